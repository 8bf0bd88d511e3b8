"""Raw annotation records for property tests: strategies for rows of every format, and functions that write files.

A row carries the expected result: `dialogs` if it is good, `reasons` if it has a known fault, neither if it was damaged
at random. Written from the published formats, independently of the readers.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

MARK = "<image>"
IMAGE = None  # among the pieces of a turn
PROMPT = object()  # a question that the reader adds: an image and some text

IMAGES = ("a.jpg", "b.png", "sub/c.webp", "图 1.jpg", "000000000009.jpg")
OUTSIDE = ("../secret.jpg", "sub/../../secret.jpg", "escape.jpg", "/etc/passwd", "C:\\secret.jpg", "away/secret.jpg")
ABSENT = ("gone.jpg", "a.jpg/b.jpg", "sub", "loop.jpg", "n\0ul.jpg", "x" * 300 + ".jpg", "A.JPG", "half \ud800.jpg")

Turn = tuple[str, Any]  # role, and a list of pieces (text or IMAGE) or PROMPT


@dataclass(frozen=True)
class Row:
    value: Any  # the value in its container: usually an object, bytes for a line that is not JSON
    dialogs: list[list[Turn]] | None = None
    images: Sequence[str | bytes] = ()
    reasons: frozenset[str] = frozenset()


def damaged(value: Any, *reasons: str) -> Row:
    """A row that must be refused for one of the reasons; without reasons, one of unknown outcome."""
    return Row(value, reasons=frozenset(reasons))


# --- texts

ODD = (
    *("<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "<|extra_0|>", "<s>", "[INST]", "<img>", "<image", "image>"),
    *('"', "\\", "\\u003c", "},\n  {", '], [{"id": ', "\r\n", "\t", "\0", "\x7f", "\u2028", "\ufeff", "'", ", "),
    *("👩‍👧", "e\u0301", "你好。", "\U0010ffff", "&lt;", "%s", "{}", "0.jpg, 1.jpg"),
)
words = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


def _texts(pieces: st.SearchStrategy[str], good: Callable[[str], bool]) -> st.SearchStrategy[str]:
    return st.lists(pieces, min_size=1, max_size=3).map("".join).filter(lambda text: text.strip() and good(text))


plain = _texts(words, lambda text: MARK not in text)
literal = _texts(words | st.just(MARK), lambda text: True)  # a mark in these texts is plain text
ids = st.sampled_from(["same", "a", "a#2", "a/1", "图", 7, 0, -1, 2**70]) | plain
blank = st.sampled_from(["", " ", "\n\t", "\u3000"])
half = st.sampled_from(["\ud800", "a\udfffb", "\ude00\ud83d"])


def joined(pieces: list) -> list:
    """The pieces with neighbouring texts joined and empty texts removed."""
    found: list = []
    for piece in pieces:
        if piece is not IMAGE and found and found[-1] is not IMAGE:
            found[-1] += piece
        elif piece != "":
            found.append(piece)
    return found


def marked(pieces: list) -> str:
    return "".join(MARK if piece is IMAGE else piece for piece in pieces)


@st.composite
def dialogs(draw, images: int, texts: st.SearchStrategy[str] = plain) -> list[Turn]:
    """One to three questions and answers, with the images before, after or inside the questions."""
    pairs = draw(st.integers(1, 3))
    where = draw(st.lists(st.integers(0, pairs - 1), min_size=images, max_size=images))
    turns = []
    for pair in range(pairs):
        pieces = [draw(texts)]
        for _ in range(where.count(pair)):
            shown = (
                [IMAGE, "\n", *pieces],
                [*pieces, "\n", IMAGE],
                [*pieces, IMAGE, draw(texts)],
                [IMAGE, *pieces],
            )
            pieces = draw(st.sampled_from(shown))
        turns += [("user", pieces), ("assistant", [draw(texts)])]
    return turns


def images_first(count: int, turns: list[Turn]) -> list[Turn]:
    (role, pieces), *others = turns
    return [(role, [IMAGE, "\n"] * count + pieces), *others]


# --- rows


@st.composite
def _with_turns(draw, names: dict[str, str], role: str, content: str) -> Row:
    """A row of turns with marks in the strings. Some rows have no marks, which the reader repairs."""
    images = draw(st.lists(st.sampled_from(IMAGES), max_size=2))
    bare = draw(st.booleans())
    turns = draw(dialogs(0 if bare else len(images)))
    said = images_first(len(images), turns) if bare else turns
    if names is CHAT_NAMES and draw(st.booleans()):
        turns, said = ([("system", [draw(plain)])] + some for some in (turns, said))
        said[0] = turns[0]
    value = {"conversations": [{role: names[who], content: marked(pieces)} for who, pieces in turns]}
    if len(images) == 2 and role == "role" and draw(st.booleans()):
        value["image"] = draw(st.sampled_from([", ", ","])).join(images)
    elif images:
        value["image"] = images[0] if len(images) == 1 and draw(st.booleans()) else images
    if draw(st.booleans()):
        value = {"id": draw(ids), **value}
    return Row(value, [said], images)


LLAVA_NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
CHAT_NAMES = {name: name for name in LLAVA_NAMES}
llava = _with_turns(LLAVA_NAMES, "from", "value")
chat = _with_turns(CHAT_NAMES, "role", "content")


def chat_table(data: list[bytes], black: bytes | None) -> st.SearchStrategy[Row]:
    """minimind-v's parquet: the conversations as JSON text, the images as bytes.

    "image_bytes" is a list, or, if `black` is given, one image, which is `black` in a row without images.
    """

    def as_table(row: Row) -> Row:
        images = [data[IMAGES.index(name) % len(data)] for name in row.images]
        held = images if black is None else (images or [black])[0]
        value = {"id": str(row.value.get("id", "")), "conversations": json.dumps(row.value["conversations"])}
        return replace(row, value=value | {"image_bytes": held}, images=images)

    return chat.filter(lambda row: black is None or len(row.images) < 2).map(as_table)


@st.composite
def messages(draw) -> Row:
    images = draw(st.lists(st.sampled_from(IMAGES), max_size=2))
    in_parts = draw(st.booleans())
    turns = draw(dialogs(len(images), literal if in_parts else plain))
    names, role, content = draw(st.sampled_from([(CHAT_NAMES, "role", "content"), (LLAVA_NAMES, "from", "value")]))
    value: dict = {"messages": []}
    own = draw(st.sampled_from([None, "image", "path", "url", "image_url"])) if in_parts else None
    shown = iter(images)
    for who, pieces in turns:
        said: object = marked(pieces)
        if in_parts:
            said = [
                {"type": "text", "text": piece} if piece is not IMAGE else _image_part(own, next(shown))
                for piece in joined(pieces)
            ]
        value["messages"].append({role: names[who], content: said})
    if own is None and (images or draw(st.booleans())):
        value["images"] = images
    if draw(st.booleans()):
        value["system"] = draw(plain)
        turns = [("system", [value["system"]]), *turns]
    if draw(st.booleans()):
        value["id"] = draw(ids)
    return Row(value, [turns], images)


def _image_part(own: str | None, path: str) -> dict:
    if own == "image_url":
        return {"type": "image_url", "image_url": {"url": path}}
    return {"type": "image"} | ({own: path} if own else {})


@st.composite
def cauldron(draw, data: list[bytes]) -> Row:
    images = draw(st.lists(st.sampled_from(data), max_size=2))
    turns = draw(dialogs(0, literal))
    texts = [
        {"user": question[1][0], "assistant": answer[1][0], "source": draw(st.sampled_from(["ai2d", "vqav2"]))}
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
    ]
    value = {"images": [{"bytes": one, "path": None} for one in images], "texts": texts}
    return Row(value, [images_first(len(images), turns)], images)


def captioned(captions: list[str]) -> list[list[Turn]]:
    return [[("user", PROMPT), ("assistant", [caption])] for caption in captions if caption.strip()]


@st.composite
def ai_challenger(draw) -> Row:
    image, captions = draw(st.sampled_from(IMAGES)), draw(st.lists(literal | blank, min_size=1, max_size=5))
    value = {"url": "http://images.example/1.jpg", "image_id": image, "caption": captions}
    if not captioned(captions):
        return damaged(value, "empty_answer")
    return Row(value, captioned(captions), [image])


@st.composite
def text(draw) -> Row:
    """minimind's pretraining data: a plain text, in which a mark has no meaning."""
    text = draw(literal | blank)
    value = {"text": text} | ({"id": draw(ids)} if draw(st.booleans()) else {})
    return Row(value, [[("text", [text])]]) if text.strip() else damaged(value, "empty_answer")


