"""The whole model: what trains and what does not, the loss, the gradients.

Run: python -m pytest tests/model/test_model.py
"""

from __future__ import annotations

import dataclasses
import json

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F

import qwen
from config import IGNORE_INDEX, InputError, LoraConfig, ModelConfig
from model.build import checkpoint_activations, weight_files
from model.hub import hub_access
from model.model import add_noise
from model.trainable import param_groups, trainable_parameters, trainable_table
from tests.toy_model import RATES, build_toy, train_config
from tests.toy_project import LANGUAGE_MODELS, TOWERS

LM = "language_model.model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, write in {**TOWERS, **LANGUAGE_MODELS}.items():
        write(folder / name)
    return folder


def batch_for(built, rows=2, length=30, images_a_row=1):
    """Return a batch of random tokens with `images_a_row` images in every row. The last tokens of a row are supervised: 3
    in the first row, one more in each further row."""
    generator = torch.Generator().manual_seed(0)
    size = built.model.vision_tower.image_size
    count = built.model.vision_tower.num_image_tokens
    ids = torch.randint(10, 200, (rows, length + images_a_row * count), generator=generator)
    for image in range(images_a_row):
        start = 2 + image * (count + 1)
        ids[:, start : start + count] = qwen.image_token_id(built.tokenizer)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row in range(rows):
        labels[row, -(row + 3) :] = ids[row, -(row + 3) :]
    pixels = torch.randn(rows * images_a_row, 3, size, size, generator=generator) if images_a_row else None
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize("tower", TOWERS)
def test_loss_is_the_cross_entropy_of_the_full_logits(folders, tower, language_model):
    """The head runs at supervised positions only. All logits and shifted labels give the same loss."""
    built = build_toy(folders, language_model, tower)
    batch = batch_for(built)
    loss = built.model(**batch).answers
    features = built.model.encode_images(batch["pixel_values"])
    logits = built.model.language_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], image_features=features
    ).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)


def test_noise_is_one_vector_for_all_tokens_of_an_image_as_large_as_asked():
    torch.manual_seed(0)
    features = torch.randn(40, 5, 64) * torch.linspace(0.1, 3, 40)[:, None, None]
    noise = add_noise(features, 0.5) - features
    torch.testing.assert_close(noise, noise[:, :1].expand(-1, 5, -1), rtol=0, atol=1e-5)
    ratios = noise.square().mean((1, 2)).sqrt() / features.square().mean((1, 2)).sqrt()
    assert 0.35 < ratios.min() < ratios.max() < 0.65 and abs(float(ratios.mean()) - 0.5) < 0.02
    other = noise[:20, 0] / noise[:20, 0].norm(dim=1, keepdim=True)
    assert (other @ other.T - torch.eye(20)).abs().max() < 0.6  # each image has its own


def test_image_noise_is_for_training_alone_and_follows_the_seed(folders):
    train = dataclasses.replace(train_config(), image_noise=0.5)
    plain, noisy = build_toy(folders).model, build_toy(folders, train=train).model
    batch = batch_for(build_toy(folders))

    def loss(model, seed: int) -> float:
        torch.manual_seed(seed)
        return float(model(**batch).answers.detach())

    plain.train(), noisy.train()
    assert loss(noisy, 1) == loss(noisy, 1) != loss(noisy, 2)
    assert loss(plain, 1) == loss(plain, 2) != loss(noisy, 1)
    plain.eval(), noisy.eval()
    assert loss(noisy, 1) == loss(plain, 1)


def test_only_projector_and_lora_have_gradients(folders):
    built = build_toy(folders)
    # while lora_B is zero, lora_A has zero gradients
    torch.nn.init.normal_(next(p for n, p in built.model.named_parameters() if "lora_B" in n))
    built.model(**batch_for(built)).answers.backward()
    for name, parameter in built.model.named_parameters():
        expected = name.startswith("projector.") or "lora_" in name
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
    assert built.model.projector.linear_1.weight.grad.abs().sum() > 0


def test_frozen_weights_do_not_change_in_a_step_and_trained_ones_do(folders):
    built = build_toy(folders)
    before = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    optimizer = torch.optim.AdamW(param_groups(built.model, train_config()))
    for _ in range(2):  # lora_A changes only once lora_B is no longer zero
        built.model(**batch_for(built)).answers.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_swapping_the_image_changes_the_loss(folders):
    built = build_toy(folders)
    batch = batch_for(built)
    swapped = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert abs(built.model(**batch).answers - built.model(**swapped).answers) > 1e-4


