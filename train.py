"""Train a vision-language model as a config says. `sh train.sh` runs this with the environment prepared.

    python train.py --config config.yaml [key=value ...] [--resume auto|none|DIR] [--extend] [--stage NAME] [--check]

Prepares the QA file if needed, builds encoder, projector and language model, trains, saves, and scores the held-out
questions; stage after stage if the config has stages. The training loop is `train` below.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import math
import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C before run_script, which handles it

from config import DEFAULT_CONFIG, Config, InputError, load_config, refuse_options, run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a vision-language model as a config says.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the YAML file (default: config.yaml)")
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: resume from the newest checkpoint; none: start over; or a checkpoint folder",
    )
    parser.add_argument(
        "--extend", action="store_true", help="resume with more epochs, steps or data than the run began with"
    )
    parser.add_argument("--stage", metavar="NAME", help="train this stage alone (default: all stages, in order)")
    parser.add_argument("--check", action="store_true", help="check config, data and model; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, for example train.lora_lr=2e-4")
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    refuse_options(unknown, known=vars(arguments).keys() - {"overrides"})
    if arguments.extend and arguments.resume == "none":
        raise InputError("--extend resumes a run, and --resume none starts over; give one of them.")
    return arguments


def check_arguments() -> None:
    """Parse the command line and the config. Raises InputError for what is wrong in them."""
    arguments = parse_arguments(None)
    load_config(arguments.config, arguments.overrides)


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("train.main_with_messages", check_arguments)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are forked after the tokenizer was used

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from dataset.batch import Batch
from dataset.workers import explain_dead_workers
from model.hub import check_hub
from training.held_out import evaluate, score_held_out
from training.interrupt import StopRequest, exit_on_sigterm
from training.memory import explain_out_of_memory
from training.open import check_trackers, open_run
from training.parallel import sum_gradients
from training.processes import print_main, process_group, total
from training.resume import save_checkpoint, write_final
from training.run import Run, read_steps
from training.stages import check_stages, open_stages, stage_index
from training.step import Outcome


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    check_trackers(config.train.report_to)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    if arguments.stage:
        stage_index(config.train.stages, arguments.stage)  # reject an unknown stage name early
    check_hub(*(stage.config.model for stage in config.train.stages), config.model)
    with process_group():
        if arguments.check:
            check_stages(config, arguments)
            return 0
        with open_stages(config, arguments) as stages:  # without stages: the config itself, once
            for stage in stages:
                if stopped := train_stage(stage, arguments):
                    return 128 + stopped  # a shell's exit code for a command that a signal ended
    return 0


def train_stage(config: Config, arguments: argparse.Namespace) -> int:
    """Train one config to its final/, and score it. Returns the number of the signal that stopped it, 0 if none did."""
    with open_run(config, arguments) as run:
        if run is None:  # finished before
            return 0
        if arguments.extend and run.position.planned_steps != run.total_steps:
            print_main(describe_extension(run))
        if stopped := train(run):
            # --resume none would start over, and --resume DIR would go back to that checkpoint
            command = "the same command" + ("" if arguments.resume == "auto" else " with --resume auto")
            print_main(
                f"stopped after step {run.position.step} of {run.total_steps}. It is saved; {command} resumes there."
            )
            return stopped
        write_final(run)
        if (scores := score_held_out(run)) is not None:
            write_final(run, scores)
        print_main(f"done: {config.output_dir / 'final'}")
    return 0


def train(run: Run) -> int:
    """Train to the last step, or until a signal. Returns the signal's number, 0 if none came.

    Everything that changes from step to step is either a pure function of the step (samples, learning rates, dropout's seed)
    or saved with it (weights, optimizer, loss scaler). So an interrupted run continues as if it had not been interrupted.
    """
    settings, position, stepper = run.config.train, run.position, run.stepper
    is_main = run.accelerator.is_main_process
    run.model.train()
    progress = tqdm(total=run.total_steps, initial=position.step, unit="step", disable=not is_main)
    with progress, StopRequest() as stop, explain_dead_workers():
        for step, micro_batches in read_steps(run):
            set_learning_rates(run, learning_rate_factor(step, run.total_steps, settings.warmup_ratio))
            losses = stepper.forward_and_backward(step, micro_batches)  # in smaller pieces if memory is full
            sum_gradients(stepper.parameters)  # over processes
            outcome = stepper.clip_and_step(losses, bool(stop))  # no update if the loss or gradient is not finite

            position.step = step + 1
            position.bad_steps = position.bad_steps + 1 if outcome.is_bad else 0
            log_skipped(run, outcome, micro_batches)
            progress.set_postfix(log_step(run, outcome, micro_batches), refresh=False)
            progress.update()

            is_last = position.step == run.total_steps
            evaluates = run.validation_set is not None and settings.eval_steps is not None
            if evaluates and (is_last or is_due(settings.eval_steps, position.step)):
                evaluate(run)
            if is_last or outcome.stop_requested or is_due(settings.save_steps, position.step):
                run.log.flush()
                save_checkpoint(run)
                run.log.draw()
                run.log.start_interval()
            if outcome.stop_requested:
                break
        else:  # a signal may also have come during the last evaluation and save
            if not total(run.accelerator, [float(bool(stop))])[0]:
                return 0
    return stop.signal or signal.SIGTERM  # if this process got no signal, another one did


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return the factor of every learning rate at `step` (from 0): linear warmup, then a cosine down to 0.

    A pure function of the step: no scheduler state can be lost.
    """
    warmup = round(total_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def describe_extension(run: Run) -> str:
    """Return a line about an extended run: every further step has the learning rate that it has in a run of the new length.

    Nothing of the old schedule is kept, so an extended run that is killed and resumed has the same rates.
    """
    step, total_steps, planned = run.position.step, run.total_steps, run.position.planned_steps
    ratio = run.config.train.warmup_ratio
    now = f"{learning_rate_factor(step, total_steps, ratio):.0%} of its peak at step {step + 1}"
    before = f" ({learning_rate_factor(step, planned, ratio):.0%} before)" if planned else ""
    return (
        f"extended to {total_steps:,} steps{f' (planned before: {planned:,})' if planned else ''}: from here on the "
        f"learning rate is that of a run of {total_steps:,} steps, {now}{before}, along the cosine to 0 at the end."
    )


def set_learning_rates(run: Run, factor: float) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def is_due(every: int | None, step: int) -> bool:
    """Return whether `step` is a multiple of `every`; never if that is None."""
    return every is not None and step % every == 0


def log_step(run: Run, outcome: Outcome, micro_batches: list[Batch]) -> dict:
    """Log a step. Returns what the progress bar shows."""
    step = run.position.step
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    return run.log.step(step, run.epoch(step), outcome, learning_rates=rates, micro_batches=micro_batches)


def log_skipped(run: Run, outcome: Outcome, micro_batches: list[Batch]) -> None:
    """Log to skipped.jsonl the replaced records, and the records of a step that did not change the weights. Raises
    InputError after too many bad steps in a row."""
    step, limit = run.position.step, run.config.train.max_bad_steps
    if outcome.replaced:
        records = gather_object([text for batch in micro_batches for text in batch.replaced])
        run.log.skipped(step, "bad_image", {"records": records})
    if not outcome.is_bad and not outcome.has_overflowed:
        return
    ids = gather_object([name for batch in micro_batches for name in batch.ids])
    values = {"loss": repr(outcome.loss), "grad_norm": repr(outcome.grad_norm)}  # JSON has no infinity
    run.log.skipped(step, "fp16_overflow" if outcome.has_overflowed else "not_finite", {**values, "records": ids})
    if run.position.bad_steps >= limit:
        raise InputError(
            f"step {step}: loss or gradient not finite for {run.position.bad_steps} steps in a row, here with records "
            f"{', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''}; all of them are in "
            f"{run.config.output_dir / 'skipped.jsonl'}. These steps did not change the weights. The same command would "
            "meet the same numbers again: raise train.max_bad_steps to skip these steps, or start over (--resume none) "
            "with lower learning rates or with train.precision bf16 or fp32."
        )


def main_with_messages() -> int:
    """Run `main`, with a message instead of a traceback when memory is full, and end on SIGTERM."""
    advice = (
        "Make train.per_device_train_batch_size smaller and train.gradient_accumulation_steps larger (the same step), set "
        "train.activation_checkpointing to on, or make data.max_length smaller."
    )
    with exit_on_sigterm(), explain_out_of_memory(advice):
        return main()
