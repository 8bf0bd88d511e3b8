"""The raw annotation formats: one function each, which reads one raw record into a draft of QA records.

A reader uses only the record: no disk, no other record, no settings. It changes text only by the repairs that it names
in the draft, and raises `RecordError` with a reason if the record does not fit the format, or has content under a key that
the reader does not use. Rules that all formats share (order of roles, number of marks, no empty answer) are checked by
`dataset.record.check_record`. `dataprocess.rows` reads tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from dataprocess.keys import IMAGE_KEYS, QUESTION_NAMES, is_empty, refuse_unread, shown
from dataprocess.marks import content_of, literal, mark_count, read_foreign_marks
from dataprocess.media import images_of
from dataprocess.rows import (
    Draft,
    captioned,
    draft,
    one_caption,
    question_with_answer,
    read_csv,
    record_id,
    record_type,
)
from dataprocess.turns import pieces_of, read_turns
from dataset.record import IMAGE_MARK, RecordError
from visual.images import IMAGE_SUFFIXES, ImageError, read_image

_SIMPLE_KEYS = frozenset(("id", "image", "conversations"))  # of nearly all LLaVA records
_CHAT_KEYS = frozenset((*IMAGE_KEYS, *QUESTION_NAMES, "id", "type", "system", "system_prompt"))
_CAULDRON_KEYS = frozenset((*IMAGE_KEYS, "id", "type", "texts"))
_CAULDRON_TEXT_KEYS = frozenset(("user", "assistant", "source"))
_COCO_KEYS = frozenset(("id", "file_name", "image_id", "caption"))
_AI_CHALLENGER_KEYS = frozenset(("image_id", "caption", "url", "id"))
_TEXT_KEYS = frozenset(("id", "text", "type"))


def read_llava(obj: dict, index: int) -> Draft:
    """LLaVA's instruction files (detail_23k, complex_reasoning_77k, conversation_58k, mix665k):

    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}. A record without "image" is text only.
    """
    if obj.keys() == _SIMPLE_KEYS:  # a fast path for nearly all records
        name, image, turns = obj["id"], obj["image"], read_turns(obj["conversations"])
        first = turns[0]["content"] if turns else None
        if name.__class__ is image.__class__ is first.__class__ is str and image and name and IMAGE_MARK in first:
            return draft((name, [image], [turns], "", (), False))
    return _read_conversation(obj, "conversations")


def read_chat(obj: dict, index: int) -> Draft:
    """SVLM-Data and minimind-v: {"image", "conversations": [{"role", "content"}]}.

    "image" may be several paths joined by commas ("0.jpg, 1.jpg"). It is split if there are several marks, or if there
    is no mark and every part is the name of an image file. The parquet files have conversations as JSON text, images in
    "image_bytes", and a black image of 8 x 8 pixels in records that are text only.
    """
    read = _read_conversation(obj, "conversations")
    if len(read.images) == 1:
        image, (turns,) = read.images[0], read.conversations
        if isinstance(image, str) and "," in image and not image.startswith("data:"):
            paths, marks = [path.strip() for path in image.split(",")], mark_count(turns)
            names = [path.lower().endswith(tuple(IMAGE_SUFFIXES)) for path in paths]
            if marks > 1 or (marks == 0 and all(names)):
                return read._replace(images=paths, repairs=[*read.repairs, "comma_joined_images_split"])
        elif isinstance(image, bytes) and mark_count(turns) == 0 and _is_black_placeholder(image):
            return read._replace(images=[], repairs=[*read.repairs, "black_placeholder_dropped"])
    return read


def read_messages(obj: dict, index: int) -> Draft:
    """messages / ShareGPT (LLaMA-Factory, TRL, ms-swift, OpenAI):

    {"messages" | "conversations": [{"role", "content"}], "images": [...]}, optionally with "system", a prompt. A
    content is a string, with marks in a user's turns, or a list of parts. A part may name its own image; the other
    parts take the next one of "images".
    """
    is_older = is_empty(obj.get("messages")) and not is_empty(obj.get("conversations"))
    return _read_conversation(obj, "conversations" if is_older else "messages")


def _read_conversation(obj: dict, key: str) -> Draft:
    """Read the conversation under `key` with its images and its system prompt."""
    turns = read_turns(obj.get(key))
    wanted: list = []  # for each mark or image part: its own image, or None for the next one of the record's images
    for turn in turns:
        content = turn["content"]
        if isinstance(content, list):
            pieces, own_images = pieces_of(content)
            turn["content"] = content_of(pieces)
            wanted += own_images
        elif isinstance(content, str) and turn["role"] == "user":
            wanted += [None] * content.count(IMAGE_MARK)
    _add_system(turns, obj)
    images: list = images_of(obj)
    repairs: list[str] = []
    if any(image is not None for image in wanted):
        listed = iter(images)
        images = [next(listed, None) if own is None else own for own in wanted]
        images = [image for image in images if image is not None] + list(listed)
    elif len(wanted) != len(images) or not images:
        turns, images, repairs = read_foreign_marks(turns, images)
    refuse_unread(obj, _CHAT_KEYS | {key}, has_image=bool(images))
    return Draft(record_id(obj), images, [turns], type=record_type(obj), repairs=repairs)


def _add_system(turns: list[dict], obj: dict) -> None:
    """Put the system prompt of a record before its turns."""
    prompts = [obj[key] for key in ("system", "system_prompt") if key in obj and not is_empty(obj[key])]
    if turns and turns[0]["role"] == "system":
        prompts.append(turns[0]["content"])
    elif prompts:
        turns.insert(0, {"role": "system", "content": prompts[0]})
    if any(prompt != prompts[0] for prompt in prompts):
        raise RecordError("unknown_key", f"two system prompts, one of them {shown(prompts[0])}; keep one.")


def read_cauldron(obj: dict, index: int) -> Draft:
    """the_cauldron and FineVision: {"images": [...], "texts": [{"user", "assistant", ...}]}.

    There are no marks; all images come before the first question.
    """
    texts, images = obj.get("texts"), images_of(obj)
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise RecordError("wrong_type", '"texts" is missing or not a list of objects.')
    turns = []
    for number, text in enumerate(texts):
        refuse_unread(text, _CAULDRON_TEXT_KEYS, has_image=bool(images))
        turns += question_with_answer(text.get("user"), text.get("assistant"), 0 if number else len(images))
    refuse_unread(obj, _CAULDRON_KEYS, has_image=bool(images))
    return Draft(record_id(obj), images, [turns], type=record_type(obj))


def read_ai_challenger(obj: dict, index: int) -> Draft:
    """AI Challenger's image captions: {"image_id": "a.jpg", "caption": [five sentences]}.

    Each caption answers a prompt. The prompts alternate over captions and records, and empty captions are left out.
    """
    if not obj.keys() <= _AI_CHALLENGER_KEYS:
        refuse_unread(obj, _AI_CHALLENGER_KEYS, has_image=True)
    name = obj.get("image_id")
    if not isinstance(name, str):
        raise RecordError("wrong_type", '"image_id" is missing; expected the image\'s file name.')
    return captioned(name=name, images=[name], captions=obj.get("caption"), index=index)


def read_coco_captions(obj: dict, index: int) -> Draft:
    """COCO's captions, one image with all its captions: {"image": {"id", "file_name"}, "captions": [...]}."""
    if "annotation" in obj:
        annotation = obj["annotation"]
        name = annotation.get("image_id") if isinstance(annotation, dict) else None
        raise RecordError("missing_image", f'an annotation about image_id {name!r:.40}, which "images" does not list.')
    image = obj.get("image")
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        raise RecordError(
            "wrong_type", 'expected COCO\'s object {"images": [{"id", "file_name"}], "annotations": [...]}.'
        )
    refuse_unread({**image, **obj.get("others", {})}, _COCO_KEYS, has_image=True)
    if not obj.get("captions"):
        raise RecordError("no_answer", f"{image['file_name']}: no annotation says anything about this image.")
    return captioned(name=record_id(image), images=[image["file_name"]], captions=obj["captions"], index=index)


