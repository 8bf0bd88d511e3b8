"""Ctrl-C and SIGTERM to train.py: it finishes and saves the step, and the next start resumes as if uninterrupted. Before
and after training it ends with a short message. `sh tests/run.sh tests/runs/test_signals.py`"""

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
from tests.runs.test_kills import assert_same_end, copy_project
from tests.starts import SECONDS, At, Start
from tests.toy_project import write_project

ROOT = Path(__file__).parents[2]
RUN = ("train.max_steps=6", "train.save_steps=5", "train.save_total_limit=null", "lora.dropout=0.2")
INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    config = write_project(tmp_path_factory.mktemp("project"))
    assert Start(config, "--help").end() == 0  # starts the fork server, so that the next starts only fork
    return config


@pytest.fixture(scope="module")
def reference(project, tmp_path_factory) -> Path:
    """The project's folder after a run without a signal."""
    config = copy_project(project, tmp_path_factory.mktemp("whole") / "project")
    start = Start(config, *RUN)
    assert start.end() == 0, start.output()
    return config.parent


@pytest.fixture
def config(project, tmp_path) -> Path:
    return copy_project(project, tmp_path / "project")


def assert_short(output: str) -> None:
    """Assert that no process printed a traceback or anything that looks like an error."""
    for word in ("Traceback", "Exception ignored", "Error", "error:", "leaked"):
        assert word not in output, output


def assert_resumes(config: Path, reference: Path, *options: str, saved_at: int | None = None) -> None:
    """Assert that the same command ends the run as if it had not been stopped. saved_at: the checkpoint of the stop."""
    start, run = Start(config, *RUN, *options), config.parent / "run"
    assert start.end() == 0, start.output()
    if saved_at is not None:
        assert f"resuming from {run}/checkpoint-{saved_at} at step {saved_at} of 6" in start.output()
        if saved_at < 5:
            shutil.rmtree(run / f"checkpoint-{saved_at}")
    assert_same_end(config.parent, reference, ("checkpoint-5", "checkpoint-6", "best", "final"))


# ---------------------------------------------------------------------------------------------------------------------
# During training


@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize("to_group, workers", [(False, 0), (True, 2)])
def test_a_signal_finishes_the_step_and_saves(config, reference, number, to_group, workers):
    """to_group: terminals, torchrun, timeout and job schedulers send it to the loader's workers too."""
    options = f"train.num_workers={workers}"
    start = Start(config, *RUN, options, at=[At("train.sum_gradients", 2, number, to_group)])
    assert start.end() == 128 + number, start.output()
    assert start.output().count("stopping after this step, which is finished and saved first") == 1
    assert "stopped after step 2 of 6. It is saved; the same command resumes there." in start.output()
    assert_short(start.output())
    assert [path.name for path in checkpoints(config.parent / "run")] == ["checkpoint-2"]
    assert_resumes(config, reference, options, saved_at=2)


@pytest.mark.parametrize(
    "place, saved_at",
    [
        ("evaluation.validation._batch_sums", 4),  # in the evaluation after step 3: one more step is made
        ("os.rename */checkpoint-5", 6),
        ("os.rename */checkpoint-6", 6),  # after the last step: the scoring does not begin
    ],
)
def test_a_signal_during_evaluation_or_saving_stops_the_run(config, reference, place, saved_at):
    start = Start(config, *RUN, at=[At(place, 1, TERM)])
    assert start.end() == 128 + TERM, start.output()
    assert f"stopped after step {saved_at} of 6" in start.output()
    assert_short(start.output())
    assert not (config.parent / "run" / "final").exists()
    assert_resumes(config, reference, saved_at=saved_at)


