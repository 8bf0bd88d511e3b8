"""The vision-language model: a tower, a projector, a language model. Photo tensors and token ids in; loss or text out.
Knows no file, no tokenizer and no training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import IGNORE_INDEX
from model.loss import balance_loss, count_right, summed_cross_entropy


class Losses(NamedTuple):
    """What the model makes of a batch; float32 scalars.

    answers: the summed cross entropy of the supervised tokens. The caller divides by the number of targets of its whole
    optimizer step. balance: the load-balancing loss of the experts over the tokens that are read; None without experts.
    right: how many supervised tokens would have been said as they stand; None while gradients are wanted.
    """

    answers: Tensor
    balance: Tensor | None = None
    right: Tensor | None = None


class VisionLanguageModel(nn.Module):
    """vision_tower: pixel_values [M,3,H,W] -> [M,N,Dv]; projector: [M,N,Dv] -> [M,K,D]; language_model: a causal language
    model of `qwen`, bare or wrapped by PEFT."""

    def __init__(self, vision_tower: nn.Module, projector: nn.Module, language_model: nn.Module):
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model = language_model
        # part -> the names of weights that an earlier run trained: not the released ones any more, so they are saved too
        self.trained_before: dict[str, set[str]] = {"language_model": set(), "vision_tower": set()}
        self.is_from_scratch = False  # the language model: no weights of it are released ones
        self.untrained = {
            "projector"
        }  # the parts of random weights; what trains is taken out by `trainable.set_trainable`

    @property
    def causal_lm(self) -> nn.Module:
        """The language model itself, without PEFT's wrapper; LoRA lives inside its layers either way."""
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
        """[M,3,H,W] -> what the tower makes of them, [M,N,Dv]: what may be kept while the tower is frozen."""
        if (
            self.vision_tower.device.type != pixel_values.device.type
        ):  # it had left (model.features), and is needed again
            self.vision_tower.to(pixel_values.device)
        return self.vision_tower(pixel_values.to(self.vision_tower.model.dtype))

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
        """input_ids, labels [B,L]; labels are unshifted.

        Rows are padded, and attention_mask [B,L] says where; or B is 1 and the row is documents of `lengths`, the first
        token of each without a label; num_tokens: how many of that row are read, what follows only fills it.
        Of pictures come the pixels, or what the frozen tower made of them.
        The vocabulary's logits are made only where there is a label: of [B,L,V] that is what costs the memory.
        """
        if pixel_values is not None:
            patch_features = self.patch_features(pixel_values)
        if patch_features is None:
            image_features, anchor = None, self._zero_from_image_side()
        else:
            image_features, anchor = self.project(patch_features), 0.0
        output = self.causal_lm.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            lengths=lengths,
            image_features=image_features,
            use_cache=False,
            **({"output_router_logits": True} if self.has_experts else {}),
        )
        hidden = output.last_hidden_state  # [B, L, D]
        # labels may stay on the CPU: to look for the supervised places on a GPU would wait for all that it has to do
        rows, columns = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        places = (rows * labels.shape[1] + columns).to(hidden.device, non_blocking=True)
        targets = labels[rows, columns + 1].to(hidden.device, non_blocking=True)
        supervised = hidden.flatten(0, 1).index_select(0, places)  # [targets, D]
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
        """0, computed from what trains in projector and tower: a batch without any image then has zero gradients there
        instead of none, so that every process of a distributed step has the same gradients to add up."""
        parameters = [*self.projector.parameters(), *self.vision_tower.parameters()]
        return sum(parameter.sum() for parameter in parameters if parameter.requires_grad) * 0.0
