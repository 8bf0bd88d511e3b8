"""The QA format: what a record is. Preprocessing writes what `check_record` accepts, training and scoring read what
`parse_record` makes of it. Knows nothing of files, tokenizers, images' contents or annotation formats.

A record is one JSON object:

    {"id": "coco:1183", "image": "images/1183.jpg", "source": "coco", "type": "colour",
     "conversations": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

"image" is a path, a list of paths, or absent; a relative path is relative to the file's own folder. "source", "type" and
"alternatives" may be absent. "alternatives" is a list of further conversations about the same images: an epoch takes
one of them or "conversations". Other keys are not read.

A text that is no conversation is a single turn, {"role": "text", "content": "..."}: learned from its first word to its
last, as it stands, for a language model that is made from nothing.

A "content" is a text, in which every `<image>` of a user's turn is a mark for one picture, or a list of parts, in which
text is nothing but text: [{"type": "image"}, {"type": "text", "text": "What does <image> mean?"}].
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby

from config import InputError

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant", "text")
FORMAT_VERSION = "4"  # raise it when what counts as a good record changes


class RecordError(InputError):
    """A record that cannot be used. `reason` is a short slug to count by, `detail` the sentence for a person."""

    def __init__(self, reason: str, detail: str, where: str = ""):
        super().__init__(f"{where}: {detail}" if where else detail)
        self.reason, self.detail, self.where = reason, detail, where

    def __reduce__(self):  # by default it would be rebuilt from its message alone, and loader workers pickle it
        return type(self), (self.reason, self.detail, self.where)


@dataclass(frozen=True, slots=True)
class Image:
    """Stands for one picture among the parts of a turn's content."""

    def __repr__(self):
        return "IMAGE"


