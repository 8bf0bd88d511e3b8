"""One optimizer step: gradients of its micro-batches, then clipping and the update, unless the loss or gradient is not
finite. A micro-batch that does not fit into memory is split and retried. Knows no file and no config.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import InputError
from dataset.batch import Batch
from model.model import VisionLanguageModel
from training.memory import is_out_of_memory, memory_advice
from training.parallel import clip_grad_norm
from training.processes import sum_dtype, total


@dataclass(frozen=True)
class StepLosses:
    """The result of `forward_and_backward`. `answers` and `balance` are this process's share; `targets` and
    `replaced` are totals over all processes."""

    answers: float  # this process's part of the loss per target
    balance: float  # this process's part of the experts' balance loss
    targets: int  # supervised tokens
    replaced: int  # records that were replaced because their images could not be read


@dataclass(frozen=True)
class Outcome:
    """The result of a step, equal on every process."""

    loss: float  # per target
    balance_loss: float | None  # of the experts, before its coefficient; None without experts
    grad_norm: float  # before clipping
    targets: int
    is_bad: bool  # the loss or gradient was not finite, so the weights were not changed
    has_overflowed: bool  # fp16: the scaled gradient did, so the weights were not changed and the scale is lowered
    replaced: int
    stop_requested: bool  # on any process


@dataclass
class Stepper:
    """Takes optimizer steps: `forward_and_backward`, then `sum_gradients(stepper.parameters)`, then `clip_and_step`.

    autocast: makes the context in which the model runs. seed: of dropout. max_grad_norm: None for no clipping. encoder:
    see `Batch.model_inputs`. balance_factor: coefficient of the experts' balance loss. That loss needs the router's choices,
    so it is computed for each micro-batch, and a step's is their mean weighted by tokens. It is the only number that depends
    on how a step is cut into micro-batches.
    """

    model: VisionLanguageModel
    optimizer: AcceleratedOptimizer
    accelerator: Accelerator
    autocast: Callable[[], contextlib.AbstractContextManager]
    seed: int
    max_grad_norm: float | None = None
    encoder: Callable[[Batch], Tensor | None] | None = None
    balance_factor: float = 0.0
    pieces: int = 1  # each micro-batch is split into so many; doubled when memory is full
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def forward_and_backward(self, step: int, micro_batches: Sequence[Batch]) -> StepLosses:
        """Add the gradients of this process's micro-batches of `step` (from 0) to the parameters."""
        with_targets = [batch for batch in micro_batches if batch.num_targets]
        counts = [
            sum(batch.num_targets for batch in with_targets),
            sum(batch.num_tokens for batch in with_targets),
            sum(len(batch.replaced) for batch in micro_batches),
        ]
        targets, tokens, replaced = map(int, total(self.accelerator, counts))
        while (losses := self._run_within_memory(step, micro_batches, targets, tokens=tokens)) is None:
            pass  # memory was full: again, in smaller pieces
        return StepLosses(*losses, targets=targets, replaced=replaced)

    def clip_and_step(self, losses: StepLosses, stop_requested: bool = False) -> Outcome:
        """Clip the summed gradients and update the weights, unless the loss or gradient is not finite; then clear the
        gradients. stop_requested: whether this process was asked to stop; every process learns whether any was."""
        values = [losses.answers, losses.balance, float(stop_requested)]
        loss, balance_loss, stops = total(self.accelerator, values)
        scaler = self.accelerator.scaler
        if scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        grad_norm = clip_grad_norm(self.parameters, self.max_grad_norm or math.inf)
        # With fp16, the scaler itself skips a step whose scaled gradient overflowed, and lowers its scale.
        is_bad = not math.isfinite(loss) or (scaler is None and not math.isfinite(grad_norm))
        has_overflowed = False
        if not is_bad:
            self.optimizer.step()
            if scaler is not None and self.optimizer.step_was_skipped:
                # A scale below 1 cannot cause an overflow: the gradient itself is not finite.
                is_bad = scaler.get_scale() < 1
                has_overflowed = not is_bad
        elif scaler is not None:
            scaler.update()  # or it would refuse to unscale the next step
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(
            loss=loss,
            balance_loss=balance_loss if self.model.has_experts else None,
            grad_norm=grad_norm,
            targets=losses.targets,
            is_bad=is_bad,
            has_overflowed=has_overflowed,
            replaced=losses.replaced,
            stop_requested=stops > 0,
        )

    def _run_within_memory(
        self, step: int, micro_batches: Sequence[Batch], targets: int, tokens: int
    ) -> tuple[float, float] | None:
        """Run all micro-batches and return this process's share of (loss, balance loss). None if memory was full:
        `pieces` is doubled, and no gradient of the attempt is left."""
        try:
            return self._run_micro_batches(step, micro_batches, targets, tokens=tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            largest = max(batch.num_samples for batch in micro_batches)
            if any(isinstance(parameter, DTensor) for parameter in self.parameters):
                raise InputError(
                    f"out of memory with {largest} samples at once, and a sharded model cannot retry a step, because the "
                    "other processes are waiting inside it. Make train.per_device_train_batch_size smaller and "
                    "train.gradient_accumulation_steps larger (the same step). "
                    f"{memory_advice(self.model, micro_batches)}"
                ) from None
            if self.pieces >= largest:
                advice = memory_advice(self.model, micro_batches)
                raise InputError(f"out of memory with one sample at a time. {advice}") from None
        # Outside of the except block, the exception's traceback no longer holds the attempt's tensors.
        at_once = -(-largest // self.pieces)
        self.pieces *= 2
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        fewer = -(-largest // self.pieces)
        print(
            f"out of memory with {at_once} samples at once: continuing with {fewer} at once, accumulated to the same step. "
            f"Smaller micro-batches (train.per_device_train_batch_size={fewer}) with as much more accumulation avoid the "
            "failed attempt.",
            flush=True,
        )
        return None

    def _run_micro_batches(
        self, step: int, micro_batches: Sequence[Batch], targets: int, tokens: int
    ) -> tuple[float, float]:
        loss = balance_loss = 0.0
        dtype = sum_dtype(self.accelerator.device)
        for i, batch in enumerate(micro_batches):
            micro_batch = i * self.accelerator.num_processes + self.accelerator.process_index
            for number, piece in enumerate(batch.split(self.pieces)):
                if not piece.num_targets:
                    continue
                # an unsplit micro-batch has the seed that it has in any run
                seed_dropout(self.seed, step, micro_batch, *([number] if self.pieces > 1 else []))
                with self.autocast():
                    losses = self.model(**piece.model_inputs(self.accelerator.device, self.encoder))
                # every target of the step has the same weight, whichever process computes it
                share = losses.answers * (1.0 / targets)
                loss += losses.answers.detach().to(dtype) / targets
                if losses.balance is not None:
                    weight = piece.num_tokens / tokens
                    share = share + losses.balance * (self.balance_factor * weight)
                    balance_loss += losses.balance.detach().to(dtype) * weight
                self.accelerator.backward(share)
        return float(loss), float(balance_loss)


def seed_dropout(seed: int, *place: int) -> None:
    """Seed dropout for one (step, micro-batch[, piece]): the same numbers on any process and after a resume, with no
    state to save."""
    torch.manual_seed(int(np.random.SeedSequence((seed, *place)).generate_state(1)[0]))
