"""What a training step costs, beside what a user would take instead: `python -m benchmarks.training`.

Every way of training of `benchmarks.peers` in a process of its own, by turns, on the same weights, samples and batches.
The steps alone are measured, the reading of pictures included, from the end of a warm-up on. In fp32 the losses must be
equal, or this stops.

Prints Markdown. Needs Linux (/proc tells what a process's children cost).
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import operator
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parent.parent
NAMES = {
    "ours": "ours, first epoch",
    "ours-cached": "ours, cached features",
    "hf": "Trainer + LLaVA + PEFT",
    "hf-sorted": "the same, sorted by length",
    "trl": "TRL's SFTTrainer",
    "trl-no-checkpointing": "the same, no checkpointing",
}
CLOCKS = ("cpu", "wall")
PACKAGES = ("torch", "transformers", "peft", "trl")
OTHER_BATCHES = ("hf-sorted",)  # other losses, therefore
TOLERANCE = 1e-5  # between two losses of the same step, in fp32


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Every way in every round, by turns, each in a process of its own: name -> its answer of each round."""
    answers = {name: [] for name in arguments.only}
    kept = ("precision", "steps", "warmup", "threads", "workers")
    command = [sys.executable, "-m", "benchmarks.training", "--workdir", str(folder)]
    command += [f"--{name}={getattr(arguments, name)}" for name in kept]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for round_ in range(arguments.rounds):
        for name in answers:
            done = subprocess.run(
                [*command, "--worker", name], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
            answer = json.loads(done.stdout.splitlines()[-1])
            answers[name].append(answer)
            print(f"round {round_ + 1}, {name}: {speed(answer, 'cpu'):.0f} tokens a CPU second", file=sys.stderr)
    return answers


def speed(answer: dict, clock: str) -> float:
    """Tokens a second of `clock`, cpu or wall; padding does not count."""
    return answer["tokens"] / answer[clock]


def largest_differences(answers: dict[str, list[dict]]) -> dict[str, float]:
    """How far the losses of each way are from those of ours, at the worst step of all rounds; ways that take the samples in
    other batches left out."""
    reference = answers["ours"][0]["losses"]
    return {
        name: float(np.abs(np.subtract([answer["losses"] for answer in found], reference)).max())
        for name, found in answers.items()
        if name not in OTHER_BATCHES
    }


def check_losses(answers: dict[str, list[dict]]) -> None:
    """Raises ValueError where two ways do not learn the same thing in fp32."""
    for name, difference in largest_differences(answers).items():
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name}: its losses are up to {difference:.1e} from ours; at most {TOLERANCE} is rounding"
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
    lines = [
        f"{machine()}; {settings}; median of {len(first)} round{'s' if len(first) > 1 else ''}. {one['samples']} samples of "
        f"{one['tokens'] / one['samples']:.0f} tokens, {one['targets'] / one['tokens']:.0%} of them in answers.",
        "",
        *("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)),
    ]
    if "ours" in answers:
        told = (f"{NAMES[name]} {value:.1e}" for name, value in largest_differences(answers).items() if name != "ours")
        lines += [
            "",
            f"Losses of {len(one['losses'])} steps with updates, largest difference from ours: {', '.join(told)}.",
        ]
    return "\n".join(lines)


def ratio(ours: list[dict] | None, theirs: list[dict], value: Callable[[dict], float]) -> str:
    """Of what was measured in the same round, the median."""
    return f"{median(value(a) / value(b) for a, b in zip(ours, theirs, strict=True)):.2f}" if ours else "-"


def machine() -> str:
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name))
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{', '.join(versions)}, {date.today()}"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a training step costs, ours and others'. Prints Markdown.")
    parser.add_argument("--workload", choices=("W1", "W2"), default="W2", help="vocabulary 151,936 or 12,288")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=24, help="with the warm-up (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not measured (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each way so many times (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in every way alike (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures; 0: the one that trains")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--workdir", type=Path, help="keep the workload here for the next run (default: nowhere)")
    parser.add_argument("--append-json", type=Path, metavar="FILE", help="add a line with all that was measured")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 3 steps: shows that it works, not how fast")
    parser.add_argument("--worker", choices=NAMES, help="this way alone, in --workdir as it is; prints JSON")
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
    if arguments.worker:
        work(arguments)
        return
    from benchmarks.vlm_workload import SHAPES, make_workload

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)).resolve() / arguments.workload
        make_workload(folder, arguments.workload, arguments.steps * SHAPES[arguments.workload].batch)
        answers = run(arguments, folder)
    named = ("workload", "precision", "threads", "workers", "steps", "warmup")
    settings = ", ".join(f"{name} {getattr(arguments, name)}" for name in named)
    if arguments.append_json:
        with open(arguments.append_json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"machine": machine(), "settings": settings, "answers": answers}) + "\n")
    if arguments.precision == "fp32" and "ours" in answers:
        check_losses(answers)
    print(markdown(answers, settings))


def work(arguments: argparse.Namespace) -> None:
    """In a process of its own: one way, its answer as the last line of what it prints."""
    import torch

    torch.set_num_threads(arguments.threads)
    from benchmarks.peers import WAYS, Settings

    names = ("precision", "steps", "warmup", "threads", "workers")
    settings = Settings(arguments.workdir, **{name: getattr(arguments, name) for name in names})
    print(json.dumps(WAYS[arguments.worker](settings)))


if __name__ == "__main__":
    main()
