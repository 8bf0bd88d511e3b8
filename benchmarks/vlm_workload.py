"""The workload of `benchmarks.training`: an encoder and a language model of random weights, photos, questions, a config.

A folder holds it twice over, with the same numbers: `tower` and `lm` as this project reads them, `llava` as transformers'
LlavaForConditionalGeneration does; `first.safetensors` are the projector and the LoRA matrices that a run of ours begins
with, for everybody else to begin with too. Everything comes from a seed. Knows no trainer.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from training.run import build, open_processors
from benchmarks.workload import SEED, WORDS
from config import load_config

VERSION = 1  # raise it when what is written changes
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
QUESTION_WORDS = 32
MEAN_ANSWER, SPREAD, LONGEST_ANSWER = (
    93,
    0.8,
    700,
)  # words: log-normal; the first and the last of an answer take six tokens
PHOTO = (640, 480)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How large the models are."""

    vocabulary: int
    width: int = 512
    layers: int = 8
    heads: int = 8
    key_heads: int = 2
    feed_forward: int = 2048
    vision_width: int = 384
    vision_layers: int = 12
    vision_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    rank: int = 16
    batch: int = 8


SHAPES = {
    "W1": Shape(vocabulary=151_936),  # the real one
    "W2": Shape(
        vocabulary=12_288
    ),  # the head's share of the work is that of a language model of 1.5 billion parameters
    "tiny": Shape(640, 64, 2, 4, 2, 96, 32, 4, 2, 32, 8, 4, 2),
}


def make_workload(folder: Path, name: str, records: int) -> None:
    """The workload `name` of SHAPES with at least so many records in `folder`; nothing if it is there already."""
    stamp, shape = folder / "workload.json", SHAPES[name]
    wanted = {"version": VERSION, "name": name}
    if stamp.is_file():
        found = json.loads(stamp.read_text())
        if found.pop("records") >= records and found == wanted:
            return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(folder / "lm")
    CLIPImageProcessor(
        size={"shortest_edge": shape.image_size}, crop_size={"height": shape.image_size, "width": shape.image_size}
    ).save_pretrained(folder / "tower")
    write_models(folder, shape, tokenizer)
    chance = np.random.default_rng(SEED)
    with open(folder / "qa.jsonl", "w", encoding="utf-8") as file:
        for i in range(records):
            photo(chance).save(folder / "images" / f"{i}.jpg", quality=88)
            file.write(json.dumps(record(chance, i)) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_values(shape)))
    write_first_weights(folder)
    stamp.write_text(json.dumps(wanted | {"records": records}))


def new_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE that makes one token of each of WORDS with a space before it, and of each role's name."""
    letters = ByteLevel.alphabet()
    words = ["Ġ" + word for word in plain_words()]
    # A word grows from its left end. Words come before roles, and nothing but a word's first letter follows "Ġ", so no
    # other merge ever comes in between.
    grown = [(whole[:end], whole[end]) for whole in (*words, "user", "assistant") for end in range(1, len(whole))]
    merges = list(dict.fromkeys(grown))
    vocabulary = {token: i for i, token in enumerate([*sorted(letters), *(left + right for left, right in merges)])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )  # fmt: skip


def plain_words() -> list[str]:
    return [word for word in WORDS if word.isascii() and word.isalpha()]


def write_models(folder: Path, shape: Shape, tokenizer: Qwen2Tokenizer) -> None:
    """`llava`, and its two halves alone, in bfloat16 as released models are."""
    eos, pad, image = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|image_pad|>"])
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width, num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads, image_size=shape.image_size, patch_size=shape.patch_size,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=(shape.image_size // shape.patch_size) ** 2, image_token_id=image, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        whole = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    whole.save_pretrained(folder / "llava")
    with torch.device("meta"):
        tower, lm = CLIPVisionModel(vision), Qwen2ForCausalLM(text)
    tower.load_state_dict(whole.model.vision_tower.state_dict(), assign=True)
    lm.model.load_state_dict(whole.model.language_model.state_dict(), assign=True)
    lm.lm_head.load_state_dict(whole.lm_head.state_dict(), assign=True)
    tower.save_pretrained(folder / "tower")
    lm.save_pretrained(folder / "lm")


def photo(chance: np.random.Generator) -> Image.Image:
    """Smooth noise from coarse to fine, some shapes and a little grain: compresses and decodes as a photo does."""
    pixels = np.zeros((PHOTO[1], PHOTO[0], 3), np.float32)
    for cells, strength in ((6, 110), (24, 50), (96, 25)):
        small = Image.fromarray(chance.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(small.resize(PHOTO, Image.Resampling.BICUBIC), np.float32) / 255 - 0.5) * strength
    pixels += chance.normal(0, 4, pixels.shape)
    image = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        left, top, width, height = (int(value) for value in chance.integers((0, 0, 30, 30), (560, 400, 200, 160)))
        shape = draw.ellipse if chance.random() < 0.5 else draw.rectangle
        shape((left, top, left + width, top + height), tuple(int(value) for value in chance.integers(0, 256, 3)))
    return image


def record(chance: np.random.Generator, number: int) -> dict:
    """One question about a photo with one answer. Three tenths of a record's tokens, on average, are the answer's."""
    mean_of_log = np.log(MEAN_ANSWER) - SPREAD**2 / 2
    length = int(np.clip(chance.lognormal(mean_of_log, SPREAD), 1, LONGEST_ANSWER))
    question, answer = (" ".join(chance.choice(plain_words(), count)) for count in (QUESTION_WORDS, length))
    turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    return {"id": f"photo:{number}", "image": f"images/{number}.jpg", "conversations": turns}


def config_values(shape: Shape) -> dict:
    """The config.yaml of our run. Nothing but what the workload is: all speed is left to the defaults."""
    return {
        "seed": SEED,
        "output_dir": "run",
        "data": {"qa_file": "qa.jsonl", "max_length": 2048, "system_prompt": None},
        "model": {"vision_tower": "tower", "language_model": "lm", "vision_feature_layer": -2},
        "lora": {"r": shape.rank, "alpha": 2 * shape.rank, "dropout": 0.0},
        "train": {
            "projector_lr": 1e-3,
            "lora_lr": 2e-4,
            "num_train_epochs": 0,
            "max_steps": 24,
            "per_device_train_batch_size": shape.batch,
            "warmup_ratio": 0.0,
            "logging_steps": 1,
            "save_steps": None,
        },
    }


def write_first_weights(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    model = build(config, "fp32", open_processors(config)).model
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(trained, folder / "first.safetensors")
