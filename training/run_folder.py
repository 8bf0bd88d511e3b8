"""The folder of a run (output_dir): its lock, which of its files a run wrote, and what moves to previous-<n>.

A run replaces, moves and deletes only what carries a run's mark: folders with a manifest, and files beside them or beside
a run.json. Anything else under one of these names belongs to somebody else, and no run begins there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import stat
from pathlib import Path

from config import STAGES_FOLDER, InputError
from config.files import naming, open_regular, refuse_link
from model.checkpoint_folder import (
    FOLDER_NAME,
    LEFTOVER,
    checkpoints,
    disk_full,
    is_ours,
    read_json,
    recover,
    step_of,
)
from training.processes import on_main, print_main
from training.provenance import utc_now

LOG_FILES = "metrics.jsonl", "samples.jsonl", "skipped.jsonl"
NO_HISTORY = "remove it, it only records the run's history"

_FILES = {*LOG_FILES, "run.json", "curves.png"}
# the names of a run's results, which --resume none moves aside
_RESULTS = {*_FILES, "answers", "tensorboard", "wandb"}
_WRITTEN = {*_FILES, "findings.jsonl"}  # by training, besides the folders above; trackers' folders may be links
_ROW_KEYS = {"step", "targets"}  # of every row of training in metrics.jsonl


class RunLock:
    """`with RunLock(output_dir):` no other run may write into the folder, and leftovers of a kill are repaired.

    The main process holds the lock for all. Raises InputError if another run holds it, or if the folder holds files that
    a run would replace and did not write. The lock is a record lock (fcntl): unlike flock's, it belongs to the process and
    not to the open file, so the loader's workers, forked while it is held, never hold it. The kernel releases it when the
    process ends, for whatever reason.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.path = output_dir, output_dir / ".lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        try:
            on_main(self._take)
        except InputError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)  # the file stays: removing it would let two runs lock two files of one name
            self._handle = None

    def _take(self) -> None:
        refuse_link(self.path)
        if not self.path.exists():
            check_owner(self.output_dir)  # before the lock's file is created in somebody else's folder
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: cannot be written ({disk_full(error) or error.strerror}); give another output_dir."
            ) from None
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(handle, 1000, 0).decode(errors="replace")
                os.close(handle)
                raise InputError(
                    f"{self.output_dir}: another run writes there{_describe(holder)}. Wait for its end or stop it, or give "
                    "another output_dir."
                ) from None
            print_main(f"{self.path}: this disk has no locks ({error.strerror}); start no second run in this folder.")
        self._handle = handle
        check_owner(self.output_dir)
        if not _is_lock(handle):
            raise InputError(f"{self.path}: not written by a run of this program; give another output_dir, or move it.")
        os.ftruncate(handle, 0)
        holder = json.dumps({"pid": os.getpid(), "host": platform.node(), "started": utc_now()})
        with naming(self.path):
            os.pwrite(handle, holder.encode(), 0)
        recover(self.output_dir)


def _is_lock(handle: int) -> bool:
    """Return whether an open file is a lock of a run; empty if the run was killed at once.

    Read through the handle that holds the lock: to close another handle of the file would release it.
    """
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        return False
    content = os.pread(handle, 1000, 0)
    return content == b"" or (content.startswith(b'{"pid": ') and b'"started": ' in content)


def _describe(holder: str) -> str:
    try:
        found = json.loads(holder)
        return f" (process {found['pid']:d} on {found['host']!s:.64}, since {found['started']!s:.32})"
    except (ValueError, KeyError, TypeError):  # it is being written at this moment
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Whose files these are


def check_owner(folder: Path) -> None:
    """Raise InputError if a run in `folder` would replace or delete something that no run wrote. Changes nothing.

    That is a file or folder under one of a run's names without its mark, or a link, which would lead a write elsewhere.
    The folder itself may be a link, and may not exist yet; so may tensorboard/ and wandb/ in it.
    """
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); give another output_dir.") from None
    foreign, marked = [], _is_marked(folder) or _was_locked(folder)
    for path in found:
        name = path.name
        is_folder, is_half = FOLDER_NAME.fullmatch(name) is not None, LEFTOVER.fullmatch(name) is not None
        if is_folder or is_half or name in _WRITTEN:
            _refuse_link_inside(path)
        if (
            (is_folder and not is_ours(path))
            or (is_half and path.is_dir() and not (marked or is_ours(path)) and any(path.iterdir()))
            or (name in _FILES and not marked)
            or (name == "findings.jsonl" and not marked and not _is_findings(path))
        ):
            foreign.append(name)
    if foreign:
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise InputError(
            f"{folder}: holds {', '.join(foreign[:4])}{more}, not written by a run of this program; a run there would "
            "replace or delete it. Give another output_dir, or move it elsewhere."
        )


