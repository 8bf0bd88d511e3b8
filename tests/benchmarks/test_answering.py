"""The benchmark of answering runs and compares equal answers. Run: python -m pytest tests/test_benchmark_answering.py"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.answering import NAMES, check_agreement, requests_about, shares_equal

ROOT = Path(__file__).parent.parent


def test_the_output_is_a_markdown_table_of_numbers_and_the_machine():
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
def test_answers_that_are_not_the_same_are_not_compared(name):
    results = {other: {"answers": ["1 2", "3 4"]} for other in NAMES}
    check_agreement(results, "fp32")
    results[name] = {"answers": ["1 2", "3 5"]}
    assert shares_equal(results)[name] == 0.5
    with pytest.raises(ValueError, match=name):
        check_agreement(results, "fp32")
    check_agreement(results, "bf16")  # rounding makes some differ: the share is shown


def test_the_questions_depend_on_the_sizes_alone():
    requests = requests_about([Path("a"), Path("b")], 3)
    assert [request.images for request in requests] == [[Path("a")]] * 3 + [[Path("b")]] * 3
    assert len({str(request.turns) for request in requests}) == 6
    assert requests == requests_about([Path("a"), Path("b")], 3)
