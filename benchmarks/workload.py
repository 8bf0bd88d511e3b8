"""The folder on which `benchmarks.training`, `limits` and `answering` work: an encoder (`tower`) and a language model (`lm`)
of random weights, photos, questions (qa.jsonl) and a config.yaml. Everything is made from a seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPImageProcessor, CLIPVisionModel, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.annotations import PLAIN_WORDS, SEED
from benchmarks.models import SIZES, answer_length

VERSION = 2  # of the files that `write_workload` writes
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
QUESTION_WORDS = 32
PHOTO = (640, 480)  # pixels
# Only what the workload is: everything about speed is left to the defaults. The learning rates are those of `models.TRAIN`.
CONFIG = """
seed: 1
output_dir: run
data: {{qa_file: qa.jsonl, max_length: 2048, system_prompt: null}}
model: {{vision_tower: tower, language_model: lm, vision_feature_layer: -2}}
lora: {{r: {rank}, alpha: {alpha}, dropout: 0.0}}
train:
  {{projector_lr: 1.0e-3, lora_lr: 2.0e-4, num_train_epochs: 0, max_steps: 24, per_device_train_batch_size: {batch_size},
   projector_start: random, warmup_ratio: 0.0, logging_steps: 1, save_steps: null}}
"""


def write_workload(folder: Path, name: str, records: int) -> None:
    """Write the workload of SIZES[name] with `records` records, unless `folder` holds one with at least so many."""
    stamp, sizes = folder / "workload.json", SIZES[name]
    wanted = {"version": VERSION, "name": name}
    if stamp.is_file():
        found = json.loads(stamp.read_text())
        if found.pop("records") >= records and found == wanted:
            return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(folder / "lm")
    side = sizes.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    image_processor.save_pretrained(folder / "tower")
    pad, eos = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in ("<|endoftext|>", "<|im_end|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        models = {"tower": CLIPVisionModel(sizes.vision_config()), "lm": Qwen2ForCausalLM(sizes.text_config(pad, eos))}
    for name_, model in models.items():
        model.bfloat16().save_pretrained(folder / name_)  # as released models are
    chance = np.random.default_rng(SEED)
    with open(folder / "qa.jsonl", "w", encoding="utf-8") as file:
        for i in range(records):
            photo(chance).save(folder / "images" / f"{i}.jpg", quality=88)
            file.write(json.dumps(record(chance, i)) + "\n")
    config = CONFIG.format(rank=sizes.lora_rank, alpha=2 * sizes.lora_rank, batch_size=sizes.batch_size)
    (folder / "config.yaml").write_text(config)
    stamp.write_text(json.dumps(wanted | {"records": records}))


def new_tokenizer() -> Qwen2Tokenizer:
    """Make a byte-level BPE with one token for each of PLAIN_WORDS after a space, and for each role's name."""
    words = ["Ġ" + word for word in PLAIN_WORDS]
    # A word grows from its left end. Words come before roles, and only a word's first letter follows "Ġ", so no other
    # merge comes in between.
    grown = [(whole[:end], whole[end]) for whole in (*words, "user", "assistant") for end in range(1, len(whole))]
    merges: Any = list(dict.fromkeys(grown))
    tokens = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )  # fmt: skip


def photo(chance: np.random.Generator) -> Image.Image:
    """Draw smooth noise from coarse to fine, some shapes and a little grain: compresses and decodes as a photo does."""
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
    """Make a question about a photo with one answer. On average, three tenths of its tokens are the answer's."""
    length = answer_length(chance)
    question, answer = (" ".join(chance.choice(PLAIN_WORDS, count)) for count in (QUESTION_WORDS, length))
    turns = [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]
    return {"id": f"photo:{number}", "image": f"images/{number}.jpg", "conversations": turns}
