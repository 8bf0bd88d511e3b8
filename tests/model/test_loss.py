"""The chunked cross entropy: the loss and gradients of the full logits, without their memory.

Run: python -m pytest tests/model/test_loss.py
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from model import loss as module
from model.loss import chunk_rows, summed_cross_entropy

WIDTH, VOCABULARY = 24, 160
TARGETS = [1, 63, 64, 65, 200]  # below, at and above one chunk of 64; several chunks, the last one not full


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make chunks of 64 tokens, the smallest possible."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert chunk_rows(VOCABULARY) == 64


def make(count: int, dtype=torch.float64, head=nn.Linear) -> tuple[Tensor, nn.Module, Tensor]:
    """Return hidden [count, D], a head and targets [count]. The logits are large enough for an uneven softmax."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    lm_head = head(WIDTH, VOCABULARY, bias=False).to(dtype)
    with torch.no_grad():
        lm_head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.7)
    return hidden, lm_head, torch.randint(VOCABULARY, (count,), generator=generator)


def plain(hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(lm_head(hidden).float(), targets, reduction="sum")


def exact(hidden: Tensor, lm_head: nn.Linear, targets: Tensor) -> list[Tensor]:
    """Return the loss, and the gradients of hidden and head for a seventh of it, computed in float64."""
    hidden = hidden.detach().double().requires_grad_()
    weight = lm_head.weight.detach().double().requires_grad_()
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(loss / 7, (hidden, weight))]


