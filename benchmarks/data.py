"""What the data costs, beside the plain way of doing the same: `python -m benchmarks.data`.

Three questions, each answered in processes of its own, ours and the plain way by turns: raw annotations into a QA file
(the mix that LLaVA-like training starts from); opening a QA file; reading it at random from forked workers. The plain
way is what one writes first: json.load, lists of dicts. It does the same work and keeps the same records, or this stops.

Prints Markdown. Needs Linux (/proc tells what memory is in use).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

from benchmarks.workload import ALL_RECORDS, SEED, SOURCES, make_workload

ROOT = Path(__file__).parent.parent
VALIDATION_FRACTION = 0.01
WORKERS = (1, 2, 4)
MAX_READS = 400_000  # random reads, shared among the workers


# ------------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """What a piece of work costs from here on: seconds, and memory above what the process held before."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory use counts from now
        self._before = _memory("VmRSS")
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds of this process and wall; MiB above the start, at the highest and now; MiB of the whole process."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        now, highest = _memory("VmRSS"), _memory("VmHWM")
        return {"cpu": cpu, "wall": wall, "peak": highest - self._before, "held": now - self._before, "process": now}


def _memory(field: str, file: str = "status") -> float:
    """MiB, of a line of /proc/self/status or smaps_rollup."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def prepare_ours(folder: Path) -> dict:
    shutil.rmtree(folder / "ours", ignore_errors=True)
    return prepare_again(folder)


def prepare_again(folder: Path) -> dict:
    """With what the last run wrote: if nothing changed, nothing is done."""
    from config import DataConfig, SourceConfig
    from dataprocess.process_image import prepare

    sources = tuple(
        SourceConfig(
            name=source.name,
            annotations=source.annotations(folder),
            images=source.images(folder),
            format="ai_challenger" if source.name == "captions" else "llava",
            captions="one_per_epoch" if source.name == "captions" else "all",
        )
        for source in SOURCES
    )
    data = DataConfig(
        qa_file=folder / "ours" / "qa.jsonl",
        sources=sources,
        validation_file=folder / "ours" / "validation.jsonl",
        validation_fraction=VALIDATION_FRACTION,
        max_refused=0.01,
        verify_images=False,
    )
    clock = Clock()
    report = prepare(data, seed=SEED)
    return clock.read() | {"kept": report["kept"]}


def prepare_plain(folder: Path) -> dict:
    """Whole files, lists of dicts, a dict by file name to keep a picture on one side. JSON Lines with json.dumps, since
    json.dump of the list takes five times as long."""
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
            conversations = _plain_conversations(row, number)
            record = {"id": f"{source.name}:{number}", "conversations": conversations[0], "source": source.name}
            if path:
                record["image"] = path
            if len(conversations) > 1:
                record["alternatives"] = conversations[1:]
            by_image[path or record["id"]].append(record)
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


def open_first(folder: Path) -> dict:
    (folder / "qa.jsonl.index.safetensors").unlink(missing_ok=True)
    return open_indexed(folder)


def open_indexed(folder: Path) -> dict:
    from dataset.qa_file import QAFile

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
    """For each number of workers: "reads_n", a second, all together, and "grown_n", MiB that a worker had for itself in
    the end and not after its first few reads. The parent has the file open, the workers are forked from it, as the
    loader's are."""
    result = {"kept": count}
    fork = multiprocessing.get_context("fork")
    for workers in WORKERS:
        order = random.Random(workers).sample(range(count), min(count, MAX_READS))
        answers, together = fork.SimpleQueue(), fork.Barrier(workers)
        shares = [array("q", order[worker::workers]) for worker in range(workers)]  # no objects whose use is counted
        processes = [fork.Process(target=_worker, args=(read, share, together, answers)) for share in shares]
        for process in processes:
            process.start()
        begun, ended, grown, letters = zip(*[answers.get() for _ in processes], strict=True)
        for process in processes:
            process.join()
        result[f"reads_{workers}"] = len(order) / (max(ended) - min(begun))
        result[f"grown_{workers}"] = max(grown)
        result[f"letters_{workers}"] = sum(letters)
    return result


def _worker(read: Callable[[int], int], order: array, together, answers) -> None:
    letters = sum(map(read, order[:100]))
    together.wait()
    before, begun = _memory("Private_Dirty", "smaps_rollup"), time.perf_counter()
    letters += sum(map(read, order[100:]))
    ended = time.perf_counter()
    answers.put((begun, ended, _memory("Private_Dirty", "smaps_rollup") - before, letters))


