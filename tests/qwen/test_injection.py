"""A language model with image features equals transformers' LLaVA with the same weights, and generates correctly.

Shapes: M images, N features each, D hidden size; B rows, L tokens.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import qwen
from tests.toy_language import HIDDEN, WRITERS

N = 4  # features per image: 8x8 pixels, patches of 4
TEXT = (0, 400)  # range of the ids of ordinary text in every toy vocabulary
VISION = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "image_size": 8}
TOWERS = {  # class, configuration, LLaVA's word for dropping the first token ("default") or not ("full")
    "clip": (CLIPVisionModel, CLIPVisionConfig(intermediate_size=32, **VISION), "default"),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(intermediate_size=32, **VISION), "full"),
    "dinov2": (Dinov2Model, Dinov2Config(mlp_ratio=2, **VISION), "default"),
}
LAYOUTS = [(1, 1, 1), (2, 2, 2), (2, 0, 1), (0, 1, 3)]  # images per row


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function: family -> a new model with its tokenizer attached."""
    folders = {family: write(tmp_path_factory.mktemp(family)) for family, write in WRITERS.items()}

    def load(family):
        model = qwen.load_language_model(folders[family])
        qwen.attach_tokenizer(model, qwen.load_tokenizer(folders[family]))
        model.generation_config.eos_token_id = None  # these models are random: generate the full length
        for (
            parameter
        ) in model.parameters():  # memory-mapped weights are not aligned, which changes the rounding of products
            parameter.data = parameter.data.clone()
        return model

    return load


@pytest.fixture(params=WRITERS)
def model(request, load):
    return load(request.param)


def make_batch(model, images_per_row, side="right", length=None, seed=0):
    """Make random prompts with `images_per_row` images: input_ids, attention_mask [B, L] and image_features [M, N, D].

    Rows differ in length and are padded on `side`, unless `length` fixes the length of all. The images are near the end,
    where they still affect the answers of these small random models.
    """
    rng = torch.Generator().manual_seed(seed)
    image = [model.config.image_token_id] * N

    def text(count):
        return torch.randint(*TEXT, (count,), generator=rng).tolist()

    rows = []
    for number, images in enumerate(images_per_row):
        row = [token for _ in range(images) for token in image + text(1)]
        rows.append(text(length - len(row) if length else 3 + 2 * number) + row)
    longest = max(map(len, rows))
    pads = [[model.generation_config.pad_token_id] * (longest - len(row)) for row in rows]
    real = [([1] * len(row), [0] * len(pad)) for row, pad in zip(rows, pads, strict=True)]
    if side == "right":
        ids, mask = [row + pad for row, pad in zip(rows, pads, strict=True)], [ones + zeros for ones, zeros in real]
    else:
        ids, mask = [pad + row for row, pad in zip(rows, pads, strict=True)], [zeros + ones for ones, zeros in real]
    # The features of an image have a common part, which adds up, so that the answer depends on every image.
    features = torch.randn(sum(images_per_row), 1, HIDDEN, generator=rng)
    features = features + 0.3 * torch.randn(sum(images_per_row), N, HIDDEN, generator=rng)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "image_features": features}


# Equality with LLaVA


def as_llava(model, tower, projector, strategy):
    """Make a LlavaForConditionalGeneration with the weights of `model`."""
    text = model.config.to_dict()
    if text.pop("model_type") == "qwen":  # LLaVA does not support v1: use plain Qwen2
        text = Qwen2Config(**text)
    else:
        text = type(model.config)(**text)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=model.config.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.language_model.config._experts_implementation = "eager"  # its default sums experts in another order
    weights = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in model.state_dict().items()
    }
    weights |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    weights["model.multi_modal_projector.linear_1.weight"] = projector[0].weight
    weights["model.multi_modal_projector.linear_1.bias"] = projector[0].bias
    weights["model.multi_modal_projector.linear_2.weight"] = projector[2].weight
    weights["model.multi_modal_projector.linear_2.bias"] = projector[2].bias
    llava.load_state_dict(weights)  # strict
    return llava


