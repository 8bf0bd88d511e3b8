"""Read the questions of published benchmarks, each in the layout of its own download: VQAv2, GQA, TextVQA, POPE, MME,
MMBench, MMStar, ScienceQA, SEED-Bench and COCO captions. Finds no image."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from config import InputError
from config.files import open_regular
from dataprocess.keys import is_empty
from dataprocess.media import images_in
from dataprocess.rows import ENGLISH_CAPTION_PROMPTS, LETTERS, as_text
from dataprocess.sniff import kind_of
from dataprocess.tables import csv_items, parquet_items
from visual.images import IMAGE_SUFFIXES

CIRCLE = 1_000_000  # MMBench: the index of a rotated question is that of the question plus a multiple of this
MME_TASKS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}
_release = re.compile(r"(?:train|val|test)20\d\d").search


class BenchmarkQuestion(NamedTuple):
    id: str  # within the benchmark
    images: Sequence[str | bytes]  # the places where its image may be, or its bytes; empty for a question without one
    text: str
    answers: Sequence[str]  # empty if they are not published
    type: str  # its first word is the metric
    native: dict  # what the file of results repeats
    options: Sequence[str] = ()
    group: str = ""


def load(path: Path) -> dict:
    try:
        with open_regular(path) as file:
            obj = orjson.loads(file.read())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a file of a benchmark.") from None
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON ({error}); download it again.") from None
    if not isinstance(obj, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return obj


# ---------------------------------------------------------------------------------------------------------------------
# Open answers: VQAv2 and others of its form, GQA, TextVQA, COCO captions


def vqa(path: Path, obj: dict, notes: list[str]) -> Iterator[BenchmarkQuestion]:
    annotations = obj.get("annotations")
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if annotations is None and beside != path and beside.is_file():
        annotations = load(beside)["annotations"]
    if annotations is None:
        notes.append(f"no {beside.name} beside it, so nothing is scored; the answers are written for the leaderboard")
    known = {one["question_id"]: one for one in annotations or ()}
    found = _release(str(obj.get("data_subtype") or path.name))
    release = found[0] if found else "val2014"
    for question in obj["questions"]:
        annotation = known.get(question["question_id"], {})
        name = f"COCO_{release}_{question['image_id']:012d}.jpg"
        kind = annotation.get("answer_type")
        yield BenchmarkQuestion(
            id=str(question["question_id"]),
            images=(name, f"{release}/{name}"),
            text=question["question"],
            answers=[one["answer"] for one in annotation.get("answers", ())],
            type=f"vqa/{kind}" if kind else "vqa",
            native={"question_id": question["question_id"]},
        )


def questions_beside(path: Path) -> dict:
    """The questions of a VQAv2 file of annotations, which are in a file beside it."""
    name = path.name.replace("annotations", "questions")
    for wanted in (name.replace("v2_", "v2_OpenEnded_"), f"OpenEnded_{name}"):
        if (other := path.with_name(wanted)) != path and other.is_file():
            return load(other)
    raise InputError(
        f"{path}: answers to questions of another file; put {name.replace('v2_', 'v2_OpenEnded_')} beside it."
    )


def gqa(obj: dict) -> Iterator[BenchmarkQuestion]:
    for name, question in obj.items():
        kind = (question.get("types") or {}).get("structural")
        file = f"{question['imageId']}.jpg"
        yield BenchmarkQuestion(
            id=str(name),
            images=(file, f"images/{file}"),
            text=question["question"],
            answers=[question["answer"]] if question.get("answer") else [],
            type=f"vqa/{kind}" if kind else "vqa",
            native={"questionId": str(name)},
        )


def textvqa(obj: dict) -> Iterator[BenchmarkQuestion]:
    for question in obj["data"]:
        file = f"{question['image_id']}.jpg"
        yield BenchmarkQuestion(
            id=str(question["question_id"]),
            images=(file, f"train_images/{file}", f"test_images/{file}", f"train_val_images/train_images/{file}"),
            text=question["question"],
            answers=question.get("answers") or [],
            type="vqa",
            native={"question_id": question["question_id"]},
        )


def coco(path: Path, obj: dict) -> Iterator[BenchmarkQuestion]:
    captions: dict[Any, list[str]] = {}
    for annotation in obj.get("annotations", ()):
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    found = _release(path.name)
    for image in obj["images"]:
        file = image["file_name"]
        yield BenchmarkQuestion(
            id=str(image["id"]),
            images=(file, *([f"{found[0]}/{file}"] if found else [])),
            text=ENGLISH_CAPTION_PROMPTS[0],
            answers=captions.get(image["id"], []),
            type="caption",
            native={"image_id": image["id"]},
        )


# ---------------------------------------------------------------------------------------------------------------------
# Yes or no: POPE, MME


def pope(path: Path) -> Iterator[BenchmarkQuestion]:
    kind = next((one for one in ("adversarial", "popular", "random") if one in path.stem), "")
    with open_regular(path) as file:
        for line in file:
            if line.strip():
                obj = orjson.loads(line)
                found = _release(obj["image"])
                yield BenchmarkQuestion(
                    id=str(obj["question_id"]),
                    images=(obj["image"], *([f"{found[0]}/{obj['image']}"] if found else [])),
                    text=obj["text"],
                    answers=[obj["label"]],
                    type=f"yes_no/{kind}" if kind else "yes_no",
                    native={"question": obj["text"]},
                )


def mme_tasks(path: Path) -> list[str]:
    return [task for tasks in MME_TASKS.values() for task in tasks if (path / task).is_dir()]


def mme(path: Path) -> Iterator[BenchmarkQuestion]:
    """Each task is a folder: images with a text file of the same name beside them, or both in folders of their own. A line
    is a question, a tab, and Yes or No."""
    for task in mme_tasks(path):
        texts, images = path / task, task
        if (path / task / "questions_answers_YN").is_dir():
            texts, images = path / task / "questions_answers_YN", f"{task}/images"
        names = {os.path.splitext(name)[0]: name for name in sorted(os.listdir(path / images)) if _is_image(name)}
        for file in sorted(texts.glob("*.txt")):
            name = names.get(file.stem, f"{file.stem}.jpg")
            for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines()):
                if not line.strip():
                    continue
                text, answer = line.rstrip().rsplit("\t", 1)
                yield BenchmarkQuestion(
                    id=f"{task}/{file.stem}/{number}",
                    images=(f"{images}/{name}",),
                    text=text.strip(),
                    answers=[answer.strip()],
                    type=f"yes_no/{task}",
                    native={"task": task, "image": name, "question": text.strip(), "answer": answer.strip()},
                )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMBench and other tables of VLMEvalKit, MMStar, ScienceQA, SEED-Bench


def table_rows(path: Path) -> Iterator[dict]:
    items = csv_items(path, kind_of(path)) if path.suffix.lower() == ".tsv" else parquet_items(path)
    for item in items:
        if not isinstance(item.value, dict):
            raise InputError(f"{path} row {item.index}: {item.value}")
        yield {key.lower(): value for key, value in item.value.items()}


def table(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[BenchmarkQuestion]:
    """Rows with "index", "question", "image" (base64, bytes, or the index of the row that has it), "answer" (a letter), and
    options in "a", "b" ... For a table of MMBench without rotated questions they are made here."""
    given: list[dict[str, Any]] = [
        {key: None if _is_missing(value) else value for key, value in row.items()} for row in rows
    ]
    images = {str(row["index"]): row["image"] for row in given}
    is_circular = any(int(row["index"]) >= CIRCLE for row in given)
    makes_circles = not is_circular and path.stem.lower().startswith(("mmbench", "ccbench"))
    for row in given:
        image = images.get(str(row["image"]), row["image"]) if isinstance(row["image"], (str, int)) else row["image"]
        letters = [letter for letter in LETTERS if row.get(letter.lower()) is not None]
        options = [str(as_text(row[letter.lower()])[0]) for letter in letters]
        answer = str(row.get("answer") or "").strip().upper()
        category = row.get("category") or row.get("l2_category") or row.get("l2-category")
        number, asked = int(row["index"]), str(row["question"])
        for turn in range(len(options) if makes_circles else 1):
            rotated = options[turn:] + options[:turn]
            index = number + turn * CIRCLE
            letter = answer
            if turn and answer in letters:
                letter = letters[(letters.index(answer) - turn) % len(letters)]
            yield BenchmarkQuestion(
                id=str(index),
                images=images_in(image, "image")[:1],
                text=_with_options(row.get("hint"), asked, rotated),
                answers=[letter] if letter else [],
                type=f"choice/{category}" if category else "choice",
                native={
                    "index": index,
                    "question": asked,
                    **dict(zip(letters, rotated, strict=True)),
                    **{
                        key: row[key]
                        for key in ("hint", "category", "l2-category", "l2_category", "split")
                        if row.get(key)
                    },
                    **({"answer": letter} if letter else {}),
                },
                options=rotated,
                group=str(number % CIRCLE) if is_circular or makes_circles else "",
            )


def _is_missing(value: object) -> bool:
    return is_empty(value) or isinstance(value, str) and value.strip().lower() == "nan"


def _with_options(hint: object, question: str, options: Sequence[str]) -> str:
    lines = [str(hint).strip()] if hint else []
    return "\n".join([*lines, question, *(f"{a}. {text}" for a, text in zip(LETTERS, options, strict=False))])


def scienceqa(obj: dict, notes: list[str]) -> Iterator[BenchmarkQuestion]:
    splits = Counter(problem["split"] for problem in obj.values())
    split = "test" if splits["test"] else splits.most_common(1)[0][0]
    notes.append(f"the {split} split: {splits[split]:,} of {len(obj):,} questions")
    for name, problem in obj.items():
        if problem["split"] == split:
            image, choices = problem.get("image"), problem["choices"]
            inside = f"{split}/{name}/{image}"
            number = problem.get("answer")
            yield BenchmarkQuestion(
                id=str(name),
                images=(f"images/{inside}", inside, f"{name}/{image}") if image else (),
                text=_with_options(problem.get("hint"), problem["question"], choices),
                answers=[LETTERS[number]] if number is not None else [],
                type=f"choice/{problem.get('subject') or 'other'}",
                native={"id": str(name)},
                options=choices,
            )


def seed(obj: dict, notes: list[str]) -> Iterator[BenchmarkQuestion]:
    kinds = {number: name for name, number in (obj.get("question_type") or {}).items()}
    videos = sum(question.get("data_type", "image") != "image" for question in obj["questions"])
    if videos:
        notes.append(f"left out: {videos:,} questions about videos")
    for question in obj["questions"]:
        if question.get("data_type", "image") == "image":
            choices = [question[f"choice_{letter}"] for letter in "abcd" if f"choice_{letter}" in question]
            options = [str(as_text(choice)[0]) for choice in choices]
            kind = kinds.get(question.get("question_type_id"))
            yield BenchmarkQuestion(
                id=str(question["question_id"]),
                images=(question["data_id"], f"SEED-Bench-image/{question['data_id']}"),
                text=_with_options(None, question["question"], options),
                answers=[question["answer"]] if question.get("answer") else [],
                type=f"choice/{kind}" if kind else "choice",
                native={"question_id": str(question["question_id"])},
                options=options,
            )
