"""The processes of a run: do work on the main one, print from it, sum numbers over all of them."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from config import InputError, printable

T = TypeVar("T")

# how long a process may wait for another: preparing data, verifying images and saving are done by the main process alone,
# and NCCL's default of ten minutes would end the run
TIMEOUT = datetime.timedelta(days=2)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started, on CPUs too; disconnect them after a normal end."""
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
    yield
    state.destroy_process_group()


def print_main(text: str, end: str = "\n") -> None:
    """Print text on the main process, and flush it. Escape sequences are escaped."""
    if PartialState().is_main_process:
        print(printable(text, lines=True), end=end, flush=True)


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process and return its result on every process.

    An InputError is raised on every process too, so that none waits for one that has stopped.
    """
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except InputError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def faults_of_all(faults: Sequence[str]) -> list[str]:
    """Return the faults that any process found, each once, on every process: one that stops alone leaves the others
    waiting."""
    return list(dict.fromkeys(gather_object(list(faults))))


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which losses are summed on a device: float64, which Apple's GPUs (MPS) lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def total(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Return each value's sum over all processes."""
    device = accelerator.device
    return accelerator.reduce(torch.tensor(values, dtype=sum_dtype(device), device=device), reduction="sum").tolist()
