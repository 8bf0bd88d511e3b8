"""Read the index of a zip or tar archive: the name, place and size of each member, without reading the members.

Archives may come from strangers. A name is only a key to look up, never a path. Archives whose members overlap or lie
outside of the file, as in damaged files and zip bombs, are refused.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from array import array
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

STORED, DEFLATED = 0, 8  # the ways of storing a member that are read
# Ways that are not read: number (of zip, or above them our own) -> what it is.
_ENCRYPTED, _LINK, _SPECIAL, _SPARSE = 252, 253, 254, 255
_UNREAD = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
MAX_INDEX_BYTES = 1 << 30  # of a zip, 10 million members
_WINDOW = 1 << 15  # bytes of a tar read at a time while its headers are searched
_ROW = np.dtype([("offset", "<u8"), ("packed", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("how", "u1")])
_ODD_NAME = re.compile(r"//|\./|/\Z|/\.\.?\Z|\A\.\.?\Z|\A/|\\|\A\Z").search

ZIP_MEMBER = struct.Struct("<4s4B4HL2L5H2L")  # an entry of the index
ZIP_LOCAL = struct.Struct("<4s5HL2L2H")  # the header of a member
ZIP_END = struct.Struct("<4s4H2LH")
ZIP64_END = struct.Struct("<4sQ2H2L4Q")
ZIP64_PLACE = struct.Struct("<4sLQL")


class ArchiveError(OSError):
    """An archive or a member of it cannot be read: `strerror` says why and what to do."""

    def __init__(self, detail: str):
        super().__init__(errno.EIO, detail)

    def __reduce__(self) -> tuple:
        return type(self), (self.strerror,)


class NotAnArchive(ArchiveError):
    """A file is neither a zip nor a tar archive."""


class ArchiveIndex(NamedTuple):
    """The members of an archive: 37 bytes each, and their names in one text."""

    is_zip: bool
    hashes: array  # of the names, 64 bits each, sorted; `hash`, which differs between processes that are not forked
    rows: np.ndarray  # _ROW, in the order of the hashes
    names: bytes  # of the members that can be read, in the order of the archive, separated by zero bytes
    top: str  # the folder that holds all of them, "" without one

    def find(self, name: str) -> tuple[int, int, int, int, int] | None:
        """Return _ROW of a member; None if there is none of this name."""
        key = hash(name) & _ALL_BITS
        position = bisect_left(self.hashes, key)
        if position == len(self.hashes) or self.hashes[position] != key:
            return None
        return self.rows[position].item()


def unread_reason(how: int) -> str:
    """Return why a member that is stored in this way is not read."""
    named = {
        _ENCRYPTED: "is encrypted",
        _LINK: "is a link, which is not followed",
        _SPECIAL: "is not a plain file",
        _SPARSE: "is a sparse file, which is not read",
    }
    what = named.get(how, f"is compressed by {_UNREAD.get(how, f'method {how}')}, which is not read")
    return f"in the archive it {what}; unpack the archive and give the folder."


def read_index(descriptor: int) -> ArchiveIndex:
    """Read the index of an open archive. Raises ArchiveError, NotAnArchive, OSError."""
    file_size = os.fstat(descriptor).st_size
    try:
        head = os.pread(descriptor, 512, 0)
        is_zip = head.startswith((b"PK\3\4", b"PK\5\6"))
        if not is_zip and not _is_tar_header(head):
            if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
                raise ArchiveError(
                    "the archive is compressed as a whole, so nothing in it can be read by its place; unpack it."
                )
            raise NotAnArchive("not a zip or tar archive.")
        found = _Found()
        (_read_zip if is_zip else _read_tar)(descriptor, file_size, found)
    except (struct.error, OverflowError, MemoryError) as error:
        raise ArchiveError(f"the archive is damaged ({error}); download it again.") from None
    return found.index(is_zip)


class _Found:
    """The members of an archive while its index is read."""

    def __init__(self) -> None:
        self.hashes, self.rows, self.names = array("Q"), bytearray(), []  # type: ignore[var-annotated]
        self.tops: set[str] = set()

    def add(self, name: str, row: tuple[int, int, int, int, int]) -> None:
        """Add the member with this name and _ROW; one without a usable name is left out."""
        if _ODD_NAME(name) and not (name := clean_name(name)):
            return
        self.hashes.append(hash(name) & _ALL_BITS)
        self.rows += _PACKED_ROW(*row)
        if row[4] in (STORED, DEFLATED):
            self.names.append(name)
            top = name[: name.find("/") + 1]
            if top not in self.tops and top != "__MACOSX/" and name[0] != ".":
                self.tops.add(top)

    def index(self, is_zip: bool) -> ArchiveIndex:
        rows, hashes = np.frombuffer(self.rows, _ROW), np.frombuffer(self.hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        last = np.ones(len(order), bool)  # of two members with one name the later one counts, as when unpacking
        last[:-1] = hashes[1:] != hashes[:-1]
        top = next(iter(self.tops)).rstrip("/") if len(self.tops) == 1 else ""
        return ArchiveIndex(
            is_zip=is_zip,
            hashes=array("Q", hashes[last].tobytes()),
            rows=rows[order[last]],
            names="\0".join(self.names).encode("utf-8", "surrogateescape"),
            top=top,
        )


_PACKED_ROW = struct.Struct("<QQQLB").pack
_ALL_BITS = (1 << 64) - 1


def clean_name(name: str) -> str:
    """Return the name of a member without what means nothing ("./a//b"); "" for one that leads out of the archive."""
    if not _ODD_NAME(name):
        return name
    name = name.replace("\\", "/")  # of old programs for Windows
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "" if name.startswith("/") or name.endswith("/") or ".." in parts else "/".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# zip


def _read_zip(descriptor: int, file_size: int, found: _Found) -> None:
    count, size, start, shift = _end_of_zip(descriptor, file_size)
    if size > MAX_INDEX_BYTES or size < ZIP_MEMBER.size * count:
        raise ArchiveError(f"the index of the archive has {size:,} bytes for {count:,} members; it is damaged.")
    data, at, places = os.pread(descriptor, size, start), 0, array("Q")
    for _ in range(count):
        (magic, _, system, *_, flags, how, _, _, crc, packed, length, name_bytes, extra_bytes, comment_bytes, _, _, mode,
         offset) = ZIP_MEMBER.unpack_from(data, at)  # fmt: skip
        if magic != b"PK\1\2":
            raise ArchiveError("the index of the archive is damaged; download it again.")
        at += ZIP_MEMBER.size
        raw, extra = data[at : at + name_bytes], data[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if 0xFFFFFFFF in (length, packed, offset):
            length, packed, offset = _long_numbers(extra, [length, packed, offset])
        places.extend((offset + shift, offset + shift + ZIP_LOCAL.size + name_bytes + packed))
        if raw.endswith((b"/", b"\\")):
            continue
        kind = stat.S_IFMT(mode >> 16) if system in (3, 19) else 0  # of Unix and macOS
        how = how if how < _ENCRYPTED else 251
        if flags & 1 or how == 99:
            how = _ENCRYPTED
        elif kind not in (0, stat.S_IFREG):
            how = _LINK if kind == stat.S_IFLNK else _SPECIAL
        found.add(zip_name(raw, flags), (offset + shift, packed, length, crc, how))
    ends = np.frombuffer(places, np.uint64).reshape(-1, 2)
    ends = ends[np.argsort(ends[:, 0], kind="stable")]
    if len(ends) and ((ends[:-1, 1] > ends[1:, 0]).any() or ends[-1, 1] > start):
        raise ArchiveError(
            "members of the archive overlap or lie outside of it, as in a damaged archive or a zip bomb; download it again."
        )


def _end_of_zip(descriptor: int, file_size: int) -> tuple[int, int, int, int]:
    """Return the number of members; the size and offset of the index; and what to add to offsets that the archive says."""
    begin = max(0, file_size - ZIP_END.size - 65_535 - ZIP64_PLACE.size)
    tail = os.pread(descriptor, file_size - begin, begin)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and (
        at + ZIP_END.size > len(tail) or at + ZIP_END.size + ZIP_END.unpack_from(tail, at)[-1] != len(tail)
    ):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        raise ArchiveError("the archive is cut off: a zip has its index at its end; download it again.")
    _, disk, _, _, count, size, offset, _ = ZIP_END.unpack_from(tail, at)
    end = begin + at
    if at >= ZIP64_PLACE.size and tail[at - ZIP64_PLACE.size : at].startswith(b"PK\6\7"):
        _, _, place, _ = ZIP64_PLACE.unpack_from(tail, at - ZIP64_PLACE.size)
        record = os.pread(descriptor, ZIP64_END.size, place) if place < file_size else b""
        if not record.startswith(b"PK\6\6"):
            raise ArchiveError("the archive is damaged: its zip64 index is not where it says; download it again.")
        *_, disk, _, _, count, size, offset = ZIP64_END.unpack(record)
        end = place
    if disk not in (0, 0xFFFF):
        raise ArchiveError("the archive is one part of several; join them: zip -s 0 PART.zip --out WHOLE.zip")
    shift = end - size - offset
    if size > end or shift < 0:
        raise ArchiveError("the archive is damaged: its index is not where it says; download it again.")
    return count, size, end - size, shift


def _long_numbers(extra: bytes, numbers: list[int]) -> list[int]:
    """Replace the numbers that are full, in the order size, packed size, offset, by those of the zip64 field."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra, 4))
            return [next(values, number) if number == 0xFFFFFFFF else number for number in numbers]
        extra = extra[4 + size :]
    return numbers


