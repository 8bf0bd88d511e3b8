"""The vision-language model: a vision tower, a projector, a language model. Image tensors and token ids in, losses out.

Knows no file, no tokenizer and no training loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import IGNORE_INDEX
from model.loss import balance_loss, count_right, summed_cross_entropy


class Losses(NamedTuple):
    """The losses of one batch, float32 scalars.

    answers: the summed cross entropy of the supervised tokens; the caller divides by the targets of its whole step.
    balance: the experts' load-balancing loss over the tokens that are read; None without experts.
    right: how many supervised tokens are the most likely ones; None while gradients are enabled.
    """

    answers: Tensor
    balance: Tensor | None = None
    right: Tensor | None = None


class VisionLanguageModel(nn.Module):
    """A vision tower, [M,3,H,W] -> [M,N,Dv]; a projector, [M,N,Dv] -> [M,K,D]; and a causal language model of `qwen`, bare
    or wrapped by PEFT."""

    # nn.Module's attributes are Tensor | Module to a type checker
    vision_tower: Any
    projector: Any
    language_model: Any

    def __init__(
        self,
        vision_tower: nn.Module,
        projector: nn.Module,
        language_model: nn.Module,
        image_noise: float = 0.0,
    ):
        """image_noise: see `add_noise`; only for training."""
        super().__init__()
        self.image_noise = image_noise
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model = language_model

    @property
    def causal_lm(self) -> Any:
        """The language model without PEFT's wrapper. LoRA is inside its layers either way."""
        return self.language_model.get_base_model() if self.has_lora else self.language_model

    @property
    def has_lora(self) -> bool:
        return hasattr(self.language_model, "peft_config")

    @property
    def has_experts(self) -> bool:
        return any(hasattr(layer.mlp, "experts") for layer in self.causal_lm.model.layers)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[M,3,H,W] -> image_features [M,K,D]."""
        return self.project(self.patch_features(pixel_values))

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """[M,3,H,W] -> the tower's features [M,N,Dv], which can be cached while the tower is frozen.

        They are what a cache gives back. Within autocast they have its type: a GPU's autocast computes norms in float32, and
        an encoder that begins with one, such as CLIP, would give features that only a cache in half precision rounds. Their
        memory is contiguous: the rounding of a product depends on the layout.
        """
        # training.cached_features moves an idle tower to the CPU; bring it back
        if self.vision_tower.device.type != pixel_values.device.type:
            self.vision_tower.to(pixel_values.device)
        features = self.vision_tower(pixel_values.to(self.vision_tower.model.dtype)).contiguous()
        kind = features.device.type
        return features.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else features

    def project(self, patch_features: Tensor) -> Tensor:
        """[M,N,Dv] -> image_features [M,K,D]."""
        return self.projector(patch_features.to(next(self.projector.parameters()).dtype))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        num_tokens: int | None = None,
        pixel_values: Tensor | None = None,
        patch_features: Tensor | None = None,
    ) -> Losses:
        """input_ids, labels [B,L]; labels are unshifted. Both may stay on the CPU: reading them on a GPU would wait for all
        queued work.

        Padded rows come with attention_mask [B,L]. A packed row (B is 1) comes with the `lengths` of its documents, whose
        first tokens have no label, and with `num_tokens`, how many tokens are read before the filler.
        Images come as pixels, or as the frozen tower's features of them.

        Logits are computed only at supervised positions: [B,L,V] would be the largest tensor of all.
        """
        if pixel_values is not None:
            patch_features = self.patch_features(pixel_values)
        if patch_features is None:
            image_features, anchor = None, self._zero_from_image_side()
        else:
            image_features, anchor = self.project(patch_features), 0.0
            if self.training and self.image_noise:
                image_features = add_noise(image_features, self.image_noise)
        output = self.causal_lm.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            lengths=lengths,
            image_features=image_features,
            use_cache=False,
            **({"output_router_logits": True} if self.has_experts else {}),
        )
        hidden = output.last_hidden_state  # [B, L, D]
        # On a GPU, finding the supervised positions would wait for all queued work; labels on the CPU avoid that.
        rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        positions = (rows * labels.shape[1] + columns).to(hidden.device, non_blocking=True)
        targets = labels[rows, columns + 1].to(hidden.device, non_blocking=True)
        supervised = hidden.flatten(0, 1).index_select(0, positions)  # [targets, D]
        lm_head = self.causal_lm.lm_head
        answers = summed_cross_entropy(supervised, lm_head, targets) + anchor
        balance = None
        if self.has_experts:
            is_read = attention_mask
            if num_tokens is not None:
                is_read = (torch.arange(input_ids.shape[1], device=hidden.device) < num_tokens)[None]
            balance = balance_loss(output.router_logits, is_read, self.causal_lm.config)
        right = None if torch.is_grad_enabled() else count_right(supervised, lm_head, targets)
        return Losses(answers, balance, right)

    def _zero_from_image_side(self) -> Tensor | float:
        """Return 0 computed from the trainable weights of projector and tower.

        A batch without images then has zero gradients there instead of none, so every process of a step has the same
        gradients to sum.
        """
        parameters = [*self.projector.parameters(), *self.vision_tower.parameters()]
        return sum(parameter.sum() for parameter in parameters if parameter.requires_grad) * 0.0


def add_noise(image_features: Tensor, factor: float) -> Tensor:
    """Add one random vector to all tokens of an image: [M,K,D] -> [M,K,D].

    Its root mean square is `factor` times that of the image's tokens, so a projector cannot escape it by a larger output.
    A vector for each token would be averaged away. The numbers come from the CPU's generator, equal on every device; the
    trainer seeds it for each micro-batch, as for dropout.
    """
    size = image_features.detach().float().square().mean((1, 2), keepdim=True).sqrt()  # [M,1,1]
    noise = torch.randn(len(image_features), 1, image_features.shape[2]).to(image_features.device)
    return image_features + (factor * size * noise).to(image_features.dtype)
