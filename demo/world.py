"""The demo's small world: drawn images, and questions whose only answer is known from the drawing.

A scene has four corners; each is empty or has one object, a (colour, shape) pair. A digit image is an enlarged
handwritten digit of scikit-learn's `load_digits`. This module draws images, asks questions in English ("en") and
Chinese ("zh"), and decides what is held out. It must not know about files, tokenizers or models. All random functions
take a `numpy` generator.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

VERSION = 3  # increase when an image or a sentence changes; demo data from another version is drawn again
SIDE = 60  # width and height of an image in pixels
LANGUAGES = ("en", "zh")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# Pairs that no training image shows and no training text mentions.
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
# Chinese uses another word for "two" when counting than when reading digits.
HOW_MANY = {"zh": ("", "一", "两", "三", "四")}

# Kind of answer -> language -> (question, answer). An answer names the subject first, then what is true of it.
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
Scene = tuple[Pair | None, ...]  # one entry per place, in the order of PLACES


class Question(NamedTuple):
    """One question with its only correct answer."""

    type: str
    question: str
    answer: str
    about: int | None = None  # index in PLACES of the object that the question is about


def sample_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """One to four objects at random places. With `unseen`, exactly one object is in UNSEEN_PAIRS; otherwise none is."""
    places = rng.permutation(len(PLACES))[: rng.integers(1, len(PLACES) + 1)]
    scene: list[Pair | None] = [None] * len(PLACES)
    for i in places:
        scene[i] = SEEN_PAIRS[rng.integers(len(SEEN_PAIRS))]
    if unseen:
        scene[places[0]] = UNSEEN_PAIRS[rng.integers(len(UNSEEN_PAIRS))]
    return tuple(scene)


def is_held_out(scene: Scene) -> bool:
    """True for one scene in ten, chosen by a hash of the scene. Training must not draw or describe these scenes."""
    content = "|".join("-" if pair is None else " ".join(pair) for pair in scene)
    return hashlib.sha256(content.encode()).digest()[0] % 10 == 0


def has_unseen_pair(scene: Scene) -> bool:
    """True when an object of the scene is one of UNSEEN_PAIRS."""
    return any(pair in UNSEEN_PAIRS for pair in scene)


def training_scene(rng: np.random.Generator) -> Scene:
    """A random scene for training: not held out, without unseen pairs."""
    while is_held_out(scene := sample_scene(rng)):
        pass
    return scene


def held_out_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """A random scene that training never shows: held out by its hash, or (`unseen`) with an object of UNSEEN_PAIRS."""
    while not is_held_out(scene := sample_scene(rng, unseen)) and not unseen:
        pass
    return scene


# Images


def _outline(shape: str, *, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y), for all shapes except the circle."""
    if shape == "square":
        points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    elif shape == "triangle":
        points = [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]
    elif shape == "cross":
        a = 0.32
        quarter = [(-a, -1.0), (a, -1.0), (a, -a)]  # the other three are this one rotated by 90 degrees
        points = [*quarter, *((-y, x) for x, y in quarter)]
        points += [(-x, -y) for x, y in points]
    else:  # star
        angles = np.arange(10) * np.pi / 5
        lengths = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        points = [(float(np.sin(t) * r), float(-np.cos(t) * r)) for t, r in zip(angles, lengths, strict=True)]
    return [(x + radius * px, y + radius * py) for px, py in points]


