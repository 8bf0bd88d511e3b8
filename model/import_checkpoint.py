"""Import another project's checkpoint.

    python -m model.import_checkpoint --from DIR --output DIR [model.vision_tower=FOLDER] [model.language_model=FOLDER]

The output is a checkpoint: test.py asks it, model.export exports it, and model.start_from names it to train on.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config, InputError, load_config, printable, run_script, to_yaml


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.import_checkpoint",
        description="Turn another project's checkpoint into one of this project.",
    )
    parser.add_argument("--from", dest="source", required=True, help="the folder with the other project's files")
    parser.add_argument(
        "--output", required=True, help="the checkpoint to write; a folder that does not exist or is empty"
    )
    parser.add_argument("--allow-download", action="store_true", help="download the models of the hub that are named")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.language_model=FOLDER")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("model.import_checkpoint.main_with_messages", lambda: parse_arguments(None))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import yaml
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from config.typed_yaml import FolderOrHub
from model.build import Built, save_processors, weight_files
from model.checkpoint import TensorFiles, save_trained
from model.checkpoint_folder import is_ours, read_json, write_folder
from model.export.llava import ENCODERS, TEXT_MODELS
from model.export.native import PARTS
from model.export.opened import built_of, is_export, load_stock
from model.export.weights import held, tower_weights, write_weights
from model.foreign import Foreign, read_foreign
from model.hub import hub_access
from qwen.configuration import released_name
from training.memory import explain_out_of_memory
from training.run import open_model, open_processors


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    source, output = Path(arguments.source).resolve(), Path(os.path.abspath(arguments.output))
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give --from the folder with the other project's files.")
    if is_ours(source):
        kind = "export" if is_export(source) else "checkpoint"
        raise InputError(
            f"{source}: is this project's {kind} already; use it as it is (model.start_from, --checkpoint)."
        )
    if os.path.lexists(output) and (output.is_symlink() or not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists and is not empty; name another --output, or move it away.")
    transformers.utils.logging.disable_progress_bar()
    path = source / "config.json"
    values = read_json(path, "use another folder") if path.exists() else {}
    is_llava_hf = isinstance(values, dict) and values.get("model_type") == "llava" and "mm_projector_type" not in values
    imported = LlavaFolder(source, output, arguments) if is_llava_hf else Adapter(source, output, arguments)
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        output.rmdir()  # an empty folder
    with hub_access(imported.config.model, imported.typed, arguments.allow_download):
        write_folder(output, imported.write)
    for line in imported.report:
        print(printable(line))
    print(printable(f"{output}: imported; ask it with sh test.sh --checkpoint {arguments.output}"))
    return 0


def make_config(output: Path, values: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return a checked config of an imported checkpoint: `values`, replaced by the user's. There is no data."""
    common = {
        "data": {"qa_file": str(output / "qa.jsonl")} | values.pop("data"),
        "output_dir": str(output),
        "train": {"projector_lr": 0.001} | values.pop("train"),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(common | values, allow_unicode=True), encoding="utf-8")
        return load_config(path, overrides)


