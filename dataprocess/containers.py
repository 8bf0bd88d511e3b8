"""Stream raw records from JSON, Parquet, Arrow, CSV, an object of two lists, or a folder of images and texts.

The container is detected from the file itself; the meaning of the records does not matter here. Nothing large is read
into memory at once. Each record is one decoded value:

    JSON, tables    the value itself; a row of a table is {column: cell}
    COCO captions   {"image": {...}, "captions": [...]}, or {"annotation": {...}} if its image is not in the file
    VQAv2           {"question", "answer", "image", ...}
    folder          {"picture": path, "text": ...}; an image alone has no "text", and a text file that cannot be read is a
                    RecordError; {"text_file": path} for a text file alone
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataprocess.folders import (
    TABLES,
    Group,
    files_with_records,
    folder_items,
    image_names,
    split_groups,
    text_names,
    unused_files,
)
from dataprocess.keys import image_keys_of
from dataprocess.sniff import Kind, kind_of, plain_file
from dataprocess.tables import arrow_items, csv_items, parquet_items
from dataprocess.two_lists import two_lists_reader
from dataset.json_stream import Item, stream_json


class Chunk(NamedTuple):
    """Consecutive records of one file."""

    file: Path
    first: int  # number of records in the files before this one
    items: list[Item]  # indices are within the file


def groups_of(annotations: Path, split: str, *, has_validation: bool) -> tuple[list[Group], list[str]]:
    """The files of a source, by the side that their names say, and notes about them. A folder of images is one group."""
    if not annotations.is_dir():
        return [Group([annotations])], []
    if not (files := files_with_records(annotations)):
        return [Group([annotations])], unused_files(annotations)
    return split_groups(files, split, has_validation=has_validation)


def stream_records(
    annotations: Path,
    images: Path | None,
    *,
    files: Sequence[Path] | None = None,
    limit: int | None,
    first_size: int,
    size: int,
) -> Iterator[Chunk]:
    """Yield the first `limit` records of a source: one chunk of at most `first_size`, then chunks of at most `size`.

    files: of the source that are read; by default all. Raises InputError if reading cannot continue: a file does not exist,
    is damaged, or has an unknown form.
    """
    first = 0
    if files is None:
        files = files_with_records(annotations) or [annotations] if annotations.is_dir() else [annotations]
    for file in files:
        left = None if limit is None else limit - first
        items, count = itertools.islice(_items_of(file, images, annotations), left), 0
        while chunk := list(itertools.islice(items, size if first + count else first_size)):
            yield Chunk(file, first, chunk)
            count += len(chunk)
        first += count


def stamps(annotations: Path, images: Path | None) -> list:
    """Values that change when the raw records change: name, size and modification time of every file with records."""
    if annotations.is_dir() and not (files := files_with_records(annotations)):
        files = [annotations / name for name in text_names(annotations)]
        return [_stamp(file) for file in files] + sorted(image_names(images or annotations))
    return [_stamp(file) for file in (files if annotations.is_dir() else [annotations])]


def notes_on(file: Path) -> list[str]:
    """A note about text that is not UTF-8."""
    if file.is_dir():
        return []
    encoding = kind_of(file).encoding
    return [f"{file.name}: read as {encoding}; if words look wrong, save it as UTF-8"] if encoding != "utf-8" else []


def _stamp(file: Path) -> list:
    try:
        state = os.stat(file)
    except OSError as error:
        raise InputError(f"annotations {file}: {error.strerror}; download them first.") from None
    return [str(file), state.st_size, state.st_mtime_ns]


def _items_of(file: Path, images: Path | None, annotations: Path) -> Iterator[Item]:
    """The records of one file, or of a folder of images and texts."""
    if file.is_dir():
        return folder_items(file, images or file)
    kind = kind_of(file)
    if kind.name != "text":
        return {"parquet": parquet_items, "arrow": arrow_items}[kind.name](file)
    if _is_table(file):
        if kind.is_json:
            raise InputError(f"{file}: is JSON, though its name says a table; rename it to .json.")
        items = csv_items(file, kind)
    else:
        items = _json_items(file, kind)
    beside = os.path.relpath(file.parent, annotations) if file.stem == "metadata" and annotations.is_dir() else "."
    return items if beside == "." else map(partial(_moved, f"{beside}/"), items)


def _is_table(file: Path) -> bool:
    return (
        file.suffix.lower() in TABLES or (file.suffixes[-2:-1] or [""])[0].lower() in TABLES and len(file.suffixes) > 1
    )


def _json_items(file: Path, kind: Kind) -> Iterator[Item]:
    with plain_file(file, kind) as plain:
        read: Callable[[Path], Iterator[Item]] | None = two_lists_reader(plain) if kind.start.startswith("{") else None
        yield from (read or stream_json)(plain)


def _moved(folder: str, item: Item) -> Item:
    """A record of an imagefolder's metadata, whose paths are relative to the folder of that file."""
    if isinstance(item.value, dict):
        moved = {
            key: folder + value
            for key in image_keys_of(item.value)
            if isinstance(value := item.value[key], str) and value and ":" not in value[:9] and value[0] != "/"
        }
        return item._replace(value=item.value | moved)
    return item
