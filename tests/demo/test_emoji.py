"""The emoji data: what is held out stays out of training, questions have the right answers; drawings, if the packages are
installed (requirements-emoji.txt).

Run: python -m pytest tests/demo/test_emoji.py
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
from config import InputError
from demo import emoji as drawn
from demo import real_parts
from demo.emoji import GROUPS, Asker, Concept, image_path
from demo.emoji_drawings import SIDE, STYLES, Icons, Style, load_icons

CONCEPTS = [
    Concept(f"1f{i:03x}", en=f"thing {i}", zh=f"东西{i}", group=list(GROUPS)[i % 3])
    for i in sorted(range(120), key=lambda i: i % 3)
]


@pytest.fixture(scope="module")
def asker():
    return Asker(CONCEPTS, held_out_style="noto", rng=np.random.default_rng(0))


@pytest.fixture(scope="module")
def training(asker):
    return [*drawn.training_dialogs(asker), *drawn.training_names(asker)]


@pytest.fixture(scope="module")
def validation(asker):
    return drawn.validation_questions(asker)


def images_of(record) -> list[str]:
    return [record["image"]] if isinstance(record["image"], str) else record["image"]


def text_of(record) -> str:
    return " ".join(turn["value"] for turn in record["conversations"])


def test_no_image_is_in_both_halves(asker, training, validation):
    seen = {image for record in training for image in images_of(record)}
    seen |= {f"images/{record['image_id']}" for record in drawn.training_captions(asker)}
    asked = {image for record in validation for image in images_of(record)}
    assert seen and asked and not seen & asked
    assert not any("/noto/" in image for image in seen)


def test_training_never_names_a_held_out_concept(asker, training):
    words = {word for concept in asker.new for word in (concept.en, concept.zh)}
    said = {turn["value"] for record in training for turn in record["conversations"]}
    assert len(asker.new) == 6 and not words & said
    named = {concept.en for concept in asker.known}
    assert named <= said  # every other concept is named


def test_answers_are_true(asker, validation):
    by_image = {image_path(style, concept): concept for style in STYLES for concept in CONCEPTS}
    for record in validation:
        shown = [by_image[image] for image in images_of(record)]
        question, answer = (turn["value"] for turn in record["conversations"])
        kind = record["type"].removeprefix("new_").removeprefix("symbol_")
        concept = shown[0]
        if kind == "pair":
            assert (answer in ("Yes", "是")) == (shown[0] is shown[1])
        elif kind == "yes_no":
            asked = question.split("\n")[1]
            is_true = asked in (f"Is this {concept.en}?", f"这是{concept.zh}吗？")
            assert (answer in ("Yes", "是")) == is_true
        elif kind == "which":
            assert answer in (concept.en, concept.zh) and answer in question
        else:
            expected = {"name_en": concept.en, "name_zh": concept.zh, "in_chinese": concept.zh}
            assert answer in (expected.get(kind), *GROUPS[concept.group])


def test_yes_and_no_are_about_even(validation):
    judged = [text_of(record) for record in validation if record["type"].endswith(("yes_no", "pair"))]
    share = sum(text.endswith(("Yes", " 是")) for text in judged) / len(judged)
    assert 0.4 < share < 0.6


def test_a_seed_gives_the_same_records():
    made = [
        json.dumps(drawn.validation_questions(Asker(CONCEPTS, held_out_style="noto", rng=np.random.default_rng(seed))))
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1] != made[2]


def test_another_archive_than_the_expected_one_is_refused(tmp_path):
    path = tmp_path / f"noto-{STYLES['noto'].version}.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="SHA-256 is .* expected"):
        load_icons("noto", tmp_path)


def test_an_archive_is_read_without_unpacking_it(tmp_path, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as files:
        for name, values in (
            ("icons", {"icons": {"dog": {"body": "<g/>"}}, "aliases": {}}),
            ("chars", {"1f415-fe0f": "dog"}),
            ("metadata", {"categories": {"Animals & Nature": ["dog"]}}),
        ):
            data = json.dumps(values).encode()
            entry = tarfile.TarInfo(f"package/{name}.json")
            entry.size = len(data)
            files.addfile(entry, io.BytesIO(data))
    style = Style(version="1", sha256=hashlib.sha256(content.getvalue()).hexdigest(), licence="MIT", author="me")
    monkeypatch.setitem(STYLES, "noto", style)
    (tmp_path / "noto-1.tgz").write_bytes(content.getvalue())
    before = (tmp_path / "noto-1.tgz").stat()
    icons = load_icons("noto", tmp_path)
    assert (tmp_path / "noto-1.tgz").stat().st_mtime_ns == before.st_mtime_ns  # only read
    assert "1f415" in icons and icons.group("1f415") == "Animals & Nature"
    assert [path.name for path in tmp_path.iterdir()] == ["noto-1.tgz"]


def test_a_broken_download_is_no_traceback_and_leaves_no_file(tmp_path, monkeypatch):
    def urlopen(*_, **__):
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(InputError, match=r"noto-.*cannot be downloaded \(IncompleteRead"):
        load_icons("noto", tmp_path)
    assert list(tmp_path.iterdir()) == []


class Whole:
    """Icons that draw one concept after another until they are stopped in the middle of saving."""

    def draw(self, code: str) -> Image.Image:
        return Image.new("RGB", (8, 8), (int(code, 16) % 256, 0, 0))


def test_a_kill_while_saving_leaves_no_truncated_image(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "load_icons", lambda *_: Whole())
    monkeypatch.setattr(drawn, "common_concepts", lambda _: CONCEPTS)
    monkeypatch.setattr(demo, "missing_packages", lambda *_: [])
    save, count = Image.Image.save, 0

    def stopped(image, target, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            target.write(b"half") if hasattr(target, "write") else Path(target).write_bytes(b"half")
            raise KeyboardInterrupt
        save(image, target, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            drawn.make_emoji(tmp_path, "noto")
    drawn.make_emoji(tmp_path, "noto")
    images = list((tmp_path / "images").rglob("*"))
    for path in images:
        if path.is_file():
            assert Image.open(path).size == (8, 8)
    assert sum(path.is_file() for path in images) == len(STYLES) * len(CONCEPTS)
    training, names = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("names_train", "validation_names")
    )
    assert {(record["id"][5:7], record["id"][8:]) for record in names} == {
        (record["id"][:2], record["id"].rpartition("-")[2]) for record in training
    }


def test_missing_packages_are_named_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "missing_packages", lambda *names: list(names))
    with pytest.raises(InputError, match="emoji, resvg_py: not installed.* requirements-emoji.txt.*demo/emoji.sh"):
        drawn.make_emoji(tmp_path, "noto")
    with pytest.raises(InputError, match="gguf: not installed.* requirements-emoji.txt.*demo/emoji.sh"):
        real_parts.make_part("smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_has_the_icons_colours_on_white():
    pytest.importorskip("resvg_py", reason="requirements-emoji.txt is not installed")
    body = '<rect x="0" y="0" width="16" height="32" fill="#ff0000"/>'
    icons = Icons(
        {"icons": {"half": {"body": body, "width": 32, "height": 32}}}, {"2b1b": "half"}, {"Symbols": ["half"]}
    )
    image = icons.draw("2b1b")
    assert image.size == (SIDE, SIDE)
    assert image.getpixel((20, 100)) == (255, 0, 0) and image.getpixel((200, 100)) == (255, 255, 255)
