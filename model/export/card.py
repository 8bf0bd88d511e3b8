"""The files beside an exported model's weights: its card, its portable config, and what was exported."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from config import DataConfig, InputError, LoraConfig, ModelConfig, TrainConfig
from model.checkpoint_folder import read_json

PRECISION_NOTE = "The proof is computed on a CPU in float32; other kernels and types round differently."


def portable_config(
    model: ModelConfig,
    data: DataConfig,
    answering: Mapping[str, Any],
    *,
    parts: tuple[str, str],
    precision: str,
    seed: int,
) -> str:
    """Return a config.yaml that opens the exported folder wherever it is: no path of this machine, nothing to train.

    answering: keys of the section `test`. parts: (vision_tower, language_model) relative to the folder.
    """
    kept = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("vision_tower", "language_model", "from_scratch", "start_from")
    }
    values = {
        "data": {"qa_file": "qa.jsonl", "max_length": data.max_length, "system_prompt": data.system_prompt},
        "model": {"vision_tower": parts[0], "language_model": parts[1], **kept},
        "output_dir": "run",
        "seed": seed,
        "train": {
            "trainable": {"language_model": "frozen"},
            "projector_lr": 0.001,
            "precision": precision,
        },
        "test": dict(answering),
    }
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


def part_name(path: str) -> str:
    """Return a hub name as it is, and of a folder its name."""
    return Path(path).name if os.path.isabs(path) else path


@dataclasses.dataclass(frozen=True)
class Story:
    """What a card tells of a run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig
    checkpoint: Path

    @property
    def parts(self) -> dict[str, str]:
        """Kind of part -> its name, with the licence that its own card names."""
        found = {"Image encoder": self.model.vision_tower}
        if self.model.language_model is not None:
            found["Language model"] = self.model.language_model
        return {kind: f"{part_name(str(path))} (licence: {licence_of(str(path))})" for kind, path in found.items()}

    def scores(self) -> dict[str, Any]:
        path = self.checkpoint / "scores.json"
        values = read_json(path) if path.exists() else {}
        return values if isinstance(values, dict) else {}

    def data_lines(self) -> list[str]:
        held_out = [source.name for source in self.data.sources if source.split == "validation"]
        others = [source.name for source in self.data.sources if source.split != "validation"]
        lines = [f"- Data: {', '.join(others) or 'one QA file'}"]
        return lines + ([f"- Held out: {', '.join(held_out)}"] if held_out else [])

    def recipe_lines(self) -> list[str]:
        """Return how long and how fast it trained; nothing of an imported checkpoint, which no run of this project made."""
        path, train = self.checkpoint / "run.json", self.train
        if not path.exists():
            return []
        processes = read_json(path)[-1].get("machine", {}).get("processes", 1)
        length = f"{train.num_train_epochs:g} epochs" if train.max_steps is None else f"{train.max_steps} steps"
        batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes
        rates = {key: value for key, value in vars(train).items() if key.endswith("_lr") and value}
        named = ", ".join(f"{key} {value:g}" for key, value in rates.items())
        return [f"- Recipe: {length} of batches of {batch}; {named}; weight_decay {train.weight_decay:g}"]


def licence_of(path: str) -> str:
    """Return the licence that the README.md of a model's folder declares."""
    card = Path(path) / "README.md"
    if card.is_file() and (found := re.search(r"^license:\s*(\S+)", card.read_text("utf-8", "replace"), re.MULTILINE)):
        return found[1]
    return "see its source"


def model_card(story: Story, *, format_name: str, dtype: str, proof: dict[str, Any]) -> str:
    """Return README.md: what the model is, its scores, how to use it, and what was proven."""
    named = [str(path) for path in (story.model.language_model, story.model.vision_tower) if path is not None]
    hub = [path for path in named if not os.path.isabs(path)]
    results = _eval_results(story.scores())
    front = ModelCardData(
        library_name={"llava": "transformers", "gguf": "gguf"}.get(format_name),
        pipeline_tag="image-text-to-text",
        base_model=hub or None,
        language=["en", "zh"],
        license="other",
        license_name="licences-of-both-parts",
        tags=None if format_name == "native" else ["llava"],
        model_name=" and ".join(map(part_name, named)) if results else None,
        eval_results=results,
    )
    words = ", ".join(f"{part} {word}" for part, word in vars(story.train.trainable).items())
    if story.train.trainable.language_model.kind == "lora":
        words += f", LoRA r {story.lora.r} alpha {story.lora.alpha:g}"
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        "# A vision-language model",
        "",
        *(f"- {kind}: {name}" for kind, name in story.parts.items()),
        f"- Projector: {story.model.projector}; features of layer {story.model.vision_feature_layer}; weights in {dtype}",
        f"- Trained: {words}",
        *story.recipe_lines(),
        *story.data_lines(),
        "",
        "The model may be used as the licences of both parts and of the data allow.",
        *_score_lines(story.scores()),
        "",
        "## Use",
        "",
        *USE[format_name],
        "",
        "## Proof",
        "",
        *(gguf_proof_lines(proof) if "tensors" in proof else _proof_lines(proof)),
        "",
        "## Limits",
        "",
        "- A special token that a user types, such as `<|im_end|>`, becomes that token in the chat template.",
        "- A user's text that begins with an empty line is tokenised differently from training if no image precedes it.",
    ]
    return "\n".join(lines) + "\n"


