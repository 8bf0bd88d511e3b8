"""A model of given sizes with random weights, made where it is used from configs alone, and random samples for it: what
the measurements that need no file train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config

import qwen
from config import IGNORE_INDEX
from model.model import VisionLanguageModel
from model.projector import build_projector
from model.trainable import add_lora, set_trainable
from qwen.attention import PACKED_SDPA
from qwen.modeling import Qwen2ForCausalLM
from visual.encoders import ENCODERS, VisionTower

FEATURE_LAYER = -2  # LLaVA's choice
PAD_TOKEN_ID, FIRST_TEXT_ID = 0, 2
IMAGE_TOKEN_ID = 1
WORDS = {"vision_tower": "frozen", "projector": "full", "language_model": "lora", "embeddings": "frozen"}
RATES = {"projector_lr": 1e-3, "lora_lr": 2e-4}


@dataclass(frozen=True)
class Sizes:
    """A CLIP encoder and a Qwen2 language model."""

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            projection_dim=self.vision_width,
        )

    def text_config(self) -> Qwen2Config:
        return Qwen2Config(
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=32768,
            tie_word_embeddings=self.tied,
            pad_token_id=PAD_TOKEN_ID,
            bos_token_id=None,
            eos_token_id=None,
        )


def random_model(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, lora_rank: int, attention: str = PACKED_SDPA, seed: int = 0
) -> VisionLanguageModel:
    """A frozen encoder, a projector and a language model with LoRA on its seven linear layers, on `device`, in training
    mode; what is frozen in `dtype`, what trains in float32. attention: transformers' name of an implementation."""
    torch.manual_seed(seed)
    with torch.device(device):
        encoder = CLIPVisionModel._from_config(sizes.vision_config(), dtype=dtype)
        language_model = Qwen2ForCausalLM._from_config(sizes.text_config(), dtype=dtype, attn_implementation=attention)
        projector = build_projector("mlp", sizes.vision_width, None, sizes.width)
    language_model.config.image_token_id = IMAGE_TOKEN_ID
    tower = VisionTower(encoder, ENCODERS["clip_vision_model"], FEATURE_LAYER, sizes.image_size)
    model = VisionLanguageModel(tower, projector, language_model)
    add_lora(model, lora_rank, 2 * lora_rank, 0.0, qwen.lora_target_modules(language_model, ["all-linear"]))
    set_trainable(model, WORDS)
    return model.to(device).train()


def random_sample(sizes: Sizes, chance: np.random.Generator, question: int, answer: int, images: int = 1) -> dict:
    """A sample as the dataset gives it: the images first, then `question` tokens, then `answer` tokens, all supervised."""
    image_tokens = images * sizes.image_tokens
    text = torch.from_numpy(chance.integers(FIRST_TEXT_ID, sizes.vocabulary, question + answer))
    input_ids = torch.cat([torch.full((image_tokens,), IMAGE_TOKEN_ID), text])
    labels = input_ids.clone()
    labels[: image_tokens + question] = IGNORE_INDEX
    shape = (images, 3, sizes.image_size, sizes.image_size)
    pixels = torch.from_numpy(chance.standard_normal(shape, dtype=np.float32)) if images else None
    return {
        "id": "random",
        "replaced": None,
        "input_ids": input_ids,
        "labels": labels,
        "pixel_values": pixels,
        "patch_features": None,
        "image_keys": [None] * images,
        "is_cached": [False] * images,
    }


def answer_lengths(count: int, chance: np.random.Generator, mean: float) -> list[int]:
    """Log-normal, as people's answers are; cut off at 6 times the mean."""
    spread = 0.8
    lengths = chance.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(lengths, 1, 6 * mean).astype(int).tolist()
