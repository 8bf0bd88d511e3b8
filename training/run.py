"""A training run: everything that its loop needs, in one object; and the parts that answering needs as well, opened in one
place so that the two cannot differ."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

import qwen
from config import Config, InputError, TrainConfig
from dataset.augment import Augmenter
from dataset.batch import Batch
from dataset.conversation import ChatFormat
from dataset.loader import QADataset, make_loader
from dataset.open import open_dataset
from dataset.order import PackedRow, SampleOrder, micro_batches, packed_rows, split_step
from model.answer import Answerer
from model.build import PRECISIONS, Built, Processors, autocast, build_model, load_processors, read_pixels
from model.checkpoint_folder import verify_folder
from model.model import VisionLanguageModel
from qwen.attention import PACKED_SDPA
from training.cached_features import CachedEncoder
from training.log import RunLog
from training.state import Position
from training.step import Stepper

FEW_STEPS = 20  # a run of fewer optimizer steps is noted


@dataclass
class Run:
    """Everything that one training run needs. `training.open` fills it."""

    config: Config
    accelerator: Accelerator
    precision: str  # fp32, bf16 or fp16
    built: Built
    train_set: QADataset
    order: SampleOrder
    validation_set: QADataset | None
    validation_records: np.ndarray  # the usable records of the validation set, in a seeded order
    answerer: Answerer
    fingerprint: dict  # what a resumed run must share and the config does not say: data, precision, released weights
    validation_sha256: str | None  # of the validation file
    is_packed: bool = False
    encoder: CachedEncoder | None = None  # None: features are not cached

    # set once training starts
    optimizer: AcceleratedOptimizer = field(init=False)
    stepper: Stepper = field(init=False)
    position: Position = field(init=False)
    log: RunLog = field(init=False)

    @property
    def model(self) -> VisionLanguageModel:
        return self.built.model

    @property
    def samples_per_step(self) -> int:
        return self.config.train.per_device_train_batch_size * self.config.train.gradient_accumulation_steps

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """(samples a micro-batch, micro-batches a step), such that the processes share a step evenly."""
        train = self.config.train
        sizes = train.per_device_train_batch_size, train.gradient_accumulation_steps
        return split_step(*sizes, self.accelerator.num_processes)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: the epochs, rounded up to whole steps, or max_steps if that is less."""
        by_epochs = math.ceil(self.config.train.num_train_epochs * self.order.epoch_length / self.samples_per_step)
        limit = self.config.train.max_steps
        if limit is None:
            return by_epochs
        return min(limit, by_epochs) if by_epochs else limit  # num_train_epochs 0: max_steps alone

    @property
    def datasets(self) -> list[QADataset]:
        return [self.train_set] if self.validation_set is None else [self.train_set, self.validation_set]

    def epoch(self, step: int) -> float:
        return step * self.samples_per_step / self.order.epoch_length


def few_steps_note(train: TrainConfig, steps: int) -> str:
    """Return a note about a run of fewer than FEW_STEPS optimizer steps, with the settings that make more; "" for a longer
    run."""
    if steps >= FEW_STEPS:
        return ""
    samples = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if train.max_steps == steps:
        how = "raise train.max_steps"
    else:
        how = f"raise train.num_train_epochs ({train.num_train_epochs:g})"
        if train.steps_per_epoch is not None:
            how += f" or train.steps_per_epoch ({train.steps_per_epoch})"
        if samples > 1:
            how += f", take fewer than {samples} samples a step (train.per_device_train_batch_size x "
            how += "train.gradient_accumulation_steps)"
        how += ", or give more data"
    return f"note: the run has {steps} optimizer step{'' if steps == 1 else 's'} in all, too few to learn much: {how}."


