"""The demo: texts describe the images, held-out data stays separate, files are reproducible, backbones score well.

Run: python -m pytest tests/demo/test_world.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from config import InputError
from demo import draw, language, vision, world

DEMO = Path(__file__).parents[2] / "demo"


def seen_in(image: Image.Image) -> list[str | None]:
    """The colour at each of the four places, from the pixels: every shape covers the middle of its corner."""
    pixels = np.asarray(image, dtype=float)
    colours = []
    for y in (15, 45):
        for x in (15, 45):
            middle = pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            name = min(world.RGB, key=lambda colour: np.abs(middle - world.RGB[colour]).sum())
            colours.append(None if np.ptp(middle) < 10 and middle.mean() < 90 else name)
    return colours


def scenes(count: int, make=world.training_scene, **extra) -> list[world.Scene]:
    rng = np.random.default_rng(5)
    return [make(rng, **extra) for _ in range(count)]


def test_an_image_shows_its_scene():
    rng = np.random.default_rng(0)
    for scene in scenes(200):
        assert seen_in(world.draw_scene(scene, rng)) == [None if pair is None else pair[0] for pair in scene]


def test_every_answer_is_true():
    rng = np.random.default_rng(0)
    types = set()
    for scene in scenes(300):
        objects = {pair[1]: (pair[0], world.PLACES[i]) for i, pair in enumerate(scene) if pair is not None}
        of_colour = {pair[0]: pair[1] for pair in scene if pair is not None}
        for _, question, answer, _ in (asked := world.scene_questions(scene, "en", rng)):
            if found := re.fullmatch(r"What colour is the (\w+)\?", question):
                assert answer == f"The {found[1]} is {objects[found[1]][0]}."
            elif found := re.fullmatch(r"What shape is the (\w+) object\?", question):
                assert answer == f"It is a {found[1]} {of_colour[found[1]]}."
            elif found := re.fullmatch(r"Where is the (\w+)\?", question):
                assert answer == f"The {found[1]} is {objects[found[1]][1]}."
            elif found := re.fullmatch(r"Is there a (\w+)\?", question):
                assert answer == f"A {found[1]}? {'Yes' if found[1] in objects else 'No'}."
            else:
                assert question == "How many objects are there?"
                count = sum(pair is not None for pair in scene)
                assert answer in (f"There are {world.NUMBERS['en'][count]} objects.", "There is one object.")
                assert ("one" in answer) == (count == 1)
        types |= {question.type for question in asked}
        shapes = [pair[1] for pair in scene if pair is not None]
        unique = [shape for shape in shapes if shapes.count(shape) == 1]
        assert sum(question.type == "place" for question in asked) == len(unique)
    assert types == set(world.SCENE_TYPES)


def test_chinese_and_english_texts_have_the_same_meaning():
    for scene in scenes(100):
        english = world.scene_questions(scene, "en", np.random.default_rng(1))
        chinese = world.scene_questions(scene, "zh", np.random.default_rng(1))
        for a, b in zip(english, chinese, strict=True):
            assert (a.type, a.about) == (b.type, b.about)
            for names in (world.COLOURS, world.SHAPES, world.PLACES):
                english_names = {name for name in names if re.search(rf"\b{name}\b", a.question + a.answer)}
                assert {name for name in names if world.CHINESE[name] in b.question + b.answer} == english_names
            assert a.answer.endswith("No.") == b.answer.endswith("？没有。")
            assert a.answer.endswith("Yes.") == b.answer.endswith("？有。")


def test_held_out_scenes_and_unseen_pairs_are_not_in_training():
    train = scenes(3000)
    held_out = scenes(300, world.held_out_scene)
    unseen = scenes(300, world.held_out_scene, unseen=True)
    assert not set(train) & set(held_out)
    assert not any(map(world.has_unseen_pair, train + held_out))
    assert all(map(world.has_unseen_pair, unseen))
    assert {pair for scene in train for pair in scene if pair is not None} == set(world.SEEN_PAIRS)
    rng = np.random.default_rng(0)
    assert 0.08 < np.mean([world.is_held_out(world.sample_scene(rng)) for _ in range(4000)]) < 0.12
    _, _, digits_held_out = world.load_digits()
    assert digits_held_out.sum() == 400


def test_no_training_text_names_an_unseen_pair():
    rng = np.random.default_rng(0)
    for scene in scenes(500):
        texts = [text for language_ in world.LANGUAGES for text in world.captions(scene, language_)]
        for language_ in world.LANGUAGES:
            texts += [text for q in world.scene_questions(scene, language_, rng) for text in (q.question, q.answer)]
        for colour, shape in world.UNSEEN_PAIRS:
            for text in texts:
                colour_zh, shape_zh = world.CHINESE[colour], world.CHINESE[shape]
                assert f"{colour} {shape}" not in text and f"{shape} is {colour}" not in text
                assert f"{colour_zh}的{shape_zh}" not in text and f"{shape_zh}是{colour_zh}" not in text


@pytest.fixture()
def small(monkeypatch):
    """make_demo with fewer images."""
    for name, value in {"SCENES": 60, "CAPTIONED": 10, "HELD_OUT": 12}.items():
        monkeypatch.setattr(draw, name, value)
    images, labels, held_out = world.load_digits()
    few = np.concatenate([np.flatnonzero(~held_out)[:30], np.flatnonzero(held_out)[:20]])
    monkeypatch.setattr(world, "load_digits", lambda: (images[few], labels[few], held_out[few]))
    return draw.make_demo


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_draws_the_same_bytes(small, tmp_path):
    small(tmp_path / "a")
    small(tmp_path / "b")
    small(tmp_path / "c", seed=1)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and a["scenes_train.json"] != c["scenes_train.json"]


def test_the_files_have_the_layouts_of_llava_and_ai_challenger(small, tmp_path):
    counts = small(tmp_path)
    for part in ("scenes_train", "scenes_validation", "digits_train", "digits_validation"):
        records = json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8"))
        assert len(records) == counts[f"{part}.json"] and len({record["id"] for record in records}) == len(records)
        for record in records:
            turns = record["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
            image = Image.open(tmp_path / "images" / part.split("_")[0] / record["image"])
            assert image.size == (world.SIDE, world.SIDE) and image.mode == "RGB"
            assert ("type" in record) == (len(turns) == 2 and part.endswith("validation"))
    captions = json.loads((tmp_path / "captions_train.json").read_text(encoding="utf-8"))
    for record in captions:
        assert record.keys() == {"url", "image_id", "caption"} and len(set(record["caption"])) == 5
        assert (tmp_path / "images" / "scenes" / record["image_id"]).is_file()
    assert len(list((tmp_path / "test_images").rglob("*.png"))) == 12


def test_validation_has_every_type_and_a_quarter_in_chinese(small, tmp_path):
    small(tmp_path)
    records = [
        record
        for part in ("scenes", "digits")
        for record in json.loads((tmp_path / f"{part}_validation.json").read_text(encoding="utf-8"))
    ]
    for type_ in (*world.SCENE_TYPES, "unseen_pair", "digit"):
        answers = [record["conversations"][1]["value"] for record in records if record["type"] == type_]
        assert len(answers) == 12 and sum(not answer.isascii() for answer in answers) == 3


def test_records_without_images_are_half_chinese_and_answerable(small, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "TEXTS", 40)
    monkeypatch.setattr(draw, "DIALOGS", 40)
    counts = small(tmp_path)

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]

    texts, dialogs, held = (lines(name) for name in ("texts_train.jsonl", "told_train.jsonl", "told_validation.jsonl"))
    assert len(texts) == counts["texts_train.jsonl"] == 40 and sum(not one["text"].isascii() for one in texts) == 20
    assert len(dialogs) == 40 and len(held) == draw.HELD_OUT_DIALOGS * len(world.SCENE_TYPES)
    for one in dialogs + held:
        assert [turn["role"] for turn in one["conversations"]] == ["user", "assistant"] * (
            len(one["conversations"]) // 2
        )
        assert all("<image>" not in turn["content"] for turn in one["conversations"])
    assert {one["type"] for one in held} == set(world.SCENE_TYPES)
    for one in held:  # the first turn contains the answer
        asked, answer = (turn["content"] for turn in one["conversations"])
        if one["type"] == "colour":
            colour = next(colour for colour in world.COLOURS if colour in answer or world.CHINESE[colour] in answer)
            assert colour in asked or world.CHINESE[colour] in asked


def test_described_images_exist(small, tmp_path):
    counts = small(tmp_path)
    for part in ("train", "validation"):
        records = (tmp_path / f"described_{part}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(records) == counts[f"described_{part}.jsonl"] > 0
        for record in map(json.loads, records):
            question, answer = record["conversations"]
            assert question["content"].endswith("\n<image>") and answer["role"] == "assistant"
            assert (tmp_path / "images" / record["image"]).is_file()
            assert (part == "validation") == ("validation" in record["image"]) == ("type" in record)


@pytest.mark.parametrize("language", world.LANGUAGES)
def test_the_facts_are_all_answers_about_the_scene(language):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.training_scene(rng)
        asked = {question.answer for _ in range(30) for question in world.scene_questions(scene, language, rng)}
        found = world.facts(scene, language)
        assert set(found) == asked and len(found) == len(asked)


def test_complete_means_all_files_of_this_version(small, tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    assert not draw.is_complete(folder)
    small(folder)
    assert draw.is_complete(folder)
    (folder / "scenes_train.json").unlink()
    assert not draw.is_complete(folder)
    small(folder)
    monkeypatch.setattr(world, "VERSION", world.VERSION + 1)
    assert not draw.is_complete(folder)


def test_drawing_again_keeps_other_files(small, tmp_path):
    small(tmp_path / "demo")
    (tmp_path / "demo" / "qa.jsonl").write_text("mine")
    small(tmp_path / "demo", seed=1)
    assert (tmp_path / "demo" / "qa.jsonl").read_text() == "mine" and draw.is_complete(tmp_path / "demo")
    foreign = tmp_path / "foreign" / "images"
    foreign.mkdir(parents=True)
    (foreign / "holiday.jpg").write_text("mine")
    with pytest.raises(InputError, match="not the demo's data"):
        small(tmp_path / "foreign")
    assert contents(tmp_path / "foreign") == {"images/holiday.jpg": b"mine"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "language_model")


def test_a_word_is_one_token_in_every_context(tokenizer):
    for scene in scenes(40):
        for language_ in world.LANGUAGES:
            rng = np.random.default_rng(0)
            asked = world.scene_questions(scene, language_, rng)
            texts = [text for q in asked for text in (q.question, q.answer)] + world.captions(scene, language_)
            for text in texts:
                tokens = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
                assert "".join(tokens) == text
                for name in (*world.COLOURS, *world.SHAPES):
                    word = f" {name}" if language_ == "en" else world.CHINESE[name]
                    expected = len(re.findall(rf"{word}\b" if language_ == "en" else word, text))
                    assert tokens.count(word) == expected, tokens


def test_special_tokens_have_ids(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(language.SPECIALS))
    assert len(set(ids)) == len(language.SPECIALS) and None not in ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.encode("<|image_pad|>") == [ids[-1]]
    assert ids[-1] not in tokenizer.encode("<|image_pad|>", split_special_tokens=True)


def test_the_shipped_files_are_small():
    files = [path for name in ("vision_tower", "language_model") for path in (DEMO / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 10e6


def test_the_encoder_beats_a_random_one_on_held_out_images():
    encoder = CLIPVisionModel.from_pretrained(DEMO / "vision_tower", dtype=torch.float32).eval()
    processor = CLIPImageProcessor.from_pretrained(DEMO / "vision_tower")
    rng = np.random.default_rng(0)
    image = world.draw_scene(world.held_out_scene(rng), rng)
    pixels, _ = vision.batch([image], [vision.scene_labels((None,) * 4)])
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], pixels, atol=1e-6, rtol=0)
    learned, untrained = vision.probe(encoder, count=300), vision.probe(vision.new_encoder(0).eval(), count=300)
    for name in ("colour", "shape", "place"):
        assert learned[name] > 0.98, learned
    assert learned["digit"] > 0.95 and learned["digit"] > untrained["digit"] + 0.1
    assert learned["shape"] > untrained["shape"] + 0.1


def test_the_language_model_answers_about_held_out_described_scenes(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO / "language_model", dtype=torch.float32).eval()
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    scores = language.probe(model, tokenizer, batches=3)
    for name, score in scores.items():
        if name.split("/")[0] in (*world.SCENE_TYPES, "digit"):
            assert score > 0.85, scores
