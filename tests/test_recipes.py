"""Every recipe in configs/, with tiny checkpoints of the same families, prepares its data and takes a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from config import load_config
from tests.toy_language import write_qwen1, write_qwen2, write_qwen3
from tests.toy_project import run_training, write_pictures
from tests.toy_towers import write_clip, write_dinov2, write_siglip, write_siglip2

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
TINY = {
    "openai/clip-vit-large-patch14": write_clip,
    "google/siglip-so400m-patch14-384": write_siglip,
    "google/siglip2-base-patch16-256": write_siglip2,
    "facebook/dinov2-base": write_dinov2,
    "Qwen/Qwen-7B-Chat": write_qwen1,
    "Qwen/Qwen2.5-0.5B-Instruct": write_qwen2,
    "Qwen/Qwen3-0.6B": write_qwen3,
}
LORA_MODULES = {
    ("c_attn", "w1", "w2"): {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"},
    ("all-linear",): {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"},
}


def write_raw_data(source: dict, folder: Path) -> dict:
    """Six records in the source's own format; returns the source with its paths."""
    write_pictures(folder / "images", 6)
    if source["format"] == "llava":
        records = [
            {
                "id": str(i),
                "image": f"{i}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?" if i % 2 else "What is it?\n<image>"},
                    {"from": "gpt", "value": f"It is picture {i}."},
                ],
            }
            for i in range(6)
        ]
    else:
        records = [
            {"url": "", "image_id": f"{i}.png", "caption": [f"图片{i}的描述{k}" for k in range(5)]} for i in range(6)
        ]
    annotations = folder / f"{source['name']}.json"
    annotations.write_text(json.dumps(records))
    return source | {"annotations": str(annotations), "images": str(folder / "images")}


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem != "demo"], ids=lambda path: path.stem)
def test_the_recipe_builds_and_takes_a_step(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    values["data"]["sources"] = [
        write_raw_data(source, tmp_path / source["name"]) for source in values["data"]["sources"]
    ]
    values["data"] |= {"qa_file": "qa.jsonl", "validation_file": "validation.jsonl", "validation_fraction": 0.2}
    for key, folder in (("vision_tower", "tower"), ("language_model", "lm")):
        TINY[values["model"][key]](tmp_path / folder)
        values["model"][key] = folder
    values["train"] |= {"max_steps": 1, "num_threads": 1, "num_workers": 0, "eval_steps": 1, "score_samples": 2}
    values["test"] |= {"max_new_tokens": 2}
    values["output_dir"] = "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    run_training(path)

    adapter = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    modules = {name.split(".")[-3] for name in adapter}
    assert modules == LORA_MODULES[tuple(load_config(path).lora.target_modules)]
    rank = {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name}
    assert rank == {values["lora"]["r"]}
    (row,) = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl") if '"loss"' in line]
    warmup = 1.0  # a run of one step has no warmup
    assert row["projector_lr"] == pytest.approx(values["train"]["projector_lr"] * warmup)
    assert row["lora_lr"] == pytest.approx(values["train"]["lora_lr"] * warmup)


def test_the_ancestors_recipe_is_kept():
    """Qwen-7B with CLIP or SigLIP: the published settings, and an alpha that goes with the rank."""
    for name in ("qwen-7b-clip", "qwen-7b-siglip"):
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        assert (config.lora.r, config.lora.dropout) == (128, 0.1) and config.lora.alpha >= config.lora.r
        assert config.lora.target_modules == ("c_attn", "w1", "w2")
        assert (config.train.projector_lr, config.train.lora_lr) == (1e-4, 3e-5)
        assert (config.train.per_device_train_batch_size, config.train.num_train_epochs) == (4, 2)


def test_demo_yaml_is_config_yaml():
    assert load_config(ROOT / "configs" / "demo.yaml") == load_config(ROOT / "config.yaml")
