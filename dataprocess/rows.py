"""Rows of tables: an image with a question and its answer, or with captions, in any container."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from dataprocess.keys import COLUMN_NAMES, IMAGE_KEYS, QUESTION_NAMES, is_empty, is_of_question, refuse_unread, shown
from dataprocess.marks import literal, read_foreign_marks
from dataprocess.media import Reference, images_in, images_of
from dataset.record import IMAGE_MARK, RecordError

# Captions have no questions. Two prompts alternate, in the caption's language. "描述一下这张图片。" means "Describe this
# image.", "图片里有什么？" means "What is in the image?".
CAPTION_PROMPTS = ("描述一下这张图片。", "图片里有什么？")
ENGLISH_CAPTION_PROMPTS = ("Describe this image.", "What is in this image?")

_is_chinese = re.compile("[\u3400-\u9fff]").search
LETTERS = "ABCDEFGHIJ"  # of the options of a question
_CAPTION_KEYS = frozenset((*IMAGE_KEYS, "caption", "id", "type"))
_QUESTION_KEYS = frozenset((*IMAGE_KEYS, *QUESTION_NAMES, "id", "type", "question", "input", "answer", "answers"))
_OPTIONAL_KEYS = frozenset(("hint", "options", "system", "history"))
# In these columns of other projects `<image>` is a mark; in "question" it is text.
_MARKED = frozenset(("query", "instruction", "instructions"))


class Draft(NamedTuple):
    """A raw record in the terms of the QA format.

    If there are several conversations, the reader must check that each has an answer in valid UTF-8.
    """

    id: str | None  # None if the record has no id; its number in the source is used instead
    images: list  # paths relative to the source's image folder, addresses, base64 text, or the bytes of images
    conversations: list  # lists of {"role", "content"}; more than one only if the format gives several answers
    type: str = ""
    repairs: Sequence[str] = ()
    is_valid: bool = False  # every conversation is valid UTF-8, one question with one mark and an answer; one image


draft = partial(tuple.__new__, Draft)  # takes a tuple of the six fields; half the cost of the constructor


@lru_cache(maxsize=4096)
def column_name(key: str) -> str:
    """The name by which this module knows a column, from a header in any case; an unknown header itself."""
    name = key.strip().lower()
    return name if name in IMAGE_KEYS else COLUMN_NAMES.get(name, key)


def read_csv(obj: dict, index: int) -> Draft:
    """A row of a table: an image, and a question with its answer or captions.

    Columns may have the names of other projects: instruction, input and output (alpaca, M3IT), query, response and history
    (ms-swift), hint, options A, B, C ... or a list of choices (VLMEvalKit, ScienceQA), a list of answers, of which the most
    frequent one is used (VQAv2, TextVQA). "<image>" is plain text, except in "query" and "instruction". A row with a
    question and without an image is text only.
    """
    columns, row = {column_name(key) for key in obj}, _row_of(obj)
    images = images_of(row)
    is_asked = bool(columns & {"question", "input"}) and bool(columns & {"answer", "answers"})
    if is_asked and (row.keys() & {"question", "input", "answer", "answers"} or "caption" not in row):
        return _asked(row, images, is_marked=any(key.strip().lower() in _MARKED for key in obj))
    if "caption" not in columns:
        raise RecordError("wrong_type", "neither a question with its answer nor a caption.")
    if others := sorted(key for key in row if key not in _CAPTION_KEYS and is_of_question(key)):
        raise RecordError(
            "unknown_key",
            f'"{others[0][:80]}" is in a row with a text that may be a question or a caption. Say what it is in "columns" '
            "of the source, for example {question: text, answer: label}.",
        )
    refuse_unread(row, _CAPTION_KEYS, has_image=bool(images))
    if not images:
        raise RecordError("missing_image", "a caption without the path of its image.")
    caption, repairs = as_text(row.get("caption", ""))
    name, kind = record_id(row), record_type(row)
    if isinstance(caption, list):
        return captioned(name=name, images=images, captions=caption, index=index)._replace(type=kind)
    if not isinstance(caption, str):
        raise RecordError("wrong_type", f'"caption" is {shown(caption)}; expected a text or a list of texts.')
    return Draft(name, images, [one_caption(caption, index)], type=kind, repairs=repairs)


def is_row(obj: dict, has_image: bool) -> bool:
    """True if an object has the columns of a question with its answer, or of a caption of an image."""
    columns = {column_name(key) for key in obj}
    is_asked = bool(columns & {"question", "input"}) and bool(columns & {"answer", "answers"})
    return is_asked or "caption" in columns and (has_image or any(key in IMAGE_KEYS for key in columns))


def _row_of(obj: dict) -> dict:
    """The cells that are not empty, under the names that `column_name` gives."""
    row: dict = {}
    for key, value in obj.items():
        name = column_name(key)
        if not is_empty(value):
            if name in row and row[name] != value:
                raise RecordError("unknown_key", f'two columns hold the {name}, one of them "{key[:80]}"; keep one.')
            row[name] = value
    return row


def _asked(row: dict, images: list[Reference], *, is_marked: bool) -> Draft:
    """A question with its answer, and what belongs to them: a hint, options, a system prompt, the turns before."""
    repairs: list[str] = []

    def text(name: str) -> object:
        value, rules = as_text(row.get(name, ""))
        repairs.extend(rules)
        return value

    options, letters = _options(row)
    refuse_unread(row, _QUESTION_KEYS | _OPTIONAL_KEYS | letters, has_image=bool(images))
    answer = text("answer")
    if "answer" not in row and "answers" in row:
        answer = _most_frequent(row["answers"])
        repairs.append("most_frequent_answer_used")
    if options and isinstance(number := row.get("answer"), int) and not letters:
        if not 0 <= number < len(options):
            raise RecordError("wrong_type", f'"answer" is {number}, but there are {len(options)} options.')
        answer, repairs = LETTERS[number], []
    lines = [line for line in (text("hint"), text("question"), text("input")) if line != ""]
    if options:
        lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
        repairs.append("options_added_to_question")
    if not all(isinstance(line, str) for line in lines):
        raise RecordError("wrong_type", f'"question" is {shown(row.get("question"))}; expected text.')
    asked = "\n".join(map(str, lines))
    before = _history(row.get("history", []))
    if "system" in row:
        before.insert(0, {"role": "system", "content": row["system"]})
    last = {"role": "user", "content": asked}
    turns = [*before, last]
    if is_marked or images and IMAGE_MARK not in asked or not images and "</img>" in asked:
        turns, images, rules = read_foreign_marks(turns, images)
        repairs, is_marked = repairs + rules, is_marked or bool(rules)
    if not is_marked:
        for turn in turns:
            if turn["role"] != "system":
                turn["content"] = literal(turn["content"])
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = literal(asked if first is last else first["content"], len(images))
    turns.append({"role": "assistant", "content": literal(answer)})
    return Draft(record_id(row), images, [turns], type=record_type(row), repairs=repairs)


def _options(row: dict) -> tuple[list[object], frozenset[str]]:
    """The options of a question, and the keys A, B, C ... that hold them."""
    for letters in (LETTERS, LETTERS.lower()):
        used = [letter for letter in letters if letter in row]
        if len(used) > 1 and "".join(used) == letters[: len(used)]:
            return [as_text(row[letter])[0] for letter in used], frozenset(used)
    options = row.get("options", [])
    if isinstance(options, dict):
        options = [options[key] for key in sorted(options, key=str)]
    if isinstance(options, str):
        options = images_in(options, "options")  # a list that a cell writes as JSON
    if not isinstance(options, list) or not all(isinstance(as_text(one)[0], str) for one in options):
        raise RecordError("wrong_type", f'"options" is {shown(row["options"])}; expected a list of texts.')
    if len(options) > len(LETTERS):
        raise RecordError("wrong_type", f"{len(options)} options; at most {len(LETTERS)} have letters.")
    return [as_text(one)[0] for one in options], frozenset()


def _most_frequent(answers: object) -> object:
    """The most frequent of several answers, the first of equals: texts, or objects as in VQAv2."""
    if not isinstance(answers, list):
        return as_text(answers)[0]
    texts = [as_text(one.get("answer") if isinstance(one, dict) else one)[0] for one in answers]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError("wrong_type", f'"answers" is {shown(answers)}; expected a list of texts.')
    return Counter(texts).most_common(1)[0][0]


def _history(pairs: object) -> list[dict]:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RecordError("wrong_type", f'"history" is {shown(pairs)}; expected a list of [question, answer].')
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def as_text(value: object) -> tuple[object, Sequence[str]]:
    """A number as text, as in a table whose column has numbers, with the name of the repair; another value unchanged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value, ()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value), ["number_written_as_text"]


