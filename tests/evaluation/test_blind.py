"""Blank and absent images. Run: python -m pytest tests/evaluation/test_blind.py"""

import pytest
from PIL import Image

from dataset.record import IMAGE
from evaluation.blind import without_images
from evaluation.score import Question, blind_questions, score_blind


@pytest.fixture
def questions(tmp_path):
    for name, size in (("a", (8, 6)), ("b", (6, 8)), ("c", (8, 6))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    images = [("a",), ("b",), (), ("c", "b")]
    return [
        Question(
            id=f"q{i}",
            turns=(("system", ["Be brief."]), ("user", [*[IMAGE] * len(names), "\nWhat?"])),
            images=tuple(tmp_path / f"{name}.png" for name in names),
            reference="yes",
            type="",
        )
        for i, names in enumerate(images)
    ]


def test_a_turn_without_images_reads_as_if_typed_without_one():
    turns = [("system", ["S"]), ("user", [IMAGE, IMAGE, "\nA", IMAGE, "\nB"]), ("assistant", ["C"]), ("user", ["D\n"])]
    turns += [("assistant", ["\nE"]), ("user", [IMAGE])]
    expected = [("system", ["S"]), ("user", ["A\nB"]), ("assistant", ["C"]), ("user", ["D\n"])]
    assert without_images(turns) == (*expected, ("assistant", ["\nE"]), ("user", [""]))


def test_blank_images_are_grey_and_of_the_same_size(questions):
    for kind, asked in blind_questions(questions, 0, {"blank"}):
        if kind == "blank":
            assert list(asked) == [0, 1, 3]
            for i, question in asked.items():
                for path, own in zip(question.images, questions[i].images, strict=True):
                    with Image.open(path) as blank, Image.open(own) as image:
                        assert blank.size == image.size and blank.getextrema() == ((128, 128),) * 3
            seen = [path for question in asked.values() for path in question.images]
    assert len(set(seen)) == 2 and not any(path.exists() for path in seen)


def test_only_the_wanted_kinds_are_asked(questions):
    def kinds(*wanted):
        return [(kind, list(asked)) for kind, asked in blind_questions(questions, 0, wanted)]

    assert kinds() == [("swapped", [0, 1])]
    assert kinds("swapped") == kinds()
    assert kinds("absent", "blank") == [("swapped", [0, 1]), ("blank", [0, 1, 3]), ("absent", [0, 1, 3])]


def test_each_kind_has_what_the_image_adds(questions):
    def answer(asked):
        """Answer only if an image is red."""
        answers = []
        for question in asked:
            colours = [Image.open(path).getpixel((0, 0)) for path in question.images]
            answers.append("yes" if (255, 0, 0) in colours else "no")
        return answers

    found, given, _ = score_blind(questions, answer, seed=0, kinds=("blank", "absent"))
    assert given == ["yes", "yes", "no", "yes"]
    adds = found["metrics"]["exact"]["image_adds"]
    assert {kind: (entry["n"], entry["value"]) for kind, entry in adds.items()} == {
        "swapped": (2, 0.0), "blank": (3, 1.0), "absent": (3, 1.0)
    }  # fmt: skip
