"""Speed-ups: what `auto` chooses and why, what on and off do, what is refused and what is printed.

Run: python -m pytest tests/training/test_speed.py
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from config import InputError, load_config
from config.load import FREE_KEYS
from dataprocess.process_image import prepare_from_config
from qwen.attention import PACKED_SDPA
from tests.toy_project import fresh_accelerate, run_training, write_project
from training import open as opening
from training import run as running
from training import speed
from training.speed import (
    Choice,
    activation_checkpointing,
    attention,
    attention_name,
    choices_table,
    feature_cache,
    packing,
)
from visual.feature_cache import cache_folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GB = 2**30
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    path = write_project(tmp_path_factory.mktemp("project"))
    prepare_from_config(load_config(path, []))
    return path


@pytest.fixture(scope="module")
def opened(project):
    """A run with its model, before anything is chosen for it."""
    config = load_config(project, [])
    with fresh_accelerate():
        built = running.open_model(config, "fp32", running.open_processors(config))
        none = {path: np.empty(0, np.int64) for path in (config.data.qa_file, config.data.validation_file)}
        yield opening._run(config, Accelerator(cpu=True), "fp32", built=built, left_out=none, digests={})


def run_of(opened, project: Path, *overrides: str) -> running.Run:
    return dataclasses.replace(opened, config=load_config(project, overrides))


# --- attention


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    "device, precision, fits", [(GPU, "bf16", True), (GPU, "fp16", True), (GPU, "fp32", False), (CPU, "bf16", False)]
)
def test_auto_chooses_flash_attention_if_it_is_installed_and_fits(
    project, monkeypatch, installed, device, precision, fits
):
    monkeypatch.setattr(speed, "is_flash_attn_2_available", lambda: installed)
    chosen = attention(load_config(project, []), device, precision)
    assert chosen.value == ("flash_attention_2" if fits and installed else "sdpa") and chosen.why


@pytest.mark.parametrize("word, name", [("sdpa", PACKED_SDPA), ("eager", "eager"), ("flash_attention_2",) * 2])
def test_a_configured_attention_is_used(project, monkeypatch, word, name):
    monkeypatch.setattr(speed, "is_flash_attn_2_available", lambda: True)
    chosen = attention(load_config(project, [f"train.attn_implementation={word}"]), GPU, "bf16")
    assert (chosen.value, chosen.why) == (word, "as configured")
    assert attention_name(chosen) == name, "its name in transformers: packed rows need an sdpa that separates documents"


@pytest.mark.parametrize("device, precision", [(CPU, "bf16"), (GPU, "fp32")])
def test_flash_attention_that_does_not_fit_is_refused(project, device, precision):
    config = load_config(project, ["train.attn_implementation=flash_attention_2"])
    with pytest.raises(InputError, match=f'"train.attn_implementation" .* {precision} on {device.type}. Use auto'):
        attention(config, device, precision)


# --- packing


@pytest.mark.parametrize(
    "word, attention, value",
    [
        ("auto", "auto", "on"), ("auto", "sdpa", "on"), ("auto", "eager", "off"), ("on", "auto", "on"),
        ("off", "auto", "off"), ("off", "eager", "off"), ("auto", "flash_attention_2", "on"),
    ],
)  # fmt: skip
def test_packing_is_on_except_with_eager_attention(project, word, attention, value):
    chosen = packing(load_config(project, [f"train.packing={word}", f"train.attn_implementation={attention}"]))
    assert chosen.value == value and chosen.is_on == (value == "on")
    assert chosen.why == "as configured" or word == "auto" or attention == "eager"


def test_packing_with_eager_attention_is_refused(project):
    config = load_config(project, ["train.packing=on", "train.attn_implementation=eager"])
    with pytest.raises(InputError, match='"train.packing" is on, but eager.*"train.attn_implementation" to auto'):
        packing(config)


# --- the feature cache


def test_features_are_cached_if_images_are_used_again(opened, project):
    """6 steps of 4 samples are more than the 9 records, and validation reads its images twice."""
    chosen, cache = feature_cache(run_of(opened, project))
    size = 12 * 16 * 32 * 4  # images, patches, width, bytes
    assert chosen.is_on and cache is not None
    assert chosen.why.startswith(f"up to {size / 2**20:.1f} MB in {project.parent / 'qa.features'}/")
    assert chosen.why.endswith("0.0 MB of it stored") and not (project.parent / "qa.features").exists()


@pytest.mark.parametrize("word", ["auto", "on"])
def test_a_damaged_cache_is_rebuilt_and_said_before_the_first_step(opened, project, capsys, word):
    run = run_of(opened, project, f"train.cache_features={word}")
    folder = cache_folder(run.config.data.qa_file, run.model.vision_tower, run.built.image_processor, torch.float32)
    folder.mkdir(parents=True)
    try:
        (folder / "index.sqlite").write_text("shopping list\n" * 1000)
        (folder / "features.bin").symlink_to(project)
        chosen, cache = feature_cache(run)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"{folder}: the feature cache is damaged" in said
        assert chosen.is_on and cache is not None and len(cache) == 0 and not project.is_symlink()
    finally:
        shutil.rmtree(folder.parent)


ONCE = ("train.max_steps=2", "train.eval_steps=2")


@pytest.mark.parametrize("overrides", [ONCE, ("train.max_steps=2", "train.eval_steps=null")])
def test_features_are_not_cached_if_each_image_is_seen_once(opened, project, overrides):
    chosen, cache = feature_cache(run_of(opened, project, *overrides))
    assert (chosen.value, chosen.why, cache) == ("off", "each image is seen once", None)
    assert feature_cache(run_of(opened, project, *overrides, "train.cache_features=on"))[1] is not None


@pytest.mark.parametrize("overrides", [("train.max_steps=3", "train.eval_steps=3"), (*ONCE, "train.eval_steps=1")])
def test_a_second_epoch_or_a_second_evaluation_turns_the_cache_on(opened, project, overrides):
    assert feature_cache(run_of(opened, project, *overrides))[0].is_on


def test_stored_features_are_used_even_for_one_epoch(opened, project, monkeypatch):
    monkeypatch.setattr(speed.FeatureCache, "nbytes", 1000)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert feature_cache(run_of(opened, project, *ONCE))[0].is_on


def test_auto_makes_no_cache_that_would_fill_the_disk(opened, project, monkeypatch):
    size = 12 * 16 * 32 * 4
    for free, value in ((2 * size, "on"), (2 * size - 2, "off")):
        monkeypatch.setattr(speed.shutil, "disk_usage", lambda folder, free=free: Disk(0, 0, free))
        chosen, cache = feature_cache(run_of(opened, project))
        assert chosen.value == value and (cache is None) == (value == "off")
        assert feature_cache(run_of(opened, project, "train.cache_features=on"))[0].is_on
    assert chosen.why == f"it would take up to {size / 2**20:.1f} MB of {2 * size / 2**20:.1f} MB free"


def test_auto_makes_no_cache_in_a_folder_that_cannot_be_written(opened, project, monkeypatch):
    monkeypatch.setattr(speed.os, "access", lambda path, mode: path != project.parent)
    chosen, cache = feature_cache(run_of(opened, project))
    assert chosen.value == "off" and cache is None and chosen.why == f"{project.parent} cannot be written"
    assert feature_cache(run_of(opened, project, "train.cache_features=on"))[0].is_on, (
        "writing then reports what is wrong"
    )


def test_off_is_off(opened, project):
    chosen, cache = feature_cache(run_of(opened, project, "train.cache_features=off"))
    assert (chosen.value, chosen.why, cache) == ("off", "as configured", None)


@pytest.mark.parametrize("word", ["auto", "on"])
@pytest.mark.parametrize("reason", ["encoder trains", "train.fsdp"])
def test_features_of_an_encoder_that_trains_or_is_sharded_are_not_cached(opened, project, monkeypatch, word, reason):
    overrides = ["train.fsdp=true"] if reason == "train.fsdp" else []
    run = run_of(opened, project, f"train.cache_features={word}", *overrides)
    if overrides:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
    else:
        monkeypatch.setattr(type(run.built.model.vision_tower), "trains", True)
    if word == "on":
        with pytest.raises(InputError, match=f'"train.cache_features" is on, but .*{reason}.* set it to auto'):
            feature_cache(run)
    else:
        chosen, cache = feature_cache(run)
        assert chosen.value == "off" and reason in chosen.why and cache is None


def test_images_are_counted_in_a_thousand_records(opened):
    """Here in all of them: 9 and 3, one image each."""
    assert [speed._count_images(dataset) for dataset in opened.datasets] == [9, 3]


# --- activation checkpointing


def choose_checkpointing(opened, project, *overrides: str, batch_size: int = 2) -> Choice:
    config = load_config(project, overrides)
    return activation_checkpointing(config, opened.built, opened.train_set, CPU, batch_size)


def test_checkpointing_is_on_if_a_batch_would_not_fit(opened, project, monkeypatch):
    """The limit is a batch that takes MEMORY_SHARE of what Adam and gradients leave; a larger batch needs more."""
    sizes = [len(opened.train_set[0, i].input_ids) for i in range(9)]
    per_token = 2 * (8 * 64 + 4 * 96) * 4  # layers, tensors of the two sizes, bytes
    needed = (2 * np.mean(sizes) + 2 * np.std(sizes) * 2**0.5) * per_token
    adam = 12 * sum(p.numel() for p in opened.built.model.parameters() if p.requires_grad)
    for share, value in ((1.02, "off"), (0.98, "on")):
        free = int(adam + needed / speed.MEMORY_SHARE * share)
        monkeypatch.setattr(speed, "_free_memory", lambda device, free=free: free)
        chosen = choose_checkpointing(opened, project)
        assert chosen.value == value and re.fullmatch(r"a batch keeps about .*MB of .*MB free", chosen.why)
    monkeypatch.setattr(speed, "_free_memory", lambda device: int(adam + needed / speed.MEMORY_SHARE * 1.02))
    assert choose_checkpointing(opened, project, batch_size=4).is_on


def test_checkpointing_is_as_configured_and_off_if_the_memory_is_unknown(opened, project, monkeypatch):
    monkeypatch.setattr(speed, "_free_memory", lambda device: None)
    assert choose_checkpointing(opened, project) == Choice(
        "activation_checkpointing", "off", "the free memory is unknown"
    )
    for word, free in (("on", 100 * GB), ("off", 0)):
        monkeypatch.setattr(speed, "_free_memory", lambda device, free=free: free)
        chosen = choose_checkpointing(opened, project, f"train.activation_checkpointing={word}")
        assert (chosen.value, chosen.why) == (word, "as configured")


def test_the_free_memory_is_read_from_the_system():
    found = speed._free_memory(CPU)
    assert found is None or 2**20 < found < 2**50
    assert speed._free_memory(torch.device("mps")) is None


# --- what is printed, and what a resumed run may change


def test_the_table_has_a_line_for_each_choice():
    lines = choices_table(
        [Choice("packing", "on", "why"), Choice("attn_implementation", "sdpa", "torch's own")]
    ).splitlines()
    assert lines == ["packing              on    why", "attn_implementation  sdpa  torch's own"]


def test_a_run_prints_and_applies_its_choices_and_may_change_them_when_it_resumes(tmp_path, capsys, monkeypatch):
    project = write_project(tmp_path / "project")
    keys = ("packing", "cache_features", "activation_checkpointing", "attn_implementation")
    packed = []
    loader = running.make_loader

    def watched(*values, **options):
        packed.append(options["packed"])
        return loader(*values, **options)

    monkeypatch.setattr(running, "make_loader", watched)

    def chosen(*overrides: str) -> dict[str, str]:
        assert run_training(project, "train.eval_steps=null", "train.score_samples=1", *overrides) == 0
        printed = capsys.readouterr().out
        return {key: re.search(rf"^{key} +(\S+)", printed, re.MULTILINE)[1] for key in keys}

    assert chosen() == dict(zip(keys, ("on", "on", "off", "sdpa"), strict=True))
    assert packed == [True] and (project.parent / "qa.features").is_dir()
    others = ("train.packing=off", "train.cache_features=off", "train.activation_checkpointing=on")
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(project.parent / "run" / name)
    assert {f"train.{key}" for key in keys} <= set(FREE_KEYS)
    assert chosen(*others, "train.attn_implementation=eager") == dict(
        zip(keys, ("off", "off", "on", "eager"), strict=True)
    )
    assert packed == [True, False]
