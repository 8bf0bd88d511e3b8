"""The growth of the cost with the work: `python -m benchmarks.growth [--figure docs/growth.png]`.

Measures a training step against the length of a text, the samples of a batch and the images of a sample, on a model that
fits on one core; and opening and reading a QA file against its records. CPU seconds, the least of several. Nothing should
grow faster than the work itself, except attention, which is quadratic in the length of one text. Draws a figure and prints
a Markdown table with the exponents: 1 is linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import ROOT, fastest, machine, open_workdir, table
from benchmarks.models import Sizes, Task, random_sample
from benchmarks.ours import ours
from dataset.qa_file import QAFile

SIZES = Sizes(
    vocabulary=512, width=256, layers=2, heads=4, kv_heads=2, mlp=768, vision_width=256, vision_layers=3,
    vision_heads=4, image_size=56, patch_size=14, lora_rank=8,
)  # fmt: skip
QUESTION, ANSWER, SHORT = 24, 24, 112  # tokens; with the 16 of its image a short text has 128
READS = 2000
TAIL = 3  # the exponent is fitted to the last points: the fixed cost of a step dominates the first ones


class Series(NamedTuple):
    """The cost of one kind of work. panel: the title of what is drawn together; unit: of the work."""

    panel: str
    unit: str
    label: str
    work: Sequence[int]
    seconds: Sequence[float]

    @property
    def exponent(self) -> float:
        """The power of the work with which the seconds grow, over the last points."""
        work, seconds = self.work[-TAIL:], np.maximum(self.seconds[-TAIL:], 1e-9)
        return float(np.polyfit(np.log(work), np.log(seconds), 1)[0])


class Extent(NamedTuple):
    """How far each panel goes."""

    tokens: Sequence[int] = (128, 256, 512, 1024, 2048, 4096, 8192)
    samples: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    images: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    records: Sequence[int] = (1000, 10_000, 100_000, 1_000_000)
    rounds: int = 3


QUICK = Extent(tokens=(128, 256, 512), samples=(1, 2, 4), images=(1, 2, 4), records=(100, 1000, 3000), rounds=1)


def step_seconds(shapes: list[tuple[int, int, int]], rounds: int) -> float:
    """Return the CPU seconds of a step on one batch of samples, each of (question tokens, answer tokens, images)."""
    chance = np.random.default_rng(0)
    samples = [random_sample(SIZES, chance, *shape) for shape in shapes]
    times = []

    def after_step(loss: Tensor | float) -> bool:
        times.append(time.process_time())
        return len(times) > rounds

    task = Task(replace(SIZES, batch_size=len(samples)), "fp32", torch.device("cpu"), samples, folder=Path())
    ours(task, kernels="plain")(after_step)
    return float(np.diff(times).min())


def measure_steps(extent: Extent) -> list[Series]:
    short = (SHORT - ANSWER, ANSWER, 1)
    long = SIZES.image_tokens + ANSWER  # and a question of the rest
    kinds: list[tuple[str, str, str, Sequence[int], Callable[[int], list[tuple[int, int, int]]]]] = [
        ("Tokens in a step", "tokens", "one text", extent.tokens, lambda n: [(n - long, ANSWER, 1)]),
        ("Tokens in a step", "tokens", "texts of 128 tokens, packed", extent.tokens, lambda n: [short] * (n // 128)),
        ("Samples in a step", "samples", "a step", extent.samples, lambda n: [short] * n),
        ("Images in a sample", "images", "a step of 4 samples", extent.images, lambda n: [(QUESTION, ANSWER, n)] * 4),
    ]
    return [
        Series(panel, unit, label, work, [step_seconds(shapes(size), extent.rounds) for size in work])
        for panel, unit, label, work, shapes in kinds
    ]


def measure_records(extent: Extent, folder: Path) -> list[Series]:
    costs = [record_seconds(folder / f"{count}.jsonl", count, extent.rounds) for count in extent.records]
    series = {label: [cost[label] for cost in costs] for label in costs[0]}
    return [Series("Records in the QA file", "records", label, extent.records, series[label]) for label in series]


def record_seconds(path: Path, count: int, rounds: int) -> dict[str, float]:
    """Return the CPU seconds of opening and reading a new file of `count` records."""
    turns = [
        {"role": "user", "content": "<image>\nWhat stands beside the table, and which colour is it?"},
        {"role": "assistant", "content": "A wooden chair stands beside it. Its seat is blue, its legs are brown."},
    ]
    rest = json.dumps({"image": "a.jpg", "conversations": turns})[1:]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f'{{"id": "r{i}", {rest}\n' for i in range(count))
    first = fastest(lambda: QAFile(path), 1)  # writes the index that later openings read
    again = fastest(lambda: QAFile(path), rounds)
    qa, places = QAFile(path), np.random.default_rng(0).integers(count, size=READS).tolist()
    read = fastest(lambda: [qa[place] for place in places], rounds)
    return {"opened for the first time": first, "opened": again, f"{READS:,} read at random": read}


def draw(series: Sequence[Series], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(2, 2, figsize=(10, 7.2), constrained_layout=True)
    for place, (title, group) in zip(places.flat, itertools.groupby(series, lambda one: one.panel), strict=True):
        found = list(group)
        for one, colour in zip(found, ("#1f5f99", "#d9662b", "#3c8d53"), strict=False):
            label = f"{one.label}: exponent {one.exponent:.2f}"
            place.plot(one.work, np.maximum(one.seconds, 1e-5), "o-", color=colour, ms=4.5, lw=1.6, label=label)
        top = found[0]
        linear = [top.seconds[-1] * work / top.work[-1] for work in top.work]
        place.plot(top.work, linear, "--", color="0.6", lw=1, label="linear", zorder=0)
        place.set(xscale="log", yscale="log", title=title, xlabel=top.unit, ylabel="CPU seconds")
        place.set_xticks(top.work, [f"{work:,}" for work in top.work])
        place.minorticks_off()
        place.set_ylim(top=place.get_ylim()[1] * 6)  # room for the legend
        place.grid(True, color="0.9", lw=0.8)
        place.spines[["top", "right"]].set_visible(False)
        place.legend(frameon=False, fontsize=9, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def markdown(series: Sequence[Series]) -> str:
    head = ["", "from", "to", "CPU seconds", "times the work", "times the seconds", "exponent"]
    rows = []
    for one in series:
        (least, most), (begun, ended) = ((values[0], values[-1]) for values in (one.work, one.seconds))
        cells = [f"{one.panel}: {one.label}", f"{least:,}", f"{most:,}", f"{begun:.3g} to {ended:.3g}"]
        rows.append([*cells, f"{most / least:,.0f}", f"{ended / max(begun, 1e-9):,.1f}", f"{one.exponent:.2f}"])
    return f"{machine()}; one thread, float32.\n\n{table(head, rows)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="The growth of the cost with the work. Draws a figure, prints Markdown."
    )
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "growth.png", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how it grows")
    arguments = parser.parse_args(argv)
    extent = QUICK if arguments.quick else Extent()
    torch.set_num_threads(1)
    with open_workdir(None) as folder:
        series = measure_steps(extent) + measure_records(extent, folder)
    draw(series, arguments.figure)
    print(markdown(series))


if __name__ == "__main__":
    main()
