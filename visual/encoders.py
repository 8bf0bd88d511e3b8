"""The image encoders: one table row a family, and the frozen tower that the rest of the model sees.

A tower gives the patch features of one hidden layer, nothing else: class tokens and registers are dropped here and
the number of tokens an image takes is known here. Knows nothing of projectors, language models or the config.

Shapes: M images, N patches an image, Dv the encoder's width, S the side of the square input in pixels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from config import InputError, choose, how_to_convert
from visual.processor import load_image_processor


@dataclass(frozen=True)
class Encoder:
    """What has to be known about a family of encoders beyond what its own config says."""

    model: type[PreTrainedModel]
    layers: str  # where the model keeps its list of layers
    final_norm: str | None  # what the model applies to the last layer's patches
    class_tokens: int  # tokens in front of the patches, registers (which the config counts) aside
    any_size: bool  # whether positions extend to other image sizes than the trained one
    unused: tuple[str, ...]  # parameters that no hidden state depends on


_CLIP = Encoder(CLIPVisionModel, "encoder.layers", None, 1, False, ("post_layernorm.",))
_SIGLIP = Encoder(SiglipVisionModel, "encoder.layers", "post_layernorm", 0, False, ("post_layernorm.", "head."))
_DINO_UNUSED = ("layernorm.", "norm.", "embeddings.mask_token")

# By the `model_type` of config.json. "clip" and "siglip" are whole checkpoints: only their vision half is loaded.
# SigLIP 2 with a fixed resolution calls itself "siglip".
ENCODERS: dict[str, Encoder] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": Encoder(Dinov2Model, "encoder.layer", "layernorm", 1, True, _DINO_UNUSED),
    "dinov2_with_registers": Encoder(Dinov2WithRegistersModel, "encoder.layer", "layernorm", 1, True, _DINO_UNUSED),
    "dinov3_vit": Encoder(DINOv3ViTModel, "model.layer", "norm", 1, True, _DINO_UNUSED),
}

_NAFLEX = (
    "is the NaFlex SigLIP 2, in which every image has its own number of patches; "
    "use one of a fixed resolution, such as google/siglip2-base-patch16-224"
)
_REFUSED = {
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
    "dinov3_convnext": "is a convolutional network without patch tokens; use a DINOv3 ViT, such as "
    "facebook/dinov3-vits16-pretrain-lvd1689m",
}

# What a whole checkpoint holds beside its vision half.
_NOT_VISION = re.compile(r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$")


class VisionTower(nn.Module):
    """An encoder as a function from pixels to the patch features of one hidden layer.

    `feature_layer` indexes transformers' `hidden_states`: -1 is the output of the last layer, before any final norm,
    -2 that of the layer before it (LLaVA's choice). Layers above it are kept, so that the tower can be saved whole,
    but not run.

    Everything is frozen to begin with. A tower in which nothing trains stays in eval mode, whatever its parent does.

    InputError: a `feature_layer` that the model lacks; an `image_size` that its positions or patches do not allow.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, feature_layer: int, image_size: int) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.hidden_size: int = config.hidden_size
        self.patch_size = _side(config.patch_size, "patch_size in the encoder's config.json")
        self.image_size = _checked_size(image_size, encoder, config, self.patch_size)
        self.num_image_tokens = (self.image_size // self.patch_size) ** 2
        self._prefix_tokens = encoder.class_tokens + getattr(config, "num_register_tokens", 0)
        self._encoder = encoder

        parent, _, name = encoder.layers.rpartition(".")
        layers = model.get_submodule(encoder.layers)
        self._depth = _depth(feature_layer, len(layers))
        setattr(model.get_submodule(parent), name, _FirstLayers(layers, self._depth))
        if encoder.final_norm:
            model.get_submodule(encoder.final_norm).register_forward_hook(_input_instead)
        if hasattr(model, "use_head"):  # SigLIP's pooling head: nothing here reads its output
            model.use_head = False
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values [M, 3, S, S] -> features [M, N, Dv], M = 0 included; without a graph where nothing trains.

        ValueError: pixels of another size than `image_size`.
        """
        expected = (3, self.image_size, self.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}, this tower takes [M, *{expected}]")
        if not len(pixel_values):  # a batch of text alone, which transformers' attention cannot reshape
            return pixel_values.new_empty(0, self.num_image_tokens, self.hidden_size, dtype=self.model.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            # Of the layers that are run, and without a final norm: transformers' hidden_states[feature_layer].
            features = self.model(pixel_values).last_hidden_state
        return features[:, self._prefix_tokens :]

    def train(self, mode: bool = True) -> VisionTower:
        """As nn.Module.train, but a tower in which nothing trains stays in eval mode."""
        return super().train(mode and self.trains)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def trains(self) -> bool:
        """Whether anything in the tower is trainable. `requires_grad` is the one switch: no flag beside it."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def unfreeze(self, top: int | None = None) -> None:
        """Let the last `top` of the layers that are run train; None: everything that the features depend on.

        InputError: `top` is not between 1 and the number of layers that are run.
        """
        layers = list(self.model.get_submodule(self._encoder.layers).children())
        used, unused = layers[: self._depth], layers[self._depth :]
        if top is None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not name.startswith(self._encoder.unused))
            for layer in unused:
                layer.requires_grad_(False)
        elif 1 <= top <= len(used):
            for layer in used[-top:]:
                layer.requires_grad_(True)
        else:
            raise InputError(
                f"vision_tower: top:{top}, but {len(used)} of the encoder's {len(layers)} layers are run; "
                f"give top:1 to top:{len(used)}."
            )


