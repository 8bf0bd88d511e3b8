"""The count of what was read, kept and refused, as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dataprocess.split import TRAIN, VALIDATION


class Tally:
    """Counts raw records: every one is kept or refused."""

    def __init__(self, names: Iterable[str]):
        self.by_source = {name: Counter(read=0, kept=0, refused=0) for name in names}
        self.by_reason: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()
        self.image_folders: dict[str, int | None] = {}

    def keep(self, source: str, repairs: set[str]) -> None:
        counts = self.by_source[source]
        counts["read"] += 1
        counts["kept"] += 1
        for repair in repairs:
            self.repairs[repair] += 1

    def refuse(self, source: str, reason: str) -> None:
        self.by_source[source].update(("read", "refused"))
        self.by_reason[reason] += 1

    def report(self) -> dict:
        total = sum(self.by_source.values(), Counter())
        return {
            "read": total["read"],
            "kept": total["kept"],
            "refused": total["refused"],
            "by_source": {name: dict(counts) for name, counts in self.by_source.items()},
            "by_reason": _largest_first(self.by_reason),
            "repairs": _largest_first(self.repairs),
            "image_folders": self.image_folders,
        }


def _largest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def summary(report: dict) -> str:
    """The report as a table for a person."""
    rows = [("source", "read", "kept", "refused")]
    rows += [(name, *(str(count) for count in counts.values())) for name, counts in report["by_source"].items()]
    if len(rows) > 2:
        rows.append(("all", *(str(report[key]) for key in rows[0][1:])))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    for title, counts in (("refused", report["by_reason"]), ("repaired", report["repairs"])):
        lines += [f"{title}: {name} {count}" for name, count in counts.items()]
    lines += [
        f"{side}: {report[side]['records']} records in {report[side]['file']}"
        for side in (TRAIN, VALIDATION)
        if side in report
    ]
    return "\n".join(lines)
