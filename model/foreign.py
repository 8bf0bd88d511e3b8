"""Read what other projects' training leaves: a projector and LoRA, as files of tensors. Nothing is executed: PyTorch's files
are read with weights_only=True, and only named files are opened.

    adapter_model.bin, other_params.bin            the Qwen v1 ancestor of this project
    adapter_model.*, non_lora_trainables.bin       LLaVA trained with LoRA
    mm_projector.bin                               LLaVA's first stage: two layers, or one
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from config import InputError
from model.checkpoint import read_tensors
from model.checkpoint_folder import read_json

ANCESTOR_PROMPT = "你是一位图像理解助手。"
# layer of Qwen v1 -> layers of this project, whose rows it joins
QWEN1_LAYERS = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
# keys of adapter_config.json that change what LoRA's two matrices compute -> the values that this project's LoRA has
PLAIN_LORA = {
    "peft_type": ("LORA",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None, []),
    "lora_bias": (False,),
}
ADVICE = "use a folder that is complete and undamaged"


@dataclass(frozen=True)
class Foreign:
    """A projector, and LoRA if there is some, under this project's names.

    projector: `linear_1.weight`, ... lora: module of the language model -> (A [r, in], B [out, r]). settings: keys of the
    section `model` that the weights were trained with. notes: what else a user must know.
    """

    kind: str
    projector: dict[str, Tensor]
    lora: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    r: int = 0
    alpha: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """The width between the projector's layers."""
        return self.projector["linear_1.weight"].shape[0]


def read_foreign(folder: Path) -> Foreign:
    """Read a folder of one of the known layouts. Raises InputError if it has none of them, or does not hold what it
    should."""
    if (folder / "other_params.bin").is_file():
        return _ancestor(folder)
    for name in ("non_lora_trainables.bin", "mm_projector.bin"):
        if (folder / name).is_file():
            return _llava(folder, folder / name)
    _refuse_nanovlm(folder)
    files = sorted(path.name for path in folder.iterdir())[:12] if folder.is_dir() else []
    raise InputError(
        f"{folder}: found {', '.join(files) or 'no files'}; expected other_params.bin with adapter_model.bin (this "
        "project's ancestor), non_lora_trainables.bin or mm_projector.bin (LLaVA), or a config.json of model_type llava (a "
        "llava-hf folder)."
    )


def _refuse_nanovlm(folder: Path) -> None:
    """Raise InputError, with the reason and what to train instead, for a checkpoint of nanoVLM."""
    values = read_json(folder / "config.json", ADVICE) if (folder / "config.json").is_file() else {}
    if isinstance(values, dict) and "mp_pixel_shuffle_factor" in values:
        raise InputError(
            f"{folder}: nanoVLM's checkpoint, which is not imported. Its projector (MP.proj.weight) reads every patch after "
            "the encoder's last norm, which no model.vision_features is. It belongs to an encoder and a language model that "
            "were trained with it and are stored in layouts of their own. Train a new projector instead, with "
            f"model.vision_tower {values.get('vit_model_type')!r:.120}, model.language_model "
            f"{values.get('lm_model_type')!r:.120}, model.projector pixel_shuffle and model.pixel_shuffle_factor "
            f"{values['mp_pixel_shuffle_factor']!r:.20}."
        )


def _ancestor(folder: Path) -> Foreign:
    tensors = read_pickled(folder / "other_params.bin")
    lora, r, alpha = _read_lora(folder)
    return Foreign(
        "the Qwen ancestor's checkpoint",
        _two_layers(tensors, folder / "other_params.bin", ""),
        lora,
        r=r,
        alpha=alpha,
        settings={"vision_feature_layer": -1, "vision_features": "normed_without_first"},
        system_prompt=ANCESTOR_PROMPT,
        notes=("features: after the encoder's last norm, without the first vector (model.vision_features)",),
    )


def _llava(folder: Path, path: Path) -> Foreign:
    values = read_json(folder / "config.json", ADVICE) if (folder / "config.json").exists() else {}
    tensors = read_pickled(path)
    is_linear = any(re.search(r"mm_projector\.(weight|bias)$", name) for name in tensors)
    kind = values.get("mm_projector_type", "linear" if is_linear else "mlp2x_gelu")
    if kind not in ("linear", "mlp2x_gelu"):
        raise InputError(
            f"{path}: the projector is of type {kind!r:.80}; only mlp2x_gelu, two linear layers with GELU, and linear have "
            "a counterpart here (model.projector mlp). Train a new projector instead."
        )
    if values.get("mm_use_im_start_end"):
        raise InputError(
            f"{folder}: trained with tokens around each image (mm_use_im_start_end), which are new rows of the embeddings "
            "and have no counterpart here."
        )
    if values.get("mm_vision_select_feature", "patch") != "patch":
        raise InputError(f"{folder}: trained with the encoder's class token as a patch, which has no counterpart here.")
    notes = [f"{key} was {values[key]}" for key in ("mm_vision_tower", "_name_or_path") if values.get(key)]
    if kind == "linear":
        notes.append("one linear layer, written as an mlp twice as wide that computes the same")
    lora: dict[str, tuple[Tensor, Tensor]] = {}
    r, alpha = 0, 0.0
    if (folder / "adapter_config.json").exists():
        lora, r, alpha = _read_lora(folder)
    else:
        notes.append("a projector alone: a warm start for another language model, a whole model only with its own")
    return Foreign(
        "LLaVA's checkpoint",
        (_one_layer if kind == "linear" else _two_layers)(tensors, path, "model.mm_projector."),
        lora,
        r=r,
        alpha=alpha,
        settings={"vision_feature_layer": int(values.get("mm_vision_select_layer", -2))},
        notes=tuple(notes),
    )


