"""No record becomes another record without a word: an image, a text or a weight is read, or the record is refused by name.

Run: python -m pytest tests/dataprocess/test_silent_changes.py
"""

from __future__ import annotations

import base64
import json
import os

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from config import InputError
from dataprocess.keys import COLUMN_NAMES, IMAGE_KEYS, is_metadata
from dataprocess.marks import repair_marks
from dataprocess.readers import FORMATS
from dataprocess.rows import column_name
from dataset.record import IMAGE, RecordError, check_record, parse_record, parts_of
from tests.dataprocess.test_readers import Desk, desk, image_file, texts, turns
from visual.images import image_bytes

__all__ = ["desk"]  # a fixture


def asked(text: str = "What?", answer: str = "This.", **more) -> dict:
    """A LLaVA record with these other keys."""
    return {"conversations": turns(text, answer, keys=("from", "value"), names=("human", "gpt")), **more}


def reason_of(desk: Desk, row: dict, **settings) -> str:
    """Why the only row beside a good one is refused; "" if it is kept."""
    good = {"image": "a.jpg", "conversations": asked("<image>")["conversations"]}
    rows = [good, row] if "conversations" in row else [row, row]
    report = desk.prepare(desk.write("raw.json", rows), desk.images("a.jpg", "b.jpg"), verify_images=False, **settings)
    return next(iter(report["by_reason"]), "")


# --- images


@pytest.mark.parametrize(
    "keys",
    [{name: "a.jpg"} for name in ("image_path", "img", "image_file", "file_name", "图片")]
    + [{"images": "a.jpg"}, {"image": {"path": "a.jpg", "bytes": None}}, {"image_url": {"url": "a.jpg"}}],
    ids=str,
)
def test_an_image_under_any_usual_key_is_read(desk, keys):
    assert reason_of(desk, asked("<image>\nWhat?", **keys)) == ""
    assert [one["image"] for one in desk.kept()] == ["../images/a.jpg"] * 2


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"videos": ["a.mp4"]}, "videos"),
        ({"audios": ["a.wav"]}, "audios"),
        ({"picture_of_it": 7}, "picture_of_it"),
        ({"source": "a.jpg"}, "source"),
        ({"image_id": 123}, "image_id"),
        ({"scan": {"bytes": "x", "path": "a.jpg"}}, "scan"),
        ({"image": "a.jpg", "images": ["a.jpg", "b.jpg"]}, "images"),
        ({"image": "a.jpg", "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}, "objects"),
    ],
    ids=str,
)
def test_an_image_or_other_media_that_is_not_read_refuses_the_record(desk, keys, word):
    assert reason_of(desk, asked(**keys), format="llava") in ("unknown_key", "wrong_type")
    assert f'"{word}"' in desk.refused()[0]["detail"]


def test_paths_in_the_text_of_qwen_vl_are_images(desk):
    said = "Picture 1: <img>a.jpg</img>\nPicture 2: <img> b.jpg</img>\nWhich?"
    report = desk.prepare(desk.write("raw.json", [asked(said)]), desk.images("a.jpg", "b.jpg"))
    (one,) = desk.kept()
    assert texts(one)[0] == "Picture 1: <image>\nPicture 2: <image>\nWhich?"
    assert one["image"] == ["../images/a.jpg", "../images/b.jpg"] and report["repairs"] == {"image_paths_in_text": 1}


MARKS = [
    "<ImageHere>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image_pad|>",
    "<|image_1|>",
    "<image 1>",
    "<Image>",
]


