"""The processes of a run: do work on the main one, print from it, sum numbers over all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from config import InputError

T = TypeVar("T")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that torchrun started, on CPUs too; disconnect them after a normal end."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    yield
    state.destroy_process_group()


def print_main(text: str, end: str = "\n") -> None:
    """Print a line on the main process, and flush it."""
    if PartialState().is_main_process:
        print(text, end=end, flush=True)


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


def total(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Return each value's sum over all processes."""
    dtype = torch.float64 if accelerator.device.type != "mps" else torch.float32  # MPS has no float64
    return accelerator.reduce(torch.tensor(values, dtype=dtype, device=accelerator.device), reduction="sum").tolist()
