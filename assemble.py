"""From the config to the parts: what training and answering both need, built in one place, so that they cannot differ."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config, InputError
from dataset.conversation import ChatFormat
from dataset.loader import QADataset, find_unusable
from dataset.record import QAFile
from model.answer import Answerer
from model.build import PRECISIONS, Built, autocast, build_model, read_pixels


def trainable_words(config: Config) -> dict[str, str]:
    """Part -> frozen | lora | full | top:N."""
    return dataclasses.asdict(config.train.trainable)


def build(config: Config, precision: str, checkpoint: Path | None = None) -> Built:
    """The model as the config says. With a `checkpoint` of this config: its weights, tokenizer and image processor."""
    return build_model(
        **{f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model) if f.name != "start_from"},
        trainable=trainable_words(config),
        lora=dataclasses.asdict(config.lora),
        dtype=PRECISIONS[precision],
        seed=config.seed,
        checkpoint=checkpoint or config.model.start_from,
        processors=checkpoint,
        activation_checkpointing=config.train.activation_checkpointing,
    )


def chat_format(config: Config, built: Built) -> ChatFormat:
    """The prompt format for the built tokenizer and encoder."""
    chat = ChatFormat(**built.chat_values(), system_prompt=config.data.system_prompt)
    if built.model.vision_tower.num_image_tokens >= config.data.max_length:
        raise InputError(
            f'"data.max_length" is {config.data.max_length}, but one image alone takes '
            f"{built.model.vision_tower.num_image_tokens} tokens with this encoder; allow more."
        )
    return chat


def answerer(config: Config, built: Built, precision: str, device: torch.device, **options) -> Answerer:
    """Asks the built model; options: transformers' generation options, in front of those in the config."""
    return Answerer(
        built.model,
        built.tokenizer,
        chat_format(config, built),
        functools.partial(read_pixels, built.image_processor),
        autocast(precision, device),
        **{"max_new_tokens": config.test.max_new_tokens, "num_beams": config.test.num_beams, **options},
    )


def open_dataset(config: Config, built: Built, path: Path) -> tuple[QADataset, np.ndarray, list[tuple[int, str, str]]]:
    """(dataset, the records that can be used, what is wrong with the others) of a QA file."""
    reader = functools.partial(read_pixels, built.image_processor)
    dataset = QADataset(QAFile(path), chat_format(config, built), reader, config.data.max_length, config.seed)
    if len(dataset) == 0:
        raise InputError(f"{path}: holds no records; expected one JSON object a line.")
    progress = functools.partial(tqdm, desc=f"checking {path.name}", unit=" records", delay=2, leave=False)
    unusable = find_unusable(dataset, progress)
    kept = np.setdiff1d(np.arange(len(dataset)), [index for index, *_ in unusable])
    if len(unusable) > config.data.max_refused * len(dataset) or len(kept) == 0:
        examples = "; ".join(f'"{name}": {problem}' for _, name, problem in unusable[:3])
        raise InputError(
            f'{path}: {len(unusable)} of {len(dataset)} records cannot be used, more than "data.max_refused" '
            f"({config.data.max_refused:g}) allows. {examples}. Raise data.max_length or data.max_refused."
        )
    return dataset, kept, unusable
