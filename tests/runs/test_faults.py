"""What goes wrong while a run trains: numbers that are none, memory that is full, processes that die, pictures that vanish,
a full disk. `sh tests/run.sh tests/test_faults.py`"""

from __future__ import annotations

import contextlib
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
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from training import run as assemble
from training import step as step_module
import test
import train
from config import InputError, load_config, run_script
from dataprocess.process_image import prepare_from_config
from dataset import loader
from dataset.batch import collate
from training import log
from training.log import RunLog
from model import answer
from model.model import VisionLanguageModel
from training.step import Stepper, on_device
from training.memory import is_out_of_memory, memory_advice
from tests.toy_project import run_training, write_project

QUICK = ("train.eval_steps=null", "train.score_samples=1", "train.save_total_limit=null")
WEIGHTS = ("projector.safetensors", "adapter_model.safetensors")
BAD = "3.png"  # the picture of the record train:r3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Its pictures are read and encoded anew in every run: what a test makes of them must not be kept for the next."""
    path = write_project(tmp_path_factory.mktemp("project"))
    values = yaml.safe_load(path.read_text())
    values["train"]["cache_features"] = "off"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module", autouse=True)
def curves():
    """Drawing curves.png at every checkpoint would take most of this file's time; the tests of it call this."""
    draw = runlog.draw_curves
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runlog, "draw_curves", lambda metrics, picture: None)
        yield draw


@pytest.fixture
def own(project, tmp_path):
    """A project whose pictures a test may damage."""
    folder = tmp_path / "own"
    shutil.copytree(project.parent, folder, ignore=shutil.ignore_patterns("run", "qa.*", "validation.jsonl", ".*"))
    return folder / "config.yaml"


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    """The rows of a log, each of them JSON as the standard has it."""

    def refuse(word: str):
        raise AssertionError(f"{word} is no JSON")

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
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong


def poison(monkeypatch, name: str = BAD) -> None:
    """The picture `name` is read as pixels that are no numbers."""
    read = assemble.read_pixels
    monkeypatch.setattr(
        assemble,
        "read_pixels",
        lambda processor, path: read(processor, path) * (math.nan if path.name == name else 1.0),
    )


def damage_the_gradient(monkeypatch, at_calls: Container[int]) -> None:
    """The loss of these micro-batches stays a number, its gradient does not."""
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
    """`change` is called once a forward pass of the model."""
    forward = VisionLanguageModel.forward

    def patched(self, **batch):
        losses = forward(self, **batch)
        return losses._replace(answers=change(losses.answers))

    monkeypatch.setattr(VisionLanguageModel, "forward", patched)


def test_a_step_with_a_loss_that_is_no_number_changes_nothing_and_is_written_down(project, tmp_path, monkeypatch):
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
    for number in goods:  # the others do learn
        before, after = (tensors(tmp_path / f"checkpoint-{n}", WEIGHTS) for n in (number - 1, number))
        assert any(not torch.equal(before[key], after[key]) for key in before), number
    assert goods and all(torch.isfinite(tensor).all() for tensor in tensors(tmp_path / "final", WEIGHTS).values())


def test_a_gradient_that_is_no_number_leaves_the_step_out_too(project, tmp_path, monkeypatch):
    damage_the_gradient(monkeypatch, {3})  # the second micro-batch of step 2
    run_training(project, f"output_dir={tmp_path}", "train.max_steps=3", "train.save_steps=1", *QUICK)
    (bad,) = rows(tmp_path, "skipped")
    assert bad["step"] == 2 and bad["grad_norm"] in ("inf", "nan") and math.isfinite(float(bad["loss"]))
    assert rows(tmp_path)[1]["grad_norm"] is None
    assert_equal(tensors(tmp_path / "checkpoint-1"), tensors(tmp_path / "checkpoint-2"))
    assert not torch.equal(*(load_file(tmp_path / f"checkpoint-{n}" / WEIGHTS[0])["linear_1.weight"] for n in (2, 3)))


