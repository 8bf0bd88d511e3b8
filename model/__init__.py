"""The model and its weights: projector, loss, building, what trains, checkpoints, answering, export."""

from __future__ import annotations

import importlib
from typing import Any


def load(folder: Any, **options: Any) -> Any:
    """Load a checkpoint or an exported folder for answering: see `model.loaded.load`."""
    # imported when it is used: it needs training and dataset, which are above this package
    return importlib.import_module("model.loaded").load(folder, **options)
