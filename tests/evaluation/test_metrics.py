"""Which metric scores which question, groups and intervals. Run: python -m pytest tests/evaluation/test_metrics.py"""

import json

import numpy as np
import pytest

from dataset.qa_file import QAFile
from dataset.record import RecordError
from evaluation.metrics import answer_scores, metric_of, summarise
from evaluation.score import Question, questions_of, score, score_blind, score_table
from evaluation.tables import metric_table, metrics_line


def question(i: int = 0, kind: str = "", reference: str = "yes", **values) -> Question:
    values = {"images": (f"{i}.png",), **values}
    return Question(id=f"q{i}", turns=(("user", ["?"]),), reference=reference, type=kind, **values)


@pytest.mark.parametrize(
    "asked, metric",
    [
        (question(kind="colour"), "exact"), (question(), "exact"), (question(kind="vqa"), "vqa"),
        (question(kind="vqa/number"), "vqa"), (question(kind="vqas"), "exact"), (question(kind="anls"), "anls"),
        (question(kind="yes_no/count"), "yes_no"), (question(kind="yes_no", reference="red"), "exact"),
        (question(kind="caption"), "caption"), (question(reference="B", options=("x", "y")), "choice"),
        (question(reference="y", options=("x", "y")), "choice"), (question(reference="z", options=("x", "y")), "exact"),
        (question(kind="colour", metric="vqa"), "vqa"), (question(kind="choice", reference="C"), "choice"),
    ],
)  # fmt: skip
def test_the_type_of_a_question_chooses_its_metric(asked, metric):
    assert metric_of(asked) == metric


def test_a_record_carries_references_options_and_a_group(tmp_path):
    turns = [{"role": "user", "content": "Is it red?"}, {"role": "assistant", "content": "Yes"}]
    record = {"id": "a", "conversations": turns * 2, "source": "s", "type": "vqa"}
    scored = {"answers": ["yes", "yeah"], "options": ["x", "y"], "group": "g"}
    lines = [record, record | scored | {"id": "b"}, record | {"id": "c", "answers": []}]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = questions_of(QAFile(tmp_path / "qa.jsonl"), range(3))
    assert [q.references for q in found] == [("Yes",)] * 3 + [("yes", "yeah"), ("Yes",), ()]  # of the last answer alone
    assert [(q.options, q.group) for q in found] == [((), "")] * 3 + [(("x", "y"), "g")] + [((), "")] * 2
    assert {q.source for q in found} == {"s"}
    for wrong in ({"answers": "yes"}, {"answers": [1]}, {"options": {}}, {"options": {"A": "x"}}, {"group": 3}):
        (tmp_path / "qa.jsonl").write_text(json.dumps(record | wrong) + "\n")
        if wrong != {"options": {}}:  # empty, as absent
            with pytest.raises(RecordError, match=f'line 1 \\("a"\\).*"{next(iter(wrong))}" must be'):
                QAFile(tmp_path / "qa.jsonl")


def test_each_answer_has_the_score_of_its_own_metric():
    questions = [
        question(kind="vqa", answers=("two", "2", "3", "4", "5", "6", "7", "8", "9", "x")),
        question(kind="colour", answers=("red", "crimson")),
        question(kind="yes_no", reference="no"),
        question(kind="anls", reference="abcd"),
        question(reference="B", options=("x", "y")),
    ]
    found = answer_scores(questions, ["2.", "crimson", "There is not", "abcx", "y"])
    assert [name for name, _ in found] == ["vqa", "exact", "yes_no", "anls", "choice"]
    assert [value for _, value in found] == pytest.approx([0.6, 1, 1, 0.75, 1])
    assert answer_scores([], []) == []


def test_an_interval_is_that_of_images_drawn_with_replacement():
    """The standard error of a mean of independent images is known; ten questions about one image are no ten images."""
    generator = np.random.default_rng(0)
    rights = generator.random(400) < 0.7
    alone = [question(i) for i in range(400)]
    answers = ["yes" if right else "no" for right in rights]
    (values,) = (summarise(alone, answers, {}, seed=1, groupings={})[name] for name in ("exact",))
    found, mean = values["accuracy"], rights.mean()
    width = 1.96 * np.sqrt(mean * (1 - mean) / 400)
    assert found["value"] == mean and values["n"] == values["images"] == 400
    assert found["low"] == pytest.approx(mean - width, abs=0.01)
    assert found["high"] == pytest.approx(mean + width, abs=0.01)
    assert summarise(alone, answers, {}, seed=1, groupings={})["exact"] == values
    assert summarise(alone, answers, {}, seed=2, groupings={})["exact"] != values

    repeated = [q for q in alone[:40] for _ in range(10)]
    same = [answer for answer in answers[:40] for _ in range(10)]
    wide = summarise(repeated, same, {}, seed=1, groupings={})["exact"]
    narrow = summarise([question(i) for i in range(400)], same, {}, seed=1, groupings={})["exact"]
    assert wide["images"] == 40 and wide["accuracy"]["value"] == narrow["accuracy"]["value"]
    spans = [entry["accuracy"]["high"] - entry["accuracy"]["low"] for entry in (wide, narrow)]
    assert spans[0] == pytest.approx(spans[1] * np.sqrt(10), rel=0.15)
    single = summarise(alone[:1], ["yes"], {}, seed=1, groupings={})["exact"]["accuracy"]
    assert single == {"value": 1.0, "low": None, "high": None}


