"""One way to train on the workload of `benchmarks.vlm_workload`, in this process: ours, or what a user would take instead.

The peers get what is to their advantage: ids made before the clock runs, no logging, no saving, the same first weights,
samples, batches, learning rates and clipping as ours. Each returns what its steps cost; the table is another file's matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from training import step
import train
from training.run import chat_format, open_processors, rates
from config import IGNORE_INDEX, Config, load_config
from dataset.order import SampleOrder
from dataset.qa_file import QAFile
from training.log import read_rows
from qwen.lora import LINEARS


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every peer is told. steps: with the `warmup` steps that are not measured."""

    folder: Path  # of the workload
    precision: str
    steps: int
    warmup: int
    threads: int
    workers: int  # processes that read pictures; 0: the one that trains


class Meter:
    """What the steps after the warm-up cost: CPU seconds of this process and of all that it started, seconds, and the most
    memory of this process in MiB until then, as a whole and above what its imports left."""

    def __init__(self, settings: Settings):
        self.settings, self.done = settings, 0
        self._imports = _peak_memory()

    def step_done(self) -> None:
        self.done += 1
        if self.done == self.settings.warmup:
            self._start = cpu_seconds(), time.perf_counter()
        if self.done == self.settings.steps:
            cpu, wall = cpu_seconds() - self._start[0], time.perf_counter() - self._start[1]
            peak = _peak_memory()
            self.cost = {"cpu": cpu, "wall": wall, "memory": peak, "memory_above": peak - self._imports}


def cpu_seconds() -> float:
    """User and system time of this process and of those below it, ended or not."""
    spent, parents = time.process_time() + sum(os.times()[2:4]), [os.getpid()]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ends just now
                for child in map(int, children.read_text().split()):
                    values = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                    spent += sum(map(int, values[11:15])) / os.sysconf("SC_CLK_TCK")
                    parents.append(child)
    return spent


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def samples(config: Config, steps: int) -> list[dict]:
    """What the first `steps` steps of our run learn from, in their order: input_ids, labels, images (paths)."""
    processors = open_processors(config)
    chat, qa = chat_format(config, processors), QAFile(config.data.qa_file)
    order = SampleOrder(np.arange(len(qa)), config.seed, np.ones(len(qa)))
    found = []
    for position in range(steps * config.train.per_device_train_batch_size):
        record = qa[order.at(position)[1]]
        encoded = chat.encode(record.conversations, config.data.max_length)
        found.append(
            {
                "input_ids": encoded.input_ids,
                "labels": encoded.labels,
                "images": [str(path) for path in qa.image_paths(record)],
            }
        )
    return found


def amount(config: Config, settings: Settings, taken: list[dict]) -> dict:
    """How much the measured steps learned from: samples, tokens that are no padding, and tokens of answers."""
    measured = taken[settings.warmup * config.train.per_device_train_batch_size :]
    return {
        "samples": len(measured),
        "tokens": sum(len(sample.input_ids) for sample in measured),
        "targets": sum(label != IGNORE_INDEX for sample in measured for label in sample.labels),
    }


# ------------------------------------------------------------------------------------------------------------------ ours


def ours(settings: Settings, cached: bool = False) -> dict:
    """`train.main`. cached: with the encoder's features on disk, as they are from the second epoch on."""
    folder = settings.folder
    if not cached:
        shutil.rmtree(folder / "qa.features", ignore_errors=True)
    meter = Meter(settings)
    take_step = step.Stepper.__call__

    def take_and_note(*arguments, **named):
        outcome = take_step(*arguments, **named)
        meter.step_done()
        return outcome

    step.Stepper.__call__ = take_and_note
    values = {
        "output_dir": folder / "run",
        "train.cache_features": "on",
        "train.precision": settings.precision,
        "train.max_steps": settings.steps,
        "train.num_threads": settings.threads,
        "train.num_workers": settings.workers,
    }
    shutil.rmtree(folder / "run", ignore_errors=True)
    overrides = [f"{key}={value}" for key, value in values.items()]
    train.main(["--config", str(folder / "config.yaml"), *overrides])
    config = load_config(folder / "config.yaml", overrides)
    losses = [row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl")]
    return meter.cost | amount(config, settings, samples(config, settings.steps)) | {"losses": losses}


# ----------------------------------------------------------------------------------------------------------------- peers


class Collator:
    """Reads the pictures of samples and pads their ids, as the examples for LLaVA do."""

    def __init__(self, image_processor, pad_token_id: int):
        self.image_processor, self.pad_token_id = image_processor, pad_token_id

    def __call__(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(sample.input_ids) for sample in batch)

        def padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in rows])

        images = [Image.open(path).convert("RGB") for sample in batch for path in sample["images"]]
        return {
            "input_ids": padded((sample.input_ids for sample in batch), self.pad_token_id),
            "labels": padded((sample.labels for sample in batch), IGNORE_INDEX),
            "attention_mask": padded(([1] * len(sample.input_ids) for sample in batch), 0),
            "pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"],
        }


