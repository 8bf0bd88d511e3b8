"""The towers return the patches of transformers' own hidden states, and stay frozen."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from config import InputError
from tests import toy_towers
from tests.visual.test_convolutional import WRITERS
from visual.encoders import ENCODERS, load_vision_tower, num_image_tokens
from visual.processor import load_image_processor

torch.set_num_threads(1)

# Checkpoint -> (writer, tokens before the patches, patches), counted by hand.
TOWERS = {
    "clip": (toy_towers.write_clip, 1, 16),
    "clip_vision_model": (lambda folder: toy_towers.write_clip(folder, whole=False), 1, 16),
    "siglip": (toy_towers.write_siglip, 0, 16),
    "siglip_vision_model": (lambda folder: toy_towers.write_siglip(folder, whole=False), 0, 16),
    "siglip2 of fixed resolution": (toy_towers.write_siglip2, 0, 16),
    "dinov2": (toy_towers.write_dinov2, 1, 16),
    "dinov2_with_registers": (toy_towers.write_dinov2_registers, 5, 16),
    "dinov3_vit": (toy_towers.write_dinov3, 5, 16),
}
every_tower = pytest.mark.parametrize("name", TOWERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp("tower") / "tower") for name, (write, *_) in TOWERS.items()}


@pytest.fixture(scope="module")
def references(folders):
    """transformers' own vision models; for a whole checkpoint, the vision half of the whole model."""
    models = {name: AutoModel.from_pretrained(folder) for name, folder in folders.items()}
    return {name: getattr(model, "vision_model", model).eval() for name, model in models.items()}


def random_pixels(size: int, seed: int = 0, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_family_is_tested(folders):
    written = {json.loads((folder / "config.json").read_text())["model_type"] for folder in folders.values()}
    convolutional = {name.split(",")[0] for name in WRITERS}  # tests/visual/test_convolutional.py
    assert written | convolutional == set(ENCODERS) and not written & convolutional


# Features


@every_tower
@pytest.mark.parametrize("feature_layer", [-1, -2, -3, 1])
def test_features_are_the_patches_of_transformers_hidden_states(folders, references, name, feature_layer):
    _, prefix, patches = TOWERS[name]
    tower = load_vision_tower(folders[name], feature_layer)
    pixels = random_pixels(tower.image_size)
    with torch.no_grad():
        hidden_states = references[name](pixels, output_hidden_states=True).hidden_states
    features = tower(pixels)
    assert torch.equal(features, hidden_states[feature_layer][:, prefix:])
    assert features.shape == (2, patches, toy_towers.HIDDEN_SIZE) == (2, tower.num_image_tokens, tower.hidden_size)
    assert num_image_tokens(folders[name]) == patches


@every_tower
def test_the_default_is_the_layer_before_the_last(folders, name):
    pixels = random_pixels(load_vision_tower(folders[name]).image_size)
    assert torch.equal(load_vision_tower(folders[name])(pixels), load_vision_tower(folders[name], -2)(pixels))


@every_tower
def test_token_i_is_patch_i(folders, name):
    """If attention is off, a change inside one patch changes only its token: no patch is lost, no class token is kept."""
    tower = load_vision_tower(folders[name], feature_layer=1)
    with torch.no_grad():
        for key, parameter in tower.named_parameters():
            if "v_proj" in key:
                parameter.zero_()
    side, per_row = tower.patch_size, tower.image_size // tower.patch_size
    pixels = random_pixels(tower.image_size, count=1)
    before = tower(pixels)
    for patch in (0, 1, per_row, tower.num_image_tokens - 1):
        row, column = divmod(patch, per_row)
        changed = pixels.clone()
        changed[:, :, row * side, column * side] += 3.0
        differs = (tower(changed) != before).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == [patch]


@every_tower
def test_layers_above_and_heads_are_kept_but_not_run(folders, references, name):
    tower = load_vision_tower(folders[name], -2)
    called = set()
    for key, module in tower.model.named_modules():
        module.register_forward_hook(lambda *_, key=key: called.add(key))
    tower(random_pixels(tower.image_size))
    assert any(key.endswith(".2") for key in called) and not any(key.endswith(".3") for key in called)
    assert "head" not in called
    expected = references[name].state_dict()
    assert tower.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in tower.model.state_dict().items())


