"""Draw the demo's raw data: images, and annotation files in the layouts of real data sets.

    python -m demo.draw [--folder data/demo] [--seed 0]

    scenes_*.json, digits_*.json   LLaVA lists: dialogs about images
    captions_train.json            AI Challenger list: images with captions
    texts_train.jsonl              plain texts: a caption of a scene, then all facts about it
    told_*.jsonl                   dialogs without an image: a caption of a scene, then questions about it
    described_*.jsonl              images with all facts: every training image and some held-out ones

The files are raw data and go through `dataprocess.process_image` like any other. Validation records have one question
each and its "type", which is "unseen_pair" if the question is about an object that no training image shows. The JSON
Lines are for a language model from scratch. This module decides how much is drawn and where it is stored; `demo.world`
defines the images and sentences.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from config import InputError, run_script

if __name__ == "__main__":  # before the imports, so that a fault in them is a line too
    run_script("demo.draw.main")

import numpy as np

from demo import world

SCENES = 3600  # training images of scenes
CAPTIONED = 240  # training images that also have captions
TURNS = (4, 6)  # smallest and largest number of questions about a training image
HELD_OUT = 240  # validation questions of each type
TEXTS, DIALOGS = 4000, 2000  # records without an image; half of both are Chinese
HELD_OUT_DIALOGS = 48  # validation dialogs without an image, of each type
DESCRIBE = {"en": "Describe the picture.", "zh": "图片里有什么？"}  # the first question of some dialogs; not scored
CHINESE_SHARE = 0.3  # of the training dialogs; one validation question in four is Chinese
MARKER = "demo.json"
ENTRIES = ("images", "test_images", "scenes_train.json", "scenes_validation.json", "digits_train.json",
           "digits_validation.json", "captions_train.json", "texts_train.jsonl", "told_train.jsonl",
           "told_validation.jsonl", "described_train.jsonl", "described_validation.jsonl")  # fmt: skip


def is_complete(folder: str | Path) -> bool:
    """True if `folder` contains all of the demo data, drawn by this version of the world."""
    folder = Path(folder)
    try:
        version = json.loads((folder / MARKER).read_text(encoding="utf-8")).get("version")
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return version == world.VERSION and all((folder / name).exists() for name in ENTRIES)


def make_demo(folder: str | Path, seed: int = 0) -> dict[str, int]:
    """Draw the demo data into `folder` and replace existing demo data; other files stay. Returns file -> records.

    The same seed gives the same bytes. Everything is drawn in a temporary folder and moved at the end; the marker file
    comes last. Raises InputError if `folder` has a file or folder of the same name that this function did not make.
    """
    folder = Path(folder)
    taken = [name for name in ENTRIES if (folder / name).exists()]
    if taken and not (folder / MARKER).exists():
        raise InputError(f"{folder}: found {taken[0]} but no {MARKER}: not the demo's data; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder))
    try:
        counts = _draw(aside, seed)
        _mark(folder, {"version": None, "seed": seed})
        for name in ENTRIES:
            target = folder / name
            if target.is_dir():
                shutil.rmtree(target)
            (aside / name).replace(target)
        _mark(folder, {"version": world.VERSION, "seed": seed, "records": counts})
    finally:
        shutil.rmtree(aside)
    return counts


def _mark(folder: Path, content: dict) -> None:
    aside = folder / f"{MARKER}.new"
    aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
    aside.replace(folder / MARKER)


def _draw(folder: Path, seed: int) -> dict[str, int]:
    """Write everything in ENTRIES into `folder`."""
    for name in ("images/scenes", "images/digits", "test_images/scenes", "test_images/digits"):
        (folder / name).mkdir(parents=True)
    digits, labels, held_out = world.load_digits()
    # One generator per part, so that the size of one part never changes another part.
    rngs = [np.random.default_rng([seed, part]) for part in range(9)]
    scene_images, digit_images = folder / "images" / "scenes", folder / "images" / "digits"
    train = digits[~held_out], labels[~held_out]
    validation = digits[held_out][:HELD_OUT], labels[held_out][:HELD_OUT]
    scenes, captions, drawn = _training_scenes(scene_images, rngs[0])
    held_scenes, held_drawn = _validation_scenes(scene_images, rngs[1])
    files = {
        "scenes_train.json": scenes,
        "captions_train.json": captions,
        "scenes_validation.json": held_scenes,
        "digits_train.json": _digits(digit_images, *train, part="train", rng=rngs[2]),
        "digits_validation.json": _digits(digit_images, *validation, part="validation", rng=rngs[3]),
    }
    for name, records in files.items():
        (folder / name).write_text(json.dumps(records, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    lines = {
        "texts_train.jsonl": _texts(rngs[6]),
        "told_train.jsonl": _text_dialogs(rngs[7]),
        "told_validation.jsonl": _validation_text_dialogs(rngs[8]),
        "described_train.jsonl": _described(drawn, train[1]),
        "described_validation.jsonl": held_drawn,
    }
    for name, records in lines.items():
        written = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / name).write_text(written, encoding="utf-8")
    files |= lines
    for i in range(8):  # the last two show an object that no training image shows
        scene = world.held_out_scene(rngs[4], unseen=i >= 6)
        world.draw_scene(scene, rngs[4]).save(folder / "test_images" / "scenes" / f"scene_{i}.png")
    for i, digit in enumerate(digits[held_out][HELD_OUT : HELD_OUT + 4]):
        world.draw_digit(digit, rngs[5]).save(folder / "test_images" / "digits" / f"digit_{i}.png")
    return {name: len(records) for name, records in files.items()}


def _llava(name: str, image: str, questions: list[world.Question], **extra: str) -> dict:
    """One record in LLaVA's layout, with `<image>` before the first question."""
    turns = []
    for k, question in enumerate(questions):
        mark = "<image>\n" if k == 0 else ""
        turns.append({"from": "human", "value": mark + question.question})
        turns.append({"from": "gpt", "value": question.answer})
    return {"id": name, "image": image, "conversations": turns, **extra}


