"""A language model of the Qwen family with random weights, for training from scratch.

The network is transformers' own class with our mixins, as for a released model; only its weights are new.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from config import ScratchConfig, choose
from qwen.attention import PACKED_SDPA
from qwen.checked_config import check_sizes
from qwen.modeling import EXPERTS, LANGUAGE_MODELS

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig}
ROWS = 64  # the number of embeddings is a multiple of this, because kernels prefer such shapes
# Passed to the library under their own names where they are set: intermediate_size is for dense models, the others are
# for mixtures of experts.
OPTIONAL_SIZES = (
    "intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


def new_language_model(
    sizes: ScratchConfig, *, vocab_size: int, seed: int, attn_implementation: str = PACKED_SDPA
) -> PreTrainedModel:
    """Create one of LANGUAGE_MODELS in float32 and eval mode; the same seed gives the same weights.

    sizes: a size that is None is left to transformers' config of the architecture; `tokenizer` and `vocab_size` are not
    read. vocab_size: number of ids of the tokenizer; the model gets the next multiple of ROWS embeddings.
    attn_implementation: see `load_language_model`. Call `attach_tokenizer` before using the model.
    InputError: an architecture that is not in CONFIGS.
    """
    optional = {name: getattr(sizes, name) for name in OPTIONAL_SIZES}
    config = choose(CONFIGS, sizes.architecture, "model.from_scratch.architecture")(
        vocab_size=math.ceil(vocab_size / ROWS) * ROWS,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads or sizes.num_attention_heads,
        head_dim=sizes.hidden_size // sizes.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        initializer_range=sizes.initializer_range,
        tie_word_embeddings=sizes.tie_word_embeddings,
        attn_implementation=attn_implementation,
        experts_implementation=EXPERTS,
        **{name: size for name, size in optional.items() if size is not None},
    )
    if hasattr(config, "norm_topk_prob"):
        # The weights of the chosen experts are scaled to sum to 1. A single expert keeps its probability instead: it would
        # always be 1, and the router could not learn.
        config.norm_topk_prob = config.num_experts_per_tok > 1
    check_sizes(config, "model.from_scratch: ", "Make it smaller, or use another checkpoint.")
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return LANGUAGE_MODELS[sizes.architecture](config).eval()
    finally:
        torch.set_rng_state(state)
