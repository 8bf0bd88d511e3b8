"""Data preparation with plain keyword arguments instead of a config section."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from config import DataConfig, SourceConfig
from dataprocess.process_image import prepare


def prepare_sources(
    sources: Iterable[SourceConfig],
    qa_file: Path,
    *,
    validation_file: Path | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    max_refused: float = 1.0,
    verify_images: bool = False,
) -> dict:
    """Run `prepare` on these sources and return its report."""
    data = DataConfig(
        qa_file=qa_file,
        sources=tuple(sources),
        validation_file=validation_file,
        validation_fraction=validation_fraction,
        max_refused=max_refused,
        verify_images=verify_images,
    )
    return prepare(data, seed=seed)
