"""Validation without generating: loss, perplexity, token accuracy and balance loss, against the plain way to compute them.
`sh tests/run.sh tests/test_validate.py`"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from config import IGNORE_INDEX
from dataset.batch import collate
from model.loss import balance_loss, count_right
from training.step import on_device
from tests.test_moe import build, folders  # noqa: F401 (a fixture)
from tests.test_packing import CPU, PAD, samples_of
from evaluation.validation import (Sums, Validation, add_up, of_sums)


def plainly(model, samples) -> tuple[float, float]:
    """(loss, share of right tokens), sample by sample from whole logits."""
    losses, right = [], []
    for sample in samples:
        inputs = on_device(collate([sample], PAD), CPU)
        features = None if inputs["pixel_values"] is None else model.encode_images(inputs["pixel_values"])
        logits = model.causal_lm(input_ids=inputs["input_ids"], image_features=features).logits[0, :-1].double()
        targets = sample.labels[1:]
        wanted = targets != IGNORE_INDEX
        losses += F.cross_entropy(logits[wanted], targets[wanted], reduction="none").tolist()
        right += (logits[wanted].argmax(-1) == targets[wanted]).tolist()
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_is_what_whole_logits_say_however_records_are_batched(folders, packed, size):  # noqa: F811
    model = build(folders).model.eval()
    samples = samples_of(model.causal_lm.config.image_token_id)
    batches = [collate(samples[start : start + size], PAD, packed) for start in range(0, len(samples), size)]
    found = of_sums(add_up(model, batches, CPU, contextlib.nullcontext), model.has_experts)
    with torch.no_grad():
        loss, right = plainly(model, samples)
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.token_accuracy == pytest.approx(right)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert 2 <= found.balance_loss < 4


def test_sums_are_added_up_over_processes_and_a_dense_model_has_no_balance():
    one, other = Sums(6.0, 4, 2, 20.0, 10), Sums(2.0, 4, 4, 90.0, 30)
    assert of_sums(one.plus(other), True) == Validation(1.0, 0.75, 2.75)
    assert of_sums(one, False).values == {"loss": 1.5, "perplexity": math.exp(1.5), "token_accuracy": 0.5}
    assert Validation(800.0, 0.0, None).perplexity == math.inf


def test_a_perplexity_that_no_float_holds_is_left_out():
    found = of_sums(Sums(loss=2000.0, targets=2, right=0, tokens=4), has_experts=False)
    assert found.perplexity == math.inf and found.values == {"loss": 1000.0, "token_accuracy": 0.0}


def test_counting_goes_by_chunks_and_misses_none(monkeypatch):
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(333, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = head(hidden).argmax(-1)
    targets = torch.where(torch.arange(333) % 3 == 0, best, (best + 1) % 50)
    monkeypatch.setattr("model.loss.chunk_rows", lambda vocabulary: 64)
    assert int(count_right(hidden, head, targets)) == 111


def test_the_balance_loss_is_in_float32_whatever_the_routers_computed_in(folders):  # noqa: F811
    config = build(folders).model.causal_lm.config
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = balance_loss((logits, logits), None, config)
    assert found.dtype == torch.float32 and float(found) == float(balance_loss((logits.float(),) * 2, None, config))
