"""How a run came about: what run.json says of each start. Reads no variable of the environment, so nothing secret can
get into it."""

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
    command: Sequence[str], step: int, resumed_from: Path | None, processes: int, config_text: str, qa_sha256: str
) -> dict:
    """One start of a run, as plain JSON values: when, by which command, at which step, with which versions, where."""
    python = {"python": platform.python_version()}
    return {
        "started": utc_now(),
        "command": list(command),
        "step": step,
        "resumed_from": None if resumed_from is None else str(resumed_from),
        "versions": python | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(ROOT),
        "machine": {
            "host": platform.node(),
            "cpu": _cpu(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "processes": processes,
        },
        "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
        "qa_sha256": qa_sha256,
    }


def utc_now() -> str:
    """The time, as 2026-01-31T12:00:00+00:00."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in `folder`, with "-dirty" where tracked files differ from it; None where `folder` is
    not the root of a git repository, or git is not there."""

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]  # with such locks it would write into .git
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != folder.resolve():
            return None
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    """The processor's name and how many it counts as."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} x {os.cpu_count()}"
