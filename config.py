"""The configuration: one YAML file and `key=value` overrides in, frozen dataclasses out.

Every wrong key, wrong type and contradiction is reported here, before anything is loaded, as one `InputError` that names
the key. Only the scripts read the config; everything below them takes plain values. This module must not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

DEFAULT_CONFIG = Path(__file__).parent / "config.yaml"  # the one that train.sh and test.sh take
IGNORE_INDEX = -100  # the label that torch's cross entropy leaves out: nothing is learned from that token


HOW_TO_CONVERT = (  # the end of a message about weights that cannot be read
    'A pickled pytorch_model.bin is never opened; in its folder, convert it once: python -c "import torch; from '
    "safetensors.torch import save_file; save_file(torch.load('pytorch_model.bin', weights_only=True), "
    "'model.safetensors', {'format': 'pt'})\""
)


class InputError(Exception):
    """Bad input that a person can act on: what was found, where, what was expected, what to do. Scripts exit with 2."""


def nearest(name: str, options) -> str:
    """`; did you mean "x"?` for the option that is spelled most like `name`, or a full stop."""
    close = difflib.get_close_matches(str(name), [str(option) for option in options], n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else "."


def choose(table: dict, key: str, what: str):
    """The value of `key` in `table`. InputError lists the keys and the nearest one: `what` says what was being chosen."""
    if key not in table:
        raise InputError(f'{what}: "{key}" is unknown{nearest(key, table)} Known: {", ".join(sorted(table))}.')
    return table[key]


def run_script(main) -> None:
    """Run a script's `main()`; an InputError becomes one message on stderr and exit code 2, without a traceback."""
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# What a config holds. The meaning of every key stands in config.yaml, beside the key.


class FolderOrHub(str):
    """A model: a folder on this disk or the name of a repository on the hub (`openai/clip-vit-large-patch14-336`)."""


class Trainable(str):
    """What of a part trains: `frozen`, `lora`, `full` or `top:N` (the last N layers)."""

    WORDS = re.compile(r"frozen|lora|full|top:[1-9][0-9]*")

    @property
    def kind(self) -> str:
        """The word without its number: frozen, lora, full or top."""
        return self.split(":")[0]


def _bounds(default, low=None, high=None, **kwargs):
    """A field that must lie in [low, high]; either end may be open (None)."""
    return field(default=default, metadata={"low": low, "high": high}, **kwargs)


@dataclass(frozen=True)
class SourceConfig:
    name: str
    format: str
    annotations: Path
    images: Path | None = None
    limit: int | None = _bounds(None, low=1)
    weight: float = _bounds(1.0, low=0.0)
    captions: Literal["all", "one_per_epoch"] = "all"
    split: Literal["auto", "train", "validation"] = "auto"


@dataclass(frozen=True)
class DataConfig:
    qa_file: Path
    sources: tuple[SourceConfig, ...] = ()
    demo_folder: Path | None = None
    validation_file: Path | None = None
    validation_fraction: float = _bounds(0.01, low=0.0, high=0.9)
    max_refused: float = _bounds(0.01, low=0.0, high=1.0)
    max_length: int = _bounds(1024, low=8)
    system_prompt: str | None = "You are a helpful assistant."


@dataclass(frozen=True)
class ModelConfig:
    vision_tower: FolderOrHub
    language_model: FolderOrHub
    vision_feature_layer: int = -2
    image_size: int | None = _bounds(None, low=1)
    projector: str = "mlp"
    projector_hidden_size: int | None = _bounds(None, low=1)
    start_from: Path | None = None


@dataclass(frozen=True)
class LoraConfig:
    r: int = _bounds(16, low=1)
    alpha: float = _bounds(32.0, low=0.0)
    dropout: float = _bounds(0.0, low=0.0, high=0.99)
    target_modules: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True)
class TrainableConfig:
    vision_tower: Trainable = Trainable("frozen")
    projector: Trainable = Trainable("full")
    language_model: Trainable = Trainable("lora")
    embeddings: Trainable = Trainable("frozen")


