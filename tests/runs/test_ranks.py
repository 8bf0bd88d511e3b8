"""train.py on one, two and four processes, with one config: the same samples, losses and weights, whoever computes them,
and the same faults handled by all of them. `sh tests/run.sh tests/test_ranks.py`

The processes are real (torchrun, gloo): this file is also what they run, once with two and once with four of them,
train.py's main several times in each.
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

from training import run as assemble
from config import load_config, run_script
from dataprocess.process_image import prepare_from_config
from training import log
from model.model import VisionLanguageModel
from tests.toy_project import run_training, write_project

ROOT = Path(__file__).parent.parent
COMMON = (
    "train.eval_steps=null", "train.score_samples=1", "train.save_total_limit=null", "train.max_steps=3",
    "train.save_steps=1", "data.sources=[]", "train.max_bad_steps=9",
)  # fmt: skip
FULL = ("train.trainable.language_model=full", "train.lora_lr=null", "train.language_model_lr=1e-4")
NO_DROPOUT = "lora.dropout=0"  # its numbers go by micro-batches, which are cut otherwise in some of these


def sizes(batch: int, accumulation: int) -> tuple[str, str]:
    return f"train.per_device_train_batch_size={batch}", f"train.gradient_accumulation_steps={accumulation}"


# name -> what differs from the project's config. `alone` runs all of them on one process.
RUNS = {
    "1x4": (*sizes(1, 4), "train.cache_features=off"),
    "1x4 still": (*sizes(1, 4), NO_DROPOUT),
    "4x1": (*sizes(4, 1), NO_DROPOUT),
    "padded": (*sizes(2, 2), NO_DROPOUT, "train.packing=off"),
    "mixed": (*sizes(1, 4), "data.qa_file=mixed.jsonl"),  # one record in three has no picture
    "bad": (*sizes(1, 4), "train.max_bad_steps=9", "train.cache_features=off"),  # what is wrong must not be kept
    "gone": (*sizes(1, 4), "data.qa_file=gone.jsonl", "data.on_bad_image=skip"),
    "crowded": (*sizes(2, 2), NO_DROPOUT),
    "full": (*sizes(1, 4), *FULL),
    "lora": (*sizes(1, 4), "data.qa_file=mixed.jsonl", "train.activation_checkpointing=on"),
}
SHARDED = ("full", "lora")
ON_FOUR = ("1x4", "4x1")


def write_files(folder: Path) -> Path:
    """The project, and two more QA files: one with records without a picture, one with pictures that are gone."""
    config = write_project(folder)
    prepare_from_config(load_config(config, []))
    records = [json.loads(line) for line in (folder / "qa.jsonl").read_text().splitlines()]
    mixed = [record if i % 3 else without_picture(record) for i, record in enumerate(records)]
    gone = [record | {"image": "images/none.png"} if i % 4 == 1 else record for i, record in enumerate(records)]
    for name, rows in (("mixed", mixed), ("gone", gone)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return config


def without_picture(record: dict) -> dict:
    turns = [turn | {"content": turn["content"].replace("<image>\n", "")} for turn in record["conversations"]]
    return {key: value for key, value in record.items() if key != "image"} | {"conversations": turns}


# ---------------------------------------------------------------------------------------------------------------------
# What is patched in every process


@contextlib.contextmanager
def faults(name: str):
    """What goes wrong in the run `name`."""
    with pytest.MonkeyPatch.context() as patched:
        read, forward = assemble.read_pixels, VisionLanguageModel.forward
        if name == "bad":  # one record's picture is no numbers: only the process that has it sees that

            def poisoned(processor, path):
                return read(processor, path) * (math.nan if path.name == "3.png" else 1.0)

            patched.setattr(assemble, "read_pixels", poisoned)
        if "crowded" in name and os.environ.get("RANK") == "1":  # the other has memory enough

            def crowded(self, **batch):
                pictures = batch.get("patch_features", batch.get("pixel_values"))  # one a sample
                if torch.is_grad_enabled() and len(pictures) > (name == "crowded"):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return forward(self, **batch)

            patched.setattr(VisionLanguageModel, "forward", crowded)
        yield


def run(config: Path, folder: Path, name: str, *arguments: str) -> None:
    """Train, into folder/name."""
    difference = [value.replace("qa_file=", f"qa_file={config.parent}/") for value in RUNS[name.split("-")[0]]]
    with faults(name):
        run_training(config, f"output_dir={folder / name}", *COMMON, *difference, *arguments)


def work(folder: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    runlog.draw_curves = lambda metrics, picture: None
    end = dist.destroy_process_group
    dist.destroy_process_group = lambda *_: (
        None
    )  # a second group could not find its peers: their old addresses stand there
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
# What is compared


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder/1, folder/2 and folder/4: the runs on so many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_files(folder)
    for name in RUNS:
        run(config, folder / "1", name)
    for name in ("1x4", "full"):
        take_up(folder / "1" / name, folder / "2" / f"{name}-resumed")
    for ranks in (2, 4):
        launch(ranks, folder, check=True)
    return folder


def take_up(source: Path, target: Path) -> None:
    """A run's folder as it was after its first step."""
    target.mkdir(parents=True)
    shutil.copytree(source / "checkpoint-1", target / "checkpoint-1")


