"""Draw emoji in four styles as raw data with English and Chinese questions: real images for a real encoder.

    python -m demo.emoji [--output data/emoji] [--held-out-style noto] [--concepts N] [--seed 0]

A concept is an emoji that all four styles draw (no skin tone, no joined sequence); its names in both languages are those of
Unicode's CLDR. Three styles are for training, the fourth is held out: can a model name a thing in a drawing style that it
has never seen? One concept in twenty is held out too: no training answer names it.

    images/<style>/<code points>.png
    names_train.json         LLaVA list: what every training image shows, once in English and once in Chinese
    dialogs_train.json       LLaVA list: the other questions about an image as one dialog, and questions about two images
    captions_train.json      AI Challenger list: Chinese names as captions
    validation.json          LLaVA list in the held-out style: one question each, with its "type"
    validation_names.json    those of them that ask for a name
    ATTRIBUTION.md           authors and licences of the drawings

The drawings: demo/emoji_drawings.py. The names are PyPI's `emoji`. Install requirements-emoji.txt first.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import InputError, choose, run_script

if __name__ == "__main__":  # before the imports, so that a fault in them is a line too
    run_script("demo.emoji.main")

import numpy as np

from config.files import publish
from demo import require_packages
from demo.emoji_drawings import SIDE, STYLES, Icons, load_icons, plain_code

HELD_OUT_CONCEPTS = 0.05
NEAR = 6  # a wrong name is that of one of the nearest concepts in Unicode's order on each side
TURNS = (2, 3)  # numbers of questions in a dialog about a training image


GROUPS = {
    "Activities": ("activities", "活动"),
    "Animals & Nature": ("animals and nature", "动物与自然"),
    "Flags": ("flags", "旗帜"),
    "Food & Drink": ("food and drink", "食物与饮料"),
    "Objects": ("objects", "物品"),
    "People & Body": ("people and body", "人物与身体"),
    "Smileys & Emotion": ("smileys and emotion", "笑脸与情感"),
    "Symbols": ("symbols", "符号"),
    "Travel & Places": ("travel and places", "旅行与地点"),
}
# Concepts beside the group of symbols for which naming is trivial or hopeless: clock faces, flags, one shape in several
# colours. Their questions have types of their own, "symbol_...".
SYMBOL = re.compile(
    r"o’clock$|-thirty$|flag|\b(red|orange|yellow|green|blue|purple|brown|black|grey|white|pink) heart$"
)

# Kind of question -> language -> (question, answer).
SENTENCES = {
    "name": {"en": ("What is this?", "{en}"), "zh": ("这是什么？", "{zh}")},
    "yes": {"en": ("Is this {en}?", "Yes"), "zh": ("这是{zh}吗？", "是")},
    "no": {"en": ("Is this {other_en}?", "No"), "zh": ("这是{other_zh}吗？", "不是")},
    "which": {
        "en": ("Is this {first_en} or {second_en}?", "{en}"),
        "zh": ("这是{first_zh}还是{second_zh}？", "{zh}"),
    },
    "group": {"en": ("Which group does this belong to?", "{group_en}"), "zh": ("这属于哪一类？", "{group_zh}")},
    "in_chinese": {"en": ("How do you say this in Chinese?", "{zh}")},
    "same": {"en": ("Do both images show the same thing?", "Yes"), "zh": ("两张图片是同一个东西吗？", "是")},
    "different": {"en": ("Do both images show the same thing?", "No"), "zh": ("两张图片是同一个东西吗？", "不是")},
}
TYPES = {"yes": "yes_no", "no": "yes_no"}  # kind -> type; others are their own


@dataclass(frozen=True)
class Concept:
    """An emoji that all styles draw."""

    code: str  # its code points in hexadecimal, joined by "-"
    en: str
    zh: str
    group: str  # a key of GROUPS

    @property
    def is_symbol(self) -> bool:
        return self.group == "Symbols" or bool(SYMBOL.search(self.en))


def make_emoji(folder: Path, held_out_style: str, *, num_concepts: int | None = None, seed: int = 0) -> dict[str, int]:
    """Draw images and annotations into `folder`. Returns file or folder -> number of records or images.

    Images that exist already are kept, so that another held-out style needs no new drawing. Raises InputError if
    requirements-emoji.txt is not installed, a package cannot be downloaded or is not the expected one, or there are fewer
    concepts than asked for.
    """
    require_packages("emoji", "resvg_py")
    icons = {style: load_icons(style, folder / "packages") for style in STYLES}
    concepts = common_concepts(icons)
    rng = np.random.default_rng(seed)
    if num_concepts is not None:
        if not 20 <= num_concepts <= len(concepts):
            raise InputError(f"--concepts {num_concepts}: give a number from 20 to {len(concepts)}.")
        chosen = rng.choice(len(concepts), num_concepts, replace=False)
        concepts = [concepts[i] for i in sorted(chosen)]
    for style, found in icons.items():
        for concept in concepts:
            path = folder / image_path(style, concept)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                drawing = io.BytesIO()
                found.draw(concept.code).save(drawing, format="PNG")
                publish(path, drawing.getvalue())
    asker = Asker(concepts, held_out_style, rng)
    files: dict[str, list] = {
        "names_train.json": list(training_names(asker)),
        "dialogs_train.json": list(training_dialogs(asker)),
        "captions_train.json": list(training_captions(asker)),
        "validation.json": validation_questions(asker),
    }
    files["validation_names.json"] = [record for record in files["validation.json"] if asks_for_name(record)]
    for name, records in files.items():
        publish(folder / name, (json.dumps(records, ensure_ascii=False, indent=1) + "\n").encode())
    publish(folder / "ATTRIBUTION.md", attribution().encode())
    return {"images": len(STYLES) * len(concepts)} | {name: len(records) for name, records in files.items()}


def image_path(style: str, concept: Concept) -> str:
    return f"images/{style}/{concept.code}.png"


def attribution() -> str:
    """Return the text of ATTRIBUTION.md."""
    rows = [f"| {name} {style.version} | {style.author} | {style.licence} |" for name, style in STYLES.items()]
    table = "\n".join(["| drawings (npm package of @iconify-json) | author | licence |", "|---|---|---|", *rows])
    return (
        f"# Attribution\n\nThe images were drawn from these icon sets at {SIDE} x {SIDE} pixels on white.\n\n{table}\n\n"
        "Names: Unicode CLDR (Unicode licence), from the Python package emoji (BSD-3-Clause).\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Questions


class Asker:
    """Makes questions with their answers, and decides what is held out: a style, some concepts, and a few drawings of the
    other styles and concepts for questions about two images."""

    def __init__(self, concepts: Sequence[Concept], held_out_style: str, rng: np.random.Generator) -> None:
        mixed = [concepts[i] for i in rng.permutation(len(concepts))]
        count = round(HELD_OUT_CONCEPTS * len(concepts))
        self.new = mixed[:count]
        self.known = [concept for concept in concepts if concept not in self.new]
        self.held_out_style = held_out_style
        self.styles = [style for style in STYLES if style != held_out_style]
        self.withheld = {
            concept: self.styles[i % len(self.styles)] for i, concept in enumerate(mixed[count : 3 * count])
        }
        self.rng = rng
        self._place = {concept: i for i, concept in enumerate(concepts)}
        self._concepts = concepts

    def near(self, concept: Concept) -> Concept:
        """Return a random known concept that is easily confused with `concept`: a neighbour of the same group."""
        place = self._place[concept]
        around = self._concepts[max(0, place - NEAR) : place + NEAR + 1]
        others = [other for other in around if other is not concept and other not in self.new]
        same = [other for other in others if other.group == concept.group]
        return self.pick(same or others)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def ask(self, kind: str, concept: Concept, language: str | None = None) -> tuple[str, str]:
        """Return a question of `kind` and its answer; language None: a random one of those that the kind has."""
        sentences = SENTENCES[kind]
        question, answer = sentences[language or self.pick(sorted(sentences))]
        other = self.near(concept)
        first, second = (concept, other) if self.rng.random() < 0.5 else (other, concept)
        group_en, group_zh = GROUPS[concept.group]
        words = {"en": concept.en, "zh": concept.zh, "group_en": group_en, "group_zh": group_zh}
        for name, one in (("other", other), ("first", first), ("second", second)):
            words |= {f"{name}_en": one.en, f"{name}_zh": one.zh}
        return question.format(**words), answer.format(**words)


def training_names(asker: Asker) -> Iterator[dict]:
    """Yield two records about every training image: its name in English and in Chinese."""
    for style, concept in training_images(asker):
        for language in ("en", "zh"):
            turn = asker.ask("name", concept, language)
            yield dialog(f"{language}-{style}-{concept.code}", [image_path(style, concept)], [turn])


def training_dialogs(asker: Asker) -> Iterator[dict]:
    """Yield a dialog about every training image, which does not ask for its name alone; and one about two images of every
    concept: in two styles, or of two near concepts in one style."""
    for style, concept in training_images(asker):
        kinds = asker.rng.permutation(["yes", "no", "which", "group", "in_chinese"])[: asker.pick(TURNS)]
        turns = [asker.ask(kind, concept) for kind in kinds]
        yield dialog(f"{style}-{concept.code}", [image_path(style, concept)], turns)
    seen = set(training_images(asker))
    for concept in asker.known:
        first, second = (style for style in asker.styles if style != asker.withheld.get(concept, asker.styles[-1]))
        if asker.rng.random() < 0.5:
            other, kind = concept, "same"
        else:
            other, second, kind = asker.near(concept), first, "different"
        if (second, other) in seen:
            yield pair_dialog(asker, kind, images=[(first, concept), (second, other)])


def training_images(asker: Asker) -> Iterator[tuple[str, Concept]]:
    """Yield the style and concept of every training image."""
    for style in asker.styles:
        for concept in asker.known:
            if asker.withheld.get(concept) != style:
                yield style, concept


def pair_dialog(asker: Asker, kind: str, images: Sequence[tuple[str, Concept]]) -> dict:
    """Return a dialog with one question about two images, which is of the kind `same` or `different`."""
    concept = images[0][1]
    return dialog(f"{kind}-{concept.code}", [image_path(*image) for image in images], [asker.ask(kind, concept)])


def training_captions(asker: Asker) -> Iterator[dict]:
    """Yield every training image with its Chinese name as AI Challenger's caption."""
    for style, concept in training_images(asker):
        yield {"image_id": image_path(style, concept).removeprefix("images/"), "caption": [concept.zh]}


