"""One optimizer step: the loss and the gradients of its micro-batches, on this process and summed over all, and what
happens where that goes wrong: a loss that is no number, a memory that is full. Knows no file and no config.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config import IGNORE_INDEX, InputError
from dataset.loader import count_tokens, split_batch
from model.parallel import clip_grad_norm, sum_gradients


@dataclass(frozen=True)
class Outcome:
    """What became of a step. The same on every process."""

    loss: float  # per answer token
    balance_loss: float | None  # of the experts, if there are any; times its factor it was learned from as well
    grad_norm: float  # before clipping
    targets: int  # answer tokens
    is_bad: bool  # the loss or the gradient was no number: the weights are as they were
    replaced: int  # records in whose place others were taken, for their pictures


class Stepper:
    """Takes optimizer steps: `stepper(step, micros, rates, stop)`.

    autocast: makes the context in which the model runs; seed: of dropout; max_grad_norm: None for no clipping;
    pad_token_id: for the smaller batches that a full memory asks for; encoder: batch -> patch features, where they are
    cached, else None: then the model makes them; balance_factor: of the experts' load-balancing loss.

    That loss is taken over a micro-batch, for which the router's choices are there, and a step's is the mean of those by
    their tokens; so it alone depends on how a step is cut into micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        accelerator: Accelerator,
        autocast: Callable[[], contextlib.AbstractContextManager],
        seed: int,
        max_grad_norm: float | None,
        pad_token_id: int,
        encoder: Callable[[dict], Tensor | None] | None = None,
        balance_factor: float = 0.0,
    ):
        self.model, self.optimizer, self.accelerator, self.autocast = model, optimizer, accelerator, autocast
        self.seed, self.max_grad_norm = seed, max_grad_norm
        self.pad_token_id, self.encoder, self.balance_factor = pad_token_id, encoder, balance_factor
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.pieces = 1  # into which each micro-batch is cut; doubled when memory was full

    def __call__(self, step: int, micros: Sequence[dict], rates: Sequence[float], stop: object) -> tuple[Outcome, bool]:
        """Learn from this process's micro-batches of `step` (from 0) at one learning rate for each optimizer group. stop:
        true once this process was asked to stop, looked at when the gradients are there; returned is whether any was."""
        read = [batch for batch in micros if count_targets(batch)]
        counts = [
            sum(map(count_targets, read)),
            sum(map(count_tokens, read)),
            sum(len(batch["replaced"]) for batch in micros),
        ]
        targets, tokens, replaced = map(int, total(self.accelerator, counts))
        while (losses := self._try(step, micros, targets, tokens)) is None:
            pass  # with smaller pieces
        sum_gradients(self.parameters)
        loss, balance_loss, stopping = total(self.accelerator, [*losses, float(bool(stop))])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        grad_norm = clip_grad_norm(self.parameters, self.max_grad_norm or math.inf)
        # fp16's scaler leaves a step out by itself where only the scaled gradient was too large, and lowers its scale
        is_bad = not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(grad_norm))
        if not is_bad:
            self.optimizer.step()
            # no scale below 1 is too large: that gradient was no number before it was scaled
            is_bad = self.optimizer.step_was_skipped and self.accelerator.scaler.get_scale() < 1
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # or it would refuse to unscale the next step
        self.optimizer.zero_grad(set_to_none=True)
        balance = balance_loss if self.model.has_experts else None
        return Outcome(loss, balance, grad_norm, targets, is_bad, replaced), stopping > 0

    def _try(self, step: int, micros: Sequence[dict], targets: int, tokens: int) -> tuple[float, float] | None:
        """Forward and backward; these micro-batches' shares of the loss and the balance loss. None: memory was full,
        `pieces` is doubled and nothing is left of the attempt."""
        try:
            return self._forward_and_backward(step, micros, targets, tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            rows = max(len(batch["ids"]) for batch in micros)
            if any(isinstance(parameter, DTensor) for parameter in self.parameters):
                raise InputError(
                    f"memory is full with {rows} samples at once, and a sharded model cannot repeat a step: the other "
                    "processes wait in the middle of it. Make train.per_device_train_batch_size smaller and "
                    f"train.gradient_accumulation_steps larger (the same step). {memory_advice(self.model, micros)}"
                ) from None
            if self.pieces >= rows:
                raise InputError(
                    f"memory is full with one sample at a time. {memory_advice(self.model, micros)}"
                ) from None
        # here the exception is gone, and with its traceback the tensors of the attempt
        self.pieces *= 2
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"memory was full with {-(-rows // (self.pieces // 2))} samples at once: going on with "
            f"{-(-rows // self.pieces)} at once, accumulated to the same step. train.per_device_train_batch_size="
            f"{-(-rows // self.pieces)} saves the attempt.",
            flush=True,
        )
        return None

    def _forward_and_backward(
        self, step: int, micros: Sequence[dict], targets: int, tokens: int
    ) -> tuple[float, float]:
        loss = balance_loss = 0.0
        for i, batch in enumerate(micros):
            micro = i * self.accelerator.num_processes + self.accelerator.process_index
            for piece, part in enumerate(split_batch(batch, self.pieces, self.pad_token_id)):
                if not count_targets(part):
                    continue
                seed_dropout(self.seed, step, micro, *([piece] if self.pieces > 1 else []))
                with self.autocast():
                    losses = self.model(**on_device(part, self.accelerator.device, self.encoder))
                # every answer token of the step weighs the same, whoever computes it
                share = losses.answers * (1.0 / targets)
                loss += losses.answers.detach().double() / targets
                if losses.balance is not None:
                    weight = count_tokens(part) / tokens
                    share = share + losses.balance * (self.balance_factor * weight)
                    balance_loss += losses.balance.detach().double() * weight
                self.accelerator.backward(share)
        return float(loss), float(balance_loss)


