"""The files that preprocessing writes, whole or not at all, and the ids in them."""

from __future__ import annotations

import os
from pathlib import Path


class AsideFile:
    """A file of lines that takes its name only when it is whole: written beside it, then renamed. A context manager: what
    was not published by its end is removed."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = os.path.abspath(path.parent)
        self.lines = 0
        self.bytes = 0
        os.makedirs(self.folder, exist_ok=True)
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._file = open(self._aside, "wb")

    def write(self, lines: list[bytes]) -> None:
        self.write_ended(b"".join(line + b"\n" for line in lines))

    def write_ended(self, lines: bytes | bytearray) -> None:
        """Lines that have their newlines."""
        self.lines += lines.count(b"\n")
        self.bytes += self._file.write(lines)

    def publish(self) -> None:
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
    """Makes the ids of one source unique: the second "a" that is kept becomes "a#2". Remembers a hash of each name, not
    the name; two names that share one would cost a needless "#2", nothing else."""

    def __init__(self):
        self._uses: dict[int, int] = {}

    def take(self, name: str) -> str:
        """A name of this source that was not taken before."""
        uses, key = self._uses, hash(name)
        if key not in uses:
            uses[key] = 1
            return name
        number = uses[key] + 1
        while (other := hash(f"{name}#{number}")) in uses:
            number += 1
        uses[key], uses[other] = uses[key] + 1, 1
        return f"{name}#{number}"
