"""The cost of a training step, beside transformers' Trainer and TRL: `python -m benchmarks.training`.

Each way runs in a process of its own, by turns, on the same weights, samples, batches and learning rates. Only steps are
measured, from the end of a warm-up on, including reading the images. In fp32 the losses must be equal, or this stops.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.measuring import machine, make_parser, measure_by_turns, median_of, open_workdir, table
from benchmarks.models import SIZES
from benchmarks.ours import watch_training
from benchmarks.peers import llava_twin, padded_inputs, sort_by_length, train_peer
from benchmarks.workload import write_workload
from config import IGNORE_INDEX, Config, load_config
from dataset.batch import collate
from dataset.loader import QADataset
from dataset.open import sample_order
from training.log import read_rows
from training.run import open_model, open_processors, open_qa_file

TOLERANCE = 1e-5  # between two losses of the same step, in fp32


def first_samples(config: Config, steps: int) -> tuple[QADataset, list[tuple]]:
    """Return our run's dataset and its first samples in their order, as arguments of `QADataset.read`."""
    dataset = open_qa_file(config, open_processors(config), config.data.qa_file)
    order = sample_order(dataset, config.data, seed=config.seed)
    keys = [order.at(position) for position in range(steps * config.train.per_device_train_batch_size)]
    return dataset, [(key, *dataset.encode(key)) for key in keys]


