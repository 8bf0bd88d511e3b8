"""The image encoders: one table entry per family, and how one is loaded as the tower that the rest of the model uses.

A tower returns the patch features of one hidden layer. Class tokens and registers are dropped here, and the number of
tokens per image is computed here. A convolutional network's grid of features is a grid of patches, and its stages are its
layers. Projectors, language models and the config are not known here.

Shapes: M images, N patches per image, Dv the encoder's width, S the side of the square input in pixels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CLIPVisionModel,
    ConvNextModel,
    ConvNextV2Model,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ConvNextModel,
    DINOv3ViTModel,
    MobileNetV2Model,
    PretrainedConfig,
    PreTrainedModel,
    ResNetModel,
    SiglipVisionModel,
)
from transformers.utils import logging as transformers_logging

from config import InputError, choose, how_to_convert
from config.files import refuse_pointers
from visual.convolutional import EfficientNetLite, outline
from visual.encoder_config import fewest_weights, read_config, refuse_too_few_weights
from visual.processor import load_image_processor
from visual.tower import Encoder, VisionTower, checked_size, geometry, refuse_norm

# Private names of transformers used in this package, to be checked at upgrades:
#   "_name_or_path" in config.to_dict(): left out of the feature cache's key (feature_cache.py)
# Public by name but without documentation: the classes *ImageProcessorPil, BaseImageProcessor.get_image_processor_dict
# (processor.py); the paths in ENCODERS below, SiglipVisionModel.use_head, that a transformer iterates over its list of
# layers, and that a convolutional network is its stem and its stages (encoders.py).


def _grid(
    model: type[PreTrainedModel], stem: str | None, layers: str, *, unused: str = "", first_state: int = 1
) -> Encoder:
    return Encoder(
        model,
        layers,
        None,
        class_tokens=0,
        any_size=True,
        unused=(unused,) if unused else (),
        is_grid=True,
        stem=stem,
        first_state=first_state,
    )


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
# SigLIP 2 with a fixed resolution has the model type "siglip". MobileNetV2's hidden states are its blocks, without the stem.
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
    "dinov3_convnext": _grid(DINOv3ConvNextModel, None, "model.stages", unused="layer_norm."),
    "convnext": _grid(ConvNextModel, "embeddings", "encoder.stages", unused="layernorm."),
    "convnextv2": _grid(ConvNextV2Model, "embeddings", "encoder.stages", unused="layernorm."),
    "resnet": _grid(ResNetModel, "embedder", "encoder.stages"),
    "mobilenet_v2": _grid(MobileNetV2Model, "conv_stem", "layer", unused="conv_1x1.", first_state=0),
    "efficientnet_lite": _grid(EfficientNetLite, "stem", "stages"),
}

_NAFLEX = (
    "is the NaFlex SigLIP 2, in which the number of patches differs between images; "
    "use one with a fixed resolution, such as google/siglip2-base-patch16-224"
)
_REFUSED = {
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
}

# Weights of a whole checkpoint that are not in its vision half, or in the classifier of an ImageNet model.
_NOT_VISION = re.compile(
    r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$|classifier\.|segmentation_head\."
)


def load_vision_tower(
    path: str | Path,
    feature_layer: int = -2,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    normed_without_first: bool = False,
) -> VisionTower:
    """Load the frozen tower of a local folder or hub model. Only safetensors are read.

    Only the vision half of a whole CLIP or SigLIP checkpoint is loaded, and no classifier. `feature_layer` and
    `normed_without_first`: see VisionTower.
    `image_size`: side of the input in pixels; None takes the output size of the path's own preprocessor_config.json.
    `dtype`: None keeps the checkpoint's.
    InputError: the encoder is not in ENCODERS; weights are quantised, missing, unexpected or have another shape; and the
    errors of transformers, VisionTower and load_image_processor.
    """
    refuse_pointers(path)
    encoder, config = _encoder_of(path)
    refuse_too_few_weights(path, _fewest_weights(encoder, config))
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
    return VisionTower(model, encoder, feature_layer, image_size=image_size, normed_without_first=normed_without_first)


def num_image_tokens(
    path: str | Path, feature_layer: int = -2, image_size: int | None = None, normed_without_first: bool = False
) -> int:
    """Return `num_image_tokens` of the tower that `load_vision_tower` would load, without reading its weights."""
    encoder, config = _encoder_of(path)
    _, _, patch_size = geometry(encoder, config, feature_layer)
    image_size = checked_size(
        image_size or load_image_processor(path).image_size, encoder, config, patch_size=patch_size
    )
    patches = (image_size // patch_size) ** 2
    if not normed_without_first:
        return patches
    refuse_norm(encoder, config, feature_layer)
    return patches + encoder.class_tokens + getattr(config, "num_register_tokens", 0) - 1


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


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' long report about the text half that was not loaded; the caller checks the report instead."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _fewest_weights(encoder: Encoder, config: PretrainedConfig) -> int:
    if encoder.is_grid:
        return sum(parameter.numel() for parameter in outline(encoder.model, config).parameters())
    return fewest_weights(config)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
