"""The training road, top to bottom.

    python train.py --config config.yaml [key=value ...] [--resume auto|none|DIR] [--check]

Prepares the QA file if needed, builds encoder + projector + language model, trains what the config says, saves, and scores
the held-out questions. `sh train.sh` is this with the environment prepared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked after the tokenizer was used

import numpy as np
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, gather_object
from tqdm import tqdm

from assemble import Run, open_loader, open_run, rates, trainable_words
from config import DEFAULT_CONFIG, IGNORE_INDEX, InputError, load_config, run_script, to_yaml
from dataprocess.process_image import prepare_from_config
from dataprocess.report import summary
from dataset.check_report import refused_rows
from dataset.findings import Findings
from dataset.loader import make_loader
from evaluation.runlog import RunLog
from evaluation.score import Question, questions_of, score, score_table
from model.answer import Request
from model.build import autocast, resolve_precision
from model.folder import verify_folder
from model.trainable import param_groups, trainable_table
from resume import find_checkpoint, is_finished, load_position, move_aside, save_checkpoint, write_final


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_trackers(config.train.report_to)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    on_cpu = not torch.accelerator.is_available()  # said aloud, torchrun's processes find each other on CPUs too
    precision = resolve_precision(config.train.precision, PartialState(cpu=on_cpu).device)
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(config.train.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(config.output_dir / "tensorboard")),
    )
    if accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(
            f"{accelerator.distributed_type} is not supported: launch with torchrun, without FSDP or DeepSpeed."
        )
    say = functools.partial(accelerator.print, flush=True)
    try:
        with accelerator.main_process_first():
            report = prepare_from_config(config)
        if report is not None:
            say(summary(report))
    finally:  # the list of refused records stands there whether they were too many or not
        if arguments.check and config.data.sources:
            say(refused_rows(config.data.qa_file.with_suffix(".refused.jsonl")), end="")
    findings, resume_from = Findings(config.output_dir / "findings.jsonl"), None
    with findings.collect():
        resume_from = find_checkpoint(config, arguments.resume, say)
    if arguments.check:
        check_folders(config.output_dir, findings, say)
    run = open_run(config, accelerator, precision, resume_from, findings, arguments.check, say)
    say(trainable_table(run.built.model, trainable_words(config), rates(config)))
    say(
        f"{len(run.order.kept):,} records, {run.order.epoch_length:,} samples an epoch; {run.total_steps:,} steps of "
        f"{run.samples_per_step} samples; {precision} on {accelerator.device}; results in {config.output_dir}"
    )
    if arguments.check:
        say("Checked: config, data and model fit together. Nothing was trained.")
        return 0
    if arguments.resume == "none":
        move_aside(config.output_dir, accelerator, say)
    elif is_finished(run, resume_from):
        return 0
    start_trackers(run)
    train(run, resume_from)
    finish(run)
    accelerator.end_training()
    return 0


def train(run: Run, resume_from: Path | None) -> None:
    """The loop. Whatever changes from step to step is a pure function of the step (samples, learning rates, dropout's seed)
    or is saved with it (weights, optimizer, loss scaler): an interrupted run goes on as if it had not been."""
    config, accelerator, settings = run.config, run.accelerator, run.config.train
    groups = param_groups(run.built.model, trainable_words(config), rates(config), settings.weight_decay)
    base_rates = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    model, optimizer = accelerator.prepare(run.built.model, torch.optim.AdamW(groups, lr=0.0))
    start_step = load_position(run, optimizer, resume_from) if resume_from else 0
    log = RunLog(
        config.output_dir,
        start_step,
        settings.logging_steps,
        accelerator.is_main_process,
        accelerator.num_processes,
        accelerator.log,
    )
    batches = iter(open_loader(run, start_step))
    micros = settings.gradient_accumulation_steps // accelerator.num_processes  # of a step, in this process
    model.train()
    progress = tqdm(total=run.total_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process)
    for step in range(start_step, run.total_steps):
        step_batches = [next(batches) for _ in range(micros)]
        targets = int(total(accelerator, sum(int((b["labels"][:, 1:] != IGNORE_INDEX).sum()) for b in step_batches)))
        loss = 0.0
        for i, batch in enumerate(step_batches):
            seed_dropout(config.seed, step, micro=i * accelerator.num_processes + accelerator.process_index)
            with contextlib.nullcontext() if i == micros - 1 else accelerator.no_sync(model):
                loss_sum = model(**on_device(batch, accelerator.device))
                # every answer token of the step weighs the same; DDP takes the mean over processes, so undo that
                accelerator.backward(loss_sum * (accelerator.num_processes / targets))
            loss += loss_sum.detach().float()
        loss = total(accelerator, loss) / targets
        stop_if_not_finite(loss, step + 1, step_batches)
        factor = learning_rate_factor(step, run.total_steps, settings.warmup_ratio)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        grad_norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf))
        if accelerator.scaler is None:  # fp16's scaler leaves such a step out and lowers its scale
            stop_if_not_finite(grad_norm, step + 1, step_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        rates_now = {group["name"]: group["lr"] for group in optimizer.param_groups}
        shown = log.step(done, run.epoch(done), loss, grad_norm, rates_now, targets, step_batches)
        progress.set_postfix(shown, refresh=False)
        progress.update()
        is_last = done == run.total_steps
        evaluates = run.validation_set is not None and settings.eval_steps
        if evaluates and (is_last or done % settings.eval_steps == 0):
            log.flush()
            log.validation(done, run.epoch(done), *evaluate(run, done))
        if is_last or (settings.save_steps and done % settings.save_steps == 0):
            log.flush()
            save_checkpoint(run, optimizer, done)
            log.draw()
            log.start_interval()
    progress.close()


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """What every rate is multiplied by at `step` (from 0): linear warmup, then a cosine down to 0. A function of the step
    alone, so there is no scheduler whose state could be lost."""
    warmup = round(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def seed_dropout(seed: int, step: int, micro: int) -> None:
    """Dropout's random numbers belong to the micro-batch, whoever computes it and whenever: nothing to save, and the same on
    one process or four."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro)).generate_state(1)[0]))


def stop_if_not_finite(value: float, step: int, batches: list[dict]) -> None:
    """InputError where a loss or a gradient norm is no number any more: before the weights are touched."""
    if not math.isfinite(value):
        names = [name for batch in batches for name in batch["ids"]]
        raise InputError(
            f"step {step}: the loss or its gradient is {value}, with records {', '.join(names[:8])}. Lower the learning "
            "rates, or set train.precision to bf16 or fp32; the last checkpoint is from before this step."
        )


def total(accelerator: Accelerator, value: float | torch.Tensor) -> float:
    """The sum over all processes."""
    value = torch.as_tensor(value, dtype=torch.float64 if accelerator.device.type != "mps" else None)
    return accelerator.reduce(value.to(accelerator.device), reduction="sum").item()


def on_device(batch: dict, device: torch.device) -> dict:
    """The tensors that the model takes, on its device."""
    tensors = {key: value for key, value in batch.items() if key != "ids"}
    return {k: None if v is None else v.to(device, non_blocking=True) for k, v in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a vision-language model as a config says.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument(
        "--resume", default="auto", help="auto: go on from the newest checkpoint; none: anew; or a folder"
    )
    parser.add_argument("--check", action="store_true", help="open and check everything, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, for example train.lora_lr=2e-4")
    return parser.parse_intermixed_args(argv)


def check_folders(output_dir: Path, findings: Findings, say) -> None:
    """Compare every checkpoint of a run with its hashes."""
    for folder in sorted([*output_dir.glob("checkpoint-*"), *output_dir.glob("final")]):
        with findings.collect():
            verify_folder(folder)
            say(f"{folder}: whole")


def check_trackers(names: Sequence[str]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f'"train.report_to" names {name}, which is not installed: pip install {name}, or leave it out.'
            )


def start_trackers(run: Run) -> None:
    """TensorBoard writes into <run>/tensorboard, wandb into <run>/wandb."""
    if run.config.train.report_to:
        folder = run.config.output_dir
        folder.mkdir(parents=True, exist_ok=True)  # wandb would go elsewhere if it were not there
        values = flatten(yaml.safe_load(to_yaml(run.config)))
        run.accelerator.init_trackers(
            "vision-language-model", values, {"wandb": {"dir": str(folder), "name": folder.name}}
        )


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested keys as dotted ones with plain values: what trackers take."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run: Run, step: int) -> tuple[float, list[dict]]:
    """(loss per answer token on held-out records, a few fixed questions with the model's answers)."""
    accelerator, settings = run.accelerator, run.config.train
    model = run.built.model.eval()
    chosen = run.validation_kept[: settings.eval_samples]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    size = settings.per_device_train_batch_size
    batches = ([(0, int(i)) for i in mine[start : start + size]] for start in range(0, len(mine), size))
    loss, targets = 0.0, 0
    for batch in make_loader(run.validation_set, batches, run.built.tokenizer.pad_token_id, 0, False):
        with autocast(run.precision, accelerator.device)():
            loss += model(**on_device(batch, accelerator.device)).float()
        targets += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    val_loss = total(accelerator, loss) / total(accelerator, targets)
    model.train()

    questions = questions_of(run.validation_set.qa, run.validation_kept[:4].tolist())[:4]
    answers = run.answerer.answer([Request(q.turns, q.images) for q in questions])
    samples = [
        {"id": q.id, "question": q.text, "answer": answer, "reference": q.reference}
        for q, answer in zip(questions, answers, strict=True)
    ]
    lines = [f"  {s['question']}  ->  {s['answer']}   (reference: {s['reference']})" for s in samples]
    if accelerator.is_main_process:
        tqdm.write("\n".join([f"step {step}: held-out loss {val_loss:.4f}", *lines]))
    return val_loss, samples


def finish(run: Run) -> None:
    """Write final/ (the trained model), score the held-out questions, add the scores to it, print the table."""
    write_final(run, None)
    if run.validation_set is not None:
        chosen = run.validation_kept[: run.config.train.score_samples].tolist()
        questions = questions_of(run.validation_set.qa, chosen)
        run.say(f"asking {len(questions)} held-out questions, with their pictures and with swapped ones")
        scores, _ = score(questions, functools.partial(answer_shared, run), run.config.seed)
        write_final(run, scores)
        run.say(score_table(scores))
    run.say(f"done: {run.config.output_dir / 'final'}")


def answer_shared(run: Run, questions: list[Question]) -> list[str]:
    """The answers to `questions`, shared out among the processes, in their order on every process."""
    mine = range(run.accelerator.process_index, len(questions), run.accelerator.num_processes)
    requests = [Request(questions[i].turns, questions[i].images) for i in mine]
    hidden = not run.accelerator.is_main_process
    answers = run.answerer.answer_all(requests, run.config.test.batch_size, functools.partial(tqdm, disable=hidden))
    gathered = dict(gather_object([(i, answer.text) for i, answer in zip(mine, answers, strict=True)]))
    return [gathered[i] for i in range(len(questions))]


def main_within_memory() -> int:
    """`main`, with a full GPU as a message instead of a traceback."""
    try:
        return main()
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the GPU's memory is full ({str(error).split('.')[0]}). Make train.per_device_train_batch_size smaller and "
            "train.gradient_accumulation_steps larger (the same step), set train.activation_checkpointing to true, or "
            "make data.max_length smaller."
        ) from None


if __name__ == "__main__":
    run_script(main_within_memory)
