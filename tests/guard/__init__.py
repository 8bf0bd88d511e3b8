"""Processes that must not reach out: the environment in which Python reads ./sitecustomize.py. For tests of the scripts."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Who may unpickle: what reads the batches of the loader's workers, which the run itself forked. (Several ranks tell each
# other Python objects through torch.distributed.distributed_c10d; they need sockets, and are not run under guard.)
UNPICKLERS = ["multiprocessing.queues"]
# Of the home: the cache, and the folder for its settings that matplotlib makes beside it, and leaves empty.
HOME_WRITES = (".cache", ".config/matplotlib")


def guarded(folder: Path, writes: list[Path], hash_seed: int = 0) -> dict[str, str]:
    """The environment of a process under guard. Its home, its current folder and its temporary files lie in `folder`; it
    may write `writes`, /dev (shared memory), temporary files (the loader's workers put sockets there), HOME_WRITES."""
    for name in ("home/.config", "temp", "elsewhere"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    own = [folder / "temp", *(folder / "home" / name for name in HOME_WRITES)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "MPL", "TORCH"))}
    return kept | {
        "PYTHONPATH": str(Path(__file__).parent),
        "GUARD_LOG": str(folder / "refused.jsonl"),
        "GUARD_WRITES": ":".join(map(str, [*writes, *own, "/dev"])),
        "GUARD_PICKLE": ":".join(UNPICKLERS),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "temp"),
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONDONTWRITEBYTECODE": "1",  # else Python keeps what it compiled beside the code
        "OMP_NUM_THREADS": "1",
        "A_SECRET": "do-not-write-this-down",
    }
