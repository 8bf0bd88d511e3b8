"""The image encoders: one table entry per family, and the frozen tower that the rest of the model uses.

A tower returns the patch features of one hidden layer. Class tokens and registers are dropped here, and the number of
tokens per image is computed here. Projectors, language models and the config are not known here.

Shapes: M images, N patches per image, Dv the encoder's width, S the side of the square input in pixels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
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
from visual.encoder_config import read_config, refuse_too_few_weights
from visual.processor import load_image_processor

# Private names of transformers used in this package, to be checked at upgrades:
#   "_name_or_path" in config.to_dict(): left out of the feature cache's key (feature_cache.py)
# Public by name but without documentation: the classes *ImageProcessorPil, BaseImageProcessor.get_image_processor_dict
# (processor.py); the paths in ENCODERS below, SiglipVisionModel.use_head, and that an encoder iterates over its list of
# layers (encoders.py).


@dataclass(frozen=True)
class Encoder:
    """A family of encoders: the facts that are not in the model's own config."""

    model: type[PreTrainedModel]
    layers: str  # submodule: the list of layers
    final_norm: str | None  # submodule: the norm applied to the last layer's patches
    class_tokens: int  # tokens before the patches, without registers, whose number is in the config
    any_size: bool  # positions extend to other image sizes than the trained one
    unused: tuple[str, ...]  # prefixes of the parameters that no hidden state depends on


_CLIP = Encoder(CLIPVisionModel, "encoder.layers", None, class_tokens=1, any_size=False, unused=("post_layernorm.",))
_SIGLIP = Encoder(
    SiglipVisionModel,
    "encoder.layers",
    "post_layernorm",
    class_tokens=0,
    any_size=False,
    unused=("post_layernorm.", "head."),
)
_DINO_UNUSED = ("layernorm.", "norm.", "embeddings.mask_token")

# `model_type` in config.json -> family. "clip" and "siglip" are whole checkpoints: only their vision half is loaded.
# SigLIP 2 with a fixed resolution has the model type "siglip".
ENCODERS: dict[str, Encoder] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": Encoder(Dinov2Model, "encoder.layer", "layernorm", class_tokens=1, any_size=True, unused=_DINO_UNUSED),
    "dinov2_with_registers": Encoder(
        Dinov2WithRegistersModel, "encoder.layer", "layernorm", class_tokens=1, any_size=True, unused=_DINO_UNUSED
    ),
    "dinov3_vit": Encoder(DINOv3ViTModel, "model.layer", "norm", class_tokens=1, any_size=True, unused=_DINO_UNUSED),
}

_NAFLEX = (
    "is the NaFlex SigLIP 2, in which the number of patches differs between images; "
    "use one with a fixed resolution, such as google/siglip2-base-patch16-224"
)
_REFUSED = {
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
    "dinov3_convnext": "is a convolutional network without patch tokens; use a DINOv3 ViT, such as "
    "facebook/dinov3-vits16-pretrain-lvd1689m",
}

