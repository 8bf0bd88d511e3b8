"""Formats in other containers and layouts than their own, as projects publish them, and images named in any way.

Run: python -m pytest tests/dataprocess/test_any_layout.py
"""

from __future__ import annotations

import base64
import json
import unicodedata

import pytest

from config import ColumnsConfig, InputError, SourceConfig, load_config, to_yaml
from tests.dataprocess.helpers import prepare_sources
from tests.dataprocess.test_readers import Desk, desk, image_file, texts, turns
from visual.images import image_bytes

__all__ = ["desk"]  # a fixture

RED = image_file("red", (64, 48))
BASE64 = base64.b64encode(RED).decode()
ASKED = {"question": "What?", "answer": "This."}


def bytes_of(desk: Desk, record: dict) -> bytes:
    return image_bytes(desk.qa.parent / record["image"])


# --- where the image is


@pytest.mark.parametrize(
    "rows",
    [
        [{"image": {"bytes": RED, "path": "a.png"}, **ASKED}],
        [{"image": {"bytes": RED, "path": None}, "text": "A red wall."}],
        [{"images": [RED], "messages": turns("<image>\nWhat?", "This.")}],
        [{"image": RED, "conversations": json.dumps(turns("<image>\nWhat?", "This."))}],
        [{"jpg": None, "image": RED, "caption": ["A red wall.", "Red."], "sentids": ["1", "2"]}],
    ],
    ids=["question", "caption", "messages", "conversations", "captions"],
)
def test_parquet_with_embedded_images_in_any_format(desk, rows):
    report = desk.prepare(desk.parquet("raw.parquet", rows))
    assert report["refused"] == 0 and {bytes_of(desk, one) for one in desk.kept()} == {RED}


@pytest.mark.parametrize(
    "value", [f"data:image/png;base64,{BASE64}", BASE64, {"url": f"data:image/png;base64,{BASE64}"}]
)
def test_an_image_in_base64_is_read(desk, value):
    rows = [{"image": value, "conversations": turns("<image>\nWhat?", "This.")}, {"image": value, **ASKED}]
    for number, row in enumerate(rows):
        desk.prepare(desk.write(f"{number}.json", [row]))
        assert bytes_of(desk, desk.kept()[0]) == RED


def test_addresses_of_files_and_absolute_paths_inside_the_folder_are_read(desk):
    folder = desk.images("sub/a b.jpg")
    places = [f"{folder}/sub/a b.jpg", f"file://{folder}/sub/a%20b.jpg", "sub/a b.jpg", "images/sub/a b.jpg"]
    desk.prepare(desk.write("raw.json", [{"image": place, **ASKED} for place in places]), folder)
    assert [one["image"] for one in desk.kept()] == ["../images/sub/a b.jpg"] * 4
    desk.prepare(desk.write("root.json", [{"image": places[0], **ASKED}]), desk.folder.__class__("/"))
    assert len(desk.kept()) == 1
    with pytest.raises(InputError, match="path_outside_folder: .*\n  path_outside_folder: "):
        outside = [{"image": place, **ASKED} for place in (f"{folder}/../secret.jpg", "file:///etc/passwd")]
        desk.prepare(desk.write("out.json", outside), folder)


def test_near_misses_of_a_path_are_found_by_rule(desk):
    composed = unicodedata.normalize("NFC", "café.jpg")
    folder = desk.images("sub/a.jpg", "b.JPG", composed, "My Photo.png")
    wanted = [
        "sub\\a.jpg",
        "b.jpg",
        unicodedata.normalize("NFD", composed),
        "images/sub/a.jpg",
        "gone.jpg",
        "my-photo.jpg",
    ]
    report = desk.prepare(desk.write("raw.json", [{"image": name, **ASKED} for name in wanted]), folder)
    assert report["repairs"] == {
        "backslashes_in_path_replaced": 1, "case_of_suffix_changed": 1, "image_folder_named_twice": 1,
        "unicode_form_of_path_changed": 1,
    }  # fmt: skip
    gone, near = [one["detail"] for one in desk.refused()]
    assert gone.endswith("gone.jpg: no such file.") and near.endswith('no such file; did you mean "My Photo.png"?')


