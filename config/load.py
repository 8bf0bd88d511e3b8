"""Read a config: YAML file and overrides -> Config, and back to YAML; compare two configs."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from config.errors import InputError, nearest, nearest_path, shortened
from config.files import open_regular
from config.rules import (
    OF_ALL_STAGES,
    STAGE_SECTIONS,
    drop_unused_rates,
    refuse_contradictions,
    refuse_stage_contradictions,
    refuse_unused_learning_rates,
    stage_entries,
)
from config.schema import STAGES_FOLDER, Config, SourceConfig, StageConfig, TrainableConfig
from config.typed_yaml import FolderOrHub, apply_override, build, kind_of, merge, nearest_key, read_yaml

DEFAULT_CONFIG = Path(__file__).parent.parent / "config.yaml"  # what train.sh and test.sh read


def load_config(path: str | Path, overrides: Sequence[str] = (), folder: Path | None = None) -> Config:
    """Read a YAML file, apply `key=value` overrides (dotted keys, YAML values), and check everything.

    Paths in the file are relative to `folder` (None: the file's own), those in overrides to the current folder. Raises
    InputError that names the key.

    With `train.stages`, each stage has a complete Config: the file's values, replaced by the stage's own, replaced by the
    command line's. The result is the last stage's config, with all stages in `train.stages`.
    """
    path = Path(path)
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        hint = nearest_path(path)
        advice = "Name one with --config, for example config.yaml; the path is relative to the current folder."
        raise InputError(f"{path}: no such config file{hint} {advice}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; expected a YAML file, for example config.yaml.") from None
    except InputError as error:  # a FIFO, as a shell's <(command) gives
        raise InputError(f"{error} To use the output of a command, write it to a file first.") from None
    except UnicodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8 in your editor.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {kind_of(values)}.")
    folder = folder or path.resolve().parent
    for_stages = [word for word in overrides if word.partition("=")[0].strip().split(".")[:2] == ["train", "stages"]]
    for override in for_stages:
        apply_override(values, override)
    for_all = [word for word in overrides if word not in for_stages]
    train = values.get("train")
    if not isinstance(train, dict) or not train.get("stages"):
        for override in for_all:
            apply_override(values, override)
        config = build(Config, values, folder)
        refuse_contradictions(config)
        return config
    entries = stage_entries(train.pop("stages"))
    stages = [_stage(values, entry, i, overrides=for_all, folder=folder) for i, entry in enumerate(entries)]
    refuse_stage_contradictions(stages)
    for override in for_all:
        apply_override(values, override)
    refuse_unused_learning_rates([key for key, rate in values["train"].items() if rate is not None], stages)
    last = stages[-1].config
    return dataclasses.replace(
        last,
        output_dir=last.output_dir.parent.parent,
        train=dataclasses.replace(last.train, stages=tuple(stages)),
    )


def _stage(values: dict, entry: dict, number: int, overrides: Sequence[str], folder: Path) -> StageConfig:
    """Return a stage: the file's `values`, replaced by those of its entry under train.stages."""
    name = entry["name"]
    own = copy.deepcopy({key: value for key, value in entry.items() if key != "name"})
    merged = merge(copy.deepcopy(values), own)
    try:
        for override in overrides:
            apply_override(merged, override)
        if isinstance(merged.get("train"), dict):
            drop_unused_rates(merged["train"], own.get("train", {}), dataclasses.asdict(TrainableConfig()))
        config = build(Config, merged, folder)
        refuse_contradictions(config, random=set())  # the stages before decide what is still random
        return StageConfig(name, dataclasses.replace(config, output_dir=config.output_dir / STAGES_FOLDER / name))
    except InputError as error:
        raise InputError(f'stage "{name}" (train.stages.{number}): {error}') from None


def to_yaml(config: Config, relative_to: Path | None = None) -> str:
    """Return the config as YAML text, which `load_config` reads back to an equal config.

    relative_to: the folder of the file, to which its paths are relative; None: they are absolute.
    """

    def place(path: str) -> str:
        if relative_to is None:
            return path
        relative = os.path.relpath(path, relative_to.resolve())
        return relative if relative.startswith("..") else f"./{relative}"  # "a/b" could be a hub name

    def plain(value: Any) -> Any:
        if isinstance(value, StageConfig):
            values = plain(value.config)
            for key in ("stages", *OF_ALL_STAGES):
                values["train"].pop(key)
            return {"name": value.name, **{section: values[section] for section in STAGE_SECTIONS}}
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, Path) or (isinstance(value, FolderOrHub) and os.path.isabs(value)):
            return place(str(value))
        return str(value) if isinstance(value, str) else value

    return yaml.safe_dump(plain(config), allow_unicode=True, sort_keys=False)


