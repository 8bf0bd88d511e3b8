"""Mistakes that need no data to be seen: each ends at once, names what was meant, and prepares no data.

Run: sh tests/run.sh tests/runs/test_cheap_mistakes.py
"""

from __future__ import annotations

import re

import pytest

import training.open
import training.prepare
import training.stages
from config import InputError
from tests.toy_project import run_training, write_project, write_staged_project

# words of the command line, where {} is the project's folder -> a part of the message
MISTAKES = {
    "model.projector=mpl": 'model.projector: "mpl" is unknown; did you mean "mlp"?',
    "model.vision_tower={}/towr": '"model.vision_tower": {}/towr does not exist; did you mean "{}/tower"?',
    "model.vision_tower=./zzzzzz": '"model.vision_tower": {}/zzzzzz does not exist.',
    "model.language_model={}/lmm": '"model.language_model": {}/lmm does not exist; did you mean "{}/lm"?',
    "model.start_from={}/tow": '"model.start_from": {}/tow does not exist; did you mean "{}/tower"?',
    "lora.target_modules=[q_prj]": 'lora.target_modules: "q_prj" is unknown; did you mean "q_proj"?',
    "--resume latest": '--resume latest: {}/latest does not exist; did you mean "auto"?',
    "--resume run/checkpoint-7": 'does not exist; did you mean "{}/run/checkpoint-70"?',
    "--lora_rate=1e-4": '"--lora_rate=1e-4": no such option; did you mean "train.lora_lr=1e-4"?',
    "--lora-lr 1e-4": '"--lora-lr": no such option; did you mean "train.lora_lr=VALUE"?',
    "my.yaml": '"my.yaml": a config file needs its option; did you mean --config my.yaml?',
    "train.lora_rate=1e-4": '"train.lora_rate" is not a key of the config; did you mean "train.lora_lr"?',
    "output_dir={}/config.yaml/run --check": "{}/config.yaml is not a folder; give another output_dir",
    "output_dir=closed/run --check": "{}/closed/run: this user may not write into {}/closed; give another output_dir",
    "model.projector=mpl model.vision_tower={}/towr": 'towr does not exist; did you mean "{}/tower"?\nmodel.projector',
}


@pytest.fixture
def prepared(monkeypatch):
    """The calls of data preparation, which does nothing."""
    calls: list[object] = []
    for module in (training.open, training.prepare):
        monkeypatch.setattr(module, "prepare_data", lambda *_, **__: calls.append(1))
    monkeypatch.setattr(training.stages, "learn_if_missing", lambda *_: calls.append(1))
    return calls


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    path = write_project(tmp_path_factory.mktemp("project"))
    (path.parent / "run/checkpoint-70").mkdir(parents=True)
    (path.parent / "run/checkpoint-70/manifest.json").write_text("{")
    (path.parent / "closed").mkdir()
    return path


@pytest.mark.parametrize("words", MISTAKES)
@pytest.mark.parametrize("check", [False, True], ids=["run", "check"])
def test_a_cheap_mistake_is_found_before_data_is_prepared(project, prepared, monkeypatch, words, check):
    folder, access = str(project.parent), training.run_folder.os.access
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        training.run_folder.os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode)
    )
    arguments = [*words.replace("{}", folder).split(), *(["--check"] if check and "--check" not in words else [])]
    with pytest.raises(InputError, match=re.escape(MISTAKES[words].replace("{}", folder))):
        run_training(project, *arguments)
    assert prepared == []


def test_a_mistake_in_a_later_stage_is_found_first(tmp_path, prepared):
    path = write_staged_project(tmp_path)
    with pytest.raises(
        InputError, match='^stage "text": model.projector: "resampled" is unknown; did you mean "resampler"'
    ):
        run_training(path, "model.projector=resampled")
    assert prepared == []


def test_a_run_that_resumes_needs_no_checkpoint_to_start_from(project, monkeypatch):
    def prepare_data(*_, **__):
        raise InputError("far enough")

    monkeypatch.setattr(training.open, "prepare_data", prepare_data)
    monkeypatch.setattr(training.open, "find_checkpoint", lambda *_: project.parent / "run/checkpoint-70")
    with pytest.raises(InputError, match="far enough"):
        run_training(project, "model.start_from=gone", "--check")
