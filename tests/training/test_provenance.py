"""What a run compares at its start: with the checkpoint that it starts from, and with what it began with.

Run: python -m pytest tests/training/test_provenance.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import InputError, load_config
from dataset.open import file_sha256
from model.checkpoint_folder import write_folder
from model.loaded import open_config
from tests.toy_project import run_training, write_project
from training import digests
from training.digests import is_same_digest, released_digests
from training.resume import WEIGHT_DIGESTS

SHORT = ("train.eval_steps=null", "train.score_samples=1", "train.max_steps=2", "train.save_steps=1", "lora.dropout=0")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(project):
    run_training(project, *SHORT, "train.save_total_limit=null")
    return project.parent / "run"


def other_weights(project, part: str, target) -> str:
    """Copy a folder of released weights, with one value of one tensor changed. Returns the copy's path."""
    shutil.copytree(project.parent / part, target)
    change(target)
    return str(target)


def change(folder) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensor = tensors[max(tensors)]
    tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0, dtype=tensor.dtype))
    save_file(tensors, path, {"format": "pt"})


def rewrite(checkpoint, target, change_files) -> None:
    """Write a copy of a checkpoint's folder whose files `change_files(folder)` has changed."""

    def write(folder):
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        change_files(folder)

    write_folder(target, write)


# --- the checkpoint that a run starts from


def check(project, start, tmp_path, *arguments: str) -> int:
    output = f"output_dir={tmp_path / 'new'}"
    return run_training(project, *SHORT, f"model.start_from={start}", output, *arguments, "--check")


@pytest.mark.parametrize(
    "override, named", [("model.vision_feature_layer=-1", "model.vision_feature_layer: -2 -> -1"),
                        ("model.projector_hidden_size=32", "model.projector_hidden_size: None -> 32")],
)  # fmt: skip
def test_what_trained_weights_compute_does_not_change_silently(project, whole, tmp_path, override, named):
    """The features of another layer have the same shape, and a width that is given may be the one that null means."""
    with pytest.raises(InputError, match=f"final: its weights were trained with other settings.*{named}"):
        check(project, whole / "final", tmp_path, override)


def test_a_change_on_purpose_is_said(project, whole, tmp_path, capsys):
    assert check(project, whole / "final", tmp_path, "model.attention=mixed", "lora.dropout=0.5") == 0
    said = f"{whole / 'final'}: its weights were trained with another setting (model.attention: causal -> mixed)"
    assert said in capsys.readouterr().out
    assert check(project, whole / "final", tmp_path) == 0
    assert "another setting" not in capsys.readouterr().out


@pytest.mark.parametrize("part, key", [("tower", "vision_tower"), ("lm", "language_model")])
def test_other_released_weights_of_the_same_shapes_are_refused(project, whole, tmp_path, part, key):
    other = other_weights(project, part, tmp_path / "other")
    with pytest.raises(InputError, match=rf"trained on top of .*/{part}, whose weights .*\(model\.{key}\)"):
        check(project, whole / "final", tmp_path, f"model.{key}={other}")
    shutil.copytree(project.parent / part, tmp_path / "moved")
    assert check(project, whole / "final", tmp_path, f"model.{key}={tmp_path / 'moved'}") == 0


def test_a_projector_may_be_tried_with_another_language_model_and_it_is_said(project, whole, tmp_path, capsys):
    def without_lora(folder):
        for path in folder.glob("adapter_*"):
            path.unlink()

    rewrite(whole / "final", tmp_path / "projector", without_lora)
    other = other_weights(project, "lm", tmp_path / "other")
    assert check(project, tmp_path / "projector", tmp_path, f"model.language_model={other}") == 0
    assert f"trained for another language model (model.language_model: lm -> {other})" in capsys.readouterr().out


def test_an_old_start_that_records_no_digests_is_compared_by_name(project, whole, tmp_path, capsys):
    def forget(folder):
        entries = json.loads((folder / "run.json").read_text())
        kept = [{k: v for k, v in entry.items() if k not in released} for entry in entries]
        (folder / "run.json").write_text(json.dumps(kept))

    released = released_digests(load_config(project).model)
    assert released == {key: json.loads((whole / "final" / "run.json").read_text())[0][key] for key in released}
    rewrite(whole / "final", tmp_path / "old", forget)
    assert check(project, tmp_path / "old", tmp_path) == 0
    assert "nothing records whether" not in capsys.readouterr().out
    other = other_weights(project, "lm", tmp_path / "other")
    assert check(project, tmp_path / "old", tmp_path, f"model.language_model={other}") == 0
    assert f"nothing records whether {other} has equal weights" in capsys.readouterr().out