def test_bad_steps_in_a_row_stop_the_run_with_their_records(project, tmp_path, monkeypatch, capsys):
    """Exit code 2. The count in a row goes on where the run goes on, and one good step ends it."""
    bad_calls = set()  # of the model, from 0; two a step
    calls = iter(range(10**6))
    change_the_loss(monkeypatch, lambda loss: loss * (math.inf if next(calls) in bad_calls else 1.0))
    bad_calls |= {1, 5, 6}  # steps 1, 3 and 4: never three in a row
    common = [f"output_dir={tmp_path}", "train.save_steps=1", "train.max_bad_steps=3", *QUICK]
    with monkeypatch.context() as inner:
        inner.setattr(train, "finish", lambda run: None)
        inner.setattr(step_module.Stepper, "__call__", stop_after(4))
        with pytest.raises(KeyboardInterrupt):
            run_training(project, *common)
    states = [json.loads((tmp_path / f"checkpoint-{n}" / "state.json").read_text())["bad_steps"] for n in (1, 2, 3, 4)]
    assert states == [1, 0, 1, 2]
    calls = iter(range(8, 10**6))
    bad_calls |= {8}  # step 5 is the third
    status = exit_status(project, monkeypatch, *common)
    message = capsys.readouterr().err
    assert status == 2 and "error: step 5:" in message and "3 steps in a row" in message
    last = rows(tmp_path, "skipped")[-1]
    assert last["step"] == 5 and all(name in message for name in last["records"]) and len(last["records"]) == 4
    assert [row["step"] for row in rows(tmp_path, "skipped")] == [1, 3, 4, 5] and not (
        tmp_path / "checkpoint-5"
    ).exists()


def stop_after(count: int):
    """A Stepper's call that is interrupted at its step `count`."""
    call = Stepper.__call__

    def patched(self, step, *arguments):
        if step == count:
            raise KeyboardInterrupt
        return call(self, step, *arguments)

    return patched


def exit_status(config: Path, monkeypatch, *arguments: str) -> int:
    """What `python train.py` tells the shell."""
    with monkeypatch.context() as patched, fresh_accelerate():
        patched.setattr(sys, "argv", ["train.py", "--config", str(config), *arguments])
        with pytest.raises(SystemExit) as ended:
            run_script(train.main_with_messages)
    return ended.value.code


@contextlib.contextmanager
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_held_out_loss_that_is_no_number_is_no_best_and_no_broken_row(project, tmp_path, monkeypatch, curves):
    poison(monkeypatch, "10.png")
    monkeypatch.setattr(runlog, "draw_curves", curves)
    run_training(project, f"output_dir={tmp_path}", "train.max_steps=3")
    assert [row["val_loss"] for row in rows(tmp_path) if "val_loss" in row] == [None]
    assert (tmp_path / "curves.png").exists() and not (tmp_path / "best").exists()


def test_fp16s_scaler_goes_on_after_a_bad_step(project, monkeypatch):
    """The scaler refuses to unscale twice what it was not told to have updated. A gradient that is no number is taken for
    one that its scale made too large, until the scale is too small for that."""
    damage_the_gradient(monkeypatch, range(4, 9))
    with fresh_accelerate():
        accelerator = Accelerator(cpu=True)
        model = open_model(project)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = AcceleratedOptimizer(torch.optim.AdamW(parameters, lr=0.0), scaler=accelerator.scaler)
        accelerator.unscale_gradients = lambda wrapped: accelerator.scaler.unscale_(wrapped.optimizer)
        stepper = Stepper(model, optimizer, accelerator, contextlib.nullcontext, 1, 1.0, pad_token_id=0)
        batch = make_batch(project)
        broken = batch | {"pixel_values": batch.pixel_values * math.nan}
        micros = [batch, broken, broken, *[batch] * 6]
        outcomes = [stepper(i, [micro], [1e-3], False)[0] for i, micro in enumerate(micros)]
    # the scale falls from 8 to 2 with the two losses, then to 1 with the first of the gradients, and on
    assert [outcome.is_bad for outcome in outcomes] == [False, True, True, False, False, True, True, True, True]
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


