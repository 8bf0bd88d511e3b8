"""GGUF files for llama.cpp: what they hold, what is refused, and answers through llama-cpp-python where it is installed.

Run: python -m pytest tests/model/test_export_gguf.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import model
import model.export.__main__ as command
import model.export.gguf_proof as proving
from config import InputError, load_config
from model.export import gguf_files, gguf_keys
from model.export.gguf_files import FileTensor
from model.export.llava import chat_template
from model.export.weights import held
from tests.toy_checkpoints import write_checkpoint, write_records
from tests.toy_language import write_llama, write_qwen3
from tests.toy_towers import write_clip, write_dinov2, write_siglip

gguf = pytest.importorskip("gguf", reason="requirements-gguf.txt is not installed")
WITH_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Encoders, language models, checkpoints and questions."""
    folder = tmp_path_factory.mktemp("parts")
    write_records(folder)
    for name, write in {
        "siglip": write_siglip,
        "clip": write_clip,
        "dinov2": write_dinov2,
        "qwen3": write_qwen3,
        "llama": write_llama,
    }.items():
        write(folder / name)
    for tower, lm in (("siglip", "qwen3"), ("siglip", "llama"), ("clip", "qwen3"), ("dinov2", "qwen3")):
        write_checkpoint(folder / f"{tower}-{lm}", folder / tower, folder / lm)
    return folder


def export(parts: Path, name: str, output: Path, *words: str) -> dict:
    """Export a checkpoint and return its proof."""
    checkpoint = ["--checkpoint", str(parts / name / "final"), "--output", str(output), "--samples", "1"]
    assert command.main([*checkpoint, "--format", "gguf", *words]) == 0
    return json.loads((output / "proof.json").read_text())


@pytest.fixture(scope="module")
def exported(parts, tmp_path_factory) -> dict[str, Path]:
    """Exports of SigLIP with Qwen3 and with Llama, in float32 and in Q8_0."""
    folder = tmp_path_factory.mktemp("exported")
    for name, words in (("qwen3", ["--dtype", "fp32"]), ("llama", ["--dtype", "fp32"]), ("q8", ["--quantize", "q8_0"])):
        proof = export(parts, f"siglip-{name.replace('q8', 'qwen3')}", folder / name, *words)
        assert proof["faults"] == [] and proof["tensors_equal"] == proof["tensors"]
    return {path.name: path for path in folder.iterdir()}