@dataclass(frozen=True)
class TrainConfig:
    trainable: TrainableConfig = TrainableConfig()
    projector_lr: float | None = _bounds(None, low=0.0)
    lora_lr: float | None = _bounds(None, low=0.0)
    language_model_lr: float | None = _bounds(None, low=0.0)
    embeddings_lr: float | None = _bounds(None, low=0.0)
    vision_tower_lr: float | None = _bounds(None, low=0.0)
    num_train_epochs: float = _bounds(1.0, low=0.0)
    max_steps: int | None = _bounds(None, low=1)
    per_device_train_batch_size: int = _bounds(4, low=1)
    gradient_accumulation_steps: int = _bounds(1, low=1)
    warmup_ratio: float = _bounds(0.03, low=0.0, high=1.0)
    weight_decay: float = _bounds(0.0, low=0.0)
    max_grad_norm: float | None = _bounds(1.0, low=0.0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    activation_checkpointing: bool = False
    num_threads: int | None = _bounds(None, low=1)
    num_workers: int = _bounds(2, low=0)
    logging_steps: int = _bounds(10, low=1)
    eval_steps: int | None = _bounds(None, low=1)
    eval_samples: int | None = _bounds(512, low=1)
    score_samples: int | None = _bounds(None, low=1)
    save_steps: int | None = _bounds(500, low=1)
    save_total_limit: int | None = _bounds(2, low=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()


@dataclass(frozen=True)
class TestConfig:
    images: Path | None = None
    questions: tuple[str, ...] = ("Describe this image.",)
    max_new_tokens: int = _bounds(128, low=1)
    batch_size: int = _bounds(8, low=1)
    num_beams: int = _bounds(1, low=1)


@dataclass(frozen=True)
class Config:
    data: DataConfig
    model: ModelConfig
    output_dir: Path
    seed: int = _bounds(0, low=0, high=2**32 - 1)
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    test: TestConfig = TestConfig()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: typing.Sequence[str] = (), folder: Path | None = None) -> Config:
    """Read a YAML file, apply `key=value` overrides (dotted keys, YAML values), check everything, resolve every relative
    path against `folder` (default: the YAML file's). Raises InputError that names the key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file; name one with --config, for example config.yaml.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    values = _read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {_kind(values)}.")
    for override in overrides:
        _apply_override(values, override)
    config = _build(Config, values, "", folder or path.resolve().parent)
    _refuse_contradictions(config)
    return config


def to_yaml(config: Config) -> str:
    """The config as YAML text that `load_config` reads back to an equal config (paths are absolute by then)."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, (Path, str)) else value

    return yaml.safe_dump(plain(config), allow_unicode=True, sort_keys=False)


# keys that may change between the parts of a run that was interrupted: they change nothing that is learned
FREE_KEYS = (
    "output_dir test.* data.max_refused data.demo_folder model.start_from train.num_threads train.num_workers "
    "train.logging_steps train.eval_steps train.eval_samples train.score_samples train.save_steps train.save_total_limit "
    "train.report_to train.activation_checkpointing"
).split()


def changed_keys(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key that differs and bears on what is learned."""

    def flat(value, prefix=""):
        if not dataclasses.is_dataclass(value):
            return {prefix: value}
        parts = [flat(getattr(value, f.name), f"{prefix}.{f.name}".lstrip(".")) for f in dataclasses.fields(value)]
        return {key: value for part in parts for key, value in part.items()}

    before, after = flat(old), flat(new)
    free = [key for key in before if key in FREE_KEYS or f"{key.split('.')[0]}.*" in FREE_KEYS]
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key] and key not in free]


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice in one mapping, where YAML would let the last one win."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'"{key}" stands twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str, where: str):
    """The value that a YAML text stands for. PyYAML reads its own tags with bare conversions (month 13 of a date is a
    ValueError, `!!bool maybe` a KeyError), so more than its own error can come out of it."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f'"{override}": expected key=value, for example train.lora_lr=2e-4.')
    value = _read_yaml(text, f'"{override}"')
    target, *path = key.strip().split(".")
    here: Any = values
    for position, name in enumerate(path):
        here = _descend(here, target, key)
        target = name
        if here is None:
            raise InputError(f'"{key}": "{".".join(key.split(".")[: position + 1])}" holds no keys.')
    if isinstance(here, list):
        here[_list_index(here, target, key)] = value
    else:
        here[target] = value


def _descend(here, name: str, key: str):
    """The mapping or list under `name`, made if it is absent; None where a plain value stands."""
    if isinstance(here, list):
        child = here[_list_index(here, name, key)]
    else:
        if here.get(name) is None:
            here[name] = {}
        child = here[name]
    return child if isinstance(child, (dict, list)) else None


def _list_index(items: list, name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise InputError(f'"{key}": "{name}" is not a position in a list of {len(items)} (counted from 0).')
    return int(name)


def _build(cls, values, where: str, folder: Path):
    """A dataclass from a mapping: every key known, every value of its type, every required key there."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f'"{where}": expected keys and values, found {_kind(values)}.')
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            full = f"{where}.{key}" if where else key
            raise InputError(f'"{full}" is not a key of the config{_nearest_key(key, where, fields)}')
    built = {}
    for name, f in fields.items():
        full = f"{where}.{name}" if where else name
        if name in values:
            built[name] = _convert(hints[name], values[name], full, folder)
            _check_bounds(built[name], f, full)
        elif dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], {}, full, folder)
        elif f.default is dataclasses.MISSING:
            raise InputError(f'"{full}" is missing; it has no default, so the config must give it.')
    return cls(**built)


def _nearest_key(key: str, where: str, fields) -> str:
    """The key that was probably meant: this word in another section, else one like it here, else one like it anywhere."""
    prefix = f"{where}." if where else ""
    everywhere: dict[str, list[str]] = {}
    for full in all_keys():
        everywhere.setdefault(full.rsplit(".", 1)[-1], []).append(full)
    same = {key: everywhere[key]} if key in everywhere else {}
    for table in (same, {name: [prefix + name] for name in fields}, everywhere):
        for word in difflib.get_close_matches(key, list(table), n=1, cutoff=0.6):
            (meant,) = difflib.get_close_matches(prefix + key, table[word], n=1, cutoff=0.0)
            return f'; did you mean "{meant}"?'
    return f". Known here: {', '.join(fields)}."


def all_keys(cls=Config, prefix: str = "") -> list[str]:
    """Every dotted key of the config, in order."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        full = f"{prefix}{name}"
        keys += all_keys(hint, full + ".") if dataclasses.is_dataclass(hint) else [full]
    return keys


def _convert(hint, value, where: str, folder: Path):
    """`value` as the type `hint`. Every type that the dataclasses above use has its line here."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        (inner,) = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return None if value is None else _convert(inner, value, where, folder)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options:
            raise InputError(f'"{where}": {value!r} is not one of {", ".join(options)}{nearest(value, options)}')
        return value
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        if isinstance(value, str):  # one item may stand without brackets
            value = [value]
        if not isinstance(value, list):
            raise InputError(f'"{where}": expected a list, found {_kind(value)}.')
        return tuple(_convert(inner, item, f"{where}.{i}", folder) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, folder)
    if hint is Trainable:
        if not isinstance(value, str) or not Trainable.WORDS.fullmatch(value):
            raise InputError(f'"{where}": {value!r} is not one of frozen, lora, full, top:N (N >= 1).')
        return Trainable(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise InputError(f'"{where}": expected true or false, found {_kind(value)}.')
        return value
    if hint in (int, float):
        return _number(hint, value, where)
    if not isinstance(value, str) or not value and hint is not str:
        raise InputError(f'"{where}": expected {"text" if hint is str else "a path"}, found {_kind(value)}.')
    if hint is Path:
        return _absolute(value, where, folder)
    if hint is FolderOrHub:
        return FolderOrHub(_folder_or_hub(value, where, folder))
    return value


def _number(kind: type, value, where: str):
    if isinstance(value, str):  # YAML 1.1 reads 2e-4 (no dot) as text
        try:
            value = float(value)
        except ValueError:
            raise InputError(f'"{where}": expected a number, found the text {value!r}.') from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f'"{where}": expected a number, found {_kind(value)}.')
    if not abs(value) < 1e300:  # nan, inf, and whole numbers that no float can hold
        raise InputError(f'"{where}": expected a finite number, found {value}.')
    if kind is int and value != int(value):
        raise InputError(f'"{where}": expected a whole number, found {value}.')
    return kind(value)


def _check_bounds(value, f, where: str) -> None:
    low, high = f.metadata.get("low"), f.metadata.get("high")
    if value is None or (low is None and high is None):
        return
    if (low is not None and value < low) or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f'"{where}": {value} is out of range; it must be {allowed}.')


def _absolute(value: str, where: str, folder: Path) -> Path:
    try:
        return (folder / Path(value).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL; the ~ of nobody; links that go in a circle
        raise InputError(f'"{where}": {value!r} cannot be a path ({error}).') from None


def _folder_or_hub(value: str, where: str, folder: Path) -> str:
    """An existing folder (against the YAML's folder) as an absolute path; `owner/name` that is no folder stays a hub
    name; anything else is meant as a path, and is made absolute so that the loader's message shows where it looked."""
    path = _absolute(value, where, folder)
    is_hub_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value) is not None
    return value if is_hub_name and not os.path.exists(path) else str(path)


def _kind(value) -> str:
    names = {
        dict: "keys and values",
        list: "a list",
        type(None): "nothing",
        bool: f"{value}",
        str: f"the text {value!r}",
    }
    return names.get(type(value), f"{value!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions that can be seen without opening a model or a data file

# (a part, what of it trains: its word up to the colon) -> the key of the learning rate that it trains at
RATE_KEYS = {
    ("vision_tower", "full"): "vision_tower_lr",
    ("vision_tower", "top"): "vision_tower_lr",
    ("projector", "full"): "projector_lr",
    ("language_model", "lora"): "lora_lr",
    ("language_model", "full"): "language_model_lr",
    ("language_model", "top"): "language_model_lr",
    ("embeddings", "full"): "embeddings_lr",
}


def _refuse_contradictions(config: Config) -> None:
    train, parts = config.train, config.train.trainable
    allowed = {f.name: ["frozen"] for f in dataclasses.fields(parts)}
    for part, kind in RATE_KEYS:
        allowed[part].append(kind)
    for part, kinds in allowed.items():
        word = getattr(parts, part)
        if word.kind not in kinds:
            listed = ", ".join(kinds).replace("top", "top:N")
            raise InputError(f'"train.trainable.{part}": "{word}" does not apply to this part; it can be {listed}.')
    if all(getattr(parts, part) == "frozen" for part in allowed):
        raise InputError('"train.trainable": every part is frozen, so nothing would train; set projector to full.')
    for key in sorted(set(RATE_KEYS.values())):
        (part, *_), kinds = next(pair for pair in RATE_KEYS if RATE_KEYS[pair] == key), _kinds_at(key)
        rate, word = getattr(train, key), getattr(parts, part)
        if word.kind in kinds and rate is None:
            raise InputError(
                f'"train.{key}" is missing, but train.trainable.{part} is {word}; give it a learning rate.'
            )
        if word.kind not in kinds and rate is not None:
            raise InputError(
                f'"train.{key}" is {rate}, but train.trainable.{part} is {word}, so nothing would use it; set '
                f"train.{key} to null, or train.trainable.{part} to {' or '.join(kinds).replace('top', 'top:N')}."
            )
    if parts.projector == "frozen" and config.model.start_from is None:
        raise InputError(
            '"train.trainable.projector" is frozen, but the projector would be random; '
            'train it (full), or give a trained one with "model.start_from".'
        )
    if train.eval_steps is not None and config.data.validation_file is None:
        raise InputError(
            '"train.eval_steps" is set, but "data.validation_file" is not, so there is nothing to evaluate on.'
        )
    if config.data.validation_file is not None and config.data.validation_file == config.data.qa_file:
        raise InputError(
            '"data.validation_file" is the same file as "data.qa_file"; held-out questions need their own.'
        )
    if train.num_train_epochs == 0 and train.max_steps is None:
        raise InputError('"train.num_train_epochs" is 0 and "train.max_steps" is not set, so nothing would train.')
    if not config.test.questions:
        raise InputError('"test.questions" is empty; give at least one question.')
    if not config.lora.target_modules:
        raise InputError('"lora.target_modules" is empty; name modules, for example [q_proj, v_proj], or all-linear.')
    _refuse_source_contradictions(config.data)


def _kinds_at(rate_key: str) -> list[str]:
    return [kind for (_, kind), key in RATE_KEYS.items() if key == rate_key]


def _refuse_source_contradictions(data: DataConfig) -> None:
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        where = f"data.sources.{i}"
        if names.count(source.name) > 1:
            raise InputError(f'"{where}.name": "{source.name}" names two sources; names must differ.')
        if source.captions == "one_per_epoch" and source.format != "ai_challenger":
            raise InputError(
                f'"{where}.captions": one_per_epoch needs several captions an image; {source.format} has none.'
            )
        if source.split == "validation" and data.validation_file is None:
            raise InputError(f'"{where}.split" is validation, but "data.validation_file" is not set.')
