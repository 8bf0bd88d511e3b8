"""The configuration: one YAML file and `key=value` overrides in, frozen dataclasses out.

Every wrong key, wrong type and contradiction is reported here, before anything is loaded, as one `InputError` that names
the key. Only the scripts read the config; everything below them takes plain values. This module must not import torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from typed_yaml import (
    FolderOrHub,
    InputError,
    Switch,
    Trainable,
    apply_override,
    bounds,
    build,
    kind_of,
    nearest,
    read_yaml,
)

DEFAULT_CONFIG = Path(__file__).parent / "config.yaml"  # the one that train.sh and test.sh take
CAPTION_FORMATS = ("ai_challenger", "coco_captions")  # of data.sources, with several captions a picture
IGNORE_INDEX = -100  # the label that torch's cross entropy leaves out: nothing is learned from that token


# One model.safetensors out of one pytorch_model.bin or several; a tensor that two names share is written under both.
HOW_TO_CONVERT = (
    'python -c "import glob, torch; from safetensors.torch import save_file; '
    "save_file({name: tensor.clone().contiguous() for file in glob.glob('pytorch_model*.bin') "
    "for name, tensor in torch.load(file, 'cpu', weights_only=True).items()}, 'model.safetensors', {'format': 'pt'})\""
)


def how_to_convert(path: str | Path) -> str:
    """The end of a message about the weights of `path`, a folder or a hub name, that cannot be read."""
    if Path(path).is_dir():
        return f"A pickled pytorch_model.bin is never opened; in its folder, convert it once: {HOW_TO_CONVERT}"
    folder = str(path).rpartition("/")[2]
    return (
        "A pickled pytorch_model.bin is never opened; download it, convert it once and put the folder into the config, "
        f"in the place of {path}: hf download {path} --local-dir {folder} && cd {folder} && {HOW_TO_CONVERT}"
    )


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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# What a config holds. The meaning of every key stands in config.yaml, beside the key. Upper bounds are far beyond use: a
# checkpoint's config may be a stranger's, and a number in it must not fill the memory.


@dataclass(frozen=True)
class SourceConfig:
    name: str
    annotations: Path
    format: str = "auto"
    images: Path | None = None
    limit: int | None = bounds(None, low=1)
    weight: float = bounds(1.0, low=0.0)
    captions: Literal["all", "one_per_epoch"] = "all"
    split: Literal["auto", "train", "validation"] = "auto"


@dataclass(frozen=True)
class DataConfig:
    qa_file: Path
    sources: tuple[SourceConfig, ...] = ()
    demo_folder: Path | None = None
    validation_file: Path | None = None
    validation_fraction: float = bounds(0.01, low=0.0, high=0.9)
    max_refused: float = bounds(0.01, low=0.0, high=1.0)
    verify_images: bool = True
    on_bad_image: Literal["stop", "skip"] = "stop"
    max_length: int = bounds(1024, low=8, high=2**20)
    system_prompt: str | None = "You are a helpful assistant."


@dataclass(frozen=True)
class ModelConfig:
    vision_tower: FolderOrHub
    language_model: FolderOrHub
    vision_feature_layer: int = -2
    image_size: int | None = bounds(None, low=1, high=2**11)
    projector: str = "mlp"
    projector_hidden_size: int | None = bounds(None, low=1, high=2**16)
    num_queries: int | None = bounds(None, low=1, high=2**12)
    start_from: Path | None = None


@dataclass(frozen=True)
class LoraConfig:
    r: int = bounds(16, low=1, high=2**16)
    alpha: float = bounds(32.0, low=0.0)
    dropout: float = bounds(0.0, low=0.0, high=0.99)
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
    projector_lr: float | None = bounds(None, low=0.0)
    lora_lr: float | None = bounds(None, low=0.0)
    language_model_lr: float | None = bounds(None, low=0.0)
    embeddings_lr: float | None = bounds(None, low=0.0)
    vision_tower_lr: float | None = bounds(None, low=0.0)
    num_train_epochs: float = bounds(1.0, low=0.0)
    max_steps: int | None = bounds(None, low=1)
    per_device_train_batch_size: int = bounds(4, low=1)
    gradient_accumulation_steps: int = bounds(1, low=1)
    warmup_ratio: float = bounds(0.03, low=0.0, high=1.0)
    weight_decay: float = bounds(0.0, low=0.0)
    max_grad_norm: float | None = bounds(1.0, low=0.0)
    max_bad_steps: int = bounds(3, low=1)
    fsdp: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    packing: Switch = Switch("auto")
    cache_features: Switch = Switch("auto")
    fused_lora: Switch = Switch("auto")
    compile: Switch = Switch("auto")
    activation_checkpointing: Switch = Switch("auto")
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    liger_kernels: Switch = Switch("auto")
    num_threads: int | None = bounds(None, low=1, high=2**10)
    num_workers: int = bounds(2, low=0, high=2**10)
    logging_steps: int = bounds(10, low=1)
    eval_steps: int | None = bounds(None, low=1)
    eval_samples: int | None = bounds(512, low=1)
    score_samples: int | None = bounds(None, low=1)
    save_steps: int | None = bounds(500, low=1)
    save_total_limit: int | None = bounds(2, low=1)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()


@dataclass(frozen=True)
class TestConfig:
    images: Path | None = None
    questions: tuple[str, ...] = ("Describe this image.",)
    max_new_tokens: int = bounds(128, low=1, high=2**16)
    batch_size: int = bounds(8, low=1, high=2**16)
    num_beams: int = bounds(1, low=1, high=2**10)


@dataclass(frozen=True)
class Config:
    data: DataConfig
    model: ModelConfig
    output_dir: Path
    seed: int = bounds(0, low=0, high=2**32 - 1)
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    test: TestConfig = TestConfig()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides (dotted keys, YAML values), check everything. Relative paths in the
    file are relative to its folder, those in overrides to the current one. Raises InputError that names the key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such config file; name one with --config, for example config.yaml.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {kind_of(values)}.")
    for override in overrides:
        apply_override(values, override)
    config = build(Config, values, path.resolve().parent)
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
    "output_dir test.* data.max_refused data.demo_folder data.on_bad_image model.start_from train.max_bad_steps "
    "train.fsdp train.num_threads train.num_workers "
    "train.logging_steps train.eval_steps train.eval_samples train.score_samples train.save_steps train.save_total_limit "
    "train.report_to train.packing train.cache_features train.fused_lora train.compile train.activation_checkpointing "
    "train.attn_implementation train.liger_kernels"
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
    for key, value in (("train.max_grad_norm", train.max_grad_norm), ("lora.alpha", config.lora.alpha)):
        if value == 0:
            raise InputError(
                f'"{key}" is 0, with which nothing would be learned; use a positive number'
                + (", or null for no clipping." if key == "train.max_grad_norm" else ".")
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
        if source.captions == "one_per_epoch" and source.format not in ("auto", *CAPTION_FORMATS):
            raise InputError(
                f'"{where}.captions": one_per_epoch needs several captions a picture; {source.format} has none.'
            )
        if source.split == "validation" and data.validation_file is None:
            raise InputError(f'"{where}.split" is validation, but "data.validation_file" is not set.')