def values_of(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_both_files_hold_the_merged_model(parts, exported):
    """By names and arithmetic that are written out here."""
    checkpoint = parts / "siglip-qwen3" / "final"
    released, lora = (
        load_file(parts / "qwen3" / "model.safetensors"),
        load_file(checkpoint / "adapter_model.safetensors"),
    )
    tensors = proving.read_file(exported["qwen3"] / "model.gguf")
    prefix, layer = "base_model.model.model.layers.1.self_attn.v_proj.lora_", "model.layers.1.self_attn.v_proj.weight"
    merged = released[layer] + 8 / 4 * lora[f"{prefix}B.weight"] @ lora[f"{prefix}A.weight"]
    assert (tensors["blk.1.attn_v.weight"][0] - merged).abs().max() < 1e-6
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        assert torch.equal(tensors[theirs][0], released[ours])
    tower, projector = (
        load_file(parts / "siglip" / "model.safetensors"),
        load_file(checkpoint / "projector.safetensors"),
    )
    tensors = proving.read_file(exported["qwen3"] / "mmproj.gguf")
    block = "vision_model.encoder.layers.2"
    for theirs, ours in {
        "v.blk.2.ffn_up.weight": f"{block}.mlp.fc1.weight",
        "v.blk.2.ffn_down.bias": f"{block}.mlp.fc2.bias",
        "v.blk.2.attn_out.weight": f"{block}.self_attn.out_proj.weight",
        "v.blk.0.ln2.weight": "vision_model.encoder.layers.0.layer_norm2.weight",
        "v.patch_embd.weight": "vision_model.embeddings.patch_embedding.weight",
        "v.position_embd.weight": "vision_model.embeddings.position_embedding.weight",
    }.items():
        assert torch.equal(tensors[theirs][0], tower[ours])
    scaled = projector["linear_2.weight"] * projector["output_scale"]
    assert torch.allclose(tensors["mm.2.weight"][0], scaled) and tensors["mm.0.bias"][0].shape == (64,)
    assert not [name for name in tensors if "post_ln" in name or "v.blk.3." in name]  # features of layer -2 of 4


def test_the_keys_that_llama_cpp_reads(exported):
    text, vision = (values_of(exported["qwen3"] / name) for name in ("model.gguf", "mmproj.gguf"))
    assert text["general.architecture"] == "qwen3" and text["qwen3.block_count"] == 2
    assert text["qwen3.rope.freq_base"] == 10000 and text["qwen3.attention.key_length"] == 16
    assert text["tokenizer.ggml.pre"] == "qwen2" and text["tokenizer.ggml.add_bos_token"] is False
    tokens, types = text["tokenizer.ggml.tokens"], text["tokenizer.ggml.token_type"]
    assert tokens[text["tokenizer.ggml.eos_token_id"]] == "<|im_end|>" and len(tokens) == len(types) == 640
    assert types[tokens.index("<|im_end|>")] == gguf.TokenType.CONTROL and types[639] == gguf.TokenType.UNUSED
    assert types[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED
    assert vision["clip.projector_type"] == "mlp" and vision["clip.has_vision_encoder"] is True
    assert vision["clip.vision.feature_layer"] == [3] and vision["clip.vision.block_count"] == 3
    assert vision["clip.vision.image_size"] == 30 and vision["clip.vision.patch_size"] == 7
    assert vision["clip.use_gelu"] is True and vision["clip.vision.image_mean"] == [0.5, 0.5, 0.5]
    assert vision["clip.vision.projection_dim"] == 64
    modelfile = (exported["qwen3"] / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE") and "SYSTEM" not in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    prompts = gguf_files.Prompts("Be brief.", 7)
    assert 'SYSTEM """Be brief."""' in gguf_files.modelfile(prompts) and "num_predict 7" in gguf_files.modelfile(
        prompts
    )


def test_transformers_reads_the_language_model_from_the_file(parts, exported):
    """An independent reader of GGUF, which knows Llama's order of rotary pairs; of Qwen3 it misses the width of a head."""
    folder = exported["llama"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    lm = model.load(parts / "siglip-llama" / "final").built.model.causal_lm
    ids = torch.arange(40, 80)[None]
    with torch.inference_mode():
        assert (theirs(input_ids=ids).logits - lm(input_ids=ids).logits).abs().max() < 1e-4


def test_q8_0_is_within_half_a_step_and_vectors_stay_float32(exported):
    kinds = {name: kind for name, (_, kind) in proving.read_file(exported["q8"] / "model.gguf").items()}
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    kinds = {name: kind for name, (_, kind) in proving.read_file(exported["q8"] / "mmproj.gguf").items()}
    assert kinds["v.blk.0.ffn_up.weight"] == "F16" and kinds["v.position_embd.weight"] == "F32"
    assert json.loads((exported["q8"] / "export.json").read_text())["dtype"] == "q8_0"
    assert 0 < json.loads((exported["q8"] / "proof.json").read_text())["logits_apart"] < 1


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
def test_the_proof_finds_a_damaged_file(tmp_path, kind):
    weights = {name: torch.randn(64, 64) for name in ("a", "b")} | {"v": torch.randn(64)}

    def tensors(scale: float = 1.0, kind: str = kind) -> list[FileTensor]:
        return [
            FileTensor(n, held(n, scale * t if n == "b" else t), kind if t.ndim == 2 else "F32")
            for n, t in weights.items()
        ]

    def faults(written: list[FileTensor]) -> list[str]:
        gguf_files.write_file(tmp_path / "x", "qwen2", [("add_block_count", 1)], tensors=written, kind=kind)
        return proving.compare_files(tmp_path, {"x": tensors()})[2]

    assert faults(tensors()) == []
    assert faults(tensors(scale=1.02)) == ["proof 1: 1 of 3 tensors are not the merged model's"]
    assert faults(tensors(kind="F16")) == ["proof 1: 2 of 3 tensors are not the merged model's"]
    assert "missing or unexpected: v" in faults(tensors()[:2])[0]


def test_a_failed_proof_leaves_no_folder(parts, tmp_path, monkeypatch):
    correct = gguf_files.write_file
    monkeypatch.setattr(gguf_files, "write_file", lambda *a, tensors, kind: correct(*a, tensors=tensors[1:], kind=kind))
    with pytest.raises(
        InputError, match="not exported: .*model.gguf: tensors missing or unexpected: token_embd.weight"
    ):
        export(parts, "siglip-qwen3", tmp_path / "out", "--dtype", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_encoders_that_llama_cpp_computes_otherwise_are_refused(parts, tmp_path):
    with pytest.raises(InputError, match=r"dinov2.*has no layer scale.*SigLIP"):
        export(parts, "dinov2-qwen3", tmp_path / "out")
    with pytest.raises(InputError, match=r"clip.*class token after the patches.*/issues/25814.*--allow-class-token"):
        export(parts, "clip-qwen3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_clip_encoder_is_written_on_demand(parts, tmp_path):
    checkpoint = parts / "clip-qwen3" / "final"
    words = ["--checkpoint", "-", "--output", "-", "--format", "gguf", "--allow-class-token", "--dtype", "fp16"]
    command.Export(load_config(checkpoint / "config.yaml"), checkpoint, command.parse_arguments(words)).write_model(
        tmp_path
    )
    tensors = proving.read_file(tmp_path / "mmproj.gguf")
    released = load_file(parts / "clip" / "model.safetensors")
    assert torch.equal(tensors["v.class_embd"][0], released["vision_model.embeddings.class_embedding"])
    assert torch.equal(tensors["v.pre_ln.bias"][0], released["vision_model.pre_layrnorm.bias"])
    assert values_of(tmp_path / "mmproj.gguf")["clip.use_gelu"] is False  # quick_gelu


def test_wrong_use_gets_one_message(parts, exported, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="GGUF files, which llama.cpp.*--format llava or native"):
        model.load(exported["qwen3"])
    words = ["--checkpoint", str(parts / "siglip-qwen3" / "final"), "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="--quantize is for --format gguf"):
        command.main([*words, "--quantize", "q8_0"])
    with pytest.raises(InputError, match="--allow-class-token is for --format gguf"):
        command.main([*words, "--allow-class-token"])
    with pytest.raises(InputError, match="--quantize and --dtype both name the type"):
        command.main([*words, "--format", "gguf", "--quantize", "f16", "--dtype", "fp32"])
    with pytest.raises(InputError, match="cuts texts by a rule.*convert_hf_to_gguf.py"):
        gguf_keys._pre_tokenizer({"type": "Whitespace"})
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}]
    assert gguf_keys._pre_tokenizer({"type": "Sequence", "pretokenizers": digits}) == "smollm"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="gguf, which is not installed: .*requirements-gguf.txt"):
        command.main([*words, "--format", "gguf"])


def test_the_template_takes_images_as_llama_cpp_gives_them():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment().from_string(chat_template("<__media__>", None, media_marker=True))
    for image in ({"type": "image"}, {"type": "text", "text": "<__media__>"}, {"type": "media_marker", "text": "<m1>"}):
        marker = "<m1>" if image["type"] == "media_marker" else "<__media__>"
        content = [image, {"type": "text", "text": "What?"}]
        found = made.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
        assert found == f"<|im_start|>user\n{marker}\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    one, two = "<__media_x1Y__>", "<__media__>"  # as the parts of a message are joined by llama-server
    for content, expected in {
        f"{one}What?": f"{one}\nWhat?",
        f"{one}\nWhat?": f"{one}\nWhat?",
        f"{one}\n\nWhat?": f"{one}\n\nWhat?",
        f"{one}{two}What?": f"{one}{two}\nWhat?",
        f"Look: {one}": f"Look: {one}",
        f"a{one}b{two}": f"a{one}\nb{two}",
        "<image>What?": "<__media__>What?",
        "no image": "no image",
    }.items():
        found = made.render(messages=[{"role": "user", "content": content}])
        assert found == f"<|im_start|>user\n{expected}<|im_end|>\n"
        assert made.render(messages=[{"role": "assistant", "content": content}]).endswith(f"\n{content}<|im_end|>\n")


@pytest.mark.skipif(not WITH_LLAMA_CPP, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", ["qwen3", "llama", "q8"])
def test_llama_cpp_answers_as_the_model_does(exported, name):
    proof = json.loads((exported[name] / "proof.json").read_text())
    found, count = proof["llama_cpp"], proof["samples"]
    assert found["ids_equal"] == count
    if name != "q8":
        assert found["answers_equal"] == count and found["logits_apart"] < 0.02
