"""The proof that GGUF files hold the model that was trained.

1. Every tensor of the files, read again, is the merged model's, rounded to its type (Q8_0: at most half a step apart).
2. As trained against merged, as in `model.export.proof`.
3. Greedy answers of the model with the files' weights, computed by this project; they are required in F32. And those of
   llama.cpp itself where llama-cpp-python is installed; it must agree in MIN_EQUAL of the samples unless quantised.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.answer import Answerer
from model.export.ask_gguf import LlamaCpp
from model.export.gguf_files import (
    LANGUAGE_MODEL,
    MMPROJ,
    FileTensor,
    language_model_tensors,
    mmproj_kind,
    mmproj_tensors,
    projector_dtype,
)
from model.export.proof import MERGE_TOLERANCE, Reference, messages_of, requests_of
from model.export.weights import held
from model.trainable import parameters_without_lora

DTYPE_WORDS = {torch.float32: "fp32", torch.float16: "fp16"}
MIN_EQUAL = 0.9  # of the samples: llama.cpp approximates GELU, and rounds activations to the type of the weights


@torch.no_grad()
def prove_gguf(
    reference: Reference, answerer: Answerer, folder: Path, *, text: dict, feature_layer: int, kind: str
) -> dict[str, Any]:
    """Compare the files in `folder` with the model as trained, and return the content of proof.json.

    Merges the reference, then gives it the files' weights. text: the language model's config. kind: of model.gguf.
    """
    merged_apart = reference.merge(fold=True)
    reference.fold(DTYPE_WORDS[projector_dtype(mmproj_kind(kind))])
    before = [reference.logits(expected)[-len(expected.logits) :].clone() for expected in reference.expected]
    lm, model = reference.model.causal_lm, reference.model
    weights = [held(name, tensor) for name, tensor in parameters_without_lora(lm).items()]
    projector = {
        name: tensor
        for name, tensor in model.projector.state_dict().items()
        if name.startswith(("linear_1", "linear_2"))
    }
    expected = {
        LANGUAGE_MODEL: language_model_tensors(text, weights, kind=kind),
        MMPROJ: mmproj_tensors(model.vision_tower, feature_layer, projector, kind=mmproj_kind(kind)),
    }
    total, equal, faults = compare_files(folder, expected)
    for name, tensors in expected.items():
        found = read_file(folder / name)
        for tensor in tensors:
            if tensor.name in found:
                _fill(tensor, found[tensor.name][0])
    if not merged_apart <= MERGE_TOLERANCE:
        faults.append(f"proof 2: merging moves logits by {merged_apart:.3g}, more than {MERGE_TOLERANCE:g}")
    pairs = zip(before, reference.expected, strict=True)
    apart = max(float((old - reference.logits(entry)[-len(old) :]).abs().max()) for old, entry in pairs)
    count, answers = len(reference.samples), [entry.answer for entry in reference.expected]
    texts = [answer.text for answer in answerer.answer_all(requests_of(reference), 1)]
    same = {"single": sum(map(str.__eq__, texts, answers))}
    if kind == "F32" and same["single"] != count:
        faults.append(f"proof 3: {count - same['single']} of {count} greedy answers differ from test.py's")
    kinds = [sample.kind for sample in reference.samples]
    figures: dict[str, Any] = {
        "samples": count,
        "kinds": {word: kinds.count(word) for word in dict.fromkeys(kinds)},
        "dtype": kind,
        "tensors": total,
        "tensors_equal": equal,
        "logits_apart": apart,
        "merged_apart": merged_apart,
        "answers_equal": same,
    }
    if not faults and importlib.util.find_spec("llama_cpp") is not None:
        figures |= ask_llama_cpp(reference, folder, int(answerer.options["max_new_tokens"]))
        same["llama.cpp"] = figures["llama_cpp"]["answers_equal"]
        if kind != "Q8_0" and same["llama.cpp"] < MIN_EQUAL * count:
            faults.append(f"proof 3: llama.cpp answers {count - same['llama.cpp']} of {count} samples otherwise")
        if wrong := count - figures["llama_cpp"]["ids_equal"]:
            faults.append(f"llama.cpp's tokenizer gives other ids for {wrong} of {count} samples")
    return figures | {"faults": faults}


def compare_files(folder: Path, expected: Mapping[str, Sequence[FileTensor]]) -> tuple[int, int, list[str]]:
    """Compare the tensors of GGUF files with those that they should hold, by file name. Returns (tensors, how many of them
    are equal, faults)."""
    faults: list[str] = []
    total = equal = 0
    for name, tensors in expected.items():
        found = read_file(folder / name)
        if extra := sorted(found.keys() ^ {tensor.name for tensor in tensors}):
            faults.append(f"{name}: tensors missing or unexpected: {', '.join(extra[:8])}")
        total += len(tensors)
        equal += sum(tensor.name in found and _is_same(tensor, *found[tensor.name]) for tensor in tensors)
    if equal != total:
        faults.append(f"proof 1: {total - equal} of {total} tensors are not the merged model's")
    return total, equal, faults


def read_file(path: Path) -> dict[str, tuple[Tensor, str]]:
    """Return name -> (float32 values, type) of a GGUF file's tensors."""
    import gguf

    return {
        tensor.name: (
            torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type))).reshape(
                tuple(int(side) for side in reversed(tensor.shape))
            ),
            tensor.tensor_type.name,
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def _is_same(tensor: FileTensor, found: Tensor, kind: str) -> bool:
    """Return whether a file's tensor is the model's, rounded to its type."""
    exact = tensor.arrange(tensor.weight.read().detach().float())
    if kind != tensor.kind or found.shape != exact.shape:
        return False
    if kind == "Q8_0":
        blocks = exact.unflatten(-1, (-1, 32))
        step = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()  # a scale is stored in F16
        return bool(((found.unflatten(-1, (-1, 32)) - blocks).abs() <= 0.51 * step + 2**-10 * blocks.abs()).all())
    rounded = exact.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).float()
    return torch.equal(found, rounded)


