"""The tower: an encoder as a frozen function from pixels to the patch features of one hidden layer.

Shapes: M images, N patches per image, Dv the encoder's width, S the side of the square input in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, SiglipVisionModel

from config import InputError
from visual.convolutional import as_patches, measure, outline, run_stages


@dataclass(frozen=True)
class Encoder:
    """A family of encoders: the facts that are not in the model's own config."""

    model: type[PreTrainedModel]
    layers: str  # submodule: the list of layers
    final_norm: str | None  # submodule: the norm applied to the last layer's patches
    class_tokens: int  # tokens before the patches, without registers, whose number is in the config
    any_size: bool  # positions extend to other image sizes than the trained one
    unused: tuple[str, ...]  # prefixes of the parameters that no hidden state depends on
    is_grid: bool = False  # a convolutional network: its layers are stages, [M, *, *, *] -> [M, Dv, G, G]
    stem: str | None = None  # of a convolutional network, submodule: what comes before the stages
    first_state: int = 1  # index in hidden_states of the first layer's output


class VisionTower(nn.Module):
    """An encoder as a function from pixels to the patch features of one hidden layer.

    With `normed_without_first` the features are transformers' `last_hidden_state[:, 1:]`: after the final norm, and without
    the first vector, which in SigLIP is a patch. The `feature_layer` must then be the last.

    `feature_layer` indexes transformers' `hidden_states`: -1 is the output of the last layer before any final norm, -2 that
    of the layer before it (LLaVA's choice). Layers above it are kept, so that the tower can be saved whole, but not run.
    In a convolutional network a layer is a stage (in MobileNetV2 a block), and `patch_size` is the stride of its output:
    -2 usually has four times as many patches as -1.

    All parameters are frozen at first. A tower without trainable parameters stays in eval mode, also when its parent's
    `train()` is called. BatchNorm stays in eval mode even while the tower trains, and in float32: it uses the checkpoint's
    statistics, since those of a few images would be noise, and answering could not repeat them. Its scale and shift train.

    InputError: the model has no such `feature_layer`; its positions or patches do not allow the `image_size`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        feature_layer: int,
        image_size: int,
        normed_without_first: bool = False,
    ) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self._depth, self.hidden_size, self.patch_size = geometry(encoder, config, feature_layer)
        self.image_size = checked_size(image_size, encoder, config, patch_size=self.patch_size)
        self._prefix_tokens = encoder.class_tokens + getattr(config, "num_register_tokens", 0)
        self.num_image_tokens = (self.image_size // self.patch_size) ** 2
        self._unused = encoder.unused
        if normed_without_first:
            refuse_norm(encoder, config, feature_layer)
            self.num_image_tokens += self._prefix_tokens - 1
            self._prefix_tokens = 1
            self._unused = tuple(name for name in encoder.unused if name != f"{encoder.final_norm}.")
        self._encoder = encoder

        parent, _, name = encoder.layers.rpartition(".")
        layers = model.get_submodule(encoder.layers)
        assert isinstance(layers, nn.ModuleList)
        setattr(model.get_submodule(parent), name, _FirstLayers(layers, self._depth))
        if encoder.final_norm and not normed_without_first:
            model.get_submodule(encoder.final_norm).register_forward_hook(_input_instead)
        if isinstance(model, SiglipVisionModel):
            model.use_head = False  # the output of the pooling head is not used here
        for norm in self._batch_norms():
            norm.float()  # also what a run trains is float32: scale, shift and statistics must have one type
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
            if self._encoder.is_grid:
                layers: Any = self.model.get_submodule(self._encoder.layers)
                return as_patches(run_stages(_stem(self.model, self._encoder), layers, pixel_values))
            features = self.model(pixel_values).last_hidden_state
        return features[:, self._prefix_tokens :]

    def train(self, mode: bool = True) -> VisionTower:
        """Like nn.Module.train, but a tower without trainable parameters, and BatchNorm in any tower, stay in eval mode."""
        super().train(mode and self.trains)
        for norm in self._batch_norms():
            norm.eval()
        return self

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
                parameter.requires_grad_(not name.startswith(self._unused))
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
        unused = (*self._unused, *not_run)
        for name, tensor in chain(self.model.named_parameters(), self.model.named_buffers()):
            if not name.startswith(unused) and not name.endswith(".num_batches_tracked"):  # a counter of BatchNorm
                yield name, tensor

    def _layers(self) -> list[nn.Module]:
        """All layers, also those that are not run."""
        return list(self.model.get_submodule(self._encoder.layers).children())

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]


def _stem(model: nn.Module, encoder: Encoder) -> nn.Module | None:
    return None if encoder.stem is None else model.get_submodule(encoder.stem)


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


def refuse_norm(encoder: Encoder, config: PretrainedConfig, feature_layer: int) -> None:
    """Raise InputError unless an encoder has features after its final norm: a transformer, of whose layers the last is
    chosen."""
    if encoder.is_grid:
        raise InputError(
            f"model.vision_features: normed_without_first, but {config.model_type} is a convolutional network, whose first "
            "vector is a patch like the others; give hidden_state."
        )
    if geometry(encoder, config, feature_layer)[0] != config.num_hidden_layers:
        raise InputError(
            f"model.vision_features: normed_without_first is the output of the last layer, but model.vision_feature_layer "
            f"is {feature_layer}; give -1."
        )


def geometry(encoder: Encoder, config: PretrainedConfig, feature_layer: int) -> tuple[int, int, int]:
    """Return (number of layers to run, width of their features, side of a patch in pixels). No weight is read.

    InputError: the config has no such `feature_layer`, or describes no network.
    """
    if not encoder.is_grid:
        depth = _depth(feature_layer, config.num_hidden_layers, first=encoder.first_state)
        return depth, config.hidden_size, _side(config.patch_size, "patch_size in the encoder's config.json")
    network = outline(encoder.model, config)
    stages: Any = network.get_submodule(encoder.layers)
    depth = _depth(feature_layer, len(stages), first=encoder.first_state)
    first_patch = _side(getattr(config, "patch_size", 1), "patch_size in the encoder's config.json")
    return depth, *measure(_stem(network, encoder), stages[:depth], first_patch)


def _depth(feature_layer: int, layers: int, first: int) -> int:
    """Return the number of layers to run for `hidden_states[feature_layer]`. Entry `first` is the first layer's output."""
    depth = feature_layer + 1 - first if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= depth <= layers:
        raise InputError(
            f"model.vision_feature_layer: {feature_layer}, but the encoder has {layers} layers; "
            f"give -1 (the last) to -{layers}, or {first} to {layers - 1 + first}."
        )
    return depth


def checked_size(image_size: int, encoder: Encoder, config: PretrainedConfig, patch_size: int) -> int:
    """Return `image_size`. InputError: the encoder's positions or patches do not allow it."""
    if encoder.any_size:
        if image_size < patch_size or image_size % patch_size:
            named = "stride at model.vision_feature_layer," if encoder.is_grid else "patch size"
            raise InputError(
                f"model.image_size: {image_size} is not a multiple of this encoder's {named} {patch_size}; "
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
