"""A whole tiny project in a folder: encoder, language model, pictures, raw annotations, config. For tests of the scripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from tests.toy_language import write_qwen1, write_qwen2, write_qwen3
from tests.toy_towers import write_clip, write_dinov2, write_siglip, write_siglip2

TOWERS = {"clip": write_clip, "siglip": write_siglip, "siglip2": write_siglip2, "dinov2": write_dinov2}
LANGUAGE_MODELS = {"qwen1": write_qwen1, "qwen2": write_qwen2, "qwen3": write_qwen3}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def write_project(folder: Path, tower: str = "clip", language_model: str = "qwen2", pictures: int = 12) -> Path:
    """Returns the path of a config.yaml that trains in seconds. Pictures are plain colours; the last quarter is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    TOWERS[tower](folder / "tower")
    LANGUAGE_MODELS[language_model](folder / "lm")
    write_pictures(folder / "images", pictures)
    records = []
    for i in range(pictures):
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
    held = pictures - pictures // 4
    (folder / "train.json").write_text(json.dumps(records[:held]))
    (folder / "validation.json").write_text(json.dumps(records[held:]))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_values()))
    return path


def config_values() -> dict:
    """The values of a toy project's config.yaml."""
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


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((40, 50, 3), list(COLOURS.values())[i % len(COLOURS)], dtype=np.uint8)
        pixels[i % 40, :, :] = 127  # no two pictures are alike
        Image.fromarray(pixels).save(folder / f"{i}.png")


def run_training(config: Path, *arguments: str) -> int:
    """train.py's main in this process, as often as wanted: accelerate keeps its state between runs otherwise."""
    import train

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        return train.main(["--config", str(config), *arguments])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
