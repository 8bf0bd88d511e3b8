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
from evaluation.validation import Sums, Validation, sum_losses
from model.loss import balance_loss, count_right
from tests.toy_batches import CPU, PAD, samples_of
from tests.toy_language import write_qwen2_moe
from tests.toy_model import build_toy, train_config
from tests.toy_towers import write_clip


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