@st.composite
def coco_image(draw) -> Row:
    """A row whose value is ("file name", [captions]); `write_coco` adds the integer id."""
    row = draw(ai_challenger())
    value = (row.value["image_id"], draw(st.just(row.value["caption"]) | st.just([])))
    return replace(row, value=value) if value[1] else damaged(value, "no_answer")


@st.composite
def table_row(draw, columns: list[str]) -> Row:
    """A row with cells for these columns: "image", "id", "question" and "answer", or "caption"."""
    cells = {"image": draw(st.sampled_from(IMAGES)), "id": str(draw(ids)).strip() or "x", "source": draw(plain)}
    cells |= {name: draw(literal) for name in ("question", "answer", "caption")}
    dialog = captioned([cells["caption"]])[0]
    if "question" in columns:
        dialog = [("user", [IMAGE, "\n", cells["question"]]), ("assistant", [cells["answer"]])]
    return Row([cells[name] for name in columns], [dialog], [cells["image"]])


# --- faults

JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        10**40,
        1.5,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\ud800",
        "\0",
        MARK,
        MARK * 3,
        "system",
    ]
    + ["user", "assistant", "gpt", "human", *OUTSIDE, *ABSENT, "data:image/png;base64,AAAA", "http://x.example/a.jpg"]
    + [[], {}, [[]], [{}], [None], {"a": {"b": []}}, [["a.jpg"]], {"type": "image"}, [{"type": "text", "text": "x"}]]
)


