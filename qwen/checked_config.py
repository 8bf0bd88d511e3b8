"""Check a language model's config.json, which may come from a stranger, and refuse what would fail or fill the memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from config import InputError, nearest

# Far beyond any released model: key -> (smallest, largest). A key that is null, or that a family does not have, is skipped.
BOUNDS: dict[str, tuple[int, int]] = {
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 2**9),
    "num_attention_heads": (1, 2**10),
    "num_key_value_heads": (1, 2**10),
    "head_dim": (2, 2**12),
    "intermediate_size": (1, 2**19),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (1, 2**30),
    "sliding_window": (0, 2**30),
    "num_experts": (1, 2**12),
    "num_experts_per_tok": (1, 2**12),
    "moe_intermediate_size": (1, 2**19),
    "shared_expert_intermediate_size": (1, 2**19),
    "decoder_sparse_step": (1, 2**9),
}
REPLACE = "Download config.json again from the source of the weights."


def check_config(path: str, values: dict, config_class: type[PreTrainedConfig]) -> None:
    """Check the config.json of the language model in a folder or hub repository. values: its content.

    InputError: a size is no whole number, out of bounds or does not fit the others; the rotary embedding, activation or
    dtype is unknown; the sizes describe more weights than the folder holds; the attention names a kernel that transformers
    would download; or transformers refuses the config.
    """
    where = f"language model {path}: config.json"
    for key, value in values.items():
        if key.endswith("_implementation") and not re.fullmatch(r"\w+", str(value)):
            raise InputError(f"{where}: {key} is {value!r:.80}, which names a kernel to download; remove the key.")
    try:
        config: Any = config_class.from_dict(values)
    except InputError:
        raise
    except Exception as error:  # transformers' validation raises nearly anything
        raise InputError(f"{where}: cannot be used ({' '.join(str(error).split()):.300}). {REPLACE}") from error
    check_sizes(config, f"{where}: ", REPLACE)
    rope = config.rope_parameters or {}
    known = ["default", *ROPE_INIT_FUNCTIONS]
    if (kind := rope.get("rope_type", "default")) not in known:
        raise InputError(f"{where}: rope_type {str(kind)!r:.80} is unknown{nearest(kind, known)} {REPLACE}")
    if not isinstance(base := rope.get("rope_theta", 1.0), int | float) or not base > 0:
        raise InputError(f"{where}: rope_theta is {base!r:.80}; expected a number above 0. {REPLACE}")
    if config.hidden_act not in ACT2FN:
        raise InputError(f"{where}: hidden_act {str(config.hidden_act)!r:.80} is unknown to transformers. {REPLACE}")
    if not (config.dtype is None or isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point):
        raise InputError(f"{where}: dtype is {config.dtype!r:.80}; expected float32, bfloat16 or float16. {REPLACE}")
    held, needed = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")), count_weights(config)
    if held and needed > held:  # a weight takes at least a byte
        raise InputError(
            f"{where}: describes {needed:,} weights, but the folder's safetensors files have {held:,} bytes. Download "
            "weights and config.json again from the same source."
        )


def check_sizes(config: PreTrainedConfig, where: str, advice: str) -> None:
    """Raise InputError unless every size is within BOUNDS and the heads fit together. where, advice: begin and end the
    message."""
    for key, (low, high) in BOUNDS.items():
        if (found := getattr(config, key, None)) is not None and not (type(found) is int and low <= found <= high):
            raise InputError(f"{where}{key} is {found!r:.80}; expected a whole number from {low} to {high:,}. {advice}")
    sizes: Any = config
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    if getattr(sizes, "head_dim", None) is None and sizes.hidden_size % heads:
        raise InputError(f"{where}hidden_size {sizes.hidden_size} cannot be divided into {heads} heads. {advice}")
    if heads % groups:
        raise InputError(f"{where}num_key_value_heads {groups} does not divide the {heads} heads. {advice}")
    experts, chosen = getattr(sizes, "num_experts", None), getattr(sizes, "num_experts_per_tok", None)
    if experts is not None and chosen is not None and chosen > experts:
        raise InputError(f"{where}num_experts_per_tok {chosen} is more than there are experts ({experts}). {advice}")


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count_weights(config: Any) -> int:
    """Return how many weights the matrices of a model have. The head counts as tied to the embeddings, as it may be."""
    width, layers = config.hidden_size, config.num_hidden_layers
    attention = 2 * width * head_width(config) * (config.num_attention_heads + config.num_key_value_heads)
    sparse = 0
    if experts := getattr(config, "num_experts", None):
        dense, step = config.mlp_only_layers or [], config.decoder_sparse_step
        sparse = sum(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
        shared = getattr(config, "shared_expert_intermediate_size", 0)
        experts = 3 * width * (experts * config.moe_intermediate_size + shared)
    feed_forward = sparse * (experts or 0) + (layers - sparse) * 3 * width * config.intermediate_size
    return config.vocab_size * width + layers * attention + feed_forward