def refuse_options(words: Sequence[str], known: Collection[str] = ()) -> None:
    """Raise InputError for words of a command line that look like options and are none, such as --lora_lr=1e-4.

    known: names of the command's options, such as no_image, one of which may be meant.
    """
    options = [f"--{name.replace('_', '-')}" for name in known]
    for word in words:
        name, _, value = word.lstrip("-").partition("=")
        hint = nearest(f"--{name}", options, cutoff=0.75)
        if hint == "." and (key := nearest_key(name.replace("-", "_"), Config)):
            hint = f'; did you mean "{key}={value or "VALUE"}"?'
        raise InputError(f'"{word}": no such option{hint} A key of the config is given as key=value, without dashes.')


# keys that may change when an interrupted run resumes: they do not change what is learned
FREE_KEYS = (
    "output_dir test.* data.max_refused data.demo_folder data.on_bad_image model.start_from train.max_bad_steps "
    "train.freeze_random train.projector_start train.fsdp train.num_threads train.num_workers "
    "train.logging_steps train.eval_steps train.eval_samples train.score_samples train.save_steps train.save_total_limit "
    "train.report_to train.packing train.cache_features train.fused_lora train.compile train.activation_checkpointing "
    "train.attn_implementation train.liger_kernels"
).split()


# what may differ between a run and the checkpoint that it starts from (model.start_from), for every key that decides what
# trained weights compute:
#   refused   the trained weights would compute something else
#   said      changed on purpose now and then; one line says so
#   digest    a folder or hub name: its files are compared, not its name (training/provenance.py)
#   adapter   compared with adapter_config.json, if the checkpoint has LoRA (model/checkpoint.py)
#   free      not used by the new run, or not a part of what the model computes
START_KEYS = {
    "model.vision_tower": "digest",
    "model.language_model": "digest",
    "model.from_scratch.tokenizer": "free",  # the checkpoint's own is used
    "model.from_scratch.vocab_size": "free",
    "model.from_scratch.initializer_range": "free",
    "model.from_scratch.architecture": "refused",
    "model.from_scratch.hidden_size": "refused",
    "model.from_scratch.num_hidden_layers": "refused",
    "model.from_scratch.num_attention_heads": "refused",
    "model.from_scratch.num_key_value_heads": "refused",
    "model.from_scratch.intermediate_size": "refused",
    "model.from_scratch.num_experts": "refused",
    "model.from_scratch.num_experts_per_tok": "refused",
    "model.from_scratch.moe_intermediate_size": "refused",
    "model.from_scratch.shared_expert_intermediate_size": "refused",
    "model.from_scratch.rope_theta": "refused",
    "model.from_scratch.tie_word_embeddings": "refused",
    "model.attention": "said",  # released models are causal, and mixed attention is trained on top of them
    "model.vision_feature_layer": "refused",
    "model.vision_features": "refused",
    "model.image_size": "said",  # DINO's positions extend to larger images, which are often used in a last stage
    "model.projector": "refused",
    "model.projector_hidden_size": "refused",
    "model.pixel_shuffle_factor": "refused",
    "model.num_queries": "refused",
    "model.start_from": "free",
    "lora.r": "adapter",
    "lora.alpha": "adapter",
    "lora.target_modules": "adapter",
    "lora.dropout": "free",
}


