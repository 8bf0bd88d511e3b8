"""The proof that an exported folder is the model that was trained.

1. Merged in place, projector folded, rounded: the same logits as the folder in stock transformers, bit for bit in float32.
2. As trained against merged: at most MERGE_TOLERANCE apart at the answers' positions. Merging and folding round so much.
3. Greedy answers: equal, one at a time and in batches.

Everything is computed on the CPU in float32, where a sum does not depend on the other rows of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

import qwen
from config import InputError
from model.answer import Answerer, Request
from model.build import Built, read_pixels
from model.export.llava import DTYPES, write_json
from model.export.weights import folded_projector
from model.model import VisionLanguageModel

EXPERTS_TOLERANCE = 1e-6  # of a mixture of experts: 3e-8 was seen once, and the cause is not known
MERGE_TOLERANCE = 1e-4  # largest distance of logits, whose size is about ten
PIXEL_TOLERANCE = 2.5 / 255  # torchvision resizes with another rounding; to be divided by a channel's deviation
ANSWER_TOKENS = 16  # of an answer, whose logits are compared
NEW_TOKENS = 32  # that are generated at most
BATCH = 8


@dataclass(frozen=True)
class Sample:
    """A question of the proof.

    turns: (role, parts) pairs, as `ChatFormat.encode_prompt` takes them; a part that is not a string is an image.
    images: names of upright RGB images in the proof's folder, in order.
    """

    kind: str
    turns: Sequence[tuple[str, Sequence[Any]]]
    images: Sequence[str]


@dataclass(frozen=True)
class Expected:
    """What the model as trained computes for a sample. logits: at the positions that predict the answer."""

    ids: list[int]
    answer_ids: list[int]
    answer: str
    pixels: Tensor | None  # [M, 3, S, S]
    logits: Tensor  # [answer, V]


class Reference:
    """A model in float32 on the CPU and what it computes. `merge` and `round_to` turn it into the exported one, in place.

    answerer: of the model, as test.py asks it. job: the folder with the samples' images.
    """

    def __init__(self, built: Built, answerer: Answerer, samples: Sequence[Sample], job: Path) -> None:
        self.built, self.samples, self.job = built, samples, job
        self.model: VisionLanguageModel = built.model.eval()
        self.has_experts = self.model.has_experts
        self._projector = {name: tensor.clone() for name, tensor in self.model.projector.state_dict().items()}
        texts = [answer.text for answer in answerer.answer_all(requests_of(self), BATCH)]
        prompts = [answerer.chat.encode_prompt(sample.turns) for sample in samples]
        self.expected = [self._expect(*row) for row in zip(prompts, samples, texts, strict=True)]

    def _expect(self, ids: list[int], sample: Sample, answer: str) -> Expected:
        paths = [self.job / name for name in sample.images]
        pixels = torch.stack([read_pixels(self.built.image_processor, path) for path in paths]) if paths else None
        stop = self.built.token_id("<|im_end|>")
        answer_ids = [*qwen.encode_text(self.built.tokenizer, answer), stop][:ANSWER_TOKENS]
        expected = Expected(ids, answer_ids, answer, pixels=pixels, logits=torch.empty(0))
        return replace(expected, logits=self.logits(expected)[-len(answer_ids) - 1 :].clone())

    @torch.inference_mode()
    def logits(self, expected: Expected) -> Tensor:
        """Return the logits [L, V] of the model as it is now, for a prompt and its answer."""
        lm, pixels = self.model.causal_lm, expected.pixels
        features = None if pixels is None else self.model.encode_images(pixels)
        ids = torch.tensor([expected.ids + expected.answer_ids])
        mask = torch.ones_like(ids)
        output = lm.model(input_ids=ids, attention_mask=mask, image_features=features, use_cache=False)
        return lm.lm_head(output.last_hidden_state)[0]

    def release(self) -> None:
        """Free the memory of the weights; `expected` stays."""
        self.model.to("meta")

    @torch.no_grad()
    def merge(self, fold: bool = False) -> float:
        """Add LoRA to the weights below it, in place, and fold the projector's buffers if `fold`. Returns how far the logits
        move at most at the answers' positions."""
        for module in self.model.causal_lm.modules():
            if isinstance(module, LoraLayer):
                module.merge()
        if fold:
            self.fold("fp32")
        moved = [(self.logits(entry)[-len(entry.logits) :] - entry.logits).abs().max() for entry in self.expected]
        return float(max(moved))

    @torch.no_grad()
    def fold(self, dtype: str) -> None:
        """Fold the projector's buffers into its layers, rounded to `dtype`."""
        projector = self.model.projector
        for name, tensor in folded_projector(self._projector, DTYPES[dtype]).items():
            projector.get_parameter(name).copy_(tensor)
        for name, value in (("feature_mean", 0.0), ("feature_std", 1.0), ("output_scale", 1.0)):
            projector.get_buffer(name).fill_(value)

    @torch.no_grad()
    def round_to(self, dtype: str) -> None:
        """Round the weights of encoder and language model to `dtype`; the arithmetic remains float32."""
        for part in (self.model.vision_tower, self.model.causal_lm):
            for name, parameter in part.named_parameters():
                if "lora_" not in name:
                    parameter.copy_(parameter.to(DTYPES[dtype]))

    def figures(
        self, dtype: str, *, identical: int, logits_apart: float, merged_apart: float, equal: Mapping[str, int]
    ) -> dict[str, Any]:
        """Return the figures of the three proofs as proof.json has them; its "faults" say what failed.

        identical: samples with the same logits. equal: way of answering -> samples with the same answer. In half precision
        rounding changes answers, so their number is reported and not required.
        """
        count = len(self.samples)
        faults = []
        if identical != count and not logits_apart <= (EXPERTS_TOLERANCE if self.has_experts else 0.0):
            faults.append(
                f"proof 1: the logits of {count - identical} of {count} samples are not those of the merged model (up to "
                f"{logits_apart:.3g} apart)"
            )
        if not merged_apart <= MERGE_TOLERANCE:
            faults.append(f"proof 2: merging moves logits by {merged_apart:.3g}, more than {MERGE_TOLERANCE:g}")
        if dtype == "fp32":
            faults += [
                f"proof 3: {count - number} of {count} greedy answers ({way}) differ from test.py's"
                for way, number in equal.items()
                if number != count
            ]
        kinds = [sample.kind for sample in self.samples]
        return {
            "samples": count,
            "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "dtype": dtype,
            "logits_identical": identical,
            "logits_apart": logits_apart,
            "merged_apart": merged_apart,
            "answers_equal": dict(equal),
            "faults": faults,
        }


