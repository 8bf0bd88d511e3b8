"""Image files are read as a viewer shows them, or refused with their name."""

import faulthandler
import io
import os
import pickle
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin, TiffTags

from config import InputError
from visual.images import MAX_ASPECT_RATIO, ImageError, image_suffix, list_images, read_image, verify_image

WHITE = (255, 255, 255)
IMAGE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


# One image in many kinds of files


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_files_give_their_pixels(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(Image.fromarray(IMAGE), tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(pixels(read_image(path)), IMAGE)
    assert np.array_equal(pixels(read_image(str(path))), IMAGE)
    with open(path, "rb") as file:
        assert np.array_equal(pixels(read_image(file)), IMAGE)
    assert np.array_equal(pixels(read_image(io.BytesIO(path.read_bytes()))), IMAGE)


def test_the_suffix_is_ignored(tmp_path):
    """Some data sets contain GIFs named .jpg."""
    path = save(Image.new("RGB", (4, 4), (255, 0, 0)), tmp_path / "a.jpg", format="GIF")
    assert (pixels(read_image(path)) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, suffix, orientation):
    """The four quarters have different colours, so each of the eight orientations looks different."""
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24], upright[16:, 24:] = 255, (255, 0, 0), (0, 255, 0), 0
    stored = {  # as the camera writes it: the inverse of the transform that the tag requests (Exif 2.32, tag 0x0112)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    path = save(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / f"a.{suffix}", exif=exif, **options)
    read = pixels(read_image(path))
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).max() <= 3  # JPEG rounds


def test_an_image_with_unreadable_exif_is_read(tmp_path):
    path = save(Image.fromarray(IMAGE), tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert pixels(read_image(path)).shape == IMAGE.shape


# Modes


def test_greyscale_and_one_bit(tmp_path):
    grey = IMAGE[..., 0]
    assert np.array_equal(pixels(read_image(save(Image.fromarray(grey), tmp_path / "l.png"))), np.dstack([grey] * 3))
    bits = Image.fromarray(grey).convert("1")
    read = pixels(read_image(save(bits, tmp_path / "1.png")))
    assert np.array_equal(read[..., 0], np.asarray(bits) * 255) and set(np.unique(read)) == {0, 255}


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 1, 128, 129, 255, 256], [257, 32768, 65000, 65406, 65407, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / f"a.{suffix}")
    expected = np.round(values / 257).astype(np.uint8)
    assert np.array_equal(pixels(read_image(path))[..., 0], expected)


def test_values_of_thirty_two_bits_are_refused_beyond_sixteen(tmp_path):
    values = np.array([[0, 257 * 7, 65535]], dtype=np.int32)
    read = pixels(read_image(save(Image.fromarray(values), tmp_path / "a.tif")))
    assert read[0, :, 0].tolist() == [0, 7, 255]
    for bad in (values * 2, values - 1):
        with pytest.raises(ImageError, match=r"b\.tif: pixels from (0|-1) to \d+ have no fixed range.*8 or 16 bits"):
            read_image(save(Image.fromarray(bad), tmp_path / "b.tif"))
    for value in (1.5, -0.5, np.nan, np.inf):
        with pytest.raises(ImageError, match=r"c\.tif: floating point.*8 or 16 bits"):
            read_image(save(Image.fromarray(np.full((2, 2), value, dtype=np.float32)), tmp_path / "c.tif"))


def with_tags(values: np.ndarray, tags: dict) -> bytes:
    """Return a grey TIFF of `values` with more tags; floats are written as such."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        if isinstance(value, float):
            directory.tagtype[tag] = TiffTags.FLOAT
        directory[tag] = value
    data = encode(Image.fromarray(values), "TIFF", tiffinfo=directory)
    black_is_zero, white_is_zero = (struct.pack("<HHII", 262, 3, 1, photometric) for photometric in (1, 0))
    return data.replace(black_is_zero, white_is_zero) if tags.get(262) == 0 else data


RAMP = np.linspace(0, 1, 16).reshape(2, 8)
DEEP = {  # (largest value, tags) -> (white, whether it is 0)
    "8 bits": (255, {}, 255, False),
    "10 bits": (1000, {}, 1023, False),
    "12 bits": (4095, {}, 4095, False),
    "12 bits, in part": (2100, {}, 4095, False),
    "14 bits": (9000, {}, 16383, False),
    "16 bits": (50_000, {}, 65_535, False),
    "declared": (4095, {281: 8000}, 8000, False),
    "declared as the whole range": (4095, {281: 65_535}, 65_535, False),
    "clipped": (65_535, {281: 4095}, 4095, False),
    "white is zero": (4095, {262: 0}, 4095, True),
    "absurd": (4095, {281: 0}, 4095, False),
}


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name, (*_, is_inverted) in DEEP.items()
        for kind in (np.uint16, np.int32)
        if not (is_inverted and kind is np.int32)  # Pillow has no mode for such a TIFF
    ],
)
def test_grey_pixels_of_more_than_8_bits_are_scaled_by_the_range_in_use(tmp_path, name, kind):
    largest, tags, white, is_inverted = DEEP[name]
    values = np.round(RAMP * largest).astype(kind)
    expected = np.round(np.minimum(values, white).astype(int) * 255 / white).astype(np.uint8)
    data = with_tags(values, tags)
    assert np.array_equal(pixels(read_image(data))[..., 0], 255 - expected if is_inverted else expected)
    if not tags and kind is np.uint16:
        assert np.array_equal(pixels(read_image(encode(Image.fromarray(values), "PNG")))[..., 0], expected)


def test_twelve_bits_a_sample_and_floating_point(tmp_path):
    tags = [(256, 1, 2), (257, 1, 1), (258, 1, 12), (262, 1, 1), (273, 1, 98), (278, 1, 1), (279, 1, 3)]
    packed = tiff(*tags, data=b"\x10\x0f\xff")
    assert pixels(read_image(packed))[0, :, 0].tolist() == [round(256 * 255 / 4095), 255]
    values = RAMP.astype(np.float32)
    for scaled, more in ((values, {}), (values * 7000, {341: 7000.0}), (values * 90 - 10, {340: -10.0, 341: 80.0})):
        read = read_image(with_tags(scaled, more))
        assert np.array_equal(pixels(read)[..., 0], np.round(values * 255).astype(np.uint8))
    holes = values.copy()
    holes[0, 3] = np.nan  # no measurement
    assert pixels(read_image(with_tags(holes, {341: 1.0})))[0, 3].tolist() == [0, 0, 0]


def test_transparent_pixels_are_blended_with_white(tmp_path):
    colours = np.array([[(200, 0, 0, 0), (200, 0, 0, 255), (200, 0, 0, 51)]], dtype=np.uint8)
    read = pixels(read_image(save(Image.fromarray(colours), tmp_path / "rgba.png")))
    assert read[0].tolist() == [list(WHITE), [200, 0, 0], [244, 204, 204]]
    greys = np.array([[(90, 0), (90, 255), (90, 51)]], dtype=np.uint8)
    read = pixels(read_image(save(Image.fromarray(greys, "LA"), tmp_path / "la.png")))
    assert read[0, :, 0].tolist() == [255, 90, 222]


def test_palette_images_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    read = pixels(read_image(save(palette, tmp_path / "p.png")))
    assert read[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    read = pixels(read_image(save(palette, tmp_path / "one.png", transparency=1)))
    assert read[0].tolist() == [[10, 20, 30], list(WHITE), [70, 80, 90]]
    read = pixels(read_image(save(palette, tmp_path / "many.png", transparency=bytes([0, 255, 51]))))
    assert read[0].tolist() == [list(WHITE), [40, 50, 60], [218, 220, 222]]
    read = pixels(read_image(save(palette, tmp_path / "a.gif", transparency=2)))
    assert read[0].tolist() == [[10, 20, 30], [40, 50, 60], list(WHITE)]


def test_a_transparent_colour_becomes_white(tmp_path):
    image = Image.fromarray(np.array([[(1, 2, 3), (9, 9, 9)]], dtype=np.uint8))
    assert pixels(read_image(save(image, tmp_path / "a.png", transparency=(1, 2, 3))))[0].tolist() == [
        list(WHITE),
        [9, 9, 9],
    ]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    """Full ink of one colour. JPEG stores it inverted, as Adobe does."""
    for ink, colour in {
        (255, 0, 0, 0): (0, 255, 255),
        (0, 0, 255, 0): (255, 255, 0),
        (0, 0, 0, 255): (0, 0, 0),
    }.items():
        path = save(Image.new("CMYK", (16, 16), ink), tmp_path / f"a.{suffix}")
        assert np.abs(pixels(read_image(path)).astype(int) - colour).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (pixels(read_image(path)) == (255, 0, 0)).all()


# Refusals: the message names the file and says what to do


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_missing_files_folders_and_text_are_refused(tmp_path):
    with pytest.raises(ImageError, match=r"no\.jpg: no such file.*check"):
        read_image(tmp_path / "no.jpg")
    with pytest.raises(ImageError, match="a folder where an image file was expected.*give"):
        read_image(tmp_path)
    for name, content in {"text.jpg": b"<html>404</html>", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name}: not an image.*convert or remove"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="the image: not an image"):
        read_image(io.BytesIO(b"nothing"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = save(Image.fromarray(IMAGE), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match=rf"a\.{suffix}: (the image is damaged|not an image).*remove"):
        read_image(path)


@pytest.mark.parametrize(("kind", "data"), [(b"tRNS", b""), (b"eXIf", b"?"), (b"iCCP", b"")])
def test_damage_that_raises_other_errors_in_pillow_is_refused(tmp_path, kind, data):
    """Bad chunks with correct checksums: ValueError, SyntaxError and IndexError in Pillow."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(kind, data) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"a\.png: the image is damaged \(.+\); get the file again"):
        read_image(tmp_path / "a.png")


def test_decompression_bombs_are_refused(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"bomb\.png: more than 178,956,970 pixels"):
        read_image(tmp_path / "bomb.png")


def test_extreme_strips_are_refused(tmp_path):
    read_image(save(Image.new("RGB", (MAX_ASPECT_RATIO, 1)), tmp_path / "fine.png"))
    with pytest.raises(ImageError, match=r"strip\.png: 101 x 1 pixels.*crop"):
        read_image(save(Image.new("RGB", (MAX_ASPECT_RATIO + 1, 1)), tmp_path / "strip.png"))


def test_an_image_error_is_an_input_error():
    assert issubclass(ImageError, InputError)


def test_errors_have_a_reason_and_can_be_pickled(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"text")
    for path, reason in {"no.jpg": "missing_image", "a\0b": "missing_image", "text.jpg": "unreadable_image"}.items():
        for read in (read_image, verify_image):
            with pytest.raises(ImageError) as caught:
                read(tmp_path / path)
            error = pickle.loads(pickle.dumps(caught.value))
            assert (error.reason, error.detail, str(error)) == (reason, caught.value.detail, str(caught.value))
            assert str(error) == f"{tmp_path / path}: {error.detail}"


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="not a plain file"):
        verify_image(tmp_path / "a.jpg")


