"""The state from which training resumes: the position in the run, the optimizer, the loss scaler. Saved as safetensors and
JSON beside the weights, in every checkpoint-<step>.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import InputError
from model.checkpoint import on_cpu, read_tensors
from model.checkpoint_folder import read_json
from training.sharding import laid_out_as

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter


@dataclass
class Position:
    """How far a run has come. The checkpoint stores the first two and the last; the third is in best/best.json."""

    step: int = 0  # steps done
    bad_steps: int = 0  # bad steps in a row, up to now
    lowest_val_loss: float = math.inf
    planned_steps: int | None = None  # of the whole run, when its checkpoint was written


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Write the optimizer's tensors by parameter name, and `state`, plain JSON values such as the step."""
    save_file(on_cpu(_state_tensors(model, optimizer)), folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes that the tensors of `save_state` take on disk."""
    return sum(tensor.nbytes for tensor in _state_tensors(model, optimizer).values())


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the optimizer from what `save_state` wrote, and return `state`.

    Raises InputError if names or shapes differ, or the step is not a count.
    """
    path = folder / "state.safetensors"
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise InputError(f'{folder / "state.json"}: "step" is not a number of steps; use another checkpoint.')
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full, tensor in read_tensors(path).items():
        name, _, key = full.rpartition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if set(by_parameter) - set(trained):
        raise InputError(
            f"{path}: its optimizer state is of other parameters than the config trains; use --resume none."
        )
    for name, tensors in by_parameter.items():
        shapes = {key: torch.Size() if key == "step" else trained[name].shape for key in ADAMW_STATE}
        if {key: tensor.shape for key, tensor in tensors.items()} != shapes:
            raise InputError(f"{path}: {name!r} lacks the optimizer state that AdamW keeps; use another checkpoint.")
        optimizer.state[trained[name]] = {
            key: tensor if key == "step" else laid_out_as(trained[name], tensor) for key, tensor in tensors.items()
        }
    return state


def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
