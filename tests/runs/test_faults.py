"""Faults while a run trains: values that are not finite, full memory, killed workers, missing images, a full disk.
`sh tests/run.sh tests/runs/test_faults.py`"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Container
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

import dataset.loader
import model.answer
import test
import train
import training.held_out
import training.log
import training.memory
import training.open
import training.run
from config import InputError, load_config, run_script
from dataprocess.process_image import prepare_from_config
from dataset.batch import Batch, collate
from model.model import VisionLanguageModel
from tests.spy import spy
from tests.toy_project import fresh_accelerate, run_training, write_project
from training.log import RunLog
from training.memory import is_out_of_memory, memory_advice
from training.parallel import sum_gradients
from training.step import Stepper

QUICK = ("train.eval_steps=null", "train.score_samples=1", "train.save_total_limit=null")
WEIGHTS = ("projector.safetensors", "adapter_model.safetensors")
BAD = "3.png"  # the image of the record train:r3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project without a feature cache: what a test does to images must not reach the next test."""
    path = write_project(tmp_path_factory.mktemp("project"))
    values = yaml.safe_load(path.read_text())
    values["train"]["cache_features"] = "off"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module", autouse=True)
def curves():
    """Skip curves.png, which would take most of this file's time. Yields the real function, for the tests of it."""
    draw = training.log.draw_curves
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.log, "draw_curves", lambda runs, image: None)
        yield draw


@pytest.fixture
def own(project, tmp_path):
    """The config of a project whose images a test may damage."""
    folder = tmp_path / "own"
    shutil.copytree(project.parent, folder, ignore=shutil.ignore_patterns("run", "qa.*", "validation.jsonl", ".*"))
    return folder / "config.yaml"


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    """Return the rows of a log, checking that each is standard JSON (no NaN, no Infinity)."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    path = folder / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=refuse) for line in lines]


def without_times(found: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.endswith(("_per_s", "_mb"))} for row in found]


def tensors(folder: Path, names=(*WEIGHTS, "state.safetensors")) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": tensor for name in names for key, tensor in load_file(folder / name).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Values that are not finite


def poison(monkeypatch, name: str = BAD) -> None:
    """Read the image `name` as NaN."""
    read = training.run.read_pixels
    monkeypatch.setattr(
        training.run,
        "read_pixels",
        lambda processor, path: read(processor, path) * (math.nan if path.name == name else 1.0),
    )


def damage_the_gradient(monkeypatch, at_calls: Container[int]) -> None:
    """Make the gradient of these micro-batches infinite, but not their loss."""
    calls = iter(range(10**6))

    class Damage(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    change_the_loss(monkeypatch, lambda loss: Damage.apply(loss) if next(calls) in at_calls else loss)


def change_the_loss(monkeypatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply `change` to the loss of every forward pass of the model."""
    forward = VisionLanguageModel.forward

    def patched(self, **inputs):
        losses = forward(self, **inputs)
        return losses._replace(answers=change(losses.answers))

    monkeypatch.setattr(VisionLanguageModel, "forward", patched)


def test_a_step_whose_loss_is_not_finite_is_skipped_and_logged(project, tmp_path, monkeypatch):
    poison(monkeypatch)
    common = [f"output_dir={tmp_path}", "train.save_steps=1", "train.max_bad_steps=9", *QUICK]
    run_training(project, *common)
    bad = rows(tmp_path, "skipped")
    assert bad and all("train:r3" in row["records"] and len(row["records"]) == 4 for row in bad)
    assert {(row["reason"], row["loss"]) for row in bad} == {("not_finite", "nan")}
    steps = rows(tmp_path)
    bad_steps = [row["step"] for row in bad]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        is_bad = row["step"] in bad_steps
        assert row["skipped_steps"] == is_bad and (row["loss"] is None) == is_bad and (row["targets"] == 0) == is_bad
    (first, *_) = [number for number in bad_steps if number > 1]
    before, after = (tensors(tmp_path / f"checkpoint-{number}") for number in (first - 1, first))
    assert_equal(before, after)  # weights, moments, and Adam's own count of steps
    goods = [number for number in range(2, 7) if number not in bad_steps]
    for number in goods:  # every other step changes the weights
        before, after = (tensors(tmp_path / f"checkpoint-{n}", WEIGHTS) for n in (number - 1, number))
        assert any(not torch.equal(before[key], after[key]) for key in before), number
    assert goods and all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "final", WEIGHTS).values())


