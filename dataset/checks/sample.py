"""A closer look at a sample of a QA file's records: are the pictures whole, are the labels the answers? Knows no tokenizer
class and no model."""

from __future__ import annotations

import json
import os
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import IGNORE_INDEX
from dataset.check import Checked, plain_text
from dataset.conversation import ChatFormat
from visual.images import ImageError, verify_image


def check_pictures(checked: Checked) -> int:
    """Decode every picture of the sample to its last pixel, in threads; what cannot be decoded is added to `bad_images`.
    Returns the number of pictures."""
    folder = checked.path.parent
    pictures = [(place, folder / path) for place, record in checked.sample for path in record.images]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for (place, _), error in zip(pictures, pool.map(_picture_fault, (path for _, path in pictures)), strict=True):
            if error:
                checked.bad_images.add(place, error.reason, str(error))
    return len(pictures)


@dataclass
class Lengths:
    """Of every conversation of the sample: tokens [n] before max_length cuts, supervised share [n] of what is left."""

    tokens: np.ndarray
    supervised: np.ndarray


def check_labels(checked: Checked, chat: ChatFormat, decode: Callable[[list[int]], str], max_length: int) -> Lengths:
    """Tokenise the sample. Each stretch of supervised tokens must decode to an answer and its `<|im_end|>`, or to a text and
    its `<|endoftext|>`, all of them in order: where it does not, `labels_are_not_the_answers` is added to `wrong`."""
    tokens, supervised = array("q"), array("d")
    for place, record in checked.sample:
        for turns in (record.conversations, *record.alternatives):
            encoded = chat.encode(turns)
            ends = (chat.im_end_id, chat.end_of_text_id)
            spoken = [decode(ids[:-1]) for ids in _stretches(encoded.labels) if ids[-1] in ends]
            answers = [plain_text(turn.content) for turn in turns if turn.role in ("assistant", "text")]
            if list(map(_composed, spoken)) != list(map(_composed, answers)):
                said, meant = (json.dumps(texts, ensure_ascii=False)[:200] for texts in (spoken, answers))
                detail = f"the supervised tokens say {said}, the answers {meant}. Is this the model's own tokenizer?"
                checked.wrong.add(place, "labels_are_not_the_answers", detail)
            tokens.append(len(encoded.input_ids))
            if tokens[-1] > max_length:
                encoded = chat.encode(turns, max_length)
            supervised.append(encoded.num_targets / len(encoded.input_ids))
    return Lengths(np.array(tokens, np.int64), np.array(supervised))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # the tokenizers of Qwen do this first


def _stretches(labels: list[int]) -> Iterator[list[int]]:
    """The supervised ids, cut where something unsupervised stands between them."""
    ids: list[int] = []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            ids.append(label)
        elif ids:
            yield ids
            ids = []


def _picture_fault(path: Path) -> ImageError | None:
    try:
        verify_image(path)
    except ImageError as error:
        return error
    return None
