"""Convolutional encoders: their patches are transformers' grids, BatchNorm keeps its statistics, sizes come without weights.

Run: python -m pytest tests/visual/test_convolutional.py
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from config import InputError
from tests import toy_towers
from tests.toy_project import run_training, write_project
from visual.convolutional import EfficientNetLite
from visual.encoders import ENCODERS, load_vision_tower, num_image_tokens
from visual.feature_cache import cache_folder
from visual.processor import load_image_processor

torch.set_num_threads(1)

WRITERS = {
    "resnet": toy_towers.write_resnet,
    "resnet, basic": lambda folder: toy_towers.write_resnet(folder, layer_type="basic"),
    "convnext": toy_towers.write_convnext,
    "convnextv2": toy_towers.write_convnextv2,
    "dinov3_convnext": toy_towers.write_dinov3_convnext,
    "mobilenet_v2": toy_towers.write_mobilenet_v2,
    "efficientnet_lite": toy_towers.write_efficientnet_lite,
}
OF_TRANSFORMERS = [name for name in WRITERS if name != "efficientnet_lite"]
# family -> for feature layers -1, -2 and 1: (patches at 64 pixels, width), counted by hand
FOUR_STAGES = [(2 * 2, toy_towers.HIDDEN_SIZE), (4 * 4, 16), (16 * 16, 8)]
GRIDS = dict.fromkeys(WRITERS, FOUR_STAGES) | {
    "mobilenet_v2": [(2 * 2, 80), (2 * 2, 40), (16 * 16, 8)],
    "efficientnet_lite": [(8 * 8, toy_towers.HIDDEN_SIZE), (8 * 8, 16), (32 * 32, 8)],
}
every_family = pytest.mark.parametrize("name", [name for name in WRITERS if "basic" not in name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("tower") / "tower") for name, write in WRITERS.items()}


def pixels_of(size: int = 64, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def changed(folder: Path, target: Path, **values) -> Path:
    """Copy an encoder's folder to `target` with other values in its config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


# Features


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_patches_are_the_grid_of_transformers_hidden_states(folders, name):
    reference = AutoModel.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        hidden_states = reference(pixels_of(), output_hidden_states=True).hidden_states
    for feature_layer in (-1, -2, 1):
        grid = hidden_states[feature_layer]
        tower = load_vision_tower(folders[name], feature_layer)
        expected = torch.stack([grid[:, :, y, x] for y in range(grid.shape[2]) for x in range(grid.shape[3])], dim=1)
        assert torch.equal(tower(pixels_of()), expected)
    assert tower.model.state_dict().keys() == reference.state_dict().keys(), "the tower can be saved whole"


