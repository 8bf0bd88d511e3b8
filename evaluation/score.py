"""Score answers to the questions of a QA file, with and without the right images.

Each accuracy comes with a *blind* accuracy: that of the same questions asked about swapped images. The difference between
the two comes from the images. Images are told apart by content, so a copy under another name is the same image. Knows no
model: a function that answers is passed in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import printable
from dataset.language import language_of
from dataset.qa_file import QAFile
from dataset.record import Image, Part, parts_of
from visual.images import ImageError, image_bytes, image_state

SEARCHED = 1000  # other questions' images that are considered for a swap
READERS = 8  # threads that compare image files


@dataclasses.dataclass(frozen=True)
class Question:
    """One assistant turn of a QA record, asked as a question."""

    id: str  # of the record
    turns: tuple  # (role, parts) pairs up to the question; earlier answers are those of the record
    images: tuple[Path, ...]  # the files of all image parts, in order
    reference: str  # the record's answer
    type: str  # of the record; "" for none

    @property
    def text(self) -> str:
        """The text of the last turn, without its images."""
        return "".join(part for part in self.turns[-1][1] if isinstance(part, str)).strip()

    @property
    def language(self) -> str:
        """The language of the question itself: "en", "zh" or "other"."""
        return language_of(self.text)


Answers = Callable[[Sequence[Question]], list[str]]


def questions_of(qa: QAFile, indices: Iterable[int]) -> list[Question]:
    """Return one question for each answer that is a target in the records `indices`."""
    questions = []
    for index in indices:
        record = qa[index]
        images = qa.image_paths(record)
        turns: list[tuple[str, list[Part]]] = []
        seen = 0
        for turn in record.conversations:
            if turn.role == "assistant" and turn.is_target:
                assert isinstance(turn.content, str)  # only a user turn has parts
                questions.append(
                    Question(
                        id=record.id,
                        turns=tuple(turns),
                        images=tuple(images[:seen]),
                        reference=turn.content,
                        type=record.type,
                    )
                )
            parts = parts_of(turn)
            seen += sum(isinstance(part, Image) for part in parts)
            turns.append((turn.role, parts))
    return questions


def is_correct(answer: str, reference: str) -> bool:
    """Return whether the two are equal, except for whitespace at the ends and the form of composed characters: a tokenizer
    writes NFC, a reference may be in any form."""
    return unicodedata.normalize("NFC", answer).strip() == unicodedata.normalize("NFC", reference).strip()


def swap_images(questions: Sequence[Question], seed: int) -> list[Question | None]:
    """Return the same questions, each with the images of another question of the same type and number of images, so that
    only what the images show changes. No image of a question is among its swapped ones, under any name. None for a question
    without images, and where no other question of its kind has such images."""
    contents_of = _contents({path for question in questions for path in question.images})
    groups: dict[tuple, dict[tuple, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, question in enumerate(questions):
        contents = tuple(contents_of[path] for path in question.images)
        groups[question.type, len(question.images)][contents].append(i)
    swapped: list[Question | None] = [None] * len(questions)
    for (_, count), members in groups.items():
        if count == 0:
            continue
        paths = {contents: min(questions[i].images for i in found) for contents, found in members.items()}
        order = sorted(paths, key=paths.__getitem__)
        random.Random(seed).shuffle(order)
        for contents, other in _disjoint(order).items():
            for i in members[contents]:
                swapped[i] = dataclasses.replace(questions[i], images=paths[other])
    return swapped


def _disjoint(order: Sequence[tuple]) -> dict[tuple, tuple]:
    """Return for each tuple a following one of the circle `order` that shares no element with it: the first that no tuple
    before it got, else the first. Tuples without one among the next SEARCHED are left out."""
    found: dict[tuple, tuple] = {}
    taken: set[tuple] = set()
    for i, mine in enumerate(order):
        images = frozenset(mine)
        following = (order[(i + step) % len(order)] for step in range(1, min(len(order), SEARCHED + 1)))
        others = (other for other in following if images.isdisjoint(other))
        first = next(others, None)
        if first is None:
            continue
        found[mine] = first if first not in taken else next((other for other in others if other not in taken), first)
        taken.add(found[mine])
    return found


def _contents(paths: Collection[Path]) -> dict[Path, object]:
    """Return what identifies the content of each image. A file that no other has the size of is not read."""
    with ThreadPoolExecutor(READERS) as pool:
        sizes = dict(zip(paths, pool.map(_size, paths), strict=True))
        counts = Counter(sizes.values())
        alike = [path for path in paths if counts[sizes[path]] > 1 and sizes[path] is not None]
        return {path: str(path) for path in paths} | dict(zip(alike, pool.map(_content, alike), strict=True))


def _size(path: Path) -> int | None:
    """Return a file's size in bytes; None for a missing one."""
    try:
        return image_state(path).size
    except (OSError, ValueError):
        return None


