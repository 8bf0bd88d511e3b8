"""The GPU memory that training a model from scratch takes: `python -m benchmarks.memory [--config FILE]`.

Counts bytes, item by item, without allocating any: weights on the meta device, and what the layers keep for their backward
from a forward of the real code over tensors that have a shape and no memory. On a machine with a GPU, `--measure` then takes
real steps of the same shapes under a hard cap and reports what the allocator counted. `--tiny` does the same with small
shapes, also without a GPU.

By default: recipes/from-scratch.yaml behind a DINOv2-base, a batch of 4 texts of 768 tokens with an image each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model
from transformers.integrations.moe import ExpertsInterface

import qwen
from benchmarks.measuring import ROOT, machine, table
from benchmarks.models import IMAGE_TOKEN_ID, PAD_TOKEN_ID, join_parts, random_sample
from benchmarks.ours import make_stepper, take_step
from config import InputError, load_config, run_script, schema
from dataset.batch import collate
from model.build import checkpoint_activations
from model.loss import CHUNK_BYTES
from model.model import VisionLanguageModel
from model.projector import NUM_QUERIES, build_projector
from model.trainable import set_trainable

# Private names of torch and transformers used here: untyped_storage()._cdata, which identifies a tensor's memory;
# torch._subclasses.fake_tensor; config._experts_implementation

RECIPE = ROOT / "recipes" / "from-scratch.yaml"
GIB = 2**30
HALF = torch.bfloat16
FULL = schema.Trainable("full")
TRAIN = schema.TrainConfig(
    trainable=schema.TrainableConfig(projector=FULL, language_model=FULL, embeddings=FULL),
    projector_lr=1e-4, language_model_lr=1e-4, embeddings_lr=1e-4, weight_decay=0.1,
)  # fmt: skip
STEPS = 5
MICRO_BATCHES = 2  # the second one adds to the gradients of the first
DINOV2_BASE = {"image_size": 518}  # the other sizes are transformers' defaults
TINY_ENCODER = {"image_size": 28, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_SIZES = ("vocab_size=320", "hidden_size=64", "num_hidden_layers=2")
TINY = ["model.num_queries=4", *(f"model.from_scratch.{size}" for size in TINY_SIZES)]


class Shapes(NamedTuple):
    """Shapes of a model and of what it trains on. encoder: arguments of transformers' Dinov2Config."""

    encoder: dict
    image_size: int
    image_tokens: int  # of the resampler
    model: schema.ModelConfig
    new: schema.ScratchConfig  # the language model
    vocabulary: int
    batch: int
    length: int  # tokens of a text


def shapes_of(config: schema.Config, batch: int, length: int) -> Shapes:
    """Return the shapes of a config's model behind DINOv2-base. InputError: its language model is a released one, the
    size of the vocabulary is not known, or the projector is not a resampler."""
    model, new = config.model, config.model.from_scratch
    if new is None or model.projector != "resampler":
        raise InputError("the config has no model.from_scratch with a resampler, which is what is counted here.")
    if new.vocab_size is None:
        raise InputError('"model.from_scratch.vocab_size" is null, so the size of the vocabulary is not known; set it.')
    return Shapes(DINOV2_BASE, 224, model.num_queries or NUM_QUERIES, model, new, new.vocab_size, batch, length)


def tiny_shapes() -> Shapes:
    return shapes_of(load_config(RECIPE, TINY), 2, 48)._replace(encoder=TINY_ENCODER, image_size=28)


def new_language_model(shapes: Shapes) -> Any:
    language_model: Any = qwen.new_language_model(shapes.new, vocab_size=shapes.vocabulary, seed=0)
    language_model.config.image_token_id = IMAGE_TOKEN_ID
    language_model.generation_config.pad_token_id = PAD_TOKEN_ID
    qwen.set_image_attention(language_model, shapes.model.attention)
    return language_model.train()