def launch(ranks: int, *arguments, **options) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        "--module",
    ]
    return subprocess.run(
        [*command, "tests.test_ranks", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, **options,
    )  # fmt: skip


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name}/{key}": t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def assert_same(one: Path, other: Path) -> None:
    """Losses, norms and numbers of targets of every step; then weights and optimizer."""
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
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(folder, name):
    """`full` and `lora` are sharded on two; a process of `crowded` cuts its micro-batches, the other does not."""
    assert_same(folder / "1" / name, folder / "2" / name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_processes_do_what_one_does(folder, name):
    """4x1: a batch of four with nothing to accumulate is shared out, one sample each."""
    assert_same(folder / "1" / name, folder / "4" / name)


@pytest.mark.parametrize("name", ["1x4", "full"])
def test_a_run_of_one_process_goes_on_with_two(folder, name):
    assert rows(folder / "2" / f"{name}-resumed")[0]["step"] == 2
    assert_same(folder / "1" / name, folder / "2" / f"{name}-resumed")


@pytest.mark.parametrize("name", ["1x4", "full", "lora"])
def test_a_run_of_two_processes_goes_on_with_one(folder, name):
    """Sharded or not."""
    take_up(folder / "2" / name, folder / "1" / f"{name}-resumed")
    run(folder / "config.yaml", folder / "1", f"{name}-resumed")
    assert_same(folder / "2" / name, folder / "1" / f"{name}-resumed")


@pytest.mark.parametrize("name", ["1x4 still", "crowded", "padded"])
def test_a_step_is_the_same_however_its_samples_stand_in_rows(folder, name):
    """Packed into four rows, two or one, or padded: the same samples, so the same losses and weights."""
    assert_same(folder / "1" / "4x1", folder / "1" / name)


def test_a_bad_record_on_one_process_is_left_out_by_all(folder):
    for ranks in "12":
        bad = rows(folder / ranks / "bad", "skipped")
        assert bad and all("train:r3" in row["records"] and len(row["records"]) == 4 for row in bad)
    assert [row["step"] for row in bad] == [row["step"] for row in rows(folder / "2" / "bad") if row["skipped_steps"]]


def test_replaced_records_are_the_same_on_one_and_on_two(folder):
    one, two = (rows(folder / ranks / "gone", "skipped") for ranks in "12")
    assert [(row["step"], sorted(row["records"])) for row in one] == [(r["step"], sorted(r["records"])) for r in two]
    assert (
        sum(len(row["records"]) for row in one)
        == sum(row["replaced_records"] for row in rows(folder / "2" / "gone"))
        > 0
    )


def test_a_full_memory_in_one_process_of_a_sharded_model_is_a_message_and_an_end(folder):
    """The others wait for it in the middle of a forward, so that nothing can be repeated."""
    ended = launch(2, folder, "full-crowded", capture_output=True, text=True)
    assert ended.returncode != 0 and not (folder / "2" / "full-crowded" / "final").exists()
    assert ended.stderr.count("error: memory is full with 1 samples at once, and a sharded model") == 1
    assert "Traceback" not in ended.stderr.split("error: memory is full")[0]


def test_the_runs_have_what_they_are_about(folder):
    config = json.dumps((folder / "mixed.jsonl").read_text())
    assert config.count("<image>") == 6 and len(rows(folder, "mixed")) == 9
    losses = {name: tuple(round(row["loss"] or 0, 4) for row in rows(folder / "1" / name)) for name in RUNS}
    cut = {losses.pop(name) for name in ("1x4 still", "4x1", "padded", "crowded")}
    assert len(cut) == 1, "one run, cut in four ways"
    assert losses.pop("lora") == losses["mixed"], "the same but for checkpointing"
    assert len(set(losses.values())) == len(losses)


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
