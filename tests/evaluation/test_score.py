"""Questions, scores, the blind test and the page of answers. Run: python -m pytest tests/test_evaluation.py"""

import base64
import html.parser
import io
import json
import math
import re
from collections import Counter

import matplotlib
import matplotlib.figure
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset.conversation import IMAGE
from dataset.qa_file import QAFile
from evaluation.page import write_page
from training.log import RunLog, read_rows
from training.curves import draw_curves
from evaluation.score import Question, is_correct, questions_of, score, score_table, swap_images


def question(i: int, images=(), text="What?", reference="yes", kind="") -> Question:
    return Question(f"q{i}", (("user", [IMAGE] * len(images) + [text]),), tuple(images), reference, kind)


# --- questions


def test_every_answer_of_a_record_becomes_a_question_with_what_was_said_before(tmp_path):
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

    said = [("system", ["Be brief, <b>please</b>."]), ("user", [IMAGE, "\nWhat is it?"])]
    assert list(first.turns) == said and first.images == (tmp_path / "a.png",)
    assert (first.id, first.reference, first.type, first.text) == ("r", "A star.", "what", "What is it?")
    assert list(second.turns) == [*said, ("assistant", ["A star."]), ("user", ["And ", IMAGE, "here?"])]
    assert [str(path) for path in second.images] == [str(tmp_path / "a.png"), "/abs/b.png"]
    assert (second.reference, second.text) == ("A moon.", "And here?")
    assert third.images == () and third.type == "" and third.language == "zh"
    assert [q.id for q in questions_of(QAFile(tmp_path / "qa.jsonl"), [1])] == ["s"]


@pytest.mark.parametrize(
    "text, language",
    [("What?", "en"), ("什么", "zh"), ("Is it 红?", "zh"), ("Yes，no", "zh"), ("", "en"), ("½ — “quoted” é 😀", "en")],
)
def test_a_question_with_any_chinese_character_is_chinese(text, language):
    assert question(0, text=text).language == language


def test_an_answer_is_right_if_it_is_the_reference_but_for_blanks_around():
    assert is_correct(" red\n", "red") and is_correct("red", " red ")
    assert not is_correct("Red", "red") and not is_correct("red.", "red") and not is_correct("", "red")


# --- the blind test

pictures = st.lists(st.sampled_from("abcdef"), max_size=2).map(tuple)
many = st.lists(st.tuples(pictures, st.sampled_from(["", "colour", "shape"])), max_size=25).map(
    lambda pairs: [question(i, images, kind=kind) for i, (images, kind) in enumerate(pairs)]
)


@settings(deadline=None)
@given(many, st.integers(0, 2**32 - 1))
def test_a_swapped_question_has_another_picture_of_its_own_type(questions, seed):
    swapped = swap_images(questions, seed)
    assert swap_images(questions, seed) == swapped
    seen = Counter()
    for before, after in zip(questions, swapped, strict=True):
        group = {q.images for q in questions if (q.type, len(q.images)) == (before.type, len(before.images))}
        if not before.images or len(group) == 1:
            assert after is None
        else:
            assert after.images != before.images and after.images in group
            assert (after.id, after.turns, after.reference) == (before.id, before.turns, before.reference)
            seen[before.type, before.images, after.images] += 1
    taken = [(kind, len(before), after) for kind, before, after in seen]
    assert len(taken) == len(set(taken))  # one to one: no picture stands in for two


def test_the_seed_decides_which_picture_stands_in():
    questions = [question(i, [f"{i}.png"]) for i in range(12)]
    assert len({tuple(q.images for q in swap_images(questions, seed)) for seed in range(5)}) == 5


QUESTIONS = [
    question(
        i, [f"{i}.png"], "什么?" if i % 4 == 0 else "What?", ["red", "blue"][i % 3 == 0], ["colour", "shape"][i < 6]
    )
    for i in range(20)
]


def test_who_does_not_look_scores_the_same_blind():
    scores, given_answers = score(QUESTIONS, lambda asked: ["red"] * len(asked), seed=0)
    assert given_answers == ["red"] * 20 and 0 < scores["accuracy"] < 1
    for entry in (scores, *scores["by_type"].values(), *scores["by_language"].values()):
        assert entry["blind"] == entry["accuracy"]


def test_who_looks_scores_less_blind():
    truth = {q.images: q.reference for q in QUESTIONS}
    scores, _ = score(QUESTIONS, lambda asked: [truth[q.images] for q in asked], seed=0)
    assert scores["accuracy"] == 1.0 and scores["blind"] < 1.0
    expected = [truth[q.images] == q.reference for q in swap_images(QUESTIONS, 0)]
    assert scores["blind"] == sum(expected) / 20


def test_scores_are_means_over_the_questions_of_each_kind():
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
        "t": {"n": 1, "accuracy": 0.0, "blind": None},  # no picture to swap
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


def test_without_any_question_there_is_nothing_to_divide_by():
    scores, answers = score([], lambda asked: [], 0)
    assert (scores["n"], scores["accuracy"], scores["blind"], scores["by_type"], answers) == (0, None, None, {}, [])
    assert score_table(scores).split("\n")[1].split() == ["all", "0", "-", "-", "-", "-"]


# --- what a run writes down


