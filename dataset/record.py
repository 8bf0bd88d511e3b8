"""The QA format: parse and check one record.

Data preparation writes records that `check_record` accepts; training and scoring use what `parse_record` returns. This
module knows nothing about tokenizers, the contents of images or the formats of raw annotations, and opens no file.

A record is one JSON object:

    {"id": "coco:1183", "image": "images/1183.jpg", "source": "coco", "type": "colour",
     "conversations": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

"image" is a path, a list of paths, or absent; a relative path is relative to the folder of the QA file. "source",
"type" and "alternatives" are optional. "alternatives" is a list of further conversations about the same images: each
epoch uses one of them or "conversations". Other keys are ignored.

Three optional keys are for scoring the last answer alone, and training ignores them. "answers" is a list of reference
answers; an empty list says that none is known. "options" is a list of the texts of options A, B, C ... "group" names the
records that count as right only together.

A text outside of a conversation is a single turn, {"role": "text", "content": "..."}. All of its tokens are supervised.
It is meant for a language model trained from scratch.

An answer with "loss": false is read, but is not a target of training; at least one answer of a conversation is.

A "content" is a string, in which every `<image>` of a user turn marks one image, or a list of parts, whose text is
always literal: [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

from config import InputError, shortened

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant", "text")
LONGEST_DETAIL, LONGEST_ID = 1000, 200  # characters of a record that a message repeats
FORMAT_VERSION = "6"  # increase it when the definition of a valid record changes


class RecordError(InputError):
    """An invalid record. `reason` is a short slug for counting, `detail` a sentence for the user, shortened if long."""

    def __init__(self, reason: str, detail: str, where: str = ""):
        detail = shortened(detail, LONGEST_DETAIL)
        super().__init__(f"{where}: {detail}" if where else detail)
        self.reason, self.detail, self.where = reason, detail, where

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str, str]]:
        # Loader workers pickle the error, and an exception is by default rebuilt from its message alone.
        return type(self), (self.reason, self.detail, self.where)


@dataclass(frozen=True, slots=True)
class Image:
    """Placeholder for one image among the parts of a turn's content."""

    def __repr__(self) -> str:
        return "IMAGE"


IMAGE = Image()
Part = str | Image


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    content: a string, with `<image>` marks if the role is user. A user turn may have a tuple of parts instead, in which
    no string is empty or follows another string. `parts_of` reads both forms.
    is_target: whether the loss covers the turn. Only answers and texts can be targets.
    """

    role: str
    content: str | tuple[Part, ...]
    is_target: bool = True


Conversation = tuple[Turn, ...]


def parts_of(turn: Turn) -> list[Part]:
    """Return the images and texts of a turn, in order.

    Marks are split only here: "<image>\nWho?" of a user -> [IMAGE, "\nWho?"]. A mark inside a text part, or in a turn
    of another role, remains seven characters of text.
    """
    if not isinstance(turn.content, str):
        return list(turn.content)
    if turn.role != "user":
        return [turn.content]
    first, *rest = turn.content.split(IMAGE_MARK)
    parts: list[Part] = [first]
    for text in rest:
        parts += [IMAGE, text]
    return [part for part in parts if part != ""]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample. Every conversation in it has one image per path in `images`, in the same order."""

    id: str
    images: tuple[str, ...]
    conversations: Conversation
    source: str = ""
    type: str = ""
    alternatives: tuple[Conversation, ...] = ()
    answers: tuple[str, ...] | None = None  # references; None: the last answer is the only one
    options: tuple[str, ...] = ()
    group: str = ""

    def at_epoch(self, seed: int, epoch: int) -> Conversation:
        """Return the conversation for an epoch, counted from 0.

        Every n epochs use each of the n conversations once, in an order that depends only on the seed, the id and the
        number of completed cycles.
        """
        choices = (self.conversations, *self.alternatives)
        if len(choices) == 1:
            return self.conversations
        cycle, position = divmod(epoch, len(choices))

        def rank(index: int) -> bytes:
            return hashlib.blake2b(f"{seed}/{cycle}/{index}/{self.id}".encode(), digest_size=8).digest()

        return choices[sorted(range(len(choices)), key=rank)[position]]


def parse_record(obj: object, where: str) -> Record:
    """Build the record described by a decoded JSON object.

    where: the place of the object ("qa.jsonl line 812"), put at the start of an error message.

    Raises RecordError with one of these reasons: wrong_type, bad_unicode, unknown_role, system_not_first,
    assistant_first, two_users_in_a_row, two_assistants_in_a_row, text_not_alone, no_answer, empty_question,
    empty_answer, mark_outside_question, marks_and_pictures_disagree.
    """
    if _is_common(obj):
        return _read_common(cast(dict, obj))
    try:
        return _parse(obj)
    except RecordError as error:
        raise located(error, obj, where) from None


def check_record(obj: object) -> None:
    """Raise the RecordError that `parse_record` would raise, without building the record.

    Several times faster than `parse_record` for a valid record.
    """
    if _is_common(obj):
        return
    try:
        _parse(obj)
    except RecordError as error:
        raise located(error, obj, "") from None


