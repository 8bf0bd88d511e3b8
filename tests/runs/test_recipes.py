"""Every recipe in recipes/ prepares its data and takes a step, with tiny checkpoints of the same model families.
`sh tests/run.sh tests/runs/test_recipes.py`"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from config import load_config
from tests.toy_language import write_llama, write_qwen1, write_qwen2, write_qwen3
from tests.toy_project import run_training, write_images
from tests.toy_towers import write_clip, write_dinov2, write_siglip, write_siglip2

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY: dict[str, Callable[[Path], Path]] = {
    "openai/clip-vit-large-patch14": write_clip,
    "google/siglip-so400m-patch14-384": write_siglip,
    "google/siglip2-base-patch16-256": write_siglip2,
    "facebook/dinov2-base": write_dinov2,
    "../data/parts/vit_s": write_dinov2,
    "../data/parts/smollm2": write_llama,
    "Qwen/Qwen-7B-Chat": write_qwen1,
    "Qwen/Qwen2.5-0.5B-Instruct": write_qwen2,
    "Qwen/Qwen2.5-1.5B-Instruct": write_qwen2,
    "Qwen/Qwen3-0.6B": write_qwen3,
}
LORA_MODULES = {
    ("c_attn", "w1", "w2"): {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"},
    ("all-linear",): {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"},
}


def write_raw_data(source: dict, folder: Path) -> dict:
    """Write six records in the source's own format, and return the source with their paths. Held-out images are others."""
    write_images(folder / "images", 12)
    numbers = range(6, 12) if source.get("split") == "validation" else range(6)
    if source["format"] == "llava":
        records = [
            {
                "id": str(i),
                "image": f"{i}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?" if i % 2 else "What is it?\n<image>"},
                    {"from": "gpt", "value": f"It is image {i}."},
                ],
            }
            for i in numbers
        ]
    else:
        records = [
            {"url": "", "image_id": f"{i}.png", "caption": [f"图片{i}的描述{k}" for k in range(5)]} for i in numbers
        ]
    annotations = folder / f"{source['name']}.json"
    annotations.write_text(json.dumps(records))
    return source | {"annotations": str(annotations), "images": str(folder / "images")}


