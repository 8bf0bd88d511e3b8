"""The image processor: RGB pictures -> pixel_values, exactly as the encoder at hand was trained to see them.

There is no second image transform anywhere. Knows nothing of image files, models or the config.

Shapes: M images, S the side of the square output in pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from config import InputError, choose

# By the type in preprocessor_config.json: the class that computes with Pillow, hence the same pixels with and without
# torchvision, and values for what the file leaves out. DINOv3's own class exists for torchvision alone; Bit's does the
# same steps (it resizes 8 bit pixels, DINOv3's resizes floats).
_PROCESSORS: dict[str, tuple[type[BaseImageProcessor], dict]] = {
    "CLIPImageProcessor": (CLIPImageProcessorPil, {}),
    "CLIPFeatureExtractor": (CLIPImageProcessorPil, {}),
    "SiglipImageProcessor": (SiglipImageProcessorPil, {}),
    "BitImageProcessor": (BitImageProcessorPil, {}),
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
MAX_SIDE = 4096  # pixels that an image may have a side, while it is resized too


class ImageProcessor:
    """RGB images -> pixel_values: an encoder's own resizing, cropping and normalisation (transformers', on Pillow).

    `processor` comes from `load_image_processor`; its output is square, `image_size` pixels a side.
    """

    def __init__(self, processor: BaseImageProcessor) -> None:
        self._processor = processor
        self.image_size = _output_size(processor, "the image processor")

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """M images, as `read_image` returns them -> pixel_values float32 [M, 3, S, S], each independent of the others.

        ValueError: an image that is not RGB.
        """
        if not images:
            return torch.empty(0, 3, self.image_size, self.image_size)
        for image in images:
            if image.mode != "RGB":
                raise ValueError(f"an image of mode {image.mode}, not RGB: read images with visual.images.read_image")
        return self._processor(images, return_tensors="pt")["pixel_values"]

    def denormalise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values [M, 3, S, S] -> uint8 [M, S, S, 3], the picture that the encoder was shown."""
        mean = torch.tensor(self._processor.image_mean).view(3, 1, 1)
        std = torch.tensor(self._processor.image_std).view(3, 1, 1)
        pixels = (pixel_values.float().cpu() * std + mean) / self._processor.rescale_factor
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def save(self, folder: str | Path) -> None:
        """Write preprocessor_config.json into `folder`: `load_image_processor(folder)` then makes identical pixels."""
        self._processor.save_pretrained(folder)


def load_image_processor(path: str | Path, image_size: int | None = None) -> ImageProcessor:
    """The processor described in the preprocessor_config.json of a folder or hub model.

    `image_size`: another side of the square output, in pixels; what is resized before a crop scales along.
    InputError: no such file, an unknown type, a step left out, or an output that is not square.
    """
    try:
        found, _ = BaseImageProcessor.get_image_processor_dict(path)
    except OSError as error:
        raise InputError(
            f"{path}: no preprocessor_config.json that can be read ({error}); "
            "copy it from where the encoder's weights come from."
        ) from error
    try:
        return _processor_from(found, path, image_size)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file's values do to transformers' classes
        raise InputError(
            f"{path}/preprocessor_config.json: cannot be used ({type(error).__name__}: {str(error):.200}); "
            "copy it from where the encoder's weights come from."
        ) from error


def _processor_from(found: dict, path: str | Path, image_size: int | None) -> ImageProcessor:
    name = found.get("image_processor_type") or found.get("feature_extractor_type")
    if not name:
        raise InputError(
            f'{path}/preprocessor_config.json: no "image_processor_type"; add it, with the one that the encoder was '
            f"trained with: {', '.join(_PROCESSORS)}."
        )
    kind, defaults = choose(_PROCESSORS, name.removesuffix("Fast"), f"{path}/preprocessor_config.json")
    processor = kind.from_dict(defaults | found)
    made = _output_size(processor, f"{path}/preprocessor_config.json")
    if image_size is not None and image_size != made:
        square = {"height": image_size, "width": image_size}
        if processor.do_center_crop:
            resized = {key: round(side * image_size / made) for key, side in dict(processor.size).items()}
            changed = {"size": resized, "crop_size": square}
        else:
            changed = {"size": square}
        processor = kind.from_dict(processor.to_dict() | changed)
    if not all(processor.image_std) or len(processor.image_std) != 3 or len(processor.image_mean) != 3:
        raise InputError(
            f"{path}/preprocessor_config.json: image_mean {processor.image_mean}, image_std {processor.image_std}; "
            "expected three numbers each, none of image_std 0."
        )
    _refuse_absurd_sizes(processor, f"{path}/preprocessor_config.json")
    made = ImageProcessor(processor)
    if not made([Image.new("RGB", (3, 2))]).isfinite().all():  # an error here is one of the file's other values
        raise ValueError("it makes pixels that are no numbers")
    return made


def _refuse_absurd_sizes(processor: BaseImageProcessor, where: str) -> None:
    """A checkpoint's file may be a stranger's: resizing must not fill the memory."""
    made = _output_size(processor, where)
    limit = min(4 * made, MAX_SIDE)  # sensible files resize to a little more than what they cut out
    sides = {name: side for name, side in dict(processor.size).items() if side is not None}
    if not all(type(side) is int and 0 < side <= limit for side in [made, *sides.values()]):
        raise InputError(f"{where}: makes {made} pixels a side of size {sides}; expected whole numbers, 1 to {limit}.")
    if getattr(processor, "do_pad", None):
        raise InputError(f"{where}: do_pad is on; use the encoder's own file, in which it is off.")


def _output_size(processor: BaseImageProcessor, where: str) -> int:
    """The side of the square that a processor makes. InputError: it makes none, or leaves a step out."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, step):
            raise InputError(f"{where}: {step} is off; use the encoder's own file, in which it is on.")
    made = processor.crop_size if processor.do_center_crop else processor.size
    if not made.height or made.height != made.width:
        raise InputError(
            f"{where}: makes images of {dict(made)}, not of one square size; "
            "give height and width, equal, in size, or do_center_crop with such a crop_size."
        )
    return made.height
