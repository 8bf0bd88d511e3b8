"""A trained model as a Hugging Face LLaVA folder, which stock transformers and the tools around it open.

Names, keys and values are those that transformers 4.57 and 5 both read, also where either alone would do with fewer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

import qwen
from config import InputError, ModelConfig
from model.build import Processors
from model.export.weights import Trained, Weight, held, tower_weights, write_weights
from qwen.tokenizer import STOP_TOKENS
from visual.encoders import VisionTower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# model_type of a language model -> (config class of stock transformers, its architecture). Qwen v1 is Qwen2's network.
TEXT_MODELS: dict[str, tuple[type[PreTrainedConfig], str]] = {
    "qwen": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
    "llama": (LlamaConfig, "LlamaForCausalLM"),
}
# model_type of an encoder's own config.json -> class tokens before the patches
ENCODERS = {"clip": 1, "clip_vision_model": 1, "siglip": 0, "siglip_vision_model": 0, "dinov2": 1}
REGISTERS = "stock LLaVA drops one token before the patches, and this encoder has registers as well"
NOT_EXPORTED = {"dinov2_with_registers": REGISTERS, "dinov3_vit": REGISTERS}
NATIVE = "Or export with --format native, a folder that model.load and test.sh open."

# keys of a config that say how it was loaded, not what the model is
LOADING_KEYS = set(
    "_name_or_path transformers_version architectures dtype torch_dtype return_dict output_hidden_states output_attentions "
    "id2label label2id problem_type chunk_size_feed_forward is_encoder_decoder use_cache stage_names out_features "
    "out_indices".split()
)
TOKENIZER_LOADING_KEYS = ("is_local", "local_files_only", "backend", "extra_special_tokens")


def refuse_inexpressible(settings: ModelConfig) -> None:
    """Raise InputError, with the reason and what to train instead, for a model that stock LLaVA cannot compute."""
    hidden_size: int | None
    text_type: str
    if settings.from_scratch is not None:
        hidden_size, text_type = settings.from_scratch.hidden_size, settings.from_scratch.architecture
    else:
        text, _ = PreTrainedConfig.get_config_dict(str(settings.language_model))
        hidden_size, text_type = text.get("hidden_size"), str(text.get("model_type"))

    def refuse(found: str, reason: str, instead: str) -> None:
        raise InputError(f"{found} cannot be exported as LLaVA: {reason}. Train {instead} instead. {NATIVE}")

    encoder = str(PreTrainedConfig.get_config_dict(settings.vision_tower)[0].get("model_type"))
    if encoder not in ENCODERS:
        reason = NOT_EXPORTED.get(encoder, "stock LLaVA takes the hidden states of a vision transformer")
        refuse(
            f'model.vision_tower {settings.vision_tower} (model_type "{encoder}")',
            reason,
            instead="with a CLIP, SigLIP, SigLIP 2 or DINOv2 (without registers) encoder",
        )
    if settings.vision_features != "hidden_state":
        refuse(
            f"model.vision_features {settings.vision_features}",
            "stock LLaVA takes a hidden state before the encoder's last norm, with every patch",
            instead="with model.vision_features hidden_state",
        )
    if settings.attention != "causal":
        refuse(
            f"model.attention {settings.attention}", "stock LLaVA is causal everywhere", "with model.attention causal"
        )
    if text_type not in TEXT_MODELS:
        refuse(
            f'a language model of model_type "{text_type}"',
            "a mixture of experts inside a LLaVA model is not supported by the tools that read such folders",
            instead="with a dense Qwen or Llama model",
        )
    if settings.projector not in ("mlp", "low_rank_mlp"):
        refuse(
            f"model.projector {settings.projector}",
            "stock LLaVA has one image token for every patch, from a linear layer, GELU and a linear layer",
            instead="with model.projector mlp",
        )
    default = hidden_size if settings.projector == "mlp" else None
    width = settings.projector_hidden_size or default
    if width != hidden_size:
        refuse(
            f"model.projector {settings.projector} with a middle width of {width or 'its default'}",
            f"stock LLaVA's is as wide as the language model, {hidden_size}",
            instead="with model.projector mlp and model.projector_hidden_size null",
        )


@dataclass(frozen=True)
class Prompts:
    """How an exported folder prompts and answers: a run's data.system_prompt and test.max_new_tokens."""

    system_prompt: str | None
    max_new_tokens: int


