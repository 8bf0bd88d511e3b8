"""Short answers compared with their references. Run: python -m pytest tests/evaluation/test_answers.py"""

import itertools
import random

import numpy as np
import pytest
from anls import anls_score
from sklearn.metrics import precision_recall_fscore_support

from evaluation.answers import LETTERS, anls, read_choice, read_yes_no, vqa_accuracy, vqa_normalised
from evaluation.metrics import METRICS
from evaluation.score import Question

# --- VQA accuracy: the rules of https://visualqa.org/evaluation.html, one by one


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("Red", "red"),
        ("  two \n cats\t", "2 cats"),
        ("a dog on the mat", "dog on mat"),
        ("An apple", "apple"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("3.", "3"),
        ("3.5", "3.5"),
        ("u.s.a.", "usa"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("what?", "what"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("yes!", "yes"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("dont", "don't"),
        ("Couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("lets", "lets"),
        ("(left)", "left"),
        ("红 色。", "红色"),
        ("２只！", "2只"),
        ("the", ""),
    ],
)
def test_the_published_rules_normalise_an_answer(text, normalised):
    assert vqa_normalised(text) == normalised


def test_ten_annotators_agree_by_the_mean_over_nine_of_them():
    for equal, accuracy in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]):
        references = ["two"] * equal + ["3"] * (10 - equal)
        assert vqa_accuracy("2.", references) == pytest.approx(accuracy, abs=1e-12)
        subsets = itertools.combinations([reference == "two" for reference in references], 9)
        assert vqa_accuracy("2", references) == pytest.approx(sum(min(1, sum(s) / 3) for s in subsets) / 10, abs=1e-12)


def test_a_few_references_can_all_be_met():
    for references in (["red"], ["red"] * 2, ["red"] * 3, ["red"] * 4):
        assert vqa_accuracy("Red", references) == 1 and vqa_accuracy("blue", references) == 0
    assert vqa_accuracy("red", ["red", "blue"]) == 0.5


# --- yes or no


@pytest.mark.parametrize(
    "answer, word",
    [
        ("Yes", "yes"), ("yes.", "yes"), ("Yes, there is no other.", "no"), ("Yes. It is not.", "yes"),
        ("No, it isn't", "no"), ("There is not a dog", "no"), ("It isn't", ""), ("A dog", ""), ("", ""),
        ("Know", ""), ("是", "yes"), ("是的。", "yes"), ("有", "yes"), ("没有", "no"), ("不是", "no"), ("否", "no"),
        ("是不是", "no"), ("红色", ""),
    ],
)  # fmt: skip
def test_an_answer_says_yes_or_no(answer, word):
    assert read_yes_no(answer) == word


def asked(answer: str, **values) -> Question:
    return Question(id=answer, turns=(("user", ["?"]),), images=(), reference=answer, type="", **values)


def values_of(name: str, questions: list, answers: list) -> dict:
    rows = np.array(METRICS[name].rows(questions, answers, questions), float)
    return {key: float(value) for key, value in METRICS[name].values(rows.sum(0)).items()}


def test_yes_and_no_have_the_values_of_scikit_learn():
    generator = random.Random(0)
    for _ in range(200):
        n = generator.randint(1, 12)
        truth, given = ([generator.random() < generator.choice([0.1, 0.5, 1]) for _ in range(n)] for _ in range(2))
        words = {True: ["yes", "Yes, it is", "unclear"], False: ["no", "There is not"]}
        found = values_of(
            "yes_no", [asked("yes" if one else "no") for one in truth], [generator.choice(words[one]) for one in given]
        )
        expected = precision_recall_fscore_support(truth, given, average="binary", zero_division=0)[:3]
        assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(list(expected), abs=1e-9)
        assert found["accuracy"] == sum(a == b for a, b in zip(truth, given, strict=True)) / n
        assert found["yes_share"] == pytest.approx(sum(given) / n, abs=1e-9)


def test_an_image_counts_when_all_its_questions_are_right():
    pictures = [f"{i // 2}.png" for i in range(6)]
    questions = [
        Question(id=str(i), turns=(), images=(picture,), reference=["yes", "no"][i % 2], type="yes_no/count")
        for i, picture in enumerate(pictures)
    ]
    found = values_of("yes_no", questions, ["yes", "no", "yes", "yes", "what", "no"])
    assert (found["accuracy"], found["accuracy_plus"]) == (5 / 6, 2 / 3) and found["unclear_share"] == 1 / 6


# --- multiple choice

OPTIONS = ["a cat", "a black cat", "a dog", "none"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("b", "B"), ("(C)", "C"), ("C.", "C"), ("B. a black cat", "B"), ("[D] none", "D"), ("Ｂ：猫", "B"),
        ("A dog", "C"), ("a dog.", "C"), ("The answer is B", "B"), ("答案是C", "C"), ("选 D", "D"),
        ("It is a black cat", "B"), ("It is a cat", "A"), ("a cat or a dog", ""), ("E", ""), ("", ""),
        ("A bird", ""), ("None", "D"), ("nonets", ""),
    ],
)  # fmt: skip
def test_an_answer_names_an_option(answer, letter):
    assert read_choice(answer, OPTIONS) == letter


def test_an_option_is_named_by_its_letter_or_its_text_in_any_language():
    options = ["左边", "右边", "3,5", "§"]
    for letter, option in zip(LETTERS, options, strict=False):
        for answer in (letter, f" {letter.lower()} ", f"({letter})", f"{letter}. {option}", option, f" {option} "):
            assert read_choice(answer, options) == letter
    assert read_choice("在右边。", options) == "B" and read_choice("左边和右边", options) == ""
    assert read_choice("G", ()) == "G" and read_choice("a cat", ()) == ""  # only the letters are known
    assert read_choice("red", ["red", "Red."]) == ""


def test_a_circle_is_right_if_all_its_rotations_are():
    questions = [asked("B", options=("x", "y"), group=group) for group in ("1", "1", "2", "2", "")]
    found = values_of("choice", questions, ["B", "y", "B", "A", "b"])
    assert found == {"accuracy": 4 / 5, "circular_accuracy": 1 / 2}
    assert values_of("choice", questions[-1:], ["B"]) == {"accuracy": 1.0}


# --- ANLS


def test_anls_is_that_of_the_anls_package():
    generator = random.Random(1)

    def text(letters: str) -> str:
        return "".join(generator.choice(letters) for _ in range(generator.randint(1, 8)))

    for _ in range(500):
        letters = generator.choice(["ab", "abcde", "左右上下"])
        answer, references = text(letters), [text(letters) for _ in range(generator.randint(1, 4))]
        assert anls(answer, references) == pytest.approx(anls_score(answer, references), abs=1e-9)


def test_anls_ignores_case_and_blanks_and_forgives_up_to_half():
    assert anls(" The  END ", ["the end"]) == 1 and anls("", ["x"]) == 0
    assert anls("abcd", ["abcx"]) == 0.75 and anls("ab", ["ax"]) == 0 and anls("红色", ["红的", "红色"]) == 1