def open_model(project: Path, *overrides: str) -> VisionLanguageModel:
    config = load_config(project, ["lora.dropout=0", *overrides])
    return assemble.build(config, "fp32", assemble.open_processors(config)).model


def make_batch(project: Path, size: int = 2) -> dict:
    config = load_config(project, [])
    processors = assemble.open_processors(config)
    prepare_from_config(config)
    dataset = assemble.open_qa_file(config, processors, config.data.qa_file)
    return collate([dataset[0, i] for i in range(size)], processors.tokenizer.pad_token_id)


# ---------------------------------------------------------------------------------------------------------------------
# A full memory


def cuda_is_full() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free.")


def cpu_is_full() -> Exception:
    """What torch really says where a CPU has not enough."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    return raised.value


class Crowd(torch.autograd.Function):
    """Passes its first argument on; memory is full in its backward where there are more rows than `limit`."""

    @staticmethod
    def forward(context, value, rows, limit):
        context.is_full = rows > limit
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        if context.is_full:
            raise cuda_is_full()
        return gradient, None, None


@pytest.fixture(scope="module")
def roomy(project, tmp_path_factory):
    """A run in which micro-batches of four rows fit."""
    folder = tmp_path_factory.mktemp("roomy")
    run_training(project, f"output_dir={folder}", *CROWDED, "train.packing=off")
    return folder


CROWDED = (
    *QUICK, "lora.dropout=0", "train.max_steps=4", "train.save_steps=4", "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=2",
)  # fmt: skip


@pytest.mark.parametrize("where, limit", [("forward", 2), ("backward", 2), ("forward", 1), ("cpu", 2)])
def test_a_full_memory_halves_the_micro_batch_and_changes_nothing_else(
    project, roomy, tmp_path, monkeypatch, capsys, where, limit
):
    """backward: the gradients of the first micro-batch and half of the second's stand there when memory is full."""
    sizes = []
    forward = VisionLanguageModel.forward

    def patched(self, **batch):
        if self.training:
            sizes.append(len(batch.input_ids))
        count = len(batch.input_ids)
        if where == "backward":
            losses = forward(self, **batch)
            return losses._replace(answers=Crowd.apply(losses.answers, count, limit if len(sizes) == 2 else 4))
        if count > limit:
            raise cpu_is_full() if where == "cpu" else cuda_is_full()
        return forward(self, **batch)

    monkeypatch.setattr(VisionLanguageModel, "forward", patched)
    run_training(project, f"output_dir={tmp_path}", *CROWDED, "train.packing=off")
    said = [line for line in capsys.readouterr().out.splitlines() if "memory was full" in line]
    for line, rows_before in zip(said, (4, 2), strict=False):
        assert f"with {rows_before} samples at once: going on with {rows_before // 2} at once" in line
    if limit == 2:
        assert len(said) == 1 and sizes == [4] * (2 if where == "backward" else 1) + [2] * 4 * 4  # and remembered
    else:
        assert len(said) == 2 and sizes == [4, 2] + [1] * 8 * 4
    expected, found = rows(roomy), rows(tmp_path)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    assert [row["targets"] for row in found] == [row["targets"] for row in expected]
    assert [row["epoch"] for row in found] == [row["epoch"] for row in expected]
    assert_close(tensors(roomy / "checkpoint-4"), tensors(tmp_path / "checkpoint-4"))


def test_a_packed_row_that_is_too_long_is_cut_into_shorter_ones(project, roomy, tmp_path, monkeypatch, capsys):
    """Also against padded rows that fit: the same step, however its samples stand in rows. Every record has a picture."""
    sizes, forward = [], VisionLanguageModel.forward

    def patched(self, **batch):
        if self.training:
            assert len(batch.input_ids) == 1
            sizes.append(len(batch.pixel_values))
            if sizes[-1] > 2:
                raise cuda_is_full()
        return forward(self, **batch)

    monkeypatch.setattr(VisionLanguageModel, "forward", patched)
    run_training(project, f"output_dir={tmp_path}", *CROWDED, "train.packing=on")
    assert "memory was full" in capsys.readouterr().out and sizes[0] > 2
    assert max(sizes[4:]) <= 2 and sum(size for size in sizes if size <= 2) >= 4 * 8
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows(tmp_path)] == pytest.approx([row[key] for row in rows(roomy)], rel=1e-6)
    assert [row["targets"] for row in rows(tmp_path)] == [row["targets"] for row in rows(roomy)]
    assert_close(tensors(roomy / "checkpoint-4"), tensors(tmp_path / "checkpoint-4"))