def validation_questions(asker: Asker) -> list[dict]:
    """Return single questions in the held-out style, in random order: all kinds about known concepts; those that need no
    name, as types "new_...", about held-out ones. Types of symbols begin with "symbol_"."""
    found, style = [], asker.held_out_style
    for concept in [*asker.known, *asker.new]:
        is_new = concept in asker.new
        kinds: list[tuple[str, str | None]] = [(asker.pick(("yes", "no")), None), ("group", None)]
        if not is_new:
            kinds += [("name", "en"), ("name", "zh"), ("which", None), ("in_chinese", None)]
        for kind, language in kinds:
            name = TYPES.get(kind, kind) + (f"_{language}" if language else "")
            prefix = "new_" if is_new else "symbol_" if concept.is_symbol else ""
            turns = [asker.ask(kind, concept, language)]
            record = dialog(f"{name}-{concept.code}", [image_path(style, concept)], turns)
            found.append(record | {"type": prefix + name})
        if is_new or concept in asker.withheld:
            name = "new_pair" if is_new else "pair"
            other_style = asker.pick(asker.styles) if is_new else asker.withheld[concept]
            for kind, image in (("same", (other_style, concept)), ("different", (style, asker.near(concept)))):
                found.append(pair_dialog(asker, kind, images=[(style, concept), image]) | {"type": name})
    return [found[i] for i in asker.rng.permutation(len(found))]


