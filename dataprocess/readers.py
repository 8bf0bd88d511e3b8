"""The raw annotation formats: one function each, which reads one raw record into a draft of QA records.

A reader uses only the record: no disk, no other record, no settings. It changes text only by the repairs that it names
in the draft, and raises `RecordError` with a reason if the record does not fit the format. Rules that all formats share
(order of roles, number of marks, no empty answer) are checked by `dataset.record.check_record`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

from dataprocess.marks import Piece, content_of, literal, mark_count
from dataset.record import IMAGE_MARK, RecordError
from visual.images import IMAGE_SUFFIXES, ImageError, read_image

# Captions have no questions. Two prompts alternate, in the caption's language. "描述一下这张图片。" means "Describe this
# image.", "图片里有什么？" means "What is in the image?".
CAPTION_PROMPTS = ("描述一下这张图片。", "图片里有什么？")
ENGLISH_CAPTION_PROMPTS = ("Describe this image.", "What is in this image?")

# Names of a CSV's columns; the first one that exists is used.
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filename", "path", "image_id")
CAPTION_COLUMNS = ("caption", "text")

_ROLES = {"human": "user", "gpt": "assistant"} | {name: name for name in ("system", "user", "assistant")}
_is_chinese = re.compile("[\u3400-\u9fff]").search


class Draft(NamedTuple):
    """A raw record in the terms of the QA format.

    If there are several conversations, the reader must check that each has an answer in valid UTF-8.
    """

    id: str | None  # None if the record has no id; its number in the source is used instead
    images: list  # paths relative to the source's image folder, or the bytes of images
    conversations: list  # lists of {"role", "content"}; more than one only if the format gives several answers
    type: str = ""
    repairs: Sequence[str] = ()


_draft = partial(tuple.__new__, Draft)  # takes a tuple of the five fields; half the cost of the constructor


def read_llava(obj: dict, index: int) -> Draft:
    """LLaVA's instruction files (detail_23k, complex_reasoning_77k, conversation_58k, mix665k):

    {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}. A record without "image" is text only.
    """
    name, image = obj.get("id"), obj.get("image")
    return _draft(
        (
            name if name.__class__ is str and name else _id(obj),
            [image] if image.__class__ is str and image else _images(obj),
            [_turns(obj.get("conversations"))],
            _type(obj) if "type" in obj else "",
            (),
        )
    )


def read_chat(obj: dict, index: int) -> Draft:
    """SVLM-Data and minimind-v: {"image", "conversations": [{"role", "content"}]}.

    "image" may be several paths joined by commas ("0.jpg, 1.jpg"). It is split if there are several marks, or if there
    is no mark and every part is the name of an image file. The parquet files have conversations as JSON text, images in
    "image_bytes", and a black image of 8 x 8 pixels in records that are text only.
    """
    turns, images = _turns(obj.get("conversations")), _images(obj)
    repairs: Sequence[str] = ()
    if len(images) == 1:
        image = images[0]
        if isinstance(image, str) and "," in image:
            paths, marks = [path.strip() for path in image.split(",")], mark_count(turns)
            names = [path.lower().endswith(tuple(IMAGE_SUFFIXES)) for path in paths]
            if marks > 1 or (marks == 0 and all(names)):
                images, repairs = paths, ["comma_joined_images_split"]
        elif isinstance(image, bytes) and mark_count(turns) == 0 and _is_black_placeholder(image):
            images, repairs = [], ["black_placeholder_dropped"]
    return Draft(id=_id(obj), images=images, conversations=[turns], type=_type(obj), repairs=repairs)


def read_messages(obj: dict, index: int) -> Draft:
    """messages / ShareGPT (LLaMA-Factory, TRL, ms-swift):

    {"messages" | "conversations": [{"role", "content"}], "images": [...]}, optionally with "system", a prompt. A
    content is a string, with marks in a user's turns, or a list of parts. A part may name its own image; the other
    parts take the next one of "images".
    """
    raw = obj.get("conversations") if obj.get("messages") is None else obj["messages"]
    turns: list[dict] = []
    wanted: list = []  # for each mark or image part: its own image, or None for the next one of "images"
    for turn in _turns(raw):
        content = turn["content"]
        if isinstance(content, list):
            pieces, own_images = _pieces(content)
            content = content_of(pieces)
            wanted += own_images
        elif isinstance(content, str) and turn["role"] == "user":
            wanted += [None] * content.count(IMAGE_MARK)
        turns.append({"role": turn["role"], "content": content})
    if obj.get("system") and turns and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": obj["system"]})
    listed = iter(_images(obj))
    images = [next(listed, None) if own is None else own for own in wanted]
    images = [image for image in images if image is not None] + list(listed)
    return Draft(id=_id(obj), images=images, conversations=[turns], type=_type(obj))


def read_cauldron(obj: dict, index: int) -> Draft:
    """the_cauldron and FineVision: {"images": [...], "texts": [{"user", "assistant", ...}]}.

    There are no marks; all images come before the first question.
    """
    texts, images = obj.get("texts"), _images(obj)
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise RecordError("wrong_type", '"texts" is missing or not a list of objects.')
    turns = []
    for number, text in enumerate(texts):
        turns += _question(text.get("user"), text.get("assistant"), 0 if number else len(images))
    return Draft(_id(obj), images, [turns])


def read_ai_challenger(obj: dict, index: int) -> Draft:
    """AI Challenger's image captions: {"image_id": "a.jpg", "caption": [five sentences]}.

    Each caption answers a prompt. The prompts alternate over captions and records, and empty captions are left out.
    """
    name = obj.get("image_id")
    if not isinstance(name, str):
        raise RecordError("wrong_type", '"image_id" is missing; expected the image\'s file name.')
    return _captioned(name=name, image=name, captions=obj.get("caption"), index=index)


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
    if not obj.get("captions"):
        raise RecordError("no_answer", f"{image['file_name']}: no annotation says anything about this image.")
    return _captioned(name=_id(image), image=image["file_name"], captions=obj["captions"], index=index)


def read_csv(obj: dict, index: int) -> Draft:
    """A row of a table: the path of an image, and a question with its answer or a caption.

    There are no marks. A row with a question and without a path is text only.
    """
    path = next((obj[name] for name in IMAGE_COLUMNS if name in obj), None)
    images = [] if path is None or path == "" else [path]
    if "question" in obj and "answer" in obj:
        turns = _question(obj["question"], obj["answer"], len(images))
        return Draft(id=_id(obj), images=images, conversations=[turns], type=_type(obj))
    caption = next((obj[name] for name in CAPTION_COLUMNS if name in obj), None)
    if not isinstance(caption, str):
        raise RecordError("wrong_type", "neither a question with its answer nor a caption.")
    if not images:
        raise RecordError("missing_image", "a caption without the path of its image.")
    return Draft(id=_id(obj), images=images, conversations=[_caption(caption, index)], type=_type(obj))


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
    return Draft(image, [image], [_caption(text.strip(), index)])


def read_text(obj: dict, index: int) -> Draft:
    """A plain text for training a language model from scratch: {"text": "..."} (minimind's pretrain_hq.jsonl)."""
    text = obj.get("text")
    if not isinstance(text, str):
        raise RecordError("wrong_type", '"text" is missing or no text.')
    turns = [{"role": "text", "content": literal(text)}]
    return Draft(id=_id(obj), images=[], conversations=[turns], type=_type(obj))


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


def _turns(turns: object) -> list[dict]:
    """Turns as {"role", "content"}, from such turns, from {"from", "value"}, or from JSON text of either."""
    if type(turns) is list:
        try:  # a fast path for valid turns
            if turns and "from" in turns[0]:
                return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
            return [{"role": _ROLES[turn["role"]], "content": turn["content"]} for turn in turns]
        except (KeyError, TypeError):
            pass
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise RecordError("wrong_type", f'"conversations" is text that is not JSON: {error}.') from None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("wrong_type", "the conversation is missing or not a list of objects.")
    return [
        {"role": _role(turn.get("from", turn.get("role"))), "content": turn.get("value", turn.get("content"))}
        for turn in turns
    ]


def _role(name: object) -> object:
    return _ROLES.get(name, name) if isinstance(name, str) else name


def _pieces(parts: list) -> tuple[list[Piece], list]:
    """The pieces of a content, and for each image among them the path or bytes that its part names, or None."""
    pieces: list[Piece] = []
    own_images: list[str | bytes | None] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url"):
            named = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None)
            if kind == "image_url" and isinstance(named, dict):
                named = named.get("url")
            pieces.append(None)
            own_images.append(None if named is None else _image(named, kind))
        else:
            raise RecordError("wrong_type", f'a part {part!r:.60}; expected {{"type": "text" or "image", ...}}.')
    return pieces, own_images


