"""Floating-point operations of one training step, counted from shapes: what must be computed, whoever computes it.

For the usual recipe: a frozen CLIP encoder, a projector that trains, and a language model of which only LoRA trains. A
product of [m, k] and [k, n] is 2 m k n operations. Recomputation (activation checkpointing, a flash attention's scores in
its backward) and padding do not count, because they depend on the implementation; element-wise operations do not either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dataset.batch import Batch
from model.model import VisionLanguageModel


class Work(NamedTuple):
    """The size of a step."""

    lengths: Sequence[int]  # tokens of each document, its images' included; no document sees another
    images: int  # at least one
    targets: int  # supervised tokens
    cached: bool = False  # the images' features come from a cache

    @classmethod
    def of(cls, batch: Batch) -> Work:
        """Return the size of a batch without padding."""
        lengths = [len(sample.input_ids) for sample in batch.samples()]
        return cls(lengths, len(batch.is_cached), batch.num_targets, batch.pixel_values is None)


class Product(NamedTuple):
    """A matrix product of a linear layer [in_features] -> [out_features] for `rows` tokens, whose weight is [out, in].

    kind: "forward", x [rows, in] @ weight^T; "input", its gradient, g [rows, out] @ weight; "weight", g^T @ x.
    """

    part: str
    kind: str
    rows: int
    in_features: int
    out_features: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.in_features * self.out_features


def linear_products(model: VisionLanguageModel, work: Work) -> Counter[Product]:
    """Count how often a step computes each product of its linear layers and of the encoder's convolution."""
    tower, projector, decoder = model.vision_tower, model.projector, model.causal_lm.model
    patches, tokens = tower.num_image_tokens, sum(work.lengths)
    found: Counter[Product] = Counter()
    if not work.cached:
        found[Product("encoder", "forward", work.images * patches, 3 * tower.patch_size**2, tower.hidden_size)] += 1
        for layer in tower.model.encoder.layers:  # only those that are run; a class token comes before the patches
            for linear in _linears(layer).values():
                found[_product("encoder", "forward", work.images * (patches + 1), linear)] += 1
    for name, linear in _linears(projector).items():
        kinds = ("forward", "weight") if name == "linear_1" else ("forward", "weight", "input")
        found.update(_product("projector", kind, work.images * patches, linear) for kind in kinds)
    for name, linear in _linears(decoder.layers).items():  # LoRA's A and B are linear layers beside the frozen one
        kinds = ("forward", "weight", "input") if "lora_" in name else ("forward", "input")
        found.update(_product("LoRA" if "lora_" in name else "decoder", kind, tokens, linear) for kind in kinds)
    found.update(_product("head", kind, work.targets, model.causal_lm.lm_head) for kind in ("forward", "input"))
    return found


def attention_flops(model: VisionLanguageModel, work: Work, causal: bool = True) -> dict[str, int]:
    """Return part -> operations of the attention's two products, queries with keys and scores with values; the backward has
    four. causal: a token sees itself and those before it, so a document of L tokens has L (L + 1) / 2 pairs; else L^2, which
    kernels without a causal form compute."""
    tower, config = model.vision_tower, model.causal_lm.config
    run = len(list(tower.model.encoder.layers))
    encoder = 0 if work.cached else work.images * run * 2 * 2 * (tower.num_image_tokens + 1) ** 2 * tower.hidden_size
    pairs = sum(length * (length + 1) // 2 if causal else length**2 for length in work.lengths)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forward = config.num_hidden_layers * 2 * 2 * pairs * config.num_attention_heads * head_size
    return {"encoder": encoder, "decoder": 3 * forward}


def step_flops(model: VisionLanguageModel, work: Work) -> dict[str, int]:
    """Return part -> operations of a whole step; "attention" is a part of its own."""
    parts = dict.fromkeys(("encoder", "projector", "decoder", "LoRA", "head"), 0)
    for product, times in linear_products(model, work).items():
        parts[product.part] += times * product.flops
    return parts | {"attention": sum(attention_flops(model, work).values())}


def torch_counter() -> FlopCounterMode:
    """Return torch's counter of operations. It knows neither addmm in place by itself nor the CPU's attention kernel."""

    def addmm(added: tuple, left: tuple, right: tuple, **options: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm})


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _product(part: str, kind: str, rows: int, linear: nn.Linear) -> Product:
    return Product(part, kind, rows, *reversed(linear.weight.shape))
