"""Checkpoints: folders that know themselves. Written aside, flushed to disk, renamed, so that a folder with its final name
is whole; listed in a manifest with sizes and hashes, so that a damaged file is noticed and named. Only safetensors and
text: nothing in a checkpoint is ever unpickled.

    config.yaml                   the whole config, paths made absolute
    projector.safetensors         always
    adapter_model.safetensors     LoRA, with adapter_config.json: a folder that PEFT loads
    language_model.safetensors    what else of the language model was trained (full, top:N, embeddings)
    vision_tower.safetensors      what of the encoder was trained
    tokenizer/ image_processor/   as the run used them
    state.safetensors state.json  optimizer and step, to go on training; not in final/
    manifest.json                 every file with its size and sha256, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import InputError
from model.model import VisionLanguageModel

MANIFEST = "manifest.json"
FORMAT = 1


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` with what `write(partial folder)` puts there, and its manifest: all of it or nothing. An existing
    folder of that name is replaced at the very end."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    files = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n")
    for path in [*partial.rglob("*"), partial]:
        if path.is_file():
            path.chmod(0o644)  # safetensors makes files that only their owner can read
        _flush(path)
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)
    _flush(folder.parent)


def verify_folder(folder: Path) -> None:
    """InputError if `folder` is no whole checkpoint: no manifest, a file missing, of another size or of other content."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder; name one that train.sh wrote, such as runs/demo/final.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise InputError(
            f"{folder}: not a checkpoint, it has no {MANIFEST}; name checkpoint-<step> or final of a run's folder."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder / MANIFEST}: damaged, it is no list of files; use another checkpoint.") from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder / MANIFEST}: format {manifest.get('format')}, this version reads format {FORMAT}.")
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise InputError(f'{folder / MANIFEST}: lists "{name}", which is not a plain file inside the folder.')
        if not path.is_file():
            raise InputError(f"{path}: listed in {MANIFEST} but missing; use another checkpoint.")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise InputError(f"{path}: not the file that was saved (size or sha256 differs); use another checkpoint.")


def latest_checkpoint(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole `checkpoint-<step>` in a run's folder; damaged ones are passed over and reported."""
    for folder in sorted(_checkpoints(output_dir), key=_step, reverse=True):
        try:
            verify_folder(folder)
            return folder
        except InputError as error:
            report(f"passing over a damaged checkpoint: {error}")
    return None


def prune_checkpoints(output_dir: Path, save_total_limit: int | None) -> None:
    """Remove the oldest checkpoints until `save_total_limit` are left (None: all), and what a kill left half written."""
    for folder in output_dir.glob(".*.partial"):
        shutil.rmtree(folder)
    if save_total_limit is not None:
        for folder in sorted(_checkpoints(output_dir), key=_step)[:-save_total_limit]:
            shutil.rmtree(folder)


def _checkpoints(output_dir: Path) -> list[Path]:
    return [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# What was trained


def save_trained(model: VisionLanguageModel, folder: Path) -> None:
    """Write every weight that differs from the released ones: the projector always, of the rest what trains and what an
    earlier run trained (`model.trained_before`), frozen now or not."""
    save_file(_on_cpu(model.projector.state_dict()), folder / "projector.safetensors")
    if model.has_lora:
        # save_embedding_layers would ask the hub for the base model's config
        model.language_model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card: an empty form
    for name, part in _parts(model).items():
        known = _own_names(part)
        trained = {n: p for n, p in known.items() if p.requires_grad or n in model.trained_before[name]}
        if trained:
            save_file(_on_cpu(trained), folder / f"{name}.safetensors")


def load_trained(model: VisionLanguageModel, folder: Path) -> None:
    """The reverse of `save_trained`, for everything but LoRA; before LoRA is added, so that names are the model's own.
    Every tensor of every file must find its place and its shape."""
    _load_into(model.projector.state_dict(), folder / "projector.safetensors", every_key=True)
    for name, part in _parts(model).items():
        path = folder / f"{name}.safetensors"
        if path.exists():
            parameters = _own_names(part)
            keys = _read(path).keys()
            for key in keys & parameters.keys():  # what was trained was float32, and stays it
                parameters[key].data = parameters[key].data.float()
            _load_into(parameters, path, every_key=False)
            model.trained_before[name] = set(keys)


def load_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """LoRA's weights from a checkpoint into a model that has the same LoRA."""
    path = folder / "adapter_model.safetensors"
    expected = get_peft_model_state_dict(model.language_model, save_embedding_layers=False)
    tensors = _read(path)
    _compare(tensors, expected, path, every_key=True)
    set_peft_model_state_dict(model.language_model, tensors)


def has_adapter(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").exists()


def _parts(model: VisionLanguageModel) -> dict[str, nn.Module]:
    return {"language_model": model.causal_lm, "vision_tower": model.vision_tower}


def _own_names(part: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without LoRA, which is saved elsewhere."""
    return {name.replace(".base_layer.", "."): p for name, p in part.named_parameters() if "lora_" not in name}


def _load_into(targets: dict[str, Tensor], path: Path, every_key: bool) -> None:
    tensors = _read(path)
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
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the checkpoint does not hold what the config says was trained."
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); use another checkpoint.") from None


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Where training stands


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The optimizer's tensors by parameter name, and `state` (plain JSON values: the step, the loss scaler)."""
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(state) + "\n")


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The reverse of `save_state`: fills the optimizer, returns `state`. InputError where the names differ."""
    path = folder / "state.safetensors"
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
        optimizer.state[trained[name]] = {
            key: tensor if key == "step" else tensor.to(trained[name].device) for key, tensor in tensors.items()
        }
    return json.loads((folder / "state.json").read_text())
