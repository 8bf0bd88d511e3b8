"""The demo: its world, its raw data, and its two tiny backbones with the code that trained them."""

from __future__ import annotations

import importlib.util
import sys

from config import InputError


def missing_packages(*names: str) -> list[str]:
    """Return those of the modules `names` that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def require_packages(*names: str) -> None:
    """Raise InputError if one of the modules `names`, which requirements-emoji.txt installs, is missing."""
    if missing := missing_packages(*names):
        raise InputError(
            f"{', '.join(missing)}: not installed; run {sys.executable} -m pip install -r requirements-emoji.txt, or use "
            "demo/emoji.sh, which installs everything."
        )
