"""Recognise what a file of raw records is from its content, and open compressed and differently encoded text.

A name is only a hint: a file whose name promises another content than it has is refused, because it was cut off, replaced by
an error page, or is the pointer of git-lfs to a file that was not downloaded.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from config import InputError
from config.files import POINTER_OF_GIT_LFS, open_regular, pointer_error

HEAD_BYTES = 1 << 20  # that decide what a file is
UNPACKED_BYTES, UNPACKED_RATIO = 1 << 30, 200  # a compressed file may become so large, or so many times its size

# First bytes -> kind of file.
_MAGIC = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # a stream, as datasets.save_to_disk writes it
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (POINTER_OF_GIT_LFS, "git-lfs pointer"),
)
_OPENERS: dict[str, Callable[[Path, str], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
# Kinds that are not read: first bytes -> (name, what to do).
_UNREAD = (
    (
        b"PK\x03\x04",
        "a zip archive",
        "unpack it and give the annotations in it; only the images of a source may be in an archive",
    ),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save it as CSV UTF-8"),
    (b"%PDF", "a PDF", "give a file of records"),
    (b"\x89PNG", "an image", "for a folder of images, give the folder"),
    (b"\xff\xd8\xff", "an image", "for a folder of images, give the folder"),
    (b"GIF8", "an image", "for a folder of images, give the folder"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: zstd -d FILE"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it and give one of its files"),
    (b"Rar!", "a RAR archive", "unpack it and give one of its files"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
    (b"\x93NUMPY", "a NumPy array", "write the records as JSON Lines"),
    (b"\x89HDF", "an HDF5 file", "write the records as JSON Lines"),
    (b"\x80\x02", "a Python pickle, which is never opened", "write the records as JSON Lines"),
    (b"\x80\x03", "a Python pickle, which is never opened", "write the records as JSON Lines"),
    (b"\x80\x04", "a Python pickle, which is never opened", "write the records as JSON Lines"),
    (b"\x80\x05", "a Python pickle, which is never opened", "write the records as JSON Lines"),
)
_OFFICE = re.compile(rb"\[Content_Types\]\.xml|docProps/|xl/")  # first members of the zips of Office and WPS
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
# Ends of names -> the kinds that the content may be. Other names promise nothing.
_PROMISES = {
    ".parquet": ("parquet",),
    ".arrow": ("arrow",),
    ".gz": ("gzip",),
    ".bz2": ("bzip2",),
    ".xz": ("xz",),
    ".csv": ("text", "gzip"),
    ".tsv": ("text", "gzip"),
    ".json": ("text", "gzip", "parquet"),
    ".jsonl": ("text", "gzip", "parquet"),
}


class Kind(NamedTuple):
    """What a file is."""

    name: str  # parquet, arrow, or text
    encoding: str = "utf-8"  # of text
    packed: str = ""  # gzip, bzip2 or xz
    start: str = ""  # the first characters of text

    @property
    def is_json(self) -> bool:
        """Whether text begins like JSON."""
        return self.start[:1] == "{" or self.start in ("[{", "[]", "[\n", "[\r", "[ ", "[")


def kind_of(file: Path) -> Kind:
    """What a file of raw records is. Raises InputError if it is nothing that can be read, and says what it is."""
    try:
        with open_regular(file) as opened:
            head = opened.read(512)
            name = _name_of(file, head)
            head += opened.read(HEAD_BYTES - 512) if name == "text" else b""
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a file of raw records.") from None
    allowed = _PROMISES.get(file.suffix.lower(), (name,))
    if name not in allowed:
        raise InputError(
            f"{file}: its content is {name}, not {allowed[0]} as its name says; rename it or download it again."
        )
    packed = ""
    if name in _OPENERS:
        packed = name
        try:
            with _OPENERS[packed](file, "rb") as unpacked:
                head = unpacked.read(HEAD_BYTES)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise InputError(f"{file}: {packed} data that is cut or damaged ({error}); download it again.") from None
        name = _name_of(file, head)
        if name != "text":
            raise InputError(f"{file}: {name} inside {packed}; unpack it first.")
    if name != "text":
        return Kind(name)
    encoding = encoding_of(head)
    start = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n")[:2]
    return Kind("text", encoding, packed=packed, start=start)


def _name_of(file: Path, head: bytes) -> str:
    if head.startswith(POINTER_OF_GIT_LFS):
        raise pointer_error(file)
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head.startswith(b"PK\3\4") and (file.suffix.lower() in (".xlsx", ".xlsm") or _OFFICE.search(head)):
        raise InputError(
            f"{file}: is an Excel workbook or another Office file, which is not read: its cells hold dates, formulas and "
            "several sheets. In Excel or WPS, save the sheet as CSV UTF-8 and give that file."
        )
    for magic, what, advice in _UNREAD:
        if head.startswith(magic):
            raise InputError(f"{file}: is {what}, which is not read; {advice}.")
    if head[257:262] == b"ustar":
        raise InputError(
            f"{file}: is a tar archive; unpack it and give the annotations in it, or the folder; only the images of a "
            "source may be in an archive."
        )
    start = head[:512].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(_PAGES):
        raise InputError(
            f"{file}: is a web page, as a server sends it for an error or a login, not the file itself; download it again."
        )
    return "text"


def encoding_of(head: bytes) -> str:
    """The encoding of text from its beginning: utf-8 unless another one is certain.

    utf-16 and utf-32 have a mark or zero bytes. gb18030 (GBK, of Excel on a Chinese Windows) is certain if no line with
    other characters than ASCII is UTF-8, and they are pairs of bytes as in Chinese text.
    """
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if head.startswith(mark):
            return name
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = head[:1000]
    if len(start) > 3 and start.count(0) * 3 > len(start):
        return "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
    if head.isascii():
        return "utf-8"
    lines = [line for line in head.splitlines() if not line.isascii()][:1000]
    if len(lines) > 1 and len(head) == HEAD_BYTES:
        lines.pop()  # may be cut
    if any(_decodes(line, "utf-8") for line in lines) or not all(_decodes(line, "gb18030") for line in lines):
        return "utf-8"
    high = sum(byte >= 0x80 for line in lines for byte in line)
    chinese = sum("\u4e00" <= character <= "\u9fff" for line in lines for character in line.decode("gb18030"))
    return "gb18030" if 2 * chinese >= 0.7 * high else "utf-8"


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def open_text(file: Path, kind: Kind) -> io.TextIOWrapper:
    """Open text for reading, unpacked and decoded. Bytes that are not UTF-8 become half surrogate pairs, which refuse the
    record instead of the whole file; in other encodings they raise UnicodeError."""
    raw = _OPENERS[kind.packed](file, "rb") if kind.packed else open_regular(file)
    if kind.encoding == "utf-8":
        return io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
    return io.TextIOWrapper(raw, kind.encoding, newline="")


@contextlib.contextmanager
def plain_file(file: Path, kind: Kind) -> Iterator[Path]:
    """Yield a file of UTF-8 text: the file itself, or a copy that is unpacked and converted, which is removed at the end."""
    if not kind.packed and kind.encoding == "utf-8":
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        limit = max(UNPACKED_BYTES, UNPACKED_RATIO * os.path.getsize(file))
        try:
            with (
                open_text(file, kind) as text,
                open(copy, "w", encoding="utf-8", errors="surrogateescape", newline="") as to,
            ):
                size = 0
                while block := text.read(1 << 20):
                    size += to.write(block.removeprefix("\ufeff"))
                    if size > limit:
                        raise InputError(
                            f"{file}: more than {limit:,} characters when unpacked; unpack it yourself if it is meant."
                        )
        except (UnicodeError, EOFError, lzma.LZMAError) as error:
            raise InputError(f"{file}: {kind.packed or kind.encoding} data that is cut or damaged ({error}).") from None
        except OSError as error:
            shown = error.strerror or error
            raise InputError(
                f"{file}: cannot be unpacked into {folder} ({shown}); unpack or convert it yourself."
            ) from None
        try:
            yield copy
        except InputError as error:
            raise InputError(str(error).replace(str(copy), str(file))) from None
