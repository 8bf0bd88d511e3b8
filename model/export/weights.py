"""The weights of a trained model with LoRA merged, as a stream: a tensor is read, merged and cast when it is written.

In memory at a time: one file's tensors, the encoder, and the weights of LoRA. Weights are those on disk (the released ones,
or a checkpoint's), whatever precision the run computed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import qwen
from config import InputError, LoraConfig, ModelConfig
from model.build import Processors, takes_normed, weight_files
from model.checkpoint import TensorFiles, has_adapter, load_adapter, read_tensors
from model.model import VisionLanguageModel
from model.start import encoder_tensors
from model.trainable import add_lora, parameters_without_lora
from qwen.checked_config import check_config
from qwen.configuration import released_name
from visual.encoders import VisionTower, load_vision_tower

SHARD_BYTES = 2 * 10**9  # of one safetensors file; a larger tensor has a file of its own


@dataclass(frozen=True)
class Weight:
    """A tensor to write: its name in the file, its shape, and the function that reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def renamed(self, name: str) -> Weight:
        return Weight(name, self.shape, self.read)


def held(name: str, tensor: Tensor) -> Weight:
    """Return a Weight of a tensor that is in memory."""
    return Weight(name, tuple(tensor.shape), lambda: tensor)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class MergedLanguageModel:
    """A checkpoint's language model with LoRA merged, under the names that transformers has in memory.

    skeleton: the model without memory (on the meta device); its config is the released one's.
    Raises InputError if a tensor is found nowhere, or has another shape.
    """

    def __init__(self, settings: ModelConfig, lora: LoraConfig, processors: Processors, checkpoint: Path) -> None:
        self.skeleton = _skeleton(settings, processors)
        path, self._released = checkpoint / "language_model.safetensors", TensorFiles([])
        self._trained = TensorFiles([path] if path.exists() else [])
        self._name = str(settings.language_model or path)
        if settings.language_model is not None:
            files = weight_files(str(settings.language_model)) or {}
            self._released = TensorFiles(file for name, file in files.items() if name != "config.json")
        self._lora: dict[str, Any] = {}
        parameters = parameters_without_lora(self.skeleton)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        self.is_tied = head not in self._shapes
        if self.is_tied and (head in self._trained or head in self._released):
            # transformers ties only equal tensors
            if not torch.equal(self._stored(head), self._stored(embedding)):
                self.is_tied, self._shapes[head] = False, self._shapes[embedding]
        if has_adapter(checkpoint):
            whole = VisionLanguageModel(nn.Identity(), nn.Identity(), self.skeleton)
            with torch.device("meta"):
                add_lora(whole, lora, qwen.lora_target_modules(self.skeleton, list(lora.target_modules)))
            for name, module in self.skeleton.named_modules():
                if isinstance(module, LoraLayer):
                    self._lora[name] = module
                    module.lora_A.to_empty(device="cpu")
                    module.lora_B.to_empty(device="cpu")
            load_adapter(whole, checkpoint)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type of the released weights; float32 for a model that was trained from random weights."""
        name = released_name("model.layers.0.self_attn.q_proj.weight", self.skeleton.config.model_type)[0]
        return self._released.read(name).dtype if name in self._released else torch.float32

    def weights(self) -> list[Weight]:
        """Return every tensor; the head only if it is not tied to the embeddings."""
        return [Weight(name, shape, lambda name=name: self.read(name)) for name, shape in self._shapes.items()]  # type: ignore[misc]

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, with LoRA added in float32 where the layer has it."""
        tensor = self._stored(name)
        layer = self._lora.get(name.removesuffix(".weight"))
        if layer is None:
            return tensor
        return tensor.float() + layer.get_delta_weight("default")

    def _stored(self, name: str) -> Tensor:
        tensor = self._trained.read(name) if name in self._trained else self._read_released(name)
        if tuple(tensor.shape) != self._shapes.get(name, tuple(tensor.shape)):
            raise InputError(
                f"language model {self._name}: {name} is {list(tensor.shape)}, its config.json says "
                f"{list(self._shapes[name])}; download the folder again."
            )
        return tensor

    def _read_released(self, name: str) -> Tensor:
        own, part, parts = released_name(name, self.skeleton.config.model_type)
        for found in (own, own.removeprefix("model.")):  # without the prefix if the model was saved without its head
            if found in self._released:
                return self._released.read(found).chunk(parts)[part]
        if match := re.fullmatch(
            r"(.*\.experts)\.(gate_up_proj|down_proj)", name
        ):  # one tensor an expert in released files
            wanted = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            names = [[f"{match[1]}.{i}.{kind}.weight" for kind in wanted] for i in range(self._shapes[name][0])]
            if all(one in self._released for expert in names for one in expert):
                return torch.stack([torch.cat([self._released.read(one) for one in expert]) for expert in names])
        raise InputError(f"language model {self._name}: no tensor {own!r} in its files; download the folder again.")


