"""The whole model: what trains, what does not, the loss, the gradients. `sh tests/run.sh tests/test_model.py`"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from config import IGNORE_INDEX, InputError
from model.build import build_model, checkpoint_activations, load_processors
from model.trainable import param_groups, trainable_parameters, trainable_table
from tests.toy_project import LANGUAGE_MODELS, TOWERS

FROZEN = {"vision_tower": "frozen", "projector": "full", "language_model": "frozen", "embeddings": "frozen"}
RATES = {
    "projector_lr": 1e-2,
    "lora_lr": 2e-3,
    "language_model_lr": 3e-4,
    "embeddings_lr": 4e-5,
    "vision_tower_lr": 5e-6,
}
LM = "language_model.model"
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, write in {**TOWERS, **LANGUAGE_MODELS}.items():
        write(folder / name)
    return folder


def build(folders, tower="clip", lm="qwen2", **words):
    trainable = FROZEN | {"language_model": "lora"} | words
    values = {"vision_feature_layer": -2, "image_size": None, "projector": "mlp", "projector_hidden_size": None}
    return build_model(
        load_processors(str(folders / tower), None, str(folders / lm)),
        str(folders / tower), language_model=str(folders / lm), trainable=trainable, lora=LORA,
        dtype=torch.float32, seed=0, **values,
    )  # fmt: skip


def batch_for(built, rows=2, length=30, images_a_row=1):
    """Random tokens with `images_a_row` images each; answers are the last tokens, of another number in every row."""
    generator = torch.Generator().manual_seed(0)
    size = built.model.vision_tower.image_size
    count = built.model.vision_tower.num_image_tokens
    values = built.chat_values()
    ids = torch.randint(10, 200, (rows, length + images_a_row * count), generator=generator)
    for image in range(images_a_row):
        start = 2 + image * (count + 1)
        ids[:, start : start + count] = values["image_token_id"]
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row in range(rows):
        labels[row, -(row + 3) :] = ids[row, -(row + 3) :]
    pixels = torch.randn(rows * images_a_row, 3, size, size, generator=generator) if images_a_row else None
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", TOWERS)
def test_loss_is_the_mean_of_the_full_logits_cross_entropy(folders, tower, language_model):
    """The head runs at supervised positions only; the plain way (all logits, shifted labels) gives the same loss."""
    built = build(folders, tower, language_model)
    batch = batch_for(built)
    loss = built.model(**batch).answers
    features = built.model.encode_images(batch.pixel_values)
    logits = built.model.language_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, image_features=features
    ).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)


def test_gradients_are_in_the_projector_and_lora_and_nowhere_else(folders):
    built = build(folders)
    torch.nn.init.normal_(next(p for n, p in built.model.named_parameters() if "lora_B" in n))  # else lora_A has zero
    built.model(**batch_for(built)).answers.backward()
    for name, parameter in built.model.named_parameters():
        expected = name.startswith("projector.") or "lora_" in name
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
    assert built.model.projector.linear_1.weight.grad.abs().sum() > 0


def test_frozen_weights_do_not_change_in_a_step_and_trained_ones_do(folders):
    built = build(folders)
    words = FROZEN | {"language_model": "lora"}
    before = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(built.model, words, RATES, weight_decay=0.1))
    for _ in range(2):  # lora_A moves only once lora_B is no longer zero
        built.model(**batch_for(built)).answers.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_swapping_the_image_changes_the_loss(folders):
    built = build(folders)
    batch = batch_for(built)
    swapped = batch | {"pixel_values": batch.pixel_values.flip(0)}
    assert abs(built.model(**batch).answers - built.model(**swapped).answers) > 1e-4


@pytest.mark.parametrize("tower", ["frozen", "top:1"])
def test_a_batch_without_images_has_zero_gradients_on_the_image_side(folders, tower):
    """Zeros, not None: processes that add up their gradients would wait for each other for ever otherwise."""
    built = build(folders, vision_tower=tower)
    built.model(**batch_for(built, images_a_row=0)).answers.backward()
    trained = trainable_parameters(built.model)
    for parameter in trained["projector"] + trained["vision_tower"]:
        assert parameter.grad is not None and parameter.grad.abs().sum() == 0


def test_text_only_rows_among_image_rows_leave_the_others_as_they_were(folders):
    """The loss of a row with an image and one without is the sum of theirs alone."""
    built = build(folders)
    with_image, without = batch_for(built, rows=1), batch_for(built, rows=1, images_a_row=0, length=46)
    assert with_image["input_ids"].shape == without["input_ids"].shape
    both = {key: torch.cat([without[key], with_image[key]]) for key in ("input_ids", "labels", "attention_mask")}
    together = built.model(**both, pixel_values=with_image["pixel_values"]).answers
    apart = built.model(**with_image).answers + built.model(**without).answers
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "words, trains",
    [
        ({"language_model": "frozen"}, ["projector.linear_1.bias"]),
        ({"language_model": "top:1"}, [f"{LM}.layers.1.mlp.up_proj.weight", f"{LM}.norm.weight"]),
        ({"language_model": "full"}, [f"{LM}.layers.0.mlp.up_proj.weight"]),
        ({"language_model": "full", "embeddings": "full"}, [f"{LM}.embed_tokens.weight"]),
        ({"vision_tower": "top:1"}, []),
        ({"vision_tower": "full"}, []),
    ],
)  # fmt: skip
def test_words_say_what_trains(folders, words, trains):
    built = build(folders, **words)
    words = FROZEN | {"language_model": "lora"} | words
    on = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert set(trains) <= on
    assert any(name.startswith("vision_tower") for name in on) == (words["vision_tower"] != "frozen")
    assert (f"{LM}.embed_tokens.weight" in on) == (words["embeddings"] == "full")
    if words["language_model"] == "top:1":
        assert not any("layers.0." in name for name in on)
    groups = param_groups(built.model, words, RATES, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(on)
    for group in groups:
        assert group["lr"] == RATES[group["name"]]
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    built.model(**batch_for(built)).answers.backward()
    assert all(p.grad is not None for group in groups for p in group["params"])


def test_more_layers_than_there_are_is_refused(folders):
    with pytest.raises(InputError, match="top:9.*2 layers"):
        build(folders, language_model="top:9")


def test_trainables_are_float32_and_the_rest_keeps_its_precision(folders):
    values = {"vision_feature_layer": -2, "image_size": None, "projector": "mlp", "projector_hidden_size": 24}
    built = build_model(
        load_processors(str(folders / "clip"), None, str(folders / "qwen2")),
        str(folders / "clip"), language_model=str(folders / "qwen2"), trainable=FROZEN | {"language_model": "lora"},
        lora=LORA, dtype=torch.bfloat16, seed=0, **values,
    )  # fmt: skip
    for name, parameter in built.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert built.model.projector.linear_1.out_features == 24
    with torch.autocast("cpu", dtype=torch.bfloat16):
        built.model(**batch_for(built)).answers.backward()
    assert all(
        parameters == [] or parameters[0].grad.isfinite().all()
        for parameters in trainable_parameters(built.model).values()
    )


def test_the_first_weights_depend_on_the_seed_alone(folders):
    torch.manual_seed(1)
    first = build(folders).model
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(folders).model
    assert torch.equal(torch.get_rng_state(), state), "building must not move the global random numbers"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_activation_checkpointing_changes_nothing_but_memory(folders):
    plain = build(folders)
    saving = build(folders)
    checkpoint_activations(saving.model)
    for built in (plain, saving):
        built.model(**batch_for(built)).answers.backward()
    assert saving.model.causal_lm.model.layers[0].gradient_checkpointing
    for (name, a), (_, b) in zip(plain.model.named_parameters(), saving.model.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_qwen_v1_names_of_lora_modules_mean_the_modules_they_became(folders):
    lora = LORA | {"target_modules": ["c_attn", "w1", "w2"]}
    values = {"vision_feature_layer": -2, "image_size": None, "projector": "mlp", "projector_hidden_size": None}
    built = build_model(
        load_processors(str(folders / "clip"), None, str(folders / "qwen1")),
        str(folders / "clip"), language_model=str(folders / "qwen1"), trainable=FROZEN | {"language_model": "lora"},
        lora=lora, dtype=torch.float32, seed=0, **values,
    )  # fmt: skip
    adapted = {name.split(".")[-4] for name, _ in built.model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"}


def test_the_table_adds_up(folders):
    built = build(folders)
    table = trainable_table(built.model, FROZEN | {"language_model": "lora"}, RATES)
    lines = [line.split() for line in table.splitlines()]
    trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert lines[-1][2] == f"{trainable:,}"
    assert sum(int(line[2].replace(",", "")) for line in lines[1:-1]) == trainable
    assert sum(int(line[3].replace(",", "")) for line in lines[1:-1]) == sum(
        p.numel() for p in built.model.parameters()
    )
    assert [line[4] for line in lines[1:5]] == ["-", "0.01", "0.002", "-"]
