"""A run whose folder is moved: it resumes, answers and is looked at from its new place. Its files name no place.

Run: sh tests/run.sh tests/training/test_moved_runs.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test
import training.log
from config import InputError, changed_keys, load_config, to_yaml
from dataset import show
from model.checkpoint_folder import write_folder
from model.loaded import load, open_config
from tests.toy_project import run_training, write_project
from training.provenance import saved_config, without_absolute_paths
from training.resume import find_checkpoint

SHORT = ("train.score_samples=1", "train.max_steps=4", "train.save_steps=2", "train.eval_steps=2", "lora.dropout=0.1")
FILES = ("projector.safetensors", "adapter_model.safetensors", "state.safetensors")


class Places:
    """A project trained to its end and then moved: `kept` is a copy from before, `clone` its new place."""

    def __init__(self, folder: Path):
        old = folder / "here" / "clone"
        run_training(write_project(old), *SHORT, "train.report_to=[tensorboard]", f"test.images={old / 'images'}")
        self.old, self.kept, self.clone = str(old), folder / "kept", folder / "there" / "renamed"
        shutil.copytree(old, self.kept)
        self.clone.parent.mkdir()
        shutil.move(old, self.clone)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.log, "draw_curves", lambda *_: None)
        yield Places(tmp_path_factory.mktemp("places"))


def with_config(checkpoint: Path, text: str) -> None:
    """Replace a checkpoint's config.yaml, as if it had been written with this text."""
    target = checkpoint.with_name("best")
    shutil.rmtree(target, ignore_errors=True)

    def write(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        (folder / "config.yaml").write_text(text)

    write_folder(target, write)
    shutil.rmtree(checkpoint)
    target.rename(checkpoint)


def test_no_file_of_a_run_holds_the_place_where_it_was_made(moved):
    files = [path for path in (moved.clone / "run").rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path.name for path in files if moved.old.encode() in path.read_bytes()] == []


def test_a_command_is_recorded_without_absolute_paths():
    words = [
        "/a/train.py",
        "--config=/a/b/c.yaml",
        "data.sources=[{images: /a/i, name: x}]",
        "http://a/b",
        "a/b",
        "x=/a/b",
    ]
    expected = ["../train.py", "--config=../b/c.yaml", "data.sources=[{images: ../i, name: x}]", "http://a/b", "a/b"]
    assert without_absolute_paths(words, Path("/a/run")) == [*expected, "x=../b"]


def test_a_moved_run_resumes_and_ends_with_equal_bits(moved, tmp_path):
    clone = tmp_path / "again"
    shutil.copytree(moved.clone, clone)
    run = clone / "run"
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(run / name)
    run_training(clone / "config.yaml", *SHORT)
    for name in FILES:
        one, two = load_file(moved.kept / "run/checkpoint-4" / name), load_file(run / "checkpoint-4" / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    assert json.loads((run / "run.json").read_text())[-1]["resumed_from"] == "checkpoint-2"


def test_a_checkpoint_of_an_earlier_version_with_absolute_paths_moves_too(moved, tmp_path):
    clone = tmp_path / "again"
    shutil.copytree(moved.clone, clone)
    text = to_yaml(saved_config(clone / "run/final")).replace(str(clone), moved.old)
    assert f"vision_tower: {moved.old}/tower" in text
    for name in ("checkpoint-4", "final"):
        with_config(clone / "run" / name, text)
    config = load_config(clone / "config.yaml", SHORT)
    assert find_checkpoint(config, "auto") == clone / "run/checkpoint-4"
    assert open_config(clone / "run/final").model == config.model
    shutil.copytree(moved.clone, moved.old)  # a copy instead: the old place exists, and its contents are compared
    try:
        config = load_config(clone / "config.yaml", [*SHORT, f"model.vision_tower={moved.kept / 'tower'}"])
        with pytest.raises(InputError) as caught:
            find_checkpoint(config, "auto")
        assert "vision_tower" not in str(caught.value) and "qa_file" not in str(caught.value)
    finally:
        shutil.rmtree(moved.old)


def test_a_moved_model_answers_and_its_data_is_shown(moved, tmp_path, capsys):
    final, output = moved.clone / "run/final", tmp_path / "answers"
    assert test.main(["--checkpoint", str(final), "--output", str(output), "--question", "What colour is it?"]) == 0
    row = json.loads((output / "answers.jsonl").read_text().splitlines()[0])
    assert row["image"].startswith(str(moved.clone))  # test.images moved too
    assert load(final).answer("What colour is it?", [row["image"]]) == row["answer"]
    assert show.main(["--config", str(moved.clone / "config.yaml"), "--output", str(tmp_path / "page.html")]) in (
        0,
        None,
    )


def test_the_folder_alone_finds_its_models_by_content_or_names_them(moved, tmp_path):
    final = tmp_path / "a" / "b" / "final"
    shutil.copytree(moved.clone / "run/final", final)
    digest = json.loads((final / "run.json").read_text())[-1]["vision_tower_sha256"]
    with pytest.raises(
        InputError, match=rf'trained on top of the model "tower" \(SHA-256 {digest}\).*model.vision_tower='
    ):
        load(final)
    given = load(final, vision_tower=moved.clone / "tower", language_model=moved.clone / "lm")
    image = moved.clone / "images/0.png"
    expected = load(moved.clone / "run/final").answer("What colour is it?", [image])
    assert given.answer("What colour is it?", [image]) == expected
    for name in ("tower", "lm"):
        shutil.copytree(moved.clone / name, tmp_path / "a" / name)
    assert load(final).answer("What colour is it?", [image]) == expected
    path = tmp_path / "a" / "tower" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"layer_norm_eps": 1e-3}))
    with pytest.raises(InputError, match="a/tower: has other weights or another config.json"):
        load(final)
    shutil.copytree(moved.clone / "tower", tmp_path / "tower")  # one with the recorded content is near
    assert load(final).answer("What colour is it?", [image]) == expected


