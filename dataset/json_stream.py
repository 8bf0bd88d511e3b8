"""Stream the JSON values of a file: JSON Lines or one JSON list, of any size, in little memory.

Knows nothing about the meaning of the values; used for the QA file and for raw annotations. orjson reads what it can.
The standard library reads what orjson rejects (NaN, unpaired surrogates) and provides the error messages. The result
never depends on which of the two has read a value.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import accumulate, count, repeat
from typing import BinaryIO, NamedTuple

import orjson

from config import InputError
from config.files import open_regular

CHUNK_BYTES = 1 << 15  # bytes read at a time; values that fit into the CPU cache are twice as fast as megabytes
LONGEST_VALUE = 1 << 26  # bytes of a line, characters of a value in a list; a record is text, without its images
CUTS = 4  # number of positions tried as the end of a record

_space: Callable[[str, int], re.Match] = re.compile(r"[ \t\r\n]*").match  # type: ignore[assignment]  # never None
_next_object = re.compile(rb'[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"[^"\\]*"').match  # separator, brace and first key
_BLANKS = b" \t\r\n"
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 19


class NotJson(str):
    """The reason why a line could not be decoded, in place of its value."""


class Item(NamedTuple):
    """One JSON value of a file."""

    index: int  # type: ignore[assignment]  # from 0; hides tuple.index
    line: int | None  # from 1; None in a list
    offset: int | None  # byte offset of the line, or of the value in a list; None in a list read without offsets
    value: object  # NotJson if the line could not be decoded


_item = partial(tuple.__new__, Item)  # builds an Item from a tuple of four, twice as fast as Item(...)


def stream_json(path: str | os.PathLike, offsets: bool = False) -> Iterator[Item]:
    """Yield the values of a UTF-8 file, JSON Lines or one JSON list. Blank lines and a BOM are skipped.

    offsets: also give the offsets of the values of a list; reading a list is then about five times slower.
    Raises InputError if reading cannot continue: the file does not exist or is not a regular file, a list is cut off or
    malformed or has a value of more than LONGEST_VALUE characters, or one object spans several lines. A line that cannot be
    decoded, or is longer than LONGEST_VALUE bytes, gives NotJson.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a JSON Lines file or a JSON list.") from None
    with file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        while (head := file.read(CHUNK_BYTES)) and not head.strip(_BLANKS):
            pass
        file.seek(start)
        if not head.lstrip(_BLANKS).startswith(b"["):
            yield from _line_items(file, start, path)
        elif offsets:
            yield from _exact_list_items(file, offset=start, index=0, path=path)
        else:
            yield from _list_items(file, start, path)


def decode(data: bytes) -> object:
    """Decode one JSON value from UTF-8 bytes. Raises the ValueError or RecursionError of the standard library."""
    if not _may_round(data):
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
    return json.loads(data.decode())


def _may_round(data: bytes) -> bool:
    """Return whether the JSON may contain an integer of 19 or more digits; orjson turns integers over 64 bits into
    floats."""
    zeros = data.translate(_ZEROS)
    at = zeros.find(_LONG)
    while at >= 0:
        if at == 0 or zeros[at - 1] in b" \t\r\n[:,-":  # not inside a name
            return True
        at = zeros.find(_LONG, at + len(_LONG))
    return False


class _Skipped(bytes):
    """An empty line in place of one that is too long. `len` gives its bytes in the file."""

    size: int

    def __len__(self) -> int:
        return self.size


def _next_lines(file: BinaryIO) -> list[bytes]:
    """Read whole lines of about CHUNK_BYTES together. If the last one is longer than LONGEST_VALUE, it is skipped."""
    data = file.read(CHUNK_BYTES)
    if data.endswith(b"\n"):
        return io.BytesIO(data).readlines()
    rest = file.readline(LONGEST_VALUE)
    lines = io.BytesIO(data + rest).readlines()
    if lines and len(lines[-1]) > LONGEST_VALUE:
        skipped = _Skipped()
        skipped.size = len(lines[-1])
        while not rest.endswith(b"\n") and (rest := file.readline(CHUNK_BYTES)):
            skipped.size += len(rest)
        lines[-1] = skipped
    return lines


def _line_items(file: BinaryIO, offset: int, path: str | os.PathLike) -> Iterator[Item]:
    index, line = 0, 1  # the next value, the next line
    while lines := _next_lines(file):
        numbers, offsets = range(line, line + len(lines)), accumulate(map(len, lines), initial=offset)
        try:
            if isinstance(lines[-1], _Skipped) or _may_round(b"".join(lines)):
                raise ValueError("left to decode()")
            values = list(map(orjson.loads, lines))
        except ValueError:  # also raised for a blank line
            for number, start, data in zip(numbers, offsets, lines, strict=False):
                if isinstance(data, _Skipped):
                    reason = NotJson(f"a line of {len(data):,} bytes; at most {LONGEST_VALUE:,} are read.")
                    yield Item(index=index, line=number, offset=start, value=reason)
                elif data.isspace():
                    continue
                else:
                    yield Item(index=index, line=number, offset=start, value=_line_value(data, index, path))
                index += 1
        else:
            yield from map(_item, zip(count(index), numbers, offsets, values, strict=False))
            index += len(values)
        line, offset = line + len(lines), offset + sum(map(len, lines))