def _input_instead(norm: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook that makes `norm` change nothing, while its parameters stay in the state_dict."""
    return inputs[0]


class _FirstLayers(nn.ModuleList):
    """All layers of an encoder, of which iteration yields the first `depth`: the encoder's own forward then ends
    there, while parameters and state_dict stay those of the whole."""

    def __init__(self, layers: nn.ModuleList, depth: int) -> None:
        super().__init__(layers)
        self._depth = depth

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self._depth)


def load_vision_tower(
    path: str | Path, feature_layer: int = -2, image_size: int | None = None, dtype: torch.dtype | None = None
) -> VisionTower:
    """The frozen tower of a local folder or hub model; of a whole CLIP or SigLIP checkpoint its vision half.

    `feature_layer`: see VisionTower. `image_size`: side of the input in pixels; None: what the path's own
    preprocessor_config.json makes. `dtype`: None keeps the checkpoint's. Only safetensors are read.
    InputError: an encoder that is not in ENCODERS, weights that are quantised, missing, left over or of another shape,
    and what transformers, VisionTower and load_image_processor refuse.
    """
    encoder = _encoder_of(path)
    if image_size is None:
        image_size = load_image_processor(path).image_size
    try:
        with _without_load_report():
            model, report = encoder.model.from_pretrained(
                path,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with the others
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: the encoder's weights cannot be read ({_first_line(error)}); "
            f"get a complete folder with model.safetensors. {how_to_convert(path)}"
        ) from error
    except (ImportError, ValueError) as error:
        raise InputError(f"{path}: the encoder cannot be loaded ({_first_line(error)}).") from error
    faults = {
        "missing": report["missing_keys"],
        "left over": [key for key in report["unexpected_keys"] if not _NOT_VISION.match(key)],
        "of another shape": [key for key, *_ in report["mismatched_keys"]],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault} (such as {min(keys)})" for fault, keys in faults.items() if keys)
        raise InputError(
            f"{path}: the weights are not those of its config.json: {listed}; "
            "get weights and config.json again, from the same place."
        )
    return VisionTower(model, encoder, feature_layer, image_size)


def count_image_tokens(path: str | Path, image_size: int | None = None) -> int:
    """`num_image_tokens` of the tower that `load_vision_tower` would load, without reading its weights."""
    encoder = _encoder_of(path)
    config = encoder.model.config_class.from_pretrained(path)
    patch_size = _side(config.patch_size, "patch_size in the encoder's config.json")
    image_size = _checked_size(image_size or load_image_processor(path).image_size, encoder, config, patch_size)
    return (image_size // patch_size) ** 2


def _encoder_of(path: str | Path) -> Encoder:
    try:
        values, _ = PretrainedConfig.get_config_dict(path)
        if not values:
            raise OSError("there is no config.json")
    except OSError as error:
        raise InputError(
            f"vision_tower {path}: neither a folder with a config.json nor a hub model that can be reached "
            f"({_first_line(error)}); check the path or the name."
        ) from error
    if values.get("quantization_config"):
        raise InputError(
            f"vision_tower {path}: config.json has a quantization_config, but quantised weights are not read; "
            "take the unquantised release of the model."
        )
    model_type = values.get("model_type")
    if not model_type:
        raise InputError(
            f'vision_tower {path}: no "model_type" in config.json; add it, with the encoder\'s family: '
            f"{', '.join(ENCODERS)}."
        )
    if model_type in _REFUSED:
        raise InputError(f'vision_tower {path}: model_type "{model_type}" {_REFUSED[model_type]}.')
    return choose(ENCODERS, model_type, f"model_type of vision_tower {path}")


def _depth(feature_layer: int, layers: int) -> int:
    """How many layers are run for `hidden_states[feature_layer]`, whose entry 0 is the input of the first layer."""
    depth = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= depth <= layers:
        raise InputError(
            f"model.vision_feature_layer: {feature_layer}, but the encoder has {layers} layers; "
            f"give -1 (the last) to -{layers}, or 1 to {layers}."
        )
    return depth


def _checked_size(image_size: int, encoder: Encoder, config: PretrainedConfig, patch_size: int) -> int:
    if encoder.any_size:
        if image_size < patch_size or image_size % patch_size:
            raise InputError(
                f"model.image_size: {image_size} is not a multiple of this encoder's patch size {patch_size}; "
                f"the nearest is {max(round(image_size / patch_size), 1) * patch_size}."
            )
        return image_size
    trained = _side(config.image_size, "image_size in the encoder's config.json")
    if image_size != trained:
        raise InputError(
            f"model.image_size: {image_size}, but this {config.model_type} has learned positions for {trained} pixels; "
            f"give {trained}, or leave it out beside the encoder's own preprocessor_config.json, which makes {trained}."
        )
    return image_size


def _side(value: int | list[int] | tuple[int, ...], what: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise InputError(f"{what}: {value} is not square; use an encoder with square patches and images.")
    return sides.pop()


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers prints a page about a text half that was left aside; here the same report is checked instead."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
