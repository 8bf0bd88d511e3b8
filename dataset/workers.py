"""The loader's worker processes: which signals they obey, and what to say if one is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

from config import InputError


@contextlib.contextmanager
def explain_dead_workers() -> Iterator[None]:
    """Turn the error of a killed worker process into an InputError.

    torch notices a dead worker in a signal handler, so its error is raised wherever this process happens to be, not only
    where it asks for a batch.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a worker process that reads images was killed ({str(error).strip()}). The usual cause is that the machine "
            "ran out of memory: lower train.num_workers, or look for huge images. The same command resumes from the last "
            "checkpoint."
        ) from None


def obey_parent_only(worker: int) -> None:
    """Ignore Ctrl-C, and SIGTERM unless the parent process sends it. DataLoader calls this at a worker's start.

    A terminal sends Ctrl-C to every process, and torchrun, timeout, Slurm and systemd send SIGTERM to every process of a
    job. The parent still needs its workers to finish the current step; it then ends them itself by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not report who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
