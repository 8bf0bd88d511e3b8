"""The feature cache: what the frozen encoder makes of pictures, kept on disk, so that each is encoded once.

A folder of two files: `features.bin`, one row of fixed size a picture, and `index.sqlite`, which says whose row is where
and its checksum. Loader processes read (`find`), training processes add (`features`), all of them at once. Knows nothing
of records, batches or the config.

A row's bytes are written before the index names them, so a process killed at any moment leaves at most bytes that nobody
knows of, and the next row takes their place. Nothing waits for the disk: what a power cut takes shows as a wrong
checksum, and the picture is encoded again.

Shapes: M pictures, N patches a picture, Dv the encoder's width, S the side of the square input in pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import InputError
from visual.encoders import VisionTower
from visual.images import image_bytes
from visual.processor import ImageProcessor

FORMAT = 1  # raise it when the files' layout changes: other folders are taken then
LOCKED_SECONDS = 60.0  # how long to wait for another process, which writes for milliseconds

_TABLES = (
    "CREATE TABLE IF NOT EXISTS pictures (digest BLOB PRIMARY KEY, place INTEGER UNIQUE, checksum INTEGER) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS paths (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest BLOB) WITHOUT ROWID",
)
_NOT_ENCODING = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # of an encoder's config


class ImageKey(NamedTuple):
    """A picture's file and what it held when it was looked at: bytes, modification time, blake2b of the content."""

    path: str
    size: int
    mtime_ns: int
    digest: bytes  # 16 bytes


class _Files(NamedTuple):
    rows: FileIO
    index: sqlite3.Connection


def cache_folder(beside: Path, tower: VisionTower, image_processor: ImageProcessor, dtype: torch.dtype) -> Path:
    """The folder, beside the file `beside`, for features in `dtype` of exactly this tower: `<stem>.features/<16 hex
    digits>`. The digits name whatever the features depend on besides the picture: the weights that are run, up to which
    layer and in which precision, the encoder's config, the image size, the preprocessing. Reads every weight, writes
    nothing.
    """
    config = {key: value for key, value in tower.model.config.to_dict().items() if key not in _NOT_ENCODING}
    settings = {
        "format": FORMAT,
        "features": str(dtype),
        "encoder": config,
        "image_size": tower.image_size,
        "processor": image_processor._processor.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_run_tensors(tower)):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_as_bytes(tensor.detach().cpu()))  # one tensor at a time: no second copy of the tower
    return beside.parent / f"{beside.stem}.features" / digest.hexdigest()[:16]


def expected_bytes(pictures: int, tower: VisionTower, dtype: torch.dtype) -> int:
    """What the features of that many different pictures take on disk; the index comes to some 200 bytes a picture more."""
    return pictures * tower.num_image_tokens * tower.hidden_size * dtype.itemsize


