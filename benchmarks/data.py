"""The cost of the data, beside the plain way of doing the same: `python -m benchmarks.data`.

Three tasks, each in processes of its own, ours and the plain way by turns: make a QA file of raw annotations (the mix that
LLaVA-like training starts from); open a QA file; read it at random from forked workers. The plain way is what one writes
first: json.load, lists of dicts. It does the same work and keeps the same records, or this stops.

With --images N two other tasks, on N small images that are in files, in one zip and in one tar: prepare records about them,
with every image decoded, and read them at random from forked workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.annotations import (
    ALL_RECORDS,
    IMAGE_PLACES,
    SEED,
    SOURCES,
    small_image_paths,
    write_annotations,
    write_small_images,
)
from benchmarks.measuring import Clock, machine, make_parser, measure_by_turns, median_of, memory, open_workdir, table

VALIDATION_FRACTION = 0.01
WORKERS = (1, 2, 4)
MAX_READS = 400_000  # random reads, shared among the workers


def prepare_ours(folder: Path, again: bool = False) -> dict:
    """Prepare the QA file. again: beside what the last run wrote; if nothing changed, nothing is done."""
    from config import DataConfig, SourceConfig
    from dataprocess.process_image import prepare

    llava: dict = {"format": "llava"}
    options: dict = {"captions": {"format": "ai_challenger", "captions": "one_per_epoch"}}
    sources = tuple(
        SourceConfig(one.name, one.annotations(folder), images=one.images(folder), **options.get(one.name, llava))
        for one in SOURCES
    )
    data = DataConfig(
        qa_file=folder / "ours" / "qa.jsonl", validation_file=folder / "ours" / "validation.jsonl", sources=sources,
        validation_fraction=VALIDATION_FRACTION, max_refused=0.01, verify_images=False,
    )  # fmt: skip
    if not again:
        shutil.rmtree(folder / "ours", ignore_errors=True)
    clock = Clock()
    report = prepare(data, seed=SEED)
    return clock.read() | {"kept": report["kept"]}


def prepare_plain(folder: Path) -> dict:
    """Read whole files into lists of dicts; a dict by file name keeps an image on one side of the split. Writes lines with
    json.dumps, because json.dump of the list takes five times as long."""
    output = folder / "plain"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    clock = Clock()
    by_image = defaultdict(list)
    for source in SOURCES:
        images = source.images(folder)
        with open(source.annotations(folder), encoding="utf-8") as file:
            rows = json.load(file)
        for number, row in enumerate(rows):
            name = row.get("image") or row.get("image_id")
            path = os.path.join(images, name) if name else None
            if path and not os.path.exists(path):
                continue
            conversations, key = _plain_conversations(row, number), f"{source.name}:{number}"
            record = {"id": key, "conversations": conversations[0], "source": source.name}
            if path:
                record["image"] = path
            if len(conversations) > 1:
                record["alternatives"] = conversations[1:]
            by_image[path or key].append(record)
    names = sorted(by_image)
    random.Random(SEED).shuffle(names)
    held = int(len(names) * VALIDATION_FRACTION)
    kept = 0
    for file_name, side in (("validation.jsonl", names[:held]), ("qa.jsonl", names[held:])):
        with open(output / file_name, "w", encoding="utf-8") as file:
            for name in side:
                for record in by_image[name]:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    kept += 1
    return clock.read() | {"kept": kept}


def _plain_conversations(row: dict, number: int) -> list[list[dict]]:
    if "caption" in row:
        prompt = ("描述一下这张图片。", "图片里有什么？")[number % 2]
        return [
            [{"role": "user", "content": "<image>\n" + prompt}, {"role": "assistant", "content": caption}]
            for caption in row["caption"]
        ]
    roles = {"human": "user", "gpt": "assistant"}
    return [[{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]]


def open_indexed(folder: Path, first: bool = False) -> dict:
    from dataset.qa_file import QAFile

    if first:
        (folder / "qa.jsonl.index.safetensors").unlink(missing_ok=True)
    clock = Clock()
    return {"kept": len(QAFile(folder / "qa.jsonl")), **clock.read()}


def open_plain(folder: Path) -> dict:
    clock = Clock()
    records = _plain_open(folder)
    return clock.read() | {"kept": len(records)}


def _plain_open(folder: Path) -> list[dict]:
    with open(folder / "qa.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_ours(folder: Path) -> dict:
    from dataset.qa_file import QAFile

    records = QAFile(folder / "qa.jsonl")
    return _read_at_random(len(records), lambda i: sum(len(turn.content) for turn in records[i].conversations))


def read_plain(folder: Path) -> dict:
    records = _plain_open(folder)
    return _read_at_random(len(records), lambda i: sum(len(turn["content"]) for turn in records[i]["conversations"]))


def _read_at_random(count: int, read: Callable[[int], int]) -> dict:
    """Return for n workers "reads_n", reads a second of all together, and "grown_n", the MiB that a worker came to hold for
    itself alone after its first reads. The workers are forked from a parent that has the file open, as the loader's are."""
    result = {"kept": count}
    fork = multiprocessing.get_context("fork")
    for workers in WORKERS:
        order = random.Random(workers).sample(range(count), min(count, MAX_READS))
        answers, together = fork.SimpleQueue(), fork.Barrier(workers)
        parts = [array("q", order[worker::workers]) for worker in range(workers)]  # no objects with reference counts
        processes = [fork.Process(target=_worker, args=(read, part, together, answers)) for part in parts]
        for process in processes:
            process.start()
        begun, ended, grown, letters = zip(*[answers.get() for _ in processes], strict=True)
        for process in processes:
            process.join()
        result[f"reads_{workers}"] = len(order) / (max(ended) - min(begun))
        result[f"grown_{workers}"] = max(grown)
        result[f"letters_{workers}"] = sum(letters)
    return result


