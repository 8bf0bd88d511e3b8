"""Samples in one row without padding: they learn what padded ones do, and none sees another.
`sh tests/run.sh tests/test_packing.py`"""

from __future__ import annotations

import json
import shutil
from itertools import chain, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from config import IGNORE_INDEX, InputError
from dataset.batch import collate
from dataset.loader import count_tokens, split_batch
from dataset.order import SampleOrder, micro_batches, packed_rows
from dataset.order import bucket, pack
from model.build import build_model, checkpoint_activations, load_processors
from qwen import attention, load_language_model
from qwen.attention import packed_sdpa
from training.step import count_targets, on_device
from tests.toy_language import write_qwen1, write_qwen2, write_qwen2_moe, write_qwen3, write_qwen3_moe
from tests.toy_towers import write_clip

WRITERS = {
    "qwen1": write_qwen1,
    "qwen2": write_qwen2,
    "qwen3": write_qwen3,
    "qwen2_moe": write_qwen2_moe,
    "qwen3_moe": write_qwen3_moe,
}
PAD = 0
CPU = torch.device("cpu")

# --- which sample stands in which row

LENGTHS = st.lists(st.integers(1, 4000), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 8))
def test_every_sample_stands_once_in_its_order_in_a_row_that_is_not_empty(lengths, rows):
    found = pack(lengths, rows)
    assert len(found) == rows and sorted(chain(*found)) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in found)
    assert sum(not row for row in found) == max(0, rows - len(lengths))
    assert pack(tuple(lengths), rows) == found


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_no_row_is_longer_than_four_thirds_of_the_best_possible(lengths, rows):
    """By trying every way."""
    best = min(
        max(sum(n for n, row in zip(lengths, way, strict=True) if row == i) for i in range(rows))
        for way in product(range(rows), repeat=len(lengths))
    )
    assert max(sum(lengths[place] for place in row) for row in pack(lengths, rows)) <= 4 / 3 * best


def test_packing_is_what_makes_rows_about_equally_long():
    lengths = [100, 900, 120, 80, 90, 110, 700, 300]
    assert [sum(lengths[i] for i in row) for row in pack(lengths, 3)] == [900, 780, 720]


def test_few_sizes_come_again_and_again_and_little_is_wasted():
    sizes = [bucket(length) for length in range(1, 2**15 + 1)]
    for length, size in enumerate(sizes, start=1):
        assert 0 <= size - length < 16 or (length >= 256 and size - length <= length / 16)
    for octave in range(4, 15):
        assert len(set(sizes[2**octave - 1 : 2 ** (octave + 1) - 1])) <= 17
    assert sizes == sorted(sizes) and all(bucket(size) == size for size in set(sizes))


# --- shares of a step


@pytest.mark.parametrize("world", range(1, 9))
def test_all_processes_together_have_each_row_of_each_step_once(world):
    """And the samples of a step are those that padded micro-batches hold."""
    order, steps, size = SampleOrder(np.arange(13), 3, np.ones(13)), range(2, 6), 3
    rows = 2 * world
    by_rank = [list(shares(order, steps, size * rows, rows, rank, world)) for rank in range(world)]
    lengths = {key: 5 + 7 * key[1] % 11 for rank in by_rank for share in rank for key in share.keys}
    for i, step in enumerate(steps):
        mine = [share for rank in by_rank for share in rank[2 * i : 2 * i + 2]]
        assert sorted(share.row for share in mine) == list(range(rows)) and {share.rows for share in mine} == {rows}
        taken = [
            share.keys[place] for share in mine for place in pack([lengths[key] for key in share.keys], rows)[share.row]
        ]
        padded = chain(*micro_batches(order, range(step, step + 1), size, rows, 0, 1))
        assert sorted(taken) == sorted(padded)
    assert all(len(rank) == 2 * len(steps) for rank in by_rank)


def test_shares_that_start_in_the_middle_are_the_tail_of_the_whole():
    order = SampleOrder(np.arange(13), 3, np.ones(13))
    whole = list(shares(order, range(9), 8, 4, 1, 2))
    assert list(shares(order, range(5, 9), 8, 4, 1, 2)) == whole[5 * 2 :]


# --- the row


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


