"""Find the image of an annotation on disk and check that it is inside its source's folder. Decodes no image."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import defaultdict
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from config import InputError, shortened
from dataprocess.image_store import ImageStore
from dataprocess.keys import shown
from dataprocess.media import bytes_in, path_in
from dataset.record import RecordError
from visual.archives import ArchiveError, NotAnArchive, file_names, find_member, split_path, top_folder

# File names of COCO 2014 are those of COCO 2017 with one of these prefixes. Annotations of one release are often used
# with the images of the other.
COCO_2014 = ("COCO_train2014_", "COCO_val2014_")
# Absolute (POSIX or Windows), or with a part "..".
_leads_away = re.compile(r"/|\\\\|[A-Za-z]:[\\/]|(?:.*/)?\.\.(?:/|\Z)", re.DOTALL).match
_is_address = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE).match

MAX_HINTS, HINT_NAMES = 3, 5_000  # messages of a source that suggest a file, and names in a folder that are compared
NAMES_KEPT = 1_000_000  # file names of listed folders in memory, about 100 MB; other files are looked up one by one


def coco_name(name: str) -> str | None:
    """The COCO 2017 name ("000000000009.jpg") for a file name of COCO 2014 or 2017; None for any other name."""
    if len(name) != 16:
        if len(name) > 31 or name[:-16] not in COCO_2014:
            return None
        name = name[-16:]
    return name if name[12:] == ".jpg" and name[:12].isdecimal() and name.isascii() else None


class Found(NamedTuple):
    """An image that exists."""

    folder: str  # absolute, as the user spelled it
    real_folder: str  # the same folder with symlinks resolved
    name: str  # the file name in this folder
    target: str | None = None  # the resolved path if the file is a symlink
    repair: str | None = None  # the rule that was needed to find the file
    digest: str = ""  # of its bytes, if they were read

    @property
    def real(self) -> str:
        """The path of the file with symlinks resolved."""
        return self.target or f"{self.real_folder}/{self.name}"


_found = partial(tuple.__new__, Found)  # takes a tuple of the six fields; half the cost of the constructor


class _Folder(NamedTuple):
    path: str
    real: str
    files: frozenset[str]  # names of its plain files; empty if there are too many to keep


class Listings:
    """Names of the plain files in folders. Each folder is listed once, even if several sources use it."""

    def __init__(self) -> None:
        self._files: dict[str, frozenset[str]] = {}
        self._archives: set[str] = set()
        self._room = NAMES_KEPT

    def files(self, folder: str) -> frozenset[str]:
        """Plain files of the folder with this resolved path; empty if too many to keep or the folder cannot be read."""
        if folder not in self._files:
            self._keep(folder, self._list(folder))
        return self._files[folder]

    def files_in(self, archive: str, folder: str) -> frozenset[str]:
        """The same for a folder in an archive, "" for its root. Raises ArchiveError."""
        if archive not in self._archives:
            self._archives.add(archive)
            names: dict[str, list[str]] = defaultdict(list)
            for count, path in enumerate(file_names(archive)):
                if count > self._room:
                    names.clear()
                    break
                cut = path.rfind("/")
                names[path[: max(cut, 0)]].append(path[cut + 1 :])
            for inside, some in names.items():
                self._keep(f"{archive}/{inside}" if inside else archive, some)
        return self._files.get(f"{archive}/{folder}" if folder else archive, frozenset())

    def _keep(self, folder: str, names: list[str]) -> None:
        self._files[folder] = frozenset(names)
        self._room -= len(names)

    def _list(self, folder: str) -> list[str]:
        names: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    # A name with a backslash may lead outside on Windows. It is left out and so gets the full check.
                    if entry.is_file(follow_symlinks=False) and "\\" not in (name := entry.name):
                        names.append(name)
                        if len(names) > self._room:
                            return []
        except OSError:
            return []
        return names


class ImageFolder:
    """The image folder of a source. A zip or tar archive is a folder too, as a root and below one.

    root: the folder, or None if the source has none. Images inside the records go to `store`.
    source: the name of the source, for error messages.
    modified: folder -> modification time (ns; None if it does not exist) of each folder that was searched, so that a
        later run can see whether an image was added, removed or renamed.

    A folder is listed when the first image in it is searched, so that each further image costs one set lookup. Symlinks
    and names that are not listed are looked up on disk. If all files of an archive are in one folder, as "train2017" in
    train2017.zip, paths may begin in that folder. Raises InputError if `root` is neither a folder nor an archive.
    """

    def __init__(self, root: str | os.PathLike | None, *, source: str, store: ImageStore, listings: Listings):
        if root is not None and not os.path.isdir(root):
            try:
                top_folder(os.path.realpath(root))
            except NotAnArchive:
                raise InputError(
                    f'source "{source}": images: {root} is neither a folder nor a zip or tar archive; give the one that '
                    "contains the images."
                ) from None
            except ArchiveError as error:
                raise InputError(f'source "{source}": images: {root}: {error.strerror}') from None
            except OSError:
                raise InputError(
                    f'source "{source}": images: {root} is not a folder; give the folder that contains the images.'
                ) from None
        self._root = "" if root is None else os.path.abspath(root)  # empty: the source has no image folder
        self._real_root = "" if root is None else os.path.realpath(root)
        self._folders: dict[str, _Folder] = {}  # key: the part of a path before the file name, with the final "/"
        self._store, self._listings = store, listings
        self._hints_left = MAX_HINTS
        self.modified: dict[str, int | None] = {}

    def find(self, path: object) -> Found:
        """Find the image at `path`, relative to the folder with POSIX separators. Bytes of an image get a file instead.

        Raises RecordError: wrong_type, path_outside_folder (absolute, `..`, or a symlink to a place outside),
        missing_image.
        """
        if type(path) is str:
            cut = path.rfind("/") + 1
            if (folder := self._folders.get(path[:cut])) is not None:
                parent, real_parent, files = folder
                if (name := path[cut:]) in files:
                    return _found((parent, real_parent, name, None, None, ""))
        return self._search(path)

    def _search(self, path: object) -> Found:
        if isinstance(path, bytes):
            return self._stored(path)
        if not isinstance(path, str) or not path:
            raise RecordError("wrong_type", f'"image" holds {shown(path)}; expected a path.')
        if (data := bytes_in(path)) is not None:
            return self._stored(data)
        path = path_in(path)
        if _is_address(path):
            raise RecordError(
                "missing_image",
                f"{path:.80}: an address, and nothing is downloaded here; download it and give its path.",
            )
        if not self._root:
            raise RecordError(
                "missing_image", f"{shown(path)}: the source has no images folder; give data.sources its images."
            )
        path = self._relative(path)
        if _leads_away(path):
            raise RecordError("path_outside_folder", f"{shortened(path, 300)}: expected a path inside {self._root}.")
        try:
            found = self._at(path) or self._nearly_at(path)
        except ValueError as error:  # characters that a path cannot contain
            raise RecordError("missing_image", f"{shown(path)}: {error}.") from None
        if found is None:
            folder = self._enter(path[: path.rfind("/") + 1])
            name = path.rpartition("/")[2]
            raise RecordError(
                "missing_image",
                f"{shortened(os.path.join(folder.path, name), 300)}: no such file{self._hint(folder, name)}",
            )
        return found

    def _stored(self, data: bytes) -> Found:
        name = self._store.place(data)
        return Found(self._store.folder, self._store.real_folder, name)

    def _at(self, path: str, repair: str | None = None) -> Found | None:
        """The image at a path, or at its COCO name of the other release."""
        cut = path.rfind("/") + 1
        folder, name = self._folders.get(path[:cut]) or self._enter(path[:cut]), path[cut:]
        found = self._look(folder, name, repair)
        if found is None and (bare := coco_name(name)):
            repair = "coco_2014_prefix_added" if name == bare else "coco_2014_prefix_removed"
            for other in [prefix + bare for prefix in COCO_2014] if name == bare else [bare]:
                found = found or self._look(folder, other, repair)
        return found

    def _relative(self, path: str) -> str:
        """A path relative to the root, if it is absolute and inside the root; another path unchanged."""
        if path.startswith("/") and ".." not in path.split("/"):
            for root in (self._root, self._real_root):
                if path.startswith(root.rstrip("/") + "/"):
                    return path[len(root.rstrip("/")) + 1 :].lstrip("/")
        return path

    def _nearly_at(self, path: str) -> Found | None:
        """The image that a path means by one of the rules that leave no doubt."""
        root = re.sub(r"\.(zip|tar)\Z", "", self._root, flags=re.IGNORECASE)  # of an archive: as it is when unpacked
        ends = ["/".join(root.split("/")[-count:]) + "/" for count in (1, 2, 3)]
        variants = [
            (path.replace("\\", "/"), "backslashes_in_path_replaced"),
            *((path.removeprefix(end), "image_folder_named_twice") for end in ends),
            (unicodedata.normalize("NFC", path), "unicode_form_of_path_changed"),
            (unicodedata.normalize("NFD", path), "unicode_form_of_path_changed"),
        ]
        stem, suffix = os.path.splitext(path)
        variants += [(stem + other, "case_of_suffix_changed") for other in (suffix.lower(), suffix.upper())]
        for variant, repair in variants:
            if variant != path and not _leads_away(variant) and (found := self._at(variant, repair)):
                return found
        return None

    def _hint(self, folder: _Folder, name: str) -> str:
        """The end of a message about a missing file: a file of nearly this name, for the first few of a source."""
        if self._hints_left <= 0:
            return "."
        self._hints_left -= 1
        if not folder.files and not os.path.isdir(folder.real):
            return "; its folder does not exist."
        loose = _loose(name)
        close = [one for one in folder.files if _loose(one) == loose] if len(folder.files) <= HINT_NAMES else []
        return f'; did you mean "{min(close)}"?' if close else "."

    def _look(self, folder: _Folder, name: str, repair: str | None) -> Found | None:
        real = f"{folder.real}/{name}"
        try:
            mode = os.lstat(real).st_mode
        except NotADirectoryError:
            return self._look_in_archive(folder, name, repair)
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(mode):
            real = os.path.realpath(real)
            if not stat.S_ISLNK(mode) or not os.path.isfile(real):
                return None
            self._refuse_escape(real, f"{folder.path}/{name}")
            self._note(os.path.dirname(real))
            return Found(folder=folder.path, real_folder=folder.real, name=name, target=real, repair=repair)
        return Found(folder=folder.path, real_folder=folder.real, name=name, repair=repair)

    def _look_in_archive(self, folder: _Folder, name: str, repair: str | None) -> Found | None:
        try:
            if find_member(f"{folder.real}/{name}") is None:
                return None
        except ArchiveError as error:
            raise RecordError("unreadable_image", f"{folder.path}/{name}: {error.strerror}") from None
        except OSError:
            return None
        return Found(folder=folder.path, real_folder=folder.real, name=name, repair=repair)

    def _enter(self, parent: str) -> _Folder:
        path = os.path.normpath(os.path.join(self._root, parent))
        real = os.path.realpath(path)
        self._refuse_escape(real, path)
        place = None if os.path.isdir(real) else split_path(real)
        if place is None:
            self._note(path)
            folder = _Folder(path, real, self._listings.files(real))
        else:
            folder = self._enter_archive(path, *place)
        self._folders[parent] = folder
        return folder

    def _enter_archive(self, path: str, archive: str, inside: str) -> _Folder:
        """A folder in an archive. inside: its path in the archive, "" for the root."""
        real = f"{archive}/{inside}".rstrip("/")
        try:
            top = top_folder(archive)
            if top and inside.split("/")[0] != top:  # nothing is outside of this folder
                path = f"{path.removesuffix(inside)}/{top}/{inside}".replace("//", "/").rstrip("/")
                real = f"{archive}/{top}/{inside}".rstrip("/")
            files = self._listings.files_in(archive, real[len(archive) + 1 :])
        except NotAnArchive:
            files = frozenset()
        except ArchiveError as error:
            raise RecordError("unreadable_image", f"{path}: {error.strerror}") from None
        except OSError:
            files = frozenset()
        self._note(archive)
        return _Folder(path, real, files)

    def _note(self, folder: str) -> None:
        if folder not in self.modified:
            self.modified[folder] = modified_ns(folder)

    def _refuse_escape(self, real: str, path: str) -> None:
        if real != self._real_root and not real.startswith(self._real_root.rstrip("/") + "/"):
            raise RecordError(
                "path_outside_folder",
                f"{path} is a link to {real}, outside {self._root}; set images of the source to the folder of that "
                "file, or replace the link by a copy.",
            )


def _loose(name: str) -> str:
    """A file name without what is often written differently: case, suffix, blanks, hyphens."""
    return re.sub(r"[\s_-]+", "", os.path.splitext(name)[0].casefold())


@lru_cache(maxsize=4096)
def folder_from(qa_folder: str, folder: str, real_folder: str) -> str:
    """The path of `folder` relative to `qa_folder`, with "/" at the end (empty for the same folder)."""
    relative = os.path.relpath(folder, qa_folder)
    if relative.split("/")[0] == "..":  # in a symlinked folder, ".." is the parent of the link's target
        relative = os.path.relpath(real_folder, os.path.realpath(qa_folder))
    return "" if relative == "." else relative + "/"


def modified_ns(path: str | Path) -> int | None:
    """The modification time in nanoseconds; None if the path does not exist."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None