class Adapter:
    """A projector, with or without LoRA, on top of models that the user names."""

    def __init__(self, source: Path, output: Path, arguments: argparse.Namespace) -> None:
        self.foreign: Foreign = read_foreign(source)
        self.output = output
        keys = {word.partition("=")[0] for word in arguments.overrides}
        if missing := [key for key in ("model.vision_tower", "model.language_model") if key not in keys]:
            notes = "".join(f" ({note})" for note in self.foreign.notes if " was " in note)
            raise InputError(
                f"{source}: {self.foreign.kind} does not hold its encoder and language model{notes}; name the ones that it "
                f"was trained with: {' '.join(f'{key}=FOLDER' for key in missing)}."
            )
        self.typed = {word.partition("=")[2] for word in arguments.overrides}
        foreign, modules = self.foreign, sorted({name.rpartition(".")[2] for name in self.foreign.lora})
        width = foreign.projector["linear_2.weight"].shape[0]
        hidden = None if foreign.hidden_size == width else foreign.hidden_size
        word = "lora" if foreign.lora else "frozen"
        values = {
            "data": {"system_prompt": foreign.system_prompt},
            "model": {"projector": "mlp", "projector_hidden_size": hidden, **foreign.settings},
            "train": {"trainable": {"language_model": word}} | ({"lora_lr": 0.0001} if foreign.lora else {}),
        }
        if foreign.lora:
            values["lora"] = {"r": foreign.r, "alpha": foreign.alpha, "target_modules": modules}
        config = make_config(output, values, arguments.overrides)
        if "model.vision_features" not in keys and _class_tokens(config.model.vision_tower):
            # the same features as the hidden state, of which an export exists
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, vision_features="hidden_state")
            )
        self.config = config
        self.report: list[str] = []

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files. Raises InputError if a tensor does not fit the models that were named."""
        processors = open_processors(self.config)
        built = open_model(self.config, "bf16", processors)
        projector = built.model.projector
        fill(dict(projector.named_parameters()), self.foreign.projector, "projector")
        matrices = {
            f"{name}.{part}": pair[i] for name, pair in self.foreign.lora.items() for i, part in enumerate("AB")
        }
        places = {
            f"{name}.{part}": getattr(module, f"lora_{part}")["default"].weight
            for name, module in built.model.causal_lm.named_modules()
            if isinstance(module, LoraLayer)
            for part in "AB"
        }
        fill(places, matrices, "LoRA")
        save(built, self.config, folder, output=self.output)
        model = self.config.model
        self.report = [
            f"{self.foreign.kind}: {', '.join(self.foreign.notes) or 'nothing left out'}",
            f"taken: projector (4 tensors), LoRA ({len(matrices)} matrices of rank {self.foreign.r})"
            if matrices
            else "taken: projector (4 tensors)",
            f"on top of: {model.vision_tower}, {model.language_model}",
        ]


def _class_tokens(vision_tower: str) -> bool:
    """Return whether an encoder is a CLIP, which has no norm after its last layer's patches."""
    return str(PreTrainedConfig.get_config_dict(vision_tower)[0].get("model_type")).startswith("clip")


