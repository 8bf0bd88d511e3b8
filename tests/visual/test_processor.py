"""Pixels equal those of transformers and of plain arithmetic, and stay equal after saving and loading."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from config import InputError
from tests import toy_towers
from visual.processor import load_image_processor

WRITERS = {
    "clip": toy_towers.write_clip,
    "siglip": toy_towers.write_siglip,
    "siglip2": toy_towers.write_siglip2,
    "dinov2": toy_towers.write_dinov2,
    "dinov2_with_registers": toy_towers.write_dinov2_registers,
    "dinov3_vit": toy_towers.write_dinov3,
    "convnextv2": toy_towers.write_convnextv2,
    "mobilenet_v2": toy_towers.write_mobilenet_v2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


def make_image(height: int, width: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [make_image(50, 70), make_image(90, 41, seed=1), make_image(32, 32, seed=2)]


def change(folder, target, **values):
    """Write a copy of preprocessor_config.json with other values to the folder `target`."""
    found = json.loads((folder / "preprocessor_config.json").read_text())
    (target / "preprocessor_config.json").write_text(json.dumps(found | values))
    return target


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "dinov3_vit"])
def test_pixels_equal_transformers(folders, name):
    """All but DINOv3, whose class cannot be imported without torchvision."""
    theirs = AutoImageProcessor.from_pretrained(folders[name])(IMAGES, return_tensors="pt")["pixel_values"]
    ours = load_image_processor(folders[name])(IMAGES)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", WRITERS)
def test_pixels_equal_arithmetic(folders, name):
    """Resize, crop, divide by 255, subtract the mean, divide by std, each once, with Pillow and numpy."""
    values = json.loads((folders[name] / "preprocessor_config.json").read_text())
    for image, ours in zip(IMAGES, load_image_processor(folders[name])(IMAGES), strict=True):
        size, crop = values["size"], values.get("crop_size")
        short = size if isinstance(size, int) else size.get("shortest_edge")
        if part := values.get("crop_pct"):
            crop, short = short, int(short / part)
        if short:
            scale = short / min(image.size)
            resized = image.resize(tuple(int(side * scale) for side in image.size), values["resample"])
            crop = crop if isinstance(crop, int) else crop["height"]
            left, top = (resized.width - crop) // 2, (resized.height - crop) // 2
            resized = resized.crop((left, top, left + crop, top + crop))
        else:
            resized = image.resize((size["width"], size["height"]), values["resample"])
        expected = (np.asarray(resized) / 255 - values["image_mean"]) / values["image_std"]
        assert np.abs(ours.permute(1, 2, 0).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("name", WRITERS)
def test_an_image_has_the_same_pixels_alone_and_in_a_batch(folders, name):
    processor = load_image_processor(folders[name])
    batch = processor(IMAGES)
    side = processor.image_size
    assert batch.shape == (3, 3, side, side)
    for image, pixels in zip(IMAGES, batch, strict=True):
        assert torch.equal(processor([image])[0], pixels)
    assert processor([]).shape == (0, 3, side, side)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "dinov3_vit"])
def test_denormalise_restores_the_image(folders, name):
    """Exactly for an image of the right size: pixels are normalised and scaled by 255 once."""
    processor = load_image_processor(folders[name])
    image = make_image(processor.image_size, processor.image_size)
    shown = processor.denormalise(processor([image]))
    assert shown.dtype == torch.uint8 and np.array_equal(shown[0].numpy(), np.asarray(image))


@pytest.mark.parametrize("name", WRITERS)
def test_a_saved_processor_makes_identical_pixels(folders, tmp_path, name):
    for image_size in (None, 56):
        processor = load_image_processor(folders[name], image_size=image_size)
        processor.save(tmp_path / str(image_size))
        again = load_image_processor(tmp_path / str(image_size))
        assert again.image_size == processor.image_size
        assert torch.equal(again(IMAGES), processor(IMAGES))
        theirs = AutoImageProcessor.from_pretrained(tmp_path / str(image_size))(IMAGES, return_tensors="pt")
        assert torch.equal(theirs["pixel_values"], processor(IMAGES))


def test_dinov3_loads_the_keys_that_transformers_5_saves(folders, tmp_path):
    """Null values are not saved, and must not get Bit's defaults (a crop of 224, CLIP's mean and std)."""
    values = json.loads((folders["dinov3_vit"] / "preprocessor_config.json").read_text())
    kept = {key: values[key] for key in ("image_processor_type", "size", "do_resize", "do_rescale", "do_normalize")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kept))
    assert torch.equal(load_image_processor(tmp_path)(IMAGES), load_image_processor(folders["dinov3_vit"])(IMAGES))


def test_another_image_size_shows_the_same_part_of_the_image(folders):
    """DINOv2 resizes to 32 and crops to 28. At 56 that is 64 and 56, not 32 padded with black to 56."""
    image = make_image(64, 64)
    shown = load_image_processor(folders["dinov2"], image_size=56)
    assert shown.image_size == 56
    assert np.array_equal(shown.denormalise(shown([image]))[0].numpy(), np.asarray(image.crop((4, 4, 60, 60))))
    assert load_image_processor(folders["siglip"], image_size=64)([image]).shape == (1, 3, 64, 64)


def test_convnexts_processor_crops_below_384_pixels_and_squeezes_from_there_on(folders):
    image = make_image(500, 400)
    cropped, squeezed = (load_image_processor(folders["convnextv2"], image_size=size) for size in (350, 400))
    resized = image.resize((400, 500), Image.Resampling.BICUBIC).crop((25, 75, 375, 425))  # 350 / 0.875 = 400
    assert np.array_equal(cropped.denormalise(cropped([image]))[0].numpy(), np.asarray(resized))
    resized = image.resize((400, 400), Image.Resampling.BICUBIC)
    assert np.array_equal(squeezed.denormalise(squeezed([image]))[0].numpy(), np.asarray(resized))


def test_images_that_are_not_rgb_are_refused(folders):
    for mode in ("L", "RGBA", "CMYK"):
        with pytest.raises(ValueError, match=f"mode {mode}, not RGB"):
            load_image_processor(folders["clip"])([Image.new(mode, (8, 8))])


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"preprocessor_config\.json not found.*copy it from the source of the encoder's weights"
    ):
        load_image_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json not found or cannot be read"):
        load_image_processor(tmp_path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("siglip", {"image_processor_type": "SiglipImageProcesor"}, 'did you mean "SiglipImageProcessor"'),
        ("siglip", {"image_processor_type": "Siglip2ImageProcessor"}, '"Siglip2ImageProcessor" is unknown'),
        ("siglip", {"image_processor_type": None}, 'no "image_processor_type"; add the one.*BitImageProcessor'),
        ("siglip", {"size": {"height": 32, "width": 48}}, "is not square"),
        ("clip", {"crop_size": {"height": 28, "width": 21}}, "is not square"),
        ("clip", {"do_center_crop": False}, "is not square"),
        ("dinov2", {"do_resize": False}, "do_resize is off"),
        ("siglip", {"do_rescale": False}, "do_rescale is off"),
        ("siglip", {"do_normalize": False}, "do_normalize is off"),
        ("convnextv2", {"crop_pct": 0}, "crop_pct is 0; expected a fraction above 0 and at most 1"),
        ("convnextv2", {"crop_pct": 1.5}, "crop_pct is 1.5; expected a fraction"),
        ("convnextv2", {"crop_pct": 1e-6}, "from size .*shortest_edge / crop_pct': 64000000"),
        ("convnextv2", {"crop_pct": None}, "cannot be used"),
        ("convnextv2", {"size": {"height": 64, "width": 32}}, "is not square"),
        ("mobilenet_v2", {"do_center_crop": False}, "is not square"),
    ],
)
def test_unusable_processor_files_are_refused(folders, tmp_path, name, values, message):
    with pytest.raises(InputError, match=message) as error:
        load_image_processor(change(folders[name], tmp_path, **values))
    assert str(tmp_path) in str(error.value)
