"""How near a training step comes to what the machine can do: `python -m benchmarks.limits [--precision fp32|bf16]`.

train.py trains on the workload W2 of `benchmarks.training`, in this process. Around its steps, by turns, stand large square
matrix products, for the machine's own rate, and the step's own products alone. The step's operations are counted from its
shapes (`benchmarks.flops`), torch's counter checks them, and the profiler says where the rest of the time goes.

Everything in CPU time, the reading of pictures included. Prints Markdown. A run as short as this is not compiled by
itself: `train.compile=on` at the end of the command measures what a long one does.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.flops import Product, linear_products, step_flops, torchs_counter
from benchmarks.training import machine
from benchmarks.vlm_workload import make_workload
from training.step import Stepper, count_targets

WARM_UP, PROFILED, COUNTED = 4, 3, 1  # steps before and after those that are measured
SQUARES = (1024, 2048)  # sides of the large products
MATRIX = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "mkldnn_convolution", "_slow_conv2d_forward")
PARTS = ("matrix products", "attention", "optimizer", "element by element", "Python")


@dataclass
class Findings:
    """CPU seconds, and operations, a step."""

    step: list[float] = field(default_factory=list)
    loading: list[float] = field(default_factory=list)  # and logging: what is between two steps
    flops: list[dict[str, int]] = field(default_factory=list)
    square_rates: list[float] = field(default_factory=list)  # operations a second
    own_rates: list[float] = field(default_factory=list)  # of the step's own products alone
    parts: list[dict[str, float]] = field(default_factory=list)  # of PARTS -> seconds
    counted: int = 0  # by torch, in one step; attention's own kernel is not among what it knows on a CPU
    expected: int = 0  # by `linear_products`, in the same step


def measured_stepper(findings: Findings, steps: int) -> type[Stepper]:
    """A Stepper whose step also measures: WARM_UP steps are only taken, `steps` are timed, PROFILED are profiled, the last
    is counted by torch."""

    class Measured(Stepper):
        ended = 0.0

        def __call__(self, step, micros, rates, stop):
            def take():
                return super(Measured, self).__call__(step, micros, rates, stop)

            begun, phase = time.process_time(), step - WARM_UP
            if phase < 0:
                result = take()
            elif phase < steps:
                findings.loading.append(begun - self.ended)
                result = take()
                findings.step.append(time.process_time() - begun)
                findings.flops.append(sum_flops(self.model, micros))
                findings.square_rates += [square_rate(size, compute_dtype(self)) for size in SQUARES]
                findings.own_rates.append(own_rate(products_of(self.model, micros), compute_dtype(self)))
            elif phase < steps + PROFILED:
                with profile(activities=[ProfilerActivity.CPU]) as seen:
                    result = take()
                seconds = time.process_time() - begun
                findings.parts.append(split_step(seen.events(), seconds))
            else:
                with torchs_counter() as counter, torch.compiler.set_stance("force_eager"):
                    result = take()
                counts = counter.get_flop_counts()[
                    "Global"
                ]  # linear layers compute no batches of products: attention does
                findings.counted = sum(count for operation, count in counts.items() if "bmm" not in str(operation))
                findings.expected = sum(times * one.flops for one, times in products_of(self.model, micros).items())
            self.ended = time.process_time()
            return result

    return Measured


def compute_dtype(stepper: Stepper) -> torch.dtype:
    return next(stepper.model.causal_lm.model.layers.parameters()).dtype


def is_cached(batch: dict) -> bool:
    return batch.pixel_values is None


def document_lengths(batch: dict) -> list[int]:
    """Of the samples, without padding."""
    if batch.lengths is None:
        return batch.attention_mask.sum(dim=1).tolist()
    return batch.lengths[: len(batch.ids)]


def sum_flops(model, micros) -> dict[str, int]:
    """What a step has to compute: part -> operations."""
    batches = [
        step_flops(model, document_lengths(batch), len(batch.is_cached), batch.num_targets, is_cached(batch))
        for batch in micros
    ]
    return {part: sum(one[part] for one in batches) for part in batches[0]}


def products_of(model, micros) -> dict[Product, int]:
    """The products that a step computes, those of its padding included."""
    tokens = sum(batch.input_ids.numel() for batch in micros)
    images = sum(len(batch.is_cached) for batch in micros)
    targets = sum(map(count_targets, micros))
    return linear_products(model, tokens, images, targets, is_cached(micros[0]))


# -------------------------------------------------------------------------------------------------------------- the rates


def square_rate(size: int, dtype: torch.dtype) -> float:
    """Operations a CPU second of a product of two square matrices."""
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    return 2 * size**3 / fastest(lambda: torch.mm(a, b, out=out))


def own_rate(products: dict[Product, int], dtype: torch.dtype) -> float:
    """Operations a CPU second of a step's products, each computed alone."""
    seconds = sum(times * fastest(matrix_product(one, dtype)) for one, times in products.items())
    return sum(times * one.flops for one, times in products.items()) / seconds


