"""A run's provenance: what run.json records of each start. No environment variable is read, so no secret can get into it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

PACKAGES = "torch transformers peft accelerate safetensors tokenizers numpy pillow".split()
ROOT = Path(__file__).parent.parent


def start_entry(
    *,
    command: Sequence[str],
    step: int,
    resumed_from: Path | None,
    processes: int,
    config_text: str,
    qa_sha256: str,
) -> dict:
    """Return one start of a run as plain JSON values: time, command, step, versions, machine, digests of config and data."""
    return {
        "started": utc_now(),
        "command": list(command),
        "step": step,
        "resumed_from": None if resumed_from is None else str(resumed_from),
        "versions": versions(),
        "git_commit": git_commit(ROOT),
        "machine": {**machine(), "processes": processes},
        "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        "qa_sha256": qa_sha256,
    }


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
