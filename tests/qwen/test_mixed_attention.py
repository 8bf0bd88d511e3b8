"""Mixed attention: tokens of one image attend to each other, text is causal, and no image attends to later tokens. Padded,
packed and generated, with several images.

Shapes: M images, N features each, D hidden size; B rows, L tokens.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import qwen
from config import InputError
from model.generate import Prompt, generate
from model.model import VisionLanguageModel
from model.projector import build_projector
from qwen.attention import document_masks
from qwen.injection import number_images
from tests.qwen.test_injection import LAYOUTS, N, answer, make_batch
from tests.toy_language import HIDDEN, WRITERS, scratch_sizes, write_qwen2
from tests.toy_model import NEW, SHARED, Tower, make_prompts, one_at_a_time, random_images
from tests.toy_project import SIZES

IMAGE, TEXT = 999, 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}


def load(folders, family: str, kind: str = "mixed", **options):
    model = qwen.load_language_model(folders[family], torch.float32, **options)
    qwen.set_image_attention(model, kind)
    qwen.attach_tokenizer(model, qwen.load_tokenizer(folders[family]))
    model.generation_config.eos_token_id = None
    for (
        parameter
    ) in model.parameters():  # memory-mapped weights are not aligned, which changes the rounding of products
        parameter.data = parameter.data.clone()
    return model


@pytest.fixture(params=WRITERS)
def model(request, folders):
    return load(folders, request.param)


def assert_unchanged(model, found, expected):
    """Bit for bit; with experts only up to rounding, because all tokens of an expert are one product."""
    tolerance = 2e-6 if model.config.model_type.endswith("_moe") else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def explicit_mask(ids: list[int], is_real: list[int], image: int) -> list[list[bool]]:
    """The mask of one row by its definition, token by token: True where the query attends to the key."""
    numbers, seen = [], 0
    for token in ids:
        numbers.append(seen // N if token == image else -1)
        seen += token == image
    return [
        [bool(is_real[k]) and (k <= q or (numbers[q] >= 0 and numbers[q] == numbers[k])) for k in range(len(ids))]
        for q in range(len(ids))
    ]


# --- which tokens are one image


def test_features_need_ids():
    model = qwen.new_language_model(scratch_sizes(**SIZES), vocab_size=300, seed=0)
    qwen.set_image_attention(model, "mixed")
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match="image_features need input_ids"):
        model(
            inputs_embeds=torch.zeros(1, 4, SIZES["hidden_size"]),
            image_features=torch.zeros(1, 4, SIZES["hidden_size"]),
        )


def test_adjacent_images_get_different_numbers():
    ids = torch.tensor([[TEXT, *[IMAGE] * 6, TEXT, *[IMAGE] * 3], [*[IMAGE] * 3, *[TEXT] * 5, *[IMAGE] * 3]])
    expected = [[-1, 0, 0, 0, 1, 1, 1, -1, 2, 2, 2], [0, 0, 0, -1, -1, -1, -1, -1, 1, 1, 1]]
    assert number_images(ids, IMAGE, 3).tolist() == expected


def test_document_masks_equal_the_definition():
    rows = [[TEXT, *[IMAGE] * 2 * N, TEXT, TEXT], [TEXT] * 3, [*[IMAGE] * N, TEXT, *[IMAGE] * N]]
    numbers = number_images(torch.tensor([sum(rows, [])]), IMAGE, N)[0]
    masks = document_masks(numbers, [len(row) for row in rows])
    assert [mask.tolist() for mask in masks] == [explicit_mask(row, [1] * len(row), IMAGE) for row in rows]


# --- equality with transformers and an explicit mask


def plain(folder):
    """Load transformers' own class with the same weights."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [family for family in WRITERS if family != "qwen"])
def test_logits_equal_transformers_with_the_explicit_mask(folders, family, side):
    ours, theirs = load(folders, family), plain(folders[family])
    for images_per_row in LAYOUTS:
        batch = make_batch(ours, images_per_row, side)
        image, padding = ours.config.image_token_id, batch["attention_mask"]
        mask = torch.tensor(
            [explicit_mask(*row, image) for row in zip(batch["input_ids"].tolist(), padding.tolist(), strict=True)]
        )
        embeds = ours.model.embed_with_images(batch["input_ids"], batch["image_features"])
        expected = theirs(inputs_embeds=embeds, attention_mask=mask[:, None], use_cache=False).logits
        found = ours(**batch, use_cache=False).logits
        assert torch.equal(found[padding.bool()], expected[padding.bool()])
        causal = theirs(inputs_embeds=embeds, attention_mask=padding, use_cache=False).logits
        assert (found - causal)[padding.bool()].abs().max() > 0.1  # the mask has an effect


