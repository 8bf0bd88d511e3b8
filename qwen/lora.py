"""Names of the linear layers that LoRA may adapt, for every family."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig, PreTrainedModel

from config import choose

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# Layer name in a Qwen v1 checkpoint -> names of the same layers here (see qwen/configuration.py).
QWEN1_LINEARS = {
    "c_attn": ["q_proj", "k_proj", "v_proj"],
    "attn.c_proj": ["o_proj"],
    "w1": ["up_proj"],
    "w2": ["gate_proj"],
    "mlp.c_proj": ["down_proj"],
    "c_proj": ["o_proj", "down_proj"],
}


def lora_target_modules(model_or_config: PreTrainedModel | PreTrainedConfig, names: Iterable[str]) -> list[str]:
    """Translate a user's layer names to module names for PEFT's `target_modules`, each once, in the order given.

    "all-linear" means all seven linear layers of a decoder layer, never the lm_head. In a mixture of experts it means the
    four of the attention: PEFT would apply the other names to the routed experts, whose weights are not linear layers.
    "a|b" is read as two names. For a model that comes from Qwen v1, its original names (c_attn, w1, w2, c_proj, ...) are
    accepted too. InputError for any other name.
    """
    config = model_or_config if isinstance(model_or_config, PreTrainedConfig) else model_or_config.config
    linears = ATTENTION if config.model_type.endswith("_moe") else LINEARS
    table = {name: [name] for name in linears} | {"all-linear": linears}
    if config.model_type == "qwen":
        table |= QWEN1_LINEARS
    written = [name.strip() for name in "|".join(names).split("|")]
    found = [module for name in written for module in choose(table, name, "lora.target_modules")]
    return list(dict.fromkeys(found))
