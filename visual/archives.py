"""Images inside zip and tar archives, read where they are: "train.zip/a/1.jpg" is the member "a/1.jpg" of train.zip.

Nothing is unpacked. The index of an archive is read once per process, and again if the file changes; it takes some 80 bytes
per member, and forked processes share it. No file is kept open and every read is at an offset, so threads and processes
never share a position.

Archives may come from strangers. The name of a member is only compared with the one that is asked for, and never becomes a
path. Members that are encrypted, links, or compressed in another way than by deflate are refused, each with the reason. So
are archives whose members overlap or lie outside of the file, as in damaged files and zip bombs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from visual.archive_index import (
    DEFLATED,
    STORED,
    ZIP_LOCAL,
    ArchiveError,
    ArchiveIndex,
    NotAnArchive,
    clean_name,
    read_index,
    unread_reason,
    zip_name,
)

# A deflated member may become so large, or so many times its size: images are compressed already.
INFLATED_BYTES, INFLATED_RATIO = 1 << 26, 200


class Member(NamedTuple):
    """One file in an archive."""

    file: str  # the archive
    name: str
    offset: int  # in bytes: of the member's header in a zip, of its data in a tar
    packed: int  # bytes in the archive
    size: int  # bytes of the content
    crc: int | None  # CRC-32 of the content; a tar has none
    how: int  # STORED or DEFLATED
    version: int  # changes when the content may have changed; negative, unlike the modification time of a file

    def read(self) -> bytes:
        """Return the content. Raises ArchiveError if the bytes are not those that the index says, OSError like `open`."""
        descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if self.crc is None:
                data = os.pread(descriptor, self.packed, self.offset)
            else:
                data = _pread_zip_member(descriptor, self)
        finally:
            os.close(descriptor)
        if self.how == DEFLATED:
            data = _inflate(data, self.size)
        if len(data) != self.size or self.crc is not None and zlib.crc32(data) != self.crc:
            raise ArchiveError("the archive is damaged here: not the bytes that its index says; download it again.")
        return data


class Unfinished(Protocol):
    """An archive that this process is writing: it is read from another file than the one it will be."""

    def member(self, name: str) -> Member | None: ...


unfinished: dict[str, Unfinished] = {}  # path that the archive will have


def find_member(path: str | bytes | os.PathLike) -> Member | None:
    """Return the member of an archive that `path` names; None if no archive is above it.

    Raises FileNotFoundError if the archive has no such member, ArchiveError if the archive or the member cannot be read.
    """
    place = split_path(path)
    if place is None:
        return None
    archive, inside = place
    name = clean_name(inside)
    being_written = unfinished.get(archive)
    try:
        found = being_written.member(name) if being_written else _member(archive, name)
    except NotAnArchive:
        return None
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such file in the archive", os.fspath(path))
    return found


def split_path(path: str | bytes | os.PathLike) -> tuple[str, str] | None:
    """Divide a path into that of the archive and the name below it, empty for the archive itself. None without one."""
    text = os.fsdecode(path)
    folder, _, name = text.rpartition("/")
    if folder in unfinished:
        return folder, name
    known = _places.get(folder)
    if known is None:
        place = _split(text)
        if place and name and place[0] != text and text.startswith("/"):
            _places[folder] = place[0], place[1][: -len(name)]
        return place
    return known[0], known[1] + name


def _split(path: str) -> tuple[str, str] | None:
    archive = path
    while archive:
        try:
            return (archive, path[len(archive) + 1 :]) if stat.S_ISREG(os.stat(archive).st_mode) else None
        except NotADirectoryError:
            archive = archive.rpartition("/")[0]
        except (OSError, ValueError):
            return None
    return None


_places: dict[str, tuple[str, str]] = {}  # absolute folder in an archive -> the archive, and the start of names in it


def file_names(archive: str) -> Iterator[str]:
    """Yield the names of the members that can be read, in the order of the archive. Raises ArchiveError, OSError."""
    names = _index_of(archive)[1].names
    return iter(names.decode("utf-8", "surrogateescape").split("\0") if names else ())


def top_folder(archive: str) -> str:
    """Return the folder that holds every file of the archive, "" if there are several. Raises ArchiveError, OSError."""
    return _index_of(archive)[1].top


def _member(archive: str, name: str) -> Member | None:
    stamp, index = _index_of(archive)
    row = index.find(name)
    if row is None:
        return None
    offset, packed, size, crc, how = row
    if how not in (STORED, DEFLATED):
        raise ArchiveError(unread_reason(how))
    known = crc if index.is_zip else None
    state = crc
    if known is None:  # the size and time of the archive, and the place, stand for the content
        state = int.from_bytes(hashlib.blake2b(repr((stamp[2:], offset)).encode(), digest_size=7).digest(), "little")
    return Member(
        file=archive, name=name, offset=offset, packed=packed, size=size, crc=known, how=how, version=-1 - state
    )


_Stamp = tuple[int, ...]
_indexes: dict[str, tuple[_Stamp, ArchiveIndex]] = {}
_lock = threading.Lock()  # one thread reads an index, the others wait for it


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # a thread of the parent may hold it


def _index_of(archive: str) -> tuple[_Stamp, ArchiveIndex]:
    stamp = _stamp(os.stat(archive))
    known = _indexes.get(archive)
    if known is None or known[0] != stamp:
        with _lock:
            known = _indexes.get(archive)
            if known is None or known[0] != stamp:
                known = _indexes[archive] = _read_index(archive)
    return known


def _read_index(archive: str) -> tuple[_Stamp, ArchiveIndex]:
    descriptor = os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _stamp(os.fstat(descriptor)), read_index(descriptor)
    finally:
        os.close(descriptor)


def _stamp(state: os.stat_result) -> _Stamp:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _pread_zip_member(descriptor: int, member: Member) -> bytes:
    """Read the bytes of a member with the header before them, and check that it is the header of this member."""
    ahead = ZIP_LOCAL.size + 4 * len(member.name) + 64  # its name, and some fields behind it whose length is not known
    data = os.pread(descriptor, ahead + member.packed, member.offset)
    if len(data) >= ZIP_LOCAL.size:
        magic, _, flags, how, *_, name_bytes, extra_bytes = ZIP_LOCAL.unpack_from(data)
        raw = data[ZIP_LOCAL.size : ZIP_LOCAL.size + name_bytes]
        if magic == b"PK\3\4" and how == member.how and clean_name(zip_name(raw, flags)) == member.name:
            begin = ZIP_LOCAL.size + name_bytes + extra_bytes
            if begin > ahead:
                return os.pread(descriptor, member.packed, member.offset + begin)
            return data[begin : begin + member.packed]
    raise ArchiveError("the archive is damaged: this member is not where its index says; download it again.")


def _inflate(data: bytes, size: int) -> bytes:
    if size > max(INFLATED_BYTES, INFLATED_RATIO * len(data)):
        raise ArchiveError(
            f"in the archive it grows from {len(data):,} to {size:,} bytes, as in a zip bomb; it is not read."
        )
    try:
        return zlib.decompressobj(-15).decompress(data, size + 1)
    except zlib.error as error:
        raise ArchiveError(f"the archive is damaged here ({error}); download it again.") from None