def test_a_step_whose_gradient_is_not_finite_is_skipped(project, tmp_path, monkeypatch):
    damage_the_gradient(monkeypatch, {3})  # the second micro-batch of step 2
    run_training(project, f"output_dir={tmp_path}", "train.max_steps=3", "train.save_steps=1", *QUICK)
    (bad,) = rows(tmp_path, "skipped")
    assert bad["step"] == 2 and bad["grad_norm"] in ("inf", "nan") and math.isfinite(float(bad["loss"]))
    assert rows(tmp_path)[1]["grad_norm"] is None
    assert_equal(tensors(tmp_path / "checkpoint-1"), tensors(tmp_path / "checkpoint-2"))
    assert not torch.equal(*(load_file(tmp_path / f"checkpoint-{n}" / WEIGHTS[0])["linear_1.weight"] for n in (2, 3)))


def test_bad_steps_in_a_row_stop_the_run_with_their_records(project, tmp_path, monkeypatch, capsys):
    """Exit code 2. A resumed run continues the count of bad steps in a row; one good step resets it."""
    bad_calls = set()  # forward passes, counted from 0; two a step
    calls = iter(range(10**6))
    change_the_loss(monkeypatch, lambda loss: loss * (math.inf if next(calls) in bad_calls else 1.0))
    bad_calls |= {1, 5, 6}  # steps 1, 3 and 4: never three in a row
    common = [f"output_dir={tmp_path}", "train.save_steps=1", "train.max_bad_steps=3", *QUICK]
    with monkeypatch.context() as inner:
        inner.setattr(Stepper, "forward_and_backward", interrupted_at(4))
        with pytest.raises(KeyboardInterrupt):
            run_training(project, *common)
    states = [json.loads((tmp_path / f"checkpoint-{n}" / "state.json").read_text())["bad_steps"] for n in (1, 2, 3, 4)]
    assert states == [1, 0, 1, 2]
    calls = iter(range(8, 10**6))
    bad_calls |= {8}  # step 5 is the third
    status = exit_status(project, monkeypatch, *common)
    message = capsys.readouterr().err
    assert status == 2 and "error: step 5:" in message and "3 steps in a row" in message
    skipped = rows(tmp_path, "skipped")
    last = skipped[-1]
    assert last["step"] == 5 and all(name in message for name in last["records"]) and len(last["records"]) == 4
    assert [row["step"] for row in skipped] == [1, 3, 4, 5] and not (tmp_path / "checkpoint-5").exists()


def before_step(action: Callable[[int], None]):
    """Return a `Stepper.forward_and_backward` that calls action(step) first."""
    forward_and_backward = Stepper.forward_and_backward

    def patched(self, step, micro_batches):
        action(step)
        return forward_and_backward(self, step, micro_batches)

    return patched


def interrupted_at(number: int):
    def interrupt(step: int) -> None:
        if step == number:
            raise KeyboardInterrupt

    return before_step(interrupt)


def exit_status(config: Path, monkeypatch, *arguments: str) -> object:
    """Return the exit status of `python train.py`."""
    with monkeypatch.context() as patched, fresh_accelerate():
        patched.setattr(sys, "argv", ["train.py", "--config", str(config), *arguments])
        with pytest.raises(SystemExit) as ended:
            run_script(train.main_with_messages)
    return ended.value.code


def test_a_held_out_loss_that_is_not_finite_is_logged_and_never_best(project, tmp_path, monkeypatch, curves):
    poison(monkeypatch, "10.png")
    monkeypatch.setattr(training.log, "draw_curves", curves)
    run_training(project, f"output_dir={tmp_path}", "train.max_steps=3")
    assert [row["val_loss"] for row in rows(tmp_path) if "val_loss" in row] == [None]
    assert (tmp_path / "curves.png").exists() and not (tmp_path / "best").exists()


