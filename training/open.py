"""Open a run: lock its folder, check its data, build its model, find its position; or report every fault at once."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list
from transformers import PreTrainedConfig

import qwen
from config import STAGES_FOLDER, Config, InputError, choose, nearest_path, printable, to_yaml
from dataprocess.train_tokenizer import learn_if_missing
from dataset.checks.findings import Findings
from dataset.open import sample_order
from dataset.order import split_step
from model.build import PRECISIONS, Built, autocast, resolve_precision
from model.model import VisionLanguageModel
from model.projector import PROJECTORS
from model.trainable import param_groups, trainable_table
from training.calibrate import start_projector
from training.digests import equal_sha256, released_digests
from training.log import RunLog
from training.parallel import check_equal_weights
from training.prepare import check_checkpoints, check_data, prepare_data
from training.processes import faults_of_all, on_main, print_main
from training.provenance import compare_start, compare_start_weights
from training.resume import (
    check_shared,
    find_checkpoint,
    is_finished,
    load_position,
    lowest_val_loss,
    record_start,
)
from training.run import Run, few_steps_note, open_answerer, open_model, open_processors, open_qa_file
from training.run_folder import RunLock, check_owner, check_writable, go_back, move_aside
from training.sharding import shard
from training.speed import apply_speed_choices, attention, attention_name, choices_table
from training.state import Position
from training.step import Stepper


@contextlib.contextmanager
def open_run(config: Config, arguments: argparse.Namespace) -> Iterator[Run | None]:
    """Yield the run of `config`, ready to train from its position; None if it is finished already.

    arguments: train.py's command line. The run's folder is locked until the context ends. Raises InputError with everything
    that is wrong.
    """
    accelerator, precision = _start_accelerator(config)
    with RunLock(config.output_dir):
        resume_from, run = _assemble(config, arguments, accelerator, precision=precision)
        if arguments.resume == "none":
            move_aside(config.output_dir)
        if arguments.resume != "none" and is_finished(run, resume_from):
            yield None
        else:
            _start_training(run, resume_from, arguments)
            _start_trackers(run)
            yield run
            for tracker in accelerator.trackers:
                tracker.finish()
    accelerator.free_memory()  # it holds the optimizer, and with it the weights; another stage may follow


def check_run(config: Config, arguments: argparse.Namespace) -> None:
    """Check config, data, checkpoints and model of a run, and print what would train. Trains nothing.

    Raises InputError with everything that is wrong.
    """
    accelerator, precision = _start_accelerator(config)
    _assemble(config, arguments, accelerator, precision=precision)
    print_main("Checked: config, data and model fit together. Nothing was trained.")
    accelerator.free_memory()


def check_settings(config: Config) -> None:
    """Find the mistakes in a config that need no data and no weights to be seen. Takes milliseconds.

    These are models that do not exist, an unknown projector, LoRA for layers that the language model lacks, and a folder for
    results that cannot be written. Raises InputError with all of them.
    """

    def look() -> None:
        model, faults = config.model, Findings(config.output_dir / "findings.jsonl")
        faults.faults = _missing({"vision_tower": model.vision_tower, "language_model": model.language_model})
        lora: Any = PreTrainedConfig()
        with faults.collect():
            choose(PROJECTORS, model.projector, "model.projector")
        if config.train.trainable.language_model.kind == "lora":
            lora.model_type = "" if model.from_scratch is None else model.from_scratch.architecture
            if model.language_model is not None and os.path.isdir(model.language_model):
                with contextlib.suppress(
                    OSError, ValueError
                ):  # a config that cannot be read is reported when it is loaded
                    values, _ = PreTrainedConfig.get_config_dict(model.language_model)
                    lora.model_type = str(values.get("model_type"))
            with faults.collect():
                if lora.model_type:
                    qwen.lora_target_modules(lora, config.lora.target_modules)
        with faults.collect():
            check_writable(config.output_dir)
        if faults.faults:
            raise InputError("\n".join(faults.faults))

    on_main(look)


def _check_start(config: Config) -> None:
    """Raise InputError if what a new run starts from does not exist. A run that resumes no longer needs it."""
    model = config.model
    missing = _missing({"start_from": model.start_from})
    if model.from_scratch is not None and model.from_scratch.vocab_size is None and model.start_from is None:
        missing += _missing({"from_scratch.tokenizer": model.from_scratch.tokenizer})
    if missing:
        raise InputError("\n".join(missing))


def _missing(named: Mapping[str, str | Path | None]) -> list[str]:
    """Return a fault for each folder that does not exist. named: key of the section `model` -> folder or hub name."""
    return [
        f'"model.{key}": {path} does not exist{nearest_path(Path(path))}'
        for key, path in named.items()
        if path is not None and os.path.isabs(path) and not os.path.exists(path)
    ]


def check_trackers(names: Sequence[str]) -> None:
    """Raise InputError for a tracker of train.report_to that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f'"train.report_to" names {name}, which is not installed: {sys.executable} -m pip install {name}, or leave '
                "it out."
            )


