"""An exported LLaVA folder as this project's model, so that test.py asks it as it asks a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, LlavaForConditionalGeneration
from transformers.utils import logging as transformers_logging

import qwen
from config import InputError
from model.build import Built
from model.checkpoint_folder import read_json
from model.model import VisionLanguageModel
from model.projector import build_projector
from model.start import EXPORT
from model.trainable import WeightOrigins
from qwen.attention import PACKED_SDPA
from visual.encoders import ENCODERS, VisionTower
from visual.processor import load_image_processor


def is_export(folder: Path) -> bool:
    """Return whether `model.export` wrote `folder`."""
    return _export_format(folder) is not None


def refuse_gguf(folder: Path) -> None:
    """Raise InputError if `folder` is an export in GGUF files, which llama.cpp opens."""
    if _export_format(folder) == "gguf":
        raise InputError(
            f"{folder}: GGUF files, which llama.cpp, Ollama and llama-cpp-python open (see its README.md); for this "
            "project export the checkpoint with --format llava or native."
        )


def _export_format(folder: Path) -> str | None:
    path = folder / EXPORT
    values = read_json(path, "export again") if path.exists() else None
    return str(values.get("format")) if isinstance(values, dict) else None


def open_llava(folder: Path, dtype: torch.dtype) -> Built:
    """Build the model of an exported LLaVA folder, in eval mode. Raises InputError for weights that do not fit."""
    config = read_json(folder / "config.json", "export again")
    stock = load_stock(folder, dtype, advice="export again")
    max_tokens = read_json(folder / EXPORT, "export again").get("max_tokens")
    built = built_of(stock, folder, dict(config["text_config"]), max_tokens=max_tokens)
    lm = built.model.causal_lm
    lm.generation_config.suppress_tokens = GenerationConfig.from_pretrained(folder).suppress_tokens
    return built


def load_stock(folder: Path, dtype: torch.dtype | str, advice: str) -> Any:
    """Load a LLaVA folder with stock transformers. Raises InputError, which ends with `advice`, for weights that do not
    fit."""
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: cannot be loaded ({' '.join(str(error).split()):.300}); {advice}.") from error
    stock, report = loaded
    faults = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys") if report[key]}
    if faults:
        raise InputError(
            f"{folder}: weights do not fit config.json: "
            + "; ".join(f"{key.replace('_', ' ')} {', '.join(names)}" for key, names in faults.items())
            + f". {advice.capitalize()}."
        )
    return stock


def built_of(stock: Any, folder: Path, text: dict, max_tokens: int | None) -> Built:
    """Build this project's model of the weights of stock LLaVA, which it takes over.

    folder: with tokenizer and preprocessor_config.json. text: the language model's config.
    """
    tokenizer = qwen.load_tokenizer(folder, any_kind=True)
    image_processor = load_image_processor(folder)
    encoder = stock.model.vision_tower
    tower = VisionTower(
        encoder,
        ENCODERS[encoder.config.model_type],
        stock.config.vision_feature_layer,
        image_size=image_processor.image_size,
    )
    projector = build_projector(
        "mlp", in_features=tower.hidden_size, hidden_size=None, out_features=text["hidden_size"]
    )
    state = stock.model.multi_modal_projector.float().state_dict()
    projector.load_state_dict(dict(projector.named_buffers()) | state)

    model_class: Any = qwen.LANGUAGE_MODELS[text["model_type"]]
    with torch.device("meta"):
        lm = model_class(model_class.config_class.from_dict(text | {"attn_implementation": PACKED_SDPA}))
    inner = stock.model.language_model
    weights = {f"model.{name}": tensor for name, tensor in inner.state_dict().items()}
    lm.load_state_dict(weights | {"lm_head.weight": stock.lm_head.weight}, assign=True)
    lm.tie_weights()
    lm.model.rotary_emb = inner.rotary_emb  # its tables are no part of the state
    qwen.set_image_attention(lm, "causal")
    qwen.attach_tokenizer(lm, tokenizer)
    model = VisionLanguageModel(tower, projector, lm.eval()).requires_grad_(False).eval()
    return Built(
        tokenizer,
        image_processor,
        tower.num_image_tokens,
        max_tokens=max_tokens,
        model=model,
        origins=WeightOrigins.new(model, from_scratch=False),
        is_projector_new=False,
    )
