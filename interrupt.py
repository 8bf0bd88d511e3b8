"""Ctrl-C and SIGTERM while a run trains: the step is finished and saved first. Knows nothing of models or data."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """A context in which the first SIGINT or SIGTERM is only noted (`signal` is its number) and a second Ctrl-C stops at
    once, with KeyboardInterrupt. torchrun passes a Ctrl-C on as SIGTERM, so a SIGTERM never counts as the second."""

    def __init__(self) -> None:
        self.signal: int | None = None

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
            print("\nstopping: this step is finished and saved first (Ctrl-C once more stops at once)", flush=True)
