"""train.py with one config on one, two and four processes: the same samples, losses and weights, and all processes handle
a fault together. `sh tests/run.sh tests/runs/test_ranks.py`

The processes are real (torchrun, gloo). This file is also the program that they run, once with two and once with four
processes; it calls train.py's main several times.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import training.log
import training.run
from config import load_config, run_script
from dataprocess.process_image import prepare_from_config
from model.model import VisionLanguageModel
from tests.toy_project import run_training, write_project

ROOT = Path(__file__).parents[2]
COMMON = (
    "train.eval_steps=null", "train.score_samples=1", "train.save_total_limit=null", "train.max_steps=3",
    "train.save_steps=1", "data.sources=[]", "train.max_bad_steps=9",
)  # fmt: skip
FULL = ("train.trainable.language_model=full", "train.lora_lr=null", "train.language_model_lr=1e-4")
NO_DROPOUT = "lora.dropout=0"  # dropout is seeded per micro-batch, and some of these runs have other micro-batches


def sizes(batch: int, accumulation: int) -> tuple[str, str]:
    return f"train.per_device_train_batch_size={batch}", f"train.gradient_accumulation_steps={accumulation}"


# name -> what differs from the project's config
RUNS = {
    "1x4": (*sizes(1, 4), "train.cache_features=off"),
    "1x4 no dropout": (*sizes(1, 4), NO_DROPOUT),
    "4x1": (*sizes(4, 1), NO_DROPOUT),
    "padded": (*sizes(2, 2), NO_DROPOUT, "train.packing=off"),
    "mixed": (*sizes(1, 4), "data.qa_file=mixed.jsonl"),  # one record in three has no image
    # Wrong features must not stay in the cache. From a calibrated start one gradient is so near zero that Adam enlarges its
    # rounding beyond the bound.
    "bad": (*sizes(1, 4), "train.cache_features=off", "train.projector_start=random"),
    "gone": (*sizes(1, 4), "data.qa_file=gone.jsonl", "data.on_bad_image=skip"),
    "crowded": (*sizes(2, 2), NO_DROPOUT),
    "full": (*sizes(1, 4), *FULL),
    "lora": (*sizes(1, 4), "data.qa_file=mixed.jsonl", "train.activation_checkpointing=on"),
}
SHARDED = ("full", "lora")
ON_FOUR = ("1x4", "4x1")


def write_files(folder: Path) -> Path:
    """Write the project and two more QA files: one has records without an image, one has missing image files."""
    config = write_project(folder)
    prepare_from_config(load_config(config, []))
    records = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()]
    mixed = [record if i % 3 else without_image(record) for i, record in enumerate(records)]
    gone = [record | {"image": "images/none.png"} if i % 4 == 1 else record for i, record in enumerate(records)]
    for name, rows in (("mixed", mixed), ("gone", gone)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return config


def without_image(record: dict) -> dict:
    turns = [turn | {"content": turn["content"].replace("<image>\n", "")} for turn in record["conversations"]]
    return {key: value for key, value in record.items() if key != "image"} | {"conversations": turns}


# ---------------------------------------------------------------------------------------------------------------------
# The program of every process


@contextlib.contextmanager
def faults(name: str):
    """Cause the fault of the run `name`, if it has one."""
    with pytest.MonkeyPatch.context() as patched:
        read, forward = training.run.read_pixels, VisionLanguageModel.forward
        if name == "bad":  # one record's image is NaN, which only the process that has it can see

            def poisoned(processor, path):
                return read(processor, path) * (math.nan if path.name == "3.png" else 1.0)

            patched.setattr(training.run, "read_pixels", poisoned)
        if "crowded" in name and os.environ.get("RANK") == "1":  # the other process has enough memory

            def crowded(self, **inputs):
                # one image per sample
                images = inputs["patch_features"] if "patch_features" in inputs else inputs["pixel_values"]
                if torch.is_grad_enabled() and len(images) > (name == "crowded"):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return forward(self, **inputs)

            patched.setattr(VisionLanguageModel, "forward", crowded)
        yield


def run(config: Path, folder: Path, name: str, *arguments: str) -> None:
    """Train the run `name` into folder/name. `full-resumed` has the settings of `full`."""
    difference = [value.replace("qa_file=", f"qa_file={config.parent}/") for value in RUNS[name.split("-")[0]]]
    with faults(name):
        run_training(config, f"output_dir={folder / name}", *COMMON, *difference, *arguments)


def work(folder: Path, only: str = "") -> None:
    """Train this number of processes' runs, or only one of them, sharded. Torchrun starts this in every process."""
    torch.set_num_threads(1)
    training.log.draw_curves = lambda runs, image: None
    end = dist.destroy_process_group
    # keep one process group for all runs: a second one would read the first one's addresses from torchrun's store
    dist.destroy_process_group = lambda *_: None
    config, ranks = folder / "config.yaml", os.environ["WORLD_SIZE"]
    results = folder / ranks
    if only:
        run_script(lambda: run(config, results, only, "train.fsdp=true"))
    for name in RUNS if ranks == "2" else ON_FOUR:
        sharded = ["train.fsdp=true"] if name in SHARDED else []
        run(config, results, name, *sharded)
    if ranks == "2":
        for name in ("1x4", "full"):
            run(config, results, f"{name}-resumed", *(["train.fsdp=true"] if name in SHARDED else []))
    end()


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the runs on one, two and four processes in 1/, 2/ and 4/."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_files(folder)
    for name in RUNS:
        run(config, folder / "1", name)
    for name in ("1x4", "full"):
        copy_first_checkpoint(folder / "1" / name, folder / "2" / f"{name}-resumed")
    for ranks in (2, 4):
        launch(ranks, folder, check=True)
    return folder