def test_a_logged_loss_is_the_mean_over_the_targets_since_the_last_row(tmp_path):
    tracked = []
    log = RunLog(tmp_path, 0, 3, True, 2, lambda values, step: tracked.append((step, values)))
    padded = {"ids": ["a", "b"], "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), "lengths": None}
    packed = {"ids": ["a", "b"], "attention_mask": None, "lengths": [7, 3, 6]}  # the last 6 are padding
    for step, (loss, targets) in enumerate([(4.0, 7), (1.0, 10), (2.0, 30), (9.0, 5)], start=1):
        log.step(step, step / 4, loss, 2.0 + step, 0.5, targets, False, 0, {"lora_lr": 0.1}, [padded, packed])
    log.validation(4, 1.0, {"loss": 3.5, "perplexity": math.inf}, [{"id": "a"}])
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("loss"), row.get("targets")) for row in rows] == [
        (1, 4.0, 7), (3, (1.0 * 10 + 2.0 * 30) / 40, 40), (4, None, None),
    ]  # fmt: skip
    assert [row.get("balance_loss") for row in rows] == [3.0, (4.0 + 5.0) / 2, None]
    assert rows[2]["val_loss"] == 3.5 and rows[2]["val_perplexity"] is None and rows[1]["lora_lr"] == 0.1
    assert rows[1]["tokens_per_s"] / rows[1]["samples_per_s"] == pytest.approx(5, rel=0.01)
    assert [step for step, _ in tracked] == [1, 3, 4] and "step" not in tracked[0][1]
    assert read_rows(tmp_path / "samples.jsonl") == [{"step": 4, "id": "a"}]


@pytest.mark.parametrize("has_experts", [False, True])
def test_the_curves_of_stages_stand_one_behind_the_other(tmp_path, monkeypatch, has_experts):
    """Drawn from what the rows hold; a stage that has not begun is left out, and a dense model has no balance to show."""
    for name in ("text", "chat"):
        row = {"step": 1, "loss": 2.0, "grad_norm": None, "embeddings_lr": 0.1, "samples_per_s": 3.0}
        row |= {"balance_loss": 2.1} if has_experts else {}
        found = [row, row | {"step": 2, f"{name}_lr": 1e-3}, {"step": 2, "val_loss": 1.5, "val_token_accuracy": 0.5}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    runs = [(name, tmp_path / f"{name}.jsonl") for name in ("text", "vision", "chat")]
    figures = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    draw_curves(runs, tmp_path / "curves.png")
    axes = {axis.get_title(): axis for axis in figures[0].axes}
    assert len(axes) == (6 if has_experts else 4)
    training = axes["loss per answer token"].lines[0]
    assert list(training.get_xdata()) == [1, 2, 3, 4]
    assert [text.get_text() for text in axes["learning rates"].texts] == ["text", "chat"]
    drawn = {line.get_label() for line in axes["learning rates"].lines}
    assert {"embeddings_lr", "text_lr", "chat_lr"} <= drawn


def test_a_run_that_goes_on_drops_the_rows_of_the_steps_that_it_makes_again(tmp_path):
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo'
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(lines)
    RunLog(tmp_path, 2, 1, False, 1, print)  # not the main process: touches nothing
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    RunLog(tmp_path, 2, 1, True, 1, print)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert read_rows(tmp_path / name) == [{"step": 1}, {"step": 2}]


# --- the page


class Reader(html.parser.HTMLParser):
    """What a browser would make of a page: tags with their attributes, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        assert self.open == []  # every element is closed

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.words.append(data)


def thumbnails(reader: Reader) -> list[Image.Image]:
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


EVIL = "</dd><script>alert(1)</script><img src='http://evil.example/x.png'>&amp;\"'"


def test_the_page_shows_text_as_text_and_needs_no_other_file(tmp_path):
    image = tmp_path / 'a<b>&".png'
    Image.new("RGB", (120, 10)).save(image)
    row = {"image": str(image), "question": EVIL + "q", "answer": EVIL + "a", "reference": EVIL + "r", "correct": False}
    problems = [{"image": "x", "problem": EVIL + "p"}]
    path = tmp_path / "page.html"
    write_page(path, EVIL + "title", EVIL + "about", [row], problems, EVIL + "table")
    reader = Reader(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "a", "iframe"})
    text = "|".join(reader.words)
    for part in "qarp":
        assert EVIL + part in text
    assert all(EVIL + part in text for part in ("title", "about", "table")) and image.name in text
    assert len(thumbnails(reader)) == 1
    assert not [value for _, pairs in reader.tags for value in pairs.values() if "//" in value[:30]]
    assert "url(" not in path.read_text() and "@import" not in path.read_text()


def test_rows_of_one_picture_share_a_small_thumbnail_of_it(tmp_path):
    big, small = tmp_path / "big.jpg", tmp_path / "small.png"
    Image.new("RGB", (1000, 500), "red").save(big, quality=95)
    Image.new("RGB", (20, 30), "blue").save(small)
    shown = [(str(big), "1"), (str(big), "2"), (None, "3"), (str(small), "4"), (str(big), "5")]
    rows = [{"image": image, "question": "Q" + name, "answer": "A" + name} for image, name in shown]
    write_page(tmp_path / "page.html", "t", "a", rows)
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in reader.tags].count("article") == 4
    first, second, third = thumbnails(reader)
    assert first.size == third.size == (220, 110) and second.size == (20, 30)
    red, blue = first.convert("RGB").getpixel((9, 9)), second.convert("RGB").getpixel((9, 9))
    assert red[0] > 240 and max(red[1:]) < 15 and blue == (0, 0, 255)
    order = [word for word in reader.words if re.fullmatch(r"[QA]\d", word)]
    assert order == [letter + str(i) for i in range(1, 6) for letter in "QA"]


def test_the_page_marks_what_is_right_and_what_was_expected_instead(tmp_path):
    rows = [
        {"image": None, "question": "Q", "answer": answer, "reference": "yes", "correct": answer == "yes"}
        for answer in ("yes", "no")
    ]
    write_page(tmp_path / "page.html", "t", "a", rows)
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [attributes.get("class") for tag, attributes in reader.tags if tag == "dd"] == ["right", "wrong"]
    assert [word for word in reader.words if "expected" in word] == ["expected: yes"]
