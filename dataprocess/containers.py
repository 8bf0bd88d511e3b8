"""What holds raw records: JSON, parquet, CSV, COCO's object of two lists, a folder of pictures and texts -> a stream.

Told by the file itself, whatever the records mean; nothing is read whole that may be large. A record comes out as one
decoded value: of JSON and parquet as it stands there, of a CSV {column: cell}, of COCO's captions {"image": {...},
"captions": [...]} (or {"annotation": {...}}, about no image in the file), of a folder {"picture": path, "text": ...}
(without "text" where there is none, or {"text_file": path}, beside no picture).
"""

from __future__ import annotations

import codecs
import csv
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ijson

from config import InputError
from dataset.json_stream import Item, NotJson, stream_json
from visual.images import IMAGE_SUFFIXES

PARQUET_ROWS = 64  # decoded at a time: with their pictures, rows may be megabytes each
DEEPEST = 64  # that COCO's objects are nested; they are four deep
LONGEST_CELL = 1 << 24  # of a CSV; the standard library's own limit is 128 KiB
TABLES = (".csv", ".tsv")


class Chunk(NamedTuple):
    """Some consecutive records of one file."""

    file: Path
    first: int  # how many records the files before this one hold
    items: list[Item]  # each with its index within the file


class _Part(NamedTuple):
    """One file of a source, and how its records are read."""

    file: Path
    items: Callable[[], Iterator[Item]]


def stream_records(
    annotations: Path, images: Path | None, limit: int | None, sample: int, size: int
) -> Iterator[Chunk]:
    """The first `limit` records of a source, in chunks of at most `size`; before them a first one of at most `sample`.

    Raises InputError where nothing can be read any further: no such file, damaged, or not in a form that is known.
    """
    first = 0
    for file, open_items in _parts(annotations, images):
        left = None if limit is None else limit - first
        items, count = itertools.islice(open_items(), left), 0
        while chunk := list(itertools.islice(items, size if first + count else sample)):
            yield Chunk(file, first, chunk)
            count += len(chunk)
        first += count


def stamps(annotations: Path, images: Path | None) -> list:
    """What changes when the raw records change: of every file that holds some, its name, size and modification time."""
    if annotations.is_dir() and not (files := _tables(annotations)):
        texts, pictures = _texts(annotations), _pictures(images or annotations)
        files = [annotations / name for name in texts]
        return [_stamp(file) for file in files] + sorted(pictures)
    return [_stamp(file) for file in (files if annotations.is_dir() else [annotations])]


def _stamp(file: Path) -> list:
    try:
        state = os.stat(file)
    except OSError as error:
        raise InputError(f"annotations {file}: {error.strerror}; download them first.") from None
    return [str(file), state.st_size, state.st_mtime_ns]


def _parts(path: Path, images: Path | None) -> list[_Part]:
    if path.is_dir() and not (files := _tables(path)):
        return [_Part(path, partial(_folder_items, path, images or path))]
    return [_Part(file, partial(_reader_of(file), file)) for file in (files if path.is_dir() else [path])]


def _reader_of(file: Path) -> Callable[[Path], Iterator[Item]]:
    if file.suffix.lower() in TABLES:
        return _csv_items
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a file of raw records.") from None
    if head.startswith(b"PAR1"):
        return _parquet_items
    is_object = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    return _coco_items if is_object and _is_coco(file) else stream_json


def _tables(folder: Path) -> list[Path]:
    """The parquet shards of a folder in the order of their names, or its one CSV; empty for a folder of pictures."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    shards = [file for file in files if file.suffix == ".parquet"]
    tables = [file for file in files if file.suffix.lower() in TABLES]
    if not shards and len(tables) > 1:
        names = ", ".join(file.name for file in tables[:5])
        raise InputError(f"{folder}: holds {len(tables)} tables ({names}); name one of them as annotations.")
    return shards or tables


def _parquet_items(file: Path) -> Iterator[Item]:
    import pyarrow  # takes longer to import than most annotations take to read
    import pyarrow.parquet

    index = 0
    try:
        # A buffered stream instead of whole column chunks: pictures make those gigabytes.
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            for batch in table.iter_batches(PARQUET_ROWS, use_threads=False):
                for value in _rows(batch):
                    yield Item(index, None, 0, value)
                    index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: the parquet file is damaged after {index} rows ({error}); get it again.") from None


def _rows(batch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [NotJson(f"text that is not UTF-8: {error.reason}.")]
        return [row for k in range(len(batch)) for row in _rows(batch.slice(k, 1))]


def _csv_items(file: Path) -> Iterator[Item]:
    csv.field_size_limit(LONGEST_CELL)
    try:
        # Bytes that are no UTF-8 become half surrogate pairs, for which the record is refused, not the file.
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            header = opened.readline()
            opened.seek(0)
            rows = csv.reader(opened, delimiter=max(",\t;", key=header.count))
            columns = [name.strip().lower() for name in next(rows, [])]
            line, index = rows.line_num + 1, 0
            for row in rows:
                if row:
                    value = dict(zip(columns, row, strict=False))
                    if len(row) != len(columns):
                        value = NotJson(
                            f"{len(row)} cells in a table of {len(columns)} columns ({', '.join(columns)})."
                        )
                    yield Item(index, line, 0, value)
                    index += 1
                line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file} line {line}: {error}; expected a table of comma-separated values.") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a table of comma-separated values.") from None


def _is_coco(file: Path) -> bool:
    """Whether the first object of a file is COCO's, with its lists "images" and "annotations" in any order."""
    try:
        for depth, key, event, value in _events(file):
            if depth == 2 and event == "start_array" and key == "annotations":
                return True
            if depth == 3 and event == "map_key" and key == "images" and value == "file_name":
                return True
            if depth == 0:
                return False
    except (ijson.JSONError, UnicodeDecodeError):
        return False
    return False


