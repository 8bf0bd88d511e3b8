"""WeightOrigins: which weights are random, released or trained, and which of them a checkpoint stores.

Run: python -m pytest tests/model/test_trainable.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import model.build
from config import InputError, TrainableConfig
from model.build import Built, save_processors
from model.checkpoint import load_trained, save_trained, trained_bytes
from model.checkpoint_folder import write_folder
from model.fused_lora import fuse_lora, fused_layers
from model.trainable import WeightOrigins, parameters_without_lora
from tests.toy_language import write_qwen2, write_qwen3
from tests.toy_model import LORA as LORA_SETTINGS
from tests.toy_model import build_toy, scratch_config, train_config
from tests.toy_towers import write_clip

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ALWAYS = {"projector.safetensors"}
LM, TOWER, LORA = "language_model.safetensors", "vision_tower.safetensors", "adapter_model.safetensors"
FROZEN = {"language_model": "frozen"}
FULL = {"language_model": "full", "embeddings": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Encoder `clip` and language models `qwen2` (tied head) and `qwen3` (untied head)."""
    folder = tmp_path_factory.mktemp("models")
    for name, write in {"clip": write_clip, "qwen2": write_qwen2, "qwen3": write_qwen3}.items():
        write(folder / name)
    return folder


def build(folder: Path, name: str = "qwen2", start_from: Path | None = None, dtype=torch.float32, **words) -> Built:
    """Build a model with the language model folder/<name>. words: of train.trainable."""
    return build_toy(folder, name, train=train_config(**words), dtype=dtype, start_from=start_from)


def build_from_scratch(folder: Path, start_from: Path | None = None, **words) -> Built:
    sizes = scratch_config(folder / "qwen2")
    return build_toy(folder, None, train=train_config(**words), from_scratch=sizes, start_from=start_from)


def train(built: Built) -> None:
    """Change every weight that trains."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def save(built: Built, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Write a checkpoint and return file -> its tensors."""

    def write(partial: Path) -> None:
        save_trained(built.model, built.origins, partial)
        save_processors(built, partial)

    write_folder(folder, write)
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def random_parts(folder: Path) -> list[str]:
    """Return the parts that a checkpoint lists as random."""
    path = folder / "untrained.json"
    return json.loads(path.read_text()) if path.exists() else []


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


def language_model_names(built: Built) -> set[str]:
    """Return the names of the language model's parameters without LoRA."""
    return {
        name.replace(".base_layer", "") for name, _ in built.model.causal_lm.named_parameters() if "lora" not in name
    }


# --- what a checkpoint stores


def layers(built: Built, first: int) -> set[str]:
    names = language_model_names(built)
    return {name for name in names if name.startswith("model.layers.") and int(name.split(".")[2]) >= first}


STORED = {  # case -> (language model, words, the stored names of the language model)
    "lora": ("qwen2", {}, lambda built: set()),
    "frozen": ("qwen2", FROZEN, lambda built: set()),
    "full": ("qwen2", {"language_model": "full"}, lambda built: layers(built, 0) | {NORM}),
    "full, untied head": ("qwen3", {"language_model": "full"}, lambda built: layers(built, 0) | {NORM, HEAD}),
    "top:1": ("qwen3", {"language_model": "top:1"}, lambda built: layers(built, 1) | {NORM}),
    "embeddings": ("qwen2", FROZEN | {"embeddings": "full"}, lambda built: {EMBEDDINGS}),
    "embeddings, untied head": ("qwen3", FROZEN | {"embeddings": "full"}, lambda built: {EMBEDDINGS}),
    "embeddings and lora": ("qwen2", {"embeddings": "full"}, lambda built: {EMBEDDINGS}),
    "everything": ("qwen3", FULL, language_model_names),
}


