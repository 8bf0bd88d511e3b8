"""A trained model as GGUF files for llama.cpp and the tools around it: the language model, and mmproj, which holds encoder
and projector. Keys, names and the order of values are those of llama.cpp's convert_hf_to_gguf.py and of its LLaVA graph.

    model.gguf      language model, LoRA merged, with tokenizer and chat template
    mmproj.gguf     encoder up to the feature layer, and projector
    Modelfile       for `ollama create NAME -f Modelfile`
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from config import InputError, ModelConfig
from model.export.gguf_keys import Keys, language_model_keys, mmproj_keys, text_config_of
from model.export.llava import DTYPES, Prompts, grown
from model.export.weights import Trained, Weight, held, tower_weights
from visual.encoders import ENCODERS, VisionTower
from visual.tower import geometry

LANGUAGE_MODEL, MMPROJ, MODELFILE = "model.gguf", "mmproj.gguf", "Modelfile"
KINDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # --dtype -> type of the matrices in a file
QUANTIZED = {"q8_0": "Q8_0", "f16": "F16"}  # --quantize -> the same
BLOCK = 32  # values of a row that Q8_0 scales together
CLASS_TOKEN_ISSUE = "https://github.com/ggml-org/llama.cpp/issues/25814"


def need_gguf() -> None:
    """Raise InputError if the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            "--format gguf needs the package gguf, which is not installed: python -m pip install -r requirements-gguf.txt"
        )


def refuse_encoder(settings: ModelConfig, allow_class_token: bool) -> None:
    """Raise InputError, with the reason, for an encoder that llama.cpp's LLaVA graph computes otherwise."""
    values, _ = PreTrainedConfig.get_config_dict(settings.vision_tower)
    kind = str(values.get("model_type"))
    found = f'model.vision_tower {settings.vision_tower} (model_type "{kind}") cannot be exported as GGUF'
    instead = "Train with a SigLIP or SigLIP 2 encoder instead, or export with --format llava or native."
    if kind == "dinov2":
        raise InputError(f"{found}: llama.cpp's LLaVA graph has no layer scale, which DINOv2 needs. {instead}")
    if kind.startswith("clip") and not allow_class_token:
        raise InputError(
            f"{found}: llama.cpp appends the class token after the patches, where CLIP has it before them, so about one "
            f"answer in five changes ({CLASS_TOKEN_ISSUE}). {instead} Add --allow-class-token to write the files for a "
            "llama.cpp in which this is fixed."
        )


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file: `weight.read()`, rearranged by `arrange`, stored as `kind` (a GGMLQuantizationType)."""

    name: str
    weight: Weight
    kind: str
    arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor
    restore: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def encode(self) -> np.ndarray:
        """Return the bytes of the file. Raises InputError if a value is too large for the type."""
        import gguf

        values = self.arrange(self.weight.read().detach().float()).contiguous().numpy()
        if self.kind == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise InputError(
                f"{self.weight.name}: holds a value that F16 cannot represent; export with --dtype bf16 or fp32."
            )
        return gguf.quantize(values, gguf.GGMLQuantizationType[self.kind])


def write_gguf(folder: Path, trained: Trained, prompts: Prompts, *, kind: str) -> None:
    """Write both files and the Modelfile, a tensor in memory at a time (and the encoder).

    kind: a value of KINDS or QUANTIZED. Raises InputError for what llama.cpp computes otherwise or cannot read.
    """
    text, processors, layer = text_config_of(trained), trained.processors, trained.settings.vision_feature_layer
    tensors = language_model_tensors(text, trained.language_model.weights(), kind=kind)
    keys = language_model_keys(text, processors, prompts)
    write_file(folder / LANGUAGE_MODEL, str(text["model_type"]), keys, tensors=tensors, kind=kind)
    tower, kind = trained.tower(), mmproj_kind(kind)
    keys = mmproj_keys(tower, layer, text["hidden_size"], processors=processors)
    tensors = mmproj_tensors(tower, layer, trained.projector(projector_dtype(kind)), kind=kind)
    write_file(folder / MMPROJ, "clip", keys, tensors=tensors, kind=kind)
    (folder / MODELFILE).write_text(modelfile(prompts), encoding="utf-8")


def mmproj_kind(kind: str) -> str:
    """Return the type of encoder and projector: F16 below a language model of fewer bits, as llama.cpp's tools do."""
    return "F32" if kind == "F32" else "F16"


