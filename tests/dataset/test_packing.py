"""Samples in one row without padding: they train like padded ones, and none attends to another.

Run: python -m pytest tests/dataset/test_packing.py
"""

from __future__ import annotations

import contextlib
import json
import shutil
from itertools import chain, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from config import IGNORE_INDEX, InputError
from dataset.batch import Batch, collate
from dataset.order import PackedRow, SampleOrder, bucket, micro_batches, pack, packed_rows
from model.build import Built, checkpoint_activations
from qwen import attention, image_token_id, load_language_model
from qwen.attention import packed_sdpa
from tests.toy_batches import CPU, PAD, samples_of, text_sample
from tests.toy_language import write_qwen1, write_qwen2, write_qwen2_moe, write_qwen3, write_qwen3_moe
from tests.toy_model import build_toy, train_config
from tests.toy_towers import write_clip

WRITERS = {
    "qwen1": write_qwen1,
    "qwen2": write_qwen2,
    "qwen3": write_qwen3,
    "qwen2_moe": write_qwen2_moe,
    "qwen3_moe": write_qwen3_moe,
}

# --- which row a sample is in

LENGTHS = st.lists(st.integers(1, 4000), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 8))
def test_every_sample_is_in_one_row_in_order_and_no_row_is_empty(lengths, rows):
    found = pack(lengths, rows)
    assert len(found) == rows and sorted(chain(*found)) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in found)
    assert sum(not row for row in found) == max(0, rows - len(lengths))
    assert pack(tuple(lengths), rows) == found


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_no_row_is_longer_than_four_thirds_of_the_best_possible(lengths, rows):
    """All ways are tried."""
    best = min(
        max(sum(n for n, row in zip(lengths, way, strict=True) if row == i) for i in range(rows))
        for way in product(range(rows), repeat=len(lengths))
    )
    assert max(sum(lengths[place] for place in row) for row in pack(lengths, rows)) <= 4 / 3 * best


def test_rows_are_about_equally_long():
    lengths = [100, 900, 120, 80, 90, 110, 700, 300]
    assert [sum(lengths[i] for i in row) for row in pack(lengths, 3)] == [900, 780, 720]


def test_row_lengths_are_rounded_to_few_sizes_and_little_is_wasted():
    sizes = [bucket(length) for length in range(1, 2**15 + 1)]
    for length, size in enumerate(sizes, start=1):
        assert 0 <= size - length < 16 or (length >= 256 and size - length <= length / 16)
    for octave in range(4, 15):
        assert len(set(sizes[2**octave - 1 : 2 ** (octave + 1) - 1])) <= 17
    assert sizes == sorted(sizes) and all(bucket(size) == size for size in set(sizes))


# --- the rows of a step


def packed_rows_of(order: SampleOrder, steps: range, samples: int, rows: int, **share) -> list[PackedRow]:
    return list(packed_rows(order, steps, samples_per_step=samples, rows=rows, **share))


@pytest.mark.parametrize("world", range(1, 9))
def test_the_processes_together_have_each_row_of_each_step_once(world):
    """The samples of a step are those of its padded micro-batches."""
    order, steps, size = SampleOrder(np.arange(13), 3, np.ones(13)), range(2, 6), 3
    rows = 2 * world
    by_rank = [packed_rows_of(order, steps, size * rows, rows, rank=rank, world_size=world) for rank in range(world)]
    lengths = {key: 5 + 7 * key[1] % 11 for rank in by_rank for item in rank for key in item.keys}
    for i, step in enumerate(steps):
        items = [item for rank in by_rank for item in rank[2 * i : 2 * i + 2]]
        assert sorted(item.row for item in items) == list(range(rows)) and {item.rows for item in items} == {rows}
        taken = [
            item.keys[place] for item in items for place in pack([lengths[key] for key in item.keys], rows)[item.row]
        ]
        padded = chain(*micro_batches(order, range(step, step + 1), batch_size=size, accumulation=rows))
        assert sorted(taken) == sorted(padded)
    assert all(len(rank) == 2 * len(steps) for rank in by_rank)


def test_rows_that_start_in_the_middle_are_the_tail_of_the_whole():
    order = SampleOrder(np.arange(13), 3, np.ones(13))
    whole = packed_rows_of(order, range(9), 8, 4, rank=1, world_size=2)
    assert packed_rows_of(order, range(5, 9), 8, 4, rank=1, world_size=2) == whole[5 * 2 :]


# --- the row


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


