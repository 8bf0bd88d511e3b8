"""Stream the rows of tables: Parquet, Arrow and CSV. The meaning of the columns does not matter here."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from config import InputError
from dataprocess.sniff import Kind, open_text
from dataset.json_stream import Item, NotJson

if TYPE_CHECKING:
    import pyarrow

PARQUET_ROWS = 64  # decoded at a time; a row with its images may take megabytes
LONGEST_CELL = 1 << 24  # characters in a cell of a CSV; the standard library's own limit is 128 KiB


def item_of(index: int, value: object, line: int | None = None) -> Item:
    """An item of a container other than JSON, where offsets have no meaning."""
    return Item(index=index, line=line, offset=0, value=value)


def parquet_items(file: Path) -> Iterator[Item]:
    """Yield the rows of a Parquet file."""
    import pyarrow  # here because the import takes longer than reading most annotations
    import pyarrow.parquet

    index = 0
    try:
        # Read a buffered stream instead of whole column chunks, which take gigabytes if they contain images.
        with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            for batch in table.iter_batches(PARQUET_ROWS, use_threads=False):
                for value in _rows(batch):
                    yield item_of(index, value)
                    index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: parquet file damaged after {index} rows ({error}); download it again.") from None


def arrow_items(file: Path) -> Iterator[Item]:
    """Yield the rows of an Arrow file or stream, as `datasets.save_to_disk` writes them."""
    import pyarrow
    import pyarrow.ipc

    index = 0
    try:
        with pyarrow.memory_map(str(file)) as data:
            is_file = data.read(6) == b"ARROW1"
            data.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(data)
                batches = (table.get_batch(k) for k in range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(data))
            for batch in batches:
                for start in range(0, len(batch), PARQUET_ROWS):
                    for value in _rows(batch.slice(start, PARQUET_ROWS)):
                        yield item_of(index, value)
                        index += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file}: arrow file damaged after {index} rows ({error}); download it again.") from None


def _rows(batch: pyarrow.RecordBatch) -> list:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [NotJson(f"text that is not UTF-8: {error.reason}.")]
        return [row for k in range(len(batch)) for row in _rows(batch.slice(k, 1))]


def csv_items(file: Path, kind: Kind) -> Iterator[Item]:
    """Yield the rows of a CSV as {column: cell}, the columns in lower case."""
    csv.field_size_limit(LONGEST_CELL)
    try:
        with open_text(file, kind) as opened:
            header = opened.readline()
            rows = csv.reader(
                itertools.chain([header.removeprefix("\ufeff")], opened), delimiter=max(",\t;", key=header.count)
            )
            columns = [name.strip().lower() for name in next(rows, [])]
            line, index = rows.line_num + 1, 0
            if doubled := next((name for name in columns if name and columns.count(name) > 1), None):
                raise InputError(f'{file}: two columns have the name "{doubled}"; rename or remove one.')
            for row in rows:
                if row:
                    value: dict | NotJson = dict(zip(columns, row, strict=False))
                    if len(row) != len(columns):
                        value = NotJson(
                            f"{len(row)} cells in a table of {len(columns)} columns ({', '.join(columns)})."
                        )
                    yield item_of(index, value, line=line)
                    index += 1
                line = rows.line_num + 1
    except UnicodeError as error:
        raise InputError(f"{file}: not {kind.encoding} after {index} rows ({error}); save it as UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{file} line {line}: {error}; expected a table of comma-separated values.") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a table of comma-separated values.") from None
