"""The weights in a checkpoint: saved and loaded as safetensors. Nothing in a checkpoint is ever unpickled. How its folder is
written and verified is in `model.checkpoint_folder`; optimizer and step are in `training.state`.

    config.yaml                   the whole config, with paths relative to the folder
    run.json                      the run's history: command, versions and machine of every start
    projector.safetensors         always
    adapter_model.safetensors     LoRA, with adapter_config.json: a folder that PEFT loads
    language_model.safetensors    what else of it was trained (full, top:N, embeddings); all of a model from scratch
    vision_tower.safetensors      what of the encoder was trained
    untrained.json                the parts whose weights are still random, if any
    config.json                   a message to tools that would load the folder as a model of transformers
    tokenizer/ image_processor/   as the run used them
    state.safetensors state.json  optimizer and step, to resume training; not in final/
    manifest.json                 every file with its size and SHA-256, written last
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qwen
from config import InputError, ScratchConfig
from model.checkpoint_folder import read_json
from model.model import VisionLanguageModel
from model.trainable import WeightOrigins, parameters_without_lora, saved_parts

UNTRAINED = "untrained.json"
# transformers would load the base model alone, which sees no image; it repeats an unknown model_type in its error
NOT_A_MODEL = (
    "a checkpoint without its base model: open it with model.load(folder), or turn it into a folder for transformers with "
    "python -m model.export"
)
LISTED = 12  # tensors that a message names at most
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# keys of adapter_config.json that do not change what trained LoRA weights compute
ADAPTER_FREE = (
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode init_lora_weights loftq_config "
    "lora_dropout lora_ga_config peft_version revision runtime_config task_type"
).split()
LORA_KEYS = {"r": "lora.r", "lora_alpha": "lora.alpha", "target_modules": "lora.target_modules"}


def save_trained(model: VisionLanguageModel, origins: WeightOrigins, folder: Path) -> None:
    """Write every weight that differs from the released ones: the projector, LoRA, and what `origins.trained` lists."""
    (folder / "config.json").write_text(json.dumps({"model_type": NOT_A_MODEL}, indent=1) + "\n")
    for name, tensors in _files(model, origins).items():
        save_file(on_cpu(tensors), folder / name)
    if origins.random:
        (folder / UNTRAINED).write_text(json.dumps(sorted(origins.random)) + "\n")
    if model.has_lora:
        # save_embedding_layers would ask the hub for the base model's config
        model.language_model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card: an empty form
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["target_modules"].sort()  # PEFT keeps a set, whose order differs from process to process
        base = values.get("base_model_name_or_path")
        if base and os.path.isabs(base):
            values["base_model_name_or_path"] = Path(base).name  # the path says nothing on another machine
        path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def saved_parameters(model: VisionLanguageModel, origins: WeightOrigins) -> list[nn.Parameter]:
    """Return the parameters that `save_trained` writes, whatever their dtype."""
    lora = [parameter for name, parameter in model.causal_lm.named_parameters() if "lora_" in name]
    trained = [parameter for part in saved_parts(model) for parameter in _trained(model, origins, part).values()]
    return [*model.projector.parameters(), *lora, *trained]


def trained_bytes(model: VisionLanguageModel, origins: WeightOrigins) -> int:
    """Return the bytes that the tensors of `save_trained` take on disk."""
    files = list(_files(model, origins).values()) + ([_adapter(model)] if model.has_lora else [])
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def load_trained(model: VisionLanguageModel, origins: WeightOrigins, folder: Path) -> WeightOrigins:
    """Load what `save_trained` wrote, except LoRA, before LoRA is added. Returns the origins of the loaded weights.

    Raises InputError unless every tensor of every file has a parameter of its name and shape, and is finite.
    """
    path = folder / "projector.safetensors"
    tensors = read_tensors(path)
    # a checkpoint from before projectors had buffers: its projector takes features as they are
    tensors |= {name: value for name, value in model.projector.named_buffers() if name not in tensors}
    _fill(model.projector.state_dict(), tensors, path, every_key=True)
    trained = dict(origins.trained)
    for name, part in saved_parts(model).items():
        path = folder / f"{name}.safetensors"
        is_whole = name == "language_model" and origins.from_scratch
        if is_whole or path.exists():
            parameters, tensors = parameters_without_lora(part), read_tensors(path)
            for key in tensors.keys() & parameters.keys():  # what was trained in float32 stays float32
                parameters[key].data = parameters[key].data.float()
            _fill(parameters, tensors, path, every_key=is_whole)
            trained[name] = frozenset(tensors)
    return replace(origins, random=_read_untrained(folder), trained=trained)


def refuse_other_sizes(folder: Path, sizes: ScratchConfig, *, vocab_size: int) -> None:
    """Raise InputError unless `folder` holds a language model of these sizes. Compares shapes alone, so that a number in a
    stranger's config fills no memory."""
    path = folder / "language_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            found = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); the config makes its own language model (model.from_scratch), whose "
            "weights exist nowhere else. Use another checkpoint."
        ) from None
    with torch.device("meta"):
        made = qwen.new_language_model(sizes, vocab_size=vocab_size, seed=0)
    compare_tensors(found, dict(made.named_parameters()), path, every_key=True)