def copy_first_checkpoint(source: Path, target: Path) -> None:
    """Make a run's folder as it was after the first step of `source`."""
    target.mkdir(parents=True)
    shutil.copytree(source / "checkpoint-1", target / "checkpoint-1")


def launch(ranks: int, *arguments, **options) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [*torchrun, "--module", "tests.runs.test_ranks", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, **options,
    )  # fmt: skip


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}/{key}": t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def assert_same(one: Path, other: Path) -> None:
    """Assert that losses, norms and counts of each step of `other` are equal in both, and weights and optimizers too."""
    expected, found = rows(one), rows(other)
    steps = [row["step"] for row in found]
    expected = [row for row in expected if row["step"] in steps]
    assert [row["step"] for row in expected] == steps and steps[-1] == 3
    for key in ("targets", "skipped_steps", "replaced_records", "epoch"):
        assert [row[key] for row in found] == [row[key] for row in expected], key
    for key in ("loss", "grad_norm"):
        wanted = [row[key] for row in expected]
        assert [value is None for value in wanted] == [row[key] is None for row in found]
        assert [row[key] or 0 for row in found] == pytest.approx([value or 0 for value in wanted], rel=1e-6), key
    a, b = (tensors(folder / "checkpoint-3") for folder in (one, other))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does(folder, name):
    """`full` and `lora` are sharded. In `crowded`, only one of the processes splits its micro-batches."""
    assert_same(folder / "1" / name, folder / "2" / name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_train_as_one_does(folder, name):
    """4x1: the four samples of a batch without accumulation are divided among the processes."""
    assert_same(folder / "1" / name, folder / "4" / name)


@pytest.mark.parametrize("name", ["1x4", "full"])
def test_two_processes_resume_a_run_of_one(folder, name):
    assert rows(folder / "2" / f"{name}-resumed")[0]["step"] == 2
    assert_same(folder / "1" / name, folder / "2" / f"{name}-resumed")


@pytest.mark.parametrize("name", ["1x4", "full", "lora"])
def test_one_process_resumes_a_run_of_two(folder, name):
    """Sharded (`full`, `lora`) or not."""
    copy_first_checkpoint(folder / "2" / name, folder / "1" / f"{name}-resumed")
    run(folder / "config.yaml", folder / "1", f"{name}-resumed")
    assert_same(folder / "2" / name, folder / "1" / f"{name}-resumed")


@pytest.mark.parametrize("name", ["1x4 no dropout", "crowded", "padded"])
def test_a_step_does_not_depend_on_its_rows(folder, name):
    """Samples packed into four rows, two or one, or padded give the same losses and weights."""
    assert_same(folder / "1" / "4x1", folder / "1" / name)


def test_a_bad_step_on_one_process_is_skipped_by_all(folder):
    for ranks in "12":
        bad = rows(folder / ranks / "bad", "skipped")
        assert bad and all("train:r3" in row["records"] and len(row["records"]) == 4 for row in bad)
    assert [row["step"] for row in bad] == [row["step"] for row in rows(folder / "2" / "bad") if row["skipped_steps"]]


def test_replaced_records_are_the_same_on_one_and_on_two(folder):
    one, two = (rows(folder / ranks / "gone", "skipped") for ranks in "12")
    assert [(row["step"], sorted(row["records"])) for row in one] == [(r["step"], sorted(r["records"])) for r in two]
    logged = sum(row["replaced_records"] for row in rows(folder / "2" / "gone"))
    assert sum(len(row["records"]) for row in one) == logged > 0


def test_out_of_memory_in_one_process_of_a_sharded_model_ends_the_run(folder):
    """The other processes wait inside a forward pass, so the step cannot be retried."""
    ended = launch(2, folder, "full-crowded", capture_output=True, text=True)
    assert ended.returncode != 0 and not (folder / "2" / "full-crowded" / "final").exists()
    assert ended.stderr.count("error: out of memory with 1 samples at once, and a sharded model") == 1
    assert "Traceback" not in ended.stderr.split("error: out of memory")[0]


def test_the_runs_differ_as_intended(folder):
    assert (folder / "mixed.jsonl").read_text().count("<image>") == 6 and len(rows(folder, "mixed")) == 9
    losses = {name: tuple(round(row["loss"] or 0, 4) for row in rows(folder / "1" / name)) for name in RUNS}
    cut = {losses.pop(name) for name in ("1x4 no dropout", "4x1", "padded", "crowded")}
    assert len(cut) == 1, "one run with four kinds of rows"
    assert losses.pop("lora") == losses["mixed"], "equal except for activation checkpointing"
    assert len(set(losses.values())) == len(losses)


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