def _worker(read: Callable[[int], int], order: array, together: Any, answers: Any) -> None:
    letters = sum(map(read, order[:100]))
    together.wait()
    before, begun = memory("Private_Dirty", "smaps_rollup"), time.perf_counter()
    letters += sum(map(read, order[100:]))
    ended = time.perf_counter()
    answers.put((begun, ended, memory("Private_Dirty", "smaps_rollup") - before, letters))


def prepare_images(folder: Path, kind: str) -> dict:
    """Prepare the records about the small images in one of IMAGE_PLACES, with every image decoded."""
    from config import DataConfig, SourceConfig
    from dataprocess.process_image import prepare

    output = folder / f"small-{kind}"
    shutil.rmtree(output, ignore_errors=True)
    source = SourceConfig("small", folder / "small.jsonl", images=folder / IMAGE_PLACES[kind])
    clock = Clock()
    report = prepare(DataConfig(qa_file=output / "qa.jsonl", sources=(source,), validation_fraction=0.0), seed=SEED)
    return clock.read() | {"kept": report["kept"], "refused": report["refused"]}


def read_images(folder: Path, kind: str) -> dict:
    """Read the small images of one of IMAGE_PLACES at random. "open", "held": CPU seconds and MiB of the first read."""
    from visual.images import image_bytes

    count = json.loads((folder / "small.json").read_text())["images"]
    paths = small_image_paths(folder, kind, count)
    clock = Clock()
    image_bytes(paths[0])
    opened = clock.read()
    read = _read_at_random(count, lambda i: len(image_bytes(paths[i])))
    return read | {"open": opened["cpu"], "held": opened["held"]}


IMAGE_MEASURES: dict[str, Callable[[Path], dict]] = {
    f"{name}_images_{kind}": partial(measure, kind=kind)
    for name, measure in (("prepare", prepare_images), ("read", read_images))
    for kind in IMAGE_PLACES
}
MEASURES: dict[str, Callable[[Path], dict]] = {
    "prepare_ours": prepare_ours, "prepare_again": partial(prepare_ours, again=True), "prepare_plain": prepare_plain,
    "open_first": partial(open_indexed, first=True), "open_indexed": open_indexed, "open_plain": open_plain,
    "read_ours": read_ours, "read_plain": read_plain,
}  # fmt: skip


def check_agreement(answers: dict[str, list[dict]]) -> None:
    """Raise ValueError if ours and the plain way do not count the same records and letters."""
    for task in ("prepare", "open", "read"):
        same = ["kept", *(f"letters_{workers}" for workers in WORKERS if task == "read")]
        seen = {tuple(one[key] for key in same) for name in answers if name.startswith(task) for one in answers[name]}
        if len(seen) > 1:
            raise ValueError(f"{task}: ours and the plain way differ in {', '.join(same)}: {sorted(seen)}")


def check_images_agree(answers: dict[str, list[dict]]) -> None:
    """Raise ValueError if files and archives do not give the same records and bytes, or a record is refused."""
    for task, keys in (("prepare", ["kept", "refused"]), ("read", [f"letters_{workers}" for workers in WORKERS])):
        seen = {tuple(one[key] for key in keys) for name in answers if name.startswith(task) for one in answers[name]}
        if len(seen) > 1 or task == "prepare" and any(refused for _, refused in seen):
            raise ValueError(f"{task}: files and archives differ in {', '.join(keys)}: {sorted(seen)}")