@st.composite
def junk_row(draw) -> Row:
    objects = st.dictionaries(st.sampled_from(["id", "image", "conversations", "messages"]), JUNK)
    # A first line with a list would make the file a JSON list.
    return Row(draw(objects | JUNK.filter(lambda value: not isinstance(value, list))))


@st.composite
def damage(draw, rows: st.SearchStrategy[Row]) -> Row:
    """A good row in which something was removed, replaced, doubled or reversed at random."""
    value = json.loads(json.dumps(draw(rows).value))
    for _ in range(draw(st.integers(1, 2))):
        holder, key = draw(st.sampled_from(_places(value) or [({}, "x")]))
        action = draw(st.sampled_from(["replace", "replace", "remove", "double", "reverse"]))
        if action == "replace":
            holder[key] = draw(JUNK)
        elif action == "remove" and key in (holder if isinstance(holder, dict) else range(len(holder))):
            del holder[key]
        elif action == "double" and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif isinstance(holder, list):
            holder.reverse()
    return Row(value)


def _places(value: Any) -> list[tuple]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


@st.composite
def faulty(draw, rows: st.SearchStrategy[Row], fault: Callable[[Row, Callable], Row | None]) -> Row:
    """A row with the fault that `fault` adds, or the unchanged row if `fault` returns None."""
    row = draw(rows)
    return (fault(row, draw) if row.dialogs else None) or row


def wrong_image(row: Row, draw: Callable) -> Row | None:
    """The path of the first image leads outside or does not exist."""
    key = next((key for key in ("image", "images", "image_id") if row.value.get(key)), None)
    path, reason = draw(
        st.sampled_from([(p, "path_outside_folder") for p in OUTSIDE] + [(p, "missing_image") for p in ABSENT])
    )
    if key is None or (isinstance(row.value[key], str) and "," in row.value[key]):
        return None
    old = row.value[key]
    reasons = {reason, "bad_unicode"} if "\ud800" in path else {reason}
    return damaged({**row.value, key: path if isinstance(old, str) else [path, *old[1:]]}, *reasons)


def wrong_turns(row: Row, draw: Callable) -> Row | None:
    """Turns that are not a conversation, or a content that is not a text."""
    key = "conversations" if "conversations" in row.value else "messages"
    turns = [dict(turn) for turn in row.value[key]]
    role, content = ("from", "value") if "from" in turns[0] else ("role", "content")
    if turns[0][role] == "system" or "system" in row.value:
        return None
    answers = draw(st.sampled_from(range(1, len(turns), 2)))
    fault = draw(st.sampled_from(["blank", "half", "number", "missing", "role", "twice", "cut", "first", "empty"]))
    if fault in ("blank", "half", "number"):
        turns[answers][content] = draw({"blank": blank, "half": half, "number": st.integers()}[fault])
        reason = {"blank": "empty_answer", "half": "bad_unicode", "number": "wrong_type"}[fault]
    elif fault == "missing":
        del turns[answers][content]
        reason = "wrong_type"
    elif fault == "role":
        turns[answers][role] = draw(st.sampled_from(["tool", "", "Assistant", None, 3, "observation"]))
        reason = "unknown_role"
    elif fault == "twice":
        turns.insert(answers, turns[answers])
        reason = "two_assistants_in_a_row"
    else:
        turns = {"cut": turns[:-1], "first": [turns[1], *turns], "empty": []}[fault]
        reason = {"cut": "no_answer", "first": "assistant_first", "empty": "no_answer"}[fault]
    # Removed turns may also have had marks.
    return damaged(
        {**row.value, key: turns}, reason, *(["marks_and_pictures_disagree"] if fault in ("cut", "empty") else [])
    )


