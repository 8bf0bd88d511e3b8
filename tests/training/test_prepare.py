"""The data of a run are prepared and checked together: preparation resolves its own leaks, and what cannot train is said.

Run: sh tests/run.sh tests/training/test_prepare.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from config import Config, load_config
from dataset.checks.findings import Findings
from dataset.checks.records import ENOUGH_HELD_OUT
from tests.toy_project import config_values, run_training, write_project
from training.prepare import check_data, prepare_data
from training.run import few_steps_note, open_processors


class Desk:
    """A folder with images, one source with split: auto, and a config that needs no model."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []

    def image(self, name: str, colour: tuple[int, int, int]) -> str:
        path = self.folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), colour).save(path, "PNG")
        return name

    def add(self, *images: str) -> None:
        turns = [{"from": "human", "value": "<image>\n" * len(images) + "What?"}, {"from": "gpt", "value": "This."}]
        self.rows.append({"id": str(len(self.rows)), "image": list(images), "conversations": turns})

    def config(self, *overrides: str, **data) -> Config:
        (self.folder / "raw.json").write_text(json.dumps(self.rows))
        values = config_values()
        source = {"name": "x", "annotations": "raw.json", "images": "images", "format": "llava"}
        values["data"] |= {"sources": [source], "validation_fraction": 0.3, "max_refused": 0.5} | data
        (self.folder / "config.yaml").write_text(yaml.safe_dump(values))
        return load_config(self.folder / "config.yaml", overrides)

    def check(self, config: Config, resumes: bool = False) -> Findings:
        """Prepare and check as a start of training does."""
        findings = Findings(config.output_dir / "findings.jsonl")
        prepare_data(config, resumes=resumes, check=False)
        check_data(config, None, findings, resumes=resumes)
        return findings

    def read(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def images_of(self, name: str) -> set[bytes]:
        """The contents of the images in a QA file."""
        paths = [one["image"] if isinstance(one["image"], list) else [one["image"]] for one in self.read(name)]
        return {(self.folder / path).read_bytes() for some in paths for path in some}


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.parametrize("verified", [True, False])
def test_copies_under_other_names_never_stop_a_run_whose_data_were_prepared_here(desk, capsys, verified):
    for k in range(30):  # COCO's names decide the side of their images even if the content is known
        desk.add(desk.image(f"{k:012}.jpg", (k, 9, 9)))
        desk.add(desk.image(f"copy-{k}.png", (k, 9, 9)))
    for k in range(30, 40):  # if the first image of a pair is held out as a copy, the second one is held out too
        desk.add(f"copy-{k - 30}.png", desk.image(f"second-{k}.png", (k, 9, 9)))
        desk.add(desk.image(f"third-{k}.png", (k, 9, 9)))
    config = desk.config(verify_images=verified)
    assert not desk.check(config)
    assert not desk.images_of("qa.jsonl") & desk.images_of("validation.jsonl")
    report = json.loads((desk.folder / "qa.report.json").read_text())
    assert report["copies"]["images"] > 5 and report["copies"]["moved"] > 5
    assert report["read"] == report["kept"] + report["refused"] and report["by_reason"].keys() <= {
        "images_on_both_sides"
    }
    printed = capsys.readouterr().out
    assert f"copies, byte for byte, of held-out images: {report['copies']['images']}; records moved" in printed
    before = (desk.folder / "qa.jsonl").stat().st_mtime_ns, (desk.folder / "qa.report.json").read_bytes()
    assert not desk.check(config)
    again = (desk.folder / "qa.jsonl").stat().st_mtime_ns, (desk.folder / "qa.report.json").read_bytes()
    assert again == before  # a later start with the same data does no work


def test_a_copy_in_a_training_source_is_refused_and_a_run_that_has_begun_keeps_its_records(desk):
    for k in range(9):
        desk.add(desk.image(f"{k}.png", (k, 9, 9)))
    (desk.folder / "exam.json").write_text(json.dumps(desk.rows[:1]))
    desk.image("exam.png", (1, 9, 9))
    exam = [{**desk.rows[0], "image": "exam.png"}]
    (desk.folder / "exam.json").write_text(json.dumps(exam))
    sources = [
        {"name": name, "annotations": f"{name}.json", "images": "images", "format": "llava", "split": split}
        for name, split in (("raw", "train"), ("exam", "validation"))
    ]
    config = desk.config(sources=sources, verify_images=False)
    prepare_data(config, resumes=False, check=False)
    before = (desk.folder / "qa.jsonl").read_bytes()
    assert "leaked_image" in [reason for _, reason in desk.check(config, resumes=True).rows.counts]
    assert (desk.folder / "qa.jsonl").read_bytes() == before
    assert not desk.check(config)
    (row,) = desk.read("qa.refused.jsonl")
    assert (row["id"], row["reason"]) == ("1", "image_held_out") and "under another name" in row["detail"]
    assert len(desk.read("qa.jsonl")) == 8
    (fault,) = desk.check(desk.config(sources=sources, verify_images=False, max_refused=0.0)).faults or [""]
    assert "image_held_out 1" in fault  # one message, and no other process waits in vain


# --- what cannot train, or is not what was meant, is said before the first step


FROZEN = ("train.trainable.projector=frozen", "train.projector_lr=null", "train.freeze_random=[projector]")


def test_a_part_that_sees_no_image_is_named_with_what_to_change(desk, capsys):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    desk.rows = [{"id": str(k), "conversations": turns} for k in range(40)]
    image = desk.image("1.png", (1, 2, 3))
    config = desk.config()
    (fault,) = desk.check(config).faults
    assert "qa.jsonl: no record that is trained on has a usable image, so projector would train on nothing" in fault
    assert "set train.trainable.projector to frozen" in fault and "freeze_random: [projector]" in fault
    assert not desk.check(config, resumes=True)  # a run of an earlier version resumes
    assert "note: " + fault in capsys.readouterr().out
    assert not desk.check(desk.config(*FROZEN))
    tower = ("train.trainable.vision_tower=full", "train.vision_tower_lr=1e-5")
    assert "so vision tower and projector would" in desk.check(desk.config(*tower)).faults[0]
    with_image = {"annotations": "with.json", "images": "images", "format": "llava", "split": "train"}
    (desk.folder / "with.json").write_text(json.dumps([{"id": "1", "image": image, "conversations": turns}]))
    more = [{"name": "with", **with_image}, {"name": "x", "annotations": "raw.json", "format": "llava"}]
    assert not desk.check(desk.config(sources=more, validation_fraction=0.4))
    capsys.readouterr()
    more[0]["weight"] = 0  # the only image is not trained on
    assert "would train on nothing" in desk.check(desk.config(sources=more, validation_fraction=0.4)).faults[0]
    assert 'source "with" has weight 0 in data.sources, so its 1 records are not trained on' in capsys.readouterr().out


@pytest.mark.parametrize(
    "split, word", [("auto", "data.validation_fraction (0.001); raise it"), ("train", "set it to auto")]
)
def test_an_empty_validation_half_is_named_with_what_to_change(desk, split, word):
    desk.add(desk.image("1.png", (1, 2, 3)))
    source = {"name": "x", "annotations": "raw.json", "images": "images", "format": "llava", "split": split}
    (fault,) = desk.check(desk.config(sources=[source], validation_fraction=0.001)).faults
    assert fault.startswith(f"{desk.folder / 'validation.jsonl'}: contains no records") and word in fault
    assert "train.eval_steps to null" in fault


def test_a_learning_rate_of_zero_and_a_length_beyond_the_model_are_named(desk, capsys):
    desk.rows = []
    for k in range(20):
        desk.add(desk.image(f"{k}.png", (k, 2, 3)))
    (desk.folder / "lm").mkdir()
    (desk.folder / "lm" / "config.json").write_text('{"model_type": "qwen2", "max_position_embeddings": 100}')
    assert not desk.check(desk.config("train.projector_lr=0", "train.lora_lr=0.0", "data.max_length=100"))
    printed = capsys.readouterr().out
    assert "note: train.projector_lr is 0" in printed and "set train.trainable.projector to frozen" in printed
    assert "note: train.lora_lr is 0" in printed and "positions" not in printed
    assert not desk.check(desk.config("data.max_length=101"))
    printed = capsys.readouterr().out
    assert "is 0" not in printed and "note: data.max_length is 101, but the language model was made for 100" in printed


def test_held_out_questions_beyond_the_positions_of_the_model_are_counted(tmp_path, capsys):
    path = write_project(tmp_path)
    config_file = tmp_path / "lm" / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"max_position_embeddings": 100}))
    rows = json.loads((tmp_path / "validation.json").read_text())
    rows[0]["conversations"][2]["value"] = "Say it. " * 60
    (tmp_path / "validation.json").write_text(json.dumps(rows))
    config = load_config(path)
    findings = Findings(tmp_path / "findings.jsonl")
    prepare_data(config, resumes=False, check=False)
    check_data(config, open_processors(config), findings)
    assert not findings
    printed = capsys.readouterr().out
    assert "note: validation.jsonl: 1 of 6 questions do not fit into the 100 positions" in printed
    assert "lower test.max_new_tokens" in printed


