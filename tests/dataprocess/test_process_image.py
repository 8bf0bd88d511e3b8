"""Raw annotations to the QA file: no record is lost or mixed up with another.

Run: python -m pytest tests/dataprocess/test_process_image.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import InputError, SourceConfig
from dataprocess import convert, process_image, verify_images
from dataprocess.process_image import summary
from dataprocess.rows import CAPTION_PROMPTS
from dataset.qa_file import QAFile
from demo import draw
from tests.dataprocess.helpers import prepare_sources
from visual.images import image_bytes, verify_image

SIDES = ("qa.jsonl", "held.jsonl")


class Workshop:
    """A folder with images and annotations, and the preparation run on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: list[SourceConfig] = []

    def images(self, folder: str, *names: str) -> Path:
        for name in names:
            path = self.folder / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{folder}/{name}".encode())  # not a real image; the tests read the text back
        return self.folder / folder

    def source(
        self, name: str, format: str, raw: list | str | bytes, *, images: Path | None = None, **settings
    ) -> None:
        path = self.folder / f"{name}.json"
        if isinstance(raw, list):
            raw = json.dumps(raw, ensure_ascii=False).encode("utf-8", "backslashreplace")
        path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
        self.sources = [one for one in self.sources if one.name != name]
        self.sources.append(SourceConfig(name, annotations=path, format=format, images=images, **settings))

    def prepare(
        self, validation_fraction=0.0, seed=0, max_refused=1.0, validation="held.jsonl", verify_images=False
    ) -> dict:
        return prepare_sources(
            self.sources,
            self.folder / "out" / "qa.jsonl",
            validation_file=self.folder / "out" / validation if validation else None,
            validation_fraction=validation_fraction,
            seed=seed,
            max_refused=max_refused,
            verify_images=verify_images,
        )

    def read(self, name: str = "qa.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.folder / "out" / name).read_text("utf-8").splitlines()]

    def refused(self) -> list[dict]:
        return self.read("qa.refused.jsonl")

    def shown(self, record: dict) -> str:
        """The content of the record's image file."""
        return (self.folder / "out" / record["image"]).read_text()


@pytest.fixture
def shop(tmp_path) -> Workshop:
    return Workshop(tmp_path)


def llava(image: str | None, *turns: str, id: object = "1", **more) -> dict:
    """A record with these turns, question first. Without turns: one question and one answer that names the image."""
    turns = turns or ("<image>\nWhat is this?", f"This is {image}.")
    conversations = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]
    shown = {"image": image} if image else {}
    return {"id": id, **shown, "conversations": conversations, **more}


def chat(image: str | None, *turns: str) -> dict:
    conversations = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns)]
    return {"conversations": conversations} | ({"image": image} if image else {})


def texts(record: dict) -> list[str]:
    return [turn["content"] for turn in record["conversations"]]


# --- nothing lost, nothing mixed up


def test_equal_file_names_in_two_sources_stay_apart(shop):
    names = [f"{k}.jpg" for k in range(20)]
    for name in ("left", "right"):
        folder = shop.images(f"images/{name}", *names)
        raw = [llava(image, f"<image>\nWhich {turn}?", f"images/{name}/{image}") for image in names for turn in "ab"]
        shop.source(name, "llava", raw, images=folder)
    report = shop.prepare()
    records = shop.read()
    assert report["kept"] == len(records) == 80  # two records about each image of each folder
    for one in records:
        assert shop.shown(one) == texts(one)[1]
    assert len({one["id"] for one in records}) == 80


def test_every_turn_and_every_caption_is_kept(shop):
    folder = shop.images("images", "a.jpg", "b.jpg")
    shop.source("talk", "llava", [llava("a.jpg", "<image>\nOne?", "1", "Two?", "2", "Three?", "3")], images=folder)
    captions = [f"图中第{k}句" for k in range(5)]
    shop.source("captions", "ai_challenger", [{"url": "u", "image_id": "b.jpg", "caption": captions}], images=folder)
    shop.prepare()
    talk, *described = shop.read()
    assert texts(talk) == ["<image>\nOne?", "1", "Two?", "2", "Three?", "3"]
    assert [texts(one)[1] for one in described] == captions
    assert [one["id"] for one in described] == [f"captions:b.jpg/{k}" for k in range(1, 6)]
    prompts = [texts(one)[0] for one in described]
    assert prompts == [f"<image>\n{CAPTION_PROMPTS[k % 2]}" for k in range(5)]


def test_one_per_epoch_keeps_the_other_captions_as_alternatives(shop):
    folder = shop.images("images", "b.jpg")
    captions = ["一", "二", "", "四", "五"]
    raw = [{"image_id": "b.jpg", "caption": captions}]
    shop.source("captions", "ai_challenger", raw, images=folder, captions="one_per_epoch")
    report = shop.prepare()
    assert report["repairs"] == {"empty_captions_left_out": 1}
    one = QAFile(shop.folder / "out" / "qa.jsonl")[0]
    assert {one.at_epoch(0, epoch)[1].content for epoch in range(4)} == {"一", "二", "四", "五"}


def test_records_with_no_image_or_two_do_not_shift_the_others(shop):
    folder = shop.images("images", "a.jpg", "b.jpg", "c.jpg")
    raw = [
        llava("a.jpg"),
        llava(None, "Just text?", "Yes."),
        llava(None, "<image>\nTwo <image>?", "Both.") | {"image": ["b.jpg", "c.jpg"]},
        llava("b.jpg"),
    ]
    shop.source("rows", "llava", raw, images=folder)
    assert shop.prepare()["kept"] == 4
    images = [one.get("image") for one in shop.read()]
    assert images == ["../images/a.jpg", None, ["../images/b.jpg", "../images/c.jpg"], "../images/b.jpg"]


# --- formats and repairs