def build(folders, name: str, **words: str) -> Built:
    built = build_toy(folders, name, train=train_config(**words))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name:  # it begins as zeros, and lora_A would have no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return built


def values(built: Built, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the loss and every gradient."""
    built.model.zero_grad(set_to_none=True)
    loss = built.model(**batch.model_inputs(CPU)).answers
    loss.backward()
    grads = {name: parameter.grad for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    return {"loss": loss.detach(), **grads}


def assert_same(found: dict, expected: dict) -> None:
    """Compare the norm of each tensor's difference with 1e-6 of its norm."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - true).norm() / true.norm()) for name, true in expected.items()}
    assert {name: error for name, error in errors.items() if error > 1e-6} == {}


def test_a_row_lists_its_samples_lengths_and_no_label_reaches_across():
    samples = samples_of(300)
    batch = collate(samples, PAD, packed=True)
    sizes = [len(sample.input_ids) for sample in samples]
    total = sum(sizes)
    assert batch.attention_mask is None and batch.lengths[:5] == sizes and batch.num_tokens == total
    assert batch.input_ids.shape == batch.labels.shape == (1, bucket(total)) and bucket(total) > total
    assert sum(batch.lengths) == bucket(total) and max(batch.lengths) == max(sizes)
    parts = zip(samples, *(row[0].split(batch.lengths) for row in (batch.input_ids, batch.labels)), strict=False)
    for sample, ids, labels in parts:
        assert torch.equal(ids, sample.input_ids) and torch.equal(labels[1:], sample.labels[1:])
        assert labels[0] == IGNORE_INDEX
    assert (batch.input_ids[0, total:] == PAD).all() and (batch.labels[0, total:] == IGNORE_INDEX).all()
    assert samples[1].labels[0] != IGNORE_INDEX, "the sample itself is not changed"
    assert batch.num_targets == collate(samples, PAD).num_targets


def test_filler_documents_are_not_longer_than_the_longest_sample():
    """A model with a limit on positions would refuse longer ones."""
    batch = collate([text_sample(str(i), 9) for i in range(58)], PAD, packed=True)
    assert len(batch.lengths) > 58 + 1 and max(batch.lengths) == 9
    assert sum(batch.lengths) == batch.input_ids.shape[1] == bucket(58 * 9)


def packed_and_padded(built: Built) -> list[dict[str, torch.Tensor]]:
    samples = samples_of(image_token_id(built.tokenizer))
    return [values(built, collate(samples, PAD, packed)) for packed in (True, False)]


@pytest.mark.parametrize("language_model", WRITERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(folders, language_model, checkpointing):
    """Samples without images, with one and with three; also with activation checkpointing.

    In float32 the loss and the gradient as a whole are compared, because rounding changes small parts of it by about 1e-6;
    in float64 each parameter's (the cross entropy is float32 in both).
    """
    built = build(folders, language_model)
    if checkpointing:
        checkpoint_activations(built.model)
    whole = [
        {"loss": found.pop("loss"), "gradient": torch.cat([grad.flatten() for grad in found.values()])}
        for found in packed_and_padded(built)
    ]
    assert_same(*whole)
    built.model.double()
    packed, padded = packed_and_padded(built)
    assert_same(packed, padded)
    assert len(packed) > 20


def test_packed_rows_equal_padded_ones_if_the_whole_language_model_trains(folders):
    """Including its embeddings, which are also the head's weights."""
    built = build(folders, "qwen2", language_model="full", embeddings="full")
    built.model.double()
    packed, padded = packed_and_padded(built)
    assert_same(packed, padded)
    assert "language_model.model.embed_tokens.weight" in packed


@pytest.mark.parametrize("language_model", WRITERS)
def test_a_sample_does_not_depend_on_the_samples_beside_it(folders, language_model):
    """Bit for bit, with other neighbours of the same lengths; the neighbours' own outputs do change."""
    model = build(folders, language_model).model.causal_lm.model.eval()
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(10, 200, (n,), generator=generator) for n in (7, 12, 9)] for _ in range(2)]
    rows[1][1] = rows[0][1]

    def hidden(row):
        with torch.no_grad():
            return model(input_ids=torch.cat(row)[None], lengths=[7, 12, 9], use_cache=False).last_hidden_state[0]

    one, other = hidden(rows[0]), hidden(rows[1])
    assert torch.equal(one[7:19], other[7:19])
    assert not torch.equal(one[19:], other[19:]) and not torch.equal(one[:7], other[:7])
    with torch.no_grad():
        alone = model(input_ids=rows[0][1][None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(one[7:19], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "mixed"])
def test_training_a_packed_row_waits_for_no_value_of_the_device(folders, kind, monkeypatch):
    """On the meta device, whose tensors have no values: reading one fails here, and on a GPU it would wait for all queued
    work."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # the meta device has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    built = build_toy(folders, "qwen2", train=train_config(), attention=kind)
    batch = collate(samples_of(image_token_id(built.tokenizer)), PAD, packed=True)
    built.model.to("meta")
    losses = built.model(**batch.model_inputs(torch.device("meta")))
    losses.answers.backward()
    assert losses.answers.device.type == "meta"
    with pytest.raises(ValueError, match="image tokens per row: .80., 80 in total; image features: 4 images of 16"):
        built.model(
            **batch.model_inputs(torch.device("meta")) | {"pixel_values": torch.empty(4, 3, 28, 28, device="meta")}
        )


# --- transformers' own model as the reference


def block_diagonal(lengths: list[int], window: int | None = None) -> torch.Tensor:
    """Return [1, 1, L, L], true where a token attends: to its own document up to itself, at most `window` tokens."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    places = torch.arange(sum(lengths))
    distance = places[:, None] - places
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or 10**9))
    return seen[None, None]


