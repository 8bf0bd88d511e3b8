"""The image processor: RGB images to pixel_values, exactly as the encoder was trained.

This is the only image transform of the project. Image files, models and the config are not known here.

Shapes: M images, S the side of the square output in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from config import InputError, choose

# Type in preprocessor_config.json -> (class, defaults for keys missing from the file). The classes compute with Pillow, so
# pixels are the same with and without torchvision. DINOv3's own class needs torchvision; Bit's does the same steps, except
# that it resizes 8-bit pixels and DINOv3's resizes floats.
_PROCESSORS: dict[str, tuple[type[BaseImageProcessor], dict]] = {
    "CLIPImageProcessor": (CLIPImageProcessorPil, {}),
    "CLIPFeatureExtractor": (CLIPImageProcessorPil, {}),
    "SiglipImageProcessor": (SiglipImageProcessorPil, {}),
    "BitImageProcessor": (BitImageProcessorPil, {}),
    "ConvNextImageProcessor": (ConvNextImageProcessorPil, {}),
    "ConvNextFeatureExtractor": (ConvNextImageProcessorPil, {}),
    "MobileNetV2ImageProcessor": (MobileNetV2ImageProcessorPil, {}),
    "MobileNetV2FeatureExtractor": (MobileNetV2ImageProcessorPil, {}),
    "DINOv3ViTImageProcessor": (
        BitImageProcessorPil,
        {
            "do_center_crop": False,
            "resample": Image.Resampling.BILINEAR,
            "image_mean": IMAGENET_DEFAULT_MEAN,
            "image_std": IMAGENET_DEFAULT_STD,
        },
    ),
}
MAX_SIDE = 4096  # pixels per side of the output and of the resized image before cropping


class ImageProcessor:
    """An encoder's own resizing, cropping and normalisation: transformers' implementation on Pillow.

    Made by `load_image_processor`. The output is square, with `image_size` pixels per side.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self._processor: Any = processor  # its settings are attributes that the library does not declare
        self.image_size = _output_size(processor, "the image processor")

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """Transform M images from `read_image` to pixel_values, float32 [M, 3, S, S], each independent of the others.

        ValueError: an image is not RGB.
        """
        if not images:
            return torch.empty(0, 3, self.image_size, self.image_size)
        for image in images:
            if image.mode != "RGB":
                raise ValueError(f"an image of mode {image.mode}, not RGB: read images with visual.images.read_image")
        return self._processor(images, return_tensors="pt")["pixel_values"]

    def denormalise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the images that the encoder gets: pixel_values [M, 3, S, S] -> uint8 [M, S, S, 3]."""
        mean = torch.tensor(self._processor.image_mean).view(3, 1, 1)
        std = torch.tensor(self._processor.image_std).view(3, 1, 1)
        pixels = (pixel_values.float().cpu() * std + mean) / self._processor.rescale_factor
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json to `folder`; `load_image_processor(folder)` then makes identical pixels."""
        self._processor.save_pretrained(folder)

    def settings(self) -> dict:
        """Return all settings that the pixels depend on, as in preprocessor_config.json."""
        return self._processor.to_dict()


def load_image_processor(path: str | Path, image_size: int | None = None) -> ImageProcessor:
    """Load the processor described in the preprocessor_config.json of a folder or hub model.

    `image_size`: another side of the square output, in pixels; the size before a crop is scaled with it. ConvNeXt's class
    crops below 384 pixels; from there on it squeezes the whole image into the square, as its released encoders were trained.
    InputError: the file is missing, its type is unknown, a step is switched off, or the output is not square.
    """
    try:
        found, _ = BaseImageProcessor.get_image_processor_dict(path)
        if not isinstance(found, dict):
            raise OSError("expected keys and values")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: preprocessor_config.json not found or cannot be read ({error}); "
            "copy it from the source of the encoder's weights."
        ) from error
    try:
        return _processor_from(found, path, image_size)
    except InputError:
        raise
    except Exception as error:  # transformers' classes raise nearly anything on a damaged file's values
        raise InputError(
            f"{path}/preprocessor_config.json: cannot be used ({type(error).__name__}: {str(error):.200}); "
            "copy it from the source of the encoder's weights."
        ) from error


