"""Is a QA file what training takes it for? Every record is looked at before the first step, and all that is wrong is found
in one go: records that do not follow the format, ids given twice, pictures that are missing, text that does not fit,
held-out pictures among the training data. What takes longer, `dataset.check_sample` does to a sample.

Reads records one at a time and keeps numbers of them, no objects. Knows no tokenizer class and no model.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import InputError
from dataset.conversation import ChatFormat, TooLong
from dataset.findings import Place, Rows
from dataset.json_stream import Item, NotJson, stream_json
from dataset.record import IMAGE_MARK, Conversation, Record, RecordError, parse_record

LANGUAGES = ("en", "zh", "other")  # told by script


@dataclass
class SourceCount:
    """What a source of a QA file holds. Turns are questions and answers; pictures are counted as often as they are used."""

    records: int = 0
    turns: int = 0
    pictures: int = 0
    text_only: int = 0
    languages: Counter[str] = field(default_factory=Counter)


@dataclass
class Checked:
    """A QA file after one pass over it."""

    path: Path
    read: int = 0  # records, good or not
    wrong: Rows = field(default_factory=Rows)
    bad_images: Rows = field(default_factory=Rows)  # good records otherwise, whose pictures cannot be read
    unfit: Rows = field(default_factory=Rows)  # what max_length leaves no use for
    unfit_records: array = field(default_factory=lambda: array("q"))  # their places among the records, from 0
    sources: dict[str, SourceCount] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[Place, Record]] = field(default_factory=list)  # seeded, of the good records
    duplicates: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))  # places: the first, a later one
    fault: str = ""  # why the file could not be read to its end
    # of a held-out file, what a training record is looked up in
    picture_keys: dict[int, list[int]] = field(default_factory=dict)  # -> records
    picture_sizes: set[int] = field(default_factory=set)
    text_hashes: set[int] = field(default_factory=set)
    # of a training file, what was found there
    suspects: list[tuple[Place, str, int]] = field(default_factory=list)  # a picture's file and its key
    held_out_texts: int = 0  # records without a picture that the held-out file has as well


def check_file(
    path: Path,
    *,
    chat: ChatFormat | None,
    max_length: int,
    sample_size: int,
    seed: int,
    is_held_out: bool = False,
    held_out: Checked | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Checked:
    """Look at every record of a QA file.

    chat: None where there is no tokenizer to ask, then nothing is said about lengths. sample_size: how many records are
    kept for `dataset.check_sample`. held_out: the other file, checked before with `is_held_out`.
    progress: wraps the records, for example tqdm.
    """
    checked, generator = Checked(path), random.Random(seed)
    places, id_hashes, content_hashes = array("q"), array("q"), array("q")
    folder = str(path.parent)
    good = 0
    try:
        for item in progress(stream_json(path)):
            checked.read += 1
            try:
                record = _parse(item)
            except RecordError as error:
                checked.wrong.add(_place(path, item), error.reason, error.detail)
                continue
            places.append(item.line or item.index)
            id_hashes.append(hash(record.id))
            content_hash = hash((record.images, record.conversations, record.alternatives))
            content_hashes.append(content_hash)
            _count(checked, record)
            readable = True
            if record.images:
                readable = _check_paths(checked, item, record, folder, is_held_out, held_out)
            elif is_held_out:
                checked.text_hashes.add(content_hash)
            elif held_out and content_hash in held_out.text_hashes:
                checked.held_out_texts += 1
            if chat and not _fits(checked, item, record, chat, max_length):
                continue
            if not readable:
                continue
            good += 1  # every good record has the same chance to be among the sample at the end
            if len(checked.sample) < sample_size:
                checked.sample.append((_place(path, item, record), record))
            elif (i := int(generator.random() * good)) < sample_size:
                checked.sample[i] = (_place(path, item, record), record)
    except InputError as error:
        checked.fault = str(error)
    else:
        if checked.read == 0:
            checked.fault = f"{path}: holds no records; expected one JSON object a line."
    _name_equal_ids(checked, _equal_pairs(np.array(places, np.int64), np.array(id_hashes, np.int64)))
    checked.duplicates = _equal_pairs(np.array(places, np.int64), np.array(content_hashes, np.int64))
    return checked


def check_leakage(train: Checked, held_out: Checked) -> None:
    """Adds to `train.wrong` each record with a picture whose bytes a held-out record shows as well, under whatever name."""
    if not train.suspects:
        return
    wanted = {index for *_, key in train.suspects for index in held_out.picture_keys[key]}
    by_digest: dict[bytes, tuple[Place, str]] = {}
    for item in stream_json(held_out.path):
        if item.index in wanted:
            record = _parse(item)
            for path in record.images:
                place = _place(held_out.path, item, record)
                by_digest.setdefault(_digest(held_out.path.parent / path), (place, path))
    digest = functools.cache(_digest)  # a picture is often asked about more than once
    for place, path, _ in train.suspects:
        if match := by_digest.get(digest(path)):
            train.wrong.add(
                place,
                "leaked_image",
                f"{path} is also held out: {match[0].file} {match[0]}, there as {match[1]}. What is asked about a "
                "picture that was trained on measures nothing; take it out of one of the two files.",
            )


# ---------------------------------------------------------------------------------------------------------------------
# One record


def _parse(item: Item) -> Record:
    if isinstance(item.value, NotJson):
        raise RecordError("not_json", item.value)
    return parse_record(item.value, "")


def _place(path: Path, item: Item, record: Record | None = None) -> Place:
    if record is None:  # what can be told of one that is no record
        value = item.value if isinstance(item.value, dict) else {}
        name, source = (value.get(key) for key in ("id", "source"))
        return Place(path, item.line, item.index, str(name or "")[:200], source if isinstance(source, str) else "")
    return Place(path, item.line, item.index, record.id, record.source)


def _count(checked: Checked, record: Record) -> None:
    count = checked.sources.get(record.source)
    if count is None:
        count = checked.sources[record.source] = SourceCount()
    count.records += 1
    count.turns += len(record.conversations)
    count.pictures += len(record.images)
    count.text_only += not record.images
    count.languages[_language(record)] += 1
    checked.types[record.type] += 1


def _check_paths(
    checked: Checked, item: Item, record: Record, folder: str, is_held_out: bool, held_out: Checked | None
) -> bool:
    """Whether each picture of the record is a file with something in it; and which ones may be held out."""
    for name in record.images:
        path = os.path.join(folder, name)
        try:
            state = os.stat(path)
            wrong = None if stat.S_ISREG(state.st_mode) else "not a file"
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            wrong = getattr(error, "strerror", None) or str(error)
        if wrong:
            checked.bad_images.add(_place(checked.path, item, record), "missing_image", f"{path}: {wrong}.")
            return False
        if state.st_size == 0:
            checked.bad_images.add(
                _place(checked.path, item, record), "unreadable_image", f"{path}: the file is empty."
            )
            return False
        if is_held_out:
            checked.picture_sizes.add(state.st_size)
            checked.picture_keys.setdefault(_picture_key(path, state.st_size), []).append(item.index)
        elif held_out and state.st_size in held_out.picture_sizes:
            key = _picture_key(path, state.st_size)
            if key in held_out.picture_keys:
                checked.suspects.append((_place(checked.path, item, record), path, key))
    return True


def _fits(checked: Checked, item: Item, record: Record, chat: ChatFormat, max_length: int) -> bool:
    """Whether every conversation of the record can be encoded."""
    if not _surely_usable(chat, record, max_length):
        try:
            for turns in (record.conversations, *record.alternatives):
                chat.encode(turns, max_length)
        except TooLong as error:
            checked.unfit.add(_place(checked.path, item, record), error.reason, f"{error}.")
            checked.unfit_records.append(item.index)
            return False
    return True


def _surely_usable(chat: ChatFormat, record: Record, max_length: int) -> bool:
    """Whether an answer is sure to begin within max_length, and after the last image: told without tokenising, which takes
    minutes for a million records. The first answer that can do is the one to the last question with an image."""
    for turns in (record.conversations, *record.alternatives):
        questions = [i for i, turn in enumerate(turns) if turn.role == "user"]
        if not questions:  # a text, whose beginning is of use
            continue
        last = questions[0]
        if record.images and len(questions) > 1:
            last = next(i for i in reversed(questions) if _may_have_image(turns, i))
        if not chat.certainly_fits(turns[: last + 1], max_length - len(chat.head["assistant"]) - 1):
            return False
    return True


def _may_have_image(turns: Conversation, i: int) -> bool:
    return not isinstance(turns[i].content, str) or IMAGE_MARK in turns[i].content


_HAN = re.compile(r"[\u3400-\u9fff\U00020000-\U000323af]")
_FOREIGN = re.compile(
    r"[^\W\d_a-zA-Z\u00c0-\u024f\u3400-\u9fff\U00020000-\U000323af]"
)  # letters, neither Latin nor Han


def _language(record: Record) -> str:
    """By the script of how the conversation begins: Latin letters count as "en", Han characters as "zh"."""
    for turn in record.conversations:
        if not isinstance(turn.content, str) or not turn.content.isascii():
            break
    else:
        return "en"
    text = " ".join(plain_text(turn.content)[:200] for turn in record.conversations[:4])
    if 10 * len(_FOREIGN.findall(text)) > len(text):
        return "other"
    return "zh" if 10 * len(_HAN.findall(text)) > len(text) else "en"


def plain_text(content: str | tuple) -> str:
    """The text of a turn's content."""
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


