"""Which files of a folder hold raw records: shards, tables, JSON files, or images with text files.

Every file is used, or is known to hold no records, or is named in a note: nothing is passed over without a word.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from config import InputError, shortened
from config.files import open_regular
from dataprocess.sniff import HEAD_BYTES, encoding_of
from dataprocess.tables import LONGEST_CELL, item_of
from dataset.json_stream import Item
from dataset.record import RecordError
from visual.archives import file_names, top_folder
from visual.images import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES

TABLES = (".csv", ".tsv")
_PACKED = (".gz", ".bz2", ".xz")
_KINDS = {".parquet": "Parquet shards", ".arrow": "Arrow shards", ".jsonl": "JSON files", ".json": "JSON files"}
_KINDS |= dict.fromkeys(TABLES, "tables")
# Files that a data set carries beside its records.
_NO_RECORDS = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json|cache-.*\.arrow|licen[sc]e.*|readme.*|.*\.(md|py|yaml|yml|"
    r"cff|log|sh|ini|lock|html|pdf|zip|tar|gz|sha256|md5|index\.json)|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
).fullmatch
_SHARD = re.compile(r"(.*?)-?(\d{3,6})-of-(\d{3,6})(?:-[0-9a-f]+)?(\.\w+)+").fullmatch
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test|testing)(?![a-z])", re.IGNORECASE).match
_SIDES = {"train": "train", "training": "train", "test": "test", "testing": "test"}


class Group(NamedTuple):
    """Files of a source that go to the same side: "train", "validation", or None if the source's `split` decides."""

    files: list[Path]
    split: Literal["train", "validation"] | None = None


def files_with_records(folder: Path) -> list[Path]:
    """The shards, tables or JSON files below a folder, sorted; empty for a folder of images.

    Raises InputError if there are files of several of these kinds, several tables, or a shard is missing.
    """
    try:
        os.listdir(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); make it readable.") from None
    found: dict[str, list[Path]] = defaultdict(list)
    for name in walk(folder):
        bare = name
        while bare.lower().endswith(_PACKED) and "." in bare.rpartition("/")[2][:-4]:
            bare = bare.rpartition(".")[0]
        kind = _KINDS.get(os.path.splitext(bare)[1].lower())
        if kind and (bare != name or not _NO_RECORDS(os.path.basename(name))):
            found[kind].append(folder / name)
    metadata = [file for files in found.values() for file in files if file.stem == "metadata"]
    if metadata and sum(map(len, found.values())) == len(metadata):
        return sorted(metadata)
    if len(found) > 1:
        names = "; ".join(f"{kind}: {', '.join(file.name for file in files[:3])}" for kind, files in found.items())
        raise InputError(
            f"{folder}: contains files of several kinds ({names}); set annotations to the file or folder of one."
        )
    files = sorted(next(iter(found.values()), []))
    if "tables" in found and len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"{folder}: contains {len(files)} tables ({names}); set annotations to one of them.")
    if "JSON files" in found and any(_is_sidecar(file) for file in files):
        return []
    _refuse_gaps(files)
    return files


def _is_sidecar(file: Path) -> bool:
    """True for a JSON file beside an image of the same name, as tools write it for each image."""
    return any(file.with_suffix(suffix).exists() for suffix in (".jpg", ".jpeg", ".png", ".webp"))