def total(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Each value's sum over all processes."""
    dtype = torch.float64 if accelerator.device.type != "mps" else torch.float32
    return accelerator.reduce(torch.tensor(values, dtype=dtype, device=accelerator.device), reduction="sum").tolist()


def count_targets(batch: dict) -> int:
    """How many answer tokens a batch has: a label at position 0 has no logits before it."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def seed_dropout(seed: int, *place: int) -> None:
    """Dropout's random numbers belong to the (step, micro-batch), whoever computes it and whenever: nothing to save, and the
    same on one process or four."""
    torch.manual_seed(int(np.random.SeedSequence((seed, *place)).generate_state(1)[0]))


def on_device(
    batch: dict, device: torch.device, encoder: Callable[[dict], Tensor | None] | None = None
) -> dict[str, Tensor | Sequence[int] | None]:
    """What the model takes, on its device; pictures as pixels, or as the features that `encoder` has of them."""
    names = ("input_ids", "attention_mask") if encoder else ("input_ids", "attention_mask", "pixel_values")
    inputs = {key: None if batch[key] is None else batch[key].to(device, non_blocking=True) for key in names}
    if encoder:
        inputs["patch_features"] = encoder(batch)
    num_tokens = None if batch["lengths"] is None else count_tokens(batch)
    return inputs | {"labels": batch["labels"], "lengths": batch["lengths"], "num_tokens": num_tokens}


def is_out_of_memory(error: Exception) -> bool:
    """Also where a plain RuntimeError says so: the CPU's allocator, CUDA and its libraries outside of torch's allocator."""
    said = ("out of memory", "can't allocate memory", "_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


@contextlib.contextmanager
def full_memory_named(advice: str) -> Iterator[None]:
    """Inside, a full memory is an InputError with `advice`, not a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"memory is full ({str(error).splitlines()[0][:200]}). {advice}") from None


def memory_advice(model: nn.Module, micros: Sequence[dict]) -> str:
    """What would help where one sample does not fit, with how much each takes (estimated from the shapes)."""
    length = max(max(batch["lengths"] or batch["input_ids"].shape[1:]) for batch in micros)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = length * kept_bytes(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (
        f"Of the longest sample ({length} tokens) the layers keep about {size_text(kept)}: "
        "train.activation_checkpointing=on takes nearly all of that away, a smaller data.max_length its share. "
        f"The {trained / 1e6:.0f} million trained weights take {size_text(16 * trained)} with gradients and Adam: "
        f"a smaller lora.r, or fewer parts that train. All weights take {size_text(weights)}: "
        "train.precision=bf16 halves what is frozen, a smaller language model more."
    )


def kept_bytes(model: nn.Module) -> int:
    """What the language model's layers keep of one token for their backward: about eight tensors of the hidden size and
    four of the feed-forward's in each; of experts those that a token passes, and for each of them its way there and back."""
    config, passed = model.causal_lm.config, 0
    feed_forward = config.intermediate_size
    if model.has_experts:
        passed = config.num_experts_per_tok
        feed_forward = passed * config.moe_intermediate_size + getattr(config, "shared_expert_intermediate_size", 0)
    width = next(model.causal_lm.model.layers.parameters()).element_size()
    return config.num_hidden_layers * ((8 + 3 * passed) * config.hidden_size + 4 * feed_forward) * width


def size_text(count: float) -> str:
    """A number of bytes as a person reads it."""
    return f"{count / 2**30:.1f} GB" if count >= 2**29 else f"{count / 2**20:.1f} MB"
