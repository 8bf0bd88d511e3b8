"""The emoji report: its numbers against other ways to compute them, its files, its messages.

Run: python -m pytest tests/demo/test_emoji_report.py
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import RidgeClassifier

import test
from config import InputError, run_script
from demo import emoji as drawn
from demo import emoji_report as report
from demo.emoji import GROUPS, Asker, Concept, image_path
from demo.emoji_baselines import ALPHAS, EmojiData, concept_of, name_by_features, read_emoji, style_of
from demo.emoji_drawings import STYLES
from demo.emoji_sheet import draw_sheet, find_font, wrapped
from demo.emoji_tables import share, wrong_names
from model.answer import Answer, Answerer
from tests.toy_project import fresh_accelerate, run_training, write_project
from tests.toy_towers import write_dinov2_registers, write_siglip
from visual.encoders import load_vision_tower
from visual.images import read_image
from visual.processor import load_image_processor

CONCEPTS = [
    Concept(f"1f{i:03x}", en=f"thing {i}", zh=f"东西{i}", group=list(GROUPS)[i // 10 + 4 * (i >= 30)])
    for i in range(40)
]  # ten in each of four groups, the last of which is Symbols
FONT = find_font(None)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    """The emoji data of CONCEPTS: in each style a concept has the same blocks of colour, with some noise."""
    folder, rng = tmp_path_factory.mktemp("emoji"), np.random.default_rng(0)
    for concept in CONCEPTS:
        blocks = rng.integers(0, 256, (4, 4, 3))
        for style in STYLES:
            noisy = (blocks + rng.integers(-30, 31, blocks.shape)).clip(0, 255).astype(np.uint8)
            path = folder / image_path(style, concept)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.repeat(14, 0).repeat(14, 1)).save(path)
    asker = Asker(CONCEPTS, held_out_style="noto", rng=np.random.default_rng(0))
    (folder / "names_train.json").write_text(json.dumps([*drawn.training_names(asker)]))
    (folder / "validation.json").write_text(json.dumps(drawn.validation_questions(asker)))
    return folder


@pytest.fixture(scope="module")
def data(emoji) -> EmojiData:
    return read_emoji(emoji)


@pytest.fixture(scope="module")
def run(emoji, tmp_path_factory) -> Path:
    """The folder of a short run whose final checkpoint test.py has asked the emoji's questions, with `see` as its model."""
    path = write_project(tmp_path_factory.mktemp("project"), tower="dinov2")
    run_training(path, "train.max_steps=1", "train.eval_steps=null", "train.save_steps=null", "train.score_samples=1")
    roles = {"human": "user", "gpt": "assistant"}
    lines = []
    for record in json.loads((emoji / "validation.json").read_text()):
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
        lines.append(json.dumps({**record, "id": f"held-out:{record['id']}", "conversations": turns}))
    qa = emoji / "validation.jsonl"
    qa.write_text("\n".join(lines) + "\n")
    final = path.parent / "run" / "final"
    with fresh_accelerate(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Answerer, "answer_all", see)
        patch.chdir(emoji)
        assert test.main(["--checkpoint", str(final), "--qa", qa.name]) == 0
    return final.parent


def see(self, requests, batch_size, progress) -> list[Answer]:
    """Stand in for a model that names what it is shown, but takes every third concept for the one before it."""

    def said(request) -> str:
        number = int(concept_of(request.images[0]), 16) % 0x100
        seen = CONCEPTS[number - (number % 3 == 0)]
        question = "".join(part for part in request.turns[-1][1] if isinstance(part, str)).strip()
        known = {"What is this?": seen.en, "这是什么？": seen.zh, "这属于哪一类？": GROUPS[seen.group][1]}
        return known.get(question, "Yes")

    return [Answer(said(request), 0.0) for request in requests]


