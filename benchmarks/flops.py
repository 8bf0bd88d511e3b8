"""The matrix products of one training step, counted from the shapes: what the step has to compute, whoever computes it.

For the usual recipe: a CLIP encoder that is frozen, a projector that trains, a language model that is frozen but for its
LoRA. A product of [m, k] and [k, n] is 2 m k n floating-point operations. What is computed again (activation
checkpointing, a flash attention's scores in its backward) and what is computed for padding is not counted: that is how,
not what. Nor is anything that goes element by element.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model.model import VisionLanguageModel


class Product(NamedTuple):
    """A matrix product of a linear layer [in_features] -> [out_features] for `rows` tokens, whose weight is [out, in].

    kind: "forward": x [rows, in] @ weight^T; "input", the input's gradient: g [rows, out] @ weight; "weight", the
    weight's: g^T @ x.
    """

    part: str
    kind: str
    rows: int
    in_features: int
    out_features: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.in_features * self.out_features


def linear_products(
    model: VisionLanguageModel, tokens: int, images: int, targets: int, cached: bool = False
) -> Counter[Product]:
    """How often a step computes each product: `tokens` in all, those of `images` images (at least one) included, and
    `targets` supervised ones. cached: the images' features were kept from an earlier epoch."""
    tower, projector, decoder = model.vision_tower, model.projector, model.causal_lm.model
    patches = tower.num_image_tokens
    found = Counter()
    if not cached:
        found[Product("encoder", "forward", images * patches, 3 * tower.patch_size**2, tower.hidden_size)] += 1
        for layer in tower.model.encoder.layers:  # those that are run; a class token stands before the patches
            for linear in _linears(layer).values():
                found[_product("encoder", "forward", images * (patches + 1), linear)] += 1
    for name, linear in _linears(projector).items():
        kinds = ("forward", "weight") if name == "linear_1" else ("forward", "weight", "input")
        found.update(_product("projector", kind, images * patches, linear) for kind in kinds)
    for name, linear in _linears(decoder.layers).items():  # LoRA's A and B are linear layers beside the frozen one
        kinds = ("forward", "weight", "input") if "lora_" in name else ("forward", "input")
        found.update(_product("LoRA" if "lora_" in name else "decoder", kind, tokens, linear) for kind in kinds)
    found.update(_product("head", kind, targets, model.causal_lm.lm_head) for kind in ("forward", "input"))
    return found


def attention_flops(
    model: VisionLanguageModel, lengths: Sequence[int], images: int, cached: bool = False, causal: bool = True
) -> dict[str, int]:
    """Part -> operations of the attention's two products, queries with keys and scores with values. lengths: of the
    documents, none of which sees another. causal: a token sees those before it and itself, so a document of L tokens has
    L (L + 1) / 2 pairs; else L^2, which kernels without a causal form compute. The backward has four such products."""
    tower, config = model.vision_tower, model.causal_lm.config
    run = len(list(tower.model.encoder.layers))
    encoder = 0 if cached else images * run * 2 * 2 * (tower.num_image_tokens + 1) ** 2 * tower.hidden_size
    pairs = sum(length * (length + 1) // 2 if causal else length**2 for length in lengths)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    forward = config.num_hidden_layers * 2 * 2 * pairs * config.num_attention_heads * head_size
    return {"encoder": encoder, "decoder": 3 * forward}


def step_flops(
    model: VisionLanguageModel, lengths: Sequence[int], images: int, targets: int, cached: bool = False
) -> dict[str, int]:
    """Part -> operations of a whole step on documents of `lengths` tokens; "attention" is a part of its own."""
    parts = dict.fromkeys(("encoder", "projector", "decoder", "LoRA", "head"), 0)
    for product, times in linear_products(model, sum(lengths), images, targets, cached).items():
        parts[product.part] += times * product.flops
    return parts | {"attention": sum(attention_flops(model, lengths, images, cached).values())}


def torchs_counter() -> FlopCounterMode:
    """What torch counts while it computes: a check. It does not know addmm in place by itself, nor the CPU's attention."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})


def _addmm_flops(added: tuple, left: tuple, right: tuple, out_shape=None, **options) -> int:
    return 2 * left[0] * left[1] * right[1]


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def _product(part: str, kind: str, rows: int, linear: nn.Linear) -> Product:
    return Product(part, kind, rows, *reversed(linear.weight.shape))