def test_the_fp16_scaler_continues_after_a_bad_step(project, monkeypatch):
    """The scaler refuses to unscale again before its update. A gradient that is not finite counts as an overflow caused
    by the scale, until the scale is too small to cause one."""
    damage_the_gradient(monkeypatch, range(4, 9))
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        built = build(project)
        parameters = [parameter for parameter in built.parameters() if parameter.requires_grad]
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = AcceleratedOptimizer(torch.optim.AdamW(parameters, lr=1e-3), scaler=accelerator.scaler)
        accelerator.unscale_gradients = lambda wrapped: accelerator.scaler.unscale_(wrapped.optimizer)
        stepper = Stepper(built, optimizer, accelerator, contextlib.nullcontext, seed=1, max_grad_norm=1.0)
        batch = make_batch(project)
        assert batch.pixel_values is not None
        broken = dataclasses.replace(batch, pixel_values=batch.pixel_values * math.nan)
        outcomes = []
        for step, micro_batch in enumerate([batch, broken, broken, *[batch] * 6]):
            losses = stepper.forward_and_backward(step, [micro_batch])
            sum_gradients(stepper.parameters)
            outcomes.append(stepper.clip_and_step(losses))
    # the two losses halve the scale from 8 to 2; then the gradients halve it to 1, and below
    assert [outcome.is_bad for outcome in outcomes] == [False, True, True, False, False, True, True, True, True]
    assert [number for number, outcome in enumerate(outcomes) if outcome.has_overflowed] == [4]
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def test_a_step_that_the_fp16_scaler_skips_is_listed(project, tmp_path, monkeypatch):
    start = training.open._start_accelerator

    def with_scaler(config):
        accelerator, precision = start(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        accelerator.unscale_gradients = lambda wrapped: accelerator.scaler.unscale_(wrapped.optimizer)
        return accelerator, precision

    monkeypatch.setattr(training.open, "_start_accelerator", with_scaler)
    damage_the_gradient(monkeypatch, {3})  # the second micro-batch of step 2
    run_training(project, f"output_dir={tmp_path}", "train.max_steps=3", "train.save_steps=1", *QUICK)
    (listed,) = rows(tmp_path, "skipped")
    assert (listed["step"], listed["reason"], len(listed["records"])) == (2, "fp16_overflow", 4)
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1, 0] and rows(tmp_path)[1]["loss"] is not None
    before, after = (tensors(tmp_path / f"checkpoint-{number}", WEIGHTS) for number in (1, 2))
    assert_equal(before, after)
    assert [json.loads((tmp_path / f"checkpoint-{n}" / "state.json").read_text())["bad_steps"] for n in (1, 2, 3)] == [
        0
    ] * 3


def build(project: Path, *overrides: str) -> VisionLanguageModel:
    config = load_config(project, ["lora.dropout=0", *overrides])
    return training.run.open_model(config, "fp32", training.run.open_processors(config)).model


def make_batch(project: Path, size: int = 2) -> Batch:
    config = load_config(project, [])
    processors = training.run.open_processors(config)
    prepare_from_config(config)
    train_set = training.run.open_qa_file(config, processors, config.data.qa_file)
    return collate([train_set[0, i] for i in range(size)], processors.tokenizer.pad_token_id)


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


def cuda_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")


