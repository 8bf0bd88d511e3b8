"""Image files: list them in a folder, check them, and read them as upright RGB images.

A path may continue below a zip or tar archive as if that were a folder: "train.zip/a/1.jpg" (visual.archives).

Data preparation, training and answering open image files only through this module. Encoders, tensors and data sets are not
known here. Every function may be called from several threads at once.

Files may come from strangers, so their headers are not trusted: sizes are compared with limits before pixels are
allocated, and files that need far more work to decode than an image of their size should are refused.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from config import InputError
from config.files import POINTER_OF_GIT_LFS
from visual.archives import ArchiveError, file_names, find_member

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import TiffImageFile

# Pillow logs some of the errors that it raises; without a handler they would be printed.
logging.getLogger("PIL").addHandler(logging.NullHandler())

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".avif"})
# Images that are read only with a package of their own, or not at all. They are listed, so that none is passed over.
OTHER_IMAGE_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw"})

# Formats that are read, whatever a file's suffix: Pillow's name -> the suffix to write. Pillow reads forty more formats, but
# not for photographs, and EPS would start a PostScript interpreter.
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
# Formats that are read if the installed Pillow or a plugin can: Pillow's name, suffix, first bytes, module, package.
_PLUGINS = (
    ("AVIF", ".avif", re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "PIL.AvifImagePlugin", "pillow>=11.3"),
    (
        "HEIF",
        ".heic",
        re.compile(rb".{4}ftyp(hei|hev|mif|msf)", re.DOTALL),
        "pillow_heif.HeifImagePlugin",
        "pillow-heif",
    ),
    ("JXL", ".jxl", re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ", re.DOTALL), "pillow_jxl", "pillow-jxl-plugin"),
)

# Increase when a file is read, or refused, in another way: verdicts that were stored before are then not used.
RULES = 4
# Increase when `is_scaled` images get other pixels: their features that were stored before are then not used. (If other
# images do, increase `FORMAT` of the feature cache.)
SCALING_RULES = 2

# Pillow's limit, 2 ** 29 bytes as RGB. Checked here too, because any library in the process can lift Pillow's.
MAX_PIXELS = 178_956_970
# A WebP of 34 bytes may be one colour of any size. A file of more than SMALL_PIXELS, 200 MB as RGB, needs a byte for so many
# pixels; one-coloured PNGs and scanned pages of text have more. Blank pages and one-coloured WebPs are below SMALL_PIXELS.
SMALL_PIXELS, MAX_PIXELS_PER_BYTE = 2**26, 2048
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
# Pillow makes a Python object of each number in a tag, and several of each strip: 16 MB of offsets would take a gigabyte.
# Normal files have at most a strip for each row. Not decoded are tags from MIN_PRIVATE_TAG on, bytes and text.
MAX_TIFF_TAG_BYTES = 2**19
MIN_PRIVATE_TAG, _TIFF_BYTES = 32_768, (1, 2, 7)
MAX_EXIF_BYTES = 2**23  # the same for EXIF in other formats; more than a hundred segments of a JPEG

_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels, refused as a decompression bomb; shrink it."
_BOMB = (
    "needs far more work to decode than its size suggests, refused as a decompression bomb; save it again or remove it."
)

# Bits of sensors. A file of 16 bits rarely says how many of them are used: medical images use 10, 12 or 14.
BIT_DEPTHS = (8, 10, 12, 14, 16)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE, _MIN_SAMPLES, _MAX_SAMPLES = 258, 262, 281, 340, 341  # TIFF tags


class ImageError(InputError):
    """An image cannot be used: which one (`where`), why and what to do (`detail`).

    `reason` is a short word for counting: missing_image, unreadable_image, decompression_bomb, extreme_shape or
    unknown_pixel_range.
    """

    def __init__(self, detail: str, reason: str = "unreadable_image", where: object = ""):
        super().__init__(f"{where}: {detail}" if where else detail)
        self.detail, self.reason = detail, reason  # attributes are pickled with the message


def list_images(folder: str | Path) -> list[Path]:
    """List all files below `folder` with an image's suffix (in any case), sorted by path, also of formats that are not read.

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


def list_archived_images(archive: str | Path) -> list[Path]:
    """List all files in a .zip or .tar with an image's suffix, as paths below the archive, sorted by path.

    Hidden files and folders are left out. InputError: the archive cannot be read.
    """
    try:
        names = list(file_names(str(archive)))
    except OSError as error:
        raise InputError(f"{archive}: {error.strerror or error} To ask about its images, unpack it.") from None
    shown = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    return sorted(Path(archive, name) for name in shown if _is_image_name(name))


