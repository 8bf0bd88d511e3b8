"""A run's folder: what somebody else put there is refused by name and kept, links are not followed, and going back to an
earlier checkpoint moves what came later.

Run: python -m pytest tests/training/test_run_folder.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from config import InputError
from model.checkpoint_folder import latest_checkpoint, prune_checkpoints, verify_folder, write_folder
from training.log import RunLog, read_rows
from training.run_folder import RunLock, check_owner, go_back, move_aside

HISTORY = json.dumps([{"config_sha256": "abc"}])


def open_log(folder: Path, start_step: int = 0) -> RunLog:
    return RunLog(folder, start_step, logging_steps=1, writes=True, processes=1, track=print)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of six steps, with a checkpoint each; best/ is of step 4."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(HISTORY)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 7)))
    for step in range(1, 7):
        save(folder / f"checkpoint-{step}")
    save(folder / "final")
    save(folder / "best", **{"best.json": json.dumps({"step": 4, "val_loss": 0.5})})
    return folder


def save(folder: Path, **files: str) -> None:
    def write(partial: Path) -> None:
        for name, text in ({"config.yaml": "seed: 1\n"} | files).items():
            (partial / name).write_text(text)

    write_folder(folder, write)


# ---------------------------------------------------------------------------------------------------------------------
# Whose files these are


@pytest.mark.parametrize(
    "path",
    [
        "best/weights.bin", "final/notes.txt", "checkpoint-1/a.txt", "checkpoint-0/trainer_state.json", "metrics.jsonl",
        "samples.jsonl", "skipped.jsonl", "curves.png", "run.json", "findings.jsonl", ".final.partial/a.txt",
        ".best.replaced/a.txt", "best", "checkpoint-7",
    ],
)  # fmt: skip
def test_what_no_run_wrote_is_refused_by_name_and_kept(tmp_path, path):
    """A folder without a manifest, and files in a folder without a run. Nothing is created either."""
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("mine")
    with pytest.raises(InputError, match=f"holds {path.split('/')[0]}, not written by a run.*another output_dir"):
        RunLock(tmp_path).__enter__()
    found = contents(tmp_path)
    assert found.pop(path) == b"mine" and found in ({}, {".lock": b""})


def test_a_foreign_lock_file_is_refused_and_kept(run):
    (run / ".lock").write_text("mine")
    with pytest.raises(InputError, match="/.lock: not written by a run"):
        RunLock(run).__enter__()
    assert (run / ".lock").read_text() == "mine"


@pytest.mark.parametrize("name", ["best", "checkpoint-2"])
def test_a_foreign_folder_among_those_of_a_run_is_refused(run, name):
    shutil.rmtree(run / name)
    (run / name).mkdir()
    (run / name / "manifest.json").write_text('{"name": "an app", "icons": []}')
    before = contents(run)
    with pytest.raises(InputError, match=f"holds {name}, not written"):
        check_owner(run)
    with pytest.raises(InputError, match=f"{name}: was not written by a run"):
        save(run / name)
    prune_checkpoints(run, 1, print)
    assert {name: text for name, text in before.items() if name in contents(run)} == contents(run)
    assert (run / name / "manifest.json").exists()


def test_what_a_run_left_is_recognised(run, tmp_path):
    """Also after a kill, with damaged checkpoints, with files of the user's, through a link, and without its run.json."""
    (run / "checkpoint-6" / "manifest.json").write_text("{")
    (run / "checkpoint-5" / "manifest.json").unlink()
    (run / "checkpoint-5" / "run.json").write_text(HISTORY)
    for name in (".checkpoint-7.partial", ".best.replaced", "answers", "notes", "checkpoint-x"):
        (run / name).mkdir()
        (run / name / "half").write_text("")
    for name in (".lock", "skipped.jsonl", "curves.png"):
        (run / name).write_text("")
    (tmp_path / "linked").symlink_to(run)
    with RunLock(tmp_path / "linked"):
        pass
    (run / "run.json").unlink()
    with RunLock(run):
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
    assert (run / "notes").exists() and not (run / ".checkpoint-7.partial").exists()
    with RunLock(tmp_path / "new"):  # killed before it wrote anything else
        pass
    check_owner(tmp_path / "new")


@pytest.mark.parametrize("kept", [".lock", "metrics.jsonl"])
@pytest.mark.parametrize("history", [None, "{"])
def test_a_run_without_a_checkpoint_is_recognised_without_its_history(tmp_path, kept, history):
    """A damaged run.json is named by who reads it, with the advice to remove it; then the folder must still be the run's."""
    with RunLock(tmp_path):
        log = open_log(tmp_path)
        log.skipped(1, "bad_image", {})
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "targets": 5}\n{"ste')
    if history is not None:
        (tmp_path / "run.json").write_text(history)
    for name in {".lock", "metrics.jsonl"} - {kept}:
        (tmp_path / name).unlink()
    with RunLock(tmp_path):
        check_owner(tmp_path)


def test_a_log_or_lock_that_is_not_of_a_run_is_no_mark(tmp_path):
    (tmp_path / "curves.png").write_text("mine")
    for name, text in {".lock": "", "metrics.jsonl": '{"step": 1, "loss": 2}\n'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="holds curves.png.*, not written by a run"):
            RunLock(tmp_path).__enter__()


def test_a_run_of_stages_is_recognised_by_its_stages(tmp_path):
    (tmp_path / "stages" / "text").mkdir(parents=True)
    (tmp_path / "stages" / "text" / "run.json").write_text(HISTORY)
    (tmp_path / "metrics.jsonl").write_text("")
    check_owner(tmp_path)


def test_a_damaged_checkpoint_is_never_pruned(run):
    (run / "checkpoint-1" / "manifest.json").write_text("{")
    (run / "checkpoint-2" / "manifest.json").unlink()
    reports: list[str] = []
    prune_checkpoints(run, 2, reports.append)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 5, 6)]
    assert len(reports) == 2 and all("not removed" in text for text in reports)