def _refuse_gaps(files: Sequence[Path]) -> None:
    """Raise InputError if a file "x-00001-of-00003" has no neighbour "x-00002-of-00003"."""
    shards: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := _SHARD(file.name):
            shards[file.parent, match[1], int(match[3])].add(int(match[2]))
    for (folder, name, count), numbers in shards.items():
        first = 1 if count in numbers else 0  # most number from 0
        wanted = range(first, first + count)
        if missing := [number for number in wanted if number not in numbers]:
            listed = ", ".join(f"{number:05d}" for number in missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise InputError(
                f"{folder}: of the {count} shards {name}-*-of-{count:05d}, {len(missing)} are missing ({listed}); download "
                "them, or give the shards that are meant one by one, each as a source."
            )


def split_groups(files: Sequence[Path], split: str, *, has_validation: bool) -> tuple[list[Group], list[str]]:
    """Divide shards by the split that their names say, and return notes about what that means.

    split: of the source. A source for one side uses the files of that side; "auto" puts train and validation files on their
    sides, and leaves test files out. If the names say only one split, or none, all files are used as the source says.
    """
    sides: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = _SPLIT(file.name) or _SPLIT(file.parent.name)
        sides[_SIDES.get(match[1].lower(), "validation") if match else "train"].append(file)
    if len(sides) < 2:
        return [Group(list(files))], []
    names = f"{files[0].parent.name}/: the names of the files say " + ", ".join(
        f"{side} ({len(some)} file{'s' if len(some) > 1 else ''})" for side, some in sorted(sides.items())
    )
    if split != "auto":
        used = sides.get(split) or (sides["test"] if split == "validation" else [])
        if not used:
            raise InputError(f"{names}; none is of split {split}. Give the files that are meant.")
        return [Group(used)], [f"{names}; of these, {', '.join(file.name for file in used[:3])} are used"]
    groups = [Group(sides["validation"], "validation")] if has_validation and "validation" in sides else []
    is_whole = "validation" not in sides
    if sides.get("train"):
        groups.append(Group(sides["train"], None if is_whole else "train"))
    left = [side for side in ("validation", "test") if side in sides and not (side == "validation" and has_validation)]
    left_out = f"; {' and '.join(left)} left out, to use one of them give its files" if left else ""
    if not groups:
        return [Group(list(files))], []
    return groups, [f"{names}; each is used as that{left_out}"]


def folder_items(folder: Path, images: Path) -> Iterator[Item]:
    """Yield images with the text files of the same name, sorted by name."""
    texts = {name[: -len(".txt")]: folder / name for name in text_names(folder)}
    names = image_names(images)
    if not texts and not names:
        raise InputError(
            f"{folder}: contains no image, .txt, .parquet, .arrow, .json, .jsonl or .csv file; expected one of these."
        )
    roots = [os.path.join(os.path.realpath(one), "") for one in (folder, images)]
    stems = {os.path.splitext(name)[0] for name in names}
    entries = [(os.path.splitext(name)[0], name) for name in names] + [(stem, "") for stem in texts.keys() - stems]
    for index, (stem, image) in enumerate(sorted(entries)):
        text = texts.get(stem)
        value: dict[str, object] = {"picture": image} if image else {"text_file": str(text)}
        if image and text:
            value["text"] = _text_of(text, roots)
        yield item_of(index, value)


def unused_files(folder: Path) -> list[str]:
    """A note about the files of a folder of images that are neither images nor texts, if there are any."""
    used = {".txt", *IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES}
    unused = [name for name in walk(folder) if os.path.splitext(name)[1].lower() not in used]
    unused = [name for name in unused if not _NO_RECORDS(os.path.basename(name))]
    if not unused:
        return []
    counts = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in unused)
    kinds = ", ".join(f"{suffix} ({count:,})" for suffix, count in counts.most_common(8))
    return [
        f"{folder.name}/: {len(unused):,} files are not read, by suffix: {kinds}, for example {shortened(unused[0], 80)}"
    ]


def _text_of(file: Path, roots: list[str]) -> str | RecordError:
    """Return the content of a .txt file, or why it is not read. roots: the folders that a link may lead to."""
    try:
        if file.is_symlink() and not os.path.realpath(file).startswith(tuple(roots)):
            detail = f"{file} is a link to {os.path.realpath(file)}, outside its folder; replace the link by a copy."
            return RecordError("path_outside_folder", detail)
        with open_regular(file) as opened:
            data = opened.read(4 * LONGEST_CELL + 1)
        encoding = encoding_of(data[:HEAD_BYTES])
        text = data.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return RecordError("bad_unicode", f"{file}: not {error.encoding} ({error.reason}); save it as UTF-8.")
    except InputError as error:
        return RecordError("unreadable_text", str(error))
    except OSError as error:
        detail = f"{file}: cannot be read ({error.strerror}); make it readable or remove it."
        return RecordError("unreadable_text", detail)
    if len(text) > LONGEST_CELL:
        return RecordError("unreadable_text", f"{file}: more than {LONGEST_CELL:,} characters; shorten it.")
    return text


def text_names(folder: Path) -> list[str]:
    return sorted(name for name in walk(folder) if name.lower().endswith(".txt"))


def image_names(folder: Path) -> list[str]:
    """Paths of the images below a folder or in an archive, also of those in formats that may not be readable here."""
    suffixes = IMAGE_SUFFIXES | OTHER_IMAGE_SUFFIXES
    names = _walk_archive(folder) if folder.is_file() else walk(folder)
    return [name for name in names if os.path.splitext(name)[1].lower() in suffixes]


def _walk_archive(archive: Path) -> Iterator[str]:
    """Yield the paths of all files in an archive without hidden ones, as if it were unpacked."""
    try:
        top = top_folder(str(archive))
        for name in file_names(str(archive)):
            if name[0] != "." and "/." not in name and not name.startswith("__MACOSX/"):
                yield name.removeprefix(f"{top}/") if top else name
    except OSError as error:
        raise InputError(f"{archive}: {error.strerror}") from None


def walk(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it, without hidden files and folders.

    Links to folders are followed; a folder that was seen before is not entered again.
    """
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = os.path.relpath(root, folder)
        yield from (name if here == "." else f"{here}/{name}" for name in files if not name.startswith("."))
