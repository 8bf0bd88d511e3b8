"""Questions, scores and the blind test. Run: python -m pytest tests/evaluation/test_score.py"""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.qa_file import QAFile
from dataset.record import IMAGE
from evaluation.score import Question, is_correct, questions_of, score, score_table, swap_images


def question(i: int, images=(), text="What?", reference="yes", kind="") -> Question:
    turns = (("user", [IMAGE] * len(images) + [text]),)
    return Question(id=f"q{i}", turns=turns, images=tuple(images), reference=reference, type=kind)


# --- questions


def test_every_answer_of_a_record_is_a_question_with_the_turns_before_it(tmp_path):
    talk = [
        ("system", "Be brief, <b>please</b>."),
        ("user", "<image>\nWhat is it?"),
        ("assistant", "A star."),
        ("user", "And <image>here?"),
        ("assistant", "A moon."),
    ]
    record = {"id": "r", "image": ["a.png", "/abs/b.png"], "type": "what"}
    record["conversations"] = [{"role": role, "content": content} for role, content in talk]
    lone = {"id": "s", "conversations": record["conversations"][:1] + [{"role": "user", "content": "图?"}]}
    lone["conversations"] = lone["conversations"] + [{"role": "assistant", "content": "No."}]
    (tmp_path / "qa.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(lone) + "\n")
    first, second, third = questions_of(QAFile(tmp_path / "qa.jsonl"), [0, 1])

    turns = [("system", ["Be brief, <b>please</b>."]), ("user", [IMAGE, "\nWhat is it?"])]
    assert list(first.turns) == turns and first.images == (tmp_path / "a.png",)
    assert (first.id, first.reference, first.type, first.text) == ("r", "A star.", "what", "What is it?")
    assert list(second.turns) == [*turns, ("assistant", ["A star."]), ("user", ["And ", IMAGE, "here?"])]
    assert [str(path) for path in second.images] == [str(tmp_path / "a.png"), "/abs/b.png"]
    assert (second.reference, second.text) == ("A moon.", "And here?")
    assert third.images == () and third.type == "" and third.language == "zh"
    assert [q.id for q in questions_of(QAFile(tmp_path / "qa.jsonl"), [1])] == ["s"]


@pytest.mark.parametrize(
    "text, language",
    [
        ("What?", "en"),
        ("什么", "zh"),
        ("Is it 红?", "zh"),  # 1 of 8 characters is Han
        ("Where is it？", "en"),  # the full-width question mark of a Chinese keyboard
        ("Yes，no", "en"),
        ("", "en"),
        ("½ — “quoted” é 😀", "en"),
        ("Где кот?", "other"),
    ],
)
def test_the_script_of_a_question_is_its_language(text, language):
    assert question(0, text=text).language == language


def test_an_answer_is_correct_in_any_form_of_composed_characters():
    assert is_correct("café", "cafe\u0301") and is_correct("cafe\u0301", "café") and not is_correct("cafe", "café")


def test_an_answer_is_correct_up_to_whitespace_at_the_ends():
    assert is_correct(" red\n", "red") and is_correct("red", " red ")
    assert not is_correct("Red", "red") and not is_correct("red.", "red") and not is_correct("", "red")


# --- the blind test

some_images = st.lists(st.sampled_from("abcdef"), max_size=2).map(tuple)
many_questions = st.lists(st.tuples(some_images, st.sampled_from(["", "colour", "shape"])), max_size=25).map(
    lambda pairs: [question(i, images, kind=kind) for i, (images, kind) in enumerate(pairs)]
)


@settings(deadline=None)
@given(many_questions, st.integers(0, 2**32 - 1))
def test_a_swapped_question_has_other_images_of_its_own_type(questions, seed):
    swapped = swap_images(questions, seed)
    assert swap_images(questions, seed) == swapped
    seen = Counter()
    for before, after in zip(questions, swapped, strict=True):
        group = {q.images for q in questions if (q.type, len(q.images)) == (before.type, len(before.images))}
        others = [images for images in group if set(images).isdisjoint(before.images)]
        if not before.images or not others:
            assert after is None
        else:
            assert after.images in others
            assert (after.id, after.turns, after.reference) == (before.id, before.turns, before.reference)
            seen[before.type, before.images, after.images] += 1
    taken = [(kind, after) for kind, before, after in seen if len(before) == 1]
    assert len(taken) == len(set(taken))  # one to one: no image replaces two others


def test_a_copy_of_an_image_is_the_same_image(tmp_path):
    """Names a, c, e have one content, b and d another: blind must not ask about the image itself."""
    for i, name in enumerate("abcde"):
        (tmp_path / name).write_bytes(b"one" if i % 2 == 0 else b"two")
    questions = [question(i, [tmp_path / name]) for i, name in enumerate("abcde")]
    for seed in range(4):
        swapped = swap_images(questions, seed)
        assert [q.images[0].read_bytes() for q in swapped] == [b"two", b"one", b"two", b"one", b"two"]
    questions = [question(i, [tmp_path / name]) for i, name in enumerate("ace")]
    scores, _ = score(questions, lambda asked: ["yes"] * len(asked), 0)
    assert (scores["blind"], scores["not_swapped"]) == (None, 3)
    assert score_table(scores).split("\n")[-1] == (
        "questions not in blind, because no others of their kind have other images: 3"
    )


def test_only_images_of_equal_size_are_read_and_each_once(tmp_path, monkeypatch):
    contents = {"a": b"one", "b": b"four", "c": b"two", "d": b"one", "e": b"eleven"}
    paths = [tmp_path / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    paths += [tmp_path / "gone", tmp_path]
    read: list[Path] = []

    def image_bytes(path: Path) -> bytes:
        read.append(path)
        return path.read_bytes()

    monkeypatch.setattr("evaluation.score.image_bytes", image_bytes)
    questions = [question(i, [path]) for i, path in enumerate(paths * 3)]
    swapped = swap_images(questions, 1)
    assert sorted(path.name for path in read) == ["a", "c", "d"]
    groups = {frozenset(q.images[0] for q in swapped[i :: len(paths)]) for i in range(len(paths))}
    assert len(groups) == 6  # one swap for each different content: a and d have one
    assert all(q is not None and q.images[0].name not in ("a", "d") for q in (swapped[0], swapped[3]))


def test_questions_about_several_images_get_none_of_their_own():
    """Neighbouring pairs of a ring: each shares images with two others. And one common image leaves nothing to swap."""
    ring = [question(i, [f"{i}", f"{(i + 1) % 6}"]) for i in range(6)]
    for seed in range(20):
        for before, after in zip(ring, swap_images(ring, seed), strict=True):
            assert set(before.images).isdisjoint(after.images)
    shared = [question(i, ["common", f"{i}"]) for i in range(3)]
    assert swap_images(shared, 0) == [None] * 3


def test_the_swap_of_single_images_is_that_of_earlier_versions():
    questions = [question(i, [f"{i}.png"]) for i in range(6)]
    assert [q.images[0] for q in swap_images(questions, 3)] == ["2.png", "0.png", "3.png", "5.png", "1.png", "4.png"]


def test_questions_that_do_not_fit_are_counted():
    scores, _ = score(QUESTIONS, lambda asked: ["red"] * len(asked), seed=0, left_out=3)
    assert (scores["n"], scores["left_out"]) == (20, 3) and "not_swapped" not in scores
    assert score_table(scores).split("\n")[-1].endswith("with their answers: 3")
    scores, _ = score(QUESTIONS, lambda asked: ["red"] * len(asked), seed=0)
    assert not {"left_out", "not_swapped"} & scores.keys()


def test_the_table_cannot_control_the_terminal():
    hostile = question(0, ["a"], kind="colour\x1b]52;c;aGk=\x07")
    table = score_table(score([hostile], lambda asked: ["yes"] * len(asked), 0)[0])
    assert "\x1b" not in table and "colour\\x1b]52" in table


def test_the_seed_decides_the_swap():
    questions = [question(i, [f"{i}.png"]) for i in range(12)]
    assert len({tuple(q.images for q in swap_images(questions, seed)) for seed in range(5)}) == 5


QUESTIONS = [
    question(
        i, [f"{i}.png"], "什么?" if i % 4 == 0 else "What?", ["red", "blue"][i % 3 == 0], ["colour", "shape"][i < 6]
    )
    for i in range(20)
]


def test_a_model_that_ignores_images_scores_the_same_blind():
    scores, given_answers = score(QUESTIONS, lambda asked: ["red"] * len(asked), seed=0)
    assert given_answers == ["red"] * 20 and 0 < scores["accuracy"] < 1
    for entry in (scores, *scores["by_type"].values(), *scores["by_language"].values()):
        assert entry["blind"] == entry["accuracy"]


def test_a_model_that_uses_images_scores_less_blind():
    truth = {q.images: q.reference for q in QUESTIONS}
    scores, _ = score(QUESTIONS, lambda asked: [truth[q.images] for q in asked], seed=0)
    assert scores["accuracy"] == 1.0 and scores["blind"] < 1.0
    expected = [truth[q.images] == q.reference for q in swap_images(QUESTIONS, 0)]
    assert scores["blind"] == sum(expected) / 20


def test_scores_are_means_over_the_questions_of_each_type_and_language():
    right = {0, 2, 3, 7}
    questions = [
        question(i, ["a", "b"][i % 2 : i % 2 + 1] if i < 6 else [], "谁?" if i % 2 else "Who?", "yes", kind)
        for i, kind in enumerate(["n", "n", "n", "m", "m", "m", "t", ""])
    ]
    scores, answers = score(questions, lambda asked: ["yes" if int(q.id[1:]) in right else "no" for q in asked], 0)
    assert answers == ["yes" if i in right else "no" for i in range(8)]
    assert {key: scores[key] for key in ("n", "accuracy", "blind")} == {"n": 8, "accuracy": 0.5, "blind": 0.5}
    assert scores["by_type"] == {
        "m": {"n": 3, "accuracy": 1 / 3, "blind": 1 / 3},
        "n": {"n": 3, "accuracy": 2 / 3, "blind": 2 / 3},
        "t": {"n": 1, "accuracy": 0.0, "blind": None},  # no image to swap
    }
    assert scores["by_language"]["zh"] == {"n": 4, "accuracy": 0.5, "blind": 1 / 3}
    assert scores["by_type_and_language"]["n/en"] == {"n": 2, "accuracy": 1.0, "blind": 1.0}
    assert sum(entry["n"] for entry in scores["by_type_and_language"].values()) == 7
    table = [line.split() for line in score_table(scores).split("\n")]
    assert table[0][:2] == ["type", "n"] and len(table) == 5
    assert table[1] == ["m", "3", "33.3", "33.3", "0.0", "50.0"]
    assert table[2] == ["n", "3", "66.7", "66.7", "100.0", "0.0"]
    assert table[3] == ["t", "1", "0.0", "-", "0.0", "-"]
    assert table[4] == ["all", "8", "50.0", "50.0", "50.0", "50.0"]
    assert len({len(line) for line in score_table(scores).split("\n")}) == 1


def test_no_questions_give_no_scores():
    scores, answers = score([], lambda asked: [], 0)
    assert (scores["n"], scores["accuracy"], scores["blind"], scores["by_type"], answers) == (0, None, None, {}, [])
    assert score_table(scores).split("\n")[1].split() == ["all", "0", "-", "-", "-", "-"]


def test_a_question_in_another_language_counts_only_among_all():
    questions = [question(i, text=text, kind="what") for i, text in enumerate(["What?", "什么?", "Что?"])]
    scores, _ = score(questions, lambda asked: ["yes" if q.language == "other" else "no" for q in asked], 0)
    assert {name: entry["n"] for name, entry in scores["by_language"].items()} == {"en": 1, "other": 1, "zh": 1}
    table = [line.split() for line in score_table(scores).split("\n")]
    assert table[1] == ["what", "3", "33.3", "-", "0.0", "0.0"] and table[2] == ["all", "3", "33.3", "-", "0.0", "0.0"]