def _skeleton(settings: ModelConfig, processors: Processors) -> Any:
    """Return the language model on the meta device."""
    with torch.device("meta"):
        if settings.from_scratch is not None:
            vocab_size = 1 + max(processors.tokenizer.get_vocab().values())  # as model.build counts
            return qwen.new_language_model(settings.from_scratch, vocab_size=vocab_size, seed=0)
        path = str(settings.language_model)
        values, _ = PreTrainedConfig.get_config_dict(path)
        model_class: Any = qwen.LANGUAGE_MODELS.get(str(values.get("model_type")))
        if model_class is None or values.get("quantization_config"):
            raise InputError(f"language model {path}: config.json is not that of the model that was trained.")
        check_config(path, values, model_class.config_class)
        return model_class(model_class.config_class.from_dict(values)).eval()


@dataclass(frozen=True)
class Trained:
    """A model to export: what it was built from, and the checkpoint that holds what was trained."""

    settings: ModelConfig
    language_model: MergedLanguageModel
    processors: Processors
    checkpoint: Path

    def tower(self) -> VisionTower:
        """Load the encoder as the checkpoint has it, in the type that its weights have on disk."""
        settings = self.settings
        tower = load_vision_tower(
            settings.vision_tower,
            feature_layer=settings.vision_feature_layer,
            image_size=settings.image_size,
            normed_without_first=takes_normed(settings),
        )
        path = self.checkpoint / "vision_tower.safetensors"
        if path.exists():
            parameters, tensors = parameters_without_lora(tower), read_tensors(path)
            if unknown := sorted(tensors.keys() - parameters.keys()):
                raise InputError(
                    f"{path}: {unknown[0]!r} is unknown to {settings.vision_tower}; use another checkpoint."
                )
            for name, tensor in tensors.items():
                parameters[name].data = tensor
        return tower

    def projector(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the two layers of an MLP projector, as `folded_projector` does."""
        return folded_projector(read_tensors(self.checkpoint / "projector.safetensors"), dtype)


def tower_weights(tower: VisionTower, prefix: str = "") -> list[Weight]:
    """Return the encoder's tensors under the names that released files have, after `prefix`."""
    return [held(prefix + name, tensor) for name, tensor in encoder_tensors(tower).items()]


def folded_projector(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return linear_1 and linear_2 of an MLP projector, in `dtype`, with its buffers folded in: both are linear.

    tensors: of projector.safetensors. The bias of linear_1 is computed from the rounded weight, so that rounding acts on a
    feature's distance from the mean and not on the mean, which may be a hundred times larger.
    """
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    mean, std = exact.get("feature_mean", torch.zeros(1).double()), exact.get("feature_std", torch.ones(1).double())
    scale = exact.get("output_scale", torch.ones(()).double())
    weight = (exact["linear_1.weight"] / std).to(dtype)
    bias = exact["linear_1.bias"] - (weight.double() * mean).sum(dim=1)
    return {
        "linear_1.weight": weight,
        "linear_1.bias": bias.to(dtype),
        "linear_2.weight": (exact["linear_2.weight"] * scale).to(dtype),
        "linear_2.bias": (exact["linear_2.bias"] * scale).to(dtype),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_weights(weights: list[Weight], folder: Path, dtype: torch.dtype, shard_bytes: int | None = None) -> None:
    """Write model.safetensors, or several files with their index, one file's tensors in memory at a time.

    dtype: of every floating-point tensor. Raises InputError if a value is too large for it.
    """
    size, limit = torch.empty((), dtype=dtype).element_size(), shard_bytes or SHARD_BYTES
    shards: list[list[Weight]] = [[]]
    taken = 0
    for weight in weights:
        count = size * torch.Size(weight.shape).numel()
        if shards[-1] and taken + count > limit:
            shards.append([])
            taken = 0
        shards[-1].append(weight)
        taken += count
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SAFE_WEIGHTS_NAME]
    total = 0
    for name, shard in zip(names, shards, strict=True):
        tensors = {weight.name: _cast(weight, dtype) for weight in shard}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
        del tensors
    if len(shards) > 1:
        index = {weight.name: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(values, indent=1) + "\n")


def _cast(weight: Weight, dtype: torch.dtype) -> Tensor:
    tensor = weight.read().detach()
    if not tensor.is_floating_point():
        return tensor.clone(memory_format=torch.contiguous_format)
    result = tensor.to(dtype, copy=True).contiguous()
    if not torch.stack(result.aminmax()).isfinite().all():  # needs no memory of the tensor's size
        raise InputError(
            f"{weight.name}: holds a value that {str(dtype).removeprefix('torch.')} cannot represent; export with --dtype "
            "bf16 or fp32."
        )
    return result
