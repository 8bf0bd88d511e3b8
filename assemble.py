"""From the config to the parts: what training and answering both need, built in one place, so that they cannot differ."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from config import RATE_KEYS, Config, InputError
from dataset.check import Checked, check_file, check_labels, check_leakage, check_pictures
from dataset.check_report import describe, notes
from dataset.conversation import ChatFormat
from dataset.findings import Findings
from dataset.loader import QADataset, make_loader
from dataset.order import SampleOrder, micro_batches
from dataset.qa_file import QAFile
from model.answer import Answerer
from model.build import PRECISIONS, Built, Processors, autocast, build_model, load_processors, read_pixels
from model.folder import verify_folder

# records whose pictures are decoded and whose labels are read back: at every start, and with --check
START_SAMPLE, CHECK_SAMPLE = 64, 2000


def trainable_words(config: Config) -> dict[str, str]:
    """Part -> frozen | lora | full | top:N."""
    return dataclasses.asdict(config.train.trainable)


def open_processors(config: Config, checkpoint: Path | None = None) -> Processors:
    """What reads pictures and text for the config's model. With a `checkpoint` of this config: its own."""
    model = config.model
    return load_processors(model.vision_tower, model.image_size, model.language_model, checkpoint)


def build(config: Config, precision: str, processors: Processors, checkpoint: Path | None = None) -> Built:
    """The model as the config says. With a `checkpoint` of this config, which the caller has verified: its weights."""
    if checkpoint is None and config.model.start_from is not None:
        verify_folder(config.model.start_from)
    return build_model(
        processors,
        **{f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model) if f.name != "start_from"},
        trainable=trainable_words(config),
        lora=dataclasses.asdict(config.lora),
        dtype=PRECISIONS[precision],
        seed=config.seed,
        checkpoint=checkpoint or config.model.start_from,
        activation_checkpointing=config.train.activation_checkpointing,
    )


