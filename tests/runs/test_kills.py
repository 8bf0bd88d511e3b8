"""A run that is killed (SIGKILL) at any moment and started again ends as one that never was, to the last bit.
`sh tests/run.sh tests/test_kills.py`"""

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
from tests.starts import At, Start
from tests.toy_project import run_training, write_project

# Samples a step (4) do not divide those of an epoch (9); rows and checkpoints come together with validations and apart.
RUN = ("train.max_steps=12", "train.save_steps=2", "train.eval_steps=3", "train.logging_steps=2", "lora.dropout=0.2")
KILLED = -9
PLAIN = ("train.packing=off", "train.cache_features=off")  # else rows are packed, and features kept from the first on
KINDS = [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 2), ("plain", 2)]
KILLS = 5  # at random moments, of each kind


def arguments(kind: str, workers: int) -> tuple[str, ...]:
    more = ("train.precision=fp32", *PLAIN) if kind == "plain" else (f"train.precision={kind}",)
    return (*RUN, *more, f"train.num_workers={workers}")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Where nothing has run yet."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def references(project, tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """The folder of a run without a kill, by kind, and the seconds that it took."""
    found = {}
    assert Start(project, "--help").end() == 0  # from here on a start is a fork
    for kind in ("fp32", "bf16", "plain"):
        config = copied(project, tmp_path_factory.mktemp("whole") / "project")
        began = time.perf_counter()
        start = Start(config, *arguments(kind, 0))
        assert start.end() == 0, start.output()
        assert (config.parent / "qa.features").exists() == (kind != "plain")
        found[kind] = config.parent, time.perf_counter() - began
    return found


def copied(project: Path, folder: Path) -> Path:
    shutil.copytree(project.parent, folder)
    return folder / project.name


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith(("_per_s", "_mb"))} for row in rows]


def content(folder: Path) -> dict[str, bytes]:
    """A saved folder's files, but for those that say when it was made, and without the project's path."""
    verify_folder(folder)
    project = str(folder.parent.parent).encode()
    return {
        path.relative_to(folder).as_posix(): path.read_bytes().replace(project, b"")
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("config.yaml", "run.json", "manifest.json")
    }


def assert_same_end(folder: Path, reference: Path, saved=("checkpoint-10", "checkpoint-12", "best", "final")) -> None:
    """Trained weights, optimizer, metrics, samples, scores and the data: equal; and nothing half made lies about."""
    run, expected = folder / "run", reference / "run"
    assert metrics(run) == metrics(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    for name in saved:
        found, whole = content(run / name), content(expected / name)
        assert found.keys() == whole.keys() >= {"projector.safetensors", "adapter_model.safetensors"}
        assert [file for file in whole if found[file] != whole[file]] == [], name
    assert "state.safetensors" in content(run / saved[1]) and "scores.json" in content(run / "final")
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
        config = copied(project, tmp_path / str(attempts))
        while kills < KILLS:
            start = Start(config, *arguments(kind, workers))
            code = start.wait(moments.uniform(0, seconds))
            if code is not None:  # it came to its end before
                assert code == 0, start.output()
                break
            start.send(9)
            start.process.join()
            kills += 1
        assert Start(config, *arguments(kind, workers)).end() == 0
        assert_same_end(config.parent, reference)


# In the order in which a run comes by them; each is that of the start after the kill before.
MOMENTS = [
    At("open */.qa.jsonl.*"),  # the data are prepared: pictures verified, nothing written
    At("os.rename */qa.jsonl"),  # written aside
    At("os.rename */validation.jsonl"),  # one of two files has its name
    At("os.rename */qa.report.json"),  # all but the report
    At("os.rename */qa.jsonl.index.*"),  # its index is made
    At("os.rename */run.json"),  # the start is written down
    At(
        "zlib.crc32", 3
    ),  # the features of the first micro-batch are kept, the bytes of the next one's first are written
    At("zlib.crc32", 3),  # the same one micro-batch later, in the middle of the first epoch
    At("open */metrics.jsonl", 2),  # the first row is there
    At("open */.checkpoint-2.partial/state.json"),  # weights and optimizer are written
    At("open */.checkpoint-2.partial/manifest.json"),  # the whole checkpoint but its manifest, which is not flushed
    At("os.rename */checkpoint-2"),  # all but its name
    At("validate.count_targets"),  # the first validation
    At("train.questions_of"),  # its answers are to be made
    At("open */samples.jsonl", 2),  # one of them is written
    At("open */.best.partial/best.json"),  # the first best/
    At("os.rename */checkpoint-4"),  # best/ is of a step that is made again
    At("os.rename */metrics.jsonl"),  # rows after the checkpoint are dropped from one file of two
    At("os.rename */.best.replaced"),  # the second best/ takes the place of the first
    At("os.rename */best"),  # between the two renames
    At("os.rename */.checkpoint-2.partial"),  # an old checkpoint is about to be removed
    At("resume.prune_checkpoints"),  # not removed: now there are three
    At("step.count_targets", 3),  # in the middle of a step
    At("step.sum_gradients", 2),
    At("torch.optim.adam.adam"),  # in the optimizer's step
    At("open */.checkpoint-12.partial/config.yaml"),
    At("os.rename */final"),  # trained to the end
    At("train.answer_shared"),  # the scoring
    At("train.answer_shared", 2),  # with pictures done, with swapped ones not
    At("open */.final.partial/scores.json"),
    At("os.rename */final"),  # between the renames: final/ is gone
]


def test_kills_at_chosen_moments(project, references, tmp_path):
    """Also with what a power cut leaves of a row that was being written."""
    precision, workers = "bf16", 2
    config = copied(project, tmp_path / "project")
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
# Going on is a jump


def test_a_start_in_the_middle_reads_nothing_before_it(project, tmp_path, monkeypatch):
    config = copied(project, tmp_path / "project")
    options = ("train.max_steps=6", "train.save_steps=4", "train.eval_steps=null", "train.score_samples=1")
    run_training(config, *options)
    shutil.rmtree(config.parent / "run" / "checkpoint-6")
    monkeypatch.setattr(train, "finish", lambda run: None)  # it reads what is held out
    positions, read = [], []
    at, read_sample = SampleOrder.at, QADataset.read
    monkeypatch.setattr(SampleOrder, "at", lambda order, position: (positions.append(position), at(order, position))[1])
    monkeypatch.setattr(
        QADataset, "read", lambda data, key, *rest: (read.append(key), read_sample(data, key, *rest))[1]
    )
    run_training(config, *options)
    assert positions == list(range(4 * 4, 6 * 4)), "two steps of four samples"
    assert len(read) == len(positions)


def test_the_start_of_a_far_step_makes_one_permutation(monkeypatch):
    """Nothing is counted up to it, neither samples nor epochs."""
    made, permute = [], SampleOrder._permute
    monkeypatch.setattr(SampleOrder, "_permute", lambda order, epoch: (made.append(epoch), permute(order, epoch))[1])
    order = SampleOrder(np.arange(1000), 3, np.ones(1000))
    step = 10**9
    next(micro_batches(order, range(step, step + 1), 4, 2, 0, 1))
    assert made == [step * 8 // 1000]
