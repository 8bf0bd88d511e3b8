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

    def plus(self, other: Sequence[float]) -> Sums:
        return Sums(*(mine + its for mine, its in zip(self, other, strict=True)))


class Validation(NamedTuple):
    """Means per supervised token. balance_loss: None without experts."""

    loss: float
    token_accuracy: float
    balance_loss: float | None

    @classmethod
    def of_sums(cls, sums: Sums, has_experts: bool) -> Validation:
        balance = sums.balance / sums.tokens if has_experts else None
        return cls(sums.loss / sums.targets, sums.right / sums.targets, balance)

    @property
    def perplexity(self) -> float:
        """e to the loss; infinity if a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def values(self) -> dict[str, float]:
        """The values under their names in metrics.jsonl and scores.json. Absent and infinite ones are left out: JSON has no
        infinity."""
        found = {"loss": self.loss, "perplexity": self.perplexity, **self._asdict()}
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
    """Sum losses and counts over `batches`.

    model: in eval mode. autocast: makes the context to compute in. encoder: see `Batch.model_inputs`.
    """
    sums = Sums()
    for batch in batches:
        with autocast():
            losses = model(**batch.model_inputs(device, encoder))
        sums = sums.plus(_batch_sums(batch, losses))
    return sums


def _batch_sums(batch: Batch, losses: Losses) -> tuple[float, ...]:
    assert losses.right is not None  # it is None only while gradients are enabled
    tokens = batch.num_tokens
    balance = 0.0 if losses.balance is None else float(losses.balance) * tokens
    return float(losses.answers), batch.num_targets, float(losses.right), balance, tokens