def write_llava(folder: Path, trained: Trained, prompts: Prompts, *, dtype: str) -> None:
    """Write everything that stock transformers reads: weights, configs, tokenizer, processor and chat template.

    dtype: a key of DTYPES. Raises InputError.
    """
    tower, processors, language_model = trained.tower(), trained.processors, trained.language_model
    image_id = qwen.image_token_id(processors.tokenizer)
    rows = language_model.skeleton.config.vocab_size
    weights = _llava_weights(trained, tower, DTYPES[dtype], rows=max(rows, image_id + 1))
    write_weights(weights, folder, DTYPES[dtype])
    text = text_config(language_model.skeleton.config, dtype)
    text |= {"vocab_size": max(rows, image_id + 1), "tie_word_embeddings": language_model.is_tied}
    text |= {"eos_token_id": _ids(processors, STOP_TOKENS)[0], "pad_token_id": processors.tokenizer.pad_token_id}
    class_tokens = ENCODERS[tower.model.config.model_type]
    strategy = "default" if class_tokens else "full"
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_id,
            "image_seq_length": processors.num_image_tokens,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": trained.settings.vision_feature_layer,
            "vision_feature_select_strategy": strategy,
            "tie_word_embeddings": language_model.is_tied,
            **_dtype_keys(dtype),
            "text_config": text,
            "vision_config": vision_config(tower, dtype),
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": _ids(processors, STOP_TOKENS),
            "max_new_tokens": prompts.max_new_tokens,
            "pad_token_id": processors.tokenizer.pad_token_id,
            # rows that were added for the image token and are no token's
            "suppress_tokens": sorted({image_id, *range(rows, image_id)}),
        },
    )
    _write_processor(folder, processors, prompts, patch_size=tower.patch_size, class_tokens=class_tokens)


def _llava_weights(trained: Trained, tower: VisionTower, dtype: torch.dtype, *, rows: int) -> list[Weight]:
    """Return all tensors under the names that llava-hf's folders have. rows: of the embeddings and the head."""
    weights = [
        weight
        for weight in tower_weights(tower, prefix="vision_tower.")
        if not weight.name.startswith("vision_tower.vision_model.head.")  # SigLIP's pooling
    ]
    weights += [held(f"multi_modal_projector.{name}", tensor) for name, tensor in trained.projector(dtype).items()]
    for weight in trained.language_model.weights():
        if weight.name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = grown(weight, rows)
        weights.append(weight.renamed(f"language_model.{weight.name}"))
    return weights


def grown(weight: Weight, rows: int) -> Weight:
    """Return the matrix with rows of zeros for ids that have none: stock LLaVA looks up the image token's embedding before
    it replaces it."""
    missing = rows - weight.shape[0]
    if missing <= 0:
        return weight
    pad = torch.nn.functional.pad
    return Weight(weight.name, (rows, *weight.shape[1:]), lambda: pad(weight.read(), (0, 0, 0, missing)))


def text_config(config: Any, dtype: str) -> dict:
    """Return a language model's config with the keys of its stock class alone: neither ours nor Qwen v1's."""
    kind, architecture = TEXT_MODELS[config.model_type]
    known = kind().to_dict().keys() | {"head_dim"}
    values = {key: value for key, value in config.to_dict().items() if key in known and key not in LOADING_KEYS}
    rope = values["rope_parameters"]
    values |= {
        "architectures": [architecture],
        "model_type": kind.model_type,
        "rope_theta": rope["rope_theta"],  # where transformers 4 and mlx look
        **_dtype_keys(dtype),
    }
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return values


def vision_config(tower: VisionTower, dtype: str) -> dict:
    """Return the encoder's config; image_size is the encoder's own, to which its positions belong."""
    config = tower.model.config
    values = {key: value for key, value in config.to_dict().items() if key not in LOADING_KEYS}
    if config.model_type == "siglip_vision_model":
        values["vision_use_head"] = False
    return values | {"model_type": config.model_type, **_dtype_keys(dtype)}