def new_model(shapes: Shapes, device: torch.device | str) -> VisionLanguageModel:
    """Make the whole model with random weights on `device` ("meta": without any), as training has it: the encoder in half
    precision, what trains in float32."""
    with torch.device(device):
        encoder = Dinov2Model(Dinov2Config(**shapes.encoder)).bfloat16()
        widths = (encoder.config.hidden_size, shapes.model.projector_hidden_size, shapes.new.hidden_size)
        projector = build_projector("resampler", *widths, num_queries=shapes.image_tokens)
        language_model = new_language_model(shapes)
    model = join_parts(encoder, projector, language_model, feature_layer=-1, image_size=shapes.image_size)
    set_trainable(model, TRAIN.trainable)
    return model.train()


def weight_items(model: VisionLanguageModel) -> dict[str, int]:
    """Return part -> bytes of its weights, as they are held."""
    kinds = {
        "encoder (frozen, bf16)": list(model.vision_tower.parameters()),
        "projector": list(model.projector.parameters()),
        "embeddings, tied to the head": [model.causal_lm.get_input_embeddings().weight],
    }
    named = {name: p for name, p in model.causal_lm.named_parameters() if "embed_tokens" not in name}
    words = {"attention": "self_attn", "routed experts": "mlp.experts", "shared expert": "shared_expert"}
    for title, word in words.items():
        kinds[title] = [named.pop(name) for name in list(named) if word in name]
    kinds["routers, norms"] = list(named.values())
    found = {title: sum(p.nbytes for p in parameters) for title, parameters in kinds.items()}
    assert sum(found.values()) == sum(p.nbytes for p in model.parameters()), "a weight is in no item or in two"
    return found


