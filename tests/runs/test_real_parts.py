"""Whole runs with real pretrained parts and real drawings: SmolLM2-135M, a ViT-S in DINOv2's layout, emoji. They are skipped
where a part cannot be downloaded. Takes a few minutes. `sh tests/run.sh tests/runs/test_real_parts.py`"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

import qwen
import test
from dataset import show
from demo.emoji import make_emoji
from tests.starts import At, Start
from tests.toy_project import config_values, run_training, write_yaml
from visual.encoders import load_vision_tower
from visual.images import read_image
from visual.processor import load_image_processor

CONCEPTS = 100
IMAGE_SIZE = 112  # 8 x 8 patches, 16 tokens: a third of the recipe's time
SECONDS = 300  # within which the killed run must reach its end


@pytest.fixture(scope="module")
def emoji(emoji_drawings, tmp_path_factory) -> Path:
    """A folder of demo.emoji with CONCEPTS concepts; noto is held out."""
    folder = tmp_path_factory.mktemp("emoji")
    shutil.copytree(emoji_drawings, folder / "packages")
    make_emoji(folder, "noto", num_concepts=CONCEPTS)
    return folder


def take(emoji: Path, name: str, choose: Callable[[list[dict]], Sequence[dict]], output: Path) -> str:
    """Write some of the records of an annotation file to `output`, and return its path."""
    records = choose(json.loads((emoji / name).read_text()))
    assert records
    output.write_text(json.dumps(records))
    return str(output)


def project_values(emoji: Path, smollm2: Path, vit_s: Path, annotations: dict[str, str]) -> dict:
    """Return the values of a config. annotations: the name of a source -> its file; "held-out" is for validation."""
    values = config_values()
    sources = []
    for name, path in annotations.items():
        captions = name == "captions"
        sources.append(
            {
                "name": name,
                "annotations": path,
                "format": "ai_challenger" if captions else "llava",
                "images": str(emoji / "images" if captions else emoji),
                "split": "validation" if name == "held-out" else "train",
            }
        )
    values["data"] |= {"sources": sources, "max_length": 320}
    values["model"] |= {
        "vision_tower": str(vit_s),
        "vision_feature_layer": -3,
        "image_size": IMAGE_SIZE,
        "projector": "pixel_shuffle",
        "language_model": str(smollm2),
    }
    return values


@pytest.fixture(scope="module")
def project(emoji, smollm2, vit_s, tmp_path_factory) -> Path:
    """The config of a run of six steps on a few records of each annotation file, among them one about two images."""
    folder = tmp_path_factory.mktemp("project")

    def few(records: list[dict]) -> list[dict]:
        return records[:4] + [record for record in records if isinstance(record["image"], list)][:2]

    files = {
        "names": take(emoji, "names_train.json", lambda records: records[:6], folder / "names.json"),
        "dialogs": take(emoji, "dialogs_train.json", few, folder / "dialogs.json"),
        "captions": take(emoji, "captions_train.json", lambda records: records[:2], folder / "captions.json"),
        "held-out": take(emoji, "validation.json", lambda records: records[:3], folder / "held_out.json"),
    }
    values = project_values(emoji, smollm2, vit_s, annotations=files)
    values["train"] |= {"gradient_accumulation_steps": 1, "eval_samples": 2, "score_samples": 2}
    write_yaml(folder / "config.yaml", values)
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(project) -> Path:
    """The folder of an uninterrupted run."""
    assert run_training(project, "output_dir=" + str(project.parent / "whole")) == 0
    return project.parent / "whole"


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def logged(run: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.endswith(("_per_s", "_mb"))}
        for row in rows(run / "metrics.jsonl")
    ]


def test_the_encoder_computes_what_transformers_does(emoji, vit_s):
    image = read_image(next((emoji / "images" / "noto").iterdir()))
    pixels = load_image_processor(vit_s, IMAGE_SIZE)([image])
    stock = Dinov2Model.from_pretrained(vit_s).eval()
    with torch.no_grad():
        expected = stock(pixels, output_hidden_states=True).hidden_states[-3][:, 1:]
        found = load_vision_tower(vit_s, feature_layer=-3, image_size=IMAGE_SIZE)(pixels)
    assert found.shape == (1, (IMAGE_SIZE // 14) ** 2, 384) and found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_language_model_computes_what_transformers_does(smollm2):
    """And it knows English: after its own chat prompt it names a capital."""
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2).eval(), AutoTokenizer.from_pretrained(smollm2)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(prompt).input_ids])
    ours = qwen.load_language_model(smollm2)
    with torch.no_grad():
        found = ours(input_ids=ids).logits
        torch.testing.assert_close(found, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-3)
        answer = tokenizer.decode(ours.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer


def test_check_accepts_the_parts_and_trains_nothing(project, capsys):
    assert run_training(project, "--check") == 0
    printed = capsys.readouterr().out
    assert "Checked: config, data and model fit together" in printed
    assert not (project.parent / "run" / "metrics.jsonl").exists()


def test_the_page_shows_the_drawings_and_both_languages(project, tmp_path):
    page = tmp_path / "show.html"
    assert show.main(["--config", str(project), "--output", str(page), "--count", "14"]) == 0
    text = page.read_text(encoding="utf-8")
    asked = json.loads((project.parent / "names.json").read_text())
    names = [turn["value"] for record in asked for turn in record["conversations"] if turn["from"] == "gpt"]
    shown = "".join(part.partition(">")[2] for part in text.split("<"))
    assert {record["id"][:2] for record in asked} == {"en", "zh"} and all(name in shown for name in names)
    assert text.count("<img") >= 14


def test_a_killed_run_ends_like_an_uninterrupted_one(project, whole):
    """Killed within step 5, two steps after a checkpoint."""
    killed = Start(project, at=[At("train.sum_gradients", 5)])
    assert killed.wait(SECONDS) == -9, killed.output()
    run = project.parent / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"] and len(logged(run)) >= 4
    assert run_training(project) == 0
    assert logged(run) == logged(whole)
    for name in ("projector.safetensors", "adapter_model.safetensors"):
        found, expected = load_file(run / "final" / name), load_file(whole / "final" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_a_checkpoint_answers_about_two_images(emoji, whole, tmp_path):
    for image in sorted((emoji / "images" / "noto").iterdir())[:2]:
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / "images")
    questions = ["What is this?", "这是什么？"]
    asked = [word for question in questions for word in ("--question", question)]
    words = ["--checkpoint", str(whole / "final"), "--images", str(tmp_path / "images"), "--output", str(tmp_path)]
    assert test.main([*words, *asked]) == 0
    found = rows(tmp_path / "answers.jsonl")
    assert [row["question"] for row in found] == questions * 2
    assert all(row["answer"].strip() and "<|" not in row["answer"] for row in found)


def test_names_of_drawings_in_an_unseen_style_are_learned(emoji, smollm2, vit_s, tmp_path):
    """English names in three styles for training, the fourth style for the scores. After one and a half epochs a fifth
    is right: far from what the recipe reaches, and far above none, which a model gets that does not look at the image."""

    def english(records: list[dict]) -> list[dict]:
        return [record for record in records if record["id"].startswith("en-")]

    def named(records: list[dict]) -> list[dict]:
        return [record for record in records if record["type"].endswith("name_en")]

    files = {
        "names": take(emoji, "names_train.json", english, tmp_path / "names.json"),
        "held-out": take(emoji, "validation.json", named, tmp_path / "held_out.json"),
    }
    values = project_values(emoji, smollm2, vit_s, annotations=files)
    values["lora"] = {"r": 32, "alpha": 64, "dropout": 0.0}
    values["train"] |= {
        "projector_start": "words",
        "projector_lr": 1e-3,
        "lora_lr": 1e-3,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_steps": 50,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_threads": 2,
        "eval_steps": None,
        "eval_samples": 16,
        "save_steps": None,
    }
    values["seed"] = 0
    values["test"] |= {"max_new_tokens": 10, "batch_size": 48}
    write_yaml(tmp_path / "config.yaml", values)
    threads = torch.get_num_threads()
    try:
        assert run_training(tmp_path / "config.yaml") == 0
    finally:
        torch.set_num_threads(threads)
    scores = json.loads((tmp_path / "run" / "final" / "scores.json").read_text())
    assert scores["n"] == 95  # all but the held-out concepts
    assert scores["accuracy"] >= 0.1 and scores["blind"] <= 0.03, scores