class Meter:
    """Measures steps after a warm-up; `__call__` is an after_step. arguments: has steps and warmup."""

    def __init__(self, arguments: argparse.Namespace):
        self.steps, self.warm_up, self.losses = arguments.steps, arguments.warmup, list[Tensor | float]()
        self._imports = measuring.memory("VmHWM")

    def __call__(self, loss: Tensor | float) -> bool:
        self.losses.append(loss)
        if len(self.losses) == self.warm_up:
            self._clock = measuring.Clock(measuring.cpu_seconds, reset_peak=False)
        if len(self.losses) == self.steps:
            self._cost = self._clock.read()
        return False

    def answer(self, samples: Sequence[tuple]) -> dict:
        """Return CPU and wall seconds of the measured steps; the peak memory of the process up to the last step in MiB, as a
        whole and above what its imports took; what the measured steps learned from; all losses. samples: of all steps."""
        measured = [encoded for _, _, encoded in samples[self.warm_up * len(samples) // self.steps :]]
        cpu, wall, peak = (self._cost[key] for key in ("cpu", "wall", "highest"))
        return {
            **{"cpu": cpu, "wall": wall, "memory": peak, "memory_above": peak - self._imports},
            "samples": len(measured),
            "tokens": sum(len(encoded.input_ids) for encoded in measured),  # without padding
            "targets": sum(label != IGNORE_INDEX for encoded in measured for label in encoded.labels),
            "losses": [float(loss) for loss in self.losses],
        }


def ours(arguments: argparse.Namespace, cached: bool = False) -> dict:
    """Run train.py. cached: with the encoder's features on disk, as they are from the second epoch on."""
    meter, folder = Meter(arguments), arguments.workdir
    if not cached:
        shutil.rmtree(folder / "qa.features", ignore_errors=True)

    def count(*_: object) -> Iterator[None]:
        yield
        meter(0.0)

    watch_training(folder, count, arguments.steps, arguments, "train.cache_features=on")
    meter.losses = [row["loss"] for row in read_rows(folder / "run" / "metrics.jsonl")]
    return meter.answer(first_samples(load_config(folder / "config.yaml"), arguments.steps)[1])


def peer(arguments: argparse.Namespace, by_length: bool = False, **options: Any) -> dict:
    """Train LLaVA on the same samples. by_length: see `sort_by_length`; options: see `train_peer`."""
    meter, config = Meter(arguments), load_config(arguments.workdir / "config.yaml")
    size = config.train.per_device_train_batch_size
    dataset, samples = first_samples(config, arguments.steps)
    if by_length:
        samples = [samples[i] for i in sort_by_length([len(encoded.input_ids) for _, _, encoded in samples], size)]
    built = open_model(config, arguments.precision, open_processors(config))
    model, pad_token_id = llava_twin(built.model), built.tokenizer.pad_token_id
    del built  # before the steps, whose memory is measured
    train_peer(
        model,
        lambda numbers: padded_inputs(collate([dataset.read(*samples[i]) for i in numbers], pad_token_id)),
        len(samples),
        meter,
        output_dir=str(arguments.workdir / "peer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=size,
        lr_scheduler_type="cosine",
        bf16=arguments.precision == "bf16",
        dataloader_num_workers=arguments.workers,
        **options,
    )
    return meter.answer(samples)


WAYS: dict[str, tuple[str, Callable[[argparse.Namespace], dict]]] = {
    "ours": ("ours, first epoch", ours),
    "ours-cached": ("ours, cached features", partial(ours, cached=True)),
    "hf": ("Trainer + LLaVA + PEFT", peer),
    "hf-sorted": ("the same, sorted by length", partial(peer, by_length=True)),
    "trl": ("TRL's SFTTrainer", partial(peer, use_trl=True)),
    "trl-no-checkpointing": ("the same, no checkpointing", partial(peer, use_trl=True, gradient_checkpointing=False)),
}
NAMES = {way: title for way, (title, _) in WAYS.items()}


def largest_differences(answers: dict[str, list[dict]]) -> dict[str, float]:
    """Return the largest difference of each way's losses from ours, in any step of any round."""
    reference = answers["ours"][0]["losses"]
    return {
        name: float(np.abs(np.subtract([answer["losses"] for answer in found], reference)).max())
        for name, found in answers.items()
        if name != "hf-sorted"  # has other batches
    }


def check_losses(answers: dict[str, list[dict]]) -> None:
    """Raise ValueError if two ways do not learn the same in fp32."""
    for name, difference in largest_differences(answers).items():
        if not difference <= TOLERANCE:
            raise ValueError(f"{name}: its losses differ from ours by up to {difference:.1e}, more than {TOLERANCE:g}")


def markdown(answers: dict[str, list[dict]], settings: str) -> str:
    first = next(iter(answers.values()))
    one = first[0]
    head = [
        "", "CPU ms a sample", "ms a sample", "peak MiB", "above imports", "ours: times its speed, CPU", "wall",
        "ours, cached: CPU", "wall", "ours: of its memory",
    ]  # fmt: skip
    clocks, rows = ("cpu", "wall"), []
    for name, found in answers.items():
        cells = [f"{median(1000 * one[clock] / one['samples'] for one in found):,.0f}" for clock in clocks]
        cells += [f"{median(one[key] for one in found):,.0f}" for key in ("memory", "memory_above")]
        for way in ("ours", "ours-cached"):
            cells += [ratio(found, answers.get(way), clock, "tokens") for clock in clocks]
        cells.append(ratio(answers.get("ours"), found, "memory"))
        rows.append([NAMES[name], *cells])
    samples = f"{one['samples']} samples of {one['tokens'] / one['samples']:.0f} tokens"
    about = f"{machine()}; {settings}; {median_of(len(first))}. {samples}"
    text = f"{about}, {one['targets'] / one['tokens']:.0%} of them in answers.\n\n{table(head, rows)}"
    if "ours" in answers:
        texts = [f"{NAMES[name]} {value:.1e}" for name, value in largest_differences(answers).items() if name != "ours"]
        steps = f"{len(one['losses'])} steps with updates"
        text += f"\n\nLosses of {steps}, largest difference from ours: {', '.join(texts)}."
    return text


def ratio(first: list[dict] | None, second: list[dict] | None, cost: str, per: str | None = None) -> str:
    """Return the ratio of two costs, or of costs per what `per` counts: the median over rounds."""
    if not first or not second:
        return "-"
    values = [[one[cost] / (one[per] if per else 1) for one in answers] for answers in (first, second)]
    return f"{median(a / b for a, b in zip(*values, strict=True)):.2f}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("The cost of a training step, ours and others'.", NAMES)
    parser.add_argument("--workload", choices=("W1", "W2"), default="W2", help="vocabulary 151,936 or 12,288")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=24, help="with the warm-up (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not measured (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch's, in every way (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images; 0: the one that trains")
    installed = [name for name in NAMES if "trl" not in name or importlib.util.find_spec("trl")]
    parser.add_argument("--only", type=lambda text: text.split(","), default=installed, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--append-json", type=Path, metavar="FILE", help="append a line with all measurements")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.workload, arguments.steps, arguments.warmup, arguments.rounds = "tiny", 3, 1, 1
    if not 0 < arguments.warmup < arguments.steps:
        parser.error("--warmup must be at least 1 and less than --steps")
    if unknown := set(arguments.only) - set(NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; known: {', '.join(NAMES)}")
    if "ours-cached" in arguments.only and "ours" not in arguments.only:
        parser.error("--only: ours-cached needs ours, which fills the cache")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.measure:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(WAYS[arguments.measure][1](arguments)))
        return
    keys = ("workload", "precision", "threads", "workers", "steps", "warmup")
    chosen = {key: getattr(arguments, key) for key in keys}
    with open_workdir(arguments.workdir) as workdir:
        folder = workdir / chosen.pop("workload")
        write_workload(folder, arguments.workload, arguments.steps * SIZES[arguments.workload].batch_size)
        answers = measure_by_turns("training", arguments.only, arguments.rounds, workdir=folder, **chosen)
    settings = ", ".join(f"{key} {getattr(arguments, key)}" for key in keys)
    if arguments.append_json:
        with open(arguments.append_json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"machine": machine(), "settings": settings, "answers": answers}) + "\n")
    if arguments.precision == "fp32" and "ours" in answers:
        check_losses(answers)
    print(markdown(answers, settings))


if __name__ == "__main__":
    main()