def _dtype_keys(dtype: str) -> dict[str, str]:
    name = str(DTYPES[dtype]).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer, processor, template


def _write_processor(
    folder: Path, processors: Processors, prompts: Prompts, patch_size: int, class_tokens: int
) -> None:
    tokenizer = processors.tokenizer
    token = qwen.image_token(tokenizer)
    template = chat_template(token, prompts.system_prompt)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    extra = values.get("extra_special_tokens")
    special = extra if isinstance(extra, list) else [token]
    values = {key: value for key, value in values.items() if key not in TOKENIZER_LOADING_KEYS}
    values |= {
        "additional_special_tokens": special,  # transformers 4 fails on 5's list of the other name
        "padding_side": "left",  # an answer begins at the last column
        "chat_template": template,
        "processor_class": "LlavaProcessor",
    }
    write_json(path, values)
    processors.image_processor.save(folder)
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["image_processor_type"] = values["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    write_json(path, values | {"processor_class": "LlavaProcessor"})
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": patch_size,
            "vision_feature_select_strategy": "default" if class_tokens else "full",
            "num_additional_image_tokens": class_tokens,
            "image_token": token,
        },
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def chat_template(image_token: str, system_prompt: str | None, media_marker: bool = False) -> str:
    """Return ChatML as a Jinja template, with the ids of `dataset.conversation.ChatFormat`.

    Content is a string, in which a user's `<image>` is an image, or a list of parts. Between an image and a text part after
    it is one newline, unless the text begins with one. media_marker: for llama.cpp, whose programs put an image into the
    list as a part of type media_marker, or as a text part that is `image_token`. Its server joins the parts of a message
    first, so in its strings a newline is put after each `<__media...__>` that a text follows.
    """
    image, line = json.dumps(image_token), '"\\n"'
    is_image, shown, said = 'part["type"] == "image"', image, 'message["content"]'
    if media_marker:
        said = _with_line_breaks(said)
        is_image += f' or part["type"] == "media_marker" or part["text"] == {image}'
        shown = f'part["text"] if part["type"] == "media_marker" else {image}'
    system = ""
    if system_prompt is not None:
        quoted = '"' + system_prompt.encode("unicode_escape").decode().replace('"', '\\"') + '"'
        system = (
            "{%- if messages[0]['role'] != 'system' -%}"
            '{{- "<|im_start|>system\\n" + ' + quoted + ' + "<|im_end|>\\n" -}}'
            "{%- endif -%}"
        )
    return (
        system
        + "{%- for message in messages -%}"
        + '{{- "<|im_start|>" + message["role"] + "\\n" -}}'
        + '{%- if message["content"] is string -%}'
        + f'{{{{- {said}.replace("<image>", {image}) if message["role"] == "user" else message["content"] -}}}}'
        + "{%- else -%}"
        + "{%- set last = namespace(image=false) -%}"
        + '{%- for part in message["content"] -%}'
        + f"{{%- if {is_image} -%}}"
        + f"{{{{- {shown} -}}}}{{%- set last.image = true -%}}"
        + '{%- elif part["type"] == "text" -%}'
        + f'{{{{- ({line} if last.image and not part["text"].startswith({line}) else "") + part["text"] -}}}}'
        + "{%- set last.image = false -%}"
        + "{%- endif -%}"
        + "{%- endfor -%}"
        + "{%- endif -%}"
        + '{{- "<|im_end|>\\n" -}}'
        + "{%- endfor -%}"
        + '{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}'
    )


def _with_line_breaks(text: str) -> str:
    """Return a Jinja expression: the string `text` with a newline between each of llama.cpp's markers and a text after it
    that begins with none."""
    end, start, line = '"__>"', '"<__media"', '"\\n"'
    broken = f"{text}.replace({end}, {end} + {line}).replace({end} + {line} + {line}, {end} + {line})"
    broken += f".replace({end} + {line} + {start}, {end} + {start})"
    return f"(({broken})[:-1] if {text}.endswith({end}) else {broken})"


def _ids(processors: Processors, tokens: list[str]) -> list[int]:
    return [processors.token_id(token) for token in tokens]


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
