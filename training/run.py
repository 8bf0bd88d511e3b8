"""From the config to the parts: what training and answering both need, built in one place, so that they cannot differ."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from config import RATE_KEYS, Config, InputError
from dataset.conversation import ChatFormat
from dataset.loader import QADataset, make_loader
from dataset.order import SampleOrder, micro_batches, share_out, shares
from dataset.qa_file import QAFile
from model.answer import Answerer
from model.build import PRECISIONS, Built, Processors, autocast, build_model, load_processors, read_pixels
from model.features import CachedEncoder
from model.folder import verify_folder
from model.model import VisionLanguageModel
from qwen.attention import PACKED_SDPA


def trainable_words(config: Config) -> dict[str, str]:
    """Part -> frozen | lora | full | top:N."""
    return dataclasses.asdict(config.train.trainable)


def open_processors(config: Config, checkpoint: Path | None = None) -> Processors:
    """What reads pictures and text for the config's model. With a `checkpoint` of this config: its own; a language model
    from scratch keeps to the tokenizer of the folder that it starts from."""
    model, new = config.model, config.model.from_scratch
    if checkpoint is None and new is not None and model.start_from is not None:
        verify_folder(model.start_from)  # before its tokenizer is opened: a folder that is none is named as one
    return load_processors(
        model.vision_tower,
        model.image_size,
        model.language_model if new is None else new.tokenizer,
        checkpoint or (model.start_from if new else None),
        projector=model.projector,
        num_queries=model.num_queries,
        any_tokenizer=new is not None,
    )


def build(
    config: Config,
    precision: str,
    processors: Processors,
    checkpoint: Path | None = None,
    attn_implementation: str = PACKED_SDPA,
) -> Built:
    """The model as the config says. With a `checkpoint` of this config, which the caller has verified: its weights."""
    if checkpoint is None and config.model.start_from is not None:
        verify_folder(config.model.start_from)
    values = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    values.pop("start_from")
    new = values.pop("from_scratch")
    if new is not None:  # what its tokenizer is, the processors know
        new = {key: value for key, value in dataclasses.asdict(new).items() if key not in ("tokenizer", "vocab_size")}
    return build_model(
        processors,
        **values,
        from_scratch=new,
        trainable=trainable_words(config),
        freeze_random=config.train.freeze_random,
        lora=dataclasses.asdict(config.lora),
        dtype=PRECISIONS[precision],
        seed=config.seed,
        checkpoint=checkpoint or config.model.start_from,
        attn_implementation=attn_implementation,
    )


def chat_format(config: Config, processors: Processors) -> ChatFormat:
    """The prompt format for the tokenizer, the encoder and the projector."""
    chat = ChatFormat(**processors.chat_values(), system_prompt=config.data.system_prompt)
    if processors.num_image_tokens >= config.data.max_length:
        raise InputError(
            f'"data.max_length" is {config.data.max_length}, but one image alone takes '
            f"{processors.num_image_tokens} tokens with this encoder and projector; allow more."
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


def open_qa_file(config: Config, processors: Processors, path: Path, left_out: Sequence[int] = ()) -> QADataset:
    """The samples of a QA file, as the model will get them. left_out: the records that cannot be used."""
    qa = QAFile(path)
    return QADataset(
        qa,
        chat_format(config, processors),
        functools.partial(read_pixels, processors.image_processor),
        config.data.max_length,
        config.seed,
        kept=np.setdiff1d(np.arange(len(qa)), left_out),
        skip_bad_images=config.data.on_bad_image == "skip",
    )


def qa_sha256(config: Config) -> str:
    """Of the training file: a run keeps to its data."""
    with open(config.data.qa_file, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    packed: bool = False  # samples stand in rows without padding
    encoder: CachedEncoder | None = None  # where the pictures' features are kept

    @property
    def samples_per_step(self) -> int:
        return self.config.train.per_device_train_batch_size * self.config.train.gradient_accumulation_steps

    @property
    def cut(self) -> tuple[int, int]:
        """(samples a micro-batch, micro-batches a step), for the processes that share the step."""
        train = self.config.train
        sizes = train.per_device_train_batch_size, train.gradient_accumulation_steps
        return share_out(*sizes, self.accelerator.num_processes)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: the epochs, rounded up to whole steps, or max_steps if that is less."""
        by_epochs = math.ceil(self.config.train.num_train_epochs * self.order.epoch_length / self.samples_per_step)
        limit = self.config.train.max_steps
        return by_epochs if limit is None else min(limit, by_epochs) if by_epochs else limit

    @property
    def datasets(self) -> list[QADataset]:
        return [self.train_set] if self.validation_set is None else [self.train_set, self.validation_set]

    def epoch(self, step: int) -> float:
        return step * self.samples_per_step / self.order.epoch_length