def chat_format(config: Config, processors: Processors) -> ChatFormat:
    """The prompt format for the tokenizer and the encoder."""
    chat = ChatFormat(**processors.chat_values(), system_prompt=config.data.system_prompt)
    if processors.num_image_tokens >= config.data.max_length:
        raise InputError(
            f'"data.max_length" is {config.data.max_length}, but one image alone takes '
            f"{processors.num_image_tokens} tokens with this encoder; allow more."
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


def open_qa_file(config: Config, processors: Processors, path: Path) -> QADataset:
    """The samples of a QA file, as the model will get them."""
    reader = functools.partial(read_pixels, processors.image_processor)
    dataset = QADataset(QAFile(path), chat_format(config, processors), reader, config.data.max_length, config.seed)
    if len(dataset) == 0:
        raise InputError(f"{path}: holds no records; expected one JSON object a line.")
    return dataset


def check_data(
    config: Config, processors: Processors | None, findings: Findings, thorough: bool, say: Callable[[str], None]
) -> dict[Path, np.ndarray]:
    """Look at every record of the training and the validation file; what is wrong goes to `findings`. Returns for each file
    the records that are left out because max_length leaves no use for them: they are counted, and listed in a file of the
    run. processors: None where they could not be opened; then nothing is said about tokens. thorough: take larger samples
    and say what the files hold."""
    data = config.data
    chat = None
    if processors is not None:
        with findings.collect():
            chat = chat_format(config, processors)
    options = {"chat": chat, "max_length": data.max_length, "seed": config.seed}
    options["sample_size"] = CHECK_SAMPLE if thorough else START_SAMPLE
    held_out, left_out = None, {}
    for path in [data.validation_file, data.qa_file]:  # the training data are looked up in what is held out
        if path is None:
            continue
        if not path.exists():
            findings.faults.append(
                f'{path}: no such QA file; set "data.qa_file", or list "data.sources" to make it.'
                if path == data.qa_file
                else f'{path}: no such file; set "data.validation_file" to null to do without.'
            )
            continue
        progress = functools.partial(tqdm, desc=f"checking {path.name}", unit=" records", delay=2, leave=False)
        is_held_out = path != data.qa_file
        checked = check_file(path, **options, is_held_out=is_held_out, held_out=held_out, progress=progress)
        pictures = check_pictures(checked)
        lengths = None
        if chat is not None:
            decode = functools.partial(
                processors.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            lengths = check_labels(checked, chat, decode, data.max_length)
        if held_out is not None:
            check_leakage(checked, held_out)
        if is_held_out:
            held_out = checked
        if checked.fault:
            findings.faults.append(checked.fault)
        findings.rows.extend(checked.wrong)
        if thorough:
            say(describe(checked, lengths, pictures, data.max_length) + "\n")
        for note in notes(checked, data.max_refused, thorough):
            say(f"note: {note}")
        left_out[path] = leave_out(config, checked, findings, say)
    return left_out


def leave_out(config: Config, checked: Checked, findings: Findings, say: Callable[[str], None]) -> np.ndarray:
    """The records that max_length leaves no use for: listed in a file of the run, and a finding where they are too many."""
    path, count = checked.path, len(checked.unfit)
    same_folder = config.output_dir == path.parent  # where the list of what preparing refused stands
    listing = config.output_dir / f"{path.stem}{'.run' if same_folder else ''}.refused.jsonl"
    if count == 0:
        listing.unlink(missing_ok=True)  # of an earlier start
    elif count > config.data.max_refused * checked.read or count == checked.read:
        findings.faults.append(
            f'{path}: {count} of {checked.read} records cannot be used, more than "data.max_refused" '
            f"({config.data.max_refused:g}) allows. Raise data.max_length or data.max_refused."
        )
        findings.rows.extend(checked.unfit)
    else:
        checked.unfit.write(listing)
        say(f"note: {path.name}: {count} records are longer than data.max_length allows and are left out: {listing}")
    return np.array(checked.unfit_records, np.int64)


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


def open_run(
    config: Config,
    accelerator: Accelerator,
    precision: str,
    resume_from: Path | None,
    findings: Findings,
    thorough: bool,
    say: Callable[[str], None],
) -> Run:
    """Everything opened and checked: data, model, how they fit. Raises InputError with all of the `findings`, those that
    were there before and the new ones. thorough: check more than a start does, and say what the data hold."""
    processes = accelerator.num_processes
    if config.train.gradient_accumulation_steps % processes:
        raise InputError(
            f'"train.gradient_accumulation_steps" is {config.train.gradient_accumulation_steps}, which {processes} '
            "processes cannot share: a step's micro-batches are divided among them. Make it a multiple of "
            f"{processes} (and the batch size smaller, to keep their product)."
        )
    processors = built = None
    with findings.collect():
        processors = open_processors(config, resume_from)
    left_out = None
    if accelerator.is_main_process:
        left_out = check_data(config, processors, findings, thorough, say)
        findings.save()
    left_out, findings = broadcast_object_list([left_out, findings])
    if not thorough:
        findings.stop()  # at once: weights take long to read
    if processors is not None:
        with findings.collect():
            built = build(config, precision, processors, resume_from)
    findings.stop()
    train_set = open_qa_file(config, processors, config.data.qa_file)
    kept = np.setdiff1d(np.arange(len(train_set)), left_out[config.data.qa_file])
    order = SampleOrder(kept, config.seed, source_weights(config, train_set)[kept])
    validation_set, validation_kept = None, np.empty(0, dtype=np.int64)
    if config.data.validation_file is not None:
        validation_set = open_qa_file(config, processors, config.data.validation_file)
        validation_kept = np.setdiff1d(np.arange(len(validation_set)), left_out[config.data.validation_file])
        validation_kept = np.random.default_rng(config.seed).permutation(validation_kept)
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