def located(error: RecordError, obj: object, where: str) -> RecordError:
    """Return a copy of `error` whose message starts with the place and the id of the decoded JSON object `obj`."""
    name = obj.get("id") if isinstance(obj, dict) and isinstance(obj.get("id"), str | int) else None
    return RecordError(error.reason, error.detail, f'{where} ("{shortened(str(name), LONGEST_ID)}")' if name else where)


def encode_refused_row(
    *, source: str, file: str, line: int | None, index: int, id: object, reason: str, detail: str
) -> bytes:
    """Encode one refused record as a line of JSON, without the newline.

    line: counted from 1, None in a file without lines. The row has "line" if it is given, otherwise "index", from 0.
    An unpaired surrogate is written as its JSON escape. A long id or detail is shortened.
    """
    id = shortened(id, LONGEST_ID) if isinstance(id, str) else id
    detail = shortened(detail, LONGEST_DETAIL)
    place = {"line": line} if line else {"index": index}
    row = {"source": source, "file": file, **place, "id": id, "reason": reason, "detail": detail}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _is_common(obj: Any) -> bool:
    """Return whether a decoded JSON object is a valid record of a common kind. For any other object `_parse` decides."""
    try:
        return _surely_valid(obj)
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
        return False


def _read_common(obj: dict[str, Any]) -> Record:
    """Return what `_parse` returns, for an object of which `_is_common` is true."""
    image, alternatives = obj.get("image"), obj.get("alternatives") or ()
    return Record(
        obj["id"],
        tuple(image) if image.__class__ is list else () if image is None else (image,),
        _read_common_turns(obj["conversations"]),
        source=obj.get("source") or "",
        type=obj.get("type") or "",
        alternatives=tuple(map(_read_common_turns, alternatives)) if alternatives else (),
    )


def _read_common_turns(turns: list[dict[str, str]]) -> Conversation:
    return tuple([Turn(turn["role"], turn["content"]) for turn in turns])


_SCORING = frozenset(("answers", "options", "group"))


def _surely_valid(obj: Any) -> bool:
    """Return whether a decoded JSON object is a valid record of a common kind, or raise what `_is_common` catches."""
    name, image = obj["id"], obj.get("image")
    if not name or obj.__class__ is not dict or not _SCORING.isdisjoint(obj):
        return False
    if not name.isascii():
        name.encode()  # raises UnicodeEncodeError for an unpaired surrogate, like the other calls of encode() here
    paths = image if image.__class__ is list else () if image is None else (image,)
    for path in paths:
        if not path:
            return False
        if not path.isascii():
            path.encode()
    source, kind = obj.get("source"), obj.get("type")
    if source and not source.isascii():
        source.encode()
    if kind and not kind.isascii():
        kind.encode()
    image_count = len(paths)
    if not _surely_valid_turns(obj["conversations"], image_count):
        return False
    alternatives = obj.get("alternatives")
    return not alternatives or all(_surely_valid_turns(turns, image_count) for turns in alternatives)


def _surely_valid_turns(turns: list, image_count: int) -> bool:
    """Return whether the turns alternate between user and assistant, and every content is a string that is not blank."""
    if turns.__class__ is not list:
        return False
    marks, role = 0, "user"
    for turn in turns:
        content = turn["content"]
        if turn["role"] != role or not content or content.isspace() or len(turn) != 2:
            return False
        if not content.isascii():
            content.encode()
        if role == "user":
            marks += content.count(IMAGE_MARK)
            role = "assistant"
        elif IMAGE_MARK in content:
            return False
        else:
            role = "user"
    return marks == image_count and role == "user" and bool(turns)


def _parse(obj: object) -> Record:
    if not isinstance(obj, dict):
        raise RecordError("wrong_type", f"a record must be a JSON object, not {_kind(obj)}.")
    if not obj.get("id"):
        raise RecordError("wrong_type", '"id" is missing or empty; give every record its own text id.')
    images = obj.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list):
        raise RecordError("wrong_type", f'"image" must be a path, a list of paths or null, not {_kind(images)}.')
    if not all(images):
        raise RecordError("wrong_type", '"image" contains an empty path; omit "image" if there is none.')
    alternatives = obj.get("alternatives") or []
    if not isinstance(alternatives, list):
        raise RecordError("wrong_type", f'"alternatives" must be a list of conversations, not {_kind(alternatives)}.')
    return Record(
        id=_text(obj["id"], '"id"'),
        images=tuple(_text(path, '"image"') for path in images),
        conversations=_conversation(obj.get("conversations"), len(images)),
        source=_text(obj.get("source") or "", '"source"'),
        type=_text(obj.get("type") or "", '"type"'),
        alternatives=tuple(_conversation(turns, len(images)) for turns in alternatives),
        answers=None if obj.get("answers") is None else _texts(obj["answers"], '"answers"'),
        options=_texts(obj.get("options") or [], '"options"'),
        group=_text(obj.get("group") or "", '"group"'),
    )


