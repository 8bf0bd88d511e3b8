"""Running out of memory: notice it, explain it, and estimate what a batch needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from config import InputError
from dataset.batch import Batch
from model.model import VisionLanguageModel


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` reports a full memory. The CPU's allocator, and CUDA libraries outside of torch's
    allocator, report it as a plain RuntimeError."""
    phrases = ("out of memory", "can't allocate memory", "_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in phrases)


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into an InputError with `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory ({str(error).splitlines()[0][:200]}). {advice}") from None


def memory_advice(model: VisionLanguageModel, micro_batches: Sequence[Batch]) -> str:
    """Advise what to change when a single sample does not fit, with estimates from the shapes."""
    length = max(batch.max_sample_length for batch in micro_batches)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    activations = length * activation_bytes_per_token(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (
        f"The layers keep about {size_text(activations)} for the longest sample ({length} tokens): "
        "train.activation_checkpointing=on saves nearly all of it, a smaller data.max_length its share. "
        f"The {trained / 1e6:.0f} million trained weights take {size_text(16 * trained)} with gradients and Adam: "
        f"use a smaller lora.r, or train fewer parts. All weights take {size_text(weights)}: "
        "train.precision=bf16 halves the frozen ones; a smaller language model saves more."
    )


def activation_bytes_per_token(model: VisionLanguageModel) -> int:
    """Estimate what the language model's layers keep of one token for the backward pass.

    Each layer keeps about eight tensors of the hidden size and four of the feed-forward size. With experts, a token's
    feed-forward is that of the experts that it passes, and each of those adds three tensors of the hidden size for routing.
    """
    config, passed = model.causal_lm.config, 0
    feed_forward = config.intermediate_size
    if model.has_experts:
        passed = config.num_experts_per_tok
        feed_forward = passed * config.moe_intermediate_size + getattr(config, "shared_expert_intermediate_size", 0)
    item_bytes = next(model.causal_lm.model.layers.parameters()).element_size()
    return config.num_hidden_layers * ((8 + 3 * passed) * config.hidden_size + 4 * feed_forward) * item_bytes


def size_text(count: float) -> str:
    """Format a number of bytes for a person."""
    return f"{count / 2**30:.1f} GB" if count >= 2**29 else f"{count / 2**20:.1f} MB"
