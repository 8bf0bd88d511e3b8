"""Load a config: keys, paths, overrides, stages, and writing it back. Run: sh tests/run.sh tests/config/test_load.py"""

import dataclasses
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from config import (
    DEFAULT_CONFIG,
    Config,
    InputError,
    LoraConfig,
    ModelConfig,
    ScratchConfig,
    SourceConfig,
    changed_keys,
    choose,
    load_config,
    printable,
    run_script,
    shortened,
    to_yaml,
)
from config.load import FREE_KEYS, START_KEYS
from config.typed_yaml import Switch, all_keys

ROOT = DEFAULT_CONFIG.parent
SOURCE = {"format": "llava", "images": "images"}
VALUES = {
    "seed": 1,
    "output_dir": "run",
    "data": {
        "sources": [
            {"name": "train", "annotations": "train.json", "split": "train", **SOURCE},
            {"name": "held", "annotations": "validation.json", "split": "validation", **SOURCE},
        ],
        "qa_file": "qa.jsonl",
        "validation_file": "validation.jsonl",
    },
    "model": {"vision_tower": "tower", "language_model": "lm"},
    "lora": {"r": 4},
    "train": {"projector_lr": 1e-3, "lora_lr": 5e-4, "num_train_epochs": 0, "max_steps": 6, "eval_steps": 3},
    "test": {"questions": ["What is it?"]},
}
RECIPES = [DEFAULT_CONFIG, *sorted((ROOT / "recipes").glob("*.yaml"))]


@pytest.fixture
def path(tmp_path):
    """The path of a config.yaml with VALUES."""
    return write(tmp_path, VALUES)


def write(folder, values) -> Path:
    path = folder / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


# --- the file a user edits


def leaves(node: yaml.Node, prefix: str = "") -> dict[str, int]:
    """Return dotted key -> its line, from 0."""
    found = {}
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            found |= leaves(value, f"{prefix}{key.value}.")
        else:
            found[prefix + key.value] = key.start_mark.line
    return found


def test_config_yaml_and_the_dataclasses_have_the_same_keys_and_each_is_explained():
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    lines, keys = text.split("\n"), leaves(yaml.compose(text))
    assert set(keys) == set(all_keys(Config))
    silent = [key for key, i in keys.items() if " # " not in lines[i] and not lines[i - 1].lstrip().startswith("#")]
    assert silent == []


def test_config_yaml_explains_every_key_of_a_model_from_scratch():
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    block = text[text.index("  # A new language model") : text.index("  from_scratch: null")]
    explained = {word for line in block.split("\n") if line.startswith("  #   ") for word in re.findall(r"\w+", line)}
    assert {field.name for field in dataclasses.fields(ScratchConfig)} <= explained


def test_config_yaml_explains_every_key_of_a_source_and_no_other():
    lines = DEFAULT_CONFIG.read_text(encoding="utf-8").split("\n")
    block = lines[lines.index("data:") + 1 : lines.index("  sources:")]
    explained = [line.split()[1] for line in block if line.startswith("  #   ")]
    assert explained == [field.name for field in dataclasses.fields(SourceConfig)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_round_trips(recipe, tmp_path):
    config = load_config(recipe)
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_config_does_not_depend_on_the_working_folder(path, monkeypatch, tmp_path_factory):
    config = load_config(path)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_config(path) == config
    monkeypatch.chdir(path.parent)
    assert load_config(path.name) == config


# --- what may be written


@pytest.mark.parametrize(
    "override, key, expected",
    [
        ("train.lora_lr=2e-4", "train.lora_lr", 2e-4),  # text to YAML 1.1, which wants a dot
        ("train.lora_lr=2.0e-4", "train.lora_lr", 2e-4),
        ("lora.alpha=8", "lora.alpha", 8.0),
        ("train.max_steps=2e2", "train.max_steps", 200),
        ("seed=7", "seed", 7),
        ("train.eval_steps=null", "train.eval_steps", None),
        ("train.eval_steps=", "train.eval_steps", None),
        ("data.system_prompt='a = b: c'", "data.system_prompt", "a = b: c"),
        ("train.fsdp=true", "train.fsdp", True),
        ("train.packing=on", "train.packing", Switch("on")),  # true to YAML 1.1
        ("train.packing=false", "train.packing", Switch("off")),
        ("train.packing='off'", "train.packing", Switch("off")),
        ("train.packing=auto", "train.packing", Switch("auto")),
        ("train.trainable.language_model=top:3", "train.trainable.language_model", "top:3"),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ("q_proj", "v_proj")),
        ("lora.target_modules=q_proj", "lora.target_modules", ("q_proj",)),
        ('test.questions=["Who?", 谁？]', "test.questions", ("Who?", "谁？")),
        ("test.questions.0=Who?", "test.questions", ("Who?",)),
        ("train.report_to=[]", "train.report_to", ()),
    ],
)
def test_override_is_a_yaml_value(path, override, key, expected):
    rates = ["train.lora_lr=null", "train.language_model_lr=1e-5"] if "top:" in override else []
    value = load_config(path, [override, *rates])
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected and isinstance(value, type(expected))