@pytest.mark.parametrize("case", STORED)
def test_a_checkpoint_stores_the_weights_that_were_trained_and_no_others(folder, tmp_path, case):
    name, words, stored = STORED[case]
    built = build(folder, name, **words)
    found = save(built, tmp_path / "final")
    names = stored(built)
    has_lora = "language_model" not in words
    assert set(found) == ALWAYS | ({LM} if names else set()) | ({LORA} if has_lora else set())
    assert set(found.get(LM, {})) == names == built.origins.trained["language_model"]
    assert random_parts(tmp_path / "final") == [] and built.origins.random == set()
    if has_lora:
        assert all("lora_" in name for name in found[LORA])
    assert trained_bytes(built.model, built.origins) == sum(t.nbytes for file in found.values() for t in file.values())


@pytest.mark.parametrize("word", ["top:1", "full"])
def test_a_checkpoint_stores_the_trained_layers_of_the_encoder(folder, tmp_path, word):
    built = build(folder, vision_tower=word)
    found = save(built, tmp_path / "final")
    trainable = {name for name, p in built.model.vision_tower.named_parameters() if p.requires_grad}
    assert set(found) == ALWAYS | {TOWER, LORA} and set(found[TOWER]) == trainable
    everything = {name for name, _ in built.model.vision_tower.named_parameters()}
    assert (trainable < everything) if word == "top:1" else len(trainable) > len(everything) / 2


def test_a_checkpoint_from_scratch_stores_the_whole_language_model(folder, tmp_path):
    """Also the weights that this run does not train: they exist nowhere else."""
    words = {
        "projector": "frozen",
        "language_model": "top:1",
        "freeze_random": ("projector", "language_model", "embeddings"),
    }
    built = build_from_scratch(folder, **words)
    found = save(built, tmp_path / "final")
    assert set(found) == ALWAYS | {LM} and set(found[LM]) == language_model_names(built)
    assert random_parts(tmp_path / "final") == ["embeddings", "language_model", "projector"]
    assert built.origins.from_scratch and built.origins.random == {"embeddings", "language_model", "projector"}


# --- new, after_training


def test_a_new_model_has_a_random_projector_and_from_scratch_a_random_language_model(folder):
    model = build(folder, "qwen3", **FROZEN).model
    nothing = {"language_model": frozenset(), "vision_tower": frozenset()}
    assert WeightOrigins.new(model, from_scratch=False) == WeightOrigins(frozenset({"projector"}), nothing)
    origins = WeightOrigins.new(model, from_scratch=True)
    assert origins.random == {"projector", "language_model", "embeddings"} and origins.from_scratch
    assert origins.trained["language_model"] == {name for name, _ in model.causal_lm.named_parameters()}
    assert origins.trained["vision_tower"] == set()


@pytest.mark.parametrize(
    "words, random",
    [
        ({"projector": "frozen", "language_model": "full"}, ["embeddings", "projector"]),
        ({"projector": "full", "language_model": "top:1"}, ["embeddings", "language_model"]),
        ({"projector": "full", "language_model": "lora"}, ["embeddings", "language_model"]),
        ({"projector": "full", **FULL}, []),
    ],
    ids=str,
)
def test_only_a_part_that_trains_completely_is_no_longer_random(folder, words, random):
    model = build(folder, **FROZEN).model
    trainable: TrainableConfig = train_config(**words).trainable
    origins = WeightOrigins.new(model, from_scratch=True).after_training(model, trainable)
    assert sorted(origins.random) == random and origins.from_scratch


def test_random_weights_that_would_stay_random_are_refused(folder):
    for words, part in (({"projector": "frozen"}, "projector"), (FULL | {"language_model": "top:1"}, "language_model")):
        with pytest.raises(InputError, match=f'"train.trainable.{part}".*would be random'):
            build_from_scratch(folder, **{"language_model": "full", "embeddings": "full"} | words)


# --- loading


