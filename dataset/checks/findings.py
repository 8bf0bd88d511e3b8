"""Collect the findings of a check: rows of a data file that cannot be used, and other faults.

Knows nothing about the checks themselves. A row is identified by its file, its place and its id, and counted by reason.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import InputError, printable, shortened
from config.files import publish
from dataset.record import LONGEST_DETAIL, LONGEST_ID, encode_refused_row

SHOWN = 20  # rows shown for each reason; the full list is in a file


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a record: its file, its position and its name."""

    file: Path
    line: int | None  # from 1; None in a JSON list
    index: int  # from 0
    id: str
    source: str

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else f"item {self.index}"
        return f"{where} ({json.dumps(shortened(self.id, LONGEST_ID), ensure_ascii=False)})" if self.id else where


class Rows:
    """Rows with a reason each: counts, the first rows of each reason as text, and all rows as JSON Lines."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Path, str]] = Counter()
        self._first: dict[tuple[Path, str], list[str]] = {}
        self._lines = bytearray()  # compact, because a wrong image folder makes every record a row

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, place: Place, reason: str, detail: str) -> None:
        self._lines += encode_refused_row(
            source=place.source,
            file=str(place.file),
            line=place.line,
            index=place.index,
            id=place.id,
            reason=reason,
            detail=detail,
        )
        self._lines += b"\n"
        key = (place.file, reason)
        self.counts[key] += 1
        if self.counts[key] <= SHOWN:
            self._first.setdefault(key, []).append(printable(f"{place}: {shortened(detail, LONGEST_DETAIL)}"))

    def extend(self, other: Rows) -> None:
        """Add the rows of `other`."""
        self._lines += other._lines
        self.counts += other.counts
        for key, first in other._first.items():
            self._first[key] = (self._first.get(key, []) + first)[:SHOWN]

    def is_cut(self) -> bool:
        """Return whether `text` omits rows."""
        return any(count > SHOWN for count in self.counts.values())

    def text(self, listing: Path) -> str:
        """Format the rows by file and reason, most frequent first. listing: the file that has the omitted rows."""
        lines = []
        for file in sorted({file for file, _ in self.counts}):
            lines.append(str(file))
            of_file = [(count, reason) for (other, reason), count in self.counts.items() if other == file]
            for count, reason in sorted(of_file, key=lambda pair: (-pair[0], pair[1])):
                first = self._first[file, reason]
                lines.append(f"  {reason}: {count:,} record{'' if count == 1 else 's'}")
                lines += [f"    {row}" for row in first]
                if count > len(first):
                    lines.append(f"    ... and {count - len(first):,} more; the full list is in {listing}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Write all rows as JSON Lines."""
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, bytes(self._lines))


class Findings:
    """All reasons not to train, reported together: rows, and faults that belong to no row.

    listing: the file for the full list of rows.
    """

    def __init__(self, listing: Path):
        self.rows, self.listing = Rows(), listing
        self.faults: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.rows or self.faults)

    def extend(self, other: Findings) -> None:
        """Add what `other` found."""
        self.rows.extend(other.rows)
        self.faults += other.faults

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Turn an InputError of the block into a finding and continue after the block."""
        try:
            yield
        except InputError as error:
            self.faults.append(str(error))

    def save(self) -> None:
        """Write all rows to `listing` if `stop` would omit some; otherwise delete the list of an earlier check."""
        if self.rows.is_cut():
            self.rows.write(self.listing)
        else:
            self.listing.unlink(missing_ok=True)

    def stop(self) -> None:
        """Raise InputError with all findings, if there are any."""
        if not self:
            return
        if len(self.faults) == 1 and not self.rows:
            raise InputError(self.faults[0])
        parts = [f"- {fault}" for fault in self.faults] + ([self.rows.text(self.listing)] if self.rows else [])
        kinds = len(self.faults) + len(self.rows.counts)
        raise InputError(
            f"{kinds} finding{'' if kinds == 1 else 's'}; nothing was trained.\n"
            + "\n".join(parts)
            + ("\nFix these records or remove them from the file." if self.rows else "")
        )
