"""The raw annotation formats: one function each, from one raw JSON object to a draft of QA records.

A reader looks at nothing but the object: no disk, no other record, no settings. It changes text only by the repairs that it
names in the draft, and raises `RecordError` with a reason where the object makes no sense in its format. What the
formats have in common (roles in order, marks equal to pictures, no empty answer) is left to `dataset.record.parse_record`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from dataset.record import IMAGE_MARK, RecordError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# AI Challenger has captions but no questions: these two alternate ("Describe this image.", "What is in the image?").
CAPTION_PROMPTS = ("描述一下这张图片。", "图片里有什么？")


@dataclass(slots=True)
class Draft:
    """A raw record in our words. Paths are still relative to the source's image folder."""

    id: str | None  # None where the format has no ids: its number in the file will do
    images: list
    conversations: list  # of lists of {"role", "content"}; more than one only where the format gives several answers
    type: str = ""
    repairs: list[str] = field(default_factory=list)


def read_llava(obj: dict, index: int) -> Draft:
    """LLaVA's instruction files (detail_23k, complex_reasoning_77k, conversation_58k, mix665k):
    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}; rows without an image are text alone."""
    draft = Draft(_id(obj), _images(obj), [_turns(obj)], obj.get("type") or "")
    _add_missing_marks(draft)
    return draft


def read_chat(obj: dict, index: int) -> Draft:
    """SVLM-Data and minimind-v: {"image", "conversations": [{"role", "content"}]}. Several images may be joined in one
    string by commas ("0.jpg, 1.jpg"): split where there are several marks, or none and every part is an image's name."""
    draft = Draft(_id(obj), _images(obj), [_turns(obj)], obj.get("type") or "")
    joined = draft.images[0] if len(draft.images) == 1 else None
    if isinstance(joined, str) and "," in joined:
        paths, marks = [path.strip() for path in joined.split(",")], _mark_count(draft.conversations[0])
        if marks > 1 or (marks == 0 and all(path.lower().endswith(IMAGE_SUFFIXES) for path in paths)):
            draft.images = paths
            draft.repairs.append("comma_joined_images_split")
    _add_missing_marks(draft)
    return draft


def read_ai_challenger(obj: dict, index: int) -> Draft:
    """AI Challenger's image captions: {"image_id": "a.jpg", "caption": [five sentences]}. Each caption answers one of
    `CAPTION_PROMPTS`, which alternate over captions and records; empty captions are left out."""
    captions = obj.get("caption")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise RecordError("wrong_type", f'"caption" is {type(captions).__name__}; expected a list of texts.')
    if not isinstance(obj.get("image_id"), str):
        raise RecordError("wrong_type", '"image_id" is missing; expected the image\'s file name.')
    conversations = [
        [
            {"role": "user", "content": f"{IMAGE_MARK}\n{CAPTION_PROMPTS[(index + number) % len(CAPTION_PROMPTS)]}"},
            {"role": "assistant", "content": caption},
        ]
        for number, caption in enumerate(captions)
        if caption.strip()
    ]
    if not conversations:
        raise RecordError("empty_answer", "no caption has any text.")
    repairs = ["empty_captions_left_out"] if len(conversations) < len(captions) else []
    return Draft(obj["image_id"], [obj["image_id"]], conversations, repairs=repairs)


FORMATS: dict[str, Callable[[dict, int], Draft]] = {
    "llava": read_llava,
    "ai_challenger": read_ai_challenger,
    "chat": read_chat,
}


def _turns(obj: dict) -> list[dict]:
    """The turns by our names, from {"role", "content"} or {"from", "value"}; a table's column may hold them as JSON text."""
    turns = obj.get("conversations")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise RecordError("wrong_type", f'"conversations" is text that is not JSON: {error}.') from None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("wrong_type", '"conversations" is missing or not a list of objects.')
    return [
        {"role": _role(turn.get("role", turn.get("from"))), "content": turn.get("content", turn.get("value"))}
        for turn in turns
    ]


def _role(name: object) -> object:
    return "user" if name == "human" else "assistant" if name == "gpt" else name


def _id(obj: dict) -> str | None:
    name = obj.get("id")
    if name is None or isinstance(name, str):
        return name or None
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    raise RecordError("wrong_type", f'"id" is {type(name).__name__}; expected text or a whole number.')


def _images(obj: dict) -> list:
    """The paths in "image", or else in "images". What other keys show is refused: without it the record would be another
    one, about text alone."""
    image = obj.get("image")
    if image:
        return image if isinstance(image, list) else [image]
    images = obj.get("images")
    if isinstance(images, list) and all(isinstance(path, str) for path in images):
        return images
    for key in ("images", "image_bytes", "video"):
        if obj.get(key):
            raise RecordError(
                "wrong_type", f'"{key}" is not read; expected "image" with the path of a file, or a list of paths.'
            )
    return []


def _mark_count(turns: list[dict]) -> int:
    return sum(turn["content"].count(IMAGE_MARK) for turn in turns if isinstance(turn["content"], str))


def _add_missing_marks(draft: Draft) -> None:
    """A row with images and no mark at all shows them at the start of its first question."""
    turns = draft.conversations[0]
    first = next((turn for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)), None)
    if draft.images and first is not None and _mark_count(turns) == 0:
        first["content"] = f"{IMAGE_MARK}\n" * len(draft.images) + first["content"]
        draft.repairs.append("image_mark_added")
