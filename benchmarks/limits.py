"""A training step's rate beside that of the machine: `python -m benchmarks.limits [--precision fp32|bf16]`.

train.py trains on the workload W2 of `benchmarks.training`, in this process. By turns with its steps, large square matrix
products measure the machine's own rate, and the step's own products are computed alone. The step's operations are counted
from its shapes (`benchmarks.flops`), torch's counter checks them, and the profiler shows where the rest of the time goes.
All in CPU time, including reading the images. `auto` does not compile so short a run; `train.compile=on` at the end of the
command measures what a long one does.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.flops import Product, Work, linear_products, step_flops, torch_counter
from benchmarks.measuring import fastest, machine, open_workdir, table
from benchmarks.ours import Watch, watch_training
from benchmarks.workload import write_workload
from dataset.batch import Batch
from model.model import VisionLanguageModel
from training.step import Stepper

WARM_UP, PROFILED, COUNTED = 4, 3, 1  # steps before and after those that are measured
SQUARES = [Product("square", "input", size, size, size) for size in (1024, 2048)]
MATRIX = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "mkldnn_convolution", "_slow_conv2d_forward")
PARTS = ("matrix products", "attention", "optimizer", "element by element", "Python")


@dataclass
class Findings:
    """CPU seconds and operations of each step."""

    step: list[float] = field(default_factory=list)
    loading: list[float] = field(default_factory=list)  # and logging: between two steps
    flops: list[dict[str, int]] = field(default_factory=list)
    square_rates: list[float] = field(default_factory=list)  # operations per second
    own_rates: list[float] = field(default_factory=list)  # of the step's own products alone
    parts: list[dict[str, float]] = field(default_factory=list)  # of PARTS -> seconds
    counted: int = 0  # by torch, in one step; without attention, whose kernel on a CPU it does not know
    expected: int = 0  # by `linear_products`, in the same step


def step_observer(findings: Findings, steps: int) -> Watch:
    """Return what times `steps` steps after WARM_UP, profiles PROFILED more, and lets torch count the last one."""
    ended = 0.0

    def observe(stepper: Stepper, step: int, micro_batches: Sequence[Batch]) -> Iterator[None]:
        nonlocal ended
        model, begun, phase = stepper.model, time.process_time(), step - WARM_UP
        if phase < 0:
            yield
        elif phase < steps:
            findings.loading.append(begun - ended)
            yield
            findings.step.append(time.process_time() - begun)
            findings.flops.append(sum_flops(model, micro_batches))
            dtype = next(model.causal_lm.model.layers.parameters()).dtype
            findings.square_rates += [own_rate({square: 1}, dtype) for square in SQUARES]
            findings.own_rates.append(own_rate(products_of(model, micro_batches), dtype))
        elif phase < steps + PROFILED:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                yield
            seconds = time.process_time() - begun
            findings.parts.append(split_step(seen.events(), seconds))
        else:
            with torch_counter() as counter, torch.compiler.set_stance("force_eager"):
                yield
            counts = counter.get_flop_counts()["Global"]
            # linear layers compute no batches of products; attention does
            findings.counted = sum(count for operation, count in counts.items() if "bmm" not in str(operation))
            findings.expected = sum_products(products_of(model, micro_batches))
        ended = time.process_time()

    return observe


def sum_flops(model: VisionLanguageModel, micro_batches: Sequence[Batch]) -> dict[str, int]:
    """Return what a step has to compute: part -> operations."""
    batches = [step_flops(model, Work.of(batch)) for batch in micro_batches]
    return {part: sum(batch[part] for batch in batches) for part in batches[0]}


def products_of(model: VisionLanguageModel, micro_batches: Sequence[Batch]) -> dict[Product, int]:
    """Return the products that a step computes, those of its padding included."""
    works = [Work.of(batch)._replace(lengths=[batch.input_ids.numel()]) for batch in micro_batches]
    return sum((linear_products(model, work) for work in works[1:]), linear_products(model, works[0]))


def sum_products(products: dict[Product, int]) -> int:
    return sum(times * product.flops for product, times in products.items())


def own_rate(products: dict[Product, int], dtype: torch.dtype) -> float:
    """Return the operations per CPU second of a step's products, each computed alone."""
    seconds = sum(times * fastest(matrix_product(product, dtype), 2) for product, times in products.items())
    return sum_products(products) / seconds