# --- what a resumed run began with


@pytest.mark.parametrize("part, key", [("tower", "vision_tower"), ("lm", "language_model")])
def test_a_run_does_not_resume_on_top_of_changed_weights(project, whole, tmp_path, part, key):
    shutil.copytree(whole / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    folder = project.parent / part
    shutil.copytree(folder, tmp_path / "kept")
    try:
        change(folder)
        with pytest.raises(InputError, match=rf"checkpoint-1: the run began with {key}_sha256 .*model\.{key}\)"):
            run_training(project, *SHORT, f"output_dir={tmp_path / 'run'}")
    finally:
        shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)


def test_a_checkpoint_without_digests_resumes_and_it_is_said(project, whole, tmp_path, capsys):
    def forget(folder):
        state = json.loads((folder / "state.json").read_text())
        kept = {key: value for key, value in state.items() if key not in WEIGHT_DIGESTS}
        (folder / "state.json").write_text(json.dumps(kept))
        assert len(kept) == len(state) - 2

    rewrite(whole / "checkpoint-1", tmp_path / "checkpoint-1", forget)
    run_training(project, *SHORT, f"output_dir={tmp_path}")
    assert capsys.readouterr().out.count("records no digest of the released weights") == 1
    last = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert last == json.loads((whole / "checkpoint-2" / "state.json").read_text())


def test_micro_batch_and_accumulation_may_change_together(project, whole, tmp_path):
    """The out-of-memory message advises it: the same samples in each step, and the same number of steps."""
    shutil.copytree(whole / "checkpoint-1", tmp_path / "checkpoint-1")
    sizes = ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1"]
    run_training(project, *SHORT, f"output_dir={tmp_path}", *sizes)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][1]
    assert row["step"] == 2 and (row["targets"], row["epoch"]) == (expected["targets"], expected["epoch"])
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    with pytest.raises(InputError, match="per_device_train_batch_size: 4 -> 8\n  train.gradient_acc"):
        run_training(project, *SHORT, f"output_dir={tmp_path}", "train.per_device_train_batch_size=8")


# --- digests


def test_a_digest_covers_every_shard_and_the_config_but_no_note_in_it(project, tmp_path):
    """Weights in two files, as large models have them."""
    model = load_config(project).model
    folder = tmp_path / "lm"
    shutil.copytree(project.parent / "lm", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = dataclasses.replace(model, language_model=type(model.language_model)(folder))

    def digest() -> str:
        return released_digests(model)["language_model_sha256"]

    notes = {"use_cache": False, "bos_token_id": 7, "eos_token_id": [1, 2], "auto_map": {"AutoConfig": "x.Y"}}
    first, config = digest(), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9.9", "dtype": "float64", **notes})
    )
    assert digest() == first
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert digest() != first
    (folder / "config.json").write_text(json.dumps(config))
    for file in shards:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert digest() != first
        (folder / file).write_bytes(content)
    assert digest() == first
    (folder / max(shards)).unlink()
    assert "language_model_sha256" not in released_digests(model)


