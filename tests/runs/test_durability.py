"""A run's folder survives kills, full disks and a second run; which checkpoints are kept.
`sh tests/run.sh tests/runs/test_durability.py`"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState, debug_launcher
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from config import Config, InputError, load_config
from model import checkpoint_folder as folders
from model.checkpoint_folder import latest_checkpoint, prune_checkpoints, recover, verify_folder, write_folder
from tests.spy import spy
from tests.toy_project import run_training, write_project
from training import resume, run_folder
from training.processes import faults_of_all
from training.provenance import git_commit
from training.run import open_model, open_processors
from training.state import Position


def files_with(content: str):
    """Return a function that fills a folder with a small file, and with a large one in a subfolder."""

    def write(folder: Path) -> None:
        (folder / "a").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.safetensors").write_bytes(content.encode() * 1000)

    return write


def content_of(folder: Path) -> str:
    """Return the content that `files_with` wrote, after verifying that the folder is whole."""
    verify_folder(folder)
    content = (folder / "a").read_text()
    assert (folder / "inner" / "b.safetensors").read_bytes() == content.encode() * 1000
    return content


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def killed_at(call: int, work) -> bool:
    """Do `work` in a child that is killed before its `call`-th access to the disk. False if it ended before that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(event: str, _: tuple = ()) -> None:
            nonlocal calls
            if event == "open" or event.startswith(("os.", "shutil.")):
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda fd: count("os.fsync")
        sys.addaudithook(count)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture
