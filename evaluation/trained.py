"""Find questions about images that a model was trained on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from config import InputError, printable
from dataset.json_stream import stream_json
from dataset.record import RecordError, parse_record
from evaluation.score import Question
from visual.images import ImageError, image_bytes, image_state


def trained_questions(questions: Sequence[Question], qa_files: Iterable[Path]) -> dict[int, Path]:
    """Return {number of a question: the training image that is one of its own}, compared by content, not by name.

    qa_files: what the model was trained on. One that does not exist, or a record in it that cannot be read, is passed over.
    Only images of the size of a question's image are read.
    """
    wanted: dict[int, list[int]] = {}  # bytes -> questions
    for i, question in enumerate(questions):
        for path in question.images:
            if (size := _size(path)) is not None:
                wanted.setdefault(size, []).append(i)
    found: dict[int, Path] = {}
    digest = functools.cache(_digest)
    for file in dict.fromkeys(Path(file).resolve() for file in qa_files):
        if wanted and file.is_file():
            for path in _images(file):
                for i in wanted.get(_size(path) or -1, ()):
                    mine = digest(path)
                    if i not in found and mine is not None and mine in map(digest, questions[i].images):
                        found[i] = path
    return found


def _images(file: Path) -> Iterator[Path]:
    """Yield each image of a QA file once, up to the place where the file cannot be read any more."""
    seen: set[str] = set()
    with contextlib.suppress(InputError):
        for item in tqdm(stream_json(file), desc=f"comparing with {printable(file.name)}", delay=2, leave=False):
            with contextlib.suppress(RecordError):
                for name in parse_record(item.value, "").images:
                    if name not in seen:
                        seen.add(name)
                        yield file.parent / name


def _size(path: Path) -> int | None:
    try:
        return image_state(path).size
    except (OSError, ValueError):
        return None


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.blake2b(image_bytes(path)).digest()
    except ImageError:
        return None
