"""How well a model tells the answers of held-out records, without generating any: loss, perplexity, share of tokens that are
right, balance of the experts. For train.py and test.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dataset.loader import count_tokens
from model.model import VisionLanguageModel
from step import count_targets, on_device


class Sums(NamedTuple):
    """What can be added up over batches and processes."""

    loss: float = 0.0  # cross entropy
    targets: float = 0.0
    right: float = 0.0  # targets that were the likeliest token
    balance: float = 0.0  # each batch's balance loss times its tokens
    tokens: float = 0.0

    def plus(self, other: Sequence[float]) -> Sums:
        return Sums(*(mine + its for mine, its in zip(self, other, strict=True)))


class Validation(NamedTuple):
    """Per supervised token. balance_loss: None where there are no experts."""

    loss: float
    token_accuracy: float
    balance_loss: float | None

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def values(self) -> dict[str, float]:
        """By the names that metrics.jsonl and scores.json have for them, without what there is not: JSON has no infinity."""
        found = {"loss": self.loss, "perplexity": self.perplexity, **self._asdict()}
        return {name: value for name, value in found.items() if value is not None and value != math.inf}


@torch.no_grad()
def add_up(
    model: VisionLanguageModel,
    batches: Iterable[dict],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
    encoder: Callable[[dict], Tensor | None] | None = None,
) -> Sums:
    """The sums over `batches` (see `dataset.loader`). model: in eval mode; autocast: makes the context to compute in."""
    sums = Sums()
    for batch in batches:
        with autocast():
            losses = model(**on_device(batch, device, encoder))
        tokens = count_tokens(batch)
        balance = 0.0 if losses.balance is None else float(losses.balance) * tokens
        sums = sums.plus((float(losses.answers), count_targets(batch), float(losses.right), balance, tokens))
    return sums


def of_sums(sums: Sums, has_experts: bool) -> Validation:
    """What the sums come to."""
    balance = sums.balance / sums.tokens if has_experts else None
    return Validation(sums.loss / sums.targets, sums.right / sums.targets, balance)