# ---------------------------------------------------------------------------------------------------------------------
# Files and equal numbers


def _picture_key(path: str, size: int) -> int:
    """Equal for files of equal content, and nearly always different otherwise: the size and 64 bytes from the middle."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            return hash((size, os.pread(handle, 64, size // 2)))
        finally:
            os.close(handle)
    except OSError:
        return 0  # cannot be opened: found when pictures are decoded


def _digest(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return os.urandom(16)  # equal to nothing


def _equal_pairs(places: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """[m, 2]: for each record that equals an earlier one, the place of the first such and its own, in its order."""
    order = np.argsort(hashes, kind="stable")
    values, position = hashes[order], np.arange(len(order))
    is_first = np.ones(len(order), bool)
    is_first[1:] = values[1:] != values[:-1]
    first = np.maximum.accumulate(np.where(is_first, position, 0))
    again = position[~is_first]
    again = again[np.argsort(order[again])]
    return np.stack([places[order[first[again]]], places[order[again]]], axis=1)


def _name_equal_ids(checked: Checked, pairs: np.ndarray) -> None:
    first_of = dict(zip(pairs[:, 1].tolist(), pairs[:, 0].tolist(), strict=True))
    for item in stream_json(checked.path) if first_of else ():  # once more, for the names
        where = item.line or item.index
        if where in first_of:
            word = "line" if item.line else "item"
            place = _place(checked.path, item, _parse(item))
            detail = f"the same id as {word} {first_of[where]}; give every record its own."
            checked.wrong.add(place, "duplicate_id", detail)
