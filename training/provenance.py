"""A run's provenance: what run.json records of each start, the config and the released models that a checkpoint was made
with, and the comparison with the checkpoint that a run starts from. No environment variable is read, so no secret can get
into it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from config import Config, InputError, ModelConfig, is_moved, load_config, moved_parts, printable, start_differences
from config.typed_yaml import FolderOrHub
from dataset.open import file_sha256
from model.checkpoint import has_adapter
from model.checkpoint_folder import read_json, verify_folder
from model.start import holds_part
from training.digests import PARTS, has_digest, is_same_digest
from training.processes import print_main

PACKAGES = "torch transformers peft accelerate safetensors tokenizers numpy pillow".split()
ROOT = Path(__file__).parent.parent


def start_entry(
    *,
    command: Sequence[str],
    step: int,
    resumed_from: str | None,
    processes: int,
    config_text: str,
    digests: Mapping[str, str],
) -> dict:
    """Return one start of a run as plain JSON values: time, command, step, versions, machine, digests of config, data and
    released weights. resumed_from: relative to the run. digests: SHA-256 by name, and the names of the released models."""
    return {
        "started": utc_now(),
        "command": list(command),
        "step": step,
        "resumed_from": resumed_from,
        "versions": versions(),
        "git_commit": git_commit(ROOT),
        "machine": {**machine(), "processes": processes},
        "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        **digests,
    }


def without_absolute_paths(command: Sequence[str], folder: Path) -> list[str]:
    """Return the words of a command with their absolute paths relative to `folder`."""
    return [
        re.sub(r"(?<![^=\[,:\s\"'])/(?!/)[^,\]}\"']*", lambda match: os.path.relpath(match[0], folder), word)
        for word in command
    ]


def utc_now() -> str:
    """Return the time, as 2026-01-31T12:00:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that bear on a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def machine() -> dict:
    """Return this machine's host name, processor and GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"host": platform.node(), "cpu": f"{cpu_name()} x {os.cpu_count()}", "gpus": gpus}


def cpu_name() -> str:
    """Return the processor's name."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out in `folder`, with "-dirty" if tracked files differ from it.

    None if `folder` is not the root of a git repository, or git is not installed.
    """

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]  # optional locks would write into .git
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != folder.resolve():
            return None
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def model_names(model: ModelConfig) -> dict[str, str]:
    """Return part -> the name of the released model below it: a hub name, or the name of its folder."""
    paths = {part: path for part in PARTS if (path := getattr(model, part))}
    return {part: Path(path).name if os.path.isabs(path) else str(path) for part, path in paths.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint records


def saved_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config of a checkpoint's folder, whose paths are relative to it (absolute in earlier versions).

    A run moves folders into `previous-<n>` without changing them; their paths are relative to the place that they had.
    """
    place = folder.resolve()
    run = place.parent.parent
    if re.fullmatch(r"previous-[0-9]+", place.parent.name) and (run / ".lock").exists():
        place = run / place.name
    return load_config(folder / "config.yaml", overrides, place)


def equal_contents(folder: Path, saved: Config, config: Config) -> set[str]:
    """Return the keys of paths that differ between the config of a checkpoint's `folder`, `saved`, and `config`, while what
    is there now has the SHA-256 that the checkpoint records."""
    path = folder / "state.json"
    recorded = read_json(path) if path.exists() else _last_start(folder)
    recorded, equal = recorded if isinstance(recorded, dict) else {}, set()
    for part in PARTS:
        was, now = getattr(saved.model, part), getattr(config.model, part)
        if now not in (was, None) and has_digest(now, recorded.get(f"{part}_sha256"), folder.resolve().parent):
            equal.add(f"model.{part}")
    old, new = saved.data, config.data
    same = (old.qa_file, old.validation_file, old.sources) == (new.qa_file, new.validation_file, new.sources)
    if not same and new.qa_file.is_file() and file_sha256(new.qa_file) == recorded.get("qa_sha256"):
        equal.add("data.qa_file")
        if old.validation_file is not None and not old.validation_file.exists():
            equal.add("data.validation_file")
        for source in old.sources:  # the records that were made of them are equal
            for key in ("annotations", "images"):
                place = getattr(source, key)
                if place is not None and not place.exists():
                    equal.add(f"data.sources.{source.name}.{key}")
    return equal