def _line_value(data: bytes, index: int, path: str | os.PathLike) -> object:
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        return NotJson(f"not UTF-8 at byte {error.start} of the line.")
    except (ValueError, RecursionError) as error:
        text = data.strip(b" \t\r\n")
        if index == 0 and text.startswith(b"{") and text.endswith((b"{", b"[", b",")):
            raise InputError(
                f"{path}: a JSON object over several lines; expected a list of objects, or one object a line."
            ) from None
        return NotJson(f"not a JSON value: {error}.")


def _list_items(file: BinaryIO, offset: int, path: str | os.PathLike) -> Iterator[Item]:
    """Yield the values of a list, read in pieces of many objects with one call of orjson per piece.

    A piece begins after a value and ends before a repetition of its first separator (a comma and an object's first
    key). It is a valid list between brackets only if it ends after a whole value, so a wrong cut cannot pass unnoticed.
    Pieces without a valid cut, and pieces that orjson rejects or would round, are read exactly.
    """
    index = 0
    while True:
        before = max(offset - 2, 0)
        file.seek(before)
        window = file.read(CHUNK_BYTES)
        at = offset - before  # window[at] is the first byte not yet consumed
        values = _objects(window, at) if index else None
        if values is None:
            end, index = yield from _exact_list_items(
                file, offset=offset, index=index, path=path, until=offset + CHUNK_BYTES
            )
            if end is None:
                return
            offset = end
        else:
            objects, end = values
            yield from map(_item, zip(count(index), repeat(None), repeat(None), objects))  # stops after the last object
            offset, index = before + end, index + len(objects)


def _objects(window: bytes, at: int) -> tuple[list, int] | None:
    """Return (values, end of the last value) for the whole objects after window[:at], or None if no cut is valid."""
    following = _next_object(window, at)
    if not following:
        return None
    separator = window[:at] + following.group()
    begin, cut = window.index(b"{", at), len(window)
    for _ in range(CUTS):
        cut = window.rfind(separator, begin, cut)
        if cut < 0:
            return None
        end = cut + len(separator) - len(following.group())
        piece = window[begin:end]
        if _may_round(piece):
            return None
        try:
            return orjson.loads(b"[%b]" % piece), end
        except orjson.JSONDecodeError:
            continue
    return None


def _exact_list_items(
    file: BinaryIO, offset: int, index: int, path: str | os.PathLike, until: int | None = None
) -> Generator[Item, None, tuple[int | None, int]]:
    """Yield the values of a list one by one, and raise InputError with the reason if the list is malformed.

    Reading begins at `offset`, the end of the value before `index` or the start of the file. Returns the end of the
    first value that reaches `until`, or None at the end of the list, and the index of the next value.

    Each iteration consumes `[ value` or `, value` from a window of the file, which grows until a value fits.
    """
    file.seek(offset)
    utf8, take = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    window, at = "", 0  # window[at] is the first character not yet consumed, at byte `offset`
    more = good = True  # whether there is more to read, and whether it is UTF-8

    def stop(what: str) -> InputError:
        return InputError(f"{path}: {what} near byte {offset}, after {index} values; expected a JSON list of objects.")

    while True:
        wrong = "the file ends inside the list"
        mark = _space(window, at).end()
        start = _space(window, mark + 1).end()
        last = mark if index else start  # position of "]" if the list ends here
        if window.startswith("]", last):
            if window[last + 1 :].strip(" \t\r\n"):
                raise stop("text after the end of the list")
            if good and not more:
                return None, index
        elif start < len(window):
            if window[mark] != ("," if index else "["):
                raise stop(f"{window[mark]!r}")
            try:
                value, end = take(window, start)
            except json.JSONDecodeError as error:
                wrong, position = f"malformed JSON ({error.msg})", error.pos
                cut = error.msg.startswith("Unterminated string")
            except (ValueError, RecursionError) as error:
                raise stop(f"malformed JSON ({error})") from None
            else:
                after = _space(window, end).end()
                if after < len(window) and window[after] in ",]":
                    yield _item((index, None, offset + start - at, value))
                    offset += start - at + len(window[start:end].encode())  # the text between values is ASCII
                    at, index = end, index + 1
                    if until is not None and offset >= until:
                        return offset, index
                    continue
                wrong, position = "no comma after a value", end
                cut = after == len(window)
            # A value cut off by the window is an open string, an error near the cut, or a shorter number ("0" of 0.5).
            if not cut and position < len(window) - 16:
                raise stop(wrong)
        if not good:
            raise stop("text that is not UTF-8")
        if not more:
            raise stop(wrong)
        if len(window) - at > LONGEST_VALUE:
            raise stop(f"a value of more than {LONGEST_VALUE:,} characters")
        data = file.read(max(CHUNK_BYTES, len(window) - at))  # at least doubles, so a long value takes linear time
        more = bool(data)
        try:
            text = utf8.decode(data, final=not more)
        except UnicodeDecodeError as error:
            text, good = error.object[: error.start].decode(), False
        window, at = window[at:] + text, 0
