"""Choose what trains and at which rate, and record where every weight comes from: the words of `train.trainable` ->
requires_grad, optimizer groups, a printed table.

Everything is frozen first and then enabled by name, so nothing trains by accident. Every trainable parameter is in exactly
one optimizer group, which is asserted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import peft
import torch
from peft import get_peft_model
from torch import nn

from config import RATE_KEYS, InputError, LoraConfig, TrainableConfig, TrainConfig, trained_parts
from model.model import VisionLanguageModel


@dataclass(frozen=True)
class WeightOrigins:
    """Which weights are random, released or trained. The builder returns it; it decides what a checkpoint stores.

    random: the parts (projector, language_model, embeddings) whose weights nothing has trained yet.
    trained: part (language_model, vision_tower) -> names of its parameters that differ from the released ones, without
    LoRA's. A language model from scratch has no released weights, so all of its names are listed.
    from_scratch: whether the language model began with random weights.

    Every other weight of the encoder and the language model is the released one, and no checkpoint stores it.
    """

    random: frozenset[str]
    trained: Mapping[str, frozenset[str]]
    from_scratch: bool = False

    @classmethod
    def new(cls, model: VisionLanguageModel, from_scratch: bool) -> WeightOrigins:
        """Return the origins of a model that was just put together: released parts and a random projector; from scratch,
        a random language model too."""
        random = {"projector", "language_model", "embeddings"} if from_scratch else {"projector"}
        trained = frozenset(parameters_without_lora(model.causal_lm)) if from_scratch else frozenset[str]()
        return cls(frozenset(random), {"language_model": trained, "vision_tower": frozenset()}, from_scratch)

    def after_training(self, model: VisionLanguageModel, trainable: TrainableConfig) -> WeightOrigins:
        """The origins once a run has trained what `set_trainable(model, trainable)` enabled."""
        trained = {
            name: self.trained[name] | {n for n, p in parameters_without_lora(part).items() if p.requires_grad}
            for name, part in saved_parts(model).items()
        }
        return replace(self, random=self.random - trained_parts(vars(trainable)), trained=trained)


def saved_parts(model: VisionLanguageModel) -> dict[str, nn.Module]:
    """Return the parts of which a checkpoint saves what differs from the released weights."""
    return {"language_model": model.causal_lm, "vision_tower": model.vision_tower}


def parameters_without_lora(part: nn.Module) -> dict[str, nn.Parameter]:
    """Return a part's parameters by the names that they have without LoRA."""
    return {name.replace(".base_layer.", "."): p for name, p in part.named_parameters() if "lora_" not in name}


def add_lora(model: VisionLanguageModel, lora: LoraConfig, target_modules: Sequence[str]) -> None:
    """Wrap the language model, and nothing else, with LoRA.

    target_modules: its linear layers by this library's names; `qwen.lora_target_modules` translates Qwen v1's names.
    """
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT calls a deprecated function of transformers
        warnings.simplefilter("ignore", FutureWarning)
        model.language_model = get_peft_model(model.language_model, settings)


def set_trainable(model: VisionLanguageModel, trainable: TrainableConfig) -> None:
    """Freeze everything, then enable what `trainable` names; what trains becomes float32.

    `lora` needs `add_lora` first. `language_model: full` means its layers, its final norm and an untied head. Its input
    embeddings, and a head tied to them, are the part `embeddings`. Raises InputError if a part has fewer layers than
    its top:N.
    """
    model.requires_grad_(False)
    if trainable.vision_tower.kind != "frozen":
        model.vision_tower.unfreeze(trainable.vision_tower.top)
    model.projector.requires_grad_(trainable.projector.kind == "full")
    lm, embedding = model.causal_lm, model.causal_lm.get_input_embeddings()
    if trainable.language_model.kind == "lora":
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif trainable.language_model.kind == "full":
        lm.requires_grad_(True)
    elif trainable.language_model.top is not None:
        layers, count = lm.model.layers, trainable.language_model.top
        if count > len(layers):
            raise InputError(
                f'"train.trainable.language_model" is top:{count}, but it has {len(layers)} layers; '
                f"use top:{len(layers)} or less."
            )
        layers[-count:].requires_grad_(True)
        lm.model.norm.requires_grad_(True)
    embedding.requires_grad_(trainable.embeddings.kind == "full")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def halve_lora_base(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Convert the frozen matrices below LoRA to `dtype`, in which autocast multiplies by them anyway: the same results with
    half the memory, and `fused_lora` computes them.

    An earlier run may have trained them in float32; then a checkpoint saves them in `dtype`. No later run trains them: what
    begins with LoRA keeps it. Embeddings, which a later run may train, and norms stay as they are.
    """
    lm = model.causal_lm
    embedding = lm.get_input_embeddings().weight
    for module in lm.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim >= 2 for parameter in own):  # a bias goes with its matrix
            for parameter in own:
                if not parameter.requires_grad and parameter is not embedding:
                    parameter.data = parameter.data.to(dtype)


def trainable_parameters(model: VisionLanguageModel) -> dict[str, list[nn.Parameter]]:
    """Return part -> its parameters that train."""
    embedding = model.causal_lm.get_input_embeddings().weight
    parts = {
        "vision_tower": list(model.vision_tower.parameters()),
        "projector": list(model.projector.parameters()),
        "language_model": [p for p in model.language_model.parameters() if p is not embedding],
        "embeddings": [embedding],
    }
    return {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}


def param_groups(model: VisionLanguageModel, train: TrainConfig) -> list[dict]:
    """Return optimizer groups, one or two per part: {"name": the rate's config key, "lr", "weight_decay", "params"}.

    Vectors (biases, norms) are not decayed. Every trainable parameter is in exactly one group.
    """
    groups = []
    for part, parameters in trainable_parameters(model).items():
        name = RATE_KEYS.get((part, getattr(train.trainable, part).kind))
        for decay, chosen in (
            (train.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                assert name is not None, f"{part} trains, but its word names no learning rate"
                groups.append({"name": name, "lr": getattr(train, name), "weight_decay": decay, "params": chosen})
    in_groups = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(in_groups) == len(set(in_groups)), "a parameter is in two optimizer groups"
    assert set(in_groups) == trainable, "the optimizer groups are not the trainable parameters"
    return groups


def trainable_table(model: VisionLanguageModel, train: TrainConfig) -> str:
    """Return the table printed before training: part, what of it trains, how many parameters, at which rate."""
    lm = model.causal_lm
    embedding = lm.get_input_embeddings().weight
    totals = {
        "vision_tower": _count(model.vision_tower.parameters()),
        "projector": _count(model.projector.parameters()),
        "language_model": _count(p for p in lm.parameters() if p is not embedding),
        "embeddings": embedding.numel(),
    }
    rows = [("part", "trains", "trainable", "of", "learning rate")]
    for part, trained in trainable_parameters(model).items():
        word = getattr(train.trainable, part)
        rate = getattr(train, RATE_KEYS[part, word.kind]) if trained else None
        cells = (f"{_count(trained):,}", f"{totals[part]:,}", "-" if rate is None else f"{rate:g}")
        rows.append((part, word, *cells))
    everything = _count(model.parameters())
    trained_count = _count(p for p in model.parameters() if p.requires_grad)
    rows.append(("together", f"{trained_count / everything:.2%}", f"{trained_count:,}", f"{everything:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}"
        for a, b, c, d, e in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
