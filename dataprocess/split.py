"""Which records are held out: a whole image goes to one side, with everything that is said about it in any source."""

from __future__ import annotations

from hashlib import blake2b

from dataprocess.images import Found, coco_name
from dataset.record import RecordError

TRAIN, VALIDATION = "train", "validation"


class Split:
    """Decides on which side a record goes: `side`, then `hold_out` once it is kept for validation.

    In a source to divide, the seed and the image decide: COCO's name for it, both of COCO's being one; else its bytes,
    where they were read; else its file name. No folder, place or order moves an image to the other side. Equal file names
    in different folders share a side, which harms nobody.

    Feed it the sources to hold out first, then the ones to divide, then the ones to train on: what a side may hold
    depends on the images held out before.
    """

    def __init__(self, seed: int, fraction: float):
        self._seeded = blake2b(f"{seed}/".encode(), digest_size=8)
        self._chosen_below = int(fraction * 2**64).to_bytes(8, "big")
        self._held: set[str] = set()

    def side(self, split: str, images: list[Found], name: str | None) -> str:
        """TRAIN or VALIDATION for a record with these images, in a source whose split is "auto", "train" or "validation".
        `name` decides where there is no image.

        Raises RecordError: image_held_out, images_on_both_sides.
        """
        if split == VALIDATION:
            return VALIDATION
        if split == "auto" and len(images) == 1:  # nearly always
            name, identity = _names(images[0])
            return VALIDATION if identity in self._held or self._is_chosen(name) else TRAIN
        names = [_names(image) for image in images]
        held = [identity in self._held for _, identity in names]
        if split == TRAIN:
            if True in held:
                path = images[held.index(True)].real
                raise RecordError("image_held_out", f"{path} is a validation image; it may not be trained on.")
            return TRAIN
        chosen = [self._is_chosen(portable) for portable, _ in names] or [self._is_chosen(name)]
        if True in held:
            chosen = [one or other for one, other in zip(held, chosen, strict=True)]
        if True not in chosen:
            return TRAIN
        if False in chosen:
            raise RecordError(
                "images_on_both_sides", "some of its images are held out for validation and some are not."
            )
        return VALIDATION

    def hold_out(self, images: list[Found]) -> None:
        self._held.update(_names(image)[1] for image in images)

    def _is_chosen(self, name: str) -> bool:
        state = self._seeded.copy()
        state.update(name.encode("utf-8", "surrogatepass"))
        return state.digest() < self._chosen_below


def _names(image: Found) -> tuple[str, str]:
    """What decides for an image on any machine, and what two sources share that show the same picture."""
    _, _, file, target, _, digest = image
    if target:
        file = target[target.rfind("/") + 1 :]
    name = coco_name(file) or digest
    return (name, name) if name else (file, image.real)