def fill(places: dict[str, nn.Parameter], tensors: dict[str, Tensor], what: str) -> None:
    """Copy tensors into parameters of the same names and shapes. Raises InputError that lists all that do not fit."""
    missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    shapes = [
        f"{name} is {list(tensors[name].shape)}, the model has {list(places[name].shape)}"
        for name in sorted(places.keys() & tensors.keys())
        if places[name].shape != tensors[name].shape
    ]
    for problem, names in (("missing", missing), ("not in the model", unexpected), ("of another shape", shapes)):
        if names:
            more = f"; and {len(names) - 12} more" if len(names) > 12 else ""
            raise InputError(
                f"{what}: {len(names)} tensors {problem}: {'; '.join(names[:12])}{more}. It was trained with another "
                "encoder or language model than those named; name the ones that it was trained with."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


def save(built: Built, config: Config, folder: Path, output: Path) -> None:
    """Write what makes `folder` a checkpoint, whose place will be `output`."""
    (folder / "config.yaml").write_text(to_yaml(config, relative_to=output), encoding="utf-8")
    save_processors(built, folder)
    save_trained(built.model, dataclasses.replace(built.origins, random=frozenset()), folder)


class LlavaFolder:
    """A whole model in Hugging Face's LLaVA layout. A part that equals the one that the user names is not copied."""

    def __init__(self, source: Path, output: Path, arguments: argparse.Namespace) -> None:
        self.source, self.output = source, output
        self.stock: Any = None
        config = read_json(source / "config.json", "use another folder")
        refuse_other_llava(source, config)
        self.typed = {word.partition("=")[2] for word in arguments.overrides}
        words = {word.partition("=")[0]: word.partition("=")[2] for word in arguments.overrides}
        self.named = {part: words[f"model.{part}"] for part in PARTS if f"model.{part}" in words}
        parts = {part: str(output / part) for part in PARTS}
        values = {
            "data": {"system_prompt": None},
            "model": parts | {"projector": "mlp", "vision_feature_layer": config["vision_feature_layer"]},
            "train": {"trainable": {"language_model": "frozen"}},
        }
        self.config = make_config(output, values, arguments.overrides)
        self.report: list[str] = []

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files. Raises InputError for a folder that cannot be loaded."""
        stock = load_stock(self.source, "auto", advice="use a complete folder of model_type llava")
        text = stock.config.text_config.to_dict()
        built = built_of(stock, self.source, text, max_tokens=None)
        lm = built.model.causal_lm
        weights = [held(name, tensor) for name, tensor in lm.state_dict().items()]
        if lm.config.tie_word_embeddings:
            weights = [weight for weight in weights if weight.name != "lm_head.weight"]
        parts = {"vision_tower": tower_weights(built.model.vision_tower), "language_model": weights}
        model = self.config.model
        for part, tensors in parts.items():
            different = None
            if part in self.named:
                different = differing({w.name: w.read() for w in tensors}, str(getattr(model, part)))
                listed = "; ".join(different[:12]) + (
                    f"; and {len(different) - 12} more" if len(different) > 12 else ""
                )
                self.report.append(
                    f"{part}: {len(different)} of {len(tensors)} tensors differ from {getattr(model, part)}"
                    + (f", so its own are used: {listed}" if different else "")
                )
            if different != []:
                self._copy(part, tensors, built, folder)
                model = dataclasses.replace(model, **{part: FolderOrHub(self.output / part)})  # type: ignore[arg-type]
        copied = [part for part in PARTS if (folder / part).exists()]
        self.report.append(f"taken: projector (4 tensors){''.join(f', {part}' for part in copied)}")
        config = dataclasses.replace(self.config, model=model)
        if (theirs := stock.config.image_token_index) != (ours := built.model.causal_lm.config.image_token_id):
            self.report.append(f"image token: {theirs} there, {ours} here (its embedding is never used)")
        self.report.append(
            "prompts: ChatML, one line break after an image; another template there may have other blanks"
        )
        save(built, config, folder, output=self.output)

    def _copy(self, part: str, tensors: list, built: Built, folder: Path) -> None:
        (folder / part).mkdir()
        network = built.model.vision_tower.model if part == "vision_tower" else built.model.causal_lm
        write_weights(tensors, folder / part, network.dtype)
        network.config.save_pretrained(folder / part)
        if part == "vision_tower":
            built.image_processor.save(folder / part)
        else:
            built.tokenizer.save_pretrained(folder / part)


def refuse_other_llava(source: Path, config: dict) -> None:
    """Raise InputError for a llava-hf folder whose parts this project would compute otherwise."""
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    encoder = str(vision.get("model_type", "clip_vision_model"))
    wanted = "full" if ENCODERS.get(encoder) == 0 else "default"
    checks = {
        "text_config.model_type": (text.get("model_type"), tuple(kind for kind in TEXT_MODELS if kind != "qwen")),
        "vision_config.model_type": (encoder, tuple(ENCODERS)),
        "projector_hidden_act": (config.get("projector_hidden_act", "gelu"), ("gelu",)),
        "multimodal_projector_bias": (config.get("multimodal_projector_bias", True), (True,)),
        "vision_feature_select_strategy": (config.get("vision_feature_select_strategy", "default"), (wanted,)),
    }
    different = [
        f"{key} is {found!r:.80}, expected {' or '.join(map(str, allowed))}"
        for key, (found, allowed) in checks.items()
        if found not in allowed
    ]
    if type(config.get("vision_feature_layer")) is not int:
        different.append(f"vision_feature_layer is {config.get('vision_feature_layer')!r:.80}, expected one number")
    if different:
        raise InputError(f"{source}/config.json: parts that this project computes otherwise: {'; '.join(different)}.")


def differing(tensors: dict[str, Tensor], path: str) -> list[str]:
    """Return the names of tensors that are not, bit for bit, those of the released model in the folder `path`."""
    found = weight_files(path)
    if found is None:
        raise InputError(f"{path}: not a folder with config.json and safetensors files.")
    kind = str(read_json(found["config.json"], "use another model").get("model_type"))
    files = TensorFiles(file for name, file in found.items() if name != "config.json")
    different = []
    for name, tensor in tensors.items():
        own, part, parts = released_name(name, kind)
        alike = [n for n in (own, f"vision_model.{own}", own.removeprefix("vision_model.")) if n in files]
        if not alike or not torch.equal(files.read(alike[0]).chunk(parts)[part].to(tensor.dtype), tensor):
            different.append(name)
    return different


def main_with_messages() -> int:
    """Run `main`, with a message instead of a traceback when memory is full."""
    with explain_out_of_memory("The language model is loaded in bfloat16; import on a machine with more memory."):
        return main()