def cpu_error() -> Exception:
    """torch's own error when the CPU's memory does not suffice."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


class FullInBackward(torch.autograd.Function):
    """Returns its first argument. Its backward pass runs out of memory if there are more rows than `limit`."""

    @staticmethod
    def forward(context, value, rows, limit):
        context.is_out_of_memory = rows > limit
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        if context.is_out_of_memory:
            raise cuda_error()
        return gradient, None, None


@pytest.fixture(scope="module")
def roomy(project, tmp_path_factory):
    """The folder of a run in which micro-batches of four rows fit."""
    folder = tmp_path_factory.mktemp("roomy")
    run_training(project, f"output_dir={folder}", *CROWDED, "train.packing=off")
    return folder


CROWDED = (
    *QUICK, "lora.dropout=0", "train.max_steps=4", "train.save_steps=4", "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=2",
)  # fmt: skip


@pytest.mark.parametrize("where, limit", [("forward", 2), ("backward", 2), ("forward", 1), ("cpu", 2)])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    project, roomy, tmp_path, monkeypatch, capsys, where, limit
):
    """backward: memory runs out when the gradients of the first micro-batch and half of the second's exist already."""
    sizes = []
    forward = VisionLanguageModel.forward

    def patched(self, **inputs):
        count = len(inputs["input_ids"])
        if self.training:
            sizes.append(count)
        if where == "backward":
            losses = forward(self, **inputs)
            return losses._replace(answers=FullInBackward.apply(losses.answers, count, limit if len(sizes) == 2 else 4))
        if count > limit:
            raise cpu_error() if where == "cpu" else cuda_error()
        return forward(self, **inputs)

    monkeypatch.setattr(VisionLanguageModel, "forward", patched)
    run_training(project, f"output_dir={tmp_path}", *CROWDED, "train.packing=off")
    messages = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    for line, before in zip(messages, (4, 2), strict=False):
        assert f"with {before} samples at once: continuing with {before // 2} at once" in line
    if limit == 2:  # one attempt fails, and later steps use the smaller size at once
        assert len(messages) == 1 and sizes == [4] * (2 if where == "backward" else 1) + [2] * 4 * 4
    else:
        assert len(messages) == 2 and sizes == [4, 2] + [1] * 8 * 4
    expected, found = rows(roomy), rows(tmp_path)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    assert [row["targets"] for row in found] == [row["targets"] for row in expected]
    assert [row["epoch"] for row in found] == [row["epoch"] for row in expected]
    assert_close(tensors(roomy / "checkpoint-4"), tensors(tmp_path / "checkpoint-4"))


def test_out_of_memory_splits_a_packed_row_into_shorter_ones(project, roomy, tmp_path, monkeypatch, capsys):
    """The result equals a run with padded rows that fit. Every record has one image: images count a row's samples."""
    sizes, forward = [], VisionLanguageModel.forward

    def patched(self, **inputs):
        if self.training:
            assert len(inputs["input_ids"]) == 1
            sizes.append(len(inputs["pixel_values"]))
            if sizes[-1] > 2:
                raise cuda_error()
        return forward(self, **inputs)

    monkeypatch.setattr(VisionLanguageModel, "forward", patched)
    run_training(project, f"output_dir={tmp_path}", *CROWDED, "train.packing=on")
    assert "out of memory" in capsys.readouterr().out and sizes[0] > 2
    assert max(sizes[4:]) <= 2 and sum(size for size in sizes if size <= 2) >= 4 * 8
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows(tmp_path)] == pytest.approx([row[key] for row in rows(roomy)], rel=1e-6)
    assert [row["targets"] for row in rows(tmp_path)] == [row["targets"] for row in rows(roomy)]
    assert_close(tensors(roomy / "checkpoint-4"), tensors(tmp_path / "checkpoint-4"))


def test_out_of_memory_with_one_sample_gives_advice(project, tmp_path, monkeypatch, capsys):
    def full(self, **inputs):
        raise cuda_error()

    monkeypatch.setattr(VisionLanguageModel, "forward", full)
    assert exit_status(project, monkeypatch, f"output_dir={tmp_path}", *QUICK) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "Traceback" not in message and "one sample at a time" in message
    for advice in ("train.activation_checkpointing", "data.max_length", "lora.r", "train.precision=bf16", " MB"):
        assert advice in message


@pytest.mark.parametrize("part", ["evaluation", "answering"])
def test_out_of_memory_outside_of_steps_is_a_message(project, tmp_path, monkeypatch, capsys, part):
    forward = VisionLanguageModel.forward

    def full_in_evaluation(self, **inputs):
        if self.training:
            return forward(self, **inputs)
        raise cuda_error()

    def full_in_answering(*_, **__):
        raise cpu_error()

    if part == "evaluation":
        monkeypatch.setattr(VisionLanguageModel, "forward", full_in_evaluation)
    else:
        monkeypatch.setattr(model.answer, "generate", full_in_answering)
    assert exit_status(project, monkeypatch, f"output_dir={tmp_path}", "train.max_steps=3") == 2
    message = capsys.readouterr().err
    assert "error: out of memory (" in message and "Traceback" not in message and "per_device" in message


