"""train.py started many times at little cost: every start is forked from one process that has imported everything and has
run nothing, so that it has no thread and no state. Signals come when they are sent, or at a chosen moment of the run.
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
from config import run_script
from training.log import RunLog

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.starts"])
SECONDS = 60  # that a start may take before it is taken to hang


class At(NamedTuple):
    """A moment at which a run sends itself a signal: the `count`-th time that `place` is come by. place: a function
    ("train.evaluate": when it is called), or an audit event with a path that it names ("open */state.json", "os.rename
    */best": just before it happens)."""

    place: str
    count: int = 1
    signal: int = signal.SIGKILL
    to_group: bool = False


class Start:
    """A running `python train.py --config CONFIG ...` in a process group of its own. log: the file that it writes its
    output to, which is not emptied."""

    def __init__(self, config: Path, *arguments: str, at: Sequence[At] = (), log: Path | None = None):
        self.log = log or config.parent / "log.txt"
        self.process = SERVER.Process(target=_run, args=(["--config", str(config), *arguments], list(at), self.log))
        self.process.start()

    def send(self, number: int, to_group: bool = False) -> None:
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    def wait(self, seconds: float = SECONDS) -> int | None:
        """The exit code, negative for a signal; None where the run goes on after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self) -> int:
        """The exit code of a run that ends by itself."""
        code = self.wait()
        if code is None:
            self.send(signal.SIGKILL, to_group=True)
            raise AssertionError(f"the run hangs:\n{self.output()}")
        return code

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def _run(arguments: list[str], moments: list[At], log: Path) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins with it ignored
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as without a server
    os.fsync = lambda _: None  # a killed process loses nothing that it gave to the kernel
    RunLog.draw = lambda _: None  # curves.png takes longer than all the rest
    for moment in reversed(moments):  # of two at one place the first comes first
        _arm(moment)
    sys.argv = ["train.py", *arguments]
    run_script(train.main_with_messages)


def _send_to_group(group: int, number: int) -> None:
    """From a process outside of it, as a terminal or a job scheduler is: workers obey their parent."""
    sender = os.fork()
    if sender == 0:
        os.setpgid(0, 0)
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(sender, 0)


def _arm(moment: At) -> None:
    pid, seen = os.getpid(), 0

    def come_by() -> None:
        nonlocal seen
        seen += 1
        if seen == moment.count and os.getpid() == pid:  # not in the loader's workers
            _send_to_group(pid, moment.signal) if moment.to_group else os.kill(pid, moment.signal)

    event, _, pattern = moment.place.partition(" ")
    if pattern:

        def audit(name: str, values: tuple) -> None:
            if name == event and fnmatch(os.fsdecode(values[1] if name == "os.rename" else str(values[0])), pattern):
                come_by()

        sys.addaudithook(audit)
        return
    module_name, _, name = moment.place.rpartition(".")
    module = importlib.import_module(module_name)
    function = getattr(module, name)

    def wrapped(*positional: object, **named: object) -> object:
        come_by()
        return function(*positional, **named)

    setattr(module, name, wrapped)
