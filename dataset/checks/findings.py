"""What a check finds, kept until all of it is known: rows of a data file that cannot be used, and other faults.

Knows nothing of what is checked. A row is named by its file, its place in it and its id, and counted by its reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from config import InputError

SHOWN = 20  # rows of one reason that are written out for a person; a list of all of them is in a file


class Place(NamedTuple):
    """Where a record stands."""

    file: Path
    line: int | None  # from 1; None in a JSON list
    index: int  # from 0
    id: str
    source: str

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else f"item {self.index}"
        return f"{where} ({json.dumps(self.id, ensure_ascii=False)})" if self.id else where


class Rows:
    """Any number of rows with a reason each: counted, the first of every reason as text, and all of them as JSON Lines."""

    def __init__(self):
        self.counts: Counter[tuple[Path, str]] = Counter()
        self._first: dict[tuple[Path, str], list[str]] = {}
        self._lines = bytearray()  # not objects: a wrong folder makes a row of every record

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, place: Place, reason: str, detail: str) -> None:
        position = {"line": place.line} if place.line else {"index": place.index}
        row = {"source": place.source, "file": str(place.file), **position, "id": place.id, "reason": reason}
        text = json.dumps({**row, "detail": detail}, ensure_ascii=False)
        self._lines += text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate becomes its JSON escape
        key = (place.file, reason)
        self.counts[key] += 1
        if self.counts[key] <= SHOWN:
            self._first.setdefault(key, []).append(printable(f"{place}: {detail}"))

    def extend(self, other: Rows) -> None:
        """Take over what another one holds."""
        self._lines += other._lines
        self.counts += other.counts
        for key, first in other._first.items():
            self._first[key] = (self._first.get(key, []) + first)[:SHOWN]

    def is_cut(self) -> bool:
        """Whether `text` leaves rows out."""
        return any(count > SHOWN for count in self.counts.values())

    def text(self, listing: Path) -> str:
        """By file and reason, largest first; `listing`: the file in which those that are left out can be read."""
        lines = []
        for file in sorted({file for file, _ in self.counts}):
            lines.append(str(file))
            of_file = [(count, reason) for (other, reason), count in self.counts.items() if other == file]
            for count, reason in sorted(of_file, key=lambda pair: (-pair[0], pair[1])):
                first = self._first[file, reason]
                lines.append(f"  {reason}: {count:,} record{'' if count == 1 else 's'}")
                lines += [f"    {row}" for row in first]
                if count > len(first):
                    lines.append(f"    ... and {count - len(first):,} more, all of them in {listing}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._lines)


class Findings:
    """Everything that would make training wrong, to be said at once: rows, and faults that are no row's."""

    def __init__(self, listing: Path):
        self.rows, self.faults, self.listing = Rows(), [], listing

    def __bool__(self) -> bool:
        return bool(self.rows or self.faults)

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """An InputError of the block becomes a finding; what comes after the block goes on."""
        try:
            yield
        except InputError as error:
            self.faults.append(str(error))

    def save(self) -> None:
        """Write all rows to `listing` if `stop` would show a part of them only."""
        if self.rows.is_cut():
            self.rows.write(self.listing)
        else:
            self.listing.unlink(missing_ok=True)  # of an earlier check

    def stop(self) -> None:
        """InputError with all that was found, if anything was."""
        if not self:
            return
        if len(self.faults) == 1 and not self.rows:
            raise InputError(self.faults[0])
        parts = [f"- {fault}" for fault in self.faults] + ([self.rows.text(self.listing)] if self.rows else [])
        kinds = len(self.faults) + len(self.rows.counts)
        raise InputError(
            f"{kinds} finding{'' if kinds == 1 else 's'}; nothing was trained.\n"
            + "\n".join(parts)
            + ("\nRepair these records or take them out of the file." if self.rows else "")
        )


_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """One line that any terminal can print: control characters and half surrogates as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