def test_a_digest_that_an_earlier_version_recorded_is_recognised(project, whole, tmp_path, monkeypatch):
    """It covered keys that are left out now. A run that recorded it resumes, and a run may start from it."""
    model = load_config(project).model
    with monkeypatch.context() as patched:
        patched.setattr(digests, "_NOT_COMPUTING", digests._FORMER_NOT_COMPUTING)
        before = released_digests(model)
    digests._FORMER.clear()
    now = released_digests(model)
    assert before["language_model_sha256"] != now["language_model_sha256"]
    assert all(is_same_digest(before[key], now[key]) for key in now)
    assert not is_same_digest("0" * 64, now["language_model_sha256"]) and not is_same_digest(None, "0" * 64)

    def age(folder):
        for name in ("state.json", "run.json"):
            text = (folder / name).read_text()
            for key in now:
                text = text.replace(now[key], before[key])
            assert before["language_model_sha256"] in text
            (folder / name).write_text(text)

    (tmp_path / "run").mkdir()
    rewrite(whole / "checkpoint-1", tmp_path / "run" / "checkpoint-1", age)
    assert run_training(project, *SHORT, f"output_dir={tmp_path / 'run'}") == 0
    assert check(project, tmp_path / "run" / "checkpoint-1", tmp_path) == 0


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are hashed, one after the other; none is remembered from before."""
    names = []

    def spy(path):
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(digests, "file_sha256", spy)
    monkeypatch.setattr(digests, "_HASHES", {})
    return names


def test_unchanged_weights_are_read_once_and_much_reading_is_said(project, tmp_path, read, monkeypatch, capsys):
    shutil.copytree(project.parent / "lm", tmp_path / "lm")
    model = load_config(project).model
    model = dataclasses.replace(model, vision_tower=None, language_model=str(tmp_path / "lm"))
    monkeypatch.setattr(digests, "SAID_BYTES", 10_000)
    with monkeypatch.context() as patched:
        patched.setattr(digests, "CLOCK_TICK", 0)
        first = released_digests(model)
        assert sorted(read) == ["config.json", "model.safetensors"]
        assert capsys.readouterr().out == "checking 0 GB of released weights\n"
        assert released_digests(model) == first and len(read) == 2 and capsys.readouterr().out == ""
    change(tmp_path / "lm")  # just now: not remembered, because it may change again within a tick of the clock
    assert released_digests(model) != first and read[2:] == ["model.safetensors"]
    assert released_digests(model) != first and read[3:] == ["model.safetensors"]


def test_a_run_remembers_the_digests_of_large_weights_until_they_change(project, whole, tmp_path, read, monkeypatch):
    """A checkpoint of a large model opens without reading the released weights in full. Each call below is a new process."""

    def opened(folder, *overrides: str) -> list[str]:
        read.clear()
        digests._HASHES.clear()
        model = open_config(folder, overrides).model
        assert (str(model.vision_tower), str(model.language_model)) == (tower, str(weights.parent))
        return sorted(set(read) - {"config.json"})

    run, weights = tmp_path / "run", tmp_path / "lm" / "model.safetensors"
    for name in ("tower", "lm"):
        shutil.copytree(project.parent / name, tmp_path / name)
    shutil.copytree(whole, run)
    (run / ".hashes.json").unlink(missing_ok=True)
    tower, final = str(tmp_path / "tower"), run / "final"
    assert opened(final) == opened(final) == ["model.safetensors"]  # small: reading is quick
    monkeypatch.setattr(digests, "LARGE_BYTES", 10_000)
    assert opened(final) == ["model.safetensors"] and not (run / ".hashes.json").exists()  # changed a moment ago
    monkeypatch.setattr(digests, "CLOCK_TICK", 0)
    assert opened(final) == ["model.safetensors"] and opened(final) == []
    assert opened(run / "checkpoint-1") == []  # the run's, not the checkpoint's
    assert str(tmp_path) not in (run / ".hashes.json").read_text()
    status, content = weights.stat(), weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size, time and inode
    with pytest.raises(InputError, match="has other weights or another config.json"):
        opened(final)
    weights.write_bytes(content)
    assert opened(final) == ["model.safetensors"] and opened(final) == []

    model = open_config(final).model
    digests._HASHES.clear()
    read.clear()
    released_digests(model, run)  # as a start of training does
    assert read == ["config.json"] * 2
    for foreign in ("mine", "[]", '{"a": 1}', '{"' + "0" * 64 + '": "1"}'):
        (run / ".hashes.json").write_text(foreign)
        assert opened(final) == opened(final) == ["model.safetensors"]
        assert (run / ".hashes.json").read_text() == foreign
    (run / ".hashes.json").write_text("")  # after a loss of power
    assert opened(final) == ["model.safetensors"] and opened(final) == []
    (run / ".hashes.json").unlink()
    (run / ".hashes.json").symlink_to(tmp_path / "elsewhere")
    assert opened(final) == ["model.safetensors"] and not (tmp_path / "elsewhere").exists()
    (run / ".hashes.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(digests, "publish", lambda *_: os.mkdir(tmp_path))  # any OSError, as on a read-only disk
        assert opened(final) == opened(final) == ["model.safetensors"]
    (run / ".lock").unlink()  # not a run's folder: nothing is written there
    assert opened(final) == ["model.safetensors"] and not (run / ".hashes.json").exists()
