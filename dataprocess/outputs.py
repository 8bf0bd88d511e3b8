"""Output files that are written completely or not at all and replace only files of data preparation, and the ids in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from config import InputError, shortened
from config.files import create_partial, naming, open_regular


class AsideFile:
    """A file of lines, written under a temporary name in the same folder and renamed by `publish`.

    A context manager: a file that was not published is removed at the end.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = os.path.abspath(path.parent)
        self.lines = 0
        self.bytes = 0
        self._digest = hashlib.sha256()
        os.makedirs(self.folder, exist_ok=True)
        self._file = create_partial(path)

    def write(self, lines: list[bytes]) -> None:
        self.write_terminated(b"".join(line + b"\n" for line in lines))

    def write_terminated(self, lines: bytes | bytearray) -> None:
        """Write lines that already end in newlines."""
        self.lines += lines.count(b"\n")
        with naming(self.path):
            self.bytes += self._file.write(lines)
        self._digest.update(lines)

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything written so far, in hexadecimal."""
        return self._digest.hexdigest()

    def publish(self) -> None:
        """Write everything to disk and give the file its name."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        os.replace(self._file.name, self.path)
        self._file.close()

    def __enter__(self) -> AsideFile:
        return self

    def __exit__(self, *_: object) -> None:
        Path(self._file.name).unlink(missing_ok=True)
        with naming(self.path):
            self._file.close()  # fails if the disk is full


def read_report(report_file: Path) -> dict | None:
    """Return the report that an earlier preparation wrote; None if there is none, or another kind of file has its name."""
    try:
        with open_regular(report_file) as file:
            report = json.loads(file.read().decode())
    except (InputError, OSError, ValueError, RecursionError):
        return None
    is_ours = (
        isinstance(report, dict)
        and {"fingerprint", "read", "kept", "refused"} <= report.keys()
        and isinstance(report.get("train"), dict)
    )
    return report if is_ours else None


def write_report(report_file: Path, report: dict) -> None:
    """Write the report, which replaces an earlier one atomically."""
    with AsideFile(report_file) as file:
        file.write([json.dumps(report, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")])
        file.publish()


def outputs_of(report: dict, report_file: Path) -> dict[str, dict]:
    """Return the files that preparation wrote, as its report says: absolute path -> its entry in the report ("bytes" and
    "sha256"), empty if preparation was interrupted. Reports of earlier versions have no "sha256".

    The folder may have been moved: paths are also taken relative to the training file, which is beside the report.
    """
    sides = [one for side in ("train", "validation") if isinstance(one := report.get(side), dict)]
    named = {one["file"]: one for one in sides if isinstance(one.get("file"), str)}
    replaced = report.get("outputs", list(named))  # a refused preparation wrote none, but keeps older ones
    if not named or not isinstance(replaced, list):
        return {}
    base, is_whole = os.path.dirname(next(iter(named))), report["fingerprint"] is not None
    return {
        os.path.abspath(place): entry if is_whole else {}
        for path, entry in named.items()
        if path in replaced
        for place in (path, os.path.join(report_file.parent, os.path.relpath(path, base)))
    }


def refuse_foreign(
    report_file: Path, qa_files: Sequence[tuple[str, Path]], refused_file: Path, *, annotations: Mapping[str, str]
) -> None:
    """Raise InputError if preparation would replace a file that it did not write, that was changed since, or that it made of
    another data set: of sources whose annotations are none of these.

    qa_files: (key of the config, its file), the training file first. Empty files may be replaced. Reads every file whose
    size is that in the report. annotations: source -> absolute path of its annotations.
    """
    report = read_report(report_file)
    for path in (report_file, refused_file):
        if report is None and _holds_something(path):
            raise InputError(
                f"{path}: exists, and was not written by data preparation, which would replace it; move it elsewhere, or "
                'give another "data.qa_file".'
            )
    written = outputs_of(report, report_file) if report else {}
    if report and _holds_something(qa_files[0][1]) and qa_files[0][1].is_file():
        _refuse_other_data(report, report_file, qa_files[0][1], annotations=annotations)
    for key, path in qa_files:
        if not _holds_something(path):
            continue
        if path.is_dir():
            raise InputError(f'{path}: is a folder; set "{key}" to a file.')
        if os.path.abspath(path) not in written:
            raise InputError(
                f'{path}: exists, and was not made from "data.sources", so it is not replaced. To use it as it is, remove '
                f'"data.sources". To make a file from them, move this one elsewhere, or give another "{key}".'
            )
        change = _change(path, written[os.path.abspath(path)])
        if change:
            raise InputError(
                f"{path}: was changed after it had been made: {change} in {report_file}. To keep the changes, remove "
                '"data.sources". To make it again, remove the file.'
            )


def _refuse_other_data(report: dict, report_file: Path, qa_file: Path, *, annotations: Mapping[str, str]) -> None:
    """Raise InputError if none of the annotations that the QA file was made of is used now.

    The folder may have been moved, as in `outputs_of`. Reports of earlier versions do not name the annotations.
    """
    made_of, file = report.get("annotations"), report["train"].get("file")
    if not isinstance(made_of, dict) or not made_of or not isinstance(file, str):
        return
    known: set[str] = set()
    for path in map(str, made_of.values()):
        moved = os.path.join(report_file.parent, os.path.relpath(path, os.path.dirname(file)))
        known |= {path, os.path.abspath(moved)}
    if not known & set(annotations.values()):
        listed = shortened(", ".join(f"{name}: {path}" for name, path in made_of.items()), 300)
        raise InputError(
            f'{qa_file}: was made from another data set ({listed}), of which "data.sources" now uses nothing, so it is not '
            'replaced. Give this data set another "data.qa_file" (and "data.validation_file"), or delete the file, to make '
            "it of the new sources."
        )


def _change(path: Path, entry: dict) -> str:
    """Return how a file differs from its entry in the report; "" for no difference that the entry can show."""
    size, digest = entry.get("bytes"), entry.get("sha256")
    found = os.path.getsize(path) if path.exists() else 0
    if isinstance(size, int) and size != found:
        return f"it has {found:,} bytes, but {size:,}"
    if isinstance(digest, str) and path.exists():
        with open_regular(path) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return "its SHA-256 is not that"
    return ""


def _holds_something(path: Path) -> bool:
    """Return whether there is anything at `path` but an empty file."""
    return os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.stat().st_size > 0)


class UniqueNames:
    """Makes the ids of one source unique: the second "a" that is kept becomes "a#2".

    Stores a hash of each name instead of the name. Two names with the same hash only cause an unnecessary "#2".
    """

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}

    def take(self, name: str) -> str:
        """Return `name`, or `name#2` and so on if it was taken before."""
        uses, key = self._uses, hash(name)
        if key not in uses:
            uses[key] = 1
            return name
        number = uses[key] + 1
        while (other := hash(f"{name}#{number}")) in uses:
            number += 1
        uses[key], uses[other] = uses[key] + 1, 1
        return f"{name}#{number}"