def _with_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.int16) + rng.integers(-3, 4, (SIDE, SIDE, 3), dtype=np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the scene as an RGB image of SIDE x SIDE. The generator decides size, exact place, tint and noise."""
    scale = 4  # draw a larger image and reduce it, for smooth edges
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
            pen.polygon(_outline(shape, x=x, y=y, radius=radius), fill=fill)
    return _with_noise(canvas.reduce(scale), rng)


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images uint8 [1797, 8, 8] in 0..255, labels int [1797], held_out bool [1797].

    400 digits are held out.
    """
    from sklearn.datasets import load_digits as load

    data = load()
    held_out = np.zeros(len(data.target), dtype=bool)
    held_out[np.random.default_rng(0).permutation(len(data.target))[:400]] = True
    return (data.images * (255 / 16)).astype(np.uint8), data.target, held_out


def draw_digit(digit: np.ndarray, rng: np.random.Generator, turn: float = 0.0) -> Image.Image:
    """Draw a digit, uint8 [8, 8], enlarged and rotated by `turn` degrees, as an RGB image of SIDE x SIDE.

    The generator decides shade, place and noise.
    """
    shade = int(rng.integers(35, 76))
    canvas = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
    ink = Image.fromarray(digit).resize((54, 54), Image.Resampling.BICUBIC).rotate(turn, Image.Resampling.BILINEAR)
    canvas.paste((240, 240, 240), (int(rng.integers(1, 6)), int(rng.integers(1, 6))), mask=ink)
    return _with_noise(canvas, rng)


# Language


def _word(english: str, language: str) -> str:
    return english if language == "en" else CHINESE[english]


def _ask(type_: str, kind: str, language: str, *, about: int | None = None, number: str = "", **words: str) -> Question:
    words = {key: _word(value, language) for key, value in words.items()}
    question, answer = (text.format(number=number, **words) for text in SENTENCES[kind][language])
    return Question(type=type_, question=question, answer=answer, about=about)


def scene_questions(scene: Scene, language: str, rng: np.random.Generator) -> list[Question]:
    """All questions that have exactly one answer in the scene.

    They ask about shapes and colours that occur once, about the count, and whether a shape is there: one question with
    the answer yes and one with no, whose shapes the generator chooses.
    """
    objects = [(i, *pair) for i, pair in enumerate(scene) if pair is not None]
    colours = Counter(colour for _, colour, _ in objects)
    shapes = Counter(shape for _, _, shape in objects)
    number = (HOW_MANY if language == "zh" else NUMBERS)[language][len(objects)]
    found = [_ask("count", "one" if len(objects) == 1 else "count", language, number=number)]
    for i, colour, shape in objects:
        words = {"colour": colour, "shape": shape}
        if colours[colour] == 1:
            found.append(_ask("shape", "shape", language, about=i, **words))
        if shapes[shape] == 1:
            found.append(_ask("colour", "colour", language, about=i, **words))
            found.append(_ask("place", "place", language, about=i, place=PLACES[i], **words))
    absent = [shape for shape in SHAPES if shape not in shapes]
    for kind, choice in (("yes", sorted(shapes)), ("no", absent)):
        found.append(_ask("yes_no", kind, language, shape=choice[rng.integers(len(choice))]))
    return found


def facts(scene: Scene, language: str) -> list[str]:
    """All answers to questions about the scene, in a fixed order.

    For each shape: whether it is there and, if it occurs once, its colour and place. Then the shape of each colour that
    occurs once. Then the count.
    """
    objects = [(i, *pair) for i, pair in enumerate(scene) if pair is not None]
    found: list[Question] = []
    for shape in SHAPES:
        with_shape = [(i, colour) for i, colour, other in objects if other == shape]
        found.append(_ask("yes_no", "yes" if with_shape else "no", language, shape=shape))
        if len(with_shape) == 1:
            ((i, colour),) = with_shape
            found.append(_ask("colour", "colour", language, about=i, colour=colour, shape=shape))
            found.append(_ask("place", "place", language, about=i, place=PLACES[i], shape=shape))
    for colour in COLOURS:
        with_colour = [(i, shape) for i, other, shape in objects if other == colour]
        if len(with_colour) == 1:
            ((i, shape),) = with_colour
            found.append(_ask("shape", "shape", language, about=i, colour=colour, shape=shape))
    number = (HOW_MANY if language == "zh" else NUMBERS)[language][len(objects)]
    found.append(_ask("count", "one" if len(objects) == 1 else "count", language, number=number))
    return [question.answer for question in found]


def choose_questions(found: list[Question], count: int, rng: np.random.Generator) -> list[Question]:
    """Up to `count` different questions in random order, chosen so that all types are about equally frequent."""
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
    """The only question about a digit image."""
    return _ask("digit", "digit", language, number=NUMBERS[language][digit])


def captions(scene: Scene, language: str) -> list[str]:
    """Five captions of a scene, with different openings and different orders of the objects."""
    objects = [(PLACES[i], *pair) for i, pair in enumerate(scene) if pair is not None]
    found = []
    for k, opening in enumerate(CAPTION_OPENINGS[language]):
        order = objects[k % len(objects) :] + objects[: k % len(objects)]
        if language == "en":
            parts = [f" a {colour} {shape} at the {place}" for place, colour, shape in order]
            found.append(opening + ",".join(parts) + ".")
        else:
            parts = [f"{CHINESE[place]}有{CHINESE[colour]}的{CHINESE[shape]}" for place, colour, shape in order]
            found.append(opening + "，".join(parts) + "。")
    return found
