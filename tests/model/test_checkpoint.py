"""Checkpoints: written as a whole or not at all, damage found and named, weights the same after loading.

Run: python -m pytest tests/model/test_checkpoint.py
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import qwen
from config import InputError, load_config
from model.checkpoint_folder import latest_checkpoint, verify_folder, write_folder
from tests.toy_project import run_training, write_project
from training.run import open_model, open_processors


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = write_project(tmp_path_factory.mktemp("project"))
    run_training(config, "train.eval_steps=null", "train.max_steps=2", "train.save_steps=1", "train.score_samples=1")
    return config


@pytest.fixture
def run(trained, tmp_path):
    """Copy the folder of a finished run, for a test to damage."""
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_is_written_as_a_whole_or_not_at_all(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    write_folder(tmp_path / "good", lambda folder: (folder / "a").write_text("first"))
    for name in ("good", "new"):
        with pytest.raises(OSError, match="disk full"):
            write_folder(tmp_path / name, fail)
    verify_folder(tmp_path / "good")
    assert (tmp_path / "good" / "a").read_text() == "first" and not (tmp_path / "new").exists()
    write_folder(tmp_path / "good", lambda folder: (folder / "a").write_text("second"))
    verify_folder(tmp_path / "good")
    assert (tmp_path / "good" / "a").read_text() == "second"


def test_every_file_is_in_the_manifest_and_nothing_is_pickled(run):
    files = {path.relative_to(run / "final").as_posix() for path in (run / "final").rglob("*") if path.is_file()}
    listed = set(json.loads((run / "final" / "manifest.json").read_text())["files"])
    assert files == listed | {"manifest.json"}
    assert {"config.yaml", "projector.safetensors", "adapter_model.safetensors", "adapter_config.json"} <= listed
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_named_and_auto_resume_uses_the_previous_checkpoint(run, damage):
    victim = run / "checkpoint-2" / ("manifest.json" if damage == "manifest" else "projector.safetensors")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flip":
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(content[:-7])
    elif damage == "remove":
        victim.unlink()
    else:
        victim.write_text("{")
    with pytest.raises(InputError, match=victim.name):
        verify_folder(run / "checkpoint-2")
    reports = []
    assert latest_checkpoint(run, reports.append) == run / "checkpoint-1"
    assert len(reports) == 1 and victim.name in reports[0]


def test_a_manifest_cannot_name_files_outside_its_folder(run):
    path = run / "final" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../checkpoint-2/projector.safetensors"] = manifest["files"]["projector.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a plain file inside"):
        verify_folder(run / "final")


def test_a_folder_that_is_not_a_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="checkpoint folder does not exist"):
        verify_folder(tmp_path / "absent")
    with pytest.raises(InputError, match="manifest.json"):
        verify_folder(tmp_path)


def test_peft_loads_the_adapter_of_a_checkpoint(trained, run):
    """The folder is also an ordinary PEFT adapter with the same weights."""
    lm = qwen.load_language_model(str(trained.parent / "lm"))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(lm, run / "final")
    saved = load_file(run / "final" / "adapter_model.safetensors")
    weights = dict(loaded.named_parameters())
    assert saved and all(
        torch.equal(weights[name.replace(".weight", ".default.weight")], tensor) for name, tensor in saved.items()
    )


def _replace(folder, name, change):
    """Write a copy of a checkpoint with one file changed and a manifest that fits."""

    def write(partial):
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / "manifest.json").unlink()
        change(partial / name)

    write_folder(folder.parent / "changed", write)
    return folder.parent / "changed"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v[:-1].clone() if v.ndim else v for k, v in t.items()}, "another shape"),
        (lambda t: t | {"linear_3.weight": torch.zeros(1)}, "unknown to this model"),
        (lambda t: {k: v for k, v in t.items() if k != "linear_2.bias"}, "missing"),
    ],
)
@pytest.mark.parametrize("name", ["projector.safetensors", "adapter_model.safetensors"])
def test_weights_that_do_not_fit_are_refused(trained, run, name, change, message):
    import test as script

    def rewrite(path):
        tensors = load_file(path)
        changed = change(tensors)
        if message == "missing" and name.startswith("adapter"):
            changed.pop(sorted(changed)[0])
        save_file(changed, path)

    folder = _replace(run / "final", name, rewrite)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        places = [f"model.vision_tower={trained.parent / 'tower'}", f"model.language_model={trained.parent / 'lm'}"]
        script.main(["--checkpoint", str(folder), "--no-image", *places])


def test_a_new_run_starts_from_the_weights_of_another(trained, tmp_path):
    """With learning rates of zero, a run with model.start_from ends with exactly the weights it started from."""
    folder = trained.parent / "run" / "final"
    run_training(
        trained, f"model.start_from={folder}", f"output_dir={tmp_path / 'second'}", "train.projector_lr=0",
        "train.lora_lr=0", "train.max_steps=1", "train.eval_steps=null", "train.score_samples=1", "seed=7",
    )  # fmt: skip
    for name in ("projector.safetensors", "adapter_model.safetensors"):
        first, second = load_file(folder / name), load_file(tmp_path / "second" / "final" / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("words", ["full", "top:1"])
def test_trained_parts_of_the_language_model_and_encoder_are_restored(trained, tmp_path, words):
    """Weights trained by full and top:N are in the checkpoint, and a run that starts from it has the same weights."""
    common = [
        f"train.trainable.language_model={words}", "train.lora_lr=null", "train.eval_steps=null", "train.score_samples=1",
        f"train.trainable.vision_tower={words}", "train.trainable.embeddings=full", "train.max_steps=1",
    ]  # fmt: skip
    rates = ("language_model_lr", "vision_tower_lr", "embeddings_lr", "projector_lr")
    run_training(trained, *common, *[f"train.{rate}=1e-3" for rate in rates], f"output_dir={tmp_path / 'a'}")
    first = tmp_path / "a" / "final"
    run_training(
        trained,
        *common,
        *[f"train.{rate}=0" for rate in rates],
        f"output_dir={tmp_path / 'b'}",
        f"model.start_from={first}",
    )
    for name in ("language_model.safetensors", "vision_tower.safetensors", "projector.safetensors"):
        a, b = load_file(first / name), load_file(tmp_path / "b" / "final" / name)
        assert a and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    assert "model.embed_tokens.weight" in load_file(first / "language_model.safetensors")
    lm = qwen.load_language_model(str(trained.parent / "lm"))
    changed = load_file(first / "language_model.safetensors")["model.norm.weight"]
    assert not torch.equal(changed, lm.model.norm.weight), "training did not change the norm"
    assert load_config(first / "config.yaml").train.trainable.language_model == words


@pytest.mark.parametrize(
    "later", [["train.trainable.language_model=frozen", "train.lora_lr=null"], []], ids=["frozen", "lora"]
)
def test_what_an_earlier_run_trained_stays_in_the_checkpoint_if_a_later_run_freezes_it(trained, tmp_path, later):
    """The checkpoint of the second run still holds the language model of the first."""
    short = ["train.eval_steps=null", "train.score_samples=1", "train.max_steps=1", "train.save_steps=1"]
    full = ["train.trainable.language_model=full", "train.lora_lr=null", "train.language_model_lr=1e-2"]
    run_training(trained, *short, *full, f"output_dir={tmp_path / 'a'}")
    run_training(
        trained, *short, *later, f"output_dir={tmp_path / 'b'}", f"model.start_from={tmp_path / 'a' / 'final'}"
    )
    first, second = (load_file(tmp_path / name / "final" / "language_model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    config = load_config(tmp_path / "b" / "final" / "config.yaml")
    for folder in ("final", "checkpoint-1"):  # as test.py and a resumed run build it
        model = open_model(config, "fp32", open_processors(config), tmp_path / "b" / folder).model
        rebuilt = {name.replace(".base_layer", ""): p for name, p in model.causal_lm.named_parameters()}
        assert all(torch.equal(rebuilt[key], first[key]) for key in first)


def test_a_file_in_place_of_a_temporary_folder_is_named_and_kept(tmp_path):
    (tmp_path / ".final.partial").write_text("mine")
    with pytest.raises(InputError, match="final.partial: is a file, where a run makes a temporary folder"):
        write_folder(tmp_path / "final", lambda folder: (folder / "a").write_text("text"))
    assert (tmp_path / ".final.partial").read_text() == "mine" and not (tmp_path / "final").exists()