def question_with_answer(question: object, answer: object, images: int) -> list[dict]:
    """A question with its answer. The images come first, and "<image>" in the texts is plain text."""
    return [
        {"role": "user", "content": literal(question, images)},
        {"role": "assistant", "content": literal(answer)},
    ]


# One object per prompt, shared by all captions.
_PROMPT_TURNS, _ENGLISH_PROMPT_TURNS = (
    [{"role": "user", "content": f"{IMAGE_MARK}\n{prompt}"} for prompt in prompts]
    for prompts in (CAPTION_PROMPTS, ENGLISH_CAPTION_PROMPTS)
)


def one_caption(caption: str, number: int) -> list[dict]:
    """A caption as the answer to a prompt in its language; the two prompts alternate with `number`."""
    prompts = _PROMPT_TURNS if _is_chinese(caption) else _ENGLISH_PROMPT_TURNS
    return [prompts[number % 2], {"role": "assistant", "content": literal(caption)}]


def with_prompts(read: Callable[[dict, int], Draft], prompts: Sequence[str]) -> Callable[[dict, int], Draft]:
    """A reader whose captions answer these prompts instead. They are used in turn over captions and records; captions
    without text do not count. Records that have their own questions stay as they are."""
    turns = [{"role": "user", "content": f"{IMAGE_MARK}\n{prompt}"} for prompt in prompts]
    defaults = {id(turn) for turn in (*_PROMPT_TURNS, *_ENGLISH_PROMPT_TURNS)}

    def read_with_prompts(obj: dict, index: int) -> Draft:
        read_draft = read(obj, index)._replace(is_valid=False)  # the prompts are the user's
        for number, conversation in enumerate(read_draft.conversations, start=index):
            if id(conversation[0]) in defaults:
                conversation[0] = turns[number % len(turns)]
        return read_draft

    return read_with_prompts


