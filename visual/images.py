"""Image files: which ones a folder holds, whether one can be used, and how it becomes an upright RGB picture.

The only place where a picture's file is opened, for data preparation, training and answering alike. Knows nothing of
encoders, tensors or data sets. Every function may be called from several threads at once.

Files come from strangers, so nothing that a file merely claims is believed: sizes are compared with limits before a
pixel is allocated, and what costs a decoder more than a picture of the same size could cost is refused.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from config import InputError

# Pillow logs a few of its errors besides raising them; without any handler they would land on the screen.
logging.getLogger("PIL").addHandler(logging.NullHandler())

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# What is read, whatever a file is called: Pillow's name -> the suffix to write it under. Pillow knows forty more, but
# they are no photos, and EPS would start a PostScript interpreter.
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}

# Pillow's limit of 2 ** 29 bytes as RGB. Ours as well, because any library in the process can lift Pillow's.
MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 2**30  # more than MAX_PIXELS take uncompressed as RGB

# A strip 1 x 20,000 is a small file, but resized until its short side is 224 it takes gigabytes.
MAX_ASPECT_RATIO = 100

# Every scan of a progressive JPEG is a pass over all pixels, and may take ten bytes. Honest files have about ten scans.
# The limit is on scans times pixels: 1,400 for a photo of a phone, whose film behind the photo can look like scans.
MAX_JPEG_SCANNED_PIXELS = 2**34
# Pillow joins a JPEG's EXIF segments one by one, which takes quadratic time.
MAX_JPEG_EXIF_SEGMENTS = 100
# Pillow decodes run-length coded BMPs in Python, about a million pixels a second.
MAX_BMP_RLE_PIXELS = 4_000_000
# A small TIFF may be one large tile, and have the same place painted by any number of tiles. Honest ones have tiles of
# 256 to 1024 a side, and paint at most six times (bands in planes of their own).
MAX_TIFF_TILE_PIXELS = 2**24
MAX_TIFF_PAINTED_TIMES = 16

_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, refused as a decompression bomb; shrink it."
_BOMB = "made to cost much more work than its pixels would, refused as a decompression bomb; save it anew or remove it."

# [0, 65535] -> [0, 255], rounded: 0 stays 0 and 65535 becomes 255.
_EIGHT_BITS = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


class ImageError(InputError):
    """An image that cannot be used: which one (`where`), why, and what to do about it (`detail`).

    `reason` is a short slug to count by: missing_image, unreadable_image, decompression_bomb, extreme_shape,
    unknown_pixel_range.
    """

    def __init__(self, detail: str, reason: str = "unreadable_image", where: object = ""):
        super().__init__(f"{where}: {detail}" if where else detail)
        self.detail, self.reason = detail, reason  # pickled with the message, as attributes


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


def read_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """The picture in a file (a path, its bytes, or a file opened in binary mode) as an RGB image of PIL, as a viewer
    shows it.

    EXIF orientation is applied, transparency is laid over white, 16 bits become 8 by scaling, an animation gives its
    first frame. Colour profiles are not applied: encoders were trained on pixels read without them.

    ImageError: the file is missing, not an image, damaged, too large, an extreme strip, or in a format whose value
    range is unknown (floating point, 32 bits). Nothing else is raised, and Pillow's warnings are not shown.
    """
    return _read(source, draft=False)


def verify_image(source: str | Path | bytes) -> None:
    """Raise the ImageError that `read_image` would raise, if it would: everything is decoded, but a JPEG to an eighth
    of its size, which leaves out arithmetic and no byte."""
    _read(source, draft=True)


def image_suffix(data: bytes) -> str:
    """The suffix that fits what `data`, an image file's bytes, holds: ".jpg", ".png", ".webp", ".gif", ".bmp", ".tif".

    ImageError: no image of these formats, or one that is already refused by its header.
    """
    with _nothing_but_image_errors("the image"), _open(data) as image:
        return FORMATS["JPEG" if image.format == "MPO" else image.format]  # MPO: a JPEG with a second one behind it


def image_bytes(path: str | Path) -> bytes:
    """What the file holds. ImageError: missing, not a plain file (a pipe would never end), too large, unreadable."""
    try:
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            raise ImageError("a folder where an image file was expected; give one file.", where=path)
        if not stat.S_ISREG(state.st_mode):
            raise ImageError("not a plain file; expected an image file.", where=path)
        if state.st_size > MAX_FILE_BYTES:
            raise ImageError(
                f"{state.st_size:,} bytes, more than {MAX_FILE_BYTES:,}; shrink it.", "decompression_bomb", path
            )
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no system has such a name
        detail, reason = "no such file; check the path, or the folder that it is relative to.", "missing_image"
    except OSError as error:
        detail, reason = f"cannot be opened ({error.strerror}); make it readable or remove it.", "unreadable_image"
    raise ImageError(detail, reason, path)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _read(source: str | Path | bytes | BinaryIO, draft: bool) -> Image.Image:
    if isinstance(source, bytes):
        name, data = "the image", source
    elif isinstance(source, (str, Path)):
        name, data = source, image_bytes(source)
    else:
        name, data = getattr(source, "name", "the image"), source.read()
    with _nothing_but_image_errors(name), _open(data) as image:
        if draft:
            image.draft(None, (1, 1))  # a JPEG is decoded as small as it can be, others as always
        ImageOps.exif_transpose(image, in_place=True)  # decodes
        return _to_rgb(image)


@contextmanager
def _nothing_but_image_errors(name: object) -> Iterator[None]:
    """Around everything that Pillow does with foreign bytes."""
    _hush_pillow()
    try:
        yield
    except ImageError as error:
        raise ImageError(error.detail, error.reason, name) from None
    except UnidentifiedImageError:
        detail = "not an image that can be read; expected JPEG, PNG, WebP, GIF, BMP or TIFF: convert or remove it."
        raise ImageError(detail, where=name) from None
    except Image.DecompressionBombError:  # some decoders learn of a second, larger size on the way
        raise ImageError(_TOO_LARGE, "decompression_bomb", name) from None
    except MemoryError as error:
        raise ImageError("not enough memory to decode the image; shrink it.", where=name) from error
    except Exception as error:  # on damaged bytes a decoder raises nearly anything: OSError, SyntaxError, struct.error
        raise ImageError(f"the image is damaged ({error}); get the file again or remove it.", where=name) from error


# Pillow warns of what is either an ImageError here or none of the user's concern (odd metadata).
_NO_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _hush_pillow() -> None:
    """Put a filter that touches Pillow alone before all others, and leave it there. `catch_warnings` is no way: it
    swaps the filters of the whole process, and of threads that do so at once the last one restores the wrong ones."""
    if warnings.filters[:1] != [_NO_PILLOW_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(data: bytes) -> Image.Image:
    """The image of the bytes, its header read and checked, no pixel decoded."""
    if data.startswith(b"\xff\xd8") and data.count(b"Exif\0\0") > MAX_JPEG_EXIF_SEGMENTS:
        raise ImageError(_BOMB, "decompression_bomb")
    image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(_TOO_LARGE, "decompression_bomb")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{width} x {height} pixels, one side more than {MAX_ASPECT_RATIO} times the other; crop the image.",
            "extreme_shape",
        )
    if _costs_too_much(image, data):
        raise ImageError(_BOMB, "decompression_bomb")
    return image


def _costs_too_much(image: Image.Image, data: bytes) -> bool:
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        return data.count(b"\xff\xda") * pixels > MAX_JPEG_SCANNED_PIXELS
    if image.format == "BMP":
        return image.tile[0].codec_name == "bmp_rle" and pixels > MAX_BMP_RLE_PIXELS
    if image.format == "TIFF":
        sides = [image.tag_v2.get(tag) for tag in (322, 323)]  # of a tile, which is allocated whole
        if all(isinstance(side, int) for side in sides) and sides[0] * sides[1] > max(pixels, MAX_TIFF_TILE_PIXELS):
            return True
        painted = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
        return painted > MAX_TIFF_PAINTED_TIMES * pixels
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating point pixels have no fixed range; save it with 8 or 16 bits.", "unknown_pixel_range")
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip everything above 255
        values = np.asarray(image)
        if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65535):
            raise ImageError("pixels of 32 bits have no fixed range; save it with 8 or 16 bits.", "unknown_pixel_range")
        image = Image.fromarray(_EIGHT_BITS[values])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
