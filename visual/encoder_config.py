"""Read an encoder's config.json, which may come from a stranger, and refuse what would fail or fill the memory later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from config import InputError

# Far beyond any released encoder: key -> (smallest, largest). A key that a family does not have is not checked.
BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 2**14),
    "num_hidden_layers": (1, 2**9),
    "num_attention_heads": (1, 2**9),
    "intermediate_size": (1, 2**17),
    "mlp_ratio": (1, 2**6),
    "num_register_tokens": (0, 2**10),
    "num_channels": (3, 3),  # images are RGB
    "patch_size": (1, 2**9),
    "image_size": (1, 2**13),
    # of convolutional networks
    "embedding_size": (1, 2**14),
    "stem_size": (1, 2**14),
    "hidden_sizes": (1, 2**14),
    "head_size": (1, 2**14),
    "depths": (1, 2**7),
    "strides": (1, 2),
    "kernel_sizes": (1, 31),
    "expansions": (1, 2**6),
    "num_stages": (1, 2**3),
    "depth_multiplier": (0.01, 2**3),
    "expand_ratio": (0.01, 2**6),
    "depth_divisible_by": (1, 2**10),
    "min_depth": (1, 2**10),
    "output_stride": (1, 2**5),
    "batch_norm_eps": (1e-9, 1.0),
}
STAGES = ("hidden_sizes", "depths", "strides", "kernel_sizes", "expansions")  # lists: a number for each stage
FRACTIONS = ("depth_multiplier", "expand_ratio", "batch_norm_eps")
ATTENTIONS = (None, "eager", "sdpa")  # others name packages, or kernels that transformers would download


def read_config(path: str | Path, values: dict, config_class: type[PretrainedConfig]) -> PretrainedConfig:
    """Return the config of the encoder in a folder or hub repository. values: the content of its config.json.

    InputError: a size is not a whole number or out of bounds; sizes do not fit together; the attention is not transformers'
    own; or transformers refuses the config.
    """
    where = f"vision_tower {path}: config.json"
    for part in (values, values.get("vision_config")):
        for key in ("attn_implementation", "_attn_implementation"):
            if isinstance(part, dict) and part.get(key) not in ATTENTIONS:
                raise InputError(f"{where}: {key} is {part[key]!r:.80}; remove it, or give sdpa or eager.")
    try:
        config: Any = config_class.from_pretrained(path)
    except Exception as error:  # its validation raises nearly anything
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where}: cannot be used ({reason:.300}); download it again from the source of the weights."
        ) from error
    config.name_or_path = str(path)  # for messages about the network that it describes
    for key in BOUNDS:
        if hasattr(config, key):
            _check_number(where, key, getattr(config, key))
    if hasattr(config, "num_attention_heads") and config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{where}: hidden_size {config.hidden_size} cannot be divided into {config.num_attention_heads} heads "
            "(num_attention_heads); download the file again."
        )
    if getattr(config, "hidden_act", "relu") not in ACT2FN:
        raise InputError(
            f"{where}: hidden_act {config.hidden_act!r:.80} is unknown to transformers; download it again."
        )
    if config.dtype is not None and not (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point):
        raise InputError(f"{where}: dtype is {config.dtype!r:.80}; expected float32, bfloat16 or float16.")
    return config


def _check_number(where: str, key: str, found: Any) -> None:
    """Raise InputError unless the value of a key of BOUNDS is a number, or as many as the key allows, within its bounds."""
    low, high = BOUNDS[key]
    is_list = isinstance(found, (list, tuple)) and key.endswith((*STAGES, "patch_size", "image_size"))
    numbers = found if is_list else [found]
    kinds = (int, float) if key in FRACTIONS else (int,)
    many = 2**3 if key in STAGES else 2
    if 1 <= len(numbers) <= many and all(type(number) in kinds and low <= number <= high for number in numbers):
        return
    what = "a number" if key in FRACTIONS else "a whole number"
    expected = f"{what} from {low} to {high}" if low < high else str(low)
    listed = f", for each of at most {many} stages" if key in STAGES else ""
    raise InputError(f"{where}: {key} is {found!r:.80}; expected {expected}{listed}. Download the file again.")


def refuse_too_few_weights(path: str | Path, needed: int) -> None:
    """Raise InputError if the folder `path` certainly holds fewer weights than the `needed` ones of its config.json:
    transformers would make the missing ones, of any size. Weights are not read. A hub name is not checked."""
    held = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    if held and needed > held:  # a weight takes at least a byte
        raise InputError(
            f"vision_tower {path}: config.json describes at least {needed:,} weights, but the folder's safetensors files "
            f"have {held:,} bytes; download weights and config.json again from the same source."
        )


def fewest_weights(config: Any) -> int:
    """Return a number of weights that a vision transformer of this config certainly has."""
    width, patch, image = config.hidden_size, _smallest(config.patch_size), _smallest(config.image_size)
    positions = 0 if config.model_type == "dinov3_vit" else (image // patch) ** 2  # DINOv3 rotates instead
    feed_forward = getattr(config, "intermediate_size", width)
    return width * (3 * patch**2 + positions + config.num_hidden_layers * (4 * width + 2 * feed_forward))


def _smallest(side: Any) -> int:
    return side if isinstance(side, int) else min(side)
