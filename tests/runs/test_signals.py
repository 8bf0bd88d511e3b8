"""Ctrl-C and SIGTERM to train.py: the step is finished, saved, and the next start goes on as if nothing had been; at any
other moment a short message. `sh tests/run.sh tests/test_signals.py`"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.checkpoint_folder import checkpoints, step_of, verify_folder
from tests.starts import SECONDS, At, Start
from tests.test_kills import assert_same_end, copied
from tests.toy_project import write_project

ROOT = Path(__file__).parent.parent
RUN = ("train.max_steps=6", "train.save_steps=5", "train.save_total_limit=null", "lora.dropout=0.2")
INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    config = write_project(tmp_path_factory.mktemp("project"))
    assert Start(config, "--help").end() == 0  # from here on a start is a fork
    return config


@pytest.fixture(scope="module")
def reference(project, tmp_path_factory) -> Path:
    """The folder of a run that no signal reached."""
    config = copied(project, tmp_path_factory.mktemp("whole") / "project")
    start = Start(config, *RUN)
    assert start.end() == 0, start.output()
    return config.parent


@pytest.fixture
def config(project, tmp_path) -> Path:
    return copied(project, tmp_path / "project")


def assert_short(output: str) -> None:
    """No traceback, from any process; nothing that somebody would take for a fault."""
    for word in ("Traceback", "Exception ignored", "Error", "error:", "leaked"):
        assert word not in output, output


def assert_goes_on(config: Path, reference: Path, *options: str, saved_at: int | None = None) -> None:
    """The same command ends the run as if it had not been stopped. saved_at: the checkpoint that the stop made."""
    start, run = Start(config, *RUN, *options), config.parent / "run"
    assert start.end() == 0, start.output()
    if saved_at is not None:
        assert f"going on from {run}/checkpoint-{saved_at} at step {saved_at} of 6" in start.output()
        if saved_at < 5:
            shutil.rmtree(run / f"checkpoint-{saved_at}")
    assert_same_end(config.parent, reference, ("checkpoint-5", "checkpoint-6", "best", "final"))


# ---------------------------------------------------------------------------------------------------------------------
# While it trains


@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize("to_group, workers", [(False, 0), (True, 2)])
def test_a_signal_finishes_the_step_and_saves(config, reference, number, to_group, workers):
    """Also to the whole group with the loader's workers, as a terminal, torchrun, timeout and job schedulers send it."""
    options = f"train.num_workers={workers}"
    start = Start(config, *RUN, options, at=[At("step.sum_gradients", 2, number, to_group)])
    assert start.end() == 128 + number, start.output()
    assert start.output().count("this step is finished and saved first") == 1
    assert "stopped after step 2 of 6. It is saved; the same command goes on from there." in start.output()
    assert_short(start.output())
    assert [path.name for path in checkpoints(config.parent / "run")] == ["checkpoint-2"]
    assert_goes_on(config, reference, options, saved_at=2)


@pytest.mark.parametrize(
    "place, saved_at",
    [
        ("validate.count_targets", 4),  # a validation: the step after it is still made
        ("os.rename */checkpoint-5", 6),
        ("os.rename */checkpoint-6", 6),  # of the last step: the scoring does not begin
    ],
)
def test_a_signal_while_it_validates_or_saves_is_heard(config, reference, place, saved_at):
    start = Start(config, *RUN, at=[At(place, 1, TERM)])
    assert start.end() == 128 + TERM, start.output()
    assert f"stopped after step {saved_at} of 6" in start.output()
    assert_short(start.output())
    assert not (config.parent / "run" / "final").exists()
    assert_goes_on(config, reference, saved_at=saved_at)


