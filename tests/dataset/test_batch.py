"""Batches: made of samples, split into smaller ones, taken apart again. Run: python -m pytest tests/dataset/test_batch.py"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from config import IGNORE_INDEX
from dataset.batch import Batch, Sample, collate
from tests.toy_batches import CPU, PAD, are_same, is_same, samples_of

IMAGES = (1, 0, 3, 0, 1)


def mixed_samples() -> list[Sample]:
    """Samples with fresh and cached images: sample 2 has a cached one between two fresh ones, sample 0 only a cached one,
    sample 4 only a fresh one."""
    samples = samples_of(300, IMAGES)
    for place, cached in ((0, [True]), (2, [False, True, False])):
        pixels, is_cached = samples[place].pixel_values, torch.tensor(cached)
        assert pixels is not None
        samples[place] = dataclasses.replace(
            samples[place],
            pixel_values=None if all(cached) else pixels[~is_cached],
            patch_features=torch.full((sum(cached), 4, 2), float(place)),
            is_cached=cached,
            image_keys=[f"{place}.{j}" for j, one in enumerate(cached) if not one],
        )
    return samples


def as_packed(samples: list[Sample]) -> list[Sample]:
    """The samples as a packed row holds them: a first token has no label."""
    samples = [dataclasses.replace(sample, labels=sample.labels.clone()) for sample in samples]
    for sample in samples:
        sample.labels[0] = IGNORE_INDEX
    return samples


# --- what a batch is


@pytest.mark.parametrize("kind", [Batch, Sample])
def test_batches_and_samples_are_frozen(kind):
    samples = samples_of(300)
    one = samples[0] if kind is Sample else collate(samples, PAD)
    assert isinstance(one, kind)
    for name in ("input_ids", "labels", "is_cached", "imput_ids"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, name, None)


@pytest.mark.parametrize("packed", [False, True])
def test_counts_leave_out_padding(packed):
    samples = samples_of(300, IMAGES)
    batch = collate(samples, PAD, packed)
    assert batch.is_packed == packed and batch.num_samples == len(samples) == len(batch.ids)
    assert batch.num_tokens == sum(len(sample.input_ids) for sample in samples) < batch.input_ids.numel()
    assert batch.num_targets == sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in samples)
    assert batch.max_sample_length == max(len(sample.input_ids) for sample in samples)
    assert batch.images_in_sample == list(IMAGES)


@pytest.mark.parametrize("packed", [False, True])
def test_the_model_gets_tensors_on_its_device_and_ids_and_labels_on_the_cpu(packed):
    batch = collate(samples_of(300), PAD, packed)
    device = torch.device("meta")
    inputs = batch.model_inputs(device)
    expected = {"input_ids", "labels", "attention_mask", "lengths", "num_tokens", "pixel_values"}
    assert set(inputs) == expected and inputs["pixel_values"].device == device
    assert inputs["input_ids"].device == inputs["labels"].device == CPU
    assert (inputs["attention_mask"] is None) == packed and inputs["lengths"] == batch.lengths
    assert inputs["num_tokens"] == (batch.num_tokens if packed else None)
    features = torch.ones(5, 4, 2)
    encoded = batch.model_inputs(device, encoder=lambda given: features if given is batch else None)
    assert set(encoded) == expected - {"pixel_values"} | {"patch_features"} and encoded["patch_features"] is features


# --- pinned memory


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "samples", [samples_of(300), mixed_samples(), samples_of(300, (0, 0))], ids=["fresh", "cached", "text"]
)
def test_data_loader_pins_every_tensor_of_a_batch(packed, samples, monkeypatch):
    """DataLoader's own function calls the method. The pinning itself needs a GPU and is replaced here."""
    batch = collate(samples, PAD, packed)
    copies: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor, device=None: copies.setdefault(id(tensor), tensor.clone())
    )
    pinned = pin_memory(batch, "cuda")
    assert is_same(pinned, batch) and pinned is not batch
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) >= 2 and len(copies) == len(tensors)
    for name, tensor in tensors.items():
        assert vars(pinned)[name] is copies[id(tensor)]


# --- a batch in pieces


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_gives_back_its_samples(packed):
    samples = mixed_samples()
    batch = collate(samples, PAD, packed)
    found = list(batch.samples())
    assert are_same(found, as_packed(samples) if packed else samples)
    assert is_same(collate(found, PAD, packed), batch)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [1, 3], [2], [4, 1, 2, 0]], ids=str)
def test_a_piece_is_what_its_samples_alone_would_make(packed, pieces, chosen):
    """Samples without images, with one and with three, cached and fresh: each keeps its own, and no piece is wider than its
    longest sample."""
    samples = mixed_samples()
    samples = [samples[i] for i in chosen]
    whole = collate(samples, PAD, packed)
    if chosen == [0, 1, 2, 3, 4]:
        assert whole.is_cached == [True, False, True, False, False] and len(whole.image_keys) == 3
    found = list(whole.split(pieces))
    size = -(-len(samples) // pieces)
    expected = [collate(samples[first : first + size], PAD, packed) for first in range(0, len(samples), size)]
    assert are_same(found, expected) and min(pieces, len(samples)) / 2 <= len(found) <= pieces
    assert [name for piece in found for name in piece.ids] == whole.ids
    assert sum(piece.num_targets for piece in found) == whole.num_targets


def test_a_batch_in_one_piece_is_itself():
    batch = collate(samples_of(300), PAD)
    (piece,) = batch.split(1)
    assert piece is batch


def test_messages_about_replaced_records_stay_with_the_whole_batch():
    samples = samples_of(300)
    samples[0] = dataclasses.replace(samples[0], replaced="r9: no such file.")
    batch = collate(samples, PAD)
    assert batch.replaced == ["r9: no such file."]
    assert all(piece.replaced == [] for piece in batch.split(2))
