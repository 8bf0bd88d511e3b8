"""Name emoji without a language model: nearest neighbour and ridge classifier on the features of a frozen image encoder.

Both learn from the images that training names, in the styles of training, and are asked about the style that is held out.
The encoder is not known here: features are passed in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from config import InputError
from config.files import open_regular
from demo.emoji import GROUPS, SENTENCES

ALPHAS = tuple(float(10**exponent) for exponent in np.arange(0.0, 6.5, 0.5))  # ridge regularisations to choose from


@dataclass(frozen=True)
class EmojiData:
    """What demo.emoji wrote. A concept is given by its code points, an image by its path below the folder."""

    folder: Path
    training: list[str]  # images that training names
    held_out: dict[str, str]  # known concept -> its image in the held-out style
    names: dict[str, dict[str, str]]  # known concept -> language -> name
    groups: dict[str, str]  # known concept -> a key of GROUPS

    @property
    def held_out_style(self) -> str:
        return style_of(next(iter(self.held_out.values())))

    def digest(self) -> str:
        """Return the SHA-256 of everything that the baselines depend on: which images are for training, which are asked
        about, and their content."""
        found = hashlib.sha256()
        for image in [*self.training, "", *self.held_out.values()]:
            content = (self.folder / image).read_bytes() if image else b""
            found.update(f"{image}\n{hashlib.sha256(content).hexdigest()}\n".encode())
        return found.hexdigest()


def concept_of(image: str) -> str:
    return Path(image).stem


def style_of(image: str) -> str:
    return Path(image).parent.name


def read_emoji(folder: Path) -> EmojiData:
    """Read the annotations in `folder`. Raises InputError if they are missing, damaged or not of one held-out style."""
    names: dict[str, dict[str, str]] = {}
    training, held_out, groups = [], {}, {}
    try:
        for record in _records(folder / "names_train.json"):
            image, (question, answer) = record["image"], _turn(record)
            if image not in names:
                training.append(image)
            names.setdefault(concept_of(image), {})[_LANGUAGES[question]] = answer
        training = sorted(set(training))
        for record in _records(folder / "validation.json"):
            image, (_, answer) = record["image"], _turn(record)
            if record["type"].endswith(("name_en", "name_zh")):
                held_out[concept_of(image)] = image
            elif record["type"] in ("group", "symbol_group"):
                groups[concept_of(image)] = _GROUP_OF[answer]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: not the emoji data of this version ({error!r}); {_DRAW}") from None
    styles = {style_of(image) for image in held_out.values()}
    if len(styles) != 1 or styles & {style_of(image) for image in training} or not held_out.keys() <= names.keys():
        raise InputError(f"{folder}: names_train.json and validation.json do not belong together; {_DRAW}")
    if missing := held_out.keys() - groups.keys():
        raise InputError(f"{folder / 'validation.json'}: no question for the group of {min(missing)}; {_DRAW}")
    return EmojiData(folder, training, held_out, names=names, groups=groups)


def name_by_features(data: EmojiData, features: np.ndarray) -> dict:
    """Return {"nearest": {concept: the concept it is taken for}, "ridge": the same, "alpha": ridge's regularisation}.

    features: [training images + held-out images, D], in the order of `data`. nearest: the training image of the largest
    cosine of standardised features. alpha: the best of ALPHAS when each training style in turn is held out, so the
    held-out style decides nothing.
    """
    count = len(data.training)
    concepts = np.array([concept_of(image) for image in data.training])
    styles = np.array([style_of(image) for image in data.training])
    right = dict.fromkeys(ALPHAS, 0)
    for style in sorted(set(styles)):
        inside = np.flatnonzero(styles == style)
        outside = np.flatnonzero(styles != style)
        for alpha in ALPHAS:
            guess = ridge(alpha).fit(features[outside], concepts[outside]).predict(features[inside])
            right[alpha] += int((guess == concepts[inside]).sum())
    alpha = max(ALPHAS, key=lambda alpha: right[alpha])
    classifiers = {"nearest": nearest(), "ridge": ridge(alpha)}
    found: dict = {"alpha": alpha}
    for name, classifier in classifiers.items():
        guesses = classifier.fit(features[:count], concepts).predict(features[count:])
        found[name] = dict(zip(data.held_out, map(str, guesses), strict=True))
    return found


def ridge(alpha: float) -> Pipeline:
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=alpha))


def nearest() -> Pipeline:
    return make_pipeline(StandardScaler(), KNeighborsClassifier(n_neighbors=1, metric="cosine"))


_DRAW = "draw it with python -m demo.emoji --output DIR, and name that folder with --emoji DIR."
_LANGUAGES = {question: language for language, (question, _) in SENTENCES["name"].items()}
_GROUP_OF = {word: group for group, words in GROUPS.items() for word in words}


def _records(path: Path) -> list[dict]:
    try:
        with open_regular(path) as file:
            return json.load(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {_DRAW}") from None


def _turn(record: Mapping) -> tuple[str, str]:
    """Return the question of a record, without its images' marks, and the answer."""
    question, answer = (turn["value"] for turn in record["conversations"][:2])
    return question.replace("<image>\n", ""), answer
