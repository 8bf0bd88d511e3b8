"""Which records are held out: a whole image goes to one side, with everything that is said about it in any source."""

from __future__ import annotations

import hashlib

from dataprocess.images import Found, coco_name
from dataset.record import RecordError

TRAIN, VALIDATION = "train", "validation"


class Split:
    """Decides on which side a record goes: `side`, then `remember` once it is kept.

    In a source to divide, the seed and an image's file name decide, COCO's two names for an image being one: no folder,
    place or order moves an image to the other side. Equal names in different folders share a side, which harms nobody.

    Feed it the sources to hold out first, then the ones to divide, then the ones to train on: what a side may hold
    depends on the images held out before.
    """

    def __init__(self, seed: int, fraction: float):
        self._seed, self._chosen_below = seed, fraction * 2**64
        self._held: set[str] = set()

    def side(self, split: str, images: list[Found], name: str) -> str:
        """TRAIN or VALIDATION for a record with these images, in a source whose split is "auto", "train" or "validation".
        `name` decides where there is no image.

        Raises RecordError: image_held_out, images_on_both_sides.
        """
        if split == VALIDATION:
            return VALIDATION
        held = [_identity(image) in self._held for image in images]
        if split == TRAIN:
            if any(held):
                path = images[held.index(True)].real
                raise RecordError("image_held_out", f"{path} is a validation image; it may not be trained on.")
            return TRAIN
        chosen = [self._is_chosen(_file_name(image)) for image in images] or [self._is_chosen(name)]
        held = [one or other for one, other in zip(held, chosen, strict=True)] if any(held) else chosen
        if any(held) and not all(held):
            raise RecordError(
                "images_on_both_sides", "some of its images are held out for validation and some are not."
            )
        return VALIDATION if any(held) else TRAIN

    def remember(self, side: str, images: list[Found]) -> None:
        if side == VALIDATION:
            self._held.update(map(_identity, images))

    def _is_chosen(self, name: str) -> bool:
        data = f"{self._seed}/{name}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") < self._chosen_below


def _file_name(image: Found) -> str:
    name = image.real.rpartition("/")[2]
    return coco_name(name) or name


def _identity(image: Found) -> str:
    """What two sources share that show the same picture: COCO's name for it, or the file itself."""
    return coco_name(image.real.rpartition("/")[2]) or image.real
