"""Every raw format in every container is detected and read.

Run: python -m pytest tests/dataprocess/test_readers.py
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import InputError, SourceConfig
from dataprocess import containers, tables
from dataprocess.marks import content_of, repair_marks
from dataprocess.rows import CAPTION_PROMPTS, ENGLISH_CAPTION_PROMPTS, captioned
from dataset.qa_file import QAFile
from dataset.record import IMAGE, RecordError, check_record, parse_record, parts_of
from tests.dataprocess.helpers import prepare_sources
from visual.images import image_bytes, image_state


def image_file(color="red", size=(16, 12), format="PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, color).save(data, format)
    return data.getvalue()


class Desk:
    """A folder with images, one source, and the preparation run on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.qa = folder / "out" / "qa.jsonl"
        self.last: Path | None = None  # annotations of the last preparation

    def images(self, *names: str, folder: str = "images") -> Path:
        for number, name in enumerate(names):
            path = self.folder / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_file((number * 20, 50, 200)))
        return self.folder / folder

    def write(self, name: str, raw: list | dict | str | bytes) -> Path:
        if not isinstance(raw, (str, bytes)):
            raw = json.dumps(raw, ensure_ascii=False)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw.encode("utf-8", "backslashreplace") if isinstance(raw, str) else raw)
        return path

    def parquet(self, name: str, rows: list[dict]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        return path

    def prepare(self, annotations: Path, images: Path | None = None, verify_images=True, **settings) -> dict:
        source = SourceConfig("x", annotations, images=images, **settings)
        if annotations != self.last:
            self.qa.unlink(missing_ok=True)  # made of other annotations, it would not be replaced
        self.last = annotations
        return prepare_sources([source], self.qa, verify_images=verify_images)

    def kept(self) -> list[dict]:
        records = [json.loads(line) for line in self.qa.read_text("utf-8").splitlines()]
        for one in records:  # check them as training reads them
            parse_record(one, "qa.jsonl")
            paths = one.get("image") or []
            for path in [paths] if isinstance(paths, str) else paths:
                assert image_state(self.qa.parent / path).is_file
        return records

    def refused(self) -> list[dict]:
        return [json.loads(line) for line in self.qa.with_suffix(".refused.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def desk(tmp_path) -> Desk:
    return Desk(tmp_path)


def texts(record: dict) -> list:
    return [turn["content"] for turn in record["conversations"]]


def turns(*contents: object, keys=("role", "content"), names=("user", "assistant")) -> list[dict]:
    return [{keys[0]: names[k % 2], keys[1]: content} for k, content in enumerate(contents)]


# --- one format each


def coco(images: list, annotations: list, backwards=False) -> dict:
    lists = {"images": images, "annotations": annotations}
    return {"info": {"annotations": [], "year": 2017.5}} | (dict(reversed(lists.items())) if backwards else lists)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_coco_captions_join_on_the_integer_id(desk, backwards, bom):
    folder = desk.images("000000000001.jpg", "000000000002.jpg", "3.jpg", "4.jpg")
    images = [
        {"id": k, "file_name": name} for k, name in ((1, "000000000001.jpg"), (2, "COCO_val2014_000000000002.jpg"))
    ]
    images += [{"id": 3, "file_name": "3.jpg"}, {"id": 4, "file_name": "4.jpg"}]
    said = [(2, "A dog."), (1, "A cat."), (2, "Ein Hund."), (99, "Nobody."), (1, "一只猫。"), (4, " "), (98, "Nobody.")]
    annotations = [{"id": k, "image_id": name, "caption": text} for k, (name, text) in enumerate(said)]
    raw = bom + json.dumps(coco(images, annotations, backwards)).encode()
    report = desk.prepare(desk.write("captions.json", raw), folder)
    assert (report["read"], report["kept"]) == (6, 2)  # four images and two annotations without an image
    assert report["by_reason"] == {"missing_image": 2, "empty_answer": 1, "no_answer": 1}
    assert report["repairs"] == {"coco_2014_prefix_removed": 1}
    kept = desk.kept()
    assert [one["id"] for one in kept] == ["x:1/1", "x:1/2", "x:2/1", "x:2/2"]
    assert [texts(one)[1] for one in kept] == ["A cat.", "一只猫。", "A dog.", "Ein Hund."]
    english, chinese = ([f"<image>\n{text}" for text in pair] for pair in (ENGLISH_CAPTION_PROMPTS, CAPTION_PROMPTS))
    assert [texts(one)[0] for one in kept] == [english[0], chinese[1], english[1], english[0]]
    assert {one["detail"].split(",")[0] for one in desk.refused() if one["reason"] == "missing_image"} == {
        "an annotation about image_id 99",
        "an annotation about image_id 98",
    }


PROMPTS = ("这是什么？", "Tell me <b>all</b>.", "What?")


def test_prompts_of_a_source_are_used_in_turn_for_every_caption_format(desk):
    folder = desk.images("a.jpg", "b.jpg")
    raw = [{"image_id": f"{name}.jpg", "caption": ["One.", " ", "二。", "Three."]} for name in "ab"]
    desk.prepare(desk.write("ai.json", raw), folder, prompts=PROMPTS)
    assert [texts(one)[0] for one in desk.kept()] == [f"<image>\n{PROMPTS[k % 3]}" for k in (0, 1, 2, 1, 2, 3)]
    assert [texts(one)[1] for one in desk.kept()] == ["One.", "二。", "Three."] * 2
    desk.prepare(desk.write("ai.json", raw), folder, prompts=PROMPTS, captions="one_per_epoch")
    first, second = QAFile(desk.qa)
    turns = [first.conversations, *first.alternatives]
    assert [one[0].content for one in turns] == [f"<image>\n{prompt}" for prompt in PROMPTS]
    table = "image,caption\na.jpg,A cat.\nb.jpg,A dog.\na.jpg,一只猫。\nb.jpg,A dog.\n"
    desk.prepare(desk.write("table.csv", table), folder, prompts=PROMPTS)
    assert [texts(one)[0] for one in desk.kept()] == [f"<image>\n{PROMPTS[k % 3]}" for k in range(4)]
    desk.write("images/a.txt", "A cat.")
    desk.write("images/b.txt", "A dog.")
    desk.prepare(folder, folder, prompts=PROMPTS[:1])
    assert [texts(one)[0] for one in desk.kept()] == [f"<image>\n{PROMPTS[0]}"] * 2
    before = desk.qa.read_bytes()
    assert desk.prepare(folder, folder, prompts=PROMPTS[1:2])["kept"] == 2
    assert desk.qa.read_bytes() != before  # other prompts make the file again
    rows = '[{"image": "a.jpg", "question": "What?", "answer": "Red."}]'
    for name, text in (("rows.json", rows), ("talk.json", json.dumps([{"image": "a.jpg", **turns_of("What?")}]))):
        with pytest.raises(
            InputError, match=f"prompts are questions for captions, .*{name} .* have their own questions"
        ):
            desk.prepare(desk.write(name, text), folder, prompts=PROMPTS)


def turns_of(question: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "This."}]}


def test_one_per_epoch_works_for_coco_captions(desk):
    folder = desk.images("a.jpg")
    raw = coco([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": text} for text in ("One.", "Two.")])
    desk.prepare(desk.write("captions.json", raw), folder, captions="one_per_epoch")
    qa = QAFile(desk.qa)
    assert len(qa) == 1
    one = qa[0]
    assert {one.at_epoch(0, epoch)[1].content for epoch in range(2)} == {"One.", "Two."}


@pytest.mark.parametrize("keys", [("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_with_marks_in_any_turn(desk, keys, column):
    folder = desk.images("a.jpg", "b.jpg")
    said = turns("Hello", "Hi.", "<image>What, and <image>?", "Two.", keys=keys[:2], names=keys[2:])
    rows = [
        {column: said, "images": ["b.jpg", "a.jpg"], "system": "Be brief."},
        {column: turns("Hi", "Hello", keys=keys[:2], names=keys[2:]), "images": []},
        {column: turns("What?", "This.", keys=keys[:2], names=keys[2:]), "images": ["a.jpg"]},
        {column: turns("<image>?", "This.", keys=keys[:2], names=keys[2:]), "images": ["a.jpg", "b.jpg"]},
    ]
    report = desk.prepare(desk.write("raw.jsonl", "\n".join(map(json.dumps, rows))), folder)
    assert report["by_reason"] == {"marks_and_pictures_disagree": 1} and report["repairs"] == {"image_mark_added": 1}
    first, text, added = desk.kept()
    assert first["image"] == ["../images/b.jpg", "../images/a.jpg"]
    assert texts(first) == ["Be brief.", "Hello", "Hi.", "<image>What, and <image>?", "Two."]
    assert "image" not in text and texts(added)[0] == "<image>\nWhat?"


def test_messages_with_parts(desk):
    folder = desk.images("a.jpg", "b.jpg", "c.jpg")
    image = {"type": "image"}

    def text(said: str) -> dict:
        return {"type": "text", "text": said}

    rows = [
        {"messages": turns([image, text("What?")], [text("This.")]), "images": ["a.jpg"]},
        {"messages": turns([text("A"), {"type": "image", "path": "b.jpg"}, image], "B"), "images": ["a.jpg"]},
        {"messages": turns([{"type": "image_url", "image_url": {"url": "c.jpg"}}, text("?")], "C")},
        {
            "messages": turns([image, text("What does <image> mean?")], [text("<image> is a mark.")]),
            "images": ["a.jpg"],
        },
        {"messages": turns([{"type": "image_url", "image_url": {"url": "https://a.org/b.jpg"}}, text("?")], "No")},
        {"messages": turns([{"type": "image", "image": "data:image/png;base64,AAAA"}], "No")},
        {"messages": turns([image, text("?")], [image]), "images": ["a.jpg", "b.jpg"]},
        {"messages": turns([{"type": "video", "video": "a.mp4"}], "No")},
        {"messages": turns([text("Hi")], [{"type": "text"}])},
    ]
    report = desk.prepare(desk.write("raw.json", rows), folder)
    assert report["by_reason"] == {
        "missing_image": 1, "unreadable_image": 1, "wrong_type": 2, "mark_outside_question": 1,
    }  # fmt: skip
    assert all("download it" in one["detail"] for one in desk.refused() if one["reason"] == "missing_image")
    one, two, three, literal = desk.kept()
    assert texts(one) == ["<image>What?", "This."]
    assert (texts(two), two["image"]) == (["A<image><image>", "B"], ["../images/b.jpg", "../images/a.jpg"])
    assert texts(three) == ["<image>?", "C"]
    question, answer = parse_record(literal, "").conversations
    assert parts_of(question) == [IMAGE, "What does <image> mean?"] and parts_of(answer) == ["<image> is a mark."]


def test_cauldron_parquet_shards_in_a_folder(desk):
    red, blue = image_file("red"), image_file("blue", format="JPEG")

    def struct(data: bytes) -> dict:
        return {"bytes": data, "path": None}

    def row(images: list[bytes], *said: str) -> dict:
        pairs = [{"user": q, "assistant": a, "source": "s"} for q, a in zip(said[::2], said[1::2], strict=True)]
        return {"images": [struct(data) for data in images], "texts": pairs}

    rows = [
        row([red, blue], "Two?", "Yes.", "Sure?", "Yes!"),
        row([red], "What is <image>?", "A mark."),
        row([red[:40]], "What?", "This."),
        row([b"no image"], "What?", "This."),
        row([red], "What?", ""),
        row([], "Last?", "Yes."),
    ]
    desk.parquet("shards/train-00001.parquet", rows[2:])
    folder = desk.parquet("shards/train-00000.parquet", rows[:2]).parent
    report = desk.prepare(folder)
    assert report["by_reason"] == {"unreadable_image": 2, "empty_answer": 1}
    two, literal, last = desk.kept()
    assert texts(last) == ["Last?", "Yes."] and "image" not in last
    assert texts(two) == ["<image>\n<image>\nTwo?", "Yes.", "Sure?", "Yes!"]
    assert [image_bytes(desk.qa.parent / path) for path in two["image"]] == [red, blue]
    assert [os.path.splitext(path)[1] for path in two["image"]] == [".png", ".jpg"]
    assert parts_of(parse_record(literal, "").conversations[0]) == [IMAGE, "\nWhat is <image>?"]
    assert literal["image"] == two["image"][0]  # identical images share one file
    assert [(os.path.basename(one["file"]), one["index"]) for one in desk.refused()] == [
        ("train-00001.parquet", k) for k in range(3)
    ]
    assert desk.prepare(folder) == report  # the second run does nothing


def test_minimind_parquet(desk):
    black, red = image_file("black", (8, 8), "JPEG"), image_file("red")
    rows = [
        {"conversations": json.dumps(turns("<image>\nWhat?", "Red.")), "image_bytes": [red]},
        {"conversations": json.dumps(turns("你好", "你好！")), "image_bytes": [black]},
        {"conversations": json.dumps(turns("<image>", "Black.")), "image_bytes": [black]},
        {"conversations": json.dumps(turns("Which?", "Red.")), "image_bytes": [image_file("red", (8, 8))]},
        {"conversations": "[{", "image_bytes": [red]},
    ]
    report = desk.prepare(desk.parquet("sft.parquet", rows))
    assert report["by_reason"] == {"wrong_type": 1}
    assert report["repairs"] == {"black_placeholder_dropped": 1, "image_mark_added": 1}
    assert ["image" in one for one in desk.kept()] == [True, False, True, True]
    single = desk.parquet("one.parquet", [row | {"image_bytes": row["image_bytes"][0]} for row in rows])
    assert desk.prepare(single)["kept"] == 4


def test_a_csv_of_questions_and_one_of_captions(desk):
    folder = desk.images("a.jpg", "b c.jpg")
    table = 'Image_Path,question,answer\na.jpg,"What, in\n""quotes""?",This.\nb c.jpg,is <image> text?,Yes.\n'
    table += "none.jpg,What?,This.\na.jpg,What?\n\n,Hi,Hello\n"
    report = desk.prepare(desk.write("qa.csv", b"\xef\xbb\xbf" + table.encode()), folder)
    assert report["by_reason"] == {"missing_image": 1, "not_json": 1}
    assert [one["line"] for one in desk.refused()] == [5, 6]
    one, literal, text = desk.kept()
    assert texts(one) == ['<image>\nWhat, in\n"quotes"?', "This."]
    assert parts_of(parse_record(literal, "").conversations[0]) == [IMAGE, "\nis <image> text?"]
    assert "image" not in text
    tsv = desk.write("captions.tsv", "filename\tcaption\na.jpg\t一只猫。\nb c.jpg\tA cat.\n\tNothing.\n")
    assert desk.prepare(tsv, folder)["by_reason"] == {"missing_image": 1}
    prompts = [texts(one)[0] for one in desk.kept()]
    assert prompts == [f"<image>\n{CAPTION_PROMPTS[0]}", f"<image>\n{ENGLISH_CAPTION_PROMPTS[1]}"]


def test_an_error_about_missing_csv_columns_lists_the_existing_ones(desk):
    table = desk.write("table.csv", "file,label\na.jpg,cat\n")
    with pytest.raises(InputError, match="has the columns file, label; expected one of image, image_path"):
        desk.prepare(table, format="csv")
    with pytest.raises(InputError, match="keys file, label"):
        desk.prepare(table)


def test_a_folder_of_images_with_text_files(desk):
    folder = desk.images("a.jpg", "deep/b.png", "c.jpg", ".hidden.jpg", folder="album")
    desk.write("album/a.txt", b"\xef\xbb\xbfA cat.\n")
    desk.write("album/deep/b.txt", "一只<image>猫。")
    desk.write("album/d.txt", "Nothing to see.")
    report = desk.prepare(folder)
    assert report["by_reason"] == {"missing_image": 1, "no_answer": 1} and report["read"] == 4
    assert [one["id"] for one in desk.kept()] == ["x:a.jpg", "x:deep/b.png"]
    assert desk.kept()[0]["image"] == "../album/a.jpg"
    assert texts(desk.kept()[0])[1] == "A cat." and texts(desk.kept()[1])[1] == [
        {"type": "text", "text": "一只<image>猫。"}
    ]
    before = desk.qa.stat().st_ino
    assert desk.prepare(folder) == report and desk.qa.stat().st_ino == before
    desk.write("album/c.txt", "A dog.")  # a text file is added
    assert desk.prepare(folder)["kept"] == 3


@pytest.mark.parametrize("long", ["text", "blank"])
def test_a_long_text_costs_linear_time_whatever_the_file_is(desk, long):
    """ijson, which looks for COCO's two lists, takes quadratic time for a long text."""
    more = f'"a": "{"x" * 3_000_000}", ' if long == "text" else " " * 3_000_000
    lines = "{" + more + '"text": "A story."}\n'
    read = list(containers.stream_records(desk.write("a.jsonl", lines), None, limit=None, first_size=9, size=9))
    assert [item.value["text"] for chunk in read for item in chunk.items] == ["A story."]
    annotations = json.dumps(coco([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": "A cat."}]))
    path = desk.write("coco.json", annotations[:-1] + f', {more}"b": 2}}')
    with pytest.raises(InputError, match=r"coco.json: malformed .*a text, number or blank of more than 1,048,576"):
        list(containers.stream_records(path, None, limit=None, first_size=9, size=9))


def test_a_folder_with_one_table_is_read_as_that_table(desk):
    folder = desk.images("a.jpg", folder="album")
    desk.write("album/labels.csv", "image,text\na.jpg,A cat.\n")
    assert desk.prepare(folder)["kept"] == 1
    desk.write("album/more.csv", "image,text\na.jpg,A cat.\n")
    with pytest.raises(InputError, match="contains 2 tables"):
        desk.prepare(folder)
    with pytest.raises(InputError, match="contains no image"):
        desk.prepare(desk.images(".x.jpg", folder="bare"))


# --- detection


def test_formats_are_detected_from_the_keys_of_the_first_records(desk):
    folder = desk.images("a.jpg")
    question = ("<image>\nWhat?", "This.")
    for raw in (
        [
            {
                "id": "1",
                "image": "a.jpg",
                "conversations": turns(*question, keys=("from", "value"), names=("human", "gpt")),
            }
        ],
        [{"image": "a.jpg", "conversations": turns(*question)}],
        [{"messages": turns(*question), "images": ["a.jpg"]}],
        [{"conversations": turns(*question), "images": ["a.jpg"]}],
        [{"image_id": "a.jpg", "caption": ["一", "二"]}],
        [{"image": "a.jpg", "question": "What?", "answer": "This."}],
        [{"conversations": turns("Hi", "Hello")}],
        [{"text": "Once upon a time."}, {"id": 7, "text": "很久以前。", "source": "tales"}],
    ):
        assert desk.prepare(desk.write("raw.json", raw), folder)["kept"] == len(raw)
    unknown: list[list] = [[{"picture_file": "a.jpg", "label": "cat"}], ["text"], ["not an object", {"label": 1}]]
    for rows in unknown:
        with pytest.raises(InputError, match=r"is unknown: .* Known: llava, chat, messages, cauldron"):
            desk.prepare(desk.write("raw.json", rows), folder)
    both = [{"messages": turns(*question), "image_id": "a.jpg", "caption": ["一"]}]
    with pytest.raises(InputError, match="looks like format .* is not read, .*keys caption, image_id, messages"):
        desk.prepare(desk.write("raw.json", both), folder)
    both.append({"image_id": "a.jpg", "caption": ["二"]})
    report = desk.prepare(desk.write("raw.json", both), folder, format="ai_challenger")
    assert report["kept"] == 1 and report["by_reason"] == {"unknown_key": 1}


def test_plain_texts_are_kept_unchanged(desk):
    said = "Once <image> upon <|im_end|> a time.\n"
    raw = [{"text": said}, {"text": "  "}, {"text": 7}, {"text": "很久以前。", "id": "x"}]
    report = desk.prepare(desk.write("raw.jsonl", "\n".join(map(json.dumps, raw))), format="text")
    assert report["by_reason"] == {"empty_answer": 1, "wrong_type": 1} and report["kept"] == 2
    found = [parse_record(one, "").conversations for one in desk.kept()]
    assert [[(turn.role, turn.content) for turn in talk] for talk in found] == [
        [("text", said)],
        [("text", "很久以前。")],
    ]


def test_one_per_epoch_requires_a_format_with_several_captions(desk):
    raw = desk.write("raw.json", [{"image": "a.jpg", "conversations": turns("<image>\nWhat?", "This.")}])
    with pytest.raises(InputError, match="one_per_epoch needs several captions per image; .*raw.json has format chat"):
        desk.prepare(raw, desk.images("a.jpg"), captions="one_per_epoch")


@pytest.mark.parametrize("damage", [b"", b"PAR1 and nothing more", b'{"images": [], "annotations": [{"image_id": 1,'])
def test_a_damaged_file_is_named(desk, damage):
    with pytest.raises(InputError, match="raw"):
        desk.prepare(desk.write("raw", damage), format="coco_captions")


def test_rows_that_are_not_utf8_are_refused_by_row(desk):
    rows = pyarrow.array([b"What?", b"\xff", b"Who?"]).view(pyarrow.string())
    table = pyarrow.table({"question": rows, "answer": ["a", "b", "c"], "image": ["a.jpg"] * 3})
    pyarrow.parquet.write_table(table, desk.folder / "raw.parquet")
    report = desk.prepare(desk.folder / "raw.parquet", desk.images("a.jpg"))
    assert (report["kept"], report["by_reason"]) == (2, {"not_json": 1})
    assert desk.refused()[0]["index"] == 1


def test_parquet_is_read_a_few_rows_at_a_time(desk, monkeypatch):
    monkeypatch.setattr(tables, "PARQUET_ROWS", 2)
    path = desk.parquet("raw.parquet", [{"image": "a.jpg", "question": f"{k}?", "answer": "a"} for k in range(9)])
    assert desk.prepare(path, desk.images("a.jpg"), limit=5)["read"] == 5
    assert [texts(one)[0] for one in desk.kept()] == [f"<image>\n{k}?" for k in range(5)]


# --- marks


@pytest.mark.parametrize(
    ("asked", "shown", "rule"),
    [
        ("<image>\n<image>\nWhat?", "<image>\nWhat?", "removed"),
        ("<image><image>What?", "<image>What?", "removed"),
        ("What?\n<image>\n<image>", "What?\n<image>", "removed"),
        ("<image>\nWhat?\n<image>", "<image>\nWhat?", "removed"),
        ("<image>\nOne\n <image> \nTwo", "<image>\nOne \nTwo", "removed"),
        ("What?\n<image> <image>\nWell?", "What?\n<image>\nWell?", "removed"),
        ("<image>\nWhat is <image>?", [IMAGE, "\nWhat is <image>?"], "kept"),
        ("See <image><image> here", ["See ", IMAGE, "<image> here"], "kept"),
        ("<image>\nIs <image> it?\n<image>", [IMAGE, "\nIs <image> it?"], "both"),
    ],
)
def test_a_record_with_one_image_and_several_marks_is_repaired(desk, asked, shown, rule):
    folder = desk.images("a.jpg")
    report = desk.prepare(desk.write("raw.json", [{"image": "a.jpg", "conversations": turns(asked, "This.")}]), folder)
    rules = {"removed": {"extra_image_marks_removed"}, "kept": {"image_mark_kept_as_text"}}
    assert report["repairs"].keys() == rules.get(rule, rules["removed"] | rules["kept"])
    question = parse_record(desk.kept()[0], "").conversations[0]
    assert parts_of(question) == shown if isinstance(shown, list) else question.content == shown


def test_the_first_mark_is_the_image_in_any_turn(desk):
    said = turns("Hi", "Hello", "<image>\nWhat?", "This.", "<image>\nAnd now?", "That.")
    repair = repair_marks(said, 1)
    assert repair is not None
    repaired, rules = repair
    assert [turn["content"] for turn in repaired][2:5:2] == ["<image>\nWhat?", "And now?"]
    assert rules == ["extra_image_marks_removed"] and said[4]["content"] == "<image>\nAnd now?"
    assert repair_marks(said, 2) is None


pieces = st.lists(st.none() | st.text(alphabet="<image> \n", max_size=9) | st.just("<image>"), max_size=6)


@given(pieces)
def test_a_content_has_the_meaning_of_its_pieces(pieces):
    content = content_of(pieces)
    record = {"id": "1", "image": ["a"] * pieces.count(None), "conversations": turns(content, "Yes.")}
    if pieces.count(None) or "".join(filter(None, pieces)).strip():
        parts = parts_of(parse_record(record, "").conversations[0])
        assert [p for p in parts if p is IMAGE] == [IMAGE] * pieces.count(None)
        joined = "".join("\0" if piece is None else piece for piece in pieces)
        assert "".join(part if isinstance(part, str) else "\0" for part in parts) == joined


@given(st.lists(st.sampled_from(["<image>", "word", " ", "\n", "<ima", "ge>"]), max_size=12).map("".join))
@settings(max_examples=300)
def test_repaired_marks_fit_and_no_word_is_lost(text):
    repaired = repair_marks(turns(text, "Yes."), 1)
    if repaired:
        content = repaired[0][0]["content"]
        parts = parts_of(
            parse_record({"id": "1", "image": "a", "conversations": turns(content, "Yes.")}, "").conversations[0]
        )
        assert parts.count(IMAGE) == 1
        assert "".join(part for part in parts if isinstance(part, str)).count("word") == text.count("word")


def test_a_long_text_of_marks_is_repaired_in_linear_time():
    repair = repair_marks(turns("<image> a " * 100_000, "Yes."), 1)
    assert repair is not None
    repaired, rules = repair
    assert len(repaired[0]["content"]) == 2 and rules == ["image_mark_kept_as_text"]


# --- nothing is lost


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", "a.jpg", "<image>", "user", "human", "text", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "image", "images", "messages", "conversations", "from", "value", "role", "content", "caption"]
                + ["image_id", "texts", "user", "assistant", "system", "question", "answer", "type", "text", "captions"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=14,
)
SOUND = {
    "llava": {
        "image": "a.jpg",
        "conversations": turns("<image>?", "Yes.", keys=("from", "value"), names=("human", "gpt")),
    },
    "chat": {"image": "a.jpg", "conversations": turns("<image>?", "Yes.")},
    "messages": {
        "images": ["a.jpg"],
        "messages": turns([{"type": "image"}, {"type": "text", "text": "<image>"}], "Yes."),
    },
    "cauldron": {"images": ["a.jpg"], "texts": [{"user": "What?", "assistant": "<image>"}]},
    "ai_challenger": {"image_id": "a.jpg", "caption": ["好", "Good"]},
    "csv": {"image": "a.jpg", "question": "What?", "answer": "This."},
}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), format=st.sampled_from(sorted(SOUND)))
def test_no_record_of_any_format_is_lost(tmp_path_factory, data, format):
    desk = Desk(tmp_path_factory.mktemp("desk"))
    captions = data.draw(st.sampled_from(["all", "one_per_epoch"] if format == "ai_challenger" else ["all"]))
    raw = [SOUND[format], *data.draw(st.lists(junk | st.sampled_from(list(SOUND.values())), max_size=9))]
    report = desk.prepare(
        desk.write("raw.json", raw), desk.images("a.jpg"), format=format, captions=captions, verify_images=False
    )
    assert report["read"] == len(raw) == report["kept"] + report["refused"]
    assert report["refused"] == len(desk.refused()) == sum(report["by_reason"].values())
    assert len({one["id"].split("/")[0] for one in desk.kept()}) == report["kept"]
    assert len(QAFile(desk.qa)) == len(desk.kept())


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["a.jpg", "b.jpg", "none.jpg"])), max_size=5),
    annotations=st.lists(st.tuples(st.integers(0, 7) | st.none(), st.sampled_from(["A.", "", None])), max_size=8),
)
def test_no_image_and_no_annotation_of_coco_is_lost(tmp_path_factory, images, annotations):
    desk = Desk(tmp_path_factory.mktemp("desk"))
    known = {name for name, _ in images}
    orphans = [name for name, _ in annotations if name not in known]
    images = [{"id": name, "file_name": file} for name, file in [(9, "a.jpg"), *images]]
    said = [{"image_id": 9, "caption": "Good."}] + [{"image_id": k, "caption": text} for k, text in annotations]
    report = desk.prepare(
        desk.write("raw.json", coco(images, said)), desk.images("a.jpg", "b.jpg"), verify_images=False
    )
    assert report["read"] == len(images) + len(orphans) == report["kept"] + report["refused"]


CAPTION = st.text(st.characters() | st.just("\ud800") | st.sampled_from(" \u3000图")) | st.just("A <image> mark.")


@settings(deadline=None, derandomize=True, max_examples=100)
@given(captions=st.lists(CAPTION, max_size=4), images=st.integers(1, 2))
def test_captions_that_a_reader_calls_valid_need_no_check(captions, images):
    """The converter does not check them again: they are half of a large collection."""
    try:
        read = captioned(name="n", images=["a.jpg"] * images, captions=captions, index=0)
    except RecordError:
        return
    assert read.is_valid == (images == 1)
    for turns in read.conversations if read.is_valid else ():
        check_record({"id": "n", "image": "a.jpg", "conversations": turns})


def test_a_caption_whose_image_has_a_name_that_is_not_utf8_is_refused(desk):
    folder = desk.images("图.jpg", os.fsdecode(b"a\xff.jpg"))
    raw = [{"image_id": name, "caption": ["好"]} for name in ("图.jpg", "a\udcff.jpg")]
    report = desk.prepare(desk.write("ai.json", json.dumps(raw)), folder, verify_images=False)
    assert report["by_reason"] == {"bad_unicode": 1} and [one["id"] for one in desk.kept()] == ["x:图.jpg"]
