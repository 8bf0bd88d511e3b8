"""From the config to the parts: what training and answering both need, built in one place, so that they cannot differ."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from config import RATE_KEYS, Config, InputError
from dataset.conversation import ChatFormat
from dataset.loader import QADataset, find_unusable, make_loader
from dataset.order import SampleOrder, micro_batches
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


def answerer(config: Config, built: Built, precision: str, device: torch.device) -> Answerer:
    """Asks the built model, with the generation options of the config."""
    return Answerer(
        built.model,
        built.tokenizer,
        chat_format(config, built),
        functools.partial(read_pixels, built.image_processor),
        autocast(precision, device),
        max_new_tokens=config.test.max_new_tokens,
        num_beams=config.test.num_beams,
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


# ---------------------------------------------------------------------------------------------------------------------
# A training run


@dataclasses.dataclass(frozen=True)
class Run:
    """What the functions below share."""

    config: Config
    accelerator: Accelerator
    built: Built
    train_set: QADataset
    order: SampleOrder
    validation_set: QADataset | None
    validation_kept: np.ndarray  # the records of the validation set that can be used, in a seeded order
    answerer: Answerer
    precision: str
    identity: dict  # what the config does not say and a run must not change on the way
    say: Callable[[str], None]

    @property
    def samples_per_step(self) -> int:
        return self.config.train.per_device_train_batch_size * self.config.train.gradient_accumulation_steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: the epochs, rounded up to whole steps, or max_steps if that is less."""
        by_epochs = math.ceil(self.config.train.num_train_epochs * self.order.epoch_length / self.samples_per_step)
        limit = self.config.train.max_steps
        return by_epochs if limit is None else min(limit, by_epochs) if by_epochs else limit

    def epoch(self, step: int) -> float:
        return step * self.samples_per_step / self.order.epoch_length


def rates(config: Config) -> dict[str, float | None]:
    return {key: getattr(config.train, key) for key in set(RATE_KEYS.values())}


def open_run(config: Config, accelerator: Accelerator, precision: str, resume_from: Path | None, say) -> Run:
    """Everything opened and checked: model, data, how they fit. Raises InputError."""
    processes = accelerator.num_processes
    if config.train.gradient_accumulation_steps % processes:
        raise InputError(
            f'"train.gradient_accumulation_steps" is {config.train.gradient_accumulation_steps}, which {processes} '
            "processes cannot share: a step's micro-batches are divided among them. Make it a multiple of "
            f"{processes} (and the batch size smaller, to keep their product)."
        )
    built = build(config, precision, resume_from)
    if not config.data.qa_file.exists():
        raise InputError(
            f'{config.data.qa_file}: no such QA file; set "data.qa_file", or list "data.sources" to make it.'
        )
    train_set, kept, unusable = open_dataset(config, built, config.data.qa_file)
    write_unusable(config, accelerator, config.data.qa_file, unusable, say)
    order = SampleOrder(kept, config.seed, source_weights(config, train_set)[kept])
    validation_set, validation_kept = None, np.empty(0, dtype=np.int64)
    if config.data.validation_file is not None and config.data.validation_file.exists():
        validation_set, validation_kept, unusable = open_dataset(config, built, config.data.validation_file)
        write_unusable(config, accelerator, config.data.validation_file, unusable, say)
        validation_kept = np.random.default_rng(config.seed).permutation(validation_kept)
    elif config.data.validation_file is not None:
        raise InputError(
            f'{config.data.validation_file}: no such file; set "data.validation_file" to null to do without.'
        )
    ask = answerer(config, built, precision, accelerator.device)
    with open(config.data.qa_file, "rb") as file:
        identity = {
            "qa_sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "records": len(kept),
            "precision": precision,
        }
    return Run(
        config, accelerator, built, train_set, order, validation_set, validation_kept, ask, precision, identity, say
    )


def source_weights(config: Config, dataset: QADataset) -> np.ndarray:
    """The weight of every record: that of its source in the config, 1 for a source that is not listed there."""
    weights = {source.name: source.weight for source in config.data.sources}
    return np.array([weights.get(name, 1.0) for name in dataset.qa.sources] or [1.0])[dataset.qa.source_of]


def write_unusable(config: Config, accelerator: Accelerator, path: Path, unusable: list, say) -> None:
    """Records that do not fit the config are not dropped silently: they are counted, and listed in a file of the run."""
    listing = config.output_dir / f"{path.stem}.unusable.jsonl"
    if not unusable:
        if accelerator.is_main_process:
            listing.unlink(missing_ok=True)  # of an earlier start
        return
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        rows = [{"record": i, "id": name, "reason": "longer_than_max_length", "detail": d} for i, name, d in unusable]
        listing.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    say(f"{path.name}: {len(unusable)} records are longer than data.max_length allows and are left out: {listing}")


def open_loader(run: Run, start_step: int) -> Iterable[dict]:
    """This process's micro-batches from `start_step` to the end. It seeks: nothing before `start_step` is read."""
    settings, accelerator = run.config.train, run.accelerator
    batches = micro_batches(
        run.order,
        range(start_step, run.total_steps),
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    pin = accelerator.device.type == "cuda"
    return make_loader(run.train_set, batches, run.built.tokenizer.pad_token_id, settings.num_workers, pin)
