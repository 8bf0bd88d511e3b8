"""Tiny random image encoders in the layout of the released ones: weights, config.json, preprocessor_config.json.

Every parameter is random, also those that are usually initialised to zero or one (biases, norms, layer scales, class
tokens), so that a weight that is missing, swapped or misread changes the features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from visual.convolutional import EfficientNetLite, EfficientNetLiteConfig

HIDDEN_SIZE = 32
NUM_LAYERS = 4

_WIDTHS: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
_TEXT: dict[str, Any] = {
    **_WIDTHS, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BICUBIC, _BILINEAR = 3, 2


def write_clip(folder: Path, whole: bool = True, image_size: int = 28, seed: int = 0) -> Path:
    """Like openai/clip-vit-large-patch14-336: patch size 7, 16 patches at 28 pixels. `whole`: with the text half."""
    vision = {**_WIDTHS, "intermediate_size": 48, "image_size": image_size, "patch_size": 7}
    model: PreTrainedModel
    if whole:
        model = CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=vision, projection_dim=16))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
    _save(model, folder, seed)
    if whole:  # released before version 4.31, which saved the position indices too
        path = folder / "model.safetensors"
        indices = {
            "text_model.embeddings.position_ids": torch.arange(_TEXT["max_position_embeddings"])[None],
            "vision_model.embeddings.position_ids": torch.arange((image_size // 7) ** 2 + 1)[None],
        }
        save_file(load_file(path) | indices, path, metadata={"format": "pt"})
    return _write_json(  # as published, from the time when rescaling was not a separate step
        folder,
        do_resize=True,
        do_normalize=True,
        feature_extractor_type="CLIPFeatureExtractor",
        size=image_size,
        crop_size=image_size,
        do_center_crop=True,
        resample=_BICUBIC,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
    )


def write_siglip(folder: Path, whole: bool = True, image_size: int = 30, seed: int = 0) -> Path:
    """Like google/siglip-so400m-patch14-384, whose patches do not cover the image: 30 pixels, patch size 7, 16 patches."""
    vision = {**_WIDTHS, "intermediate_size": 48, "image_size": image_size, "patch_size": 7}
    model: PreTrainedModel
    if whole:
        model = SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=vision))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    return _write_siglip_processor(_save(model, folder, seed), image_size, resample=_BICUBIC)


def write_siglip2(folder: Path, image_size: int = 32, seed: int = 0) -> Path:
    """Like google/siglip2-base-patch16-224: SigLIP's layout with another vocabulary; patch size 8, 16 patches."""
    vision = {**_WIDTHS, "intermediate_size": 48, "image_size": image_size, "patch_size": 8}
    text = {**_TEXT, "vocab_size": 96, "projection_size": HIDDEN_SIZE}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    folder = _save(model, folder, seed)
    return _write_siglip_processor(folder, image_size, resample=_BILINEAR, do_convert_rgb=None)


def write_dinov2(folder: Path, seed: int = 0) -> Path:
    """Like facebook/dinov2-base: positions for 42 pixels (6 x 6 patches of 7), but the processor crops to 28 (4 x 4)."""
    config = Dinov2Config(**_WIDTHS, mlp_ratio=2, image_size=42, patch_size=7)
    return _write_dinov2_processor(_save(Dinov2Model(config), folder, seed))


def write_dinov2_registers(folder: Path, seed: int = 0) -> Path:
    """Like facebook/dinov2-with-registers-base: DINOv2 with 4 registers."""
    config = Dinov2WithRegistersConfig(**_WIDTHS, mlp_ratio=2, image_size=42, patch_size=7, num_register_tokens=4)
    return _write_dinov2_processor(_save(Dinov2WithRegistersModel(config), folder, seed))


def write_dinov3(folder: Path, seed: int = 0) -> Path:
    """Like facebook/dinov3-vits16-pretrain-lvd1689m: rotary positions, 4 registers, 16 patches of 8 at 32 pixels."""
    config = DINOv3ViTConfig(**_WIDTHS, intermediate_size=48, image_size=32, patch_size=8, num_register_tokens=4)
    return _write_dinov3_processor(_save(DINOv3ViTModel(config), folder, seed), 32)


def _write_dinov3_processor(folder: Path, image_size: int) -> Path:
    return _write_processor(
        folder,
        image_processor_type="DINOv3ViTImageProcessorFast",
        size={"height": image_size, "width": image_size},
        crop_size=None,
        do_center_crop=None,
        do_convert_rgb=None,
        resample=_BILINEAR,
        image_mean=_IMAGENET_MEAN,
        image_std=_IMAGENET_STD,
    )