@pytest.mark.parametrize("case", [case for case in STORED if "lora" not in case])
def test_loading_restores_weights_and_origins(folder, tmp_path, case):
    language_model, words, _ = STORED[case]
    words = words | {"vision_tower": "top:1"}
    built = build(folder, language_model, **words)
    train(built)
    stored = save(built, tmp_path / "final")
    fresh = build(folder, language_model, **FROZEN).model
    origins = load_trained(fresh, WeightOrigins.new(fresh, from_scratch=False), tmp_path / "final")
    assert origins == built.origins
    for one, other in zip(built.model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    resumed = build(folder, language_model, start_from=tmp_path / "final", **words)
    assert resumed.origins == built.origins
    again = save(resumed, tmp_path / "again")
    assert again.keys() == stored.keys()
    for name in stored:
        assert_equal(stored[name], again[name])


def test_loading_restores_lora(folder, tmp_path):
    built = build(folder)
    train(built)
    stored = save(built, tmp_path / "final")
    again = build(folder, start_from=tmp_path / "final")
    assert again.origins == built.origins
    assert_equal(save(again, tmp_path / "again")[LORA], stored[LORA])
    with pytest.raises(InputError, match="holds LoRA weights"):
        build(folder, start_from=tmp_path / "final", **FROZEN)


def test_what_was_trained_in_float32_stays_float32(folder, tmp_path):
    """The released weights are bfloat16, what the first run trained is not rounded to it."""
    first = build(folder, "qwen3", language_model="top:1", dtype=torch.bfloat16)
    train(first)
    stored = save(first, tmp_path / "first")
    second = build(folder, "qwen3", start_from=tmp_path / "first", dtype=torch.bfloat16, **FROZEN)
    for name, parameter in second.model.causal_lm.named_parameters():
        assert parameter.dtype == (torch.float32 if name in stored[LM] else torch.bfloat16), name
        assert name not in stored[LM] or torch.equal(parameter, stored[LM][name])


# --- a run that starts from another's checkpoint


@pytest.mark.parametrize("later", [FROZEN, {}], ids=["frozen", "lora"])
def test_a_second_run_stores_what_the_first_trained_and_it_freezes(folder, tmp_path, later):
    first = build(folder, **FULL, vision_tower="top:1")
    train(first)
    stored = save(first, tmp_path / "first")
    second = build(folder, start_from=tmp_path / "first", **later)
    train(second)
    found = save(second, tmp_path / "second")
    for name in (LM, TOWER):
        assert_equal(stored[name], found[name])
    assert second.origins.trained == first.origins.trained
    assert (LORA in found) == (later == {})


def test_a_second_run_adds_what_it_trains_to_what_the_first_trained(folder, tmp_path):
    first = build(folder, "qwen3", language_model="top:1")
    save(first, tmp_path / "first")
    second = build(folder, "qwen3", start_from=tmp_path / "first", embeddings="full", **FROZEN)
    found = save(second, tmp_path / "second")
    assert set(found[LM]) == layers(first, 1) | {NORM, EMBEDDINGS}


def test_stages_from_scratch_store_everything_and_train_the_random_projector_last(folder, tmp_path):
    """Texts without projector, then the projector with the language model frozen, then LoRA."""
    first = build_from_scratch(folder, projector="frozen", freeze_random=("projector",), **FULL)
    train(first)
    stored = save(first, tmp_path / "first")
    assert random_parts(tmp_path / "first") == ["projector"] and set(stored[LM]) == language_model_names(first)
    with pytest.raises(InputError, match="projector.*would be random"):
        build_from_scratch(folder, tmp_path / "first", projector="frozen", **FULL)

    second = build_from_scratch(folder, tmp_path / "first", **FROZEN)
    train(second)
    found = save(second, tmp_path / "second")
    assert second.origins.random == set() and random_parts(tmp_path / "second") == []
    assert_equal(stored[LM], found[LM])
    assert not torch.equal(*(file["projector.safetensors"]["linear_1.weight"] for file in (stored, found)))

    third = build_from_scratch(folder, tmp_path / "second", projector="frozen")
    train(third)
    last = save(third, tmp_path / "third")
    assert set(last) == ALWAYS | {LM, LORA}
    for name in (LM, "projector.safetensors"):
        assert_equal(found[name], last[name])


def test_an_untrained_list_that_is_not_one_is_refused(folder, tmp_path):
    built = build(folder, **FROZEN)
    save_trained(built.model, built.origins, tmp_path)
    for text in ('"projector"', '["encoder"]', '{"projector": 1}', "7"):
        (tmp_path / "untrained.json").write_text(text)
        with pytest.raises(InputError, match=r"untrained\.json: not a list of a model's parts"):
            load_trained(built.model, built.origins, tmp_path)


# --- LoRA on top of trained weights


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_lora_on_trained_weights_has_a_base_in_half_precision_and_equal_results(folder, tmp_path, monkeypatch, name):
    """A run in bfloat16 trains the language model in float32, the next one adds LoRA: its frozen matrices are bfloat16, all
    of them are fused, and the outputs are the same bits."""
    bf16 = torch.bfloat16
    first = build(folder, name, dtype=bf16, **FULL)
    train(first)
    stored = save(first, tmp_path / "first")[LM]
    found = build(folder, name, start_from=tmp_path / "first", dtype=bf16).model
    with monkeypatch.context() as patched:
        patched.setattr(model.build, "halve_lora_base", lambda *_: None)
        expected = build(folder, name, start_from=tmp_path / "first", dtype=bf16).model
    kept = {EMBEDDINGS, *(key for key in stored if "norm" in key)}
    dtypes = {key: p.dtype for key, p in parameters_without_lora(found.causal_lm).items()}
    assert dtypes == {key: torch.float32 if key in kept else bf16 for key in stored}

    ids = torch.randint(1, 200, (2, 12), generator=torch.Generator().manual_seed(3))
    losses = []
    for one in (expected, found):
        with torch.autocast("cpu", bf16):
            losses.append(one(input_ids=ids, labels=ids).answers)
        losses[-1].backward()
    assert torch.equal(*losses)
    gradients = [[p.grad for p in one.parameters() if p.grad is not None] for one in (expected, found)]
    assert len(gradients[0]) > 20 and all(map(torch.equal, *gradients))
    with torch.autocast("cpu", bf16):
        count = fuse_lora(found.language_model)
        assert fused_layers(found.language_model, bf16) == count == 14


OTHER_LORA = {
    "alpha": ({"alpha": 16.0}, "lora.alpha is 8.0, the config says 16.0"),
    "rank": ({"r": 2}, "lora.r is 4, the config says 2"),
    "modules of the same shapes": ({"target_modules": ("q_proj",)}, "lora.target_modules is"),
}


@pytest.mark.parametrize("case", OTHER_LORA)
def test_another_lora_than_the_checkpoints_is_refused(folder, tmp_path, case):
    values, message = OTHER_LORA[case]
    own = replace(LORA_SETTINGS, target_modules=("o_proj",))
    words = {"train": train_config()}
    save(build_toy(folder, lora=own, **words), tmp_path / "first")
    build_toy(folder, lora=replace(own, dropout=0.5), start_from=tmp_path / "first", **words)
    with pytest.raises(InputError, match=rf"adapter_config\.json: another LoRA than the config's: {message}"):
        build_toy(folder, lora=replace(own, **values), start_from=tmp_path / "first", **words)


@pytest.mark.parametrize("key, value", [("use_rslora", True), ("alpha_pattern", {"q_proj": 64}), ("bias", "all")])
def test_a_checkpoint_whose_lora_scales_otherwise_is_refused(folder, tmp_path, key, value):
    """The config has no such key, but another program may have written the checkpoint."""
    save(build(folder), tmp_path / "first")
    path = tmp_path / "first" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=f"another LoRA than the config's: {key} is"):
        build(folder, start_from=tmp_path / "first")
