"""Speed-ups of a run: each is chosen by `auto` or by its config key, applied to the model, and printed before
the first step.

None of them changes what is learned, except for rounding: each is tested against the plain way.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import is_flash_attn_2_available

from config import Config, InputError
from dataset.loader import QADataset
from model.build import PRECISIONS, Built, autocast, checkpoint_activations
from model.elementwise import compile_elementwise, use_liger
from model.fused_lora import fuse_lora, fused_layers
from qwen.attention import PACKED_SDPA
from training.cached_features import CachedEncoder
from training.calibrate import VIEWS
from training.memory import activation_bytes_per_token, size_text
from training.processes import on_main, print_main
from training.run import Run
from visual.feature_cache import FeatureCache, cache_folder, expected_bytes

DISK_SHARE = 0.5  # of the free disk space, that a cache chosen by `auto` may take
COMPILED_WIDTH, COMPILED_STEPS = 256, 100  # smaller models and shorter runs do not pay for compilation (some 20 s)
MEMORY_SHARE = 0.8  # of the memory left beside the weights; a larger batch is computed with activation checkpointing


@dataclass(frozen=True)
class Choice:
    """One speed-up: whether it is used, and why."""

    name: str  # the key, without "train."
    value: str
    why: str

    @property
    def is_on(self) -> bool:
        return self.value == "on"


def choices_table(choices: Sequence[Choice]) -> str:
    """Return the table printed before training."""
    width = max(len(choice.name) for choice in choices)
    values = max(len(choice.value) for choice in choices)
    return "\n".join(f"{c.name:<{width}}  {c.value:<{values}}  {c.why}".rstrip() for c in choices)


def apply_speed_choices(run: Run, flash: Choice) -> list[Choice]:
    """Choose the speed-ups of a run, apply them to it, and return them. flash: the attention that the model was loaded
    with."""
    config, device, model = run.config, run.accelerator.device, run.model
    packs, fuses = packing(config), fused_lora(config, run.built)
    kernels = liger_kernels(config, run.built, device)
    compiles = elementwise_compiler(config, run.built, device, total_steps=run.total_steps, has_liger=kernels.is_on)
    if fuses.is_on:
        fuses = fuse(fuses, run)
    if kernels.is_on:
        use_liger(model.causal_lm)
    if compiles.is_on:
        folder = config.output_dir / "compiled"
        if not compile_elementwise(model.language_model, device.type, folder, report=print_main):
            compiles = Choice(compiles.name, "off", "no compiler found")
    checkpointing = activation_checkpointing(
        config, run.built, run.train_set, device=device, batch_size=run.micro_batch_shape[0]
    )
    if checkpointing.is_on:
        checkpoint_activations(model)
    caches, cache = feature_cache(run)
    if cache is not None:
        run.encoder = CachedEncoder(model, cache, device, autocast=autocast(run.precision, device))
        for dataset in run.datasets:
            dataset.find_features = cache.find
    run.is_packed = packs.is_on
    return [packs, caches, fuses, compiles, checkpointing, flash, kernels]


# ---------------------------------------------------------------------------------------------------------------------
# Decided by the config and the device alone


def attention(config: Config, device: torch.device, precision: str) -> Choice:
    """Choose the attention of the language model."""
    name, word = "attn_implementation", config.train.attn_implementation
    fits = device.type == "cuda" and precision != "fp32"
    if word == "flash_attention_2" and not fits:
        raise InputError(
            '"train.attn_implementation" is flash_attention_2, which needs a GPU and bf16 or fp16; here it is '
            f"{precision} on {device.type}. Use auto."
        )
    if word != "auto":
        return Choice(name, word, "as configured")
    if fits and config.model.attention == "causal" and is_flash_attn_2_available():
        return Choice(name, "flash_attention_2", "flash-attn is installed")
    return Choice(name, "sdpa", "torch's own")


def attention_name(choice: Choice) -> str:
    """Return the attention's name in transformers."""
    return PACKED_SDPA if choice.value == "sdpa" else choice.value


def packing(config: Config) -> Choice:
    """Choose whether the samples of a batch share one row, without padding."""
    word, eager = config.train.packing, config.train.attn_implementation == "eager"
    if eager and word == "on":
        raise InputError(
            '"train.packing" is on, but eager attention cannot separate the samples of a row; set packing to off, or '
            '"train.attn_implementation" to auto.'
        )
    if eager:
        return Choice("packing", "off", "eager attention cannot separate the samples of a row")
    return _as_configured("packing", word) or Choice("packing", "on", "no padding for any lengths")


def _as_configured(name: str, word: str) -> Choice | None:
    return None if word == "auto" else Choice(name, str(word), "as configured")


def fused_lora(config: Config, built: Built) -> Choice:
    """Choose whether a linear layer and its LoRA are one function."""
    name, word = "fused_lora", config.train.fused_lora
    if not built.model.has_lora:
        if word == "on":
            raise InputError('"train.fused_lora" is on, but the language model has no LoRA; set it to auto.')
        return Choice(name, "off", "the model has no LoRA")
    return _as_configured(name, word) or Choice(name, "on", "replaces PEFT's separate casts and additions")


def fuse(choice: Choice, run: Run) -> Choice:
    """Fuse the language model's LoRA. Returns the choice as it is carried out: off if no layer can be fused."""
    count = fuse_lora(run.model.language_model)
    with autocast(run.precision, run.accelerator.device)():
        fused = fused_layers(run.model.language_model, PRECISIONS[run.precision])
    if fused == count:
        return choice
    why = f"{fused} of {count} linear layers; the others are not plain layers in {run.precision}"
    return Choice(choice.name, "on" if fused else "off", why)


