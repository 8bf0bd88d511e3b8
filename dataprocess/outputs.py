"""Output files that are written completely or not at all, and the ids in them."""

from __future__ import annotations

import os
from pathlib import Path


class AsideFile:
    """A file of lines, written under a temporary name in the same folder and renamed by `publish`.

    A context manager: a file that was not published is removed at the end.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = os.path.abspath(path.parent)
        self.lines = 0
        self.bytes = 0
        os.makedirs(self.folder, exist_ok=True)
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = open(self._aside, "wb")

    def write(self, lines: list[bytes]) -> None:
        self.write_terminated(b"".join(line + b"\n" for line in lines))

    def write_terminated(self, lines: bytes | bytearray) -> None:
        """Write lines that already end in newlines."""
        self.lines += lines.count(b"\n")
        self.bytes += self._file.write(lines)

    def publish(self) -> None:
        """Write everything to disk and give the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._aside, self.path)

    def __enter__(self) -> AsideFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)


class UniqueNames:
    """Makes the ids of one source unique: the second "a" that is kept becomes "a#2".

    Stores a hash of each name instead of the name. Two names with the same hash only cause an unnecessary "#2".
    """

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}

    def take(self, name: str) -> str:
        """Return `name`, or `name#2` and so on if it was taken before."""
        uses, key = self._uses, hash(name)
        if key not in uses:
            uses[key] = 1
            return name
        number = uses[key] + 1
        while (other := hash(f"{name}#{number}")) in uses:
            number += 1
        uses[key], uses[other] = uses[key] + 1, 1
        return f"{name}#{number}"
