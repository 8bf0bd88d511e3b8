"""Start from weights of any kind: a checkpoint, or a folder that holds its own encoder or language model (an export, or an
imported model), of which the tensors that differ from the released ones are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from config import InputError, ModelConfig
from model.checkpoint import TensorFiles, compare_tensors, has_adapter, load_trained
from model.checkpoint_folder import read_json
from model.model import VisionLanguageModel
from model.trainable import WeightOrigins, parameters_without_lora, saved_parts
from visual.encoders import VisionTower

EXPORT = "export.json"  # marks a folder as an export
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Start:
    """What a model got from the folder that it starts from. origins: of its weights then. taken, left: lines of text."""

    origins: WeightOrigins
    taken: tuple[str, ...]
    left: tuple[str, ...]

    def report(self, folder: Path, model: VisionLanguageModel) -> list[str]:
        """Return lines that say what was taken, what is new and what was left."""
        new = [f"{part} (random)" for part in sorted(self.origins.random)]
        if model.has_lora and not has_adapter(folder):
            new.append("LoRA")
        rows = (("taken", self.taken), ("new", new), ("left", self.left))
        return [f"starting from {folder}", *(f"  {word}: {', '.join(names) or 'nothing'}" for word, names in rows)]


def holds_part(folder: Path, part: str) -> bool:
    """Return whether a folder has all weights of a part (vision_tower or language_model), not only the trained ones."""
    return is_llava_export(folder) or (folder / part / "config.json").exists()


def is_llava_export(folder: Path) -> bool:
    """Return whether `folder` is a Hugging Face LLaVA folder that `model.export` wrote."""
    path = folder / EXPORT
    values = read_json(path, "export again") if path.exists() else None
    return isinstance(values, dict) and values.get("format") == "llava"


def load_start(model: VisionLanguageModel, origins: WeightOrigins, folder: Path, settings: ModelConfig) -> Start:
    """Load everything but LoRA of a verified folder, before LoRA is added.

    settings: with the released models that `model` was built from; a part that was built from the folder itself is not read
    again. Raises InputError for tensors that do not fit.
    """
    left = [f"{name} ({what})" for name, what in LEFT.items() if (folder / name).exists()]
    if is_llava_export(folder):
        files = TensorFiles(sorted(folder.glob("*.safetensors")))
        projector = {
            name: files.read(f"multi_modal_projector.{name}") for name in _below(files, "multi_modal_projector.")
        }
        buffers = dict(model.projector.named_buffers())  # the export has folded them into the layers
        compare_tensors(buffers | projector, model.projector.state_dict(), folder, every_key=True)
        with torch.no_grad():
            for name, tensor in projector.items():
                model.projector.get_parameter(name).copy_(tensor)
        origins = replace(origins, random=origins.random - {"projector"})
    else:
        origins = load_trained(model, origins, folder)
    trained = dict(origins.trained)
    for part, module in saved_parts(model).items():
        path = getattr(settings, part)
        if not holds_part(folder, part) or path is None or Path(path).resolve() == (folder / part).resolve():
            continue
        files, prefix = TensorFiles(sorted((folder / part).glob("*.safetensors"))), ""
        if is_llava_export(folder):
            files, prefix = TensorFiles(sorted(folder.glob("*.safetensors"))), f"{part}."
        different, more = _take(module, files, prefix, folder=folder)
        trained[part] = trained[part] | different
        left += more
    origins = replace(origins, trained=trained)
    taken = [] if "projector" in origins.random else [f"projector ({len(list(model.projector.parameters()))} tensors)"]
    taken += ["LoRA"] if has_adapter(folder) else []
    for part, module in saved_parts(model).items():
        if trained[part]:
            count = len(parameters_without_lora(module))
            taken.append(f"{part} ({len(trained[part])} of {count} tensors are not the released ones)")
    return Start(origins, tuple(taken), tuple(left))


LEFT = {
    "state.safetensors": "optimizer and step",
    "tokenizer": "the language model's own is used",
    "image_processor": "the encoder's own is used",
}


def encoder_tensors(tower: VisionTower) -> dict[str, Tensor]:
    """Return the encoder's tensors under the names that released files have."""
    network: PreTrainedModel = tower.model
    tensors: dict[str, Tensor] = revert_weight_conversion(network, network.state_dict())
    if network.config.model_type in ("clip_vision_model", "siglip_vision_model"):
        return {f"vision_model.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
    return tensors


def _below(files: TensorFiles, prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in files.names() if name.startswith(prefix)]


def _take(part: nn.Module, files: TensorFiles, prefix: str, folder: Path) -> tuple[frozenset[str], list[str]]:
    """Give a part the tensors of a folder that differ from those that it has. Returns (their names, what was left)."""
    parameters: Mapping[str, nn.Parameter] = parameters_without_lora(part)
    stored = {name: name for name in parameters}  # parameter -> its name in the files
    if isinstance(part, VisionTower):
        by_address = {tensor.data_ptr(): name for name, tensor in encoder_tensors(part).items()}
        stored = {name: by_address[parameter.data_ptr()] for name, parameter in parameters.items()}
    left: list[str] = []
    optional = {
        name for name, place in stored.items() if ".head." in f".{place}"
    }  # SigLIP's pooling: not in LLaVA folders
    wanted = {name: place for name, place in stored.items() if name not in optional or f"{prefix}{place}" in files}
    known = {f"{prefix}{place}" for place in wanted.values()}
    found = {name: torch.empty(files.shape(name), device="meta") for name in files.names() if name.startswith(prefix)}
    found = {name: tensor for name, tensor in found.items() if name in known or not _is_buffer(part, name)}
    shapes: dict[str, Any] = {f"{prefix}{place}": parameters[name] for name, place in wanted.items()}
    for name in EMBEDDINGS:
        place = f"{prefix}{name}"
        if place in found and place in shapes and len(found[place]) > (rows := len(shapes[place])):
            left.append(f"{len(found[place]) - rows} rows of {name}")
            found[place] = found[place][:rows]
    compare_tensors(found, shapes, folder, every_key=True)
    different = set()
    for name, place in wanted.items():
        parameter, tensor = parameters[name], files.read(f"{prefix}{place}")[: len(parameters[name])]
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: {place!r} is not finite (it holds NaN or infinity); use another folder.")
        if not torch.equal(tensor.to(parameter.dtype), parameter):
            parameter.data = tensor.float()
            different.add(name)
    return frozenset(different), left


def _is_buffer(part: nn.Module, name: str) -> bool:
    """Return whether a file's tensor is a statistic of BatchNorm, which no run trains."""
    return isinstance(part, VisionTower) and name.endswith(("running_mean", "running_var", "num_batches_tracked"))