def _start_accelerator(config: Config) -> tuple[Accelerator, str]:
    """Return the accelerator and the precision."""
    precision = resolve_precision(config.train.precision, PartialState().device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # each stage reports its own peak
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        # accelerate would divide every loss by ACCELERATE_GRADIENT_ACCUMULATION_STEPS, if the environment sets it
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=list(config.train.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(config.output_dir / "tensorboard")),
    )
    if accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(
            f"{accelerator.distributed_type} is not supported: launch with torchrun, not with accelerate's FSDP or "
            "DeepSpeed; train.fsdp shards the weights."
        )
    train = config.train
    # reject a step that cannot be shared evenly before anything is opened
    split_step(train.per_device_train_batch_size, train.gradient_accumulation_steps, accelerator.num_processes)
    return accelerator, precision


def _assemble(
    config: Config, arguments: argparse.Namespace, accelerator: Accelerator, precision: str
) -> tuple[Path | None, Run]:
    """Prepare and check the data, build the model. Returns (the checkpoint to resume from, the run)."""
    findings = Findings(config.output_dir / "findings.jsonl")
    resume_from = processors = built = left_out = None
    check_settings(config)
    on_main(lambda: check_owner(config.output_dir))
    # before data are prepared: a checkpoint of another config must not lose its QA file
    resume_from = find_checkpoint(config, arguments.resume, arguments.extend)
    keeps_data = resume_from is not None and not arguments.extend
    if resume_from is None:
        on_main(lambda: _check_start(config))
    if resume_from is None and config.model.start_from is not None:
        check_shared(config.model.start_from)
        with findings.collect():
            on_main(lambda: compare_start(config))
    if arguments.check:
        check_checkpoints(config.output_dir, findings)
    # a resumed run keeps the records that it began with, even if image files have changed
    prepare_data(config, resumes=keeps_data, check=arguments.check)
    if size := on_main(lambda: learn_if_missing([config])):
        assert config.model.from_scratch is not None
        print_main(f"learned a tokenizer of {size:,} tokens: {config.model.from_scratch.tokenizer}")
    with findings.collect():
        processors = open_processors(config, resume_from)
    findings.faults = faults_of_all(findings.faults)
    if accelerator.is_main_process:
        left_out = check_data(config, processors, findings, thorough=arguments.check, resumes=keeps_data)
        findings.save()
    left_out, findings = broadcast_object_list([left_out, findings])
    if not arguments.check:
        findings.stop()  # before weights are read, which takes long
    flash = None
    if processors is not None:
        with findings.collect():
            flash = attention(config, accelerator.device, precision)
            built = open_model(
                config, precision, processors, checkpoint=resume_from, attn_implementation=attention_name(flash)
            )
            router_loss_factor(config, built.model)  # raises for a coefficient without experts
    findings.faults = faults_of_all(findings.faults)
    findings.stop()
    assert built is not None and flash is not None and left_out is not None
    digests = released_digests(config.model, config.output_dir)
    if resume_from is None and config.model.start_from is not None:
        on_main(lambda: compare_start_weights(config, digests))
        print_main("\n".join(map(printable, built.start_report)))
    run = _run(config, accelerator, precision, built=built, left_out=left_out, digests=digests)
    print_main(trainable_table(run.model, config.train))
    print_main(choices_table(apply_speed_choices(run, flash)))
    print_main(
        f"{len(run.order.kept):,} records, {run.order.epoch_length:,} samples an epoch; {run.total_steps:,} steps of "
        f"{run.samples_per_step} samples; {precision} on {accelerator.device}; results in {config.output_dir}"
    )
    if note := few_steps_note(config.train, run.total_steps):
        print_main(note)
    return resume_from, run


