"""Write the answers to a benchmark as the file that its leaderboard or its own evaluation script takes."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from config.files import make_folder, write_whole
from evaluation.answers import LETTERS, read_choice


class Result(NamedTuple):
    """The answer to one question of a benchmark."""

    answer: str
    native: dict  # what the file repeats of the question
    options: Sequence[str] = ()


def _objects(answer: str) -> Callable[[Sequence[Result]], dict[str, str]]:
    """A JSON list of the native keys with the answer under the key `answer`."""

    def write(results: Sequence[Result]) -> dict[str, str]:
        rows = [{**result.native, answer: result.answer} for result in results]
        return {"results.json": json.dumps(rows, ensure_ascii=False)}

    return write


def _lines(results: Sequence[Result], answer: str) -> dict[str, str]:
    rows = ({**result.native, answer: result.answer} for result in results)
    return {"results.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def _mme(results: Sequence[Result]) -> dict[str, str]:
    """A text file for each task: image, question, expected and given answer, separated by tabs."""
    lines: dict[str, list[str]] = defaultdict(list)
    for result in results:
        of = result.native
        cells = (of["image"], of["question"], of["answer"], " ".join(result.answer.split()))
        lines[of["task"]].append("\t".join(cells) + "\n")
    return {f"results/{task}.txt": "".join(some) for task, some in lines.items()}


def _table(results: Sequence[Result]) -> dict[str, str]:
    """A table with the columns of the benchmark's own, without images, and "prediction"."""
    columns = dict.fromkeys(key for result in results for key in result.native)
    ordered = [key for key in columns if key not in LETTERS] + [letter for letter in LETTERS if letter in columns]
    written = io.StringIO()
    rows = csv.DictWriter(written, [*ordered, "prediction"], delimiter="\t", lineterminator="\n", restval="")
    rows.writeheader()
    rows.writerows({**result.native, "prediction": result.answer} for result in results)
    return {"results.tsv": written.getvalue()}


def _scienceqa(results: Sequence[Result]) -> dict[str, str]:
    """The number of the chosen option of each question, -1 for none, and the texts of the answers."""
    letters = {result.native["id"]: read_choice(result.answer, result.options) for result in results}
    written = {
        "results": {name: LETTERS.index(letter) if letter else -1 for name, letter in letters.items()},
        "outputs": {result.native["id"]: result.answer for result in results},
    }
    return {"results.json": json.dumps(written, ensure_ascii=False)}


def _seed(results: Sequence[Result]) -> dict[str, str]:
    chosen = [result._replace(answer=read_choice(result.answer, result.options)) for result in results]
    return _lines(chosen, "prediction")


RESULTS: dict[str, Callable[[Sequence[Result]], dict[str, str]]] = {
    "vqav2": _objects("answer"),
    "textvqa": _objects("answer"),
    "gqa": _objects("prediction"),
    "coco": _objects("caption"),
    "pope": lambda results: _lines(results, "answer"),
    "mme": _mme,
    "mmbench": _table,
    "scienceqa": _scienceqa,
    "seed": _seed,
}


def write_results(benchmark: str, results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the file, or for MME the files, and return their paths. Raises OSError."""
    paths = []
    for name, text in RESULTS[benchmark](results).items():
        path = folder / name
        make_folder(path.parent)
        write_whole(path, text)
        paths.append(path)
    return paths


def mme_scores(metrics: dict, tasks: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the score of each part of MME: the sum over its tasks of 100 x (accuracy + accuracy of images both of whose
    questions are right).

    metrics: of `evaluation.score.score`. tasks: part -> its tasks.
    """
    by_type = metrics.get("yes_no", {}).get("by_type", {})
    found = {}
    for part, names in tasks.items():
        entries = [by_type[f"yes_no/{name}"] for name in names if f"yes_no/{name}" in by_type]
        if entries:
            found[part] = sum(100 * (one["accuracy"]["value"] + one["accuracy_plus"]["value"]) for one in entries)
    return found