def matrix_product(product: Product, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Return what computes a product; it was computed once, so that no first call is measured."""
    rows, columns, inner = product.rows, product.out_features, product.in_features
    x, gradient, weight = (torch.randn(shape).to(dtype) for shape in ((rows, inner), (rows, columns), (columns, inner)))
    left, right = {"forward": (x, weight.T), "input": (gradient, weight), "weight": (gradient.T, x)}[product.kind]
    out = torch.mm(left, right)
    return lambda: torch.mm(left, right, out=out)


def split_step(events: Iterable[FunctionEvent], seconds: float) -> dict[str, float]:
    """Divide `seconds` among PARTS: the time that operations took themselves; the rest is Python's."""
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if part := part_of(event):
            parts[part] += event.self_cpu_time_total / 1e6
    parts["Python"] = max(0.0, seconds - sum(parts.values()))
    return parts


def part_of(event: FunctionEvent) -> str | None:
    """Return the part of an operation; None for a name that groups several, whose own time is Python's."""
    parent: FunctionEvent | None = event
    while parent is not None:
        if parent.name.startswith("Optimizer.step"):
            return "optimizer"
        if parent.name.startswith("_CausalDocuments"):  # made of plain products (qwen.cpu_attention)
            return "attention"
        parent = parent.cpu_parent
    library, _, name = event.name.rpartition("::")
    if "scaled_dot_product" in name:
        return "attention"
    if name in MATRIX or library == "mkldnn":
        return "matrix products"
    is_operation = library or "CompiledFxGraph" in name  # the latter is all that torch compiled
    return "element by element" if is_operation else None


def markdown(findings: Findings, precision: str, threads: int) -> str:
    step, loading = fmean(findings.step), fmean(findings.loading)
    flops = {part: fmean(one[part] for one in findings.flops) for part in findings.flops[0]}
    useful, best = sum(flops.values()), max(findings.square_rates)
    rates = {
        "large square products": best,
        "the step's products, alone": median(findings.own_rates),
        "the step": useful / step,
        "the step with loading": useful / (step + loading),
    }
    profiled = sum(sum(parts.values()) for parts in findings.parts)
    seconds = {part: step * sum(parts[part] for parts in findings.parts) / profiled for part in PARTS}
    seconds["loading and logging"] = loading
    rate_rows = [[title, f"{rate / 1e9:,.1f}", f"{rate / best:.0%}"] for title, rate in rates.items()]
    flop_rows = [[part, f"{count / 1e9:,.2f}", f"{count / useful:.1%}"] for part, count in flops.items()]
    time_rows = [[part, f"{1e3 * s:,.1f}", f"{s / (step + loading):.1%}"] for part, s in seconds.items()]
    checked = findings.counted / max(1, findings.expected)
    texts = [
        f"{machine()}. Threads: {threads}; {precision}, {len(findings.step)} steps, CPU time.",
        table(["", "GFLOP/s", "of the machine's"], rate_rows),
        f"The step's products by torch's counter: {checked:.4f} of what the shapes say.",
        table(["what has to be computed", "GFLOP a step", "share"], flop_rows),
        table(["where the time goes", "ms a step", "share"], time_rows),
    ]
    return "\n\n".join(texts)


def measure(folder: Path, workload: str, arguments: argparse.Namespace) -> Findings:
    """Train on the workload, written into `folder` if it is missing. arguments: see `main`."""
    findings, steps = Findings(), WARM_UP + arguments.steps + PROFILED + COUNTED
    write_workload(folder, workload, records=192)
    watch_training(folder, step_observer(findings, arguments.steps), steps, arguments, *arguments.overrides)
    return findings


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A training step's rate beside that of the machine. Prints Markdown.")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="that are timed (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="keep the workload here (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="small shapes: shows that it works, not how fast")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, for example train.compile=on")
    arguments = parser.parse_args(argv)
    arguments.workers = 0  # reading images counts in this process's time
    with open_workdir(arguments.workdir) as folder, contextlib.redirect_stdout(sys.stderr):
        findings = measure(folder, "tiny" if arguments.tiny else "W2", arguments)
    print(markdown(findings, arguments.precision, arguments.threads))


if __name__ == "__main__":
    main()