def test_only_out_of_memory_errors_count_as_such():
    assert is_out_of_memory(cuda_error()) and is_out_of_memory(cpu_error())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))


@pytest.mark.parametrize("words", ["lora", "full"])
def test_the_estimates_of_the_advice_are_close(project, monkeypatch, words):
    """Weights and Adam are exact; what the layers keep for the backward pass is within a factor of two."""
    overrides = ["train.trainable.language_model=full", "train.language_model_lr=1e-4", "train.lora_lr=null"]
    built = build(project, *(overrides if words == "full" else []))
    batch = make_batch(project, 1)
    sizes = spy(monkeypatch, training.memory, "size_text", lambda count: count)
    memory_advice(built, [batch])
    kept, trained, weights = sizes
    parameters = [parameter for parameter in built.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    measured, loss = saved_by_layers(built, batch)
    loss.backward()
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values() if tensor.dim()]
    held = sum(tensor.nbytes for tensor in [*parameters, *(p.grad for p in parameters), *state])
    assert trained == pytest.approx(held, rel=1e-6)
    assert weights == sum(tensor.nbytes for tensor in built.parameters())
    assert measured / 2 < kept < measured * 2, (kept, measured)


def saved_by_layers(built: VisionLanguageModel, batch: Batch) -> tuple[int, torch.Tensor]:
    """Return (bytes that the decoder layers keep for the backward pass, the loss)."""
    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    inside = [False]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # keep it alive, so that its address is not used again
        return tensor

    for layer in built.causal_lm.model.layers:
        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    built.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = built(**batch.model_inputs(torch.device("cpu"))).answers
    return sum(storage.nbytes() for storage in kept.values()), loss


# ---------------------------------------------------------------------------------------------------------------------
# A killed worker of the loader


class LostBatch:
    """A batch whose worker dies before it is fetched: unpickling fails, and a moment later torch notices the death."""

    def __reduce__(self):
        return lose_batch, (os.getpid(),)


def lose_batch(worker: int) -> None:
    threading.Timer(0.5, os.kill, (worker, signal.SIGKILL)).start()
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("when", ["reading", "sharing", "in a step"])
def test_a_killed_worker_is_reported_and_the_run_can_resume(project, tmp_path, monkeypatch, capsys, when):
    """reading: killed while it reads an image. sharing: its batch was announced but not yet fetched from its memory.
    in a step: torch notices while this process computes."""
    common = [f"output_dir={tmp_path}", "train.num_workers=2", "train.save_steps=1", *QUICK]
    dead: list[int] = []
    others = multiprocessing.active_children()  # left by earlier tests
    with monkeypatch.context() as patched:
        if when == "reading":
            read = training.run.read_pixels

            def die(processor, path):
                if get_worker_info() is not None and path.name == BAD:
                    os.kill(os.getpid(), signal.SIGKILL)
                return read(processor, path)

            patched.setattr(training.run, "read_pixels", die)
        elif when == "sharing":
            patched.setattr(dataset.loader, "collate", lambda *_: LostBatch())
        else:

            def kill(step: int) -> None:
                if step == 2:
                    worker = next(child for child in multiprocessing.active_children() if child not in others).pid
                    assert worker is not None
                    dead.append(worker)
                    os.kill(worker, signal.SIGKILL)
                    for _ in range(600):  # torch's signal handler ends it
                        time.sleep(0.05)

            patched.setattr(Stepper, "forward_and_backward", before_step(kill))
        assert exit_status(project, patched, *common) == 2
    message = capsys.readouterr().err
    assert "error: a worker process that reads images was killed (DataLoader worker (pid" in message
    assert all(str(pid) in message for pid in dead) and "Traceback" not in message and "num_workers" in message
    assert run_training(project, *common) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Images that disappear


def prepare(config: Path) -> None:
    """Make the QA files. The test damages images afterwards."""
    prepare_from_config(load_config(config, []))


