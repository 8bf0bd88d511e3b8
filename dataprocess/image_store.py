"""Keep the images that raw records contain: in one archive beside the QA file, instead of a file for each."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from config import InputError
from config.files import publish, remove_partials
from dataset.record import RecordError
from visual.image_pack import ImagePack
from visual.images import ImageError, image_suffix


class ImageStore:
    """The place for images that are stored inside the records, as in parquet files: one archive, `folder` with ".zip".

    Each image is named after its content. If `folder` exists, as earlier versions made it, each image becomes a file in it,
    so that a QA file that is made again names the same paths. A context manager: an archive that was not published is
    removed at the end.

    folder: the path of the archive or folder, as the user spelled it; real_folder: with symlinks resolved.
    """

    def __init__(self, folder: Path):
        is_folder = os.path.isdir(folder)
        self.folder = os.path.abspath(folder) + ("" if is_folder else ".zip")
        self.is_used = False
        self.real_folder = os.path.realpath(self.folder)
        if not is_folder:  # a link to a file is refused, not followed
            self.real_folder = os.path.join(os.path.realpath(folder.parent), os.path.basename(self.folder))
        self._pack: ImagePack | None = None
        self._is_folder = is_folder
        self._placed: dict[str, bytes] = {}  # file name -> bytes, not yet written

    def place(self, data: bytes) -> str:
        """Choose the name of an image without writing it. Raises RecordError with the reason of the ImageError."""
        try:
            suffix = image_suffix(data)
        except ImageError as error:
            raise RecordError(error.reason, error.detail) from None
        name = hashlib.blake2b(data, digest_size=16).hexdigest() + suffix
        self._placed[name] = data
        return name

    def write_placed(self) -> None:
        """Write the placed images, except for those that are there already. Raises InputError."""
        if self._placed:
            try:
                for name, data in self._placed.items():
                    if self._is_folder:
                        self._write_file(name, data)
                    else:
                        self._opened().add(name, data)
            except OSError as error:
                raise self._unwritable(error) from None
            self._placed.clear()

    def forget_placed(self) -> None:
        """Drop the placed images without writing them."""
        self._placed.clear()

    def publish(self) -> None:
        """Give the archive its name. Nothing is written afterwards. Raises InputError."""
        if self._pack:
            try:
                self._pack.publish()
            except OSError as error:
                raise self._unwritable(error) from None

    def __enter__(self) -> ImageStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pack:
            self._pack.__exit__()

    def _opened(self) -> ImagePack:
        if self._pack is None:
            self._pack, self.is_used = ImagePack(Path(self.real_folder)), True
        return self._pack

    def _write_file(self, name: str, data: bytes) -> None:
        path = f"{self.folder}/{name}"
        if not self.is_used:
            remove_partials(self.folder)
            self.is_used = True
        if not os.path.exists(path) or os.path.getsize(path) != len(data):
            publish(Path(path), data)

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.folder}: cannot be written ({error.strerror}); free space or make it writable.")
