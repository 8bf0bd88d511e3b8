"""The language models: transformers' Qwen2 and Qwen3, dense or mixture of experts, and Llama, with image features; and Qwen
v1, which is based on Qwen2.

A family is one entry of LANGUAGE_MODELS and two short classes. They have transformers' class names, so that a saved folder
names the usual architecture and other tools load it. Attention, cache, `generate`, quantisation and PEFT are the
library's. Image encoders, projectors and prompts are not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils import ModelOutput

from config import InputError, choose, how_to_convert, is_hub_name
from config.files import refuse_pointers
from qwen.attention import PACKED_SDPA
from qwen.checked_config import check_config
from qwen.configuration import QWenConfig
from qwen.injection import ImageGeneration, ImageInjection
from qwen.tokenizer import STOP_TOKENS, image_token, image_token_id


class Qwen2Model(ImageInjection, modeling_qwen2.Qwen2Model):
    """Qwen1.5, 2 and 2.5."""


class Qwen2ForCausalLM(ImageGeneration, modeling_qwen2.Qwen2ForCausalLM):
    """Qwen1.5, 2 and 2.5."""

    base_class = Qwen2Model


class Qwen3Model(ImageInjection, modeling_qwen3.Qwen3Model):
    """Qwen3, dense."""


class Qwen3ForCausalLM(ImageGeneration, modeling_qwen3.Qwen3ForCausalLM):
    """Qwen3, dense."""

    base_class = Qwen3Model


class Qwen2MoeModel(ImageInjection, modeling_qwen2_moe.Qwen2MoeModel):
    """Qwen1.5-MoE and Qwen2-MoE: routed experts and a shared one."""


class Qwen2MoeForCausalLM(ImageGeneration, modeling_qwen2_moe.Qwen2MoeForCausalLM):
    """Qwen1.5-MoE and Qwen2-MoE."""

    base_class = Qwen2MoeModel


class Qwen3MoeModel(ImageInjection, modeling_qwen3_moe.Qwen3MoeModel):
    """Qwen3-MoE: routed experts only."""


class Qwen3MoeForCausalLM(ImageGeneration, modeling_qwen3_moe.Qwen3MoeForCausalLM):
    """Qwen3-MoE."""

    base_class = Qwen3MoeModel


class LlamaModel(ImageInjection, modeling_llama.LlamaModel):
    """Llama's layout with ChatML prompts, such as SmolLM2."""


class LlamaForCausalLM(ImageGeneration, modeling_llama.LlamaForCausalLM):
    """Llama's layout with ChatML prompts, such as SmolLM2."""

    base_class = LlamaModel


class QWenModel(Qwen2Model):
    """Qwen v1: equal to the original code up to the trained length, an error beyond it.

    Beyond `seq_length` the original scales queries (log-n attention) and the rotary base (dynamic NTK). Neither is
    implemented here, so the logits would be wrong without any notice.
    """

    config_class = QWenConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_features: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run Qwen2Model's forward. InputError: a position is beyond `seq_length`."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        length = max(lengths) if lengths else given.shape[1]
        if past_key_values is not None:
            length += past_key_values.get_seq_length()
        if length > self.config.max_position_embeddings:  # else no position can be too large, and none need be read
            # Positions restart in packed documents: only the longest document counts.
            length = length if position_ids is None else int(position_ids.max()) + 1
            refuse_past_seq_length(length, self.config)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_features=image_features,
            lengths=lengths,
            **kwargs,
        )


class QWenLMHeadModel(Qwen2ForCausalLM):
    """Qwen v1."""

    config_class = QWenConfig
    base_class = QWenModel
    # Constants in early checkpoints; the original code ignores the first and recomputes the second.
    _keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias$", r"rotary_emb\.inv_freq$"]

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        # Checked before the first token: an error in the middle of an answer would lose the answer.
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        refuse_past_seq_length(generation_config.max_length, self.config, prompt=input_ids_length)


def refuse_past_seq_length(length: int, config: PreTrainedConfig, prompt: int | None = None) -> None:
    """Raise InputError if `length` tokens exceed v1's `seq_length`; `prompt` of them are given, the rest is generated."""
    limit = config.max_position_embeddings
    if length > limit:
        tokens = f"{length} tokens" if prompt is None else f"{prompt} prompt and {length - prompt} new tokens"
        raise InputError(
            f"Qwen v1: {tokens}, but seq_length is {limit}, and the scaling beyond it (log-n attention, dynamic NTK) is "
            "not implemented. Shorten the text, or lower max_length (training) or max_new_tokens (answering)."
        )