def _question(question: object, answer: object, images: int) -> list[dict]:
    """A question with its answer. The images come first, and "<image>" in the texts is plain text."""
    return [
        {"role": "user", "content": literal(question, images)},
        {"role": "assistant", "content": literal(answer)},
    ]


# One object per prompt, shared by all captions.
_PROMPT_TURNS, _ENGLISH_PROMPT_TURNS = (
    [{"role": "user", "content": f"{IMAGE_MARK}\n{prompt}"} for prompt in prompts]
    for prompts in (CAPTION_PROMPTS, ENGLISH_CAPTION_PROMPTS)
)


def _caption(caption: str, number: int) -> list[dict]:
    """A caption as the answer to a prompt in its language; the two prompts alternate with `number`."""
    prompts = _PROMPT_TURNS if _is_chinese(caption) else _ENGLISH_PROMPT_TURNS
    return [prompts[number % 2], {"role": "assistant", "content": literal(caption)}]


def _captioned(*, name: str | None, image: str, captions: object, index: int) -> Draft:
    """One conversation for each caption that has any text."""
    if not isinstance(captions, list):
        raise RecordError("wrong_type", f'"caption" is {type(captions).__name__}; expected a list of texts.')
    try:
        text = "\n".join(captions)
        text.encode()
    except TypeError:
        raise RecordError("wrong_type", f'"caption" holds {captions!r:.40}; expected a list of texts.') from None
    except UnicodeEncodeError:
        raise RecordError("bad_unicode", "a caption contains an unpaired surrogate, not a valid character.") from None
    conversations = [  # the first character decides the language of most captions, without the slower search
        [
            (_PROMPT_TURNS if "\u3400" <= caption < "\ua000" or _is_chinese(caption) else _ENGLISH_PROMPT_TURNS)[
                number % 2
            ],
            {"role": "assistant", "content": caption},
        ]
        for number, caption in enumerate(captions, start=index)
        if caption and not caption.isspace()
    ]
    if IMAGE_MARK in text:
        for _, answer in conversations:
            answer["content"] = literal(answer["content"])
    if not conversations:
        raise RecordError("empty_answer", "no caption has any text.")
    repairs = ["empty_captions_left_out"] if len(conversations) < len(captions) else ()
    return _draft((name, [image], conversations, "", repairs))


