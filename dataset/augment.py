"""Augmentation: change a training image at random, in ways that leave most answers true.

A view is one changed image: rotated, cropped, with other colours, blurred, in this order. It is never mirrored, because that
would exchange left and right and make text unreadable. All random numbers are a hash of what identifies the view, so they
depend on no generator, no earlier view and no process.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageStat

from config import AugmentConfig

# Increase when a view gets other pixels: features that were stored before are then not used.
RULES = 1


@dataclass(frozen=True)
class Augmenter:
    """The choice of a view for each image of a sample.

    `settings.views` None: a new one for each (seed, epoch, record, image of the record). N: one of the N fixed views of each
    image. Then the epochs take a record's views in turn, and a view's pixels depend on the seed, the image and the number of
    the view alone.
    """

    settings: AugmentConfig
    seed: int
    side: int  # of the encoder's input, in pixels

    def view(self, key: tuple[int, int], image: int) -> View:
        """Return the view of a record's image. key: (epoch, record). image: its position among those of the record."""
        (epoch, record), views = key, self.settings.views
        if views is None:
            return View(self, (epoch, record, image))
        first = int(views * _numbers(["first", self.seed, record, image])[0])
        return View(self, ((first + epoch) % views,))


@dataclass(frozen=True)
class View:
    """A view of an image: a function of the image. `identity`: (epoch, record, image), or (number of a fixed view,)."""

    augmenter: Augmenter
    identity: tuple[int, ...]

    @property
    def key(self) -> bytes:
        """Everything besides the image that the pixels depend on, as 16 bytes for the feature cache."""
        augmenter = self.augmenter
        known = (RULES, *augmenter.settings.strengths.values(), augmenter.seed, augmenter.side, *self.identity)
        return hashlib.blake2b(_text(known), digest_size=16).digest()

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the view of an RGB image, as RGB."""
        settings, side = self.augmenter.settings, self.augmenter.side
        # the number of a fixed view alone would change all images alike
        content = () if settings.views is None else (*image.size, hashlib.blake2b(image.tobytes()).hexdigest())
        area, left, top, turn, *colours, radius = _numbers(["view", self.augmenter.seed, *self.identity, *content])
        kept = math.sqrt(1 - settings.crop * area)  # fraction of each side
        if (factor := int(min(image.size) * kept / (2 * side))) > 1:
            image = image.reduce(factor)  # the encoder sees no more, and the rest takes less time
        if settings.rotate:
            angle = settings.rotate * (2 * turn - 1)
            image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=border_colour(image))
        if settings.crop:
            width, height = (max(1, round(kept * length)) for length in image.size)
            x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
            image = image.crop((x, y, x + width, y + height))
        if settings.color:
            for kind, number in zip(_COLOURS, colours, strict=True):
                image = kind(image).enhance(1 + settings.color * (2 * number - 1))
        if settings.blur:
            image = image.filter(ImageFilter.GaussianBlur(settings.blur * radius * min(image.size) / side))
        return image


_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def border_colour(image: Image.Image) -> tuple[int, ...]:
    """Return the median colour of the outermost pixels: of a drawing its background, of a photograph a colour that it has
    at its edges."""
    border = Image.new("L", image.size)
    ImageDraw.Draw(border).rectangle((0, 0, image.width - 1, image.height - 1), outline=255)
    return tuple(ImageStat.Stat(image, border).median)


def _numbers(identity: Sequence[object]) -> list[float]:
    """Return eight numbers in [0, 1) that depend on `identity` alone, in every version of every library."""
    digest = hashlib.blake2b(_text(identity), digest_size=64).digest()
    return [(number >> 11) / 2**53 for number in struct.unpack("<8Q", digest)]


def _text(values: Sequence[object]) -> bytes:
    return " ".join(map(str, values)).encode()
