"""Stream raw records from JSON, parquet, CSV, COCO's object of two lists, or a folder of images and texts.

The container is detected from the file itself; the meaning of the records does not matter here. Nothing large is read
into memory at once. Each record is one decoded value:

    JSON, parquet   the value itself
    CSV             {column: cell}
    COCO captions   {"image": {...}, "captions": [...]}, or {"annotation": {...}} if its image is not in the file
    folder          {"picture": path, "text": ...}, without "text" if there is no text file, with a RecordError if it is
                    not read; {"text_file": path} if there is no image
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import ijson

from config import InputError
from config.files import open_regular
from dataset.json_stream import Item, NotJson, stream_json
from dataset.record import RecordError
from visual.images import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import pyarrow

PARQUET_ROWS = 64  # decoded at a time; a row with its images may take megabytes
DEEPEST = 64  # largest depth of nesting in COCO's file; a valid file has four levels
LONGEST_TOKEN = 1 << 20  # bytes of one string, number or blank in COCO's file
LONGEST_CELL = 1 << 24  # characters in a cell of a CSV; the standard library's own limit is 128 KiB
TABLES = (".csv", ".tsv")


class Chunk(NamedTuple):
    """Consecutive records of one file."""

    file: Path
    first: int  # number of records in the files before this one
    items: list[Item]  # indices are within the file


class _Part(NamedTuple):
    """One file of a source and the function that reads its records."""

    file: Path
    items: Callable[[], Iterator[Item]]


def stream_records(
    annotations: Path, images: Path | None, *, limit: int | None, first_size: int, size: int
) -> Iterator[Chunk]:
    """Yield the first `limit` records of a source: one chunk of at most `first_size`, then chunks of at most `size`.

    Raises InputError if reading cannot continue: the file does not exist, is damaged, or has an unknown form.
    """
    first = 0
    for file, open_items in _parts(annotations, images):
        left = None if limit is None else limit - first
        items, count = itertools.islice(open_items(), left), 0
        while chunk := list(itertools.islice(items, size if first + count else first_size)):
            yield Chunk(file, first, chunk)
            count += len(chunk)
        first += count


def stamps(annotations: Path, images: Path | None) -> list:
    """Values that change when the raw records change: name, size and modification time of every file with records."""
    if annotations.is_dir() and not (files := _tables(annotations)):
        files = [annotations / name for name in _texts(annotations)]
        return [_stamp(file) for file in files] + sorted(_images(images or annotations))
    return [_stamp(file) for file in (files if annotations.is_dir() else [annotations])]


def _stamp(file: Path) -> list:
    try:
        state = os.stat(file)
    except OSError as error:
        raise InputError(f"annotations {file}: {error.strerror}; download them first.") from None
    return [str(file), state.st_size, state.st_mtime_ns]


def _item(index: int, value: object, line: int | None = None) -> Item:
    """An item of a container other than JSON, where offsets have no meaning."""
    return Item(index=index, line=line, offset=0, value=value)


def _parts(path: Path, images: Path | None) -> list[_Part]:
    if path.is_dir() and not (files := _tables(path)):
        return [_Part(path, partial(_folder_items, path, images or path))]
    return [_Part(file, partial(_reader_of(file), file)) for file in (files if path.is_dir() else [path])]


def _reader_of(file: Path) -> Callable[[Path], Iterator[Item]]:
    if file.suffix.lower() in TABLES:
        return _csv_items
    try:
        with open_regular(file) as opened:
            head = opened.read(64)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a file of raw records.") from None
    if head.startswith(b"PAR1"):
        return _parquet_items
    is_object = head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    return _coco_items if is_object and _is_coco(file) else stream_json


def _tables(folder: Path) -> list[Path]:
    """The parquet shards of a folder, sorted by name, or its only CSV; empty for a folder of images."""
    try:
        files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable.") from None
    shards = [file for file in files if file.suffix == ".parquet"]
    tables = [file for file in files if file.suffix.lower() in TABLES]
    if not shards and len(tables) > 1:
        names = ", ".join(file.name for file in tables[:5])
        raise InputError(f"{folder}: contains {len(tables)} tables ({names}); set annotations to one of them.")
    return shards or tables


def _parquet_items(file: Path) -> Iterator[Item]:
    import pyarrow  # here because the import takes longer than reading most annotations
    import pyarrow.parquet

    index = 0
    try:
        # Read a buffered stream instead of whole column chunks, which take gigabytes if they contain images.
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            for batch in table.iter_batches(PARQUET_ROWS, use_threads=False):
                for value in _rows(batch):
                    yield _item(index, value)
                    index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: parquet file damaged after {index} rows ({error}); download it again.") from None


def _rows(batch: pyarrow.RecordBatch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [NotJson(f"text that is not UTF-8: {error.reason}.")]
        return [row for k in range(len(batch)) for row in _rows(batch.slice(k, 1))]


def _csv_items(file: Path) -> Iterator[Item]:
    csv.field_size_limit(LONGEST_CELL)
    try:
        # Bytes that are not UTF-8 become half surrogate pairs, which refuse the record instead of the whole file.
        with io.TextIOWrapper(open_regular(file), "utf-8-sig", errors="surrogateescape", newline="") as opened:
            header = opened.readline()
            opened.seek(0)
            rows = csv.reader(opened, delimiter=max(",\t;", key=header.count))
            columns = [name.strip().lower() for name in next(rows, [])]
            line, index = rows.line_num + 1, 0
            for row in rows:
                if row:
                    value: dict | NotJson = dict(zip(columns, row, strict=False))
                    if len(row) != len(columns):
                        value = NotJson(
                            f"{len(row)} cells in a table of {len(columns)} columns ({', '.join(columns)})."
                        )
                    yield _item(index, value, line=line)
                    index += 1
                line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file} line {line}: {error}; expected a table of comma-separated values.") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a table of comma-separated values.") from None


def _is_coco(file: Path) -> bool:
    """True if the first object of a file is COCO's, with the lists "images" and "annotations" in any order."""
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
    """Yield ijson's events of a file's first value: (depth after the event, key of the outer object, event, value).

    ijson's own prefixes are not used, because their cost grows with the square of the depth.
    """
    depth, key = 0, None
    with open_regular(file) as opened:
        _skip_bom(opened)
        bounded = _Bounded(opened)
        # Numbers as floats: an integer with thousands of digits would end the process (ijson 3.6).
        for event, value in ijson.basic_parse(bounded, use_float=True, multiple_values=True):
            bounded.left = LONGEST_TOKEN
            depth += (event in ("start_map", "start_array")) - (event in ("end_map", "end_array"))
            if depth > DEEPEST:
                raise ijson.JSONError(f"nested more than {DEEPEST} deep")
            if depth == 1 and event == "map_key":
                key = value
            yield depth, key, event, value


