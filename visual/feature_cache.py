"""The feature cache: features of the frozen encoder on disk, so that each image is encoded once.

A cache is a folder of two files: `features.bin`, one row of fixed size per image, and `index.sqlite`, with the position
and checksum of each image's row. Loader processes read (`find`) and training processes add (`features`) at the same time.
Records, batches and the config are not known here.

A row is written before its index entry, so a process killed at any moment leaves at most a row without an entry, which the
next row overwrites. Nothing is flushed to the disk: data lost in a power cut has a wrong checksum, and the image is encoded
again. Rows are never removed, so the places in the index are 0, 1, 2, ... without gaps.

A cache may come from a stranger. No file in it is followed if it is a link, nor opened if it is a FIFO or a device, and an
index that this class has not written is not used.

Shapes: M images, N patches per image, Dv the encoder's width, S the side of the square input in pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import zlib
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import InputError, printable
from config.files import make_folder
from visual.encoders import VisionTower
from visual.images import SCALING_RULES, image_bytes, image_state, is_scaled
from visual.processor import ImageProcessor

FORMAT = 1  # part of the folder's name: increase it when the layout of the files changes
MAX_PLACE = 2**40  # rows of a cache; an index with more is damaged
LOCKED_SECONDS = 60.0  # how long to wait for another process's lock, which is normally held for milliseconds

_TABLES = {  # as SQLite stores these statements
    "pictures": "(digest BLOB PRIMARY KEY, place INTEGER UNIQUE, checksum INTEGER) WITHOUT ROWID",
    "paths": "(path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest BLOB) WITHOUT ROWID",
}
_SCHEMA = {f"CREATE TABLE {name} {columns}" for name, columns in _TABLES.items()}
_ROWS, _INDEX = "features.bin", "index.sqlite"
_FILES = (_ROWS, _INDEX, *(f"{_INDEX}-{suffix}" for suffix in ("journal", "wal", "shm")))  # SQLite makes the last three
# Keys of an encoder's config that its features do not depend on.
_NOT_ENCODING = {"_name_or_path", "architectures", "dtype", "transformers_version"}


class ImageKey(NamedTuple):
    """A view of an image file, and the file's state when it was read."""

    path: str
    size: int  # bytes
    mtime_ns: int  # modification time
    digest: bytes  # blake2b of content and view, 16 bytes, with the rules of scaling for grey of more than 8 bits
    view: bytes = b""  # how the image is changed before it is encoded; empty: not at all


class _Files(NamedTuple):
    rows: FileIO
    database: sqlite3.Connection

    def close(self) -> None:
        self.rows.close()
        self.database.close()


class _Damaged(sqlite3.DatabaseError):
    """A cache that FeatureCache has not written: a link or a special file, other tables, or other places of rows."""


