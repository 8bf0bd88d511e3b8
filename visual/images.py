"""Image files: which ones a folder holds, and how one becomes an upright RGB picture.

The only place where a picture's file is opened, for training and for answering alike. Knows nothing of encoders,
tensors or data sets.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from config import InputError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# A strip 1 x 20,000 is a small file, but resized until its short side is 224 it takes gigabytes.
MAX_ASPECT_RATIO = 100


class ImageError(InputError):
    """An image file that cannot be used: which one, why, and what to do about it."""


def list_images(folder: str | Path) -> list[Path]:
    """All image files below `folder`, by suffix (any case), sorted by path.

    Hidden files and folders are left out, links to folders are not followed. InputError: not a folder, or a folder
    below it that cannot be read.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: not a folder; give a folder of images.")

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away.")

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if _is_image_name(name)]
    return sorted(found)


def read_image(source: str | Path | BinaryIO) -> Image.Image:
    """The picture in a file (a path, or a file opened in binary mode) as an RGB image of PIL, as a viewer shows it.

    EXIF orientation is applied, transparency is laid over white, 16 bits become 8 by scaling, an animation gives its
    first frame. Colour profiles are not applied: encoders were trained on pixels read without them.

    ImageError: the file is missing, not an image, damaged, too large (Pillow's decompression bomb limit), an extreme
    strip, or in a format whose value range is unknown (floating point, 32 bits).
    """
    name = source if isinstance(source, (str, Path)) else getattr(source, "name", "the image")
    try:
        with Image.open(source) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ImageError(
                    f"{name}: {width} x {height} pixels, one side more than {MAX_ASPECT_RATIO} times the other; "
                    "crop the image."
                )
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file; check the path, or the folder that it is relative to.") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: a folder where an image file was expected; give one file.") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not an image that can be read; expected JPEG, PNG, WebP, GIF, BMP or TIFF: convert or remove it."
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, refused as a decompression bomb; shrink it."
        ) from None
    except Exception as error:  # on damaged bytes a decoder raises nearly anything: OSError, SyntaxError, struct.error
        raise ImageError(f"{name}: the image is damaged ({error}); get the file again or remove it.") from error


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _to_rgb(image: Image.Image, name: object) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name}: floating point pixels have no fixed range; save the image with 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip everything above 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: pixels of 32 bits have no fixed range; save the image with 8 or 16 bits.")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
