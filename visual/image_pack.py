"""Write many images into one file: a zip without compression, which any program can open.

The bytes depend only on the names, the contents and their order: there are no times and no names of users in it.
"""

from __future__ import annotations

import os
import zlib
from array import array
from pathlib import Path

from config import InputError
from config.files import create_partial, open_regular, remove_partials
from visual import archives
from visual.archive_index import STORED, ZIP64_END, ZIP64_PLACE, ZIP_END, ZIP_LOCAL, ZIP_MEMBER
from visual.archives import Member

MARK = b"images of a QA file, made by data preparation"  # the comment of the zip
_VERSION, _VERSION64, _UNIX = 20, 45, 3
_DATE = 0x21  # 1980-01-01, the first that a zip can name
_MODE = 0o100644 << 16
_FULL, _MANY = 0xFFFFFFFF, 0xFFFF


class ImagePack:
    """A zip that is written under a temporary name and replaces `path` in `publish`. A context manager.

    Until then, this process can read its members at the paths that they will have (`visual.archives.find_member`).
    Raises InputError if there is another file than a pack at `path`, OSError if it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        _refuse_foreign(path)
        os.makedirs(path.parent, exist_ok=True)
        remove_partials(path.parent, path.name)
        self._file = create_partial(path)
        self._entries = bytearray()  # the index at the end of the file
        self._position: dict[str, int] = {}  # name -> its number
        self._rows = array("Q")  # offset, size and CRC-32 of each member
        self._end = 0
        archives.unfinished[str(path)] = self

    def add(self, name: str, data: bytes) -> None:
        """Add a member, unless there is one of this name. name: in ASCII. data: less than 4 GiB."""
        if name in self._position:
            return
        raw, offset, crc, size = name.encode("ascii"), self._end, zlib.crc32(data), len(data)
        common = (0, STORED, 0, _DATE, crc, size, size, len(raw))
        self._file.write(ZIP_LOCAL.pack(b"PK\3\4", _VERSION, *common, 0) + raw)
        self._file.write(data)
        self._file.flush()
        self._end += ZIP_LOCAL.size + len(raw) + size
        extra = b"" if offset < _FULL else b"\1\0\x08\0" + offset.to_bytes(8, "little")
        version = _VERSION64 if extra else _VERSION
        self._entries += ZIP_MEMBER.pack(
            b"PK\1\2", version, _UNIX, version, 0, *common, len(extra), 0, 0, 0, _MODE, min(offset, _FULL)
        )
        self._entries += raw + extra
        self._position[name] = len(self._position)
        self._rows.extend((offset, size, crc))

    def member(self, name: str) -> Member | None:
        """Return the member of this name in the unfinished file."""
        number = self._position.get(name)
        if number is None:
            return None
        offset, size, crc = self._rows[3 * number : 3 * number + 3]
        return Member(
            file=self._file.name,
            name=name,
            offset=offset,
            packed=size,
            size=size,
            crc=crc,
            how=STORED,
            version=-1 - crc,
        )

    def publish(self) -> None:
        """Write the index, put everything on the disk, and give the file its name."""
        count, size = len(self._position), len(self._entries)
        self._file.write(self._entries)
        if count >= _MANY or self._end + size >= _FULL:
            end = self._end + size
            self._file.write(
                ZIP64_END.pack(
                    b"PK\6\6", ZIP64_END.size - 12, _VERSION64, _VERSION64, 0, 0, count, count, size, self._end
                )
            )
            self._file.write(ZIP64_PLACE.pack(b"PK\6\7", 0, end, 1))
        counts = min(count, _MANY), min(count, _MANY), min(size, _FULL), min(self._end, _FULL)
        self._file.write(ZIP_END.pack(b"PK\5\6", 0, 0, *counts, len(MARK)) + MARK)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._file.name, self.path)
        self._leave()

    def _leave(self) -> None:
        if archives.unfinished.get(str(self.path)) is self:
            del archives.unfinished[str(self.path)]
        self._file.close()

    def __enter__(self) -> ImagePack:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        Path(self._file.name).unlink(missing_ok=True)


def _refuse_foreign(path: Path) -> None:
    """Raise InputError if there is something at `path` that is no pack."""
    if not os.path.lexists(path):
        return
    ours = False
    if path.is_file() and not path.is_symlink():
        with open_regular(path) as file:
            file.seek(max(0, path.stat().st_size - len(MARK)))
            ours = file.read() == MARK
    if not ours:
        raise InputError(
            f"{path}: exists, and was not written by data preparation, which would replace it with the images of the "
            'records; move it elsewhere, or give another "data.qa_file".'
        )
