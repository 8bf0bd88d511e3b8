"""Where a picture stands in a text: marks and parts, and the two repairs of a row whose marks and pictures disagree.

Works on turns {"role", "content"} of the QA format; knows no annotation format, no file and no setting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dataset.record import IMAGE_MARK

Piece = str | None  # literal text, or a picture

_runs = re.compile(rf"{IMAGE_MARK}(?:\s*{IMAGE_MARK})*").finditer  # marks with nothing but white space between them
_space = re.compile(r"\s*").match
_line_end = re.compile(r"[ \t]*\n").match


def content_of(pieces: Sequence[Piece]) -> str | list[dict]:
    """The content of a turn: a string with a mark per picture; a list of parts where the text itself says "<image>"."""
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
    """Text without a mark convention as the content of a turn, after `images` pictures. What is no text is left alone."""
    if not isinstance(text, str):
        return text
    if IMAGE_MARK not in text:
        return f"{IMAGE_MARK}\n" * images + text if images else text
    return content_of([None, "\n"] * images + [text])


def mark_count(turns: list[dict]) -> int:
    """Marks in the strings of all turns."""
    return sum(turn["content"].count(IMAGE_MARK) for turn in turns if isinstance(turn["content"], str))


def repair_marks(turns: list[dict], images: int) -> tuple[list[dict], list[str]] | None:
    """Turns whose marks fit the number of images, and the rules that were needed; None where no rule applies.

    image_mark_added: pictures and no mark at all; they are shown at the start of the first question.
    extra_image_marks_removed, image_mark_kept_as_text: one picture and several marks. The first mark is the picture;
    another one is removed where it stands alone on its line or at an end of its text, and inside a sentence it is text.
    """
    asked = [turn for turn in turns if turn["role"] == "user"]
    if images and asked and mark_count(turns) == 0 and isinstance(asked[0]["content"], str):
        shown = {**asked[0], "content": f"{IMAGE_MARK}\n" * images + asked[0]["content"]}
        return [shown if turn is asked[0] else turn for turn in turns], ["image_mark_added"]
    if images != 1 or mark_count(asked) < 2 or not all(isinstance(turn["content"], str) for turn in asked):
        return None
    repaired, rules, shown = [], set(), False
    for turn in turns:
        if turn["role"] == "user" and IMAGE_MARK in turn["content"]:
            turn = {**turn, "content": _without_extra_marks(turn["content"], shown, rules)}
            shown = True
        repaired.append(turn)
    return repaired, sorted(rules)


def _without_extra_marks(text: str, shown: bool, rules: set[str]) -> str | list[dict]:
    """`text` with one picture at its first mark (none if `shown` already); adds the rules that were needed to `rules`."""
    pieces: list[Piece] = []
    at = 0  # the text before is in the pieces
    for number, run in enumerate(_runs(text)):
        before, rest = text[at : run.start()], _space(text, run.end()).end()
        at_start = number == 0 and not before.strip()
        alone = at_start or rest == len(text) or (before.rstrip(" \t")[-1:] == "\n" and _line_end(text, run.end()))
        extra = run[0] if shown else run[0][len(IMAGE_MARK) :]
        at = run.end()
        if not alone:
            pieces += [before, *([] if shown else [None]), extra]
            rules |= {"image_mark_kept_as_text"} if extra else set()
        elif not shown:
            pieces += [before, None]
            rules |= {"extra_image_marks_removed"} if extra else set()
        else:  # the white space that led to it goes with it
            pieces.append(before.rstrip())
            at = rest if at_start else at
            rules.add("extra_image_marks_removed")
        shown = True
    return content_of([*pieces, text[at:]])
