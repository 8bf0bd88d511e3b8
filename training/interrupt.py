"""Ctrl-C and SIGTERM. While a run trains, it first finishes and saves the current step; before and after, they end it at
once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as Ctrl-C does: files are closed, half-written ones removed."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    _write_stderr("terminated; the same command resumes (with --resume auto, the default)")
    sys.exit(128 + number)  # a shell's exit code for a command that a signal ended


def _write_stderr(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # print would fail if the signal interrupted another print


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only recorded: the request becomes true, and `signal` its number. A
    second Ctrl-C raises KeyboardInterrupt. torchrun passes a Ctrl-C on as SIGTERM, so a SIGTERM never counts as the second.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            _write_stderr("stopping after this step, which is finished and saved first (Ctrl-C again stops at once)")
