"""Counts of records read, kept and refused, as JSON and as a table."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from config import printable, shortened
from dataprocess.split import TRAIN, VALIDATION
from dataset.record import LONGEST_ID, encode_refused_row

EXAMPLES = 3  # examples of each reason in the message about too many refusals


class Refusal(NamedTuple):
    """The reason why a raw record was refused, and its place."""

    source: str
    file: str
    line: int | None  # from 1; None if the file has no lines
    position: int  # from 0, within the file
    id: str | int | None
    reason: str
    detail: str

    def to_line(self) -> bytes:
        """The refusal as a JSON object, without a newline."""
        return encode_refused_row(
            source=self.source,
            file=self.file,
            line=self.line,
            index=self.position,
            id=self.id,
            reason=self.reason,
            detail=self.detail,
        )

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else f"item {self.position}"
        name = "" if self.id is None else f' ("{shortened(str(self.id), LONGEST_ID)}")'
        return printable(f"{os.path.basename(self.file)} {place}{name}: {self.detail}")


class Tally:
    """Counts raw records; each is kept or refused."""

    def __init__(self, names: Iterable[str]):
        self.by_source = {name: Counter(read=0, kept=0, refused=0) for name in names}
        self.by_reason: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.examples: dict[str, list[Refusal]] = {}

    def keep(self, source: str, number: int) -> None:
        self.by_source[source].update(read=number, kept=number)

    def refuse(self, refusals: list[Refusal]) -> None:
        for refusal in refusals:
            self.by_source[refusal.source].update(("read", "refused"))
            self.by_reason[refusal.reason] += 1
            examples = self.examples.setdefault(refusal.reason, [])
            if len(examples) < EXAMPLES:
                examples.append(refusal)

    def examples_by_reason(self, reasons: int) -> list[str]:
        """One line for each of the first refusals of the `reasons` most frequent reasons."""
        most = itertools.islice(_largest_first(self.by_reason), reasons)
        return [f"{reason}: {refusal}" for reason in most for refusal in self.examples[reason]]

    def report(self) -> dict:
        """The counts as JSON values, most frequent reasons and repairs first."""
        total: Counter[str] = sum(self.by_source.values(), Counter())
        return {
            "read": total["read"],
            "kept": total["kept"],
            "refused": total["refused"],
            "by_source": {name: dict(counts) for name, counts in self.by_source.items()},
            "by_reason": _largest_first(self.by_reason),
            "repairs": _largest_first(self.repairs),
        }


def _largest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def summary(report: dict) -> str:
    """The report as a table for the terminal."""
    sources = [(name, *counts.values()) for name, counts in report["by_source"].items()]
    if len(sources) > 1:
        sources.append(("all", *(report[key] for key in ("read", "kept", "refused"))))
    blocks: list[tuple[tuple[str, ...], list[tuple]]] = [(("source", "read", "kept", "refused"), sources)]
    for title, key in (("refused for", "by_reason"), ("repaired by", "repairs")):
        if report[key]:
            blocks.append(((title, "records"), list(report[key].items())))
    width = max(len(row[0]) for head, rows in blocks for row in [head, *rows])
    lines = []
    for head, rows in blocks:
        lines += ["", *(_row(row, width) for row in [head, *rows])]
    lines.append("")
    for side in (TRAIN, VALIDATION):
        if side in report:
            lines.append(f"{side + ':':<{width}}{report[side]['records']:>12,} records in {report[side]['file']}")
    lines += [f"note: {note}" for note in report.get("notes", [])]
    return "\n".join(lines[1:])


def _row(cells: tuple, width: int) -> str:
    name, *numbers = cells
    return f"{name:<{width}}" + "".join(f"{cell if isinstance(cell, str) else f'{cell:,}':>12}" for cell in numbers)