@pytest.mark.parametrize("tower", ["frozen", "top:1"])
def test_a_batch_without_images_has_zero_gradients_on_the_image_side(folders, tower):
    """Zeros, not None: processes that sum their gradients would wait for each other forever otherwise."""
    built = build_toy(folders, train=train_config(vision_tower=tower))
    built.model(**batch_for(built, images_a_row=0)).answers.backward()
    trained = trainable_parameters(built.model)
    for parameter in trained["projector"] + trained["vision_tower"]:
        assert parameter.grad is not None and parameter.grad.abs().sum() == 0


def test_rows_without_images_do_not_change_rows_with_images(folders):
    """The loss of a row with an image and one without is the sum of their own losses."""
    built = build_toy(folders)
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
def test_words_decide_what_trains(folders, words, trains):
    train = train_config(**words)
    built = build_toy(folders, train=train)
    on = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert set(trains) <= on
    assert any(name.startswith("vision_tower") for name in on) == (train.trainable.vision_tower != "frozen")
    assert (f"{LM}.embed_tokens.weight" in on) == (train.trainable.embeddings == "full")
    if train.trainable.language_model == "top:1":
        assert not any("layers.0." in name for name in on)
    groups = param_groups(built.model, train)
    assert sum(len(group["params"]) for group in groups) == len(on)
    for group in groups:
        assert group["lr"] == RATES[group["name"]]
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    built.model(**batch_for(built)).answers.backward()
    assert all(p.grad is not None for group in groups for p in group["params"])


def test_more_layers_than_the_model_has_are_refused(folders):
    with pytest.raises(InputError, match="top:9.*2 layers"):
        build_toy(folders, train=train_config(language_model="top:9"))


def test_trainable_weights_are_float32_and_the_others_keep_their_type(folders):
    built = build_toy(folders, dtype=torch.bfloat16, projector_hidden_size=24)
    for name, parameter in built.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert built.model.projector.linear_1.out_features == 24
    with torch.autocast("cpu", dtype=torch.bfloat16):
        built.model(**batch_for(built)).answers.backward()
    assert all(
        parameters == [] or parameters[0].grad.isfinite().all()
        for parameters in trainable_parameters(built.model).values()
    )


def test_the_first_weights_depend_on_the_seed_only(folders):
    torch.manual_seed(1)
    first = build_toy(folders).model
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_toy(folders).model
    assert torch.equal(torch.get_rng_state(), state), "building changed the state of the global random generator"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_activation_checkpointing_changes_nothing_but_memory(folders):
    plain = build_toy(folders)
    saving = build_toy(folders)
    checkpoint_activations(saving.model)
    for built in (plain, saving):
        built.model(**batch_for(built)).answers.backward()
    assert saving.model.causal_lm.model.layers[0].gradient_checkpointing
    for (name, a), (_, b) in zip(plain.model.named_parameters(), saving.model.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_qwen_v1_names_of_lora_modules_are_translated(folders):
    built = build_toy(folders, "qwen1", lora=LoraConfig(r=4, target_modules=("c_attn", "w1", "w2")))
    adapted = {name.split(".")[-4] for name, _ in built.model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"}


def test_the_table_adds_up(folders):
    built = build_toy(folders)
    table = trainable_table(built.model, train_config())
    lines = [line.split() for line in table.splitlines()]
    trainable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert lines[-1][2] == f"{trainable:,}"
    assert sum(int(line[2].replace(",", "")) for line in lines[1:-1]) == trainable
    assert sum(int(line[3].replace(",", "")) for line in lines[1:-1]) == sum(
        p.numel() for p in built.model.parameters()
    )
    assert [line[4] for line in lines[1:5]] == ["-", "0.01", "0.002", "-"]


def test_a_model_of_the_hub_is_cached_once_every_file_is(tmp_path, monkeypatch):
    """A large model's download that was stopped leaves some of its files."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = ModelConfig(vision_tower=str(tmp_path / "tower"), language_model="some/body")
    snapshot = tmp_path / "models--some--body" / "snapshots" / ("0" * 40)
    for folder in (snapshot, tmp_path / "models--some--body" / "refs"):
        folder.mkdir(parents=True)
    (tmp_path / "models--some--body" / "refs" / "main").write_text("0" * 40)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    for name, text in {"config.json": "{}", "model.safetensors.index.json": json.dumps(index), shards[0]: ""}.items():
        (snapshot / name).write_text(text)
    with pytest.raises(InputError, match="some/body: .* not on this machine"), hub_access(settings, set(), False):
        pass
    (snapshot / shards[1]).write_text("")
    assert weight_files("some/body") == {name: snapshot / name for name in ["config.json", *shards]}
    with hub_access(settings, set(), False):
        assert huggingface_hub.is_offline_mode()
    (snapshot / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with (
        pytest.raises(InputError, match='index.json: "weight_map" is not an object'),
        hub_access(settings, set(), False),
    ):
        pass
