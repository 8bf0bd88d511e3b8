"""A trained model as one self-contained folder in this project's own form: a checkpoint with its encoder and its language
model, LoRA merged, beside it. `model.load` and test.py open it; no code in it is run.

    config.yaml                relative paths; the parts below
    projector.safetensors      as trained
    vision_tower/              weights, config.json, preprocessor_config.json
    language_model/            weights with LoRA merged, config.json
    tokenizer/ image_processor/
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from model.answer import Answerer
from model.build import Built
from model.export.llava import DTYPES
from model.export.proof import Reference, requests_of
from model.export.weights import Trained, tower_weights, write_weights

PARTS = ("vision_tower", "language_model")


def write_native(folder: Path, trained: Trained, dtype: str) -> None:
    """Write the model's files. dtype: a key of DTYPES, for encoder and language model. Raises InputError."""
    for name in PARTS:
        (folder / name).mkdir()
    tower, processors, language_model = trained.tower(), trained.processors, trained.language_model
    write_weights(tower_weights(tower), folder / "vision_tower", DTYPES[dtype])
    tower.model.config.save_pretrained(folder / "vision_tower")
    processors.image_processor.save(folder / "vision_tower")
    write_weights(language_model.weights(), folder / "language_model", DTYPES[dtype])
    config = language_model.skeleton.config
    config.tie_word_embeddings, config.dtype = language_model.is_tied, DTYPES[dtype]
    config.save_pretrained(folder / "language_model")
    processors.tokenizer.save_pretrained(folder / "language_model")  # so that a new run may be built on it
    shutil.copyfile(trained.checkpoint / "projector.safetensors", folder / "projector.safetensors")
    for name in ("tokenizer", "image_processor"):
        shutil.copytree(trained.checkpoint / name, folder / name)


@torch.inference_mode()
def prove_native(reference: Reference, opened: Built, answerer: Answerer, dtype: str) -> dict[str, Any]:
    """Compare an exported folder, opened in float32, with the model that was trained; see `model.export.proof`.

    Merges the reference. Returns the content of proof.json.
    """
    apart = reference.merge()
    reference.round_to(dtype)
    identical, distance = 0, 0.0
    again = Reference(opened, answerer, reference.samples, job=reference.job)
    for ours in reference.expected:
        expected, found = reference.logits(ours), again.logits(ours)
        identical += torch.equal(expected, found)
        distance = max(distance, float((expected - found).abs().max()))
    texts = [answer.text for answer in answerer.answer_all(requests_of(reference), 1)]
    answers = [expected.answer for expected in reference.expected]
    return reference.figures(
        dtype,
        identical=identical,
        logits_apart=distance,
        merged_apart=apart,
        equal={
            "single": sum(map(str.__eq__, texts, answers)),
            "batched": sum(entry.answer == answer for entry, answer in zip(again.expected, answers, strict=True)),
        },
    )
