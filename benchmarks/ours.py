"""This project's optimizer steps: those of train.py, watched; or taken on samples in memory, each speed-up on or off."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import train
from benchmarks.annotations import SEED
from benchmarks.models import TRAIN, NotInstalled, Task
from config import IGNORE_INDEX, TrainConfig
from dataset.batch import Batch
from model.build import autocast, checkpoint_activations
from model.elementwise import compile_elementwise, use_liger
from model.fused_lora import fuse_lora
from model.model import Losses, VisionLanguageModel
from model.trainable import param_groups
from training.parallel import sum_gradients
from training.step import Outcome, StepLosses, Stepper

MAX_GRAD_NORM = 1.0

# after_step(loss per answer token) -> whether to stop; train(after_step) repeats the batches until then
AfterStep = Callable[[Tensor | float], bool]
Train = Callable[[AfterStep], None]
Watch = Callable[[Stepper, int, Sequence[Batch]], Iterator[None]]  # yields once: there the step is taken


def watch_training(folder: Path, watch: Watch, steps: int, arguments: argparse.Namespace, *words: str) -> None:
    """Run train.py on the workload in `folder`, each step (forward to update) inside `watch(stepper, step, micro_batches)`.
    arguments: has precision, threads and workers. words: more config keys."""
    begin, end = Stepper.forward_and_backward, Stepper.clip_and_step
    contexts = contextlib.ExitStack()

    def forward_and_backward(stepper: Stepper, step: int, micro_batches: Sequence[Batch]) -> StepLosses:
        contexts.enter_context(contextlib.contextmanager(watch)(stepper, step, micro_batches))
        return begin(stepper, step, micro_batches)

    def clip_and_step(stepper: Stepper, losses: StepLosses, stop_requested: bool = False) -> Outcome:
        outcome = end(stepper, losses, stop_requested)
        contexts.close()
        return outcome

    shutil.rmtree(folder / "run", ignore_errors=True)
    command = ["--config", str(folder / "config.yaml"), f"output_dir={folder / 'run'}", f"train.max_steps={steps}"]
    command += [f"train.precision={arguments.precision}", f"train.num_threads={arguments.threads}"]
    with mock.patch.multiple(Stepper, forward_and_backward=forward_and_backward, clip_and_step=clip_and_step):
        if stopped := train.main([*command, f"train.num_workers={arguments.workers}", *words]):
            raise SystemExit(stopped)


def make_stepper(
    model: VisionLanguageModel, train: TrainConfig, precision: str, device: torch.device, **options: Any
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


def ours(
    task: Task,
    packing: bool = True,
    fused_lora: bool = True,
    kernels: str = "compiled",
    cached: bool = False,
    checkpointing: bool = False,
    chosen_logits: bool = True,
) -> Train:
    """Make this project's way to train. kernels: of the element-wise parts: compiled, liger or plain. cached: the features
    of all images. checkpointing: of activations. chosen_logits: logits only where there is a label."""
    model = task.model()
    if fused_lora:
        fuse_lora(model.language_model)
    if kernels == "liger" and not use_liger(model.causal_lm):
        raise NotInstalled("liger_kernel")
    if kernels == "compiled":
        compile_elementwise(model.language_model, task.device.type, task.folder, task.say)
    if checkpointing:
        checkpoint_activations(model)
    if not chosen_logits:
        model.__class__ = AllLogits
    batches = task.batches(task.samples, packing)
    if cached:
        batches = [with_features(model, task, batch) for batch in batches]
    encoder = partial(move_features, task.device) if cached else None
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
        self, input_ids: Any, labels: Any, attention_mask: Any = None, lengths: Any = None, num_tokens: Any = None,
        pixel_values: Any = None, patch_features: Any = None,
    ) -> Losses:  # fmt: skip
        features = self.project(self.patch_features(pixel_values) if patch_features is None else patch_features)
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "lengths": lengths}
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
    is_cached = [True] * len(features)
    images: dict = {"pixel_values": None, "patch_features": features, "image_keys": [], "is_cached": is_cached}
    cached = dataclasses.replace(batch, **images)
    return cached.pin_memory() if task.device.type == "cuda" else cached


def move_features(device: torch.device, batch: Batch) -> Tensor | None:
    return None if batch.patch_features is None else batch.patch_features.to(device, non_blocking=True)
