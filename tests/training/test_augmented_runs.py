"""A run with augmentation: what is augmented and what is not, resuming, and cached views.

Run: python -m pytest tests/training/test_augmented_runs.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from config import InputError, load_config
from dataprocess.process_image import prepare_from_config
from model.build import read_pixels
from tests.spy import spy
from tests.toy_batches import are_same
from tests.toy_project import fresh_accelerate, run_training, write_project
from training import open as opening
from training.calibrate import sample_examples
from training.run import Run, open_model, open_processors, open_qa_file
from training.speed import feature_cache
from visual.encoders import VisionTower

NEW = "data.augment={crop: 0.3, rotate: 15, color: 0.2, blur: 1.0}"
FIXED = "data.augment={crop: 0.3, rotate: 15, color: 0.2, blur: 1.0, views: 2}"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    path = write_project(tmp_path_factory.mktemp("project"))
    prepare_from_config(load_config(path))
    return path


@pytest.fixture(scope="module")
def opened(project):
    """Return a function that opens a run before anything is chosen for it: overrides -> run."""
    config = load_config(project)
    with fresh_accelerate():
        built = open_model(config, "fp32", open_processors(config))
        none = {path: np.empty(0, np.int64) for path in (config.data.qa_file, config.data.validation_file)}
        accelerator = Accelerator(cpu=True)

        def open_run(*overrides: str) -> Run:
            config = load_config(project, overrides)
            return opening._run(config, accelerator, "fp32", built=built, left_out=none, digests={})

        yield open_run


@pytest.mark.parametrize("augment", [NEW, FIXED])
def test_training_images_are_augmented_and_no_others(opened, augment):
    """Neither held-out images, nor those of a QA file that is opened to ask about."""
    plain, run = opened(), opened(augment)
    keys = [(epoch, index) for epoch in range(2) for index in range(9)]
    assert not any(torch.equal(run.train_set[key].pixel_values, plain.train_set[key].pixel_values) for key in keys)
    held_out = [[one.validation_set[0, i] for i in range(3)] for one in (run, plain)]
    assert len(plain.validation_set) == 3 and are_same(*held_out)
    asked = open_qa_file(run.config, run.built, run.config.data.qa_file)
    assert are_same([asked[key] for key in keys], [plain.train_set[key] for key in keys])


@pytest.mark.parametrize(("augment", "views"), [(NEW, 4), (FIXED, 2)])
def test_the_projectors_start_sees_the_images_and_the_first_views_of_them(opened, augment, views):
    plain, run = opened(), opened(augment)
    found, images = (sample_examples(one, 9, with_views=True) for one in (run, plain))
    assert len(sample_examples(run, 9, with_views=False).features) == 9
    assert len(images.features) == 9 and torch.equal(images.image_of, torch.arange(9))
    assert torch.equal(found.features[:9], images.features)
    assert are_same(found.answers, images.answers)
    assert torch.equal(found.image_of, torch.arange(9).repeat(1 + views))

    def encoded(one: Run, epoch: int, index: int) -> Tensor:
        return one.model.patch_features(one.train_set[epoch, index].pixel_values)[0]

    of_records = [encoded(plain, 0, index) for index in range(9)]
    order = [next(i for i in range(9) if torch.equal(of_records[i], features)) for features in images.features]
    for place, features in enumerate(found.features[9:]):
        assert torch.equal(encoded(run, place // 9, order[place % 9]), features)


def test_off_gives_the_pixels_of_the_image_processor_alone(opened):
    run = opened()
    for index in range(9):
        (path,) = run.train_set.qa.image_paths(run.train_set.qa[index])
        pixels = run.train_set[0, index].pixel_values
        assert torch.equal(pixels[0], read_pixels(run.built.image_processor, path))


def test_views_and_seed_reach_the_pixels(opened):
    new, fixed, other = opened(NEW), opened(FIXED), opened(NEW, "seed=2")
    pixels = [[run.train_set[epoch, 0].pixel_values for epoch in range(4)] for run in (new, fixed, other)]
    assert len({tensor.numpy().tobytes() for tensor in pixels[0] + pixels[2]}) == 8
    assert torch.equal(pixels[1][0], pixels[1][2]) and torch.equal(pixels[1][1], pixels[1][3])
    assert not torch.equal(pixels[1][0], pixels[1][1])


def test_features_of_new_views_are_not_cached_and_those_of_fixed_ones_are(opened):
    chosen, cache = feature_cache(opened(NEW))
    assert chosen.value == "off" and cache is None and "data.augment.views" in chosen.why
    chosen, cache = feature_cache(opened(FIXED))
    size = (12 + 2 * 9) * 16 * 32 * 4  # images and views of the training images, patches, width, bytes
    assert chosen.is_on and cache is not None and chosen.why.startswith(f"up to {size / 2**20:.1f} MB")
    once = (FIXED, "train.max_steps=4", "train.eval_steps=4")  # 16 samples of 9 records, each with two views
    assert feature_cache(opened(*once))[0] == dataclasses.replace(
        chosen, value="off", why="each view of an image is seen once"
    )


# --- whole runs

RUN = (
    "train.max_steps=4", "train.save_steps=2", "train.eval_steps=null", "lora.dropout=0.1",
    "train.image_noise=0.5", FIXED,
    "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4",  # the tower always gets one image
)  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    files = (folder / "checkpoint-4").glob("*.safetensors")
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_cached_views_and_a_resumed_run_give_the_same_weights_bit_for_bit(project, tmp_path, monkeypatch):
    """An uninterrupted run without a cache, one with a cache, and its end again, resumed with worker processes."""
    counts = spy(monkeypatch, VisionTower, "forward", lambda tower, pixels: len(pixels))
    monkeypatch.setattr("train.score_held_out", lambda run: None)
    shutil.rmtree(project.parent / "qa.features", ignore_errors=True)

    def run(name: str, *more: str) -> int:
        """Train, compare with the first run, and return how many images were encoded."""
        counts.clear()
        assert run_training(project, *RUN, f"output_dir={tmp_path / name}", *more) == 0
        found, expected = weights(tmp_path / name), weights(tmp_path / "plain")
        assert found.keys() == expected.keys() and len(found) > 20
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
        assert losses(tmp_path / name) == losses(tmp_path / "plain") and len(losses(tmp_path / name)) == 4
        return sum(counts)

    assert run("plain", "train.cache_features=off") == 16 + 9  # four steps, and the projector's start
    assert run("cached", "train.cache_features=on") == 16 + 9
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "cached" / name)
    assert run("cached", "train.cache_features=on", "train.num_workers=2") == 0

    with pytest.raises(InputError, match=r"data\.augment\.crop: 0\.3 -> 0\.2"):
        run("cached", "data.augment.crop=0.2")