def test_override_reaches_into_a_list_and_the_last_one_wins(path):
    config = load_config(path, ["data.sources.0.limit=5", "data.sources.1.limit=6", "data.sources.1.limit=7"])
    assert [source.limit for source in config.data.sources] == [5, 7]


def test_byte_order_mark_is_not_part_of_the_first_key(path):
    expected = load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path) == expected


def test_paths_are_relative_to_the_file_and_hub_names_are_kept(path, tmp_path):
    (tmp_path / "local" / "tower").mkdir(parents=True)
    values = yaml.safe_load(path.read_text())
    values["model"] = {"vision_tower": "local/tower", "language_model": "Qwen/Qwen2.5-0.5B-Instruct"}
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    assert config.output_dir == tmp_path / "run"
    assert config.data.sources[0].annotations == tmp_path / "train.json"
    assert config.model.vision_tower == str(tmp_path / "local" / "tower")
    assert config.model.language_model == "Qwen/Qwen2.5-0.5B-Instruct"


def test_paths_on_the_command_line_are_relative_to_the_current_folder(path, tmp_path, monkeypatch):
    """As a shell completes them, wherever the config is."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "local" / "tower").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    source = "{name: a, format: llava, annotations: a.json, images: pictures}"
    config = load_config(path, ["model.vision_tower=local/tower", "output_dir=run", f"data.sources=[{source}]"])
    assert config.model.vision_tower == str(elsewhere / "local" / "tower") and config.output_dir == elsewhere / "run"
    assert config.data.sources[0].images == elsewhere / "pictures"
    assert config.data.qa_file.parent == tmp_path
    # what can be no hub name is meant as a folder: the loader's message will then say where it looked
    assert load_config(path, ["model.language_model=../no/such"]).model.language_model == str(tmp_path / "no" / "such")
    too_long = "a" * 300 + "/b"  # for a folder's name; what the hub says to it is the hub's matter
    assert load_config(path, [f"model.language_model={too_long}"]).model.language_model == too_long
    assert load_config(path, ["output_dir=~/run"]).output_dir == Path("~/run").expanduser()
    assert load_config(path, ["data.system_prompt=hello"]) == load_config(path, ["data.system_prompt='hello'"])


# --- what may change between the parts of a run


def test_changed_keys_lists_only_what_changes_learning(path):
    old = load_config(path)
    assert changed_keys(old, old) == {}
    new = load_config(
        path, ["lora.r=8", "train.projector_lr=2e-3", "test.batch_size=1", "output_dir=b", "train.save_steps=7"]
    )
    assert changed_keys(old, new) == {
        "lora.r": "lora.r: 4 -> 8",
        "train.projector_lr": "train.projector_lr: 0.001 -> 0.002",
    }
    name = old.data.sources[0].name
    heavier = changed_keys(old, load_config(path, ["data.sources.0.weight=2"]))
    assert list(heavier.values()) == [f"data.sources.{name}.weight: 1.0 -> 2.0"]
    assert list(changed_keys(old, load_config(path, ["data.sources=[]"])).values()) == [
        f"data.sources: {', '.join(source.name for source in old.data.sources)} -> none"
    ]


def test_a_resumed_run_keeps_its_augmentation_and_an_old_run_had_none(path):
    plain, augmented = load_config(path), load_config(path, ["data.augment={crop: 0.3, views: 8}"])
    assert plain.data.augment is None
    more = load_config(path, ["data.augment={crop: 0.5, views: 8}"])
    assert list(changed_keys(augmented, more).values()) == ["data.augment.crop: 0.3 -> 0.5"]
    assert {"data.augment.crop: None -> 0.3", "data.augment.views: None -> 8"} <= {
        *changed_keys(plain, augmented).values()
    }
    assert changed_keys(augmented, plain) and not changed_keys(augmented, augmented)
    old = yaml.safe_load(to_yaml(plain))
    del old["data"]["augment"]
    assert changed_keys(load_config(write(path.parent, old)), plain) == {}


def test_micro_batch_and_accumulation_are_free_if_a_step_keeps_its_samples(path):
    def changed(size: int, accumulation: int) -> list[str]:
        train = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        new = load_config(path, [f"train.{key}={value}" for key, value in train.items()])
        return list(changed_keys(load_config(path), new).values())

    old = load_config(path).train
    samples = old.per_device_train_batch_size * old.gradient_accumulation_steps
    assert changed(samples, 1) == changed(1, samples) == []
    assert changed(samples, 2)[-1].startswith("train.gradient_accumulation_steps: ")


def test_every_key_of_a_model_says_whether_a_run_may_start_from_another_value():
    """A new key of `model` or `lora` needs a word in START_KEYS."""
    keys = {f"model.{f.name}" for f in dataclasses.fields(ModelConfig)} - {"model.from_scratch"}
    keys |= {f"model.from_scratch.{f.name}" for f in dataclasses.fields(ScratchConfig)}
    assert set(START_KEYS) == keys | {f"lora.{f.name}" for f in dataclasses.fields(LoraConfig)}
    assert set(START_KEYS.values()) == {"refused", "said", "digest", "adapter", "free"}


def test_free_keys_are_config_keys():
    sections = [field.name + ".*" for field in dataclasses.fields(Config)]
    assert set(FREE_KEYS) <= {*all_keys(Config), *sections}


# --- as the user sees it


def test_unknown_choice_lists_the_known_ones():
    assert choose({"mlp": 1, "linear": 2}, "mlp", "model.projector") == 1
    with pytest.raises(InputError, match='model.projector: "mpl" is unknown; did you mean "mlp".* Known: linear, mlp'):
        choose({"mlp": 1, "linear": 2}, "mpl", "model.projector")


def test_run_script_exits_with_2_and_one_message_on_bad_input(capsys):
    def fail():
        raise InputError("seed: no.")

    with pytest.raises(SystemExit) as ended:
        run_script(fail)
    assert ended.value.code == 2 and capsys.readouterr() == ("", "error: seed: no.\n")
    for code in (0, 3):
        with pytest.raises(SystemExit) as ended:
            run_script(lambda code=code: code)
        assert ended.value.code == code


@given(st.text() | st.text("\x00\t\n\r\x1b\x7f\x9b\u2028\u202e\u2066\ud800aß图😀", max_size=9))
def test_printable_text_has_no_control_characters_and_is_otherwise_unchanged(text):
    for lines in (False, True):
        shown = printable(text, lines=lines)
        shown.encode()
        assert not [one for one in shown if unicodedata.category(one) == "Cc" and not (lines and one in "\n\t")]
        assert not {unicodedata.bidirectional(one) for one in shown} & {"LRO", "RLO", "LRE", "RLE", "RLI", "LRI"}
        assert shown == text or "\\" in shown
        assert printable(shown, lines=lines) == shown


def test_a_message_cannot_command_the_terminal(capsys):
    def fail():
        raise InputError("a\n\x1b]52;c;cm0gLXJm\x07.png: gone\udc80")

    with pytest.raises(SystemExit):
        run_script(fail)
    assert capsys.readouterr().err == "error: a\n\\x1b]52;c;cm0gLXJm\\x07.png: gone\\udc80\n"


@pytest.mark.parametrize("length", [199, 200, 201, 100_000])
def test_a_long_text_is_shortened(length):
    text = shortened("b" + "x" * (length - 2) + "e")
    assert len(text) < 240 and text[0] == "b" and text[-1] == "e"
    assert len(text) == length or f"{length:,} characters" in text


def test_a_closed_pipe_ends_a_script_without_traceback():
    code = "from config import run_script; run_script(lambda: print('line\\n' * 100_000))"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first.stdout.readline()
    first.stdout.close()
    assert first.stderr.read() == b"" and first.wait() == 141


def test_script_prints_one_error_without_traceback(path):
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(path), "train.lora_rl=1e-3"]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=path.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr and 'did you mean "train.lora_lr"?' in ran.stderr.splitlines()[-1]
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.yaml"]