def test_llava_marks_keep_their_place_and_a_missing_one_is_added(shop):
    folder = shop.images("images", "a.jpg")
    questions = ["<image>\nStart?", "End?\n<image>", "None?"]
    shop.source("marks", "llava", [llava("a.jpg", question, "Yes.") for question in questions], images=folder)
    report = shop.prepare()
    assert [texts(one)[0] for one in shop.read()] == ["<image>\nStart?", "End?\n<image>", "<image>\nNone?"]
    assert report["repairs"] == {"image_mark_added": 1}


def test_coco_2014_and_2017_names_match(shop):
    folder = shop.images(
        "coco", "000000000001.jpg", "train2014/COCO_train2014_000000000002.jpg", "COCO_val2014_000000000003.jpg"
    )
    wanted = ("COCO_train2014_000000000001.jpg", "train2014/000000000002.jpg", "000000000003.jpg", "a.jpg")
    raw = [llava(name) for name in wanted]
    shop.source("coco", "llava", raw, images=folder)
    report = shop.prepare()
    assert [one["image"].split("coco/")[1] for one in shop.read()] == [
        "000000000001.jpg",
        "train2014/COCO_train2014_000000000002.jpg",
        "COCO_val2014_000000000003.jpg",
    ]
    assert report["repairs"] == {"coco_2014_prefix_added": 2, "coco_2014_prefix_removed": 1}
    assert report["by_reason"] == {"missing_image": 1}


def test_chat_lines_with_marks_at_the_end_and_joined_images(shop):
    folder = shop.images("images", "0.jpg", "1.jpg", "a, b.jpg")
    rows = [
        chat("0.jpg", "描述图片。\n<image>", "好。"),
        chat("0.jpg", "描述图片。<image>", "好。"),
        chat("0.jpg, 1.jpg", "<image> <image>?", "Two."),
        chat("0.jpg, 1.jpg", "<image> <image> <image>?", "Three."),
        chat("a, b.jpg", "<image>?", "One, with a comma in its name."),
        {"conversations": [{"role": "system", "content": "Be kind."}, *chat(None, "Hi", "Hello")["conversations"]]},
    ]
    shop.source("svlm", "chat", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), images=folder)
    report = shop.prepare()
    kept = shop.read()
    assert [texts(one)[0] for one in kept[:2]] == ["描述图片。\n<image>", "描述图片。<image>"]
    assert kept[2]["image"] == ["../images/0.jpg", "../images/1.jpg"]
    assert kept[3]["image"] == "../images/a, b.jpg"
    assert kept[4]["conversations"][0] == {"role": "system", "content": "Be kind."}
    assert [one["id"] for one in kept] == ["svlm:0", "svlm:1", "svlm:2", "svlm:4", "svlm:5"]
    assert report["repairs"] == {"comma_joined_images_split": 1}
    (refusal,) = shop.refused()
    assert (refusal["reason"], refusal["line"]) == ("marks_and_pictures_disagree", 4)


def test_joined_images_without_marks_are_split_if_every_part_is_an_image(shop):
    folder = shop.images("images", "0.jpg", "1.PNG", "a, b.jpg")
    shop.source("svlm", "chat", [chat("0.jpg, 1.PNG", "Two?", "Yes."), chat("a, b.jpg", "One?", "Yes.")], images=folder)
    report = shop.prepare()
    split, whole = shop.read()
    assert (split["image"], texts(split)[0]) == (["../images/0.jpg", "../images/1.PNG"], "<image>\n<image>\nTwo?")
    assert (whole["image"], texts(whole)[0]) == ("../images/a, b.jpg", "<image>\nOne?")
    assert report["repairs"] == {"image_mark_added": 2, "comma_joined_images_split": 1}


def test_chat_reads_llava_turns_and_turns_as_json_text(shop):
    folder = shop.images("images", "a.jpg")
    turns = chat("a.jpg", "<image>\nWhat?", "This.")["conversations"]
    rows = [
        {"image": "a.jpg", "conversations": turns},
        {"image": "a.jpg", "conversations": json.dumps(turns)},
        llava("a.jpg", "<image>\nWhat?", "This."),
        {"image": "a.jpg", "conversations": "[{"},
    ]
    shop.source("svlm", "chat", rows, images=folder)
    assert shop.prepare()["by_reason"] == {"wrong_type": 1}
    assert [one["conversations"] for one in shop.read()] == [turns] * 3


@pytest.mark.parametrize("format", ["llava", "chat"])
def test_images_under_another_key_are_read_or_refused(shop, format):
    folder = shop.images("images", "a.jpg", "b.jpg")
    shown: list[dict] = [
        {"images": ["a.jpg", "b.jpg"]},
        {"images": []},
        {"image": None, "images": [{"bytes": "iVBORw0KGgo="}]},
        {"images": "a.jpg"},
        {"image_bytes": "iVBORw0KGgo="},
        {"video": "a.mp4"},
        {"image": 3},
    ]
    shop.source("x", format, [llava(None, "What?", "This.") | keys for keys in shown], images=folder)
    report = shop.prepare()
    assert [one.get("image") for one in shop.read()] == [
        ["../images/a.jpg", "../images/b.jpg"],
        None,
        "../images/a.jpg",
    ]
    assert report["by_reason"] == {"missing_image": 2, "wrong_type": 2}
    named = [refusal["detail"].split()[0] for refusal in shop.refused() if refusal["reason"] == "wrong_type"]
    assert named == ['"video"', '"image"']


def test_ids_are_unique_and_types_are_kept(shop):
    folder = shop.images("images", "a.jpg")
    ids = ["a", "a", 7, "a#2", "7", None, "a"]
    raw = [llava("a.jpg", id=name, type="colour") for name in ids]
    shop.source("x", "llava", raw, images=folder)
    shop.source("y", "llava", raw[:1], images=folder)
    shop.prepare()
    records = shop.read()
    assert [one["id"] for one in records] == ["x:a", "x:a#2", "x:7", "x:a#2#2", "x:7#2", "x:5", "x:a#3", "y:a"]
    assert {(one["type"], one["source"]) for one in records} == {("colour", "x"), ("colour", "y")}