OTHERS = ("demo", "from-scratch", "from-scratch-demo")  # have their own tests


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.stem not in OTHERS], ids=lambda path: path.stem)
def test_recipe_builds_and_takes_a_step(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    stages = values["train"].get("stages") or []
    for part in [values, *stages]:
        if sources := part.get("data", {}).get("sources"):
            name = part.get("name", "all")
            part["data"]["sources"] = [write_raw_data(source, tmp_path / name / source["name"]) for source in sources]
            part["data"] |= {"qa_file": f"{name}.jsonl", "validation_file": f"{name}_held.jsonl"}
            part["data"]["validation_fraction"] = 0.2
    for key, folder in (("vision_tower", "tower"), ("language_model", "lm")):
        TINY[values["model"][key]](tmp_path / folder)
        values["model"][key] = folder
    values["train"] |= {"max_steps": 1, "num_threads": 1, "num_workers": 0, "eval_steps": 1, "score_samples": 2}
    for stage in stages:
        stage["train"] = stage.get("train", {}) | {"max_steps": 1}
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
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl") if '"loss"' in line]
    assert len(rows) == max(1, len(stages))
    # a run of one step has no warmup
    for row, stage in zip(rows, stages or [values], strict=True):
        rates = {key: stage["train"].get(key, values["train"][key]) for key in ("projector_lr", "lora_lr")}
        if stage["train"].get("trainable", {}).get("language_model") == "frozen":
            del rates["lora_lr"]
            assert "lora_lr" not in row
        assert {key: row[key] for key in rates} == pytest.approx(rates)


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return str(path)


def test_the_recipe_from_scratch_trains_all_its_stages(tmp_path):
    """With a narrow model and data in the published layouts: minimind's texts, SVLM's captions and instructions with the
    image mark at the end, with and without a newline before it, one row with three images."""
    values = yaml.safe_load((ROOT / "recipes" / "from-scratch.yaml").read_text())
    write_dinov2(tmp_path / "tower")
    write_images(tmp_path / "images", 6)
    texts = [{"text": f"很久以前，有{i}只猫。Once upon a time there were {i} cats."} for i in range(12)]

    def talk(question: str, i: int, image: str) -> dict:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"图片{i}：一只猫。"}]
        return {"conversations": turns, "image": image}

    captions = [talk("请描述这张图片\n<image>", i, f"{i}.png") for i in range(6)]
    asked = [talk("图里有什么？<image>", i, f"{i}.png") for i in range(6)]
    asked.append(talk("比较：<image><image><image>", 6, "0.png, 1.png, 2.png"))
    files = {"text": texts, "vision": captions, "chat": asked}
    for stage in values["train"]["stages"]:
        (source,) = stage["data"]["sources"]
        source["annotations"] = write_jsonl(tmp_path / f"{stage['name']}_raw.jsonl", files[stage["name"]])
        if "images" in source:
            source["images"] = str(tmp_path / "images")
        stage["data"] |= {"qa_file": f"{stage['name']}.jsonl", "validation_file": f"{stage['name']}_held.jsonl"}
        stage["data"]["validation_fraction"] = 0.34
        stage["train"] |= {"max_steps": 1}
    values["data"] |= {"qa_file": "qa.jsonl"}
    values["model"] |= {"vision_tower": "tower"}
    values["model"]["from_scratch"] |= {
        "tokenizer": "./tokenizer", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2,
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    values["train"] |= {"num_threads": 1, "num_workers": 0, "eval_steps": 1, "score_samples": 2, "precision": "fp32"}
    values["test"] |= {"max_new_tokens": 2}
    values["output_dir"] = "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True))
    run_training(path)
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl") if '"loss"' in line]
    assert [row["stage"] for row in rows] == ["text", "vision", "chat"]
    assert all(row["balance_loss"] > 1 for row in rows) and "projector_lr" not in rows[0] | rows[2]
    report = json.loads((tmp_path / "chat.report.json").read_text())
    assert report["kept"] == 7 and report["repairs"] == {"comma_joined_images_split": 1}
    assert (tmp_path / "run" / "final" / "scores.json").exists()


def test_the_recipe_from_scratch_has_svlms_settings():
    """DINOv2-base, 32 tokens per image, width 1024, 14 layers, 4 heads; four experts, of which a token passes two and a
    shared one; first projector, embeddings and the top two layers, at most 1,500 steps an epoch, then all layers."""
    config = load_config(ROOT / "recipes" / "from-scratch.yaml")
    model, new = config.model, config.model.from_scratch
    assert new is not None
    assert (model.vision_tower, model.projector, model.num_queries) == ("facebook/dinov2-base", "resampler", 32)
    assert (new.hidden_size, new.num_hidden_layers, new.num_attention_heads) == (1024, 14, 4)
    assert (new.num_experts, new.num_experts_per_tok) == (4, 2) and new.shared_expert_intermediate_size
    text, vision, chat = (stage.config for stage in config.train.stages)
    words = vision.train.trainable
    assert (words.projector, words.language_model, words.embeddings) == ("full", "top:2", "full")
    assert (vision.train.num_train_epochs, vision.train.steps_per_epoch) == (5, 1500)
    assert (chat.train.trainable.projector, chat.train.trainable.language_model) == ("frozen", "full")
    assert chat.data.max_length == 768 and chat.train.per_device_train_batch_size == 4
    assert text.train.freeze_random == ("projector",) and not vision.train.freeze_random


def test_the_qwen_7b_recipes_have_the_published_settings():
    """Qwen-7B with CLIP or SigLIP. Only alpha differs: it is not below the rank."""
    for name in ("qwen-7b-clip", "qwen-7b-siglip"):
        config = load_config(ROOT / "recipes" / f"{name}.yaml")
        assert (config.lora.r, config.lora.dropout) == (128, 0.1) and config.lora.alpha >= config.lora.r
        assert config.lora.target_modules == ("c_attn", "w1", "w2")
        assert (config.train.projector_lr, config.train.lora_lr) == (1e-4, 3e-5)
        assert (config.train.per_device_train_batch_size, config.train.num_train_epochs) == (4, 2)


def test_demo_recipe_equals_config_yaml():
    assert load_config(ROOT / "recipes" / "demo.yaml") == load_config(ROOT / "config.yaml")
