"""Check every record of a QA file before training.

Finds all faults in one pass: records that break the format, duplicate ids, missing images, text that does not fit into
max_length, and held-out images among the training data. `dataset.checks.sample` makes the slower checks, on a sample.

Reads one record at a time and keeps numbers, not objects. Knows no tokenizer class and no model.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import InputError, printable
from dataset.checks.findings import Place, Rows
from dataset.conversation import ChatFormat, TooLong
from dataset.json_stream import Item, NotJson, stream_json
from dataset.language import language_of
from dataset.record import IMAGE_MARK, Conversation, Record, RecordError, parse_record
from visual.images import ImageError, image_bytes, image_state

ENOUGH_HELD_OUT = 10  # a held-out file of fewer images and texts is noted


@dataclass
class SourceCount:
    """Totals of one source of a QA file. An image is counted once for each record that uses it."""

    records: int = 0
    turns: int = 0  # questions and answers
    images: int = 0
    text_only: int = 0  # records without an image
    usable_images: int = 0  # images of records that fit into max_length and whose image files exist
    languages: Counter[str] = field(default_factory=Counter)


@dataclass
class Checked:
    """The result of one pass over a QA file."""

    path: Path
    read: int = 0  # all records, valid or not
    wrong: Rows = field(default_factory=Rows)
    bad_images: Rows = field(default_factory=Rows)  # valid records with an image that cannot be read
    unfit: Rows = field(default_factory=Rows)  # valid records left out because of max_length
    unfit_records: array = field(default_factory=lambda: array("q"))  # their positions in the file, from 0
    sources: dict[str, SourceCount] = field(default_factory=dict)
    types: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[Place, Record]] = field(default_factory=list)  # a seeded sample of the good records
    duplicates: np.ndarray = field(
        default_factory=lambda: np.empty((0, 2), np.int64)
    )  # lines or items: first, later one
    fault: str = ""  # why the file could not be read to its end
    # Filled for a held-out file: what the training records are compared with.
    image_keys: dict[int, list[int]] = field(default_factory=dict)  # key of an image -> positions of its records
    image_sizes: set[int] = field(default_factory=set)  # bytes
    text_hashes: set[int] = field(default_factory=set)
    some_images: set[str] = field(default_factory=set)  # paths of its first images, at most ENOUGH_HELD_OUT
    # Filled for a training file: the matches.
    suspects: list[tuple[Place, str, int]] = field(default_factory=list)  # record, path of the image, its key
    leaks: set[str] = field(default_factory=set)  # paths of the images that are held out too, by `check_leakage`
    held_out_texts: int = 0  # records without an image that are also in the held-out file


def check_file(
    path: Path,
    *,
    chat: ChatFormat | None,
    max_length: int,
    sample_size: int,
    seed: int,
    is_held_out: bool = False,
    held_out: Checked | None = None,
) -> Checked:
    """Check every record of a QA file, with a progress bar if it takes longer than two seconds.

    chat: None if no tokenizer is available; lengths are then not checked.
    sample_size: number of records to keep for `dataset.checks.sample`.
    is_held_out: remember the images and texts of this file, to find them in the training file.
    held_out: the result for the held-out file, from an earlier call with `is_held_out`.
    """
    checked, generator = Checked(path), random.Random(seed)
    places, id_hashes, content_hashes = array("q"), array("q"), array("q")
    folder = str(path.parent)
    good = 0
    items = tqdm(stream_json(path), desc=f"checking {printable(path.name)}", unit=" records", delay=2, leave=False)
    try:
        for item in items:
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
                readable = _check_paths(
                    checked, item=item, record=record, folder=folder, is_held_out=is_held_out, held_out=held_out
                )
            elif is_held_out:
                checked.text_hashes.add(content_hash)
            elif held_out and content_hash in held_out.text_hashes:
                checked.held_out_texts += 1
            if chat and not _fits(checked, item=item, record=record, chat=chat, max_length=max_length):
                continue
            if not readable:
                continue
            checked.sources[record.source].usable_images += len(record.images)
            good += 1  # reservoir sampling: every good record is in the sample with the same probability
            if len(checked.sample) < sample_size:
                checked.sample.append((_place(path, item, record), record))
            elif (i := int(generator.random() * good)) < sample_size:
                checked.sample[i] = (_place(path, item, record), record)
    except InputError as error:
        checked.fault = str(error)
    else:
        if checked.read == 0:
            checked.fault = f"{path}: contains no records; expected one JSON object per line."
    _name_equal_ids(checked, _equal_pairs(np.array(places, np.int64), np.array(id_hashes, np.int64)))
    checked.duplicates = _equal_pairs(np.array(places, np.int64), np.array(content_hashes, np.int64))
    return checked


def check_leakage(train: Checked, held_out: Checked) -> None:
    """Add to `train.wrong` the records with an image that is also held out, compared by content, not by name, and the paths
    of these images to `train.leaks`."""
    if not train.suspects:
        return
    wanted = {index for *_, key in train.suspects for index in held_out.image_keys[key]}
    by_digest: dict[bytes, tuple[Place, str]] = {}
    for item in stream_json(held_out.path):
        if item.index in wanted:
            record = _parse(item)
            for path in record.images:
                place = _place(held_out.path, item, record)
                by_digest.setdefault(_digest(held_out.path.parent / path), (place, path))
    digest = functools.cache(_digest)  # several records may use the same image
    for place, path, _ in train.suspects:
        if match := by_digest.get(digest(path)):
            train.leaks.add(path)
            train.wrong.add(
                place,
                "leaked_image",
                f"{path} is also held out: {match[0].file} {match[0]}, as {match[1]}. Scores on an image that was "
                "trained on are meaningless; remove it from one of the two files.",
            )


# ---------------------------------------------------------------------------------------------------------------------
# One record


def _parse(item: Item) -> Record:
    if isinstance(item.value, NotJson):
        raise RecordError("not_json", item.value)
    return parse_record(item.value, "")


def _place(path: Path, item: Item, record: Record | None = None) -> Place:
    """Return the place of a record. record: None if it is invalid; its id and source are then taken from the item."""
    if record is not None:
        name, source = record.id, record.source
    else:
        value = item.value if isinstance(item.value, dict) else {}
        name, source = str(value.get("id") or "")[:200], value.get("source", "")
        if not isinstance(source, str):
            source = ""
    return Place(file=path, line=item.line, index=item.index, id=name, source=source)


def _count(checked: Checked, record: Record) -> None:
    count = checked.sources.get(record.source)
    if count is None:
        count = checked.sources[record.source] = SourceCount()
    count.records += 1
    count.turns += len(record.conversations)
    count.images += len(record.images)
    count.text_only += not record.images
    count.languages[_language(record)] += 1
    checked.types[record.type] += 1


def _check_paths(
    checked: Checked, item: Item, record: Record, folder: str, is_held_out: bool, held_out: Checked | None
) -> bool:
    """Return whether each image of the record is a file that is not empty.

    Also remembers the images of a held-out file, and the images of a training file that may be held out.
    """
    for name in record.images:
        path = os.path.join(folder, name)
        try:
            state = image_state(path)
            wrong = None if state.is_file else "not a file"
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            wrong = getattr(error, "strerror", None) or str(error)
        if wrong:
            checked.bad_images.add(_place(checked.path, item, record), "missing_image", f"{path}: {wrong}.")
            return False
        if state.size == 0:
            checked.bad_images.add(
                _place(checked.path, item, record), "unreadable_image", f"{path}: the file is empty."
            )
            return False
        if is_held_out:
            if len(checked.some_images) < ENOUGH_HELD_OUT:
                checked.some_images.add(path)
            checked.image_sizes.add(state.size)
            checked.image_keys.setdefault(_image_key(path, state.size), []).append(item.index)
        elif held_out and state.size in held_out.image_sizes:
            key = _image_key(path, state.size)
            if key in held_out.image_keys:
                checked.suspects.append((_place(checked.path, item, record), path, key))
    return True


def _fits(checked: Checked, item: Item, record: Record, chat: ChatFormat, max_length: int) -> bool:
    """Return whether every conversation of the record can be encoded; otherwise the record becomes unfit."""
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
    """Return whether an answer certainly begins within max_length and after the last image.

    Determined without tokenising, which would take minutes for a million records. The first answer after the last image
    is the one to the last question with an image.
    """
    for turns in (record.conversations, *record.alternatives):
        if not all(turn.is_target for turn in turns):
            return False
        questions = [i for i, turn in enumerate(turns) if turn.role == "user"]
        if not questions:  # a text turn, which may be cut anywhere
            continue
        last = questions[0]
        if record.images and len(questions) > 1:
            last = next(i for i in reversed(questions) if _may_have_image(turns, i))
        if not chat.certainly_fits(turns[: last + 1], max_length - len(chat.head["assistant"]) - 1):
            return False
    return True


def _may_have_image(turns: Conversation, i: int) -> bool:
    return not isinstance(turns[i].content, str) or IMAGE_MARK in turns[i].content


def _language(record: Record) -> str:
    """Return the language of the beginning of the conversation."""
    for turn in record.conversations:
        if not isinstance(turn.content, str) or not turn.content.isascii():
            return language_of(" ".join(plain_text(turn.content)[:200] for turn in record.conversations[:4]))
    return "en"  # the common case, without joining the texts


def plain_text(content: str | tuple) -> str:
    """Return the text of a turn's content, without images."""
    return content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))


