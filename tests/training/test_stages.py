"""A run in stages: each starts from the one before and can be run alone, resumed and repeated.

Contradictions between stages are found before the first one trains. Run: python -m pytest tests/training/test_stages.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

import model.checkpoint
import test
import train as train_script
from config import InputError, load_config, to_yaml
from dataprocess import process_image
from dataset import show
from model.checkpoint_folder import verify_folder, weights_digest
from tests.runs.test_training import ROOT, assert_equal_files, rows, without_times
from tests.toy_project import run_training, write_staged_project, write_yaml
from training.step import Stepper

NAMES = ("text", "vision", "chat")
FILES = ("language_model.safetensors", "projector.safetensors")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_staged_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    """The folder of a run of all three stages."""
    run_training(project)
    return project.parent / "run"


@pytest.fixture
def again(project, whole, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def final(run: Path, name: str) -> Path:
    return run / "stages" / name / "final"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file}/{name}": tensor for file in FILES for name, tensor in load_file(folder / file).items()}


def changed(before: Path, after: Path) -> set[str]:
    one, other = weights(before), weights(after)
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


# --- a run in stages


def test_each_stage_starts_from_the_one_before_and_trains_its_own_parts(whole):
    text, vision, chat = (final(whole, name) for name in NAMES)
    moved = changed(text, vision)
    assert {name for name in weights(text) if "projector" in name} <= moved  # the text stage left it random
    last = changed(vision, chat)
    assert last and all("layers.1." in name or "model.norm" in name or "embed_tokens" in name for name in last)
    for name, before in (("vision", text), ("chat", vision)):
        (start,) = json.loads((whole / "stages" / name / "run.json").read_text())
        assert start["start_from_sha256"] == weights_digest(before)
        assert Path(load_config(final(whole, name) / "config.yaml").model.start_from) == before
    assert json.loads((text / "untrained.json").read_text()) == ["projector"]
    assert not (vision / "untrained.json").exists() and not (chat / "untrained.json").exists()


def test_every_stage_has_its_own_folder_data_and_rates(whole, project):
    for name, steps in zip(NAMES, (4, 4, 2), strict=True):
        found = [row for row in rows(whole / "stages" / name) if "loss" in row]
        assert [row["step"] for row in found] == list(range(1, steps + 1))
        assert ("projector_lr" in found[0]) == (name == "vision")
        assert (whole / "stages" / name / "curves.png").exists()
    assert (project.parent / "text.jsonl").exists() and (project.parent / "qa.jsonl").exists()
    text = json.loads((project.parent / "text.report.json").read_text())
    assert text["read"] == 30 and text["kept"] == 30


def test_the_run_has_the_final_of_its_last_stage_and_the_log_of_all(whole):
    verify_folder(whole / "final")
    assert_equal_files(whole / "final", final(whole, "chat"), FILES)
    assert (whole / "final" / "language_model.safetensors").stat().st_nlink == 2  # one file under two names
    logged = rows(whole)
    assert [row["stage"] for row in logged] == sorted((row["stage"] for row in logged), key=NAMES.index)
    for name in NAMES:
        mine = [{key: value for key, value in row.items() if key != "stage"} for row in logged if row["stage"] == name]
        assert mine == rows(whole / "stages" / name)
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in json.loads((whole / "final" / "scores.json").read_text())


def test_a_text_stage_has_a_loss_and_no_questions(whole):
    scores = json.loads((final(whole, "text") / "scores.json").read_text())
    assert scores["n"] == 0 and scores["accuracy"] is None and scores["loss"] > 0 and scores["perplexity"] > 1


def test_a_checkpoint_answers_without_the_learned_tokenizers_folder(project, whole, tmp_path):
    copied = tmp_path / "model"
    shutil.copytree(whole / "final", copied)
    tokenizer = project.parent / "tokenizer"
    tokenizer.rename(project.parent / "away")
    try:
        image = str(project.parent / "images" / "0.png")
        place = f"model.vision_tower={project.parent / 'tower'}"  # the copy alone does not know where it is
        words = ["--checkpoint", str(copied), "--images", image, "--question", "What colour is it?", place]
        assert test.main(words) == 0
    finally:
        (project.parent / "away").rename(tokenizer)
    (answer,) = [json.loads(line) for line in (tmp_path / "answers" / "answers.jsonl").read_text().splitlines()]
    assert answer["question"] == "What colour is it?"


def test_scoring_a_file_reports_loss_balance_loss_perplexity_and_accuracy(project, whole, tmp_path, capsys):
    qa = project.parent / "validation.jsonl"
    assert test.main(["--checkpoint", str(whole / "final"), "--qa", str(qa), "--output", str(tmp_path)]) == 0
    scores, printed = json.loads((tmp_path / "scores.json").read_text()), capsys.readouterr().out
    assert {"accuracy", "blind", "loss", "perplexity", "token_accuracy", "balance_loss"} <= scores.keys()
    for name in ("loss", "perplexity", "token_accuracy", "balance_loss"):
        assert f"{name} {scores[name]:.4f}" in printed
    in_the_run = json.loads((whole / "final" / "scores.json").read_text())
    assert scores["loss"] == pytest.approx(in_the_run["loss"], rel=1e-5)
    # texts hold no questions, but have a loss
    texts = project.parent / "text_held.jsonl"
    assert test.main(["--checkpoint", str(whole / "final"), "--qa", str(texts), "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 0


# --- alone, resumed, repeated


def test_a_finished_run_is_skipped_and_changes_nothing(project, again, capsys):
    def state() -> dict:
        return {p: p.stat().st_mtime_ns for p in again.rglob("*") if p.is_file() and p.name != ".lock"}

    before = state()
    run_training(project, f"output_dir={again}")
    assert state() == before and capsys.readouterr().out.count("This run is finished") == 3


@pytest.mark.parametrize("stopped_in", [0, 1])
@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_run_resumes_in_its_stage_and_ends_equal(
    project, whole, tmp_path, monkeypatch, stopped_in, step
):
    """Interrupted inside of a step of the first or the second stage: bit for bit as without."""
    taken, forward_and_backward = [], Stepper.forward_and_backward

    def interrupted(self, number, micro_batches):
        taken.append(number)
        if taken == [*range(4)] * stopped_in + [*range(step + 1)]:
            raise KeyboardInterrupt
        return forward_and_backward(self, number, micro_batches)

    monkeypatch.setattr(Stepper, "forward_and_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(project, f"output_dir={tmp_path}")
    assert not (tmp_path / "final").exists()
    monkeypatch.setattr(Stepper, "forward_and_backward", forward_and_backward)
    run_training(project, f"output_dir={tmp_path}")
    for name in NAMES:
        assert_equal_files(final(tmp_path, name), final(whole, name), FILES)
        logged = (rows(run / "stages" / name) for run in (tmp_path, whole))
        assert without_times(next(logged)) == without_times(next(logged))


def test_results_that_an_interrupt_left_unwritten_are_written_by_the_next_start(project, whole, tmp_path, monkeypatch):
    """After the last stage: nothing is trained again."""
    shutil.copytree(whole / "stages", tmp_path / "stages")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("training.stages.draw_curves", interrupted)
        run_training(project, f"output_dir={tmp_path}")
    monkeypatch.setattr(Stepper, "forward_and_backward", interrupted)
    run_training(project, f"output_dir={tmp_path}")
    assert_equal_files(tmp_path / "final", whole / "final", FILES)
    assert (tmp_path / "curves.png").exists()


def test_stages_one_by_one_equal_all_at_once(project, whole, tmp_path):
    for name in NAMES:
        run_training(project, f"output_dir={tmp_path}", "--stage", name)
        assert (tmp_path / "final").exists() == (name == "chat")
    for name in NAMES:
        assert_equal_files(final(tmp_path, name), final(whole, name), FILES)


def test_a_stage_without_the_one_before_is_refused(project, tmp_path):
    with pytest.raises(InputError, match='stage "chat" starts from stage "vision", which has not ended'):
        run_training(project, f"output_dir={tmp_path}", "--stage", "chat")
    with pytest.raises(InputError, match='no such stage; there are text, vision, chat; did you mean "vision"'):
        run_training(project, f"output_dir={tmp_path}", "--stage", "vison")
    with pytest.raises(InputError, match="with --stage NAME"):
        run_training(project, f"output_dir={tmp_path}", "--resume", str(tmp_path))


def test_a_stage_may_be_repeated_and_later_stages_are_then_stale(project, whole, again):
    run_training(project, f"output_dir={again}", "--stage", "vision", "--resume", "none")
    assert (again / "stages" / "vision" / "previous-1" / "final").exists()
    assert_equal_files(final(again, "vision"), final(whole, "vision"), FILES)
    run_training(project, f"output_dir={again}")  # the repeated stage gave the same weights: nothing is stale

    other = "train.stages.vision.train.projector_lr=5e-3"
    run_training(project, f"output_dir={again}", other, "--stage", "vision", "--resume", "none")
    with pytest.raises(InputError, match='stage "chat" was trained on top of another "vision"'):
        run_training(project, f"output_dir={again}", other)
    run_training(project, f"output_dir={again}", other, "--stage", "chat", "--resume", "none")
    assert_equal_files(again / "final", final(again, "chat"), FILES)
    assert changed(again / "final", whole / "final")


def test_starting_all_stages_over_moves_the_old_run_aside(project, whole, again):
    run_training(project, f"output_dir={again}", "--resume", "none")
    assert_equal_files(again / "final", whole / "final", FILES)
    assert (again / "previous-1" / "final").exists() and (again / "stages" / "text" / "previous-1" / "final").exists()


def test_starting_all_stages_over_moves_nothing_if_data_are_wrong(project, again):
    """The first stage's data are checked before the old run moves, too."""
    gone = ["train.stages.text.data.sources.0.annotations=gone.json"]
    gone += [f"train.stages.text.data.{key}_file={again / key}.jsonl" for key in ("qa", "validation")]
    before = {path for path in again.rglob("*")}
    with pytest.raises(InputError, match='stage "text": .*gone.json'):
        run_training(project, f"output_dir={again}", "--resume", "none", *gone)
    assert {path for path in again.rglob("*")} == before


