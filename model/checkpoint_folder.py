"""Write, verify, find and prune the folders of a run (checkpoint-<step>, best, final). Knows nothing of their contents.

A folder is written as a whole or not at all, even if the process is killed. Its manifest lists every file with size and
SHA-256, so a damaged or foreign file is found and named.

A kill may leave two folders beside `X`: `.X.partial` (being written or removed, of no value) and `.X.replaced` (the previous
`X`, while a new one takes its name). `recover` cleans up both.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import InputError
from config.files import open_regular, write_whole

MANIFEST = "manifest.json"
FORMAT = 1
# Largest size of a file, in bytes. A larger one is refused before it is read. Weights (.safetensors) have no limit.
MAX_BYTES = {MANIFEST: 1 << 20, "config.yaml": 1 << 18, "state.json": 1 << 20}
MAX_TEXT_BYTES = 1 << 26  # of any other file; the largest are tokenizers' vocabularies, about 11 MB

FOLDER_NAME = re.compile(r"checkpoint-[0-9]{1,15}|best|final")
LEFTOVER = re.compile(rf"\.({FOLDER_NAME.pattern})\.(partial|replaced)")  # of a kill
_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is exceeded",
    errno.EFBIG: "a file would exceed the size limit (ulimit -f)",
}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_folder(folder: Path, write: Callable[[Path], None], tensor_bytes: int = 0) -> None:
    """Make `folder` with the files that `write(partial folder)` creates, and their manifest: all of it or nothing.

    An existing folder of that name is replaced at the very end. After a kill at any moment, `recover` restores the old
    folder or the new one. tensor_bytes: the size of the weights in it, for the message.

    Raises InputError if the disk is full, if an existing folder of that name was not written by this function, or if
    the folder around it does not exist. The existing folder is then unchanged and no partial one is left.
    """
    partial, replaced = _beside(folder, "partial"), _beside(folder, "replaced")
    if os.path.lexists(folder) and not is_ours(folder):
        raise InputError(f"{folder}: was not written by a run, and would be replaced; move it elsewhere.")
    _put_back(folder)  # in case `recover` was not called after a kill
    _remove(replaced)
    _remove(partial)
    try:
        partial.mkdir()
        write(partial)
        files = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(0o644)  # safetensors creates files that only their owner can read
            _flush(path)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        refuse_lost(folder.parent)
        text_bytes = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file() and p.suffix != ".safetensors")
        _put_back(folder)
        _remove(partial)
        if (reason := disk_full(error)) is None:
            raise
        raise InputError(_disk_full_message(folder, reason, tensor_bytes + text_bytes)) from None
    _remove(replaced)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text atomically: readers see the old text or the new one. A link of that name is replaced.

    Raises InputError if the disk is full, or the folder does not exist.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        refuse_lost(path.parent)
        if (reason := disk_full(error)) is None:
            raise
        raise InputError(
            f"{path}: {reason}; free some space there, then repeat the command with --resume auto, the default."
        ) from None


def refuse_lost(folder: Path) -> None:
    """Raise InputError if the folder into which a run writes does not exist any more."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: does not exist any more: it was deleted or moved while the run was writing there, with its "
            "checkpoints and its log, and the steps since the last checkpoint are lost. Put it back to resume from that "
            "checkpoint (--resume auto, the default), or start over with the same command."
        )


def disk_full(error: BaseException) -> str | None:
    """Return the reason if `error` means that there is no space on the disk, else None.

    That is an OSError, or the form in which safetensors and tokenizers, written in Rust, report one ("... (os error 28)").
    """
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return None if number is None else _DISK_FULL.get(number)


def _disk_full_message(folder: Path, reason: str, needed: int) -> str:
    free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
    newest = max(checkpoints(folder.parent), key=step_of, default=None)
    restart = "start over" if newest is None else f"resume from {newest.name} (with --resume auto, the default)"
    elsewhere = "another output_dir" if newest is None else f"another output_dir and --resume {newest}"
    return (
        f"{folder}: {reason}. This folder needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there. Free "
        f"some space or reduce train.save_total_limit, then repeat the command to {restart}; or give {elsewhere}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# After a kill


def recover(output_dir: Path) -> None:
    """Clean up what a kill left in a run's folder. Only the run that holds the folder's lock may call this.

    A replaced folder is put back if its new version is missing; partial folders are removed.
    """
    found = [(path, match) for path in output_dir.glob(".*") if (match := LEFTOVER.fullmatch(path.name))]
    for path, match in sorted(found, key=lambda pair: pair[1][2], reverse=True):  # replaced, then partial
        if match[2] == "replaced":
            _put_back(output_dir / match[1])
        _remove(path)


def _put_back(folder: Path) -> None:
    replaced = _beside(folder, "replaced")
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
        _flush(folder.parent)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def is_ours(folder: Path) -> bool:
    """Return whether `write_folder` wrote `folder`: it has a manifest of its form, or one that is damaged.

    If the manifest is missing, a run.json or a state.safetensors beside a config.yaml still tells. Only such a folder is
    ever replaced, moved or removed; a link is never ours.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    manifest = folder / MANIFEST
    if not manifest.exists():
        return (folder / "config.yaml").exists() and any(
            (folder / name).exists() for name in ("run.json", "state.safetensors")
        )
    try:
        values = read_json(manifest)
    except InputError:
        return True
    return isinstance(values, dict) and {"format", "files"} <= values.keys()


def verify_folder(folder: Path, hashes: bool = True) -> None:
    """Raise InputError unless `folder` is as `write_folder` wrote it.

    Refused are a missing manifest, a missing file, a file that is not listed, a link, and a file of another size or (with
    `hashes`) of other content. Only names found in the folder are opened, so a manifest cannot point outside it. Hidden
    files are ignored: nothing reads them.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: checkpoint folder does not exist; name one that train.sh wrote, such as runs/demo/final."
        )
    manifest = folder / MANIFEST
    found = _plain_files(folder)
    if MANIFEST not in found:
        raise InputError(
            f"{folder}: not a checkpoint, {MANIFEST} not found; name checkpoint-<step> or final in a run's folder."
        )
    values = read_json(manifest)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        version = values.get("format") if isinstance(values, dict) else None
        raise InputError(f"{manifest}: found format {version!r:.40}, expected format {FORMAT}; use another checkpoint.")
    listed = _listed(values, manifest)
    if absent := sorted(set(listed) - set(found)):
        raise InputError(
            f"{manifest}: lists {absent[0]!r:.200}, which is missing or not a plain file inside the folder; use another "
            "checkpoint."
        )
    if unlisted := sorted(set(found) - set(listed) - {MANIFEST}):
        raise InputError(
            f"{folder}: holds {unlisted[0]!r}, which is not in {MANIFEST}, so it was not saved with the checkpoint; move it "
            "elsewhere."
        )
    for name, (size, digest) in listed.items():
        path = folder / name
        try:
            is_same = found[name] == size and (not hashes or _sha256(path) == digest)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); use another checkpoint.") from None
        if not is_same:
            raise InputError(f"{path}: not the file that was saved (size or sha256 differs); use another checkpoint.")


