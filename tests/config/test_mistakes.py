"""The message for each mistake in a config: the key, what was found, what was expected.

Run: sh tests/run.sh tests/config/test_mistakes.py
"""

import copy
import dataclasses
import os

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config import Config, InputError, SourceConfig, load_config, to_yaml
from config.typed_yaml import all_keys
from tests.config.test_load import VALUES, write


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, VALUES)


def message(path, *overrides) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# --- wrong keys


def typo(word: str) -> str:
    return word[: len(word) // 2] + word[len(word) // 2 + 1 :]


@pytest.mark.parametrize("key", [key for key in all_keys(Config) if len(key.rsplit(".", 1)[-1]) > 4])
def test_typo_suggests_the_intended_key(path, key):
    section, _, word = key.rpartition(".")
    wrong = f"{section}.{typo(word)}".lstrip(".")
    found = message(path, f"{wrong}=1")
    assert f'"{wrong}"' in found and f'did you mean "{key}"?' in found


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(SourceConfig) if len(field.name) > 4])
def test_typo_in_a_source_suggests_the_intended_key(path, key):
    found = message(path, f"data.sources.1.{typo(key)}=1")
    assert f'"data.sources.1.{typo(key)}"' in found and f'did you mean "data.sources.1.{key}"?' in found


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("train.max_length", "data.max_length"),  # train.max_steps is spelled alike, but this very word exists
        ("lora_lr", "train.lora_lr"),
        ("train.r", "lora.r"),
        ("vision_tower", "model.vision_tower"),
        ("train.vision_tower", "train.trainable.vision_tower"),
    ],
)
def test_key_in_the_wrong_section_is_found(path, wrong, meant):
    assert message(path, f"{wrong}=1") == f'"{wrong}" is not a key of the config; did you mean "{meant}"?'


def test_unknown_key_lists_the_known_ones(path):
    found = message(path, "test.zzz=1")
    assert found.startswith('"test.zzz" is not a key of the config. Known here: images, questions, ')


def test_missing_key_is_named(tmp_path):
    for key in ("output_dir", "data.qa_file", "model.vision_tower", "model.language_model"):
        values = copy.deepcopy(VALUES)
        *section, word = key.split(".")
        del (values[section[0]] if section else values)[word]
        assert message(write(tmp_path, values)).startswith(f'"{key}" is missing')
    values = copy.deepcopy(VALUES)
    del values["data"]["sources"][1]["annotations"]
    assert message(write(tmp_path, values)).startswith('"data.sources.1.annotations" is missing')


