"""Scores a model on a QA file, and proves that its answers come from the picture: every score stands beside the *blind*
score, from the same questions asked about swapped pictures. Knows no model: it is handed a function that answers.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dataset.qa_file import QAFile
from dataset.record import Image, parts_of

# Han characters, kana and CJK punctuation: enough to tell a Chinese question from an English one
_CHINESE = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")


@dataclasses.dataclass(frozen=True)
class Question:
    """One answer of a QA record to be found again. turns: (role, parts) pairs up to the question, earlier answers as the
    record has them; images: the files of all image parts, in order."""

    id: str
    turns: tuple
    images: tuple[Path, ...]
    reference: str
    type: str

    @property
    def text(self) -> str:
        """The words of the question itself."""
        return "".join(part for part in self.turns[-1][1] if isinstance(part, str)).strip()

    @property
    def language(self) -> str:
        return "zh" if _CHINESE.search(self.text) else "en"


Answers = Callable[[Sequence[Question]], list[str]]


def questions_of(qa: QAFile, indices: Iterable[int]) -> list[Question]:
    """Every assistant turn of the records `indices` as a question of its own."""
    questions = []
    for index in indices:
        record = qa[index]
        images, turns, seen = qa.image_paths(record), [], 0
        for turn in record.conversations:
            if turn.role == "assistant":
                questions.append(Question(record.id, tuple(turns), tuple(images[:seen]), turn.content, record.type))
                turns.append((turn.role, [turn.content]))
            else:
                parts = parts_of(turn)
                seen += sum(isinstance(part, Image) for part in parts)
                turns.append((turn.role, parts))
    return questions


def is_correct(answer: str, reference: str) -> bool:
    """Exact match, but for blanks at the ends."""
    return answer.strip() == reference.strip()


def swap_images(questions: Sequence[Question], seed: int) -> list[Question | None]:
    """The same questions, each about the picture of another question: a question of the same type and with as many pictures,
    so that nothing but the picture's content changes. None where there is no other picture."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        groups[question.type, len(question.images)].append(i)
    swapped: list[Question | None] = [None] * len(questions)
    for (_, count), members in groups.items():
        pictures = sorted({questions[i].images for i in members})
        if count == 0 or len(pictures) < 2:
            continue
        random.Random(seed).shuffle(pictures)
        following = dict(zip(pictures, pictures[1:] + pictures[:1], strict=True))
        for i in members:
            swapped[i] = dataclasses.replace(questions[i], images=following[questions[i].images])
    return swapped


def score(questions: Sequence[Question], answers: Answers, seed: int) -> tuple[dict, list[str]]:
    """(scores, the answers). scores: {"n", "accuracy", "blind", "by_type": {type: the same three}, "by_language": ...,
    "by_type_and_language": ...}; accuracy and blind lie in [0, 1]; blind is None where no picture could be swapped."""
    given = answers(questions)
    swapped = swap_images(questions, seed)
    asked_blind = [i for i, question in enumerate(swapped) if question is not None]
    blind_answers = answers([swapped[i] for i in asked_blind])
    right = [is_correct(answer, q.reference) for answer, q in zip(given, questions, strict=True)]
    right_blind: list[bool | None] = [None] * len(questions)
    for i, answer in zip(asked_blind, blind_answers, strict=True):
        right_blind[i] = is_correct(answer, questions[i].reference)

    def summary(members: Sequence[int]) -> dict:
        blind = [right_blind[i] for i in members if right_blind[i] is not None]
        return {
            "n": len(members),
            "accuracy": sum(right[i] for i in members) / len(members) if members else None,
            "blind": sum(blind) / len(blind) if blind else None,
        }

    def summaries(key: Callable[[Question], str]) -> dict:
        groups: dict[str, list[int]] = defaultdict(list)
        for i, question in enumerate(questions):
            if key(question):  # a record without a type counts in the whole alone
                groups[key(question)].append(i)
        return {name: summary(groups[name]) for name in sorted(groups)}

    scores = {
        **summary(range(len(questions))),
        "by_type": summaries(lambda q: q.type),
        "by_language": summaries(lambda q: q.language),
        "by_type_and_language": summaries(lambda q: q.type and f"{q.type}/{q.language}"),
    }
    return scores, given


def score_table(scores: dict) -> str:
    """The scores as text: one line a type with its languages, then everything together."""

    def cell(entry: dict | None, key: str) -> str:
        return "-" if not entry or entry[key] is None else f"{100 * entry[key]:.1f}"

    rows = [("type", "n", "correct %", "blind %", "English %", "Chinese %")]
    both = scores["by_type_and_language"]
    for name, entry in scores["by_type"].items():
        languages = [cell(both.get(f"{name}/{language}"), "accuracy") for language in ("en", "zh")]
        rows.append((name, str(entry["n"]), cell(entry, "accuracy"), cell(entry, "blind"), *languages))
    languages = [cell(scores["by_language"].get(language), "accuracy") for language in ("en", "zh")]
    rows.append(("all", str(scores["n"]), cell(scores, "accuracy"), cell(scores, "blind"), *languages))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 6))]) for row in rows
    )
