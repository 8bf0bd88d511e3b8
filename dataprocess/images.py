"""Where the image of an annotation lies on disk, and that it lies inside its source's folder. Opens no image."""

from __future__ import annotations

import os
import re
import stat
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataset.record import RecordError

# COCO's 2014 release puts this before the file names of 2017; annotations and folders of the two get mixed.
COCO_2014 = "COCO_train2014_"
_coco_name = re.compile(rf"({COCO_2014})?(\d{{12}}\.jpg)").fullmatch


class Found(NamedTuple):
    """An image that exists."""

    folder: str  # absolute, as the user spelled it
    name: str  # its file name there
    real_folder: str  # the same file with every symlink followed
    real_name: str
    linked: bool  # the file itself is a symlink
    repair: str | None  # the rule that was needed to find it


class _Folder(NamedTuple):
    path: str
    real: str
    mtime_ns: int | None


class ImageFolder:
    """The image folder of one source (None: the source is text alone). Raises InputError if there is no such folder.

    `missing_in` maps each folder in which an image was missing to its modification time (ns; None: no such folder),
    so that a later run can tell whether looking again is worth it.
    """

    def __init__(self, root: str | os.PathLike | None, source: str):
        if root is not None and not os.path.isdir(root):
            raise InputError(f'source "{source}": images: {root} is not a folder; give the folder the images lie in.')
        self._root = None if root is None else os.path.abspath(root)
        self._real_root = None if root is None else os.path.realpath(root)
        self._enter = lru_cache(maxsize=4096)(self._enter_folder)  # images share folders, and following links is slow
        self.missing_in: dict[str, int | None] = {}

    def find(self, path: object) -> Found:
        """The image at `path`, relative to the folder, POSIX separators.

        Raises RecordError: wrong_type, path_outside_folder (absolute, `..`, or a symlink that leads out), missing_image.
        """
        if not isinstance(path, str) or not path:
            raise RecordError("wrong_type", f'"image" holds {path!r}; expected a path.')
        if self._root is None:
            raise RecordError(
                "missing_image", f"{path}: the source has no images folder; give data.sources its images."
            )
        if os.path.isabs(path) or re.match(r"[A-Za-z]:[\\/]|\\\\", path) or ".." in path.split("/"):
            raise RecordError("path_outside_folder", f"{path}: expected a path inside {self._root}.")
        parent, _, name = path.rpartition("/")
        try:
            folder = self._enter(parent)
        except ValueError as error:  # characters that no path can hold
            raise RecordError("missing_image", f"{path!r}: {error}.") from None
        found = self._look(folder, name, None)
        coco = _coco_name(name)
        if found is None and coco:
            prefix, bare = coco.groups()
            repair = "coco_2014_prefix_removed" if prefix else "coco_2014_prefix_added"
            found = self._look(folder, bare if prefix else COCO_2014 + bare, repair)
        if found is None:
            self.missing_in.setdefault(folder.path, folder.mtime_ns)
            raise RecordError("missing_image", f"{os.path.join(folder.path, name)}: no such file.")
        return found

    def _look(self, folder: _Folder, name: str, repair: str | None) -> Found | None:
        try:
            mode = os.lstat(f"{folder.real}/{name}").st_mode
        except (OSError, ValueError):
            return None
        if stat.S_ISREG(mode):
            return Found(folder.path, name, folder.real, name, False, repair)
        real = os.path.realpath(f"{folder.real}/{name}")
        if not stat.S_ISLNK(mode) or not os.path.isfile(real):
            return None
        self._refuse_escape(real, f"{folder.path}/{name}")
        return Found(folder.path, name, *os.path.split(real), True, repair)

    def _enter_folder(self, parent: str) -> _Folder:
        path = os.path.normpath(os.path.join(self._root, parent))
        real = os.path.realpath(path)
        self._refuse_escape(real, path)
        return _Folder(path, real, modified_ns(path))

    def _refuse_escape(self, real: str, path: str) -> None:
        if real != self._real_root and not real.startswith(self._real_root.rstrip("/") + "/"):
            raise RecordError("path_outside_folder", f"{path} leads to {real}; expected a file inside {self._root}.")


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
