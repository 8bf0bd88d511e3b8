"""Start train.py many times cheaply, and send it signals, also at a chosen moment of the run.

Every start is forked from one process that has imported everything but has run nothing: it has no threads and no state.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch

import train
import training.log
from config import run_script

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.starts"])
SECONDS = 60  # a start that takes longer counts as hanging


class At(NamedTuple):
    """A moment at which a run sends itself a signal: just before `place` happens for the `nth` time.

    place: a call of a function, by the module that looks its name up and this name ("train.evaluate"); or an audit
    event with a pattern of its path, for a rename the new one ("open */state.json", "os.rename */best").
    """

    place: str
    nth: int = 1
    signal: int = signal.SIGKILL
    to_group: bool = False


class Start:
    """A running `python train.py --config CONFIG ...` in its own process group. log: the file to which its output is
    appended."""

    def __init__(self, config: Path, *arguments: str, at: Sequence[At] = (), log: Path | None = None):
        self.log = log or config.parent / "log.txt"
        self.process = SERVER.Process(target=_run, args=(["--config", str(config), *arguments], list(at), self.log))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def send(self, number: int, to_group: bool = False) -> None:
        (os.killpg if to_group else os.kill)(self.pid, number)

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Return the exit code, negative for a signal; None if the run has not ended after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> int:
        """Return the exit code of a run that ends by itself. Raises AssertionError if it hangs."""
        code = self.wait()
        if code is None:
            self.send(signal.SIGKILL, to_group=True)
            raise AssertionError(f"the run hangs:\n{self.output()}")
        return code

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def _run(arguments: list[str], moments: list[At], log: Path) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a plain start
    os.fsync = lambda fd: None  # a kill loses nothing that the kernel already has
    training.log.draw_curves = lambda runs, image: None  # it would take longer than the rest of the run
    for moment in reversed(moments):  # of two at one function, the one armed last is reached first
        _arm(moment)
    sys.argv = ["train.py", *arguments]
    run_script(train.main_with_messages)


def _send_to_group(group: int, number: int) -> None:
    """Send a signal to a process group from outside of it, as a terminal or a job scheduler does. (The loader's workers
    would obey a signal from their parent.)"""
    sender = os.fork()
    if sender == 0:
        os.setpgid(0, 0)
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(sender, 0)


def _arm(moment: At) -> None:
    pid, seen = os.getpid(), 0

    def reach() -> None:
        nonlocal seen
        seen += 1
        if seen == moment.nth and os.getpid() == pid:  # ignore the loader's workers
            _send_to_group(pid, moment.signal) if moment.to_group else os.kill(pid, moment.signal)

    event, _, pattern = moment.place.partition(" ")
    if pattern:

        def audit(name: str, values: tuple) -> None:
            if name == event and fnmatch(os.fsdecode(values[1] if name == "os.rename" else str(values[0])), pattern):
                reach()

        sys.addaudithook(audit)
        return
    module_name, _, name = moment.place.rpartition(".")
    module = importlib.import_module(module_name)
    function = getattr(module, name)

    def wrapped(*positional: object, **named: object) -> object:
        reach()
        return function(*positional, **named)

    setattr(module, name, wrapped)
