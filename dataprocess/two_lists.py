"""Stream JSON objects of two lists, in which records are split over both: COCO's captions, VQAv2's questions and answers.

Nothing large is read into memory at once, except for the texts of one of the lists.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import ijson

from config import InputError
from config.files import open_regular
from dataprocess.keys import has_content, is_metadata
from dataprocess.tables import item_of
from dataset.json_stream import Item

DEEPEST = 64  # largest depth of nesting in such a file; a valid file has at most five levels
_OF_ANSWERS = ("question_id", "question_type", "multiple_choice_answer")
_CAPTION_KEYS = frozenset(("id", "image_id", "caption"))
LONGEST_TOKEN = 1 << 20  # bytes of one string, number or blank in such a file


def two_lists_reader(file: Path) -> Callable[[Path], Iterator[Item]] | None:
    """The function that reads a file whose first object is COCO's or VQAv2's; None for another file."""
    has_annotations = False
    try:
        for depth, key, event, value in _events(file):
            if depth == 2 and event == "start_array":
                if key == "questions":
                    return vqa_items
                has_annotations = has_annotations or key == "annotations"
            if depth == 3 and event == "map_key" and key == "annotations" and value in _OF_ANSWERS:
                return vqa_items
            if depth == 2 and event == "end_map" and has_annotations:  # the first annotation
                return coco_items
            if depth == 3 and event == "map_key" and key == "images" and value == "file_name":
                return coco_items
            if depth == 0:
                break
    except (ijson.JSONError, UnicodeDecodeError):
        pass
    return coco_items if has_annotations else None


def _events(file: Path) -> Iterator[tuple[int, str | None, str, object]]:
    """Yield ijson's events of a file's first value: (depth after the event, key of the outer object, event, value).

    ijson's own prefixes are not used, because their cost grows with the square of the depth.
    """
    depth, key = 0, None
    with open_regular(file) as opened:
        _skip_bom(opened)
        bounded = _Bounded(opened)
        # Numbers as floats: an integer with thousands of digits would end the process (ijson 3.6).
        for event, value in ijson.basic_parse(bounded, use_float=True, multiple_values=True):
            bounded.left = LONGEST_TOKEN
            depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
            if depth > DEEPEST:
                raise ijson.JSONError(f"nested more than {DEEPEST} deep")
            if depth == 1 and event == "map_key":
                key = value
            yield depth, key, event, value


class _Bounded:
    """A file that can be read up to `left` bytes further: ijson takes quadratic time for a long string."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, LONGEST_TOKEN

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ijson.JSONError(f"a text, number or blank of more than {LONGEST_TOKEN:,} bytes")
        return data


def coco_items(file: Path) -> Iterator[Item]:
    """Yield every image with its captions, then the annotations whose image is not in the file.

    A record is {"image", "captions"}, with "others", the content of unknown keys of its annotations, if there is any; or
    {"annotation"}. Keeps all captions in memory.
    """
    captions: dict[object, list] = {}
    others: dict[object, dict] = {}
    for annotation in _list_of(file, "annotations"):
        name = _image_id(annotation)
        captions.setdefault(name, []).append(annotation.get("caption") if isinstance(annotation, dict) else None)
        if isinstance(annotation, dict) and not annotation.keys() <= _CAPTION_KEYS:
            unread = {key: value for key, value in annotation.items() if key not in _CAPTION_KEYS}
            if any(has_content(value) and not is_metadata(key) for key, value in unread.items()):
                others.setdefault(name, {}).update(unread)
    index = -1
    for index, image in enumerate(_list_of(file, "images")):
        name = image.get("id") if isinstance(image, dict) else None
        is_name = isinstance(name, (int, str))
        value = {"image": image, "captions": captions.pop(name, []) if is_name else []}
        yield item_of(index, value | {"others": others[name]} if is_name and name in others else value)
    if captions:
        orphans = (one for one in _list_of(file, "annotations") if _image_id(one) in captions)
        for number, annotation in enumerate(orphans, start=index + 1):
            yield item_of(number, {"annotation": annotation})


def vqa_items(file: Path) -> Iterator[Item]:
    """Yield VQAv2's questions with their answers: {"question_id", "image", "question", "answer", ...}.

    The questions are in a file of their own, beside that of the answers. The image is COCO's of this number. Keeps all
    questions in memory. Questions without an answer follow at the end.
    """
    asked: dict[object, dict] = {}
    for question in _list_of(_questions_file(file), "questions"):
        if isinstance(question, dict) and isinstance(question.get("question_id"), (int, str)):
            asked[question["question_id"]] = question
    index = -1
    for index, annotation in enumerate(_list_of(file, "annotations")):
        name = annotation.get("question_id") if isinstance(annotation, dict) else None
        question = asked.pop(name, {}) if isinstance(name, (int, str)) else {}
        yield item_of(index, _with_image(question | annotation) if isinstance(annotation, dict) else annotation)
    for number, question in enumerate(asked.values(), start=index + 1):
        yield item_of(number, _with_image(question))


def _with_image(record: dict) -> dict:
    """A question with the file name of COCO's image instead of the image's number."""
    number = record.get("image_id")
    if isinstance(number, int) and "image" not in record and 0 <= number < 10**12:
        return {"id": str(record.get("question_id")), **record, "image": f"{number:012d}.jpg"}
    return record


def _questions_file(file: Path) -> Path:
    """The file with the questions to a file of answers: itself, or the one of VQAv2's name for it beside it."""
    if next(_list_of(file, "questions"), None) is not None:
        return file
    name = file.name.replace("annotations", "questions")
    for wanted in (name, name.replace("v2_", "v2_OpenEnded_"), f"OpenEnded_{name}"):
        if wanted != file.name and (file.parent / wanted).is_file():
            return file.parent / wanted
    raise InputError(
        f"{file}: answers to questions that are in another file; put that beside it, with the name "
        f"{name.replace('v2_', 'v2_OpenEnded_')}."
    )


def _image_id(annotation: object) -> int | str | None:
    name = annotation.get("image_id") if isinstance(annotation, dict) else None
    return name if isinstance(name, (int, str)) else None


def _list_of(file: Path, name: str) -> Iterator[object]:
    builder = ijson.ObjectBuilder()
    try:
        for depth, key, event, value in _events(file):
            if key == name and depth >= 2 and not (depth == 2 and event == "start_array"):
                builder.event(event, value)
                if depth == 2:
                    yield builder.value
                    builder = ijson.ObjectBuilder()
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InputError(f'{file}: malformed JSON in "{name}" ({error}); expected a whole file.') from None


def _skip_bom(file: BinaryIO) -> None:
    file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
