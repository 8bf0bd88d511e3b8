"""Digests of what a run reads: its data, and the released weights below it.

The digests of large released files are remembered in the run's folder, so that a checkpoint of a model of many gigabytes
opens without reading them twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from accelerate.utils import gather_object

from config import InputError, ModelConfig
from config.files import open_regular, publish, refuse_link, remove_partials
from dataset.open import file_sha256
from model.build import weight_files
from model.checkpoint_folder import read_json
from training.processes import on_main, print_main

PARTS = "vision_tower", "language_model"  # the released models below a run

# keys of a released config.json that do not change what the model computes. Not pad_token_id: its embedding is not trained.
_FORMER_NOT_COMPUTING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_NOT_COMPUTING = _FORMER_NOT_COMPUTING | set(
    "auto_map bos_token_id decoder_start_token_id eos_token_id sep_token_id tokenizer_class use_cache".split()
)
_FORMER: dict[str, str] = {}  # digest -> the one that earlier versions computed, with fewer keys left out
_HASHES: dict[str, str] = {}  # state of a file (`_file_state`) -> its SHA-256
HASHES_FILE = ".hashes.json"  # in a run's folder: the same of the large files of its released models
LARGE_BYTES = 10**8  # such a file is remembered in HASHES_FILE
SAID_BYTES = 5 * 10**9  # reading more than this is announced
CLOCK_TICK = 2 * 10**9  # ns; the clocks of file systems tick at least this often


def equal_sha256(path: Path) -> str:
    """Return a file's SHA-256. Raises InputError on every process if two processes have different files there."""
    try:
        mine = file_sha256(path)
    except OSError as error:
        mine = f"not readable ({error.strerror})"
    every = gather_object([mine])
    for rank, other in enumerate(every):
        if other != every[0]:
            raise InputError(
                f"{path}: process {rank} has another file there than process 0 ({other:.16} and {every[0]:.16}, SHA-256). "
                "Every machine must read the same data; copy the file again."
            )
    return mine


def released_digests(model: ModelConfig, run: Path | None = None) -> dict[str, str]:
    """Return {"vision_tower_sha256": ..., "language_model_sha256": ...}: digests of the released weights, each over its
    safetensors files and config.json.

    The main process reads every byte once, as many files at once as there are processors; a later stage does not read them
    again. run: a run's folder, which remembers the digests of large files, so that later starts do not read these again
    unless they have changed. A new language model has no digest, nor has a hub model without safetensors of its own. Raises
    InputError if a file cannot be read.
    """
    paths = {part: path for part in PARTS if (path := getattr(model, part))}
    found = on_main(lambda: _released_sha256(paths, run))
    _FORMER.update(found.values())
    return {f"{part}_sha256": digest for part, (digest, _) in found.items()}


def is_same_digest(recorded: object, now: object) -> bool:
    """Return whether a recorded digest of released weights is the one of now, also if an earlier version recorded it."""
    return recorded == now or (recorded is not None and recorded == _FORMER.get(str(now)))


def _released_sha256(paths: Mapping[str, str], run: Path | None) -> dict[str, tuple[str, str]]:
    """Return part -> its digest, and the one that earlier versions computed."""
    files = {part: found for part, path in paths.items() if (found := weight_files(path)) is not None}
    hashes = _hash_files([file for found in files.values() for file in found.values()], run)
    digests = {}
    for part, found in files.items():
        config = read_json(found["config.json"], "use another model")
        weights = [[name, hashes[file]] for name, file in found.items() if name != "config.json"]
        former = {key: value for key, value in config.items() if key not in _FORMER_NOT_COMPUTING}
        computing = {key: value for key, value in config.items() if key not in _NOT_COMPUTING}
        now, then = (json.dumps([weights, kept], sort_keys=True) for kept in (computing, former))
        digests[part] = hashlib.sha256(now.encode()).hexdigest(), hashlib.sha256(then.encode()).hexdigest()
    return digests


def _hash_files(files: Sequence[Path], run: Path | None) -> dict[Path, str]:
    """Return the SHA-256 of each file. A file that this process has read, or whose hash the run's folder remembers, and that
    has not changed is not read again."""
    stored = {} if run is None else _stored_hashes(run)
    try:
        status = {file: file.stat() for file in files}
        states = {file: _file_state(file, status[file]) for file in files}
        known = {**(stored or {}), **_HASHES}
        unread = [file for file in status if states[file] not in known]
        size = sum(status[file].st_size for file in unread)
        if size > SAID_BYTES:
            print_main(f"checking {size / 1e9:.0f} GB of released weights")
        began = time.time_ns()
        with ThreadPoolExecutor() as pool:
            read = dict(zip(unread, pool.map(file_sha256, unread), strict=True))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}).") from None
    # a file written a moment ago may change again without a later time
    settled = {file for file in read if status[file].st_ctime_ns < began - CLOCK_TICK}
    known |= {states[file]: read[file] for file in settled}
    _HASHES.update({state: known[state] for state in states.values() if state in known})
    large = {states[file] for file in files if status[file].st_size >= LARGE_BYTES} & known.keys()
    if run is not None and stored is not None and not large <= stored.keys():
        _store_hashes(run, stored | {state: known[state] for state in sorted(large)})
    return {file: read[file] if file in read else known[states[file]] for file in files}


def _file_state(file: Path, status: os.stat_result) -> str:
    """Return a hash of what a file's path, size, times and inode are. Nobody can set the time of the last change (ctime), so
    a file of the same state has the same content."""
    state = [os.path.realpath(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _stored_hashes(run: Path) -> dict[str, str] | None:
    """Return the hashes that a run's folder remembers; None if it is not a run's, or a file of that name is not ours."""
    path = run / HASHES_FILE
    if not (run / ".lock").is_file():
        return None
    try:
        if not os.path.lexists(path):
            return {}
        refuse_link(path)
        with open_regular(path) as file:
            stored = json.loads(file.read() or b"{}")  # empty after a loss of power
    except (InputError, OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(stored, dict) and all(
        isinstance(word, str) and re.fullmatch("[0-9a-f]{64}", word) for pair in stored.items() for word in pair
    )
    return stored if is_ours else None


def _store_hashes(run: Path, hashes: Mapping[str, str]) -> None:
    """Remember hashes in a run's folder, if it can be written. The newest come last, and very old ones are dropped."""
    newest = dict(list(hashes.items())[-1000:])
    with contextlib.suppress(OSError):
        remove_partials(run, HASHES_FILE)
        publish(run / HASHES_FILE, json.dumps(newest, indent=0).encode())


def has_digest(path: str, recorded: object, run: Path) -> bool:
    """Return whether the released model at `path` has a recorded digest, also if an earlier version recorded it. run: as in
    `released_digests`."""
    return recorded in _released_sha256({"": path}, run).get("", ())
