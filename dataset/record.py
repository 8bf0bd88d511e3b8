"""The QA format: what a record is, and how a file of them is read without holding it in memory.

Owner of the format: preprocessing writes what `parse_record` accepts, training and scoring read through `QAFile`. Knows
nothing of tokenizers, images' contents or annotation formats.

A record is one JSON object:

    {"id": "coco:1183", "image": "images/1183.jpg", "source": "coco", "type": "colour",
     "conversations": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

"image" is a path, a list of paths, or absent; a relative path is relative to the file's own folder. "source", "type" and
"alternatives" may be absent. "alternatives" is a list of further conversations about the same images: an epoch takes
one of them or "conversations". Other keys are not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from config import InputError
from dataset.json_stream import NotJson, stream_json

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")
INDEX_VERSION = "2"  # raise it when the index, or what counts as a good record, changes


class RecordError(InputError):
    """A record that cannot be used. `reason` is a short slug to count by, `detail` the sentence for a person."""

    def __init__(self, reason: str, detail: str, where: str = ""):
        super().__init__(f"{where}: {detail}" if where else detail)
        self.reason, self.detail, self.where = reason, detail, where

    def __reduce__(self):  # by default it would be rebuilt from its message alone, and loader workers pickle it
        return type(self), (self.reason, self.detail, self.where)


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    content: str


Conversation = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample. Every conversation in it carries one `<image>` per path in `images`, in the paths' order."""

    id: str
    images: tuple[str, ...]
    conversations: Conversation
    source: str = ""
    type: str = ""
    alternatives: tuple[Conversation, ...] = ()

    def at_epoch(self, seed: int, epoch: int) -> Conversation:
        """The conversation of this epoch (from 0): n conversations are all taken once in every n epochs, each time in a
        new order that depends on the seed and the id alone."""
        choices = (self.conversations, *self.alternatives)
        if len(choices) == 1:
            return self.conversations
        cycle, position = divmod(epoch, len(choices))

        def rank(index: int) -> bytes:
            return hashlib.blake2b(f"{seed}/{cycle}/{index}/{self.id}".encode(), digest_size=8).digest()

        return choices[sorted(range(len(choices)), key=rank)[position]]


def parse_record(obj: object, where: str) -> Record:
    """The record that a decoded JSON object describes. `where` ("qa.jsonl line 812") opens the message of an error.

    Raises RecordError with one of these reasons: wrong_type, bad_unicode, unknown_role, system_not_first,
    assistant_first, two_users_in_a_row, two_assistants_in_a_row, no_answer, empty_question, empty_answer,
    mark_outside_question, marks_and_pictures_disagree.
    """
    try:
        return _parse(obj)
    except RecordError as error:
        name = obj.get("id") if isinstance(obj, dict) else None
        raise RecordError(error.reason, error.detail, f'{where} ("{name}")' if name else where) from None


def _parse(obj: object) -> Record:
    if not isinstance(obj, dict):
        raise RecordError("wrong_type", f"a record is a JSON object, not {_kind(obj)}.")
    if not obj.get("id"):
        raise RecordError("wrong_type", '"id" is missing or empty; give every record its own text id.')
    images = obj.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise RecordError("wrong_type", f'"image" is a path, a list of paths or null, not {_kind(images)}.')
    if not all(images):
        raise RecordError("wrong_type", '"image" holds an empty path; leave it out where there is no image.')
    alternatives = obj.get("alternatives") or []
    if not isinstance(alternatives, list):
        raise RecordError("wrong_type", f'"alternatives" is a list of conversations, not {_kind(alternatives)}.')
    return Record(
        id=_text(obj["id"], '"id"'),
        images=tuple(_text(path, '"image"') for path in images),
        conversations=_conversation(obj.get("conversations"), len(images)),
        source=_text(obj.get("source") or "", '"source"'),
        type=_text(obj.get("type") or "", '"type"'),
        alternatives=tuple(_conversation(turns, len(images)) for turns in alternatives),
    )


# The roles that may follow a role, and start a conversation.
_NEXT = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


def _conversation(turns: object, image_count: int) -> Conversation:
    if not isinstance(turns, list):
        raise RecordError("wrong_type", f'"conversations" is a list of turns, not {_kind(turns)}.')
    conversation = []
    marks, previous = 0, None
    for turn in turns:
        if not isinstance(turn, dict):
            raise _at(conversation, "wrong_type", f'is {_kind(turn)}; expected {{"role", "content"}}')
        role, content = turn.get("role"), _text(turn.get("content"), '"content" of a turn')
        if role not in _NEXT[previous]:
            raise _wrong_order(role, previous, conversation)
        if IMAGE_MARK in content:
            if role != "user":
                raise _at(conversation, "mark_outside_question", f'({role}) holds "{IMAGE_MARK}"; only a user turn may')
            marks += content.count(IMAGE_MARK)
        if (not content or content.isspace()) and role != "system":
            raise _at(conversation, "empty_answer" if role == "assistant" else "empty_question", f"({role}) is empty")
        conversation.append(Turn(role, content))
        previous = role
    if previous != "assistant":
        end = f"ends with a {previous} turn" if previous else "has no turns"
        raise RecordError("no_answer", f"the conversation {end}; it must end with an assistant turn.")
    if marks != image_count:
        raise RecordError(
            "marks_and_pictures_disagree",
            f'{marks} "{IMAGE_MARK}" mark{"" if marks == 1 else "s"} but {image_count} image '
            f"path{'' if image_count == 1 else 's'}; give one path per mark.",
        )
    return tuple(conversation)