# --- wrong values


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed=x", ['"seed"', "number", "'x'"]),
        ("seed=1.5", ['"seed"', "whole number", "1.5"]),
        ("seed=true", ['"seed"', "number", "True"]),
        ("seed=null", ['"seed"', "number", "nothing"]),
        ("seed=[1]", ['"seed"', "number", "a list"]),
        ("seed=-1", ['"seed"', "between 0 and"]),
        ("seed=4294967296", ['"seed"', "between 0 and"]),
        ("seed.x=1", ['"seed.x"', '"seed" holds no keys']),
        ("seed=2001-99-99", ["seed", "not valid YAML", "month"]),
        ("seed=!!bool maybe", ["seed", "not valid YAML"]),
        ("seed={a: 1, a: 2}", ["seed", '"a" is given twice']),
        ("lora.alpha=.nan", ['"lora.alpha"', "finite"]),
        ("lora.alpha=1" + "0" * 400, ['"lora.alpha"', "finite"]),
        ("lora.alpha=-1", ['"lora.alpha"', "at least 0"]),
        ("lora.dropout=1", ['"lora.dropout"', "between 0.0 and 0.99"]),
        ("data.max_length=0", ['"data.max_length"', "between 8 and"]),
        ("data.sources.0.weight=-0.5", ['"data.sources.0.weight"', "at least 0"]),
        ("data.sources.2.weight=1", ['"data.sources.2.weight"', '"2"', "list of 2"]),
        ("data.sources.²=1", ['"²"', "list of 2"]),
        ("data.sources=3", ['"data.sources"', "a list", "3"]),
        ("data.sources=[3]", ['"data.sources.0"', "keys and values", "3"]),
        ("data.sources.0.images=3", ['"data.sources.0.images"', "a path", "3"]),
        ("data.system_prompt=3", ['"data.system_prompt"', "text", "3"]),
        ("output_dir=''", ['"output_dir"', "a path"]),
        ('output_dir="a\\0b"', ['"output_dir"', "cannot be a path"]),
        ("output_dir=~nobody-of-this-name/x", ['"output_dir"', "cannot be a path"]),
        ("train=3", ['"train"', "keys and values", "3"]),
        ("train.precision=bf61", ['"train.precision"', '"bf16"?']),
        ("train.precision=[fp32]", ['"train.precision"', "not one of auto, fp32"]),
        ("train.fsdp=1", ['"train.fsdp"', "true or false"]),
        ("train.packing=1", ['"train.packing"', "1 is not one of auto, on, off"]),
        ("train.packing=atuo", ['"train.packing"', "not one of auto, on, off", '"auto"?']),
        ("train.packing=[on]", ['"train.packing"', "not one of auto, on, off"]),
        ("train.report_to=[tensorbord]", ['"train.report_to.0"', '"tensorboard"?']),
        ("train.trainable.projector=yes", ['"train.trainable.projector"', "frozen, lora, full, top:N"]),
        ("train.trainable.language_model=top:0", ['"train.trainable.language_model"', "top:N (N >= 1)"]),
        ("data.augment=true", ['"data.augment"', "keys and values", "True"]),
        ("data.augment.crop=-0.1", ['"data.augment.crop"', "between 0.0 and 0.9"]),
        ("data.augment.crop=1", ['"data.augment.crop"', "between 0.0 and 0.9"]),
        ("data.augment.rotate=181", ['"data.augment.rotate"', "between 0.0 and 180"]),
        ("data.augment.color=.nan", ['"data.augment.color"', "finite"]),
        ("data.augment.color=yes", ['"data.augment.color"', "number", "True"]),
        ("data.augment.blur=.inf", ['"data.augment.blur"', "finite"]),
        ("data.augment.blur=33", ['"data.augment.blur"', "between 0.0 and 32"]),
        ("data.augment.views=0", ['"data.augment.views"', "between 1 and 1024"]),
        ("data.augment.views=1.5", ['"data.augment.views"', "whole number"]),
        ("data.augment.flip=1", ['"data.augment.flip"', "not a key", "crop, rotate, color, blur, views"]),
        ("data.augment.colour=0.1", ['did you mean "data.augment.color"?']),
        ("=1", ["expected key=value"]),
        ("seed", ['"seed"', "expected key=value"]),
        ("seed=[", ["seed=[", "not valid YAML"]),
    ],
)
def test_wrong_value_names_the_expected_one(path, override, words):
    found = message(path, override)
    assert [word for word in words if word not in found] == [], found


@pytest.mark.parametrize(
    "text, words",
    [
        ("seed: 1\nseed: 2\n", ['"seed" is given twice', "line 2"]),
        ("1: 2\n", ["the key 1 is not a word"]),
        ("off: 2\n", ["the key False is not a word"]),
        ("- 1\n", ["expected keys and values", "a list"]),
        ("", ["expected keys and values", "nothing"]),
        ("a: [1\n", ["not valid YAML", "line 2"]),
        ("a: !!python/object:os.system x\n", ["not valid YAML"]),
    ],
)
def test_file_that_is_not_a_config_is_refused(tmp_path, text, words):
    found = message(write(tmp_path, text))
    assert found.startswith(str(tmp_path / "config.yaml")) and [word for word in words if word not in found] == []


