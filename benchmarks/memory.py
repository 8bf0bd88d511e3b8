"""What training a model from scratch takes of a card's memory: `python -m benchmarks.memory [--config FILE]`.

Counts bytes, item by item, without allocating any: weights on the meta device, and what the layers keep for their backward
from a forward of the real code over tensors that have a shape and no memory. On a machine with a GPU, `--measure` then takes
real steps of the same shapes under a hard cap and says what the allocator counted. `--tiny` does the same with small shapes,
also without a GPU.

By default: recipes/from-scratch.yaml behind a DINOv2-base, a batch of 4 texts of 768 tokens with a picture each.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Dinov2Config, Dinov2Model
from transformers.integrations.moe import ExpertsInterface

import qwen
from benchmarks.random_model import random_sample
from benchmarks.training import machine
from config import Config, InputError, load_config, run_script
from dataset.batch import collate
from model.build import autocast, checkpoint_activations
from model.loss import CHUNK_BYTES
from model.model import VisionLanguageModel
from model.projector import NUM_QUERIES, build_projector
from model.trainable import param_groups, set_trainable
from training.step import Stepper
from visual.encoders import ENCODERS, VisionTower

ROOT = Path(__file__).parent.parent
GIB = 2**30
HALF = torch.bfloat16
IMAGE_TOKEN_ID, PAD_TOKEN_ID = 1, 0
WORDS = {"vision_tower": "frozen", "projector": "full", "language_model": "full", "embeddings": "full"}
RATES = {"projector_lr": 1e-4, "language_model_lr": 1e-4, "embeddings_lr": 1e-4}
DINOV2_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 518,
    "patch_size": 14,
}
STEPS = 5
MICROS = 2  # the second finds the gradients of the first


@dataclass(frozen=True)
class Shapes:
    """Of a model and what it trains on. encoder: what transformers' Dinov2Config takes; sizes: what
    `qwen.new_language_model` takes; queries: of the resampler."""

    encoder: dict
    image_size: int
    queries: int
    attention: str
    vocabulary: int
    sizes: dict
    batch: int
    length: int
    projector_hidden_size: int | None = None


def shapes_of(config: Config, batch: int, length: int) -> Shapes:
    """A config's, with DINOv2-base for its encoder. InputError for a config whose language model is a released one, or whose
    projector is no resampler."""
    new = config.model.from_scratch
    if new is None or config.model.projector != "resampler":
        raise InputError("the config has no model.from_scratch with a resampler, which is what is counted here.")
    sizes = {key: value for key, value in dataclasses.asdict(new).items() if key not in ("tokenizer", "vocab_size")}
    if new.vocab_size is None:
        raise InputError('"model.from_scratch.vocab_size" is null, so the size of the vocabulary is not known; set it.')
    queries = config.model.num_queries or NUM_QUERIES
    texts = new.vocab_size, sizes, batch, length
    return Shapes(DINOV2_BASE, 224, queries, config.model.attention, *texts, config.model.projector_hidden_size)


TINY_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TINY_SIZES = {
    "architecture": "qwen2_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
}  # fmt: skip
TINY = Shapes(TINY_ENCODER, 28, 4, "mixed", 320, TINY_SIZES, 2, 48)


def new_model(shapes: Shapes, device: torch.device | str) -> VisionLanguageModel:
    """The whole model with random weights on `device` ("meta": without any), as training has it: the encoder in half
    precision, what trains in float32."""
    with torch.device(device):
        encoder = Dinov2Model(Dinov2Config(**shapes.encoder)).to(HALF)
        width = shapes.sizes["hidden_size"]
        projector = build_projector(
            "resampler", encoder.config.hidden_size, shapes.projector_hidden_size, width, shapes.queries
        )
        language_model = qwen.new_language_model(shapes.vocabulary, 0, **shapes.sizes)
    language_model.config.image_token_id = IMAGE_TOKEN_ID
    language_model.generation_config.pad_token_id = PAD_TOKEN_ID
    qwen.set_image_attention(language_model, shapes.attention)
    tower = VisionTower(encoder, ENCODERS["dinov2"], -1, shapes.image_size)
    model = VisionLanguageModel(tower, projector, language_model)
    set_trainable(model, WORDS)
    return model.train()


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def weight_items(model: VisionLanguageModel) -> dict[str, int]:
    """Part -> bytes of its weights, as they are held."""
    kinds = {
        "encoder (frozen, bf16)": list(model.vision_tower.parameters()),
        "projector": list(model.projector.parameters()),
        "embeddings, tied to the head": [model.causal_lm.get_input_embeddings().weight],
    }
    named = {name: p for name, p in model.causal_lm.named_parameters() if "embed_tokens" not in name}
    for title, word in (
        ("attention", "self_attn"),
        ("routed experts", "mlp.experts"),
        ("shared expert", "shared_expert"),
    ):
        kinds[title] = [named.pop(name) for name in list(named) if word in name]
    kinds["routers, norms"] = list(named.values())
    found = {title: sum(p.numel() * p.element_size() for p in parameters) for title, parameters in kinds.items()}
    whole = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    assert sum(found.values()) == sum(whole.values()), "a weight is in no item or in two"
    return found


def _evenly(self: nn.Module, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """A mixture of experts as transformers computes it ("eager"), had the router sent every expert as many tokens. What is
    kept for the backward is as much however they are sent: every token passes as many experts."""
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


@contextlib.contextmanager
def _no_look_at_values() -> Iterator[None]:
    """Inside, image tokens are not compared with features: tensors without memory have no values."""
    with mock.patch("qwen.injection.check_image_tokens", lambda *_: None):
        yield


def kept_for_backward(shapes: Shapes, checkpointing: bool) -> tuple[int, int]:
    """(bytes of what the language model's layers keep for their backward, of the half-precision copies of its weights), of a
    forward in autocast over a packed batch."""
    with FakeTensorMode(), _no_look_at_values():
        lm = qwen.new_language_model(shapes.vocabulary, 0, **shapes.sizes).train()
        lm.config.image_token_id = IMAGE_TOKEN_ID
        lm.config._experts_implementation = "evenly"
        qwen.set_image_attention(lm, shapes.attention)
        if checkpointing:
            checkpoint_activations(SimpleNamespace(causal_lm=lm))
        ids = torch.zeros(1, shapes.batch * shapes.length, dtype=torch.long)
        features = torch.zeros(shapes.batch, shapes.queries, shapes.sizes["hidden_size"])
        return saved_bytes(lm, ids, [shapes.length] * shapes.batch, features)


def saved_bytes(lm: nn.Module, ids: Tensor, lengths: Sequence[int], features: Tensor) -> tuple[int, int]:
    """What one forward of the base model in autocast keeps, each storage once: (activations, casts of weights), in bytes.
    Autocast casts every matrix of the layers once, and the backward needs it."""
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
    casts = (
        0 if is_checkpointed else sum(HALF.itemsize * p.numel() for p in lm.model.layers.parameters() if p.ndim >= 2)
    )
    return total - casts, casts


def table(shapes: Shapes) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """((item, bytes) of everything, the two moments that take most -> bytes)."""
    weights = weight_items(new_model(shapes, "meta"))
    trained = sum(size for title, size in weights.items() if "frozen" not in title)
    tokens, width = shapes.batch * shapes.length, shapes.sizes["hidden_size"]
    kept, casts = kept_for_backward(shapes, checkpointing=False)
    kept_less, _ = kept_for_backward(shapes, checkpointing=True)
    # a chunk of logits and its softmax, the head's matrix in half precision, the gradients of that matrix and of the hidden
    # states, both once more where they are multiplied by the loss's factor
    head = 2 * CHUNK_BYTES + (HALF.itemsize + 8) * shapes.vocabulary * width + 8 * tokens * width
    rows = [(f"weights: {title}", size) for title, size in weights.items()]
    rows += [
        ("gradients", trained),
        ("AdamW: mean and mean square", 2 * trained),
        ("AdamW's own step: one more of each weight", trained),
        ("half-precision copies of the weights", casts),
        (f"kept by the layers, {shapes.batch} x {shapes.length} tokens", kept),
        ("  the same with activation checkpointing", kept_less),
        ("head and cross entropy, a chunk at a time", head),
    ]
    # weights, AdamW's state, and, from a step's second micro-batch on, the gradients that are added to
    base, layers = sum(weights.values()) + 3 * trained, shapes.sizes["num_hidden_layers"]
    moments = {
        "between forward and backward": base + casts + kept + head,
        "the same with activation checkpointing": base + kept_less + head + (casts + kept - kept_less) // layers,
        "in the optimizer's step": base + trained,
    }
    return rows, moments


def as_markdown(rows: list[tuple[str, int]], moments: dict[str, int]) -> str:
    lines = ["| what | MiB |", "|---|---|"]
    lines += [f"| {title} | {size / 2**20:,.1f} |" for title, size in rows]
    lines += [f"| **{title}** | **{size / 2**20:,.1f}** |" for title, size in moments.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(shapes: Shapes, device: torch.device, cap: float, checkpointing: bool) -> str:
    """Take STEPS optimizer steps of the real training step, of MICROS micro-batches each, on random pictures and texts, on a
    GPU under a cap of `cap` GiB. Returns what happened in a sentence."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    model = new_model(shapes, device).to(device)
    if checkpointing:
        checkpoint_activations(model)
    groups = param_groups(model, WORDS, RATES, 0.1)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(groups, lr=0.0))
    stepper = Stepper(model, optimizer, accelerator, autocast("bf16", device), 0, 1.0, PAD_TOKEN_ID, None, 0.01)
    chance = np.random.default_rng(0)
    like = SimpleNamespace(
        image_tokens=shapes.queries, image_size=shapes.image_size, vocabulary=shapes.vocabulary
    )  # what random_sample reads of its sizes
    text = shapes.length - shapes.queries
    losses = []
    for step in range(STEPS):
        micros = []
        for _ in range(MICROS):
            samples = [random_sample(like, chance, text // 4, text - text // 4) for _ in range(shapes.batch)]
            micros.append(collate(samples, PAD_TOKEN_ID, packed=True))
        outcome, _ = stepper(step, micros, [1e-4] * len(groups), False)
        losses.append(outcome.loss)
    how = "with" if checkpointing else "without"
    said = (
        f"{STEPS} steps of {MICROS} x {shapes.batch} x {shapes.length} tokens {how} activation checkpointing, loss "
        f"{losses[-1]:.3f}"
    )
    if device.type != "cuda":
        return f"{said}; on {device.type}, where nothing caps the memory"
    peak, held = (read(device) / GIB for read in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    return f"{said}, under a cap of {cap:g} GiB: {peak:.2f} GiB allocated at most, {held:.2f} GiB held by the allocator"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Count, and measure, the memory of training a model from scratch.")
    parser.add_argument("--config", default=ROOT / "recipes" / "from-scratch.yaml")
    parser.add_argument("--batch", type=int, default=4, help="texts at once")
    parser.add_argument("--length", type=int, default=768, help="tokens of each, its picture's among them")
    parser.add_argument("--measure", action="store_true", help="take real steps as well, on a GPU under the cap")
    parser.add_argument("--cap", type=float, default=8.0, help="GiB that the process may take of the GPU")
    parser.add_argument("--checkpointing", action="store_true", help="measure with activation checkpointing")
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU")
    arguments = parser.parse_args(argv)
    shapes = TINY if arguments.tiny else shapes_of(load_config(arguments.config), arguments.batch, arguments.length)
    has_gpu = torch.cuda.is_available()
    if arguments.checkpointing and not arguments.measure:
        raise InputError("--checkpointing says how to --measure; the count shows both.")
    if arguments.measure and not has_gpu and not arguments.tiny:
        raise InputError("--measure needs a GPU, or --tiny for the same code on a CPU.")
    print(f"{datetime.date.today()}, torch {torch.__version__}, {machine()}\n")
    print(as_markdown(*table(shapes)))
    if arguments.measure:
        device = torch.device("cuda", 0) if has_gpu else torch.device("cpu")
        print("\n" + measure(shapes, device, arguments.cap, arguments.checkpointing))
    return 0


if __name__ == "__main__":
    run_script(main)