@torch.no_grad()
@pytest.mark.parametrize("tower_name", TOWERS)
def test_logits_equal_llavas(model, tower_name):
    torch.manual_seed(0)
    tower_class, config, strategy = TOWERS[tower_name]
    tower = tower_class(config).eval()
    projector = torch.nn.Sequential(torch.nn.Linear(16, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    llava = as_llava(model, tower, projector, strategy)
    for images_per_row in LAYOUTS:
        pixel_values = torch.randn(sum(images_per_row), 3, 8, 8)
        patches = tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        features = projector(patches if strategy == "full" else patches[:, 1:])
        for side in ("right", "left"):
            batch = make_batch(model, images_per_row, side) | {"image_features": features}
            ours = model(**batch).logits
            del batch["image_features"]
            assert torch.equal(ours, llava(**batch, pixel_values=pixel_values).logits)


# Effects of the features


@torch.no_grad()
def test_another_image_changes_the_logits_from_its_position_on(model):
    batch = make_batch(model, [1, 1])
    logits = model(**batch).logits
    other = batch["image_features"].clone()
    other[0] += torch.randn(N, HIDDEN)
    changed = model(**batch | {"image_features": other}).logits
    start = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[0]
    assert (changed[0, start:] != logits[0, start:]).any(dim=-1).all()
    # all tokens of an expert are one product, whose rounding depends on their number
    tolerance = 1e-5 if "moe" in model.config.model_type else 0.0
    for found, expected in ((changed[0, :start], logits[0, :start]), (changed[1], logits[1])):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    swapped = model(**batch | {"image_features": batch["image_features"].flip(0)}).logits
    assert not torch.allclose(swapped[0, start:], logits[0, start:])


@torch.no_grad()
def test_later_text_and_images_never_change_earlier_logits(model):
    batch = make_batch(model, [2], length=24)
    logits = model(**batch).logits
    second_image = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[N]
    ids = batch["input_ids"].clone()
    ids[0, -1] = (ids[0, -1] + 1) % TEXT[1]
    assert torch.equal(model(**batch | {"input_ids": ids}).logits[:, :-1], logits[:, :-1])
    features = batch["image_features"].clone()
    features[1] = 0
    changed = model(**batch | {"image_features": features}).logits
    assert torch.equal(changed[:, :second_image], logits[:, :second_image])


@torch.no_grad()
def test_text_alone_needs_no_features(model):
    batch = make_batch(model, [0, 0])
    nothing = batch.pop("image_features")
    assert nothing.shape == (0, N, HIDDEN)
    plain = super(qwen.injection.ImageInjection, model.model).forward(**batch)[0]
    assert torch.equal(model(**batch).logits, model.lm_head(plain))
    assert torch.equal(model(**batch, image_features=nothing).logits, model.lm_head(plain))


def test_a_new_image_token_without_an_embedding(model):
    batch = make_batch(model, [1, 2], "left")
    logits = model(**batch).logits
    beyond = model.config.vocab_size + 7
    ids = torch.where(batch["input_ids"] == model.config.image_token_id, beyond, batch["input_ids"])
    model.config.image_token_id = beyond
    batch["input_ids"] = ids
    assert torch.equal(model(**batch).logits, logits)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, ids.shape[1] + 3)


@torch.no_grad()
def test_an_image_token_in_a_decoding_step_is_harmless(model):
    cache = model(**make_batch(model, [1]), use_cache=True).past_key_values
    ids = torch.tensor([[model.config.image_token_id]])
    assert model(ids, past_key_values=cache, use_cache=True).logits.isfinite().all()


@torch.no_grad()
def test_several_tokens_after_a_filled_cache_need_their_features(model):
    batch = make_batch(model, [2], length=24)
    whole = model(**batch).logits
    ids, mask, features = batch.values()
    cut = (ids[0] == model.config.image_token_id).nonzero()[N]  # before the second image

    def rest(**features):
        cache = model(ids[:, :cut], mask[:, :cut], image_features=batch["image_features"][:1], use_cache=True)
        return model(ids[:, cut:], mask, past_key_values=cache.past_key_values, use_cache=True, **features).logits

    assert torch.allclose(rest(image_features=features[1:]), whole[:, cut:], atol=1e-4)
    with pytest.raises(ValueError, match=r"\[4\], 4 in total; image features: 0 images"):
        rest()


def test_features_that_do_not_match_are_refused_with_the_numbers(model):
    batch = make_batch(model, [1, 2])
    features = batch.pop("image_features")
    for wrong in (features[:2], torch.cat([features, features]), features[:, :3], features[:0]):
        with pytest.raises(ValueError, match=rf"\[4, 8\], 12 in total; image features: {len(wrong)} images"):
            model(**batch, image_features=wrong)
    with pytest.raises(ValueError, match="12 in total; image features: 0 images"):
        model(**batch)
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, HIDDEN), image_features=features)
    # The totals agree, but one token of the first image is in the second row.
    image = model.config.image_token_id
    ids = torch.tensor([[1, 2, *[image] * 3, 5], [1, *[image] * 5]])
    with pytest.raises(ValueError, match=r"\[3, 5\], 8 in total; image features: 2 images of 4, 8 in total"):
        model(ids, image_features=features[:2])


