"""The patch features of a batch's pictures: from the cache where they are, else from the frozen tower, and then into it.
Knows no training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from model.model import VisionLanguageModel
from visual.feature_cache import FeatureCache

IDLE_BATCHES = 100  # without one new picture, after which the tower leaves the GPU


class CachedEncoder:
    """encoder(batch) -> patch_features [M,N,Dv] on `device`, or None for a batch without pictures.

    autocast: makes the context in which the tower runs. A tower that has nothing to do goes to the CPU, so that the GPU's
    memory is the language model's; the model takes it back by itself when there is a new picture.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        cache: FeatureCache,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ):
        self.model, self.cache, self.device, self.autocast = model, cache, device, autocast
        self.idle = 0  # batches since the last new picture

    @torch.no_grad()
    def __call__(self, batch: dict) -> Tensor | None:
        """batch: as `dataset.loader.collate` makes it."""
        stored, pixels = batch["patch_features"], batch["pixel_values"]
        self.idle = self.idle + 1 if pixels is None else 0
        if self.idle and self.idle % IDLE_BATCHES == 0:  # again and again: a question about a picture brings it back
            self.model.vision_tower.to("cpu")
        if pixels is None:
            return None if stored is None else stored.to(self.device, non_blocking=True)
        fresh = self.cache.features(batch["image_keys"], pixels.to(self.device, non_blocking=True), self._encode)
        if stored is None:
            return fresh
        is_cached = torch.tensor(batch["is_cached"], device=self.device)
        features = torch.empty(len(is_cached), *fresh.shape[1:], dtype=fresh.dtype, device=self.device)
        features[is_cached] = stored.to(self.device, non_blocking=True)
        features[~is_cached] = fresh
        return features

    def _encode(self, pixel_values: Tensor) -> Tensor:
        with self.autocast():
            return self.model.patch_features(pixel_values)
