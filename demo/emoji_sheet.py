"""Answers about images as one PNG: each image with what was expected, what was answered, and the answer about another image.

Text is drawn with a font that has Chinese characters; Pillow finds it by its file's name in the system's font folders.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from config import InputError, printable

FONTS = (  # of Linux, macOS and Windows
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simhei.ttf",
)
FONT_SIZE, LINE, MARGIN = 13, 17, 10  # pixels
COLUMNS, CELL, DRAWING = 5, (206, 106), 72
MAX_BYTES = 300_000
COLOURS = {"expected": "#60646c", "right": "#18794e", "wrong": "#b42318", "blind": "#9a9ea6", "ink": "#1c2024"}


def find_font(path: str | None) -> ImageFont.FreeTypeFont | None:
    """Return the font in the file `path`; None: the first of FONTS on this machine, or None if it has none of them.

    Raises InputError if `path` is not a font, or has no Chinese characters.
    """
    for name in FONTS if path is None else (path,):
        try:
            font = _simplified(name)
        except (OSError, ValueError) as error:
            if path is not None:
                raise InputError(f"--font {path}: cannot be read as a font ({error}).") from None
            continue
        if bytes(font.getmask("中")) != bytes(font.getmask("文")):  # both are an empty box where they are missing
            return font
        if path is not None:
            raise InputError(f"--font {path}: has no Chinese characters; name another one, such as {FONTS[0]}.")
    return None


def _simplified(name: str) -> ImageFont.FreeTypeFont:
    """Return the face of a font file that is meant for simplified Chinese, else the first."""
    faces = [ImageFont.truetype(name, FONT_SIZE)]
    while name.endswith(".ttc") and "SC" not in str(faces[-1].getname()[0]).split():
        try:
            faces.append(ImageFont.truetype(name, FONT_SIZE, index=len(faces)))
        except OSError:
            return faces[0]
    return faces[-1]


def draw_sheet(rows: Sequence[dict], images: Sequence[Image.Image], title: str, font: ImageFont.FreeTypeFont) -> bytes:
    """Return a PNG of at most MAX_BYTES, unless sixteen colours take more. rows: as for evaluation.page, each with its
    image."""
    height = -(-len(rows) // COLUMNS) * CELL[1]
    sheet = Image.new("RGB", (COLUMNS * CELL[0] + MARGIN, height + 2 * LINE + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), printable(title), font=font, fill=COLOURS["ink"])
    x = MARGIN
    for key, text in (
        ("right", "right"),
        ("wrong", "wrong"),
        ("expected", "expected"),
        ("blind", "with another image"),
    ):
        pen.text((x, MARGIN + LINE), text, font=font, fill=COLOURS[key])
        x += round(font.getlength(text)) + 2 * MARGIN
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        left, top = MARGIN + i % COLUMNS * CELL[0], 2 * MARGIN + 2 * LINE + i // COLUMNS * CELL[1]
        sheet.paste(image.resize((DRAWING, DRAWING)), (left, top))
        said = [("right", row["answer"], 2)] if row["correct"] else [("wrong", row["answer"], 2)]
        said += [] if row["correct"] else [("expected", row["reference"], 2)]
        said += [] if row["blind"] is None else [("blind", row["blind"], 1)]
        width, y = CELL[0] - DRAWING - 2 * MARGIN, top
        for key, text, most in said:
            for line in wrapped(printable(text) or "(empty)", font, width=width, most=most):
                pen.text((left + DRAWING + 8, y), line, font=font, fill=COLOURS[key])
                y += LINE
    for colours in (256, 128, 64, 32, 16):
        file = io.BytesIO()
        sheet.quantize(colours, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """Return `text` in at most `most` lines of `width` pixels. A word longer than a line is broken, as Chinese is; what does
    not fit into the last line is replaced by an ellipsis."""
    lines: list[str] = []
    rest = text
    while rest:
        fits = max((n for n in range(1, len(rest) + 1) if font.getlength(rest[:n]) <= width), default=1)
        if fits < len(rest):
            if len(lines) == most - 1:
                while fits > 1 and font.getlength(rest[:fits] + "…") > width:
                    fits -= 1
                return [*lines, rest[:fits].rstrip() + "…"]
            fits = rest.rfind(" ", 0, fits + 1) + 1 or fits
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:]
    return lines