def requests_of(reference: Reference) -> list[Request]:
    return [Request(sample.turns, [reference.job / name for name in sample.images]) for sample in reference.samples]


# ---------------------------------------------------------------------------------------------------------------------
# With stock transformers


def write_job(folder: Path, reference: Reference, dtype: str, max_new_tokens: int) -> float:
    """Write what `stock.py` compares the exported `folder` with into the reference's folder.

    Merges the reference and returns how far that moves its logits. max_new_tokens: of the folder's generation config.
    """
    merged_apart = reference.merge(fold=True)
    reference.fold(dtype)
    reference.round_to(dtype)
    tensors, rows = {}, []
    for i, (sample, expected) in enumerate(zip(reference.samples, reference.expected, strict=True)):
        logits = reference.logits(expected)
        tensors[f"logits.{i}"] = logits[-len(expected.logits) :].clone()
        if expected.pixels is not None:
            tensors[f"pixels.{i}"] = expected.pixels.contiguous()
        rows.append(
            {
                "messages": messages_of(sample.turns),
                "images": list(sample.images),
                "ids": expected.ids,
                "answer_ids": expected.answer_ids,
                "logits_sha256": hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest(),
            }
        )
    lm = reference.model.causal_lm
    save_file(tensors, reference.job / "expected.safetensors")
    write_json(
        reference.job / "job.json",
        {
            "folder": str(folder.resolve()),
            "dtype": str(DTYPES[dtype]).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "vocabulary": lm.config.vocab_size,
            "batch_size": BATCH,
            "new_tokens": min(NEW_TOKENS, max_new_tokens),
            "image_token": lm.config.image_token_id,
            "generation": {
                "do_sample": False,
                "eos_token_id": lm.generation_config.eos_token_id,
                "pad_token_id": lm.generation_config.pad_token_id,
                "max_new_tokens": max_new_tokens,
            },
            "samples": rows,
        },
    )
    return merged_apart