# ---------------------------------------------------------------------------------------------------------------------
# Equal files, equal records


def _image_key(path: str, size: int) -> int:
    """Hash the size and 64 bytes from the middle of a file: equal for equal files, almost always unique otherwise."""
    middle = slice(size // 2, size // 2 + 64)
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            return hash((size, os.pread(handle, 64, middle.start)))
        finally:
            os.close(handle)
    except NotADirectoryError:  # in an archive
        with contextlib.suppress(ImageError):
            return hash((size, image_bytes(path)[middle]))
    except OSError:
        pass
    return 0  # cannot be opened; reported when the image is decoded


def _digest(path: str | Path) -> bytes:
    try:
        return hashlib.blake2b(image_bytes(path)).digest()
    except ImageError:
        return os.urandom(16)  # differs from every other digest


def _equal_pairs(places: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Return [m, 2]: the place of the first equal record and its own, for each record with the hash of an earlier one.

    places, hashes: [n], of all records. The result is in the order of the later record.
    """
    order = np.argsort(hashes, kind="stable")
    values, position = hashes[order], np.arange(len(order))
    is_first = np.ones(len(order), bool)
    is_first[1:] = values[1:] != values[:-1]
    first = np.maximum.accumulate(np.where(is_first, position, 0))
    again = position[~is_first]
    again = again[np.argsort(order[again])]
    return np.stack([places[order[first[again]]], places[order[again]]], axis=1)


def _name_equal_ids(checked: Checked, pairs: np.ndarray) -> None:
    """Add the later record of each pair [m, 2] of `_equal_pairs` to `wrong`."""
    first_of = dict(zip(pairs[:, 1].tolist(), pairs[:, 0].tolist(), strict=True))
    for item in stream_json(checked.path) if first_of else ():  # a second pass, for the ids
        where = item.line or item.index
        if where in first_of:
            word = "line" if item.line else "item"
            place = _place(checked.path, item, _parse(item))
            detail = f"the same id as {word} {first_of[where]}; give every record its own."
            checked.wrong.add(place, "duplicate_id", detail)