def damage(config: Path) -> None:
    (config.parent / "images" / BAD).unlink()
    image = config.parent / "images" / "5.png"
    image.write_bytes(image.read_bytes()[:60])


SKIP = (
    *QUICK, "data.on_bad_image=skip", "data.sources=[]", "train.save_steps=3", "train.cache_features=on",
)  # fmt: skip


def test_records_with_unreadable_images_are_replaced_deterministically(own, tmp_path, capsys):
    """The same replacements without workers, with two, and in a resumed run. The check at the start only notes them."""
    prepare(own)
    damage(own)
    run_training(own, f"output_dir={tmp_path / 'a'}", *SKIP)
    assert "2 records with unreadable images are replaced by others" in capsys.readouterr().out
    listed = rows(tmp_path / "a", "qa.bad_images")
    assert [row["id"] for row in listed] == ["train:r3", "train:r5"]
    replaced = rows(tmp_path / "a", "skipped")
    assert {row["reason"] for row in replaced} == {"bad_image"}
    named = [text for row in replaced for text in row["records"]]
    assert sum('("train:r3")' in text for text in named) >= 2 and sum('("train:r5")' in text for text in named) >= 2
    assert all("3.png" in text or "5.png" in text for text in named)
    steps = rows(tmp_path / "a")
    counts = {row["step"]: len(row["records"]) for row in replaced}
    assert [row["replaced_records"] for row in steps] == [counts.get(step, 0) for step in range(1, 7)]
    run_training(own, f"output_dir={tmp_path / 'b'}", *SKIP, "train.num_workers=2")
    (tmp_path / "c").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-3", tmp_path / "c" / "checkpoint-3")
    run_training(own, f"output_dir={tmp_path / 'c'}", *SKIP)
    for other in ("b", "c"):
        assert_equal(tensors(tmp_path / "a" / "checkpoint-6"), tensors(tmp_path / other / "checkpoint-6"))
        first = 4 if other == "c" else 1
        for name in ("metrics", "skipped"):
            expected = [row for row in rows(tmp_path / "a", name) if row["step"] >= first]
            assert without_times(rows(tmp_path / other, name)) == without_times(expected)


def test_an_unreadable_image_stops_the_run_and_skip_resumes_it(own, tmp_path, monkeypatch, capsys):
    """The image disappears during training. The resumed run keeps the QA file that it began with."""

    def remove_image(step: int) -> None:
        if step == 2:
            shutil.rmtree(own.parent / "images")
            shutil.copytree(aside, own.parent / "images")

    prepare(own)
    qa = own.parent / "qa.jsonl"
    before = (qa.stat().st_mtime_ns, qa.read_bytes())
    aside = tmp_path / "aside"
    shutil.copytree(own.parent / "images", aside)
    (aside / BAD).unlink()
    common = [f"output_dir={tmp_path / 'run'}", "train.save_steps=1", *QUICK]
    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "forward_and_backward", before_step(remove_image))
        assert exit_status(own, patched, *common) == 2
    message = capsys.readouterr().err
    assert "train:r3" in message and BAD in message and "data.on_bad_image=skip" in message
    assert (tmp_path / "run" / "checkpoint-3").exists() and not (tmp_path / "run" / "final").exists()
    assert exit_status(own, monkeypatch, *common) == 2  # the next start finds the fault before it reads the model
    printed = capsys.readouterr()
    assert "missing_image: 1 record" in printed.err and "train:r3" in printed.err
    assert "data.on_bad_image=skip" in printed.out
    assert run_training(own, *common, "data.on_bad_image=skip") == 0
    assert "resuming from" in capsys.readouterr().out
    assert (qa.stat().st_mtime_ns, qa.read_bytes()) == before
    assert sum(row["replaced_records"] for row in rows(tmp_path / "run")) > 0


def test_a_run_stops_if_no_image_can_be_read(own, tmp_path, monkeypatch, capsys):
    prepare(own)
    for image in (own.parent / "images").iterdir():
        image.write_text(f"{image.name} is no image")
    assert exit_status(own, monkeypatch, f"output_dir={tmp_path}", *SKIP) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "cannot be read either" in message and "train:r" in message


