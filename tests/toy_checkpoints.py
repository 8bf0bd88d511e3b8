"""Checkpoints of toy models with random weights everywhere that training would have changed, without training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from config import Config, DataConfig, LoraConfig, TestConfig, TrainConfig, to_yaml
from config.schema import ModelConfig
from config.typed_yaml import FolderOrHub
from model.build import build_model, load_processors, save_processors
from model.checkpoint import save_trained
from model.checkpoint_folder import write_folder
from model.projector import Projector
from tests.toy_project import write_images

LORA = LoraConfig(r=4, alpha=8.0, target_modules=("q_proj", "v_proj", "down_proj"))
TRAIN = TrainConfig(projector_lr=1e-3, lora_lr=1e-3, precision="fp32")


def write_checkpoint(
    folder: Path,
    tower: Path,
    language_model: Path,
    *,
    train: TrainConfig = TRAIN,
    lora: LoraConfig = LORA,
    data: DataConfig | None = None,
    **model,
) -> Config:
    """Write final/ into `folder`: random LoRA, projector and buffers of the projector. model: keys of ModelConfig."""
    settings = ModelConfig(FolderOrHub(tower), FolderOrHub(language_model), **model)
    config = Config(
        data=data or DataConfig(folder / "qa.jsonl", max_length=256, system_prompt=None),
        model=settings,
        output_dir=folder,
        lora=lora,
        train=train,
        test=TestConfig(max_new_tokens=4),
    )
    processors = load_processors(settings)
    built = build_model(processors, settings, lora, train, dtype=torch.float32, seed=0)
    randomise(built.model)

    def write(target: Path) -> None:
        (target / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        save_processors(processors, target)
        save_trained(built.model, dataclasses.replace(built.origins, random=frozenset()), target)

    folder.mkdir(parents=True, exist_ok=True)
    write_folder(folder / "final", write)
    return config


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Change LoRA, every trainable weight and the projector's buffers, so that each matters."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        elif parameter.requires_grad:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    projector = model.get_submodule("projector")
    assert isinstance(projector, Projector)
    projector.feature_mean.normal_(generator=generator)
    projector.feature_std.uniform_(0.5, 2.0, generator=generator)
    projector.output_scale.fill_(0.7)


def write_records(folder: Path, count: int = 3) -> Path:
    """Write a QA file about images of 40 x 50 pixels, every other record with two turns. Returns its path."""
    write_images(folder / "images", count)
    questions = ["What colour is it?", "这是什么颜色？"]
    records = []
    for i in range(count):
        turns = [{"role": "user", "content": f"<image>\n{questions[i % 2]}"}, {"role": "assistant", "content": "red"}]
        turns += [{"role": "user", "content": "Say it again."}, {"role": "assistant", "content": "red again"}] * (i % 2)
        records.append({"id": f"r{i}", "image": f"images/{i}.png", "conversations": turns})
    path = folder / "validation.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path