def test_a_folder_that_was_moved_aside_keeps_its_paths(moved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(moved.clone / "run", run)
    (run / "previous-1").mkdir()
    (run / "best").rename(run / "previous-1" / "best")
    assert saved_config(run / "previous-1" / "best") == saved_config(run / "final")


def test_a_difference_is_one_line_a_key(moved):
    shutil.copyfile(moved.clone / "train.json", moved.clone / "train2.json")
    words = ["lora.r=8", "data.sources.0.annotations=" + str(moved.clone / "train2.json"), "train.max_steps=5"]
    with pytest.raises(InputError) as caught:
        run_training(moved.clone / "config.yaml", *SHORT, *words)
    lines = str(caught.value).splitlines()
    place = moved.clone
    assert lines[0] == f"{place}/run/checkpoint-4: belongs to a run of another config:"
    assert lines[1:-1] == [
        f"  data.sources.train.annotations: {place}/train.json -> {place}/train2.json",
        "  lora.r: 4 -> 8",
        "  train.max_steps: 4 -> 5",
    ]
    assert "Resume with that config" in lines[-1] and "--extend" not in lines[-1]


def test_a_path_counts_as_moved_only_if_the_old_one_is_gone(tmp_path):
    path = write_project(tmp_path / "clone")
    config, other = load_config(path), tmp_path / "other"
    assert list(changed_keys(config, load_config(path, [f"data.qa_file={other / 'qa.jsonl'}"]))) == []
    (tmp_path / "clone/qa.jsonl").write_text("")
    assert list(changed_keys(config, load_config(path, [f"data.qa_file={other / 'qa.jsonl'}"]))) == ["data.qa_file"]
    assert list(changed_keys(config, load_config(path, [f"data.validation_file={other / 'qa.jsonl'}"]))) == [
        "data.validation_file"
    ]
    assert list(changed_keys(config, load_config(path, [f"model.vision_tower={tmp_path / 'tower'}"]))) == [
        "model.vision_tower"
    ]