def _run(
    config: Config,
    accelerator: Accelerator,
    precision: str,
    *,
    built: Built,
    left_out: dict[Path, np.ndarray],
    digests: dict[str, str],
) -> Run:
    """Open the data and put the run together. left_out: file -> its records that cannot be used. digests: of the released
    weights. Raises InputError if processes have different data."""
    train, data = config.train, config.data
    qa_sha256 = equal_sha256(data.qa_file)
    validation_sha256 = None if data.validation_file is None else equal_sha256(data.validation_file)
    train_set = open_qa_file(config, built, data.qa_file, left_out=left_out[data.qa_file], is_training=True)
    samples_per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    epoch_limit = None if train.steps_per_epoch is None else train.steps_per_epoch * samples_per_step
    validation_set, validation_records = None, np.empty(0, dtype=np.int64)
    if data.validation_file is not None:
        validation_set = open_qa_file(config, built, data.validation_file, left_out=left_out[data.validation_file])
        validation_records = np.random.default_rng(config.seed).permutation(validation_set.kept)
    return Run(
        config=config,
        accelerator=accelerator,
        precision=precision,
        built=built,
        train_set=train_set,
        order=sample_order(train_set, data, seed=config.seed, epoch_limit=epoch_limit),
        validation_set=validation_set,
        validation_records=validation_records,
        answerer=open_answerer(config, built, precision, device=accelerator.device),
        fingerprint={
            "qa_sha256": qa_sha256,
            "records": len(train_set.kept),
            "precision": precision,
            **digests,
        },
        validation_sha256=validation_sha256,
    )


def _start_training(run: Run, resume_from: Path | None, arguments: argparse.Namespace) -> None:
    """Move the model to its device, make the optimizer, load the position, open the log.

    If the user chose `resume_from`, later results in the run's folder move aside.
    """
    config, accelerator, model = run.config, run.accelerator, run.model
    if resume_from is None:
        start_projector(run)
    check_equal_weights(model)
    if config.train.fsdp:
        shard(model, accelerator.device, PRECISIONS[run.precision])
    model.to(accelerator.device)
    groups = [group | {"base_lr": group["lr"]} for group in param_groups(model, config.train)]
    run.optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(groups, lr=0.0))
    run.position = load_position(run, resume_from, arguments.extend) if resume_from else Position()
    if resume_from is not None and arguments.resume != "auto":
        go_back(config.output_dir, resume_from, run.position.step)
    record_start(run, resume_from, sys.argv)
    run.log = RunLog(
        config.output_dir,
        run.position.step,
        logging_steps=config.train.logging_steps,
        writes=accelerator.is_main_process,
        processes=accelerator.num_processes,
        track=accelerator.log,
    )
    run.position.lowest_val_loss = lowest_val_loss(config.output_dir, run.validation_sha256)
    run.stepper = Stepper(
        model=model,
        optimizer=run.optimizer,
        accelerator=accelerator,
        autocast=autocast(run.precision, accelerator.device),
        seed=config.seed,
        max_grad_norm=config.train.max_grad_norm,
        encoder=run.encoder,
        balance_factor=router_loss_factor(config, model),
    )


def router_loss_factor(config: Config, model: VisionLanguageModel) -> float:
    """Return the coefficient of the experts' balance loss: the config's, or the model's own.

    Raises InputError if the config sets it for a model without experts.
    """
    factor = config.train.router_aux_loss_coef
    if model.has_experts:
        return model.causal_lm.config.router_aux_loss_coef if factor is None else factor
    if factor is not None:
        raise InputError(
            f'"train.router_aux_loss_coef" is {factor}, but the language model has no experts to balance; set it to null.'
        )
    return 0.0


def _start_trackers(run: Run) -> None:
    """Start TensorBoard in <run>/tensorboard and wandb in <run>/wandb.

    TensorBoard then hides the rows of an earlier start whose steps are repeated. In wandb each start is a run of its own.
    """
    if not run.config.train.report_to:
        return
    folder = run.config.output_dir
    folder.mkdir(parents=True, exist_ok=True)  # wandb would write elsewhere if it did not exist
    name, group = folder.name, None
    if folder.parent.name == STAGES_FOLDER:
        group = folder.parent.parent.name
        name = f"{group}-{folder.name}"
    wandb = {"dir": str(folder), "name": name, "group": group}
    values = _flatten(yaml.safe_load(to_yaml(run.config, relative_to=folder)))
    tensorboard = {"purge_step": run.position.step + 1} if run.position.step else {}
    run.accelerator.init_trackers("vision-language-model", values, {"wandb": wandb, "tensorboard": tensorboard})


def _flatten(values: dict, prefix: str = "") -> dict:
    """Return nested keys as dotted ones with values as text, as trackers take them."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
