"""The printed table of metrics and their intervals. `evaluation.score` has the table of exact answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from config import printable
from evaluation.metrics import METRICS, metric_of
from evaluation.score import Question

SHOWN_TYPES = 5

TITLES = {
    "accuracy": "accuracy %",
    "precision": "precision %",
    "recall": "recall %",
    "f1": "F1 %",
    "yes_share": "answers yes %",
    "unclear_share": "answers neither %",
    "accuracy_plus": "all of an image right %",
    "circular_accuracy": "circular accuracy %",
    "anls": "ANLS %",
    "cider_d": "CIDEr-D x 100",
    "bleu_4": "BLEU-4 %",
    "rouge_l": "ROUGE-L %",
}


def metric_table(scores: dict) -> str:
    """Return the values of each metric with their 95 % intervals, and how much the images add to its main value."""

    def bounds(entry: dict, sign: str = "") -> tuple[str, str]:
        low, high = entry["low"], entry["high"]
        interval = "-" if low is None else f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"
        return f"{100 * entry['value']:{sign}.1f}", interval

    rows: list[tuple[str, ...]] = [("metric", "value", "n", "", "95 % interval")]
    for name, entry in scores.get("metrics", {}).items():
        for value, title in TITLES.items():
            if value in entry:
                rows.append((name, title, str(entry["n"]), *bounds(entry[value])))
        for kind, adds in entry.get("image_adds", {}).items():
            rows.append((name, f"the image adds ({kind})", str(adds["n"]), *bounds(adds, "+")))
    if len(rows) == 1:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in range(2, 5))]
        ).rstrip()
        for row in rows
    )


def metrics_line(questions: Sequence[Question]) -> str:
    """Return which metric scores how many questions, and of which types."""
    types: dict[str, Counter[str]] = {name: Counter() for name in METRICS}
    for question in questions:
        if question.references:
            types[metric_of(question)][question.type] += 1
    parts = []
    for name, found in types.items():
        if found:
            named = [printable(kind) for kind in found if kind]
            more = f" and {len(named) - SHOWN_TYPES} more" if len(named) > SHOWN_TYPES else ""
            listed = f" (type{'s' if len(named) > 1 else ''} {', '.join(named[:SHOWN_TYPES])}{more})" if named else ""
            parts.append(f"{found.total()} by {name}{listed}")
    return f"scored: {'; '.join(parts)}" if parts else "scored: nothing, no question has a known answer"