def _at(before: list[Turn], reason: str, what: str) -> RecordError:
    return RecordError(reason, f"turn {len(before) + 1} {what}.")


def _wrong_order(role: object, previous: str | None, before: list[Turn]) -> RecordError:
    if role not in ROLES:
        return _at(before, "unknown_role", f"has role {json.dumps(role)}; expected {', '.join(ROLES)}")
    if role == "system":
        return _at(before, "system_not_first", "is a system turn; only the first may be one")
    if role == "assistant" and previous != "assistant":
        return _at(before, "assistant_first", "is an answer to nothing; a user turn comes first")
    return _at(before, f"two_{role}s_in_a_row", f"and the one before are both {role} turns")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{what} is text, not {_kind(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError("bad_unicode", f"{what} holds half a surrogate pair, which is no character.") from None
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "missing")


class QAFile:
    """A QA file as a sequence of records, read from disk one at a time: `len(qa)`, `qa[i]`.

    The first opening checks every record and keeps where each begins beside the file (`<name>.index.safetensors`; in
    memory if the folder cannot be written); later openings read only that, unless the file changed. May be shared
    with forked workers and pickled to spawned ones.

    Raises RecordError for a record that cannot be used (file, line, id), InputError for a file that cannot be read or in
    which two records have the same id.
    """

    sources: list[str]  # the distinct "source" values, "" for none
    source_of: np.ndarray  # int32 [n], each record's place in `sources`

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.folder = self.path.parent
        self._descriptor: int | None = None
        try:
            state = self.path.stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; expected a QA file. Has the data been prepared?") from None
        self._stamp = {"version": INDEX_VERSION, "size": str(state.st_size), "mtime_ns": str(state.st_mtime_ns)}
        index = self.path.with_name(self.path.name + ".index.safetensors")
        if not self._load(index):
            self._build()
            self._save(index)

    def __len__(self) -> int:
        return len(self.source_of)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        begin, end = map(int, self._offsets[index % len(self) :][:2])
        text = os.pread(self._open(), end - begin, begin).decode()
        # The bytes run on to the next record, so in a list a comma follows the value.
        return parse_record(json.JSONDecoder().raw_decode(text)[0], self.path.name)

    def image_paths(self, record: Record) -> list[Path]:
        """Where the record's images lie, in order."""
        return [self.folder / path for path in record.images]

    def _load(self, index: Path) -> bool:
        try:
            with safe_open(index, framework="numpy") as file:
                metadata = file.metadata() or {}
                if any(metadata.get(key) != value for key, value in self._stamp.items()):
                    return False
                self.sources = json.loads(metadata["sources"])
                self._offsets, self.source_of = file.get_tensor("offsets"), file.get_tensor("source_of")
        except (OSError, SafetensorError):
            return False
        return True

    def _build(self) -> None:
        offsets, source_of, sources = array("q"), array("i"), {}
        places, hashes = array("q"), array("q")
        for item in stream_json(self.path):
            word, place = ("line", item.line) if item.line else ("item", item.index)
            where = f"{self.path} {word} {place}"
            if isinstance(item.value, NotJson):
                raise RecordError("not_json", item.value, where)
            record = parse_record(item.value, where)
            offsets.append(item.offset)
            source_of.append(sources.setdefault(record.source, len(sources)))
            places.append(place)
            hashes.append(hash(record.id))
        offsets.append(int(self._stamp["size"]))
        self._offsets, self.source_of = np.array(offsets, np.int64), np.array(source_of, np.int32)
        self.sources = list(sources)
        for first, second in _equal_pairs(np.array(hashes, np.int64)):
            if self[first].id == self[second].id:
                raise InputError(
                    f'{self.path}: {word}s {places[first]} and {places[second]} have the same id "{self[first].id}"; '
                    "give every record its own."
                )

    def _save(self, index: Path) -> None:
        aside = index.with_name(f".{index.name}.{os.getpid()}")
        try:
            save_file(
                {"offsets": self._offsets, "source_of": self.source_of},
                aside,
                metadata={**self._stamp, "sources": json.dumps(self.sources)},
            )
            os.replace(aside, index)
        except (OSError, SafetensorError):
            aside.unlink(missing_ok=True)  # a folder that cannot be written: this process has the index in memory

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            state = os.fstat(self._descriptor)
            if (str(state.st_size), str(state.st_mtime_ns)) != (self._stamp["size"], self._stamp["mtime_ns"]):
                raise InputError(f"{self.path}: changed while it was in use; start again.")
        return self._descriptor

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptor": None}

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


def _equal_pairs(values: np.ndarray) -> list[tuple[int, int]]:
    """Neighbours of equal value (i < j), smallest j first."""
    order = np.argsort(values, kind="stable")
    equal = np.flatnonzero(values[order[:-1]] == values[order[1:]])
    return sorted(zip(order[equal].tolist(), order[equal + 1].tolist(), strict=True), key=lambda pair: pair[1])