class _Bounded:
    """A file that can be read up to `left` bytes further: ijson takes quadratic time for a long string."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, LONGEST_TOKEN

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ijson.JSONError(f"a text, number or blank of more than {LONGEST_TOKEN:,} bytes")
        return data


def _coco_items(file: Path) -> Iterator[Item]:
    """Yield every image with its captions, then the annotations whose image is not in the file.

    Keeps all captions in memory.
    """
    captions: dict[object, list] = {}
    for annotation in _coco_list(file, "annotations"):
        captions.setdefault(_image_id(annotation), []).append(
            annotation.get("caption") if isinstance(annotation, dict) else None
        )
    index = -1
    for index, image in enumerate(_coco_list(file, "images")):
        name = image.get("id") if isinstance(image, dict) else None
        found = captions.pop(name, []) if isinstance(name, (int, str)) else []
        yield _item(index, {"image": image, "captions": found})
    if captions:
        orphans = (one for one in _coco_list(file, "annotations") if _image_id(one) in captions)
        for number, annotation in enumerate(orphans, start=index + 1):
            yield _item(number, {"annotation": annotation})


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


def _skip_bom(file: BinaryIO) -> None:
    file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)


def _folder_items(folder: Path, images: Path) -> Iterator[Item]:
    """Yield images with the text files of the same name, sorted by name."""
    texts = {name[: -len(".txt")]: folder / name for name in _texts(folder)}
    names = _images(images)
    if not texts and not names:
        raise InputError(f"{folder}: contains no image, .txt, .parquet or .csv file; expected at least one of these.")
    roots = [os.path.join(os.path.realpath(one), "") for one in (folder, images)]
    stems = {os.path.splitext(name)[0] for name in names}
    entries = [(os.path.splitext(name)[0], name) for name in names] + [(stem, "") for stem in texts.keys() - stems]
    for index, (stem, image) in enumerate(sorted(entries)):
        text = texts.get(stem)
        value: dict[str, object] = {"picture": image} if image else {"text_file": str(text)}
        if image and text:
            value["text"] = _text_of(text, roots)
        yield _item(index, value)


def _text_of(file: Path, roots: list[str]) -> str | RecordError:
    """Return the content of a .txt file, or why it is not read. roots: the folders that a link may lead to."""
    try:
        if file.is_symlink() and not os.path.realpath(file).startswith(tuple(roots)):
            detail = f"{file} is a link to {os.path.realpath(file)}, outside its folder; replace the link by a copy."
            return RecordError("path_outside_folder", detail)
        with io.TextIOWrapper(open_regular(file), "utf-8-sig", errors="surrogateescape", newline="") as opened:
            text = opened.read(LONGEST_CELL + 1)
    except InputError as error:
        return RecordError("unreadable_text", str(error))
    except OSError as error:
        detail = f"{file}: cannot be read ({error.strerror}); make it readable or remove it."
        return RecordError("unreadable_text", detail)
    if len(text) > LONGEST_CELL:
        return RecordError("unreadable_text", f"{file}: more than {LONGEST_CELL:,} characters; shorten it.")
    return text


def _texts(folder: Path) -> list[str]:
    return sorted(name for name in _walk(folder) if name.lower().endswith(".txt"))


def _images(folder: Path) -> list[str]:
    return [name for name in _walk(folder) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]


def _walk(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, without hidden files and folders."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = os.path.relpath(root, folder)
        yield from (name if here == "." else f"{here}/{name}" for name in files if not name.startswith("."))
