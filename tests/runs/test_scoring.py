"""test.py --qa on benchmarks and raw sources, with its options. `sh tests/run.sh tests/runs/test_scoring.py`"""

from __future__ import annotations

import json

import pytest

import test
import train
from config import InputError
from evaluation.blind import BLIND
from evaluation.metrics import METRICS
from tests.spy import spy
from tests.toy_project import run_training, write_project


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        ended = spy(patch, train, "score_held_out", lambda run: run)
        run_training(path, "train.max_steps=1", "train.eval_steps=null", "train.save_steps=null")
    return ended[0]


@pytest.fixture
def score(run, tmp_path):
    def ask(*arguments) -> tuple[list[dict], dict]:
        final = run.config.output_dir / "final"
        assert test.main(["--checkpoint", str(final), *map(str, arguments), "--output", str(tmp_path / "out")]) == 0
        rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        return rows, json.loads((tmp_path / "out" / "scores.json").read_text())

    return ask


@pytest.fixture
def pope(run, tmp_path):
    """A benchmark about three images: one was trained on, the others are held out."""
    images = run.config.data.sources[0].images
    rows = [
        {"question_id": i, "image": path.name, "text": "Is it red?", "label": ["yes", "no"][i % 2]}
        for i, path in enumerate(sorted(images.glob("*.png"))[:4])
    ]
    path = tmp_path / "coco_pope_random.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, images


def test_a_benchmark_is_scored_and_its_results_are_written(score, pope, tmp_path, capsys):
    path, images = pope
    rows, scores = score("--qa", path, "--images", images, "--blind", "all", "--suffix", "Answer yes or no.")
    printed = capsys.readouterr().out
    assert [row["metric"] for row in rows] == ["yes_no"] * 4 and rows[0]["question"] == "Is it red?\nAnswer yes or no."
    entry = scores["metrics"]["yes_no"]
    assert list(entry["by_type"]) == ["yes_no/random"] and list(entry["by_source"]) == ["pope"]
    assert set(entry["image_adds"]) == set(BLIND) and entry["image_adds"]["absent"]["n"] == 4
    assert {"blind", "blind_blank", "blind_absent"} <= set(rows[0])
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert results == [{"question": "Is it red?", "answer": row["answer"]} for row in rows]
    assert "scored: 4 by yes_no (type yes_no/random)" in printed and "the image adds (blank)" in printed
    assert "swapped, blank, absent" in printed and str(tmp_path / "out" / "results.jsonl") in printed
    assert "answers yes %" in (tmp_path / "out" / "answers.html").read_text()
    assert "loss" in scores
    # the toy project trains on some of these images, and holds others out
    assert 0 < len(scores["trained_on"]) < 4
    assert f"warning: {len(scores['trained_on'])} of 4 questions are about images" in printed
    assert all(name in printed for name in scores["trained_on"])


def test_a_split_without_answers_is_answered_for_the_leaderboard(score, pope, tmp_path, capsys):
    _, images = pope
    questions = {str(i): {"question": "What?", "imageId": path.stem} for i, path in enumerate(images.glob("*.png"))}
    (tmp_path / "pictures").mkdir()
    for path in images.glob("*.png"):
        (tmp_path / "pictures" / f"{path.stem}.jpg").write_bytes(path.read_bytes())
    (tmp_path / "testdev.json").write_text(json.dumps(questions))
    rows, scores = score("--qa", tmp_path / "testdev.json", "--images", tmp_path / "pictures", "limit=2")
    assert (scores["n"], scores["no_reference"], scores["metrics"]) == (0, 2, {}) and "loss" not in scores
    assert [row["correct"] for row in rows] == [None, None]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == [{"questionId": str(i), "prediction": row["answer"]} for i, row in enumerate(rows)]
    assert "scored: nothing" in capsys.readouterr().out


def test_a_table_is_scored_by_the_metric_that_is_asked_for(score, pope, tmp_path):
    _, images = pope
    name = next(images.glob("*.png")).name
    (tmp_path / "t.csv").write_text(f"file_name,问,answer\n{name},What?,red\n")
    rows, scores = score(
        "--qa", tmp_path / "t.csv", "--images", images, "columns.question=问", "--metric", "vqa", "test.batch_size=1"
    )
    assert [(row["question"], row["reference"], row["metric"]) for row in rows] == [("What?", "red", "vqa")]
    assert list(scores["metrics"]) == ["vqa"]


def test_the_options_name_what_there_is():
    assert (test.BLIND, test.METRIC_NAMES) == (BLIND, tuple(METRICS))
    kinds = {words: test.blind_kinds(words) for words in ("swapped", "absent", "blank,swapped", "all")}
    assert kinds == {
        "swapped": ("swapped",), "absent": ("swapped", "absent"), "blank,swapped": ("swapped", "blank"), "all": BLIND
    }  # fmt: skip
    with pytest.raises(InputError, match='did you mean "blank"'):
        test.blind_kinds("blnak")
    for words in (["--blind", "all"], ["--metric", "vqa"], ["--suffix", "x"]):
        with pytest.raises(InputError, match=f"{words[0]} is for scoring"):
            test.parse_arguments(words)
    found = test.parse_arguments(["--qa", "t.csv", "limit=3", "test.batch_size=2", "data.max_refused=0.5"])
    assert (found.settings, found.overrides) == (["limit=3", "data.max_refused=0.5"], ["test.batch_size=2"])
