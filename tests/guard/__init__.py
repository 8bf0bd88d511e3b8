"""The environment of a guarded process: Python reads ./sitecustomize.py in it. For tests of the scripts."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The modules that may unpickle: the queue from the loader's workers, which the run itself forked. (Several ranks exchange
# Python objects through torch.distributed.distributed_c10d; they need sockets, and do not run under guard.)
UNPICKLERS = ["multiprocessing.queues"]
# In the home folder: the cache, and matplotlib's settings folder, which stays empty.
HOME_WRITES = (".cache", ".config/matplotlib")


def guarded(folder: Path, writes: list[Path], hash_seed: int = 0) -> dict[str, str]:
    """Return the environment of a process under guard. Its home, current folder and temporary files are in `folder`. It may
    write `writes`, /dev (shared memory), temporary files (the loader's workers put sockets there) and HOME_WRITES."""
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
        "PYTHONDONTWRITEBYTECODE": "1",  # or Python writes compiled files beside the code
        "OMP_NUM_THREADS": "1",
        "A_SECRET": "do-not-write-this-down",
    }