def _content(path: Path) -> object:
    """Return a hash of a file; its path if it cannot be read."""
    try:
        return hashlib.blake2b(image_bytes(path), digest_size=16).digest()
    except ImageError:
        return str(path)


def score(questions: Sequence[Question], answers: Answers, seed: int, left_out: int = 0) -> tuple[dict, list[str]]:
    """Ask the questions with their images and with swapped ones. Returns (scores, the answers about their own images).

    left_out: how many questions more there are, which do not fit into the language model.
    scores: {"n", "accuracy", "blind", "by_type": {type: the same three}, "by_language": ..., "by_type_and_language": ...}.
    accuracy and blind are in [0, 1]; None if no question counts, for blind if no image could be swapped. Where they are not
    0, scores also has "left_out" and "not_swapped", the number of questions with images that blind does not count.
    """
    given = answers(questions)
    swapped = {i: question for i, question in enumerate(swap_images(questions, seed)) if question is not None}
    blind_answers = answers(list(swapped.values()))
    right = [is_correct(answer, q.reference) for answer, q in zip(given, questions, strict=True)]
    right_blind = {
        i: is_correct(answer, questions[i].reference) for i, answer in zip(swapped, blind_answers, strict=True)
    }

    def summary(members: Sequence[int]) -> dict:
        blind = [right_blind[i] for i in members if i in right_blind]
        return {
            "n": len(members),
            "accuracy": sum(right[i] for i in members) / len(members) if members else None,
            "blind": sum(blind) / len(blind) if blind else None,
        }

    def summaries(key: Callable[[Question], str]) -> dict:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            if key(question):  # a record without a type counts only among all
                groups[key(question)].append(i)
        return {name: summary(groups[name]) for name in sorted(groups)}

    scores = {
        **summary(range(len(questions))),
        "by_type": summaries(lambda q: q.type),
        "by_language": summaries(lambda q: q.language),
        "by_type_and_language": summaries(lambda q: q.type and f"{q.type}/{q.language}"),
    }
    not_swapped = sum(bool(question.images) for question in questions) - len(swapped)
    scores |= {name: count for name, count in (("left_out", left_out), ("not_swapped", not_swapped)) if count}
    return scores, given


def score_table(scores: dict) -> str:
    """Return the scores as a table: one line for each type, with its English and Chinese questions, then one for all; and
    a line about the questions that do not count, if any."""

    def cell(entry: dict | None, key: str) -> str:
        return "-" if not entry or entry[key] is None else f"{100 * entry[key]:.1f}"

    rows: list[tuple[str, ...]] = [("type", "n", "correct %", "blind %", "English %", "Chinese %")]
    both = scores["by_type_and_language"]
    for name, entry in scores["by_type"].items():
        languages = [cell(both.get(f"{name}/{language}"), "accuracy") for language in ("en", "zh")]
        rows.append((printable(name), str(entry["n"]), cell(entry, "accuracy"), cell(entry, "blind"), *languages))
    languages = [cell(scores["by_language"].get(language), "accuracy") for language in ("en", "zh")]
    rows.append(("all", str(scores["n"]), cell(scores, "accuracy"), cell(scores, "blind"), *languages))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 6))]) for row in rows]
    if count := scores.get("left_out"):
        lines.append(f"questions left out, because they do not fit into the language model with their answers: {count}")
    if count := scores.get("not_swapped"):
        lines.append(f"questions not in blind, because no others of their kind have other images: {count}")
    return "\n".join(lines)
