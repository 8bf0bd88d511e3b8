"""Score answers to the questions of a QA file, with and without the right images.

Each accuracy comes with a *blind* accuracy: that of the same questions asked about swapped images, and if wanted about blank
ones and without any. The difference between the two comes from the images. Images are told apart by content, so a copy under
another name is the same image. Knows no model: a function that answers is passed in.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from config import printable
from dataset.language import language_of
from dataset.qa_file import QAFile
from dataset.record import Image, Part, parts_of
from evaluation.answers import is_correct
from evaluation.blind import BLIND, blank_images, without_images
from evaluation.metrics import summarise
from visual.images import ImageError, image_bytes, image_state

SEARCHED = 1000  # other questions' images that are considered for a swap
READERS = 8  # threads that compare image files


@dataclass(frozen=True)
class Question:
    """One assistant turn of a QA record, asked as a question."""

    id: str  # of the record
    turns: tuple  # (role, parts) pairs up to the question; earlier answers are those of the record
    images: tuple[Path, ...]  # the files of all image parts, in order
    reference: str  # the record's answer
    type: str  # of the record; "" for none
    source: str = ""  # of the record
    answers: tuple[str, ...] | None = None  # of the record: all references; empty if none is known
    options: tuple[str, ...] = ()  # of the record
    group: str = ""  # of the record
    metric: str = ""  # the metric to score it by; "" for that of its type

    @property
    def references(self) -> tuple[str, ...]:
        """The answers that count as right; empty if none is known."""
        return (self.reference,) if self.answers is None else self.answers

    @property
    def unit(self) -> tuple:
        """What an interval draws as one: all questions about the same images."""
        return self.images or (self.id,)

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
        last = len(record.conversations) - 1
        turns: list[tuple[str, list[Part]]] = []
        seen = 0
        for i, turn in enumerate(record.conversations):
            if turn.role == "assistant" and turn.is_target:
                assert isinstance(turn.content, str)  # only a user turn has parts
                questions.append(
                    Question(
                        id=record.id,
                        turns=tuple(turns),
                        images=tuple(images[:seen]),
                        reference=turn.content,
                        type=record.type,
                        source=record.source,
                        answers=record.answers if i == last else None,
                        options=record.options if i == last else (),
                        group=record.group if i == last else "",
                    )
                )
            parts = parts_of(turn)
            seen += sum(isinstance(part, Image) for part in parts)
            turns.append((turn.role, parts))
    return questions


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
                swapped[i] = replace(questions[i], images=paths[other])
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


class Scored(NamedTuple):
    """scores: as `score` returns them. given: the answers. blind: kind of BLIND -> {number of a question: its answer}."""

    scores: dict
    given: list[str]
    blind: dict[str, dict[int, str]]


def score(questions: Sequence[Question], answers: Answers, seed: int, left_out: int = 0) -> tuple[dict, list[str]]:
    """Ask the questions with their images and with swapped ones. Returns (scores, the answers about their own images).

    left_out: how many questions more there are, which do not fit into the language model.
    scores: {"n", "accuracy", "blind", "by_type": {type: the same three}, "by_source": ..., "by_language": ...,
    "by_type_and_language": ..., "metrics"}. accuracy and blind are the share of exact answers, in [0, 1]; None if no
    question counts, for blind if no image could be swapped. "metrics" has the values of each question's own metric, as
    `summarise` returns them. Where they are not 0, scores also has "left_out", "not_swapped", the number of questions with
    images that blind does not count, and "no_reference", that of questions without a known answer, which have no score.
    """
    return score_blind(questions, answers, seed, left_out=left_out)[:2]


def score_blind(
    questions: Sequence[Question], answers: Answers, seed: int, left_out: int = 0, kinds: Collection[str] = ()
) -> Scored:
    """Do what `score` does, and ask about further `kinds` of BLIND: "blank", "absent". Each takes as long as the questions
    themselves."""
    given = answers(questions)
    blind_answers: dict[str, dict[int, str]] = {}
    for kind, asked in blind_questions(questions, seed, kinds):
        blind_answers[kind] = dict(zip(asked, answers(list(asked.values())), strict=True))
    known = [i for i, question in enumerate(questions) if question.references]
    right = {i: is_exact(given[i], questions[i]) for i in known}
    right_blind = {i: is_exact(answer, questions[i]) for i, answer in blind_answers["swapped"].items()}

    def summary(members: Sequence[int]) -> dict:
        swapped = [right_blind[i] for i in members if i in right_blind]
        return {
            "n": len(members),
            "accuracy": sum(right[i] for i in members) / len(members) if members else None,
            "blind": sum(swapped) / len(swapped) if swapped else None,
        }

    def summaries(key: Callable[[Question], str]) -> dict:
        groups: dict[str, list[int]] = defaultdict(list)
        for i in known:
            if name := key(questions[i]):  # a record without a type counts only among all
                groups[name].append(i)
        return {name: summary(groups[name]) for name in sorted(groups)}

    keys: dict[str, Callable[[Question], str]] = {
        "by_type": lambda q: q.type,
        "by_source": lambda q: q.source,
        "by_language": lambda q: q.language,
    }
    place = {i: k for k, i in enumerate(known)}
    scores = {
        **summary(known),
        **{name: summaries(key) for name, key in keys.items()},
        "by_type_and_language": summaries(lambda q: q.type and f"{q.type}/{q.language}"),
        "metrics": summarise(
            [questions[i] for i in known],
            [given[i] for i in known],
            {kind: {place[i]: text for i, text in found.items()} for kind, found in blind_answers.items()},
            seed=seed,
            groupings={name: [key(questions[i]) for i in known] for name, key in keys.items()},
        ),
    }
    not_swapped = sum(bool(questions[i].images) for i in known) - len(right_blind)
    counts = {"left_out": left_out, "not_swapped": not_swapped, "no_reference": len(questions) - len(known)}
    return Scored(scores | {name: count for name, count in counts.items() if count}, given, blind_answers)


def is_exact(answer: str, question: Question) -> bool:
    """Return whether an answer is exactly one of the question's references, see `is_correct`."""
    return any(is_correct(answer, reference) for reference in question.references)


def blind_questions(
    questions: Sequence[Question], seed: int, kinds: Collection[str] = ()
) -> Iterator[tuple[str, dict[int, Question]]]:
    """Yield ("swapped", {number of a question: the question to ask}), then the same for the other `kinds`, in the order of
    BLIND. Questions without images or without a known answer are not asked. Blank images exist until the next kind."""
    yield (
        "swapped",
        {
            i: question
            for i, question in enumerate(swap_images(questions, seed))
            if question is not None and question.references
        },
    )
    seeing = {i: question for i, question in enumerate(questions) if question.images and question.references}
    for kind in BLIND[1:]:
        if kind in kinds and kind == "absent":
            yield kind, {i: replace(q, turns=without_images(q.turns), images=()) for i, q in seeing.items()}
        elif kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                blank = blank_images({path for q in seeing.values() for path in q.images}, Path(folder))
                yield kind, {i: replace(q, images=tuple(blank[p] for p in q.images)) for i, q in seeing.items()}


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
    if count := scores.get("no_reference"):
        lines.append(f"questions without a known answer, which are asked but not scored: {count}")
    return "\n".join(lines)
