"""A run that is killed (SIGKILL) at any moment and started again ends bit for bit like an uninterrupted one.
`sh tests/run.sh tests/runs/test_kills.py`"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import train
from dataset.loader import QADataset
from dataset.order import SampleOrder, micro_batches
from model.checkpoint_folder import verify_folder
from tests.spy import spy
from tests.starts import At, Start
from tests.toy_project import run_training, write_project

# A step's 4 samples do not divide an epoch's 9. Rows, checkpoints and evaluations coincide in some steps only.
RUN = ("train.max_steps=12", "train.save_steps=2", "train.eval_steps=3", "train.logging_steps=2", "lora.dropout=0.2")
KILLED = -9
PLAIN = ("train.packing=off", "train.cache_features=off")  # the other kinds pack rows and cache features
KINDS = [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 2), ("plain", 2)]
KILLS = 5  # of each kind, at random moments


def arguments(kind: str, workers: int) -> tuple[str, ...]:
    more = ("train.precision=fp32", *PLAIN) if kind == "plain" else (f"train.precision={kind}",)
    return (*RUN, *more, f"train.num_workers={workers}")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The config of a project in which nothing has run yet."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def references(project, tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """By kind: the project's folder after an uninterrupted run, and the seconds that it took."""
    found = {}
    assert Start(project, "--help").end() == 0  # starts the fork server, so that the next starts only fork
    for kind in ("fp32", "bf16", "plain"):
        config = copy_project(project, tmp_path_factory.mktemp("whole") / "project")
        began = time.perf_counter()
        start = Start(config, *arguments(kind, 0))
        assert start.end() == 0, start.output()
        assert (config.parent / "qa.features").exists() == (kind != "plain")
        found[kind] = config.parent, time.perf_counter() - began
    return found


def copy_project(project: Path, folder: Path) -> Path:
    """Copy a project into `folder`, and return the path of its config.yaml there."""
    shutil.copytree(project.parent, folder)
    return folder / project.name


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(("_per_s", "_mb"))} for row in rows]


def saved_files(folder: Path) -> dict[str, bytes]:
    """Return a saved folder's files without the project's path, except those that hold times."""
    verify_folder(folder)
    project = str(folder.parent.parent).encode()
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(project, b"")
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("config.yaml", "run.json", "manifest.json")
    }


