"""The processes of a run: sums, and how long one waits for another. Run: sh tests/run.sh tests/training/test_processes.py"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.processes import TIMEOUT, sum_dtype

ROOT = Path(__file__).parents[2]

WAITS = """
import os, torch, torch.distributed as dist
from training.processes import process_group
with process_group():
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    os.write(1, f"{dist.get_world_size()} {timeout}\\n".encode())  # one write: both processes share the pipe
"""


@pytest.mark.parametrize("kind, dtype", [("cpu", torch.float64), ("cuda", torch.float64), ("mps", torch.float32)])
def test_losses_are_summed_in_a_type_that_the_device_has(kind, dtype):
    assert sum_dtype(torch.device(kind)) == dtype


def test_no_other_code_of_a_step_needs_float64():
    """Apple's GPUs have no float64: only `sum_dtype` may name it."""
    found = {
        f"{path.name}:{node.lineno}"
        for path in [ROOT / "train.py", *(ROOT / "training").glob("*.py"), *(ROOT / "model").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("double", "float64")
    }
    assert {place.split(":")[0] for place in found} == {"processes.py"} and len(found) == 1


def test_processes_wait_long_for_the_main_one(tmp_path):
    """Preparing data takes longer than the ten minutes after which NCCL ends a run by default."""
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"2 {TIMEOUT}"] * 2
