"""Load exported folders with stock transformers and compare them with the model that was exported.

Run as a file in a process of its own (`python -I stock.py JOB...`), in which nothing of this project can be imported. A JOB
is a folder that `model.export.proof` wrote; this writes `result.json` into it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

OURS = ("model", "qwen", "visual", "training", "dataset", "evaluation")


def main(jobs: list[str]) -> None:
    found = [name for name in OURS if (spec := importlib.util.find_spec(name)) is not None and spec.origin]
    if found:
        raise SystemExit(
            f"the project's own package {found[0]!r} can be imported in this Python environment, so a proof would not show "
            "that stock transformers is enough; use an environment in which the project is not installed."
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for job in jobs:
        try:
            result = compare(Path(job))
        except Exception as error:  # a folder that cannot be used is a result
            result = {"fault": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        (Path(job) / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


@torch.inference_mode()
def compare(job: Path) -> dict:
    """Return what a folder computes beside what it should: ids, pixels, logits and answers of each sample."""
    values = json.loads((job / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(values["threads"])
    tensors = load_file(job / "expected.safetensors")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        values["folder"], dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    model.eval()
    processor: Any = AutoProcessor.from_pretrained(values["folder"])
    samples, limit = values["samples"], values["new_tokens"]
    images = [[Image.open(job / name).convert("RGB") for name in sample["images"]] for sample in samples]
    texts = [processor.apply_chat_template(s["messages"], tokenize=False, add_generation_prompt=True) for s in samples]
    rows = []
    for i, sample in enumerate(samples):
        inputs = processor(text=texts[i], images=images[i] or None, return_tensors="pt")
        row = {"ids_equal": inputs["input_ids"][0].tolist() == sample["ids"], "pixels_apart": 0.0}
        pixels = tensors.get(f"pixels.{i}")
        if pixels is not None:
            row["pixels_apart"] = float((inputs["pixel_values"] - pixels).abs().max())
        logits = read(model, sample, pixels)
        vocabulary = values["vocabulary"]  # rows added for the image token come after it
        row["logits_identical"] = digest(logits[:, :vocabulary]) == sample["logits_sha256"]
        expected = tensors[f"logits.{i}"]
        row["logits_apart"] = float((logits[-len(expected) :, :vocabulary] - expected).abs().max())
        row["answer"] = answers(model, processor, [texts[i]], images=[images[i]], new_tokens=limit)[0]
        rows.append(row)
    for start in range(0, len(samples), values["batch_size"]):
        part = slice(start, start + values["batch_size"])
        batch = answers(model, processor, texts[part], images=images[part], new_tokens=limit)
        for row, answer in zip(rows[part], batch, strict=True):
            row["batched_answer"] = answer
    with_image = next((i for i, sample in enumerate(samples) if sample["images"]), 0)
    by_pipeline = ask_pipeline(
        model, processor, samples[with_image]["messages"], images=images[with_image], new_tokens=limit
    )
    if values["dtype"] != "float32":
        model.to(getattr(torch, values["dtype"]))
        for start in range(0, len(samples), values["batch_size"]):
            part = slice(start, start + values["batch_size"])
            batch = answers(model, processor, texts[part], images=images[part], new_tokens=limit)
            for row, answer in zip(rows[part], batch, strict=True):
                row["half_answer"] = answer
    loading = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {
        "versions": versions, "loading": loading, "samples": rows, "settings": other_settings(model, processor, values),
        "pipeline": {"sample": with_image, "answer": by_pipeline},
    }  # fmt: skip


def other_settings(model: Any, processor: Any, values: dict) -> dict[str, list]:
    """Return name -> [found, expected] of the settings that no sample may need but that a user relies on."""
    found = {key: getattr(model.generation_config, key) for key in values["generation"]}
    pairs = {key: [found[key], expected] for key, expected in values["generation"].items()}
    image = values["image_token"]
    pairs["image_token_id"] = [[model.config.image_token_id, processor.image_token_id], [image, image]]
    pairs["suppress_tokens"] = [image in (model.generation_config.suppress_tokens or []), True]
    pairs["padding_side"] = [processor.tokenizer.padding_side, "left"]
    config = json.loads((Path(values["folder"]) / "config.json").read_text(encoding="utf-8"))
    for part in ("", "text_config", "vision_config"):
        for key in ("dtype", "torch_dtype"):  # the type of the weights where none is asked for, in 5 and in 4
            found = (config[part] if part else config).get(key)
            pairs[f"{part}.{key}".lstrip(".")] = [found, values["dtype"]]
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def read(model: Any, sample: dict, pixels: torch.Tensor | None) -> torch.Tensor:
    """Return the logits [L, V] of a prompt and its expected answer."""
    ids = torch.tensor([sample["ids"] + sample["answer_ids"]])
    inputs = {} if pixels is None else {"pixel_values": pixels}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits[0]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def answers(
    model: Any, processor: Any, texts: list[str], images: list[list[Image.Image]], new_tokens: int
) -> list[str]:
    """Answer prompts as one batch, with the folder's own generation settings."""
    flat = [image for some in images for image in some]
    inputs = processor(text=texts, images=flat or None, padding=True, return_tensors="pt").to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    length = inputs["input_ids"].shape[1]
    made = model.generate(**inputs, max_new_tokens=new_tokens)[:, length:]
    return [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]


def ask_pipeline(model: Any, processor: Any, messages: list[dict], images: list[Image.Image], new_tokens: int) -> str:
    """Answer one conversation through transformers' pipeline."""
    rest = iter(images)

    def with_image(part: dict) -> dict:
        return {"type": "image", "image": next(rest)} if part["type"] == "image" else part

    shown = []
    for message in messages:
        content = message["content"]
        parts = (
            [{"type": "text", "text": content}] if isinstance(content, str) else [with_image(part) for part in content]
        )
        shown.append({"role": message["role"], "content": parts})
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor)
    return ask(text=shown, return_full_text=False, max_new_tokens=new_tokens)[0]["generated_text"].strip()


if __name__ == "__main__":
    main(sys.argv[1:])