def test_a_refused_record_takes_no_id(shop):
    folder = shop.images("images", "a.jpg")
    raw = [llava("a.jpg", "<image>\nWhat?", answer, id="a") for answer in ("", "One.", "", "Two.")]
    shop.source("x", "llava", raw, images=folder)
    shop.prepare()
    assert [one["id"] for one in shop.read()] == ["x:a", "x:a#2"]


def test_text_is_copied_exactly(shop):
    folder = shop.images("图 片", "猫.jpg")
    strange = 'tab\t "quoted" \\n back\\slash 🦊 e\u0301 \u2028 <|im_end|> '
    shop.source("unicode", "llava", [llava("猫.jpg", "<image>\n" + strange, strange)], images=folder)
    shop.prepare()
    one = QAFile(shop.folder / "out" / "qa.jsonl")[0]
    assert [turn.content for turn in one.conversations] == ["<image>\n" + strange, strange]
    assert one.images == ("../图 片/猫.jpg",)


def test_limit_takes_the_first_records(shop):
    folder = shop.images("images", "a.jpg")
    shop.source("x", "llava", [llava("a.jpg", id=str(k)) for k in range(9)], images=folder, limit=4)
    assert shop.prepare()["read"] == 4
    assert [one["id"] for one in shop.read()] == ["x:0", "x:1", "x:2", "x:3"]


# --- refusals


REFUSALS = [
    ("not an object", "wrong_type"),
    ({"image": "a.jpg"}, "wrong_type"),
    ({"id": True} | chat(None, "Hi", "Hello"), "wrong_type"),
    (llava("a.jpg", "<image>\nWhat?", ""), "empty_answer"),
    (llava("a.jpg", "<image>\nWhat?"), "no_answer"),
    (llava("a.jpg", "<image>\nWhat?", "See <image>."), "mark_outside_question"),
    (llava(None, "<image>?<image>?<image>?", "This.") | {"image": ["a.jpg", "a.jpg"]}, "marks_and_pictures_disagree"),
    (llava(None, "<image>\nWhat?", "This."), "marks_and_pictures_disagree"),
    ({"image": "a.jpg", "conversations": [{"from": "gpt", "value": "This."}]}, "assistant_first"),
    ({"image": "a.jpg", "conversations": [{"from": ["human"], "value": "<image>"}]}, "unknown_role"),
    (llava("a.jpg", "<image>\nWhat?", "half \ud83d"), "bad_unicode"),
    (llava("a.jpg", id="half \ud83d"), "bad_unicode"),
    (llava("b.jpg"), "missing_image"),
    (llava("nul\0.jpg"), "missing_image"),
    (llava("nul\0/a.jpg"), "missing_image"),
    (llava("folder"), "missing_image"),
    (llava("loop.jpg"), "missing_image"),
    (llava("../secret.jpg"), "path_outside_folder"),
    (llava("folder/../../secret.jpg"), "path_outside_folder"),
    (llava("folder/../a.jpg"), "path_outside_folder"),
    (llava("/etc/hostname"), "path_outside_folder"),
    (llava("C:\\secret.jpg"), "path_outside_folder"),
    (llava("link.jpg"), "path_outside_folder"),
    (llava("link/secret.jpg"), "path_outside_folder"),
    (llava(None, "<image>", "This.") | {"image": [3]}, "wrong_type"),
]


@pytest.fixture
def image_folder(shop) -> Path:
    """A folder with a.jpg and with several links, some of which lead outside."""
    shop.images(".", "secret.jpg")
    folder = shop.images("images", "a.jpg", "folder/c.jpg")
    (folder / "link.jpg").symlink_to(shop.folder / "secret.jpg")
    (folder / "link").symlink_to(shop.folder)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "inside.jpg").symlink_to("a.jpg")
    return folder


@pytest.mark.parametrize(("raw", "reason"), REFUSALS)
def test_a_refused_record_is_counted_with_its_reason_and_place(shop, image_folder, raw, reason):
    good = llava("inside.jpg", id="good")
    shop.source("x", "llava", [good, raw, good], images=image_folder)
    report = shop.prepare()
    assert (report["read"], report["kept"], report["refused"]) == (3, 2, 1)
    assert report["by_source"] == {"x": {"read": 3, "kept": 2, "refused": 1}}
    assert report["by_reason"] == {reason: 1}
    (refusal,) = shop.refused()
    assert refusal["source"] == "x" and refusal["file"].endswith("x.json")
    assert (refusal["index"], refusal["reason"]) == (1, reason)
    assert refusal["detail"]
    assert [one["id"] for one in shop.read()] == ["x:good", "x:good#2"]


def test_a_link_out_of_the_folder_is_refused_with_advice(shop, image_folder):
    shop.source("x", "llava", [llava("link.jpg"), llava("link/secret.jpg"), llava("a.jpg")], images=image_folder)
    shop.prepare()
    for refusal, target in zip(shop.refused(), (shop.folder / "secret.jpg", shop.folder), strict=True):
        assert f"is a link to {target}, outside {image_folder}; set images of the source to" in refusal["detail"]


def test_links_inside_the_folder_and_to_it_are_followed(shop):
    folder = shop.images("images", "deep/a.jpg")
    (folder / "b.jpg").symlink_to("deep/a.jpg")
    (folder / "shallow").symlink_to("deep")
    (shop.folder / "alias").symlink_to(folder)
    shop.source(
        "x", "llava", [llava(name) for name in ("deep/a.jpg", "b.jpg", "shallow/a.jpg")], images=shop.folder / "alias"
    )
    assert shop.prepare()["kept"] == 3
    assert {shop.shown(one) for one in shop.read()} == {"images/deep/a.jpg"}