def projector_dtype(kind: str) -> torch.dtype:
    """Return the type to which the projector is rounded while it is folded."""
    return DTYPES["fp32" if kind == "F32" else "fp16"]


def modelfile(prompts: Prompts) -> str:
    """Return Ollama's description of the model: both files, ChatML, greedy answers."""
    system = "" if prompts.system_prompt is None else f'SYSTEM """{prompts.system_prompt}"""\n'
    return (
        f"FROM ./{LANGUAGE_MODEL}\nFROM ./{MMPROJ}\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
        '<|im_start|>assistant\n"""\n'
        f'{system}PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
        f"PARAMETER num_predict {prompts.max_new_tokens}\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def language_model_tensors(text: dict, weights: Iterable[Weight], kind: str) -> list[FileTensor]:
    """Return the tensors of model.gguf. weights: under transformers' names. text: the language model's config."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == text["model_type"])
    names = gguf.get_tensor_name_map(arch, text["num_hidden_layers"])
    found = []
    for weight in weights:
        name = names.get_name(weight.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"language model: llama.cpp has no tensor for {weight.name!r}; export with --format llava."
            )
        if weight.name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = grown(weight, text["vocab_size"])
        tensor = FileTensor(name, weight, _kind(weight.shape, kind))
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
        if text["model_type"] == "llama" and heads:
            tensor = _interleaved(tensor, text[heads])
        found.append(tensor)
    return found


def mmproj_tensors(tower: VisionTower, feature_layer: int, projector: dict[str, Tensor], kind: str) -> list[FileTensor]:
    """Return the tensors of mmproj.gguf: no layer above the feature layer, no norm after it."""
    import gguf

    config = tower.model.config
    depth = geometry(ENCODERS[config.model_type], config, feature_layer)[0]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.num_hidden_layers)
    found = []
    for weight in tower_weights(tower, prefix="vision_tower."):
        if any(f".{part}." in weight.name for part in ("head", "post_layernorm")) or "position_ids" in weight.name:
            continue
        name = names.get_name(weight.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"encoder: llama.cpp has no tensor for {weight.name!r}; export with --format llava.")
        block = name.removeprefix("v.blk.").split(".")[0]
        if block.isdecimal() and int(block) >= depth:
            continue
        found.append(FileTensor(name, weight, "F32" if "position_embd" in name else _kind(weight.shape, kind)))
    for name, tensor in projector.items():
        layer, _, part = name.partition(".")
        number = {"linear_1": 0, "linear_2": 2}[layer]
        found.append(FileTensor(f"mm.{number}.{part}", held(name, tensor), _kind(tuple(tensor.shape), kind)))
    return found


def _kind(shape: Sequence[int], kind: str) -> str:
    """Return the type of a tensor in a file of `kind`: vectors stay F32."""
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % BLOCK else kind


def _interleaved(tensor: FileTensor, heads: int) -> FileTensor:
    """Return a Llama's query or key layer with the pairs that rotary embeddings turn side by side, as llama.cpp has them."""

    def arrange(values: Tensor) -> Tensor:
        return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def restore(values: Tensor) -> Tensor:
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    return FileTensor(tensor.name, tensor.weight, tensor.kind, arrange=arrange, restore=restore)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_file(path: Path, arch: str, keys: Keys, *, tensors: Sequence[FileTensor], kind: str) -> None:
    """Write a GGUF file, one tensor in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = gguf.LlamaFileType
    writer.add_file_type(types.ALL_F32 if kind == "F32" else types[f"MOSTLY_{kind}"])
    for method, value in keys:
        if method == "add_feature_layers":  # the package has no method for it
            writer.add_array("clip.vision.feature_layer", value)
        else:
            getattr(writer, method)(value)
    for tensor in tensors:
        form = gguf.GGMLQuantizationType[tensor.kind]
        block, size = gguf.GGML_QUANT_SIZES[form]
        count = torch.Size(tensor.weight.shape).numel() // block * size
        writer.add_tensor_info(tensor.name, tensor.weight.shape, np.dtype(np.float32), count, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.encode())
    writer.close()