# --- leaks


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_and_images_do_not_change_earlier_states(model, packed):
    """Two images, then an answer. A changed token changes no state before it, and the second image changes no state before
    itself, so not the first image's."""
    batch = make_batch(model, [2], length=28)
    ids, features = batch["input_ids"], batch["image_features"]

    def hidden(ids, features):
        if packed:  # the same text twice in one row; return the states of the first
            twice = {"input_ids": ids.repeat(1, 2), "lengths": [28, 28], "image_features": features.repeat(2, 1, 1)}
            return model.model(**twice, use_cache=False).last_hidden_state[0, :28]
        return model.model(input_ids=ids, image_features=features, use_cache=False).last_hidden_state[0]

    before = hidden(ids, features)
    text = (ids[0] != model.config.image_token_id).nonzero().flatten().tolist()
    for place in text:
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 400
        after = hidden(changed, features)
        assert_unchanged(model, after[:place], before[:place])
        assert (after[place:] - before[place:]).abs().amax(-1).min() > 1e-6  # and all states from there on
    places = (ids[0] == model.config.image_token_id).nonzero().flatten().tolist()
    other = features.clone()
    other[1] += torch.randn(N, HIDDEN)
    assert_unchanged(model, hidden(ids, other)[: places[N]], before[: places[N]])


@torch.no_grad()
def test_tokens_of_an_image_attend_to_each_other_only_with_mixed_attention(model):
    batch = make_batch(model, [2], length=24)
    other = batch["image_features"].clone()
    other[0, -1] += torch.randn(HIDDEN)  # the last token of the first image
    first, *_, last = (batch["input_ids"][0] == model.config.image_token_id).nonzero().flatten()[:N].tolist()

    def states(features):
        changed = batch | {"image_features": features}
        return model.model(**changed, use_cache=False).last_hidden_state[0]

    def moved() -> list[bool]:
        return ((states(other) - states(batch["image_features"])).abs().amax(-1) > 1e-5).tolist()

    assert moved() == [False] * first + [True] * (24 - first)
    model.config.image_attention = "causal"
    assert moved() == [False] * last + [True] * (24 - last)


# --- packed


