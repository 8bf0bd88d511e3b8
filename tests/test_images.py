"""Image files are read as a viewer shows them, or refused by name. Run: pytest tests/test_images.py"""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from config import InputError
from visual.images import MAX_ASPECT_RATIO, ImageError, list_images, read_image

WHITE = (255, 255, 255)
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


# One picture, many files


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_files_give_their_pixels(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(Image.fromarray(PICTURE), tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(pixels(read_image(path)), PICTURE)
    assert np.array_equal(pixels(read_image(str(path))), PICTURE)
    with open(path, "rb") as file:
        assert np.array_equal(pixels(read_image(file)), PICTURE)
    assert np.array_equal(pixels(read_image(io.BytesIO(path.read_bytes()))), PICTURE)


def test_the_suffix_is_not_believed(tmp_path):
    """Some data sets hold GIFs named .jpg."""
    path = save(Image.new("RGB", (4, 4), (255, 0, 0)), tmp_path / "a.jpg", format="GIF")
    assert (pixels(read_image(path)) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, suffix, orientation):
    """The four quarters have their own colours, so each of the eight orientations looks different."""
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24], upright[16:, 24:] = 255, (255, 0, 0), (0, 255, 0), 0
    stored = {  # what the camera wrote: the inverse of what the tag asks a viewer to do (Exif 2.32, tag 0x0112)
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the EXIF
def test_unreadable_exif_does_not_lose_a_photo(tmp_path):
    path = save(Image.fromarray(PICTURE), tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert pixels(read_image(path)).shape == PICTURE.shape


# Modes


def test_greyscale_and_one_bit(tmp_path):
    grey = PICTURE[..., 0]
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


def test_thirty_two_bit_mode_holds_sixteen_bits_or_is_refused(tmp_path):
    values = np.array([[0, 257 * 7, 65535]], dtype=np.int32)
    read = pixels(read_image(save(Image.fromarray(values), tmp_path / "a.tif")))
    assert read[0, :, 0].tolist() == [0, 7, 255]
    with pytest.raises(ImageError, match=r"b\.tif.*32 bits.*8 or 16 bits"):
        read_image(save(Image.fromarray(values * 2), tmp_path / "b.tif"))
    with pytest.raises(ImageError, match=r"c\.tif.*floating point.*8 or 16 bits"):
        read_image(save(Image.fromarray(np.ones((2, 2), dtype=np.float32)), tmp_path / "c.tif"))


def test_transparency_is_laid_over_white(tmp_path):
    colours = np.array([[(200, 0, 0, 0), (200, 0, 0, 255), (200, 0, 0, 51)]], dtype=np.uint8)
    read = pixels(read_image(save(Image.fromarray(colours), tmp_path / "rgba.png")))
    assert read[0].tolist() == [list(WHITE), [200, 0, 0], [244, 204, 204]]
    greys = np.array([[(90, 0), (90, 255), (90, 51)]], dtype=np.uint8)
    read = pixels(read_image(save(Image.fromarray(greys, "LA"), tmp_path / "la.png")))
    assert read[0, :, 0].tolist() == [255, 90, 222]


def test_palettes_with_and_without_transparency(tmp_path):
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


def test_a_transparent_colour_without_alpha_channel(tmp_path):
    image = Image.fromarray(np.array([[(1, 2, 3), (9, 9, 9)]], dtype=np.uint8))
    assert pixels(read_image(save(image, tmp_path / "a.png", transparency=(1, 2, 3))))[0].tolist() == [
        list(WHITE),
        [9, 9, 9],
    ]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    """Full ink of one kind; JPEG stores it inverted, as Adobe does."""
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


# Refusals: each names the file and says what to do


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_missing_files_folders_and_text(tmp_path):
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
def test_truncated_files(tmp_path, suffix):
    path = save(Image.fromarray(PICTURE), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match=rf"a\.{suffix}: (the image is damaged|not an image).*remove"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tif"])
def test_damage_anywhere_raises_nothing_but_image_errors(tmp_path, suffix):
    path = save(Image.fromarray(PICTURE), tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    generator = np.random.default_rng(1)
    for _ in range(100):
        damaged = bytearray(content)
        for position in generator.integers(0, min(len(content), 400), 3):
            damaged[position] = generator.integers(0, 256)
        try:
            assert read_image(io.BytesIO(bytes(damaged))).mode == "RGB"
        except ImageError:
            pass


@pytest.mark.parametrize(("kind", "data"), [(b"tRNS", b""), (b"eXIf", b"?"), (b"iCCP", b"")])
def test_damage_that_pillow_reports_as_something_else(tmp_path, kind, data):
    """Sound checksums around bad chunks: ValueError, SyntaxError and IndexError in Pillow."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(kind, data) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"a\.png: the image is damaged \(.+\); get the file again"):
        read_image(tmp_path / "a.png")


def test_decompression_bombs(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"bomb\.png: more than 178,956,970 pixels"):
        read_image(tmp_path / "bomb.png")


def test_strips_are_refused_before_a_resize_makes_them_huge(tmp_path):
    read_image(save(Image.new("RGB", (MAX_ASPECT_RATIO, 1)), tmp_path / "fine.png"))
    with pytest.raises(ImageError, match=r"strip\.png: 101 x 1 pixels.*crop"):
        read_image(save(Image.new("RGB", (MAX_ASPECT_RATIO + 1, 1)), tmp_path / "strip.png"))


def test_an_image_error_is_an_input_error():
    assert issubclass(ImageError, InputError)


# Folders


def test_list_images_is_recursive_sorted_and_leaves_out_what_is_hidden(tmp_path):
    shown = ["B.JPG", "a.png", "deep/d.tiff", "deep/er/c.WebP", "e.jpeg"]
    hidden = ["notes.txt", ".hidden.jpg", ".cache/f.jpg", "deep/.x/g.jpg", "png", "._a.png"]
    for name in shown + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == [tmp_path / name for name in shown]
    assert list_images(str(tmp_path / "deep")) == [tmp_path / "deep/d.tiff", tmp_path / "deep/er/c.WebP"]
    assert list_images(tmp_path / "folder.jpg") == []


def test_list_images_in_a_hidden_folder_that_was_asked_for(tmp_path):
    (tmp_path / ".photos").mkdir()
    (tmp_path / ".photos/a.jpg").touch()
    assert list_images(tmp_path / ".photos") == [tmp_path / ".photos/a.jpg"]


def test_list_images_of_no_folder(tmp_path):
    (tmp_path / "a.jpg").touch()
    for path in (tmp_path / "a.jpg", tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{path.name}: not a folder"):
            list_images(path)