def test_many_images_are_drawn_in_pieces(monkeypatch):
    questions, answers = [question(i) for i in range(50)], ["yes", "no"] * 25
    whole = summarise(questions, answers, {}, seed=0, groupings={})
    monkeypatch.setattr("evaluation.metrics.AT_ONCE", 1000)
    assert summarise(questions, answers, {}, seed=0, groupings={}) == whole


def test_what_the_image_adds_compares_the_same_questions():
    questions = [question(i) for i in range(60)]
    answers = ["yes"] * 45 + ["no"] * 15
    blind = {"swapped": {i: "yes" if i < 15 else "no" for i in range(60)}, "blank": {0: "no", 50: "no"}, "absent": {}}
    found = summarise(questions, answers, blind, seed=0, groupings={"by_type": ["a"] * 30 + ["b"] * 30})["exact"]
    adds = found["image_adds"]
    assert set(adds) == {"swapped", "blank"} and adds["swapped"]["value"] == 0.5 and adds["swapped"]["n"] == 60
    assert 0.3 < adds["swapped"]["low"] < 0.5 < adds["swapped"]["high"] < 0.7
    assert (adds["blank"]["n"], adds["blank"]["value"]) == (2, 0.5)
    assert found["by_type"]["a"]["image_adds"]["swapped"]["value"] == 0.5
    assert found["by_type"]["b"]["accuracy"]["value"] == 0.5


def test_a_model_that_ignores_images_gains_exactly_nothing_from_them():
    questions = [question(i, reference=["yes", "no"][i % 2]) for i in range(20)]
    found, _ = score(questions, lambda asked: ["yes"] * len(asked), seed=0)
    assert found["metrics"]["exact"]["image_adds"]["swapped"] == {"n": 20, "value": 0.0, "low": 0.0, "high": 0.0}


def test_scores_are_told_by_type_source_and_language():
    questions = [
        question(0, "vqa/number", "2", source="one"), question(1, "vqa/other", "red", source="two"),
        question(2, "colour", "red", source="two"), question(3, "caption", "一只猫", source="two"),
        question(4, "caption", "a cat on a mat", source="two"),
    ]  # fmt: skip
    found, _ = score(questions, lambda asked: ["2"] * len(asked), seed=0)
    assert list(found["metrics"]) == ["exact", "vqa", "caption"]
    vqa = found["metrics"]["vqa"]
    assert {name: entry["accuracy"]["value"] for name, entry in vqa["by_type"].items()} == {
        "vqa/number": 1.0, "vqa/other": 0.0
    }  # fmt: skip
    assert {name: entry["n"] for name, entry in vqa["by_source"].items()} == {"one": 1, "two": 1}
    assert {name: entry["n"] for name, entry in vqa["by_language"].items()} == {"en": 2}
    assert found["by_source"]["two"] == {"n": 4, "accuracy": 0.0, "blind": 0.0}
    assert set(found["metrics"]["caption"]) >= {"cider_d", "bleu_4", "rouge_l"}
    json.dumps(found, allow_nan=False)
    assert metrics_line(questions) == (
        "scored: 1 by exact (type colour); 2 by vqa (types vqa/number, vqa/other); 2 by caption (type caption)"
    )
    table = metric_table(found).split("\n")
    assert [line.split()[0] for line in table] == ["metric", "exact", "vqa", *["caption"] * 4]
    assert "accuracy %" in table[2] and "50.0" in table[2] and "the image adds (swapped)" in table[6]
    assert metric_table({"n": 0}) == ""  # the scores of an earlier version


def test_questions_without_a_known_answer_are_asked_once_and_not_scored():
    asked = []

    def answer(questions):
        asked.append([q.id for q in questions])
        return ["yes"] * len(questions)

    questions = [question(0), question(1, answers=()), question(2)]
    found, given, _ = score_blind(questions, answer, seed=0, kinds=("absent",))
    assert asked == [["q0", "q1", "q2"], ["q0", "q2"], ["q0", "q2"]] and given == ["yes"] * 3
    assert (found["n"], found["accuracy"], found["no_reference"]) == (2, 1.0, 1) and "not_swapped" not in found
    assert score_table(found).split("\n")[-1] == "questions without a known answer, which are asked but not scored: 1"
    found, _ = score([question(1, answers=())], answer, seed=0)
    assert (found["n"], found["accuracy"], found["metrics"]) == (0, None, {})
    assert metrics_line([question(1, answers=())]) == "scored: nothing, no question has a known answer"
