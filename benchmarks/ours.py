"""This project's optimizer steps, as the benchmarks measure them: those of train.py, watched; or taken on samples in memory,
with each speed-up switched on or off."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import train
from benchmarks.annotations import SEED
from benchmarks.models import TRAIN, Task
from config import IGNORE_INDEX, TrainConfig
from dataset.batch import Batch
from model.build import autocast, checkpoint_activations
from model.elementwise import compile_elementwise, use_liger
from model.fused_lora import fuse_lora
from model.model import Losses, VisionLanguageModel
from model.trainable import param_groups
from qwen.attention import PACKED_SDPA
from training.parallel import sum_gradients
from training.step import Outcome, Stepper

MAX_GRAD_NORM = 1.0

# after_step(loss per answer token) -> whether to stop; train(after_step) repeats the batches until then
AfterStep = Callable[[Tensor | float], bool]
Train = Callable[[AfterStep], None]
Watch = Callable[[Stepper, int, Sequence[Batch]], contextlib.AbstractContextManager]


class NotInstalled(Exception):
    """A way needs a package that is not installed."""


def require(name: str) -> Any:
    """Import and return a module. Raises NotInstalled if its package is not installed."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(package)
    return importlib.import_module(name)


def watch_training(folder: Path, watch: Watch, steps: int, arguments: argparse.Namespace, *words: str) -> None:
    """Run train.py on the workload in `folder`, each optimizer step inside `watch(stepper, step, micro_batches)`: from its
    first forward pass to the update. arguments: has precision, threads and workers. words: more config keys."""
    begin, end = Stepper.forward_and_backward, Stepper.clip_and_step
    contexts = contextlib.ExitStack()

    def forward_and_backward(stepper, step, micro_batches):
        contexts.enter_context(watch(stepper, step, micro_batches))
        return begin(stepper, step, micro_batches)

    def clip_and_step(stepper, *given, **named):
        outcome = end(stepper, *given, **named)
        contexts.close()
        return outcome

    values = {
        "output_dir": folder / "run",
        "train.max_steps": steps,
        "train.precision": arguments.precision,
        "train.num_threads": arguments.threads,
        "train.num_workers": arguments.workers,
    }
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = ["--config", str(folder / "config.yaml"), *(f"{key}={value}" for key, value in values.items()), *words]
    with mock.patch.multiple(Stepper, forward_and_backward=forward_and_backward, clip_and_step=clip_and_step):
        if stopped := train.main(command):
            raise SystemExit(stopped)


def make_stepper(
    model: VisionLanguageModel, train: TrainConfig, precision: str, device: torch.device, **options
) -> Stepper:
    """Make what takes the steps of train.py. options: more of Stepper's fields."""
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no" if precision == "fp32" else precision)
    return Stepper(
        model=model,
        optimizer=accelerator.prepare_optimizer(torch.optim.AdamW(param_groups(model, train))),
        accelerator=accelerator,
        autocast=autocast(precision, device),
        seed=SEED,
        max_grad_norm=MAX_GRAD_NORM,
        **options,
    )


def take_step(stepper: Stepper, step: int, micro_batches: Sequence[Batch]) -> Outcome:
    losses = stepper.forward_and_backward(step, micro_batches)
    sum_gradients(stepper.parameters)
    return stepper.clip_and_step(losses)


@dataclass(frozen=True)
class Switches:
    """What of this project's training is switched on."""

    packing: bool = True
    fused_lora: bool = True
    compiled: bool = True
    cached: bool = False  # the features of all images
    checkpointing: bool = False  # of activations
    chosen_logits: bool = True  # logits only where there is a label
    attention: str = PACKED_SDPA
    liger: bool = False


def ours(task: Task, **switches) -> Train:
    """Make this project's way to train. switches: see `Switches`."""
    on = Switches(**switches)
    if on.attention.startswith("flash_attention"):
        require("flash_attn")
    model = task.model(on.attention)
    if on.fused_lora:
        fuse_lora(model.language_model)
    if on.liger and not use_liger(model.causal_lm):
        raise NotInstalled("liger_kernel")
    if on.compiled:
        compile_elementwise(model.language_model, task.device.type, task.folder, task.say)
    if on.checkpointing:
        checkpoint_activations(model)
    if not on.chosen_logits:
        model.__class__ = AllLogits
    batches, encoder = task.batches(task.samples, on.packing), None
    if on.cached:
        batches = [with_features(model, task, batch) for batch in batches]

        def encoder(batch):
            return batch.patch_features.to(task.device, non_blocking=True)

    stepper = make_stepper(model, TRAIN, task.precision, task.device, encoder=encoder)

    def train(after_step: AfterStep) -> None:
        for step, batch in enumerate(itertools.cycle(batches)):
            outcome = take_step(stepper, step, [batch])
            if stepper.pieces > 1:
                raise torch.OutOfMemoryError("out of memory with a whole batch at once")
            if after_step(outcome.loss):
                return

    return train


class AllLogits(VisionLanguageModel):
    """Computes the loss from the logits of all positions, as transformers does."""

    def forward(
        self, input_ids, labels, attention_mask=None, lengths=None, num_tokens=None, pixel_values=None,
        patch_features=None,
    ) -> Losses:  # fmt: skip
        if patch_features is None:
            patch_features = self.patch_features(pixel_values)
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "lengths": lengths}
        features = self.project(patch_features)
        hidden = self.causal_lm.model(**rows, image_features=features, use_cache=False).last_hidden_state
        logits = self.causal_lm.lm_head(hidden).float()  # [B, L, V]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(logits.device, non_blocking=True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return Losses(loss)


@torch.no_grad()
def with_features(model: VisionLanguageModel, task: Task, batch: Batch) -> Batch:
    """Return the batch as it is from the second epoch on, with cached features instead of pixels."""
    assert batch.pixel_values is not None
    with autocast(task.precision, task.device)():
        features = model.patch_features(batch.pixel_values.to(task.device)).cpu()
    images = {"pixel_values": None, "patch_features": features, "image_keys": [], "is_cached": [True] * len(features)}
    cached = dataclasses.replace(batch, **images)
    return cached.pin_memory() if task.device.type == "cuda" else cached
