"""Names of the keys of raw records: which of them hold images, questions and answers, and which hold no content.

A reader names the keys that it reads. `refuse_unread` refuses a record with any other key that carries content, so that
nothing is dropped without a word: text or an image under an unknown name would make another record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set
from functools import lru_cache

from dataset.record import RecordError
from visual.images import IMAGE_SUFFIXES

# Keys with the images of a record, most explicit first. The Chinese names are headers of tables.
IMAGE_KEYS = tuple(
    (
        "image images image_bytes image_base64 image_base64_str image_path image_paths image_file image_files "
        "image_name image_names img imgs img_path img_paths img_file img_name file_name filename filepath file_path "
        "path picture photo image_url image_urls img_url image_id "
        "图片 图像 照片 图片路径 图像路径 图片名 图片名称 图片文件 文件名 文件路径 路径"
    ).split()
)
_IMAGE_ORDER = {key: number for number, key in enumerate(IMAGE_KEYS)}
# Names of a table's other columns -> the name that `dataprocess.rows` knows.
COLUMN_NAMES = {
    **dict.fromkeys(
        ("question", "query", "instruction", "instructions", "问题", "提问", "题目", "指令", "问"), "question"
    ),
    **dict.fromkeys(("input", "inputs", "输入"), "input"),
    **dict.fromkeys(
        ("answer", "response", "output", "outputs", "答案", "回答", "回复", "标准答案", "输出", "答"), "answer"
    ),
    "multiple_choice_answer": "answer",
    "answers": "answers",
    **dict.fromkeys(("caption", "captions", "text", "description", "blip_caption"), "caption"),
    **dict.fromkeys(("描述", "图片描述", "图像描述", "图片说明", "说明", "文本"), "caption"),
    **dict.fromkeys(("hint", "context", "提示"), "hint"),
    **dict.fromkeys(("options", "choices", "选项"), "options"),
    **dict.fromkeys(("system", "system_prompt", "系统提示"), "system"),
    **dict.fromkeys(("id", "编号", "序号"), "id"),
    **dict.fromkeys(("type", "类型"), "type"),
    "history": "history",
}

# A key that ends in one of these words says where a record comes from or what it is like, and holds nothing to learn.
_METADATA = frozenset(
    "id ids idx index uid uuid guid hash md5 sha1 sha256 url urls uri link source sources dataset datasets subset split set "
    "license licence copyright author date time timestamp created captured version model generator annotator worker "
    "category categories subcategory domain task subject topic skill grade level difficulty language languages lang locale "
    "width height size length tokens count num score scores rating ratings quality confidence similarity meta metadata info "
    "tag tags mode min max rank sentids cocoid 来源 日期 作者 难度 语言 分类".split()
)
# These words say that a key belongs to a question, and that the text beside it may not be a caption.
_OF_QUESTIONS = frozenset(
    "question questions answer answers query label labels option options choice choices prompt".split()
)
# Keys about a question that hold nothing to learn beside the question itself.
QUESTION_NAMES = frozenset(
    "question_id questionId question_type questionType question_types answer_type answerType answer_id".split()
)
_OF_IMAGES = frozenset("image images img imgs picture pictures photo photos pic 图片 图像".split())
_SIZES = frozenset("width height size count num scores ratings score rating".split())
_OTHER_MEDIA = frozenset("video videos audio audios".split())
# Keys that say how much a record or turn counts in the loss.
_WEIGHTS = frozenset("weight loss loss_weight sample_weight train loss_mask".split())

_words = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+").findall
_is_measure = re.compile(
    r"\s*([-+]?\d*\.?\d*(e[-+]?\d+)?|nan|true|false|null|none)\s*\Z", re.IGNORECASE | re.ASCII
).match
_DEEPEST = 8  # nesting that is searched for content; more counts as content


def is_empty(value: object, depth: int = 0) -> bool:
    """True for null, NaN, blank text and objects or lists of nothing else, as tables write a value that is missing."""
    if value is None or value != value or value == "":
        return True
    if isinstance(value, str):
        return value.isspace()
    if isinstance(value, (list, dict)) and depth < _DEEPEST:
        return all(is_empty(one, depth + 1) for one in (value.values() if isinstance(value, dict) else value))
    return False


def shown(value: object) -> str:
    """The beginning of a value, for a message."""
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    if isinstance(value, str):
        text = json.dumps(value[:60], ensure_ascii=False)
        return text if len(value) <= 60 else f"{text[:-1]}..."
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)[:60]


def has_content(value: object, depth: int = 0) -> bool:
    """True if a value contains text or bytes. Numbers and truth values, also as text, are measures of a record."""
    if isinstance(value, str):
        return not value.isspace() and _is_measure(value) is None
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return depth >= _DEEPEST or any(has_content(one, depth + 1) for one in inner)
    return isinstance(value, bytes) and bool(value)


@lru_cache(maxsize=4096)
def words_of(key: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _words(key[:100]))


@lru_cache(maxsize=4096)
def is_metadata(key: str) -> bool:
    words = words_of(key)
    return bool(words) and words[-1] in _METADATA and not _OF_QUESTIONS.intersection(words)


def is_of_question(key: str) -> bool:
    """True for a key that belongs to a question, such as "question_id", "label" or an option "A"."""
    return not _OF_QUESTIONS.isdisjoint(words_of(key)) or len(key) == 1 and key.isascii() and key.isalpha()


def image_keys_of(obj: dict) -> list[str]:
    """The keys that hold the images of a record, most explicit first."""
    return sorted(obj.keys() & _IMAGE_ORDER.keys(), key=_IMAGE_ORDER.__getitem__)


def refuse_unread(obj: dict, read: Set[str], *, has_image: bool) -> None:
    """Raise RecordError (unknown_key, wrong_type) if `obj` has content under a key that is not in `read`.

    has_image: whether an image was read. Otherwise no other key may seem to name one.
    """
    for key in obj.keys() - read:
        value = obj[key]
        if is_empty(value):
            continue
        words = words_of(key)
        if not _OTHER_MEDIA.isdisjoint(words):
            raise unsupported(key)
        if key in _WEIGHTS:
            if value is not True and value != 1:
                raise RecordError("unknown_key", f'"{key}" is {shown(value)}; records cannot be weighted one by one.')
        elif not has_image and _may_name_image(key, words, value):
            raise RecordError(
                "unknown_key", f'"{key}" seems to name an image ({shown(value)}), but is not read; name it "image".'
            )
        elif not is_metadata(key) and (has_content(value) or is_of_question(key)):
            raise RecordError(
                "unknown_key",
                f'"{key[:80]}" is not read, and holds {shown(value)}. To leave it out, write columns: {{ignore: '
                f"[{key[:80]}]}} into the source; if it is the answer, for example, columns: {{answer: {key[:80]}}}.",
            )


def unsupported(key: str) -> RecordError:
    return RecordError(
        "wrong_type", f'"{key}" is not read; expected "image" with the path of a file, or a list of paths.'
    )


def _may_name_image(key: str, words: tuple[str, ...], value: object) -> bool:
    if not _OF_IMAGES.isdisjoint(words) and words[-1] not in _SIZES:
        return True
    return names_image(value)


def names_image(value: object, depth: int = 0) -> bool:
    """True if a value contains the path, address or bytes of an image."""
    if isinstance(value, str):
        start = value[:4096].strip()
        return start.startswith("data:image/") or start.lower().endswith(tuple(IMAGE_SUFFIXES))
    if isinstance(value, (list, dict)) and depth < _DEEPEST:
        return any(names_image(one, depth + 1) for one in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes) and bool(value)