def matrix_product(product: Product, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    rows, columns, inner = product.rows, product.out_features, product.in_features
    x, gradient, weight = (torch.randn(shape).to(dtype) for shape in ((rows, inner), (rows, columns), (columns, inner)))
    left, right = {"forward": (x, weight.T), "input": (gradient, weight), "weight": (gradient.T, x)}[product.kind]
    out = torch.mm(left, right)
    return lambda: torch.mm(left, right, out=out)


def fastest(call: Callable, times: int = 2) -> float:
    """CPU seconds, after one call that is not measured."""
    call()
    seconds = []
    for _ in range(times):
        begun = time.process_time()
        call()
        seconds.append(time.process_time() - begun)
    return max(min(seconds), 1e-9)


# ------------------------------------------------------------------------------------------------------------ the profile


def split_step(events: list[FunctionEvent], seconds: float) -> dict[str, float]:
    """`seconds` among PARTS: what each operation took itself; Python is what no operation took."""
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = part_of(event)
        if part:
            parts[part] += event.self_cpu_time_total / 1e6
    parts["Python"] = max(0.0, seconds - sum(parts.values()))
    return parts


def part_of(event: FunctionEvent) -> str | None:
    """None for what is no operation, but a name for several: its own time is Python's."""
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return "optimizer"
        if parent.name.startswith("_CausalDocuments"):  # made of plain products (qwen.attention)
            return "attention"
        parent = parent.cpu_parent
    library, _, name = event.name.rpartition("::")
    if "scaled_dot_product" in name:
        return "attention"
    if name in MATRIX or library == "mkldnn":
        return "matrix products"
    is_operation = library or "CompiledFxGraph" in name  # the latter is all that torch compiled
    return "element by element" if is_operation else None


# -------------------------------------------------------------------------------------------------------------- the table


def markdown(findings: Findings, precision: str, threads: int) -> str:
    step, loading = sum(findings.step), sum(findings.loading)
    useful = sum(sum(flops.values()) for flops in findings.flops)
    best, own = max(findings.square_rates), median(findings.own_rates)
    counted = findings.counted / max(1, findings.expected)
    lines = [
        f"{machine()}. Threads: {threads}; {precision}, {len(findings.step)} steps, CPU time.",
        "",
        *table(
            ["", "GFLOP/s", "of the machine's"],
            [
                ["large square products", f"{best / 1e9:,.1f}", "100%"],
                ["the step's products, alone", f"{own / 1e9:,.1f}", f"{own / best:.0%}"],
                ["the step", f"{useful / step / 1e9:,.1f}", f"{useful / step / best:.0%}"],
                [
                    "the step with loading",
                    f"{useful / (step + loading) / 1e9:,.1f}",
                    f"{useful / (step + loading) / best:.0%}",
                ],
            ],
        ),
        f"The step's products by torch's counter: {counted:.4f} of what the shapes say.",
        "",
        *table(["what has to be computed", "GFLOP a step", "share"], operations(findings)),
        *table(["where the time goes", "ms a step", "share"], times(findings)),
    ]
    return "\n".join(lines)


def operations(findings: Findings) -> list[list[str]]:
    count = len(findings.flops)
    parts = {part: sum(flops[part] for flops in findings.flops) / count for part in findings.flops[0]}
    return [[part, f"{value / 1e9:,.2f}", f"{value / sum(parts.values()):.1%}"] for part, value in parts.items()]


def times(findings: Findings) -> list[list[str]]:
    """The measured step, divided as the profiled steps are; and what is between the steps."""
    step = sum(findings.step) / len(findings.step)
    loading = sum(findings.loading) / len(findings.loading)
    profiled = sum(sum(parts.values()) for parts in findings.parts)
    seconds = {part: step * sum(parts[part] for parts in findings.parts) / profiled for part in PARTS}
    seconds["loading and logging"] = loading
    return [[part, f"{1e3 * value:,.1f}", f"{value / (step + loading):.1%}"] for part, value in seconds.items()]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def measure(
    folder: Path, workload: str, precision: str, threads: int, steps: int, overrides: Sequence[str] = ()
) -> Findings:
    """Train in `folder`, which holds the workload or will. overrides: of the config's keys, key=value."""
    total, findings = WARM_UP + steps + PROFILED + COUNTED, Findings()
    make_workload(folder, workload, records=192)
    values = {
        "output_dir": folder / "run",
        "train.max_steps": total,
        "train.precision": precision,
        "train.num_threads": threads,
        "train.num_workers": 0,  # so that reading pictures is in this process's time
    }
    arguments = ["--config", str(folder / "config.yaml"), "--resume", "none"]
    arguments += [f"{key}={value}" for key, value in values.items()]
    arguments += overrides
    with mock.patch.object(train, "Stepper", measured_stepper(findings, steps)):
        with contextlib.redirect_stdout(sys.stderr):
            stopped = train.main(arguments)
    if stopped:
        raise SystemExit(stopped)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How near a training step comes to the machine's rate. Prints Markdown."
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="that are timed (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="keep the workload here (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it works, not how fast")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, for example train.compile=on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)).resolve()
        workload = "tiny" if arguments.tiny else "W2"
        findings = measure(
            folder, workload, arguments.precision, arguments.threads, arguments.steps, arguments.overrides
        )
    print(markdown(findings, arguments.precision, arguments.threads))


if __name__ == "__main__":
    main()