def zip_name(raw: bytes, flags: int) -> str:
    """Decode a name: UTF-8 if it says so or can be, else GBK, as Chinese Windows writes it, else what the standard says."""
    for encoding in ("utf-8", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            if flags & 0x800:
                return ""
    return raw.decode("cp437")


# ---------------------------------------------------------------------------------------------------------------------
# tar


def _is_tar_header(header: bytes) -> bool:
    try:
        return len(header) == 512 and _tar_number(header[148:156]) == sum(header) - sum(header[148:156]) + 256
    except ValueError:
        return False


def _tar_number(field: bytes) -> int:
    if field[0] & 0x80:  # beyond 8 GiB, in base 256
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _read_tar(descriptor: int, file_size: int, found: _Found) -> None:
    at, begin, window = 0, 0, b""
    given: dict[str, str] = {}  # of the next member, in a header of its own
    while True:
        if not begin <= at <= begin + len(window) - 512:
            begin, window = at, os.pread(descriptor, _WINDOW, at)
        header = window[at - begin : at - begin + 512]
        if not header.strip(b"\0") and len(header) == 512:  # the end
            return
        if not _is_tar_header(header):
            raise ArchiveError(
                f"the archive is cut off or damaged after {len(found.hashes):,} members; download it again."
            )
        kind, size = header[156:157], _size_in(header, given)
        data = at + 512
        at = data + (size + 511) // 512 * 512
        if size < 0 or at > file_size:
            raise ArchiveError(f"the archive is cut off after {len(found.hashes):,} members; download it again.")
        if kind in (b"x", b"L"):
            if size > 1 << 20:
                raise ArchiveError("the archive is damaged: a name of more than a mebibyte; download it again.")
            text = os.pread(descriptor, size, data)
            given |= _pax(text) if kind == b"x" else {"path": _tar_text(text)}
            continue
        if kind in (b"g", b"K"):
            continue
        name = given.get("path") or _name_in(header)
        is_sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in given)
        given = {}
        if kind == b"5" or name.endswith("/"):
            continue
        how = (
            _SPARSE
            if is_sparse
            else STORED
            if kind in (b"0", b"\0", b"7")
            else _LINK
            if kind in (b"1", b"2")
            else _SPECIAL
        )
        found.add(name, (data, size, size, 0, how))


def _size_in(header: bytes, given: dict[str, str]) -> int:
    try:
        if header[156:157] in (b"1", b"2", b"3", b"4", b"5", b"6"):  # links, folders and devices have no data
            return 0
        return int(given["size"]) if "size" in given and header[156:157] != b"x" else _tar_number(header[124:136])
    except ValueError:
        return -1


def _name_in(header: bytes) -> str:
    name, prefix = _tar_text(header[:100]), _tar_text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _tar_text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Read the records of a pax header: "LENGTH KEY=VALUE\\n"."""
    values = {}
    while match := re.match(rb"(\d{1,7}) ", data):
        record, data = data[match.end() : int(match[1])], data[max(int(match[1]), match.end()) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        values[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return values
