"""Validation without generating: loss, perplexity, token accuracy and balance loss, compared with a plain computation.

Run: python -m pytest tests/evaluation/test_validation.py
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from config import IGNORE_INDEX
from dataset.batch import collate
from evaluation.validation import Sums, Validation, sum_losses, swap_images
from model.loss import balance_loss, count_right
from tests.toy_batches import CPU, PAD, samples_of
from tests.toy_language import write_qwen2_moe
from tests.toy_model import build_toy, train_config
from tests.toy_towers import write_clip
from training.held_out import image_text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A mixture of experts, in eval mode."""
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_qwen2_moe(folder / "qwen2_moe")
    return build_toy(folder, "qwen2_moe", train=train_config(language_model="full")).model.eval()


def plain_losses(model, samples) -> tuple[float, float]:
    """Return (loss, share of right tokens), computed sample by sample from all logits."""
    losses, right = [], []
    for sample in samples:
        features = None if sample.pixel_values is None else model.encode_images(sample.pixel_values)
        logits = model.causal_lm(input_ids=sample.input_ids[None], image_features=features).logits[0, :-1].double()
        targets = sample.labels[1:]
        wanted = targets != IGNORE_INDEX
        losses += F.cross_entropy(logits[wanted], targets[wanted], reduction="none").tolist()
        right += (logits[wanted].argmax(-1) == targets[wanted]).tolist()
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_validation_equals_a_plain_computation_however_records_are_batched(model, packed, size):
    samples = samples_of(model.causal_lm.config.image_token_id)
    batches = [collate(samples[start : start + size], PAD, packed) for start in range(0, len(samples), size)]
    sums = sum_losses(model, batches, device=CPU, autocast=contextlib.nullcontext)
    found = Validation.of_sums(sums, model.has_experts)
    with torch.no_grad():
        loss, right = plain_losses(model, samples)
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.token_accuracy == pytest.approx(right)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert 2 <= found.balance_loss < 4


def test_sums_add_up_over_processes_and_a_dense_model_has_no_balance_loss():
    one, other = Sums(6.0, 4, 2, 20.0, 10), Sums(2.0, 4, 4, 90.0, 30)
    assert Validation.of_sums(one.plus(other), True) == Validation(1.0, 0.75, 2.75)
    assert Validation.of_sums(one, False).values == {"loss": 1.5, "perplexity": math.exp(1.5), "token_accuracy": 0.5}
    assert Validation(800.0, 0.0, None).perplexity == math.inf


def test_a_perplexity_beyond_a_floats_range_is_left_out():
    found = Validation.of_sums(Sums(loss=2000.0, targets=2, right=0, tokens=4), has_experts=False)
    assert found.perplexity == math.inf and found.values == {"loss": 1000.0, "token_accuracy": 0.0}


def test_right_tokens_are_counted_in_chunks_without_a_gap(monkeypatch):
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(333, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = head(hidden).argmax(-1)
    targets = torch.where(torch.arange(333) % 3 == 0, best, (best + 1) % 50)
    monkeypatch.setattr("model.loss.chunk_rows", lambda vocabulary: 64)
    assert int(count_right(hidden, head, targets)) == 111


def test_the_balance_loss_is_float32_whatever_dtype_the_routers_have(model):
    config = model.causal_lm.config
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = balance_loss((logits, logits), None, config)
    assert found.dtype == torch.float32 and float(found) == float(balance_loss((logits.float(),) * 2, None, config))


# Swapped images


def test_images_are_swapped_among_different_ones():
    red, green, blue = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    features = torch.stack([red, green, red, blue, green])
    swapped = swap_images(features)
    assert all(not torch.equal(new, old) for new, old in zip(swapped, features, strict=True))
    assert torch.equal(swapped[0], swapped[2]) and torch.equal(swapped[1], swapped[4])
    assert swap_images(torch.stack([red, red])) is None and swap_images(features[:0]) is None


@pytest.mark.parametrize("packed", [False, True])
def test_what_images_add_is_the_loss_with_swapped_ones_minus_that_with_the_own(model, packed):
    """Over the samples that have an image."""
    samples = samples_of(model.causal_lm.config.image_token_id)
    batch = collate(samples, PAD, packed=packed)
    assert 0 < sum(map(bool, batch.images_in_sample)) < len(samples)
    found = Validation.of_sums(sum_losses(model, [batch], device=CPU, autocast=contextlib.nullcontext), True)
    with torch.no_grad():
        features = model.patch_features(batch.pixel_values)
        pictured = [sample for sample, count in zip(samples, batch.images_in_sample, strict=True) if count]
        inputs = collate(pictured, PAD, packed=False).model_inputs(CPU) | {"pixel_values": None}
        own, swapped = (model(**inputs | {"patch_features": one}).answers for one in (features, swap_images(features)))
        targets = int(sum((sample.labels[1:] != IGNORE_INDEX).sum() for sample in pictured))
    assert found.image_adds == pytest.approx(float(swapped - own) / targets, rel=1e-4)
    assert found.image_adds != 0 and "image_adds" not in found.values


def test_a_model_that_does_not_read_its_images_is_warned_about(model, monkeypatch):
    samples = samples_of(model.causal_lm.config.image_token_id)
    monkeypatch.setattr(model.projector.linear_2.weight, "data", torch.zeros_like(model.projector.linear_2.weight))
    batch = collate(samples, PAD, packed=True)
    found = Validation.of_sums(sum_losses(model, [batch], device=CPU, autocast=contextlib.nullcontext), True)
    assert found.image_adds == 0
    assert "warning: the answers do not depend on the image" in image_text(found)
    assert image_text(found._replace(image_adds=0.5)) == "; swapped images add 0.5000"
    assert image_text(found._replace(image_adds=None)) == ""