# Files from strangers: for any bytes, reading ends soon and silently, with an image or an ImageError, and verifying agrees
# with reading


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_of_each() -> dict[str, bytes]:
    image, other = Image.fromarray(IMAGE), Image.fromarray(IMAGE[::-1].copy())
    palette, rgba = image.quantize(16), image.convert("RGBA")
    deep = Image.fromarray(IMAGE[..., 0].astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "baseline.jpg": encode(image, "JPEG", exif=turned),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "restarts.jpg": encode(image, "JPEG", subsampling=0, restart_marker_blocks=2),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(image.convert("L"), "JPEG"),
        "two.jpg": encode(image, "MPO", save_all=True, append_images=[other]),
        "rgb.png": encode(image, "PNG"),
        "palette.png": encode(palette, "PNG", transparency=3),
        "sixteen.png": encode(deep, "PNG"),
        "alpha.png": encode(rgba, "PNG", exif=turned),
        "animated.png": encode(image, "PNG", save_all=True, append_images=[other]),
        "interlaced.png": interlaced(),
        "lossy.webp": encode(image, "WEBP"),
        "lossless.webp": encode(rgba, "WEBP", lossless=True, exif=turned),
        "animated.webp": encode(image, "WEBP", save_all=True, append_images=[other]),
        "palette.gif": encode(palette, "GIF", transparency=2),
        "animated.gif": encode(image, "GIF", save_all=True, append_images=[other], comment=b"?"),
        "rgb.bmp": encode(image, "BMP"),
        "palette.bmp": encode(palette, "BMP"),
        "sixteen.tif": encode(deep, "TIFF", exif=turned),
        "bilevel.tif": encode(image.convert("1"), "TIFF"),
    }
    return files | {f"{kind}.tif": encode(image, "TIFF", compression=kind) for kind in ("raw", "packbits")}


