"""Convolutional image encoders: their grid of features read as patches, and the network EfficientNet-Lite.

Such a network is a stem and a list of stages. Most stages halve the grid and widen the features, so width and stride depend
on the stage. They are measured on the network itself, built without memory for its weights, not derived from its config.

Shapes: M images, S the side of the square input in pixels, G the side of the grid, N = G * G patches, Dv the width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from config import InputError

PROBE = 2**10  # the stride of any allowed network divides this many pixels, times the side of its first patch


def outline(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return the network of class `kind` that `config` describes, on the device "meta": all shapes, no memory.

    InputError: the config describes no network.
    """
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:  # a class raises nearly anything on sizes that do not fit together
        reason = " ".join(str(error).split())
        raise InputError(
            f"vision_tower {config.name_or_path}: config.json describes no network that can be built "
            f"({type(error).__name__}: {reason:.200}); download it again from the source of the weights."
        ) from error


def run_stages(stem: nn.Module | None, stages: Iterable[nn.Module], pixel_values: Tensor) -> Tensor:
    """Run a network, [M, 3, S, S] -> grid [M, Dv, G, G]."""
    grid = pixel_values if stem is None else stem(pixel_values)
    for stage in stages:
        grid = stage(grid)
    return grid


def measure(stem: nn.Module | None, stages: nn.ModuleList, first_patch: int) -> tuple[int, int]:
    """Return (Dv, stride in pixels) of the grid of an outlined network, whose BatchNorm becomes the identity.

    first_patch: side in pixels of the patches that the stem takes, if it takes patches; else 1.
    """
    for part in (stages, stem):
        modules = () if part is None else part.modules()
        batch_norms: list[Any] = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        for norm in batch_norms:  # it keeps the shape, and is slow on "meta"
            norm.forward = _same
    pixels = torch.empty(1, 3, PROBE * first_patch, PROBE * first_patch, device="meta")
    grid = run_stages(stem, stages, pixels)
    return grid.shape[1], pixels.shape[-1] // grid.shape[-1]


def _same(grid: Tensor) -> Tensor:
    return grid


def as_patches(grid: Tensor) -> Tensor:
    """Read a grid [M, Dv, G, G] as patches [M, N, Dv], row by row."""
    return grid.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# EfficientNet-Lite, which transformers does not have: its EfficientNet has squeeze-and-excitation, SiLU and other padding


class EfficientNetLiteConfig(PretrainedConfig):
    """The sizes of an EfficientNet-Lite; the defaults are those of Lite0. A list has an entry for each stage of blocks."""

    model_type = "efficientnet_lite"

    num_channels: int = 3
    stem_size: int = 32
    hidden_sizes: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    strides: list[int] | tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    kernel_sizes: list[int] | tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    expansions: list[int] | tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    head_size: int = 1280
    batch_norm_eps: float = 1e-3


class _Convolution(nn.Module):
    """A convolution with TensorFlow's "same" padding, BatchNorm and, unless it is linear, ReLU6.

    forward: [M, in_size, G, G] -> [M, out_size, ceil(G / stride), ceil(G / stride)]
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        linear: bool = False,
        eps: float,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*sizes, kernel_size, stride=stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(sizes[1], eps=eps)
        self.act = nn.Identity() if linear else nn.ReLU6()

    def forward(self, grid: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in grid.shape[-2:]]
        top, left = (count // 2 for count in missing)  # an odd pixel is added at the bottom and at the right
        padded = functional.pad(grid, (left, missing[1] - left, top, missing[0] - top))
        return self.act(self.norm(self.conv(padded)))


class _Block(nn.Module):
    """An inverted residual: widen each feature, mix neighbours within each channel, narrow again without activation.

    forward: [M, in_size, G, G] -> [M, out_size, ceil(G / stride), ceil(G / stride)]
    """

    def __init__(self, sizes: tuple[int, int], expansion: int, kernel_size: int, stride: int, eps: float) -> None:
        super().__init__()
        wide = sizes[0] * expansion
        self.expand = nn.Identity() if expansion == 1 else _Convolution((sizes[0], wide), 1, eps=eps)
        self.depthwise = _Convolution((wide, wide), kernel_size, stride, groups=wide, eps=eps)
        self.project = _Convolution((wide, sizes[1]), 1, linear=True, eps=eps)
        self.is_residual = stride == 1 and sizes[0] == sizes[1]

    def forward(self, grid: Tensor) -> Tensor:
        made = self.project(self.depthwise(self.expand(grid)))
        return grid + made if self.is_residual else made


class EfficientNetLite(PreTrainedModel):
    """EfficientNet-Lite without its classifier: `stem`, and `stages`, of which the last is the wide 1 x 1 convolution.

    A tower runs these by itself (`run_stages`); there is no other forward pass.
    """

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps, size = config.batch_norm_eps, config.stem_size
        self.stem = _Convolution((config.num_channels, size), 3, 2, eps=eps)
        self.stages = nn.ModuleList()
        listed = (config.hidden_sizes, config.depths, config.strides, config.kernel_sizes, config.expansions)
        for width, depth, stride, kernel_size, expansion in zip(*listed, strict=True):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(_Block((size, width), expansion, kernel_size, stride=stride if i == 0 else 1, eps=eps))
                size = width
            self.stages.append(blocks)
        self.stages.append(_Convolution((size, config.head_size), 1, eps=eps))
        self.post_init()
