"""The demo's little world: pictures that are drawn, and every question whose answer the drawing decides.

A scene has four corners; each is empty or holds one object, a (colour, shape) pair. A digit picture is one handwritten
digit of scikit-learn's `load_digits`, enlarged. This module draws, asks in English ("en") and Chinese ("zh"), and says
what is held out. It must not know of files, tokenizers or models. Everything random takes a `numpy` generator.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

VERSION = 3  # raise it whenever a picture or a sentence changes: demo data drawn by another version is drawn again
SIDE = 60  # pixels
LANGUAGES = ("en", "zh")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# In no training picture and no training text:
UNSEEN_PAIRS = (("red", "star"), ("blue", "cross"), ("yellow", "triangle"))
SEEN_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in UNSEEN_PAIRS)

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "white": "白色",
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字形",
    "top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角",
}  # fmt: skip
NUMBERS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
}
HOW_MANY = {"zh": ("", "一", "两", "三", "四")}  # Chinese counts with another "two" than it reads digits with

# Kind of answer -> language -> (question, answer). An answer names what was asked about before what is said of it.
SENTENCES = {
    "colour": {
        "en": ("What colour is the {shape}?", "The {shape} is {colour}."),
        "zh": ("{shape}是什么颜色？", "{shape}是{colour}的。"),
    },
    "shape": {
        "en": ("What shape is the {colour} object?", "It is a {colour} {shape}."),
        "zh": ("{colour}的物体是什么形状？", "是{colour}的{shape}。"),
    },
    "place": {
        "en": ("Where is the {shape}?", "The {shape} is {place}."),
        "zh": ("{shape}在哪里？", "{shape}在{place}。"),
    },
    "yes": {
        "en": ("Is there a {shape}?", "A {shape}? Yes."),
        "zh": ("有{shape}吗？", "{shape}？有。"),
    },
    "no": {
        "en": ("Is there a {shape}?", "A {shape}? No."),
        "zh": ("有{shape}吗？", "{shape}？没有。"),
    },
    "one": {
        "en": ("How many objects are there?", "There is one object."),
        "zh": ("有几个物体？", "有{number}个物体。"),
    },
    "count": {
        "en": ("How many objects are there?", "There are {number} objects."),
        "zh": ("有几个物体？", "有{number}个物体。"),
    },
    "digit": {
        "en": ("Which digit is this?", "This is the digit {number}."),
        "zh": ("这是数字几？", "这是数字{number}。"),
    },
}
SCENE_TYPES = ("colour", "shape", "count", "place", "yes_no")
CAPTION_OPENINGS = {
    "en": ("The picture shows", "There is", "We see", "Here is", "It has"),
    "zh": ("图中", "画面里", "可以看到", "这里", "我们看到"),
}

RGB = {
    "red": (215, 45, 40), "green": (40, 165, 65), "blue": (45, 90, 225),
    "yellow": (240, 210, 50), "purple": (150, 60, 185), "white": (240, 240, 240),
}  # fmt: skip

Pair = tuple[str, str]
Scene = tuple[Pair | None, Pair | None, Pair | None, Pair | None]  # one entry a place, in the order of PLACES


class Question(NamedTuple):
    """One question with its only right answer. `about`: index in PLACES of the object it is about, or None."""

    type: str
    question: str
    answer: str
    about: int | None = None


def sample_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """One to four objects at random places. With `unseen`, exactly one of them is one of UNSEEN_PAIRS; else none is."""
    places = rng.permutation(len(PLACES))[: rng.integers(1, len(PLACES) + 1)]
    scene: list[Pair | None] = [None] * len(PLACES)
    for i in places:
        scene[i] = SEEN_PAIRS[rng.integers(len(SEEN_PAIRS))]
    if unseen:
        scene[places[0]] = UNSEEN_PAIRS[rng.integers(len(UNSEEN_PAIRS))]
    return tuple(scene)


def is_held_out(scene: Scene) -> bool:
    """True for one scene in ten, chosen by a hash of what stands where: no training may draw or describe it."""
    content = "|".join("-" if pair is None else " ".join(pair) for pair in scene)
    return hashlib.sha256(content.encode()).digest()[0] % 10 == 0


def has_unseen_pair(scene: Scene) -> bool:
    """True when an object of the scene is one of UNSEEN_PAIRS."""
    return any(pair in UNSEEN_PAIRS for pair in scene)


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene that training may see: not held out, without unseen pairs."""
    while is_held_out(scene := sample_scene(rng)):
        pass
    return scene


