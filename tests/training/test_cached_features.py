"""Patch features from the cache and from the tower: in reading order, and the same training.

Run: python -m pytest tests/training/test_cached_features.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dataset.batch import Batch, Sample, collate
from dataset.loader import QADataset
from model.model import VisionLanguageModel
from model.projector import PROJECTORS
from tests.toy_batches import text_sample
from tests.toy_language import write_qwen2
from tests.toy_model import build_toy
from tests.toy_project import TOWERS, run_training, write_images, write_project
from training import cached_features
from training.cached_features import CachedEncoder
from visual.encoders import VisionTower
from visual.feature_cache import FeatureCache

CPU, AWAY = torch.device("cpu"), torch.device("meta")  # meta plays a device that the model does not run on
TOKENS, WIDTH = 3, 5


class Tower(nn.Module):
    """A stub: an image of sevens has features of sevens. Records its moves and the images that it encodes."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)
        self.model.dtype = torch.float32
        self.device, self.moves, self.calls = CPU, [], []

    def to(self, device):
        self.moves.append(torch.device(device))
        self.device = self.moves[-1]
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        assert self.device == CPU
        self.calls.append(pixel_values[:, 0, 0, 0].tolist())
        return pixel_values[:, 0, 0, 0].view(-1, 1, 1).expand(-1, TOKENS, WIDTH)


@pytest.fixture
def encoder(tmp_path) -> CachedEncoder:
    model = VisionLanguageModel(Tower(), nn.Identity(), nn.Identity())
    cache = FeatureCache(tmp_path / "features", TOKENS, WIDTH, torch.float32)
    return CachedEncoder(model, cache, CPU, contextlib.nullcontext)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    write_images(tmp_path / "images", 8)
    return [tmp_path / "images" / f"{i}.png" for i in range(8)]


def batch_of(encoder: CachedEncoder, images: list[Path], *samples: list[int]) -> Batch:
    """Return a batch of samples with these images, each looked up in the cache as the loader does."""

    def sample(numbers: list[int]) -> Sample:
        found = [encoder.cache.find(images[i]) for i in numbers]
        pixels = [
            torch.full((3, 2, 2), float(i)) for i, (stored, _) in zip(numbers, found, strict=True) if stored is None
        ]
        stored = [tensor for tensor, _ in found if tensor is not None]
        return Sample(
            id="s",
            input_ids=torch.ones(4).long(),
            labels=torch.ones(4).long(),
            pixel_values=torch.stack(pixels) if pixels else None,
            patch_features=torch.stack(stored) if stored else None,
            image_keys=[key for tensor, key in found if tensor is None],
            is_cached=[tensor is not None for tensor, _ in found],
        )

    return collate([sample(numbers) for numbers in samples], 0, packed=True)


def numbers(features: Tensor) -> list[int]:
    assert features.shape[1:] == (TOKENS, WIDTH) and (features == features[:, :1, :1]).all()
    return features[:, 0, 0].int().tolist()


def test_stored_and_new_images_are_in_reading_order(encoder, images):
    """No image stored, some, all. Each is encoded once, even one that is twice in a batch."""
    tower = encoder.model.vision_tower
    assert numbers(encoder(batch_of(encoder, images, [5, 1], [3]))) == [5, 1, 3]
    mixed = batch_of(encoder, images, [2, 1, 7], [], [3, 4], [2])
    assert mixed.is_cached == [False, True, False, True, False, False]
    assert numbers(encoder(mixed)) == [2, 1, 7, 3, 4, 2]
    assert tower.calls == [[5, 1, 3], [2, 7, 4]]
    stored = batch_of(encoder, images, [7], [2, 5])
    assert stored.pixel_values is None and numbers(encoder(stored)) == [7, 2, 5] and len(tower.calls) == 2
    assert not encoder(stored).requires_grad


def test_stored_and_new_images_are_joined_without_waiting_for_the_device(encoder, images, monkeypatch):
    """On the meta device, whose tensors have no values to wait for."""
    encoder(batch_of(encoder, images, [1, 3]))
    encoder.device = AWAY
    fresh = torch.empty(2, TOKENS, WIDTH, device=AWAY)
    monkeypatch.setattr(encoder.cache, "features", lambda keys, pixel_values, encode: fresh)
    features = encoder(batch_of(encoder, images, [2, 1, 7], [3]))
    assert features.device == AWAY and features.shape == (4, TOKENS, WIDTH)


def test_a_batch_without_images_has_no_features(encoder, images):
    batch = batch_of(encoder, images, [], [])
    assert encoder(batch) is None and batch.model_inputs(CPU, encoder)["patch_features"] is None


def test_the_model_gets_features_instead_of_pixels(encoder, images):
    inputs = batch_of(encoder, images, [3], [6]).model_inputs(CPU, encoder)
    assert numbers(inputs["patch_features"]) == [3, 6] and "pixel_values" not in inputs
    assert set(batch_of(encoder, images, [0]).model_inputs(CPU)) >= {"pixel_values", "lengths"}