# `model_type` in config.json -> class.
LANGUAGE_MODELS = {
    "qwen": QWenLMHeadModel,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen2_moe": Qwen2MoeForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "llama": LlamaForCausalLM,
}


# transformers' implementation of a mixture of experts: plain products per expert, which autocast runs in half precision.
# Its grouped products would run in float32 where the weights are trained in float32.
EXPERTS = "eager"


def load_language_model(
    path: str | Path, dtype: torch.dtype | str | None = None, attn_implementation: str = PACKED_SDPA
) -> PreTrainedModel:
    """Load one of LANGUAGE_MODELS from a local folder or hub name, in eval mode. Only safetensors are read.

    dtype: a torch dtype or its name; None keeps the checkpoint's. attn_implementation: a name of transformers ("sdpa",
    "eager", "flash_attention_2", ...) or PACKED_SDPA, which is sdpa that also takes documents packed into a row.
    Call `attach_tokenizer` before using images or `generate`.

    InputError: weights are missing, unexpected or have another shape (a tied lm_head may be absent); the path does not
    exist; the model type is not in LANGUAGE_MODELS; the weights are quantised; or transformers refuses the model, for
    example because the package of the attention is not installed.
    """
    path = str(path)
    refuse_pointers(path)
    if not Path(path).is_dir() and not is_hub_name(path):
        raise InputError(
            f"language model {path}: folder does not exist. Give a folder with config.json, or a hub name."
        )
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
        if "model_type" not in config:
            raise InputError(
                f"language model {path}: config.json with a model_type not found. Give a model's own folder."
            )
        if config.get("quantization_config"):
            raise InputError(
                f"language model {path}: config.json has a quantization_config, but quantised weights (AWQ, GPTQ, FP8, "
                "...) are not supported. Use the unquantised release of the model."
            )
        model_class: Any = choose(LANGUAGE_MODELS, config["model_type"], f"language model {path}, model_type")
        check_config(path, config, model_class.config_class)
        loaded: Any = model_class.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            experts_implementation=EXPERTS,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
        )
        model, report = loaded  # a pair with output_loading_info, against its annotation
    except (OSError, SafetensorError) as error:
        raise InputError(f"language model {path}: cannot be read. {_reason(error)} {how_to_convert(path)}") from error
    except (ImportError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"language model {path}: cannot be loaded. {_reason(error)}") from error
    mismatched = [
        f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]
    ]
    wrong = {
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "of another shape": mismatched,
    }
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names]
    if found:
        raise InputError(
            f"language model {path}: weights do not fit {model_class.__name__}: {'; '.join(found)}. "
            "Download the folder again, or use another model."
        )
    return model.eval()


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _some(names: Iterable[str], shown: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


IMAGE_ATTENTION = ("causal", "mixed")


def set_image_attention(model: PreTrainedModel, kind: str) -> None:
    """Set `model.config.image_attention`; call it once, before PEFT wraps the model.

    `causal`: every token attends to the tokens before it. `mixed`: the tokens of one image attend to each other as well.
    InputError: another word, or `mixed` for a model with a sliding window.
    """
    choose(dict.fromkeys(IMAGE_ATTENTION), kind, "model.attention")
    if kind == "mixed" and getattr(model.config, "use_sliding_window", False) and model.config.sliding_window:
        raise InputError(
            '"model.attention" is mixed, but this language model attends to only the last '
            f"{model.config.sliding_window} tokens in some of its layers, which is not supported; set it to causal."
        )
    model.config.image_attention = kind


def attach_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the token ids that `model` needs: image, stop and padding. Call it once, before PEFT wraps the model.

    Sets `model.config.image_token_id` and a new `model.generation_config` with both stop tokens, the padding token and the
    image token as one that is never generated. The sampling settings and the repetition penalty that a chat model was
    released with are dropped.
    InputError: the tokenizer has ids without an embedding in the model (the image token needs none).
    """
    image_id = image_token_id(tokenizer)
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    highest = max(index for token, index in tokenizer.get_vocab().items() if token != image_token(tokenizer))
    if highest >= rows:
        raise InputError(
            f"the tokenizer's ids go up to {highest}, but the language model has {rows} embeddings; "
            "take the tokenizer from the model's own folder."
        )
    model.config.image_token_id = image_id
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(STOP_TOKENS),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[image_id],
    )