def test_starting_over_moves_nothing_that_no_run_wrote(tmp_path):
    for name in ("answers", "wandb"):
        (tmp_path / name).mkdir()
    move_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "wandb"]


# ---------------------------------------------------------------------------------------------------------------------
# Links, pipes and damage


@pytest.mark.parametrize(
    "name",
    ["final", "best", "checkpoint-2", ".final.partial", "metrics.jsonl", "run.json", ".lock", "curves.png"],
)
def test_a_link_where_a_run_writes_is_refused(run, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.copytree(run / "final", outside)
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside)
    before = contents(outside)
    with pytest.raises(InputError, match=f"{name}: is a symbolic link"):
        RunLock(run).__enter__()
    assert contents(outside) == before


def test_the_message_about_a_link_names_what_works_and_trackers_may_write_through_links(run, tmp_path):
    (tmp_path / "other_disk").mkdir()
    for name in ("tensorboard", "wandb"):
        (run / name).symlink_to(tmp_path / "other_disk")
    with RunLock(run):
        pass
    shutil.rmtree(run / "best")
    (run / "best").symlink_to(tmp_path / "other_disk")
    with pytest.raises(InputError, match=f"best: is a symbolic link.* make the whole folder {run} a link"):
        check_owner(run)


def test_no_write_follows_a_link_that_appears_later(run, tmp_path):
    """Under the temporary names too."""
    (tmp_path / "mine").write_text("mine")
    for name in (".metrics.jsonl.partial", "metrics.partial", ".curves.png.partial"):
        (run / name).symlink_to(tmp_path / "mine")
    log = open_log(run, 3)
    log.draw()
    (run / "skipped.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="skipped.jsonl: is a symbolic link"):
        log.skipped(4, "bad_image", {})
    assert (tmp_path / "mine").read_text() == "mine" and (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_rows(run / "metrics.jsonl")) == 3


def test_a_pipe_is_not_waited_for(run):
    for name in ("final/manifest.json", "metrics.jsonl", ".lock"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    with pytest.raises(InputError, match="special file"):
        verify_folder(run / "final")
    with pytest.raises(InputError, match="special file"):
        open_log(run)
    with pytest.raises(InputError, match="/.lock: not written by a run"):
        RunLock(run).__enter__()


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1]", '{"step": "1"}', "step,loss", "\ufffd{"])
def test_a_damaged_row_is_named_by_its_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(InputError, match="metrics.jsonl: line 2 is damaged"):
        open_log(tmp_path)


def test_a_folder_that_was_deleted_during_the_run_is_one_message(run):
    log = open_log(run)
    shutil.rmtree(run)
    for write in (lambda: log.skipped(1, "bad_image", {}), log.draw, lambda: save(run / "checkpoint-7")):
        with pytest.raises(
            InputError, match=f"{run}: does not exist any more.*steps since the last checkpoint are lost"
        ):
            write()
    assert not run.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Going back


def test_going_back_moves_what_came_later(run, capsys):
    log = (run / "metrics.jsonl").read_bytes()
    go_back(run, run / "checkpoint-2", 2)
    aside = run / "previous-1"
    later = [f"checkpoint-{step}" for step in (3, 4, 5, 6)]
    assert sorted(path.name for path in aside.iterdir()) == ["best", *later, "final", "metrics.jsonl", "samples.jsonl"]
    assert (aside / "metrics.jsonl").read_bytes() == log
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "going back to step 2" in line and str(aside) in line
    go_back(run, run / "checkpoint-2", 2)  # again: nothing is left to move
    assert capsys.readouterr().out == "" and not (run / "previous-2").exists()


def test_going_back_keeps_an_earlier_best(run):
    go_back(run, run / "checkpoint-4", 4)
    assert (run / "best").exists() and latest_checkpoint(run, print) == run / "checkpoint-4"


def test_a_checkpoint_of_another_folder_begins_another_run(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    go_back(run, other / "checkpoint-2", 2)
    assert sorted(path.name for path in run.iterdir()) == ["previous-1"]
    assert len(list((run / "previous-1").glob("checkpoint-*"))) == 6 and (other / "checkpoint-6").exists()


@pytest.mark.parametrize("moved", range(6))
def test_a_kill_while_going_back_leaves_a_run_that_resumes(run, monkeypatch, moved):
    """At each move: final/ never stays without the last checkpoint, and the same command completes the moves."""
    rename, done = Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        go_back(run, run / "checkpoint-2", 2)
    newest = latest_checkpoint(run, pytest.fail)
    assert newest is not None and newest.name == f"checkpoint-{min(6, 7 - moved) if moved else 6}"
    assert (run / "final").exists() == (moved == 0)
    check_owner(run)
    go_back(run, run / "checkpoint-2", 2)
    assert latest_checkpoint(run, pytest.fail) == run / "checkpoint-2" and not (run / "best").exists()
