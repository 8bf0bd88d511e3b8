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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

import train
from benchmarks.measuring import (
    PACKAGES,
    Meter,
    machine,
    make_parser,
    measure_by_turns,
    median_of,
    open_workdir,
    table,
)
from benchmarks.models import SIZES, fresh_sample
from benchmarks.ours import watch_steps
from benchmarks.peers import Peer, add_lora, make_optimizer, padded_inputs, sort_by_length, train_peer
from benchmarks.workload import write_workload
from config import IGNORE_INDEX, Config, load_config
from dataset.batch import collate
from dataset.conversation import Encoded
from dataset.open import sample_order
from model.build import PRECISIONS
from training.log import read_rows
from training.run import open_processors, open_qa_file

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


@dataclass(frozen=True)
class Settings:
    """What every way gets. steps: including the `warmup` steps, which are not measured."""

    folder: Path  # of the workload
    precision: str
    steps: int
    warmup: int
    threads: int
    workers: int  # processes that read images; 0: the one that trains


class Taken(NamedTuple):
    """A sample of our run, encoded, its images not read yet."""

    encoded: Encoded
    images: list[Path]


def first_samples(config: Config, steps: int) -> list[Taken]:
    """Return the samples of the first `steps` steps of our run, in their order."""
    dataset = open_qa_file(config, open_processors(config), config.data.qa_file)
    order = sample_order(dataset, config.data, seed=config.seed)
    count = steps * config.train.per_device_train_batch_size
    found = [dataset.encode(order.at(position)) for position in range(count)]
    return [Taken(encoded, dataset.qa.image_paths(record)) for record, encoded in found]


def amount(config: Config, settings: Settings, taken: Sequence[Taken]) -> dict:
    """Count what the measured steps learn from: samples, tokens without padding, and tokens of answers."""
    measured = taken[settings.warmup * config.train.per_device_train_batch_size :]
    return {
        "samples": len(measured),
        "tokens": sum(len(sample.encoded.input_ids) for sample in measured),
        "targets": sum(label != IGNORE_INDEX for sample in measured for label in sample.encoded.labels),
    }


def ours(settings: Settings, cached: bool = False) -> dict:
    """Run `train.main`. cached: with the encoder's features on disk, as they are from the second epoch on."""
    meter = Meter(settings.steps, settings.warmup)
    folder = settings.folder
    if not cached:
        shutil.rmtree(folder / "qa.features", ignore_errors=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    values = {
        "output_dir": folder / "run",
        "train.cache_features": "on",
        "train.precision": settings.precision,
        "train.max_steps": settings.steps,
        "train.num_threads": settings.threads,
        "train.num_workers": settings.workers,
    }

    @contextlib.contextmanager
    def count(*_) -> Iterator[None]:
        yield
        meter.step_done()

    overrides = [f"{key}={value}" for key, value in values.items()]
    with watch_steps(count):
        train.main(["--config", str(folder / "config.yaml"), *overrides])
    config = load_config(folder / "config.yaml", overrides)
    losses = [row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl")]
    return meter.cost | amount(config, settings, first_samples(config, settings.steps)) | {"losses": losses}


class Reader:
    """Reads the images of samples and pads their ids, as the examples for LLaVA do: numbers of samples -> inputs."""

    def __init__(self, samples: Sequence[Taken], image_processor, pad_token_id: int):
        self.samples, self.image_processor, self.pad_token_id = samples, image_processor, pad_token_id

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        taken = [self.samples[number] for number in numbers]
        images = [Image.open(path).convert("RGB") for sample in taken for path in sample.images]
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"].split([len(s.images) for s in taken])
        texts = [(torch.tensor(sample.encoded.input_ids), torch.tensor(sample.encoded.labels)) for sample in taken]
        samples = [fresh_sample(*text, of_sample) for text, of_sample in zip(texts, pixels, strict=True)]
        return padded_inputs(collate(samples, self.pad_token_id))


def peer(settings: Settings, by_length: bool = False, **options) -> dict:
    """Train LLaVA. by_length: see `sort_by_length`; options: see `train_peer`."""
    meter = Meter(settings.steps, settings.warmup)
    folder, config = settings.folder, load_config(settings.folder / "config.yaml")
    size = config.train.per_device_train_batch_size
    taken = first_samples(config, settings.steps)
    if by_length:
        taken = [taken[i] for i in sort_by_length([len(one.encoded.input_ids) for one in taken], size)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    dtype = PRECISIONS[settings.precision]
    llava = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=dtype)
    model = add_lora(llava, config.lora.r, load_file(folder / "first.safetensors"))
    losses = []

    def after_step(loss: Tensor | float) -> bool:
        losses.append(loss)
        meter.step_done()
        return False

    train_peer(
        Peer(
            model=model,
            optimizer=make_optimizer(model, config.train),
            read=Reader(taken, AutoImageProcessor.from_pretrained(folder / "tower"), tokenizer.pad_token_id),
            samples=len(taken),
            batch_size=size,
            tokenizer=tokenizer,
        ),
        after_step,
        output_dir=str(folder / "peer"),
        max_steps=settings.steps,
        lr_scheduler_type="cosine",
        bf16=settings.precision == "bf16",
        dataloader_num_workers=settings.workers,
        **options,
    )
    return meter.cost | amount(config, settings, taken) | {"losses": [float(loss) for loss in losses]}


WAYS: dict[str, Callable[[Settings], dict]] = {
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
        f"{machine(*PACKAGES)}; {settings}; {median_of(len(first))}. {one['samples']} samples of "
        f"{one['tokens'] / one['samples']:.0f} tokens, {one['targets'] / one['tokens']:.0%} of them in answers.\n\n"
        f"{table(head, rows)}"
    )
    if "ours" in answers:
        found = [f"{NAMES[name]} {value:.1e}" for name, value in largest_differences(answers).items() if name != "ours"]
        steps = f"{len(one['losses'])} steps with updates"
        text += f"\n\nLosses of {steps}, largest difference from ours: {', '.join(found)}."
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
    chosen = {name: getattr(arguments, name) for name in ("precision", "steps", "warmup", "threads", "workers")}
    if arguments.measure:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(WAYS[arguments.measure](Settings(arguments.workdir, **chosen))))
        return
    with open_workdir(arguments.workdir) as workdir:
        folder = workdir / arguments.workload
        write_workload(folder, arguments.workload, arguments.steps * SIZES[arguments.workload].batch_size)
        options = [f"--workdir={folder}", *(f"--{name}={value}" for name, value in chosen.items())]
        environment = {
            "OMP_NUM_THREADS": str(arguments.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        answers = measure_by_turns("training", arguments.only, arguments.rounds, options, **environment)
    named = ("workload", "precision", "threads", "workers", "steps", "warmup")
    settings = ", ".join(f"{name} {getattr(arguments, name)}" for name in named)
    if arguments.append_json:
        line = {"machine": machine(*PACKAGES), "settings": settings, "answers": answers}
        with open(arguments.append_json, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if arguments.precision == "fp32" and "ours" in answers:
        check_losses(answers)
    print(markdown(answers, settings))


if __name__ == "__main__":
    main()
