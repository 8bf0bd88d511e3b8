"""The patch features of a batch's images: from the cache, else from the frozen tower and then into the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from dataset.batch import Batch
from model.model import VisionLanguageModel
from visual.feature_cache import FeatureCache

IDLE_BATCHES = 100  # batches without a new image, after which the tower leaves the GPU


class CachedEncoder:
    """encoder(batch) -> patch features [M,N,Dv] on `device`, or None for a batch without images.

    autocast: makes the context in which the tower runs. An idle tower moves to the CPU and leaves the GPU's memory to the
    language model. The model brings it back when there is a new image.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        cache: FeatureCache,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager],
    ):
        self.model, self.cache, self.device, self.autocast = model, cache, device, autocast
        self.idle = 0  # batches since the last new image

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor | None:
        stored, pixels = batch.patch_features, batch.pixel_values
        self.idle = self.idle + 1 if pixels is None else 0
        if self.idle and self.idle % IDLE_BATCHES == 0:  # repeatedly: a generated answer brings the tower back
            self.model.vision_tower.to("cpu")
        if pixels is None:
            return None if stored is None else stored.to(self.device, non_blocking=True)
        fresh = self.cache.features(batch.image_keys, pixels.to(self.device, non_blocking=True), self._encode)
        if stored is None:
            return fresh
        found, made = iter(stored.to(self.device, non_blocking=True)), iter(fresh)
        return torch.stack([next(found if is_cached else made) for is_cached in batch.is_cached])

    def _encode(self, pixel_values: Tensor) -> Tensor:
        with self.autocast():
            return self.model.patch_features(pixel_values)
