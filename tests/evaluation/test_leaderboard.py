"""The files that leaderboards take. Run: python -m pytest tests/evaluation/test_leaderboard.py"""

import csv
import json

import pytest

from dataprocess.benchmark_files import MME_TASKS
from evaluation.leaderboard import RESULTS, Result, mme_scores, write_results
from evaluation.score import Question, score


@pytest.mark.parametrize(
    "benchmark, native, row",
    [
        ("vqav2", {"question_id": 9001}, {"question_id": 9001, "answer": "红 \t色"}),
        ("textvqa", {"question_id": 34}, {"question_id": 34, "answer": "红 \t色"}),
        ("gqa", {"questionId": "201"}, {"questionId": "201", "prediction": "红 \t色"}),
        ("coco", {"image_id": 7}, {"image_id": 7, "caption": "红 \t色"}),
    ],
)
def test_lists_of_answers(tmp_path, benchmark, native, row):
    (path,) = write_results(benchmark, [Result("红 \t色", native)] * 2, tmp_path)
    assert path == tmp_path / "results.json" and json.loads(path.read_text(encoding="utf-8")) == [row, row]


def test_lines_of_answers(tmp_path):
    (path,) = write_results("pope", [Result("Yes.", {"question": "Is it?"})] * 2, tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"question": "Is it?", "answer": "Yes."}
    ] * 2
    results = [Result(answer, {"question_id": "5_0"}, ["a cat", "a dog"]) for answer in ("a dog", "nothing")]
    (path,) = write_results("seed", results, tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"question_id": "5_0", "prediction": "B"}, {"question_id": "5_0", "prediction": ""}
    ]  # fmt: skip


def test_mme_has_a_file_for_each_task(tmp_path):
    native = {"image": "1.jpg", "question": "Is it?", "answer": "Yes"}
    results = [Result(answer, native | {"task": task}) for task, answer in (("OCR", "No\nIt is"), ("color", "Yes"))]
    paths = write_results("mme", results, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["results/OCR.txt", "results/color.txt"]
    assert paths[0].read_text() == "1.jpg\tIs it?\tYes\tNo It is\n"


def test_a_table_keeps_the_columns_of_the_benchmark(tmp_path):
    natives = [{"index": 5, "question": 'A "b"?', "A": "x", "B": "y", "category": "c"}, {"index": 6, "question": "?"}]
    (path,) = write_results("mmbench", [Result("A\tx\nz", native) for native in natives], tmp_path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "category", "A", "B", "prediction"]
    assert rows[0] == {"index": "5", **natives[0], "prediction": "A\tx\nz"} | {"index": "5"}
    assert (rows[1]["A"], rows[1]["prediction"]) == ("", "A\tx\nz")


def test_scienceqa_numbers_its_options(tmp_path):
    results = [Result(answer, {"id": str(i)}, ["north", "south"]) for i, answer in enumerate(["B. south", "what?"])]
    (path,) = write_results("scienceqa", results, tmp_path)
    assert json.loads(path.read_text()) == {"results": {"0": 1, "1": -1}, "outputs": {"0": "B. south", "1": "what?"}}


def test_the_score_of_mme_is_the_sum_over_its_tasks():
    """100 x (accuracy + accuracy of whole images), as in the benchmark's own calculation."""
    answers = {"count": ["yes", "no", "yes", "yes"], "color": ["yes", "no"], "code_reasoning": ["no", "no"]}
    questions = [
        Question(id=f"{task}{i}", turns=(("user", ["?"]),), images=(f"{task}{i // 2}",), reference=["Yes", "No"][i % 2],
                 type=f"yes_no/{task}")
        for task, given in answers.items()
        for i in range(len(given))
    ]  # fmt: skip
    given = {question.id: text for question, text in zip(questions, sum(answers.values(), []), strict=True)}
    found, _ = score(questions, lambda asked: [given[q.id] for q in asked], seed=0)
    assert mme_scores(found["metrics"], MME_TASKS) == {"perception": 75 + 50 + 200, "cognition": 50}
    assert mme_scores({}, MME_TASKS) == {}


def test_every_benchmark_has_a_file():
    assert set(RESULTS) == {"vqav2", "gqa", "textvqa", "coco", "pope", "mme", "mmbench", "scienceqa", "seed"}
