"""What a GPU makes of the training step, beside what people take instead: `python -m benchmarks.gpu --output DIR`.

A Qwen2.5-0.5B and a Qwen-7B, each behind a CLIP-L/14 at 336 pixels, with random weights made on the device: nothing is
downloaded, and nothing is read from disk while it measures, so loading is not in it (`benchmarks.training` has it).
One row a way: ours, ours without each of its parts, and others. It ends by the clock and says what it left out.

Writes gpu.md and gpu.json into DIR after every row. `--tiny` runs the same code on small shapes, also without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers.models.llava import modeling_llava
from transformers.models.qwen2 import modeling_qwen2

from benchmarks.flops import step_flops
from benchmarks.gpu_ways import NotInstalled, Task, Train, ours, trainer_like, trl
from benchmarks.random_model import Sizes, answer_lengths, random_model, random_sample
from benchmarks.training import machine
from config import IGNORE_INDEX

CLIP_L_336 = {"image_size": 336, "patch_size": 14, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16}
MODELS = {
    "Qwen2.5-0.5B": Sizes(
        **CLIP_L_336, width=896, layers=24, heads=14, kv_heads=2, mlp=4864, vocabulary=151_936, tied=True
    ),
    "Qwen-7B": Sizes(**CLIP_L_336, width=4096, layers=32, heads=32, kv_heads=32, mlp=11_008, vocabulary=151_936),
}
TINY = Sizes(
    image_size=28, patch_size=7, vision_width=32, vision_layers=3, vision_heads=2,
    width=64, layers=2, heads=4, kv_heads=2, mlp=96, vocabulary=256,
)  # fmt: skip
BATCH_SIZE = {"Qwen2.5-0.5B": 16, "Qwen-7B": 8, "tiny": 2}
SHARE_OF_TIME = {"Qwen2.5-0.5B": 0.4, "Qwen-7B": 0.6, "tiny": 1.0}
BATCHES = 6  # a pass: every way sees all samples equally often
WARM_UP = 2  # steps
SECONDS = 5.0  # of whole passes, at least one
LORA_RANK = 64
MEAN_ANSWER, QUESTION = 98, (20, 68)  # tokens

OURS, HF = "ours", "LLaVA + PEFT, padded"
# What matters most comes first: the clock cuts off the end.
WAYS: dict[str, tuple[Callable[..., Train], dict]] = {
    OURS: (ours, {}),
    HF: (trainer_like, {}),
    "ours, cached features": (ours, {"cached": True}),
    "LLaVA + PEFT, sorted by length": (trainer_like, {"by_length": True}),
    "TRL's SFTTrainer": (trl, {}),
    "TRL's SFTTrainer, no checkpointing": (trl, {"checkpointing": False}),
    "ours without packing": (ours, {"packing": False}),
    "ours without fused LoRA": (ours, {"fused_lora": False}),
    "ours without compile": (ours, {"compiled": False}),
    "ours with all logits": (ours, {"chosen_logits": False}),
    "ours, activation checkpointing": (ours, {"checkpointing": True}),
    "LLaVA + PEFT, activation checkpointing": (trainer_like, {"checkpointing": True}),
    "ours, FlashAttention": (ours, {"attention": "flash_attention_2"}),
    "LLaVA + PEFT, FlashAttention": (trainer_like, {"attention": "flash_attention_2"}),
    "ours, Liger's kernels": (ours, {"liger": True, "compiled": False}),
    "LLaVA + PEFT, Liger's kernels": (trainer_like, {"liger": True}),
}


@dataclass(frozen=True)
class Row:
    """What one way reached on one model; `note` alone where it could not run."""

    model: str
    way: str
    samples_per_s: float | None = None
    tokens_per_s: float | None = None  # of text and images, padding not counted
    peak_fraction: float | None = None  # of the measured matrix rate, padding and recomputation not counted
    peak_gib: float | None = None  # of the device's memory
    first_loss: float | None = None
    note: str = ""


class Clock:
    """Seconds on the device, and until the end."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.end = device, time.perf_counter() + seconds

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def left(self) -> float:
        return self.end - time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> float:
    """Operations a second of the best of several large square products."""
    clock, best = Clock(device, 0.0), 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = a @ b
        for _ in range(4):
            begun = clock.now()
            for _ in range(8):
                torch.mm(a, b, out=out)
            best = max(best, 8 * 2 * size**3 / (clock.now() - begun))
    return best


def make_task(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, folder: Path) -> Task:
    chance = np.random.default_rng(0)
    count = BATCH_SIZE[name] * BATCHES
    samples = [
        random_sample(sizes, chance, int(chance.integers(*QUESTION)), answer)
        for answer in answer_lengths(count, chance, MEAN_ANSWER)
    ]
    return Task(sizes, dtype, device, LORA_RANK, BATCH_SIZE[name], samples, folder)


def pass_flops(task: Task) -> dict[bool, int]:
    """Whether features are cached -> the operations of every sample once."""
    shapes = random_model(task.sizes, task.dtype, torch.device("meta"), task.lora_rank)
    lengths = [len(sample.input_ids) for sample in task.samples]
    images = sum(len(sample.is_cached) for sample in task.samples)
    targets = sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in task.samples)
    return {cached: sum(step_flops(shapes, lengths, images, targets, cached).values()) for cached in (False, True)}


