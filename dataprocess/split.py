"""Which records are held out: a whole image goes to one side, with everything that is said about it in any source."""

from __future__ import annotations

import hashlib

from dataprocess.images import Found, folder_from
from dataset.record import RecordError

TRAIN, VALIDATION = "train", "validation"


class Split:
    """Decides on which side a record goes: `keys`, then `side`, then `remember` once it is kept.

    Feed it the sources to hold out first, then the ones to divide, then the ones to train on: what a side may hold
    depends on the images held out before.
    """

    def __init__(self, seed: int, fraction: float, qa_folder: str):
        self._seed, self._fraction, self._qa_folder = seed, fraction, qa_folder
        self._held: set[int] = set()
        self._names: dict[str, str] = {}  # real folder -> the name by which it was first reached

    def keys(self, found: list[Found]) -> list[str]:
        """One key an image, by whatever path and source it is reached: its path from the QA file's folder, so that the
        split does not change when the project moves."""
        keys = []
        for image in found:
            folder = image.real_folder if image.linked else image.folder
            name = folder_from(self._qa_folder, folder, image.real_folder)
            keys.append(self._names.setdefault(image.real_folder, name) + image.real_name)
        return keys

    def side(self, split: str, keys: list[str]) -> str:
        """TRAIN or VALIDATION for a record with these images, in a source whose split is "auto", "train" or "validation".

        Raises RecordError: image_held_out, images_on_both_sides.
        """
        if split == VALIDATION:
            return VALIDATION
        held = [self._is_held(key, by_hash=split == "auto") for key in keys]
        if split == TRAIN and any(held):
            raise RecordError(
                "image_held_out", f"{keys[held.index(True)]} is a validation image; it may not be trained on."
            )
        if any(held) and not all(held):
            raise RecordError(
                "images_on_both_sides", "some of its images are held out for validation and some are not."
            )
        return VALIDATION if any(held) else TRAIN

    def remember(self, side: str, keys: list[str]) -> None:
        if side == VALIDATION:
            self._held.update(map(self._digest, keys))

    def _is_held(self, key: str, by_hash: bool) -> bool:
        digest = self._digest(key)
        return digest in self._held or (by_hash and digest < self._fraction * 2**64)

    def _digest(self, key: str) -> int:
        data = f"{self._seed}/{key}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
