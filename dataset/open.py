"""Open a QA file as a dataset, and give its samples an order, as the config's `data` section says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from config import DataConfig
from config.files import open_regular
from dataset.conversation import ChatFormat
from dataset.loader import QADataset
from dataset.order import SampleOrder
from dataset.qa_file import QAFile


def open_dataset(
    path: Path,
    data: DataConfig,
    chat: ChatFormat,
    read_pixels: Callable[[Path], Tensor],
    *,
    seed: int,
    left_out: Sequence[int] | np.ndarray = (),
) -> QADataset:
    """Open the QA file `path`. left_out: its records that cannot be used."""
    qa = QAFile(path)
    return QADataset(
        qa,
        chat,
        read_pixels,
        max_length=data.max_length,
        seed=seed,
        kept=np.setdiff1d(np.arange(len(qa)), left_out),
        skip_bad_images=data.on_bad_image == "skip",
    )


def sample_order(dataset: QADataset, data: DataConfig, *, seed: int, epoch_limit: int | None = None) -> SampleOrder:
    """Return the order in which training reads `dataset`. epoch_limit: samples an epoch has at most."""
    return SampleOrder(dataset.kept, seed, source_weights(dataset, data)[dataset.kept], limit=epoch_limit)


def source_weights(dataset: QADataset, data: DataConfig) -> np.ndarray:
    """Return every record's weight, float64 [n]: that of its source in the config, 1 for a source that is not listed."""
    weights = {source.name: source.weight for source in data.sources}
    return np.array([weights.get(name, 1.0) for name in dataset.qa.sources] or [1.0])[dataset.qa.source_of]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file as hex digits."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
