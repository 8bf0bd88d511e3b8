"""benchmarks.data runs and compares equal work. Run: sh tests/run.sh tests/benchmarks/test_data.py"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.annotations import IMAGE_PLACES, SOURCES, small_image_paths, write_annotations, write_small_images
from benchmarks.data import IMAGE_MEASURES, MEASURES, WORKERS, check_agreement, check_images_agree
from visual.images import image_bytes, read_image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("work")
    sizes = ["--records", "900", "--qa-records", "700", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.data", *sizes, "--workdir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables(text: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[:-1]] for table in found
    ]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_prints_the_machine_and_three_tables_of_numbers(output):
    machine = output.split("\n")[0]
    assert re.search(r"\d+ cores, Python 3\.\d+\.\d+, \d{4}-\d\d-\d\d; median of 1 round\.", machine)
    prepared, opened, read = tables(output)
    for head, rule, *rows in (prepared, opened, read):
        assert set(rule) == {"---"} and all(len(row) == len(head) == 5 for row in (rule, *rows))
        assert all(number(cell) >= 0 for row in rows for cell in row[1:] if cell != "-")
    assert opened[0][0] == "700 records opened"
    assert [int(row[0]) for row in read[2:]] == list(WORKERS) and all(number(row[1]) > 0 for row in read[2:])
    seconds = prepared[2]
    assert seconds[0] == "CPU seconds" and number(seconds[1]) > 0 and number(seconds[2]) > 0


def test_prepares_every_source_and_refuses_missing_images(output):
    prepared = tables(output)[0]
    wanted = sum(source.share * 900 // sum(other.share for other in SOURCES) for source in SOURCES)
    kept = int(prepared[0][0].split()[0])
    assert wanted - len(SOURCES) <= kept <= wanted


def test_the_workload_depends_on_its_sizes_alone(tmp_path):
    for name in "ab":
        write_annotations(tmp_path / name, 300, 50)
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in "ab"]
    assert files[0] == files[1] and len(files[0]) > 200
    for path in [Path("qa.jsonl"), *(source.annotations(Path()) for source in SOURCES)]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_an_existing_workload_is_used_again(tmp_path):
    write_annotations(tmp_path, 50, 5)
    (tmp_path / "qa.jsonl").write_text("mine")
    write_annotations(tmp_path, 50, 5)
    assert (tmp_path / "qa.jsonl").read_text() == "mine"
    write_annotations(tmp_path, 50, 6)
    assert len((tmp_path / "qa.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("wrong", [name for name in MEASURES if name != "open_indexed"])
def test_refuses_to_compare_different_work(wrong):
    answers = {name: [{"kept": 5} | {f"letters_{workers}": 9 for workers in WORKERS}] for name in MEASURES}
    check_agreement(answers)
    answers[wrong][0]["kept"] = 4
    with pytest.raises(ValueError, match="differ"):
        check_agreement(answers)


def test_small_images_in_files_and_archives_are_prepared_and_read_alike(tmp_path, monkeypatch, capsys):
    seen: dict[str, list[dict]] = {}

    def measure_here(module: str, names, rounds: int, workdir: Path) -> dict[str, list[dict]]:
        seen.update({name: [measure(workdir)] for name, measure in names.items()})
        return seen

    monkeypatch.setattr(data, "measure_by_turns", measure_here)
    monkeypatch.setattr(data, "machine", lambda _: "here")
    monkeypatch.setattr(sys, "argv", ["data", "--images", "450", "--rounds", "1", "--workdir", str(tmp_path)])
    data.main()
    (found,) = tables(capsys.readouterr().out)
    assert found[0] == ["450 small images", "files", "one zip", "one tar"] and len(found) == 2 + 5 + len(WORKERS)
    assert all(number(cell) >= 0 for row in found[2:] for cell in row[1:])
    assert seen.keys() == IMAGE_MEASURES.keys()
    same = [[image_bytes(path) for path in small_image_paths(tmp_path, kind, 450)] for kind in IMAGE_PLACES]
    assert same[0] == same[1] == same[2] and 200 < sum(map(len, same[0])) / 450 < 900
    assert read_image(same[0][0]).size == (32, 32)
    for name, wrong in (("prepare_images_zip", {"refused": 1}), ("read_images_tar", {"letters_2": 1})):
        with pytest.raises(ValueError, match="files and archives differ"):
            check_images_agree(seen | {name: [seen[name][0] | wrong]})


def test_small_images_are_the_same_each_time(tmp_path):
    for name in "ab":
        write_small_images(tmp_path / name, 20)
    files = [(tmp_path / name / IMAGE_PLACES["zip"]).with_name("train") for name in "ab"]
    assert [path.read_bytes() for path in sorted(files[0].iterdir())] == [
        path.read_bytes() for path in sorted(files[1].iterdir())
    ]
    assert (tmp_path / "a" / IMAGE_PLACES["tar"]).read_bytes() == (tmp_path / "b" / IMAGE_PLACES["tar"]).read_bytes()