def measure(name: str, way: str, task: Task, flops: dict[bool, int], rate: float, clock: Clock, least: float) -> Row:
    """Whole passes after the warm-up, for `least` seconds or until the clock's end. A way that cannot run says why."""
    if clock.left() <= 0:
        return Row(name, way, note="left out: no time")
    make, switches = WAYS[way]
    losses, times, notes = [], [], []

    def after_step(loss) -> bool:
        losses.append(loss)
        times.append(clock.now())
        if len(times) == WARM_UP and task.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what building the model took is gone
        passes, within = divmod(len(times) - WARM_UP, BATCHES)
        if passes < 1:
            return clock.left() <= 0
        return within == 0 and (times[-1] - times[WARM_UP - 1] >= least or clock.left() <= 0)

    try:
        with patches_undone():
            make(replace(task, say=notes.append), **switches)(after_step)
    except NotInstalled as missing:
        return Row(name, way, note=f"left out: {missing} is not installed")
    except torch.OutOfMemoryError:
        return Row(name, way, note="out of memory")
    except Exception as error:  # must not take the numbers of the other ways with it
        return Row(name, way, note=f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    passes = (len(times) - WARM_UP) // BATCHES
    if passes < 1:
        return Row(name, way, note="left out: no time for a pass")
    seconds = (times[WARM_UP - 1 + passes * BATCHES] - times[WARM_UP - 1]) / passes
    return Row(
        name,
        way,
        samples_per_s=len(task.samples) / seconds,
        tokens_per_s=sum(len(sample.input_ids) for sample in task.samples) / seconds,
        peak_fraction=flops[switches.get("cached", False)] / seconds / rate,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if task.device.type == "cuda" else None,
        first_loss=float(losses[0]),
        note="; ".join(notes),
    )


@contextlib.contextmanager
def patches_undone() -> Iterator[None]:
    """Liger puts its classes into transformers' modules, where the next model would find them."""
    before = {module: dict(vars(module)) for module in (modeling_qwen2, modeling_llava)}
    try:
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------------- the table


def markdown(rows: list[Row], about: str) -> str:
    lines = [about]
    for model in dict.fromkeys(row.model for row in rows):
        mine = [row for row in rows if row.model == model]
        measured = [row for row in mine if row.samples_per_s]
        reference = next((row.samples_per_s for row in measured if row.way == HF), None)
        head = [model, "samples/s", f"times {HF}", "tokens/s", "of the matrix rate", "peak memory, GiB"]
        lines += ["", _line(head), _line(["---"] * len(head))]
        for row in measured:
            times = f"{row.samples_per_s / reference:.2f}" if reference else "-"
            memory = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
            speeds = (f"{row.samples_per_s:,.2f}", times, f"{row.tokens_per_s:,.0f}", f"{row.peak_fraction:.1%}")
            lines.append(_line([row.way, *speeds, memory]))
        lines += ["", *(f"- {row.way}: {row.note}" for row in mine if row.note)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def describe(device: torch.device, dtype: torch.dtype, rate: float) -> str:
    name = f"{torch.cuda.get_device_name()}; " if device.type == "cuda" else ""
    return (
        f"{name}{machine()}. {str(dtype).removeprefix('torch.')}; {rate / 1e12:.3g} TFLOP/s in large matrix products; "
        f"LoRA r={LORA_RANK} on all linear layers; loading not included."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a GPU makes of the training step. Writes gpu.md and gpu.json.")
    parser.add_argument("--output", type=Path, required=True, help="the folder for both files")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop by then (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, float32; shows that it works, not how fast")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs without one.")
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.output, arguments.tiny, 60 * arguments.minutes, Path(folder))


def compare(output: Path, tiny: bool, seconds: float, folder: Path) -> None:
    """Every way on every model; all that is known so far is written after each. folder: for what is compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if tiny else torch.bfloat16
    models = {"tiny": TINY} if tiny else MODELS
    clock = Clock(device, seconds)
    rate = matrix_rate(device, dtype, (256,) if tiny else (4096, 8192, 16_384))
    about, rows = describe(device, dtype, rate), []
    output.mkdir(parents=True, exist_ok=True)
    for name, sizes in models.items():
        task = make_task(name, sizes, dtype, device, folder)
        flops = pass_flops(task)
        of_model = Clock(device, min(clock.left(), seconds * SHARE_OF_TIME[name]))
        for way in WAYS:
            rows.append(measure(name, way, task, flops, rate, of_model, least=0.0 if tiny else SECONDS))
            free(device)
            print(rows[-1], flush=True)
            (output / "gpu.md").write_text(markdown(rows, about))
            (output / "gpu.json").write_text(
                json.dumps({"about": about, "matrix_rate": rate, "rows": [asdict(row) for row in rows]}, indent=1)
            )
    print(markdown(rows, about))


if __name__ == "__main__":
    main()
