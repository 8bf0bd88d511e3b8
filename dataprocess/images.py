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

# COCO's 2014 release puts one of these before the file names of 2017; annotations and folders of the two get mixed.
COCO_2014 = ("COCO_train2014_", "COCO_val2014_")
_coco_name = re.compile(rf"(?:{'|'.join(COCO_2014)})?(\d{{12}}\.jpg)").fullmatch
# Absolute, here or on Windows, or with a part "..".
_leads_away = re.compile(r"/|\\\\|[A-Za-z]:[\\/]|(?:.*/)?\.\.(?:/|\Z)", re.DOTALL).match


def coco_name(name: str) -> str | None:
    """The name of 2017 ("000000000009.jpg") of an image of COCO, by either name; None for any other name."""
    match = _coco_name(name)
    return match and match[1]


class Found(NamedTuple):
    """An image that exists."""

    folder: str  # absolute, as the user spelled it
    real_folder: str  # the same folder with every symlink followed
    name: str  # its file name there
    real: str  # the path of the file, every symlink followed
    repair: str | None  # the rule that was needed to find it


class _Folder(NamedTuple):
    path: str
    real: str


class ImageFolder:
    """The image folder of one source (None: the source is text alone). Raises InputError if there is no such folder.

    `modified` maps each folder in which an image was looked for to its modification time (ns; None: no such folder), so
    that a later run can tell whether an image has come, gone or been renamed.
    """

    def __init__(self, root: str | os.PathLike | None, source: str):
        if root is not None and not os.path.isdir(root):
            raise InputError(f'source "{source}": images: {root} is not a folder; give the folder the images lie in.')
        self._root = None if root is None else os.path.abspath(root)
        self._real_root = None if root is None else os.path.realpath(root)
        self._enter = lru_cache(maxsize=4096)(self._enter_folder)  # images share folders, and following links is slow
        self.modified: dict[str, int | None] = {}

    def find(self, path: object) -> Found:
        """The image at `path`, relative to the folder, POSIX separators.

        Raises RecordError: wrong_type, path_outside_folder (absolute, `..`, or a symlink that leads out), missing_image.
        """
        if not isinstance(path, str) or not path:
            raise RecordError("wrong_type", f'"image" holds {path!r:.40}; expected a path.')
        if self._root is None:
            raise RecordError(
                "missing_image", f"{path}: the source has no images folder; give data.sources its images."
            )
        if _leads_away(path):
            raise RecordError("path_outside_folder", f"{path}: expected a path inside {self._root}.")
        parent, _, name = path.rpartition("/")
        try:
            folder = self._enter(parent)
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

    def _enter_folder(self, parent: str) -> _Folder:
        path = os.path.normpath(os.path.join(self._root, parent))
        real = os.path.realpath(path)
        self._refuse_escape(real, path)
        self._note(path)
        return _Folder(path, real)

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
