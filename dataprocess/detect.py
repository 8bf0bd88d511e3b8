"""Detect the format of raw records from the keys of the first ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from config import CAPTION_FORMATS, InputError, SourceConfig, choose, shortened
from dataprocess.readers import CAPTION_COLUMNS, FORMATS, IMAGE_COLUMNS, Draft
from dataset.json_stream import Item

# With one of these keys a "text" is a caption or a part of a conversation, not a record of plain text.
BESIDE_A_TEXT = {
    *IMAGE_COLUMNS,
    "picture",
    "images",
    "conversations",
    "messages",
    "texts",
    "question",
    "answer",
    "annotation",
}


def reader_for(source: SourceConfig, file: Path, items: list[Item]) -> Callable[[dict, int], Draft]:
    """The reader for a source's format, detected from `items`, the first records of `file`, if the format is "auto".

    Raises InputError if no format or several formats match, or a table lacks the required columns.
    """
    name = detect(source, file, items) if source.format == "auto" else source.format
    if source.captions == "one_per_epoch" and name not in CAPTION_FORMATS:
        raise InputError(
            f'source "{source.name}": captions: one_per_epoch needs several captions per image; {file} has format '
            f"{name}, which has only one text per record."
        )
    if name == "csv":
        _check_columns(source, file, items)
    return FORMATS[name]


def check_format(source: SourceConfig) -> None:
    """Raise InputError if the source's format does not exist."""
    choose(FORMATS | {"auto": None}, source.format, f'source "{source.name}": format')


def detect(source: SourceConfig, file: Path, items: list[Item]) -> str:
    """The name of the only format that fits the keys of `items`.

    Raises InputError if no format or several formats fit.
    """
    objects = [item.value for item in items if isinstance(item.value, dict)]
    found = set().union(*map(_by_keys, objects))
    if not found:  # records without images, which look the same in several formats
        found = {format for format in map(_of_text, objects) if format}
    if len(found) == 1:
        return found.pop()
    keys = sorted({str(key) for obj in objects for key in obj})
    says = f"could be {' or '.join(sorted(found))}" if found else "is unknown"
    raise InputError(
        f'source "{source.name}": the format of {file} {says}: its records have the keys '
        f"{shortened(', '.join(keys)) or '(none)'}. Set it in data.sources, for example format: "
        f"{min(found, default='llava')}. Known: {', '.join(FORMATS)}."
    )


def _by_keys(obj: dict) -> set[str]:
    """The formats that an object's keys fit: usually one; none for a record without images."""
    found: set[str] = set()
    turn_keys = _turn_keys(obj)
    if turn_keys and obj.get("image") is not None:
        found.add("llava" if "from" in turn_keys else "chat")
    if turn_keys and "image" not in obj and isinstance(obj.get("images"), list):
        found.add("messages")
    if obj.get("conversations") and ("image_bytes" in obj or isinstance(obj["conversations"], str)):
        found.add("chat")
    if isinstance(obj.get("messages"), list):
        found.add("messages")
    texts = obj.get("texts")
    if isinstance(texts, list) and texts and isinstance(texts[0], dict) and {"user", "assistant"} <= texts[0].keys():
        found.add("cauldron")
    if isinstance(obj.get("image_id"), str) and isinstance(obj.get("caption"), list):
        found.add("ai_challenger")
    if "captions" in obj and isinstance(obj.get("image"), dict) or obj.keys() == {"annotation"}:
        found.add("coco_captions")
    if obj.keys() in ({"picture", "text"}, {"picture"}, {"text_file"}):
        found.add("folder")
    if _is_row(obj):
        found.add("csv")
    if isinstance(obj.get("text"), str) and not obj.keys() & BESIDE_A_TEXT:
        found.add("text")
    return found


def _turn_keys(obj: dict) -> set[str]:
    """The keys of the first turn of a conversation; empty if there is none."""
    turns = obj.get("conversations")
    return set(turns[0]) if isinstance(turns, list) and turns and isinstance(turns[0], dict) else set()


def _of_text(obj: dict) -> str | None:
    """The format of a conversation without images."""
    keys = _turn_keys(obj)
    return ("llava" if "from" in keys else "chat") if keys else None


def _is_row(obj: dict) -> bool:
    """True if an object has the columns of a table with questions or captions."""
    named = any(isinstance(obj.get(name), str) for name in IMAGE_COLUMNS)
    asked = {"question", "answer"} <= obj.keys()
    return named and (asked or any(isinstance(obj.get(name), str) for name in CAPTION_COLUMNS))


def _check_columns(source: SourceConfig, file: Path, items: list[Item]) -> None:
    columns = next((item.value.keys() for item in items if isinstance(item.value, dict)), ())
    says = {"question", "answer"} <= set(columns) or any(name in columns for name in CAPTION_COLUMNS)
    if says and any(name in columns for name in IMAGE_COLUMNS):
        return
    raise InputError(
        f'source "{source.name}": {file} has the columns {shortened(", ".join(columns)) or "(none)"}; expected one of '
        f"{', '.join(IMAGE_COLUMNS)}, and question with answer, or one of {', '.join(CAPTION_COLUMNS)}."
    )