def interlaced() -> bytes:
    """An 8 x 8 grey PNG in the seven passes of Adam7."""
    rows = ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8))  # height, width of each pass
    passes = b"".join((b"\0" + bytes(range(width))) * height for height, width in rows)
    return png(8, 8, chunk(b"IDAT", zlib.compress(passes)), colour=0, interlace=1)


def png(width: int, height: int, *chunks: bytes, colour: int = 2, interlace: int = 0) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.fixture
def watchdog():
    """End the tests with a traceback if one hangs."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def outcome(data: bytes) -> Any:
    """Return the image or the ImageError of reading; assert that verifying agrees and that there are no warnings."""
    results: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in (read_image, verify_image, image_suffix):
            try:
                results.append(function(data))
            except ImageError as error:
                results.append(error)
    read, verified, suffix = results
    if isinstance(read, ImageError):
        assert isinstance(verified, ImageError) and str(verified) == str(read) and verified.reason == read.reason
    else:
        assert verified is None and isinstance(suffix, str) and read.mode == "RGB"
    return read


def test_every_kind_is_read_and_its_suffix_found_by_content(watchdog):
    for name, data in one_of_each().items():
        assert isinstance(outcome(data), Image.Image), name
        assert image_suffix(data) == name[name.index(".") :]


def test_a_file_truncated_anywhere_is_refused_or_has_all_pixels(watchdog):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for name, data in one_of_each().items():
        whole = outcome(data)
        for end in range(0, len(data), 1 + len(data) // 60):
            read = outcome(data[:end])
            if not isinstance(read, ImageError):
                assert read.tobytes() == whole.tobytes(), (name, end)
        assert isinstance(outcome(data[: len(data) // 4]), ImageError), name


def test_random_damage_is_handled(watchdog):
    generator = random.Random(0)
    files = list(one_of_each().values())
    refused = 0
    for number in range(1500):
        data = bytearray(files[number % len(files)])
        for _ in range(generator.choice((1, 1, 2, 4))):
            where = generator.randrange(len(data)) if number % 2 else generator.randrange(min(len(data), 200))
            length = generator.randrange(1, 40)
            change = generator.randrange(5)
            if change == 0:
                data[where] ^= 1 << generator.randrange(8)
            elif change == 1:
                data[where : where + 4] = generator.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
            elif change == 2:
                data[where:where] = data[where : where + length] * 3
            elif change == 3 and len(data) > 50:
                del data[where : where + length]
            else:
                other = generator.choice(files)
                start = generator.randrange(len(other))
                data[where:where] = other[start : start + length]
        refused += isinstance(outcome(bytes(data)), ImageError)
    assert 300 < refused < 1400


def huge() -> dict[str, bytes]:
    """Make files with a header of 30,000 x 30,000 pixels and almost no data."""
    files, side = one_of_each(), 30_000
    jpeg, bmp, tiff = (bytearray(files[name]) for name in ("grey.jpg", "rgb.bmp", "raw.tif"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", side, side)
    bmp[18:26] = struct.pack("<ii", side, side)
    for tag in (256, 257):
        start = (
            tiff.index(struct.pack("<HH", tag, 4))
            if struct.pack("<HH", tag, 4) in tiff
            else tiff.index(struct.pack("<HH", tag, 3))
        )
        tiff[start : start + 12] = struct.pack("<HHII", tag, 4, 1, side)
    three = struct.pack("<I", side - 1)[:3] * 2
    return {
        "png": png(side, side, chunk(b"IDAT", zlib.compress(bytes(100)))),
        "jpg": bytes(jpeg),
        "gif": files["palette.gif"][:6] + struct.pack("<HH", side, side) + files["palette.gif"][10:],
        "bmp": bytes(bmp),
        "webp": b"RIFF"
        + struct.pack("<I", 100)
        + b"WEBPVP8X"
        + struct.pack("<II", 10, 16)
        + three
        + b"VP8 "
        + bytes(78),
        "tif": bytes(tiff),
    }


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_a_huge_size_is_refused_before_pixels_are_allocated(watchdog, monkeypatch, kind):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    assert outcome(huge()[kind]).reason == "decompression_bomb"
    if kind != "webp":  # its plugin allocates on opening
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as another library may do
        assert outcome(huge()[kind]).reason == "decompression_bomb"


def scans(size: int, count: int) -> bytes:
    data = one_of_each()["progressive.jpg"]
    frame, scan = data.index(b"\xff\xc2"), data.rindex(b"\xff\xda")
    header = data[scan : scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")]
    return data[: frame + 5] + struct.pack(">HH", size, size) + data[frame + 9 : scan] + header * count + b"\xff\xd9"


def tiff(*tags: tuple[int, int, int], data: bytes) -> bytes:
    """A grey TIFF with one directory and 32-bit values."""
    entries = b"".join(struct.pack("<HHII", tag, 4, *value) for tag, *value in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def run_length(size: int) -> bytes:
    data = bytearray(one_of_each()["palette.bmp"])
    data[18:26], data[30:34] = struct.pack("<ii", size, size), struct.pack("<I", 1)
    return bytes(data[: struct.unpack("<I", data[10:14])[0]]) + b"\1\5\0\0" * size + b"\0\1"


GREY = [(256, 1, 64), (257, 1, 64), (258, 1, 8), (262, 1, 1)]


def endless_work() -> dict[str, bytes]:
    jpeg = one_of_each()["grey.jpg"]
    tile = [(322, 1, 65_024), (323, 1, 32_000), (324, 1, 200), (325, 1, 20)]
    painted = [(259, 1, 1), (273, 20_000, 5000), (278, 1, 32), (279, 1, 9)]
    return {
        "scans": scans(12_000, 5_000),
        "exif": jpeg[:2] + b"\xff\xe1\0\x0aExif\0\0ab" * 200_000 + jpeg[2:],
        "tile": tiff(*GREY, (259, 1, 8), *tile, data=bytes(500)),
        "painted": tiff(*GREY, *painted, data=bytes(5000) + struct.pack("<I", 200) * 20_000),
        "run length": run_length(12_000),
    }


@pytest.mark.parametrize("name", ["scans", "exif", "tile", "painted", "run length"])
def test_small_files_that_would_take_minutes_or_gigabytes_are_refused(watchdog, name):
    assert outcome(endless_work()[name]).reason == "decompression_bomb"


def big_tiff(count: int) -> bytes:
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, count) + struct.pack("<HHQQ", 256, 4, 1, 4) * 1000


def refused_unopened() -> dict[str, bytes]:
    """Files that Pillow takes a gigabyte or seconds to open or to decode, in proportion to their size here."""
    strips, numbers = 200_000, 400_000
    solid = bytearray(encode(Image.new("RGB", (64, 64), (1, 2, 3)), "WEBP", lossless=True))
    solid[21:25] = struct.pack("<I", int.from_bytes(solid[21:25], "little") & 0xF0000000 | 13_369 << 14 | 13_369)
    extended = b"VP8X" + struct.pack("<II", 10, 0) + struct.pack("<I", 13_369)[:3] * 2
    return {
        "strips": tiff(*GREY, (259, 1, 1), (273, strips, 200), (278, 1, 1), (279, 1, 9), data=bytes(200 + 4 * strips)),
        "bits": tiff(*GREY[:2], (258, numbers, 200), (262, 1, 1), data=bytes(200 + 4 * numbers)),
        "big tiff": big_tiff(2**17),
        "webp": bytes(solid),
        "extended webp": b"RIFF" + struct.pack("<I", 100) + b"WEBP" + extended + bytes(solid[12:]),
    }


@pytest.mark.parametrize("name", ["strips", "bits", "big tiff", "webp", "extended webp"])
def test_a_hostile_header_is_refused_before_pillow_opens_the_file(watchdog, monkeypatch, name):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the file was opened"))
    data = refused_unopened()[name]
    assert outcome(data).reason == "decompression_bomb"
    assert len(data) < 70 or "webp" not in name


def test_blank_pages_and_one_colour_are_no_bombs():
    """A blank A4 page of 600 dots per inch, and a one-colour WebP of a camera's size."""
    page = encode(Image.new("1", (4961, 7016), 1), "TIFF", compression="group4")
    plain = encode(Image.new("RGB", (5000, 5000), (1, 2, 3)), "WEBP", lossless=True, method=0)
    assert len(page) < 17_000 and len(plain) < 12_000
    verify_image(page)
    verify_image(plain)