def test_stages_that_were_started_over_resume_where_they_were_interrupted(project, again, monkeypatch):
    """Nothing of the old run is found, in the later stages either."""
    words = [f"output_dir={again}", "train.language_model_lr=2e-3"]
    forward_and_backward = Stepper.forward_and_backward

    def interrupted(self, number, micro_batches):
        if number == 2:
            raise KeyboardInterrupt
        return forward_and_backward(self, number, micro_batches)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Stepper, "forward_and_backward", interrupted)
        run_training(project, *words, "--resume", "none")
    assert not final(again, "chat").exists()
    run_training(project, *words)
    assert (final(again, "chat") / "scores.json").exists()


def test_a_finished_stage_needs_neither_its_data_nor_its_checkpoints(tmp_path):
    project = write_staged_project(tmp_path)
    run = tmp_path / "run"
    run_training(project, "--stage", "text")
    for folder in (run / "stages" / "text").glob("checkpoint-*"):
        shutil.rmtree(folder)
    values = yaml.safe_load(project.read_text())
    (tmp_path / values["train"]["stages"][0]["data"]["sources"][0]["annotations"]).unlink()
    run_training(project)
    assert (run / "final" / "scores.json").exists()


def test_data_of_later_stages_are_checked_before_an_earlier_one_trains(project, tmp_path, monkeypatch):
    """With a tokenizer that exists: a file is missing, or has a record that cannot be used. --check names all faults at
    once."""
    run_training(project, f"output_dir={tmp_path / 'run'}", "--check")
    monkeypatch.setattr(Stepper, "forward_and_backward", lambda *_: pytest.fail("trained"))
    gone = [f"train.stages.chat.data.{key}_file={tmp_path / key}.jsonl" for key in ("qa", "validation")]
    gone += ["train.stages.chat.data.sources.0.annotations=gone.json"]
    with pytest.raises(InputError, match='stage "chat": .*gone.json'):
        run_training(project, f"output_dir={tmp_path / 'run'}", *gone)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "conversations": []}\n')
    no_record = [f"train.stages.vision.data.qa_file={bad}", "train.stages.vision.data.sources=[]"]
    with pytest.raises(InputError, match='(?s)stage "vision": .*bad.jsonl'):
        run_training(project, f"output_dir={tmp_path / 'run'}", *no_record, *gone[:2])
    with pytest.raises(InputError, match='(?s)stage "vision": .*bad.jsonl.*stage "chat": .*gone.json'):
        run_training(project, f"output_dir={tmp_path / 'run'}", *no_record, *gone, "--check")