def test_where_one_sample_does_not_fit_it_is_said_what_would_help(project, tmp_path, monkeypatch, capsys):
    def full(self, **batch):
        raise cuda_is_full()

    monkeypatch.setattr(VisionLanguageModel, "forward", full)
    assert exit_status(project, monkeypatch, f"output_dir={tmp_path}", *QUICK) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "Traceback" not in message and "one sample at a time" in message
    for advice in ("train.activation_checkpointing", "data.max_length", "lora.r", "train.precision=bf16", " MB"):
        assert advice in message


@pytest.mark.parametrize("part", ["evaluation", "answering"])
def test_a_full_memory_outside_of_steps_is_a_message(project, tmp_path, monkeypatch, capsys, part):
    forward = VisionLanguageModel.forward

    def full(self, *arguments, **batch):
        if part == "evaluation" and self.training:
            return forward(self, *arguments, **batch)
        raise cuda_is_full() if part == "evaluation" else cpu_is_full()

    monkeypatch.setattr(*((VisionLanguageModel, "forward") if part == "evaluation" else (answer, "generate")), full)
    assert exit_status(project, monkeypatch, f"output_dir={tmp_path}", "train.max_steps=3") == 2
    message = capsys.readouterr().err
    assert "error: memory is full" in message and "Traceback" not in message and "per_device" in message


def test_another_runtime_error_is_not_taken_for_a_full_memory():
    assert is_out_of_memory(cuda_is_full()) and is_out_of_memory(cpu_is_full())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))


@pytest.mark.parametrize("words", ["lora", "full"])
def test_the_estimates_of_the_advice_are_near_the_truth(project, monkeypatch, words):
    """Weights and Adam exactly, what the layers keep for their backward within a factor of two."""
    overrides = ["train.trainable.language_model=full", "train.language_model_lr=1e-4", "train.lora_lr=null"]
    model = open_model(project, *(overrides if words == "full" else []))
    batch = make_batch(project, 1)
    said = []
    monkeypatch.setattr(step_module, "size_text", lambda count: said.append(count) or str(count))
    memory_advice(model, [batch])
    kept, trained, weights = said
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    real, per_layer = saved_by_layers(model, batch)
    per_layer.backward()
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values() if tensor.dim()]
    held = sum(tensor.nbytes for tensor in [*parameters, *(p.grad for p in parameters), *state])
    assert trained == pytest.approx(held, rel=1e-6)
    assert weights == sum(tensor.nbytes for tensor in model.parameters())
    assert real / 2 < kept < real * 2, (kept, real)


