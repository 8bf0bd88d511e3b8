"""Find out which published benchmark a file or folder is, and make a QA file of its questions, for scoring alone."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson

from config import InputError, shortened
from config.files import open_regular
from dataprocess.benchmark_files import (
    BenchmarkQuestion,
    coco,
    gqa,
    load,
    mme,
    mme_tasks,
    pope,
    questions_beside,
    scienceqa,
    seed,
    table,
    table_rows,
    textvqa,
    vqa,
)
from dataprocess.image_paths import Found, ImageFolder, Listings
from dataprocess.image_store import ImageStore
from dataprocess.outputs import AsideFile
from dataprocess.rows import question_with_answer
from dataset.record import RecordError, check_record

UNKNOWN = "?"  # the answer of a record whose answer is not known
SHOWN = 3  # missing images that a message names


class Benchmark(NamedTuple):
    name: str  # vqav2, gqa, textvqa, coco, pope, mme, mmbench (also MMStar and other tables of its form), scienceqa or seed
    file: Path
    questions: list[BenchmarkQuestion]
    notes: list[str]


def find_benchmark(path: Path) -> Benchmark | None:
    """Read the benchmark in a file or folder; None if it is another kind of data. Raises InputError if it is damaged."""
    name, read = _reader_of(path)
    if read is None:
        return None
    notes: list[str] = []
    try:
        questions = list(read(notes))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: looks like a file of {name}, but cannot be read ({error!r}); download it again."
        ) from None
    if not questions:
        raise InputError(f"{path}: a file of {name} without questions.")
    return Benchmark(name, path, questions=questions, notes=notes)


_Read = Callable[[list[str]], Iterable[BenchmarkQuestion]]


def _reader_of(path: Path) -> tuple[str, _Read | None]:
    if path.is_dir():
        if (path / "problems.json").is_file():
            return "scienceqa", lambda notes: scienceqa(load(path / "problems.json"), notes)
        return "mme", (lambda _: mme(path)) if mme_tasks(path) else None
    if path.suffix.lower() in (".tsv", ".parquet"):
        rows = table_rows(path)
        first = next(rows, {})
        is_one = {"index", "question", "image"} <= first.keys() and not {"a", "l2_category", "l2-category"}.isdisjoint(
            first
        )
        return "mmbench", (lambda _: table(path, itertools.chain([first], rows))) if is_one else None
    if path.suffix.lower() not in (".json", ".jsonl") or not path.is_file():
        return "", None
    with open_regular(path) as file:
        head = file.readline(2**20)
        if not head.lstrip().startswith(b"{"):
            return "", None
        try:
            first = orjson.loads(head)
            is_lines = bool(file.readline(1))
        except orjson.JSONDecodeError:
            first, is_lines = {}, False
    if first.keys() >= {"question_id", "image", "text", "label"}:
        return "pope", lambda _: pope(path)
    return ("", None) if is_lines else _object_reader(path)


def _object_reader(path: Path) -> tuple[str, _Read | None]:
    """The reader of a file with one JSON object."""
    try:
        obj = load(path)
    except InputError:  # malformed, or no JSON object: another reader says so
        return "", None

    def first(key: str) -> dict:
        value = obj.get(key)
        return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}

    any_value = next(iter(obj.values()), None)
    if "choice_a" in first("questions"):
        return "seed", lambda notes: seed(obj, notes)
    if first("questions").keys() >= {"question_id", "image_id", "question"}:
        return "vqav2", lambda notes: vqa(path, obj, notes)
    if first("annotations").keys() >= {"question_id", "answers"}:
        return "vqav2", lambda notes: vqa(path, questions_beside(path) | {"annotations": obj["annotations"]}, notes)
    if first("data").keys() >= {"question_id", "image_id", "question"}:
        return "textvqa", lambda _: textvqa(obj)
    if "file_name" in first("images") and ("caption" in first("annotations") or "annotations" not in obj):
        return "coco", lambda _: coco(path, obj)
    if isinstance(any_value, dict) and any_value.keys() >= {"question", "imageId"}:
        return "gqa", lambda _: gqa(obj)
    if isinstance(any_value, dict) and any_value.keys() >= {"question", "choices", "split"}:
        return "scienceqa", lambda notes: scienceqa(obj, notes)
    return "", None


# ---------------------------------------------------------------------------------------------------------------------
# The QA file


def write_questions(
    benchmark: Benchmark, output: Path, *, images: Path | None = None, limit: int | None = None
) -> list[BenchmarkQuestion]:
    """Write the first `limit` questions as a QA file. Returns them, in the order of the records.

    images: the folder or archive with the images; by default that of the benchmark's own file. Images inside that file go
    into an archive beside `output`. Raises InputError if an image is missing, because a score on a part of a benchmark
    cannot be compared.
    """
    root = images or (benchmark.file if benchmark.file.is_dir() else benchmark.file.parent)
    questions = benchmark.questions[:limit]
    missing: list[str] = []
    with ImageStore(output.with_suffix(".images")) as store, AsideFile(output) as file:
        folder = ImageFolder(root, source=benchmark.name, store=store, listings=Listings())
        for question in questions:
            try:
                found = _find(folder, question.images) if question.images else None
                store.write_placed()
                obj = _record(benchmark.name, question, found)
                check_record(obj)
            except RecordError as error:
                missing.append(f"question {question.id}: {error.detail}")
                continue
            file.write([orjson.dumps(obj)])
        if missing:
            more = f"\n  and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
            raise InputError(
                f"{benchmark.file}: {len(missing):,} of {len(questions):,} questions cannot be asked. Give the folder of "
                "the images with --images DIR.\n  " + "\n  ".join(shortened(one, 300) for one in missing[:SHOWN]) + more
            )
        if store.is_used:
            store.publish()
        file.publish()
    return questions


def _find(folder: ImageFolder, places: Sequence[str | bytes]) -> Found:
    """Find the image at the first of several places that has one. Raises the RecordError of the first."""
    error: RecordError | None = None
    for place in places:
        try:
            return folder.find(place)
        except RecordError as caught:
            error = error or caught
    assert error is not None
    raise error


def _record(name: str, question: BenchmarkQuestion, found: Found | None) -> dict:
    answer = Counter(question.answers).most_common(1)[0][0] if question.answers else UNKNOWN
    obj = {
        "id": f"{name}:{question.id}",
        "image": found and os.path.join(found.folder, found.name),
        "conversations": question_with_answer(question.text, answer, 1 if found else 0),
        "source": name,
        "type": question.type,
        "answers": list(question.answers),
        "options": list(question.options),
        "group": question.group,
    }
    return {key: value for key, value in obj.items() if value or key == "answers"}
