"""Qwen v1 (Qwen-7B-Chat, Qwen-1.8B-Chat, ...) as a configuration of transformers' Qwen2.

Version 1 is the Qwen2 network with other names. This module translates the keys of `config.json` and the names of the
weights; transformers applies both translations on loading and reverses them on saving.
Source of the names: configuration_qwen.py and modeling_qwen.py, which Qwen published with the v1 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig, Qwen2Config
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from config import InputError

# Settings that the Qwen2 network does not have. These values are also v1's defaults, so a key may be absent.
REQUIRED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}

# v1 name -> Qwen2 name, same value. The trained length is v1's `seq_length`, not its `max_position_embeddings`.
RENAMED = {"layer_norm_epsilon": "rms_norm_eps", "seq_length": "max_position_embeddings"}

# Not written to config.json: v1 has another key for it, or supports only one value.
QWEN2_ONLY = {"rms_norm_eps", "rope_parameters", "attention_dropout", "num_key_value_heads", "hidden_act"}
QWEN2_ONLY |= {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}

# v1 computes c_proj(w1(x) * silu(w2(x))): w2 is the gate. c_attn is the concatenation of q, k and v, heads in order.
WEIGHTS: list[WeightConverter | WeightRenaming] = [
    WeightRenaming("transformer.wte", "model.embed_tokens"),
    WeightRenaming("transformer.h", "model.layers"),
    WeightRenaming("transformer.ln_f", "model.norm"),
    WeightRenaming(".ln_1.", ".input_layernorm."),
    WeightRenaming(".ln_2.", ".post_attention_layernorm."),
    WeightRenaming(".attn.c_proj.", ".self_attn.o_proj."),
    WeightRenaming(".mlp.w1.", ".mlp.up_proj."),
    WeightRenaming(".mlp.w2.", ".mlp.gate_proj."),
    WeightRenaming(".mlp.c_proj.", ".mlp.down_proj."),
    *(
        WeightConverter(f".attn.c_attn.{kind}", [f".self_attn.{x}_proj.{kind}" for x in "qkv"], [Chunk(dim=0)])
        for kind in ("weight", "bias")
    ),
]


def released_name(name: str, model_type: str) -> tuple[str, int, int]:
    """Return (the tensor of a released file that holds the parameter `name`, part i, of n parts along the first
    dimension): v1 joins q, k and v. Other families' files have the names that the model has in memory."""
    part, parts = 0, 1
    if model_type == QWenConfig.model_type:
        for entry in WEIGHTS:
            (source,) = entry.source_patterns
            for number, target in enumerate(entry.target_patterns):
                if target in name:
                    name = name.replace(target, source)
                    if len(entry.target_patterns) > 1:
                        part, parts = number, len(entry.target_patterns)
    return name, part, parts


class QWenConfig(Qwen2Config):
    """A Qwen v1 `config.json` as a Qwen2 configuration, saved under v1's names.

    `max_position_embeddings` is v1's `seq_length`. Keys that the Qwen2 network does not use (`use_logn_attn`, ...) are
    kept as attributes, so that saving loses nothing.
    """

    model_type = "qwen"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Accept v1's names (from a released or saved folder) or Qwen2's (from `to_dict()`). InputError: see `translate`."""
        if "rms_norm_eps" not in config_dict:
            config_dict = translate(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict:
        """Return the content of `config.json`: a v1 configuration, which Qwen's original code reads too."""
        written = super().to_diff_dict()
        for name in QWEN2_ONLY:
            written.pop(name, None)
        written |= REQUIRED | {old: getattr(self, new) for old, new in RENAMED.items()}
        assert self.rope_parameters is not None  # set by `translate`
        return written | {
            "intermediate_size": 2 * self.intermediate_size,
            "kv_channels": self.hidden_size // self.num_attention_heads,
            "rotary_emb_base": self.rope_parameters["rope_theta"],
            "attn_dropout_prob": self.attention_dropout,
        }


def translate(v1: dict) -> dict:
    """Translate a v1 `config.json` to keyword arguments of Qwen2Config; other keys are passed on unchanged.

    InputError names the key if the checkpoint is not the Qwen2 network: a size is missing, every linear layer has a bias,
    rotary embeddings are partial, or the heads' sizes do not add up to the hidden size.
    """
    needed = (*RENAMED, "hidden_size", "num_attention_heads", "intermediate_size", "kv_channels", "rotary_emb_base")
    missing = [name for name in needed if name not in v1]
    if missing:
        raise InputError(
            f"Qwen v1 config.json: {', '.join(missing)} missing; download the model's config.json again, "
            "the first releases used other names."
        )
    for name, expected in REQUIRED.items():
        if v1.get(name, expected) != expected:
            raise InputError(f"Qwen v1 config.json: {name} is {v1[name]}; only {expected} is supported.")
    if v1["kv_channels"] * v1["num_attention_heads"] != v1["hidden_size"]:
        raise InputError(
            f"Qwen v1 config.json: kv_channels {v1['kv_channels']} x num_attention_heads {v1['num_attention_heads']} "
            f"is not hidden_size {v1['hidden_size']}; only equal sizes are supported."
        )

    consumed = {*RENAMED, "kv_channels", "rotary_emb_base", "attn_dropout_prob", "auto_map"}
    config = {name: value for name, value in v1.items() if name not in consumed}
    config |= {new: v1[old] for old, new in RENAMED.items()}
    return config | {
        "intermediate_size": v1["intermediate_size"] // 2,  # v1 counts gate and up projection together
        "num_key_value_heads": v1["num_attention_heads"],
        "rope_parameters": {"rope_type": "default", "rope_theta": v1["rotary_emb_base"]},
        "attention_dropout": v1.get("attn_dropout_prob", 0.0),
    }


def longest_input(path: str | Path) -> int | None:
    """Return the number of tokens beyond which the language model of a folder or hub name fails; None without such a limit.

    Only Qwen v1 has one, `seq_length`. A config that cannot be read gives None: loading the model then reports why.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(path))
    except (OSError, ValueError):
        return None
    length = config.get("seq_length")
    return length if config.get("model_type") == QWenConfig.model_type and type(length) is int else None


def trained_length(path: str | Path) -> int | None:
    """Return the number of positions that the language model of a folder or hub name was made for; None if its config does
    not say so or cannot be read.

    Beyond it other models than Qwen v1 compute something, but at positions that they never saw.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(str(path))
    except (OSError, ValueError):
        return None
    length = config.get(
        "seq_length" if config.get("model_type") == QWenConfig.model_type else "max_position_embeddings"
    )
    return length if type(length) is int and length > 0 else None
