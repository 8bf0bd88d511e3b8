"""Take the images of questions away: blank images of the same size, or none. `evaluation.score` swaps images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image

from dataset.record import Part
from visual.images import read_image

BLIND = ("swapped", "blank", "absent")
GREY = (128, 128, 128)  # near 0 for an encoder after normalisation


def without_images(turns: Sequence[tuple[str, Sequence[Part]]]) -> tuple[tuple[str, list[str]], ...]:
    """Return the (role, parts) pairs of a question without images and the line breaks that follow them."""
    found = []
    for role, parts in turns:
        text = "".join(part for part in parts if isinstance(part, str))
        starts_with_image = bool(parts) and not isinstance(parts[0], str)
        found.append((role, [text.lstrip("\n") if starts_with_image else text]))
    return tuple(found)


def blank_images(paths: Collection[Path], folder: Path) -> dict[Path, Path]:
    """Write a grey image of each size into `folder`. Returns image -> the grey image of its size. Raises ImageError if an
    image cannot be read."""
    blank: dict[Path, Path] = {}
    for path in paths:
        width, height = read_image(path).size
        blank[path] = folder / f"{width}x{height}.png"
        if not blank[path].exists():
            Image.new("RGB", (width, height), GREY).save(blank[path])
    return blank