def efficientnet(weights: dict[str, Tensor], grid: Tensor, strides: dict[str, int]) -> Tensor:
    """Evaluate an EfficientNet-Lite from its weights, by the paper: no module of the project is used."""

    def convolve(grid: Tensor, name: str) -> Tensor:
        kernel, stride = weights[f"{name}.conv.weight"], strides.get(name, 1)
        size, side = kernel.shape[-1], grid.shape[-1]
        total = max((side + stride - 1) // stride * stride - stride + size - side, 0)
        before = total // 2
        canvas = torch.zeros(*grid.shape[:2], side + total, side + total)
        canvas[:, :, before : before + side, before : before + side] = grid
        grid = functional.conv2d(canvas, kernel, stride=stride, groups=1 if kernel.shape[1] > 1 else len(kernel))
        mean, var, scale, shift = (
            weights[f"{name}.norm.{part}"][None, :, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (grid - mean) / (var + 1e-3).sqrt() * scale + shift

    grid = convolve(grid, "stem").clamp(0, 6)
    stages = sorted({int(name.split(".")[1]) for name in weights if name.startswith("stages")})
    for stage in stages[:-1]:
        blocks = {int(name.split(".")[2]) for name in weights if name.startswith(f"stages.{stage}.")}
        for block in sorted(blocks):
            path, before = f"stages.{stage}.{block}", grid
            if f"{path}.expand.conv.weight" in weights:
                grid = convolve(grid, f"{path}.expand").clamp(0, 6)
            grid = convolve(convolve(grid, f"{path}.depthwise").clamp(0, 6), f"{path}.project")
            grid = grid + before if block > 0 or grid.shape == before.shape else grid
    return convolve(grid, f"stages.{stages[-1]}").clamp(0, 6)


@pytest.mark.parametrize("size", [64, 56])  # 56: a grid of 7 x 7
def test_efficientnet_lite_computes_what_its_weights_say(folders, size):
    tower = load_vision_tower(folders["efficientnet_lite"], -1, image_size=size)
    weights = load_file(folders["efficientnet_lite"] / "model.safetensors")
    strides = {"stem": 2, "stages.1.0.depthwise": 2, "stages.2.0.depthwise": 2}
    grid = efficientnet(weights, pixels_of(size), strides)
    assert tower.num_image_tokens == (size // 8) ** 2
    expected = grid.permute(0, 2, 3, 1).reshape(2, tower.num_image_tokens, -1)
    torch.testing.assert_close(tower(pixels_of(size)), expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0).float().mean() > 0.2, "the comparison has something to compare"


@every_family
def test_width_stride_and_tokens_are_those_of_the_layer_and_need_no_weights(folders, tmp_path, name):
    for feature_layer, (patches, width) in zip((-1, -2, 1), GRIDS[name], strict=True):
        tower = load_vision_tower(folders[name], feature_layer)
        assert tower(pixels_of()).shape == (2, patches, width) == (2, tower.num_image_tokens, tower.hidden_size)
        assert tower.patch_size**2 * patches == 64**2
        assert tower(pixels_of()[:0]).shape == (0, patches, width)
    bare = shutil.copytree(folders[name], tmp_path / "tower", ignore=shutil.ignore_patterns("*.safetensors"))
    assert [num_image_tokens(bare, layer) for layer in (-1, -2, 1)] == [patches for patches, _ in GRIDS[name]]


@pytest.mark.parametrize(("values", "tokens"), [({"output_stride": 16}, 16), ({"output_stride": 8}, 64)])
def test_a_smaller_output_stride_makes_more_patches(folders, tmp_path, values, tokens):
    """MobileNetV2 then dilates its convolutions."""
    folder = changed(folders["mobilenet_v2"], tmp_path, **values)
    assert num_image_tokens(folder, -1) == tokens == load_vision_tower(folder, -1)(pixels_of()).shape[1]


# Sizes and layers


def test_any_multiple_of_the_stride_is_taken_and_others_are_refused(folders):
    for name, ((patches, _), *_) in GRIDS.items():
        size = 3 * 64 // math.isqrt(patches)
        tower = load_vision_tower(folders[name], -1, image_size=size)
        assert tower(pixels_of(size)).shape[1] == 9 == tower.num_image_tokens
    for feature_layer, stride, nearest in ((-1, 32, 96), (-2, 16, 80)):
        message = rf"image_size: 84 .*stride at model\.vision_feature_layer, {stride}; the nearest is {nearest}"
        for load in (num_image_tokens, load_vision_tower):
            with pytest.raises(InputError, match=message):
                load(folders["resnet"], feature_layer, image_size=84)
    assert num_image_tokens(folders["resnet"], 1, image_size=84) == 21 * 21


def test_layers_that_do_not_exist_are_refused(folders):
    for layer in (0, -5, 5):
        with pytest.raises(InputError, match=f"vision_feature_layer: {layer}, but .*4 layers; .*-1.* to -4, or 1 to 4"):
            num_image_tokens(folders["resnet"], layer)
    for layer in (16, -17):
        with pytest.raises(InputError, match="vision_feature_layer: .*16 layers; .*-1.* to -16, or 0 to 15"):
            num_image_tokens(folders["mobilenet_v2"], layer)
    # MobileNetV2's hidden states begin with the first block's output
    first, same = (load_vision_tower(folders["mobilenet_v2"], layer) for layer in (0, -16))
    assert torch.equal(first(pixels_of()), same(pixels_of()))


# Frozen and trained


@every_family
def test_batchnorm_keeps_its_statistics_while_the_tower_trains(folders, name):
    tower = load_vision_tower(folders[name], -2)
    parent = torch.nn.Sequential(tower).train()
    assert not any(module.training for module in tower.modules())
    before, buffers = tower(pixels_of()), {key: value.clone() for key, value in tower.named_buffers()}
    tower.unfreeze()
    parent.train()
    assert tower.training
    features = tower(pixels_of())
    assert torch.equal(features, before)
    features.sum().backward()
    trainable = {key for key, parameter in tower.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, parameter in tower.named_parameters() if parameter.grad is not None}
    assert all(torch.equal(value, buffers[key]) for key, value in tower.named_buffers())
    parent.requires_grad_(False)
    parent.train()
    assert not any(module.training for module in tower.modules())


@every_family
def test_unfreezing_trains_what_the_features_depend_on_and_top_counts_stages(folders, name, feature_layer=-2):
    tower = load_vision_tower(folders[name], feature_layer)
    assert not tower.trains
    tower.unfreeze()
    trainable = {key for key, parameter in tower.named_parameters() if parameter.requires_grad}
    tower.requires_grad_(True)(pixels_of()).sum().backward()
    assert trainable == {key for key, parameter in tower.named_parameters() if parameter.grad is not None}

    tower = load_vision_tower(folders[name], feature_layer)
    tower.unfreeze(top=2)
    stages = {int(key.split("stages." if "stages" in key else "layer.")[1].split(".")[0]) for key in trained(tower)}
    count = 16 if name == "mobilenet_v2" else 4
    last = count + feature_layer
    assert stages == {last - 1, last}
    tower(pixels_of()).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(InputError, match=f"top:17, but {last + 1} of the encoder's {count} layers are run"):
        tower.unfreeze(top=17)


def trained(tower) -> list[str]:
    return [key for key, parameter in tower.named_parameters() if parameter.requires_grad]


@every_family
def test_layers_above_are_kept_but_not_run(folders, name):
    tower, called = load_vision_tower(folders[name], -2), set()
    for key, module in tower.model.named_modules():
        module.register_forward_hook(lambda *_, key=key: called.add(key))
    tower(pixels_of())
    layers = ENCODERS[name].layers
    count = len(tower.model.get_submodule(layers))
    assert f"{layers}.{count - 2}" in called and f"{layers}.{count - 1}" not in called
    assert not called & {"pooler", "pool", "layernorm", "layer_norm", "conv_1x1"}


@pytest.mark.parametrize("name", ["resnet", "convnextv2", "efficientnet_lite"])
@pytest.mark.parametrize("top", [1, None])
def test_a_tower_in_half_precision_trains_in_float32_below_autocast(folders, name, top):
    """The frozen part stays bfloat16. BatchNorm is float32 throughout: a norm of two types is refused by torch."""
    expected = load_vision_tower(folders[name], -1)(pixels_of())
    tower = load_vision_tower(folders[name], -1, dtype=torch.bfloat16)
    assert {norm.running_var.dtype for norm in norms(tower)} <= {torch.float32}
    frozen = tower(pixels_of().bfloat16())
    assert frozen.dtype == tower.model.dtype == torch.bfloat16
    tower.unfreeze(top)
    for parameter in tower.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        features = tower.train()(pixels_of().bfloat16())
    features.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tower.parameters() if parameter.requires_grad)
    for found in (frozen, features):
        assert (found - expected).norm() / expected.norm() < 0.1


def norms(tower) -> list[torch.nn.BatchNorm2d]:
    return [module for module in tower.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_the_caches_folder_depends_on_what_the_features_depend_on(folders, tmp_path):
    source = folders["efficientnet_lite"]
    tower, processor = load_vision_tower(source, -2), load_image_processor(source)
    folder, before = cache_folder(tmp_path / "qa.jsonl", tower, processor, torch.float32), tower(pixels_of())
    unused = set()
    for key, tensor in tower.model.state_dict().items():
        kept = tensor.clone()
        tensor.add_(1)
        if cache_folder(tmp_path / "qa.jsonl", tower, processor, torch.float32) == folder:
            assert torch.equal(tower(pixels_of()), before), key
            unused.add(key)
        tensor.copy_(kept)
    last = {key for key in tower.model.state_dict() if key.startswith("stages.3.")}
    assert unused == last | {key for key in tower.model.state_dict() if key.endswith("num_batches_tracked")}
    settings = json.loads((folders["resnet"] / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"crop_pct": 0.9}))
    tower, processor = load_vision_tower(folders["resnet"]), load_image_processor(folders["resnet"])
    one, other = (
        cache_folder(tmp_path / "qa.jsonl", tower, found, torch.float32)
        for found in (processor, load_image_processor(tmp_path))
    )
    assert one != other


@pytest.mark.parametrize("trainable", ["frozen", "top:1"])
def test_a_project_trains_with_a_convolutional_encoder(folders, tmp_path, trainable):
    config = write_project(tmp_path)
    values = yaml.safe_load(config.read_text())
    values["model"] |= {"vision_tower": str(folders["resnet"]), "vision_feature_layer": -2}
    values["train"] |= {"max_steps": 1, "eval_steps": None, "trainable": {"vision_tower": trainable}}
    if trainable != "frozen":
        values["train"]["vision_tower_lr"] = 1e-4
    config.write_text(yaml.safe_dump(values))
    assert run_training(config) == 0
    saved = tmp_path / "run" / "final" / "vision_tower.safetensors"
    assert saved.exists() == (trainable != "frozen")
    if saved.exists():
        assert all(".stages.2." in name for name in load_file(saved))


# A folder from somebody else


def test_weights_that_do_not_match_are_refused_but_a_classifier_is_left_out(folders, tmp_path):
    folder = shutil.copytree(folders["resnet"], tmp_path / "tower")
    path = folder / "model.safetensors"
    weights = load_file(path)
    assert any(name.startswith("classifier.") for name in weights)

    def refusal(found: dict) -> str:
        save_file(found, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match="the weights do not match its config.json") as error:
            load_vision_tower(folder)
        return str(error.value)

    statistic = "resnet.embedder.embedder.normalization.running_mean"
    assert "1 missing (such as embedder.embedder.normalization.running_mean)" in refusal(
        {name: value for name, value in weights.items() if name != statistic}
    )
    assert "1 of another shape" in refusal(weights | {statistic: torch.ones(4)})
    assert "1 unexpected" in refusal(weights | {"resnet.encoder.stages.4.weight": torch.ones(4)})


ABSURD = {
    "num_channels": (1, 10**6),
    "hidden_act": ("x", None),
    "dtype": ("x", "load"),
    "attn_implementation": ("name/kernel",),
    "hidden_sizes": (0, "x", [], [0] * 4, [8, 12, 16, 10**9], [8] * 10_000, [8, 12, 16, "x"], None, {"8": 8}),
    "depths": (0, [], [1, 1, 1, 0], [1, 1, 1, 10**9], [10**9] * 4, [1] * 10_000, [1, 1, 1, 1.5]),
}
ABSURD_OF = {
    "resnet": {"embedding_size": (0, 10**9, "x"), "layer_type": ("x",)},
    "convnextv2": {"patch_size": (0, 10**9, [4, "x"], [4, 8]), "num_stages": (0, 5, 10**9), "layer_norm_eps": ("x",)},
    "mobilenet_v2": {
        "hidden_sizes": (), "depths": (),
        "depth_multiplier": (0, -1, 10**9, float("nan"), float("inf"), "x"),
        "expand_ratio": (0, -1, 10**9, float("nan"), "x"),
        "depth_divisible_by": (0, 10**9), "min_depth": (0, 10**9), "output_stride": (0, "x"),
    },
    "efficientnet_lite": {
        "hidden_act": (), "stem_size": (0, 10**9), "head_size": (0, 10**9), "strides": ([1, 2, 3], [2, 2], 0),
        "kernel_sizes": ([3, 5, 0], [3, 5, 10**6]), "expansions": ([0, 1, 1], [1, 1, 10**6]), "batch_norm_eps": ("x",),
    },
}  # fmt: skip
TOO_MUCH = {"hidden_sizes": [2**14] * 4, "depths": [2**5] * 4}  # possible, but more than the weights beside it


@pytest.mark.parametrize("name", ABSURD_OF)
def test_an_absurd_config_is_one_message_before_memory_is_taken(folders, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ENCODERS[name].model, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for key, value in ((key, value) for key, found in (ABSURD | ABSURD_OF[name]).items() for value in found):
        folder = changed(folders[name], tmp_path / "tower", **{key: value})
        with pytest.raises(InputError, match=rf"{folder}.*config\.json|patch_size in the encoder's") as error:
            num_image_tokens(folder)
        assert len(str(error.value)) < 600, (key, value)
    for key, value in TOO_MUCH.items():
        if ABSURD_OF[name].get(key, True):
            folder = changed(
                folders[name], tmp_path / "tower", **{key: value[:3] if name == "efficientnet_lite" else value}
            )
            with pytest.raises(InputError, match=r"config\.json describes at least [\d,]+ weights, but"):
                load_vision_tower(folder)


def test_an_efficientnet_lite_is_saved_whole(folders, tmp_path):
    tower = load_vision_tower(folders["efficientnet_lite"], -2)
    tower.model.save_pretrained(tmp_path)
    shutil.copy(folders["efficientnet_lite"] / "preprocessor_config.json", tmp_path)
    assert isinstance(tower.model, EfficientNetLite)
    assert torch.equal(
        load_vision_tower(tmp_path, -1)(pixels_of()), load_vision_tower(folders["efficientnet_lite"], -1)(pixels_of())
    )
