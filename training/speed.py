"""What makes a run fast: each part chosen by `auto` or by its key, applied to the model, and told before the first step.

None of them changes what is learned, but for rounding: each is tested against the plain way. For the scripts.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.utils import is_flash_attn_2_available

from assemble import Run
from config import Config, InputError
from dataset.loader import QADataset
from model.build import PRECISIONS, Built, autocast, checkpoint_activations
from model.compiled import compile_elementwise, use_liger
from model.features import CachedEncoder
from model.fused import fuse_lora
from qwen.attention import PACKED_SDPA
from step import kept_bytes, size_text
from visual.feature_cache import FeatureCache, cache_folder, expected_bytes

DISK_SHARE = 0.5  # of what is free, that a cache chosen by `auto` may take
COMPILED_WIDTH, COMPILED_STEPS = 256, 100  # from which on compiling, some twenty seconds, pays
MEMORY_SHARE = 0.8  # of what is left beside the weights, above which layers are computed twice instead of kept


@dataclass(frozen=True)
class Choice:
    """One way of being fast: whether it is used, and why."""

    name: str  # the key, without "train."
    value: str
    why: str

    @property
    def is_on(self) -> bool:
        return self.value == "on"


def table(choices: Sequence[Choice]) -> str:
    """What is printed before training."""
    width = max(len(choice.name) for choice in choices)
    values = max(len(choice.value) for choice in choices)
    return "\n".join(f"{c.name:<{width}}  {c.value:<{values}}  {c.why}".rstrip() for c in choices)


def make_fast(run: Run, flash: Choice) -> tuple[Run, list[Choice]]:
    """The run with all that is chosen for it, and the choices. flash: the attention that the model was loaded with."""
    config, device = run.config, run.accelerator.device
    packs, fuses = packing(config), fused_lora(config, run.built)
    kernels = liger_kernels(config, run.built, device)
    compiles = elementwise_compiler(config, run.built, device, run.total_steps, kernels.is_on)
    model = run.built.model.language_model
    if fuses.is_on:
        fuse_lora(model)
    if kernels.is_on:
        use_liger(run.built.model.causal_lm)
    if compiles.is_on and not compile_elementwise(model, device.type, config.output_dir / "compiled", run.say):
        compiles = Choice(compiles.name, "off", "there is no compiler")
    checkpointing = activation_checkpointing(config, run.built, run.train_set, device, run.cut[0])
    if checkpointing.is_on:
        checkpoint_activations(run.built.model)
    caches, cache = feature_cache(run)
    encoder = None
    if cache is not None:
        encoder = CachedEncoder(run.built.model, cache, device, autocast(run.precision, device))
        for dataset in run.datasets:
            dataset.find_features = cache.find
    choices = [packs, caches, fuses, compiles, checkpointing, flash, kernels]
    return dataclasses.replace(run, packed=packs.is_on, encoder=encoder), choices


# ---------------------------------------------------------------------------------------------------------------------
# What the config and the device alone decide


def attention(config: Config, device: torch.device, precision: str) -> Choice:
    """Which attention computes the language model."""
    name, word = "attn_implementation", config.train.attn_implementation
    fits = device.type == "cuda" and precision != "fp32"
    if word == "flash_attention_2" and not fits:
        raise InputError(
            '"train.attn_implementation" is flash_attention_2, which computes on a GPU, in bf16 or fp16; here it is '
            f"{precision} on {device.type}. Use auto."
        )
    if word != "auto":
        return Choice(name, word, "as configured")
    if fits and config.model.attention == "causal" and is_flash_attn_2_available():
        return Choice(name, "flash_attention_2", "flash-attn is installed")
    return Choice(name, "sdpa", "torch's own")


def attention_name(choice: Choice) -> str:
    """As transformers knows it."""
    return PACKED_SDPA if choice.value == "sdpa" else choice.value


def packing(config: Config) -> Choice:
    """Whether the samples of a batch stand in one row, without padding."""
    word, eager = config.train.packing, config.train.attn_implementation == "eager"
    if eager and word == "on":
        raise InputError(
            '"train.packing" is on, but eager attention cannot keep the samples in a row apart; set packing to off, or '
            '"train.attn_implementation" to auto.'
        )
    if eager:
        return Choice("packing", "off", "eager attention cannot keep the samples in a row apart")
    return _as_configured("packing", word) or Choice("packing", "on", "no padding, whatever the lengths")


def _as_configured(name: str, word: str) -> Choice | None:
    return None if word == "auto" else Choice(name, str(word), "as configured")


def fused_lora(config: Config, built: Built) -> Choice:
    """Whether a linear layer and its LoRA are one function."""
    name, word = "fused_lora", config.train.fused_lora
    if not built.model.has_lora:
        if word == "on":
            raise InputError('"train.fused_lora" is on, but the language model has no LoRA; set it to auto.')
        return Choice(name, "off", "there is no LoRA")
    return _as_configured(name, word) or Choice(name, "on", "in the place of PEFT's chain of casts and sums")


def liger_kernels(config: Config, built: Built, device: torch.device) -> Choice:
    """Whether norms, rotary embedding and activation are Liger's kernels."""
    name, word = "liger_kernels", config.train.liger_kernels
    if built.model.has_experts:
        if word == "on":
            raise InputError(
                '"train.liger_kernels" is on, but they are put into dense language models only; set it to auto.'
            )
        return Choice(name, "off", "a mixture of experts keeps the library's own")
    there = device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if word == "on" and not there:
        raise InputError('"train.liger_kernels" is on, which needs a GPU and pip install liger-kernel; set it to auto.')
    return _as_configured(name, word) or Choice(name, *(("on", "installed") if there else ("off", "not installed")))


