"""Open what `test.py --qa` names: a QA file as it is, or a raw source or the file of a benchmark, of which a QA file is
made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from config import InputError, printable
from config.files import make_folder, open_regular
from dataprocess.benchmark_files import BenchmarkQuestion
from dataprocess.benchmarks import find_benchmark, write_questions
from dataprocess.process_image import convert_source
from dataprocess.report import summary
from dataset.json_stream import NotJson, stream_json

QUESTIONS = "questions"  # the folder below --output for what is made


class Questions(NamedTuple):
    """qa_file: the questions. benchmark: its name, "" for none. asked: of a benchmark, one for each record, in order."""

    qa_file: Path
    benchmark: str = ""
    asked: Sequence[BenchmarkQuestion] = ()


def open_questions(path: Path, output: Path, *, images: Path | None = None, settings: Sequence[str] = ()) -> Questions:
    """Find the QA file of `path`, or make one of a raw source or a benchmark in output/questions, and print what was made.

    images: the folder of a source's images; by default that of `path`. settings: `key=value` with keys of a source, as in
    data.sources, or data.max_refused. With a folder or a key of a source, a QA file is a raw source too. Raises InputError.
    """
    is_raw = images is not None or any(not setting.startswith("data.") for setting in settings)
    is_qa = False if is_raw else is_qa_file(path)
    benchmark = None if is_qa else find_benchmark(path)
    if is_qa or is_qa is None and benchmark is None:
        return Questions(path)
    made = output / QUESTIONS / f"{path.resolve().stem}.jsonl"
    if benchmark is None:
        make_folder(output / QUESTIONS)
        _, report = convert_source(
            str(path), str(made), images=None if images is None else str(images), settings=settings, option="--qa"
        )
        print(printable(summary(report), lines=True))
        return Questions(made)
    limit = _limit(benchmark.name, settings)
    make_folder(output / QUESTIONS)
    asked = write_questions(benchmark, made, images=images, limit=limit)
    part = "" if limit is None else f", the first {len(asked):,} of {len(benchmark.questions):,}"
    print(printable(f"{path}: {len(asked):,} questions in the form of {benchmark.name}{part}"))
    for note in benchmark.notes:
        print(printable(f"note: {note}"))
    return Questions(made, benchmark.name, asked)


def is_qa_file(path: Path) -> bool | None:
    """Return whether the first record of a file is one of the QA format; None if the first line is not JSON. True for a
    file that cannot be read, which opening it as a QA file explains."""
    if path.is_dir():
        return False
    try:
        with open_regular(path) as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head[:1] not in (b"{", b"["):
            return not head
        first = next(iter(stream_json(path)), None)
    except (OSError, InputError):
        return True
    if first is None or isinstance(first.value, NotJson):
        return None
    turns = first.value.get("conversations") if isinstance(first.value, dict) and first.value.get("id") else None
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


def _limit(benchmark: str, settings: Sequence[str]) -> int | None:
    """The `limit` among settings; no other means anything for a benchmark."""
    limit = None
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.strip() != "limit" or not value.strip().isdecimal() or int(value) < 1:
            raise InputError(
                f"{setting}: a file of {benchmark} takes limit=N, the number of its first questions, alone."
            )
        limit = int(value)
    return limit