def rates(config: Config) -> dict[str, float | None]:
    return {key: getattr(config.train, key) for key in set(RATE_KEYS.values())}


def open_run(
    config: Config,
    accelerator: Accelerator,
    precision: str,
    built: Built,
    left_out: dict[Path, np.ndarray],
    say: Callable[[str], None],
) -> Run:
    """The model and its data. left_out: file -> its records that cannot be used. Raises InputError."""
    train_set = open_qa_file(config, built, config.data.qa_file, left_out[config.data.qa_file])
    order = sample_order(config, train_set)
    validation_set, validation_kept = None, np.empty(0, dtype=np.int64)
    if config.data.validation_file is not None:
        path = config.data.validation_file
        validation_set = open_qa_file(config, built, path, left_out[path])
        validation_kept = np.random.default_rng(config.seed).permutation(validation_set.kept)
    ask = answerer(config, built, precision, accelerator.device)
    identity = {"qa_sha256": qa_sha256(config), "records": len(train_set.kept), "precision": precision}
    return Run(
        config, accelerator, built, train_set, order, validation_set, validation_kept, ask, precision, identity, say
    )


def sample_order(config: Config, dataset: QADataset) -> SampleOrder:
    """The order in which the config trains on a dataset."""
    train = config.train
    step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    limit = None if train.steps_per_epoch is None else train.steps_per_epoch * step
    return SampleOrder(dataset.kept, config.seed, source_weights(config, dataset)[dataset.kept], limit)


def source_weights(config: Config, dataset: QADataset) -> np.ndarray:
    """The weight of every record: that of its source in the config, 1 for a source that is not listed there."""
    weights = {source.name: source.weight for source in config.data.sources}
    return np.array([weights.get(name, 1.0) for name in dataset.qa.sources] or [1.0])[dataset.qa.source_of]


def balance_factor(config: Config, model: VisionLanguageModel) -> float:
    """What the experts' balance loss is multiplied by: as the config says, or as the model came with. InputError where the
    config says it of a model without experts."""
    factor = config.train.router_aux_loss_coef
    if model.has_experts:
        return model.causal_lm.config.router_aux_loss_coef if factor is None else factor
    if factor is not None:
        raise InputError(
            f'"train.router_aux_loss_coef" is {factor}, but the language model has no experts to balance; set it to null.'
        )
    return 0.0


def open_loader(run: Run, start_step: int) -> Iterable[dict]:
    """This process's micro-batches from `start_step` to the end. It seeks: nothing before `start_step` is read."""
    accelerator, workers = run.accelerator, run.config.train.num_workers
    steps = range(start_step, run.total_steps)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if run.packed:
        batches = shares(run.order, steps, run.samples_per_step, run.cut[1], rank, world_size)
    else:
        batches = micro_batches(run.order, steps, *run.cut, rank, world_size)
    pin = accelerator.device.type == "cuda"
    return make_loader(run.train_set, batches, run.built.tokenizer.pad_token_id, workers, pin, run.packed)
