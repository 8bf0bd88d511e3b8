"""How the cost grows with the work: `python -m benchmarks.growth [--figure docs/growth.png]`.

A step of training against the length of a text, the samples of a batch and the images of a sample, on a model so small that
all fits on one core; opening and reading a QA file against its records. CPU seconds; the least of several. Nothing should
grow faster than the work itself, but attention, which is quadratic in the length of one text.

Draws a figure, prints a Markdown table with the exponents: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_ways import Task, ours
from benchmarks.random_model import Sizes, random_sample
from benchmarks.training import machine
from dataset.qa_file import QAFile

ROOT = Path(__file__).parent.parent
SIZES = Sizes(
    image_size=56, patch_size=14, vision_width=256, vision_layers=3, vision_heads=4,
    width=256, layers=2, heads=4, kv_heads=2, mlp=768, vocabulary=512,
)  # fmt: skip
LORA_RANK = 8
QUESTION, ANSWER, SHORT = 24, 24, 112  # tokens; with the 16 of its image a short text has 128
READS = 2000
TAIL = 3  # the last points, to which the exponent is fitted: before them it is mostly what a step costs anyway


@dataclass(frozen=True)
class Series:
    """The cost of one kind of work."""

    label: str
    work: list[int]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """Of the power of the work that the seconds grow with, over the last points."""
        work, seconds = self.work[-TAIL:], np.maximum(self.seconds[-TAIL:], 1e-9)
        return float(np.polyfit(np.log(work), np.log(seconds), 1)[0])


@dataclass(frozen=True)
class Panel:
    """What is drawn together."""

    title: str
    unit: str  # of the work
    series: list[Series]


@dataclass(frozen=True)
class Extent:
    """How far each panel goes."""

    tokens: Sequence[int] = (128, 256, 512, 1024, 2048, 4096, 8192)
    samples: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    images: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    records: Sequence[int] = (1000, 10_000, 100_000, 1_000_000)
    rounds: int = 3


QUICK = Extent(tokens=(128, 256, 512), samples=(1, 2, 4), images=(1, 2, 4), records=(100, 1000, 3000), rounds=1)


def step_seconds(shapes: list[tuple[int, int, int]], rounds: int) -> float:
    """CPU seconds of a step on one batch of samples, each of (question tokens, answer tokens, images)."""
    chance = np.random.default_rng(0)
    samples = [random_sample(SIZES, chance, *shape) for shape in shapes]
    task = Task(SIZES, torch.float32, torch.device("cpu"), LORA_RANK, len(samples), samples, Path())
    times = []

    def after_step(loss: float) -> bool:
        times.append(time.process_time())
        return len(times) > rounds

    ours(task, compiled=False)(after_step)
    return float(np.diff(times).min())


def measure_steps(extent: Extent) -> list[Panel]:
    def series(label: str, work: Sequence[int], shapes: Callable[[int], list[tuple[int, int, int]]]) -> Series:
        return Series(label, list(work), [step_seconds(shapes(size), extent.rounds) for size in work])

    image = SIZES.image_tokens
    one = series("one text", extent.tokens, lambda n: [(n - ANSWER - image, ANSWER, 1)])
    many = series("texts of 128 tokens, packed", extent.tokens, lambda n: [(SHORT - ANSWER, ANSWER, 1)] * (n // 128))
    batch = series("a step", extent.samples, lambda n: [(SHORT - ANSWER, ANSWER, 1)] * n)
    images = series("a step of 4 samples", extent.images, lambda n: [(QUESTION, ANSWER, n)] * 4)
    return [
        Panel("Tokens in a step", "tokens", [one, many]),
        Panel("Samples in a step", "samples", [batch]),
        Panel("Images in a sample", "images", [images]),
    ]


def measure_records(extent: Extent, folder: Path) -> Panel:
    costs = [record_seconds(folder / f"{count}.jsonl", count, extent.rounds) for count in extent.records]
    labels = ("opened for the first time", "opened", f"{READS:,} read at random")
    series = [
        Series(label, list(extent.records), list(seconds)) for label, *seconds in zip(labels, *costs, strict=True)
    ]
    return Panel("Records in the QA file", "records", series)


def record_seconds(path: Path, count: int, rounds: int) -> tuple[float, float, float]:
    """CPU seconds to open a file of `count` records for the first time, to open it again, to read READS of it at random."""
    write_records(path, count)
    first = fastest(lambda: QAFile(path), 1)  # writes the index that every later opening reads
    again = fastest(lambda: QAFile(path), rounds)
    qa, places = QAFile(path), np.random.default_rng(0).integers(count, size=READS).tolist()
    return first, again, fastest(lambda: [qa[place] for place in places], rounds)


def write_records(path: Path, count: int) -> None:
    turns = [
        {"role": "user", "content": "<image>\nWhat stands beside the table, and which colour is it?"},
        {"role": "assistant", "content": "A wooden chair stands beside it. Its seat is blue, its legs are brown."},
    ]
    rest = json.dumps({"image": "a.jpg", "conversations": turns})[1:]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f'{{"id": "r{i}", {rest}\n' for i in range(count))


def fastest(call: Callable, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        begun = time.process_time()
        call()
        seconds.append(time.process_time() - begun)
    return min(seconds)


# --------------------------------------------------------------------------------------------------- the figure, the table


def draw(panels: list[Panel], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ("#1f5f99", "#d9662b", "#3c8d53")
    figure, places = pyplot.subplots(2, 2, figsize=(10, 7.2), constrained_layout=True)
    for place, panel in zip(places.flat, panels, strict=True):
        for one, colour in zip(panel.series, colours, strict=False):
            label = f"{one.label}: exponent {one.exponent:.2f}"
            place.plot(one.work, np.maximum(one.seconds, 1e-5), "o-", color=colour, ms=4.5, lw=1.6, label=label)
        top = panel.series[0]
        linear = [top.seconds[-1] * work / top.work[-1] for work in top.work]
        place.plot(top.work, linear, "--", color="0.6", lw=1, label="linear", zorder=0)
        place.set(xscale="log", yscale="log", title=panel.title, xlabel=panel.unit, ylabel="CPU seconds")
        place.set_xticks(top.work, [f"{work:,}" for work in top.work])
        place.minorticks_off()
        place.set_ylim(top=place.get_ylim()[1] * 6)  # room for the legend
        place.grid(True, color="0.9", lw=0.8)
        place.spines[["top", "right"]].set_visible(False)
        place.legend(frameon=False, fontsize=9, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def markdown(panels: list[Panel]) -> str:
    lines = [f"{machine()}; one thread, float32.", ""]
    lines += ["| | from | to | CPU seconds | times the work | times the seconds | exponent |", "|" + " --- |" * 7]
    for panel in panels:
        for one in panel.series:
            (least, most), (begun, ended) = ((values[0], values[-1]) for values in (one.work, one.seconds))
            cells = [
                f"{panel.title}: {one.label}",
                *(f"{value:,}" for value in (least, most)),
                f"{begun:.3g} to {ended:.3g}",
                f"{most / least:,.0f}",
                f"{ended / max(begun, 1e-9):,.1f}",
                f"{one.exponent:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How the cost grows with the work. Draws a figure, prints Markdown.")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "growth.png", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how it grows")
    arguments = parser.parse_args()
    extent = QUICK if arguments.quick else Extent()
    torch.set_num_threads(1)
    panels = measure_steps(extent)
    with tempfile.TemporaryDirectory() as folder:
        panels.append(measure_records(extent, Path(folder)))
    draw(panels, arguments.figure)
    print(markdown(panels))


if __name__ == "__main__":
    main()