def test_an_idle_tower_leaves_and_comes_back_for_a_new_image(encoder, images, monkeypatch):
    """It leaves after IDLE_BATCHES batches in a row without a new image, and again after as many, because an answer may have
    brought it back in between; it does not move with every batch."""
    monkeypatch.setattr(cached_features, "IDLE_BATCHES", 3)
    tower = encoder.model.vision_tower
    encoder(batch_of(encoder, images, [0]))
    known, new = batch_of(encoder, images, [0]), batch_of(encoder, images, [1])
    batches = [known, known, new, known, known, known, known, known, known]
    moves = [0, 0, 0, 0, 0, 1, 1, 1, 2]
    for batch, count in zip(batches, moves, strict=True):
        encoder(batch)
        assert tower.moves == [CPU] * count
    tower.device = AWAY  # as if the model ran on a GPU and the tower had left it
    assert numbers(encoder(batch_of(encoder, images, [2, 0]))) == [2, 0]
    assert tower.moves == [CPU] * 3 and tower.device == CPU


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_qwen2(folder / "qwen2")
    for name, write in TOWERS.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_features_are_the_same_tensor_with_and_without_a_cache_in_half_precision(folders, tmp_path, tower, projector):
    """The tower's norms compute in float32, as a GPU's autocast makes them: its features have more precision than the
    cache. They are rounded without a cache too, and stay as they are without autocast."""
    built = build_toy(folders, tower=tower, projector=projector, dtype=torch.bfloat16)
    model, side = built.model, built.model.vision_tower.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.patch_features(pixels)
        assert plain.dtype == torch.bfloat16 and torch.equal(plain, model.vision_tower(pixels.bfloat16()))
        model.vision_tower.float()
        assert torch.equal(model.patch_features(pixels), model.vision_tower(pixels))
    autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    cache = FeatureCache(tmp_path, *model.vision_tower(pixels).shape[1:], torch.bfloat16)
    (tmp_path / "0.png").write_bytes(b"0"), (tmp_path / "1.png").write_bytes(b"1")
    keys = [cache.find(tmp_path / name)[1] for name in ("0.png", "1.png")]
    encoder = CachedEncoder(model, cache, CPU, autocast)
    images = {"images_in_sample": [2], "is_cached": [False] * 2, "image_keys": keys, "pixel_values": pixels}
    batch = dataclasses.replace(collate([text_sample("s", 4)], 0), **images)
    cached = encoder(batch)
    with autocast(), torch.no_grad():
        assert model.vision_tower(pixels).dtype == torch.float32, "the case that is tested"
        features = model.patch_features(pixels)
        assert features.dtype == cached.dtype == torch.bfloat16 and torch.equal(features, cached)
        assert torch.equal(model.encode_images(pixels), model.project(cached))


# --- a run


RUN = (
    "train.eval_steps=null", "train.score_samples=1", "train.max_steps=4", "train.save_steps=4", "lora.dropout=0",
    "train.projector_start=random",  # no image is encoded before the first step
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def state(folder: Path) -> dict[str, Tensor]:
    saved = folder / "checkpoint-4"
    return {
        f"{path.name}/{key}": tensor for path in saved.glob("*.safetensors") for key, tensor in load_file(path).items()
    }


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def count_encoded(monkeypatch) -> list[int]:
    counts, forward = [], VisionTower.forward
    monkeypatch.setattr(
        VisionTower, "forward", lambda self, pixels: (counts.append(len(pixels)), forward(self, pixels))[1]
    )
    return counts


def test_a_run_with_cached_features_equals_one_without_bit_for_bit(project, tmp_path, monkeypatch):
    """With one image in each micro-batch the tower always computes the same shapes. The last run finds all features."""
    alone = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4")
    counts = count_encoded(monkeypatch)
    monkeypatch.setattr("train.score_held_out", lambda run: None)
    encoded = {}
    for name, word in (("without", "off"), ("first", "on"), ("second", "on")):
        run_training(project, f"output_dir={tmp_path / name}", f"train.cache_features={word}", *RUN, *alone)
        encoded[name], counts[:] = len(counts), []
    assert encoded == {"without": 16, "first": 9, "second": 0}
    for name in ("first", "second"):
        found, expected = state(tmp_path / name), state(tmp_path / "without")
        assert found.keys() == expected.keys() and len(found) > 20
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
        assert losses(tmp_path / name) == losses(tmp_path / "without")


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_encoded_in_other_batches_differ_only_by_rounding(project, tmp_path, packing, workers):
    common = (*RUN, f"train.packing={packing}", f"train.num_workers={workers}")
    shutil.rmtree(project.parent / "qa.features", ignore_errors=True)
    for word in ("off", "on"):
        run_training(project, f"output_dir={tmp_path / word}", f"train.cache_features={word}", *common)
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-6)


def test_an_image_with_stored_features_is_not_read(project, tmp_path, monkeypatch):
    """Reading, decoding and scaling images is most of the loader's work."""
    run_training(project, f"output_dir={tmp_path / 'a'}", *RUN)
    read, sample = [], QADataset._sample

    def watched(self, *arguments):
        pixels = self.read_pixels
        self.read_pixels = lambda path: read.append(path) or pixels(path)
        try:
            return sample(self, *arguments)
        finally:
            self.read_pixels = pixels

    monkeypatch.setattr(QADataset, "_sample", watched)
    run_training(project, f"output_dir={tmp_path / 'b'}", *RUN)
    assert read == []
    run_training(project, f"output_dir={tmp_path / 'c'}", *RUN, "train.cache_features=off")
    assert len(read) == 17 and losses(tmp_path / "b") == losses(tmp_path / "a")
