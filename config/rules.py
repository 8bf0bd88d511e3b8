"""Find contradictory settings in a config, without opening a model or a data file.

Each is an InputError that names the key, what was found and what to do.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from config.typed_yaml import InputError, Trainable, kind_of, nearest

if TYPE_CHECKING:
    from config.schema import Config, DataConfig, ScratchConfig, StageConfig

CAPTION_FORMATS = ("ai_challenger", "coco_captions")  # of data.sources, with several captions per image

# (part, kind of its word under train.trainable) -> the config key of its learning rate
RATE_KEYS = {
    ("vision_tower", "full"): "vision_tower_lr",
    ("vision_tower", "top"): "vision_tower_lr",
    ("projector", "full"): "projector_lr",
    ("language_model", "lora"): "lora_lr",
    ("language_model", "full"): "language_model_lr",
    ("language_model", "top"): "language_model_lr",
    ("embeddings", "full"): "embeddings_lr",
}

STAGE_SECTIONS = ("data", "lora", "train")  # the sections in which a stage may set keys
OF_ALL_STAGES = (
    "precision",
    "fsdp",
    "num_threads",
    "report_to",
)  # keys of `train` that stages share, because one process trains them all


def refuse_contradictions(config: Config, random: set[str] | None = None) -> None:
    """Raise InputError for the first contradiction.

    random: the parts whose weights are random before this config trains; None: derived from the config itself.
    """
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
        part, kinds = _part_at(key), _kinds_at(key)
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
                f'"{key}" is 0, so nothing would be learned; use a positive number'
                + (", or null for no clipping." if key == "train.max_grad_norm" else ".")
            )
    _refuse_language_model(config)
    if random is None:
        random = set() if config.model.start_from else random_parts(config)
    _refuse_random_and_frozen(config, random)
    if train.eval_steps is not None and config.data.validation_file is None:
        raise InputError(
            '"train.eval_steps" is set, but "data.validation_file" is not, so there is nothing to evaluate on; set '
            "train.eval_steps to null, or give data.validation_file the name of a file, beside data.qa_file."
        )
    if config.data.validation_file is not None and config.data.validation_file == config.data.qa_file:
        raise InputError(
            '"data.validation_file" is the same file as "data.qa_file"; held-out questions need their own; '
            "give it another name, or set it to null."
        )
    if train.num_train_epochs == 0 and train.max_steps is None:
        raise InputError(
            '"train.num_train_epochs" is 0 and "train.max_steps" is not set, so nothing would train; set one of them.'
        )
    if train.num_train_epochs == 0 and train.steps_per_epoch is not None:
        raise InputError('"train.steps_per_epoch" is set, but "train.num_train_epochs" is 0; say how many epochs.')
    if not config.test.questions:
        raise InputError('"test.questions" is empty; give at least one question.')
    if not config.lora.target_modules:
        raise InputError('"lora.target_modules" is empty; name modules, for example [q_proj, v_proj], or all-linear.')
    refuse_source_contradictions(config.data)
    augment = config.data.augment
    if augment is not None and not any(augment.strengths.values()):
        raise InputError(
            f'"data.augment" changes nothing: {", ".join(augment.strengths)} are all 0; set one of them, or data.augment to '
            "null."
        )
    if augment is not None and augment.views is None and train.cache_features == "on":
        raise InputError(
            '"train.cache_features" is on, but "data.augment" makes new images in each epoch; set "data.augment.views" to a '
            "number of fixed views of each image, or train.cache_features to auto."
        )


def _part_at(rate_key: str) -> str:
    return next(part for (part, _), key in RATE_KEYS.items() if key == rate_key)


def _kinds_at(rate_key: str) -> list[str]:
    return [kind for (_, kind), key in RATE_KEYS.items() if key == rate_key]


def refuse_source_contradictions(data: DataConfig) -> None:
    """Raise InputError for sources that contradict each other or the other keys of their section."""
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        where = f"data.sources.{i}"
        if names.count(source.name) > 1:
            raise InputError(f'"{where}.name": "{source.name}" is the name of two sources; names must differ.')
        if source.captions == "one_per_epoch" and source.format not in ("auto", *CAPTION_FORMATS):
            raise InputError(
                f'"{where}.captions": one_per_epoch needs several captions per image; {source.format} has none; '
                "set it to all."
            )
        if source.prompts and source.format not in ("auto", "csv", "folder", *CAPTION_FORMATS):
            raise InputError(
                f'"{where}.prompts" are questions for captions, but {source.format} has its own questions; leave them out.'
            )
        for number, prompt in enumerate(source.prompts):
            if not prompt.strip() or "<image>" in prompt:
                raise InputError(
                    f'"{where}.prompts.{number}": {prompt!r:.80} is not a question about an image; write text, without '
                    "<image>, which is put before it."
                )
        if source.split == "validation" and data.validation_file is None:
            raise InputError(
                f'"{where}.split" is validation, but "data.validation_file" is not set; give it the name of a file, beside '
                "data.qa_file, or set the split to train."
            )


# ---------------------------------------------------------------------------------------------------------------------
# The language model: released or from scratch


def _refuse_language_model(config: Config) -> None:
    model = config.model
    if model.language_model is None and model.from_scratch is None:
        raise InputError(
            '"model.language_model" is missing; give a folder or a hub name, or, in model.from_scratch, the sizes of a new '
            "one."
        )
    if model.language_model is not None and model.from_scratch is not None:
        raise InputError(
            f'"model.from_scratch" makes a new language model, but "model.language_model" is {model.language_model}; set '
            "one of the two to null."
        )
    if model.from_scratch is not None:
        _refuse_sizes(model.from_scratch)
        if config.train.router_aux_loss_coef is not None and not model.from_scratch.architecture.endswith("_moe"):
            raise InputError(
                f'"train.router_aux_loss_coef" is {config.train.router_aux_loss_coef}, but '
                f'"model.from_scratch.architecture" is {model.from_scratch.architecture}, which has no experts to balance; '
                "set it to null."
            )
    if model.attention == "mixed" and config.train.attn_implementation == "flash_attention_2":
        raise InputError(
            '"train.attn_implementation" is flash_attention_2, whose kernels compute causal attention only, and '
            '"model.attention" is mixed; set one of them to auto or causal.'
        )


def _refuse_sizes(sizes: ScratchConfig) -> None:
    where = "model.from_scratch"
    if sizes.vocab_size is not None and not os.path.isabs(sizes.tokenizer):
        raise InputError(
            f'"{where}.tokenizer" is {sizes.tokenizer}, which looks like a hub name, but "vocab_size" says to learn '
            f"it; write ./{sizes.tokenizer} for a folder, or set vocab_size to null."
        )
    has_experts = sizes.architecture.endswith("_moe")
    has_shared = sizes.architecture == "qwen2_moe"
    wanted = {
        "intermediate_size": not has_experts,
        "num_experts": has_experts,
        "num_experts_per_tok": has_experts,
        "moe_intermediate_size": has_experts,
        "shared_expert_intermediate_size": has_shared,
    }
    for key, is_wanted in wanted.items():
        value = getattr(sizes, key)
        if is_wanted and value is None:
            raise InputError(f'"{where}.{key}" is missing; {sizes.architecture} has that size.')
        if not is_wanted and value is not None:
            raise InputError(f'"{where}.{key}" is {value}, but {sizes.architecture} has no such size; set it to null.')
    if sizes.num_experts and sizes.num_experts_per_tok and sizes.num_experts_per_tok > sizes.num_experts:
        raise InputError(
            f'"{where}.num_experts_per_tok" is {sizes.num_experts_per_tok}, more than there are experts '
            f"({sizes.num_experts}); make it smaller."
        )
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads or sizes.num_attention_heads
    if sizes.hidden_size % (2 * heads):
        raise InputError(
            f'"{where}.hidden_size" is {sizes.hidden_size}, which cannot be divided into {heads} heads of an even width; '
            f"make it a multiple of {2 * heads}."
        )
    if heads % groups:
        raise InputError(f'"{where}.num_key_value_heads" is {groups}, which does not divide the {heads} heads.')


def random_parts(config: Config) -> set[str]:
    """Return the parts whose weights are random before anything has trained."""
    return {"projector"} | ({"language_model", "embeddings"} if config.model.from_scratch else set())


def trained_parts(words: Mapping[str, str]) -> set[str]:
    """Return the parts that train completely; `lora` and `top:N` leave weights unchanged. words: part -> its word."""
    return {part for part, word in words.items() if word == "full"}


def frozen_error(part: str, word: str) -> InputError:
    """Return the error for a part whose random weights would stay random."""
    rest = "" if word == "frozen" else ", which leaves some of its weights unchanged"
    return InputError(
        f'"train.trainable.{part}" is {word}{rest}, but the {part.replace("_", " ")} would be random: nothing has trained '
        f'it. Train it (full), or start from a trained one ("model.start_from"). If a random one is intended, add {part} to '
        "train.freeze_random."
    )


def _refuse_random_and_frozen(config: Config, random: set[str]) -> set[str]:
    """Return the parts of `random` that are still random after the run. Raises InputError if one would be frozen without
    train.freeze_random."""
    words = dataclasses.asdict(config.train.trainable)
    for part in config.train.freeze_random:
        if part in trained_parts(words):
            raise InputError(
                f'"train.freeze_random" names {part}, which trains: train.trainable.{part} is full; take it out of the list.'
            )
    left = random - trained_parts(words)
    if unasked := sorted(left - set(config.train.freeze_random), reverse=True):
        raise frozen_error(unasked[0], words[unasked[0]])
    return left


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def stage_entries(written: object) -> list[dict]:
    """Check the form of train.stages and return it: a list of {name, data, lora, train}."""
    if not isinstance(written, list):
        raise InputError(f'"train.stages": expected a list, found {kind_of(written)}.')
    names: list[str] = []
    for i, entry in enumerate(written):
        where = f"train.stages.{i}"
        if not isinstance(entry, dict):
            raise InputError(f'"{where}": expected keys and values, found {kind_of(entry)}.')
        for key in entry:
            if key not in ("name", *STAGE_SECTIONS):
                known = ("name", *STAGE_SECTIONS)
                raise InputError(
                    f'"{where}.{key}": a stage has name, {", ".join(STAGE_SECTIONS)}; the rest of the config is the same '
                    f"for all stages{nearest(key, known)}"
                )
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise InputError(
                f'"{where}.name": expected a name for its folder, of letters, digits, "-" and "_"; found {kind_of(name)}.'
            )
        if name.lower() in (other.lower() for other in names):
            raise InputError(f'"{where}.name": "{name}" is the name of two stages; names must differ.')
        names.append(name)
        for section in STAGE_SECTIONS:
            if section in entry and not isinstance(entry[section], dict):
                raise InputError(f'"{where}.{section}": expected keys and values, found {kind_of(entry[section])}.')
        train = entry.get("train", {})
        for key in (*OF_ALL_STAGES, "stages"):
            if key in train:
                raise InputError(f'"{where}.train.{key}" is the same for all stages; set "train.{key}" instead.')
    return written


def drop_unused_rates(train: dict, own: dict, defaults: dict[str, str]) -> None:
    """Remove from `train`, in place, the learning rates that the file sets for all stages and this stage does not use.

    Rates that the stage sets itself (`own`) stay, and are refused later if nothing uses them. defaults: part -> its word if
    the file sets none. Malformed values are left for later checks.
    """
    parts = train.get("trainable")
    words = defaults | (parts if isinstance(parts, dict) else {})
    for key in set(RATE_KEYS.values()) - own.keys():
        word = words[_part_at(key)]
        if isinstance(word, str) and Trainable(word).kind not in _kinds_at(key):
            train.pop(key, None)


def refuse_unused_learning_rates(given: Sequence[str], stages: Sequence[StageConfig]) -> None:
    """Raise InputError for a learning rate among the keys `given` for all stages that no stage uses."""
    for key in sorted(set(RATE_KEYS.values())):
        if key in given and all(getattr(stage.config.train, key) is None for stage in stages):
            raise InputError(
                f'"train.{key}" is set, but no stage uses it; set it to null, or '
                f'"train.trainable.{_part_at(key)}" of a '
                f"stage to {' or '.join(_kinds_at(key)).replace('top', 'top:N')}."
            )


def refuse_stage_contradictions(stages: Sequence[StageConfig]) -> None:
    """Raise InputError for contradictions between stages, before the first of them trains."""
    random = set() if stages[0].config.model.start_from else random_parts(stages[0].config)
    lora_of: StageConfig | None = None
    for i, stage in enumerate(stages):
        config, where = stage.config, f'stage "{stage.name}" (train.stages.{i})'
        try:
            random = _refuse_random_and_frozen(config, random)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        has_lora = config.train.trainable.language_model == "lora"
        if lora_of is not None and (not has_lora or config.lora != lora_of.config.lora):
            raise InputError(
                f'{where}: stage "{lora_of.name}" before it trains LoRA, which every later stage must keep; set '
                '"train.trainable.language_model" to lora, with the same "lora" section.'
            )
        lora_of = lora_of or (stage if has_lora else None)
        for other in stages[:i]:
            _refuse_shared_files(where, config.data, f'stage "{other.name}"', other=other.config.data)


def _refuse_shared_files(where: str, data: DataConfig, other_name: str, other: DataConfig) -> None:
    """A QA file that two stages write must have the same sources and the same use in both."""
    for key in ("qa_file", "validation_file"):
        for its_key in ("qa_file", "validation_file"):
            path = getattr(data, key)
            if path is None or path != getattr(other, its_key):
                continue
            if key == its_key and (_made_of(data) == _made_of(other) or not (data.sources or other.sources)):
                continue
            what = "makes from other data" if key == its_key else f'uses as its "data.{its_key}"'
            raise InputError(f'{where}: "data.{key}" is {path}, which {other_name} {what}; give each its own file.')


def _made_of(data: DataConfig) -> tuple:
    sources = [dataclasses.replace(source, weight=1.0) for source in data.sources]
    return sources, data.qa_file, data.validation_file, data.validation_fraction, data.verify_images