def _training_scenes(folder: Path, rng: np.random.Generator) -> tuple[list[dict], list[dict], list[world.Scene]]:
    """Training dialogs about scenes, the captions of the first CAPTIONED images, and the scene of each image."""
    records, captions, scenes = [], [], []
    for i in range(SCENES):
        name = f"train_{i:05d}"
        scene = world.training_scene(rng)
        world.draw_scene(scene, rng).save(folder / f"{name}.png")
        scenes.append(scene)
        language = "zh" if rng.random() < CHINESE_SHARE else "en"
        asked = world.scene_questions(scene, language, rng)
        questions = world.choose_questions(asked, int(rng.integers(TURNS[0], TURNS[1] + 1)), rng)
        if i < 2 * CAPTIONED and language == "en":
            english = world.captions(scene, "en")
            questions.insert(0, world.Question("caption", DESCRIBE["en"], english[i % len(english)]))
        records.append(_llava(name, f"{name}.png", questions))
        if i < CAPTIONED:
            chinese = world.captions(scene, "zh")
            captions.append({"url": f"demo://scenes/{name}.png", "image_id": f"{name}.png", "caption": chinese})
    return records, captions, scenes


def _validation_scenes(folder: Path, rng: np.random.Generator) -> tuple[list[dict], list[dict]]:
    """HELD_OUT questions of every type, each about its own held-out image; and the facts of every fifth image.

    Every fourth question is in Chinese. Images with an unseen pair get no facts.
    """
    records, described = [], []
    for type_ in (*world.SCENE_TYPES, "unseen_pair"):
        for i in range(HELD_OUT):
            asked: list[world.Question] = []
            while not asked:  # not every scene has a question of every type
                scene = world.held_out_scene(rng, unseen=type_ == "unseen_pair")
                asked = world.scene_questions(scene, "zh" if i % 4 == 3 else "en", rng)
                if type_ == "unseen_pair":  # only questions that need the pair: its colour or its shape
                    asked = [q for q in asked if q.type in ("colour", "shape") and _is_about_unseen_pair(q, scene)]
                else:
                    asked = [q for q in asked if q.type == type_]
            name = f"validation_{type_}_{i:03d}"
            world.draw_scene(scene, rng).save(folder / f"{name}.png")
            records.append(_llava(name, f"{name}.png", [asked[rng.integers(len(asked))]], type=type_))
            if i % 5 == 0 and type_ != "unseen_pair":
                language = world.LANGUAGES[i % 2]
                described.append(
                    _description(f"scenes/{name}.png", language, _facts(scene, language)) | {"type": "described"}
                )
    return records, described


def _is_about_unseen_pair(question: world.Question, scene: world.Scene) -> bool:
    return question.about is not None and scene[question.about] in world.UNSEEN_PAIRS