@pytest.mark.parametrize("place", ["train.sum_gradients", "os.rename */checkpoint-2"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_ctrl_c_stops_at_once(config, reference, place, workers):
    """In the step, or while the checkpoint is being saved. The first signal may also be a SIGTERM."""
    options = f"train.num_workers={workers}"
    first = At("train.sum_gradients", 2, INT if workers else TERM, to_group=True)
    second = At(place, 2 if place == first.place else 1, INT)
    start = Start(config, *RUN, options, at=[first, second])
    assert start.end() == 128 + INT, start.output()
    assert start.output().endswith("interrupted\n") and "stopped after" not in start.output()
    assert_short(start.output())
    assert not [path for path in (config.parent / "run").iterdir() if "checkpoint" in path.name]  # none half written
    assert_resumes(config, reference, options)


def test_a_sigterm_after_ctrl_c_does_not_stop_at_once(config, reference):
    """torchrun sends its processes a SIGTERM after a Ctrl-C that the terminal has already sent them."""
    start = Start(config, *RUN, at=[At("train.sum_gradients", 2, INT), At("os.rename */checkpoint-2", 1, TERM)])
    assert start.end() == 128 + INT, start.output()
    assert_short(start.output())
    assert_resumes(config, reference, saved_at=2)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


TERMINATED = "terminated; the same command resumes (with --resume auto, the default)\n"


@pytest.mark.parametrize("number, line", [(INT, "interrupted\n"), (TERM, TERMINATED)])
@pytest.mark.parametrize(
    "place",
    [
        "open */images/3.png",  # in the threads that verify images
        "os.rename */validation.jsonl",  # while data are prepared
        "training.open.open_model",
        "os.rename */run.json",
        "training.held_out.answer_shared",  # in the scoring
        "open */.final.partial/scores.json",
    ],
)
def test_a_signal_outside_of_training_prints_one_line(config, reference, number, line, place):
    start = Start(config, *RUN, at=[At(place, 1, number)])
    assert start.end() == 128 + number, start.output()
    assert start.output().endswith("\n" + line) or start.output() == line
    assert_short(start.output())
    assert not list((config.parent / "run").glob(".*.partial"))  # half-written folders are removed
    assert_resumes(config, reference)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs, two processes, and train.py as a command


def test_a_second_run_in_the_folder_is_refused_without_harm_to_the_first(config, reference):
    first = Start(config, *RUN, at=[At("train.evaluate", 1, signal.SIGSTOP)])
    while Path(f"/proc/{first.pid}/stat").read_text().split()[2] != "T":  # stopped
        assert first.wait(0.05) is None, first.output()
    for _ in range(2):
        second = Start(config, *RUN, log=config.parent / "second.txt")
        assert second.end() == 2
    assert f"error: {config.parent / 'run'}: another run writes there (process {first.pid} on" in second.output()
    assert "Traceback" not in second.output()
    first.send(signal.SIGCONT)
    assert first.end() == 0, first.output()
    assert_same_end(config.parent, reference, ("checkpoint-5", "checkpoint-6", "best", "final"))


LONG = ("train.max_steps=5000", "train.save_steps=null", "train.eval_steps=null", "train.num_workers=2")


def launch(config: Path, *before: str) -> subprocess.Popen:
    """Start the real command, and return once it has logged some steps."""
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
    """Return RANK -> process id of torchrun's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    variables = {int(pid): Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    return {v.removeprefix("RANK="): pid for pid, found in variables.items() for v in found if v.startswith("RANK=")}


def saved_step(config: Path, at_least: int) -> int:
    """Return the step of a stopped run's one new checkpoint, after verifying it and the message about it."""
    (folder,) = [path for path in checkpoints(config.parent / "run") if step_of(path) > at_least]
    verify_folder(folder)
    assert f"stopped after step {step_of(folder)} of 5000" in (config.parent / "log.txt").read_text()
    return step_of(folder)


def test_the_command_stops_for_ctrl_c_then_resumes_and_stops_for_sigterm(config):
    process = launch(config)
    os.killpg(process.pid, INT)  # as a terminal does
    assert process.wait(SECONDS) == 128 + INT
    step = saved_step(config, 0)
    process = launch(config)
    process.send_signal(TERM)
    assert process.wait(SECONDS) == 128 + TERM
    output = (config.parent / "log.txt").read_text()
    assert f"resuming from {config.parent / 'run'}/checkpoint-{step} at step {step} of 5000" in output
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
    assert f"resuming from {config.parent / 'run'}/checkpoint-{step} at step {step} of 5000" in output
    assert 'train.py", line' not in output  # no traceback except torchrun's own