LLAVA_USE = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```""".splitlines()

NATIVE_USE = """In the repository of the project that trained it; no code of this folder is run:

```python
from model import load

print(load(FOLDER).answer("What is in the picture?", ["photo.jpg"]))
```""".splitlines()


GGUF_USE = """Images should have the encoder's size: llama.cpp pads other shapes, where this model was trained on crops or
squeezed images. Through Ollama, begin a question about an image with a line break, as in training.

```sh
llama-server -m model.gguf --mmproj mmproj.gguf
llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --jinja --temp 0 --image photo.png -p "
What is in the picture?"
ollama create my-model -f Modelfile
```

```python
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler

model = Llama("model.gguf", chat_handler=MTMDChatHandler("mmproj.gguf"), n_ctx=1024)
image = {"type": "image_url", "image_url": {"url": "file:///photo.png"}}
parts = [image, {"type": "text", "text": "What is in the picture?"}]
print(model.create_chat_completion([{"role": "user", "content": parts}], temperature=0, repeat_penalty=1))
```""".splitlines()

USE = {"llava": LLAVA_USE, "native": NATIVE_USE, "gguf": GGUF_USE}


def _eval_results(scores: dict[str, Any]) -> list[EvalResult] | None:
    """Return the scores in the form of the hub's model-index."""
    names = {"accuracy": "exact answers", "blind": "exact answers about swapped images"}
    found = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="held-out",
            dataset_name="held-out questions of the run",
            metric_type="exact_match",
            metric_name=name,
            metric_value=round(scores[key], 4),
        )
        for key, name in names.items()
        if scores.get(key) is not None
    ]
    return found or None


def _score_lines(scores: dict[str, Any]) -> list[str]:
    if "accuracy" not in scores:
        return []
    rows = [("all", scores), *sorted((scores.get("by_type") or {}).items())]
    table = [f"| {name} | {row['n']} | {_rate(row['accuracy'])} | {_rate(row.get('blind'))} |" for name, row in rows]
    return [
        "",
        "## Scores",
        "",
        "Exact answers to held-out questions, and blind: the same questions about swapped images.",
        "",
        "| type | questions | accuracy | blind |",
        "|---|---|---|---|",
        *table,
    ]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _proof_lines(proof: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in proof["kinds"].items())
    equal = ", ".join(f"{key.replace('_', ' ')} {count}" for key, count in proof["answers_equal"].items())
    return [
        f"Compared on {proof['samples']} samples ({kinds}); the figures are in `proof.json`.",
        "",
        f"1. Merged in place against this folder: logits of {proof['logits_identical']} samples identical, at most "
        f"{proof['logits_apart']:.3g} apart.",
        f"2. As trained against merged: logits at most {proof['merged_apart']:.3g} apart, before rounding to "
        f"{proof['dtype']}.",
        f"3. Greedy answers equal, of {proof['samples']}: {equal}.",
        "",
        PRECISION_NOTE,
    ]


def gguf_proof_lines(proof: dict[str, Any]) -> list[str]:
    """Return the figures of a proof of GGUF files as lines of text."""
    count = proof["samples"]
    equal = ", ".join(f"{way} {number} of {count}" for way, number in proof["answers_equal"].items())
    by_llama = "" if "llama_cpp" in proof else "; llama-cpp-python is not installed, so llama.cpp was not asked"
    return [
        f"1. tensors of the files that are the merged model's, rounded to {proof['dtype']}: {proof['tensors_equal']} of "
        f"{proof['tensors']}; rounding moves logits by at most {proof['logits_apart']:.3g}",
        f"2. as trained against merged: at most {proof['merged_apart']:.3g} apart at the answers",
        f"3. greedy answers equal: {equal}{by_llama}",
    ]


def export_json(format_name: str, dtype: str, max_tokens: int | None, digest: str) -> str:
    """Return export.json, which marks a folder as an export. digest: of the checkpoint's weights."""
    values = {
        "format": format_name,
        "dtype": dtype,
        "max_tokens": max_tokens,
        "checkpoint_sha256": digest,
        "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")
        },
    }
    return json.dumps(values, indent=1) + "\n"


def refuse_foreign(folder: Path, is_ours: bool) -> None:
    """Raise InputError if `folder` exists, is not empty, and is not an earlier export."""
    if (
        os.path.lexists(folder)
        and not is_ours
        and (not folder.is_dir() or folder.is_symlink() or any(folder.iterdir()))
    ):
        raise InputError(f"{folder}: exists and was not written by an export; name another --output, or move it away.")