def message(capsys, *arguments: object) -> str:
    """Run the report, which must end with exit code 2, and return stderr."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: report.main([*map(str, arguments)]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# ---------------------------------------------------------------------------------------------------------------------
# The whole report


def test_the_report_counts_test_pys_answers(run, emoji, tmp_path, monkeypatch, capsys):
    final, output = run / "final", tmp_path / "out"
    monkeypatch.chdir(tmp_path)  # test.py was run in another folder, and its paths were relative to that
    assert report.main(["--checkpoint", str(final), "--emoji", str(emoji), "--output", str(output)]) == 0
    values = json.loads((output / "report.json").read_text())
    scores = json.loads((run / "answers" / "scores.json").read_text())
    found = {entry["type"]: entry for entry in values["questions"]}
    assert found.keys() == scores["by_type"].keys()
    for kind, expected in scores["by_type"].items():
        assert found[kind]["correct"]["n"] == expected["n"]
        assert found[kind]["correct"]["percent"] == pytest.approx(100 * expected["accuracy"])
        if expected["blind"] is not None:
            assert found[kind]["blind"]["percent"] == pytest.approx(100 * expected["blind"])
    assert values["held_out_style"] == "noto" and f"--checkpoint {final}" in values["command"]
    assert (output / "report.md").read_text().strip() in capsys.readouterr().out
    names = found["name_en"]
    assert names["ridge"]["n"] == names["nearest"]["n"] == names["correct"]["n"]
    assert names["ridge"]["percent"] > 80  # blocks of colour are easy
    assert 50 < names["correct"]["percent"] < 80 and names["blind"]["percent"] < 10
    assert names["wrong"] == names["correct"]["n"] - names["correct"]["right"] and names["right_group"]["right"] > 0
    page = (output / "answers.html").read_text(encoding="utf-8")
    assert page.count('<dd class="right"') + page.count('<dd class="wrong"') == 50 and 'class="wrong"' in page
    assert page.count("with another image:") == 50 and page.count("<img") >= 40
    sheet = output / "answers.png"
    assert sheet.exists() == (FONT is not None)
    # once computed, the baselines are read; other answers are shown with another seed
    (stored,) = (emoji / "baselines").iterdir()
    kept = json.loads(stored.read_text())
    stored.write_text(json.dumps({"patches": kept["patches"] | {"ridge": dict.fromkeys(kept["patches"]["ridge"], "")}}))
    try:
        again = ["--checkpoint", str(final), "--emoji", str(emoji), "--output", str(output), "--seed", "1"]
        assert report.main(again) == 0
    finally:
        stored.unlink()
    values = json.loads((output / "report.json").read_text())
    assert {entry["ridge"]["right"] for entry in values["questions"] if "ridge" in entry} == {0}
    assert (output / "answers.html").read_text(encoding="utf-8") != page


def test_baselines_need_no_checkpoint(run, emoji, capsys):
    assert report.main(["--baselines-only", "--config", str(run.parent / "config.yaml"), "--emoji", str(emoji)]) == 0
    printed = capsys.readouterr().out
    assert "| class token and mean of patches |" in printed and "| mean of patches |" in printed


def test_answers_of_another_checkpoint_or_none_are_refused(run, emoji, tmp_path, capsys):
    asked = tmp_path / "run"
    shutil.copytree(run, asked)
    given = ("--checkpoint", asked / "final", "--emoji", emoji)
    advice = f"run python test.py --checkpoint {asked / 'final'} --qa {emoji / 'validation.jsonl'}"
    scores = asked / "answers" / "scores.json"
    values = json.loads(scores.read_text())
    scores.write_text(json.dumps(values | {"checkpoint_sha256": "0" * 64}))
    assert "not this checkpoint's" in (error := message(capsys, *given)) and advice in error
    scores.write_text("{")
    assert "not answers of test.py --qa" in (error := message(capsys, *given)) and advice in error
    scores.write_text(json.dumps(values))
    (asked / "answers" / "answers.jsonl").write_text("")
    assert "no answer to a question for the name" in message(capsys, *given)
    shutil.rmtree(asked / "answers")
    error = message(capsys, *given)
    assert f"{asked / 'answers' / 'answers.jsonl'}: cannot be read" in error and advice in error
    assert "--baselines-only" in message(capsys, "--emoji", emoji)
    assert "--font" in message(
        capsys, "--checkpoint", run / "final", "--emoji", emoji, "--font", scores.parent / "no.ttf"
    )
    assert "give 0 or" in message(capsys, *given, "--seed", -1)
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0 and "--baselines-only" in capsys.readouterr().out


def test_a_folder_without_emoji_data_is_refused(run, emoji, tmp_path, capsys):
    advice = "python -m demo.emoji --output DIR"
    error = message(capsys, "--checkpoint", run / "final", "--emoji", tmp_path)
    assert f"{tmp_path / 'names_train.json'}: cannot be read" in error and advice in error
    for name in ("names_train.json", "validation.json"):
        shutil.copy(emoji / name, tmp_path / name)
    records = json.loads((tmp_path / "validation.json").read_text())
    (tmp_path / "validation.json").write_text(json.dumps(records).replace("noto", "openmoji"))
    assert "do not belong together" in message(capsys, "--checkpoint", run / "final", "--emoji", tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps(records).replace("thing 7", "thing seven"))
    names = (tmp_path / "names_train.json").read_text()
    (tmp_path / "names_train.json").write_text(names.replace('"thing 7"', '"thing seven"'))
    assert "under this name" in message(capsys, "--checkpoint", run / "final", "--emoji", tmp_path)
    (tmp_path / "names_train.json").write_text("[{}]")
    assert "not the emoji data of this version" in message(capsys, "--checkpoint", run / "final", "--emoji", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def test_baselines_learn_from_the_images_that_training_names(data):
    asker = Asker(CONCEPTS, held_out_style="noto", rng=np.random.default_rng(0))
    expected = {image_path(style, concept) for style, concept in drawn.training_images(asker)}
    assert set(data.training) == expected and len(data.training) == len(expected)
    withheld = {image_path(style, concept) for concept, style in asker.withheld.items()}
    assert withheld and not withheld & set(data.training)
    known = {concept.code: concept for concept in asker.known}
    assert data.held_out == {code: image_path("noto", concept) for code, concept in known.items()}
    assert data.names == {code: {"en": concept.en, "zh": concept.zh} for code, concept in known.items()}
    assert data.groups == {code: concept.group for code, concept in known.items()}


def random_features(data: EmojiData) -> np.ndarray:
    """Features of which some dimensions say the concept, the largest the style, and the others nothing."""
    rng, images = np.random.default_rng(0), [*data.training, *data.held_out.values()]
    of = {name: rng.normal(size=12) for name in sorted({*map(concept_of, images), *STYLES})}
    parts = [[of[concept_of(image)], 20 * of[style_of(image)], rng.normal(size=12)] for image in images]
    return np.array([np.concatenate(part) + 0.6 * rng.normal(size=36) for part in parts])


def test_nearest_is_the_largest_cosine_of_standardised_features(data):
    features, count = random_features(data), len(data.training)
    found = name_by_features(data, features)["nearest"]
    scaled = (features - features[:count].mean(0)) / features[:count].std(0)
    for concept, row in zip(data.held_out, scaled[count:], strict=True):
        cosines = [row @ other / np.linalg.norm(row) / np.linalg.norm(other) for other in scaled[:count]]
        assert found[concept] == concept_of(data.training[int(np.argmax(cosines))])


def test_the_held_out_style_does_not_choose_ridges_alpha(data):
    features, count = random_features(data), len(data.training)
    found = name_by_features(data, features)
    changed = features.copy()
    changed[count:] = np.random.default_rng(1).normal(size=changed[count:].shape)
    assert name_by_features(data, changed)["alpha"] == found["alpha"]
    concepts = np.array([concept_of(image) for image in data.training])
    styles = np.array([style_of(image) for image in data.training])

    def right(alpha: float) -> int:
        total = 0
        for style in set(styles):
            fit = features[:count][styles != style]
            mean, std = fit.mean(0), fit.std(0)
            ridge = RidgeClassifier(alpha).fit((fit - mean) / std, concepts[styles != style])
            guess = ridge.predict((features[:count][styles == style] - mean) / std)
            total += int((guess == concepts[styles == style]).sum())
        return total

    totals = [right(alpha) for alpha in ALPHAS]
    assert found["alpha"] == ALPHAS[int(np.argmax(totals))] and len(set(totals)) > 3
    mean, std = features[:count].mean(0), features[:count].std(0)
    ridge = RidgeClassifier(found["alpha"]).fit((features[:count] - mean) / std, concepts)
    assert list(found["ridge"].values()) == list(ridge.predict((features[count:] - mean) / std))


@pytest.mark.parametrize("write", [write_dinov2_registers, write_siglip])
def test_features_are_the_class_token_and_the_mean_of_patches(write, data, tmp_path):
    path = write(tmp_path / "tower")
    tower, processor = load_vision_tower(path, -2), load_image_processor(path)
    few = EmojiData(data.folder, data.training[:17], dict([*data.held_out.items()][:2]), names={}, groups={})
    found = report.encode(few, tower, processor)
    images = [read_image(data.folder / image) for image in [*few.training, *few.held_out.values()]]
    with torch.no_grad():
        pixels = processor(images)
        patches = load_vision_tower(path, -2)(pixels).mean(1)
        tokens = load_vision_tower(path, -2).model(pixels).last_hidden_state
    assert torch.allclose(torch.from_numpy(found["patches"]), patches, atol=1e-5)
    if write is write_siglip:
        assert found.keys() == {"patches"}  # it has no class token
    else:
        both = torch.cat([tokens[:, 0], patches], dim=1)
        assert torch.allclose(torch.from_numpy(found["class_and_patches"]), both, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 27.75), (5, 10, 23.66, 76.34), (10, 10, 72.25, 100.0), (81, 263, 25.53, 36.62)],
)  # Newcombe 1998 (81 of 263), and the formula's values at its ends
def test_intervals_are_wilsons(right, count, low, high):
    found = share(right, count)
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    assert share(0, 0)["percent"] is None


def test_wrong_names_are_of_the_right_group_another_or_none(data):
    groups = {group: [concept for concept in data.names if data.groups[concept] == group] for group in GROUPS}
    first, second, *_ = (members for members in groups.values() if members)
    wrong = [(first[0], first[1]), (first[0], second[0]), (first[2], None), (second[1], second[0])]
    found = wrong_names(data, wrong)
    assert (found["wrong"], found["no_name"]) == (4, 1)
    assert (found["right_group"]["right"], found["right_group"]["n"]) == (2, 3)
    others = len(data.names) - 1
    chance = sum(len(group) - 1 for group in (first, first, second)) / 3 / others
    assert found["chance"] == pytest.approx(100 * chance)
    assert wrong_names(data, [])["chance"] is None


def answer(data: EmojiData, shown: str, said: str, kind: str = "name_en", blind: str | None = "nothing") -> dict:
    reference = data.names[shown][kind[-2:]]
    row = {"image": str(data.folder / data.held_out[shown]), "question": "?", "answer": said, "reference": reference}
    return row | {"correct": said == reference, "type": kind, "blind": blind}


def test_an_entry_counts_answers_blind_answers_and_baselines_on_the_same_concepts(data):
    shown = [concept for concept in data.names if data.groups[concept] == "Activities"][:3]
    name = [data.names[concept]["en"] for concept in shown]
    rows = [
        answer(data, shown[0], name[0], blind=name[0]),
        answer(data, shown[1], name[0], blind=""),
        answer(data, shown[2], "thing nobody knows", blind=None),
        answer(data, shown[0], "x", kind="name_zh"),
    ]
    guesses = dict(zip(shown, (shown[0], shown[1], shown[0]), strict=True))
    baselines = {"class_and_patches": {"nearest": dict.fromkeys(shown, ""), "ridge": guesses, "alpha": 1.0}}
    entry = report.entry_of("", "name_en", rows, data=data, baselines=baselines)
    assert (entry["correct"]["right"], entry["correct"]["n"]) == (1, 3)
    assert (entry["blind"]["right"], entry["blind"]["n"]) == (1, 2)
    assert (entry["ridge"]["right"], entry["nearest"]["right"]) == (2, 0)
    assert (entry["wrong"], entry["no_name"], entry["right_group"]["right"]) == (2, 1, 1)
    assert report.entry_of("symbol_", "name_en", rows, data=data, baselines=baselines) is None


# ---------------------------------------------------------------------------------------------------------------------
# Shown answers


def test_shown_answers_are_half_chinese_and_chosen_by_the_seed():
    kinds = ["name_en", "name_zh", "symbol_name_en"]
    rows = [{"type": kind, "id": f"{kind}-{i}", "correct": i % 2 == 0} for kind in kinds for i in range(60)]
    chosen = report.choose_rows(rows, 3)
    assert [row["type"] for row in chosen].count("name_en") == [row["type"] for row in chosen].count("name_zh") == 25
    assert len({row["id"] for row in chosen}) == 50
    assert chosen == report.choose_rows(rows, 3) != report.choose_rows(rows, 4)
    flipped = [row | {"correct": not row["correct"]} for row in rows]  # whether an answer is right decides nothing
    assert [row["id"] for row in report.choose_rows(flipped, 3)] == [row["id"] for row in chosen]
    assert len(report.choose_rows(rows[:60], 0)) == 50 and len(report.choose_rows(rows[:7], 0)) == 7


@pytest.mark.skipif(FONT is None, reason="no font with Chinese characters is installed")
def test_the_sheet_is_small_and_shows_each_image(monkeypatch):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)) for _ in range(7)]
    rows = [{"answer": "答" * 40, "reference": "a b " * 30, "blind": None, "correct": i % 2 == 0} for i in range(7)]
    assert len(draw_sheet(rows, images, title="t", font=FONT)) > 32_000
    monkeypatch.setattr("demo.emoji_sheet.MAX_BYTES", 32_000)
    assert len(draw_sheet(rows, images, title="t", font=FONT)) <= 32_000
    plain = draw_sheet(rows[:2], [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")], title="t", font=FONT)
    with Image.open(io.BytesIO(plain)) as sheet:
        pixels = {pixel for _, pixel in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 0, 255)} <= pixels
    lines = wrapped("a pair of scissors and a very long tail 剪刀剪刀剪刀剪刀剪刀剪刀剪刀", FONT, width=90, most=3)
    assert len(lines) == 3 and lines[-1].endswith("…") and all(FONT.getlength(line) <= 90 for line in lines)
    assert wrapped("scissors", FONT, width=90, most=1) == ["scissors"]


def test_a_font_without_chinese_characters_is_refused(monkeypatch):
    path = pytest.importorskip("matplotlib").get_data_path() + "/fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(InputError, match="no Chinese characters"):
        find_font(path)
    monkeypatch.setattr("demo.emoji_sheet.FONTS", ("no-such-font.ttc",))
    assert find_font(None) is None
