"""A run's folders (checkpoint-<step>, best, final): whole or absent, whatever happens while they are written; listed in
a manifest with sizes and hashes, so that a damaged or a foreign file is noticed and named. Knows nothing of what they hold.

Beside `X` there may stand, after a kill, `.X.partial` (being written or removed: worth nothing) and `.X.replaced` (the one
before, while a new one takes its place); `recover` puts that in order.
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

MANIFEST = "manifest.json"
FORMAT = 1
# Bytes that a file of text may have. A larger one is refused before it is read; only weights (.safetensors) may be larger.
MAX_BYTES = {MANIFEST: 1 << 20, "config.yaml": 1 << 18, "state.json": 1 << 20}
MAX_TEXT_BYTES = 1 << 26  # the tokenizers' vocabularies are the largest: some 11 MB

_LEFTOVER = re.compile(r"\.(checkpoint-\d+|best|final)\.(partial|replaced)")
_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your share of the disk is used up (quota)",
    errno.EFBIG: "a file would be larger than is allowed here (ulimit -f)",
}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_folder(folder: Path, write: Callable[[Path], None], tensor_bytes: int = 0) -> None:
    """Make `folder` with what `write(partial folder)` puts there, and its manifest: all of it or nothing. An existing
    folder of that name is replaced at the very end. Killed at any moment, it leaves the old one or the new one, after
    `recover`. tensor_bytes: what the weights among it will take, for the message.

    InputError where the disk is full: the folder as it was before is untouched, nothing half written is left.
    """
    partial, replaced = _beside(folder, "partial"), _beside(folder, "replaced")
    _put_back(folder)  # where nobody called `recover` after a kill
    _remove(replaced)
    _remove(partial)
    try:
        partial.mkdir(parents=True)
        write(partial)
        files = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(0o644)  # safetensors makes files that only their owner can read
            _flush(path)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        text_bytes = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file() and p.suffix != ".safetensors")
        _put_back(folder)
        _remove(partial)
        if (reason := disk_full(error)) is None:
            raise
        raise InputError(_no_room(folder, reason, tensor_bytes + text_bytes)) from None
    _remove(replaced)


def replace_text(path: Path, text: str) -> None:
    """Write a file aside, flush it, give it its name: readers see the old text or the new one. InputError: a full disk."""
    partial = _beside(path, "partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if (reason := disk_full(error)) is None:
            raise
        raise InputError(f"{path}: {reason}; free some room there, the same command then goes on.") from None


def disk_full(error: BaseException) -> str | None:
    """Why there is no room, if `error` says that there is none: an OSError, or what safetensors and tokenizers, which are
    written in Rust, make of one ("... (os error 28)")."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return _DISK_FULL.get(number)