def sliding(folders, folder, window: int):
    """Copy the Qwen2 of `folders` to `folder`, with a sliding window in its second layer."""
    shutil.copytree(folders / "qwen2", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LENGTHS_OF_ROW = [5, 23, 1, 14]


@pytest.mark.parametrize("window", [None, 6])
def test_a_row_equals_transformers_own_model_with_an_explicit_mask(folders, tmp_path, window):
    """And each document alone, with the mask that transformers makes itself."""
    folder = folders / "qwen2" if window is None else sliding(folders, tmp_path / "windows", window)
    ours = load_language_model(str(folder), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert type(plain) is Qwen2ForCausalLM
    ids = torch.randint(10, 200, (1, sum(LENGTHS_OF_ROW)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS_OF_ROW])[None]
    masks = {"full_attention": block_diagonal(LENGTHS_OF_ROW)}
    if window:
        masks["sliding_attention"] = block_diagonal(LENGTHS_OF_ROW, window)
    with torch.no_grad():
        found = ours(input_ids=ids, lengths=LENGTHS_OF_ROW, use_cache=False).logits
        masked = plain(input_ids=ids, attention_mask=masks, position_ids=positions, use_cache=False).logits
        alone = torch.cat([plain(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS_OF_ROW, 1)], 1)
        unwindowed = plain(
            input_ids=ids, attention_mask=dict.fromkeys(masks, masks["full_attention"]), position_ids=positions,
            use_cache=False,
        ).logits  # fmt: skip
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=2e-5)
    assert ((found - unwindowed).abs().max() > 1e-3) == bool(window), "the window makes a difference"


# --- flash-attn, and attention that cannot separate documents


def test_flash_attention_gets_the_start_of_each_document(folders, monkeypatch):
    built = build(folders, "qwen2")
    batch = collate(samples_of(image_token_id(built.tokenizer)), PAD, packed=True)
    expected = values(built, batch)
    calls = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        calls.append(kwargs)
        starts = kwargs["cu_seq_lens_q"]
        assert attention_mask is None and starts.dtype == torch.int32 and torch.equal(starts, kwargs["cu_seq_lens_k"])
        assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(batch.lengths)
        assert starts[0] == 0 and starts[-1] == query.shape[2]
        names = ("dropout", "scaling", "sliding_window")
        options = {name: kwargs[name] for name in names if name in kwargs}
        return packed_sdpa(module, query, key, value, None, lengths=starts.diff().tolist(), **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    monkeypatch.setattr(built.model.causal_lm.config, "_attn_implementation_internal", "flash_attention_2")
    assert_same(values(built, batch), expected)
    assert len(calls) == 2 and calls[0]["cu_seq_lens_q"].diff().tolist() == batch.lengths


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_cannot_separate_documents_is_refused(folders, attention):
    """It would ignore `lengths`, and documents would attend to each other."""
    model = load_language_model(str(folders / "qwen2"), torch.float32, attention)
    with pytest.raises(ValueError, match=f'"{attention}" cannot keep documents'):
        model(input_ids=torch.ones(1, 8).long(), lengths=[5, 3], use_cache=False)


def test_qwen_v1s_limit_applies_to_a_sample_and_not_to_the_row(tmp_path):
    model = load_language_model(str(write_qwen1(tmp_path / "lm", seq_length=16)), torch.float32)
    model(input_ids=torch.ones(1, 32).long(), lengths=[16, 16], use_cache=False)
    with pytest.raises(InputError, match="17"):
        model(input_ids=torch.ones(1, 33).long(), lengths=[16, 17], use_cache=False)


# --- which kernel of torch a GPU can use


@pytest.mark.parametrize("flash, cudnn", [(True, False), (False, True), (False, False)])
def test_heads_share_keys_only_where_a_kernel_takes_them(monkeypatch, flash, cudnn):
    """torch itself says which kernel takes an input on this GPU; its answers are replaced here."""
    asked = []
    for name, answer in (("flash", flash), ("cudnn", cudnn)):
        monkeypatch.setattr(
            torch.backends.cuda,
            f"can_use_{name}_attention",
            lambda params, answer=answer: asked.append(params) or answer,
        )
    with FakeTensorMode():
        query, key = torch.empty(1, 4, 9, 16, device="cuda"), torch.empty(1, 2, 9, 16, device="cuda")
        assert attention.can_share_keys(query, key, key, dropout=0.1) == (flash or cudnn)
    assert all((one.enable_gqa, one.is_causal, one.dropout, one.attn_mask) == (True, True, 0.1, None) for one in asked)
    assert attention.can_share_keys(torch.empty(1, 4, 9, 16), torch.empty(1, 2, 9, 16), None, dropout=0.0)


@pytest.mark.parametrize("packed", [True, False])
def test_keys_are_repeated_for_a_kernel_that_cannot_share_them(folders, monkeypatch, packed):
    """In float32 or on an older GPU. The memory-efficient kernel takes as many heads of keys as of queries, and no
    `enable_gqa`; with it, torch would hold all scores. Loss and gradients are the same."""
    built, calls = build(folders, "qwen2"), []
    built.model.double()
    samples = samples_of(image_token_id(built.tokenizer))
    batch = collate(samples, PAD, packed=True) if packed else collate(samples[:1], PAD)  # one row, which has no mask
    own = F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        if options["is_causal"]:  # not the encoder's
            calls.append((query.shape[1], key.shape[1], value.shape[1], options.get("enable_gqa", False)))
        return own(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    expected = values(built, batch)
    assert set(calls) == {(4, 2, 2, True)}
    calls.clear()
    monkeypatch.setattr(attention, "can_share_keys", lambda *_, **__: False)
    assert_same(values(built, batch), expected)
    assert set(calls) == {(4, 4, 4, False)}


# --- attention in bfloat16 on a CPU, which has its own implementation


@pytest.mark.parametrize(
    "lengths, width",
    [((1, 5, 3), 16), ((128, 129, 1), 16), ((256,), 16), *(((300, 127), width) for width in (64, 80, 128))],
)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("spread", [1.0, 4.0])  # of the scores
def test_attention_in_bfloat16_is_as_exact_as_torchs(lengths, width, heads, spread, monkeypatch):
    """Compare the output and the gradients of queries, keys and values with float64, for documents shorter and longer than a
    block, with the strides that a model's tensors have, and widths whose scale is a power of two and is not."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), count, width) for count in (heads[0], heads[1], heads[1], heads[0])]
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    values[0] *= spread

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [value.to(dtype).transpose(1, 2).detach().requires_grad_() for value in values[:3]]
        out, _ = packed_sdpa(None, *inputs, None, lengths=lengths, scaling=width**-0.5)
        assert out.shape == (1, sum(lengths), heads[0], width)
        return [out, *torch.autograd.grad(out, inputs, values[3].to(dtype))]

    exact, calls = run(torch.float64), []
    own = attention.causal_documents
    monkeypatch.setattr(attention, "causal_documents", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    ours = run(torch.bfloat16)
    assert calls == [1], "the own implementation is used"
    monkeypatch.setattr(attention, "causal_documents", torchs_attention)
    torchs = run(torch.bfloat16)
    for found, other, wanted in zip(ours, torchs, exact, strict=True):
        error, others = ((tensor.double() - wanted).norm() / wanted.norm().clamp(min=1e-9) for tensor in (found, other))
        assert error <= 1.3 * others and error < 0.01, (error, others)


def torchs_attention(query, key, value, lengths, scale) -> torch.Tensor:
    documents = zip(*(tensor[None].split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True) for one in documents]
    return torch.cat([one.transpose(1, 2) for one in attended], dim=1)[0]