def test_no_message_prints_a_blob(desk):
    blob = "data:image/png;base64," + "A" * 500_000
    rows: list[dict] = [
        {"image": blob, **ASKED},
        {"image": BASE64 * 200 + "!", **ASKED},
        {"image": {"a": blob}, **ASKED},
    ]
    rows += [
        {"image": "a.jpg", **ASKED, "extra": blob},
        {"messages": turns([{"type": "image", "image": blob, "x": blob}], "A")},
    ]
    for row in rows:
        with pytest.raises(InputError) as error:
            desk.prepare(desk.write("raw.json", [row]), desk.images("a.jpg"))
        assert len(str(error.value)) < 1500 and "A" * 200 not in str(error.value)


# --- tables of other projects


def test_rows_of_a_unified_table_with_nulls_are_read(desk):
    nan = float("nan")
    empty = {"image": {"bytes": None, "path": None}, "images": nan, "caption": None, "system": nan, "options": []}
    rows = [
        empty | {"id": 3.0, "type": 2, "question": "How many?", "answer": 4, "image": "a.jpg"},
        empty | {"id": 4.0, "type": None, "question": "Hello?", "answer": 2.5},
        empty | {"id": nan, "question": nan, "answer": None, "images": "a.jpg", "caption": "A cat."},
        {"id": 5.0, "image": None, "images": None, "conversations": turns("Hi", "Ho"), "system": None},
    ]
    report = desk.prepare(desk.write("raw.json", rows[:3]), desk.images("a.jpg"))
    number, text, caption = desk.kept()
    assert (number["id"], number["type"], texts(number)) == ("x:3", "2", ["<image>\nHow many?", "4"])
    assert (texts(text), "image" in text, texts(caption)[1]) == (["Hello?", "2.5"], False, "A cat.")
    assert report["repairs"] == {"number_written_as_text": 2}
    desk.prepare(desk.write("chat.json", rows[3:]))
    assert desk.kept()[0]["id"] == "x:5"