def messages_of(turns: Sequence[tuple[str, Sequence[Any]]]) -> list[dict]:
    """Return turns as chat messages.

    The template puts a newline between an image and a text, so one is left out here. A text that follows an image without a
    newline needs the form in which `<image>` marks the place.
    """
    messages = []
    for role, parts in turns:
        pairs = list(zip(parts, [None, *parts], strict=False))  # (part, the one before it)
        after_image = [part for part, before in pairs if isinstance(part, str) and not isinstance(before, str | None)]
        content: Any
        if all(isinstance(part, str) for part in parts):
            content = "".join(parts)
        elif all(part.startswith("\n") for part in after_image):
            content = [_content(part, before) for part, before in pairs]
        else:
            content = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        messages.append({"role": role, "content": content})
    return messages


def _content(part: Any, before: Any) -> dict[str, str]:
    if not isinstance(part, str):
        return {"type": "image"}
    is_after_image = not isinstance(before, str | None)
    return {"type": "text", "text": part[1:] if is_after_image and part[1:2] not in ("", "\n") else part}


def run_stock(jobs: Sequence[Path]) -> None:
    """Compare folders in one process that can import nothing of ours. Raises InputError if it fails."""
    script = Path(__file__).resolve().with_name("stock.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as elsewhere:
        ran = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", str(script), *(str(job.resolve()) for job in jobs)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}, no message"])[-1]
        raise InputError(f"the proof with stock transformers failed: {reason:.600}")


def judge(reference: Reference, merged_apart: float, dtype: str) -> dict[str, Any]:
    """Return the content of proof.json from what `stock.py` found."""
    result = json.loads((reference.job / "result.json").read_text(encoding="utf-8"))
    if "fault" in result:
        raise InputError(f"the proof with stock transformers failed: {result['fault']:.600}")
    rows = result["samples"]
    answers = [entry.answer for entry in reference.expected]
    ways = [("single", "answer"), ("batched", "batched_answer")]
    ways += [] if dtype == "fp32" else [(f"in {dtype}", "half_answer")]
    figures = reference.figures(
        dtype,
        identical=sum(row["logits_identical"] for row in rows),
        logits_apart=max(row["logits_apart"] for row in rows),
        merged_apart=merged_apart,
        equal={way: sum(row[key] == answer for row, answer in zip(rows, answers, strict=True)) for way, key in ways},
    )
    faults = [f"{key.replace('_', ' ')}: {', '.join(names)}" for key, names in result["loading"].items() if names]
    faults += [f"{key} is {found!r}, expected {wanted!r}" for key, (found, wanted) in result["settings"].items()]
    if wrong := [i for i, row in enumerate(rows) if not row["ids_equal"]]:
        kinds = sorted({reference.samples[i].kind for i in wrong})
        faults.append(f"tokenizer or chat template give other ids for {len(wrong)} samples ({', '.join(kinds)})")
    pixels_apart = max(row["pixels_apart"] for row in rows)
    if pixels_apart > PIXEL_TOLERANCE / min(reference.built.image_processor.settings()["image_std"]):
        faults.append(f"the image processor's pixels are {pixels_apart:.3g} apart")
    shown, by_pipeline = result["pipeline"]["sample"], result["pipeline"]["answer"]
    if by_pipeline != rows[shown]["answer"]:
        faults.append(f"transformers' pipeline answers {by_pipeline!r:.80} instead of {rows[shown]['answer']!r:.80}")
    more = {"pixels_apart": pixels_apart, "pipeline_equal": by_pipeline == rows[shown]["answer"], **result["versions"]}
    return figures | more | {"faults": faults + figures["faults"]}