def _id(obj: dict) -> str | None:
    name = obj.get("id")
    if name is None or isinstance(name, str):
        return name or None
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    raise RecordError("wrong_type", f'"id" is {type(name).__name__}; expected text or a whole number.')


def _type(obj: dict) -> str:
    kind = obj.get("type") or ""
    if isinstance(kind, str):
        return kind
    raise RecordError("wrong_type", f'"type" is {type(kind).__name__}; expected text.')


def _images(obj: dict) -> list:
    """The images in "image", "images" or "image_bytes".

    A record with other media is refused: without them it would become a different record, about text only.
    """
    image = obj.get("image")
    if image:
        return [image] if type(image) is str else _each_image(image if isinstance(image, list) else [image], "image")
    for key in ("images", "image_bytes"):
        if images := obj.get(key):
            return _each_image([images] if isinstance(images, (bytes, dict)) else images, key)
    if obj.get("video"):
        raise _unsupported("video")
    return []


def _each_image(images: object, key: str) -> list:
    if not isinstance(images, list):
        raise _unsupported(key)
    return [_image(image, key) for image in images]


def _image(image: object, key: str) -> str | bytes:
    """A path or bytes, alone or in the {"bytes", "path"} of parquet tables."""
    if isinstance(image, dict):
        data = image.get("bytes")
        image = image.get("path") if data is None else data if isinstance(data, bytes) else None
    if isinstance(image, bytes) or (isinstance(image, str) and key != "image_bytes"):
        return image
    raise _unsupported(key)


def _unsupported(key: str) -> RecordError:
    return RecordError(
        "wrong_type", f'"{key}" is not read; expected "image" with the path of a file, or a list of paths.'
    )


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