# Convolutional networks of four stages, as released: with a classifier. Their inputs have 64 pixels.

_STAGES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, HIDDEN_SIZE], "depths": [1, 2, 1, 1]}


def write_resnet(folder: Path, layer_type: str = "bottleneck", seed: int = 0) -> Path:
    """Like microsoft/resnet-50: strides 4, 8, 16 and 32."""
    config = ResNetConfig(**_STAGES, embedding_size=8, layer_type=layer_type)
    return _write_convnext_processor(_save(ResNetForImageClassification(config), folder, seed))


def write_convnext(folder: Path, seed: int = 0) -> Path:
    """Like facebook/convnext-tiny-224: patches of 4 pixels, strides 4, 8, 16 and 32."""
    model = ConvNextForImageClassification(ConvNextConfig(**_STAGES))
    return _write_convnext_processor(_save(model, folder, seed))


def write_convnextv2(folder: Path, seed: int = 0) -> Path:
    """Like facebook/convnextv2-tiny-1k-224: patches of 4 pixels, strides 4, 8, 16 and 32."""
    model = ConvNextV2ForImageClassification(ConvNextV2Config(**_STAGES))
    return _write_convnext_processor(_save(model, folder, seed))


def write_dinov3_convnext(folder: Path, seed: int = 0) -> Path:
    """Like facebook/dinov3-convnext-tiny-pretrain-lvd1689m: strides 4, 8, 16 and 32, no stem."""
    folder = _save(DINOv3ConvNextModel(DINOv3ConvNextConfig(**_STAGES)), folder, seed)
    return _write_dinov3_processor(folder, 64)


def write_mobilenet_v2(folder: Path, seed: int = 0) -> Path:
    """Like google/mobilenet_v2_0.35_96: 16 blocks of strides 4 to 32, the last of 80 channels."""
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=64)
    return _write_mobilenet_processor(_save(MobileNetV2ForImageClassification(config), folder, seed))


def write_efficientnet_lite(folder: Path, seed: int = 0) -> Path:
    """Like demo.real_parts' EfficientNet-Lite0: three stages of strides 2, 4 and 8, and the wide convolution after them."""
    config = EfficientNetLiteConfig(
        stem_size=8, hidden_sizes=[8, 12, 16], depths=[1, 2, 2], strides=[1, 2, 2], kernel_sizes=[3, 5, 3],
        expansions=[1, 2, 2], head_size=HIDDEN_SIZE,
    )  # fmt: skip
    return _write_mobilenet_processor(_save(EfficientNetLite(config), folder, seed))


def _save(model: PreTrainedModel, folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
        for name, statistic in model.named_buffers():  # of BatchNorm
            if name.endswith(("running_mean", "running_var")):
                noise = 0.2 * torch.randn(statistic.shape, generator=generator)
                statistic.copy_(1 + noise.abs() if name.endswith("running_var") else noise)
    model.save_pretrained(folder)
    return folder


def _write_convnext_processor(folder: Path) -> Path:
    return _write_json(  # as published, from the time when rescaling was not a separate step
        folder,
        feature_extractor_type="ConvNextFeatureExtractor",
        do_resize=True,
        do_normalize=True,
        size=64,
        crop_pct=0.875,
        resample=_BICUBIC,
        image_mean=_IMAGENET_MEAN,
        image_std=_IMAGENET_STD,
    )


def _write_mobilenet_processor(folder: Path) -> Path:
    return _write_processor(
        folder,
        image_processor_type="MobileNetV2ImageProcessor",
        size={"shortest_edge": 72},
        crop_size={"height": 64, "width": 64},
        do_center_crop=True,
        resample=_BILINEAR,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _write_siglip_processor(folder: Path, image_size: int, **values) -> Path:
    return _write_processor(
        folder,
        image_processor_type="SiglipImageProcessor",
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        **values,
    )


def _write_dinov2_processor(folder: Path) -> Path:
    return _write_processor(
        folder,
        image_processor_type="BitImageProcessor",
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        do_center_crop=True,
        resample=_BICUBIC,
        image_mean=_IMAGENET_MEAN,
        image_std=_IMAGENET_STD,
    )


def _write_processor(folder: Path, **values) -> Path:
    return _write_json(folder, do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, **values)


def _write_json(folder: Path, **values) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2))
    return folder