def _events(file: Path) -> Iterator[tuple[int, str | None, str, object]]:
    """ijson's events of a file's first value: (depth after it, the outer object's key that it belongs to, event, value).
    Without ijson's own prefixes, whose cost grows with the square of the depth."""
    depth, key = 0, None
    with open(file, "rb") as opened:
        _skip_bom(opened)
        # as floats: a whole number of thousands of digits would end the process (ijson 3.6)
        for event, value in ijson.basic_parse(opened, use_float=True, multiple_values=True):
            depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
            if depth > DEEPEST:
                raise ijson.JSONError(f"nested more than {DEEPEST} deep")
            if depth == 1 and event == "map_key":
                key = value
            yield depth, key, event, value


def _coco_items(file: Path) -> Iterator[Item]:
    """Every image with its captions; then the annotations about no image in the file. Holds the captions in memory."""
    captions: dict[object, list] = {}
    for annotation in _coco_list(file, "annotations"):
        captions.setdefault(_image_id(annotation), []).append(
            annotation.get("caption") if isinstance(annotation, dict) else None
        )
    index = -1
    for index, image in enumerate(_coco_list(file, "images")):
        name = image.get("id") if isinstance(image, dict) else None
        found = captions.pop(name, []) if isinstance(name, (int, str)) else []
        yield Item(index, None, 0, {"image": image, "captions": found})
    if captions:
        orphans = (one for one in _coco_list(file, "annotations") if _image_id(one) in captions)
        for number, annotation in enumerate(orphans, start=index + 1):
            yield Item(number, None, 0, {"annotation": annotation})


def _image_id(annotation: object) -> int | str | None:
    name = annotation.get("image_id") if isinstance(annotation, dict) else None
    return name if isinstance(name, (int, str)) else None


def _coco_list(file: Path, name: str) -> Iterator[object]:
    builder = ijson.ObjectBuilder()
    try:
        for depth, key, event, value in _events(file):
            if key == name and depth >= 2 and not (depth == 2 and event == "start_array"):
                builder.event(event, value)
                if depth == 2:
                    yield builder.value
                    builder = ijson.ObjectBuilder()
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InputError(f'{file}: malformed JSON in "{name}" ({error}); expected COCO\'s captions.') from None


def _skip_bom(file) -> None:
    file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)


def _folder_items(folder: Path, images: Path) -> Iterator[Item]:
    """Pictures and the text files of the same name, in the order of their names."""
    texts = {name[: -len(".txt")]: folder / name for name in _texts(folder)}
    pictures = _pictures(images)
    if not texts and not pictures:
        raise InputError(f"{folder}: holds no picture, no .txt, no .parquet and no .csv; expected one of these.")
    stems = {os.path.splitext(name)[0] for name in pictures}
    entries = [(os.path.splitext(name)[0], name) for name in pictures] + [(stem, "") for stem in texts.keys() - stems]
    for index, (stem, picture) in enumerate(sorted(entries)):
        text = texts.get(stem)
        value = {"picture": picture} if picture else {"text_file": str(text)}
        if picture and text:
            with open(text, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
                value["text"] = opened.read()
        yield Item(index, None, 0, value)


def _texts(folder: Path) -> list[str]:
    return sorted(name for name in _walk(folder) if name.lower().endswith(".txt"))


def _pictures(folder: Path) -> list[str]:
    return [name for name in _walk(folder) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]


def _walk(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it; hidden ones are left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = os.path.relpath(root, folder)
        yield from (name if here == "." else f"{here}/{name}" for name in files if not name.startswith("."))
