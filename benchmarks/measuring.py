"""Shared by the benchmarks: measures by turns in processes of their own, clocks, memory, the machine's name, tables.

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "trl")


def make_parser(description: str, measures: Collection[str]) -> argparse.ArgumentParser:
    """Return a parser with the options that `measure_by_turns` needs, and --quick."""
    parser = argparse.ArgumentParser(description=f"{description} Prints Markdown.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--workdir", type=Path, help="keep the workload here (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="small and one round: shows that it works, not how fast")
    parser.add_argument("--measure", "--worker", choices=measures, help="only this one, in --workdir; prints JSON")
    return parser


@contextlib.contextmanager
def open_workdir(folder: Path | None) -> Iterator[Path]:
    """Yield `folder`, or a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        yield (folder or Path(temporary)).resolve()


def measure_by_turns(module: str, names: Iterable[str], rounds: int, **options: object) -> dict[str, list[dict]]:
    """Measure each of `names` once a round, in a process of its own, and return name -> its answer of each round.

    The process is `python -m benchmarks.MODULE --OPTION=VALUE ... --measure NAME`, offline. Its answer is the last line
    that it prints, in JSON. Raises RuntimeError if it fails.
    """
    threads = {"OMP_NUM_THREADS": str(options.get("threads", 1)), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1"}
    answers: dict[str, list[dict]] = {name: [] for name in names}
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    for number in range(rounds):
        for name, found in answers.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            words = [*command, "--measure", name]
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return answers


class Clock:
    """The cost of a piece of work. cpu: the clock of CPU time. reset_peak: take the peak memory from here on."""

    def __init__(self, cpu: Callable[[], float] = time.process_time, reset_peak: bool = True) -> None:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        self._clock, self._held = cpu, memory("VmRSS")
        self._cpu, self._wall = cpu(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Return CPU and wall seconds; MiB at the peak and now, above the start; MiB at the peak and now, of the process."""
        cpu, wall = self._clock() - self._cpu, time.perf_counter() - self._wall
        now, highest = memory("VmRSS"), memory("VmHWM")
        above = {"peak": highest - self._held, "held": now - self._held}
        return {"cpu": cpu, "wall": wall, **above, "highest": highest, "process": now}


def memory(field: str, file: str = "status") -> float:
    """Return a value of /proc/self/status or smaps_rollup in MiB."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


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


def fastest(call: Callable[[], object], times: int, clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of the fastest of several calls; by default those of the CPU."""
    seconds = []
    for _ in range(times):
        begun = clock()
        call()
        seconds.append(clock() - begun)
    return max(min(seconds), 1e-9)


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
