"""The questions of a proof: held-out ones of the run, and variants of them in the shapes that users send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from config import Config
from dataset.qa_file import QAFile
from dataset.record import IMAGE, Part
from evaluation.score import Question, questions_of
from model.answer import Answerer
from model.build import Processors
from model.export.proof import Sample
from visual.images import ImageError, read_image

SHAPES = ((2.3, 1.0), (1.0, 1.7), (0.6, 0.6), (3.1, 2.9))  # factors of width and height
CHINESE, ENGLISH = "图片里有什么？", "What is in the picture?"
Turns = list[tuple[str, list[Part]]]


def collect_samples(
    config: Config, processors: Processors, answerer: Answerer, *, job: Path, count: int
) -> list[Sample]:
    """Return about `count` questions of the held-out file, spread over it, and their variants; write their images to `job`.

    Left out are questions that do not fit into the model, and those that a chat template cannot express: a text that spells
    a special token, or that begins with a newline and follows no image. Without a file of the run on this machine the
    questions are about drawn images.
    """
    specials = [token for token in processors.tokenizer.get_added_vocab() if token.strip()]

    def is_plain(turns: Sequence[tuple[str, Sequence[Part]]]) -> bool:
        for _, parts in turns:
            for part, before in zip(parts, [None, *parts], strict=False):
                if isinstance(part, str) and (
                    any(token in part for token in specials)
                    or "<image>" in part
                    or (before is None and part.startswith("\n"))
                ):
                    return False
        return answerer.fits(turns)

    samples: list[Sample] = []
    names: dict[Path, str] = {}

    def add(kind: str, turns: Turns, images: Sequence[str]) -> None:
        if is_plain(turns):
            samples.append(Sample(kind, turns, images))

    for question in _questions(config, count):
        try:
            shown = [_saved(path, job, names) for path in question.images]
        except ImageError:
            continue
        add("held out", [(role, list(parts)) for role, parts in question.turns], shown)
    if not samples:
        for i in range(4):
            name = f"drawn-{i}.png"
            _drawn(processors.image_processor.image_size, seed=i).save(job / name)
            add("drawn image", [("user", [IMAGE, "\n" + (CHINESE if i % 2 else ENGLISH)])], [name])
    images = list(dict.fromkeys(name for sample in samples for name in sample.images))
    single = [sample for sample in samples if len(sample.images) == 1 and len(sample.turns) == 1]
    for sample, (width, height) in zip(single, SHAPES, strict=False):
        with Image.open(job / sample.images[0]) as image:
            size = max(1, round(image.width * width)), max(1, round(image.height * height))
            name = f"{size[0]}x{size[1]}-{sample.images[0]}"
            image.resize(size).save(job / name)
        add("other shape", [(role, list(parts)) for role, parts in sample.turns], [name])
    if images:
        add("Chinese", [("user", [IMAGE, "\n" + CHINESE])], images[:1])
        add("text beside image", [("user", [IMAGE, ENGLISH])], images[:1])
        add("text before image", [("user", [ENGLISH + "\n", IMAGE])], images[:1])
        two = (images * 2)[:2]
        add("two images", [("user", [IMAGE, IMAGE, "\n" + ENGLISH])], two)
        turns: Turns = [("user", [IMAGE, "\n" + ENGLISH]), ("assistant", ["A circle."]), ("user", [CHINESE])]
        add("several turns", turns, images[:1])
        turns = [("user", [IMAGE, "\n" + ENGLISH]), ("assistant", ["红色。"]), ("user", [IMAGE, "\n" + CHINESE])]
        add("several turns", turns, two)
    for text in (CHINESE, ENGLISH):
        add("text only", [("user", [text])], [])
    add("text only", [("system", ["Answer briefly."]), ("user", [ENGLISH])], [])
    return samples


def _questions(config: Config, count: int) -> Iterator[Question]:
    """Yield about `count` questions, evenly spread over the run's held-out file, else over its training file."""
    path = config.data.validation_file or config.data.qa_file
    path = path if path.exists() else config.data.qa_file
    if not path.exists():
        return
    qa = QAFile(path)
    found = 0
    for index in np.unique(np.linspace(0, len(qa) - 1, min(count, len(qa))).round().astype(int)):
        for question in questions_of(qa, [int(index)]):
            if found < count:
                found += 1
                yield question


def _saved(path: Path, job: Path, names: dict[Path, str]) -> str:
    """Save an image file as PNG in `job`, once, and return its name. Raises ImageError."""
    if path not in names:
        name = f"{len(names)}.png"
        read_image(path).save(job / name)
        names[path] = name
    return names[path]


def _drawn(side: int, seed: int) -> Image.Image:
    """Return an image of coloured rectangles."""
    random = np.random.default_rng(seed)
    pixels = np.full((2 * side, 3 * side, 3), 255, np.uint8)
    for _ in range(6):
        top, left = random.integers(0, 2 * side), random.integers(0, 3 * side)
        pixels[top : top + side, left : left + side] = random.integers(0, 256, 3)
    return Image.fromarray(pixels)