def _no_room(folder: Path, reason: str, needed: int) -> str:
    free = shutil.disk_usage(next(parent for parent in folder.parents if parent.exists())).free
    before = max(checkpoints(folder.parent), key=step_of, default=None)
    then = "begins anew" if before is None else f"goes on from {before.name}"
    elsewhere = "another output_dir" if before is None else f"another output_dir and --resume {before}"
    return (
        f"{folder}: {reason}. This folder needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free there. Free "
        f"some room or make train.save_total_limit smaller, and the same command {then}; or give {elsewhere}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# After a kill


def recover(output_dir: Path) -> None:
    """Put in order what a kill left in a run's folder: a folder that was being replaced goes back where its new version did
    not take its place; what was half written or half removed goes away. For the one run that owns the folder."""
    found = [(path, match) for path in output_dir.glob(".*") if (match := _LEFTOVER.fullmatch(path.name))]
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


def verify_folder(folder: Path, hashes: bool = True) -> None:
    """InputError if `folder` is not what `write_folder` made: no manifest, a file missing, one that is not listed, a link, a
    file of another size, or (`hashes`) of other content. Only names found in the folder are opened, so a manifest cannot
    point elsewhere. Hidden files are passed over: nothing here reads them."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder; name one that train.sh wrote, such as runs/demo/final.")
    manifest = folder / MANIFEST
    found = _plain_files(folder)
    if MANIFEST not in found:
        raise InputError(
            f"{folder}: not a checkpoint, it has no {MANIFEST}; name checkpoint-<step> or final of a run's folder."
        )
    values = read_json(manifest)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        version = values.get("format") if isinstance(values, dict) else None
        raise InputError(f"{manifest}: format {version!r:.40}, this version reads format {FORMAT}.")
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


def weights_digest(folder: Path) -> str:
    """What tells one model from another: a sha256 over those of its weights, as its manifest has them. Scores and history,
    which are added later, do not count."""
    files = _listed(read_json(folder / MANIFEST), folder / MANIFEST)
    weights = sorted((name, digest) for name, (_, digest) in files.items() if name.endswith(".safetensors"))
    return hashlib.sha256(json.dumps(weights).encode()).hexdigest()


def read_json(path: Path, advice: str = "use another checkpoint") -> Any:
    """The value in a small JSON file. InputError: absent, too large, unreadable, or no JSON."""
    try:
        _refuse_large(path, path.stat().st_size)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {advice}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, it is no JSON ({str(error)[:80]}); {advice}.") from None


def _plain_files(folder: Path) -> dict[str, int]:
    """Path inside the folder -> bytes, of all that is not hidden. InputError: a link, a pipe, a text of gigabytes."""
    found = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *(name for name in files if not name.startswith("."))]:
            path = Path(parent, name)
            if not name.isprintable():
                raise InputError(f"{parent}: holds {name!r}, a name that nothing here writes; use another checkpoint.")
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                _refuse_large(path, status.st_size)
                found[path.relative_to(folder).as_posix()] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise InputError(f"{path}: a link or no plain file; a checkpoint holds plain files only, put it there.")
    return found


def _refuse_large(path: Path, size: int) -> None:
    limit = MAX_BYTES.get(path.name, MAX_TEXT_BYTES)
    if path.suffix != ".safetensors" and size > limit:
        raise InputError(
            f"{path}: {size / 1e6:,.0f} MB, more than such a file ever has ({limit / 1e6:,.1f} MB); use another checkpoint."
        )


def _listed(values: dict, manifest: Path) -> dict[str, tuple[int, str]]:
    files = values.get("files")
    entries = files.items() if isinstance(files, dict) else [("files", None)]
    for name, entry in entries:
        sound = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not sound:
            raise InputError(f"{manifest}: damaged at {name!r:.200}, it is no list of files; use another checkpoint.")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoints of a run


def latest_checkpoint(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole `checkpoint-<step>` in a run's folder; damaged ones are passed over and reported."""
    for folder in sorted(checkpoints(output_dir), key=step_of, reverse=True):
        try:
            verify_folder(folder)
            return folder
        except InputError as error:
            report(f"passing over a damaged checkpoint: {error}")
    return None


def prune_checkpoints(output_dir: Path, save_total_limit: int | None, report: Callable[[str], None]) -> None:
    """Remove the oldest checkpoints until `save_total_limit` whole ones are left (None: all). The newest is read back
    before an older one goes; a damaged one does not count, and is reported. Of the others only names and sizes are looked
    at: they were read back when they were the newest."""
    if save_total_limit is None:
        return
    whole = 0
    for folder in sorted(checkpoints(output_dir), key=step_of, reverse=True):
        if whole == save_total_limit:
            partial = _beside(folder, "partial")
            _remove(partial)
            folder.rename(partial)  # a kill while it is removed leaves no folder that looks like a checkpoint
            _remove(partial)
            continue
        try:
            verify_folder(folder, hashes=whole == 0)
            whole += 1
        except InputError as error:
            report(f"a damaged checkpoint, which does not count towards train.save_total_limit: {error}")


def checkpoints(output_dir: Path) -> list[Path]:
    return [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d{1,15}", p.name)]


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