def markdown(answers: dict[str, list[dict]]) -> str:
    results = {name: {key: median(one[key] for one in found) for key in found[0]} for name, found in answers.items()}
    prepared = [results[f"prepare_{way}"] for way in ("ours", "plain", "again")]
    opened = [results[f"open_{way}"] for way in ("indexed", "plain", "first")]
    read = [results[f"read_{way}"] for way in ("ours", "plain")]

    def row(title: str, form: str, found: list[dict], key: str, factor: int = 1) -> list[str]:
        ours, plain, other = (factor * one[key] for one in found)
        ratio = f"{plain / ours:.1f}" if ours > 0 else "-"
        return [title, form.format(ours), form.format(plain), ratio, form.format(other)]

    preparing = [
        row("CPU seconds", "{:.2f}", prepared, "cpu"),
        row("seconds", "{:.2f}", prepared, "wall"),
        row("memory at the highest", "{:,.0f}", prepared, "peak"),
    ]
    opening = [
        row("milliseconds", "{:,.0f}", opened, "wall", 1000),
        row("CPU milliseconds", "{:,.0f}", opened, "cpu", 1000),
        row("memory held", "{:,.0f}", opened, "held"),
        row("memory of the whole process", "{:,.0f}", opened, "process"),
    ]
    reading = []
    for workers in WORKERS:
        speeds = [f"{one[f'reads_{workers}']:,.0f}" for one in read]
        reading.append([str(workers), *speeds, *(f"{one[f'grown_{workers}']:,.1f}" for one in read)])
    rounds, ways = median_of(len(answers["prepare_ours"])), ["ours", "plain", "plain / ours"]
    parts = [
        f"{machine(())}; {rounds}. Memory is MiB above what the process held after its imports.",
        table([f"{prepared[0]['kept']:,.0f} records prepared", *ways, "ours, nothing changed"], preparing),
        table([f"{opened[0]['kept']:,.0f} records opened", *ways, "ours, first time"], opening),
        table(["workers", "ours: reads a second", "plain", "ours: a worker grows by MiB", "plain"], reading),
    ]
    return "\n\n".join(parts)


def images_markdown(answers: dict[str, list[dict]]) -> str:
    results = {name: {key: median(one[key] for one in found) for key in found[0]} for name, found in answers.items()}
    prepared = [results[f"prepare_images_{kind}"] for kind in IMAGE_PLACES]
    read = [results[f"read_images_{kind}"] for kind in IMAGE_PLACES]
    rows = [
        ["preparing, CPU seconds", *(f"{one['cpu']:.2f}" for one in prepared)],
        ["preparing, seconds", *(f"{one['wall']:.2f}" for one in prepared)],
        ["preparing, MiB at the highest", *(f"{one['peak']:,.0f}" for one in prepared)],
        ["until the first read, CPU milliseconds", *(f"{1000 * one['open']:,.1f}" for one in read)],
        ["index, MiB", *(f"{one['held']:,.1f}" for one in read)],
    ]
    for workers in WORKERS:
        rows.append([f"reads a second, workers: {workers}", *(f"{one[f'reads_{workers}']:,.0f}" for one in read)])
    rounds = median_of(len(answers["prepare_images_files"]))
    head = [f"{prepared[0]['kept']:,.0f} small images", "files", "one zip", "one tar"]
    return f"{machine(())}; {rounds}.\n\n{table(head, rows)}"


def main() -> None:
    parser = make_parser("The cost of the data, beside the plain way.", MEASURES | IMAGE_MEASURES)
    parser.add_argument("--records", type=int, default=ALL_RECORDS, help="raw records (default: %(default)s)")
    parser.add_argument("--qa-records", type=int, default=1_000_000, help="of the QA file (default: %(default)s)")
    parser.add_argument("--images", type=int, help="compare this many small images in files, a zip and a tar instead")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps((MEASURES | IMAGE_MEASURES)[arguments.measure](arguments.workdir)))
        return
    if arguments.quick:
        arguments.records, arguments.qa_records, arguments.rounds = 2000, 3000, 1
    with open_workdir(arguments.workdir) as folder:
        if arguments.images:
            write_small_images(folder, 200 if arguments.quick else arguments.images)
            answers = measure_by_turns("data", IMAGE_MEASURES, arguments.rounds, workdir=folder)
            check_images_agree(answers)
            print(images_markdown(answers))
            return
        write_annotations(folder, arguments.records, arguments.qa_records)
        answers = measure_by_turns("data", MEASURES, arguments.rounds, workdir=folder)
    check_agreement(answers)
    print(markdown(answers))


if __name__ == "__main__":
    main()