def test_a_run_without_any_of_its_images_does_not_start(own, tmp_path, monkeypatch, capsys):
    prepare(own)
    shutil.rmtree(own.parent / "images")
    assert exit_status(own, monkeypatch, f"output_dir={tmp_path}", *SKIP) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "no record that is trained on has a usable image" in message


def test_unreadable_held_out_images_are_left_out_of_the_scores(own, tmp_path, monkeypatch):
    prepare(own)
    (own.parent / "images" / "10.png").unlink()
    common = ["train.max_steps=3", "data.sources=[]", "data.on_bad_image=skip"]
    assert run_training(own, f"output_dir={tmp_path / 'a'}", *common) == 0
    assert json.loads((tmp_path / "a" / "final" / "scores.json").read_text())["n"] == 4  # two records of two questions
    assert {row["id"] for row in rows(tmp_path / "a", "samples")} == {"held:r9", "held:r11"}
    assert [row["val_loss"] > 0 for row in rows(tmp_path / "a") if "val_loss" in row] == [True]
    monkeypatch.setattr(training.held_out, "held_out_questions", lambda run, count: [])  # none is readable
    assert run_training(own, f"output_dir={tmp_path / 'b'}", *common) == 0
    assert json.loads((tmp_path / "b" / "final" / "scores.json").read_text())["n"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@contextlib.contextmanager
def files_of_at_most(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_log(folder: Path, start_step: int = 0) -> RunLog:
    return RunLog(folder, start_step, logging_steps=1, writes=True, processes=1, track=lambda values, step: None)


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_row_is_whole_or_absent_on_a_full_disk(tmp_path, room):
    log = open_log(tmp_path)
    log.validation(1, 0.5, {"loss": 2.5}, [])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with files_of_at_most(len(before) + room):
        with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written \(.*\); make room"):
            log.validation(2, 0.5, {"loss": 2.5}, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.validation(2, 0.5, {"loss": 2.5}, [])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_the_log_and_its_curves_survive_a_full_disk(tmp_path, monkeypatch, curves):
    monkeypatch.setattr(training.log, "draw_curves", curves)
    log = open_log(tmp_path)
    for step in range(1, 40):
        log.validation(step, 0.5, {"loss": 2.5}, [])
    log.draw()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with files_of_at_most(1000):
        with pytest.raises(InputError, match="metrics.jsonl: cannot be written"):
            open_log(tmp_path, 30)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        with pytest.raises(InputError, match="curves.png: cannot be written"):
            log.draw()
    assert sorted(path.name for path in tmp_path.iterdir()) in (["curves.png", "metrics.jsonl"], ["metrics.jsonl"])
    open_log(tmp_path, 30).draw()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 31)) and (tmp_path / "curves.png").exists()


def test_a_run_resumes_after_a_full_disk_as_if_it_had_not_stopped(project, tmp_path, monkeypatch, capsys):
    common = ["train.save_steps=2", *QUICK]
    run_training(project, f"output_dir={tmp_path / 'whole'}", *common)
    append = training.log._append

    def full(path, line):
        if json.loads(line)["step"] == 4:
            with files_of_at_most(path.stat().st_size + 20):
                append(path, line)
        append(path, line)

    with monkeypatch.context() as patched:
        patched.setattr(training.log, "_append", full)
        assert exit_status(project, patched, f"output_dir={tmp_path / 'full'}", *common) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "metrics.jsonl: cannot be written (No space left on device)" in message
    assert [row["step"] for row in rows(tmp_path / "full")] == [1, 2, 3]
    run_training(project, f"output_dir={tmp_path / 'full'}", *common)
    assert without_times(rows(tmp_path / "full")) == without_times(rows(tmp_path / "whole"))
    assert_equal(tensors(tmp_path / "full" / "checkpoint-6"), tensors(tmp_path / "whole" / "checkpoint-6"))


def test_out_of_memory_while_answering_is_one_message(monkeypatch, capsys):
    def full():
        raise cuda_error()

    monkeypatch.setattr(test, "main", full)
    with pytest.raises(SystemExit) as stopped:
        run_script(test.main_with_messages)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "error: out of memory (CUDA out of memory" in message and "test.batch_size" in message