def _fill(tensor: FileTensor, found: Tensor) -> None:
    """Give the model's tensor the values of the file. Rows that only the file has are left out."""
    target = tensor.weight.read()
    values = tensor.restore(found)[: len(target)]
    if values.shape == target.shape:  # else a fault says so
        target.copy_(values)


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp


def ask_llama_cpp(reference: Reference, folder: Path, new_tokens: int) -> dict[str, Any]:
    """Answer the samples through llama-cpp-python, and return {"llama_cpp": figures}. Images are given in the encoder's
    size, because llama.cpp pads an image where most processors crop it."""
    longest = max(len(entry.ids) for entry in reference.expected)
    image_id = reference.model.causal_lm.config.image_token_id
    ids_equal = answers_equal = 0
    apart = 0.0
    with LlamaCpp(folder / LANGUAGE_MODEL, folder / MMPROJ, num_tokens=longest + new_tokens + 1) as program:
        for sample, entry in zip(reference.samples, reference.expected, strict=True):
            images: list[np.ndarray] = []
            if entry.pixels is not None:
                images = [image.numpy() for image in reference.built.image_processor.denormalise(entry.pixels)]
            ids, logits, text = program.ask(messages_of(sample.turns), images, new_tokens=new_tokens)
            ids_equal += ids == [None if token == image_id else token for token in entry.ids]
            answers_equal += text.strip() == entry.answer
            apart = max(apart, float(np.abs(logits - reference.logits(entry)[len(entry.ids) - 1].numpy()).max()))
    figures = {"ids_equal": ids_equal, "answers_equal": answers_equal, "logits_apart": apart}
    return {"llama_cpp": figures | {"version": importlib.metadata.version("llama_cpp_python")}}
