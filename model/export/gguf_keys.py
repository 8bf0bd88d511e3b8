"""The keys of GGUF files: what llama.cpp reads beside the tensors. Names and values are those of its
convert_hf_to_gguf.py and of its LLaVA graph."""

from __future__ import annotations

import json
from typing import Any

import qwen
from config import InputError
from model.build import Processors
from model.export.llava import Prompts, chat_template, text_config
from model.export.weights import Trained
from qwen.tokenizer import STOP_TOKENS
from visual.encoders import ENCODERS, VisionTower
from visual.tower import geometry

# regular expression of tokenizer.json -> llama.cpp's name of it
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
SMOLLM = [("Digits", "individual_digits", True), ("ByteLevel", "use_regex", True)]
MARKER = "<__media__>"  # of an image, in a prompt for llama.cpp
Keys = list[tuple[str, Any]]  # method of GGUFWriter, its argument


def text_config_of(trained: Trained) -> dict:
    """Return the language model's config with the rows that its embeddings get. Raises InputError for what GGUF lacks."""
    text = text_config(trained.language_model.skeleton.config, "fp32")
    text["vocab_size"] = max(text["vocab_size"], qwen.image_token_id(trained.processors.tokenizer) + 1)
    advice = "export with --format llava, and convert that folder with llama.cpp's convert_hf_to_gguf.py."
    rope = text["rope_parameters"].get("rope_type", "default")
    if rope != "default":
        raise InputError(
            f'the language model scales its positions (rope_type "{rope}"), which is not written; {advice}'
        )
    if set(text.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise InputError(f"the language model has layers with a sliding window, which is not written; {advice}")
    return text


def language_model_keys(text: dict, processors: Processors, prompts: Prompts) -> Keys:
    """Return the keys of model.gguf. text: the language model's config. Raises InputError for a tokenizer that llama.cpp
    lacks."""
    return [*_network_keys(text), *_tokenizer_keys(processors, text["vocab_size"], prompts)]


def _network_keys(text: dict) -> Keys:
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    return [
        ("add_block_count", text["num_hidden_layers"]),
        ("add_context_length", text["max_position_embeddings"]),
        ("add_embedding_length", text["hidden_size"]),
        ("add_feed_forward_length", text["intermediate_size"]),
        ("add_head_count", heads),
        ("add_head_count_kv", text["num_key_value_heads"]),
        ("add_key_length", head),
        ("add_value_length", head),
        ("add_rope_dimension_count", head),
        ("add_rope_freq_base", text["rope_theta"]),
        ("add_layer_norm_rms_eps", text["rms_norm_eps"]),
        ("add_vocab_size", text["vocab_size"]),
    ]


def _tokenizer_keys(processors: Processors, rows: int, prompts: Prompts) -> Keys:
    """Return the tokenizer's keys: one token for each row, unused ones included."""
    import gguf

    values = json.loads(processors.tokenizer.backend_tokenizer.to_str())
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, i in values["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in values["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in values["model"]["merges"]]
    template = chat_template(MARKER, prompts.system_prompt, media_marker=True)
    return [
        ("add_tokenizer_model", "gpt2"),
        ("add_tokenizer_pre", _pre_tokenizer(values["pre_tokenizer"])),
        ("add_token_list", tokens),
        ("add_token_types", types),
        ("add_token_merges", merges),
        ("add_eos_token_id", processors.token_id(STOP_TOKENS[0])),
        ("add_pad_token_id", processors.tokenizer.pad_token_id),
        ("add_add_bos_token", False),
        ("add_chat_template", template),
    ]


def _pre_tokenizer(values: dict | None) -> str:
    """Return llama.cpp's name of the rule that cuts a text before merging. Raises InputError if the rule is unknown."""
    steps = (values or {}).get("pretokenizers", [values or {}])
    for step in steps:
        pattern = step.get("pattern", {}).get("Regex") if step.get("type") == "Split" else None
        if pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
    if len(steps) == 2 and all(
        step.get("type") == kind and step.get(key) is value
        for step, (kind, key, value) in zip(steps, SMOLLM, strict=True)
    ):
        return "smollm"
    raise InputError(
        f"the tokenizer cuts texts by a rule that is not known by a name of llama.cpp ({json.dumps(values)[:200]}); export "
        "with --format llava, and convert that folder with llama.cpp's convert_hf_to_gguf.py."
    )


def mmproj_keys(tower: VisionTower, feature_layer: int, width: int, processors: Processors) -> Keys:
    """Return the keys of mmproj.gguf. width: of the language model. Raises InputError for what llama.cpp computes
    otherwise."""
    config, images = tower.model.config, processors.image_processor.settings()
    if config.intermediate_size == config.hidden_size:
        raise InputError(
            f"the encoder's MLP is as wide as the encoder ({config.hidden_size}), and then llama.cpp takes its two layers "
            "for swapped ones; export with --format llava."
        )
    activation = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}.get(config.hidden_act)
    if activation is None:
        raise InputError(f"the encoder's activation {config.hidden_act} is unknown to llama.cpp; use --format llava.")
    depth = geometry(ENCODERS[config.model_type], config, feature_layer)[0]
    return [
        ("add_clip_has_vision_encoder", True),
        ("add_clip_projector_type", "mlp"),
        ("add_vision_projection_dim", width),
        ("add_vision_image_size", tower.image_size),
        ("add_vision_patch_size", tower.patch_size),
        ("add_vision_embedding_length", config.hidden_size),
        ("add_vision_feed_forward_length", config.intermediate_size),
        ("add_vision_block_count", depth),
        ("add_vision_head_count", config.num_attention_heads),
        ("add_vision_attention_layernorm_eps", config.layer_norm_eps),
        ("add_vision_image_mean", images["image_mean"]),
        ("add_vision_image_std", images["image_std"]),
        ("add_vision_use_gelu", activation),
        ("add_feature_layers", [depth]),
    ]