# Role -> the roles that may follow it; None: the roles that may start a conversation.
_NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user", "text"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "text": (),
}


def _conversation(turns: object, image_count: int) -> Conversation:
    if not isinstance(turns, list):
        raise RecordError("wrong_type", f'"conversations" must be a list of turns, not {_kind(turns)}.')
    conversation: list[Turn] = []
    marks, previous = 0, None
    for turn in turns:
        if not isinstance(turn, dict):
            raise _at(conversation, "wrong_type", f'is {_kind(turn)}; expected {{"role", "content"}}')
        role, content = turn.get("role"), turn.get("content")
        if isinstance(content, list):
            content = _parts(content, conversation)
            images, what = content.count(IMAGE), "an image part"
            words = "".join(part for part in content if isinstance(part, str))
        else:
            words = content = _text(content, '"content" of a turn')
            images, what = content.count(IMAGE_MARK), f'"{IMAGE_MARK}"'
        if role not in _NEXT[previous]:
            raise _wrong_order(role, previous, conversation)
        if images and role != "user":
            raise _at(conversation, "mark_outside_question", f"({role}) contains {what}; only a user turn may")
        if (not words or words.isspace()) and not images and role != "system":
            raise _at(conversation, "empty_question" if role == "user" else "empty_answer", f"({role}) is empty")
        loss = turn.get("loss", True)
        if loss not in (True, False) or not loss and role != "assistant":
            raise _at(conversation, "wrong_type", f'({role}) has "loss": {_shown(loss)}; only an answer may have false')
        conversation.append(Turn(role, content if role == "user" else words, bool(loss)))
        marks += images
        previous = role
    if previous not in ("assistant", "text"):
        end = f"ends with a {previous} turn" if previous else "has no turns"
        raise RecordError("no_answer", f"the conversation {end}; it must end with an assistant turn.")
    if not any(turn.is_target for turn in conversation if turn.role in ("assistant", "text")):
        raise RecordError("no_answer", 'every answer has "loss": false, so there is nothing to learn.')
    if marks != image_count:
        raise RecordError(
            "marks_and_pictures_disagree",
            f'{marks} "{IMAGE_MARK}" mark{"" if marks == 1 else "s"} but {image_count} image '
            f"path{'' if image_count == 1 else 's'}; give one path per mark.",
        )
    return tuple(conversation)


_PARTS = '{"type": "image"} or {"type": "text", "text": "..."}'


def _parts(parts: list, before: list[Turn]) -> tuple[Part, ...]:
    """Parse a list of parts. Adjacent texts are joined, because a content is tokenised part by part."""
    read: list[Part] = []
    for part in parts:
        if not isinstance(part, dict):
            raise _at(before, "wrong_type", f"contains {_kind(part)} instead of a part; expected {_PARTS}")
        kind = part.get("type")
        if kind == "image" and len(part) == 1:
            read.append(IMAGE)
        elif kind == "text" and len(part) == 2 and "text" in part:
            read.append(_text(part["text"], '"text" of a part'))
        else:  # an unknown type, or keys of another format, for example the image's own path
            known = kind in ("image", "text")
            found = f"with {', '.join(map(_shown, list(part)[:4]))}" if known else f"of type {_shown(kind)}"
            raise _at(before, "wrong_type", f"contains a part {found}; expected {_PARTS}")
    joined: list[Part] = []
    for is_image, group in groupby(read, key=lambda part: part is IMAGE):
        if is_image:
            joined.extend(group)
        else:
            joined.append("".join(part for part in group if isinstance(part, str)))
    return tuple(part for part in joined if part != "")


def _at(before: list[Turn], reason: str, what: str) -> RecordError:
    return RecordError(reason, f"turn {len(before) + 1} {what}.")


def _wrong_order(role: object, previous: str | None, before: list[Turn]) -> RecordError:
    if role not in ROLES:
        return _at(before, "unknown_role", f"has role {_shown(role)}; expected {', '.join(ROLES)}")
    if "text" in (role, previous):
        return _at(before, "text_not_alone", f"({role}) is not alone; a text turn must be the only turn of its record")
    if role == "system":
        return _at(before, "system_not_first", "is a system turn; only the first turn may be one")
    if role == "assistant" and previous != "assistant":
        return _at(before, "assistant_first", "is an answer without a question; a user turn must come first")
    return _at(before, f"two_{role}s_in_a_row", f"and the turn before it are both {role} turns")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{what} must be text, not {_kind(value)}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError("bad_unicode", f"{what} contains an unpaired surrogate, not a valid character.") from None
    return value


def _texts(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise RecordError("wrong_type", f"{what} must be a list of texts, not {_kind(value)}.")
    return tuple(_text(one, what) for one in value)


def _shown(value: object) -> str:
    """Format a value for a message: short, and safe for deeply nested values."""
    return json.dumps(value[:40]) if isinstance(value, str) else _kind(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "missing")