# Weights of a whole checkpoint that are not in its vision half.
_NOT_VISION = re.compile(r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$")


class VisionTower(nn.Module):
    """An encoder as a function from pixels to the patch features of one hidden layer.

    `feature_layer` indexes transformers' `hidden_states`: -1 is the output of the last layer before any final norm, -2 that
    of the layer before it (LLaVA's choice). Layers above it are kept, so that the tower can be saved whole, but not run.

    All parameters are frozen at first. A tower without trainable parameters stays in eval mode, also when its parent's
    `train()` is called.

    InputError: the model has no such `feature_layer`; its positions or patches do not allow the `image_size`.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, feature_layer: int, image_size: int) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.hidden_size: int = config.hidden_size
        self.patch_size = _side(config.patch_size, "patch_size in the encoder's config.json")
        self.image_size = _checked_size(image_size, encoder, config, patch_size=self.patch_size)
        self.num_image_tokens = (self.image_size // self.patch_size) ** 2
        self._prefix_tokens = encoder.class_tokens + getattr(config, "num_register_tokens", 0)
        self._encoder = encoder

        parent, _, name = encoder.layers.rpartition(".")
        layers = model.get_submodule(encoder.layers)
        assert isinstance(layers, nn.ModuleList)
        self._depth = _depth(feature_layer, len(layers))
        setattr(model.get_submodule(parent), name, _FirstLayers(layers, self._depth))
        if encoder.final_norm:
            model.get_submodule(encoder.final_norm).register_forward_hook(_input_instead)
        if isinstance(model, SiglipVisionModel):
            model.use_head = False  # the output of the pooling head is not used here
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pixel_values [M, 3, S, S] -> features [M, N, Dv]; M may be 0.

        The features have no graph if no parameter is trainable. ValueError: S is not `image_size`.
        """
        expected = (3, self.image_size, self.image_size)
        if pixel_values.shape[1:] != expected:
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape)}, this tower takes [M, *{expected}]")
        if not len(pixel_values):  # a batch without images: transformers' attention cannot reshape an empty tensor
            return pixel_values.new_empty(0, self.num_image_tokens, self.hidden_size, dtype=self.model.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            # the output of the last layer that is run, without final norm: transformers' hidden_states[feature_layer]
            features = self.model(pixel_values).last_hidden_state
        return features[:, self._prefix_tokens :]

    def train(self, mode: bool = True) -> VisionTower:
        """Like nn.Module.train, but a tower without trainable parameters stays in eval mode."""
        return super().train(mode and self.trains)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def trains(self) -> bool:
        """Return whether any parameter is trainable. This is read from `requires_grad`; there is no other flag."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def unfreeze(self, top: int | None = None) -> None:
        """Make the last `top` of the layers that are run trainable; None: all parameters that the features depend on.

        InputError: `top` is not between 1 and the number of layers that are run.
        """
        layers = self._layers()
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

    def tensors_used(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the parameters and buffers of `model` that the features depend on."""
        not_run = (f"{self._encoder.layers}.{layer}." for layer in range(self._depth, len(self._layers())))
        unused = (*self._encoder.unused, *not_run)
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            if not name.startswith(unused):
                yield name, tensor

    def _layers(self) -> list[nn.Module]:
        """All layers, also those that are not run."""
        return list(self.model.get_submodule(self._encoder.layers).children())


def _input_instead(norm: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A forward hook that turns `norm` into the identity, while its parameters stay in the state_dict."""
    return inputs[0]


class _FirstLayers(nn.ModuleList):
    """All layers of an encoder; iteration yields only the first `depth`.

    The encoder's own forward therefore stops there, while parameters and state_dict are those of all layers.
    """

    def __init__(self, layers: nn.ModuleList, depth: int) -> None:
        super().__init__(layers)
        self._depth = depth

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(super().__iter__(), self._depth)


def load_vision_tower(
    path: str | Path, feature_layer: int = -2, image_size: int | None = None, dtype: torch.dtype | None = None
) -> VisionTower:
    """Load the frozen tower of a local folder or hub model. Only safetensors are read.

    Only the vision half of a whole CLIP or SigLIP checkpoint is loaded. `feature_layer`: see VisionTower. `image_size`:
    side of the input in pixels; None takes the output size of the path's own preprocessor_config.json. `dtype`: None keeps
    the checkpoint's.
    InputError: the encoder is not in ENCODERS; weights are quantised, missing, unexpected or have another shape; and the
    errors of transformers, VisionTower and load_image_processor.
    """
    encoder, config = _encoder_of(path)
    refuse_too_few_weights(path, config)
    if image_size is None:
        image_size = load_image_processor(path).image_size
    try:
        with _without_load_report():
            loaded: Any = encoder.model.from_pretrained(
                path,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported, and refused below
                output_loading_info=True,
            )
        model, report = loaded  # a pair with output_loading_info, against its annotation
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: the encoder's weights cannot be read ({_first_line(error)}); "
            f"get a complete folder with model.safetensors. {how_to_convert(path)}"
        ) from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises nearly anything on a config that it does not expect
        raise InputError(
            f"{path}: the encoder cannot be loaded ({_first_line(error):.300}); download the folder again."
        ) from error
    faults = {
        "missing": report["missing_keys"],
        "unexpected": [key for key in report["unexpected_keys"] if not _NOT_VISION.match(key)],
        "of another shape": [key for key, *_ in report["mismatched_keys"]],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault} (such as {min(keys)})" for fault, keys in faults.items() if keys)
        raise InputError(
            f"{path}: the weights do not match its config.json: {listed}; "
            "download weights and config.json again from the same source."
        )
    return VisionTower(model, encoder, feature_layer, image_size=image_size)


def num_image_tokens(path: str | Path, image_size: int | None = None) -> int:
    """Return `num_image_tokens` of the tower that `load_vision_tower` would load, without reading its weights."""
    encoder, config = _encoder_of(path)
    patch_size = _side(config.patch_size, "patch_size in the encoder's config.json")
    image_size = _checked_size(
        image_size or load_image_processor(path).image_size, encoder, config, patch_size=patch_size
    )
    return (image_size // patch_size) ** 2


def _encoder_of(path: str | Path) -> tuple[Encoder, PretrainedConfig]:
    """Return the family and the checked config of the encoder in a folder or hub repository."""
    try:
        values, _ = PretrainedConfig.get_config_dict(path)
        if not values or not isinstance(values, dict):
            raise OSError("config.json not found, or without keys")
    except (OSError, TypeError, ValueError, AttributeError, RecursionError) as error:  # a file that holds no keys
        raise InputError(
            f"vision_tower {path}: not a folder with a config.json, and not a hub model that can be reached "
            f"({_first_line(error)}); check the path or the name."
        ) from error
    if values.get("quantization_config"):
        raise InputError(
            f"vision_tower {path}: config.json has a quantization_config, but quantised weights are not supported; "
            "use the unquantised release of the model."
        )
    model_type = values.get("model_type")
    if not model_type:
        raise InputError(
            f'vision_tower {path}: no "model_type" in config.json; add it with the encoder\'s family, one of '
            f"{', '.join(ENCODERS)}."
        )
    if str(model_type) in _REFUSED:
        raise InputError(f'vision_tower {path}: model_type "{model_type}" {_REFUSED[model_type]}.')
    encoder = choose(ENCODERS, str(model_type), f"model_type of vision_tower {path}")
    assert encoder.model.config_class is not None
    return encoder, read_config(path, values, encoder.model.config_class)


def _depth(feature_layer: int, layers: int) -> int:
    """Return the number of layers to run for `hidden_states[feature_layer]`; entry 0 is the first layer's input."""
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
            f"give {trained}, or leave it out and use the encoder's own preprocessor_config.json, whose output is {trained}."
        )
    return image_size


def _side(value: int | list[int] | tuple[int, ...], what: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise InputError(f"{what}: {value} is not square; use an encoder with square patches and images.")
    return sides.pop()


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' long report about the text half that was not loaded; the caller checks the report instead."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