def asks_for_name(record: dict) -> bool:
    return record["type"].removeprefix("symbol_") in ("name_en", "name_zh")


def dialog(name: str, images: list[str], turns: Sequence[tuple[str, str]]) -> dict:
    """Return one record of a LLaVA list; the marks of its images begin the first question."""
    said = []
    for number, (question, answer) in enumerate(turns):
        marks = "<image>\n" * len(images) if number == 0 else ""
        said += [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": images[0] if len(images) == 1 else images, "conversations": said}


def common_concepts(icons: dict[str, Icons]) -> list[Concept]:
    """Return the concepts that every style draws, in Unicode's order within each group."""
    import emoji

    emoji.config.load_language("zh")
    concepts = []
    for text, entry in emoji.EMOJI_DATA.items():
        points = [ord(letter) for letter in text]
        joined = 0x200D in points or any(
            0x1F3FB <= p <= 0x1F3FF or 0x1F1E6 <= p <= 0x1F1FF or p == 0xE007F for p in points
        )
        code = plain_code("-".join(f"{p:x}" for p in points))
        if (
            entry["status"] != emoji.STATUS["fully_qualified"]
            or joined
            or not all(code in found for found in icons.values())
        ):
            continue
        en, zh = (entry[language].strip(":").replace("_", " ") for language in ("en", "zh"))
        concepts.append(Concept(code, en=en, zh=zh, group=icons["noto"].group(code)))
    return sorted(concepts, key=lambda concept: (concept.group, [int(part, 16) for part in concept.code.split("-")]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw emoji in four styles with English and Chinese questions.")
    parser.add_argument("--output", type=Path, default=Path("data/emoji"))
    parser.add_argument("--held-out-style", default="noto", help=f"one of {', '.join(STYLES)} (default: noto)")
    parser.add_argument("--concepts", type=int, help="draw only so many, chosen by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choose(STYLES, arguments.held_out_style, "--held-out-style")
    counts = make_emoji(
        arguments.output, arguments.held_out_style, num_concepts=arguments.concepts, seed=arguments.seed
    )
    for name, count in counts.items():
        print(f"{arguments.output / name}: {count}")
    return 0