def test_a_held_out_file_of_a_few_images_is_noted_once(desk, capsys):
    def notes(split_of_images: int, **data) -> list[str]:
        sides = {"train": desk.rows[:-split_of_images], "validation": desk.rows[-split_of_images:]}
        for side, rows in sides.items():
            (desk.folder / f"{side}.json").write_text(json.dumps(rows))
        sources = [
            {"name": side, "annotations": f"{side}.json", "images": "images", "format": "llava", "split": side}
            for side in sides
        ]
        assert not desk.check(desk.config(sources=sources, **data))
        return [line for line in capsys.readouterr().out.splitlines() if "holds only" in line]

    for k in range(30):
        desk.add(desk.image(f"{k}.png", (k, 2, 3)))
    desk.rows[-2]["image"] = desk.rows[-1]["image"]  # two questions about one image
    (note,) = notes(2)
    assert note.startswith("note: validation.jsonl: holds only 1 image, so scores on it say little")
    assert "raise data.validation_fraction" in note
    assert not notes(ENOUGH_HELD_OUT + 1) and len(notes(ENOUGH_HELD_OUT)) == 1
    for k in range(ENOUGH_HELD_OUT):  # texts that are scored too
        turns = [{"from": "human", "value": f"Say {k}."}, {"from": "gpt", "value": str(k)}]
        desk.rows.append({"id": f"text {k}", "conversations": turns})
    assert not notes(ENOUGH_HELD_OUT + 1)
    (note,) = notes(3)
    assert "holds only 3 texts, so" in note