def read_steps(run: Run) -> Iterator[tuple[int, list[Batch]]]:
    """Yield (step, this process's micro-batches) from the run's position to its end. Seeks: no earlier sample is read."""
    accelerator = run.accelerator
    steps = range(run.position.step, run.total_steps)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    size, rows = run.micro_batch_shape
    batches: Iterator[list[tuple[int, int]]] | Iterator[PackedRow]
    if run.is_packed:
        batches = packed_rows(run.order, steps, samples_per_step=run.samples_per_step, rows=rows, **share)
    else:
        batches = micro_batches(run.order, steps, batch_size=size, accumulation=rows, **share)
    loader = make_loader(
        run.train_set,
        batches,
        run.built.tokenizer.pad_token_id,
        num_workers=run.config.train.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        packed=run.is_packed,
    )
    for step in steps:
        yield step, [next(loader) for _ in range(rows // accelerator.num_processes)]


# ---------------------------------------------------------------------------------------------------------------------
# What training and answering share


def open_model(
    config: Config,
    precision: str,
    processors: Processors,
    checkpoint: Path | None = None,
    attn_implementation: str = PACKED_SDPA,
) -> Built:
    """Build the model that the config describes. checkpoint: a verified folder of this config whose weights it gets; None:
    those of model.start_from, if set."""
    settings = config.model
    if checkpoint is not None:
        settings = dataclasses.replace(settings, start_from=checkpoint)
    elif settings.start_from is not None:
        verify_folder(settings.start_from)
    return build_model(
        processors,
        settings,
        config.lora,
        train=config.train,
        dtype=PRECISIONS[precision],
        seed=config.seed,
        attn_implementation=attn_implementation,
    )


def open_processors(config: Config, checkpoint: Path | None = None) -> Processors:
    """Load what reads images and text. checkpoint: a verified folder of this config whose own are used."""
    return load_processors(config.model, checkpoint)


def max_length(config: Config, processors: Processors) -> int:
    """Return the number of tokens at which samples are cut: data.max_length, or less where the language model fails
    beyond fewer."""
    length, limit = config.data.max_length, processors.max_tokens
    return length if limit is None else min(length, limit)


def chat_format(config: Config, processors: Processors) -> ChatFormat:
    """Return the prompt format for the tokenizer, the encoder and the projector.

    Raises InputError if data.max_length, or the language model's limit, does not even hold one image.
    """
    limit = max_length(config, processors)
    if processors.num_image_tokens >= limit:
        found = (
            f'"data.max_length" is {limit}' if limit == config.data.max_length else f"the language model takes {limit}"
        )
        raise InputError(
            f"{found}, but one image alone takes {processors.num_image_tokens} tokens with this encoder and projector; "
            f"{'allow more' if limit == config.data.max_length else 'use a projector with fewer tokens, or another model'}."
        )
    return ChatFormat(
        encode_text=functools.partial(qwen.encode_text, processors.tokenizer),
        im_start_id=processors.token_id("<|im_start|>"),
        im_end_id=processors.token_id("<|im_end|>"),
        end_of_text_id=processors.token_id("<|endoftext|>"),
        image_token_id=qwen.image_token_id(processors.tokenizer),
        num_image_tokens=processors.num_image_tokens,
        system_prompt=config.data.system_prompt,
    )


def open_answerer(config: Config, built: Built, precision: str, device: torch.device) -> Answerer:
    """Return what asks the built model, with the config's generation options."""
    return Answerer(
        built.model,
        built.tokenizer,
        chat_format(config, built),
        read_pixels=functools.partial(read_pixels, built.image_processor),
        autocast=autocast(precision, device),
        max_tokens=built.max_tokens,
        max_new_tokens=config.test.max_new_tokens,
        num_beams=config.test.num_beams,
    )


def open_qa_file(
    config: Config,
    processors: Processors,
    path: Path,
    *,
    left_out: Sequence[int] | np.ndarray = (),
    is_training: bool = False,
) -> QADataset:
    """Open a QA file's samples as the model gets them. left_out: the records that cannot be used. is_training: images are
    augmented as `data.augment` says."""
    dataset = open_dataset(
        path,
        dataclasses.replace(config.data, max_length=max_length(config, processors)),
        chat_format(config, processors),
        read_pixels=functools.partial(read_pixels, processors.image_processor),
        seed=config.seed,
        left_out=left_out,
    )
    if is_training and config.data.augment is not None:
        dataset.augmenter = Augmenter(config.data.augment, config.seed, processors.image_processor.image_size)
    return dataset
