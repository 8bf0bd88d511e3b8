"""The training road, top to bottom.

    python train.py --config config.yaml [key=value ...] [--resume auto|none|DIR] [--stage NAME] [--check]

Prepares the QA file if needed, builds encoder + projector + language model, trains what the config says, saves, and scores
the held-out questions; stage after stage, where the config has stages. `sh train.sh` is this with the environment
prepared.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked after the tokenizer was used

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object
from tqdm import tqdm

from assemble import Run, balance_factor, build, open_loader, open_processors, open_run, rates, trainable_words
from check import check_data, check_folders, look_ahead, prepare_data
from config import DEFAULT_CONFIG, STAGES_FOLDER, Config, InputError, load_config, run_script, to_yaml
from dataprocess.train_tokenizer import learn_if_missing
from dataset.findings import Findings
from dataset.loader import dead_workers_named, make_loader
from dataset.order import share_out
from evaluation.runlog import RunLog
from evaluation.score import Question, questions_of, score, score_table
from interrupt import StopRequest, exit_on_sigterm
from model.answer import Request
from model.build import PRECISIONS, autocast, resolve_precision
from model.parallel import check_equal_weights, gathered, shard
from model.trainable import param_groups, trainable_table
from resume import (
    RunLock,
    best_val_loss,
    find_checkpoint,
    is_finished,
    load_position,
    move_aside,
    on_main,
    record_start,
    save_checkpoint,
    write_best,
    write_final,
)
from speed import attention, attention_name, make_fast, table
from stages import place_of, run_stages
from step import Stepper, full_memory_named, total
from validate import Sums, Validation, add_up, of_sums
from visual.images import ImageError, verify_image


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_trackers(config.train.report_to)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    if arguments.stage:
        place_of(config.train.stages, arguments.stage)  # a name that there is not is refused before anything is opened
    state = PartialState(cpu=not torch.accelerator.is_available())  # torchrun's processes find each other on CPUs too
    ended = (
        run_stages(config, arguments, run_config, look_ahead) if config.train.stages else run_config(config, arguments)
    )
    state.destroy_process_group()
    return ended


def run_config(config: Config, arguments: argparse.Namespace) -> int:
    """One run, from its config to its final/: the whole of it, or a stage."""
    precision = resolve_precision(config.train.precision, PartialState().device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # a stage's peak is its own
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(config.train.report_to) or None,
        project_config=ProjectConfiguration(logging_dir=str(config.output_dir / "tensorboard")),
    )
    if accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise InputError(
            f"{accelerator.distributed_type} is not supported: launch with torchrun, without FSDP or DeepSpeed."
        )
    sizes = config.train.per_device_train_batch_size, config.train.gradient_accumulation_steps
    share_out(*sizes, accelerator.num_processes)  # what cannot be shared is refused before anything is opened
    say = functools.partial(accelerator.print, flush=True)
    with contextlib.nullcontext() if arguments.check else RunLock(config.output_dir, say):
        ended = run_locked(arguments, config, accelerator, precision, say)
    accelerator.free_memory()  # it keeps the optimizer, and with it the weights: a stage may come after this one
    return ended


def run_locked(arguments: argparse.Namespace, config: Config, accelerator: Accelerator, precision: str, say) -> int:
    """What a run does in its folder, which is its own by now."""
    findings = Findings(config.output_dir / "findings.jsonl")
    resume_from = processors = built = left_out = None
    with findings.collect():
        resume_from = find_checkpoint(config, arguments.resume, say)
    if arguments.check:
        check_folders(config.output_dir, findings, say)
    # a run that goes on keeps the records that it began with, whatever has become of their pictures
    prepare_data(config, resume_from is not None, arguments.check, say)
    if size := on_main(lambda: learn_if_missing([config])):
        say(f"learned a tokenizer of {size:,} tokens: {config.model.from_scratch.tokenizer}")
    with findings.collect():
        processors = open_processors(config, resume_from)
    if accelerator.is_main_process:
        left_out = check_data(config, processors, findings, arguments.check, say)
        findings.save()
    left_out, findings = broadcast_object_list([left_out, findings])
    if not arguments.check:
        findings.stop()  # at once: weights take long to read
    if processors is not None:
        with findings.collect():
            flash = attention(config, accelerator.device, precision)
            built = build(config, precision, processors, resume_from, attention_name(flash))
            balance_factor(config, built.model)
    findings.stop()
    run = open_run(config, accelerator, precision, built, left_out, say)
    say(trainable_table(run.built.model, trainable_words(config), rates(config)))
    run, choices = make_fast(run, flash)
    say(table(choices))
    say(
        f"{len(run.order.kept):,} records, {run.order.epoch_length:,} samples an epoch; {run.total_steps:,} steps of "
        f"{run.samples_per_step} samples; {precision} on {accelerator.device}; results in {config.output_dir}"
    )
    if arguments.check:
        say("Checked: config, data and model fit together. Nothing was trained.")
        return 0
    if arguments.resume == "none":
        move_aside(config.output_dir, say)
    elif is_finished(run, resume_from):
        return 0
    start_trackers(run)
    stopped = train(run, resume_from)
    if not stopped:
        finish(run)
    for tracker in accelerator.trackers:
        tracker.finish()
    return 128 + stopped if stopped else 0  # what a shell says of a command that a signal ended


def train(run: Run, resume_from: Path | None) -> int:
    """The loop. Whatever changes from step to step is a pure function of the step (samples, learning rates, dropout's seed)
    or is saved with it (weights, optimizer, loss scaler): an interrupted run goes on as if it had not been. Returns the
    number of the signal that stopped it, 0 where it ran to its end."""
    config, accelerator, settings = run.config, run.accelerator, run.config.train
    model = run.built.model
    check_equal_weights(model)
    if settings.fsdp:
        shard(model, accelerator.device, PRECISIONS[run.precision])
    model.to(accelerator.device)
    groups = param_groups(model, trainable_words(config), rates(config), settings.weight_decay)
    base_rates = [group["lr"] for group in groups]
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(groups, lr=0.0))
    start_step, bad_steps = load_position(run, optimizer, resume_from) if resume_from else (0, 0)
    record_start(run, resume_from, start_step, sys.argv)
    processes = accelerator.num_processes
    log = RunLog(
        config.output_dir, start_step, settings.logging_steps, accelerator.is_main_process, processes, accelerator.log
    )
    lowest = best_val_loss(run)
    context = autocast(run.precision, accelerator.device)
    pad = run.built.tokenizer.pad_token_id
    balance = balance_factor(config, model)
    stepper = Stepper(
        model, optimizer, accelerator, context, config.seed, settings.max_grad_norm, pad, run.encoder, balance
    )
    batches = iter(open_loader(run, start_step))
    micros_here = run.cut[1] // processes  # of a step, in this process
    done = start_step
    model.train()
    progress = tqdm(total=run.total_steps, initial=start_step, unit="step", disable=not accelerator.is_main_process)
    with progress, StopRequest() as asked, dead_workers_named():
        for step in range(start_step, run.total_steps):
            micros = [next(batches) for _ in range(micros_here)]
            factor = learning_rate_factor(step, run.total_steps, settings.warmup_ratio)
            outcome, stop = stepper(step, micros, [rate * factor for rate in base_rates], asked)
            done = step + 1
            bad_steps = bad_steps + 1 if outcome.is_bad else 0
            if outcome.replaced:
                records = gather_object([text for batch in micros for text in batch["replaced"]])
                log.skipped(done, "bad_image", {"records": records})
            if outcome.is_bad:
                ids = gather_object([name for batch in micros for name in batch["ids"]])
                values = {"loss": repr(outcome.loss), "grad_norm": repr(outcome.grad_norm)}  # JSON has no infinity
                log.skipped(done, "not_finite", {**values, "records": ids})
                if bad_steps >= settings.max_bad_steps:
                    stop_for_bad_steps(run, done, bad_steps, ids)
            rates_now = {group["name"]: group["lr"] for group in optimizer.param_groups}
            shown = log.step(done, run.epoch(done), **dataclasses.asdict(outcome), rates=rates_now, batches=micros)
            progress.set_postfix(shown, refresh=False)
            progress.update()
            is_last = done == run.total_steps
            evaluates = run.validation_set is not None and settings.eval_steps
            if evaluates and (is_last or done % settings.eval_steps == 0):
                log.flush()
                found, samples = evaluate(run, done)
                log.validation(done, run.epoch(done), found.values, samples)
                if found.loss < lowest:
                    lowest = found.loss
                    write_best(run, done, found.loss)
            if is_last or stop or (settings.save_steps and done % settings.save_steps == 0):
                log.flush()
                save_checkpoint(run, optimizer, done, bad_steps)
                log.draw()
                log.start_interval()
            if stop:
                break
        else:  # its validation and its saving take long as well
            stop = total(accelerator, [float(bool(asked))])[0] > 0
    if not stop:
        return 0
    run.say(f"stopped after step {done} of {run.total_steps}. It is saved; the same command goes on from there.")
    return asked.signal or signal.SIGTERM  # another process may have been the one that was asked


def stop_for_bad_steps(run: Run, step: int, count: int, ids: list[str]) -> None:
    raise InputError(
        f"step {step}: the loss or its gradient is no number, {count} steps in a row now, here with records "
        f"{', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}; all are in {run.config.output_dir / 'skipped.jsonl'}. "
        "These steps were left out, so the weights are whole. The same command meets the same numbers again: raise "
        "train.max_bad_steps to pass over them, or start anew (--resume none) with lower learning rates or with "
        "train.precision bf16 or fp32."
    )


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """What every rate is multiplied by at `step` (from 0): linear warmup, then a cosine down to 0. A function of the step
    alone, so there is no scheduler whose state could be lost."""
    warmup = round(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a vision-language model as a config says.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument(
        "--resume", default="auto", help="auto: go on from the newest checkpoint; none: anew; or a folder"
    )
    parser.add_argument(
        "--stage", metavar="NAME", help="train this stage alone (default: all of them, one after the other)"
    )
    parser.add_argument("--check", action="store_true", help="open and check everything, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, for example train.lora_lr=2e-4")
    return parser.parse_intermixed_args(argv)


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
        name, group = folder.name, None
        if folder.parent.name == STAGES_FOLDER:
            group = folder.parent.parent.name
            name = f"{group}-{folder.name}"
        wandb = {"dir": str(folder), "name": name, "group": group}
        run.accelerator.init_trackers("vision-language-model", values, {"wandb": wandb})


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested keys as dotted ones with plain values: what trackers take."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(run: Run, step: int) -> tuple[Validation, list[dict]]:
    """(what the held-out records say of the model, a few fixed questions with the model's answers)."""
    model = run.built.model.eval()
    with gathered(model):
        found = validate_held_out(run, run.config.train.eval_samples)
        questions = held_out_questions(run, 4)[:4]
        answers = run.answerer.answer([Request(q.turns, q.images) for q in questions]) if questions else []
    model.train()
    samples = [
        {"id": q.id, "question": q.text, "answer": answer, "reference": q.reference}
        for q, answer in zip(questions, answers, strict=True)
    ]
    lines = [f"  {s['question']}  ->  {s['answer']}   (reference: {s['reference']})" for s in samples]
    if run.accelerator.is_main_process:
        tqdm.write("\n".join([f"step {step}: held-out loss {found.loss:.4f}", *lines]))
    return found, samples


def validate_held_out(run: Run, count: int | None) -> Validation:
    """Of the first `count` held-out records, shared out among the processes. The model is in eval mode, and gathered."""
    accelerator, model = run.accelerator, run.built.model
    mine = run.validation_kept[:count][accelerator.process_index :: accelerator.num_processes]
    size = run.config.train.per_device_train_batch_size
    batches = ([(0, int(i)) for i in mine[start : start + size]] for start in range(0, len(mine), size))
    loader = make_loader(run.validation_set, batches, run.built.tokenizer.pad_token_id, 0, False, run.packed)
    context = autocast(run.precision, accelerator.device)
    sums = add_up(model, loader, accelerator.device, context, run.encoder)
    return of_sums(Sums(*total(accelerator, sums)), model.has_experts)


def held_out_questions(run: Run, count: int | None) -> list[Question]:
    """The questions of the first `count` held-out records; with data.on_bad_image=skip without those whose pictures cannot
    be read, which the main process finds out for all."""
    qa = run.validation_set.qa

    def is_readable(record: int) -> bool:
        try:
            for path in qa.image_paths(qa[record]):
                verify_image(path)
        except ImageError:
            return False
        return True

    records = run.validation_kept[:count].tolist()
    if run.config.data.on_bad_image == "skip":
        records = on_main(lambda: [record for record in records if is_readable(record)])
    return questions_of(qa, records)


def finish(run: Run) -> None:
    """Write final/ (the trained model), score the held-out questions, add the scores to it, print the table."""
    write_final(run, None)
    if run.validation_set is not None:
        questions = held_out_questions(run, run.config.train.score_samples)
        run.say(f"asking {len(questions)} held-out questions, with their pictures and with swapped ones")
        run.built.model.eval()
        with gathered(run.built.model):
            scores, _ = score(questions, functools.partial(answer_shared, run), run.config.seed)
            scores |= validate_held_out(run, run.config.train.score_samples).values
        write_final(run, scores)
        run.say(score_table(scores))
    run.say(f"done: {run.config.output_dir / 'final'}")


def answer_shared(run: Run, questions: list[Question]) -> list[str]:
    """The answers to `questions`, shared out among the processes, in their order on every process."""
    rank, processes = run.accelerator.process_index, run.accelerator.num_processes
    # neighbours stay together: the questions about one picture share its reading
    mine = range(len(questions) * rank // processes, len(questions) * (rank + 1) // processes)
    requests = [Request(questions[i].turns, questions[i].images) for i in mine]
    hidden = not run.accelerator.is_main_process
    answers = run.answerer.answer_all(requests, run.config.test.batch_size, functools.partial(tqdm, disable=hidden))
    gathered = dict(gather_object([(i, answer.text) for i, answer in zip(mine, answers, strict=True)]))
    return [gathered[i] for i in range(len(questions))]


def main_within_memory() -> int:
    """`main`, with a full memory as a message instead of a traceback, and SIGTERM as well."""
    advice = (
        "Make train.per_device_train_batch_size smaller and train.gradient_accumulation_steps larger (the same step), set "
        "train.activation_checkpointing to on, or make data.max_length smaller."
    )
    with exit_on_sigterm(), full_memory_named(advice):
        return main()


if __name__ == "__main__":
    run_script(main_within_memory)
