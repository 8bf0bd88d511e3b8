"""Image files: list them in a folder, check them, and read them as upright RGB images.

Data preparation, training and answering open image files only through this module. Encoders, tensors and data sets are not
known here. Every function may be called from several threads at once.

Files may come from strangers, so their headers are not trusted: sizes are compared with limits before pixels are
allocated, and files that need far more work to decode than an image of their size should are refused.
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
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from config import InputError

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

# Pillow logs some of the errors that it raises; without a handler they would be printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# Formats that are read, whatever a file's suffix: Pillow's name -> the suffix to write. Pillow reads forty more formats, but
# not for photographs, and EPS would start a PostScript interpreter.
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}

# Pillow's limit, 2 ** 29 bytes as RGB. Checked here too, because any library in the process can lift Pillow's.
MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 2**30  # more than an uncompressed RGB image of MAX_PIXELS

# A 1 x 20,000 strip is a small file, but takes gigabytes when resized to a short side of 224.
MAX_ASPECT_RATIO = 100

# Each scan of a progressive JPEG is a pass over all pixels and may take only ten bytes. Normal files have about ten scans.
# The limit is on scans times pixels. It allows 1,400 for a phone's image: a video appended to it can look like scans.
MAX_JPEG_SCANNED_PIXELS = 2**34
# Pillow joins a JPEG's EXIF segments one by one, which takes quadratic time.
MAX_JPEG_EXIF_SEGMENTS = 100
# Pillow decodes run-length coded BMPs in Python, about a million pixels per second.
MAX_BMP_RLE_PIXELS = 4_000_000
# A small TIFF may contain one huge tile, or any number of tiles at the same position. Normal files have tiles of 256 to 1024
# pixels per side, and paint each pixel at most six times (once per band if bands are stored separately).
MAX_TIFF_TILE_PIXELS = 2**24
MAX_TIFF_PAINTED_TIMES = 16

_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, refused as a decompression bomb; shrink it."
_BOMB = (
    "needs far more work to decode than its size suggests, refused as a decompression bomb; save it again or remove it."
)

# [0, 65535] -> [0, 255], rounded: 0 stays 0 and 65535 becomes 255.
_EIGHT_BITS = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


class ImageError(InputError):
    """An image cannot be used: which one (`where`), why and what to do (`detail`).

    `reason` is a short word for counting: missing_image, unreadable_image, decompression_bomb, extreme_shape or
    unknown_pixel_range.
    """

    def __init__(self, detail: str, reason: str = "unreadable_image", where: object = ""):
        super().__init__(f"{where}: {detail}" if where else detail)
        self.detail, self.reason = detail, reason  # attributes are pickled with the message


def list_images(folder: str | Path) -> list[Path]:
    """List all files below `folder` with an image's suffix (in any case), sorted by path.

    Hidden files and folders are left out, links to folders are not followed. InputError: not a folder, or a folder below
    it cannot be read.
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
    """Read an image file (a path, bytes, or a file opened in binary mode) as an RGB image, as a viewer shows it.

    EXIF orientation is applied, transparent pixels are blended with white, 16 bits are scaled to 8, and of an animation the
    first frame is read. Colour profiles are not applied: encoders were trained on pixels read without them.

    ImageError: the file is missing, not an image, damaged, too large, an extreme strip, or has pixels of unknown range
    (floating point, 32 bits). Nothing else is raised, and Pillow's warnings are suppressed.
    """
    return _read(source, draft=False)


def verify_image(source: str | Path | bytes) -> None:
    """Raise the ImageError that `read_image` would raise, if any.

    Every byte is decoded, but a JPEG is scaled to an eighth while decoding, which saves arithmetic.
    """
    _read(source, draft=True)


def image_suffix(data: bytes) -> str:
    """Return the suffix for an image file's bytes: ".jpg", ".png", ".webp", ".gif", ".bmp" or ".tif".

    ImageError: not an image in these formats, or refused because of its header.
    """
    with _image_errors_only("the image"), _open(data) as image:
        assert image.format is not None
        return FORMATS["JPEG" if image.format == "MPO" else image.format]  # MPO: a JPEG followed by another one