# keys that a run which is extended (train.py --extend) may change: its length and its data
EXTENDABLE_KEYS = (
    "train.num_train_epochs train.max_steps train.steps_per_epoch "
    "data.qa_file data.validation_file data.validation_fraction data.sources"
).split()


def is_extendable(key: str) -> bool:
    """Return whether a run that is extended may change this key."""
    return key in EXTENDABLE_KEYS or key.startswith("data.sources.")


def changed_keys(old: Config, new: Config, equal: Collection[str] = ()) -> dict[str, str]:
    """Return key -> `key: old -> new` for every key that differs and changes what is learned.

    A micro-batch and the accumulation may change together: their product is the number of samples in a step, which decides
    the order of samples and the number of steps. A path may change if the old one does not exist any more and the new one
    is at the same place as seen from a folder that was moved. equal: keys of paths whose contents are known to be equal.
    """
    free = {key for key in _flat(old) if key in FREE_KEYS or f"{key.split('.')[0]}.*" in FREE_KEYS}
    if _samples_per_step(old) == _samples_per_step(new):
        free |= {"train.per_device_train_batch_size", "train.gradient_accumulation_steps"}
    before, after = _flat(old), _flat(new)
    return {
        key: text
        for key, text in _differences(old, new).items()
        if key not in free
        and not (key in equal and None not in (before.get(key), after.get(key)))
        and not is_moved(before.get(key), after.get(key), old.output_dir)
    }


def moved_parts(path: str | Path, output_dir: Path) -> str:
    """Return the part of a path that stays when the folder that holds it and the run is moved: `path` relative to
    `output_dir`, without the leading "..". Empty if the path is above the run."""
    parts = Path(os.path.relpath(path, output_dir)).parts
    return "/".join(part for part in parts if part != "..")


def is_moved(before: object, after: object, output_dir: Path) -> bool:
    """Return whether `after` is the place of `before`, a path of a run in `output_dir`, after both have been moved."""
    paths = (Path, FolderOrHub)
    if not isinstance(before, paths) or not isinstance(after, paths) or not os.path.isabs(before):
        return False
    kept = moved_parts(before, output_dir)
    return bool(kept) and not os.path.exists(before) and str(after).endswith(f"/{kept}")


def _samples_per_step(config: Config) -> int:
    """Return how many samples an optimizer step learns from, on all processes together."""
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps


def start_differences(old: Config, new: Config, verdict: str) -> list[str]:
    """Return `key: old -> new` for every key with that verdict in START_KEYS that differs between a checkpoint's config and
    that of a run which starts from it."""
    return [text for key, text in _differences(old, new).items() if START_KEYS.get(key) == verdict]


def _differences(old: Config, new: Config) -> dict[str, str]:
    before, after = _flat(old), _flat(new)
    lone = {source.name for source in old.data.sources} ^ {source.name for source in new.data.sources}
    prefixes = tuple(f"data.sources.{name}." for name in lone)  # "data.sources" lists their names
    return {
        key: f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}"
        for key in {**before, **after}
        if before.get(key) != after.get(key) and not key.startswith(prefixes)
    }


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
    return shortened(text)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value of a config or a section. The key of a source has its name."""
    if isinstance(value, tuple) and value and all(isinstance(item, SourceConfig) for item in value):
        found: dict[str, Any] = {prefix: tuple(source.name for source in value)}
        for source in value:
            found |= _flat(source, f"{prefix}.{source.name}")
        return found
    if not dataclasses.is_dataclass(value):
        return {prefix: value}
    parts = [_flat(getattr(value, f.name), f"{prefix}.{f.name}".lstrip(".")) for f in dataclasses.fields(value)]
    return {key: value for part in parts for key, value in part.items()}
