"""Fixtures that download once for all tests. And tiny models are fastest on one thread; two test processes do not disturb
each other then."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.downloads import drawings, part, qwen3_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def downloads() -> Iterator[Path]:
    """The folder of all downloads, removed at the end; TEST_DOWNLOADS names one that is kept for later sessions."""
    if kept := os.environ.get("TEST_DOWNLOADS"):
        yield Path(kept)
    else:
        with tempfile.TemporaryDirectory(prefix="test-downloads-") as folder:
            yield Path(folder)


@pytest.fixture(scope="session")
def smollm2(downloads) -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return part("smollm2", downloads)


@pytest.fixture(scope="session")
def vit_s(downloads) -> Path:
    """The folder of a ViT-S/14 in DINOv2's layout."""
    return part("vit_s", downloads)


@pytest.fixture(scope="session")
def efficientnet_lite0(downloads) -> Path:
    """The folder of EfficientNet-Lite0, trained on ImageNet."""
    return part("efficientnet_lite0", downloads)


@pytest.fixture(scope="session")
def emoji_drawings(downloads) -> Path:
    """A folder with four packages of emoji drawings."""
    return drawings(downloads)


@pytest.fixture(scope="session")
def qwen3(downloads) -> Path:
    """A folder with Qwen3's own tokenizer, without weights."""
    return qwen3_tokenizer(downloads)
