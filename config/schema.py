"""The configuration: one YAML file and `key=value` overrides in, frozen dataclasses out.

Every wrong key, wrong type and contradiction is reported here, before anything is loaded, as one `InputError` that names
the key. Only the scripts read the config; everything below them takes plain values. This module must not import torch.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from contradictions import (
    CAPTION_FORMATS,
    OF_ALL_STAGES,
    RATE_KEYS,
    STAGE_SECTIONS,
    drop_unused_rates,
    frozen_error,
    refuse_contradictions,
    refuse_rates_for_nobody,
    refuse_stage_contradictions,
    stage_entries,
    trained_parts,
)
from typed_yaml import (
    FolderOrHub,
    InputError,
    Switch,
    Trainable,
    apply_override,
    bounds,
    build,
    kind_of,
    merge,
    nearest,
    read_yaml,
)

# what others take from here, though it stands elsewhere
__all__ = ["CAPTION_FORMATS", "RATE_KEYS", "InputError", "frozen_error", "trained_parts"]

DEFAULT_CONFIG = Path(__file__).parent / "config.yaml"  # the one that train.sh and test.sh take
STAGES_FOLDER = "stages"  # of a run's folder, with a folder for each stage
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
class ScratchConfig:
    tokenizer: FolderOrHub
    hidden_size: int = bounds(low=8, high=2**14)
    num_hidden_layers: int = bounds(low=1, high=2**9)
    num_attention_heads: int = bounds(low=1, high=2**9)
    architecture: Literal["qwen2_moe", "qwen3_moe", "qwen2", "qwen3"] = "qwen2_moe"
    vocab_size: int | None = bounds(None, low=300, high=2**18)
    num_key_value_heads: int | None = bounds(None, low=1, high=2**9)
    intermediate_size: int | None = bounds(None, low=1, high=2**17)
    num_experts: int | None = bounds(None, low=2, high=2**10)
    num_experts_per_tok: int | None = bounds(None, low=1, high=2**10)
    moe_intermediate_size: int | None = bounds(None, low=1, high=2**17)
    shared_expert_intermediate_size: int | None = bounds(None, low=1, high=2**17)
    rope_theta: float = bounds(10_000.0, low=1.0)
    initializer_range: float = bounds(0.02, low=1e-6, high=1.0)
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class ModelConfig:
    vision_tower: FolderOrHub
    language_model: FolderOrHub | None = None
    from_scratch: ScratchConfig | None = None
    attention: Literal["causal", "mixed"] = "causal"
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
class StageConfig:
    name: str
    config: Config  # the whole of it: a stage is a run of its own, in a folder of its own


@dataclass(frozen=True)
class TrainConfig:
    trainable: TrainableConfig = TrainableConfig()
    freeze_random: tuple[Literal["projector", "language_model", "embeddings"], ...] = ()
    projector_lr: float | None = bounds(None, low=0.0)
    lora_lr: float | None = bounds(None, low=0.0)
    language_model_lr: float | None = bounds(None, low=0.0)
    embeddings_lr: float | None = bounds(None, low=0.0)
    vision_tower_lr: float | None = bounds(None, low=0.0)
    router_aux_loss_coef: float | None = bounds(None, low=0.0)
    num_train_epochs: float = bounds(1.0, low=0.0)
    steps_per_epoch: int | None = bounds(None, low=1)
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
    stages: tuple[StageConfig, ...] = ()


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
    file are relative to its folder, those in overrides to the current one. Raises InputError that names the key.

    With `train.stages`, each has a whole Config of its own: what the file says for all, with the stage's own words over
    it, with the command line over both. What is returned is the last stage's, with all of them in `train.stages`.
    """
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
    folder = path.resolve().parent
    of_stages = [word for word in overrides if word.partition("=")[0].strip().split(".")[:2] == ["train", "stages"]]
    for override in of_stages:
        apply_override(values, override)
    of_all = [word for word in overrides if word not in of_stages]
    train = values.get("train")
    if not isinstance(train, dict) or not train.get("stages"):
        for override in of_all:
            apply_override(values, override)
        config = build(Config, values, folder)
        refuse_contradictions(config)
        return config
    entries = stage_entries(train.pop("stages"))
    stages = [_stage(values, entry, i, of_all, folder) for i, entry in enumerate(entries)]
    refuse_stage_contradictions(stages)
    for override in of_all:
        apply_override(values, override)
    refuse_rates_for_nobody([key for key, rate in values["train"].items() if rate is not None], stages)
    last = stages[-1].config
    train = dataclasses.replace(last.train, stages=tuple(stages))
    return dataclasses.replace(last, output_dir=last.output_dir.parent.parent, train=train)


def _stage(values: dict, entry: dict, number: int, overrides: Sequence[str], folder: Path) -> StageConfig:
    """A stage: the file's `values` with the entry's words over them."""
    name = entry["name"]
    words = copy.deepcopy({key: value for key, value in entry.items() if key != "name"})
    merged = merge(copy.deepcopy(values), words)
    try:
        for override in overrides:
            apply_override(merged, override)
        if isinstance(merged.get("train"), dict):
            drop_unused_rates(merged["train"], words.get("train", {}), dataclasses.asdict(TrainableConfig()))
        config = build(Config, merged, folder)
        refuse_contradictions(config, random=set())  # what is random by then, the stages before decide
        return StageConfig(name, dataclasses.replace(config, output_dir=config.output_dir / STAGES_FOLDER / name))
    except InputError as error:
        raise InputError(f'stage "{name}" (train.stages.{number}): {error}') from None


def to_yaml(config: Config) -> str:
    """The config as YAML text that `load_config` reads back to an equal config (paths are absolute by then)."""

    def plain(value):
        if isinstance(value, StageConfig):
            values = plain(value.config)
            for key in ("stages", *OF_ALL_STAGES):
                values["train"].pop(key)
            return {"name": value.name, **{section: values[section] for section in STAGE_SECTIONS}}
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, (Path, str)) else value

    return yaml.safe_dump(plain(config), allow_unicode=True, sort_keys=False)


# keys that may change between the parts of a run that was interrupted: they change nothing that is learned
FREE_KEYS = (
    "output_dir test.* data.max_refused data.demo_folder data.on_bad_image model.start_from train.max_bad_steps "
    "train.freeze_random train.fsdp train.num_threads train.num_workers "
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
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key not in free
    ]
