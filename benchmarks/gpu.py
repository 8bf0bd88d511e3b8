"""The training step on a GPU, beside other libraries: `python -m benchmarks.gpu --output DIR`.

Trains a Qwen2.5-0.5B and a Qwen-7B, each behind a CLIP-L/14 at 336 pixels, with random weights made on the device. Nothing
is downloaded, and nothing is read from disk meanwhile, so loading is not included (`benchmarks.training` includes it). One
row for each way: ours, ours without each of its parts, and others. It ends by the clock, and lists what it left out.

Writes gpu.md and gpu.json into DIR after every row. `--tiny` runs the same code on small shapes, also without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers.models.llava import modeling_llava
from transformers.models.qwen2 import modeling_qwen2

from benchmarks.flops import Work, step_flops
from benchmarks.measuring import fastest, machine, table
from benchmarks.models import PAD_TOKEN_ID, SIZES, NotInstalled, Sizes, Task, answer_length, random_model, random_sample
from benchmarks.ours import Train, ours
from benchmarks.peers import llava
from dataset.batch import collate
from model.build import PRECISIONS

LORA_RANK = 64
CLIP_L_336: dict = {"image_size": 336, "patch_size": 14, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16}
MODELS = {
    "Qwen2.5-0.5B": Sizes(
        151_936, width=896, layers=24, heads=14, kv_heads=2, mlp=4864, tied=True, batch_size=16, **CLIP_L_336
    ),
    "Qwen-7B": Sizes(151_936, width=4096, layers=32, heads=32, kv_heads=32, mlp=11_008, **CLIP_L_336),
}
SHARE_OF_TIME = {"Qwen2.5-0.5B": 0.4, "Qwen-7B": 0.6, "tiny": 1.0}
BATCHES = 6  # a pass: every way sees all samples equally often
WARM_UP = 2  # steps
SECONDS = 5.0  # of whole passes, at least one
MEAN_ANSWER, QUESTION = 98, (20, 68)  # tokens

OURS, HF = "ours", "LLaVA + PEFT, padded"
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
# The most important ones come first: the clock cuts off the end.
WAYS: dict[str, tuple[Callable[..., Train], dict]] = {
    OURS: (ours, {}),
    HF: (llava, {}),
    "ours, cached features": (ours, {"cached": True}),
    "LLaVA + PEFT, sorted by length": (llava, {"by_length": True}),
    "TRL's SFTTrainer": (llava, {"use_trl": True}),
    "TRL's SFTTrainer, no checkpointing": (llava, {"use_trl": True, "gradient_checkpointing": False}),
    "ours without packing": (ours, {"packing": False}),
    "ours without fused LoRA": (ours, {"fused_lora": False}),
    "ours without compile": (ours, {"kernels": "plain"}),
    "ours with all logits": (ours, {"chosen_logits": False}),
    "ours, activation checkpointing": (ours, {"checkpointing": True}),
    "LLaVA + PEFT, activation checkpointing": (llava, CHECKPOINTING),
    "ours, FlashAttention": (ours, {"flash": True}),
    "LLaVA + PEFT, FlashAttention": (llava, {"flash": True}),
    "ours, Liger's kernels": (ours, {"kernels": "liger"}),
    "LLaVA + PEFT, Liger's kernels": (llava, {"liger": True}),
}


@dataclass(frozen=True)
class Row:
    """The result of one way on one model; only `note` if it could not run."""

    model: str
    way: str
    samples_per_s: float | None = None
    tokens_per_s: float | None = None  # of text and images, without padding
    peak_fraction: float | None = None  # of the measured matrix rate, without padding and recomputation
    peak_gib: float | None = None  # of the device's memory
    first_loss: float | None = None
    note: str = ""


def now(device: torch.device) -> float:
    """Return the time in seconds at which all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Return the operations per second of the best of several large square products."""

    def rate(size: int) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = a @ b
        seconds = fastest(lambda: [torch.mm(a, b, out=out) for _ in range(8)], 4, functools.partial(now, device))
        return 8 * 2 * size**3 / seconds

    return max(map(rate, sizes))


def pass_flops(task: Task) -> dict[bool, int]:
    """Return whether features are cached -> the operations of every sample once."""
    shapes = random_model(task.sizes, torch.float32, torch.device("meta"))
    work = Work.of(collate(task.samples, PAD_TOKEN_ID, packed=True))
    return {cached: sum(step_flops(shapes, work._replace(cached=cached)).values()) for cached in (False, True)}


def measure(row: Row, task: Task, flops: dict[bool, int], rate: float, end: float, least: float = SECONDS) -> Row:
    """Fill in a row: whole passes after the warm-up, for `least` seconds or until the time `end`. The note of a way that
    cannot run says why."""
    if time.perf_counter() >= end:
        return replace(row, note="left out: no time")
    make, switches = WAYS[row.way][0], dict(WAYS[row.way][1])
    losses, times, notes = list[Tensor | float](), list[float](), list[str]()

    def after_step(loss: Tensor | float) -> bool:
        losses.append(loss)
        times.append(now(task.device))
        if len(times) == WARM_UP and task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # forget what building the model took
        passes, within = divmod(len(times) - WARM_UP, BATCHES)
        if passes < 1:
            return times[-1] >= end
        return within == 0 and (times[-1] - times[WARM_UP - 1] >= least or times[-1] >= end)

    try:
        # Liger replaces classes in transformers' modules, which the next model would use: restore these
        with mock.patch.dict(vars(modeling_qwen2)), mock.patch.dict(vars(modeling_llava)):
            task = replace(task, say=notes.append, flash=switches.pop("flash", False))
            make(task, **switches)(after_step)
    except NotInstalled as missing:
        return replace(row, note=f"left out: {missing} is not installed")
    except torch.OutOfMemoryError:
        return replace(row, note="out of memory")
    except Exception as error:  # the other ways still run
        return replace(row, note=f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    passes = (len(times) - WARM_UP) // BATCHES
    if passes < 1:
        return replace(row, note="left out: no time for a pass")
    seconds = (times[WARM_UP - 1 + passes * BATCHES] - times[WARM_UP - 1]) / passes
    return replace(
        row,
        samples_per_s=len(task.samples) / seconds,
        tokens_per_s=sum(len(sample.input_ids) for sample in task.samples) / seconds,
        peak_fraction=flops[switches.get("cached", False)] / seconds / rate,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if task.device.type == "cuda" else None,
        first_loss=float(losses[0]),
        note="; ".join(notes),
    )


def markdown(rows: list[Row], about: str) -> str:
    parts = [about]
    for model in dict.fromkeys(row.model for row in rows):
        of_model = [row for row in rows if row.model == model]
        reference = next((row.samples_per_s for row in of_model if row.way == HF), None)
        head = [model, "samples/s", f"times {HF}", "tokens/s", "of the matrix rate", "peak memory, GiB"]
        cells = []
        for row in of_model:
            if row.samples_per_s:
                times = f"{row.samples_per_s / reference:.2f}" if reference else "-"
                memory = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
                speeds = (f"{row.samples_per_s:,.2f}", times, f"{row.tokens_per_s:,.0f}", f"{row.peak_fraction:.1%}")
                cells.append([row.way, *speeds, memory])
        parts += [table(head, cells), "\n".join(f"- {row.way}: {row.note}" for row in of_model if row.note)]
    return "\n\n".join(part for part in parts if part) + "\n"


def compare(output: Path, tiny: bool, seconds: float, folder: Path) -> None:
    """Measure every way on every model, and write all rows so far after each. folder: for compiled code."""
    device, end = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter() + seconds
    precision = "fp32" if tiny else "bf16"
    dtype = PRECISIONS[precision]
    rate = matrix_rate(device, dtype, (256,) if tiny else (4096, 8192, 16_384))
    name = f"{torch.cuda.get_device_name()}; " if device.type == "cuda" else ""
    about = (
        f"{name}{machine()}. {str(dtype).removeprefix('torch.')}; {rate / 1e12:.3g} TFLOP/s in large matrix products; "
        f"LoRA r={LORA_RANK} on all linear layers; loading not included."
    )
    rows, chance = list[Row](), np.random.default_rng(0)
    output.mkdir(parents=True, exist_ok=True)
    for name, sizes in ({"tiny": SIZES["tiny"]} if tiny else MODELS).items():
        sizes = replace(sizes, lora_rank=LORA_RANK)
        count = sizes.batch_size * BATCHES
        lengths = [(int(chance.integers(*QUESTION)), answer_length(chance, MEAN_ANSWER)) for _ in range(count)]
        samples = [random_sample(sizes, chance, question, answer) for question, answer in lengths]
        task = Task(sizes, precision, device, samples, folder)
        flops = pass_flops(task)
        end_of_model = min(end, time.perf_counter() + seconds * SHARE_OF_TIME[name])
        for way in WAYS:
            rows.append(measure(Row(name, way), task, flops, rate, end_of_model, least=0.0 if tiny else SECONDS))
            gc.collect()
            torch.cuda.empty_cache()
            print(rows[-1], flush=True)
            (output / "gpu.md").write_text(markdown(rows, about))
            found = {"about": about, "matrix_rate": rate, "rows": [asdict(row) for row in rows]}
            (output / "gpu.json").write_text(json.dumps(found, indent=1))
    print(markdown(rows, about))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The training step on a GPU. Writes gpu.md and gpu.json.")
    parser.add_argument("--output", type=Path, required=True, help="the folder for both files")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop by then (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, float32; shows that it works, not how fast")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs without one.")
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.output, arguments.tiny, 60 * arguments.minutes, Path(folder))


if __name__ == "__main__":
    main()
