"""Exported folders compute what the trained model computes, in stock transformers that knows nothing of this project.

Run: python -m pytest tests/model/test_export.py
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from config import DataConfig
from model.export import samples, weights
from model.export.__main__ import Export
from model.export.proof import Reference, judge, run_stock, write_job
from model.export.samples import SHAPES
from tests.toy_checkpoints import write_checkpoint, write_records
from tests.toy_language import (
    CHAT_TOKENS,
    PLAIN_TOKENS,
    VISION_TOKENS,
    toy_sizes,
    write_llama,
    write_modern,
    write_qwen1,
    write_qwen2,
    write_qwen3,
)
from tests.toy_towers import write_clip, write_dinov2, write_siglip, write_siglip2


def write_qwen25(folder: Path) -> Path:
    """Qwen2.5: Qwen2's layout, untied, with vision tokens in the vocabulary; stored in bfloat16."""
    config = Qwen2Config(tie_word_embeddings=False, bos_token_id=None, **toy_sizes())
    write_modern(folder, Qwen2ForCausalLM, config, CHAT_TOKENS + VISION_TOKENS, 3, plain=PLAIN_TOKENS)
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def write_smollm(folder: Path) -> Path:
    """SmolLM2: Llama's layout, tied, with exactly as many embeddings as tokens, so that none is left for the image token."""
    write_llama(folder)
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    rows = 1 + max(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"].values())
    rows = max(rows, 1 + max(t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]))
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:rows].clone()
    save_file(tensors, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    return folder


TOWERS = {"clip": write_clip, "siglip": write_siglip, "siglip2": write_siglip2, "dinov2": write_dinov2}
LANGUAGE_MODELS = {"qwen1": write_qwen1, "qwen2": write_qwen2, "qwen2.5": write_qwen25, "qwen3": write_qwen3}
OPTIONS = {"format": "llava", "dtype": "fp32", "quantize": None, "samples": 2, "overrides": [], "allow_download": False}
MATRIX = [(tower, lm) for tower in TOWERS for lm in LANGUAGE_MODELS] + [("siglip", "smollm")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with every encoder and language model, and a QA file."""
    folder = tmp_path_factory.mktemp("parts")
    for name, write in {**TOWERS, **LANGUAGE_MODELS, "smollm": write_smollm}.items():
        write(folder / name)
    write_records(folder)
    return folder


def data_of(parts: Path, **values: Any) -> DataConfig:
    return DataConfig(parts / "qa.jsonl", validation_file=parts / "validation.jsonl", max_length=256, **values)


def make_export(config, **options: Any) -> Export:
    arguments = argparse.Namespace(**{**OPTIONS, **options})
    return Export(config, config.output_dir / "final", arguments)


@dataclasses.dataclass
class Case:
    """An exported folder, and what it is compared with."""

    folder: Path
    reference: Reference
    merged_apart: float
    dtype: str = "fp32"

    def proof(self) -> dict:
        return judge(self.reference, self.merged_apart, self.dtype)


def prepare(folder: Path, export: Export) -> Case:
    """Export into `folder`/model and write the job of its proof to `folder`/job."""
    for name in ("model", "job"):
        (folder / name).mkdir(parents=True)
    export.write_model(folder / "model")
    reference = export.reference(folder / "job")
    apart = write_job(folder / "model", reference, export.dtype, max_new_tokens=export.config.test.max_new_tokens)
    return Case(folder / "model", reference, apart, export.dtype)


def few_samples(case: Case, folder: Path) -> Case:
    """Copy an exported folder and the part of its job that has one sample of each of three kinds."""
    shutil.copytree(case.folder, folder / "model")
    shutil.copytree(case.reference.job, folder / "job")
    kinds = [sample.kind for sample in case.reference.samples]
    kept = [kinds.index(kind) for kind in ("held out", "text beside image", "two images")]
    job = json.loads((folder / "job" / "job.json").read_text())
    job |= {"folder": str(folder / "model"), "samples": [job["samples"][i] for i in kept]}
    (folder / "job" / "job.json").write_text(json.dumps(job))
    tensors = load_file(folder / "job" / "expected.safetensors")
    few = {f"{kind}.{new}": tensors[f"{kind}.{old}"] for new, old in enumerate(kept) for kind in ("logits", "pixels")}
    save_file(few, folder / "job" / "expected.safetensors")
    reference = copy.copy(case.reference)
    reference.job = folder / "job"
    reference.samples = [case.reference.samples[i] for i in kept]
    reference.expected = [case.reference.expected[i] for i in kept]
    return Case(folder / "model", reference, case.merged_apart)


def edit(name: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return apply


def edit_weights(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def edit_template(old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return apply


def rope_of(config: dict) -> list[dict]:
    return [config["text_config"], config["text_config"]["rope_parameters"]]


# what is changed in an exported folder -> (encoder, change, a part of the fault that the proof must name)
MUTATIONS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "config: another image token": ("clip", edit("config.json", lambda c: c.update(image_token_index=5)), ""),
    "config: relu": ("clip", edit("config.json", lambda c: c.update(projector_hidden_act="relu")), "proof 1"),
    "config: no bias": ("clip", edit("config.json", lambda c: c.update(multimodal_projector_bias=False)), "unexpected"),
    "config: another layer": ("clip", edit("config.json", lambda c: c.update(vision_feature_layer=-1)), "proof 1"),
    "config: another strategy": (
        "clip",
        edit("config.json", lambda c: c.update(vision_feature_select_strategy="full")),
        "",
    ),
    "config: untied": (
        "clip",
        edit("config.json", lambda c: [part.update(tie_word_embeddings=False) for part in (c, c["text_config"])]),
        "missing",
    ),
    "config: not llava": ("clip", edit("config.json", lambda c: c.update(model_type="llava_next")), ""),
    "config: rotary base": (
        "clip",
        edit("config.json", lambda c: [t.update(rope_theta=7.0) for t in rope_of(c)]),
        "proof 1",
    ),
    "config: another activation of the encoder": (
        "clip",
        edit("config.json", lambda c: c["vision_config"].update(hidden_act="relu")),
        "proof 1",
    ),
    "config: the processor's size of image": (
        "dinov2",
        edit("config.json", lambda c: c["vision_config"].update(image_size=28)),
        "",
    ),
    "config: SigLIP's head": ("siglip", edit("config.json", lambda c: c["vision_config"].pop("vision_use_head")), "missing"),
    **{
        f"config: {part or 'top'} {key}": (
            "clip",
            edit("config.json", lambda c, part=part, key=key: (c[part] if part else c).update({key: "bfloat16"})),
            f"{part}.{key} is 'bfloat16', expected 'float32'".lstrip("."),
        )
        for part in ("", "text_config", "vision_config")
        for key in ("dtype", "torch_dtype")
    },
    "generation: one stop token": (
        "clip",
        edit("generation_config.json", lambda c: c.update(eos_token_id=c["eos_token_id"][:1])),
        "eos_token_id",
    ),
    "generation: no padding": ("clip", edit("generation_config.json", lambda c: c.pop("pad_token_id")), "pad_token_id"),
    "generation: the image token": (
        "clip",
        edit("generation_config.json", lambda c: c.pop("suppress_tokens")),
        "suppress_tokens",
    ),
    "generation: sampling": ("clip", edit("generation_config.json", lambda c: c.update(do_sample=True)), "do_sample"),
    "generation: length": ("clip", edit("generation_config.json", lambda c: c.pop("max_new_tokens")), "max_new_tokens"),
    "tokenizer: padding on the right": (
        "clip",
        edit("tokenizer_config.json", lambda c: c.pop("padding_side")),
        "padding_side",
    ),
    "processor: patch size": ("clip", edit("processor_config.json", lambda c: c.update(patch_size=14)), ""),
    "processor: no class token": (
        "clip",
        edit("processor_config.json", lambda c: c.update(num_additional_image_tokens=0)),
        "",
    ),
    "processor: strategy": (
        "clip",
        edit("processor_config.json", lambda c: c.update(vision_feature_select_strategy="full")),
        "",
    ),
    "processor: image token": ("clip", edit("processor_config.json", lambda c: c.update(image_token="<|im_end|>")), ""),
    "processor: pixels": (
        "clip",
        edit("preprocessor_config.json", lambda c: c.update(image_std=[0.5, 0.5, 0.5])),
        "pixels",
    ),
    "template: no newline after an image": ("clip", edit_template("last.image = true", "last.image = false"), "ids"),
    "template: no stop token": ("clip", edit_template("<|im_end|>", ""), "ids"),
    "template: no marks in a string": ("clip", edit_template('.replace("<image>"', '.replace("<photo>"'), "image_pad"),
    "weights: the head": (
        "clip",
        edit_weights(lambda t: t.pop("language_model.model.norm.weight")),
        "missing",
    ),
    "weights: a projector that is not folded": (
        "clip",
        edit_weights(lambda t: t["multi_modal_projector.linear_2.bias"].mul_(1.01)),
        "proof 1",
    ),
    "weights: one value": (
        "clip",
        edit_weights(lambda t: t["language_model.model.layers.1.mlp.down_proj.weight"][0, 0].add_(1e-3)),
        "proof 1",
    ),
    "weights: not merged": (
        "clip",
        edit_weights(lambda t: t["language_model.model.layers.0.self_attn.q_proj.weight"].mul_(1.5)),
        "proof 1",
    ),
    "weights: in-memory names": (
        "dinov2",
        edit_weights(lambda t: t.update({"vision_tower.extra": t.pop("vision_tower.embeddings.cls_token")})),
        "missing",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def cases(parts, tmp_path_factory, whole_module_patch) -> dict[Any, Case]:
    """Every combination of the matrix, exported, and the mutations of one; compared in one process of stock transformers."""
    folder = tmp_path_factory.mktemp("exports")
    found: dict[Any, Case] = {}
    for number, (tower, lm) in enumerate(MATRIX):
        prompt = 'Say "yes" {{or}}\n\\no' if number % 2 else None
        layer = {"vision_feature_layer": (-2, -1)[number // 2 % 2]}
        whole_module_patch.setattr(samples, "SHAPES", SHAPES[number % 4 :][:1])
        whole_module_patch.setattr(weights, "SHARD_BYTES", (2**16, 2**30)[number % 2])  # in several files, or in one
        here = folder / f"{tower}-{lm}"
        config = write_checkpoint(here, parts / tower, parts / lm, data=data_of(parts, system_prompt=prompt), **layer)
        found[tower, lm] = prepare(here / "export", make_export(config))
    assert (found["clip", "qwen1"].folder / "model.safetensors.index.json").exists()
    half = write_checkpoint(folder / "half", parts / "clip", parts / "qwen2.5", data=data_of(parts))
    found["bf16"] = prepare(folder / "half" / "export", make_export(half, dtype=None))
    for name, (tower, change, _) in MUTATIONS.items():
        found[name] = few_samples(found[tower, "qwen2"], folder / "mutations" / name.replace(":", ""))
        change(found[name].folder)
    run_stock([case.reference.job for case in found.values()])
    return found


@pytest.mark.parametrize("pair", MATRIX, ids=lambda pair: "-".join(pair))
def test_stock_transformers_computes_the_trained_model(cases, pair):
    proof = cases[pair].proof()
    assert proof["faults"] == []
    count = proof["samples"]
    assert proof["logits_identical"] == count and proof["logits_apart"] == 0.0 and proof["pixels_apart"] == 0.0
    assert proof["answers_equal"] == {"single": count, "batched": count}
    assert {"held out", "other shape", "Chinese", "two images", "several turns", "text only"} <= proof["kinds"].keys()


def test_half_precision_is_proven_on_the_rounded_weights(cases):
    """The released weights' type is the default."""
    proof = cases["bf16"].proof()
    assert proof["faults"] == [] and proof["dtype"] == "bf16" and proof["logits_identical"] == proof["samples"]
    files = list(cases["bf16"].folder.glob("*.safetensors"))
    assert len(files) > 1 and {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
    assert "in bf16" in proof["answers_equal"]


def test_a_language_model_without_a_row_for_the_image_token_gets_one(cases, parts):
    rows = json.loads((parts / "smollm" / "config.json").read_text())["vocab_size"]
    config = json.loads((cases["siglip", "smollm"].folder / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == rows + 1 == config["image_token_index"] + 1


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_proof_finds_a_wrong_key(cases, name):
    try:
        faults = cases[name].proof()["faults"]
    except Exception as error:
        faults = [str(error)]
    assert faults and MUTATIONS[name][2] in "; ".join(faults)
