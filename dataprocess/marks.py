"""Positions of images in a text: marks and parts, and the repairs of a record whose marks and images disagree.

Works on turns {"role", "content"} of the QA format. This module knows nothing about annotation formats, files or
settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dataset.record import IMAGE_MARK

Piece = str | None  # literal text, or None for an image

# Marks of other projects: Qwen2-VL, Phi-3, Llama 3.2, MMMU, InternLM-XComposer, Gemma 3, MiniCPM, llama.cpp. A number says
# which image is meant.
_foreign = re.compile(
    r"<\|vision_start\|>(?:<\|image_pad\|>)*<\|vision_end\|>|<\|image_pad\|>|<\|image\|>|<\|image_(\d+)\|>"
    r"|<image[ _-]?(\d+)>|<ImageHere>|<Image>|<IMAGE>|<start_of_image>|<image_placeholder>|<image_soft_token>"
    r"|<IMG_CONTEXT>|<__media__>"
)
_tag = re.compile(r"<img>([^<>\n]{1,4096})</img>")  # Qwen-VL writes the path of an image into the text

_runs = re.compile(rf"{IMAGE_MARK}(?:\s*{IMAGE_MARK})*").finditer  # marks with only white space between them
_space = re.compile(r"\s*").match
_line_end = re.compile(r"[ \t]*\n").match


def content_of(pieces: Sequence[Piece]) -> str | list[dict]:
    """The content of a turn: a string with a mark per image, or a list of parts if the text contains "<image>"."""
    text = "".join(IMAGE_MARK if piece is None else piece for piece in pieces)
    if text.count(IMAGE_MARK) == sum(piece is None for piece in pieces):
        return text
    parts: list[dict] = []
    for piece in pieces:
        if piece is None:
            parts.append({"type": "image"})
        elif parts and "text" in parts[-1]:
            parts[-1]["text"] += piece
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def literal(text: object, images: int = 0) -> object:
    """The content of a turn: `images` images, then `text`, in which "<image>" is plain text.

    A `text` that is not a string is returned unchanged.
    """
    if not isinstance(text, str):
        return text
    if IMAGE_MARK not in text:
        return f"{IMAGE_MARK}\n" * images + text if images else text
    return content_of([None, "\n"] * images + [text])


def mark_count(turns: list[dict]) -> int:
    """Number of marks in the string contents of all turns."""
    return sum(turn["content"].count(IMAGE_MARK) for turn in turns if isinstance(turn["content"], str))


def read_foreign_marks(turns: list[dict], images: list) -> tuple[list[dict], list, list[str]]:
    """Read the marks and paths of images as other projects write them into a user's texts.

    foreign_image_marks: the marks of other projects become `<image>`, unless every image has such a mark already. Numbered
    images are put into the order of their marks. If an image has no number or several, numbers remain text.
    image_paths_in_text: `<img>a.jpg</img>`, in a record that names no other image, becomes `<image>`.
    Returns the turns, the images and the rules that were used; the same objects if none was.
    """
    asked = [turn["content"] for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)]
    if not any("<" in text for text in asked):
        return turns, images, []
    if not images and (paths := [path for text in asked for path in _tag.findall(text)]):
        return _replaced(turns, _tag), [path.strip() for path in paths], ["image_paths_in_text"]
    found = [mark for text in asked for mark in _foreign.finditer(text)]
    marks = len(found) + sum(text.count(IMAGE_MARK) for text in asked)
    if not found or (images and marks - len(found) == len(images)):
        return turns, images, []
    numbers = [int(mark[1] or mark[2] or -1) for mark in found]
    if images and max(numbers) >= 0:
        if len(found) != len(images) or len(set(numbers)) < len(numbers):  # text about images that come first
            return turns, images, []
        images = [images[sorted(numbers).index(number)] for number in numbers]
    return _replaced(turns, _foreign), images, ["foreign_image_marks"]


def _replaced(turns: list[dict], pattern: re.Pattern) -> list[dict]:
    return [
        turn | {"content": pattern.sub(IMAGE_MARK, turn["content"])}
        if turn["role"] == "user" and isinstance(turn["content"], str)
        else turn
        for turn in turns
    ]


def repair_marks(turns: list[dict], images: int) -> tuple[list[dict], list[str]] | None:
    """Make the marks fit the number of images. Returns the turns and the rules that were used; None if no rule applies.

    image_mark_added: images but no marks. The images go to the start of the first question.
    extra_image_marks_removed, image_mark_kept_as_text: one image and several marks. The first mark is the image.
    Another mark is removed if it is alone on its line or at either end of its text; inside a sentence it is kept as
    text.
    """
    asked = [turn for turn in turns if turn["role"] == "user"]
    if images and asked and mark_count(turns) == 0 and isinstance(asked[0]["content"], str):
        shown = {**asked[0], "content": f"{IMAGE_MARK}\n" * images + asked[0]["content"]}
        return [shown if turn is asked[0] else turn for turn in turns], ["image_mark_added"]
    if images != 1 or mark_count(asked) < 2 or not all(isinstance(turn["content"], str) for turn in asked):
        return None
    repaired: list[dict] = []
    rules: set[str] = set()
    has_image = False
    for turn in turns:
        if turn["role"] == "user" and IMAGE_MARK in turn["content"]:
            turn = {**turn, "content": _without_extra_marks(turn["content"], has_image, rules)}
            has_image = True
        repaired.append(turn)
    return repaired, sorted(rules)


def _without_extra_marks(text: str, has_image: bool, rules: set[str]) -> str | list[dict]:
    """`text` with one image at its first mark (with none if `has_image`); adds the rules that were used to `rules`."""
    pieces: list[Piece] = []
    at = 0  # the text before this position is in the pieces
    for number, run in enumerate(_runs(text)):
        space = _space(text, run.end())
        assert space is not None  # the pattern also matches no space at all
        before, rest = text[at : run.start()], space.end()
        at_start = number == 0 and not before.strip()
        alone = at_start or rest == len(text) or (before.rstrip(" \t")[-1:] == "\n" and _line_end(text, run.end()))
        extra = run[0] if has_image else run[0][len(IMAGE_MARK) :]
        at = run.end()
        if not alone:
            pieces += [before, *([] if has_image else [None]), extra]
            rules |= {"image_mark_kept_as_text"} if extra else set()
        elif not has_image:
            pieces += [before, None]
            rules |= {"extra_image_marks_removed"} if extra else set()
        else:  # remove the white space before the mark as well
            pieces.append(before.rstrip())
            at = rest if at_start else at
            rules.add("extra_image_marks_removed")
        has_image = True
    return content_of([*pieces, text[at:]])
