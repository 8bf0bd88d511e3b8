"""Models with random weights, made in memory, and random samples to train them on. Everything is made from a seed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, Qwen2Config

import qwen
from config import IGNORE_INDEX, LoraConfig, TrainConfig
from dataset.batch import Batch, Sample, collate
from model.build import PRECISIONS
from model.model import VisionLanguageModel
from model.projector import build_projector
from model.trainable import add_lora, set_trainable
from qwen.attention import PACKED_SDPA
from qwen.modeling import Qwen2ForCausalLM
from visual.encoders import ENCODERS, VisionTower

PAD_TOKEN_ID, IMAGE_TOKEN_ID, FIRST_TEXT_ID = 0, 1, 2
FEATURE_LAYER = -2  # LLaVA's choice
TRAIN = TrainConfig(projector_lr=1e-3, lora_lr=2e-4)
MEAN_ANSWER, SPREAD, LONGEST_ANSWER = 93, 0.8, 700  # words, log-normal; an answer's first and last take six tokens


@dataclass(frozen=True)
class Sizes:
    """Sizes of a CLIP encoder and a Qwen2 language model, and of what trains them."""

    vocabulary: int
    width: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    mlp: int = 2048
    tied: bool = False
    vision_width: int = 384
    vision_layers: int = 12
    vision_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    lora_rank: int = 16
    batch_size: int = 8

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def vision_config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.vision_width, intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers, num_attention_heads=self.vision_heads,
            image_size=self.image_size, patch_size=self.patch_size,
        )  # fmt: skip

    def text_config(self, pad: int = PAD_TOKEN_ID, eos: int | None = None) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=32_768, tie_word_embeddings=self.tied,
            pad_token_id=pad, bos_token_id=None, eos_token_id=eos,
        )  # fmt: skip


SIZES = {
    "W1": Sizes(vocabulary=151_936),  # Qwen's own
    "W2": Sizes(vocabulary=12_288),  # the head's share of the work is that of a language model of 1.5 billion parameters
    "tiny": Sizes(
        vocabulary=640, width=64, layers=2, heads=4, kv_heads=2, mlp=96, vision_width=32, vision_layers=4,
        vision_heads=2, image_size=32, patch_size=8, lora_rank=4, batch_size=2,
    ),
}  # fmt: skip


def join_parts(
    encoder: PreTrainedModel, projector: Any, language_model: Any, *, feature_layer: int, image_size: int
) -> VisionLanguageModel:
    """Put the parts of a model together; IMAGE_TOKEN_ID stands for images."""
    language_model.config.image_token_id = IMAGE_TOKEN_ID
    tower = VisionTower(encoder, ENCODERS[encoder.config.model_type], feature_layer, image_size)
    return VisionLanguageModel(tower, projector, language_model)


def random_model(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, attention: str = PACKED_SDPA
) -> VisionLanguageModel:
    """Make a frozen encoder, a projector, and a language model with LoRA on its seven linear layers, in training mode.
    Frozen weights have `dtype`, the others are float32. attention: an implementation's name in transformers."""
    torch.manual_seed(0)
    with torch.device(device):
        encoder = CLIPVisionModel._from_config(sizes.vision_config(), dtype=dtype)
        language_model = Qwen2ForCausalLM._from_config(sizes.text_config(), dtype=dtype, attn_implementation=attention)
        projector = build_projector("mlp", sizes.vision_width, None, sizes.width)
    model = join_parts(encoder, projector, language_model, feature_layer=FEATURE_LAYER, image_size=sizes.image_size)
    lora = LoraConfig(r=sizes.lora_rank, alpha=2 * sizes.lora_rank)
    add_lora(model, lora, qwen.lora_target_modules(language_model, ["all-linear"]))
    set_trainable(model, TRAIN.trainable)
    return model.to(device).train()


def random_sample(sizes: Any, chance: np.random.Generator, question: int, answer: int, images: int = 1) -> Sample:
    """Make a sample as the dataset returns it: the images, `question` tokens, and `answer` supervised tokens. sizes: has
    image_tokens, image_size and vocabulary."""
    image_tokens = images * sizes.image_tokens
    text = torch.from_numpy(chance.integers(FIRST_TEXT_ID, sizes.vocabulary, question + answer))
    input_ids = torch.cat([torch.full((image_tokens,), IMAGE_TOKEN_ID), text])
    labels = input_ids.clone()
    labels[: image_tokens + question] = IGNORE_INDEX
    shape = (images, 3, sizes.image_size, sizes.image_size)
    return Sample(
        id="random",
        input_ids=input_ids,
        labels=labels,
        pixel_values=torch.from_numpy(chance.standard_normal(shape, dtype=np.float32)),
        patch_features=None,
        image_keys=[None] * images,
        is_cached=[False] * images,
    )


def answer_length(chance: np.random.Generator, mean: float = MEAN_ANSWER) -> int:
    """Draw a length; log-normal, as people's answers are."""
    return int(np.clip(chance.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD), 1, LONGEST_ANSWER))


class NotInstalled(Exception):
    """A way to train needs a package that is not installed."""


def require(name: str) -> Any:
    """Import and return a module. Raises NotInstalled if a package is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise NotInstalled(missing.name) from None


@dataclass(frozen=True)
class Task:
    """A model and samples in memory, for a way to train."""

    sizes: Sizes
    precision: str  # fp32 or bf16
    device: torch.device
    samples: list[Sample]  # a multiple of sizes.batch_size
    folder: Path  # for compiled code
    flash: bool = False  # FlashAttention
    say: Callable[[str], None] = print  # for notes of a way about itself

    def model(self) -> VisionLanguageModel:
        if self.flash:
            require("flash_attn")
        attention = "flash_attention_2" if self.flash else PACKED_SDPA
        return random_model(self.sizes, PRECISIONS[self.precision], self.device, attention)

    def batches(self, samples: Sequence[Sample], packed: bool = False) -> list[Batch]:
        """Return what a loader would yield; pinned if the device is a GPU."""
        size = self.sizes.batch_size
        batches = [collate(samples[i : i + size], PAD_TOKEN_ID, packed) for i in range(0, len(samples), size)]
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