def test_unreadable_file_is_refused(tmp_path):
    assert "no such config file" in message(tmp_path / "none.yaml")
    assert str(tmp_path) in message(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # what a shell's <(command) gives
    assert "write it to a file first" in message(tmp_path / "pipe")
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # é".encode("latin-1"))
    assert "UTF-8" in message(tmp_path / "latin.yaml")


# --- contradictions

FULL = ["train.trainable.language_model=full", "train.lora_lr=null"]
TOP = ["train.trainable.language_model=top:2", "train.lora_lr=null"]


@pytest.mark.parametrize(
    "overrides, key, words",
    [
        (["train.trainable.vision_tower=lora"], "train.trainable.vision_tower", ["frozen, full, top:N"]),
        (["train.trainable.projector=top:1"], "train.trainable.projector", ["frozen, full"]),
        (["train.trainable.embeddings=lora"], "train.trainable.embeddings", ["frozen, full"]),
        (["train.trainable.projector=frozen", "train.trainable.language_model=frozen"], "train.trainable", ["nothing"]),
        (["train.lora_lr=null"], "train.lora_lr", ["missing", "language_model is lora"]),
        (["train.projector_lr=null"], "train.projector_lr", ["missing", "projector is full"]),
        (FULL, "train.language_model_lr", ["missing", "language_model is full"]),
        (TOP, "train.language_model_lr", ["missing", "language_model is top:2"]),
        (["train.trainable.embeddings=full"], "train.embeddings_lr", ["missing"]),
        (["train.trainable.vision_tower=top:1"], "train.vision_tower_lr", ["missing"]),
        (["train.language_model_lr=1e-5"], "train.language_model_lr", ["nothing would use it", "full or top:N"]),
        (["train.embeddings_lr=1e-5"], "train.embeddings_lr", ["nothing would use it"]),
        (["train.vision_tower_lr=1e-5"], "train.vision_tower_lr", ["nothing would use it"]),
        (["train.trainable.projector=frozen", "train.projector_lr=null"], "train.trainable.projector", ["start_from"]),
        (["data.validation_file=null"], "train.eval_steps", ["set train.eval_steps to null", "data.validation_file"]),
        (["data.validation_file=qa.jsonl"], "data.validation_file", ["data.qa_file", "another name"]),
        (["train.max_steps=null"], "train.num_train_epochs", ["nothing would train; set one of them"]),
        (["test.questions=[]"], "test.questions", ["at least one"]),
        (["lora.target_modules=[]"], "lora.target_modules", ["all-linear"]),
        (["data.sources.1.name=train"], "data.sources.0.name", ["two sources"]),
        (["data.sources.0.captions=one_per_epoch"], "data.sources.0.captions", ["llava", "set it to all"]),
        (["data.sources.0.prompts=[What]"], "data.sources.0.prompts", ["llava has its own questions"]),
        (
            ["data.sources.0={name: x, annotations: a, prompts: [What, ' ']}"],
            "data.sources.0.prompts.1",
            ["write text"],
        ),
        (
            ["data.sources.0={name: x, annotations: a, prompts: <image>}"],
            "data.sources.0.prompts.0",
            ["without <image>"],
        ),
        (
            ["data.validation_file=null", "train.eval_steps=null"],
            "data.sources.1.split",
            ["data.validation_file", "give it the name of a file", "set the split to train"],
        ),
        (["data.augment={}"], "data.augment", ["changes nothing", "crop, rotate, color, blur are all 0", "null"]),
        (["data.augment={crop: 0, views: 8}"], "data.augment", ["changes nothing"]),
        (
            ["data.augment.crop=0.3", "train.cache_features=on"],
            "train.cache_features",
            ["data.augment", '"data.augment.views"', "auto"],
        ),
    ],
)
def test_contradiction_names_a_key(path, overrides, key, words, monkeypatch):
    monkeypatch.chdir(path.parent)  # what paths on the command line are relative to
    found = message(path, *overrides)
    assert found.startswith(f'"{key}"') and [word for word in words if word not in found] == [], found


@pytest.mark.parametrize(
    "overrides",
    [
        [*FULL, "train.language_model_lr=1e-5", "train.trainable.embeddings=full", "train.embeddings_lr=1e-5"],
        [*TOP, "train.language_model_lr=1e-5", "train.trainable.vision_tower=top:1", "train.vision_tower_lr=1e-6"],
        ["train.trainable.projector=frozen", "train.projector_lr=null", "model.start_from=run/final"],
        ["data.sources=[]", "data.validation_file=null", "train.eval_steps=null"],
        ["data.augment.rotate=15", "data.augment.views=8", "train.cache_features=on"],
    ],
)
def test_consistent_settings_load_and_round_trip(path, overrides, tmp_path_factory):
    config = load_config(path, overrides)
    assert load_config(write(tmp_path_factory.mktemp("again"), to_yaml(config))) == config


# --- anything at all

words = st.sampled_from([key.rsplit(".", 1)[-1] for key in all_keys(Config)] + ["limit", "name", "x"]) | st.text(
    max_size=4
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
scalars |= st.sampled_from(["full", "top:2", "~x", "a/b", "auto", "2e-4", 10**400, "all"])
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(all_keys(Config)) | words, anything), max_size=4), st.text(max_size=12))
def test_any_value_gives_a_config_or_an_input_error(path, settings, garbage):
    values = copy.deepcopy(VALUES)
    for key, value in settings:
        here = values
        *section, word = key.split(".")
        for name in section:
            here = here[name] if isinstance(here.get(name), dict) else here.setdefault(name, {})
            if not isinstance(here, dict):
                break
        else:
            here[word] = value
    for text, overrides in (
        (yaml.safe_dump(values), []),
        (yaml.safe_dump(VALUES), [garbage, "seed=" + garbage]),
    ):
        try:
            assert isinstance(load_config(write(path.parent, text), overrides), Config)
        except InputError as error:
            assert str(error)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40))
@example("seed: " + "[" * 5000)
@example("seed: !!timestamp x")
@example("seed: !!map [1]")
@example("a: &a [*a]")
@example("output_dir: " + "a" * 300 + "/b")
def test_any_file_gives_a_config_or_an_input_error(path, text):
    with pytest.raises(InputError):
        load_config(write(path.parent, text.encode("utf-8", "replace").decode()))
