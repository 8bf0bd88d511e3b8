"""Check which image files can be read. Each file is decoded once, in parallel, and the verdict is cached.

The verdict on a file is stored in SQLite under its path and is valid while the file's size and modification time stay
the same. This module knows nothing about records or annotation formats.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import PIL

from visual.images import RULES, ImageError, image_bytes, image_state, verify_image

# Another version of Pillow may give other verdicts.
VERSION = zlib.crc32(f"{RULES}, Pillow {PIL.__version__}".encode()) & 0x7FFFFFFF

PATHS_PER_TASK = 8  # enough to make the cost of starting a task small
PATHS_PER_QUERY = 500
SECONDS_BETWEEN_COMMITS = 1.0
LOCKED_SECONDS = 30.0  # longest wait for another process to finish writing, which takes milliseconds

_CREATE = """CREATE TABLE verdicts (
    path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest BLOB, reason TEXT, detail TEXT) WITHOUT ROWID"""


class Verdict(NamedTuple):
    """The result of checking one image file."""

    digest: str  # of the content (blake2b, 32 hex digits); "" if the file could not be read
    reason: str  # "" for a good image, else the reason of the ImageError
    detail: str  # the message of the ImageError


_Stamp = tuple[int, int]  # size in bytes, modification time in ns


class ImageVerifier:
    """Verdicts on image files, cached in `cache_file`. A context manager; call its methods from one thread only.

    A cache that is damaged or was not written by this version is replaced. If no file can be written, or the name is a
    link, the cache is in memory. Several processes may share one file.
    """

    def __init__(self, cache_file: Path, workers: int | None = None):
        """workers: number of threads that decode; by default one per processor that this process may use."""
        self._cache = _Cache(cache_file)
        self._verified = False
        self._threads = ThreadPoolExecutor(workers or _processors(), "verify-images")

    def __enter__(self) -> ImageVerifier:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._cache.close(forget_stale=self._verified and kind is None)

    def verify(self, paths: Sequence[str]) -> list[Verdict]:
        """The verdicts on the files, in the order of the paths for any number of workers. Paths are absolute.

        After an interrupt the finished verdicts stay in the cache. A verdict is not cached if the file was missing or
        unreadable, changed while it was read, or memory ran out.
        """
        self._verified = True
        verdicts = self._cache.known(paths)
        todo = [path for path in dict.fromkeys(paths) if path not in verdicts]
        tasks = [
            self._threads.submit(_verify_files, todo[start : start + PATHS_PER_TASK])
            for start in range(0, len(todo), PATHS_PER_TASK)
        ]
        try:
            for task in as_completed(tasks):
                for path, stamp, verdict in task.result():
                    verdicts[path] = verdict
                    if stamp:
                        self._cache.put(path, stamp, verdict)
        finally:
            for task in tasks:
                task.cancel()
            self._cache.commit()
        return [verdicts[path] for path in paths]

    def changed(self) -> bool:
        """True if any file in the cache was removed, or its size or modification time has changed."""
        return self._cache.stale()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _verify_files(paths: list[str]) -> list[tuple[str, _Stamp | None, Verdict]]:
    """Path, stamp and verdict of each file; the stamp is None if the verdict must not be cached."""
    results: list[tuple[str, _Stamp | None, Verdict]] = []
    for path in paths:
        stamp = _stamp(path)
        try:
            data = image_bytes(path)
        except ImageError as error:
            results.append((path, None, Verdict("", error.reason, error.detail)))
            continue
        if stamp is None or _stamp(path) != stamp or len(data) != stamp[0]:
            stamp = None
        verdict, lasting = _verify(data)
        results.append((path, stamp if lasting else None, verdict))
    return results


def _verify(data: bytes) -> tuple[Verdict, bool]:
    """The verdict, and whether it depends only on the bytes."""
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        verify_image(data)
    except ImageError as error:
        return Verdict(digest, error.reason, error.detail), not isinstance(error.__cause__, MemoryError)
    return Verdict(digest, "", ""), True


def _stamp(path: str | bytes) -> _Stamp | None:
    try:
        state = image_state(path)
    except (OSError, ValueError):
        return None
    return state.size, state.mtime_ns


class _Cache:
    """Path -> (stamp, verdict) in SQLite. A damaged or unwritable file costs time but is never an error."""

    def __init__(self, file: Path):
        self._file = file
        self._pending: dict[bytes, tuple] = {}  # rows not yet written
        self._stale: set[bytes] = set()
        self._committed = time.monotonic()
        try:
            if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
                raise sqlite3.OperationalError("a link or a special file, into which nothing is written")
            self._rows = _connect(file)
            (sound,) = self._rows.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
        except sqlite3.OperationalError:
            self._rows = _connect(":memory:")  # no such folder, no permission, no space, or locked for too long
        except sqlite3.DatabaseError:
            self._replace()

    def known(self, paths: Sequence[str]) -> dict[str, Verdict]:
        """The verdicts on those files that have not changed since they were verified."""
        found = {}
        for start in range(0, len(paths), PATHS_PER_QUERY):
            stamps = {}
            for path in paths[start : start + PATHS_PER_QUERY]:
                if stamp := _stamp(path):
                    stamps[os.fsencode(path)] = path, stamp
            marks = ", ".join("?" * len(stamps))
            rows = self._run(f"SELECT * FROM verdicts WHERE path IN ({marks})", tuple(stamps))
            for key, size, mtime_ns, digest, reason, detail in rows:
                path, stamp = stamps[key]
                if stamp == (size, mtime_ns):
                    found[path] = Verdict(digest.hex(), reason, detail)
        return found

    def put(self, path: str, stamp: _Stamp, verdict: Verdict) -> None:
        key = os.fsencode(path)
        self._stale.discard(key)
        self._pending[key] = (key, *stamp, bytes.fromhex(verdict.digest), verdict.reason, verdict.detail)
        if time.monotonic() - self._committed > SECONDS_BETWEEN_COMMITS:
            self.commit()

    def commit(self) -> None:
        if self._pending:
            self._run("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", list(self._pending.values()))
            self._pending.clear()
        self._committed = time.monotonic()

    def stale(self) -> bool:
        """True if the stamp of any file differs from the cache. `close` can remove the files found here."""
        rows = self._run("SELECT path, size, mtime_ns FROM verdicts")
        self._stale = {path for path, *stamp in rows if _stamp(path) != tuple(stamp)}
        return bool(self._stale)

    def close(self, forget_stale: bool) -> None:
        """Write the pending rows and close the file.

        forget_stale: also delete the rows that `stale` found and that no call has asked for since; these files are no
            longer in use.
        """
        self.commit()
        if forget_stale and self._stale:
            self._run("DELETE FROM verdicts WHERE path = ?", [(path,) for path in self._stale])
        self._rows.close()

    def _run(self, statement: str, values: tuple | list[tuple] = ()) -> list[tuple]:
        """Run a statement and return its rows. A list of values runs it once for each, in one transaction."""
        for _ in range(2):
            try:
                if isinstance(values, tuple):
                    return self._rows.execute(statement, values).fetchall()
                with self._rows:
                    self._rows.execute("BEGIN IMMEDIATE")
                    self._rows.executemany(statement, values)
                return []
            except sqlite3.OperationalError:
                self._move_to_memory()
            except sqlite3.DatabaseError:
                self._replace()
        return []

    def _move_to_memory(self) -> None:
        memory = _connect(":memory:")
        try:
            self._rows.backup(memory)
        except sqlite3.Error:
            memory = _connect(":memory:")
        self._rows.close()
        self._rows = memory

    def _replace(self) -> None:
        """Replace a damaged cache with a new file, or with memory if that fails."""
        try:
            for suffix in ("", "-journal", "-wal", "-shm"):  # SQLite would apply an old journal to the new file
                Path(f"{self._file}{suffix}").unlink(missing_ok=True)
            self._rows = _connect(self._file)
        except (OSError, sqlite3.Error):
            self._rows = _connect(":memory:")


def _connect(file: Path | str) -> sqlite3.Connection:
    """Open or create the table of verdicts. Tables of other programs in the same file stay as they are."""
    rows = sqlite3.connect(file, timeout=LOCKED_SECONDS, isolation_level=None)
    try:
        rows.execute("PRAGMA synchronous = NORMAL")
        if rows.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            with rows:
                rows.execute("BEGIN IMMEDIATE")
                if rows.execute("PRAGMA user_version").fetchone()[0] != VERSION:  # another process may have created it
                    rows.execute("DROP TABLE IF EXISTS verdicts")
                    rows.execute(_CREATE)
                    rows.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.Error:
        rows.close()
        raise
    return rows
