"""The vision-language model: a tower, a projector, a language model. Photo tensors and token ids in; loss or text out.
Knows no file, no tokenizer and no training loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE_INDEX


class VisionLanguageModel(nn.Module):
    """vision_tower: pixel_values [M,3,H,W] -> [M,N,Dv]; projector: [M,N,Dv] -> [M,N,D]; language_model: a causal language
    model of `qwen`, bare or wrapped by PEFT."""

    def __init__(self, vision_tower: nn.Module, projector: nn.Module, language_model: nn.Module):
        super().__init__()
        self.vision_tower = vision_tower
        self.projector = projector
        self.language_model = language_model
        # part -> the names of weights that an earlier run trained: not the released ones any more, so they are saved too
        self.trained_before: dict[str, set[str]] = {"language_model": set(), "vision_tower": set()}

    @property
    def causal_lm(self) -> nn.Module:
        """The language model itself, without PEFT's wrapper; LoRA lives inside its layers either way."""
        return self.language_model.get_base_model() if self.has_lora else self.language_model

    @property
    def has_lora(self) -> bool:
        return hasattr(self.language_model, "peft_config")

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[M,3,H,W] -> image_features [M,N,D]."""
        features = self.vision_tower(pixel_values.to(self.vision_tower.model.dtype))
        return self.projector(features.to(self.projector.linear_1.weight.dtype))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pixel_values: Tensor | None = None
    ) -> Tensor:
        """The summed cross entropy of the supervised tokens (float32 scalar). input_ids, attention_mask, labels: [B,L];
        labels are unshifted. The caller divides by the number of targets of its whole optimizer step.

        The vocabulary's logits are made only where there is a label: of [B,L,V] that is what costs the memory.
        """
        if pixel_values is None:
            image_features, anchor = None, self._zero_from_image_side()
        else:
            image_features, anchor = self.encode_images(pixel_values), 0.0
        hidden = self.causal_lm.model(
            input_ids=input_ids, attention_mask=attention_mask, image_features=image_features, use_cache=False
        ).last_hidden_state  # [B, L, D]
        targets = labels[:, 1:]
        supervised = targets != IGNORE_INDEX
        logits = self.causal_lm.lm_head(hidden[:, :-1][supervised])  # [targets, V]
        return F.cross_entropy(logits.float(), targets[supervised], reduction="sum") + anchor

    def _zero_from_image_side(self) -> Tensor | float:
        """0, computed from what trains in projector and tower: a batch without any image then has zero gradients there
        instead of none, so that every process of a distributed step has the same gradients to add up."""
        parameters = [*self.projector.parameters(), *self.vision_tower.parameters()]
        return sum(parameter.sum() for parameter in parameters if parameter.requires_grad) * 0.0

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None, **options
    ) -> Tensor:
        """Generated ids [B, new]. input_ids, attention_mask [B,L]: prompts padded on the *left*; options: transformers'."""
        image_features = None if pixel_values is None else self.encode_images(pixel_values)
        ids = self.language_model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_features=image_features,
            synced_gpus=False,
            **options,
        )
        return ids[:, input_ids.shape[1] :]
