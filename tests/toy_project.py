"""A tiny project in a folder: encoder, language model, images, raw annotations, config. For tests of the scripts."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import qwen
from dataset.conversation import ChatFormat
from model.build import Processors
from tests.toy_language import write_qwen1, write_qwen2, write_qwen3
from tests.toy_towers import write_clip, write_dinov2, write_siglip, write_siglip2

TOWERS: dict[str, Callable[[Path], Path]] = {
    "clip": write_clip,
    "siglip": write_siglip,
    "siglip2": write_siglip2,
    "dinov2": write_dinov2,
}
LANGUAGE_MODELS = {"qwen1": write_qwen1, "qwen2": write_qwen2, "qwen3": write_qwen3}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def write_project(folder: Path, tower: str = "clip", language_model: str = "qwen2", images: int = 12) -> Path:
    """Write a project that trains in seconds, and return the path of its config.yaml.

    Its images are plain colours with one grey line each; the last quarter of its records is held out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    TOWERS[tower](folder / "tower")
    LANGUAGE_MODELS[language_model](folder / "lm")
    write_images(folder / "images", images)
    records = []
    for i in range(images):
        name = list(COLOURS)[i % len(COLOURS)]
        records.append(
            {
                "id": f"r{i}",
                "image": f"{i}.png",
                "type": "colour",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat colour is it?" if i % 2 else "<image>\n这是什么颜色？"},
                    {"from": "gpt", "value": name},
                    {"from": "human", "value": "Say it again."},
                    {"from": "gpt", "value": name + " again" * (i % 5)},
                ],
            }
        )
    held = images - images // 4
    (folder / "train.json").write_text(json.dumps(records[:held]))
    (folder / "validation.json").write_text(json.dumps(records[held:]))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_values()))
    return path


def config_values() -> dict:
    """Return the values of a toy project's config.yaml."""
    source = {"format": "llava", "images": "images"}
    return {
        "seed": 1,
        "output_dir": "run",
        "data": {
            "sources": [
                {"name": "train", "annotations": "train.json", "split": "train", **source},
                {"name": "held", "annotations": "validation.json", "split": "validation", **source},
            ],
            "qa_file": "qa.jsonl",
            "validation_file": "validation.jsonl",
            "max_length": 128,
            "system_prompt": None,
        },
        "model": {"vision_tower": "tower", "language_model": "lm"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            "projector_start": "calibrated",  # "words" takes a second
            "projector_lr": 1e-3,
            "lora_lr": 5e-4,
            "max_steps": 6,
            "num_train_epochs": 0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "precision": "fp32",
            "num_threads": 1,
            "num_workers": 0,
            "logging_steps": 1,
            "eval_steps": 3,
            "save_steps": 3,
        },
        "test": {"images": "images", "questions": ["What colour is it?"], "max_new_tokens": 4},
    }


SIZES = {
    "architecture": "qwen2_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip


def write_staged_project(folder: Path) -> Path:
    """Write a project whose language model starts from random weights and trains in three stages: texts, images,
    instructions. Its tokenizer is learned from their data. Returns the path of its config.yaml."""
    path = write_project(folder)
    lines = [{"text": f"There are {i} red circles. 有{i}个红色的圆形。" * (1 + i % 3)} for i in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    values = yaml.safe_load(path.read_text())
    seen = values["data"]
    values["data"] = {"max_length": 128, "system_prompt": None}
    values["model"] = {
        "vision_tower": "tower",
        "projector": "resampler",
        "num_queries": 4,
        "attention": "mixed",
        "from_scratch": {"tokenizer": "./tokenizer", "vocab_size": 320, **SIZES},
    }
    del values["lora"]
    words = {"language_model": "full", "embeddings": "full"}
    train = values["train"] | {"trainable": words, "language_model_lr": 1e-3, "embeddings_lr": 1e-3}
    train |= {"router_aux_loss_coef": 0.01, "max_steps": 4, "eval_steps": 2, "save_steps": 2, "score_samples": 4}
    del train["lora_lr"]
    texts = {"name": "texts", "annotations": "texts.jsonl"}
    text = {
        "sources": [texts],
        "qa_file": "text.jsonl",
        "validation_file": "text_held.jsonl",
        "validation_fraction": 0.3,
    }
    sources = ("sources", "qa_file", "validation_file")
    train["stages"] = [
        {
            "name": "text",
            "data": text,
            "train": {"trainable": {"projector": "frozen"}, "freeze_random": ["projector"]},
        },
        {"name": "vision", "data": {key: seen[key] for key in sources}, "train": {"projector_lr": 2e-3}},
        {
            "name": "chat",
            "data": {key: seen[key] for key in sources},
            "train": {"trainable": {"projector": "frozen", "language_model": "top:1"}, "max_steps": 2},
        },
    ]
    values["train"] = train
    write_yaml(path, values)
    return path


def write_yaml(path: Path, values: dict) -> None:
    """Write a YAML file without aliases, which the config's reader refuses."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values)), allow_unicode=True))


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((40, 50, 3), list(COLOURS.values())[i % len(COLOURS)], dtype=np.uint8)
        pixels[i % 40, :, :] = 127  # no two images are equal
        Image.fromarray(pixels).save(folder / f"{i}.png")


def run_training(config: Path, *arguments: str) -> int:
    """Run train.py's main in this process and return its exit code. May be called any number of times."""
    import train

    with fresh_accelerate():
        return train.main(["--config", str(config), *arguments])


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Clear accelerate's global state before and after: it would keep the devices and precision of an earlier run."""
    reset_accelerate()
    try:
        yield
    finally:
        reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def chat_of(processors: Processors, system_prompt: str | None = None) -> ChatFormat:
    """Return the prompt format for `processors`, as `training.run.chat_format` makes it of a config."""
    return ChatFormat(
        encode_text=functools.partial(qwen.encode_text, processors.tokenizer),
        im_start_id=processors.token_id("<|im_start|>"),
        im_end_id=processors.token_id("<|im_end|>"),
        end_of_text_id=processors.token_id("<|endoftext|>"),
        image_token_id=qwen.image_token_id(processors.tokenizer),
        num_image_tokens=processors.num_image_tokens,
        system_prompt=system_prompt,
    )