def read_folder(obj: dict, index: int) -> Draft:
    """An image with the text of the .txt file of the same name: {"picture": path, "text": ...}. A text may be the
    RecordError that reading the file gave."""
    image, text = obj.get("picture"), obj.get("text")
    if not isinstance(image, str):
        raise RecordError("missing_image", f"{obj.get('text_file')}: no image of that name beside it.")
    if isinstance(text, RecordError):  # it could not be read
        raise text
    if not isinstance(text, str):
        raise RecordError("no_answer", f"{image}: no .txt file of that name beside it.")
    return Draft(image, [image], [one_caption(text.strip(), index)])


def read_text(obj: dict, index: int) -> Draft:
    """A plain text for training a language model from scratch: {"text": "..."} (minimind's pretrain_hq.jsonl)."""
    text = obj.get("text")
    if not isinstance(text, str):
        raise RecordError("wrong_type", '"text" is missing or no text.')
    refuse_unread(obj, _TEXT_KEYS, has_image=False)
    turns = [{"role": "text", "content": literal(text)}]
    return Draft(id=record_id(obj), images=[], conversations=[turns], type=record_type(obj))


FORMATS: dict[str, Callable[[dict, int], Draft]] = {
    "llava": read_llava,
    "chat": read_chat,
    "messages": read_messages,
    "cauldron": read_cauldron,
    "ai_challenger": read_ai_challenger,
    "coco_captions": read_coco_captions,
    "csv": read_csv,
    "folder": read_folder,
    "text": read_text,
}


def _is_black_placeholder(data: bytes) -> bool:
    if len(data) > 4096:
        return False
    try:
        image = read_image(data)
    except ImageError:
        return False
    if image.size != (8, 8):
        return False
    extrema = cast(tuple[tuple[int, int], ...], image.getextrema())  # of an RGB image: (low, high) per channel
    return max(high for _, high in extrema) < 8  # black in a JPEG is not exactly 0
