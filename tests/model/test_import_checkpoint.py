"""`python -m model.import_checkpoint`: other projects' layouts, written here, compute what a direct computation gives.

Run: python -m pytest tests/model/test_import_checkpoint.py
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import model
import model.import_checkpoint as command
import qwen
from config import InputError
from model.checkpoint_folder import verify_folder
from model.export.opened import load_stock
from model.foreign import ANCESTOR_PROMPT
from tests.toy_language import LAYERS, toy_sizes, write_qwen1, write_qwen2
from tests.toy_towers import write_clip, write_siglip

R, ALPHA, D = 4, 8, 64
SEQUENTIAL = ("0.weight", "0.bias", "2.weight", "2.bias")


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for name, write in {"siglip": write_siglip, "clip": write_clip, "qwen1": write_qwen1, "qwen2": write_qwen2}.items():
        write(folder / name)
    return folder


def projector_of(width: int = D) -> nn.Sequential:
    projector = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, D))
    for i, parameter in enumerate(projector.parameters()):
        parameter.data = random(*parameter.shape, seed=i)
    return projector.eval()


def write_lora(folder: Path, shapes: dict[str, tuple[int, int]], **values) -> dict[str, Tensor]:
    """Write adapter_model.bin with LoRA on layers of (outputs, inputs). Returns layer -> the change of its weight."""
    tensors, deltas = {}, {}
    for i, (name, (outputs, inputs)) in enumerate(shapes.items()):
        a, b = random(R, inputs, seed=i), random(outputs, R, seed=i + 99)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        deltas[name] = ALPHA / R * b @ a
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["x"], **values}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return deltas


def merged(source: Path, deltas: dict[str, Tensor], folder: Path):
    """Load the language model in `source` with changes added to the tensors of its file."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, delta in deltas.items():
        tensors[f"{name}.weight"] += delta
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return qwen.load_language_model(folder, torch.float32).eval()


def run(source: Path, output: Path, *words: str, parts: Path | None = None, tower="siglip", lm="qwen1") -> None:
    bases = [f"model.vision_tower={parts / tower}", f"model.language_model={parts / lm}"] if parts else []
    assert command.main(["--from", str(source), "--output", str(output), *bases, *words]) == 0
    verify_folder(output)


@torch.inference_mode()
def compare(folder: Path, lm, features: Tensor, pixels: Tensor) -> None:
    """Compare an imported checkpoint's logits with those of a language model that gets `features` directly."""
    opened = model.load(folder, device="cpu").built
    assert opened.num_image_tokens == features.shape[1]
    ids = torch.tensor([[5, 6, *[qwen.image_token_id(opened.tokenizer)] * features.shape[1], 7, 8, 9]])
    found = opened.model.causal_lm.float()(input_ids=ids, image_features=opened.model.encode_images(pixels)).logits
    before, after = (lm.get_input_embeddings()(ids[:, part]) for part in (slice(0, 2), slice(-3, None)))
    expected = lm(inputs_embeds=torch.cat([before, features, after], dim=1)).logits
    assert (found - expected).abs().max() < 2e-5