# --- containers

Place = tuple[str, str, int]  # file, "line" or "index", number: the place of a row in a refusal


def write_json(draw: Callable, file: Path, rows: list[Row]) -> list[Place]:
    """Write a JSON list or JSON Lines. Rows of bytes become lines without encoding."""
    lines = any(isinstance(row.value, bytes) for row in rows) or draw(st.booleans())
    texts = [row.value if isinstance(row.value, bytes) else _json(draw, row.value, lines) for row in rows]
    bom = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    if not lines:
        comma = draw(st.sampled_from([b",", b" ,\r\n", b", "]))
        file.write_bytes(bom + b" [" + comma.join(texts) + b"\n]\n")
        return [(str(file), "index", index) for index in range(len(rows))]
    data, places = bom, []
    for text in texts:
        data += draw(st.sampled_from([b"", b"", b"\n", b" \r\n"]))
        places.append((str(file), "line", data.count(b"\n") + 1))
        data += text + draw(st.sampled_from([b"\n", b"\r\n"]))
    file.write_bytes(data)
    return places


def _json(draw: Callable, value: object, one_line: bool) -> bytes:
    escaped = json.dumps(value, indent=None if one_line else draw(st.sampled_from([None, 1])))
    try:
        return draw(st.sampled_from([escaped, json.dumps(value, ensure_ascii=False)])).encode()
    except UnicodeEncodeError:
        return escaped.encode()


def write_coco(draw: Callable, file: Path, *, rows: list[Row], orphans: int) -> list[Place]:
    """Write COCO's object of two lists in any order; the last `orphans` annotations have no image."""
    images: list[dict] = []
    annotations: list[dict] = []
    for number, row in enumerate(rows):
        name, captions = row.value
        images.append({"id": 100 - number, "file_name": name, "height": 4, "width": 4})
        annotations += [
            {"id": len(annotations) + k, "image_id": 100 - number, "caption": c} for k, c in enumerate(captions)
        ]
    annotations += [{"image_id": 1000 + number, "caption": "orphan"} for number in range(orphans)]
    lists = [("images", images), ("annotations", annotations), ("info", {"images": "no list"}), ("licenses", [])]
    file.write_bytes(
        draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + _json(draw, dict(draw(st.permutations(lists))), True)
    )
    return [(str(file), "index", index) for index in range(len(rows) + orphans)]


def write_parquet(draw: Callable, folder: Path, rows: list[Row]) -> list[Place]:
    """Write one or two shards."""
    import pyarrow
    import pyarrow.parquet

    cut, places = draw(st.integers(0, len(rows) - 1)), []
    folder.mkdir()
    for number, shard in enumerate(rows[i:j] for i, j in ((0, cut), (cut, len(rows))) if j > i):
        file = folder / f"train-0000{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row.value for row in shard]), file)
        places += [(str(file), "index", index) for index in range(len(shard))]
    return places


def write_csv(draw: Callable, file: Path, *, columns: list[str], rows: list[Row]) -> list[Place]:
    """Write a table. Rows of bytes become lines without encoding."""
    delimiter = draw(st.sampled_from([",", ";", "\t"]))
    data, places = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])), []
    for values in [columns, *(row.value for row in rows)]:
        places.append((str(file), "line", len(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))))
        if isinstance(values, bytes):
            data += values + b"\n"
        else:
            text, quoting = io.StringIO(), draw(st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
            # QUOTE_MINIMAL does not quote a "\r" in a cell if lines end in "\n".
            end = "\r\n" if quoting == csv.QUOTE_MINIMAL else draw(st.sampled_from(["\n", "\r\n"]))
            csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerow(values)
            data += text.getvalue().encode("utf-8", "surrogatepass")
    file.write_bytes(data)
    return places[1:]
