"""Detect the format of raw records from the keys of the first ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from config import CAPTION_FORMATS, InputError, SourceConfig, choose, shortened
from dataprocess.keys import image_keys_of, is_empty
from dataprocess.readers import FORMATS
from dataprocess.rows import Draft, column_name, is_row, with_prompts
from dataset.json_stream import Item
from dataset.record import RecordError


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
    if source.prompts:
        _check_captions(source, file, name, items=items)
        return with_prompts(FORMATS[name], source.prompts)
    return FORMATS[name]


def check_format(source: SourceConfig) -> None:
    """Raise InputError if the source's format does not exist."""
    choose(FORMATS | {"auto": None}, source.format, f'source "{source.name}": format')


def detect(source: SourceConfig, file: Path, items: list[Item]) -> str:
    """The name of the only format that fits the keys of `items` and reads every key with content.

    Raises InputError if no format or several formats do.
    """
    objects = [item.value for item in items if isinstance(item.value, dict)]
    found: set[str] = set()
    unread: dict[str, str] = {}  # format -> why it does not read a record whose keys it fits
    for obj in objects:
        for name in _by_keys(obj):
            if reason := _unread(name, obj):
                unread.setdefault(name, reason)
            else:
                found.add(name)
    if not found and not unread:  # records without images, which look the same in several formats
        found = {format for format in map(_of_text, objects) if format}
    if len(found) > 1 and found <= {"llava", "chat", "messages"}:  # read alike, except for what chat adds
        return "chat" if "chat" in found else "messages"
    if len(found) == 1:
        return found.pop()
    keys = shortened(", ".join(sorted({str(key) for obj in objects for key in obj}))) or "(none)"
    if unread and not found:
        name, reason = next(iter(unread.items()))
        raise InputError(
            f'source "{source.name}": {file} looks like format {name}, but {reason} Its records have the keys {keys}.'
        )
    says = f"could be {' or '.join(sorted(found))}" if found else "is unknown"
    raise InputError(
        f'source "{source.name}": the format of {file} {says}: its records have the keys {keys}. Set it in data.sources, '
        f"for example format: {min(found, default='llava')}. Known: {', '.join(FORMATS)}."
    )


def _unread(format: str, obj: dict) -> str:
    """Why a reader drops content of a record; "" if it does not, whatever else is wrong with the record."""
    try:
        FORMATS[format](obj, 0)
    except RecordError as error:
        return error.detail if error.reason == "unknown_key" else ""
    return ""


def _by_keys(obj: dict) -> set[str]:
    """The formats that an object's keys fit: usually one; none for a conversation without images."""
    found: set[str] = set()
    has_image = any(not is_empty(obj[key]) for key in image_keys_of(obj))
    turn_keys = _turn_keys(obj)
    if turn_keys and has_image:
        if _has_parts(obj) or is_empty(obj.get("image")) and isinstance(obj.get("images"), list):
            found.add("messages")
        else:
            found.add("llava" if "from" in turn_keys else "chat")
    elif turn_keys and _has_parts(obj):
        found.add("messages")
    if obj.get("conversations") and ("image_bytes" in obj or isinstance(obj["conversations"], str)):
        found = {"chat"}
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
    if not found and not turn_keys and is_row(obj, has_image):
        found.add("csv")
    if isinstance(obj.get("text"), str) and not has_image and not found and not turn_keys:
        found.add("text")
    return found


def _turn_keys(obj: dict) -> set[str]:
    """The keys of the first turn of a conversation; empty if there is none."""
    turns = obj.get("conversations")
    return set(turns[0]) if isinstance(turns, list) and turns and isinstance(turns[0], dict) else set()


def _has_parts(obj: dict) -> bool:
    """True if the content of a turn is a list of parts."""
    return any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in obj["conversations"])


def _of_text(obj: dict) -> str | None:
    """The format of a conversation without images."""
    keys = _turn_keys(obj)
    return ("llava" if "from" in keys else "chat") if keys else None


def _check_captions(source: SourceConfig, file: Path, format: str, *, items: list[Item]) -> None:
    """Raise InputError if the source's prompts would be used for nothing, because its records have questions."""
    has_captions = format in (*CAPTION_FORMATS, "folder")
    if format == "csv":
        rows = [item.value for item in items if isinstance(item.value, dict)]
        has_captions = any("caption" in map(column_name, row) for row in rows)
    if not has_captions:
        raise InputError(
            f'source "{source.name}": prompts are questions for captions, but the records of {file} (format {format}) have '
            "their own questions; leave prompts out."
        )


def _check_columns(source: SourceConfig, file: Path, items: list[Item]) -> None:
    obj = next((item.value for item in items if isinstance(item.value, dict)), {})
    if is_row(obj, bool(image_keys_of({column_name(key): None for key in obj}))):
        return
    raise InputError(
        f'source "{source.name}": {file} has the columns {shortened(", ".join(obj)) or "(none)"}; expected one of '
        "image, image_path, file_name, path ..., and question with answer, or caption. Other names can be given in "
        "data.sources, for example columns: {image: 图片, question: 问题, answer: 答案}."
    )