def _evenly(self: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Compute a mixture of experts as transformers does ("eager"), as if each expert got equally many tokens. The memory
    kept for the backward does not depend on the router: each token passes the same number of experts."""
    out = torch.zeros_like(states)
    tokens, passed = index.shape
    share = tokens * passed // self.num_experts
    for expert in range(self.num_experts):
        rows = torch.arange(share, device=states.device) % tokens
        place = torch.zeros_like(rows)
        gate, up = F.linear(states[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
        hidden = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[rows, place, None]
        out.index_add_(0, rows, hidden.to(out.dtype))
    return out


ExpertsInterface.register("evenly", _evenly)


def kept_for_backward(shapes: Shapes, checkpointing: bool) -> tuple[int, int]:
    """Return the bytes of (what the language model's layers keep for their backward, the half-precision copies of its
    weights), of a forward in autocast over a packed batch."""
    # tensors without memory have no values: image tokens are not compared with features
    with FakeTensorMode(), mock.patch("qwen.injection.check_image_tokens", lambda *_: None):
        lm = new_language_model(shapes)
        lm.config._experts_implementation = "evenly"
        if checkpointing:
            checkpoint_activations(VisionLanguageModel(nn.Identity(), nn.Identity(), lm))
        ids = torch.zeros(1, shapes.batch * shapes.length, dtype=torch.long)
        features = torch.zeros(shapes.batch, shapes.image_tokens, shapes.new.hidden_size)
        return saved_bytes(lm, ids, [shapes.length] * shapes.batch, features)


def saved_bytes(lm: Any, ids: Tensor, lengths: Sequence[int], features: Tensor) -> tuple[int, int]:
    """Return what one forward of the base model in autocast keeps, each storage once: (activations, casts of weights), in
    bytes. Autocast casts every matrix of the layers once, and the backward needs it."""
    weights = {p.untyped_storage()._cdata for p in lm.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    routes = {"output_router_logits": True} if "moe" in lm.config.model_type else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", HALF):
        lm.model(input_ids=ids, lengths=list(lengths), image_features=features, use_cache=False, **routes)
    is_checkpointed = any(layer.gradient_checkpointing for layer in lm.model.layers)
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    casts = sum(HALF.itemsize * p.numel() for p in lm.model.layers.parameters() if p.ndim >= 2)
    return (total, 0) if is_checkpointed else (total - casts, casts)


def count_bytes(shapes: Shapes) -> tuple[dict[str, int], dict[str, int]]:
    """Return (item -> bytes of everything, the moments that take most -> bytes)."""
    weights = weight_items(new_model(shapes, "meta"))
    trained = sum(size for title, size in weights.items() if "frozen" not in title)
    tokens, width = shapes.batch * shapes.length, shapes.new.hidden_size
    kept, casts = kept_for_backward(shapes, checkpointing=False)
    kept_less, _ = kept_for_backward(shapes, checkpointing=True)
    # a chunk of logits and its softmax, the head's matrix in half precision and its gradient, the gradient of the hidden
    # states and its copy in half precision
    head = 2 * CHUNK_BYTES + (HALF.itemsize + 4) * (shapes.vocabulary + tokens) * width
    items = {f"weights: {title}": size for title, size in weights.items()} | {
        "gradients": trained,
        "AdamW: mean and mean square": 2 * trained,
        "AdamW's own step: one more of each weight": trained,
        "half-precision copies of the weights": casts,
        f"kept by the layers, {shapes.batch} x {shapes.length} tokens": kept,
        "  the same with activation checkpointing": kept_less,
        "head and cross entropy, a chunk at a time": head,
    }
    # weights, AdamW's state, and, from a step's second micro-batch on, the gradients to which it adds
    base, layers = sum(weights.values()) + 3 * trained, shapes.new.num_hidden_layers
    moments = {
        "between forward and backward": base + casts + kept + head,
        "the same with activation checkpointing": base + kept_less + head + (casts + kept - kept_less) // layers,
        "in the optimizer's step": base + trained,
    }
    return items, moments


def measure(shapes: Shapes, device: torch.device, cap: float, checkpointing: bool) -> str:
    """Take STEPS real optimizer steps of MICRO_BATCHES micro-batches each, on random images and texts, on a GPU under a cap
    of `cap` GiB. Returns a sentence about them."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    model = new_model(shapes, device).to(device)
    if checkpointing:
        checkpoint_activations(model)
    stepper = make_stepper(model, TRAIN, "bf16", device, balance_factor=0.01)
    chance, text, count = np.random.default_rng(0), shapes.length - shapes.image_tokens, MICRO_BATCHES * shapes.batch
    for step in range(STEPS):
        samples = [random_sample(shapes, chance, text // 4, text - text // 4) for _ in range(count)]
        outcome = take_step(stepper, step, [*collate(samples, PAD_TOKEN_ID, packed=True).split(MICRO_BATCHES)])
    how = f"{'with' if checkpointing else 'without'} activation checkpointing"
    steps = f"{STEPS} steps of {MICRO_BATCHES} x {shapes.batch} x {shapes.length} tokens {how}, loss {outcome.loss:.3f}"
    if device.type != "cuda":
        return f"{steps}; on {device.type}, where nothing caps the memory"
    peak, held = (read(device) / GIB for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    return f"{steps}, under a cap of {cap:g} GiB: {peak:.2f} GiB allocated at most, {held:.2f} GiB held"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count, and measure, the memory of training a model from scratch.")
    parser.add_argument("--config", type=Path, default=RECIPE)
    parser.add_argument("--batch", type=int, default=4, help="texts at once")
    parser.add_argument("--length", type=int, default=768, help="tokens of each, its image's among them")
    parser.add_argument("--measure", action="store_true", help="take real steps as well, on a GPU under the cap")
    parser.add_argument("--cap", type=float, default=8.0, help="GiB that the process may take of the GPU")
    parser.add_argument("--checkpointing", action="store_true", help="measure with activation checkpointing")
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU")
    arguments = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    if arguments.checkpointing and not arguments.measure:
        raise InputError("--checkpointing is an option of --measure; the count shows both.")
    if arguments.measure and not has_gpu and not arguments.tiny:
        raise InputError("--measure needs a GPU, or --tiny for the same code on a CPU.")
    texts = (arguments.batch, arguments.length)
    shapes = tiny_shapes() if arguments.tiny else shapes_of(load_config(arguments.config), *texts)
    items, moments = count_bytes(shapes)
    rows = [[title, f"{size / 2**20:,.1f}"] for title, size in items.items()]
    rows += [[f"**{title}**", f"**{size / 2**20:,.1f}**"] for title, size in moments.items()]
    print(f"{machine()}\n\n{table(['what', 'MiB'], rows)}")
    if arguments.measure:
        device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
        print("\n" + measure(shapes, device, arguments.cap, arguments.checkpointing))
    return 0


if __name__ == "__main__":
    run_script(main)
