"""A model may start from a checkpoint, an imported one, or an exported folder, and says what it took.

Run: python -m pytest tests/model/test_start.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
import model.export.__main__ as command
import train
from config import InputError, load_config, to_yaml
from config.schema import TrainableConfig, TrainConfig
from config.typed_yaml import Trainable
from model.build import Built, build_model, load_processors
from model.checkpoint import save_trained
from model.checkpoint_folder import write_folder
from model.export import stock
from tests.toy_checkpoints import TRAIN, write_checkpoint, write_records
from tests.toy_language import write_qwen1
from tests.toy_towers import write_dinov2

ALL = TrainConfig(
    trainable=TrainableConfig(vision_tower=Trainable("top:1")), projector_lr=1e-3, lora_lr=1e-3, vision_tower_lr=1e-3,
    precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A checkpoint with LoRA and a trained layer of the encoder; and its exports."""
    folder = tmp_path_factory.mktemp("start")
    write_dinov2(folder / "tower")
    write_qwen1(folder / "lm")
    write_records(folder)
    write_checkpoint(folder / "run", folder / "tower", folder / "lm", train=ALL)

    def compare_here(jobs):
        for job in jobs:
            (job / "result.json").write_text(json.dumps(stock.compare(job)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_stock", compare_here)
        for name in ("llava", "native"):
            words = ["--checkpoint", str(folder / "run" / "final"), "--output", str(folder / name), "--samples", "1"]
            assert command.main([*words, "--format", name, "--dtype", "fp32"]) == 0
    return folder


def start(folders: Path, name: str, word: str = "lora", **settings: Any) -> Built:
    """Build a new run's model on the released parts, which starts from a folder."""
    config = load_config(folders / "run" / "final" / "config.yaml")
    trainable = TrainableConfig(language_model=Trainable(word))
    place = folders / name if name != "checkpoint" else folders / "run" / "final"
    values = dataclasses.replace(config.model, start_from=place, **settings)
    processors = load_processors(values)
    training = dataclasses.replace(TRAIN, trainable=trainable, lora_lr=1e-3 if word == "lora" else None)
    return build_model(processors, values, config.lora, training, dtype=torch.float32, seed=1)


@torch.inference_mode()
def logits_of(built: Built) -> torch.Tensor:
    """Return logits for a prompt with an image. LoRA that is new adds zero."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, *[built.model.causal_lm.config.image_token_id] * 16, 7, 8]])
    vlm = built.model.eval()
    return vlm.causal_lm(input_ids=ids, image_features=vlm.encode_images(pixels)).logits


@pytest.mark.parametrize("name", ["checkpoint", "llava", "native"])
def test_a_run_starts_from_what_was_trained(folders, tmp_path, name):
    built = start(folders, name)
    expected = logits_of(model.load(folders / "run" / "final", device="cpu").built)
    assert (logits_of(built) - expected).abs().max() < 1e-4
    taken, new, left = built.start_report[1:]
    lora = "LoRA" in taken
    assert lora == (name == "checkpoint") and "projector (4 tensors)" in taken
    assert "vision_tower (18 of 79 tensors are not the released ones)" in taken  # one layer of DINOv2
    if name != "checkpoint":  # LoRA on q, v and down in two layers has been merged
        assert "language_model (6 of " in taken
    assert new == ("  new: nothing" if name == "checkpoint" else "  new: LoRA")
    assert ("tokenizer" in left) == (name != "llava")
    save_trained(built.model, built.origins, tmp_path)
    if name != "checkpoint":  # later checkpoints hold what differs from the released weights, and no more
        names = load_file(tmp_path / "language_model.safetensors").keys()
        assert names == {
            f"model.layers.{i}.{m}.weight"
            for i in (0, 1)
            for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        }


def test_the_checkpoint_that_follows_opens_without_the_export(folders, tmp_path):
    """A run that began from an export is continued from its own checkpoint."""
    config = load_config(folders / "run" / "final" / "config.yaml")
    built = start(folders, "llava")

    def write(folder: Path) -> None:
        values = dataclasses.replace(config, model=dataclasses.replace(config.model, start_from=folders / "llava"))
        (folder / "config.yaml").write_text(to_yaml(values))
        built.tokenizer.save_pretrained(folder / "tokenizer")
        built.image_processor.save(folder / "image_processor")
        save_trained(built.model, built.origins, folder)

    write_folder(tmp_path / "final", write)
    assert torch.equal(logits_of(model.load(tmp_path / "final", device="cpu").built), logits_of(built))


def test_a_native_export_may_be_its_own_base(folders):
    parts = {part: str(folders / "native" / part) for part in ("vision_tower", "language_model")}
    settings = {
        key: type(load_config(folders / "run/final/config.yaml").model.vision_tower)(p) for key, p in parts.items()
    }
    built = start(folders, "native", "full", **settings)
    assert built.start_report[1] == "  taken: projector (4 tensors)" and built.start_report[2] == "  new: nothing"
    expected = logits_of(model.load(folders / "run" / "final", device="cpu").built)
    assert (logits_of(built) - expected).abs().max() < 1e-4


def test_an_export_that_does_not_fit_lists_its_tensors(folders, tmp_path):
    write_qwen1(tmp_path / "lm", seed=5)
    tensors = load_file(tmp_path / "lm" / "model.safetensors")
    tensors["transformer.h.0.mlp.w1.weight"] = tensors["transformer.h.0.mlp.w1.weight"][:32]
    path = folders / "native" / "language_model" / "model.safetensors"
    before = path.read_bytes()
    changed = load_file(path)
    changed["model.extra"] = changed.pop("model.norm.weight")
    save_file(changed, path, {"format": "pt"})
    try:
        with pytest.raises(InputError, match="1 tensors unknown to this model: model.extra"):
            start(folders, "native")
    finally:
        path.write_bytes(before)
    with pytest.raises(InputError, match="projector|linear_1"):
        start(folders, "llava", projector_hidden_size=32)


def test_train_prints_what_it_took(folders, tmp_path, capsys):
    """`--check` opens a run as training does."""
    config = load_config(folders / "run" / "final" / "config.yaml")
    data = dataclasses.replace(config.data, qa_file=folders / "validation.jsonl")
    settings = dataclasses.replace(config.model, start_from=folders / "llava")
    values = dataclasses.replace(config, data=data, model=settings, output_dir=tmp_path / "run", train=TRAIN)
    (tmp_path / "config.yaml").write_text(to_yaml(values))
    assert train.main(["--config", str(tmp_path / "config.yaml"), "--check"]) == 0
    said = capsys.readouterr().out
    assert f"starting from {folders / 'llava'}\n  taken: projector (4 tensors), language_model (6 of" in said
    assert "new: LoRA" in said and "nothing records" not in said