def _processor_from(found: dict, path: str | Path, image_size: int | None) -> ImageProcessor:
    name = found.get("image_processor_type") or found.get("feature_extractor_type")
    if not name:
        raise InputError(
            f'{path}/preprocessor_config.json: no "image_processor_type"; add the one that the encoder was trained with, '
            f"one of {', '.join(_PROCESSORS)}."
        )
    kind, defaults = choose(_PROCESSORS, str(name).removesuffix("Fast"), f"{path}/preprocessor_config.json")
    for key in found:
        if callable(getattr(kind, key, None)):  # the value would replace a method
            raise InputError(f"{path}/preprocessor_config.json: {key!r:.80} is not a setting; remove it.")
    processor: Any = kind.from_dict(defaults | found)
    side = _output_size(processor, f"{path}/preprocessor_config.json")
    if image_size is not None and image_size != side:
        square = {"height": image_size, "width": image_size}
        if processor.do_center_crop or kind is ConvNextImageProcessorPil:
            resized = {key: round(value * image_size / side) for key, value in dict(processor.size).items()}
            changed = {"size": resized, "crop_size": square}
        else:
            changed = {"size": square}
        processor = kind.from_dict(processor.to_dict() | changed)
    if not all(processor.image_std) or len(processor.image_std) != 3 or len(processor.image_mean) != 3:
        raise InputError(
            f"{path}/preprocessor_config.json: image_mean {processor.image_mean}, image_std {processor.image_std}; "
            "expected three numbers each, and image_std without 0."
        )
    if not 0 < processor.rescale_factor <= 1:
        raise InputError(
            f"{path}/preprocessor_config.json: rescale_factor {processor.rescale_factor}; expected a number above 0 and at "
            "most 1, such as 1/255."
        )
    _refuse_absurd_sizes(processor, f"{path}/preprocessor_config.json")
    result = ImageProcessor(processor)
    if not result([Image.new("RGB", (3, 2))]).isfinite().all():  # an error here comes from the file's other values
        raise ValueError("the pixels that it makes are not finite")
    return result


def _refuse_absurd_sizes(processor: Any, where: str) -> None:
    """Raise InputError for sizes at which resizing could fill the memory: the file may come from a stranger."""
    output = _output_size(processor, where)
    limit = min(4 * output, MAX_SIDE)  # sensible files resize to slightly more than they crop
    sides = {name: side for name, side in dict(processor.size).items() if side is not None}
    if (part := getattr(processor, "crop_pct", None)) is not None:
        if not 0 < part <= 1:
            raise InputError(
                f"{where}: crop_pct is {part!r:.80}; expected a fraction above 0 and at most 1, such as 0.875."
            )
        sides["shortest_edge / crop_pct"] = int(sides["shortest_edge"] / part)
    if not all(type(side) is int and 0 < side <= limit for side in [output, *sides.values()]):
        raise InputError(
            f"{where}: output of {output} pixels per side from size {sides}; expected whole numbers from 1 to {limit}."
        )
    if getattr(processor, "do_pad", None):
        raise InputError(f"{where}: do_pad is on; use the encoder's own file, in which it is off.")


def _output_size(processor: Any, where: str) -> int:
    """Return the side of a processor's square output. InputError: it is not square, or a step is switched off."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, step):
            raise InputError(f"{where}: {step} is off; use the encoder's own file, in which it is on.")
    made = processor.crop_size if processor.do_center_crop else processor.size
    makes_squares = isinstance(processor, ConvNextImageProcessorPil) and made is processor.size
    if makes_squares and made.shortest_edge:
        return made.shortest_edge
    if not made.height or made.height != made.width:
        raise InputError(
            f"{where}: the output size {dict(made)} is not square; "
            "give an equal height and width in size, or do_center_crop with such a crop_size."
        )
    return made.height