@every_tower
def test_a_tower_is_saved_whole(folders, references, tmp_path, name):
    load_vision_tower(folders[name], -3).model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    pixels = random_pixels(again.config.image_size)
    with torch.no_grad():
        expected = references[name](pixels)
        assert torch.equal(again(pixels).pooler_output, expected.pooler_output)


@every_tower
def test_an_image_alone_equals_the_batch_and_no_image_is_allowed(folders, name):
    tower = load_vision_tower(folders[name])
    pixels = random_pixels(tower.image_size, count=3)
    together = tower(pixels)
    for image, features in zip(pixels, together, strict=True):
        torch.testing.assert_close(tower(image[None])[0], features, rtol=1e-5, atol=1e-5)
    nothing = tower(pixels[:0])
    assert nothing.shape == (0, *together.shape[1:]) and nothing.dtype == together.dtype


def test_the_dtype_is_the_checkpoints_unless_given(tmp_path):
    folder = toy_towers.write_clip(tmp_path / "clip", whole=False)
    assert load_vision_tower(folder)(random_pixels(28)).dtype == torch.float32
    half = load_vision_tower(folder, dtype=torch.bfloat16)
    assert half(random_pixels(28)).dtype == half(random_pixels(28)[:0]).dtype == torch.bfloat16
    half.model.save_pretrained(folder)
    assert load_vision_tower(folder)(random_pixels(28)).dtype == torch.bfloat16


# Frozen


@every_tower
def test_a_tower_stays_frozen_and_in_eval_mode(folders, name):
    parent = nn.Sequential(load_vision_tower(folders[name]), nn.Linear(toy_towers.HIDDEN_SIZE, 2))
    tower = parent[0]
    pixels = random_pixels(tower.image_size)
    before = tower(pixels)
    parent.train()
    assert parent.training and parent[1].training
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters()) and not tower.trains
    assert torch.equal(tower(pixels), before)

    features = tower(pixels.requires_grad_())
    assert not features.requires_grad
    parent[1](features).sum().backward()
    assert pixels.grad is None and all(parameter.grad is None for parameter in tower.parameters())


@every_tower
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_unfreezing_all_trains_exactly_what_the_features_depend_on(folders, name, feature_layer):
    tower = load_vision_tower(folders[name], feature_layer)
    tower.unfreeze()
    tower(random_pixels(tower.image_size)).sum().backward()
    trainable = {key for key, parameter in tower.named_parameters() if parameter.requires_grad}
    for parameter in tower.parameters():  # reference: the parameters that autograd reaches when nothing is frozen
        parameter.grad = None
        parameter.requires_grad_(True)
    tower(random_pixels(tower.image_size)).sum().backward()
    assert trainable == {key for key, parameter in tower.named_parameters() if parameter.grad is not None}
    assert trainable and tower.trains


@every_tower
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_keeps_the_gradients(folders, name, use_reentrant):
    tower = load_vision_tower(folders[name], -2)
    tower.unfreeze()
    pixels = random_pixels(tower.image_size)

    def gradients():
        tower.zero_grad()
        torch.manual_seed(0)  # DINOv3 varies its positions in training
        tower.train()(pixels).square().sum().backward()
        return [parameter.grad for parameter in tower.parameters() if parameter.requires_grad]

    expected = gradients()
    tower.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))


@every_tower
def test_the_top_layers_are_the_last_ones_that_are_run(folders, name):
    tower = load_vision_tower(folders[name], -2)  # layers 0 to 2 of 4
    tower.unfreeze(top=2)
    trainable = [key for key, parameter in tower.named_parameters() if parameter.requires_grad]
    assert {key.split("layer")[1].split(".")[1] for key in trainable} == {"1", "2"}
    tower(random_pixels(tower.image_size)).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in tower.parameters())
    parent = nn.Sequential(tower).train()
    assert tower.training and tower.model.training
    parent.eval()
    assert not tower.model.training
    for top in (0, 4):
        with pytest.raises(
            InputError, match=f"top:{top}, but 3 of the encoder's 4 layers are run; give top:1 to top:3"
        ):
            tower.unfreeze(top=top)


# Sizes and layers