@pytest.mark.parametrize("mark", [*MARKS, "<image1>", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"])
def test_marks_of_other_projects_are_marks(desk, mark):
    folder, rows = desk.images("a.jpg"), [asked(f"See {mark} here", image="a.jpg"), asked(f"See {mark} here")]
    report = desk.prepare(desk.write("raw.json", rows), folder)
    assert [texts(one)[0] for one in desk.kept()] == ["See <image> here"]
    assert report["by_reason"] == {"marks_and_pictures_disagree": 1}


def test_numbered_marks_choose_the_order_of_the_images(desk):
    rows = [asked(text, images=["a.jpg", "b.jpg"]) for text in ("<image2>, then <image1>", "<image1> twice: <image1>")]
    desk.prepare(desk.write("raw.json", rows), desk.images("a.jpg", "b.jpg"))
    first, second = desk.kept()
    assert (texts(first)[0], first["image"]) == ("<image>, then <image>", ["../images/b.jpg", "../images/a.jpg"])
    assert texts(second)[0] == "<image>\n<image>\n<image1> twice: <image1>"


def test_a_text_about_marks_beside_a_marked_image_is_text(desk):
    rows = [asked("<image>\nWhat does <|image_pad|> mean?", image="a.jpg")]
    desk.prepare(desk.write("raw.json", rows), desk.images("a.jpg"))
    question = parse_record(desk.kept()[0], "").conversations[0]
    assert parts_of(question) == [IMAGE, "\nWhat does <|image_pad|> mean?"]


# --- turns


def flagged(**flags) -> dict:
    talk = [*turns("One?", "1"), {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2", **flags}]
    return {"messages": talk}


@pytest.mark.parametrize("flags", [{"loss": False}, {"weight": 0}, {"train": False}, {"loss": 0.0}], ids=str)
def test_an_answer_without_loss_is_no_target(desk, flags):
    desk.prepare(desk.write("raw.json", [flagged(**flags), flagged(loss=True), flagged(weight=1), flagged(loss=None)]))
    targets = [[turn.is_target for turn in parse_record(one, "").conversations] for one in desk.kept()]
    assert targets == [[True, True, True, False]] + [[True] * 4] * 3


@pytest.mark.parametrize(
    "flags", [{"weight": 0.5}, {"loss_weigth": 0}, {"los": False}, {"tool_calls": [{"id": "x"}]}], ids=str
)
def test_an_unknown_key_of_a_turn_refuses_the_record(desk, flags):
    rows = [flagged(), flagged(**flags), flagged(tool_calls=None, name=""), {"messages": turns("Hi", "Ho", "He", "Ha")}]
    rows[3]["messages"][0]["loss"] = True  # of a question
    report = desk.prepare(desk.write("raw.json", rows))
    assert report["kept"] == 2 and report["by_reason"] == {"unknown_key": 2}


def test_a_conversation_without_any_target_is_refused(desk):
    rows = [
        flagged(),
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "loss": False}]},
    ]
    assert desk.prepare(desk.write("raw.json", rows))["by_reason"] == {"no_answer": 1}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("format", ["llava", "chat", "messages"])
def test_a_system_prompt_is_kept_in_every_conversation_format(desk, key, format):
    desk.prepare(desk.write("raw.json", [asked(**{key: "Be brief."})]), format=format)
    assert texts(desk.kept()[0])[0] == "Be brief."
    both = asked(**{key: "Be brief."})
    both["conversations"].insert(0, {"from": "system", "value": "Be long."})
    with pytest.raises(InputError, match="two system prompts"):
        desk.prepare(desk.write("raw.json", [both]), format=format)


# --- detection

POPE = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
EVALUATION = {"question_id": 1, "image": "a.jpg", "text": "What is this?", "category": "conv"}


@pytest.mark.parametrize("row", [POPE, EVALUATION, POPE | {"question_id": None}], ids=["pope", "llava", "no id"])
@pytest.mark.parametrize("format", ["auto", "csv"])
def test_a_question_is_never_taken_for_a_caption(desk, row, format):
    with pytest.raises(
        InputError, match=r'(question_id|label)" is in a row with a text that may be a question .*columns'
    ):
        desk.prepare(desk.write("raw.jsonl", json.dumps(row)), desk.images("a.jpg"), format=format)


@pytest.mark.parametrize(
    "table",
    [
        "image,text,question\na.jpg,A dog.,What?\n",
        "image,text,A,B\na.jpg,Which?,cat,dog\n",
        "image,question,options\na.jpg,Which?,x\n",
        "image,caption,note\na.jpg,A dog.,wrong\n",
    ],
)
@pytest.mark.parametrize("format", ["auto", "csv"])
def test_a_table_with_a_column_that_is_not_read_is_refused_by_name(desk, table, format):
    with pytest.raises(InputError, match=r"question|\"A\"|options|note"):
        desk.prepare(desk.write("raw.csv", table), desk.images("a.jpg"), format=format)


def test_a_table_of_questions_with_options_is_read(desk):
    data = base64.b64encode(image_file("red", (64, 64))).decode()
    table = (
        f"index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n1\tWhich?\tLook.\tcat\tdog\t\t\tB\tx\t{data}\n"
    )
    report = desk.prepare(desk.write("raw.tsv", table))
    (one,) = desk.kept()
    assert texts(one) == ["<image>\nLook.\nWhich?\nA. cat\nB. dog", "B"]
    assert image_bytes(desk.qa.parent / one["image"]) == image_file("red", (64, 64))
    assert report["repairs"] == {"options_added_to_question": 1}


def test_every_format_says_which_key_it_does_not_read():
    rows = {
        "llava": asked("<image>", image="a.jpg"),
        "chat": {"image": "a.jpg", "conversations": turns("<image>", "A")},
        "messages": {"images": ["a.jpg"], "messages": turns("<image>", "A")},
        "cauldron": {"images": ["a.jpg"], "texts": [{"user": "Q", "assistant": "A"}]},
        "ai_challenger": {"image_id": "a.jpg", "caption": ["好"]},
        "coco_captions": {"image": {"id": 1, "file_name": "a.jpg"}, "captions": ["A."], "others": {}},
        "csv": {"image": "a.jpg", "question": "Q", "answer": "A"},
        "text": {"text": "Once."},
    }
    assert rows.keys() == FORMATS.keys() - {"folder"}
    for format, row in rows.items():
        assert FORMATS[format]({**row, "width": 3, "license": "MIT", "dataset": "x"}, 0).conversations
        held = row["others"] if format == "coco_captions" else row
        held["remark"] = "It is not so."
        with pytest.raises(RecordError, match='"remark" is not read, and holds "It is not so."'):
            FORMATS[format](row, 0)


# --- the search


PLAIN = st.text(st.characters(categories=["L"]), min_size=1, max_size=6).filter(
    lambda word: word.lower() not in ODD_WORDS
)
ODD_WORDS = {"nan", "true", "false", "null", "none", "e"}
NAMES = (
    st.sampled_from(
        [
            *IMAGE_KEYS,
            *COLUMN_NAMES,
            "img_",
            "image2",
            "pic",
            "Image",
            "IMAGE_PATH",
            "txt",
            "label",
            "note",
            "objects",
            "video",
            "A",
        ]
        + [
            "loss",
            "weight",
            "los",
            "conversation",
            "message",
            "turns",
            "sys",
            "answer_key",
            "prompt",
            "title",
            "rationale",
        ]
    )
    | PLAIN
)


@st.composite
def sound_rows(draw) -> tuple[str, dict]:
    """A format and a good record of it, with every optional key now and then."""
    format = draw(st.sampled_from(sorted(FORMATS.keys() - {"folder"})))
    image = draw(st.sampled_from(["a.jpg", "b.jpg"]))
    question, answer = draw(PLAIN), draw(PLAIN)
    has_image = draw(st.booleans())
    mark = "<image>\n" if has_image and draw(st.booleans()) else ""
    row: dict
    if format in ("llava", "chat", "messages"):
        keys, names = draw(
            st.sampled_from([(("role", "content"), ("user", "assistant")), (("from", "value"), ("human", "gpt"))])
        )
        talk = turns(mark + question, answer, *draw(st.sampled_from([(), ("Q", "A")])), keys=keys, names=names)
        if draw(st.booleans()) and len(talk) > 2:
            talk[1]["loss"] = False
        row = {"messages" if format == "messages" else "conversations": talk}
        if has_image:
            row |= {"images": [image]} if draw(st.booleans()) else {"image": image}
        if draw(st.booleans()):
            row["system"] = draw(PLAIN)
    elif format == "cauldron":
        row = {
            "images": [image] if has_image else [],
            "texts": [{"user": question, "assistant": answer, "source": "x"}],
        }
    elif format == "ai_challenger":
        row = {"image_id": image, "caption": [answer, question], "url": "u"}
    elif format == "coco_captions":
        row = {"image": {"id": 1, "file_name": image, "height": 4}, "captions": [answer]}
    elif format == "text":
        row = {"text": question}
    elif draw(st.booleans()):
        row = {"image": image, "caption": answer}
    else:
        row = {"question": question, "answer": answer} | ({"image": image} if has_image else {})
        row |= draw(
            st.sampled_from([{}, {"hint": "Look."}, {"options": ["x", "y"]}, {"A": "x", "B": "y"}, {"system": "S."}])
        )
    return format, row | draw(st.sampled_from([{}, {"id": "7"}, {"id": 7, "width": 3}]))


def places_of(value: object) -> list[dict]:
    """Every object within a record, itself first."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict) else []) + [place for one in inner for place in places_of(one)]


def role_of(name: str) -> str:
    """What a known name means; "" for an unknown name."""
    if column_name(name) in IMAGE_KEYS:
        return "image"
    own = {"from": "role", "role": "role", "value": "content", "content": "content", "text": "caption"}
    own |= dict.fromkeys(("loss", "train", "weight"), "loss") | dict.fromkeys("ABab", "options")
    known = own.get(name, column_name(name))
    return known if known in {*own.values(), *COLUMN_NAMES.values()} else ""


def content_of_row(format: str, row: dict) -> object:
    """What is learned from a record, or None if it is refused: as the converter decides, without files."""
    try:
        draft = FORMATS[format](json.loads(json.dumps(row)), 0)
        images = [str(image) for image in draft.images]
        learned = []
        for conversation in draft.conversations:
            record = {"id": "1", "image": images, "conversations": conversation}
            try:
                check_record(record)
            except RecordError:
                repaired = repair_marks(conversation, len(images))
                record["conversations"] = repaired[0] if repaired else conversation
            parsed = parse_record(record, "").conversations
            learned.append([(turn.role, parts_of(turn), turn.is_target) for turn in parsed])
    except RecordError:
        return None
    return images, learned


@settings(
    max_examples=int(os.environ.get("SILENT_CHANGES", "300")),
    deadline=None,
    derandomize="SILENT_CHANGES" not in os.environ,
    suppress_health_check=[HealthCheck.filter_too_much],
)
@given(data=st.data(), case=sound_rows())
def test_an_unknown_or_renamed_key_changes_nothing_or_refuses_the_record(data, case):
    """SILENT_CHANGES=10000 in the environment tries so many random cases, which takes minutes."""
    format, row = case
    before = content_of_row(format, row)
    assert before is not None
    changed = json.loads(json.dumps(row))
    place = data.draw(st.sampled_from(places_of(changed)))
    name = data.draw(NAMES.filter(lambda name: name not in place and not is_metadata(name)))
    old = None if data.draw(st.booleans()) else data.draw(st.sampled_from(sorted(place)))
    # another known key has a meaning of its own
    assume(not role_of(name) or role_of(name) == role_of(old or ""))
    if old is None:
        place[name] = data.draw(
            st.sampled_from(["c.jpg", "Or is it?", ["c.jpg"], {"bytes": "x"}, {"text": "Or?"}, ["yes", "no"]])
        )
    else:
        # nothing is learned from these
        assume(old not in ("id", "type", "width", "height", "url", "source"))
        assume(old != "loss" or place[old] is False)
        place[name] = place.pop(old)
    after = content_of_row(format, changed)
    assert after is None or after == before, (format, row, changed)
