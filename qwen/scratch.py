"""A language model of the Qwen family with random weights, sized by the caller: what training from nothing begins with.

The network is transformers' own class with our override, as for a released model; only its weights are new.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from config import choose
from qwen.attention import PACKED_SDPA
from qwen.modeling import EXPERTS, LANGUAGE_MODELS

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig}
ROWS = 64  # the embeddings are a multiple of it: shapes that kernels like


def new_language_model(
    vocabulary: int,
    seed: int,
    *,
    architecture: str,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    rope_theta: float = 10_000.0,
    initializer_range: float = 0.02,
    tie_word_embeddings: bool = True,
    attn_implementation: str = PACKED_SDPA,
    **sizes: int | None,
) -> PreTrainedModel:
    """One of LANGUAGE_MODELS in float32, in eval mode; the same weights for the same seed.

    vocabulary: how many ids the tokenizer has. architecture: a key of CONFIGS. initializer_range: the standard deviation
    of the first weights. sizes: what else transformers' config of the architecture takes: intermediate_size (dense);
    num_experts, num_experts_per_tok, moe_intermediate_size (of each routed expert) and, for qwen2_moe,
    shared_expert_intermediate_size. None is left to the library. Call `attach_tokenizer` before it is used.
    """
    config = choose(CONFIGS, architecture, "model.from_scratch.architecture")(
        vocab_size=math.ceil(vocabulary / ROWS) * ROWS,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=initializer_range,
        tie_word_embeddings=tie_word_embeddings,
        attn_implementation=attn_implementation,
        experts_implementation=EXPERTS,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    if hasattr(config, "norm_topk_prob"):
        # the weights of the chosen experts add up to 1, however sure the router is; one alone keeps its probability, which
        # is all that the router can learn from
        config.norm_topk_prob = config.num_experts_per_tok > 1
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        return LANGUAGE_MODELS[architecture](config).eval()
    finally:
        torch.set_rng_state(state)