def test_more_pixels_than_the_bytes_can_mean_are_refused_before_they_are_decoded(watchdog, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    for kind, size in {"PNG": (13_000, 13_000), "GIF": (9000, 9000), "TIFF": (13_000, 13_000)}.items():
        options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
        small = encode(Image.new("L", (64, 64)), kind, **options)
        assert outcome(resized(small, kind, *size)).reason == "decompression_bomb", kind


def resized(data: bytes, kind: str, width: int, height: int) -> bytes:
    """Return the file with another size in its header."""
    if kind == "PNG":
        head = struct.pack(">II", width, height) + data[24:29]
        return data[:8] + chunk(b"IHDR", head) + data[33:]
    if kind == "GIF":
        return data[:6] + struct.pack("<HH", width, height) + data[10:]
    for tag, side in ((256, width), (257, height)):
        data = data.replace(struct.pack("<HHII", tag, 3, 1, 64), struct.pack("<HHII", tag, 3, 1, side))
    return data


def test_large_images_of_one_colour_and_normal_strips_are_read(watchdog):
    assert outcome(encode(Image.new("L", (4000, 4000)), "PNG")).size == (4000, 4000)
    assert outcome(encode(Image.new("1", (4000, 4000)), "TIFF", compression="group4")).size == (4000, 4000)
    rows = tiff(
        (256, 1, 20),
        (257, 1, 2000),
        *GREY[2:],
        (259, 1, 1),
        (273, 2000, 110),
        (278, 1, 1),
        (279, 1, 20),
        data=struct.pack("<I", 110) * 2001,
    )
    assert outcome(rows).size == (20, 2000)


def test_metadata_after_the_pixels_of_a_png_is_not_expanded(watchdog):
    """Eight million numbers where the orientation is expected would become as many objects."""
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05" + struct.pack(">III", 2**20, 26, 0) + bytes(2**23)
    pixels = chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
    assert outcome(png(4, 4, pixels, chunk(b"eXIf", exif))).reason == "decompression_bomb"
    assert outcome(png(4, 4, chunk(b"eXIf", exif), pixels)).reason == "decompression_bomb"


def test_long_metadata_and_many_frames_are_cheap(watchdog):
    """None of these is trusted, expanded or counted; each takes much less than a second."""
    pixels, bomb = chunk(b"IDAT", zlib.compress(bytes(4 * 13))), zlib.compress(bytes(50_000_000))
    for kind, start in {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}.items():
        assert outcome(png(4, 4, chunk(kind, start + bomb), pixels)).reason == "unreadable_image"
    assert outcome(png(4, 4, chunk(b"IDAT", zlib.compress(bytes(100_000_000))))).size == (4, 4)
    assert outcome(png(4, 4, chunk(b"acTL", struct.pack(">II", 2**31, 0)), pixels)).size == (4, 4)
    gif, jpeg = one_of_each()["palette.gif"], one_of_each()["grey.jpg"]
    assert outcome(gif[:-1] + gif[gif.index(b",") : -1] * 20_000 + b";").size == (32, 24)
    assert outcome(jpeg[:2] + b"\xff\xfe\xff\xff" + bytes(65_533) + jpeg[2:]).size == (32, 24)
    profile = b"".join(b"\xff\xe2\xff\xffICC_PROFILE\0" + bytes([n, 255]) + bytes(65_519) for n in range(1, 256))
    assert outcome(jpeg[:2] + profile + jpeg[2:]).size == (32, 24)


def test_other_formats_are_not_tried(tmp_path):
    for kind in ("EPS", "PPM", "TGA", "ICO", "PCX"):
        with pytest.raises(ImageError, match="not an image that can be read"):
            read_image(encode(Image.fromarray(IMAGE), kind))


def test_a_large_image_below_the_limit_gives_no_warning(watchdog, monkeypatch):
    """Pillow warns above half its limit. Several threads must not show this or leave other filters changed."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    data = encode(Image.fromarray(IMAGE), "PNG")
    with warnings.catch_warnings(record=True) as seen, ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("always")
        assert all(image.size == (32, 24) for image in threads.map(read_image, [data] * 200))
        before = list(warnings.filters)
        list(threads.map(verify_image, [data] * 200))
        assert warnings.filters == before
    assert seen == []


# Folders


def test_list_images_is_recursive_and_sorted_without_hidden_files(tmp_path):
    shown = ["B.JPG", "a.png", "deep/d.tiff", "deep/er/c.WebP", "e.jpeg"]
    hidden = ["notes.txt", ".hidden.jpg", ".cache/f.jpg", "deep/.x/g.jpg", "png", "._a.png"]
    for name in shown + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == [tmp_path / name for name in shown]
    assert list_images(str(tmp_path / "deep")) == [tmp_path / "deep/d.tiff", tmp_path / "deep/er/c.WebP"]
    assert list_images(tmp_path / "folder.jpg") == []


def test_list_images_of_a_hidden_folder(tmp_path):
    (tmp_path / ".images").mkdir()
    (tmp_path / ".images/a.jpg").touch()
    assert list_images(tmp_path / ".images") == [tmp_path / ".images/a.jpg"]


def test_list_images_refuses_paths_that_are_not_folders(tmp_path):
    (tmp_path / "a.jpg").touch()
    for path in (tmp_path / "a.jpg", tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{path.name}: not a folder"):
            list_images(path)
