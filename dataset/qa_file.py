"""A file of QA records as a sequence that stays on disk. `dataset.record` defines a record."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from config import InputError, shortened
from config.files import open_regular, publish, remove_partials
from dataset.json_stream import NotJson, decode, stream_json
from dataset.record import FORMAT_VERSION, LONGEST_ID, Record, RecordError, check_record, located, parse_record


class QAFile:
    """A QA file as a sequence of records, read from disk one at a time: `len(qa)`, `qa[i]`.

    The first opening checks every record and saves their offsets next to the file, in `<name>.index.safetensors`, or
    keeps them in memory if the folder is not writable. Later openings read only this index, unless the file has
    changed or the index has another form. A QAFile may be shared with forked workers and pickled to spawned workers.

    Raises RecordError for an invalid record (with file, line and id), InputError for a file that cannot be read or in
    which two records have the same id.
    """

    sources: list[str]  # the distinct "source" values, "" for none
    source_of: np.ndarray  # int32 [n], the position of each record's source in `sources`

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.folder = self.path.parent
        self._descriptor: int | None = None
        try:
            with open_regular(self.path) as file:
                state = os.fstat(file.fileno())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a QA file. Has the data been prepared?") from None
        self._stamp = {"version": FORMAT_VERSION, "size": str(state.st_size), "mtime_ns": str(state.st_mtime_ns)}
        self._index = self.path.with_name(self.path.name + ".index.safetensors")
        if not self._load(self._index):
            self._build()
            self._save(self._index)

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, index: int | np.integer) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        begin, end = map(int, self._offsets[index % len(self) :][:2])
        data = os.pread(self._open(), end - begin, begin)
        try:
            # The bytes extend to the next record: in a list, a comma or the closing bracket follows the object.
            return parse_record(decode(data.rstrip(b" \t\r\n,]")), self.path.name)
        except (RecordError, ValueError, RecursionError):  # every record was valid when the index was made
            raise InputError(
                f"{self.path}: record {index} is not at the place that its index gives; remove {self._index} to make "
                "another."
            ) from None

    def image_paths(self, record: Record) -> list[Path]:
        """Return the paths of the record's images, in order."""
        return [self.folder / path for path in record.images]

    def _load(self, index: Path) -> bool:
        """Read the index. Returns False if there is none, or it does not have the form that `_save` gives it."""
        try:
            open_regular(index).close()
            with safe_open(index, framework="numpy") as file:
                metadata = file.metadata() or {}
                if any(metadata.get(key) != value for key, value in self._stamp.items()):
                    return False
                sources = json.loads(metadata["sources"])
                offsets, source_of = file.get_tensor("offsets"), file.get_tensor("source_of")
        except (InputError, OSError, SafetensorError, LookupError, ValueError, RecursionError):
            return False
        is_sound = (
            isinstance(sources, list)
            and all(isinstance(name, str) for name in sources)
            and (offsets.dtype, source_of.dtype) == (np.int64, np.int32)
            and offsets.shape == (source_of.size + 1,)
            and source_of.ndim == 1
            and offsets[0] >= 0
            and offsets[-1] == int(self._stamp["size"])
            and bool((np.diff(offsets) > 0).all())
            and bool(((0 <= source_of) & (source_of < len(sources))).all())
        )
        if is_sound:
            self.sources, self._offsets, self.source_of = sources, offsets, source_of
        return is_sound

    def _build(self) -> None:
        sources: dict[str, int] = {}
        offsets, source_of = array("q"), array("i")
        places, hashes = array("q"), array("q")
        for index, line, offset, obj in stream_json(self.path, offsets=True):
            try:
                check_record(obj)
            except RecordError as error:
                where = f"{self.path} line {line}" if line else f"{self.path} item {index}"
                if isinstance(obj, NotJson):
                    raise RecordError("not_json", obj, where) from None
                raise located(error, obj, where) from None
            assert isinstance(obj, dict) and offset is not None
            offsets.append(offset)
            source_of.append(sources.setdefault(obj.get("source") or "", len(sources)))
            places.append(line or index)
            hashes.append(hash(obj["id"]))
        offsets.append(int(self._stamp["size"]))
        self._offsets, self.source_of = np.array(offsets, np.int64), np.array(source_of, np.int32)
        self.sources = list(sources)
        for first, second in _equal_pairs(np.array(hashes, np.int64)):
            if self[first].id == self[second].id:
                word = "lines" if line else "items"
                raise InputError(
                    f"{self.path}: {word} {places[first]} and {places[second]} have the same id "
                    f'"{shortened(self[first].id, LONGEST_ID)}"; give every record its own.'
                )

    def _save(self, index: Path) -> None:
        tensors = {"offsets": self._offsets, "source_of": self.source_of}
        remove_partials(self.folder, index.name)
        with contextlib.suppress(OSError):  # the folder is not writable; the index is in memory
            publish(index, save(tensors, {**self._stamp, "sources": json.dumps(self.sources)}))

    def _open(self) -> int:
        if self._descriptor is None:
            with open_regular(self.path) as file:
                self._descriptor = os.dup(file.fileno())
            state = os.fstat(self._descriptor)
            if (str(state.st_size), str(state.st_mtime_ns)) != (self._stamp["size"], self._stamp["mtime_ns"]):
                raise InputError(f"{self.path}: changed while it was in use; start again.")
        return self._descriptor

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def _equal_pairs(values: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs i < j of positions with equal values and no equal value between them, smallest j first."""
    order = np.argsort(values, kind="stable")
    equal = np.flatnonzero(values[order[:-1]] == values[order[1:]])
    return sorted(zip(order[equal].tolist(), order[equal + 1].tolist(), strict=True), key=lambda pair: pair[1])