def test_a_stage_of_another_config_is_not_resumed(project, again):
    with pytest.raises(InputError, match="train.language_model_lr: 0.001 -> 0.002"):
        run_training(project, f"output_dir={again}", "train.stages.text.train.language_model_lr=2e-3")


def test_check_checks_all_stages_and_trains_nothing(project, tmp_path, capsys):
    run_training(project, f"output_dir={tmp_path / 'run'}", "--check")
    printed = capsys.readouterr().out
    assert printed.count("Checked: config, data and model fit together") == 3
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_trackers_get_a_curve_for_each_stage(project, tmp_path, monkeypatch):
    """TensorBoard in each stage's folder; wandb (offline) has one run for each stage, in one group."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    started = []
    init = Accelerator.init_trackers

    def watched(self, name, values, kwargs):
        started.append(kwargs["wandb"])
        return init(self, name, values, kwargs)

    monkeypatch.setattr(Accelerator, "init_trackers", watched)
    words = ["train.max_steps=1", "train.eval_steps=null", "train.report_to=[tensorboard, wandb]"]
    run_training(project, f"output_dir={tmp_path / 'first'}", *words)
    assert [(one["name"], one["group"]) for one in started] == [(f"first-{name}", "first") for name in NAMES]
    for name in NAMES:
        folder = tmp_path / "first" / "stages" / name
        assert list((folder / "tensorboard").rglob("events.*")) and list((folder / "wandb").glob("offline-run-*"))


def test_two_processes_train_the_same_stages(project, whole, tmp_path):
    """With torchrun. The balance loss depends on how a step is cut into micro-batches, so it is off here."""
    common = ["train.router_aux_loss_coef=0", "train.num_threads=1", "train.packing=off", "train.max_steps=2"]
    run_training(project, f"output_dir={tmp_path / 'one'}", *common)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29637"]
    subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(project), f"output_dir={tmp_path / 'two'}", *common],
        check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for name in NAMES:
        one, two = (weights(final(tmp_path / run, name)) for run in ("one", "two"))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)


def test_show_shows_the_chosen_stage(project, whole, tmp_path):
    for name, words in (
        ("text", ["texts:", "no image", "&lt;|endoftext|&gt;"]),
        ("vision", ["data:image/png", "r0"]),
    ):
        page = tmp_path / f"{name}.html"
        show.main(["--config", str(project), "--stage", name, "--output", str(page)])
        assert [word for word in ("qwen2_moe from scratch; tokenizer", *words) if word not in page.read_text()] == []
    with pytest.raises(InputError, match="no such stage"):
        show.main(["--config", str(project), "--stage", "sight", "--output", str(tmp_path / "x.html")])


def test_the_preparing_script_prepares_every_stage(tmp_path, monkeypatch, capsys):
    path = write_staged_project(tmp_path)
    monkeypatch.setattr(sys, "argv", ["process_image", "--config", str(path)])
    process_image.main()
    assert (tmp_path / "text.jsonl").exists() and (tmp_path / "qa.jsonl").exists()
    assert capsys.readouterr().out.count("source") == 3


# --- the config


def test_a_stages_values_replace_those_of_the_file(project):
    config = load_config(project)
    stages = {stage.name: stage.config for stage in config.train.stages}
    assert tuple(stages) == NAMES
    assert stages["text"].train.projector_lr is None and stages["vision"].train.projector_lr == 2e-3
    assert stages["chat"].train.projector_lr is None  # set for all stages, but this one does not train the projector
    assert [stage.train.max_steps for stage in stages.values()] == [4, 4, 2]
    assert all(stage.train.router_aux_loss_coef == 0.01 and not stage.train.stages for stage in stages.values())
    assert stages["text"].output_dir == project.parent / "run" / "stages" / "text"
    assert config.output_dir == project.parent / "run" and config.data == stages["chat"].data
    assert len({stage.model for stage in stages.values()}) == 1


def test_the_command_line_overrides_all_stages_or_one(project):
    def steps(*overrides) -> list:
        return [stage.config.train.max_steps for stage in load_config(project, overrides).train.stages]

    assert steps("train.max_steps=9") == [9, 9, 9]
    assert steps("train.stages.vision.train.max_steps=9") == [4, 9, 2]
    assert steps("train.stages.2.train.max_steps=9") == [4, 4, 9]
    with pytest.raises(InputError, match='"sight" is not a position .* nor one of the names "text", "vision", "chat"'):
        steps("train.stages.sight.train.max_steps=9")


def test_a_rate_for_all_stages_applies_to_those_that_train_its_part(project):
    def rates(*overrides) -> list:
        return [stage.config.train.projector_lr for stage in load_config(project, overrides).train.stages]

    assert rates("train.projector_lr=7e-3") == [None, 7e-3, None]  # replaces the stage's own
    with pytest.raises(InputError, match='"train.lora_lr" is set, but no stage uses it'):
        rates("train.lora_lr=1e-4")
    with pytest.raises(InputError, match='"train.projector_lr" is 0.001, but train.trainable.projector is frozen'):
        rates("train.stages.text.train.projector_lr=1e-3")


def test_a_config_with_stages_is_equal_after_writing_and_reading(project, tmp_path):
    config = load_config(project)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "../x"}, ["train.stages.0.name", "letters"]),
        ({"name": None}, ["train.stages.0.name", "nothing"]),
        ({"name": "Vision"}, ["train.stages.1.name", "two stages"]),
        ({"model": {"attention": "causal"}}, ["train.stages.0.model", "the same", "for all stages"]),
        ({"dat": {}}, ['did you mean "data"']),
        ({"data": []}, ["train.stages.0.data", "keys and values"]),
        ({"train": {"precision": "bf16"}}, ["train.stages.0.train.precision", "the same for all stages"]),
        ({"train": {"max_stps": 3}}, ['stage "text"', '"train.max_stps"', 'did you mean "train.max_steps"']),
        ({"train": {"freeze_random": ["projector"], "trainable": {"projector": "frozen"}, "projector_lr": 1e-3}},
         ['stage "text"', "projector_lr", "nothing would use it"]),
        ({"train": {"trainable": {"projector": "frozen"}}}, ['stage "text"', "projector would be random", "freeze_random"]),
        ({"train": {"trainable": {"language_model": "top:1"}}}, ['stage "text"', "language model would be random"]),
        ({"train": {"trainable": {"embeddings": "frozen"}}}, ['stage "text"', "embeddings would be random"]),
        ({"data": {"qa_file": "qa.jsonl", "validation_file": "validation.jsonl"}}, ['stage "vision"', "its own file"]),
        ({"data": {"qa_file": "validation.jsonl"}, "train": {"eval_steps": None}},
         ['stage "vision"', '"data.validation_file"', 'which stage "text" uses as its "data.qa_file"']),
        ({"train": {"freeze_random": ["language_model"]}}, ['stage "text"', "names language_model, which trains"]),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_stages_are_found_before_anything_is_opened(project, tmp_path, change, words):
    values = yaml.safe_load(project.read_text())
    stage = values["train"]["stages"][0]
    for key, value in change.items():
        stage[key] = stage[key] | value if key == "data" and isinstance(value, dict) and "data" in stage else value
    path = project.parent / "changed.yaml"
    write_yaml(path, values)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_every_stage_after_one_with_lora_must_train_lora(project):
    lora = ["train.stages.vision.train.trainable={language_model: lora}", "train.stages.vision.train.lora_lr=1e-3"]
    with pytest.raises(InputError, match='stage "chat" .*: stage "vision" before it trains LoRA'):
        load_config(project, lora)
    both = [*lora, "train.stages.chat.train.trainable={language_model: lora}", "train.stages.chat.train.lora_lr=1e-4"]
    assert load_config(project, both).lora == load_config(project).lora


def test_a_stage_name_without_stages_is_refused(project, tmp_path):
    values = yaml.safe_load(project.read_text())
    stage = values["train"].pop("stages")[1]
    values["data"] |= stage["data"]
    path = project.parent / "plain.yaml"
    write_yaml(path, values)
    with pytest.raises(InputError, match="the config has no stages"):
        train_script.main(["--config", str(path), "--stage", "text"])


# --- weights that are still random


@pytest.mark.parametrize("part", ["language_model", "embeddings", "projector"])
def test_a_checkpoint_records_which_parts_are_still_random(project, whole, tmp_path, part):
    """A run that froze a random part on purpose lists it in its folder. A run that starts from it and freezes the same part
    without train.freeze_random is refused."""
    words = {"projector": "full", "language_model": "full", "embeddings": "full"} | {part: "frozen"}
    rates = {"projector": "projector_lr", "language_model": "language_model_lr", "embeddings": "embeddings_lr"}
    values = yaml.safe_load(project.read_text())
    stage = values["train"].pop("stages")[1]
    values["data"] |= stage["data"]
    values["train"] |= {"trainable": words, rates[part]: None, "max_steps": 1, "eval_steps": None}
    path = project.parent / f"frozen_{part}.yaml"
    write_yaml(path, values)
    with pytest.raises(InputError, match=f"add {part} to train.freeze_random"):
        load_config(path)
    run_training(path, f"output_dir={tmp_path / 'asked'}", f"train.freeze_random=[{part}]")
    found = tmp_path / "asked" / "final"
    assert json.loads((found / "untrained.json").read_text()) == [part]
    with pytest.raises(InputError, match=f"add {part} to train.freeze_random"):
        run_training(path, f"output_dir={tmp_path / 'unasked'}", f"model.start_from={found}")
    trained = [f"train.trainable.{part}=full", f"train.{rates[part]}=1e-3"]
    run_training(path, f"output_dir={tmp_path / 'trained'}", f"model.start_from={found}", *trained)
    assert not (tmp_path / "trained" / "final" / "untrained.json").exists()
    run_training(path, f"output_dir={tmp_path / 'later'}", f"model.start_from={tmp_path / 'trained' / 'final'}")


def test_a_malformed_list_of_untrained_parts_is_refused(again):
    for text in ('["legs"]', "3", "{"):
        (again / "final" / "untrained.json").write_text(text)
        with pytest.raises(InputError, match="untrained.json"):
            model.checkpoint._read_untrained(again / "final")