def find_released(config: Config, folder: Path, given: Collection[str] = ()) -> ModelConfig:
    """Return the model section of a checkpoint's config with the places of its released models on this machine.

    A folder that is not where the config says, or holds other weights than the checkpoint records, is looked for near the
    checkpoint, the program and the current folder; only one with the recorded SHA-256 is taken. given: the keys that the
    user set; such a folder may hold other weights, and one line says so. Raises InputError if a folder is not found.
    """
    entry = _last_start(folder)
    places: dict[str, Any] = {}
    for part in PARTS:
        path, recorded = getattr(config.model, part), entry.get(f"{part}_sha256")
        if path is None or not os.path.isabs(path):
            continue
        is_there = os.path.isdir(path)
        if is_there and (recorded is None or has_digest(path, recorded, folder.resolve().parent)):
            continue
        if f"model.{part}" in given and is_there:
            print(printable(f"note: {path}: has other weights or another config.json than {folder} was trained with"))
            continue
        found = None if recorded is None else _find_folder(path, config.output_dir, folder, recorded=recorded)
        if found is None:
            name = entry.get(part, Path(path).name)
            raise InputError(
                f"{path}: {'has other weights or another config.json' if is_there else 'does not exist'}, and {folder} was "
                f'trained on top of the model "{name}"{f" (SHA-256 {recorded})" if recorded else ""}. Say where it is now: '
                f"model.{part}=FOLDER."
            )
        places[part] = FolderOrHub(found)
    return dataclasses.replace(config.model, **places)


def _find_folder(path: str, output_dir: Path, folder: Path, recorded: str) -> str | None:
    """Return a folder of the name of `path`, seen from a run in `output_dir`, that has the recorded digest."""
    near = [*folder.resolve().parents, ROOT, *ROOT.parents, Path.cwd()]
    names = [name for name in (moved_parts(path, output_dir), Path(path).name) if name]
    for place in dict.fromkeys(str(base / name) for name in names for base in near):
        if os.path.isdir(place) and has_digest(place, recorded, folder.resolve().parent):
            return place
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint that a run starts from


def compare_start(config: Config) -> None:
    """Compare the config with that of the checkpoint in model.start_from, whose weights were trained for it: some keys must
    be equal, others are printed if they differ (START_KEYS). Reads no weights.

    Raises InputError. A folder that is not a checkpoint is left to `open_model`.
    """
    start = config.model.start_from
    assert start is not None
    try:
        verify_folder(start, hashes=False)
    except InputError:
        return
    trained = saved_config(start)
    if different := start_differences(trained, config, "refused"):
        raise InputError(
            f"{start}: its weights were trained with other settings ({'; '.join(different[:4])}), so they would compute "
            "something else. Set these keys as in its config.yaml, or start without it (model.start_from: null)."
        )
    for text in start_differences(trained, config, "said"):
        print_main(f"{start}: its weights were trained with another setting ({text})")


def compare_start_weights(config: Config, digests: Mapping[str, str]) -> None:
    """Compare the released weights below this run with those below the checkpoint in model.start_from.

    digests: of `released_digests`. Raises InputError if they differ, unless the checkpoint holds nothing of a language
    model: a projector may be tried with another one. What an old checkpoint did not record is compared by name, and printed.
    """
    start = config.model.start_from
    assert start is not None
    trained_config, entry = saved_config(start), _last_start(start)
    trained = trained_config.model
    for part in PARTS:
        was, now, key = getattr(trained, part), getattr(config.model, part), f"{part}_sha256"
        if None in (was, now) or holds_part(start, part):
            continue  # the folder holds all weights of it: a new language model's, or an export's
        recorded, shown = entry.get(key), was if os.path.exists(was) else model_names(trained)[part]
        if recorded is None or key not in digests:
            if was != now and not is_moved(was, now, trained_config.output_dir):
                print_main(f"{start}: trained on top of {shown}, and nothing records whether {now} has equal weights")
        elif not is_same_digest(recorded, digests[key]):
            holds = has_adapter(start) or (start / "language_model.safetensors").exists()
            if part == "vision_tower" or holds:
                raise InputError(
                    f"{start}: trained on top of {shown}, whose weights or config.json were not those of {now} "
                    f"(model.{part}). Its weights would compute something else: give the folder that it was trained with, "
                    "or undo the edit of its config.json."
                )
            print_main(
                f"{start}: its projector was trained for another language model (model.{part}: {shown} -> {now})"
            )


def _last_start(checkpoint: Path) -> dict:
    """Return the last entry of a checkpoint's run.json, empty if it has none."""
    path = checkpoint / "run.json"
    starts = read_json(path) if path.exists() else []
    return starts[-1] if isinstance(starts, list) and starts and isinstance(starts[-1], dict) else {}