def test_features_without_an_image_token_are_refused(model):
    batch = make_batch(model, [1])
    del model.config.image_token_id
    with pytest.raises(ValueError, match="attach_tokenizer"):
        model(**batch)


# Generation


def answer(model, batch, **settings):
    """Generate and return the new ids only."""
    out = model.generate(**batch, **{"max_new_tokens": 8, "do_sample": False} | settings)
    return out[:, batch["input_ids"].shape[1] :]


def row_of(batch, images_per_row, row):
    first = sum(images_per_row[:row])
    features = batch["image_features"][first : first + images_per_row[row]]
    return {name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask")} | {"image_features": features}


def test_generation_with_and_without_cache_is_equal(model):
    batch = make_batch(model, [2, 0, 1], "left")
    cached = answer(model, batch)
    assert torch.equal(cached, answer(model, batch, use_cache=False))

    # Both equal the argmax of one forward over the whole sequence.
    ids = torch.cat([batch["input_ids"], cached], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(cached)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, mask, positions, image_features=batch["image_features"]).logits
    logits[..., model.config.image_token_id] = -torch.inf
    assert torch.equal(logits[:, -cached.shape[1] - 1 : -1].argmax(-1), cached)


def test_prompt_lookup_works_with_image_tokens_in_the_prompt(model):
    """Prompt lookup passes several tokens at once after a filled cache, without features."""
    batch = make_batch(model, [2])
    assert torch.equal(answer(model, batch, prompt_lookup_num_tokens=6), answer(model, batch))


def test_chunked_prefill_of_a_prompt_with_images_is_refused(model):
    batch = make_batch(model, [1, 1])
    with pytest.raises(ValueError, match="prefill_chunk_size: a prompt with images cannot be read in chunks"):
        answer(model, batch, prefill_chunk_size=4)
    text = make_batch(model, [0, 0], length=12)
    assert torch.equal(answer(model, text, prefill_chunk_size=4), answer(model, text))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_keep_each_rows_own_images(model, settings):
    images_per_row = [2, 0, 1]
    batch = make_batch(model, images_per_row, length=12)  # no padding, so that a row alone is computed in the same way
    together = answer(model, batch, **settings)
    alone = [answer(model, row_of(batch, images_per_row, row), **settings) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))
    # The answer depends on the images: with its first image twice, the first row's answer changes.
    batch["image_features"] = batch["image_features"][[0, 0, 2]]
    assert not torch.equal(answer(model, batch, **settings)[0], together[0])