def write_ancestor(folder: Path, width: int = D) -> tuple[dict[str, Tensor], nn.Sequential]:
    """Its LoRA on c_attn, w1 and w2, and its projector without a prefix; training_args.bin is never opened."""
    shapes = {}
    for layer in range(LAYERS):
        names = {"attn.c_attn": (3 * D, D), "mlp.w1": (96, D), "mlp.w2": (96, D)}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in names.items()}
    deltas, projector = write_lora(folder, shapes), projector_of(width)
    torch.save(projector.state_dict(), folder / "other_params.bin")
    (folder / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    return deltas, projector


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_the_ancestors_checkpoint(parts, tmp_path, tower, capsys):
    deltas, projector = write_ancestor(tmp_path / "theirs", width=D if tower == "clip" else 48)
    run(tmp_path / "theirs", tmp_path / "ours", parts=parts, tower=tower)
    kind = SiglipVisionModel if tower == "siglip" else CLIPVisionModel
    encoder, size = kind.from_pretrained(parts / tower).eval(), 30 if tower == "siglip" else 28
    pixels = random(1, 3, size, size)
    with torch.inference_mode():
        features = projector(encoder(pixels).last_hidden_state[:, 1:])
    assert features.shape[1] == (15 if tower == "siglip" else 16)
    compare(tmp_path / "ours", merged(parts / "qwen1", deltas, tmp_path / "merged"), features, pixels=pixels)
    text = (tmp_path / "ours" / "config.yaml").read_text()
    assert ANCESTOR_PROMPT in text and f"vision_features: {'normed' if tower == 'siglip' else 'hidden_state'}" in text
    assert "LoRA (20 matrices of rank 4)" in capsys.readouterr().out  # q, k, v, gate and up in two layers
    assert isinstance(model.load(tmp_path / "ours").answer("图片里有什么？"), str)


def test_the_ancestors_features_are_an_option(parts, tmp_path):
    write_ancestor(tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "ours", "model.vision_features=hidden_state", parts=parts)
    assert model.load(tmp_path / "ours").built.num_image_tokens == 16
    with pytest.raises(InputError, match="leaves no square grid.*pixel_shuffle needs one"):
        run(tmp_path / "theirs", tmp_path / "no", "model.projector=pixel_shuffle", parts=parts)
    with pytest.raises(InputError, match="is the output of the last layer, but model.vision_feature_layer is -2"):
        run(tmp_path / "theirs", tmp_path / "no", "model.vision_feature_layer=-2", parts=parts)


@pytest.mark.parametrize("with_lora", [True, False])
def test_llavas_checkpoint(parts, tmp_path, with_lora):
    folder, projector, deltas = tmp_path / "theirs", projector_of(), {}
    if with_lora:
        names = {"self_attn.q_proj": (D, D), "self_attn.o_proj": (D, D), "mlp.down_proj": (D, 96)}
        shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in names.items()}
        deltas = write_lora(folder, shapes, task_type="CAUSAL_LM")
        prefix, name = "base_model.model.model.mm_projector.", "non_lora_trainables.bin"
    else:
        folder.mkdir()
        prefix, name = "model.mm_projector.", "mm_projector.bin"
    state = {f"{prefix}{key}": value.half() for key, value in projector.state_dict().items()}
    torch.save(state, folder / name)
    settings = {"model_type": "llava", "mm_vision_select_layer": -3, "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps(settings | {"mm_vision_tower": "openai/clip"}))
    with pytest.raises(
        InputError, match="mm_vision_tower was openai/clip.*model.vision_tower=FOLDER model.language_model"
    ):
        run(folder, tmp_path / "ours")
    run(folder, tmp_path / "ours", parts=parts, tower="clip", lm="qwen2")
    projector.half().float()
    pixels = random(1, 3, 28, 28)
    with torch.inference_mode():
        encoder = CLIPVisionModel.from_pretrained(parts / "clip").eval()
        features = projector(encoder(pixels, output_hidden_states=True).hidden_states[-3][:, 1:])
    compare(tmp_path / "ours", merged(parts / "qwen2", deltas, tmp_path / "merged"), features, pixels=pixels)


def test_llavas_linear_projector(parts, tmp_path, capsys):
    """Written as an mlp twice as wide, which computes the same."""
    projector = nn.Linear(32, D).eval()
    state = {f"model.mm_projector.{key}": value for key, value in projector.state_dict().items()}
    (tmp_path / "theirs").mkdir()
    torch.save(state, tmp_path / "theirs" / "mm_projector.bin")
    run(tmp_path / "theirs", tmp_path / "ours", parts=parts, tower="clip", lm="qwen2")
    assert "twice as wide" in capsys.readouterr().out
    pixels = random(1, 3, 28, 28)
    with torch.inference_mode():
        encoder = CLIPVisionModel.from_pretrained(parts / "clip").eval()
        features = projector(encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    compare(tmp_path / "ours", merged(parts / "qwen2", {}, tmp_path / "merged"), features, pixels=pixels)


@pytest.fixture(scope="module")
def llava_hf(parts, tmp_path_factory) -> Path:
    """A folder that stock transformers has written: SigLIP and Qwen2, random, in bfloat16."""
    folder = tmp_path_factory.mktemp("llava-hf")
    vision = SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, image_size=30, patch_size=7,
        vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(tie_word_embeddings=True, bos_token_id=None, **toy_sizes())
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=430, vision_feature_layer=-1,
        vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stock = LlavaForConditionalGeneration(config).bfloat16()
    stock.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parts / "qwen2" / name, folder / name)
    shutil.copy(parts / "siglip" / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder


def test_a_llava_hf_folder(parts, llava_hf, tmp_path, capsys):
    """It is complete: nothing else is needed, also when it has been moved."""
    run(llava_hf, tmp_path / "ours")
    (tmp_path / "ours").rename(tmp_path / "moved")
    stock = load_stock(llava_hf, torch.float32, advice="").eval()
    pixels = random(1, 3, 30, 30)
    opened = model.load(tmp_path / "moved", device="cpu").built
    assert {p.dtype for p in load_file(tmp_path / "moved" / "language_model" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    ours = torch.tensor([[5, 6, *[qwen.image_token_id(opened.tokenizer)] * 16, 7, 8]])
    theirs = torch.tensor([[5, 6, *[430] * 16, 7, 8]])
    with torch.inference_mode():
        lm = opened.model.float()
        found = lm.causal_lm(input_ids=ours, image_features=lm.encode_images(pixels)).logits
        expected = stock(input_ids=theirs, pixel_values=pixels).logits
    assert (found - expected).abs().max() < 1e-5
    assert "taken: projector (4 tensors), vision_tower, language_model" in capsys.readouterr().out


def test_parts_of_a_llava_hf_folder_that_differ_are_named(parts, llava_hf, tmp_path, capsys):
    """A part that is the released one is not copied."""
    run(llava_hf, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "language_model", tmp_path / "lm")
    shutil.copytree(tmp_path / "whole" / "vision_tower", tmp_path / "tower")
    tensors = load_file(tmp_path / "lm" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, tmp_path / "lm" / "model.safetensors", {"format": "pt"})
    words = [f"model.vision_tower={tmp_path / 'tower'}", f"model.language_model={tmp_path / 'lm'}"]
    capsys.readouterr()
    run(llava_hf, tmp_path / "ours", *words)
    said = capsys.readouterr().out
    assert "vision_tower: 0 of" in said and "taken: projector (4 tensors), language_model" in said
    assert "tensors differ from" in said and "model.layers.1.mlp.up_proj.weight" in said
    assert not (tmp_path / "ours" / "vision_tower").exists() and (tmp_path / "ours" / "language_model").exists()
    assert isinstance(model.load(tmp_path / "ours").answer("What?"), str)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', expected gelu"),
        ({"vision_feature_select_strategy": "default"}, "strategy is 'default', expected full"),
        ({"vision_feature_layer": [-2, -1]}, "expected one number"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type is 'mistral', expected qwen2"),
    ],
)
def test_what_a_llava_hf_folder_computes_otherwise_is_named(llava_hf, tmp_path, values, message):
    config = json.loads((llava_hf / "config.json").read_text())
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=f"parts that this project computes otherwise: .*{message}"):
        run(tmp_path / "theirs", tmp_path / "ours")


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_is_executed_and_nothing_is_left(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "theirs"
    write_ancestor(folder)
    good = torch.load(folder / "other_params.bin", weights_only=True)
    for values, message in (
        (good | {"0.weight": Code()}, "holds more than tensors"),
        (
            good | {"3.weight": random(2)},
            "missing or unexpected: 3.weight; expected 0.weight, 0.bias, 2.weight, 2.bias",
        ),
        ({"0.weight": good["0.weight"]}, "3 tensors missing"),
        (good | {"0.bias": good["0.bias"] * float("nan")}, "'0.bias' is not finite"),
        (good | {"2.bias": random(3)}, "do not fit together"),
        ([1], "not a dict of floating-point tensors"),
    ):
        torch.save(values, folder / "other_params.bin")
        with pytest.raises(InputError, match=message):
            run(folder, tmp_path / "ours", parts=parts)
    (folder / "other_params.bin").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="other_params.bin: (damaged|holds more than tensors)"):
        run(folder, tmp_path / "ours", parts=parts)
    torch.save(good, folder / "other_params.bin")
    with pytest.raises(InputError, match="projector: .*of another shape.*linear_1.weight is .64, 32., the model has"):
        run(folder, tmp_path / "ours", "model.projector_hidden_size=16", parts=parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"use_rslora": True}, "use_rslora is True; expected plain LoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 8}, "expected a lora_A and a lora_B of rank 8"),
        ({"r": None}, "expected numbers"),
    ],
)
def test_variants_of_lora_are_refused(parts, tmp_path, values, message):
    write_ancestor(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(InputError, match=message):
        run(tmp_path / "theirs", tmp_path / "ours", parts=parts)


def test_folders_of_another_kind_get_one_message(parts, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match="found x.bin; expected other_params.bin"):
        run(tmp_path / "other", tmp_path / "ours", parts=parts)
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "none", tmp_path / "ours")
    torch.save({"model.mm_projector.weight": random(D, 32)}, tmp_path / "other" / "mm_projector.bin")
    with pytest.raises(
        InputError, match="missing or unexpected: model.mm_projector.bias; expected model.mm_projector.w"
    ):
        run(tmp_path / "other", tmp_path / "ours", parts=parts)
    (tmp_path / "other" / "config.json").write_text(json.dumps({"mm_projector_type": "mlp3x_gelu"}))
    with pytest.raises(InputError, match="of type 'mlp3x_gelu'; only mlp2x_gelu, .* and linear"):
        run(tmp_path / "other", tmp_path / "ours", parts=parts)
    (tmp_path / "nano").mkdir()
    save_file({"MP.proj.weight": random(D, 32 * 16)}, tmp_path / "nano" / "model.safetensors")
    settings = {
        "mp_pixel_shuffle_factor": 4,
        "vit_model_type": "google/siglip2",
        "lm_model_type": "HuggingFaceTB/SmolLM2",
    }
    (tmp_path / "nano" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        InputError, match="nanoVLM.*not imported.*'google/siglip2'.*'HuggingFaceTB/SmolLM2'.*pixel_shuffle_factor 4"
    ):
        run(tmp_path / "nano", tmp_path / "ours", parts=parts)
    write_ancestor(tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path / "ours", parts=parts)
    with pytest.raises(InputError, match="is this project's checkpoint already"):
        run(tmp_path / "ours", tmp_path / "again", parts=parts)
    with pytest.raises(InputError, match="exists and is not empty"):
        run(tmp_path / "theirs", tmp_path / "ours", parts=parts)
