"""Ask questions of a trained model, score the answers, and list them: what test.py writes of a QA file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from config import printable
from evaluation.metrics import answer_scores
from evaluation.score import Question, is_exact, score_blind
from model.answer import Answer, Request

SHOWN = 5  # records that a warning names


def ask_and_score(
    questions: Sequence[Question],
    answer_all: Callable[[Sequence[Request]], list[Answer]],
    seed: int,
    *,
    left_out: int = 0,
    kinds: Collection[str] = (),
) -> tuple[dict, list[dict]]:
    """Return (the scores of `evaluation.score.score`, one row for each question).

    A row has "id", "image", "question", "answer", "blind", the answer about a swapped image, "reference", "correct", whether
    the answer is exactly a reference, "type", "source", "metric", "score" and "seconds", and the answers about other `kinds`
    of blind images as "blind_blank" and "blind_absent". What is not known is None.
    """
    answered: list[list[Answer]] = []

    def ask(asked: Sequence[Question]) -> list[str]:
        answered.append(answer_all([Request(question.turns, question.images) for question in asked]))
        return [answer.text for answer in answered[-1]]

    scores, given, blind = score_blind(questions, ask, seed, left_out=left_out, kinds=kinds)
    known = [i for i, question in enumerate(questions) if question.references]
    of_known = answer_scores([questions[i] for i in known], [given[i] for i in known])
    scored = dict(zip(known, of_known, strict=True))
    rows = []
    for i, (question, answer) in enumerate(zip(questions, answered[0], strict=True)):
        metric, value = scored.get(i, (None, None))
        rows.append(
            {
                "id": question.id,
                "image": str(question.images[-1]) if question.images else None,
                "question": question.text,
                "answer": answer.text,
                "blind": blind["swapped"].get(i),
                **{f"blind_{kind}": found.get(i) for kind, found in blind.items() if kind != "swapped"},
                "reference": shown_reference(question),
                "correct": is_exact(answer.text, question) if question.references else None,
                "type": question.type,
                "source": question.source,
                "metric": metric,
                "score": value,
                "seconds": round(answer.seconds, 4),
            }
        )
    return scores, rows


def shown_reference(question: Question) -> str | None:
    """Return the record's answer, if it is one of the references, else the first of them; None without one."""
    if not question.references or question.reference in question.references:
        return question.reference if question.references else None
    return question.references[0]


def with_suffix(question: Question, suffix: str) -> Question:
    """Return a question with another line at its end."""
    *before, (role, parts) = question.turns
    if parts and isinstance(parts[-1], str):
        return replace(question, turns=(*before, (role, [*parts[:-1], f"{parts[-1]}\n{suffix}"])))
    return replace(question, turns=(*before, (role, [*parts, f"\n{suffix}"])))


def trained_on_text(questions: Sequence[Question], found: dict[int, Path]) -> str:
    """Return a warning that names the questions whose images were trained on; found: of `trained_questions`."""
    ids = {questions[i].id: path for i, path in found.items()}
    named = [f"  {shown}: {path}" for shown, path in list(ids.items())[:SHOWN]]
    more = [f"  and {len(ids) - SHOWN:,} more; scores.json lists them"] if len(ids) > SHOWN else []
    first = (
        f"warning: {len(found):,} of {len(questions):,} questions are about images that this model was trained on, so their "
        "scores say little about new images. Record and training image:"
    )
    return printable("\n".join([first, *named, *more]), lines=True)