def values(function, hidden: Tensor, lm_head: nn.Module, targets: Tensor) -> list[Tensor]:
    loss = function(hidden, lm_head, targets)
    return [loss.detach(), *torch.autograd.grad(loss / 7, (hidden, lm_head.weight))]


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the norm."""
    return float((found.double() - expected).norm() / expected.norm())


# --- equal numbers


@pytest.mark.parametrize("count", TARGETS)
def test_loss_and_gradients_equal_those_of_the_full_logits(count):
    given = make(count, torch.float32)
    found = values(summed_cross_entropy, *given)
    assert found[0].dtype == torch.float32 and found[0].shape == ()
    assert [error(*pair) < 1e-6 for pair in zip(found, exact(*given), strict=True)] == [True] * 3


@pytest.mark.parametrize("count", TARGETS)
@pytest.mark.parametrize("mixed", [False, True])
def test_half_precision_is_as_exact_as_with_full_logits(count, mixed):
    """Compared with float64. mixed: float32 weights under autocast, as for a head that trains; else all in bfloat16."""
    given = make(count, torch.float32 if mixed else torch.bfloat16)
    reference = exact(*given)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found, usual = values(summed_cross_entropy, *given), values(plain, *given)
    for name, ours, theirs, true in zip(("loss", "hidden", "head"), found, usual, reference, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert error(ours, true) <= 1.1 * error(theirs, true) + 1e-6, name


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_frozen_inputs_have_no_gradient(frozen):
    hidden, lm_head, targets = make(130, torch.float32)
    reference = exact(hidden, lm_head, targets)
    (lm_head.weight if frozen == "head" else hidden).requires_grad_(False)
    (summed_cross_entropy(hidden, lm_head, targets) / 7).backward()
    grads = {"hidden": hidden.grad, "head": lm_head.weight.grad}
    assert grads.pop(frozen) is None
    for name, grad in grads.items():
        assert error(grad, reference[1 if name == "hidden" else 2]) < 1e-6


def test_loss_without_gradients():
    hidden, lm_head, targets = make(130, torch.float32)
    with torch.no_grad():
        loss = summed_cross_entropy(hidden, lm_head, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, lm_head, targets).detach(), rtol=1e-6, atol=0)


def test_tied_embeddings_get_the_gradients_of_both_uses():
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    ids = torch.randint(VOCABULARY, (2, 90))
    grads = []
    for function in (summed_cross_entropy, plain):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        function(hidden, model.lm_head, ids[:, 1:].flatten()).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    assert grads[0].keys() == grads[1].keys() and "model.embed_tokens.weight" in grads[0]
    for name, grad in grads[0].items():
        assert error(grad, grads[1][name].double()) < 1e-6, name


class WithBias(nn.Linear):
    def __init__(self, width, vocabulary, bias=False):
        super().__init__(width, vocabulary, bias=True)


class WithLora(nn.Module):
    """A head with LoRA that is not zero."""

    def __new__(cls, width, vocabulary, bias=False):
        inner = nn.ModuleDict({"lm_head": nn.Linear(width, vocabulary, bias=False)})
        head = get_peft_model(inner, LoraConfig(r=4, target_modules=["lm_head"])).base_model.model["lm_head"]
        nn.init.normal_(head.lora_B["default"].weight)
        return head


@pytest.mark.parametrize("head", [WithBias, WithLora])
def test_a_heads_bias_and_lora_are_in_the_loss_and_have_gradients(head):
    hidden, lm_head, targets = make(130, torch.float32, head)
    grads, losses = [], []
    for function in (summed_cross_entropy, plain):
        losses.append(function(hidden, lm_head, targets))
        losses[-1].backward()
        grads.append(
            {name: p.grad for name, p in [*lm_head.named_parameters(), ("hidden", hidden)] if p.grad is not None}
        )
        lm_head.zero_grad(set_to_none=True)
        hidden.grad = None
    assert losses[0] == losses[1] and grads[0].keys() == grads[1].keys() and len(grads[0]) >= 3
    assert all(error(grad, grads[1][name].double()) < 1e-6 for name, grad in grads[0].items())


def test_without_targets_loss_and_gradients_are_zero():
    hidden, lm_head, targets = make(3, torch.float32)
    loss = summed_cross_entropy(hidden[:0], lm_head, targets[:0])
    loss.backward()
    assert loss == 0 and lm_head.weight.grad.abs().sum() == 0 and hidden.grad.abs().sum() == 0


def test_a_large_loss_scale_does_not_overflow_the_heads_gradient_in_half_precision():
    """The scale multiplies a float32 sum over all chunks; the largest float16 is 65,504."""
    hidden, lm_head, targets = make(130, torch.float32)
    expected = exact(hidden, lm_head, targets)[2] * 7
    with torch.autocast("cpu", torch.float16):
        loss = summed_cross_entropy(hidden, lm_head, targets)
    grad = torch.autograd.grad(loss * 2.0**20, lm_head.weight)[0]
    assert error(grad / 2.0**20, expected) < 1e-2


def almost_right(vocabulary: int, loss: float) -> tuple[Tensor, nn.Linear, Tensor]:
    """Return hidden [32, 16], a head and targets for which a token's loss is about `loss`, and the other tokens share the
    rest of the probability evenly. Every number is one of float16's."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(8, (32,), generator=generator)
    lm_head = nn.Linear(16, vocabulary, bias=False)
    hidden = torch.zeros(32, 16)
    with torch.no_grad():
        lm_head.weight.zero_()[:8, :8] = torch.eye(8)
        lm_head.weight[8:, 8:] = 1 / 8 + 0.001 * torch.randn(vocabulary - 8, 8, generator=generator)
        lm_head.weight.copy_(lm_head.weight.half())
        hidden[:, 8:] = 1.0
        hidden[torch.arange(32), targets] = math.log(vocabulary / loss) + 1
    return hidden.half().float().requires_grad_(), lm_head, targets


@pytest.mark.parametrize("loss", [0.2, 0.004, 0.001])
@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_gradients_of_small_losses_are_exact_in_float16(loss, scale):
    """At a GradScaler's first scale, and without one. Each probability but the target's is about 1e-7 at a loss of 0.001;
    float16's smallest number is 6e-8, so such a probability would be rounded by half of itself."""
    given = almost_right(10_000, loss)
    found_loss, *expected = exact(*given)
    assert float(found_loss) / 32 == pytest.approx(loss, rel=0.1)

    def scaled(function) -> list[float]:
        with torch.autocast("cpu", torch.float16):
            value = function(*given)
        grads = torch.autograd.grad(value * (scale / 7), (given[0], given[1].weight))
        return [error(grad / scale, wanted) for grad, wanted in zip(grads, expected, strict=True)]

    ours, usual = scaled(summed_cross_entropy), scaled(plain)
    assert max(ours) < 2e-3 and all(a <= 1.1 * b for a, b in zip(ours, usual, strict=True)), (ours, usual)