def test_a_run_of_a_dozen_steps_is_noted_with_what_makes_more(tmp_path, capsys):
    path = write_project(tmp_path)
    epochs = ("train.max_steps=null", "train.num_train_epochs=2")
    run_training(path, *epochs, "--check")
    noted = "note: the run has {} optimizer steps in all, too few to learn much: raise {}"
    advice = (
        "train.num_train_epochs (2){}, take fewer than 4 samples a step (train.per_device_train_batch_size x "
        "train.gradient_accumulation_steps), or give more data."
    )
    printed = capsys.readouterr().out
    assert (
        printed.count(noted.format(5, advice.format(""))) == printed.count("too few to learn") == 1
    )  # 9 records, 4 a step

    def note(steps: int, *overrides: str) -> str:
        return few_steps_note(load_config(path, overrides).train, steps)

    limited = note(2, *epochs, "train.steps_per_epoch=1")
    assert limited == noted.format(2, advice.format(" or train.steps_per_epoch (1)"))
    single = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1")
    assert note(18, *epochs, *single) == noted.format(18, "train.num_train_epochs (2), or give more data.")
    assert note(19, "train.max_steps=19") == noted.format(19, "train.max_steps.")
    assert note(20, "train.max_steps=20") == "" and "has 1 optimizer step in" in note(1)