TABLES = {
    "alpaca": ({"instruction": "Name it.", "input": "Be brief.", "output": "Red."}, ["Name it.\nBe brief.", "Red."]),
    "alpaca, with images": (
        {"instruction": "<image>Name it.", "input": "", "output": "Red.", "images": ["a.jpg"]},
        ["<image>Name it.", "Red."],
    ),
    "alpaca, with history": (
        {"instruction": "And now?", "input": "", "output": "C.", "history": [["A?", "B."]], "system": "S"},
        ["S", "A?", "B.", "And now?", "C."],
    ),
    "swift": (
        {"query": "<image>\nWhat?", "response": "Red.", "history": [], "images": ["a.jpg"]},
        ["<image>\nWhat?", "Red."],
    ),
    "M3IT": (
        {
            "instruction": "Answer.",
            "inputs": "What?",
            "outputs": "Red.",
            "image_base64_str": [BASE64],
            "meta_data": {"h": 2},
        },
        ["<image>\nAnswer.\nWhat?", "Red."],
    ),
    "ScienceQA": (
        {"image": "a.jpg", "question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "grade": "2"},
        ["<image>\nWhich?\nA. x\nB. y", "B"],
    ),
    "TextVQA": (
        {
            "image": "a.jpg",
            "image_id": "a",
            "question_id": 1,
            "question": "Q?",
            "answers": ["x", "y", "y"],
            "image_width": 4,
        },
        ["<image>\nQ?", "y"],
    ),
    "VQAv2": (
        {
            "image": "a.jpg",
            "question": "Q?",
            "multiple_choice_answer": "y",
            "answers": [{"answer": "x"}],
            "answer_type": "o",
        },
        ["<image>\nQ?", "y"],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_projects_are_read(desk, name):
    row, said = TABLES[name]
    report = desk.prepare(desk.write("raw.json", [row]), desk.images("a.jpg"))
    assert report["kept"] == 1 and texts(desk.kept()[0]) == said
    assert ("image" in desk.kept()[0]) == (not name.startswith("alpaca") or "images" in row)


@pytest.mark.parametrize("together", [False, True])
def test_vqav2_joins_questions_and_answers(desk, together):
    questions = {"questions": [{"image_id": 9, "question": f"Q{k}?", "question_id": 90 + k} for k in range(3)]}
    answers = {
        "info": {},
        "annotations": [
            {"question_type": "what", "multiple_choice_answer": f"a{k}", "answers": [{"answer": "x", "answer_id": 1}],
             "image_id": 9, "answer_type": "other", "question_id": 90 + k} for k in (1, 0, 7)
        ],
    }  # fmt: skip
    file = desk.write("v2_mscoco_train2014_annotations.json", answers | (questions if together else {}))
    if not together:
        with pytest.raises(
            InputError, match="questions that are in another file; .*v2_OpenEnded_mscoco_train2014_quest"
        ):
            desk.prepare(file, desk.images("COCO_train2014_000000000009.jpg"))
        desk.write("v2_OpenEnded_mscoco_train2014_questions.json", questions)
    report = desk.prepare(file, desk.images("COCO_train2014_000000000009.jpg"))
    assert [texts(one) for one in desk.kept()] == [["<image>\nQ1?", "a1"], ["<image>\nQ0?", "a0"]]
    assert (report["read"], report["refused"]) == (4, 2)  # an answer without its question, a question without answer


def test_openai_parts_are_read_in_every_conversation_format(desk):
    parts = [{"type": "text", "text": "See "}, {"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}]
    folder = desk.images("a.jpg")
    for key in ("messages", "conversations"):
        desk.prepare(desk.write(f"{key}.json", [{key: turns(parts, "A cat.")}]), folder)
        assert texts(desk.kept()[0])[0] == "See <image>" and desk.kept()[0]["image"] == "../images/a.jpg"


# --- the map of columns


def test_columns_are_mapped_by_the_config(desk):
    folder = desk.images("a.jpg")
    table = desk.write("raw.csv", "文件,QUESTION_ZH,应答,备注,question\na.jpg,什么？,猫。,x,What?\n")
    with pytest.raises(InputError, match="文件|应答"):
        desk.prepare(table, folder)
    columns = ColumnsConfig(image="文件", question="question_zh", answer="应答", ignore=("备注", "question"))
    desk.prepare(table, folder, columns=columns)
    assert texts(desk.kept()[0]) == ["<image>\n什么？", "猫。"]
    with pytest.raises(InputError, match=r'has no column "答案", .* It has: question'):
        desk.prepare(table, folder, columns=ColumnsConfig(answer="答案"))
    pope = desk.write("pope.jsonl", json.dumps({"question_id": 1, "image": "a.jpg", "text": "A dog?", "label": "yes"}))
    desk.prepare(pope, folder, columns=ColumnsConfig(question="text", answer="label"))
    assert texts(desk.kept()[0]) == ["<image>\nA dog?", "yes"]


def test_columns_are_read_from_the_config(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "output_dir: run\nmodel: {vision_tower: ./tower, language_model: ./lm}\ntrain: {projector_lr: 1e-3, lora_lr: 1e-4}\n"
        "data: {qa_file: qa.jsonl, sources: [{name: x, annotations: a.csv, columns: {image: 图片, ignore: 备注}}]}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert config.data.sources[0].columns == ColumnsConfig(image="图片", ignore=("备注",))
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(InputError, match='did you mean "data.sources.0.columns.question"'):
        load_config(tmp_path / "c.yaml", ["data.sources.0.columns.qestion=Q"])


def test_another_map_of_columns_prepares_again(desk):
    table, folder = desk.write("raw.csv", "image,question,answer,other\na.jpg,Q?,A.,B.\n"), desk.images("a.jpg")
    said = []
    for columns in (ColumnsConfig(ignore=("other",)), ColumnsConfig(answer="other", ignore=("answer",))):
        source = SourceConfig("x", table, images=folder, columns=columns)
        prepare_sources([source], desk.qa)
        said.append(texts(desk.kept()[0])[1])
    assert said == ["A.", "B."]
