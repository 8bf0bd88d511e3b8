"""Positions of images in a text: marks and parts, and the repairs of a record whose marks and images disagree.

Works on turns {"role", "content"} of the QA format. This module knows nothing about annotation formats, files or
settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dataset.record import IMAGE_MARK

Piece = str | None  # literal text, or None for an image

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
