"""What the benchmarks share: command line, measures by turns in separate processes, clocks, memory, tables.

Imports only the standard library, so that a measured process holds nothing that it does not need. Linux only: memory and
child processes are read from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "trl")

# ---------------------------------------------------------------------------------------------------------------------
# The command line, and measures by turns


def make_parser(description: str, measures: Collection[str]) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark that measures by turns."""
    parser = argparse.ArgumentParser(description=f"{description} Prints Markdown.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="keep the workload here (default: a temporary folder)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: shows that it works, not how fast"
    )
    parser.add_argument("--measure", "--worker", choices=measures, help="only this one, in --workdir; prints JSON")
    return parser


@contextlib.contextmanager
def open_workdir(folder: Path | None) -> Iterator[Path]:
    """Yield `folder`, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        yield (folder or Path(temporary)).resolve()


def measure_by_turns(
    module: str, names: Iterable[str], rounds: int, options: Sequence[str], **environment: str
) -> dict[str, list[dict]]:
    """Measure each of `names` once a round, in a process of its own, and return name -> its answer of each round.

    The process is `python -m benchmarks.MODULE OPTIONS --measure NAME`; the last line that it prints is its answer in JSON.
    Raises RuntimeError if it fails.
    """
    answers: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name, found in answers.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--measure", name]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return answers


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


class Clock:
    """What a piece of work costs from here on: seconds, and memory above what the process held before."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident memory
        self._before = memory("VmRSS")
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return CPU and wall seconds; MiB above the start, at the peak and now; MiB of the whole process."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        now, highest = memory("VmRSS"), memory("VmHWM")
        return {"cpu": cpu, "wall": wall, "peak": highest - self._before, "held": now - self._before, "process": now}


class Meter:
    """Cost of the steps after a warm-up.

    cost, after the last step: CPU seconds of this process and its children, wall seconds, and the peak memory of this
    process in MiB until then, as a whole and above what its imports took.
    """

    def __init__(self, steps: int, warm_up: int):
        self.steps, self.warm_up, self.done = steps, warm_up, 0
        self._imports = peak_memory()

    def step_done(self) -> None:
        self.done += 1
        if self.done == self.warm_up:
            self._start = cpu_seconds(), time.perf_counter()
        if self.done == self.steps:
            cpu, wall = cpu_seconds() - self._start[0], time.perf_counter() - self._start[1]
            peak = peak_memory()
            self.cost = {"cpu": cpu, "wall": wall, "memory": peak, "memory_above": peak - self._imports}


def memory(field: str, file: str = "status") -> float:
    """Return a value of /proc/self/status or smaps_rollup in MiB."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def peak_memory() -> float:
    """Return the peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    """Return user and system time of this process and its descendants, finished ones included."""
    spent, parents = time.process_time() + sum(os.times()[2:4]), [os.getpid()]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ends just now
                for child in map(int, children.read_text().split()):
                    values = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                    spent += sum(map(int, values[11:15])) / os.sysconf("SC_CLK_TCK")
                    parents.append(child)
    return spent


def fastest(call: Callable[[], object], times: int) -> float:
    """Return the CPU seconds of the fastest of several calls."""
    seconds = []
    for _ in range(times):
        begun = time.process_time()
        call()
        seconds.append(time.process_time() - begun)
    return max(min(seconds), 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def machine(packages: Sequence[str] = PACKAGES) -> str:
    """Return processor, cores, versions of Python and of the installed ones of `packages`, and the date."""
    from training.provenance import cpu_name, versions  # imports torch

    found = versions()
    if importlib.util.find_spec("trl"):
        found["trl"] = importlib.metadata.version("trl")
    named = [f"{name} {found[name]}" for name in packages if name in found]
    cores, python = f"{os.cpu_count()} cores", f"Python {found['python']}"
    return ", ".join([cpu_name(), cores, python, *named, str(datetime.date.today())])


def median_of(rounds: int) -> str:
    return f"median of {rounds} round{'s' if rounds > 1 else ''}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