def held_out_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """A scene that no training saw: held out by its hash, or (`unseen`) with an object that no training saw."""
    while not is_held_out(scene := sample_scene(rng, unseen)) and not unseen:
        pass
    return scene


# Pictures


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y), without the circle, which has none."""
    if shape == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        points = [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "cross":
        a = 0.32
        quarter = [(-a, -1.0), (a, -1.0), (a, -a)]  # and three more, each turned by 90 degrees
        points = [*quarter, *((-y, x) for x, y in quarter)]
        points += [(-x, -y) for x, y in points]
    else:  # star
        angles = np.arange(10) * np.pi / 5
        lengths = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        points = [(float(np.sin(t) * r), float(-np.cos(t) * r)) for t, r in zip(angles, lengths, strict=True)]
    return [(x + radius * px, y + radius * py) for px, py in points]


def _with_noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.int16) + rng.integers(-3, 4, (SIDE, SIDE, 3), dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture of SIDE x SIDE. The generator decides size, exact place, tint and noise."""
    scale = 4  # drawn larger, then reduced: smooth edges
    shade = int(rng.integers(35, 76))
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), (shade, shade, shade))
    pen = ImageDraw.Draw(canvas)
    for place, pair in enumerate(scene):
        if pair is None:
            continue
        colour, shape = pair
        radius = rng.uniform(0.16, 0.195) * SIDE * scale
        x = (0.25 + 0.5 * (place % 2) + rng.uniform(-0.03, 0.03)) * SIDE * scale
        y = (0.25 + 0.5 * (place // 2) + rng.uniform(-0.03, 0.03)) * SIDE * scale
        fill = tuple(int(v) for v in np.clip(np.array(RGB[colour]) + rng.integers(-12, 13, 3), 0, 255))
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon(_outline(shape, x, y, radius), fill=fill)
    return _with_noise(canvas.reduce(scale), rng)


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images uint8 [1797,8,8] in 0..255, labels int [1797], held_out bool [1797],
    which is true of 400."""
    from sklearn.datasets import load_digits as load

    data = load()
    held_out = np.zeros(len(data.target), dtype=bool)
    held_out[np.random.default_rng(0).permutation(len(data.target))[:400]] = True
    return (data.images * (255 / 16)).astype(np.uint8), data.target, held_out


def draw_digit(digit: np.ndarray, rng: np.random.Generator, turn: float = 0.0) -> Image.Image:
    """An 8x8 digit, uint8, enlarged and turned by `turn` degrees, as an RGB picture of SIDE x SIDE. The generator decides
    shade, place and noise."""
    shade = int(rng.integers(35, 76))
    canvas = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    ink = Image.fromarray(digit).resize((54, 54), Image.Resampling.BICUBIC).rotate(turn, Image.Resampling.BILINEAR)
    canvas.paste((240, 240, 240), (int(rng.integers(1, 6)), int(rng.integers(1, 6))), mask=ink)
    return _with_noise(canvas, rng)


# Language


def _word(english: str, language: str) -> str:
    return english if language == "en" else CHINESE[english]


def _ask(type_: str, kind: str, language: str, about: int | None = None, number: str = "", **words: str) -> Question:
    words = {key: _word(value, language) for key, value in words.items()}
    question, answer = (text.format(number=number, **words) for text in SENTENCES[kind][language])
    return Question(type_, question, answer, about)


def scene_questions(scene: Scene, language: str, rng: np.random.Generator) -> list[Question]:
    """Every question that the scene answers in one way: about a shape or a colour that is there once, the count,
    one with yes and one with no, about shapes that the generator chooses."""
    objects = [(i, *pair) for i, pair in enumerate(scene) if pair is not None]
    colours = Counter(colour for _, colour, _ in objects)
    shapes = Counter(shape for _, _, shape in objects)
    number = (HOW_MANY if language == "zh" else NUMBERS)[language][len(objects)]
    found = [_ask("count", "one" if len(objects) == 1 else "count", language, number=number)]
    for i, colour, shape in objects:
        words = {"colour": colour, "shape": shape}
        if colours[colour] == 1:
            found.append(_ask("shape", "shape", language, i, **words))
        if shapes[shape] == 1:
            found.append(_ask("colour", "colour", language, i, **words))
            found.append(_ask("place", "place", language, i, place=PLACES[i], **words))
    absent = [shape for shape in SHAPES if shape not in shapes]
    for kind, choice in (("yes", sorted(shapes)), ("no", absent)):
        found.append(_ask("yes_no", kind, language, shape=choice[rng.integers(len(choice))]))
    return found


def facts(scene: Scene, language: str) -> list[str]:
    """All that the scene's questions could be answered with, in a fixed order: shape by shape whether it is there and, where
    it is there once, its colour and place; then the shape of each colour that is there once; then the count."""
    objects = [(i, *pair) for i, pair in enumerate(scene) if pair is not None]
    found: list[Question] = []
    for shape in SHAPES:
        alike = [(i, colour) for i, colour, other in objects if other == shape]
        found.append(_ask("yes_no", "yes" if alike else "no", language, shape=shape))
        if len(alike) == 1:
            ((i, colour),) = alike
            found.append(_ask("colour", "colour", language, i, colour=colour, shape=shape))
            found.append(_ask("place", "place", language, i, place=PLACES[i], shape=shape))
    for colour in COLOURS:
        alike = [(i, shape) for i, other, shape in objects if other == colour]
        if len(alike) == 1:
            found.append(_ask("shape", "shape", language, alike[0][0], colour=colour, shape=alike[0][1]))
    number = (HOW_MANY if language == "zh" else NUMBERS)[language][len(objects)]
    found.append(_ask("count", "one" if len(objects) == 1 else "count", language, number=number))
    return [question.answer for question in found]


def choose_questions(found: list[Question], count: int, rng: np.random.Generator) -> list[Question]:
    """Up to `count` different questions in random order, drawn so that every type comes about equally often."""
    left: dict[str, list[Question]] = {}
    for i in rng.permutation(len(found)):
        left.setdefault(found[i].type, []).append(found[i])
    chosen: list[Question] = []
    while left and len(chosen) < count:
        type_ = sorted(left)[rng.integers(len(left))]
        chosen.append(left[type_].pop())
        if not left[type_]:
            del left[type_]
    return chosen


def digit_question(digit: int, language: str) -> Question:
    """The one question about a digit picture."""
    return _ask("digit", "digit", language, number=NUMBERS[language][digit])


def captions(scene: Scene, language: str) -> list[str]:
    """Five captions of a scene: other openings, and the objects told in another order."""
    objects = [(PLACES[i], *pair) for i, pair in enumerate(scene) if pair is not None]
    told = []
    for k, opening in enumerate(CAPTION_OPENINGS[language]):
        order = objects[k % len(objects) :] + objects[: k % len(objects)]
        if language == "en":
            parts = [f" a {colour} {shape} at the {place}" for place, colour, shape in order]
            told.append(opening + ",".join(parts) + ".")
        else:
            parts = [f"{CHINESE[place]}有{CHINESE[colour]}的{CHINESE[shape]}" for place, colour, shape in order]
            told.append(opening + "，".join(parts) + "。")
    return told