def saved_by_layers(model: VisionLanguageModel, batch: dict) -> tuple[int, torch.Tensor]:
    """(bytes that the decoder layers keep for their backward, the loss)."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    inside = [False]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other tensor gets its place
        return tensor

    for layer in model.causal_lm.model.layers:
        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch.model_inputs(torch.device("cpu"))).answers
    return sum(storage.nbytes() for storage in kept.values()), loss


# ---------------------------------------------------------------------------------------------------------------------
# A process of the loader that dies


class GoneBeforeFetched:
    """Part of a batch: whoever fetches it finds the process that made it gone, a moment before that is known."""

    def __reduce__(self):
        return _find_gone, (os.getpid(),)


def _find_gone(pid: int) -> None:
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize("when", ["reading", "sharing", "in a step"])
def test_a_worker_that_dies_is_named_and_the_run_goes_on_afterwards(project, tmp_path, monkeypatch, capsys, when):
    """reading: it is killed over a picture. sharing: its batch was announced, and is to be fetched from its memory.
    in a step: torch notices while this process is somewhere else."""
    common = [f"output_dir={tmp_path}", "train.num_workers=2", "train.save_steps=1", *QUICK]
    dead, others = [], multiprocessing.active_children()  # what earlier tests have left
    with monkeypatch.context() as patched:
        if when == "reading":
            read = assemble.read_pixels

            def die(processor, path):
                if get_worker_info() is not None and path.name == BAD:
                    os.kill(os.getpid(), signal.SIGKILL)
                return read(processor, path)

            patched.setattr(assemble, "read_pixels", die)
        elif when == "sharing":
            patched.setattr(loader, "collate", lambda *arguments: {"gone": GoneBeforeFetched()})
        else:
            call = Stepper.__call__

            def kill(self, step, *arguments):
                if step == 2:
                    dead.append(next(child for child in multiprocessing.active_children() if child not in others).pid)
                    os.kill(dead[0], signal.SIGKILL)
                    for _ in range(600):  # ended by the signal
                        time.sleep(0.05)
                return call(self, step, *arguments)

            patched.setattr(Stepper, "__call__", kill)
        assert exit_status(project, patched, *common) == 2
    message = capsys.readouterr().err
    assert "error: a process that reads pictures was killed (DataLoader worker (pid" in message
    assert all(str(pid) in message for pid in dead) and "Traceback" not in message and "num_workers" in message
    assert run_training(project, *common) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that vanish


def prepare(config: Path) -> None:
    """Make the QA files; pictures are damaged afterwards."""
    prepare_from_config(load_config(config, []))


def damage(config: Path) -> None:
    (config.parent / "images" / BAD).unlink()
    picture = config.parent / "images" / "5.png"
    picture.write_bytes(picture.read_bytes()[:60])


SKIP = (
    *QUICK, "data.on_bad_image=skip", "data.sources=[]", "train.save_steps=3", "train.cache_features=on",
)  # fmt: skip


def test_a_picture_that_vanished_is_replaced_the_same_way_however_it_is_read(own, tmp_path, capsys):
    """With no or two workers, and where the run is taken up in the middle. The check at the start only notes it."""
    prepare(own)
    damage(own)
    run_training(own, f"output_dir={tmp_path / 'a'}", *SKIP)
    assert "records with bad pictures, 2, are replaced by others" in capsys.readouterr().out
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


def test_stop_is_the_default_and_the_stopped_run_goes_on_with_skip(own, tmp_path, monkeypatch, capsys):
    """The picture goes while the run is training. What goes on is the same run, with the QA file that it began with."""
    call = Stepper.__call__

    def vanish(self, step, *arguments):
        if step == 2:
            shutil.rmtree(own.parent / "images")
            shutil.copytree(aside, own.parent / "images")
        return call(self, step, *arguments)

    prepare(own)
    qa = own.parent / "qa.jsonl"
    before = (qa.stat().st_mtime_ns, qa.read_bytes())
    aside = tmp_path / "aside"
    shutil.copytree(own.parent / "images", aside)
    (aside / BAD).unlink()
    common = [f"output_dir={tmp_path / 'run'}", "train.save_steps=1", *QUICK]
    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "__call__", vanish)
        assert exit_status(own, patched, *common) == 2
    message = capsys.readouterr().err
    assert "train:r3" in message and BAD in message and "data.on_bad_image=skip" in message
    assert (tmp_path / "run" / "checkpoint-3").exists() and not (tmp_path / "run" / "final").exists()
    assert exit_status(own, monkeypatch, *common) == 2  # not better by itself, and said before the model is read
    said = capsys.readouterr()
    assert "missing_image: 1 record" in said.err and "train:r3" in said.err and "data.on_bad_image=skip" in said.out
    assert run_training(own, *common, "data.on_bad_image=skip") == 0
    assert "going on from" in capsys.readouterr().out
    assert (qa.stat().st_mtime_ns, qa.read_bytes()) == before
    assert sum(row["replaced_records"] for row in rows(tmp_path / "run")) > 0


def test_where_no_picture_can_be_read_any_more_the_run_stops(own, tmp_path, monkeypatch, capsys):
    prepare(own)
    shutil.rmtree(own.parent / "images")
    assert exit_status(own, monkeypatch, f"output_dir={tmp_path}", *SKIP) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "cannot be read either" in message and "train:r" in message


def test_held_out_pictures_that_vanish_are_left_out_of_the_scores(own, tmp_path, monkeypatch):
    prepare(own)
    (own.parent / "images" / "10.png").unlink()
    common = ["train.max_steps=3", "data.sources=[]", "data.on_bad_image=skip"]
    assert run_training(own, f"output_dir={tmp_path / 'a'}", *common) == 0
    assert json.loads((tmp_path / "a" / "final" / "scores.json").read_text())["n"] == 4  # two records of two questions
    assert {row["id"] for row in rows(tmp_path / "a", "samples")} == {"held:r9", "held:r11"}
    assert [row["val_loss"] > 0 for row in rows(tmp_path / "a") if "val_loss" in row] == [True]
    monkeypatch.setattr(train, "held_out_questions", lambda run, count: [])  # none is left
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


def run_log(folder: Path, start_step: int = 0) -> RunLog:
    return RunLog(folder, start_step, 1, True, 1, lambda values, step: None)


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_row_is_whole_or_absent_on_a_full_disk(tmp_path, room):
    log = run_log(tmp_path)
    log.validation(1, 0.5, {"loss": 2.5}, [])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with files_of_at_most(len(before) + room):
        with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written \(.*\); make room"):
            log.validation(2, 0.5, {"loss": 2.5}, [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.validation(2, 0.5, {"loss": 2.5}, [])
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_the_log_and_its_picture_outlive_a_full_disk(tmp_path, monkeypatch, curves):
    monkeypatch.setattr(runlog, "draw_curves", curves)
    log = run_log(tmp_path)
    for step in range(1, 40):
        log.validation(step, 0.5, {"loss": 2.5}, [])
    log.draw()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with files_of_at_most(1000):
        with pytest.raises(InputError, match="metrics.jsonl: cannot be written"):
            run_log(tmp_path, 30)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        with pytest.raises(InputError, match="curves.png: cannot be written"):
            log.draw()
    assert sorted(path.name for path in tmp_path.iterdir()) in (["curves.png", "metrics.jsonl"], ["metrics.jsonl"])
    run_log(tmp_path, 30).draw()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 31)) and (tmp_path / "curves.png").exists()


def test_a_run_whose_disk_was_full_goes_on_as_if_it_had_not_been(project, tmp_path, monkeypatch, capsys):
    common = ["train.save_steps=2", *QUICK]
    run_training(project, f"output_dir={tmp_path / 'whole'}", *common)
    append = runlog._append

    def full(path, line):
        if json.loads(line)["step"] == 4:
            with files_of_at_most(path.stat().st_size + 20):
                append(path, line)
        append(path, line)

    with monkeypatch.context() as patched:
        patched.setattr(runlog, "_append", full)
        assert exit_status(project, patched, f"output_dir={tmp_path / 'full'}", *common) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "metrics.jsonl: cannot be written (No space left on device)" in message
    assert [row["step"] for row in rows(tmp_path / "full")] == [1, 2, 3]
    run_training(project, f"output_dir={tmp_path / 'full'}", *common)
    assert without_times(rows(tmp_path / "full")) == without_times(rows(tmp_path / "whole"))
    assert_equal(tensors(tmp_path / "full" / "checkpoint-6"), tensors(tmp_path / "whole" / "checkpoint-6"))


def test_answering_without_memory_is_one_message(monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(test, "main", full)
    with pytest.raises(SystemExit) as stopped:
        run_script(test.main_with_messages)
    assert stopped.value.code == 2
    assert "memory is full (CUDA out of memory" in (told := capsys.readouterr().err) and "test.batch_size" in told