def test_sizes_come_from_the_processor(folders):
    """DINOv2's config has 42 pixels, but its processor crops to 28: 16 tokens, not 36."""
    tower = load_vision_tower(folders["dinov2"])
    assert tower.model.config.image_size == 42
    assert (tower.image_size, tower.patch_size, tower.num_image_tokens) == (28, 7, 16)
    siglip = load_vision_tower(folders["siglip"])  # 30 pixels hold 4 patches of 7 per side
    assert (siglip.image_size, siglip.patch_size, siglip.num_image_tokens) == (30, 7, 16)


@pytest.mark.parametrize(("name", "size", "tokens"), [("dinov2", 42, 36), ("dinov2", 56, 64), ("dinov3_vit", 48, 36)])
def test_dino_takes_other_multiples_of_its_patch_size(folders, references, name, size, tokens):
    tower = load_vision_tower(folders[name], image_size=size)
    pixels = load_image_processor(folders[name], image_size=size).denormalise(random_pixels(size))
    assert pixels.shape[1:3] == (size, size)
    features = tower(random_pixels(size))
    assert tower.num_image_tokens == tokens == features.shape[1]
    assert num_image_tokens(folders[name], image_size=size) == tokens
    with torch.no_grad():
        expected = references[name](random_pixels(size), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(features, expected[:, -tokens:])


def test_sizes_that_do_not_fit_are_refused(folders, tmp_path):
    with pytest.raises(InputError, match="image_size: 40 is not a multiple of this encoder's patch size 7.* 42"):
        load_vision_tower(folders["dinov2"], image_size=40)
    for name, trained in {"clip": 28, "siglip": 30}.items():
        assert load_vision_tower(folders[name], image_size=trained).image_size == trained
        with pytest.raises(InputError, match=f"image_size: 56, but .* learned positions for {trained} pixels"):
            load_vision_tower(folders[name], image_size=56)
    other = toy_towers.write_clip(tmp_path / "clip")  # another encoder's preprocessor_config.json
    edit_json(other / "preprocessor_config.json", size=35, crop_size=35)
    with pytest.raises(InputError, match=r"image_size: 35, but .* 28 pixels.*own preprocessor_config\.json"):
        load_vision_tower(other)
    with pytest.raises(
        ValueError, match=r"\(2, 3, 35, 35\)"
    ):  # DINOv2 itself would accept it, with another number of tokens
        load_vision_tower(folders["dinov2"])(random_pixels(35))


def test_layers_that_do_not_exist_are_refused(folders):
    for layer in (0, 5, -5, 23):
        with pytest.raises(InputError, match=f"vision_feature_layer: {layer}, but the encoder has 4 layers.*-1.*to -4"):
            load_vision_tower(folders["clip"], layer)


# Refusals


def test_unsupported_encoders_are_refused_by_name(tmp_path):
    def refusal(model_type) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(InputError, match=f'"{model_type}"') as error:
            load_vision_tower(tmp_path)
        return str(error.value)

    for naflex in ("siglip2", "siglip2_vision_model"):
        assert "NaFlex" in refusal(naflex) and "google/siglip2-base-patch16-224" in refusal(naflex)
    assert 'did you mean "dinov2"' in refusal("dino_v2")
    assert all(known in refusal("beit") for known in ENCODERS)


def test_a_config_without_a_model_type_is_refused_with_the_fix(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32}))
    with pytest.raises(InputError, match=rf'no "model_type" in config\.json; add it with.*{", ".join(ENCODERS)}'):
        load_vision_tower(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    folder = toy_towers.write_clip(tmp_path / "clip")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="quantization_config.*use the unquantised release"):
        load_vision_tower(folder)


