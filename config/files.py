"""Open files safely in folders that others may have prepared: no write follows a link, and no read waits for a pipe."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from config.errors import InputError

# The content of a git-lfs pointer: the text that replaces a large file until it is downloaded.
POINTER_OF_GIT_LFS = b"version https://git-lfs.github.com/spec/"


def pointer_error(path: str | os.PathLike) -> InputError:
    """Return the error for a file that is a pointer of git-lfs."""
    return InputError(
        f"{path}: is a git-lfs pointer, a few lines of text in place of the file; in its folder, run: git lfs install && "
        "git lfs pull"
    )


def refuse_pointers(folder: str | os.PathLike[str]) -> None:
    """Raise InputError if a file in `folder` is a pointer of git-lfs. A folder or file that cannot be read is no error."""
    with contextlib.suppress(OSError), os.scandir(os.fspath(folder)) as entries:
        for entry in entries:
            if entry.is_file() and entry.stat().st_size < 1024:
                with open(entry.path, "rb") as file:
                    if file.read(len(POINTER_OF_GIT_LFS)) == POINTER_OF_GIT_LFS:
                        raise pointer_error(entry.path)


def refuse_link(path: Path) -> None:
    """Raise InputError if `path` is a symbolic link."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, which would lead a write elsewhere; remove it or move it away.")


def make_folder(path: Path) -> Path:
    """Make the folder `path`, with the folders above it, unless it exists. Raises InputError if it is a symbolic link."""
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def open_regular(path: str | os.PathLike) -> io.BufferedReader:
    """Open a regular file for reading. A link is followed.

    Raises InputError for a FIFO, a device or a socket, whose reading may block or never end. Raises OSError like `open`.
    """
    _refuse_special(path, os.stat(path))
    return open(path, "rb")


def open_append(path: Path) -> BinaryIO:
    """Open a regular file for appending, unbuffered; it is created if it does not exist.

    Raises InputError for a symbolic link and for a FIFO, a device or a socket. Raises OSError like `open`.
    """
    refuse_link(path)
    with contextlib.suppress(FileNotFoundError):
        _refuse_special(path, os.lstat(path))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "ab", buffering=0)


def open_new(path: Path) -> BinaryIO:
    """Create a file for writing. A file or link of that name is removed first."""
    path.unlink(missing_ok=True)
    return open(path, "xb")  # fails if a link appeared in the meantime


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file's content atomically, in UTF-8: readers see the old content or the new one. A link is replaced too.

    Raises OSError. The content is first written to `.<name>.partial`, so only one process may write the file at a time.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path), open_new(partial) as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _refuse_special(path: str | os.PathLike, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise InputError(f"{path}: is a special file (a FIFO, a device or a socket); expected a regular file.")


# ---------------------------------------------------------------------------------------------------------------------
# Partial files of processes that may write the same file at the same time

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial", re.DOTALL)


def create_partial(path: Path) -> BinaryIO:
    """Create a file for writing beside `path`, under a name of its own, which the caller renames or removes.

    `file.name` is its path. It is locked while it is open, so that `remove_partials` can tell what a kill left.
    """
    while True:
        try:
            file = open(_fresh_name(path), "xb")  # never follows a link
        except FileExistsError:
            continue
        _lock(file.fileno())
        if os.path.lexists(file.name):  # another process may have removed it before it was locked
            return file
        file.close()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path`, under a name of its own, for the caller to rename. If it was not, it is removed."""
    partial = _fresh_name(path)
    partial.mkdir(parents=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor)
        yield partial
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)


def publish(path: Path, content: bytes) -> None:
    """Replace a file's content atomically, as several processes may do at the same time. A link is replaced too.

    Raises OSError.
    """
    file = create_partial(path)
    try:
        with naming(path), file:
            file.write(content)
        os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise


def remove_partials(folder: str | os.PathLike[str], *names: str) -> None:
    """Remove the partial files and folders in `folder` that killed processes left; of these names, if any are given.

    Those that a process still has open are kept, and so is everything on a disk without locks.
    """
    with contextlib.suppress(OSError), os.scandir(os.fspath(folder)) as entries:
        for entry in entries:
            match = _PARTIAL.fullmatch(entry.name)
            if match and (not names or match[1] in names):
                with contextlib.suppress(OSError):
                    _remove_abandoned(entry)


def _remove_abandoned(entry: os.DirEntry) -> None:
    is_folder = entry.is_dir(follow_symlinks=False)
    if not is_folder and not entry.is_file(follow_symlinks=False):
        return
    flags = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR  # NFS locks only what is open for writing
    descriptor = os.open(entry.path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _lock(descriptor):
            return
        if is_folder:
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
    finally:
        os.close(descriptor)


def _fresh_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds the lock or the disk has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
