"""Check a sample of the records of a QA file: decode the images, and compare the labels with the answers.

Knows no tokenizer class and no model.
"""

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
from dataset.checks.records import Checked, plain_text
from dataset.conversation import ChatFormat
from visual.images import ImageError, verify_image


def check_images(checked: Checked) -> int:
    """Decode all images of the sample completely, in threads, and add records with a bad image to `bad_images`.

    Returns the number of images.
    """
    folder = checked.path.parent
    images = [(place, folder / path) for place, record in checked.sample for path in record.images]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for (place, _), error in zip(images, pool.map(_image_fault, (path for _, path in images)), strict=True):
            if error:
                checked.bad_images.add(place, error.reason, str(error))
    return len(images)


@dataclass
class Lengths:
    """Lengths of the n conversations of the sample."""

    tokens: np.ndarray  # [n], before the cut to max_length
    supervised: np.ndarray  # [n], share of supervised tokens after the cut


def check_labels(checked: Checked, chat: ChatFormat, decode: Callable[[list[int]], str], max_length: int) -> Lengths:
    """Tokenise the sample and check that the labels are the answers.

    The runs of supervised tokens must decode to the answers in order, each with its `<|im_end|>`, or to a text with its
    `<|endoftext|>`. Otherwise the record is added to `wrong` with the reason `labels_are_not_the_answers`.
    """
    tokens, supervised = array("q"), array("d")
    for place, record in checked.sample:
        for turns in (record.conversations, *record.alternatives):
            encoded = chat.encode(turns)
            ends = (chat.im_end_id, chat.end_of_text_id)
            decoded = [decode(ids[:-1]) for ids in _supervised_runs(encoded.labels) if ids[-1] in ends]
            targets = [turn for turn in turns if turn.role in ("assistant", "text") and turn.is_target]
            answers = [plain_text(turn.content) for turn in targets]
            if list(map(_composed, decoded)) != list(map(_composed, answers)):
                found, expected = (json.dumps(texts, ensure_ascii=False)[:200] for texts in (decoded, answers))
                detail = (
                    f"the supervised tokens decode to {found}, expected the answers {expected}. "
                    "Is this the model's own tokenizer?"
                )
                checked.wrong.add(place, "labels_are_not_the_answers", detail)
            tokens.append(len(encoded.input_ids))
            if tokens[-1] > max_length:
                encoded = chat.encode(turns, max_length)
            supervised.append(encoded.num_targets / len(encoded.input_ids))
    return Lengths(np.array(tokens, np.int64), np.array(supervised))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)  # as Qwen's tokenizers do first


def _supervised_runs(labels: list[int]) -> Iterator[list[int]]:
    """Yield the runs of consecutive supervised ids."""
    ids: list[int] = []
    for label in [*labels, IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            ids.append(label)
        elif ids:
            yield ids
            ids = []


def _image_fault(path: Path) -> ImageError | None:
    try:
        verify_image(path)
    except ImageError as error:
        return error
    return None
