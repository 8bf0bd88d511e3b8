"""A file of JSON values as a stream: JSON Lines or one JSON list, of any size, in little memory.

Knows nothing of what the values mean: it serves the QA file and the raw annotations alike.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from config import InputError

CHUNK_BYTES = 1 << 20  # how much of a list is read at a time

_space = re.compile(r"[ \t\r\n]*").match


class NotJson(str):
    """Stands in the place of a line's value that could not be decoded, and says why."""


class Item(NamedTuple):
    """One JSON value of a file."""

    index: int  # from 0
    line: int | None  # from 1; None in a list
    offset: int  # of its first byte
    value: object  # NotJson where a line could not be decoded


def stream_json(path: str | os.PathLike) -> Iterator[Item]:
    """The values of a UTF-8 file, JSON Lines or one JSON list, one at a time; blank lines and a BOM are skipped.

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
        yield from (_list_items if first == b"[" else _line_items)(file, start, path)


def _line_items(file: BinaryIO, offset: int, path) -> Iterator[Item]:
    index = 0
    for line, data in enumerate(file, start=1):
        if not data.isspace():
            text = data.lstrip(b" \t\r\n")
            try:
                value = json.loads(text.decode())
            except UnicodeDecodeError as error:
                value = NotJson(f"not UTF-8 from byte {error.start} of the line on.")
            except (ValueError, RecursionError) as error:
                if index == 0 and text.startswith(b"{") and text.rstrip().endswith((b"{", b"[", b",")):
                    raise InputError(
                        f"{path}: a JSON object over several lines; expected a list of objects, or one object a line."
                    ) from None
                value = NotJson(f"not a JSON value: {error}.")
            yield Item(index, line, offset + len(data) - len(text), value)
            index += 1
        offset += len(data)


def _list_items(file: BinaryIO, offset: int, path) -> Iterator[Item]:
    """Each turn of the loop takes `[ value` or `, value` from a window on the file, widening it until one fits."""
    utf8, decode = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    window, at, index, more = "", 0, 0, True  # window[at]: the first character not taken; `offset`: its byte

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
            if not more:
                return
        elif start < len(window):
            if window[mark] != ("," if index else "["):
                raise stop(f"{window[mark]!r}")
            try:
                value, end = decode(window, start)
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
                    continue
                wrong, position = "no comma after a value", end
                cut = after == len(window)
            # A value that the window cuts off is an open string, an error near the cut, or a shorter number ("0" of 0.5).
            if not cut and position < len(window) - 16:
                raise stop(wrong)
        if more:
            data = file.read(max(CHUNK_BYTES, len(window) - at))  # at least doubling: a long value is not read n times
            more = bool(data)
            try:
                window, at = window[at:] + utf8.decode(data, final=not more), 0
            except UnicodeDecodeError:
                raise stop("text that is not UTF-8") from None
        else:
            raise stop(wrong)