MEASURES = {
    measure.__name__: measure
    for measure in (
        *(prepare_ours, prepare_again, prepare_plain),
        *(open_first, open_indexed, open_plain),
        *(read_ours, read_plain),
    )
}


# -------------------------------------------------------------------------------------------------------------- the table


def run(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Every measure in every round, by turns, each in a process of its own: name -> the medians of what it answered."""
    answers = {name: [] for name in MEASURES}
    for _ in range(rounds):
        for name in MEASURES:
            command = [sys.executable, "-m", "benchmarks.data", "--workdir", str(folder), "--measure", name]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
            answers[name].append(json.loads(done.stdout))
    check_agreement(answers)
    return {name: {key: median(one[key] for one in found) for key in found[0]} for name, found in answers.items()}


def check_agreement(answers: dict[str, list[dict[str, float]]]) -> None:
    """Raises ValueError where ours and the plain way do not count the same records and letters."""
    for task in ("prepare", "open", "read"):
        same = ["kept", *(f"letters_{workers}" for workers in WORKERS if task == "read")]
        seen = {tuple(one[key] for key in same) for name in answers if name.startswith(task) for one in answers[name]}
        if len(seen) > 1:
            raise ValueError(f"{task}: ours and the plain way differ in {', '.join(same)}: {sorted(seen)}")


def markdown(results: dict[str, dict[str, float]], rounds: int) -> str:
    ours, again, plain = (results[f"prepare_{way}"] for way in ("ours", "again", "plain"))
    first, indexed, loaded = (results[f"open_{way}"] for way in ("first", "indexed", "plain"))
    random_ours, random_plain = results["read_ours"], results["read_plain"]
    lines = [
        f"{_machine()}; median of {rounds} round{'s' if rounds > 1 else ''}. Memory is MiB above what the process "
        "held after its imports.",
        "",
        *_table(
            [f"{ours['kept']:,.0f} records prepared", "ours", "plain", "plain / ours", "ours, nothing changed"],
            [
                _row("CPU seconds", "{:.2f}", ours["cpu"], plain["cpu"], again["cpu"]),
                _row("seconds", "{:.2f}", ours["wall"], plain["wall"], again["wall"]),
                _row("memory at the highest", "{:,.0f}", ours["peak"], plain["peak"], again["peak"]),
            ],
        ),
        *_table(
            [f"{indexed['kept']:,.0f} records opened", "ours", "plain", "plain / ours", "ours, first time"],
            [
                _row("milliseconds", "{:,.0f}", *(1000 * one["wall"] for one in (indexed, loaded, first))),
                _row("CPU milliseconds", "{:,.0f}", *(1000 * one["cpu"] for one in (indexed, loaded, first))),
                _row("memory held", "{:,.0f}", *(one["held"] for one in (indexed, loaded, first))),
                _row("memory of the whole process", "{:,.0f}", *(one["process"] for one in (indexed, loaded, first))),
            ],
        ),
        *_table(
            ["workers", "ours: reads a second", "plain", "ours: a worker grows by MiB", "plain"],
            [
                [
                    str(workers),
                    *(f"{one[f'reads_{workers}']:,.0f}" for one in (random_ours, random_plain)),
                    *(f"{one[f'grown_{workers}']:,.1f}" for one in (random_ours, random_plain)),
                ]
                for workers in WORKERS
            ],
        ),
    ]
    return "\n".join(lines)


def _row(what: str, form: str, ours: float, plain: float, other: float) -> list[str]:
    ratio = f"{plain / ours:.1f}" if ours > 0 else "-"
    return [what, form.format(ours), form.format(plain), ratio, form.format(other)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _machine() -> str:
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the data costs, beside the plain way. Prints Markdown.")
    parser.add_argument("--records", type=int, default=ALL_RECORDS, help="raw records (default: %(default)s)")
    parser.add_argument("--qa-records", type=int, default=1_000_000, help="of the QA file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each measure so many times (default: %(default)s)")
    parser.add_argument(
        "--workdir", type=Path, help="keep the workload here for the next run (default: a temporary folder)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round: shows that it works, not how fast"
    )
    parser.add_argument("--measure", choices=MEASURES, help="this one alone, in --workdir as it is; prints JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASURES[arguments.measure](arguments.workdir)))
        return
    if arguments.quick:
        arguments.records, arguments.qa_records, arguments.rounds = 2000, 3000, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)).resolve()
        make_workload(folder, arguments.records, arguments.qa_records)
        print(markdown(run(folder, arguments.rounds), arguments.rounds))


if __name__ == "__main__":
    main()