def test_captions_of_the_wrong_type_are_refused(shop, image_folder):
    raw = [{"image_id": "a.jpg", "caption": caption} for caption in (["好"], "好", [3], [], [" "])]
    shop.source("captions", "ai_challenger", raw + [{"caption": ["好"]}], images=image_folder)
    report = shop.prepare()
    assert (report["kept"], report["by_reason"]) == (1, {"wrong_type": 3, "empty_answer": 2})
    assert shop.refused()[0]["id"] == "a.jpg"


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from(["", "a.jpg", "<image>", "human", "gpt", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "image", "conversations", "from", "value", "role", "content", "caption", "image_id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
sound = st.sampled_from(
    [llava("a.jpg"), chat("a.jpg", "<image>?", "Yes."), {"image_id": "a.jpg", "caption": ["好", "美"]}]
)


@settings(max_examples=60, deadline=None)
@given(raw=st.lists(junk | sound, min_size=1, max_size=12), format=st.sampled_from(["llava", "chat", "ai_challenger"]))
def test_no_record_is_lost(tmp_path_factory, raw, format):
    shop = Workshop(tmp_path_factory.mktemp("shop"))
    folder = shop.images("images", "a.jpg")
    shop.source("good", "llava", [llava("a.jpg")], images=folder)
    shop.source("x", format, raw, images=folder, captions="one_per_epoch" if format == "ai_challenger" else "all")
    report = shop.prepare()
    assert report["read"] == len(raw) + 1 == report["kept"] + report["refused"]
    assert report["kept"] == len(shop.read()) == len(QAFile(shop.folder / "out" / "qa.jsonl"))
    assert report["refused"] == len(shop.refused()) == sum(report["by_reason"].values())
    assert {one["index"] for one in shop.refused()} <= set(range(len(raw)))


def test_broken_lines_are_refused_and_a_broken_list_stops(shop, image_folder):
    good = json.dumps(llava("a.jpg")).encode()
    shop.source("x", "llava", b"\n".join([good, good[:-4], b"\xff" + good, good]), images=image_folder)
    report = shop.prepare()
    assert (report["kept"], report["by_reason"]) == (2, {"not_json": 2})
    assert [one["line"] for one in shop.refused()] == [2, 3]
    shop.source("x", "llava", b"[" + good + b"," + good[:-4], images=image_folder)
    with pytest.raises(InputError, match=r"x\.json: .* after 1 values"):
        shop.prepare()


def test_too_many_refusals_leave_the_report_and_no_qa_file(shop, image_folder):
    raw = [llava("a.jpg")] * 8 + [llava("b.jpg"), llava("a.jpg", "<image>\nWhat?", "")]
    shop.source("x", "llava", raw, images=image_folder)
    with pytest.raises(InputError, match=r"2 of 10 raw records were refused \(empty_answer 1, missing_image 1\)"):
        shop.prepare(max_refused=0.1)
    assert sorted(os.listdir(shop.folder / "out")) == ["qa.refused.jsonl", "qa.report.json"]
    assert json.loads((shop.folder / "out" / "qa.report.json").read_text())["refused"] == 2
    with pytest.raises(InputError):  # the report of a refused run does not count as finished
        shop.prepare(max_refused=0.1)
    assert shop.prepare(max_refused=0.2)["kept"] == 8
    with pytest.raises(InputError, match="2 of 10"):  # a finished report does not count under a stricter limit
        shop.prepare(max_refused=0.1)


def test_the_report_of_a_refused_run_is_not_used_with_an_older_qa_file(shop, image_folder):
    for answer in ("old", "new"):
        raw = [llava("a.jpg", "<image>\nWhich?", answer), llava("b.jpg")]
        shop.source("x", "llava", raw, images=image_folder)
        if answer == "new":
            with pytest.raises(InputError):
                shop.prepare(max_refused=0.0)
        shop.prepare(max_refused=0.5)
        assert texts(shop.read()[0])[1] == answer  # both QA files have the same size


def test_unusable_sources_are_named_in_the_error(shop, image_folder):
    shop.source("x", "lava", [llava("a.jpg")], images=image_folder)
    with pytest.raises(InputError, match='source "x": format: "lava" is unknown; did you mean "llava"'):
        shop.prepare()
    shop.source("x", "llava", [], images=image_folder)
    with pytest.raises(InputError, match="contains no records"):
        shop.prepare()
    shop.source("x", "llava", [llava("a.jpg")], images=shop.folder / "none")
    with pytest.raises(InputError, match="images .*none does not exist"):
        shop.prepare()
    shop.source("x", "llava", [llava("a.jpg")], images=image_folder)
    os.remove(shop.sources[0].annotations)
    with pytest.raises(InputError, match="download them first"):
        shop.prepare()
    shop.source("x", "llava", [llava("a.jpg")], images=image_folder, split="validation")
    with pytest.raises(InputError, match="none of 1 raw records is left to train on"):
        shop.prepare()
    shop.source("a:b", "llava", [llava("a.jpg")], images=image_folder)
    with pytest.raises(InputError, match="a name must not contain"):
        shop.prepare()


def test_annotations_are_never_overwritten(shop, image_folder):
    shop.source("x", "llava", [llava("a.jpg")], images=image_folder)
    before = shop.sources[0].annotations.read_bytes()
    with pytest.raises(InputError, match="would be overwritten"):
        shop.prepare(validation="../x.json")
    assert shop.sources[0].annotations.read_bytes() == before
    shop.images("out", "made")
    for name in ("qa.jsonl", "held.jsonl", "qa.report.json", "qa.refused.jsonl"):
        raw = shop.folder / "out" / name
        raw.write_bytes(before)
        shop.sources = [SourceConfig("x", raw, "llava", images=image_folder)]
        with pytest.raises(InputError, match="would be overwritten"):
            shop.prepare()
        assert raw.read_bytes() == before


def test_one_json_object_over_several_lines_is_an_error(shop, image_folder):
    shop.source("x", "llava", json.dumps({"images": [llava("a.jpg")]}, indent=1), images=image_folder)
    with pytest.raises(InputError, match="a JSON object over several lines"):
        shop.prepare()


# --- the split


def images_of(records: list[dict]) -> set[str]:
    paths = [one.get("image") or [] for one in records]
    return {os.path.realpath(path) for some in paths for path in ([some] if isinstance(some, str) else some)}


def split_shop(shop: Workshop, order=lambda raw: raw) -> None:
    names = [f"{k}.jpg" for k in range(400)]
    folder = shop.images("out/images/inner", *names)
    (shop.folder / "out" / "alias").symlink_to(folder)
    shop.source("one", "llava", order([llava(name, id=f"{name}-{k}") for name in names for k in "ab"]), images=folder)
    shop.source("two", "llava", order([llava(f"inner/{name}") for name in names]), images=folder.parent)
    shop.source("three", "llava", order([llava(name) for name in names]), images=shop.folder / "out" / "alias")


def test_an_image_is_held_out_with_all_its_records_from_any_source(shop, monkeypatch):
    split_shop(shop)
    report = shop.prepare(validation_fraction=0.25)
    monkeypatch.chdir(shop.folder / "out")
    train, held = shop.read(), shop.read("held.jsonl")
    assert len(train) + len(held) == 1600 == report["train"]["records"] + report["validation"]["records"]
    assert not images_of(train) & images_of(held)
    assert len(held) == 4 * len(images_of(held))
    assert 60 < len(images_of(held)) < 140  # 100 are expected, with a standard deviation of 9


def test_the_split_depends_on_seed_and_image_not_on_order_or_place(shop, tmp_path):
    def held(folder: Path, order=lambda raw: raw, **settings) -> set[str]:
        one = Workshop(folder)
        split_shop(one, order)
        one.prepare(validation_fraction=0.25, **settings)
        return {record["image"].split("/")[-1] for record in one.read("held.jsonl")}

    reference = held(tmp_path / "a")
    shuffled = held(tmp_path / "elsewhere" / "b", lambda raw: random.Random(0).sample(raw, len(raw)))
    assert shuffled == reference
    assert held(tmp_path / "c", seed=1) != reference


def test_folders_and_source_order_do_not_change_the_split(shop, tmp_path):
    names = [f"COCO_{('train', 'val')[k % 2]}2014_{k:012}.jpg" for k in range(200)]

    def held(folder: str, prefix: bool, images: str, backwards: bool) -> set[str]:
        one = Workshop(tmp_path / folder)
        here = [name if prefix else name[-16:] for name in names]
        one.images(f"{images}/other", *here)
        root = one.images(images, *here)
        one.source("first", "llava", [llava(name) for name in here[:150]], images=root)
        one.source("second", "llava", [llava(f"other/{name}") for name in here[50:]], images=root)
        one.sources = one.sources[:: -1 if backwards else 1]
        one.prepare(validation_fraction=0.25)
        sides = [
            {record["image"].split("/")[-1][-16:] for record in one.read(name)} for name in ("qa.jsonl", "held.jsonl")
        ]
        assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200
        return sides[1]

    reference = held("a", prefix=False, images="images", backwards=False)
    assert 25 < len(reference) < 75  # 50 are expected, with a standard deviation of 6
    assert held("b", prefix=True, images="images", backwards=False) == reference
    assert held("c", prefix=False, images="out/elsewhere/deep", backwards=False) == reference
    assert held("d", prefix=False, images="images", backwards=True) == reference


def test_coco_images_are_held_out_by_name_and_others_by_file(shop):
    held = shop.images("held", "000000000009.jpg", "a.jpg")
    other = shop.images("other", "COCO_train2014_000000000009.jpg", "a.jpg")
    (shop.folder / "alias").symlink_to(held)
    shop.source("exam", "llava", [llava("000000000009.jpg"), llava("a.jpg")], images=held, split="validation")
    shop.source(
        "learn", "llava", [llava("COCO_train2014_000000000009.jpg"), llava("a.jpg")], images=other, split="train"
    )
    shop.source("again", "llava", [llava("a.jpg")], images=shop.folder / "alias", split="train")
    report = shop.prepare()
    assert [one["image"] for one in shop.read()] == ["../other/a.jpg"]  # a different image with the same name
    assert report["by_reason"] == {"image_held_out": 2}


def test_an_image_of_a_validation_source_is_not_trained_on(shop):
    folder = shop.images("images", "a.jpg", "b.jpg", "c.jpg")
    shop.source("learn", "llava", [llava("a.jpg"), llava("b.jpg")], images=folder, split="train")
    shop.source("divide", "llava", [llava("b.jpg"), llava("c.jpg"), llava(None, "Hi", "Hello")], images=folder)
    shop.source("exam", "llava", [llava("b.jpg")], images=folder, split="validation")
    report = shop.prepare()
    assert [one["id"] for one in shop.read()] == ["divide:1#2", "divide:1#3", "learn:1"]
    assert [one["id"] for one in shop.read("held.jsonl")] == ["exam:1", "divide:1"]
    assert report["by_reason"] == {"image_held_out": 1}
    assert list(report["by_source"]) == ["learn", "divide", "exam"]


def test_images_of_one_record_go_to_one_side(shop):
    names = [f"{k}.jpg" for k in range(30)]
    folder = shop.images("images", *names)
    pairs = [
        llava(None, "<image><image>?", "Two.") | {"image": [a, b]} for a, b in zip(names[::2], names[1::2], strict=True)
    ]
    shop.source("pairs", "llava", pairs, images=folder)
    report = shop.prepare(validation_fraction=0.5)
    assert not {p for one in shop.read() for p in one["image"]} & {
        p for one in shop.read("held.jsonl") for p in one["image"]
    }
    assert report["by_reason"].keys() == {"images_on_both_sides"}


def test_text_only_records_are_divided_by_id(shop):
    shop.source("text", "llava", [llava(None, "Hi", "Hello", id=k) for k in range(200)])
    shop.prepare(validation_fraction=0.5)
    assert 60 < len(shop.read("held.jsonl")) < 140


def test_without_a_validation_file_nothing_is_held_out(shop, image_folder):
    shop.source("text", "llava", [llava(None, "Hi", "Hello", id=k) for k in range(50)])
    report = shop.prepare(validation_fraction=0.5, validation=None)
    assert report["train"]["records"] == 50 and "validation" not in report


# --- repeated runs


def outputs(shop: Workshop) -> dict[str, bytes]:
    return {name: (shop.folder / "out" / name).read_bytes() for name in os.listdir(shop.folder / "out")}


def mixed_shop(shop: Workshop, order=lambda items: items) -> None:
    folder = shop.images("images", *(f"{k}.jpg" for k in range(30)))

    def reorder(value):
        if isinstance(value, dict):
            return {key: reorder(inner) for key, inner in order(list(value.items()))}
        return [reorder(inner) for inner in value] if isinstance(value, list) else value

    raw = [llava(f"{k}.jpg", id=k % 7, type="x") for k in range(33)]
    shop.source("one", "llava", reorder(raw), images=folder)
    shop.source("two", "ai_challenger", reorder([{"image_id": "3.jpg", "caption": ["好", "美"]}]), images=folder)


def test_the_order_of_json_keys_does_not_change_the_output(shop):
    mixed_shop(shop)
    shop.prepare(validation_fraction=0.3)
    first = outputs(shop)
    for name in first:
        os.remove(shop.folder / "out" / name)
    mixed_shop(shop, order=lambda items: items[::-1])
    shop.prepare(validation_fraction=0.3)
    second = outputs(shop)
    assert first.keys() == second.keys() == {"qa.jsonl", "held.jsonl", "qa.report.json", "qa.refused.jsonl"}
    for name in ("qa.jsonl", "held.jsonl", "qa.refused.jsonl"):
        assert first[name] == second[name]
    assert len(first["qa.refused.jsonl"].splitlines()) == 3


def test_a_second_run_does_nothing_until_something_changes(shop, monkeypatch):
    mixed_shop(shop)
    first = shop.prepare(validation_fraction=0.3)
    out = shop.folder / "out"

    def ran(**settings) -> bool:
        before = (out / "qa.jsonl").stat()
        report = shop.prepare(**{"validation_fraction": 0.3} | settings)
        assert json.loads((out / "qa.report.json").read_text("utf-8")) == report
        return (out / "qa.jsonl").stat().st_ino != before.st_ino

    assert shop.prepare(validation_fraction=0.3) == first
    assert not ran()
    assert ran(seed=1)
    assert ran()
    assert ran(validation_fraction=0.2)
    assert ran()
    (out / "qa.jsonl").write_bytes(b"")  # a truncated output file
    assert ran()
    (out / "held.jsonl").unlink()
    assert ran()
    shop.images("images", "30.jpg")  # a missing image was added
    assert ran()
    assert len(shop.refused()) == 2
    shop.images("out", "new.jpg")  # a folder without images of the sources
    assert not ran()
    with open(shop.sources[0].annotations, "a") as file:
        file.write(" ")
    assert ran()
    assert not ran()
    with monkeypatch.context() as patch:
        patch.setattr(process_image, "FORMAT_VERSION", -1)
        assert ran()
        assert not ran()
    shop.sources[0] = replace(shop.sources[0], limit=5)
    assert ran()


def test_added_and_removed_images_are_noticed(shop):
    folder = shop.images("images", "a.jpg", "deep/b.jpg", "far/c.jpg")
    (folder / "link.jpg").symlink_to("far/c.jpg")
    shop.source("x", "llava", [llava("a.jpg"), llava("deep/b.jpg"), llava("link.jpg")], images=folder)
    assert [shop.prepare()["kept"] for _ in range(2)] == [3, 3]
    (folder / "deep" / "b.jpg").rename(folder / "deep" / "d.jpg")
    assert shop.prepare()["by_reason"] == {"missing_image": 1}
    (folder / "deep" / "d.jpg").rename(folder / "deep" / "b.jpg")
    assert shop.prepare()["kept"] == 3
    (folder / "far" / "c.jpg").unlink()
    assert shop.prepare()["kept"] == 2
    (folder / "a.jpg").unlink()
    assert shop.prepare()["kept"] == 1


def test_images_next_to_the_qa_file_do_not_repeat_the_work(shop):
    shop.source("x", "llava", [llava("a.jpg"), llava("b.jpg")], images=shop.images("out", "a.jpg"))
    shop.prepare()
    before = (shop.folder / "out" / "qa.jsonl").stat().st_ino
    shop.prepare()
    assert (shop.folder / "out" / "qa.jsonl").stat().st_ino == before


def test_refused_records_do_not_stay_in_memory(shop):
    folder, answer = shop.images("images", "a.jpg", "held.jpg"), "word " * 1000
    names = {0: "gone.jpg", 1: "held.jpg"}
    raw = [llava(names.get(k % 50, "a.jpg"), "<image>\nWhat?", f"{answer}{k}", id=k) for k in range(3000)]
    shop.source("held", "llava", [llava("held.jpg")], images=folder, split="validation")
    shop.source("x", "llava", raw, images=folder, split="train")
    del raw
    tracemalloc.start()
    try:
        report = shop.prepare()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["by_reason"] == {"image_held_out": 60, "missing_image": 60}
    assert peak < 8e6  # of 15 MB


def test_an_interrupted_run_changes_no_file(shop, monkeypatch):
    mixed_shop(shop)
    shop.prepare()
    before = outputs(shop)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "check_record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        shop.prepare(seed=1)
    assert outputs(shop) == before


# --- verified images


def write_image(folder: Path, name: str, color: str | tuple[int, int, int], size=(24, 18)) -> bytes:
    """Write a real image and return its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(folder / name)
    return (folder / name).read_bytes()


def verified_shop(shop: Workshop) -> Path:
    folder = shop.folder / "images"
    for k in range(40):
        write_image(folder, f"{k}.png", (k, 6 * k, 100))
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:60])
    (folder / "8.png").write_bytes(b"")
    write_image(folder, "9.png", "red", size=(1, 500))
    shop.source("x", "llava", [llava(f"{k}.png", id=k) for k in range(41)], images=folder)
    return folder


def test_an_image_that_cannot_be_decoded_refuses_its_record(shop):
    verified_shop(shop)
    report = shop.prepare(verify_images=True)
    assert report["by_reason"] == {"unreadable_image": 2, "extreme_shape": 1, "missing_image": 1}
    assert [(one["id"], one["reason"]) for one in shop.refused()] == [
        (7, "unreadable_image"),
        (8, "unreadable_image"),
        (9, "extreme_shape"),
        (40, "missing_image"),
    ]
    assert "images/7.png: " in shop.refused()[0]["detail"]
    assert [one["id"] for one in shop.read()] == [f"x:{k}" for k in range(40) if k not in (7, 8, 9)]
    assert shop.prepare(verify_images=False)["by_reason"] == {"missing_image": 1}


def test_workers_and_batch_size_do_not_change_the_output(shop, monkeypatch):
    verified_shop(shop)
    results = set()
    for workers, batch in ((1, 512), (4, 512), (4, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(process_image, "ImageVerifier", partial(verify_images.ImageVerifier, workers=workers))
            patch.setattr(convert, "BATCH", batch)
            shop.prepare(verify_images=True, validation_fraction=0.3, max_refused=0.9 + batch / 10000)
        results.add(tuple(outputs(shop)[name] for name in ("qa.jsonl", "held.jsonl", "qa.refused.jsonl")))
        shutil.rmtree(shop.folder / "out")
    assert len(results) == 1


def test_an_image_is_decoded_again_only_if_it_changed(shop, monkeypatch):
    folder = verified_shop(shop)
    decoded: list[bytes] = []

    def verify_and_remember(data: bytes) -> None:
        decoded.append(data)
        verify_image(data)

    monkeypatch.setattr(verify_images, "verify_image", verify_and_remember)
    shop.prepare(verify_images=True)
    assert len(decoded) == 40
    before = (shop.folder / "out" / "qa.jsonl").stat().st_ino
    shop.prepare(verify_images=True)
    assert (shop.folder / "out" / "qa.jsonl").stat().st_ino == before
    shop.prepare(verify_images=True, seed=1)  # converts the records again
    assert len(decoded) == 40
    whole = write_image(shop.folder / "elsewhere", "7.png", "green")
    (folder / "7.png").write_bytes(whole)  # the folder's modification time stays the same
    assert shop.prepare(verify_images=True, seed=1)["by_reason"]["unreadable_image"] == 1
    assert decoded[40:] == [whole]


def test_only_images_of_otherwise_good_records_are_decoded(shop, monkeypatch):
    folder = verified_shop(shop)
    decoded: list[bytes] = []
    monkeypatch.setattr(verify_images, "verify_image", decoded.append)
    shop.source(
        "x", "llava", [llava("1.png"), llava("2.png", "<image>\nWhat?", ""), llava("3.png", "None?")], images=folder
    )
    shop.prepare(verify_images=True)
    assert len(decoded) == 1


def test_identical_images_share_a_side_when_verified(shop):
    folder = shop.folder / "images"
    for k in range(60):
        write_image(folder / "a", f"{k}.png", (k, k, 9))
        write_image(folder / "b", f"copy-{59 - k}.png", (k, k, 9))
    raw = [llava(f"a/{k}.png") for k in range(60)] + [llava(f"b/copy-{k}.png") for k in range(60)]
    shop.source("x", "llava", raw, images=folder)
    sides = []
    for verified in (True, False):
        shop.prepare(validation_fraction=0.4, verify_images=verified)
        read = [{image_bytes(shop.folder / "out" / one["image"]) for one in shop.read(n)} for n in SIDES]
        sides.append(read)
    assert not sides[0][0] & sides[0][1] and len(sides[0][1]) > 9
    assert sides[1][0] & sides[1][1]  # by name alone they are different images


def test_a_copy_of_a_held_out_image_is_not_trained_on(shop):
    write_image(shop.folder / "exam", "a.png", "red")
    write_image(shop.folder / "learn", "b.png", "red")
    write_image(shop.folder / "learn", "c.png", "blue")
    shop.source("exam", "llava", [llava("a.png")], images=shop.folder / "exam", split="validation")
    shop.source("learn", "llava", [llava("b.png"), llava("c.png")], images=shop.folder / "learn", split="train")
    assert shop.prepare(verify_images=True)["by_reason"] == {"image_held_out": 1}
    assert [one["image"] for one in shop.read()] == ["../learn/c.png"]


# --- messages


def test_the_error_shows_examples_of_every_reason(shop, image_folder):
    raw = [llava("b.jpg", id=f"lost{k}") for k in range(5)] + [
        llava("a.jpg", "<image>\nWhat?", "", id=5),
        llava("a.jpg"),
    ]
    shop.source("x", "llava", "\n".join(map(json.dumps, raw)), images=image_folder)
    with pytest.raises(InputError) as error:
        shop.prepare(max_refused=0.1)
    first, *examples = str(error.value).split("\n")
    assert "(missing_image 5, empty_answer 1)" in first
    missing = f"{image_folder}/b.jpg: no such file."
    assert examples == [
        *(f'  missing_image: x.json line {k + 1} ("lost{k}"): {missing}' for k in range(3)),
        '  empty_answer: x.json line 6 ("5"): turn 2 (assistant) is empty.',
    ]


def test_the_summary_adds_up(shop):
    mixed_shop(shop)
    lines = summary(shop.prepare(validation_fraction=0.3)).splitlines()
    assert lines[0].split() == ["source", "read", "kept", "refused"]
    assert [line.split() for line in lines[1:4]] == [
        ["one", "33", "30", "3"],
        ["two", "1", "1", "0"],
        ["all", "34", "31", "3"],
    ]
    assert ["missing_image", "3"] in [line.split() for line in lines]
    assert sum(int(line.split()[1]) for line in lines[-2:]) == 32


CONFIG = """
output_dir: run
model: {vision_tower: ./tower, language_model: ./lm}
train: {projector_lr: 1e-3, lora_lr: 1e-4}
data:
  qa_file: out/qa.jsonl
  validation_file: out/held.jsonl
  demo_folder: demo
  verify_images: false
  sources: [{name: x, format: llava, annotations: demo/raw.json, images: demo}]
"""


def test_the_command_draws_the_demo_prepares_it_and_exits_with_2_on_bad_input(shop, monkeypatch, capsys):
    (shop.folder / "config.yaml").write_text(CONFIG)

    def make_demo(folder: Path) -> None:
        shop.images("demo", "a.jpg")
        (Path(folder) / "raw.json").write_text(json.dumps([llava("a.jpg")]))

    monkeypatch.setattr(draw, "is_complete", lambda folder: (Path(folder) / "raw.json").exists())
    monkeypatch.setattr(draw, "make_demo", make_demo)
    command = ["process_image", "--config", str(shop.folder / "config.yaml"), "data.validation_fraction=0"]
    monkeypatch.setattr(sys, "argv", command)
    process_image.main()
    assert [one["image"] for one in shop.read()] == ["../demo/a.jpg"]
    printed = capsys.readouterr().out
    assert f"drawing the demo's images into {shop.folder / 'demo'}" in printed
    assert f"1 records in {shop.folder / 'out' / 'qa.jsonl'}" in printed

    monkeypatch.setattr(sys, "argv", [*command, "data.sources.0.format=lava"])
    with pytest.raises(SystemExit) as stop:
        process_image.run_script(process_image.main)
    assert stop.value.code == 2
    assert "lava" in capsys.readouterr().err


# --- a QA file of one source, without a config


def run_command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["process_image", *map(str, arguments)])
    process_image.main()


@pytest.mark.parametrize(
    "name, text, settings, count",
    [
        ("table.csv", "图片,问题,答案\nphotos/a.jpg,颜色？,红\nphotos/b.jpg,颜色？,蓝\n".encode("gbk"), [], 2),
        ("odd.csv", b"file;asks;says\nphotos/a.jpg;Colour?;red\n",
         ["columns={image: file, question: asks, answer: says}"], 1),
        ("odd.tsv", b"bild\tquestion\tanswer\nphotos/a.jpg\tColour?\tred\n", ["columns.image=bild", "format=csv"], 1),
        ("talk.json", json.dumps([llava("photos/a.jpg"), llava("photos/b.jpg")]).encode(), ["limit=1"], 1),
        ("bad.json", json.dumps([llava("photos/a.jpg"), llava("gone.jpg")]).encode(),
         ["data.max_refused=0.5", "data.verify_images=false"], 1),
    ],
)  # fmt: skip
def test_one_command_makes_a_scoring_file_of_any_source(shop, monkeypatch, capsys, name, text, settings, count):
    for one in "ab":
        write_image(shop.folder / "photos", f"{one}.jpg", "red")
    (shop.folder / name).write_bytes(text)
    (shop.folder / "out").mkdir()
    monkeypatch.chdir(shop.folder / "out")
    run_command(monkeypatch, "--from", f"../{name}", "--output", "scoring.jsonl", *settings)
    records = QAFile(shop.folder / "out" / "scoring.jsonl")
    assert len(records) == count and records[0].images == ("../photos/a.jpg",)
    assert f"sh test.sh --qa {shop.folder / 'out' / 'scoring.jsonl'}" in capsys.readouterr().out
    run_command(monkeypatch, "--from", f"../{name}", "--output", "scoring.jsonl", *settings)  # again: nothing to do


def test_the_command_without_a_config_names_what_to_change(shop, monkeypatch, capsys):
    photos = shop.images("photos", "a.jpg")
    monkeypatch.chdir(shop.folder)
    (shop.folder / "talk.json").write_text(json.dumps([llava("a.jpg")]))
    command = ["--from", "talk.json", "--output", "scoring.jsonl", "data.verify_images=false"]
    for arguments, message in (
        ([*command, "format=lava"], "lava"),
        ([*command, "colums.image=x"], "did you mean"),
        ([*command, "data.validation_file=x"], "data.max_refused and data.verify_images do"),
        (command, "a.jpg: no such file"),  # beside the file, and not in the folder
        (["--from", "gone.csv", "--output", "x.jsonl"], "gone.csv: no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            run_command(monkeypatch, *arguments)
    run_command(monkeypatch, *command, "--images", photos)
    (shop.folder / "scoring.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"was changed after [\s\S]*data.qa_file is --output here"):
        run_command(monkeypatch, *command, "--images", photos, "limit=1")
    for arguments, message in ((["--from", "talk.json"], "needs --output"), (["--images", "x"], "need --from")):
        with pytest.raises(SystemExit) as stop:
            run_command(monkeypatch, *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