class FeatureCache:
    """Features [N, Dv] of pictures in `folder`, all in `dtype`: `num_tokens` is N, `width` is Dv.

    Nothing is opened before the first use, and each process opens its own: an object may be forked, and pickled if `say`
    can be. For one thread a process. `say` is told once when nothing more can be added, mostly because the disk is full.

    InputError, of every method: the folder cannot be used or made, its index is damaged, or another process does not
    let go of it.
    """

    def __init__(
        self, folder: Path, num_tokens: int, width: int, dtype: torch.dtype, say: Callable[[str], None] = print
    ) -> None:
        self._folder, self._shape, self._dtype, self._say = folder, (num_tokens, width), dtype, say
        self._row_bytes = num_tokens * width * dtype.itemsize
        self._opened: dict[int, _Files] = {}  # by process; a parent's is left alone: SQLite forbids even closing it
        self._adds = True

    def __reduce__(self) -> tuple:
        return FeatureCache, (self._folder, *self._shape, self._dtype, self._say)

    def __len__(self) -> int:
        """How many pictures are stored."""
        return self._select("SELECT count(*) FROM pictures")[0]

    @property
    def nbytes(self) -> int:
        """What their features take on disk."""
        return len(self) * self._row_bytes

    def find(self, path: Path) -> tuple[Tensor | None, ImageKey]:
        """The features [N, Dv] of the picture in a file, None if they are not stored or damaged, and its key for `features`.
        For loader processes: it adds nothing.

        A file of known path, size and modification time is not read. Any other is found by its content, each time.
        ImageError: the file is missing or cannot be read, as from `read_image`; whether it is a picture is not looked at.
        """
        try:
            state = os.stat(path)  # before its content is read: changed in between, the file will look changed
        except (OSError, ValueError):
            image_bytes(path)  # says what is wrong
            raise
        stamp = str(path), state.st_size, state.st_mtime_ns
        known = self._select(
            "SELECT digest, place, checksum FROM paths JOIN pictures USING (digest) "
            "WHERE path = ? AND size = ? AND mtime_ns = ?",
            (os.fsencode(path), *stamp[1:]),
        )
        if known:
            digest, *row = known
            return self._read(*row), ImageKey(*stamp, digest)
        digest = hashlib.blake2b(image_bytes(path), digest_size=16).digest()
        return self._stored(digest), ImageKey(*stamp, digest)

    def features(self, keys: Sequence[ImageKey], pixel_values: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """pixel_values [M, 3, S, S] of pictures that `find` did not have, and their keys -> features [M, N, Dv] on the same
        device, without a graph, in the cache's dtype: bit for bit what `find` returns from then on.

        What was added since `find` looked is read; the different pictures still missing go through one call of `encode`,
        [m, 3, S, S] -> [m, N, Dv], and are added together or not at all. So a picture's features are those of its first
        batch, and a run that was killed and goes on meets the same ones as a run that was not, whatever got stored.
        ValueError: `encode` gave another shape.
        """
        first = {}  # digest -> its first position
        for position, key in enumerate(keys):
            first.setdefault(key.digest, position)
        found = {digest: self._stored(digest) for digest in first}
        missing = [digest for digest in first if found[digest] is None]
        if missing:
            made = encode(pixel_values[[first[digest] for digest in missing]]).detach().to(self._dtype).cpu()
            if made.shape != (len(missing), *self._shape):
                raise ValueError(f"features are {tuple(made.shape)}, expected {(len(missing), *self._shape)}")
            found.update(zip(missing, made, strict=True))
            if self._adds:
                found |= self._add({digest: found[digest] for digest in missing}, keys)
        features = torch.empty(len(keys), *self._shape, dtype=self._dtype)
        for position, key in enumerate(keys):
            features[position] = found[key.digest]
        return features.to(pixel_values.device)

    def _add(self, made: dict[bytes, Tensor], keys: Iterable[ImageKey]) -> dict[bytes, Tensor]:
        """Store features by digest, and what each key's file is known by. Returned are the features that are stored:
        another process's, where it was first."""
        stored = {}
        try:
            with self._files().index as index:
                index.execute("BEGIN IMMEDIATE")  # no other writer until the commit: places are given out here
                for digest, features in made.items():
                    stored[digest] = self._stored(digest)
                    if stored[digest] is None:
                        stored[digest] = features
                        self._write(index, digest, features)
                paths = [(os.fsencode(path), *rest) for path, *rest in keys]
                index.executemany("INSERT OR REPLACE INTO paths VALUES (?, ?, ?, ?)", paths)
        except (OSError, sqlite3.OperationalError) as error:
            if _is_locked(error):
                raise self._unusable(error) from None
            self._adds = False
            self._say(
                f"{self._folder}: no more features can be stored ({_reason(error)}); training goes on and encodes the "
                "pictures that are not stored each time. Free some room and start again to store them too."
            )
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None
        return stored

    def _write(self, index: sqlite3.Connection, digest: bytes, features: Tensor) -> None:
        """A row's bytes, then its entry; a damaged row is written over. Inside a transaction."""
        (place,) = index.execute(
            "SELECT coalesce((SELECT place FROM pictures WHERE digest = ?), (SELECT max(place) + 1 FROM pictures), 0)",
            (digest,),
        ).fetchone()
        data = _as_bytes(features)
        written = 0
        while written < len(data):  # the last bytes that fit on a disk are no error yet
            written += os.pwrite(self._files().rows.fileno(), data[written:], place * self._row_bytes + written)
        index.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (digest, place, zlib.crc32(data)))

    def _stored(self, digest: bytes) -> Tensor | None:
        row = self._select("SELECT place, checksum FROM pictures WHERE digest = ?", (digest,))
        return self._read(*row) if row else None

    def _read(self, place: int, checksum: int) -> Tensor | None:
        """A row, in memory of its own; None where it is not what was written. Read, not mapped: the same time to get its
        bytes, and a file that is cut short is no crash."""
        features = torch.empty(self._shape, dtype=self._dtype)
        data, rows = _as_bytes(features), self._files().rows
        try:
            rows.seek(place * self._row_bytes)
            if rows.readinto(data) < len(data):
                return None  # what stands in the rest is what this memory held before, which may be an older copy of it
        except OSError:  # a bad place of the disk
            return None
        return features if zlib.crc32(data) == checksum else None

    def _select(self, query: str, values: tuple = ()) -> tuple | None:
        """The first row that the index gives."""
        index = self._files().index
        try:
            return index.execute(query, values).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None

    def _files(self) -> _Files:
        process = os.getpid()
        if process not in self._opened:
            try:
                self._opened[process] = self._open()
            except (OSError, sqlite3.DatabaseError) as error:
                raise self._unusable(error) from None
        return self._opened[process]

    def _open(self) -> _Files:
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = open(os.open(self._folder / "features.bin", os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        index = sqlite3.connect(self._folder / "index.sqlite", timeout=LOCKED_SECONDS, isolation_level=None)
        # A rollback journal, SQLite's default: write-ahead logs do not work on network disks.
        index.execute("PRAGMA synchronous = OFF")  # 30 ms a commit otherwise
        for table in _TABLES:
            index.execute(table)
        return _Files(rows, index)

    def _unusable(self, error: Exception) -> InputError:
        if _is_locked(error):
            return InputError(
                f"{self._folder}: another process has held the feature cache for {LOCKED_SECONDS:.0f} seconds; end the one "
                "that hangs, or set train.cache_features=off."
            )
        if isinstance(error, (OSError, sqlite3.OperationalError)):
            return InputError(
                f"{self._folder}: the feature cache cannot be used ({_reason(error)}); make the folder writable, with some "
                "room on its disk, or set train.cache_features=off."
            )
        return InputError(
            f"{self._folder}: the feature cache is damaged ({error}); delete this folder, it is made again."
        )


def _run_tensors(tower: VisionTower) -> Iterator[tuple[str, Tensor]]:
    """The named tensors that the features depend on."""
    encoder, model = tower._encoder, tower.model
    layers = range(tower._depth, len(model.get_submodule(encoder.layers)))
    unused = (*encoder.unused, *(f"{encoder.layers}.{layer}." for layer in layers))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not name.startswith(unused):
            yield name, tensor


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU, uint8 [bytes]: bfloat16 has no name in numpy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _is_locked(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