def elementwise_compiler(
    config: Config, built: Built, device: torch.device, total_steps: int, by_liger: bool
) -> Choice:
    """Whether torch.compile makes the element-wise parts."""
    name = "compile"
    configured = _as_configured(name, config.train.compile)
    if configured:
        return configured
    width = built.model.causal_lm.config.hidden_size
    if by_liger:
        return Choice(name, "off", "Liger's kernels do that")
    if built.model.causal_lm.model.norm.weight.requires_grad and not built.model.has_lora:
        return Choice(name, "off", "the norms train, and keep the library's way")
    if width < COMPILED_WIDTH or total_steps < COMPILED_STEPS:
        return Choice(name, "off", f"{total_steps:,} steps at width {width:,} would not win back the compiling")
    return Choice(name, "on", "norms and activations, at the first step")


# ---------------------------------------------------------------------------------------------------------------------
# What the data and the model decide


def feature_cache(run: Run) -> tuple[Choice, FeatureCache | None]:
    """The cache of what the frozen encoder makes of the run's pictures, beside the QA file; None for no cache."""
    config, tower, dtype = run.config, run.built.model.vision_tower, PRECISIONS[run.precision]
    name, word = "cache_features", config.train.cache_features
    sharded = config.train.fsdp and run.accelerator.num_processes > 1
    why = "the encoder trains, so its features change" if tower.trains else "train.fsdp shares the encoder out"
    if tower.trains or sharded:
        if word == "on":
            raise InputError(f'"train.cache_features" is on, but {why}; set it to auto.')
        return Choice(name, "off", why), None
    if word == "off":
        return Choice(name, "off", "as configured"), None
    beside = config.data.qa_file.parent
    if word == "auto" and not os.access(beside, os.W_OK):
        return Choice(name, "off", f"{beside} cannot be written"), None
    folder = cache_folder(config.data.qa_file, tower, run.built.image_processor, dtype)
    cache = FeatureCache(folder, tower.num_image_tokens, tower.hidden_size, dtype)
    stored = cache.nbytes if folder.exists() else 0
    size = expected_bytes(sum(map(_count_pictures, run.datasets)), tower, dtype)
    free = shutil.disk_usage(beside).free
    epochs = run.total_steps * run.samples_per_step / run.order.pass_length
    evaluations = run.total_steps // config.train.eval_steps if config.train.eval_steps else 0
    if word == "auto" and epochs <= 1 and evaluations <= 1 and not stored:
        return Choice(name, "off", "each picture is seen once"), None
    if word == "auto" and size - stored > DISK_SHARE * free:
        return Choice(name, "off", f"it would take up to {size_text(size)}, of {size_text(free)} free"), None
    return Choice(name, "on", f"up to {size_text(size)} in {folder}, {size_text(stored)} of it there"), cache


def _count_pictures(dataset: QADataset) -> int:
    """About how many pictures its records name, from a thousand of them; one that several name is counted for each."""
    kept = dataset.kept
    sample = kept[np.linspace(0, len(kept) - 1, min(1000, len(kept))).astype(np.int64)] if len(kept) else kept
    named = sum(len(dataset.qa.image_paths(dataset.qa[int(index)])) for index in sample)
    return round(named / max(1, len(sample)) * len(kept))


def activation_checkpointing(
    config: Config, built: Built, dataset: QADataset, device: torch.device, batch_size: int
) -> Choice:
    """Whether each layer is computed a second time instead of kept: where a batch would not fit otherwise."""
    name = "activation_checkpointing"
    configured = _as_configured(name, config.train.activation_checkpointing)
    if configured:
        return configured
    free = _free_memory(device)
    if free is None:
        return Choice(name, "off", "the free memory is not known")
    sizes = [len(dataset.encode((0, int(index)))[1].input_ids) for index in dataset.kept[:256]]
    mean, spread = float(np.mean(sizes)), float(np.std(sizes))
    tokens = batch_size * mean + 2 * spread * batch_size**0.5  # few batches are larger
    model = built.model
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) if device.type != "cpu" else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed, room = tokens * kept_bytes(model), free - weights - 12 * trained
    told = f"a batch keeps about {size_text(needed)}, of {size_text(room)} free"
    return Choice(name, "on" if needed > MEMORY_SHARE * room else "off", told)


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    (line,) = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024
