"""benchmarks.answering runs and compares equal answers. Run: sh tests/run.sh tests/benchmarks/test_answering.py"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import answering
from benchmarks.answering import NAMES, check_agreement, requests_about, shares_equal

ROOT = Path(__file__).parents[2]


def test_prints_the_machine_and_a_table_of_numbers():
    command = [sys.executable, "-m", "benchmarks.answering", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about, _, head, rule, *rows = done.stdout.strip().split("\n")
    assert re.search(
        r"torch \d.*transformers \d.*, \d{4}-\d\d-\d\d; fp32, .* 4 new tokens an answer; median of 1 round\.", about
    )
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    assert [len(row) for row in cells] == [7] * 5 and [row[0] for row in cells[1:]] == list(NAMES.values())
    assert all(float(cell.replace(",", "")) >= 0 for row in cells[1:] for cell in row[1:6])
    assert [row[6] for row in cells[1:]] == ["", "100 %", "", "100 %"]  # in float32 every token is the same


@pytest.mark.parametrize("name", ["folder_batched", "questions_shared"])
def test_refuses_to_compare_different_answers(name):
    answers = {other: [{"answers": ["1 2", "3 4"]}] for other in NAMES}
    check_agreement(answers, "fp32")
    answers[name] = [{"answers": ["1 2", "3 5"]}]
    assert shares_equal(answers)[name] == 0.5
    with pytest.raises(ValueError, match=name):
        check_agreement(answers, "fp32")
    check_agreement(answers, "bf16")  # rounding makes some differ: the share is shown


def test_the_questions_depend_on_the_sizes_alone():
    requests = requests_about([Path("a"), Path("b")], 3)
    assert [request.images for request in requests] == [[Path("a")]] * 3 + [[Path("b")]] * 3
    assert len({str(request.turns) for request in requests}) == 6
    assert requests == requests_about([Path("a"), Path("b")], 3)


def test_the_old_name_of_images_is_accepted(monkeypatch):
    seen = []
    monkeypatch.setattr(answering, "measure", lambda name, arguments: seen.append(arguments.images) or {})
    for flag in ("--images", "--pictures"):
        monkeypatch.setattr(sys, "argv", ["answering", "--measure", "folder_plain", flag, "5"])
        answering.main()
    assert seen == [5, 5]
