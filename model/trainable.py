"""What of the model trains, and at which rate: the words of `train.trainable` -> requires_grad, optimizer groups, a table.

Everything is frozen first and then switched on by name, so nothing trains by accident; and every parameter that trains
is in exactly one optimizer group, which is asserted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from peft import LoraConfig, get_peft_model
from torch import nn

from config import RATE_KEYS, InputError, trained_parts
from model.model import VisionLanguageModel


def add_lora(model: VisionLanguageModel, r: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> None:
    """Wrap the language model, and only it, with LoRA. target_modules: names of its linear layers, as they are called in
    this library (`qwen.lora_target_modules` translates the names of Qwen v1)."""
    settings = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # PEFT asks transformers in an older way
        warnings.simplefilter("ignore", FutureWarning)
        model.language_model = get_peft_model(model.language_model, settings)


def set_trainable(model: VisionLanguageModel, words: dict[str, str]) -> None:
    """Freeze everything, then let train what `words` (part -> frozen | lora | full | top:N) names; what trains becomes
    float32. `lora` wants `add_lora` before. Raises InputError where a part has fewer than N layers.

    The language model's `full` is its layers, its final norm and an untied head; its input embeddings, and a head that
    is tied to them, are the part `embeddings`.
    """
    model.requires_grad_(False)
    kinds = {part: word.split(":")[0] for part, word in words.items()}
    counts = {part: int(word.split(":")[1]) for part, word in words.items() if kinds[part] == "top"}
    if kinds["vision_tower"] != "frozen":
        model.vision_tower.unfreeze(counts.get("vision_tower"))
    model.projector.requires_grad_(kinds["projector"] == "full")
    lm, embedding = model.causal_lm, model.causal_lm.get_input_embeddings()
    if kinds["language_model"] == "lora":
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif kinds["language_model"] == "full":
        lm.requires_grad_(True)
    elif kinds["language_model"] == "top":
        layers, count = lm.model.layers, counts["language_model"]
        if count > len(layers):
            raise InputError(
                f'"train.trainable.language_model" is top:{count}, but it has {len(layers)} layers; '
                f"say top:{len(layers)} or less."
            )
        layers[-count:].requires_grad_(True)
        lm.model.norm.requires_grad_(True)
    embedding.requires_grad_(kinds["embeddings"] == "full")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.untrained -= trained_parts(words)


def trainable_parameters(model: VisionLanguageModel) -> dict[str, list[nn.Parameter]]:
    """Part -> its parameters that train."""
    embedding = model.causal_lm.get_input_embeddings().weight
    parts = {
        "vision_tower": list(model.vision_tower.parameters()),
        "projector": list(model.projector.parameters()),
        "language_model": [p for p in model.language_model.parameters() if p is not embedding],
        "embeddings": [embedding],
    }
    return {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}


def param_groups(
    model: VisionLanguageModel, words: dict[str, str], rates: dict[str, float | None], weight_decay: float
) -> list[dict]:
    """Optimizer groups, one or two a part: {"name": the rate's key, "lr", "weight_decay", "params"}. Vectors (biases, norms)
    are not decayed. Every trainable parameter is in exactly one group."""
    groups = []
    for part, parameters in trainable_parameters(model).items():
        name = RATE_KEYS.get((part, words[part].split(":")[0]))
        for decay, chosen in (
            (weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                groups.append({"name": name, "lr": rates[name], "weight_decay": decay, "params": chosen})
    in_groups = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(in_groups) == len(set(in_groups)), "a parameter is in two optimizer groups"
    assert set(in_groups) == trainable, "the optimizer groups are not the trainable parameters"
    return groups


def trainable_table(model: VisionLanguageModel, words: dict[str, str], rates: dict[str, float | None]) -> str:
    """The table that is printed before training: part, what of it trains, how many parameters, at which rate."""
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
        rate = rates[RATE_KEYS[part, words[part].split(":")[0]]] if trained else None
        cells = (f"{_count(trained):,}", f"{totals[part]:,}", "-" if rate is None else f"{rate:g}")
        rows.append((part, words[part], *cells))
    everything = _count(model.parameters())
    trained = _count(p for p in model.parameters() if p.requires_grad)
    rows.append(("together", f"{trained / everything:.2%}", f"{trained:,}", f"{everything:,}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}"
        for a, b, c, d, e in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)
