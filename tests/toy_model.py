"""Toy vision-language models in memory, and prompts with images for them. For tests that need a model but no run.

`build_toy` builds a model as training does; `Tower` is an encoder of one matrix, for tests of generation.

Shapes: M images of N tokens each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from config import LoraConfig, ModelConfig, ScratchConfig, Trainable, TrainableConfig, TrainConfig
from config.typed_yaml import FolderOrHub
from model.build import Built, build_model, load_processors
from model.generate import Prompt
from model.model import VisionLanguageModel

# ---------------------------------------------------------------------------------------------------------------------
# Built as training builds them

LORA = LoraConfig(r=4, alpha=8.0)
RATES = {
    "projector_lr": 1e-2,
    "lora_lr": 2e-3,
    "language_model_lr": 3e-4,
    "embeddings_lr": 4e-5,
    "vision_tower_lr": 5e-6,
}


def train_config(freeze_random: tuple = (), **words: str) -> TrainConfig:
    """Return settings with a learning rate for every part. words: part -> its word, where it is not the default (projector
    full, language_model lora, the others frozen)."""
    trainable = TrainableConfig(**{part: Trainable(word) for part, word in words.items()})
    return TrainConfig(trainable=trainable, freeze_random=freeze_random, weight_decay=0.1, **RATES)


def build_toy(
    folder: Path,
    language_model: str | None = "qwen2",
    tower: str = "clip",
    *,
    train: TrainConfig | None = None,
    lora: LoraConfig = LORA,
    dtype: torch.dtype = torch.float32,
    **settings,
) -> Built:
    """Build a model of the parts in `folder`/<name>.

    language_model: None for one that `from_scratch`, in `settings`, describes. train: None for `train_config()`.
    settings: other fields of ModelConfig.
    """
    model = ModelConfig(
        vision_tower=FolderOrHub(folder / tower),
        language_model=None if language_model is None else FolderOrHub(folder / language_model),
        **settings,
    )
    return build_model(load_processors(model), model, lora, train or train_config(), dtype=dtype, seed=0)


def scratch_config(tokenizer: Path, **sizes) -> ScratchConfig:
    """Return a small mixture of experts, or another model of `sizes`, with the tokenizer of a folder."""
    default = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }
    return ScratchConfig(tokenizer=FolderOrHub(tokenizer), **{**default, **sizes})


# ---------------------------------------------------------------------------------------------------------------------
# For generation

N, SIDE = 6, 4  # tokens of an image; its height and width in pixels
NEW = 8  # tokens to generate


class Tower(nn.Module):
    """An encoder that makes N features of an image, each of which depends on all of its pixels. Counts the images."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3 * SIDE * SIDE, N * 16)
        self.model.dtype, self.device = torch.float32, torch.device("cpu")
        self.seen = 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.seen += len(pixel_values)
        return self.model(pixel_values.flatten(1)).unflatten(1, (N, 16))


# name -> (tokens before the images, images, tokens of the question) of each prompt
SHARED: dict[str, list[tuple[int, tuple[int, ...], int]]] = {
    "questions about one image": [(3, (0,), question) for question in (1, 4, 9, 2)],
    "questions about some images": [(3, (i % 3,), 2 + i) for i in range(7)],
    "one image with one question": [(3, (0,), 5), (3, (1,), 3), (3, (0,), 2)],
    "several images a prompt": [(2, (0, 1), 3), (2, (0, 1), 6), (2, (1, 0), 4), (2, (1, 0), 2)],
    "heads of different lengths": [(1, (0,), 3), (5, (0,), 6), (1, (0,), 2), (5, (0,), 4), (5, (1, 2), 1), (5, (1, 2), 2)],
    "some without an image": [(3, (0,), 4), (3, (0,), 9), (4, (), 3), (3, (0,), 5), (3, (1,), 5), (3, (0,), 2)],
}  # fmt: skip


def make_prompts(vlm: VisionLanguageModel, shapes: Sequence[tuple[int, tuple[int, ...], int]]) -> list[Prompt]:
    """Return a prompt for each (head, images, question): `head` tokens, the same for the same number; the images; `question`
    random tokens."""
    image = [vlm.causal_lm.config.image_token_id] * N
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for head, images, question in shapes:
        own = torch.randint(0, 400, (question,), generator=generator).tolist()
        prompts.append(Prompt([*(i % 256 for i in range(7, 7 + head)), *image * len(images), *own], images))
    return prompts


def random_images(count: int) -> Tensor:
    """Return [count, 3, SIDE, SIDE]."""
    return 2 * torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def one_at_a_time(vlm: VisionLanguageModel, prompts: Sequence[Prompt], pixel_values: Tensor) -> list[list[int]]:
    """Return the first NEW tokens of greedy decoding for each prompt, by an independent reference: the whole sequence is
    computed for every token, without cache and padding."""
    answers, lm = [], vlm.causal_lm
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(NEW):
            features = vlm.encode_images(pixel_values[list(prompt.images)]) if prompt.images else None
            hidden = lm.model(input_ids=torch.tensor([ids]), image_features=features, use_cache=False)
            logits = lm.lm_head(hidden.last_hidden_state[0, -1])
            logits[lm.config.image_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
        answers.append(ids[len(prompt.ids) :])
    return answers