def test_an_error_of_transformers_is_an_input_error(tmp_path):
    folder = toy_towers.write_siglip(tmp_path / "siglip", whole=False)
    edit_json(folder / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(InputError, match=rf"{folder}: the encoder cannot be loaded \(.*inside the model directory"):
        load_vision_tower(folder)


def test_folders_without_an_encoder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing", str(tmp_path / "missing")):
        with pytest.raises(
            InputError, match=rf"vision_tower {path}: not a folder with a config\.json, and not a hub model"
        ):
            load_vision_tower(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=str(tmp_path)):
        load_vision_tower(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_do_not_match_the_vision_half_are_refused(tmp_path, whole):
    folder = toy_towers.write_clip(tmp_path / "clip", whole)
    path = folder / "model.safetensors"
    weights = load_file(path)
    prefix = "vision_model." if whole else ""
    norm = prefix + "encoder.layers.1.layer_norm1.weight"

    def refusal(changed: dict) -> str:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match="the weights do not match its config.json") as error:
            load_vision_tower(folder)
        return str(error.value)

    assert "1 missing (such as encoder.layers.1.layer_norm1.weight)" in refusal(
        {key: value for key, value in weights.items() if key != norm}
    )
    assert "1 unexpected" in refusal(weights | {prefix + "encoder.layers.4.layer_norm1.weight": torch.ones(32)})
    assert "1 of another shape" in refusal(weights | {norm: torch.ones(16)})
    save_file(weights, path, metadata={"format": "pt"})
    load_vision_tower(folder)


def test_unreadable_weights_are_refused(tmp_path):
    folder = toy_towers.write_siglip(tmp_path / "siglip")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"{folder}: the encoder's weights cannot be read"):
        load_vision_tower(folder)
    path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"get a complete folder with model\.safetensors"):
        load_vision_tower(folder)


def test_released_vision_only_checkpoints_keep_the_prefix_of_the_whole(tmp_path):
    """Files saved by transformers 4 have the names vision_model.encoder... also if they contain only the vision half."""
    for write in (toy_towers.write_clip, toy_towers.write_siglip):
        folder = write(tmp_path / write.__name__, whole=False)
        pixels = random_pixels(load_vision_tower(folder).image_size)
        expected = load_vision_tower(folder)(pixels)
        path = folder / "model.safetensors"
        renamed = {f"vision_model.{key}": value for key, value in load_file(path).items()}
        save_file(renamed, path, metadata={"format": "pt"})
        assert torch.equal(load_vision_tower(folder)(pixels), expected)


# A config.json from somebody else

ABSURD = {
    "num_attention_heads": (0, -2, 5, "x"),
    "patch_size": (0, -7, "x", [7, "x"], 10**9),
    "image_size": ("x", 0, -28, 10**9, []),
    "hidden_size": (0, -1, 10**9, 2**14),
    "num_hidden_layers": (0, -1, 20_000),
    "num_channels": (1, 10**6),
    "hidden_act": ("x", None),
    "layer_norm_eps": ("x",),
    "dtype": ("x", "load"),
    "attn_implementation": ("name/kernel", "flash_attention_2"),
    "_attn_implementation": ("name/kernel", "flash_attention_2"),
}


TOO_MUCH = (2**14, 2**17)  # possible, but more than the weights beside it


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3_vit"])
def test_an_absurd_config_is_one_message_before_a_weight_is_made(folders, tmp_path, monkeypatch, name):
    """No model is made: a large one would fill the memory, and an attention by name may be downloaded as a kernel."""
    folder = shutil.copytree(folders[name], tmp_path / "tower")
    original = (folder / "config.json").read_text()
    monkeypatch.setattr(ENCODERS[name].model, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    sizes = ABSURD | {
        "intermediate_size": (10**12, 2**17) if name != "dinov2" else (),
        "mlp_ratio": (10**9, 0) if name == "dinov2" else (),
        "num_register_tokens": (10**9, -4) if name == "dinov3_vit" else (),
    }
    for key, value in ((key, value) for key, found in sizes.items() for value in found):
        values = json.loads(original)
        values.get("vision_config", values)[key] = value
        (folder / "config.json").write_text(json.dumps(values))
        for load in (num_image_tokens, load_vision_tower) if value not in TOO_MUCH else (load_vision_tower,):
            with pytest.raises(InputError, match=rf"{folder}.*config\.json") as error:
                load(folder)
            assert len(str(error.value)) < 600, (key, value)


@pytest.mark.parametrize("text", ["[]", "7", '"x"', "null", "", "{", "[" * 100_000, '{"model_type": ["clip"]}'])
def test_a_config_that_holds_no_keys_is_one_message(folders, tmp_path, text):
    folder = shutil.copytree(folders["clip"], tmp_path / "tower")
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=str(folder)):
        num_image_tokens(folder)