def _digits(folder: Path, digits: np.ndarray, labels: np.ndarray, *, part: str, rng: np.random.Generator) -> list[dict]:
    """One question about each digit image. In training, every third dialog first asks for a description.

    The description has the same answer as the question.
    """
    records = []
    for i, (digit, label) in enumerate(zip(digits, labels, strict=True)):
        name = f"{part}_{i:05d}"
        world.draw_digit(digit, rng).save(folder / f"{name}.png")
        chinese = rng.random() < CHINESE_SHARE if part == "train" else i % 4 == 3
        language = "zh" if chinese else "en"
        question = world.digit_question(int(label), language)
        asked = [question]
        if part == "train" and i % 3 == 0:
            asked.insert(0, question._replace(question=DESCRIBE[language]))
        records.append(_llava(name, f"{name}.png", asked, **({} if part == "train" else {"type": "digit"})))
    return records


def _texts(rng: np.random.Generator) -> list[dict]:
    """Texts in minimind's layout: a caption of a training scene, then all facts about it."""
    records = []
    for i in range(TEXTS):
        scene, language = world.training_scene(rng), world.LANGUAGES[i % 2]
        caption = world.captions(scene, language)[rng.integers(5)]
        records.append({"text": caption + (" " if language == "en" else "") + _facts(scene, language)})
    return records


def _facts(scene: world.Scene, language: str) -> str:
    """All facts about the scene as one text."""
    return (" " if language == "en" else "").join(world.facts(scene, language))


def _description(image: str, language: str, answer: str) -> dict:
    """One record in SVLM-Data's layout: an image with its description."""
    question = {"role": "user", "content": f"{DESCRIBE[language]}\n<image>"}
    return {"image": image, "conversations": [question, {"role": "assistant", "content": answer}]}


def _described(scenes: list[world.Scene], digits: np.ndarray) -> list[dict]:
    """Every training image with all facts about it, half of them in Chinese."""
    records = []
    for i, scene in enumerate(scenes):
        language = world.LANGUAGES[i % 2]
        records.append(_description(f"scenes/train_{i:05d}.png", language, _facts(scene, language)))
    for i, digit in enumerate(digits):
        language = world.LANGUAGES[i % 2]
        answer = world.digit_question(int(digit), language).answer
        records.append(_description(f"digits/train_{i:05d}.png", language, answer))
    return records


def _text_dialogs(rng: np.random.Generator) -> list[dict]:
    """Dialogs without an image, about training scenes and digits that the first question describes in words."""
    records = []
    for i in range(DIALOGS):
        language = world.LANGUAGES[i % 2]
        if i % 8 >= 6:
            question = world.digit_question(int(rng.integers(10)), language)
            records.append(_dialog(question.answer, [question]))
            continue
        scene = world.training_scene(rng)
        caption = world.captions(scene, language)[rng.integers(5)]
        asked = world.choose_questions(world.scene_questions(scene, language, rng), TURNS[1], rng)
        records.append(_dialog(caption, asked))
    return records


def _validation_text_dialogs(rng: np.random.Generator) -> list[dict]:
    """HELD_OUT_DIALOGS questions of every type about held-out scenes described in words, every fourth in Chinese."""
    records = []
    for type_ in world.SCENE_TYPES:
        for i in range(HELD_OUT_DIALOGS):
            language = "zh" if i % 4 == 3 else "en"
            asked: list[world.Question] = []
            while not asked:  # not every scene has a question of every type
                scene = world.held_out_scene(rng)
                asked = [q for q in world.scene_questions(scene, language, rng) if q.type == type_]
            caption = world.captions(scene, language)[rng.integers(5)]
            records.append(_dialog(caption, [asked[rng.integers(len(asked))]], type=type_))
    return records


def _dialog(description: str, questions: list[world.Question], **extra: str) -> dict:
    """One record in SVLM-Data's layout, with the description before the first question."""
    turns = []
    for k, question in enumerate(questions):
        turns.append({"role": "user", "content": question.question if k else f"{description}\n{question.question}"})
        turns.append({"role": "assistant", "content": question.answer})
    return {"conversations": turns, **extra}


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the demo's raw data.")
    parser.add_argument("--folder", default="data/demo")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = make_demo(arguments.folder, arguments.seed)
    print(f"{arguments.folder}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return 0