def assert_same_end(folder: Path, reference: Path, saved=("checkpoint-10", "checkpoint-12", "best", "final")) -> None:
    """Assert that two runs have equal weights, optimizer, metrics, samples, scores and data, and the same files."""
    run, expected = folder / "run", reference / "run"
    assert metrics(run) == metrics(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    for name in saved:
        found, whole = saved_files(run / name), saved_files(expected / name)
        assert found.keys() == whole.keys() >= {"projector.safetensors", "adapter_model.safetensors"}
        assert [file for file in whole if found[file] != whole[file]] == [], name
    assert "state.safetensors" in saved_files(run / saved[1]) and "scores.json" in saved_files(run / "final")
    for name in ("qa.jsonl", "validation.jsonl"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in expected.iterdir()}


@pytest.mark.parametrize("kind, workers", KINDS)
def test_kills_at_random_moments(project, references, tmp_path, kind, workers):
    reference, seconds = references[kind]
    moments = random.Random(f"{kind}-{workers}")
    kills = attempts = 0
    while kills < KILLS:
        attempts += 1
        config = copy_project(project, tmp_path / str(attempts))
        while kills < KILLS:
            start = Start(config, *arguments(kind, workers))
            code = start.wait(moments.uniform(0, seconds))
            if code is not None:  # it ended before the kill
                assert code == 0, start.output()
                break
            start.send(9)
            start.process.join()
            kills += 1
        assert Start(config, *arguments(kind, workers)).end() == 0
        assert_same_end(config.parent, reference)


# In the order in which a run reaches them. Each counts from the start that follows the kill before it.
MOMENTS = [
    At("open */.qa.jsonl.*"),  # while data are prepared: images are verified, nothing is written
    At("os.rename */qa.jsonl"),  # written under a temporary name
    At("os.rename */validation.jsonl"),  # one of two files has its final name
    At("os.rename */qa.report.json", 2),  # everything but the report that says so
    At("os.rename */qa.jsonl.index.*"),  # the index is written under a temporary name
    At("os.rename */run.json"),  # the start is about to be recorded
    At("zlib.crc32", 3),  # the first micro-batch's features are cached, the next one's first are half written
    At("zlib.crc32", 3),  # the same one micro-batch later, within the first epoch
    At("open */metrics.jsonl", 2),  # the first row is written
    At("open */.checkpoint-2.partial/state.json"),  # weights and optimizer are written
    At("open */.checkpoint-2.partial/manifest.json"),  # everything but the manifest, not flushed
    At("os.rename */checkpoint-2"),  # everything but the final name
    At("evaluation.validation._batch_sums"),  # in the first evaluation
    At("training.held_out.questions_of"),  # before its answers
    At("open */samples.jsonl", 2),  # one of them is written
    At("open */.best.partial/best.json"),  # in the first best/
    At("os.rename */checkpoint-4"),  # best/ is of a step that will be repeated
    At("os.rename */metrics.jsonl"),  # rows after the checkpoint are dropped from one of two files
    At("os.rename */.best.replaced"),  # the second best/ is about to replace the first
    At("os.rename */best"),  # between its two renames
    At("os.rename */.checkpoint-2.partial"),  # an old checkpoint is about to be removed
    At("training.resume.prune_checkpoints"),  # it was not removed: now there are three
    At("training.step.seed_dropout", 2),  # in the middle of a step, with one micro-batch's gradients
    At("train.sum_gradients", 2),
    At("torch.optim.adam.adam"),  # in the optimizer's step
    At("open */.checkpoint-12.partial/config.yaml"),
    At("os.rename */final"),  # trained to the end
    At("training.held_out.answer_shared"),  # in the scoring
    At("training.held_out.answer_shared", 2),  # own images are done, swapped ones are not
    At("open */.final.partial/scores.json"),
    At("os.rename */final"),  # between the renames: final/ is absent
]


def test_kills_at_chosen_moments(project, references, tmp_path):
    """Each kill also leaves a half-written row in the logs, as a power cut does."""
    precision, workers = "bf16", 2
    config = copy_project(project, tmp_path / "project")
    for i, moment in enumerate(MOMENTS):
        start = Start(config, *arguments(precision, workers), at=[moment])
        assert start.end() == KILLED, (moment, start.output())
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (config.parent / "run" / name).exists():
                with open(config.parent / "run" / name, "ab") as file:
                    file.write('{"step": 3, "text": "绿'.encode()[: 5 + 7 * (i % 4)])
    start = Start(config, *arguments(precision, workers))
    assert start.end() == 0, start.output()
    assert "Traceback" not in start.output()
    assert_same_end(config.parent, references[precision][0])


# ---------------------------------------------------------------------------------------------------------------------
# Resuming reads nothing of earlier steps


def test_a_resumed_run_reads_no_earlier_sample(project, tmp_path, monkeypatch):
    config = copy_project(project, tmp_path / "project")
    options = ("train.max_steps=6", "train.save_steps=4", "train.eval_steps=null", "train.score_samples=1")
    run_training(config, *options)
    shutil.rmtree(config.parent / "run" / "checkpoint-6")
    monkeypatch.setattr(train, "score_held_out", lambda run: None)  # it reads the held-out records
    positions = spy(monkeypatch, SampleOrder, "at", lambda order, position: position)
    read = spy(monkeypatch, QADataset, "read", lambda dataset, key, *_: key)
    run_training(config, *options)
    assert positions == list(range(4 * 4, 6 * 4))  # two steps of four samples
    assert len(read) == len(positions)


def test_a_distant_step_makes_one_permutation(monkeypatch):
    """The order seeks to it directly, without counting samples or epochs."""
    made = spy(monkeypatch, SampleOrder, "_permute", lambda order, epoch: epoch)
    order = SampleOrder(np.arange(1000), 3, np.ones(1000))
    step = 10**9
    next(micro_batches(order, range(step, step + 1), batch_size=4, accumulation=2))
    assert made == [step * 8 // 1000]