@torch.no_grad()
def test_packed_documents_equal_each_document_alone(model):
    batches = [make_batch(model, [images], seed=seed) for seed, images in enumerate((1, 0, 3, 2))]
    alone = [model.model(**batch, use_cache=False).last_hidden_state[0] for batch in batches]
    packed = model.model(
        input_ids=torch.cat([batch["input_ids"] for batch in batches], dim=1),
        lengths=[len(states) for states in alone],
        image_features=torch.cat([batch["image_features"] for batch in batches]),
        use_cache=False,
    ).last_hidden_state[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", WRITERS)
def test_packed_and_padded_rows_have_equal_gradients(folders, family):
    """In float64, up to 1e-9."""
    model = load(folders, family).double()
    layout = (1, 0, 3, 2)
    padded = make_batch(model, layout)
    lengths = padded["attention_mask"].sum(1).tolist()
    weight = torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradients(batch, rows) -> list[torch.Tensor]:
        model.zero_grad()
        features = padded["image_features"].double().requires_grad_()
        states = model.model(**batch, image_features=features, use_cache=False).last_hidden_state
        (torch.cat(rows(states)) @ weight).pow(2).sum().backward()
        return [features.grad, *(p.grad for p in model.model.parameters() if p.grad is not None)]

    mask = {key: padded[key] for key in ("input_ids", "attention_mask")}
    expected = gradients(mask, lambda states: [row[:length] for row, length in zip(states, lengths, strict=True)])
    ids = torch.cat([row[:length] for row, length in zip(padded["input_ids"], lengths, strict=True)])[None]
    found = gradients({"input_ids": ids, "lengths": lengths}, lambda states: list(states[0].split(lengths)))
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm().clamp(min=1e-6)


@torch.no_grad()
def test_packed_text_without_images_needs_no_mask(model, monkeypatch):
    monkeypatch.setattr("qwen.injection.document_masks", lambda *_: pytest.fail("a mask was made"))
    ids = torch.randint(0, 400, (1, 20), generator=torch.Generator().manual_seed(0))
    found = model.model(input_ids=ids, lengths=[12, 8], use_cache=False).last_hidden_state
    model.config.image_attention = "causal"
    assert torch.equal(model.model(input_ids=ids, lengths=[12, 8], use_cache=False).last_hidden_state, found)


# --- generated


@torch.no_grad()
def test_generation_with_and_without_cache_is_equal(model):
    batch = make_batch(model, [2, 0, 1], "left")
    with_cache = answer(model, batch)
    assert torch.equal(answer(model, batch, use_cache=False), with_cache)
    for row, images in enumerate((2, 0, 1)):  # and equal to the row alone, without padding
        real = batch["attention_mask"][row].bool()
        first = sum((2, 0, 1)[:row])
        alone = {
            "input_ids": batch["input_ids"][row][real][None],
            "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
            "image_features": batch["image_features"][first : first + images],
        }
        assert torch.equal(answer(model, alone)[0], with_cache[row])
    mixed = model(**batch).logits[:, -1]
    model.config.image_attention = "causal"
    moved = (model(**batch).logits[:, -1] - mixed).abs().amax(-1)
    assert moved[0] > 1e-3 and moved[1] < 1e-4 and moved[2] > 1e-3  # the middle row has no image


@torch.no_grad()
def test_tokens_of_an_image_after_a_filled_cache_attend_to_each_other(model):
    """A second question with another image, read after the cached first one."""
    whole = make_batch(model, [2], length=30)
    ids, features = whole["input_ids"], whole["image_features"]
    cut = int((ids[0] == model.config.image_token_id).nonzero()[N]) - 1  # just before the second image
    expected = model.model(**whole, use_cache=False).last_hidden_state
    cache = model.model(input_ids=ids[:, :cut], image_features=features[:1], use_cache=True).past_key_values
    rest = model.model(input_ids=ids[:, cut:], image_features=features[1:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(rest.last_hidden_state, expected[:, cut:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_a_shared_image_changes_no_token(folders, family, shapes):
    lm = load(folders, family)
    torch.manual_seed(0)
    vlm = VisionLanguageModel(Tower(), build_projector("mlp", 16, HIDDEN, HIDDEN), lm).eval()
    prompts, pixels = make_prompts(vlm, shapes), random_images(3)
    found = generate(vlm, prompts, pixels, max_new_tokens=NEW).tolist()
    assert found == one_at_a_time(vlm, prompts, pixels)
    lm.config.image_attention = "causal"
    assert found != generate(vlm, [Prompt(*prompt) for prompt in prompts], pixels, max_new_tokens=NEW).tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_eager_attention_makes_the_same_mask(folders, family):
    sdpa, eager = load(folders, family), load(folders, family, attn_implementation="eager")
    batch = make_batch(sdpa, [2, 0, 1])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(eager(**batch).logits[real], sdpa(**batch).logits[real], rtol=1e-4, atol=1e-4)


# --- refusals


def test_unsupported_combinations_are_refused(folders, tmp_path):
    model = load(folders, "qwen2")
    batch = make_batch(model, [1])
    with pytest.raises(ValueError, match="makes its own mask"):
        model(**batch | {"attention_mask": torch.ones(1, 1, *[batch["input_ids"].shape[1]] * 2, dtype=torch.bool)})
    eager = load(folders, "qwen2", attn_implementation="eager")
    with pytest.raises(ValueError, match="cannot"):
        eager.model(
            input_ids=batch["input_ids"],
            image_features=batch["image_features"],
            lengths=[batch["input_ids"].shape[1]],
        )
    with pytest.raises(InputError, match='model.attention: "mixd" is unknown; did you mean "mixed"'):
        qwen.set_image_attention(model, "mixd")

    folder = write_qwen2(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="attends to only the last 8 tokens"):
        qwen.set_image_attention(qwen.load_language_model(folder), "mixed")