@pytest.mark.parametrize("place", ["step.sum_gradients", "os.rename */checkpoint-2"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_ctrl_c_stops_at_once(config, reference, place, workers):
    """In the step, or while the first one's checkpoint is being saved. A SIGTERM before it counts as the first."""
    options = f"train.num_workers={workers}"
    first = At("step.sum_gradients", 2, INT if workers else TERM, to_group=True)
    second = At(place, 2 if place == first.place else 1, INT)
    start = Start(config, *RUN, options, at=[first, second])
    assert start.end() == 128 + INT, start.output()
    assert start.output().endswith("interrupted\n") and "stopped after" not in start.output()
    assert_short(start.output())
    left = [path.name for path in (config.parent / "run").iterdir()]
    assert not [name for name in left if "checkpoint" in name], "nothing half written"
    assert_goes_on(config, reference, options)


def test_a_second_sigterm_is_not_impatience(config, reference):
    """torchrun passes a Ctrl-C on as SIGTERM, which may come from the terminal as well."""
    start = Start(config, *RUN, at=[At("step.sum_gradients", 2, INT), At("os.rename */checkpoint-2", 1, TERM)])
    assert start.end() == 128 + INT, start.output()
    assert_short(start.output())
    assert_goes_on(config, reference, saved_at=2)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


@pytest.mark.parametrize("number, said", [(INT, "interrupted\n"), (TERM, "terminated; the same command goes on\n")])
@pytest.mark.parametrize(
    "place",
    [
        "open */images/3.png",  # pictures are verified, in threads
        "os.rename */validation.jsonl",  # the data are prepared
        "train.build",
        "os.rename */run.json",
        "train.answer_shared",  # the scoring
        "open */.final.partial/scores.json",
    ],
)
def test_a_signal_at_another_moment_is_one_line(config, reference, number, said, place):
    start = Start(config, *RUN, at=[At(place, 1, number)])
    assert start.end() == 128 + number, start.output()
    assert start.output().endswith("\n" + said) or start.output() == said
    assert_short(start.output())
    assert not list((config.parent / "run").glob(".*.partial")), "what is half written is removed"
    assert_goes_on(config, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, two processes, and train.py as a command


def test_a_second_run_in_the_folder_is_refused_and_the_first_unharmed(config, reference):
    first = Start(config, *RUN, at=[At("train.evaluate", 1, signal.SIGSTOP)])
    while Path(f"/proc/{first.process.pid}/stat").read_text().split()[2] != "T":  # stopped
        assert first.wait(0.05) is None, first.output()
    for _ in range(2):
        second = Start(config, *RUN, log=config.parent / "second.txt")
        assert second.end() == 2
    assert (
        f"error: {config.parent / 'run'}: another run writes there (process {first.process.pid} on" in second.output()
    )
    assert "Traceback" not in second.output()
    first.send(signal.SIGCONT)
    assert first.end() == 0, first.output()
    assert_same_end(config.parent, reference, ("checkpoint-5", "checkpoint-6", "best", "final"))


LONG = ("train.max_steps=5000", "train.save_steps=null", "train.eval_steps=null", "train.num_workers=2")


def launch(config: Path, *before: str) -> subprocess.Popen:
    """The real command, once it has taken some steps."""
    rows = config.parent / "run" / "metrics.jsonl"
    known = len(rows.read_bytes()) if rows.exists() else 0
    with open(config.parent / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, *before, str(ROOT / "train.py"), "--config", str(config), *LONG],
            stdout=log, stderr=log, cwd=config.parent, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    while not rows.exists() or len(rows.read_bytes()) <= known + 500:
        assert process.poll() is None, (config.parent / "log.txt").read_text()
        time.sleep(0.05)
    return process


def ranks_of(launcher: int) -> dict[str, int]:
    """RANK -> process id of torchrun's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    variables = {int(pid): Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    return {v.removeprefix("RANK="): pid for pid, found in variables.items() for v in found if v.startswith("RANK=")}


def saved_step(config: Path, at_least: int) -> int:
    """The one checkpoint of a stopped run, whole and as said."""
    (folder,) = [path for path in checkpoints(config.parent / "run") if step_of(path) > at_least]
    verify_folder(folder)
    assert f"stopped after step {step_of(folder)} of 5000" in (config.parent / "log.txt").read_text()
    return step_of(folder)


def test_the_command_stops_for_ctrl_c_and_goes_on_and_stops_for_sigterm(config):
    process = launch(config)
    os.killpg(process.pid, INT)  # as a terminal does
    assert process.wait(SECONDS) == 128 + INT
    step = saved_step(config, 0)
    process = launch(config)
    process.send_signal(TERM)
    assert process.wait(SECONDS) == 128 + TERM
    output = (config.parent / "log.txt").read_text()
    assert f"going on from {config.parent / 'run'}/checkpoint-{step} at step {step} of 5000" in output
    saved_step(config, step)
    assert_short(output)


def test_sigterm_to_one_of_two_processes_or_to_torchrun_saves_and_stops_both(config):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = launch(config, *torchrun)
    ranks = ranks_of(process.pid)
    os.kill(ranks["1"], TERM)
    assert process.wait(SECONDS) != 0
    step = saved_step(config, 0)
    process = launch(config, *torchrun)
    ranks |= {f"again {rank}": pid for rank, pid in ranks_of(process.pid).items()}
    process.send_signal(TERM)
    assert process.wait(SECONDS) != 0
    saved_step(config, step)
    assert len(ranks) == 4 and not [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()]
    output = (config.parent / "log.txt").read_text()
    assert f"going on from {config.parent / 'run'}/checkpoint-{step} at step {step} of 5000" in output
    assert 'train.py", line' not in output, "no traceback but torchrun's own"
