"""Language models of the Qwen family that take image features.

Importing this package registers the model type `qwen` (Qwen v1) with transformers: afterwards
`AutoModelForCausalLM.from_pretrained(<Qwen v1 folder>)` needs no remote code.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from qwen.configuration import WEIGHTS, QWenConfig, longest_input, trained_length
from qwen.lora import lora_target_modules
from qwen.modeling import (
    LANGUAGE_MODELS,
    QWenLMHeadModel,
    QWenModel,
    attach_tokenizer,
    load_language_model,
    set_image_attention,
)
from qwen.scratch import new_language_model
from qwen.tokenizer import encode_text, image_token, image_token_id, load_tokenizer

register_checkpoint_conversion_mapping(QWenConfig.model_type, WEIGHTS, overwrite=True)
# Without this, the library joins the weights of the routed experts for its own classes only.
for family in ("qwen2_moe", "qwen3_moe"):
    register_checkpoint_conversion_mapping(family, get_checkpoint_conversion_mapping(family), overwrite=True)
AutoConfig.register(QWenConfig.model_type, QWenConfig, exist_ok=True)
AutoModel.register(QWenConfig, QWenModel, exist_ok=True)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)

__all__ = [
    "LANGUAGE_MODELS",
    "attach_tokenizer",
    "encode_text",
    "image_token",
    "image_token_id",
    "load_language_model",
    "load_tokenizer",
    "longest_input",
    "lora_target_modules",
    "new_language_model",
    "set_image_attention",
    "trained_length",
]