def test_samples_keep_each_rows_own_images(model):
    batch = make_batch(model, [2, 0, 1], length=12)
    # Only the most likely token can be sampled, so every sample of a row is its greedy answer.
    sampled = answer(model, batch, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(sampled, answer(model, batch).repeat_interleave(3, dim=0))


def test_batched_answers_equal_single_answers(model):
    images_per_row = [1, 0, 2]
    batch = make_batch(model, images_per_row, "left")
    together = answer(model, batch)
    for row in range(3):
        single = row_of(batch, images_per_row, row)
        real = single["attention_mask"].bool()
        single |= {name: single[name][real][None] for name in ("input_ids", "attention_mask")}
        assert torch.equal(answer(model, single)[0], together[row])


def test_the_image_token_is_never_generated(model):
    batch = make_batch(model, [1, 1])
    image = model.config.image_token_id

    def prefer_the_image(input_ids, scores):
        scores[:, image] += 1e4
        return scores

    prefer = [prefer_the_image]
    model.generation_config.suppress_tokens = None
    assert (answer(model, batch, logits_processor=prefer)[:, 0] == image).all()  # the preference works ...
    model.generation_config.suppress_tokens = [image]
    assert (answer(model, batch, logits_processor=prefer) != image).all()  # ... and the suppression wins


# Training


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_every_combination_of_dtypes_trains(load, model_dtype, features_dtype, autocast):
    model = load("qwen")
    batch = make_batch(model, [2, 0, 1])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def train(dtype, autocast):
        features = batch["image_features"].detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**batch | {"image_features": features})
        output.loss.backward()
        assert features.grad.dtype == dtype
        return output.logits.float(), output.loss.float(), features.grad.float()

    expected = train(torch.float32, autocast=False)
    model.to(model_dtype)
    for value, reference in zip(train(features_dtype, autocast), expected, strict=True):
        assert (value - reference).norm() < 0.05 * reference.norm()


def test_gradient_checkpointing_keeps_loss_and_gradients(model):
    batch = make_batch(model, [2, 0, 1])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["image_features"].requires_grad_()
    model.train()

    def loss_and_gradients():
        model.zero_grad()
        batch["image_features"].grad = None
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), batch["image_features"].grad, *(p.grad.clone() for p in model.parameters())

    plain = loss_and_gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = loss_and_gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert plain[1].abs().sum(dim=(1, 2)).gt(0).all()  # every image gets a gradient


def test_replaced_embeddings_get_no_gradient(model):
    batch = make_batch(model, [1, 2])
    embeddings = model.get_input_embeddings().weight.clone().detach().requires_grad_()
    torch.func.functional_call(model.model, {"embed_tokens.weight": embeddings}, kwargs=batch)[0].sum().backward()
    used = embeddings.grad.abs().sum(1).nonzero().flatten().tolist()
    assert set(used) <= set(batch["input_ids"].unique().tolist()) - {model.config.image_token_id}


def test_a_peft_model_takes_features_too(model):
    batch = make_batch(model, [2, 0, 1], "left")
    logits, ids = model(**batch).logits, answer(model, batch)
    beams = answer(model, batch, num_beams=3)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=qwen.lora_target_modules(model, ["all-linear"]), task_type="CAUSAL_LM")
    ).eval()
    assert torch.equal(adapted(**batch).logits, logits)  # a new adapter adds zero
    assert torch.equal(answer(adapted, batch), ids)
    assert torch.equal(answer(adapted, batch, num_beams=3), beams)


def test_released_sampling_settings_are_dropped(tmp_path):
    """Qwen's chat models are released with sampling and a repetition penalty; models here answer greedily."""
    folder = WRITERS["qwen2"](tmp_path / "lm")
    released = {"do_sample": True, "top_p": 0.8, "temperature": 0.7, "repetition_penalty": 1.5, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(released))
    model, tokenizer = qwen.load_language_model(folder), qwen.load_tokenizer(folder)
    assert model.generation_config.repetition_penalty == 1.5
    qwen.attach_tokenizer(model, tokenizer)
    prompt = torch.tensor([qwen.encode_text(tokenizer, "What is in the picture?")])
    ids = model.generate(prompt, max_new_tokens=8)
    for _ in range(8):
        scores = model(prompt).logits[0, -1]
        scores[qwen.image_token_id(tokenizer)] = -torch.inf
        prompt = torch.cat([prompt, scores.argmax().view(1, 1)], dim=1)
    assert torch.equal(ids, prompt[:, : ids.shape[1]])


def test_every_language_model_has_a_writer():
    assert set(WRITERS) == set(qwen.LANGUAGE_MODELS)
