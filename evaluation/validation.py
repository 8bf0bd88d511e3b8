"""Loss and accuracy on the answers of held-out records, without generating text: used during training, at its end, and by
test.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dataset.batch import Batch
from model.model import Losses, VisionLanguageModel


class Sums(NamedTuple):
    """The numbers that are summed over batches and processes."""

    loss: float = 0.0  # cross entropy
    targets: float = 0.0
    right: float = 0.0  # targets that were the most likely token
    balance: float = 0.0  # each batch's balance loss times its tokens
    tokens: float = 0.0
    # of the records with images, in batches with two different images or more
    own: float = 0.0  # cross entropy with the own images
    swapped: float = 0.0  # cross entropy with swapped ones
    paired: float = 0.0  # targets

    def plus(self, other: Sequence[float]) -> Sums:
        return Sums(*(mine + its for mine, its in zip(self, other, strict=True)))


class Validation(NamedTuple):
    """Means per supervised token.

    balance_loss: None without experts. image_adds: how much larger the loss of records with images is if the images are
    swapped within a batch; None if there are no two images to swap. 0 means that the answers do not depend on the image.
    It depends on the batches, so it is not among the `values`.
    """

    loss: float
    token_accuracy: float
    balance_loss: float | None
    image_adds: float | None = None

    @classmethod
    def of_sums(cls, sums: Sums, has_experts: bool) -> Validation:
        balance = sums.balance / sums.tokens if has_experts else None
        image_adds = (sums.swapped - sums.own) / sums.paired if sums.paired else None
        return cls(sums.loss / sums.targets, sums.right / sums.targets, balance, image_adds)

    @property
    def perplexity(self) -> float:
        """e to the loss; infinity if a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def values(self) -> dict[str, float]:
        """The values under their names in metrics.jsonl and scores.json. Absent and infinite ones are left out: JSON has no
        infinity."""
        found = {"loss": self.loss, "perplexity": self.perplexity, **self._asdict()}
        del found["image_adds"]
        return {name: value for name, value in found.items() if value is not None and value != math.inf}


@torch.no_grad()
def sum_losses(
    model: VisionLanguageModel,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
    encoder: Callable[[Batch], Tensor | None] | None = None,
) -> Sums:
    """Sum losses and counts over `batches`, with the own images and with swapped ones.

    model: in eval mode. autocast: makes the context to compute in. encoder: see `Batch.model_inputs`.
    """
    sums = Sums()
    for batch in batches:
        with autocast():
            inputs = batch.model_inputs(device, encoder)
            if (pixels := inputs.pop("pixel_values", None)) is not None:
                inputs["patch_features"] = model.patch_features(pixels)  # once for both
            losses = model(**inputs)
            sums = sums.plus(_batch_sums(batch, losses))
            features = inputs.get("patch_features")
            others = None if features is None else swap_images(features)
            if others is not None:
                own = float(losses.answers)
                if not all(batch.images_in_sample):  # texts alone would dilute the difference
                    batch = batch.with_images()
                    inputs = batch.model_inputs(device) | {"patch_features": features}
                    inputs.pop("pixel_values")
                    own = float(model(**inputs).answers)
                swapped = float(model(**inputs | {"patch_features": others}).answers)
                sums = sums._replace(
                    own=sums.own + own, swapped=sums.swapped + swapped, paired=sums.paired + batch.num_targets
                )
    return sums


def swap_images(features: Tensor) -> Tensor | None:
    """Give each image the features of another image: [M, N, Dv] -> [M, N, Dv]. Images with equal features are one
    image: a copy does not count as another image. None if all are the same."""
    if len(features) < 2:
        return None
    _, kinds = features.flatten(1).unique(dim=0, return_inverse=True)
    rows = kinds.tolist()
    count = max(rows) + 1
    if count < 2:
        return None
    first_row = {kind: row for row, kind in reversed(list(enumerate(rows)))}
    return features[[first_row[(kind + 1) % count] for kind in rows]]


def _batch_sums(batch: Batch, losses: Losses) -> tuple[float, ...]:
    assert losses.right is not None  # it is None only while gradients are enabled
    tokens = batch.num_tokens
    balance = 0.0 if losses.balance is None else float(losses.balance) * tokens
    return float(losses.answers), batch.num_targets, float(losses.right), balance, tokens, 0.0, 0.0, 0.0