def _two_layers(tensors: Mapping[str, Tensor], path: Path, prefix: str) -> dict[str, Tensor]:
    """Return a Sequential of linear layer, GELU, linear layer as linear_1 and linear_2. Raises InputError unless the file
    holds these four tensors alone, and they fit together."""
    names = [f"{layer}.{part}" for layer in ("linear_1", "linear_2") for part in ("weight", "bias")]
    stored = [f"{prefix}{name.replace('linear_1', '0').replace('linear_2', '2')}" for name in names]
    result = dict(zip(names, _only(tensors, path, stored), strict=True))
    first, second = result["linear_1.weight"], result["linear_2.weight"]
    shapes = [tuple(result[f"linear_{layer}.bias"].shape) for layer in (1, 2)]
    fits = first.ndim == second.ndim == 2 and second.shape[1:] == first.shape[:1]
    if not fits or shapes != [first.shape[:1], second.shape[:1]]:
        raise InputError(
            f"{path}: layers of {list(first.shape)} and {list(second.shape)} do not fit together; {ADVICE}."
        )
    return result


def _one_layer(tensors: Mapping[str, Tensor], path: Path, prefix: str) -> dict[str, Tensor]:
    """Return a linear layer as the two of an MLP that compute the same, because GELU(z) - GELU(-z) = z. Raises InputError
    unless the file holds its two tensors alone, and they fit together."""
    weight, bias = _only(tensors, path, [f"{prefix}weight", f"{prefix}bias"])
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise InputError(f"{path}: {list(weight.shape)} and {list(bias.shape)} are not a linear layer's; {ADVICE}.")
    one = torch.eye(len(bias))
    return {
        "linear_1.weight": torch.cat([weight, -weight]),
        "linear_1.bias": torch.cat([bias, -bias]),
        "linear_2.weight": torch.cat([one, -one], dim=1),
        "linear_2.bias": torch.zeros(len(bias)),
    }


def _only(tensors: Mapping[str, Tensor], path: Path, wanted: list[str]) -> list[Tensor]:
    """Return the tensors named `wanted`, float32. Names in the file may begin with PEFT's `base_model.model.`. Raises
    InputError if one is missing, or if the file holds others."""
    found = {name.removeprefix("base_model.model.").removeprefix("module."): value for name, value in tensors.items()}
    if wrong := sorted(found.keys() ^ set(wanted)):
        raise InputError(
            f"{path}: {len(wrong)} tensors missing or unexpected: {', '.join(wrong[:12])}; expected {', '.join(wanted)}."
        )
    return [found[name].float() for name in wanted]


def _read_lora(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], int, float]:
    """Return LoRA's matrices by module, its rank and its alpha. Raises InputError for a variant of LoRA."""
    path = folder / "adapter_config.json"
    values = read_json(path, ADVICE)
    values = values if isinstance(values, dict) else {}
    for key, allowed in PLAIN_LORA.items():
        if key in values and values[key] not in allowed:
            raise InputError(f"{path}: {key} is {values[key]!r:.80}; expected plain LoRA ({allowed[0]!r}).")
    r, alpha = values.get("r"), values.get("lora_alpha")
    if type(r) is not int or not isinstance(alpha, (int, float)):
        raise InputError(f"{path}: r is {r!r:.40} and lora_alpha {alpha!r:.40}; expected numbers.")
    file = folder / "adapter_model.safetensors"
    tensors = read_tensors(file) if file.exists() else read_pickled(file := folder / "adapter_model.bin")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None:
            raise InputError(
                f"{file}: {name!r:.200} is not a matrix of LoRA; expected ...lora_A.weight and lora_B.weight."
            )
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    lora: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in found.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[:1] != (r,) or pair["B"].shape[1:] != (r,):
            raise InputError(f"{file}: {name}: expected a lora_A and a lora_B of rank {r}; {ADVICE}.")
        for module, b in _modules(name, pair["B"], file):
            lora[module] = pair["A"], b
    if not lora:
        raise InputError(f"{file}: holds no tensors; {ADVICE}.")
    return lora, r, float(alpha)


def _modules(name: str, b: Tensor, path: Path) -> list[tuple[str, Tensor]]:
    """Return the modules of this project that a foreign layer becomes, each with its rows of B."""
    if re.fullmatch(r"model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj", name):
        return [(name, b)]
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    if match is None or match[2] not in QWEN1_LAYERS:
        raise InputError(f"{path}: LoRA on {name!r:.200}, which is no linear layer of a Qwen language model.")
    modules = QWEN1_LAYERS[match[2]]
    return [
        (f"model.layers.{match[1]}.{module}", rows) for module, rows in zip(modules, b.chunk(len(modules)), strict=True)
    ]


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch file, with PyTorch's reader that builds tensors and nothing else. Raises InputError if
    the file holds anything else, or a value that is not finite."""
    problem: str
    try:
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {ADVICE}.") from None
    except UnpicklingError:
        problem = "holds more than tensors, so it is not read: it could run code"
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        problem = f"damaged ({str(error).splitlines()[0] if str(error) else type(error).__name__:.120})"
    else:
        is_wrong: Callable[[Any], bool] = lambda value: not isinstance(value, Tensor) or not value.is_floating_point()  # noqa: E731
        if not isinstance(values, dict) or any(not isinstance(key, str) or is_wrong(values[key]) for key in values):
            problem = "not a dict of floating-point tensors"
        elif bad := [name for name, tensor in values.items() if not tensor.isfinite().all()]:
            problem = f"{bad[0]!r} is not finite (it holds NaN or infinity)"
        else:
            return {name: tensor.detach() for name, tensor in values.items()}
    raise InputError(f"{path}: {problem}; {ADVICE}.")