def weights_digest(folder: Path, model_only: bool = False) -> str:
    """Return a SHA-256 that identifies a model, over the hashes of its weights in the manifest.

    Scores and history, which are added later, do not change it. model_only: leave out the state of training.
    """
    files = _listed(read_json(folder / MANIFEST), folder / MANIFEST)
    weights = sorted((name, digest) for name, (_, digest) in files.items() if name.endswith(".safetensors"))
    if model_only:
        weights = [entry for entry in weights if entry[0] != "state.safetensors"]
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def read_json(path: Path, advice: str = "use another checkpoint") -> Any:
    """Return the value in a small JSON file. Raises InputError if it is missing, too large, unreadable or not JSON."""
    try:
        with open_regular(path) as file:
            _refuse_large(path, os.fstat(file.fileno()).st_size)
            return json.loads(file.read().decode())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {advice}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not valid JSON ({str(error)[:80]}); {advice}.") from None


def _plain_files(folder: Path) -> dict[str, int]:
    """Return path inside the folder -> size in bytes, of all files that are not hidden.

    Raises InputError for a link, a pipe, and a file over its size limit.
    """
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *(name for name in files if not name.startswith("."))]:
            path = Path(parent, name)
            if not name.isprintable():
                raise InputError(f"{parent}: holds {name!r}, an unprintable file name; use another checkpoint.")
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                _refuse_large(path, status.st_size)
                found[path.relative_to(folder).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise InputError(f"{path}: a link or special file; expected a plain file, so copy its content there.")
    return found


def _refuse_large(path: Path, size: int) -> None:
    limit = MAX_BYTES.get(path.name, MAX_TEXT_BYTES)
    if path.suffix != ".safetensors" and size > limit:
        raise InputError(
            f"{path}: {size / 1e6:,.0f} MB, larger than the limit for this file ({limit / 1e6:,.1f} MB); use another "
            "checkpoint."
        )


def _listed(values: dict, manifest: Path) -> dict[str, tuple[int, str]]:
    """Return name -> (bytes, sha256) from a manifest's values. Raises InputError if they have another form."""
    files = values.get("files")
    entries: list[tuple[str, Any]] = list(files.items()) if isinstance(files, dict) else [("files", None)]
    for name, entry in entries:
        is_valid = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not is_valid:
            raise InputError(f"{manifest}: damaged at {name!r:.200}, not a list of files; use another checkpoint.")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run


def latest_checkpoint(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest intact `checkpoint-<step>` in a run's folder. Damaged ones are skipped and reported."""
    for folder in sorted(checkpoints(output_dir), key=step_of, reverse=True):
        try:
            verify_folder(folder)
            return folder
        except InputError as error:
            report(f"skipping a damaged checkpoint: {error}")
    return None


def prune_checkpoints(output_dir: Path, save_total_limit: int | None, report: Callable[[str], None]) -> None:
    """Remove the oldest checkpoints until `save_total_limit` intact ones are left (None: keep all).

    The newest is verified with its hashes before an older one is removed. The others were verified when they were the
    newest, so only their names and sizes are compared. A damaged one does not count and is reported. A folder whose
    manifest is missing or damaged is never removed.
    """
    if save_total_limit is None:
        return
    intact = 0
    for folder in sorted(checkpoints(output_dir), key=step_of, reverse=True):
        if intact == save_total_limit:
            if not folder.is_symlink() and not _has_manifest(folder):
                report(f"not removed, its {MANIFEST} is missing or damaged: {folder}")
                continue
            partial = _beside(folder, "partial")
            _remove(partial)
            folder.rename(partial)  # a kill during removal leaves no folder that looks like a checkpoint
            _remove(partial)
            continue
        try:
            verify_folder(folder, hashes=intact == 0)
            intact += 1
        except InputError as error:
            report(f"a damaged checkpoint does not count towards train.save_total_limit: {error}")


def _has_manifest(folder: Path) -> bool:
    try:
        _listed(read_json(folder / MANIFEST), folder / MANIFEST)
    except (InputError, AttributeError):
        return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the `checkpoint-<step>` folders of a run, in no order, intact or not."""
    return [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and FOLDER_NAME.fullmatch(p.name)]


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("checkpoint-"))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        raise InputError(f"{path}: is a file, where a run makes a temporary folder; move it elsewhere.")


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
