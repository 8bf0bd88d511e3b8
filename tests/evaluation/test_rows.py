"""Rows of answers, and images that were trained on. Run: python -m pytest tests/evaluation/test_rows.py"""

import json

import pytest
from PIL import Image

from dataset.record import IMAGE
from evaluation.rows import ask_and_score, trained_on_text, with_suffix
from evaluation.score import Question
from evaluation.trained import trained_questions
from model.answer import Answer


@pytest.fixture
def questions(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "green")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{name}.png")

    def question(name: str, kind: str, reference: str, **values) -> Question:
        images = (tmp_path / f"{name}.png",)
        turns = (("user", [IMAGE, "\nWhat?"]),)
        return Question(id=f"{name}-{kind}", turns=turns, images=images, reference=reference, type=kind, **values)

    return [
        question("a", "colour", "red", source="s"),
        question("b", "vqa", "2", answers=("2",) * 3 + ("3",) * 7),
        question("c", "caption", "A cat."),
        question("a", "", "?", answers=()),
        question("b", "anls", "abcd"),
    ]


def test_a_row_says_how_its_answer_was_scored(questions):
    def answer_all(requests):
        return [Answer("red" if request.images else "blind", 0.25) for request in requests]

    scores, rows = ask_and_score(questions, answer_all, 0, left_out=2, kinds=("swapped", "absent"))
    assert scores["left_out"] == 2 and scores["no_reference"] == 1
    assert list(rows[0]) == [
        *("id", "image", "question", "answer", "blind", "blind_absent", "reference", "correct", "type", "source"),
        *("metric", "score", "seconds"),
    ]
    assert [(row["metric"], row["correct"]) for row in rows] == [
        ("exact", True), ("vqa", False), ("caption", False), (None, None), ("anls", False)
    ]  # fmt: skip
    assert [row["reference"] for row in rows] == ["red", "2", "A cat.", None, "abcd"]
    assert [row["blind_absent"] for row in rows] == ["blind"] * 3 + [None, "blind"]
    assert rows[0]["blind"] is None and rows[0]["source"] == "s" and rows[3]["score"] is None
    _, rows = ask_and_score(questions, answer_all, 0)
    assert "blind_absent" not in rows[0]


def test_a_suffix_is_a_line_after_the_question(questions):
    asked = with_suffix(questions[0], "Answer with one word.")
    assert asked.turns == (("user", [IMAGE, "\nWhat?\nAnswer with one word."]),)
    assert questions[0].turns == (("user", [IMAGE, "\nWhat?"]),)


def test_images_that_were_trained_on_are_found_under_any_name(questions, tmp_path):
    train = tmp_path / "train"
    train.mkdir()
    for new, old in (("x", "b"), ("y", "c")):
        (train / f"{new}.png").write_bytes((tmp_path / f"{old}.png").read_bytes())
    (train / "other.png").write_bytes((tmp_path / "c.png").read_bytes()[:-1] + b"x")  # of the same size
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    records = [{"id": str(i), "image": f"{name}.png", "conversations": turns} for i, name in enumerate(["x", "other"])]
    records += [{"id": "gone", "image": "gone.png", "conversations": turns}, {"id": "bad"}]
    (train / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = trained_questions(questions, [tmp_path / "gone.jsonl", train / "qa.jsonl"])
    assert found == {1: train / "x.png", 4: train / "x.png"}
    (train / "more.jsonl").write_text(json.dumps(records[0] | {"image": "y.png"}) + "\n")
    assert set(trained_questions(questions, [train / "qa.jsonl", train / "more.jsonl"])) == {1, 2, 4}
    assert trained_questions(questions, []) == trained_questions([], [train / "qa.jsonl"]) == {}

    text = trained_on_text(questions, found)
    assert text.startswith("warning: 2 of 5 questions are about images that this model was trained on")
    assert f"  b-vqa: {train / 'x.png'}\n  b-anls: {train / 'x.png'}" in text
