"""Ctrl-C and SIGTERM. While a run trains, the step is finished and saved first; before and after, they end it at once.
Knows nothing of models or data."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process as Ctrl-C does: what is open is closed, what is half written is removed."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    _say("terminated; the same command goes on")
    sys.exit(128 + number)  # what a shell says of a command that a signal ended


def _say(text: str) -> None:
    os.write(2, f"\n{text}\n".encode())  # print would fail where the signal came in the middle of another print


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only noted (from then on this is true, and `signal` its number) and
    a second Ctrl-C stops at once, with KeyboardInterrupt. torchrun passes a Ctrl-C on as SIGTERM, so a SIGTERM never counts
    as the second."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            _say("stopping: this step is finished and saved first (Ctrl-C once more stops at once)")