def liger_kernels(config: Config, built: Built, device: torch.device) -> Choice:
    """Choose whether norms, rotary embedding and activation are Liger's kernels."""
    name, word = "liger_kernels", config.train.liger_kernels
    if built.model.has_experts:
        if word == "on":
            raise InputError(
                '"train.liger_kernels" is on, but Liger replaces the kernels of dense language models only; set it to auto.'
            )
        return Choice(name, "off", "a mixture of experts keeps transformers' own")
    is_usable = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if word == "on" and not is_usable:
        raise InputError(
            '"train.liger_kernels" is on, which needs a GPU and the package liger-kernel; set it to auto, or run: '
            f"{sys.executable} -m pip install liger-kernel"
        )
    return _as_configured(name, word) or Choice(name, *(("on", "installed") if is_usable else ("off", "not installed")))


def elementwise_compiler(
    config: Config, built: Built, device: torch.device, *, total_steps: int, has_liger: bool
) -> Choice:
    """Choose whether torch.compile makes the element-wise parts."""
    name = "compile"
    configured = _as_configured(name, config.train.compile)
    if configured:
        return configured
    width = built.model.causal_lm.config.hidden_size
    if has_liger:
        return Choice(name, "off", "Liger's kernels replace it")
    if built.model.causal_lm.model.norm.weight.requires_grad and not built.model.has_lora:
        return Choice(name, "off", "the norms train, and keep transformers' implementation")
    if width < COMPILED_WIDTH or total_steps < COMPILED_STEPS:
        return Choice(name, "off", f"{total_steps:,} steps at width {width:,} are too few to pay for compilation")
    return Choice(name, "on", "norms and activations, at the first step")


# ---------------------------------------------------------------------------------------------------------------------
# Decided by the data and the model


def feature_cache(run: Run) -> tuple[Choice, FeatureCache | None]:
    """Choose the cache of the frozen encoder's features, beside the QA file. Returns None for no cache."""
    config, tower, dtype = run.config, run.built.model.vision_tower, PRECISIONS[run.precision]
    name, word = "cache_features", config.train.cache_features
    sharded = config.train.fsdp and run.accelerator.num_processes > 1
    why = (
        "the encoder trains, so its features change"
        if tower.trains
        else "train.fsdp divides the encoder among processes"
    )
    if tower.trains or sharded:
        if word == "on":
            raise InputError(f'"train.cache_features" is on, but {why}; set it to auto.')
        return Choice(name, "off", why), None
    if word == "off":
        return Choice(name, "off", "as configured"), None
    views = 0 if config.data.augment is None else config.data.augment.views
    if views is None:  # config.rules refuses `on`
        return Choice(name, "off", "data.augment makes new images in each epoch; data.augment.views limits them"), None
    beside = config.data.qa_file.parent
    folder = cache_folder(config.data.qa_file, tower, run.built.image_processor, dtype=dtype)
    cache = FeatureCache(folder, tower.num_image_tokens, tower.hidden_size, dtype=dtype)

    def open_cache() -> int | None:
        """Repair the cache, and return the bytes in it; None if the folder cannot be written."""
        if word == "auto" and not os.access(beside, os.W_OK):
            return None
        cache.repair()
        return cache.nbytes if folder.exists() else 0

    stored = on_main(open_cache)
    if stored is None:
        return Choice(name, "off", f"{beside} cannot be written"), None
    epochs = run.total_steps * run.samples_per_step / run.order.pass_length
    images = sum(map(_count_images, run.datasets))
    at_start = VIEWS if config.train.projector_start == "words" and run.built.is_projector_new else 0
    images += min(views, max(math.ceil(epochs), at_start)) * _count_images(run.train_set)
    size = expected_bytes(images, tower, dtype)
    free = shutil.disk_usage(beside).free
    evaluations = run.total_steps // config.train.eval_steps if config.train.eval_steps else 0
    if word == "auto" and epochs <= max(1, views) and evaluations <= 1 and not stored:
        return Choice(name, "off", f"each {'view of an ' if views else ''}image is seen once"), None
    if word == "auto" and size - stored > DISK_SHARE * free:
        return Choice(name, "off", f"it would take up to {size_text(size)} of {size_text(free)} free"), None
    return Choice(name, "on", f"up to {size_text(size)} in {folder}, {size_text(stored)} of it stored"), cache


def _count_images(dataset: QADataset) -> int:
    """Estimate how many images the records name, from a thousand of them. An image named twice counts twice."""
    kept = dataset.kept
    sample = kept[np.linspace(0, len(kept) - 1, min(1000, len(kept))).astype(np.int64)] if len(kept) else kept
    named = sum(len(dataset.qa.image_paths(dataset.qa[int(index)])) for index in sample)
    return round(named / max(1, len(sample)) * len(kept))


def activation_checkpointing(
    config: Config, built: Built, dataset: QADataset, device: torch.device, batch_size: int
) -> Choice:
    """Choose whether the backward pass recomputes each layer instead of keeping it: where a batch would not fit
    otherwise."""
    name = "activation_checkpointing"
    configured = _as_configured(name, config.train.activation_checkpointing)
    if configured:
        return configured
    free = _free_memory(device)
    if free is None:
        return Choice(name, "off", "the free memory is unknown")
    sizes = [len(dataset.encode((0, int(index)))[1].input_ids) for index in dataset.kept[:256]]
    mean, spread = float(np.mean(sizes)), float(np.std(sizes))
    tokens = batch_size * mean + 2 * spread * batch_size**0.5  # two standard deviations: few batches are larger
    model = built.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) if device.type != "cpu" else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed, room = tokens * activation_bytes_per_token(model), free - weights - 12 * trained
    why = f"a batch keeps about {size_text(needed)} of {size_text(room)} free"
    return Choice(name, "on" if needed > MEMORY_SHARE * room else "off", why)


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    (line,) = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024