def read_image(source: str | Path | bytes | BinaryIO) -> Image.Image:
    """Read an image file (a path, bytes, or a file opened in binary mode) as an RGB image, as a viewer shows it.

    EXIF orientation is applied, transparent pixels are blended with white, and of an animation the first frame is read.
    Colour profiles are not applied: encoders were trained on pixels read without them.

    Grey pixels of more than 8 bits are scaled linearly to 8. Black is 0. White is the largest value that a TIFF declares;
    else 1 for floating point, and otherwise the largest value of the fewest bits, among 8, 10, 12, 14 and 16, that hold all
    values of the image: a radiograph of 12 bits in a file of 16 is not almost black. Images that must be scaled alike, such
    as depth maps, are best saved with 8 bits.

    ImageError: the file is missing, not an image, damaged, too large, an extreme strip, or has pixels of unknown range
    (negative, above 65,535, or floating point beyond 0 to 1). Nothing else is raised, and Pillow's warnings are suppressed.
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
        name = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG followed by another one
        return FORMATS.get(name) or next(suffix for other, suffix, *_ in _PLUGINS if other == name)


def is_scaled(data: bytes) -> bool:
    """Return whether these bytes are an image whose pixels `read_image` scales to 8 bits: grey of more bits. Reads the
    header only; False if it is damaged or refused."""
    if not data.startswith((b"\x89PNG", b"II", b"MM")):  # no other format has such pixels
        return False
    try:
        with _image_errors_only("the image"), _open(data) as image:
            return _is_deep(image)
    except ImageError:
        return False


class ImageState(NamedTuple):
    """What changes when the content of an image file may have changed."""

    size: int  # bytes
    mtime_ns: int  # modification time; of an image in an archive a negative number that stands for its content
    is_file: bool = True  # not a folder, a pipe or a device


def image_state(path: str | bytes | Path) -> ImageState:
    """Return the state of a file, or of a file in an archive. Raises OSError like `os.stat`, ValueError for a null byte."""
    try:
        state = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if (member := find_member(path)) is None:
            raise
        return ImageState(member.size, member.version)
    return ImageState(state.st_size, state.st_mtime_ns, stat.S_ISREG(state.st_mode))


def image_bytes(path: str | Path) -> bytes:
    """Read the content of a file, or of a file in an archive.

    ImageError: missing, not a plain file (a pipe would never end), too large or unreadable.
    """
    try:
        try:
            state = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            if (member := find_member(path)) is None:
                raise
            _check_bytes(max(member.size, member.packed), path)
            return member.read()
        if stat.S_ISDIR(state.st_mode):
            raise ImageError("a folder where an image file was expected; give one file.", where=path)
        if not stat.S_ISREG(state.st_mode):
            raise ImageError("not a plain file; expected an image file.", where=path)
        _check_bytes(state.st_size, path)
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: an impossible name, as with a null byte
        detail, reason = "no such file; check the path, or the folder that it is relative to.", "missing_image"
    except ArchiveError as error:
        detail, reason = error.strerror or "", "unreadable_image"
    except OSError as error:
        detail, reason = f"cannot be opened ({error.strerror}); make it readable or remove it.", "unreadable_image"
    raise ImageError(detail, reason, path)


def _check_bytes(size: int, path: str | Path) -> None:
    if size > MAX_FILE_BYTES:
        raise ImageError(f"{size:,} bytes, more than {MAX_FILE_BYTES:,}; shrink it.", "decompression_bomb", path)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES


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
        image.load()
        if len(image.info.get("exif") or b"") > MAX_EXIF_BYTES:  # a PNG's may come after its pixels
            raise ImageError(_BOMB, "decompression_bomb")
        ImageOps.exif_transpose(image, in_place=True)
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


def _formats_of(data: bytes) -> tuple[str, ...]:
    """Return the names of the formats that a file's first bytes allow. ImageError: they need a missing package."""
    if data.startswith(POINTER_OF_GIT_LFS):
        raise ImageError("a git-lfs pointer, text in place of an image; run: git lfs install && git lfs pull")
    for name, suffix, magic, module, package in _PLUGINS:
        if magic.match(data):
            try:
                importlib.import_module(module)
            except ImportError:
                pass
            if name in Image.OPEN:
                return (name,)
            raise ImageError(
                f"a {suffix[1:].upper()} image, which needs a package that is not installed: {sys.executable} -m "
                f'pip install "{package}", or convert it to JPEG or PNG.'
            )
    return tuple(FORMATS)


