"""What a checkpoint holds: the weights that were trained and where training stands. Only safetensors and text: nothing in
a checkpoint is ever unpickled. How its folder is written and verified is `model.folder`'s matter.

    config.yaml                   the whole config, paths made absolute
    run.json                      how it came about: every start of the run, with command, versions and machine
    projector.safetensors         always
    adapter_model.safetensors     LoRA, with adapter_config.json: a folder that PEFT loads
    language_model.safetensors    what else of it was trained (full, top:N, embeddings), and all of one from scratch
    vision_tower.safetensors      what of the encoder was trained
    untrained.json                the parts whose weights are random still, if there are any
    tokenizer/ image_processor/   as the run used them
    state.safetensors state.json  optimizer and step, to go on training; not in final/
    manifest.json                 every file with its size and sha256, written last
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qwen
from config import InputError
from model.folder import read_json
from model.model import VisionLanguageModel
from model.parallel import laid_out_as

UNTRAINED = "untrained.json"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter


# ---------------------------------------------------------------------------------------------------------------------
# What was trained


def save_trained(model: VisionLanguageModel, folder: Path) -> None:
    """Write every weight that differs from the released ones: the projector always, of the rest what trains and what an
    earlier run trained (`model.trained_before`), frozen now or not."""
    for name, tensors in _own_files(model).items():
        save_file(_on_cpu(tensors), folder / name)
    if model.untrained:
        (folder / UNTRAINED).write_text(json.dumps(sorted(model.untrained)) + "\n")
    if model.has_lora:
        # save_embedding_layers would ask the hub for the base model's config
        model.language_model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card: an empty form
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["target_modules"].sort()  # PEFT keeps a set, whose order is another one in each process
        path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def trained_bytes(model: VisionLanguageModel) -> int:
    """What the tensors of `save_trained` take on the disk."""
    files = list(_own_files(model).values()) + ([_adapter(model)] if model.has_lora else [])
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def load_trained(model: VisionLanguageModel, folder: Path) -> None:
    """The reverse of `save_trained`, for everything but LoRA; before LoRA is added, so that names are the model's own.
    Every tensor of every file must find its place and its shape, and hold numbers."""
    path = folder / "projector.safetensors"
    _fill(model.projector.state_dict(), _read(path), path, every_key=True)
    for name, part in _parts(model).items():
        path = folder / f"{name}.safetensors"
        is_whole = name == "language_model" and model.is_from_scratch
        if is_whole or path.exists():
            parameters, tensors = _own_names(part), _read(path)
            for key in tensors.keys() & parameters.keys():  # what was trained was float32, and stays it
                parameters[key].data = parameters[key].data.float()
            _fill(parameters, tensors, path, every_key=is_whole)
            model.trained_before[name] = set(tensors)
    model.untrained = _read_untrained(folder)


def refuse_other_sizes(folder: Path, vocabulary: int, sizes: dict) -> None:
    """InputError where a new language model of these sizes (see `qwen.new_language_model`) is not the one in `folder`: told
    from shapes alone, so that a number in a stranger's config fills no memory."""
    path = folder / "language_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            found = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); the config makes its own language model (model.from_scratch), whose "
            "weights are there or nowhere. Use another checkpoint."
        ) from None
    with torch.device("meta"):
        made = qwen.new_language_model(vocabulary, 0, **sizes)
    _compare(found, dict(made.named_parameters()), path, every_key=True)


def _read_untrained(folder: Path) -> set[str]:
    path = folder / UNTRAINED
    parts = read_json(path) if path.exists() else []
    if not isinstance(parts, list) or not set(map(str, parts)) <= {"projector", "language_model", "embeddings"}:
        raise InputError(f"{path}: no list of a model's parts; use another checkpoint.")
    return set(parts)


def load_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """LoRA's weights from a checkpoint into a model that has the same LoRA."""
    path = folder / "adapter_model.safetensors"
    tensors = _read(path)
    _compare(tensors, _adapter(model), path, every_key=True)
    set_peft_model_state_dict(model.language_model, tensors)


def has_adapter(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").exists()


def _parts(model: VisionLanguageModel) -> dict[str, nn.Module]:
    return {"language_model": model.causal_lm, "vision_tower": model.vision_tower}


def _own_names(part: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without LoRA, which is saved elsewhere."""
    return {name.replace(".base_layer.", "."): p for name, p in part.named_parameters() if "lora_" not in name}


def _own_files(model: VisionLanguageModel) -> dict[str, dict[str, Tensor]]:
    """File -> tensors, of all that is saved but LoRA."""
    files: dict[str, dict[str, Tensor]] = {"projector.safetensors": model.projector.state_dict()}
    for name, part in _parts(model).items():
        before = model.trained_before[name]
        trained = {n: p for n, p in _own_names(part).items() if p.requires_grad or n in before}
        if trained:
            files[f"{name}.safetensors"] = trained
    return files


def _adapter(model: VisionLanguageModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model.language_model, save_embedding_layers=False)


def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], path: Path, every_key: bool) -> None:
    _compare(tensors, targets, path, every_key)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path, every_key: bool) -> None:
    unexpected = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found)) if every_key else []
    shapes = [
        f"{name} is {list(found[name].shape)}, the model has {list(expected[name].shape)}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name].shape
    ]
    for problem, names in (("unknown to this model", unexpected), ("missing", missing), ("of another shape", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(
                f"{path}: {len(names)} tensors {problem}: {'; '.join(names[:3])}{more}. The checkpoint was trained with "
                "another encoder, language model, projector or LoRA than the config says."
            )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: finite real numbers. InputError names one that is not."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the checkpoint does not hold what the config says was trained."
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); use another checkpoint.") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{path}: {name!r} is {tensor.dtype}, expected float32; use another checkpoint.")
        if not tensor.isfinite().all():
            raise InputError(
                f"{path}: {name!r} holds values that are no numbers (NaN or infinite); use another checkpoint."
            )
    return tensors


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Where training stands


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The optimizer's tensors by parameter name, and `state` (plain JSON values: the step, the loss scaler)."""
    save_file(_on_cpu(_state_tensors(model, optimizer)), folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What the tensors of `save_state` take on the disk."""
    return sum(tensor.nbytes for tensor in _state_tensors(model, optimizer).values())


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The reverse of `save_state`: fills the optimizer, returns `state`. InputError where the names or shapes differ, or the
    step is no count."""
    path = folder / "state.safetensors"
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise InputError(f'{folder / "state.json"}: "step" is no number of steps; use another checkpoint.')
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full, tensor in _read(path).items():
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
            raise InputError(f"{path}: {name!r} has not the optimizer state that AdamW keeps; use another checkpoint.")
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
