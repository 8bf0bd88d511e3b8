"""A file of JSON values as a stream: JSON Lines or one JSON list, of any size, in little memory.

Knows nothing of what the values mean: it serves the QA file and the raw annotations alike. orjson reads what it can; the
standard library reads what orjson refuses (NaN, half a surrogate pair) and says what is wrong with the rest. So nothing
depends on which of the two has read a value.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Generator, Iterator
from functools import partial
from itertools import accumulate, count, repeat
from typing import BinaryIO, NamedTuple

import orjson

from config import InputError

CHUNK_BYTES = 1 << 15  # read at a time: values that fit a CPU's cache come twice as fast as those of megabytes
CUTS = 4  # how many places are tried as the end of a record

_space = re.compile(r"[ \t\r\n]*").match
_next_object = re.compile(rb'[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"[^"\\]*"').match  # what separates it, and its first key
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG = b"0" * 19


class NotJson(str):
    """Stands in the place of a line's value that could not be decoded, and says why."""


class Item(NamedTuple):
    """One JSON value of a file."""

    index: int  # from 0
    line: int | None  # from 1; None in a list
    offset: int | None  # of its line, or in a list of its first byte; None in a list that is read without offsets
    value: object  # NotJson where a line could not be decoded


_item = partial(tuple.__new__, Item)  # from a tuple of the four, at half the price


def stream_json(path: str | os.PathLike, offsets: bool = False) -> Iterator[Item]:
    """The values of a UTF-8 file, JSON Lines or one JSON list, one at a time; blank lines and a BOM are skipped.

    offsets: tell of a list, too, where its values lie in the file; it is then read about five times slower.
    Raises InputError where nothing can be read any further: no such file, a list that is cut off or malformed, one object
    over several lines.
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a JSON Lines file or a JSON list.") from None
    with file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        first = file.read(1)
        while first and first in b" \t\r\n":
            first = file.read(1)
        file.seek(start)
        if first != b"[":
            yield from _line_items(file, start, path)
        elif offsets:
            yield from _exact_list_items(file, start, 0, path)
        else:
            yield from _list_items(file, start, path)


def decode(data: bytes) -> object:
    """The JSON value that UTF-8 bytes hold. Raises ValueError or RecursionError, with the standard library's message."""
    if not _may_round(data):
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
    return json.loads(data.decode())


def _may_round(data: bytes) -> bool:
    """Whether JSON may hold a whole number beyond 64 bits, which orjson makes a float of: it has 19 digits or more."""
    zeros = data.translate(_ZEROS)
    at = zeros.find(_LONG)
    while at >= 0:
        if at == 0 or zeros[at - 1] in b" \t\r\n[:,-":  # not in the middle of a name
            return True
        at = zeros.find(_LONG, at + len(_LONG))
    return False


def _line_items(file: BinaryIO, offset: int, path) -> Iterator[Item]:
    index, line = 0, 1  # of the next value, of the next line
    while lines := file.readlines(CHUNK_BYTES):
        numbers, offsets = range(line, line + len(lines)), accumulate(map(len, lines), initial=offset)
        try:
            if _may_round(b"".join(lines)):
                raise ValueError("for decode")
            values = list(map(orjson.loads, lines))
        except ValueError:  # a blank line is one, too
            for number, start, data in zip(numbers, offsets, lines, strict=False):
                if not data.isspace():
                    yield Item(index, number, start, _line_value(data, index, path))
                    index += 1
        else:
            yield from map(_item, zip(count(index), numbers, offsets, values, strict=False))
            index += len(values)
        line, offset = line + len(lines), offset + sum(map(len, lines))


def _line_value(data: bytes, index: int, path) -> object:
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        return NotJson(f"not UTF-8 from byte {error.start} of the line on.")
    except (ValueError, RecursionError) as error:
        text = data.strip(b" \t\r\n")
        if index == 0 and text.startswith(b"{") and text.endswith((b"{", b"[", b",")):
            raise InputError(
                f"{path}: a JSON object over several lines; expected a list of objects, or one object a line."
            ) from None
        return NotJson(f"not a JSON value: {error}.")


def _list_items(file: BinaryIO, offset: int, path) -> Iterator[Item]:
    """A list in pieces of many objects, one call of orjson for each. A piece begins after a value and ends where what stood
    at its beginning (a comma and an object's first key) stands once more: what is a list between brackets ends where a value
    ends, so a wrong guess cannot be taken for a right one. What no guess cuts well, and what orjson refuses or would round,
    is read exactly."""
    index = 0
    while True:
        before = max(offset - 2, 0)
        file.seek(before)
        window = file.read(CHUNK_BYTES)
        at = offset - before  # window[at]: the first byte not taken
        values = _objects(window, at) if index else None
        if values is None:
            end, index = yield from _exact_list_items(file, offset, index, path, until=offset + CHUNK_BYTES)
            if end is None:
                return
            offset = end
        else:
            objects, end = values
            yield from map(_item, zip(count(index), repeat(None), repeat(None), objects))  # ends with objects
            offset, index = before + end, index + len(objects)


def _objects(window: bytes, at: int) -> tuple[list, int] | None:
    """(values, where the last one ends) of as many of a list's objects after window[:at] as are surely whole."""
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
    file: BinaryIO, offset: int, index: int, path, until: int | None = None
) -> Generator[Item, None, tuple[int | None, int]]:
    """The list from `offset` on, where the value before `index` ends (or the file begins): value by value, and with the
    reason why it ends where it should not. Returns where the first value that reaches `until` ends, None for the end of the
    list, and the index after it.

    Each turn of the loop takes `[ value` or `, value` from a window on the file, widening it until one fits.
    """
    file.seek(offset)
    utf8, take = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    window, at = "", 0  # window[at]: the first character not taken; `offset`: its byte
    more = good = True  # whether more can be read, and whether it is UTF-8

    def stop(what: str) -> InputError:
        return InputError(f"{path}: {what} near byte {offset}, after {index} values; expected a JSON list of objects.")

    while True:
        wrong = "the file ends inside the list"
        mark = _space(window, at).end()
        start = _space(window, mark + 1).end()
        last = mark if index else start  # where "]" stands, if the list ends here
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
                    yield Item(index, None, offset + start - at, value)
                    offset += start - at + len(window[start:end].encode())  # what stands between values is ASCII
                    at, index = end, index + 1
                    if until is not None and offset >= until:
                        return offset, index
                    continue
                wrong, position = "no comma after a value", end
                cut = after == len(window)
            # A value that the window cuts off is an open string, an error near the cut, or a shorter number ("0" of 0.5).
            if not cut and position < len(window) - 16:
                raise stop(wrong)
        if not good:
            raise stop("text that is not UTF-8")
        if not more:
            raise stop(wrong)
        data = file.read(max(CHUNK_BYTES, len(window) - at))  # at least doubling: a long value is not read n times
        more = bool(data)
        try:
            text = utf8.decode(data, final=not more)
        except UnicodeDecodeError as error:
            text, good = error.object[: error.start].decode(), False
        window, at = window[at:] + text, 0