IMAGE = Image()
Part = str | Image


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. content: text, with marks if it is a user's; of a user alone also a tuple of parts, in which no
    text is empty or follows another. `parts_of` reads both."""

    role: str
    content: str | tuple[Part, ...]


Conversation = tuple[Turn, ...]


def parts_of(turn: Turn) -> list[Part]:
    """The pictures and texts of a turn, in order. Here alone marks are cut: of a user "<image>\nWho?" -> [IMAGE, "\nWho?"],
    while a mark in a text part, or in anybody else's text, stays seven characters."""
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
    """One sample. Every conversation in it has one picture per path in `images`, in the paths' order."""

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
    assistant_first, two_users_in_a_row, two_assistants_in_a_row, text_not_alone, no_answer, empty_question, empty_answer,
    mark_outside_question, marks_and_pictures_disagree.
    """
    try:
        return _parse(obj)
    except RecordError as error:
        raise located(error, obj, where) from None


def check_record(obj: object) -> None:
    """Raise the RecordError that `parse_record` would, but build nothing: several times faster where a record is good."""
    try:
        if _surely_good(obj):
            return
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
        pass  # not what it is in nearly every record; what is wrong, if anything, is for _parse to say
    try:
        _parse(obj)
    except RecordError as error:
        raise located(error, obj, "") from None


def located(error: RecordError, obj: object, where: str) -> RecordError:
    """`error` of a decoded JSON object, with the place where it stands and its id in front."""
    name = obj.get("id") if isinstance(obj, dict) and isinstance(obj.get("id"), str | int) else None
    return RecordError(error.reason, error.detail, f'{where} ("{name}")' if name else where)


def _surely_good(obj: dict) -> bool:
    """Whether a decoded JSON object is a record of the common kinds without a fault. False, or one of the errors that
    check_record expects, says nothing about it."""
    name, image = obj["id"], obj.get("image")
    if not name or obj.__class__ is not dict:
        return False
    if not name.isascii():
        name.encode()  # raises UnicodeEncodeError for half a surrogate pair, as everywhere here
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
    pictures = len(paths)
    if not _surely_good_talk(obj["conversations"], pictures):
        return False
    alternatives = obj.get("alternatives")
    return not alternatives or all(_surely_good_talk(turns, pictures) for turns in alternatives)


def _surely_good_talk(turns: list, pictures: int) -> bool:
    """Of strings alone, a question and an answer in turn, none of them blank."""
    if turns.__class__ is not list:
        return False
    marks, role = 0, "user"
    for turn in turns:
        content = turn["content"]
        if turn["role"] != role or not content or content.isspace():
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
    return marks == pictures and role == "user" and bool(turns)


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
_NEXT = {
    None: ("system", "user", "text"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "text": (),
}


def _conversation(turns: object, image_count: int) -> Conversation:
    if not isinstance(turns, list):
        raise RecordError("wrong_type", f'"conversations" is a list of turns, not {_kind(turns)}.')
    conversation = []
    marks, previous = 0, None
    for turn in turns:
        if not isinstance(turn, dict):
            raise _at(conversation, "wrong_type", f'is {_kind(turn)}; expected {{"role", "content"}}')
        role, content = turn.get("role"), turn.get("content")
        if isinstance(content, list):
            content = _parts(content, conversation)
            pictures, what = content.count(IMAGE), "an image part"
            words = "".join(part for part in content if part is not IMAGE)
        else:
            words = content = _text(content, '"content" of a turn')
            pictures, what = content.count(IMAGE_MARK), f'"{IMAGE_MARK}"'
        if role not in _NEXT[previous]:
            raise _wrong_order(role, previous, conversation)
        if pictures and role != "user":
            raise _at(conversation, "mark_outside_question", f"({role}) holds {what}; only a user turn may")
        if (not words or words.isspace()) and not pictures and role != "system":
            raise _at(conversation, "empty_question" if role == "user" else "empty_answer", f"({role}) is empty")
        conversation.append(Turn(role, content if role == "user" else words))
        marks += pictures
        previous = role
    if previous not in ("assistant", "text"):
        end = f"ends with a {previous} turn" if previous else "has no turns"
        raise RecordError("no_answer", f"the conversation {end}; it must end with an assistant turn.")
    if marks != image_count:
        raise RecordError(
            "marks_and_pictures_disagree",
            f'{marks} "{IMAGE_MARK}" mark{"" if marks == 1 else "s"} but {image_count} image '
            f"path{'' if image_count == 1 else 's'}; give one path per mark.",
        )
    return tuple(conversation)


_PARTS = '{"type": "image"} or {"type": "text", "text": "..."}'


def _parts(parts: list, before: list[Turn]) -> tuple[Part, ...]:
    """The parts of a content, neighbouring texts as one: it is tokenised part by part."""
    read = []
    for part in parts:
        if not isinstance(part, dict):
            raise _at(before, "wrong_type", f"holds {_kind(part)} for a part; expected {_PARTS}")
        kind = part.get("type")
        if kind == "image" and len(part) == 1:
            read.append(IMAGE)
        elif kind == "text" and len(part) == 2 and "text" in part:
            read.append(_text(part["text"], '"text" of a part'))
        else:  # an unknown kind, or keys that mean something elsewhere, for example a picture of its own
            known = kind in ("image", "text")
            found = f"with {', '.join(map(_shown, list(part)[:4]))}" if known else f"of type {_shown(kind)}"
            raise _at(before, "wrong_type", f"holds a part {found}; expected {_PARTS}")
    joined = []
    for is_image, group in groupby(read, key=lambda part: part is IMAGE):
        run = list(group)
        joined += run if is_image else ["".join(run)]
    return tuple(part for part in joined if part != "")


def _at(before: list[Turn], reason: str, what: str) -> RecordError:
    return RecordError(reason, f"turn {len(before) + 1} {what}.")


def _wrong_order(role: object, previous: str | None, before: list[Turn]) -> RecordError:
    if role not in ROLES:
        return _at(before, "unknown_role", f"has role {_shown(role)}; expected {', '.join(ROLES)}")
    if "text" in (role, previous):
        return _at(
            before, "text_not_alone", f"({role}) stands beside a text turn; a text is the only turn of its record"
        )
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


def _shown(value: object) -> str:
    """A value in a message: never long, and never so deep that it cannot be written."""
    return json.dumps(value[:40]) if isinstance(value, str) else _kind(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "missing")