def no_flush(monkeypatch):
    """Skip fsync: a kill loses nothing that the kernel already has, so these tests need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path, no_flush):
    folder, seen = tmp_path / "best", set()
    (tmp_path / ".mine.partial").mkdir()
    for call in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, files_with("old"))
        killed = killed_at(call, lambda: write_folder(folder, files_with("new")))
        recover(tmp_path)
        seen.add(content_of(folder))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "best"], call
        if not killed:
            break
    assert call > 30 and seen == {"old", "new"}


def test_a_kill_at_any_call_leaves_a_first_folder_whole_or_absent(tmp_path, no_flush):
    folder, seen = tmp_path / "checkpoint-1", set()
    for call in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        killed = killed_at(call, lambda: write_folder(folder, files_with("new")))
        recover(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] in ([], [folder.name])
        seen.add(content_of(folder) if folder.exists() else None)
        if not killed:
            break
    assert call > 20 and seen == {None, "new"}


@pytest.mark.parametrize("work", ["recover", "prune"])
def test_a_kill_during_recovery_or_pruning_loses_nothing(tmp_path, work, no_flush):
    """Recovery starts between the renames of a replacement; pruning removes old checkpoints."""
    for call in range(1, 1000):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for step in (1, 2, 3):
            write_folder(tmp_path / f"checkpoint-{step}", files_with(str(step)))
        (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.replaced")
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-3.replaced")
        shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-2.partial")
        if work == "recover":
            killed = killed_at(call, lambda: recover(tmp_path))
            recover(tmp_path)
            assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (1, 2, 3)]
        else:
            recover(tmp_path)
            killed = killed_at(call, lambda: prune_checkpoints(tmp_path, 1, print))
            recover(tmp_path)
        for folder in tmp_path.iterdir():
            assert content_of(folder) == folder.name[-1]
        if not killed:
            break
    assert call > 10 and (tmp_path / "checkpoint-3").exists()


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """A power cut loses what was not flushed: files, their folders, and after the renames the parent folder."""
    events = spy(monkeypatch, os, "fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    spy(monkeypatch, os, "rename", lambda a, b, **_: events.append((Path(a).name, Path(b).name)))
    for content in ("old", "new"):
        events.clear()
        write_folder(tmp_path / "final", files_with(content))
        partial = tmp_path / ".final.partial"
        inside = {str(partial / name) for name in ("a", "inner", "inner/b.safetensors", "manifest.json")}
        named = events.index((".final.partial", "final"))
        assert {event for event in events[:named] if isinstance(event, str)} == inside | {str(partial)}
        assert events[named + 1] == str(tmp_path)


def test_an_error_while_writing_keeps_the_old_folder(tmp_path):
    def fail(folder):
        files_with("half")(folder)
        raise KeyboardInterrupt

    write_folder(tmp_path / "final", files_with("old"))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "final", fail)
    assert content_of(tmp_path / "final") == "old" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


def fill_tensors(folder: Path) -> None:
    (folder / "a.json").write_text("x" * 1000)
    save_file({"a": torch.zeros(1_000_000)}, folder / "a.safetensors")


def fill_tokenizer(folder: Path) -> None:
    vocabulary = {chr(0x4E00 + i): i for i in range(20000)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))


def fill_text(folder: Path) -> None:
    (folder / "a.json").write_text("x" * 4_000_000)


@pytest.mark.parametrize("fill", [fill_tensors, fill_tokenizer, fill_text])
def test_a_file_size_limit_keeps_the_earlier_checkpoint_and_names_the_needed_space(tmp_path, fill):
    """RLIMIT_FSIZE (`ulimit -f`), for each library that writes into a checkpoint: Python, safetensors, tokenizers."""
    write_folder(tmp_path / "checkpoint-20", files_with("old"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(InputError) as caught:
            write_folder(tmp_path / "checkpoint-40", fill, 4_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert "checkpoint-40: a file would exceed the size limit" in message
    assert f"needs about 4.{'0' if fill is fill_tensors else '1'} MB" in message and "MB are free there" in message
    assert "resume from checkpoint-20" in message and "save_total_limit" in message and "output_dir" in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]
    assert content_of(tmp_path / "checkpoint-20") == "old"


@pytest.mark.parametrize("number, reason", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota")])
@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
def test_a_full_disk_at_any_call_is_one_message(tmp_path, monkeypatch, call, number, reason):
    """Some file systems report a full disk only at the flush, and a folder's entry needs space too."""

    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    write_folder(tmp_path / "final", files_with("old"))
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(InputError, match=f"final: .*{reason}.*start over"):
            write_folder(tmp_path / "final", files_with("new"))
        patched.setattr(os, "rename", lambda *_: full())
        if call == "fsync":
            with pytest.raises(InputError, match=reason):
                folders.replace_text(tmp_path / "run.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and content_of(tmp_path / "final") == "old"


def test_a_failed_second_rename_restores_the_old_folder(tmp_path, monkeypatch):
    write_folder(tmp_path / "final", files_with("old"))
    rename = os.rename

    def fail_second(source, target, **_):
        if Path(source).name == ".final.partial":
            raise OSError(errno.ENOSPC, "no room")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", fail_second)
        with pytest.raises(InputError, match="the disk is full"):
            write_folder(tmp_path / "final", files_with("new"))
    assert content_of(tmp_path / "final") == "old" and len(list(tmp_path.iterdir())) == 1


def test_other_errors_pass_through_unchanged(tmp_path):
    def fail(_):
        raise OSError(errno.EIO, "a broken disk")

    with pytest.raises(OSError, match="a broken disk"):
        write_folder(tmp_path / "final", fail)


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints are kept


def test_pruning_keeps_the_newest(tmp_path):
    for step in (5, 10, 100):
        write_folder(tmp_path / f"checkpoint-{step}", files_with(str(step)))
    (tmp_path / "checkpoint-x").mkdir()
    prune_checkpoints(tmp_path, None, pytest.fail)
    assert len(list(tmp_path.iterdir())) == 4
    prune_checkpoints(tmp_path, 2, pytest.fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-x"]


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_the_last_intact_checkpoint_is_never_removed(tmp_path, damage):
    """The newest one is read back before an older one is removed; a damaged one does not count, and is named."""
    for step in (1, 2, 3, 4):
        write_folder(tmp_path / f"checkpoint-{step}", files_with(str(step)))
    for step in (3, 4):
        victim = tmp_path / f"checkpoint-{step}" / "inner" / "b.safetensors"
        flip(victim) if damage == "flip" else victim.unlink()
    reports: list[str] = []
    prune_checkpoints(tmp_path, 1, reports.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in (2, 3, 4)]
    assert len(reports) == 2 and all("does not count" in text and "b.safetensors" in text for text in reports)
    assert latest_checkpoint(tmp_path, reports.append) == tmp_path / "checkpoint-2"
    flip(tmp_path / "checkpoint-2" / "a")
    prune_checkpoints(tmp_path, 1, reports.append)
    assert len(list(tmp_path.iterdir())) == 3, "removed a checkpoint although no intact one is left"


def test_pruning_a_linked_checkpoint_removes_only_the_link(tmp_path):
    for name in ("elsewhere", "run"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path / "elsewhere" / "checkpoint-1", files_with("1"))
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    write_folder(tmp_path / "run" / "checkpoint-2", files_with("2"))
    prune_checkpoints(tmp_path / "run", 1, pytest.fail)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert content_of(tmp_path / "elsewhere" / "checkpoint-1") == "1"


# ---------------------------------------------------------------------------------------------------------------------
# One run per folder


def hold_and_fork(run: Path, ready: int) -> None:
    """Hold the lock in a process with a forked worker, like the loader's, that outlives it."""
    with run_folder.RunLock(run):
        worker = os.fork()
        if worker:
            os.write(ready, str(worker).encode())
        while True:
            signal.pause()


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(tmp_path):
    """A SIGKILL releases the lock at once, although a forked worker of the killed run is still alive."""
    run, (reader, ready) = tmp_path / "run", os.pipe()
    holder = os.fork()
    if holder == 0:
        hold_and_fork(run, ready)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(InputError, match=rf"{run}: another run writes there \(process {holder} on .*, since 2"):
            run_folder.RunLock(run).__enter__()
        (run / ".checkpoint-1.partial").mkdir()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(worker, 0)  # still alive
        with run_folder.RunLock(run):
            assert [path.name for path in run.iterdir()] == [".lock"], "a leftover of the killed run was not removed"
            assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(ready)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".lock").symlink_to(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "linked"):
        named = f"{folder}: cannot be written" if folder.is_file() else f"{folder}/.lock: is a symbolic link"
        with pytest.raises(InputError, match=named):
            run_folder.RunLock(folder).__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", no_locks)
    with run_folder.RunLock(tmp_path):
        assert capsys.readouterr().out.count("start no second run") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    path = write_project(tmp_path_factory.mktemp("project"))
    run_training(path, "train.eval_steps=null", "train.max_steps=2", "train.save_steps=1", "train.score_samples=1")
    return path


@pytest.fixture
def run(project, tmp_path):
    """The config of a copy of a finished run's folder, which a test may damage."""
    shutil.copytree(project.parent / "run", tmp_path / "run")
    overrides = ["train.eval_steps=null", "train.max_steps=2", f"output_dir={tmp_path / 'run'}"]
    return load_config(project, overrides)


def test_finding_the_checkpoint_reads_each_file_once(run, monkeypatch, capsys):
    read = spy(monkeypatch, folders, "_sha256", lambda path: path)
    newest = run.output_dir / "checkpoint-2"
    assert resume.find_checkpoint(run, "auto") == newest and capsys.readouterr().out == ""
    assert sorted(read) == sorted(p for p in newest.rglob("*") if p.is_file() and p.name != "manifest.json")
    flip(newest / "projector.safetensors")
    assert resume.find_checkpoint(run, "auto") == run.output_dir / "checkpoint-1"
    (report,) = capsys.readouterr().out.splitlines()
    assert str(newest / "projector.safetensors") in report


def test_two_processes_resume_from_the_same_checkpoint_or_both_stop(run, tmp_path, capfd):
    """The main process reads and reports; the other one receives its result or its error."""
    flip(run.output_dir / "checkpoint-2" / "adapter_model.safetensors")

    def work() -> None:
        PartialState._reset_state()  # inherited from the process that was forked
        rank = PartialState(cpu=True).process_index
        read = spy(pytest.MonkeyPatch(), folders, "_sha256", lambda path: path)
        found = resume.find_checkpoint(run, "auto")
        outcome = {"found": found and found.name, "read": len(read)}
        try:
            resume.find_checkpoint(run, str(run.output_dir / "final"))
        except InputError as error:
            outcome["error"] = str(error)
        (tmp_path / f"{rank}.json").write_text(json.dumps(outcome))

    debug_launcher(work, num_processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"] == second["found"] == "checkpoint-1" and first["read"] > 0 and second["read"] == 0
    assert first["error"] == second["error"] and "no training state" in first["error"]
    assert capfd.readouterr().out.count("damaged checkpoint") == 1


def test_a_checkpoint_that_another_machine_does_not_find_stops_both(run, tmp_path):
    """Two machines without a shared disk: the second one has no checkpoint, or another one of the same step."""
    second = tmp_path / "second" / "run"
    shutil.copytree(run.output_dir, second)
    write_folder(second / "checkpoint-2", files_with("of another run"))
    shutil.rmtree(second / "checkpoint-1")

    def work() -> None:
        PartialState._reset_state()  # inherited from the process that was forked
        rank = PartialState(cpu=True).process_index
        if rank == 1:  # it sees another disk
            patched = pytest.MonkeyPatch()
            patched.setattr(
                resume, "open_regular", lambda path: open(str(path).replace(str(run.output_dir), str(second)), "rb")
            )
            patched.setattr(resume.platform, "node", lambda: "the-second-machine")
        messages = []
        for name in ("checkpoint-1", "checkpoint-2"):
            try:
                resume.find_checkpoint(run, str(run.output_dir / name))
            except InputError as error:
                messages.append(str(error))
        faults = faults_of_all([f"of {rank}", "of both"])
        (tmp_path / f"{rank}.json").write_text(json.dumps({"messages": messages, "faults": faults}))

    debug_launcher(work, num_processes=2)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found["messages"]) == 2
        assert all("is missing or different on the-second-machine" in message for message in found["messages"])
        assert found["faults"] == ["of 0", "of both", "of 1"]


class FakeRun(SimpleNamespace):
    """The attributes of a Run that training.resume uses, around a real model."""

    def __init__(self, config: Config):
        built = open_model(config, "fp32", open_processors(config))
        super().__init__(
            config=config,
            built=built,
            model=built.model,
            accelerator=SimpleNamespace(num_processes=1, scaler=None, wait_for_everyone=lambda: None),
            fingerprint={"qa_sha256": "abc"},
            validation_sha256=None,
            total_steps=9,
        )


@pytest.fixture(scope="module")
def opened(project):
    return FakeRun(load_config(project))


@pytest.fixture
def opened_run(opened, project, tmp_path):
    """A run of the project's model with an empty folder, before its first step. Its optimizer has made one."""
    opened.config = load_config(project, [f"output_dir={tmp_path / 'run'}", "train.save_total_limit=1"])
    opened.config.output_dir.mkdir()
    opened.position = Position()
    parameters = [p for p in opened.model.parameters() if p.requires_grad]
    opened.optimizer = wrapped(torch.optim.AdamW(parameters, lr=0.0))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    opened.optimizer.optimizer.step()
    return opened


def wrapped(optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    """Wrap an optimizer as accelerate does."""
    return SimpleNamespace(optimizer=optimizer)


def save_at(run: Any, step: int) -> Path:
    """Save the checkpoint of `step` and return its folder."""
    run.position.step = step
    resume.save_checkpoint(run)
    return run.config.output_dir / f"checkpoint-{step}"


def change_state(checkpoint: Path, **values) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_folder_records_how_it_was_made(opened_run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    folder = opened_run.config.output_dir
    resume.record_start(opened_run, None, ["train.py", "seed=1"])
    save_at(opened_run, 3)
    resume.record_start(opened_run, folder / "checkpoint-3", ["train.py"])
    resume.write_final(opened_run)
    text = (folder / "final" / "run.json").read_text()
    first, second = json.loads(text)
    assert text == (folder / "run.json").read_text() and "a-secret" not in text
    assert json.loads((folder / "checkpoint-3" / "run.json").read_text()) == [first]
    assert first["command"] == ["train.py", "seed=1"] and first["step"] == 0 and first["resumed_from"] is None
    assert second["step"] == 3 and second["resumed_from"] == "checkpoint-3"
    assert first["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in first["versions"]["torch"]
    assert set(first["machine"]) == {"host", "cpu", "gpus", "processes"} and first["qa_sha256"] == "abc"
    assert first["config_sha256"] == second["config_sha256"] and first["started"] <= second["started"]
    (folder / "run.json").unlink()  # --resume of another run's checkpoint, in a new folder
    resume.record_start(opened_run, folder / "checkpoint-3", ["train.py"])
    assert [entry["step"] for entry in json.loads((folder / "run.json").read_text())] == [0, 3]
    (folder / "run.json").write_text("{")
    with pytest.raises(InputError, match="run.json.*remove it"):
        resume.record_start(opened_run, None, [])
    os.truncate(folder / "run.json", 1 << 30)
    with pytest.raises(InputError, match="run.json: 1,074 MB"):
        resume.record_start(opened_run, None, [])


def test_git_commit_is_the_folders_own_and_marks_changes(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert git_commit(tmp_path) is None
    git("init")
    assert git_commit(tmp_path) is None, "no commit yet"
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "a")
    commit = git_commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "new.txt").write_text("not tracked")
    assert git_commit(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert git_commit(tmp_path) == commit + "-dirty"
    (tmp_path / "copy").mkdir()
    assert git_commit(tmp_path / "copy") is None, "inside another repository"


def test_the_best_model_is_kept_beside_the_others(opened_run, capsys):
    folder = opened_run.config.output_dir
    assert resume.lowest_val_loss(folder) == float("inf")
    opened_run.position.step = 3
    resume.write_best(opened_run, 0.75)
    kept = load_file(folder / "best" / "projector.safetensors")
    with torch.no_grad():
        opened_run.model.projector.linear_1.bias += 1
    for step in (4, 5):
        save_at(opened_run, step)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "checkpoint-5"]
    verify_folder(folder / "best")
    assert json.loads((folder / "best" / "best.json").read_text()) == {"step": 3, "val_loss": 0.75}
    assert resume.lowest_val_loss(folder) == 0.75
    now = load_file(folder / "best" / "projector.safetensors")
    assert all(torch.equal(kept[key], now[key]) for key in kept)
    assert not (folder / "best" / "state.safetensors").exists() and (folder / "best" / "tokenizer").is_dir()
    (folder / "best" / "best.json").write_text("{}")
    assert capsys.readouterr().out == ""
    assert resume.lowest_val_loss(folder) == float("inf") and "best.json" in capsys.readouterr().out


def test_a_checkpoint_knows_its_size_before_it_is_written(opened_run, monkeypatch):
    """All tensors, to the byte; file headers are not counted."""
    folder = opened_run.config.output_dir
    announced = spy(monkeypatch, resume, "write_folder", lambda folder, write, room: room)
    save_at(opened_run, 1)
    resume.write_final(opened_run)
    for name, room in zip(("checkpoint-1", "final"), announced, strict=True):
        saved = [load_file(path) for path in (folder / name).glob("*.safetensors")]
        assert room == sum(tensor.nbytes for tensors in saved for tensor in tensors.values())


def test_the_optimizer_is_restored_bit_for_bit(opened_run):
    checkpoint, saved = save_at(opened_run, 1), opened_run.optimizer.optimizer
    fresh = torch.optim.AdamW(saved.param_groups[0]["params"])
    opened_run.optimizer = wrapped(fresh)
    assert resume.load_position(opened_run, checkpoint) == Position(1, 0, planned_steps=9)
    assert saved.state.keys() == fresh.state.keys() != set()
    for parameter, state in saved.state.items():
        assert all(torch.equal(state[key], fresh.state[parameter][key]) for key in state)


@pytest.mark.parametrize(
    "step, message",
    [
        (10, "the run has 9 steps"),
        (-1, "not a number of steps"),
        (True, "not a number of steps"),
        (1.5, "not a number of steps"),
    ],
)
def test_an_impossible_step_is_refused(opened_run, step, message):
    checkpoint = save_at(opened_run, 1)
    change_state(checkpoint, step=step)
    with pytest.raises(InputError, match=f"state.json.*{message}"):
        resume.load_position(opened_run, checkpoint)


@pytest.mark.parametrize("count", [-1, True, None, "0"])
def test_an_impossible_count_of_bad_steps_is_refused(opened_run, count):
    checkpoint = save_at(opened_run, 1)
    change_state(checkpoint, bad_steps=count)
    with pytest.raises(InputError, match='state.json: "bad_steps" is not a count'):
        resume.load_position(opened_run, checkpoint)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda name, tensor: {name: torch.full_like(tensor, float("nan"))}, "not finite"),
        (lambda name, tensor: {name: tensor.reshape(-1, 1).clone()}, "AdamW"),
        (lambda name, tensor: {}, "AdamW"),
        (lambda name, tensor: {name: tensor.to(torch.int32)}, "int32"),
        (lambda name, tensor: {"stranger/" + name: tensor}, "other parameters"),
    ],
)
def test_an_unsuitable_optimizer_state_is_refused(opened_run, change, message):
    checkpoint = save_at(opened_run, 1)
    path = checkpoint / "state.safetensors"
    tensors = load_file(path)
    name = "projector.linear_1.bias/exp_avg"
    save_file({k: v for k, v in tensors.items() if k != name} | change(name, tensors[name]), path)
    with pytest.raises(InputError, match=f"state.safetensors.*{message}"):
        resume.load_position(opened_run, checkpoint)


def test_a_loss_scaler_of_another_precision_is_refused(opened_run):
    """Only fp16 keeps a scaler, and without its state the run would continue differently."""
    checkpoint = save_at(opened_run, 1)
    change_state(checkpoint, scaler={"scale": 1.0})
    with pytest.raises(InputError, match='"scaler" does not fit this precision'):
        resume.load_position(opened_run, checkpoint)


def test_a_folder_with_an_odd_number_in_its_name_is_not_counted(tmp_path):
    (tmp_path / "previous-²").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "run.json").write_text('[{"config_sha256": ""}]')
    run_folder.move_aside(tmp_path)
    assert (tmp_path / "previous-1" / "metrics.jsonl").exists()