def _open(data: bytes) -> ImageFile.ImageFile:
    """Open an image: read and check its header, without decoding pixels."""
    if data.startswith(b"\xff\xd8") and data.count(b"Exif\0\0") > MAX_JPEG_EXIF_SEGMENTS:
        raise ImageError(_BOMB, "decompression_bomb")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_pixels(*_webp_size(data), data)  # Pillow allocates on opening
    if data.startswith((b"II", b"MM")) and _has_endless_tags(data):
        raise ImageError(_BOMB, "decompression_bomb")
    image = Image.open(io.BytesIO(data), formats=_formats_of(data))
    width, height = image.size
    _check_pixels(width, height, data)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            f"{width} x {height} pixels, one side more than {MAX_ASPECT_RATIO} times the other; crop the image.",
            "extreme_shape",
        )
    if _costs_too_much(image, data):
        raise ImageError(_BOMB, "decompression_bomb")
    return image


def _check_pixels(width: int, height: int, data: bytes) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(_TOO_LARGE, "decompression_bomb")
    if width * height > max(SMALL_PIXELS, MAX_PIXELS_PER_BYTE * len(data)):
        raise ImageError(_BOMB, "decompression_bomb")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return the width and height in a WebP's header, 0 for an unknown one, which Pillow refuses."""
    kind, head = data[12:16], data[:30].ljust(30, b"\0")
    if kind == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _has_endless_tags(data: bytes) -> bool:
    """Return whether a TIFF has a tag whose decoding would take far more time and memory than its bytes.

    Reads the first directory with Pillow's own class, without decoding its values.
    """
    file = io.BytesIO(data)
    try:
        is_big = data[2] == 43  # BigTIFF, whose number of tags has 8 bytes instead of 2
        tags = TiffImagePlugin.ImageFileDirectory_v1(data[: 16 if is_big else 8])
        if is_big:
            count = int.from_bytes(data[tags.next : tags.next + 8], "little" if data.startswith(b"II") else "big")
            if count > 65_535:
                return True
        file.seek(tags.next)
        tags.load(file)
    except Exception:  # Pillow will refuse the file for the same reason, with a message
        return False
    decoded = [tag for tag, kind in tags.tagtype.items() if tag < MIN_PRIVATE_TAG and kind not in _TIFF_BYTES]
    return max((len(tags.tagdata[tag]) for tag in decoded), default=0) > MAX_TIFF_TAG_BYTES


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


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):  # Pillow's own conversion would clip all values above 255
        tags = cast("TiffImageFile", image).tag_v2 if image.format == "TIFF" else {}
        image = Image.fromarray(_to_eight_bits(np.asarray(image), tags))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Scale grey pixels of 16 or 32 bits to uint8: black to 0, white to 255. tags: of a TIFF.

    ImageError: the range of the values is unknown.
    """
    smallest, largest = values.min(), values.max()
    black, white = _declared_range(tags)
    if white is None and values.dtype.kind == "f":
        if not (smallest >= 0 and largest <= 1):  # or not a number
            raise ImageError(
                "floating point pixels beyond 0 to 1 have no fixed range; save it with 8 or 16 bits.",
                "unknown_pixel_range",
            )
        white = 1.0
    elif white is None:
        if smallest < 0 or largest > 65535:
            raise ImageError(
                f"pixels from {smallest} to {largest} have no fixed range (16 bits hold 0 to 65535); save it with 8 or 16 "
                "bits.",
                "unknown_pixel_range",
            )
        white = next(2**bits - 1 for bits in BIT_DEPTHS if largest < 2**bits)

    def scale(values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float32) - black) * (255 / (white - black))
        grey = np.floor(np.nan_to_num(scaled).clip(0, 255) + 0.5).astype(np.uint8)  # not a number: black
        return 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey  # 0: white is zero

    fits_table = values.dtype.kind != "f" and smallest >= 0 and largest <= 65535
    return scale(np.arange(65536))[values] if fits_table else scale(values)


def _declared_range(tags: Mapping[int, Any]) -> tuple[float, float | None]:
    """Return the values of black and white that a TIFF declares; 0 and None if it declares none."""

    def number(tag: int) -> float | None:
        value = tags.get(tag)
        value = value[0] if isinstance(value, tuple) and value else value
        return float(value) if isinstance(value, (int, float)) and np.isfinite(value) else None

    black, white = number(_MIN_SAMPLES) or 0.0, number(_MAX_SAMPLES)
    if white is not None and white > black:
        return black, white
    white, bits = number(_MAX_SAMPLE), number(_BITS_PER_SAMPLE)
    if bits is not None and 8 < bits < 16:
        white = 2**bits - 1
    return 0.0, white if white and white > 0 else None
