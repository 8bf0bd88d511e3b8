"""The language models: transformers' Qwen2 and Qwen3, dense or with a mixture of experts, that take image features, and
Qwen v1 on top of Qwen2.

A family is one row of LANGUAGE_MODELS and two short classes, named as transformers names them, so that a saved folder
says the usual architecture and other tools load it. Attention, cache, `generate`, quantisation and PEFT stay the
library's. No image encoder, projector or prompt is known here.
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from config import InputError, choose, how_to_convert
from qwen.attention import PACKED_SDPA
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
    """Qwen1.5-MoE and Qwen2-MoE: routed experts and one that every token passes."""


class Qwen2MoeForCausalLM(ImageGeneration, modeling_qwen2_moe.Qwen2MoeForCausalLM):
    """Qwen1.5-MoE and Qwen2-MoE."""

    base_class = Qwen2MoeModel


class Qwen3MoeModel(ImageInjection, modeling_qwen3_moe.Qwen3MoeModel):
    """Qwen3-MoE: routed experts alone."""


class Qwen3MoeForCausalLM(ImageGeneration, modeling_qwen3_moe.Qwen3MoeForCausalLM):
    """Qwen3-MoE."""

    base_class = Qwen3MoeModel


class QWenModel(Qwen2Model):
    """Qwen v1, equal to the original code up to the trained length and refused beyond it.

    Past `seq_length` the original scales queries (log-n attention) and the rotary base (dynamic NTK); without these
    the logits would be silently wrong.
    """

    config_class = QWenConfig

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        lengths=None,
        **kwargs,
    ):
        """As Qwen2Model's. InputError if a position lies past `seq_length`."""
        length = max(lengths) if lengths else (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if past_key_values is not None:
            length += past_key_values.get_seq_length()
        if length > self.config.max_position_embeddings:  # else no position can be too large: nothing to look up
            # Packed documents restart their positions: only the longest document counts.
            length = length if position_ids is None else int(position_ids.max()) + 1
            refuse_past_seq_length(length, self.config)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            lengths=lengths,
            **kwargs,
        )


class QWenLMHeadModel(Qwen2ForCausalLM):
    """Qwen v1."""

    config_class = QWenConfig
    base_class = QWenModel
    # Constants that early checkpoints carry; the original code ignores the first and recomputes the second.
    _keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias$", r"rotary_emb\.inv_freq$"]

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        # Before the first token: a refusal in the middle of an answer would lose the answer.
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)
        refuse_past_seq_length(generation_config.max_length, self.config, prompt=input_ids_length)


def refuse_past_seq_length(length: int, config: QWenConfig, prompt: int | None = None) -> None:
    """InputError if `length` tokens (of which `prompt` are given and the rest generated) exceed v1's `seq_length`."""
    limit = config.max_position_embeddings
    if length > limit:
        tokens = f"{length} tokens" if prompt is None else f"{prompt} prompt and {length - prompt} new tokens"
        raise InputError(
            f"Qwen v1: {tokens}, but seq_length is {limit} and what follows it (log-n attention, dynamic NTK) is not "
            "implemented. Shorten the text, or lower max_length (training) or max_new_tokens (answering)."
        )


# `model_type` in config.json -> class.
LANGUAGE_MODELS = {
    "qwen": QWenLMHeadModel,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen2_moe": Qwen2MoeForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}


# How transformers computes a mixture of experts: each expert's tokens as plain products, which autocast takes to half
# precision. Its grouped products would stay in float32 where the weights train in that.
EXPERTS = "eager"


def load_language_model(path: str, dtype=None, attn_implementation: str = PACKED_SDPA) -> PreTrainedModel:
    """A local folder or a hub name -> one of LANGUAGE_MODELS, in eval mode.

    dtype: a torch dtype or its name; None keeps the checkpoint's. attn_implementation: transformers' names ("sdpa",
    "eager", "flash_attention_2", ...); by default sdpa that also takes documents packed into a row.
    Only safetensors are read.
    Every weight is accounted for: InputError names those that are missing, unexpected or of another shape (a tied
    lm_head may be absent). InputError also for an unknown path, a model type that is not in LANGUAGE_MODELS, quantised
    weights, and what transformers refuses, such as an attention whose package is not installed.
    Call `attach_tokenizer` before images or `generate` are used.
    """
    path = str(path)
    is_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) is not None
    if not Path(path).is_dir() and not is_hub_name:
        raise InputError(f"language model {path}: no such folder. Give a folder with config.json, or a hub name.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
        if "model_type" not in config:
            raise InputError(
                f"language model {path}: no config.json with a model_type in it. Give a model's own folder."
            )
        if config.get("quantization_config"):
            raise InputError(
                f"language model {path}: config.json has a quantization_config, but quantised weights (AWQ, GPTQ, FP8, "
                "...) are not read. Take the unquantised release of the model."
            )
        model_class = choose(LANGUAGE_MODELS, config["model_type"], f"language model {path}, model_type")
        model, report = model_class.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            experts_implementation=EXPERTS,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused below
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"language model {path}: cannot be read. {_reason(error)} {how_to_convert(path)}") from error
    except (ImportError, ValueError) as error:
        raise InputError(f"language model {path}: cannot be loaded. {_reason(error)}") from error
    mismatched = [
        f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in report["mismatched_keys"]
    ]
    wrong = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "of another shape": mismatched}
    found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in wrong.items() if names]
    if found:
        raise InputError(
            f"language model {path}: weights do not fit {model_class.__name__}: {'; '.join(found)}. "
            "Download the folder again, or choose another model."
        )
    return model.eval()


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _some(names, shown: int = 6) -> str:
    names = sorted(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


IMAGE_ATTENTION = ("causal", "mixed")


def set_image_attention(model: PreTrainedModel, kind: str) -> None:
    """`causal`: every token sees what stands before it. `mixed`: the tokens of one image see each other as well. Call it
    once, before PEFT wraps the model. InputError: another word, or mixed where layers see only the last tokens."""
    choose(dict.fromkeys(IMAGE_ATTENTION), kind, "model.attention")
    if kind == "mixed" and getattr(model.config, "use_sliding_window", False) and model.config.sliding_window:
        raise InputError(
            f'"model.attention" is mixed, but this language model sees only the last {model.config.sliding_window} tokens '
            "in some of its layers, which is not combined with it; set it to causal."
        )
    model.config.image_attention = kind


def attach_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tell `model` the ids that it must know: where images stand, where an answer stops, what pads.

    Sets `model.config.image_token_id`, and a new `model.generation_config` with both stop tokens, the padding token and
    the image token as one that is never generated: the sampling and the repetition penalty that a chat model was
    released with are not taken over. Call it once, before PEFT wraps the model.
    InputError if the tokenizer has ids for which the model has no embedding (the image token needs none).
    """
    image_id = image_token_id(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
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
