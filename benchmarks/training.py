"""What a training step costs, beside what a user would take instead: `python -m benchmarks.training`.

Each way runs in a process of its own, by turns, on the same weights, samples, batches and learning rates. Only steps are
measured, from the end of a warm-up on, including reading the images. In fp32 the losses must be equal, or this stops.

Prints Markdown. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import operator
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

import train
from benchmarks.measuring import Meter, machine, make_parser, measure_by_turns, median_of, open_workdir, table
from benchmarks.models import SIZES
from benchmarks.ours import watch_steps
from benchmarks.peers import llava_twin, padded_inputs, sort_by_length, train_peer
from benchmarks.workload import write_workload
from config import IGNORE_INDEX, Config, load_config
from dataset.batch import collate
from dataset.conversation import Encoded
from dataset.loader import Key, QADataset
from dataset.open import sample_order
from dataset.record import Record
from training.log import read_rows
from training.run import open_model, open_processors, open_qa_file

NAMES = {
    "ours": "ours, first epoch",
    "ours-cached": "ours, cached features",
    "hf": "Trainer + LLaVA + PEFT",
    "hf-sorted": "the same, sorted by length",
    "trl": "TRL's SFTTrainer",
    "trl-no-checkpointing": "the same, no checkpointing",
}
CLOCKS = ("cpu", "wall")
OTHER_BATCHES = ("hf-sorted",)  # whose losses differ, therefore
TOLERANCE = 1e-5  # between two losses of the same step, in fp32


# ---------------------------------------------------------------------------------------------------------------------
# The ways, each in a process of its own


EncodedSample = tuple[Key, Record, Encoded]  # the arguments of `QADataset.read`, which reads its images


def first_samples(config: Config, steps: int) -> tuple[QADataset, list[EncodedSample]]:
    """Return the samples of the first `steps` steps of our run in their order, and their dataset."""
    dataset = open_qa_file(config, open_processors(config), config.data.qa_file)
    order = sample_order(dataset, config.data, seed=config.seed)
    keys = [order.at(position) for position in range(steps * config.train.per_device_train_batch_size)]
    return dataset, [(key, *dataset.encode(key)) for key in keys]


def answer(meter: Meter, samples: Sequence[EncodedSample], losses: Sequence[Tensor | float]) -> dict:
    """Return the cost of the measured steps, what they learned from (samples, tokens without padding, tokens of answers), and
    the losses of all steps. samples: of all steps."""
    first = meter.warm_up * len(samples) // meter.steps
    measured = [encoded for _, _, encoded in samples[first:]]
    return meter.cost | {
        "samples": len(measured),
        "tokens": sum(len(encoded.input_ids) for encoded in measured),
        "targets": sum(label != IGNORE_INDEX for encoded in measured for label in encoded.labels),
        "losses": [float(loss) for loss in losses],
    }


def ours(arguments: argparse.Namespace, cached: bool = False) -> dict:
    """Run `train.main`. cached: with the encoder's features on disk, as they are from the second epoch on."""
    meter = Meter(arguments.steps, arguments.warmup)
    folder = arguments.workdir
    if not cached:
        shutil.rmtree(folder / "qa.features", ignore_errors=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    values = {
        "output_dir": folder / "run",
        "train.cache_features": "on",
        "train.precision": arguments.precision,
        "train.max_steps": arguments.steps,
        "train.num_threads": arguments.threads,
        "train.num_workers": arguments.workers,
    }

    @contextlib.contextmanager
    def count(*_) -> Iterator[None]:
        yield
        meter.step_done()

    with watch_steps(count):
        train.main(["--config", str(folder / "config.yaml"), *(f"{key}={value}" for key, value in values.items())])
    _, samples = first_samples(load_config(folder / "config.yaml"), arguments.steps)
    return answer(meter, samples, [row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl")])


def peer(arguments: argparse.Namespace, by_length: bool = False, **options) -> dict:
    """Train LLaVA on the same samples. by_length: see `sort_by_length`; options: see `train_peer`."""
    meter = Meter(arguments.steps, arguments.warmup)
    config = load_config(arguments.workdir / "config.yaml")
    size = config.train.per_device_train_batch_size
    dataset, samples = first_samples(config, arguments.steps)
    if by_length:
        samples = [samples[i] for i in sort_by_length([len(encoded.input_ids) for _, _, encoded in samples], size)]
    built = open_model(config, arguments.precision, open_processors(config))
    model, pad_token_id = llava_twin(built.model), built.tokenizer.pad_token_id
    del built  # before the steps, whose memory is measured
    losses: list[Tensor | float] = []

    def after_step(loss: Tensor | float) -> bool:
        losses.append(loss)
        meter.step_done()
        return False

    train_peer(
        model,
        lambda numbers: padded_inputs(collate([dataset.read(*samples[i]) for i in numbers], pad_token_id)),
        len(samples),
        after_step,
        output_dir=str(arguments.workdir / "peer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=size,
        lr_scheduler_type="cosine",
        bf16=arguments.precision == "bf16",
        dataloader_num_workers=arguments.workers,
        **options,
    )
    return answer(meter, samples, losses)


WAYS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "ours": ours,
    "ours-cached": functools.partial(ours, cached=True),
    "hf": peer,
    "hf-sorted": functools.partial(peer, by_length=True),
    "trl": functools.partial(peer, use_trl=True),
    "trl-no-checkpointing": functools.partial(peer, use_trl=True, gradient_checkpointing=False),
}


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def speed(answer: dict, clock: str) -> float:
    """Return tokens per second of `clock`, cpu or wall. Padding does not count."""
    return answer["tokens"] / answer[clock]


def largest_differences(answers: dict[str, list[dict]]) -> dict[str, float]:
    """Return how far the losses of each way are from ours, at the worst step of all rounds. Ways whose batches differ are
    left out."""
    reference = answers["ours"][0]["losses"]
    return {
        name: float(np.abs(np.subtract([answer["losses"] for answer in found], reference)).max())
        for name, found in answers.items()
        if name not in OTHER_BATCHES
    }


def check_losses(answers: dict[str, list[dict]]) -> None:
    """Raise ValueError if two ways do not learn the same in fp32."""
    for name, difference in largest_differences(answers).items():
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name}: its losses differ from ours by up to {difference:.1e}; rounding explains {TOLERANCE}"
            )


def markdown(answers: dict[str, list[dict]], settings: str) -> str:
    first = next(iter(answers.values()))
    one = first[0]
    head = [
        "", "CPU ms a sample", "ms a sample", "peak MiB", "above imports", "ours: times its speed, CPU", "wall",
        "ours, cached: CPU", "wall", "ours: of its memory",
    ]  # fmt: skip
    rows = []
    for name, found in answers.items():
        cells = [f"{median(1000 * answer[clock] / answer['samples'] for answer in found):,.0f}" for clock in CLOCKS]
        cells += [f"{median(answer[key] for answer in found):,.0f}" for key in ("memory", "memory_above")]
        for way in ("ours", "ours-cached"):
            cells += [ratio(answers.get(way), found, functools.partial(speed, clock=clock)) for clock in CLOCKS]
        cells.append(ratio(answers.get("ours"), found, operator.itemgetter("memory")))
        rows.append([NAMES[name], *cells])
    text = (
        f"{machine()}; {settings}; {median_of(len(first))}. {one['samples']} samples of "
        f"{one['tokens'] / one['samples']:.0f} tokens, {one['targets'] / one['tokens']:.0%} of them in answers.\n\n"
        f"{table(head, rows)}"
    )
    if "ours" in answers:
        texts = [f"{NAMES[name]} {value:.1e}" for name, value in largest_differences(answers).items() if name != "ours"]
        steps = f"{len(one['losses'])} steps with updates"
        text += f"\n\nLosses of {steps}, largest difference from ours: {', '.join(texts)}."
    return text


def ratio(ours: list[dict] | None, theirs: list[dict], value: Callable[[dict], float]) -> str:
    """Return the median of the ratios of each round."""
    return f"{median(value(a) / value(b) for a, b in zip(ours, theirs, strict=True)):.2f}" if ours else "-"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("What a training step costs, ours and others'.", NAMES)
    parser.add_argument("--workload", choices=("W1", "W2"), default="W2", help="vocabulary 151,936 or 12,288")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=24, help="with the warm-up (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not measured (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's, in every way (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images; 0: the one that trains")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--append-json", type=Path, metavar="FILE", help="append a line with all measurements")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.workload, arguments.steps, arguments.warmup, arguments.rounds = "tiny", 3, 1, 1
    if not 0 < arguments.warmup < arguments.steps:
        parser.error("--warmup must be at least 1 and less than --steps")
    if arguments.only is None:
        arguments.only = [name for name in NAMES if "trl" not in name or importlib.util.find_spec("trl")]
    if unknown := set(arguments.only) - set(NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; known: {', '.join(NAMES)}")
    if "ours-cached" in arguments.only and "ours" not in arguments.only:
        parser.error("--only: ours-cached needs ours, which fills the cache")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.measure:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(WAYS[arguments.measure](arguments)))
        return
    with open_workdir(arguments.workdir) as workdir:
        folder = workdir / arguments.workload
        write_workload(folder, arguments.workload, arguments.steps * SIZES[arguments.workload].batch_size)
        options = [
            f"--{name}={getattr(arguments, name)}" for name in ("precision", "steps", "warmup", "threads", "workers")
        ]
        options += [f"--workdir={folder}"]
        environment = {
            "OMP_NUM_THREADS": str(arguments.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        answers = measure_by_turns("training", arguments.only, arguments.rounds, options, **environment)
    named = ("workload", "precision", "threads", "workers", "steps", "warmup")
    settings = ", ".join(f"{name} {getattr(arguments, name)}" for name in named)
    if arguments.append_json:
        line = {"machine": machine(), "settings": settings, "answers": answers}
        with open(arguments.append_json, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if arguments.precision == "fp32" and "ours" in answers:
        check_losses(answers)
    print(markdown(answers, settings))


if __name__ == "__main__":
    main()