def captioned(*, name: str | None, images: list, captions: object, index: int) -> Draft:
    """One conversation for each caption that has any text."""
    if not isinstance(captions, list):
        raise RecordError("wrong_type", f'"caption" is {type(captions).__name__}; expected a list of texts.')
    try:
        text = "\n".join(captions)
        text.encode()
    except TypeError:
        raise RecordError("wrong_type", f'"caption" holds {captions!r:.40}; expected a list of texts.') from None
    except UnicodeEncodeError:
        raise RecordError("bad_unicode", "a caption contains an unpaired surrogate, not a valid character.") from None
    conversations = [  # the first character decides the language of most captions, without the slower search
        [
            (_PROMPT_TURNS if "\u3400" <= caption < "\ua000" or _is_chinese(caption) else _ENGLISH_PROMPT_TURNS)[
                number % 2
            ],
            {"role": "assistant", "content": caption},
        ]
        for number, caption in enumerate(captions, start=index)
        if caption and not caption.isspace()
    ]
    if IMAGE_MARK in text:
        for _, answer in conversations:
            answer["content"] = literal(answer["content"])
    if not conversations:
        raise RecordError("empty_answer", "no caption has any text.")
    repairs = ["empty_captions_left_out"] if len(conversations) < len(captions) else ()
    return draft((name, images, conversations, "", repairs, len(images) == 1))


def record_id(obj: dict) -> str | None:
    name = obj.get("id")
    if name is None or isinstance(name, str):
        return name or None
    if isinstance(name, float) and name.is_integer():  # a column of whole numbers with gaps
        return str(int(name))
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if is_empty(name):
        return None
    raise RecordError("wrong_type", f'"id" is {type(name).__name__}; expected text or a whole number.')


def record_type(obj: dict) -> str:
    kind = obj.get("type")
    if is_empty(kind):
        return ""
    kind = as_text(kind)[0]
    if isinstance(kind, str):
        return kind
    raise RecordError("wrong_type", f'"type" is {type(kind).__name__}; expected text.')
