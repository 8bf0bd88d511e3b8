"""train.py: exact resume, exact accumulation, the files of a run. `sh tests/run.sh tests/runs/test_training.py`"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing import event_accumulator

import train
import training.held_out
import training.open
from config import InputError
from tests.toy_project import run_training, write_project

ROOT = Path(__file__).parents[2]
QUICK = ("train.eval_steps=null", "train.score_samples=1")
WEIGHTS = ("projector.safetensors", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    """The folder of a run of six steps with evaluations, scores and every checkpoint."""
    run_training(project, "train.save_total_limit=null")
    return project.parent / "run"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(found: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith(("_per_s", "_mb"))} for row in found]


def assert_equal_files(a: Path, b: Path, names) -> None:
    for name in names:
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name


def test_accumulation_set_in_the_environment_changes_nothing(whole, project, tmp_path, monkeypatch):
    """accelerate reads this variable and would divide the gradients by it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run_training(project, *QUICK, f"output_dir={tmp_path / 'run'}")
    assert_equal_files(tmp_path / "run" / "final", whole / "final", WEIGHTS)


def test_run_folder_holds_the_promised_files(whole):
    logged = rows(whole)
    steps = [row for row in logged if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    expected = {
        "step", "epoch", "loss", "grad_norm", "projector_lr", "lora_lr", "targets", "samples_per_s", "tokens_per_s",
        "peak_memory_mb", "skipped_steps", "replaced_records",
    }  # fmt: skip
    assert all(set(row) == expected for row in steps)
    assert [row["step"] for row in logged if "val_loss" in row] == [3, 6]
    assert steps[0]["epoch"] == pytest.approx(4 / 9, abs=1e-4)
    for step, row in enumerate(steps):
        factor = 0.5 * (1 + math.cos(math.pi * step / 6))
        assert row["projector_lr"] == pytest.approx(1e-3 * factor) and row["lora_lr"] == pytest.approx(5e-4 * factor)
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in whole.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    scores = json.loads((whole / "final" / "scores.json").read_text())
    assert scores["n"] == 6 and set(scores["by_type"]["colour"]) == {"n", "accuracy", "blind"}
    assert not (whole / "final" / "state.safetensors").exists()
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {3, 6} and set(samples[0]) == {
        "step", "id", "question", "answer", "reference",
    }  # fmt: skip
    assert_equal_files(whole / "final", whole / "checkpoint-6", WEIGHTS)


def test_three_steps_resumed_equal_six_steps_bit_for_bit(project, whole, tmp_path):
    """Interrupted after step 3, within an epoch: weights, optimizer and metrics end the same, with dropout."""
    again = tmp_path / "run"
    again.mkdir()
    shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", again)  # its rows after the checkpoint must be dropped and written again
    shutil.copy(whole / "samples.jsonl", again)
    with open(again / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # a line cut off by a kill
    run_training(project, f"output_dir={again}", "train.save_total_limit=null")
    assert_equal_files(whole / "checkpoint-6", again / "checkpoint-6", [*WEIGHTS, "state.safetensors"])
    assert without_times(rows(again)) == without_times(rows(whole))
    assert (again / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_two_equal_runs_give_equal_files(project, whole, tmp_path):
    run_training(project, f"output_dir={tmp_path}", "train.save_total_limit=null", "train.num_workers=2")
    assert_equal_files(whole / "checkpoint-6", tmp_path / "checkpoint-6", [*WEIGHTS, "state.safetensors"])
    assert without_times(rows(tmp_path)) == without_times(rows(whole))


def test_a_step_does_not_depend_on_its_micro_batches(project, tmp_path):
    """8 x 1, 1 x 8, 2 x 4: every answer token has the same weight, whatever its micro-batch holds."""
    losses, weights = [], []
    for size, accumulation in ((8, 1), (1, 8), (2, 4)):
        folder = tmp_path / f"{size}x{accumulation}"
        run_training(
            project, f"output_dir={folder}", *QUICK, "lora.dropout=0", "train.max_steps=2", "train.save_steps=null",
            f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        losses.append([row["loss"] for row in rows(folder)])
        weights.append({name: load_file(folder / "final" / name) for name in WEIGHTS})
    for other_loss, other in zip(losses[1:], weights[1:], strict=True):
        assert other_loss == pytest.approx(losses[0], rel=1e-6)
        for name in WEIGHTS:
            for key, tensor in weights[0][name].items():
                torch.testing.assert_close(other[name][key], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one_does(project, tmp_path):
    """torchrun with two processes and the same config: the same samples, losses and weights, with dropout and noise."""
    common = ["train.max_steps=2", "train.save_steps=2", *QUICK, "train.num_threads=1", "train.image_noise=0.5"]
    run_training(project, f"output_dir={tmp_path / 'one'}", *common)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(project), f"output_dir={tmp_path / 'two'}", *common],
        check=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6)
    assert [row["targets"] for row in two] == [row["targets"] for row in one]
    for name in WEIGHTS:
        a, b = load_file(tmp_path / "one" / "final" / name), load_file(tmp_path / "two" / "final" / name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_a_finished_run_changes_nothing(project, whole, capsys):
    def times() -> dict:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}

    before = times()
    run_training(project)
    assert "finished" in capsys.readouterr().out
    assert times() == before


def test_a_run_of_another_config_is_not_resumed(project, whole):
    with pytest.raises(InputError, match="train.lora_lr: 0.0005 -> 0.002"):
        run_training(project, "train.lora_lr=2e-3")
    run_training(project, "train.logging_steps=5", "test.max_new_tokens=7")  # these keys do not change what is learned


def test_resume_none_moves_the_old_run_aside(project, tmp_path):
    short = ["train.max_steps=1", *QUICK, f"output_dir={tmp_path}"]
    run_training(project, *short)
    run_training(project, *short, "--resume", "none", "train.lora_lr=1e-3")
    run_training(project, *short, "--resume", "none")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("previous")) == ["previous-1", "previous-2"]
    assert (tmp_path / "previous-1" / "final" / "projector.safetensors").exists()
    assert_equal_files(tmp_path / "final", tmp_path / "previous-1" / "final", WEIGHTS)


def test_resume_accepts_a_named_checkpoint_only_with_training_state(project, whole, tmp_path):
    run_training(
        project, f"output_dir={tmp_path}", "--resume", str(whole / "checkpoint-3"), "train.save_total_limit=null"
    )
    assert_equal_files(whole / "checkpoint-6", tmp_path / "checkpoint-6", [*WEIGHTS, "state.safetensors"])
    with pytest.raises(InputError, match="no training state"):
        run_training(project, f"output_dir={tmp_path / 'other'}", "--resume", str(whole / "final"))


class StopsAtOnce:
    """A StopRequest that a signal reaches in the first step."""

    signal = 15

    def __enter__(self) -> StopsAtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("resume", ["checkpoint-3", "none"])
def test_the_message_of_a_stopped_run_names_a_command_that_continues_it(
    project, whole, tmp_path, monkeypatch, capsys, resume
):
    """Also after going back to an earlier checkpoint: what came later moves aside, and nothing of it is used again."""
    again = tmp_path / "run"
    shutil.copytree(whole, again)
    words = [f"output_dir={again}", "train.save_total_limit=1"]
    with monkeypatch.context() as patched:
        patched.setattr(train, "StopRequest", StopsAtOnce)
        code = run_training(project, *words, "--resume", resume if resume == "none" else str(again / resume))
    step = 1 if resume == "none" else 4
    assert code == 128 + 15
    assert (
        f"stopped after step {step} of 6. It is saved; the same command with --resume auto" in capsys.readouterr().out
    )
    assert [path.name for path in again.glob("checkpoint-*")] == [f"checkpoint-{step}"]
    aside = again / "previous-1"
    assert {"checkpoint-6", "final", "best", "metrics.jsonl"} <= {path.name for path in aside.iterdir()}
    assert not (again / "final").exists()
    run_training(project, *words, "--resume", "auto")
    assert f"resuming from {again / f'checkpoint-{step}'}" in capsys.readouterr().out
    assert_equal_files(whole / "checkpoint-6", again / "checkpoint-6", [*WEIGHTS, "state.safetensors"])
    assert without_times(rows(again)) == without_times(rows(whole)) == without_times(rows(aside))


def test_another_config_is_named_before_its_data_are_prepared(project, whole, monkeypatch):
    """The QA file would be rewritten for the other config."""
    monkeypatch.setattr(training.open, "prepare_data", lambda *_, **__: pytest.fail("prepared data"))
    with pytest.raises(InputError, match="train.lora_lr: 0.0005 -> 0.002"):
        run_training(project, "train.lora_lr=2e-3")


@pytest.mark.parametrize("arguments", [(), ("--check",), ("--resume", "none")])
def test_a_foreign_folder_is_refused_before_work_begins(project, tmp_path, monkeypatch, arguments):
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-0" / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(training.open, "prepare_data", lambda *_, **__: pytest.fail("prepared data"))
    with pytest.raises(InputError, match="holds checkpoint-0, not written by a run"):
        run_training(project, f"output_dir={tmp_path}", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0"]


def test_resume_none_moves_only_the_files_of_a_run(project, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    short = ["train.max_steps=1", *QUICK, f"output_dir={tmp_path}", "--resume", "none"]
    run_training(project, *short)
    run_training(project, *short, "--check")
    assert not (tmp_path / "previous-1").exists(), "--check changes nothing"
    with pytest.raises(InputError):
        run_training(project, *short, "model.language_model=nowhere/../nothing")
    assert not (tmp_path / "previous-1").exists(), "a config that cannot run changes nothing"
    run_training(project, *short)
    assert (tmp_path / "notes.txt").exists() and (tmp_path / "previous-1" / "metrics.jsonl").exists()


def test_a_run_resumes_only_with_its_own_data(project, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-3", tmp_path / "checkpoint-3")
    for name in ("qa.jsonl", "validation.jsonl"):
        text = (project.parent / name).read_text().replace('"images/', f'"{project.parent}/images/')
        (tmp_path / name).write_text(text)
    other = [f"output_dir={tmp_path}", "data.sources=[]"]
    state = json.loads((tmp_path / "checkpoint-3" / "state.json").read_text())
    assert set(state) >= {"qa_sha256", "records", "precision"}
    with pytest.raises(InputError, match="data.sources|data.qa_file"):
        run_training(project, *other, f"data.qa_file={tmp_path / 'qa.jsonl'}")
    lines = (project.parent / "qa.jsonl").read_text()
    try:
        (project.parent / "train.json").write_text(
            (project.parent / "train.json").read_text().replace("Say it again.", "Say it once more.")
        )
        with pytest.raises(InputError, match="training data have changed"):
            run_training(project, f"output_dir={tmp_path}")
    finally:
        (project.parent / "train.json").write_text(
            (project.parent / "train.json").read_text().replace("Say it once more.", "Say it again.")
        )
    run_training(project, f"output_dir={tmp_path}", "train.save_total_limit=null")
    assert (project.parent / "qa.jsonl").read_text() == lines
    assert_equal_files(whole / "checkpoint-6", tmp_path / "checkpoint-6", WEIGHTS)


def test_a_finished_run_without_checkpoints_is_not_trained_again(project, whole, tmp_path):
    shutil.copytree(whole / "final", tmp_path / "final")
    with pytest.raises(InputError, match="a finished run whose checkpoints are gone"):
        run_training(project, f"output_dir={tmp_path}")


def test_every_step_counts_in_exactly_one_row(project, whole, tmp_path):
    """Evaluations and checkpoints between two rows lose no step: the rows' targets add up to those of all steps."""
    run_training(project, f"output_dir={tmp_path}", "train.logging_steps=4", "train.save_steps=5")
    logged = [row for row in rows(tmp_path) if "loss" in row]
    steps = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in logged] == [1, 3, 4, 5, 6]
    assert sum(row["targets"] for row in logged) == sum(row["targets"] for row in steps)
    targets = sum(row["targets"] for row in steps[1:3])
    assert logged[1]["targets"] == targets
    assert logged[1]["loss"] == pytest.approx(sum(row["loss"] * row["targets"] for row in steps[1:3]) / targets)


def test_the_model_is_saved_before_it_is_scored(project, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise InputError("this image cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr(training.held_out, "score", fail)
        with pytest.raises(InputError, match="this image"):
            run_training(project, f"output_dir={tmp_path}", "train.eval_steps=null", "train.max_steps=1")
    assert (tmp_path / "final" / "projector.safetensors").exists()
    run_training(project, f"output_dir={tmp_path}", "train.eval_steps=null", "train.max_steps=1")
    assert (tmp_path / "final" / "scores.json").exists()


def test_check_trains_nothing(project, tmp_path, capsys):
    run_training(project, "--check", f"output_dir={tmp_path / 'run'}")
    assert "projector" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_bf16_trains_and_its_weights_stay_float32(project, tmp_path):
    run_training(project, f"output_dir={tmp_path}", "train.precision=bf16", "train.max_steps=2", *QUICK)
    assert all(row["loss"] < 20 for row in rows(tmp_path))
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "final" / "projector.safetensors").values())


def test_fp16_is_refused_without_a_gpu(project, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="fp16"):
            run_training(project, f"output_dir={tmp_path}", "train.precision=fp16")


def test_the_loss_decreases(project, tmp_path):
    run_training(
        project, f"output_dir={tmp_path}", *QUICK, "train.max_steps=40", "train.projector_lr=1e-2", "train.lora_lr=1e-2",
        "train.save_steps=null",
    )  # fmt: skip
    losses = [row["loss"] for row in rows(tmp_path)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_records_longer_than_max_length_are_counted_and_listed(project, tmp_path):
    with pytest.raises(InputError, match="max_refused"):
        run_training(project, f"output_dir={tmp_path}", "data.max_length=40")
    # the answers to the Chinese question begin at token 42, those to the English one at 40
    run_training(
        project, f"output_dir={tmp_path}", "data.max_length=42", "data.max_refused=0.8", *QUICK, "train.max_steps=1"
    )
    listed = [json.loads(line) for line in (tmp_path / "qa.refused.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == [f"train:r{i}" for i in (0, 2, 4, 6, 8)]
    assert all(row["reason"] == "nothing_supervised" and "42" in row["detail"] for row in listed)


@pytest.mark.parametrize(
    "override, named",
    [
        ("model.image_size=30", "model.image_size: 30"),
        ("model.vision_feature_layer=-9", "model.vision_feature_layer: -9"),
    ],
)
def test_an_impossible_encoder_setting_is_named_by_its_key(project, tmp_path, override, named):
    with pytest.raises(InputError, match=named):
        run_training(project, f"output_dir={tmp_path}", override, "--check")


def test_trackers_write_only_into_the_run_folder(project, tmp_path, monkeypatch):
    """TensorBoard holds every logged loss; wandb (offline) creates no folder elsewhere."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    arguments = ("train.max_steps=3", "train.report_to=[tensorboard, wandb]", f"output_dir={tmp_path / 'run'}")
    run_training(project, *arguments, *QUICK)
    (events,) = [
        p for p in (tmp_path / "run" / "tensorboard").rglob("events.*") if p.parent.name == "vision-language-model"
    ]
    accumulator = event_accumulator.EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.value for event in accumulator.Scalars("loss")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "run")], rel=1e-6
    )
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")) and not (tmp_path / "wandb").exists()


def test_tensorboard_shows_each_step_once_after_a_resume(project, whole, tmp_path):
    """Steps after the checkpoint are repeated, and so are their rows."""
    words = (f"output_dir={tmp_path}", "train.report_to=tensorboard", "train.max_steps=4", *QUICK)
    run_training(project, *words)
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / name)
    run_training(project, *words)
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "vision-language-model"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4]


def test_a_tracker_that_is_not_installed_is_named(project, tmp_path, monkeypatch):
    monkeypatch.setattr(training.open.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        run_training(project, f"output_dir={tmp_path}", "train.report_to=wandb")


def test_learning_rate_warms_up_and_decays_to_zero():
    factors = [train.learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and factors[99] < 1e-3
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
