"""Where the image of an annotation lies on disk, and that it lies inside its source's folder. Decodes no image."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataset.record import RecordError
from visual.images import ImageError, image_suffix

# COCO's 2014 release puts one of these before the file names of 2017; annotations and folders of the two get mixed.
COCO_2014 = ("COCO_train2014_", "COCO_val2014_")
# Absolute, here or on Windows, or with a part "..".
_leads_away = re.compile(r"/|\\\\|[A-Za-z]:[\\/]|(?:.*/)?\.\.(?:/|\Z)", re.DOTALL).match
_is_address = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE).match

NAMES_KEPT = 1_000_000  # of files in listed folders; some 100 MB. What does not fit is looked up one by one


def coco_name(name: str) -> str | None:
    """The name of 2017 ("000000000009.jpg") of an image of COCO, by either name; None for any other name."""
    if len(name) != 16:
        if len(name) > 31 or name[:-16] not in COCO_2014:
            return None
        name = name[-16:]
    return name if name[12:] == ".jpg" and name[:12].isdecimal() and name.isascii() else None


class Found(NamedTuple):
    """An image that exists."""

    folder: str  # absolute, as the user spelled it
    real_folder: str  # the same folder with every symlink followed
    name: str  # its file name there
    target: str | None = None  # where that leads, every symlink followed, if it is one
    repair: str | None = None  # the rule that was needed to find it
    digest: str = ""  # of its bytes, where they were read

    @property
    def real(self) -> str:
        """The path of the file, every symlink followed."""
        return self.target or f"{self.real_folder}/{self.name}"


_found = partial(tuple.__new__, Found)  # from a tuple of the six, at half the price


class PictureStore:
    """The folder for pictures that lie inside the records, as in parquet files: each a file named by its content."""

    def __init__(self, folder: Path):
        self.folder = os.path.abspath(folder)
        self.is_used = False
        self._placed: dict[str, bytes] = {}  # what is not yet written

    def place(self, data: bytes) -> Found:
        """Where a picture belongs; nothing is written yet. Raises RecordError with the reason of the ImageError."""
        try:
            suffix = image_suffix(data)
        except ImageError as error:
            raise RecordError(error.reason, error.detail) from None
        name, real_folder = hashlib.blake2b(data, digest_size=16).hexdigest() + suffix, os.path.realpath(self.folder)
        self._placed[name] = data
        return Found(self.folder, real_folder, name)

    def write_placed(self) -> None:
        """Write what was placed, unless it is there."""
        if self._placed:
            self.is_used = True
            for name, data in self._placed.items():
                self._write(name, data)
            self._placed.clear()

    def forget_placed(self) -> None:
        self._placed.clear()

    def _write(self, name: str, data: bytes) -> None:
        path, aside = f"{self.folder}/{name}", f"{self.folder}/.{name}.{os.getpid()}"
        try:
            os.makedirs(self.folder, exist_ok=True)
            if not os.path.exists(path) or os.path.getsize(path) != len(data):
                with open(aside, "wb") as file:
                    file.write(data)
                os.replace(aside, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); make room or rights there.") from None


class _Folder(NamedTuple):
    path: str
    real: str
    files: frozenset[str]  # its plain files; empty where there are too many to keep


class Listings:
    """The names of the plain files in folders. Each folder is listed once, however many sources show it."""

    def __init__(self):
        self._files: dict[str, frozenset[str]] = {}
        self._room = NAMES_KEPT

    def files(self, folder: str) -> frozenset[str]:
        """Of the folder with this real path; empty where there are too many to keep, or where it cannot be read."""
        if folder not in self._files:
            names = self._files[folder] = frozenset(self._list(folder))
            self._room -= len(names)
        return self._files[folder]

    def _list(self, folder: str) -> list[str]:
        """A backslash may lead away on another system: such a name is left out, and looked at closely."""
        names: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) and "\\" not in (name := entry.name):
                        names.append(name)
                        if len(names) > self._room:
                            return []
        except OSError:
            return []
        return names


class ImageFolder:
    """The image folder of a source (None: its pictures, if any, are inside the records, and go to `store`). Raises
    InputError if there is no such folder.

    A folder is listed once, when the first image in it is looked for: an image then costs a look into a set. Links, and
    what the list does not have, are looked up on disk.

    `modified` maps each folder in which an image was looked for to its modification time (ns; None: no such folder), so
    that a later run can tell whether an image has come, gone or been renamed.
    """

    def __init__(self, root: str | os.PathLike | None, source: str, store: PictureStore, listings: Listings):
        if root is not None and not os.path.isdir(root):
            raise InputError(f'source "{source}": images: {root} is not a folder; give the folder the images lie in.')
        self._root = None if root is None else os.path.abspath(root)
        self._real_root = None if root is None else os.path.realpath(root)
        self._folders: dict[str, _Folder] = {}  # by what stands before the file name in a path, with its "/"
        self._store, self._listings = store, listings
        self.modified: dict[str, int | None] = {}

    def find(self, path: object) -> Found:
        """The image at `path`, relative to the folder, POSIX separators; or a picture's bytes, which get a file.

        Raises RecordError: wrong_type, path_outside_folder (absolute, `..`, or a symlink that leads out), missing_image.
        """
        if type(path) is str:
            cut = path.rfind("/") + 1
            if (folder := self._folders.get(path[:cut])) is not None:
                parent, real_parent, files = folder
                if (name := path[cut:]) in files:
                    return _found((parent, real_parent, name, None, None, ""))
        return self._find_anew(path)

    def _find_anew(self, path: object) -> Found:
        if isinstance(path, bytes):
            return self._store.place(path)
        if not isinstance(path, str) or not path:
            raise RecordError("wrong_type", f'"image" holds {path!r:.40}; expected a path.')
        if _is_address(path):
            raise RecordError(
                "missing_image",
                f"{path:.80}: an address, and nothing is downloaded here; download it and give its path.",
            )
        if self._root is None:
            raise RecordError(
                "missing_image", f"{path}: the source has no images folder; give data.sources its images."
            )
        if _leads_away(path):
            raise RecordError("path_outside_folder", f"{path}: expected a path inside {self._root}.")
        cut = path.rfind("/") + 1
        name = path[cut:]
        try:
            folder = self._folders.get(path[:cut]) or self._enter(path[:cut])
        except ValueError as error:  # characters that no path can hold
            raise RecordError("missing_image", f"{path!r}: {error}.") from None
        found = self._look(folder, name, None)
        if found is None and (bare := coco_name(name)):
            repair = "coco_2014_prefix_added" if name == bare else "coco_2014_prefix_removed"
            for other in [prefix + bare for prefix in COCO_2014] if name == bare else [bare]:
                found = found or self._look(folder, other, repair)
        if found is None:
            raise RecordError("missing_image", f"{os.path.join(folder.path, name)}: no such file.")
        return found

    def _look(self, folder: _Folder, name: str, repair: str | None) -> Found | None:
        real = f"{folder.real}/{name}"
        try:
            mode = os.lstat(real).st_mode
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(mode):
            real = os.path.realpath(real)
            if not stat.S_ISLNK(mode) or not os.path.isfile(real):
                return None
            self._refuse_escape(real, f"{folder.path}/{name}")
            self._note(os.path.dirname(real))
            return Found(folder.path, folder.real, name, real, repair)
        return Found(folder.path, folder.real, name, None, repair)

    def _enter(self, parent: str) -> _Folder:
        path = os.path.normpath(os.path.join(self._root, parent))
        real = os.path.realpath(path)
        self._refuse_escape(real, path)
        self._note(path)
        folder = self._folders[parent] = _Folder(path, real, self._listings.files(real))
        return folder

    def _note(self, folder: str) -> None:
        if folder not in self.modified:
            self.modified[folder] = modified_ns(folder)

    def _refuse_escape(self, real: str, path: str) -> None:
        if real != self._real_root and not real.startswith(self._real_root.rstrip("/") + "/"):
            raise RecordError(
                "path_outside_folder",
                f"{path} leads by a link to {real}, outside {self._root}; point images of a source at the folder where "
                "that lies, or put a copy in the link's place.",
            )


@lru_cache(maxsize=4096)
def folder_from(qa_folder: str, folder: str, real_folder: str) -> str:
    """How a file in `qa_folder` names `folder`: relative, with "/" at the end (empty for the same folder)."""
    relative = os.path.relpath(folder, qa_folder)
    if relative.split("/")[0] == "..":  # out of a symlinked folder, ".." leads somewhere else
        relative = os.path.relpath(real_folder, os.path.realpath(qa_folder))
    return "" if relative == "." else relative + "/"


def modified_ns(path: str | Path) -> int | None:
    """The modification time in nanoseconds; None where there is nothing."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
