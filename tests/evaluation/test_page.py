"""The page of answers: text stays text, images are thumbnails. Run: python -m pytest tests/evaluation/test_page.py"""

import base64
import html.parser
import io
import re

from PIL import Image

from evaluation.page import write_page


class Reader(html.parser.HTMLParser):
    """A parsed page: its tags with their attributes, and its text outside of the style."""

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
    write_page(path, EVIL + "title", EVIL + "about", [row], unreadable=problems, table=EVIL + "table")
    reader = Reader(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "a", "iframe"})
    text = "|".join(reader.words)
    for part in "qarp":
        assert EVIL + part in text
    assert all(EVIL + part in text for part in ("title", "about", "table")) and image.name in text
    assert len(thumbnails(reader)) == 1
    assert not [value for _, pairs in reader.tags for value in pairs.values() if "//" in value[:30]]
    assert "url(" not in path.read_text() and "@import" not in path.read_text()


def test_consecutive_rows_about_one_image_share_its_thumbnail(tmp_path):
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


def test_answers_are_marked_right_or_wrong_with_the_expected_one(tmp_path):
    rows = [
        {"image": None, "question": "Q", "answer": answer, "reference": "yes", "correct": answer == "yes"}
        for answer in ("yes", "no")
    ]
    write_page(tmp_path / "page.html", "t", "a", rows)
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [attributes.get("class") for tag, attributes in reader.tags if tag == "dd"] == ["right", "wrong"]
    assert [word for word in reader.words if "expected" in word] == ["expected: yes"]


def test_the_answer_about_another_image_stands_beside_its_own(tmp_path):
    row = {"image": None, "question": "Q", "answer": "dog", "reference": "dog", "correct": True}
    write_page(tmp_path / "page.html", "t", "a", [row | {"blind": "<cat>"}, row | {"blind": None}])
    reader = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [word for word in reader.words if "another image" in word] == ["with another image: <cat>"]


def test_an_answer_is_right_by_its_metric(tmp_path):
    """A caption is neither, and an unknown answer has no reference."""
    row = {"image": None, "question": "?", "answer": "a", "reference": "expected this", "correct": False}
    known = [("vqa", 0.6), ("vqa", 0.3), ("caption", 2.0), ("exact", 0.0)]
    rows = [row | {"metric": metric, "score": score} for metric, score in known]
    rows += [row | {"correct": True}, row | {"reference": None, "correct": None, "metric": None, "score": None}]
    for one, (verdict, is_shown) in zip(
        rows, [("right", 0), ("wrong", 1), (None, 1), ("wrong", 1), ("right", 0), (None, 0)], strict=True
    ):
        write_page(tmp_path / "page.html", "t", "a", [one])
        reader = Reader((tmp_path / "page.html").read_text())
        (answer,) = (attributes for tag, attributes in reader.tags if tag == "dd")
        assert answer.get("class") == verdict
        assert any("expected this" in word for word in reader.words) == is_shown