def cache_folder(beside: Path, tower: VisionTower, image_processor: ImageProcessor, dtype: torch.dtype) -> Path:
    """Return the folder for this tower's features in `dtype`: `<stem>.features/<16 hex digits>` next to file `beside`.

    The digits are a hash of everything that the features depend on besides the image: the weights that are run, up to which
    layer and in which precision, the encoder's config, the image size and the preprocessing. How an image file is read is
    part of the image's key instead (`FeatureCache.find`). Reads every weight, writes nothing.
    """
    config = {key: value for key, value in tower.model.config.to_dict().items() if key not in _NOT_ENCODING}
    settings = {
        "format": FORMAT,
        "features": str(dtype),
        "encoder": config,
        "image_size": tower.image_size,
        "processor": image_processor.settings(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.tensors_used()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_as_bytes(tensor.detach().cpu()))  # one tensor at a time, to avoid a copy of the whole tower
    return beside.parent / f"{beside.stem}.features" / digest.hexdigest()[:16]


def expected_bytes(num_images: int, tower: VisionTower, dtype: torch.dtype) -> int:
    """Return the disk space of the features of `num_images` different images; the index adds some 200 bytes per image."""
    return num_images * tower.num_image_tokens * tower.hidden_size * dtype.itemsize


class FeatureCache:
    """Features [N, Dv] of images in `folder`, all in `dtype`: `num_tokens` is N, `width` is Dv.

    Files are opened at the first use, by each process for itself: an object may be forked, and pickled if `say` can be.
    Not for several threads of a process. `say` is called once when nothing more can be added, usually because the disk is
    full.

    Every method raises InputError if the folder cannot be created or used, another process keeps it locked, or the cache is
    damaged (`repair` makes a new one).
    """

    def __init__(
        self, folder: Path, num_tokens: int, width: int, dtype: torch.dtype, say: Callable[[str], None] = print
    ) -> None:
        self._folder, self._shape, self._dtype, self._say = folder, (num_tokens, width), dtype, say
        self._row_bytes = num_tokens * width * dtype.itemsize
        self._opened: dict[int, _Files] = {}  # by process id; SQLite forbids even closing a parent process's connection
        self._adds = True

    def __reduce__(self) -> tuple:
        return FeatureCache, (self._folder, *self._shape, self._dtype, self._say)

    def repair(self) -> None:
        """Replace a damaged cache by an empty one, and say so in one line. Call it before other processes use the cache."""
        if not os.path.lexists(self._folder):
            return
        try:
            with contextlib.closing(self._open()) as files:
                _check_rows(files.database)
        except (OSError, sqlite3.DatabaseError) as error:
            if not _is_damage(error):
                raise self._unusable(error) from None
            try:
                for name in _FILES:
                    (self._folder / name).unlink(missing_ok=True)  # of a link, the link itself
            except OSError as failure:
                raise self._unusable(failure) from None
            found = printable(str(error))  # an index may name tables by escape sequences
            self._say(
                f"{self._folder}: the feature cache is damaged ({found}). It is rebuilt: images are encoded again."
            )

    def __len__(self) -> int:
        """The number of images stored."""
        row = self._select("SELECT count(*) FROM pictures")
        assert row is not None
        return row[0]

    @property
    def nbytes(self) -> int:
        """The size of all stored features."""
        return len(self) * self._row_bytes

    def find(self, path: Path, view: bytes = b"") -> tuple[Tensor | None, ImageKey]:
        """Return the features [N, Dv] of an image file, None if they are not stored or damaged, and the key for `features`.

        view: at most 64 bytes that identify how the image is changed before it is encoded, such as an augmentation; empty:
        it is not changed. Each view of an image has features of its own.

        Loader processes use this method; it adds nothing. The file is not read if its path, size and modification time are
        known. Otherwise it is looked up by its content; with visual.images.SCALING_RULES, if they decide its pixels.
        ImageError: the file is missing or cannot be read, as in `read_image`. The content is not decoded.
        """
        try:
            state = image_state(path)  # before reading, so that a file changed in between will not match its key
        except (OSError, ValueError):
            image_bytes(path)  # raises the ImageError that explains it
            raise
        stamp = str(path), state.size, state.mtime_ns
        known = self._select(
            "SELECT digest, place, checksum FROM paths JOIN pictures USING (digest) "
            "WHERE path = ? AND size = ? AND mtime_ns = ?",
            (_path_key(path, view), *stamp[1:]),
        )
        if known:
            digest, *row = known
            return self._read(*row), ImageKey(*stamp, digest, view)
        digest = _digest(image_bytes(path), view)
        return self._stored(digest), ImageKey(*stamp, digest, view)

    def features(self, keys: Sequence[ImageKey], pixel_values: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Encode and add images that `find` did not return: pixel_values [M, 3, S, S] and their keys -> [M, N, Dv].

        The result is on the device of `pixel_values`, without a graph, in the cache's dtype, and bit for bit what `find`
        returns afterwards. Images added since the call of `find` are read. The different images that are still missing are
        encoded by one call of `encode`, [m, 3, S, S] -> [m, N, Dv], and added together or not at all. The features of an
        image are therefore those of its first batch, and a resumed run gets the same features as an uninterrupted one,
        whatever was stored before the interruption.
        ValueError: `encode` returned another shape.
        """
        first: dict[bytes, int] = {}  # digest -> its first position
        for position, key in enumerate(keys):
            first.setdefault(key.digest, position)
        stored = {digest: self._stored(digest) for digest in first}
        found = {digest: features for digest, features in stored.items() if features is not None}
        missing = [digest for digest in first if digest not in found]
        if missing:
            made = encode(pixel_values[[first[digest] for digest in missing]]).detach().to(self._dtype).cpu()
            if made.shape != (len(missing), *self._shape):
                raise ValueError(f"features are {tuple(made.shape)}, expected {(len(missing), *self._shape)}")
            new = dict(zip(missing, made, strict=True))
            found |= new
            if self._adds:
                found |= self._add(new, keys)
        result = torch.empty(len(keys), *self._shape, dtype=self._dtype)
        for position, key in enumerate(keys):
            result[position] = found[key.digest]
        return result.to(pixel_values.device)

    def _add(self, new: dict[bytes, Tensor], keys: Iterable[ImageKey]) -> dict[bytes, Tensor]:
        """Store features by digest, and the state of each key's file. Return the features that are stored now.

        They are another process's if it stored an image first.
        """
        result: dict[bytes, Tensor] = {}
        try:
            with self._files().database as database:
                # no other writer until the commit, so a new place is not taken twice
                database.execute("BEGIN IMMEDIATE")
                for digest, features in new.items():
                    stored = self._stored(digest)
                    result[digest] = features if stored is None else stored
                    if stored is None:
                        self._write(database, digest, features)
                paths = [(_path_key(key.path, key.view), key.size, key.mtime_ns, key.digest) for key in keys]
                database.executemany("INSERT OR REPLACE INTO paths VALUES (?, ?, ?, ?)", paths)
        except (OSError, sqlite3.OperationalError) as error:
            if _is_locked(error):
                raise self._unusable(error) from None
            self._adds = False
            self._say(
                f"{self._folder}: cannot store more features ({_reason(error)}); training continues and encodes the images "
                "that are not stored each time. Free disk space and restart to store them too."
            )
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None
        return result

    def _write(self, database: sqlite3.Connection, digest: bytes, features: Tensor) -> None:
        """Write a row, then its entry, inside the caller's transaction. A damaged row is overwritten."""
        (place,) = database.execute(
            "SELECT coalesce((SELECT place FROM pictures WHERE digest = ?), (SELECT max(place) + 1 FROM pictures), 0)",
            (digest,),
        ).fetchone()
        if not isinstance(place, int) or not 0 <= place < MAX_PLACE:
            raise _Damaged(f"a row at place {place}")
        data = _as_bytes(features)
        written = 0
        while written < len(data):  # on a nearly full disk, a partial write comes before the error
            written += os.pwrite(self._files().rows.fileno(), data[written:], place * self._row_bytes + written)
        database.execute("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", (digest, place, zlib.crc32(data)))

    def _stored(self, digest: bytes) -> Tensor | None:
        row = self._select("SELECT place, checksum FROM pictures WHERE digest = ?", (digest,))
        return self._read(*row) if row else None

    def _read(self, place: int, checksum: int) -> Tensor | None:
        """Read a row into new memory; None if it is damaged.

        Memory mapping would be no faster and would crash on a truncated file.
        """
        features = torch.empty(self._shape, dtype=self._dtype)
        data, rows = _as_bytes(features), self._files().rows
        try:
            rows.seek(place * self._row_bytes)
            if rows.readinto(data) < len(data):
                return None  # the checksum is no test: the rest of this memory may hold an older copy of the row
        except (OSError, OverflowError, TypeError):  # a bad sector, or a place that no file has
            return None
        return features if zlib.crc32(data) == checksum else None

    def _select(self, query: str, values: tuple = ()) -> tuple | None:
        """Return the first row of a query."""
        database = self._files().database
        try:
            return database.execute(query, values).fetchone()
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
        make_folder(self._folder)
        for name in _FILES:
            _refuse_special(self._folder / name)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        rows = open(os.open(self._folder / _ROWS, flags, 0o644), "r+b", buffering=0)
        files = _Files(rows, sqlite3.connect(self._folder / _INDEX, timeout=LOCKED_SECONDS, isolation_level=None))
        try:
            # The journal stays SQLite's default, a rollback journal: write-ahead logs do not work on network disks.
            files.database.execute("PRAGMA synchronous = OFF")  # otherwise a commit takes 30 ms
            _make_tables(files.database)
        except BaseException:
            files.close()
            raise
        return files

    def _unusable(self, error: Exception) -> InputError:
        if _is_locked(error):
            return InputError(
                f"{self._folder}: another process has locked the feature cache for {LOCKED_SECONDS:.0f} seconds; end that "
                "process if it hangs, or set train.cache_features=off."
            )
        if isinstance(error, (OSError, sqlite3.OperationalError)):
            return InputError(
                f"{self._folder}: the feature cache cannot be used ({_reason(error)}); make the folder writable and free "
                "disk space, or set train.cache_features=off."
            )
        return InputError(f"{self._folder}: the feature cache is damaged ({error}); start again to rebuild it.")


def _digest(data: bytes, view: bytes) -> bytes:
    """Return what identifies a view of an image: its content, the view, and the rules that decide its pixels if they have
    changed."""
    rules = b"rules %d" % SCALING_RULES if is_scaled(data) else b""
    return hashlib.blake2b(data, digest_size=16, person=rules, key=view).digest()


def _path_key(path: str | Path, view: bytes) -> bytes:
    """Return the key in the index of a view of a file. No path has a zero byte, so paths that were stored under other rules
    are not found, and their files are read again."""
    return b"%d\0" % SCALING_RULES + os.fsencode(path) + (b"\0" + view if view else b"")


def _refuse_special(path: Path) -> None:
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "a special file or a folder"
        raise _Damaged(f"{path.name} is {kind}; expected a regular file")


def _make_tables(database: sqlite3.Connection) -> None:
    """Create the tables that are missing. _Damaged: there are others."""
    found = {sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if not found <= _SCHEMA:  # another process may have created only the first table yet
        raise _Damaged(f"{_INDEX} has other tables")
    for name, columns in _TABLES.items():
        database.execute(f"CREATE TABLE IF NOT EXISTS {name} {columns}")


def _check_rows(database: sqlite3.Connection) -> None:
    """Read the whole index, which takes seconds for millions of images. _Damaged: this class has not written its rows."""
    (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if sound != "ok":
        raise _Damaged(sound)
    count, different, lowest, highest, odd = database.execute(
        "SELECT count(*), count(DISTINCT place), min(place), max(place), total(typeof(place) != 'integer' "
        "OR typeof(checksum) != 'integer' OR typeof(digest) != 'blob') FROM pictures"
    ).fetchone()
    if count and (odd, different, lowest, highest) != (0, count, 0, count - 1):
        raise _Damaged(f"{_INDEX} names {count} rows at other places than 0 to {count - 1}")


def _as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a CPU tensor as bytes. Viewed as uint8, because numpy has no bfloat16."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _is_damage(error: Exception) -> bool:
    """Return whether a new cache would not have the error: the files are wrong, not the disk or the permissions."""
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_ERROR  # "unsupported file format"
    return isinstance(error, sqlite3.DatabaseError)


def _is_locked(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
