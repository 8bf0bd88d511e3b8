"""`train.py --extend`: a run that gets more steps and more data, exactly.

Run: sh tests/run.sh tests/training/test_extended_runs.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import train
import training.log
from config import InputError, load_config
from dataset.order import SampleOrder
from dataset.qa_file import QAFile
from model.checkpoint_folder import write_folder
from tests.spy import spy
from tests.toy_project import run_training, write_project, write_staged_project, write_yaml
from training.resume import lowest_val_loss

SHORT = ("train.score_samples=1", "train.save_steps=2", "train.eval_steps=null", "train.save_total_limit=null")
SHORT += ("train.warmup_ratio=0.25",)
LONGER = "train.max_steps=8"
MODEL = ("projector.safetensors", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config of a project with a finished run of 4 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.log, "draw_curves", lambda *_: None)
        path = write_project(tmp_path_factory.mktemp("finished") / "project")
        run_training(path, *SHORT, "train.max_steps=4")
        yield path


@pytest.fixture
def project(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "project")
    return tmp_path / "project" / "config.yaml"


def add_data(path: Path) -> None:
    """Add a source of three records to a project's config."""
    values, folder = yaml.safe_load(path.read_text()), path.parent
    records = json.loads((folder / "train.json").read_text())[:3]
    for record in records:
        record["conversations"] = [
            {"from": "human", "value": "<image>\nHow many?"},
            {"from": "gpt", "value": "one more"},
        ]
    (folder / "more.json").write_text(json.dumps(records))
    first = values["data"]["sources"][0]
    values["data"]["sources"].append(first | {"name": "more", "annotations": "more.json"})
    write_yaml(path, values)


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """A copy of the finished run, extended by 4 steps and 3 records: its config, the ids of each new step, what it said."""
    folder = tmp_path_factory.mktemp("extended") / "project"
    shutil.copytree(finished.parent, folder)
    add_data(folder / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        ids = spy(patch, train, "log_step", lambda _, __, batches: sorted(i for batch in batches for i in batch.ids))
        said = spy(patch, train, "print_main", lambda text: text)
        run_training(folder / "config.yaml", *SHORT, LONGER, "--extend")
    return folder / "config.yaml", ids, "\n".join(said)


def assert_equal(a: Path, b: Path, *names: str) -> None:
    for name in names:
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name


def test_every_further_step_is_that_of_a_run_of_the_new_length_on_the_new_data(extended):
    path, ids, said = extended
    rows = [json.loads(line) for line in (path.parent / "run/metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["projector_lr"] for row in rows}
    old = [train.learning_rate_factor(step, 4, 0.25) for step in range(4)]
    new = [train.learning_rate_factor(step, 8, 0.25) for step in range(4, 8)]
    assert [rates[step] for step in range(1, 9)] == pytest.approx([1e-3 * factor for factor in old + new])
    assert (
        "extended to 8 steps (planned before: 4): from here on the learning rate is that of a run of 8 steps, " in said
    )
    assert f"{new[0]:.0%} of its peak at step 5 (0% before), along the cosine to 0 at the end" in said

    qa = QAFile(load_config(path).data.qa_file)
    order = SampleOrder(torch.arange(len(qa)).numpy(), 1, torch.ones(len(qa)).numpy())
    assert len(qa) == 12
    expected = [sorted(qa[order.at(4 * step + i)[1]].id for i in range(4)) for step in range(4, 8)]
    assert ids == expected and any(name.startswith("more:") for step in ids for name in step)


@pytest.mark.parametrize(
    "lost, arguments",
    [(("checkpoint-8",), ()), (("checkpoint-6", "checkpoint-8"), ("--extend",))],
    ids=["after its first checkpoint", "before it, by the same command"],
)
def test_an_extended_run_that_is_killed_and_resumed_ends_with_equal_bits(extended, finished, tmp_path, lost, arguments):
    shutil.copytree(extended[0].parent, tmp_path / "project")
    run = tmp_path / "project" / "run"
    for name in lost:
        shutil.rmtree(run / name)
    shutil.rmtree(run / "final")
    shutil.copytree(finished.parent / "run/final", run / "final")  # of the shorter run, as a kill leaves it
    run_training(tmp_path / "project/config.yaml", *SHORT, LONGER, *arguments)
    assert_equal(run / "checkpoint-8", extended[0].parent / "run/checkpoint-8", *MODEL, "state.safetensors")
    assert_equal(run / "final", run / "checkpoint-8", *MODEL)


def test_a_kill_between_the_last_checkpoint_and_final_leaves_the_run_unfinished(extended, finished, tmp_path, capsys):
    shutil.copytree(extended[0].parent, tmp_path / "project")
    run, path = tmp_path / "project/run", tmp_path / "project/config.yaml"
    shutil.rmtree(run / "final")
    shutil.copytree(finished.parent / "run/final", run / "final")
    run_training(path, *SHORT, LONGER)
    assert_equal(run / "final", run / "checkpoint-8", *MODEL)
    capsys.readouterr()
    run_training(path, *SHORT, LONGER, "--extend")
    assert "This run is finished" in capsys.readouterr().out


def test_a_refusal_names_extend(project):
    with pytest.raises(InputError, match=r"train.max_steps: 4 -> 8\nTo train the same run longer.*add --extend"):
        run_training(project, *SHORT, LONGER)
    add_data(project)
    with pytest.raises(InputError, match=r"data.sources: train, held -> train, held, more\nTo train.*add --extend"):
        run_training(project, *SHORT, "train.max_steps=4")
    with pytest.raises(InputError, match=r"another config:\n  lora.r: 4 -> 8\nResume"):
        run_training(project, *SHORT, LONGER, "lora.r=8", "--extend")


def test_an_edited_qa_file_may_grow_and_not_shrink(project, capsys):
    values = yaml.safe_load(project.read_text())
    del values["data"]["sources"]
    write_yaml(project, values)
    with pytest.raises(InputError, match="data.sources: train, held -> none\nTo train"):
        run_training(project, *SHORT, "train.max_steps=4")
    lines = (project.parent / "qa.jsonl").read_text().splitlines(keepends=True)
    (project.parent / "qa.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match="--extend: the run began with 9 records and now has 8; it may only get more"):
        run_training(project, *SHORT, LONGER, "--extend")
    more = json.dumps(json.loads(lines[0]) | {"id": "new"}) + "\n"
    (project.parent / "qa.jsonl").write_text("".join([*lines, more]))
    run_training(project, *SHORT, "train.max_steps=5", "--extend")
    assert "extended data: 9 records before, 10 now." in (said := capsys.readouterr().out)
    assert "step 4 is 1.60 epochs into it" in said
    (project.parent / "qa.jsonl").write_text("".join(lines))
    shutil.rmtree(project.parent / "run/final")
    with pytest.raises(InputError, match="changed since the run began:\n  records: 10 -> 9 (?s:.)*\nPut the old data"):
        run_training(project, *SHORT, "train.max_steps=5")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.max_steps=3", "--extend"], "has trained 4 steps already, and this config ends at step 3; raise"),
        ([LONGER, "--extend", "--resume", "none"], "--extend resumes a run, and --resume none starts over"),
        ([LONGER, "--extend", "output_dir=new"], "--extend: .*new holds no checkpoint to resume from"),
    ],
)
def test_what_cannot_be_extended_is_named(project, monkeypatch, arguments, message):
    monkeypatch.chdir(project.parent)
    with pytest.raises(InputError, match=message):
        run_training(project, *SHORT, *arguments)


def test_a_stage_is_extended_by_its_name(tmp_path):
    path = write_staged_project(tmp_path)
    with pytest.raises(InputError, match="--extend: say which stage trains further, with --stage NAME"):
        run_training(path, "--extend")


def test_a_loss_on_another_validation_file_is_not_compared(extended, capsys):
    best = extended[0].parent / "run/best"
    assert not best.exists()
    write_folder(best, lambda folder: (folder / "best.json").write_text('{"val_loss": 0.5, "validation_sha256": "a"}'))
    assert lowest_val_loss(best.parent, "a") == 0.5
    assert lowest_val_loss(best.parent, "b") == float("inf")
    assert "of another validation file" in capsys.readouterr().out
    shutil.rmtree(best)