def image_bytes(path: str | Path) -> bytes:
    """Read a file's content. ImageError: missing, not a plain file (a pipe would never end), too large or unreadable."""
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
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: an impossible name, as with a null byte
        detail, reason = "no such file; check the path, or the folder that it is relative to.", "missing_image"
    except OSError as error:
        detail, reason = f"cannot be opened ({error.strerror}); make it readable or remove it.", "unreadable_image"
    raise ImageError(detail, reason, path)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _read(source: str | Path | bytes | BinaryIO, draft: bool) -> Image.Image:
    name: object
    if isinstance(source, bytes):
        name, data = "the image", source
    elif isinstance(source, (str, Path)):
        name, data = source, image_bytes(source)
    else:
        name, data = getattr(source, "name", "the image"), source.read()
    with _image_errors_only(name), _open(data) as image:
        if draft:
            image.draft(None, (1, 1))  # decodes a JPEG at the smallest size, has no effect on other formats
        ImageOps.exif_transpose(image, in_place=True)  # decodes
        return _to_rgb(image)


@contextmanager
def _image_errors_only(name: object) -> Iterator[None]:
    """Turn every error of Pillow on a file's bytes into an ImageError about `name`."""
    _hush_pillow()
    try:
        yield
    except ImageError as error:
        raise ImageError(error.detail, error.reason, name) from None
    except UnidentifiedImageError:
        detail = "not an image that can be read; expected JPEG, PNG, WebP, GIF, BMP or TIFF; convert or remove it."
        raise ImageError(detail, where=name) from None
    except Image.DecompressionBombError:  # some decoders find a second, larger size while decoding
        raise ImageError(_TOO_LARGE, "decompression_bomb", name) from None
    except MemoryError as error:
        raise ImageError("out of memory while decoding the image; shrink it.", where=name) from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes: OSError, SyntaxError, struct.error
        raise ImageError(f"the image is damaged ({error}); get the file again or remove it.", where=name) from error


# Pillow's warnings are about problems that are an ImageError here, or about odd metadata, which users need not know.
_NO_PILLOW_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _hush_pillow() -> None:
    """Suppress Pillow's warnings for good, with a filter before all others that affects Pillow only.

    `catch_warnings` is not safe here: it replaces the filters of the whole process, and with several threads the last one
    restores the wrong filters.
    """
    if warnings.filters[:1] != [_NO_PILLOW_WARNINGS]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open an image: read and check its header, without decoding pixels."""
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


def _costs_too_much(image: ImageFile.ImageFile, data: bytes) -> bool:
    """Return whether decoding takes far more work or memory than the image's size suggests."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        return data.count(b"\xff\xda") * pixels > MAX_JPEG_SCANNED_PIXELS
    if image.format == "BMP":
        return image.tile[0].codec_name == "bmp_rle" and pixels > MAX_BMP_RLE_PIXELS
    if image.format == "TIFF":
        tags = cast("TiffImageFile", image).tag_v2
        width, length = tags.get(322), tags.get(323)  # of a tile, which is allocated as a whole
        if isinstance(width, int) and isinstance(length, int) and width * length > max(pixels, MAX_TIFF_TILE_PIXELS):
            return True
        painted = 0
        for tile in image.tile:
            assert tile.extents is not None
            left, top, right, bottom = tile.extents
            painted += (right - left) * (bottom - top)
        return painted > MAX_TIFF_PAINTED_TIMES * pixels
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating point pixels have no fixed range; save it with 8 or 16 bits.", "unknown_pixel_range")
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion would clip all values above 255
        values = np.asarray(image)
        if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() > 65535):
            raise ImageError("pixels of 32 bits have no fixed range; save it with 8 or 16 bits.", "unknown_pixel_range")
        image = Image.fromarray(_EIGHT_BITS[values])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