def test_float16_gradients_of_many_rows_with_one_target_do_not_overflow(monkeypatch):
    """Each of 6,400 rows of a chunk adds nearly 1 times a hidden state of 30 to the same row of the head's gradient."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 6400 * 40)
    hidden = (30 + torch.randn(6400, WIDTH, generator=torch.Generator().manual_seed(0))).half().float().requires_grad_()
    lm_head = nn.Linear(WIDTH, 40, bias=False)
    given = hidden, lm_head.half().float(), torch.zeros(6400, dtype=torch.long)
    assert chunk_rows(40) == 6400
    expected = exact(*given)[2] * 7
    with torch.autocast("cpu", torch.float16):
        grad = torch.autograd.grad(summed_cross_entropy(*given), lm_head.weight)[0]
    assert expected.abs().max() > 2 * torch.finfo(torch.float16).max and error(grad, expected) < 2e-3


# --- memory


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made within the context, each storage once, and their largest sum at any time."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, positional=(), named=None):
        made = function(*positional, **(named or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((positional, named)) if isinstance(a, Tensor)}
        self.storages = {key: one for key, one in self.storages.items() if not one[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return made


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_head_that_trains_takes_one_gradient_and_one_copy(dtype):
    """In forward and backward together: a float32 gradient of the head's size, the head's copy in half precision, chunks."""
    lm_head, hidden = nn.Linear(1024, 2048, bias=False), torch.randn(192, 1024)
    size, chunk = 4 * lm_head.weight.numel(), 4 * 64 * 2048
    with Live() as live, torch.autocast("cpu", dtype, enabled=dtype is not None):
        summed_cross_entropy(hidden, lm_head, torch.arange(192)).backward()
    assert lm_head.weight.grad is not None
    copies = (0 if dtype is None else size / 2) + 6 * hidden.numel()  # and the hidden states' copy and gradient
    assert size < live.most <= size + copies + 3 * chunk, (live.most / size, copies / size, chunk / size)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor created within the context."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, positional=(), named=None):
        made = function(*positional, **(named or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("trains", [True, False])
def test_at_most_one_chunk_of_logits_exists(trains):
    """In forward and backward of 640 tokens no tensor is larger than a chunk, hidden or the head."""
    hidden, lm_head, targets = make(640, torch.float32)
    lm_head.weight.requires_grad_(trains)
    chunk, inputs = 64 * VOCABULARY, max(hidden.numel(), lm_head.weight.numel())
    with Largest() as ours:
        summed_cross_entropy(hidden, lm_head, targets).backward()
    with Largest() as usual:
        plain(hidden, lm_head, targets).backward()
    assert ours.elements <= max(chunk, inputs) < usual.elements == 640 * VOCABULARY


@pytest.mark.parametrize("vocabulary, mib", [(420, 96), (151_936, 96), (151_936, 1), (10**6, 200)])
def test_a_chunk_is_as_large_as_allowed_and_at_least_64_tokens(monkeypatch, vocabulary, mib):
    monkeypatch.setattr(module, "CHUNK_BYTES", mib * 2**20)
    rows = chunk_rows(vocabulary)
    assert rows % 64 == 0 and rows >= 64
    assert rows == 64 or 4 * rows * vocabulary <= mib * 2**20
    assert 4 * (rows + 64) * vocabulary > mib * 2**20


def test_no_gradient_of_the_heads_size_is_made_while_validating(monkeypatch):
    """A head that trains has requires_grad under no_grad too."""
    head, hidden = nn.Linear(8, 100, bias=False), torch.randn(5, 8)
    expected = summed_cross_entropy(hidden, head, torch.arange(5))
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert torch.equal(summed_cross_entropy(hidden, head, torch.arange(5)), expected)
