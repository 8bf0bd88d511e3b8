"""The names of the linear layers that LoRA may adapt, for every family under the names that people know."""

from __future__ import annotations

from config import choose

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

# What the layers of a Qwen v1 checkpoint are called there -> what they are called here (see qwen/configuration.py).
QWEN1_LINEARS = {
    "c_attn": ["q_proj", "k_proj", "v_proj"],
    "attn.c_proj": ["o_proj"],
    "w1": ["up_proj"],
    "w2": ["gate_proj"],
    "mlp.c_proj": ["down_proj"],
    "c_proj": ["o_proj", "down_proj"],
}


def lora_target_modules(model_or_config, names: list[str]) -> list[str]:
    """Names as a user writes them -> module names for PEFT's `target_modules`, each once, in the order given.

    "all-linear" means all seven of a decoder layer (never the lm_head), and the four of its attention where the
    feed-forward is a mixture of experts: PEFT takes the other names for the routed experts, whose weights are no linear
    layers. "a|b" is read as two names. For a model that comes from Qwen v1 its old names (c_attn, w1, w2, c_proj, ...) mean
    what they became. InputError for other names.
    """
    config = getattr(model_or_config, "config", model_or_config)
    linears = ATTENTION if config.model_type.endswith("_moe") else LINEARS
    table = {name: [name] for name in linears} | {"all-linear": linears}
    if config.model_type == "qwen":
        table |= QWEN1_LINEARS
    written = [name.strip() for name in "|".join(names).split("|")]
    found = [module for name in written for module in choose(table, name, "lora.target_modules")]
    return list(dict.fromkeys(found))