def build(folders, language_model: str, trainable: dict | None = None):
    words = {"vision_tower": "frozen", "projector": "full", "language_model": "lora", "embeddings": "frozen"}
    built = build_model(
        load_processors(str(folders / "clip"), None, str(folders / language_model)), str(folders / "clip"),
        vision_feature_layer=-2, image_size=None, projector="mlp", projector_hidden_size=None,
        language_model=str(folders / language_model), trainable=words | (trainable or {}), dtype=torch.float32, seed=0,
        lora={"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name:  # zero at birth: lora_A would have no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return built


def samples_of(image_token: int, pictures=(1, 0, 3, 0, 1), seed: int = 0) -> list[dict]:
    """A sample for each number of pictures, of 16 tokens each, with text before, between and after; a few last tokens are
    learned, and in the second one every token, the first as well."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i, count in enumerate(pictures):
        text = torch.randint(10, 200, (6 + 5 * i,), generator=generator)
        ids = torch.cat([text[:2], *[torch.cat([torch.full((16,), image_token), text[2:3]])] * count, text[2:]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-(2 + i) :] = ids[-(2 + i) :]
        pixels = torch.randn(count, 3, 28, 28, generator=generator) if count else None
        samples.append(
            {
                "id": f"s{i}",
                "replaced": None,
                "input_ids": ids,
                "labels": ids.clone() if i == 1 else labels,
                "pixel_values": pixels,
                "patch_features": None,
                "image_keys": [f"{i}.{j}" for j in range(count)],
                "is_cached": [False] * count,
            }  # fmt: skip
        )
    return samples


def values(built, batch: dict) -> dict[str, torch.Tensor]:
    """The loss and every gradient."""
    built.model.zero_grad(set_to_none=True)
    loss = built.model(**batch.model_inputs(CPU)).answers
    loss.backward()
    grads = {name: parameter.grad for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    return {"loss": loss.detach(), **grads}


def assert_same(found: dict, expected: dict) -> None:
    """To 1e-6, in the norm of each tensor."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - true).norm() / true.norm()) for name, true in expected.items()}
    assert {name: error for name, error in errors.items() if error > 1e-6} == {}


def test_a_row_says_what_it_is_made_of_and_no_label_reaches_across():
    samples = samples_of(300)
    batch = collate(samples, PAD, packed=True)
    sizes = [len(sample.input_ids) for sample in samples]
    total = sum(sizes)
    assert batch.attention_mask is None and batch.lengths[:5] == sizes and batch.num_tokens == total
    assert batch.input_ids.shape == batch.labels.shape == (1, bucket(total)) and bucket(total) > total
    assert sum(batch.lengths) == bucket(total) and max(batch.lengths) == max(sizes)
    parts = zip(samples, *(batch[key][0].split(batch.lengths) for key in ("input_ids", "labels")), strict=False)
    for sample, ids, labels in parts:
        assert torch.equal(ids, sample.input_ids) and torch.equal(labels[1:], sample.labels[1:])
        assert labels[0] == IGNORE_INDEX
    assert (batch.input_ids[0, total:] == PAD).all() and (batch.labels[0, total:] == IGNORE_INDEX).all()
    assert samples[1]["labels"][0] != IGNORE_INDEX, "the sample itself is left as it is"
    assert batch.num_targets == count_targets(collate(samples, PAD))


def test_what_fills_a_row_is_no_document_longer_than_a_sample():
    """A model that refuses what is past its positions would refuse the filler otherwise."""
    short = {"pixel_values": None, "patch_features": None, "image_keys": [], "is_cached": [], "replaced": None}
    samples = [
        short | {"id": str(i), "input_ids": torch.ones(9).long(), "labels": torch.ones(9).long()} for i in range(58)
    ]
    batch = collate(samples, PAD, packed=True)
    assert len(batch.lengths) > 58 + 1 and max(batch.lengths) == 9
    assert sum(batch.lengths) == batch.input_ids.shape[1] == bucket(58 * 9)


def packed_and_padded(built) -> tuple[dict, dict]:
    samples = samples_of(built.chat_values()["image_token_id"])
    return tuple(values(built, collate(samples, PAD, packed)) for packed in (True, False))


@pytest.mark.parametrize("language_model", WRITERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(folders, language_model, checkpointing):
    """Text, one picture and three; also where the layers are computed twice. In float32 the loss and the gradient as a
    whole: a small part of it is rounded otherwise by about 1e-6. In float64 each part (the cross entropy is float32)."""
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


def test_packed_rows_are_padded_ones_where_all_of_the_language_model_trains(folders):
    """Its embeddings, which are the head's weights as well, among it."""
    built = build(folders, "qwen2", trainable={"language_model": "full", "embeddings": "full"})
    built.model.double()
    packed, padded = packed_and_padded(built)
    assert_same(packed, padded)
    assert "language_model.model.embed_tokens.weight" in packed


@pytest.mark.parametrize("language_model", WRITERS)
def test_a_sample_is_the_same_whatever_stands_beside_it(folders, language_model):
    """To the last bit, also where the neighbours are others of the same lengths; its own tokens do matter."""
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


# --- transformers' own model as the reference


def block_diagonal(lengths: list[int], window: int | None = None) -> torch.Tensor:
    """[1, 1, L, L]: each token sees its own document up to itself, `window` tokens of it."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    places = torch.arange(sum(lengths))
    distance = places[:, None] - places
    seen = (document[:, None] == document) & (distance >= 0) & (distance < (window or 10**9))
    return seen[None, None]


def sliding(folders, folder, window: int):
    """The Qwen2 of `folders` with windows in its second layer."""
    shutil.copytree(folders / "qwen2", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LENGTHS_OF_ROW = [5, 23, 1, 14]


@pytest.mark.parametrize("window", [None, 6])
def test_a_row_is_what_transformers_makes_of_it_with_an_explicit_mask(folders, tmp_path, window):
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
    assert ((found - unwindowed).abs().max() > 1e-3) == bool(window), "the window does matter"


# --- flash-attn, and what cannot keep documents apart


def test_flash_attention_is_told_where_each_document_starts(folders, monkeypatch):
    built = build(folders, "qwen2")
    batch = collate(samples_of(built.chat_values()["image_token_id"]), PAD, packed=True)
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
def test_an_attention_that_cannot_keep_documents_apart_is_refused(folders, attention):
    """Without `lengths` it would let them see each other, silently."""
    model = load_language_model(str(folders / "qwen2"), torch.float32, attention)
    with pytest.raises(ValueError, match=f'"{attention}" cannot keep documents'):
        model(input_ids=torch.ones(1, 8).long(), lengths=[5, 3], use_cache=False)


def test_qwen_v1s_limit_is_for_a_sample_and_not_for_the_row(tmp_path):
    model = load_language_model(str(write_qwen1(tmp_path / "lm", seq_length=16)), torch.float32)
    model(input_ids=torch.ones(1, 32).long(), lengths=[16, 16], use_cache=False)
    with pytest.raises(InputError, match="17"):
        model(input_ids=torch.ones(1, 33).long(), lengths=[16, 17], use_cache=False)


# --- a batch in pieces


def same(a: dict, b: dict) -> bool:
    def equal(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pieces", [2, 3, 5, 8])
def test_pieces_are_what_their_samples_alone_would_make_with_cached_and_fresh_pictures(packed, pieces):
    """Sample 2 has a cached picture between two fresh ones, sample 0 a cached one, sample 4 a fresh one."""
    samples = samples_of(300)
    for place, cached in ((0, [True]), (2, [False, True, False])):
        pixels, kept = samples[place]["pixel_values"], torch.tensor(cached)
        samples[place] |= {
            "pixel_values": pixels[~kept] if not all(cached) else None,
            "patch_features": torch.full((sum(cached), 4, 2), float(place)), "is_cached": cached,
            "image_keys": [f"{place}.{j}" for j, is_cached in enumerate(cached) if not is_cached],
        }  # fmt: skip
    if packed:
        samples[1]["labels"][0] = IGNORE_INDEX  # as the row has it
    whole = collate(samples, PAD, packed)
    assert whole["is_cached"] == [True, False, True, False, False] and len(whole["image_keys"]) == 3
    found = list(split_batch(whole, pieces, PAD))
    size = -(-5 // pieces)
    expected = [collate(samples[first : first + size], PAD, packed) for first in range(0, 5, size)]
    assert len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))


# --- attention in bfloat16 on a CPU, which has an implementation of its own


@pytest.mark.parametrize("lengths", [(1, 5, 3), (128, 129, 1), (300, 127), (256,)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_in_bfloat16_is_no_further_from_the_exact_one_than_torchs(lengths, heads, monkeypatch):
    """Output and the gradients of queries, keys and values, against float64, over documents shorter and longer than a
    block; strided as a model hands them over."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), count, 16) for count in (heads[0], heads[1], heads[1], heads[0])]
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [value.to(dtype).transpose(1, 2).detach().requires_grad_() for value in values[:3]]
        out, _ = packed_sdpa(None, *inputs, None, lengths=lengths, scaling=0.3)
        assert out.shape == (1, sum(lengths), heads[0], 16)
        return [out, *torch.autograd.grad(out, inputs, values[3].to(dtype))]

    exact, calls = run(torch.float64), []
    own = attention._CausalDocuments.apply
    monkeypatch.setattr(attention._CausalDocuments, "apply", lambda *given: calls.append(1) or own(*given))
    ours = run(torch.bfloat16)
    assert calls == [1], "its own implementation is used"
    monkeypatch.setattr(
        attention._CausalDocuments, "apply", lambda q, k, v, lengths, scale: plain(q, k, v, lengths, scale)
    )
    torchs = run(torch.bfloat16)
    for found, other, wanted in zip(ours, torchs, exact, strict=True):
        error, others = ((tensor.double() - wanted).norm() / wanted.norm().clamp(min=1e-9) for tensor in (found, other))
        assert error <= 1.25 * others + 1e-3 and error < 0.01, (error, others)


def plain(query, key, value, lengths, scale) -> torch.Tensor:
    documents = zip(*(tensor[None].split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True) for one in documents]
    return torch.cat([one.transpose(1, 2) for one in attended], dim=1)[0]
