"""Tiny random language models in the layouts of Qwen's releases, each in a folder with a small real tokenizer.

They are written without the code in `qwen/`, so that reading them tests it. A few hundred kilobytes each.
"""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from config import ScratchConfig
from config.typed_yaml import FolderOrHub

SENTENCES = [
    "What is in the picture? There is a red star in the upper left corner, and a blue circle below it.",
    "How many objects are there? There are three objects: two green squares and one yellow triangle.",
    "You are a helpful assistant. Is there a circle? Yes. Is there a star? No.",
    "Describe the image in one sentence. user assistant system",
    "图片里有什么？图片的左上角有一个红色的星星，下面有一个蓝色的圆形。",
    "图中有几个物体？图中有三个物体：两个绿色的正方形和一个黄色的三角形。",
]
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]  # in Qwen2.5 and later
PLAIN_TOKENS = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<think>", "</think>"]  # not special
VOCABULARY = 420  # 256 bytes and the merges
ROWS = 640  # embeddings: more than the ids of any of the tokenizers, as in the released models
HIDDEN, HEADS, LAYERS, MLP = 64, 4, 2, 96


@cache
def train_bpe() -> tuple[dict[str, int], list]:
    """Train a byte-level BPE on SENTENCES; return its vocabulary (the 256 bytes first) and merges (pairs)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write_qwen1(folder, seed: int = 0, seq_length: int = 512) -> Path:
    """Qwen v1: `qwen.tiktoken`, fused `c_attn`, v1's `config.json` with remote-code entries. Untied embeddings, fp32."""
    folder = _new(folder)
    vocabulary, _ = train_bpe()
    byte = {letter: value for value, letter in bytes_to_unicode().items()}
    lines = [
        f"{base64.b64encode(bytes(byte[letter] for letter in token)).decode()} {rank}"
        for token, rank in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    remote = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": remote, "model_max_length": 8192, "tokenizer_class": "QWenTokenizer"})
    )
    config = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "fp32": True,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 2 * MLP,
        "kv_channels": HIDDEN // HEADS,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": seq_length,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": ROWS,
    }
    (folder / "config.json").write_text(json.dumps(config))

    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.15

    weights = {"transformer.wte.weight": random(ROWS, HIDDEN), "lm_head.weight": random(ROWS, HIDDEN)}
    weights["transformer.ln_f.weight"] = 1 + random(HIDDEN)
    for layer in range(LAYERS):
        weights |= {
            f"transformer.h.{layer}.{name}": tensor
            for name, tensor in {
                "ln_1.weight": 1 + random(HIDDEN),
                "ln_2.weight": 1 + random(HIDDEN),
                "attn.c_attn.weight": random(3 * HIDDEN, HIDDEN),
                "attn.c_attn.bias": random(3 * HIDDEN),
                "attn.c_proj.weight": random(HIDDEN, HIDDEN),
                "mlp.w1.weight": random(MLP, HIDDEN),
                "mlp.w2.weight": random(MLP, HIDDEN),
                "mlp.c_proj.weight": random(HIDDEN, MLP),
            }.items()
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_qwen2(folder, seed: int = 0) -> Path:
    """Qwen1.5 or Qwen2: vocabulary without image token, tied embeddings, fewer key heads than query heads."""
    config = Qwen2Config(tie_word_embeddings=True, bos_token_id=None, **toy_sizes())
    return write_modern(folder, Qwen2ForCausalLM, config, CHAT_TOKENS, seed)


def write_qwen3(folder, seed: int = 0) -> Path:
    """Qwen3: vocabulary with `<|image_pad|>`, added tokens that are not special (`<think>`), untied embeddings."""
    config = Qwen3Config(tie_word_embeddings=False, bos_token_id=None, head_dim=HIDDEN // HEADS, **toy_sizes())
    return write_modern(folder, Qwen3ForCausalLM, config, CHAT_TOKENS + VISION_TOKENS, seed, plain=PLAIN_TOKENS)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def write_qwen2_moe(folder, seed: int = 0) -> Path:
    """Qwen1.5-MoE: four routed experts, two per token, and a shared one; untied embeddings."""
    sizes = toy_sizes() | EXPERTS | {"shared_expert_intermediate_size": 64, "norm_topk_prob": False}
    config = Qwen2MoeConfig(tie_word_embeddings=False, bos_token_id=None, **sizes)
    return write_modern(folder, Qwen2MoeForCausalLM, config, CHAT_TOKENS, seed)


def write_qwen3_moe(folder, seed: int = 0) -> Path:
    """Qwen3-MoE: four routed experts, two per token; untied embeddings."""
    sizes = toy_sizes() | EXPERTS | {"norm_topk_prob": True, "head_dim": HIDDEN // HEADS}
    config = Qwen3MoeConfig(tie_word_embeddings=False, bos_token_id=None, **sizes)
    return write_modern(folder, Qwen3MoeForCausalLM, config, CHAT_TOKENS + VISION_TOKENS, seed, plain=PLAIN_TOKENS)


def write_llama(folder, seed: int = 0, tied: bool = True) -> Path:
    """SmolLM2: Llama's layout with ChatML tokens and tied embeddings; TinyLlama: the same, untied."""
    config = LlamaConfig(tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, **toy_sizes())
    return write_modern(folder, LlamaForCausalLM, config, CHAT_TOKENS, seed)


WRITERS = {
    "qwen": write_qwen1,
    "qwen2": write_qwen2,
    "qwen3": write_qwen3,
    "qwen2_moe": write_qwen2_moe,
    "qwen3_moe": write_qwen3_moe,
    "llama": write_llama,
}


def scratch_sizes(**sizes) -> ScratchConfig:
    """Sizes of a new language model, as in a config. `new_language_model` does not read the tokenizer."""
    return ScratchConfig(tokenizer=FolderOrHub("not read"), **sizes)


def toy_sizes() -> dict:
    return {
        "vocab_size": ROWS,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.15,
    }


def write_modern(folder, model_class, config, special: list[str], seed: int, plain=()) -> Path:
    folder = _new(folder)
    vocabulary, merges = train_bpe()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=list(merges), extra_special_tokens=special[1:])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, which a trained model's biases are not
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def _new(folder) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