def _read_untrained(folder: Path) -> frozenset[str]:
    path = folder / UNTRAINED
    parts = read_json(path) if path.exists() else []
    if not isinstance(parts, list) or not set(map(str, parts)) <= {"projector", "language_model", "embeddings"}:
        raise InputError(f"{path}: not a list of a model's parts; use another checkpoint.")
    return frozenset(parts)


def load_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """Load LoRA's weights from a checkpoint into a model that has the same LoRA.

    Raises InputError for another rank, scaling or set of layers, which may have the same shapes, and for weights that do not
    fit.
    """
    _refuse_other_adapter(model, folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    tensors = read_tensors(path)
    compare_tensors(tensors, _adapter(model), path, every_key=True)
    set_peft_model_state_dict(model.language_model, tensors)


def _refuse_other_adapter(model: VisionLanguageModel, path: Path) -> None:
    """Raise InputError unless `path` describes the model's own LoRA. Keys that one version of PEFT lacks are skipped."""
    found, config = read_json(path), model.language_model.peft_config["default"].to_dict()
    if not isinstance(found, dict):
        raise InputError(f"{path}: not an object with LoRA's settings; use another checkpoint.")
    expected = json.loads(json.dumps(config, default=list))  # as PEFT writes it; it keeps names in sets
    different = [
        f"{LORA_KEYS.get(key, key)} is {_plain(found[key])!r:.80}, the config says {_plain(value)!r:.80}"
        for key, value in sorted(expected.items())
        if key in found and key not in ADAPTER_FREE and _plain(found[key]) != _plain(value)
    ]
    if different:
        raise InputError(
            f"{path}: another LoRA than the config's: {'; '.join(different)}. Its weights would compute something else; "
            "give the values of the checkpoint."
        )


def _plain(value: object) -> object:
    """Return a list sorted, for PEFT's sets of names have no order, and anything else as it is."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def has_adapter(folder: Path) -> bool:
    """Return whether a checkpoint holds LoRA weights."""
    return (folder / "adapter_model.safetensors").exists()


def _files(model: VisionLanguageModel, origins: WeightOrigins) -> dict[str, dict[str, Tensor]]:
    """Return file -> tensors, of everything saved except LoRA."""
    files: dict[str, dict[str, Tensor]] = {"projector.safetensors": model.projector.state_dict()}
    for name in saved_parts(model):
        if trained := _trained(model, origins, name):
            files[f"{name}.safetensors"] = dict(trained)
    return files


def _trained(model: VisionLanguageModel, origins: WeightOrigins, part: str) -> dict[str, nn.Parameter]:
    """Return name -> parameter, of what differs from the released weights of one part."""
    parameters = parameters_without_lora(saved_parts(model)[part])
    return {name: parameter for name, parameter in parameters.items() if name in origins.trained[part]}


def _adapter(model: VisionLanguageModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model.language_model, save_embedding_layers=False)


def _fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path, every_key: bool) -> None:
    compare_tensors(tensors, targets, path, every_key=every_key)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)


def compare_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, every_key: bool) -> None:
    """Raise InputError that lists the tensors of `path` that are unknown, of another shape, or (every_key) missing."""
    unexpected = sorted(set(found) - set(expected))
    missing = sorted(set(expected) - set(found)) if every_key else []
    shapes = [
        f"{name} is {list(found[name].shape)}, the model has {list(expected[name].shape)}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name].shape
    ]
    for problem, names in (("unknown to this model", unexpected), ("missing", missing), ("of another shape", shapes)):
        if names:
            more = f"; and {len(names) - LISTED} more" if len(names) > LISTED else ""
            raise InputError(
                f"{path}: {len(names)} tensors {problem}: {'; '.join(names[:LISTED])}{more}. The checkpoint was trained "
                "with another encoder, language model, projector or LoRA than the config says."
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises InputError if one is not a finite floating-point tensor."""
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
            raise InputError(f"{path}: {name!r} is not finite (it holds NaN or infinity); use another checkpoint.")
    return tensors


class TensorFiles:
    """The tensors of safetensors files, each read when it is asked for. Raises InputError if a file cannot be opened.

    A file is opened again for each tensor: while it is open, all that was read of it stays in memory.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        for path in files:
            with self._open(path) as file:
                self._file_of |= dict.fromkeys(file.keys(), path)
                self._shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cannot be read ({error}); download it again.") from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> list[int]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        with self._open(self._file_of[name]) as file:
            return file.get_tensor(name)


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached, contiguous copies on the CPU, as safetensors saves them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