def check_writable(folder: Path) -> None:
    """Raise InputError if a run could not write into `folder`, which may not exist yet. Writes nothing."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"{folder}: {there} is not a folder; give another output_dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: this user may not write into {there}; give another output_dir.")


def _is_marked(folder: Path) -> bool:
    """Return whether a run has begun in `folder`, or in its stages."""
    histories = [folder / "run.json", *(folder / STAGES_FOLDER).glob("*/run.json")]
    return (
        any(map(is_history, histories))
        or any(is_ours(path) for path in (*checkpoints(folder), folder / "best", folder / "final"))
        or _is_log(folder / "metrics.jsonl")
    )


def _was_locked(folder: Path) -> bool:
    """Return whether an earlier start has locked `folder`: its .lock is a file with content.

    Does not open the file, whose lock this process may hold: to close another handle of it would release the lock.
    `RunLock` checks the content.
    """
    try:
        status = (folder / ".lock").lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def _is_log(path: Path) -> bool:
    """Return whether `path` is a run's metrics.jsonl: one of its first rows is a row of training with a numeric step."""
    try:
        with open_regular(path) as file:
            lines = file.read(10_000).splitlines()
    except (InputError, OSError):
        return False
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # damaged, or cut at the end of what was read
            continue
        if isinstance(row, dict) and _ROW_KEYS <= row.keys() and type(row["step"]) in (int, float):
            return True
    return False


def _refuse_link_inside(path: Path) -> None:
    try:
        refuse_link(path)
    except InputError as error:
        advice = f"To keep a run on another disk, make the whole folder {path.parent} a link."
        raise InputError(f"{error} {advice}") from None


def is_history(path: Path) -> bool:
    """Return whether `path` is a run.json, the list of a run's starts."""
    try:
        starts = read_json(path)
    except InputError:
        return False
    return isinstance(starts, list) and any(isinstance(start, dict) and "config_sha256" in start for start in starts)


def _is_findings(path: Path) -> bool:
    """Return whether a file is the list of refused records that an earlier start wrote."""
    try:
        with open_regular(path) as file:
            return b'"reason":' in file.read(10_000)
    except (InputError, OSError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# What an earlier run wrote


def move_aside(folder: Path) -> None:
    """Move what an earlier run wrote into `folder` to `folder`/previous-<n>. Nothing else in it is touched."""

    def move() -> None:
        old = [path for path in folder.glob("*") if path.name in _RESULTS or FOLDER_NAME.fullmatch(path.name)]
        if old and _is_marked(folder):
            aside = _new_previous(folder)
            for path in _newest_first(old):
                path.rename(aside / path.name)
            print_main(f"the run that was in {folder} is now in {aside}")

    on_main(move)


def go_back(folder: Path, checkpoint: Path, step: int) -> None:
    """Make room for a run that resumes from `checkpoint`, of `step`, although `folder` may hold later results.

    Later checkpoints, final/ and a later best/ move to `folder`/previous-<n>, with a copy of the log, whose later rows are
    dropped afterwards. A checkpoint of another folder begins another run, so everything moves. A kill between the moves
    leaves a run that resumes from its newest remaining checkpoint.
    """
    if checkpoint.resolve().parent != folder.resolve():
        move_aside(folder)
        return

    def move() -> None:
        later = [path for path in checkpoints(folder) if step_of(path) > step]
        later += [path for path in (folder / "final",) if path.exists()]
        later += [path for path in (folder / "best",) if path.exists() and not _is_best_until(path, step)]
        if not later:
            return
        aside = _new_previous(folder)
        for name in LOG_FILES:
            if (folder / name).exists():
                shutil.copyfile(folder / name, aside / name)
        for path in _newest_first(later):
            path.rename(aside / path.name)
        names = ", ".join(path.name for path in reversed(_newest_first(later)))
        print_main(f"going back to step {step}: {names} of {folder} moved to {aside}")

    on_main(move)


def _newest_first(paths: list[Path]) -> list[Path]:
    """Return paths in the order in which they may move: final/ ends a run, then its checkpoints from the last one, and its
    history last, which marks the folder as a run's."""

    def key(path: Path) -> tuple[int, int]:
        if path.name == "final":
            return 0, 0
        if path.name.startswith("checkpoint-"):
            return 1, -step_of(path)
        return (3 if path.name == "run.json" else 2), 0

    return sorted(paths, key=key)


def _is_best_until(best: Path, step: int) -> bool:
    """Return whether best/ was written at `step` or before."""
    try:
        values = read_json(best / "best.json")
    except InputError:
        return False
    found = values.get("step") if isinstance(values, dict) else None
    return isinstance(found, int) and found <= step


def _new_previous(folder: Path) -> Path:
    """Create the next previous-<n>."""
    names = [path.name.removeprefix("previous-") for path in folder.glob("previous-*")]
    aside = folder / f"previous-{1 + max([int(name) for name in names if name.isdecimal()], default=0)}"
    aside.mkdir()
    return aside