def sorted_batches(taken: list[dict], size: int, seed: int) -> list[dict]:
    """The same samples in batches of like length, the batches in a random order: the least padding that can be."""
    by_length = sorted(taken, key=lambda sample: len(sample.input_ids))
    batches = [by_length[first : first + size] for first in range(0, len(taken), size)]
    random.Random(seed).shuffle(batches)
    return [sample for batch in batches for sample in batch]


def llava(config: Config, folder: Path, precision: str) -> nn.Module:
    """LLaVA in transformers' own class with PEFT's LoRA on its language model, at the weights that ours begins with."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=dtype)
    targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
    # PEFT makes its matrices float32, whatever the model is
    model = get_peft_model(model, LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, target_modules=targets))
    inner = model.get_base_model().model
    inner.multi_modal_projector.float().requires_grad_(True)
    first = load_file(folder / "first.safetensors")
    parts = {"projector.": inner.multi_modal_projector, "language_model.base_model.model.model.": inner.language_model}
    for prefix, part in parts.items():
        names = {name for name, weight in part.named_parameters() if weight.requires_grad}
        weights = {name.removeprefix(prefix): first.pop(name) for name in list(first) if name.startswith(prefix)}
        assert weights.keys() == names, "other weights train than in ours"
        part.load_state_dict(weights, strict=False)
    assert not first
    return model


def with_trainer(
    settings: Settings, trainer_class: type = Trainer, arguments_class: type = TrainingArguments, by_length: bool = False,
    as_dataset: Callable = list, with_processor: bool = False, **options,
) -> dict:  # fmt: skip
    """A training with transformers' Trainer, or a class made of it. by_length: see `sorted_batches`; as_dataset: of the
    list of samples; with_processor: the class wants LLaVA's processor; options: more of arguments_class."""
    meter = Meter(settings)
    config = load_config(settings.folder / "config.yaml")
    size, rate = config.train.per_device_train_batch_size, rates(config)
    taken = samples(config, settings.steps)
    if by_length:
        taken = sorted_batches(taken, size, config.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.folder / "lm")
    image_processor = AutoImageProcessor.from_pretrained(settings.folder / "tower")
    model = llava(config, settings.folder, settings.precision)
    parts = {"lora_lr": "lora_", "projector_lr": "multi_modal_projector"}
    groups = [
        {"lr": rate[key], "params": [weight for name, weight in model.named_parameters() if part in name]}
        for key, part in parts.items()
    ]
    losses = []

    class Noting(TrainerCallback):
        def on_step_end(self, *given, **named) -> None:
            meter.step_done()

    class Recording(trainer_class):
        def training_step(self, *given, **named) -> torch.Tensor:
            losses.append(super().training_step(*given, **named))
            return losses[-1]

    Recording(
        model=model,
        args=arguments_class(
            output_dir=str(settings.folder / "peer"),
            max_steps=settings.steps,
            per_device_train_batch_size=size,
            lr_scheduler_type="cosine",
            max_grad_norm=config.train.max_grad_norm,
            bf16=settings.precision == "bf16",
            use_cpu=True,
            dataloader_num_workers=settings.workers,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
            **options,
        ),
        data_collator=Collator(image_processor, tokenizer.pad_token_id),
        train_dataset=as_dataset(taken),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0, fused=True), None),  # fused, as Trainer would make it
        callbacks=[Noting()],
        processing_class=LlavaProcessor(image_processor, tokenizer) if with_processor else None,
    ).train()
    return meter.cost | amount(config, settings, taken) | {"losses": [float(loss) for loss in losses]}


def with_trl(settings: Settings, **options) -> dict:
    """TRL's SFTTrainer at its defaults, but for `options`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return with_trainer(settings, SFTTrainer, SFTConfig, as_dataset=Dataset.from_list, with_processor=True, **options)


WAYS: dict[str, Callable[[Settings], dict]] = {
    "ours": ours,
    "ours-cached": functools.partial(ours, cached=True),
    "hf": with_trainer,
    "hf-sorted": functools.partial(with_trainer, by_length=True),
    "trl": with_trl,
    "trl-no-checkpointing": functools.partial(with_trl, gradient_checkpointing=False),
}
