"""Choose the held-out records: an image goes to one side with every record about it, from any source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b

from dataprocess.image_paths import Found, coco_name
from dataset.record import RecordError

TRAIN, VALIDATION = "train", "validation"


class Split:
    """Chooses the side of each record: call `side`, then `hold_out` for a record that is kept for validation.

    In a source with split "auto" the seed and the image decide: its COCO name (both forms count as one), else a digest
    of its bytes if they were read, else its file name. The folder, the place in the file and the order of records make
    no difference. Equal file names in different folders get the same side, which does no harm.

    copies: resolved paths of images that are known to be copies, byte for byte, of held-out images under other names. They
    are held out as well: records about them go to validation from a source with split "auto" (counted in `moved`), and are
    refused from one with split "train".

    Process sources with split "validation" first, then "auto", then "train": the records that a side may take depend on
    the images that were held out before.
    """

    def __init__(self, seed: int, fraction: float, copies: Iterable[str] = ()):
        self._seeded = blake2b(f"{seed}/".encode(), digest_size=8)
        self._chosen_below = int(fraction * 2**64).to_bytes(8, "big")
        self._copies = frozenset(copies)
        self._held = {name for path in self._copies if (name := coco_name(os.path.basename(path)))}
        self.moved = 0

    def side(self, split: str, images: list[Found], name: str | None) -> str:
        """TRAIN or VALIDATION for a record with these images.

        split: of the source, "auto", "train" or "validation".
        name: of the record; decides if there is no image, and may be None otherwise.
        Raises RecordError: image_held_out, images_on_both_sides.
        """
        if split == VALIDATION:
            return VALIDATION
        if split == "auto" and len(images) == 1:  # a shortcut for nearly all records
            portable, identity = _names(images[0])
            if self._copies and images[0].real in self._copies:
                self.moved += 1
                return VALIDATION
            return VALIDATION if identity in self._held or self._is_chosen(portable) else TRAIN
        names = [_names(image) for image in images]
        copied = [image.real in self._copies for image in images]
        held = [copy or identity in self._held for copy, (_, identity) in zip(copied, names, strict=True)]
        if split == TRAIN:
            if True in held:
                path = images[held.index(True)].real
                other = " under another name" if path in self._copies else ""
                raise RecordError("image_held_out", f"{path} is a validation image{other}; it may not be trained on.")
            return TRAIN
        chosen = [self._is_chosen(portable) for portable, _ in names]
        if not images:
            assert name is not None, "a record without an image is divided by its name"
            chosen = [self._is_chosen(name)]
        if True in held:
            chosen = [one or other for one, other in zip(held, chosen, strict=True)]
        if True not in chosen:
            return TRAIN
        if False in chosen:
            raise RecordError(
                "images_on_both_sides", "some of its images are held out for validation and some are not."
            )
        self.moved += True in copied
        return VALIDATION

    def hold_out(self, images: list[Found]) -> None:
        """Keep these images out of the training records from now on."""
        self._held.update(_names(image)[1] for image in images)

    def _is_chosen(self, name: str) -> bool:
        state = self._seeded.copy()
        state.update(name.encode("utf-8", "surrogatepass"))
        return state.digest() < self._chosen_below


def _names(image: Found) -> tuple[str, str]:
    """The name that decides the side of an image on any machine, and the name shared by all sources with this image."""
    _, folder, file, target, _, digest = image
    if target:
        file = target[target.rfind("/") + 1 :]
    name = coco_name(file) or digest
    return (name, name) if name else (file, target or f"{folder}/{file}")
