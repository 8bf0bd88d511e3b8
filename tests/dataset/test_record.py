"""The QA format and QA files. Run: python -m pytest tests/dataset/test_record.py"""

import json
import multiprocessing
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import dataset.qa_file
import dataset.record
from config import InputError
from dataset import json_stream
from dataset.qa_file import QAFile
from dataset.record import (
    IMAGE,
    IMAGE_MARK,
    Record,
    RecordError,
    Turn,
    check_record,
    encode_refused_row,
    parse_record,
)

QUESTION = {"role": "user", "content": "<image>\nWhat is this?"}
ANSWER = {"role": "assistant", "content": "A cat."}
TEXT = {"role": "text", "content": "Once upon a time."}
IMAGE_PART = {"type": "image"}


def words(text: object) -> dict:
    return {"type": "text", "text": text}


def record(number: int = 0, **changes) -> dict:
    return {"id": f"r{number}", "image": f"{number}.jpg", "conversations": [QUESTION, ANSWER]} | changes


def write_lines(path, objects) -> None:
    path.write_text("".join(json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects), encoding="utf-8")


# --- one record


texts = st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: text.replace(IMAGE_MARK, ""))
filled = texts.filter(str.strip)


@st.composite
def records(draw) -> Record:
    images = tuple(draw(st.lists(filled, max_size=3)))

    def conversation() -> tuple[Turn, ...]:
        turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
        for number in range(draw(st.integers(1, 3))):
            marks = IMAGE_MARK * len(images) if number == 0 else ""
            turns += [Turn("user", marks + draw(filled)), Turn("assistant", draw(filled))]
        return tuple(turns)

    alternatives = tuple(conversation() for _ in range(draw(st.integers(0, 2))))
    name, first = draw(filled), conversation()
    return Record(
        id=name, images=images, conversations=first, source=draw(texts), type=draw(texts), alternatives=alternatives
    )


def json_of(one: Record) -> dict:
    def turns(conversation):
        return [{"role": turn.role, "content": turn.content} for turn in conversation]

    obj = {"id": one.id, "image": list(one.images), "conversations": turns(one.conversations)}
    return obj | {"source": one.source, "type": one.type, "alternatives": [turns(other) for other in one.alternatives]}


@given(records())
def test_a_record_round_trips_through_json(one):
    assert parse_record(json.loads(json.dumps(json_of(one))), "") == one


def asked(*parts: object) -> dict:
    return {"conversations": [{"role": "user", "content": list(parts)}, ANSWER]}


def answered(*parts: object) -> dict:
    return {"conversations": [QUESTION, {"role": "assistant", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": None}, "wrong_type"),
        ({"id": 7}, "wrong_type"),
        ({"image": 7}, "wrong_type"),
        ({"image": ["a.jpg", None]}, "wrong_type"),
        ({"image": ""}, "wrong_type"),
        ({"conversations": None}, "wrong_type"),
        ({"conversations": {}}, "wrong_type"),
        ({"conversations": ["<image>"]}, "wrong_type"),
        ({"conversations": [QUESTION, {"role": "assistant"}]}, "wrong_type"),
        ({"conversations": [QUESTION, {"role": "assistant", "content": ["A cat."]}]}, "wrong_type"),
        ({"source": 3}, "wrong_type"),
        ({"type": ["colour"]}, "wrong_type"),
        ({"alternatives": "none"}, "wrong_type"),
        ({"alternatives": [{"role": "user"}]}, "wrong_type"),
        ({"id": "half \ud83d"}, "bad_unicode"),
        ({"image": "half \ud83d"}, "bad_unicode"),
        ({"source": "half \ud83d"}, "bad_unicode"),
        ({"type": "half \ud83d"}, "bad_unicode"),
        ({"conversations": [QUESTION, {"role": "assistant", "content": "half \ude00"}]}, "bad_unicode"),
        ({"conversations": [QUESTION, {"role": "gpt", "content": "A cat."}]}, "unknown_role"),
        ({"conversations": [QUESTION, {"role": ["user"], "content": "A cat."}]}, "unknown_role"),
        ({"conversations": [QUESTION, ANSWER, {"role": "system", "content": "Be kind."}]}, "system_not_first"),
        ({"conversations": [ANSWER]}, "assistant_first"),
        ({"conversations": [{"role": "system", "content": "Be kind."}, ANSWER]}, "assistant_first"),
        ({"conversations": [QUESTION, {"role": "user", "content": "And?"}, ANSWER]}, "two_users_in_a_row"),
        ({"conversations": [QUESTION, ANSWER, ANSWER]}, "two_assistants_in_a_row"),
        ({"conversations": [TEXT, QUESTION, ANSWER]}, "text_not_alone"),
        ({"conversations": [QUESTION, ANSWER, TEXT]}, "text_not_alone"),
        ({"conversations": [TEXT, TEXT]}, "text_not_alone"),
        ({"conversations": [TEXT]}, "marks_and_pictures_disagree"),
        ({"conversations": [TEXT | {"content": "an <image>"}]}, "mark_outside_question"),
        ({"conversations": [TEXT | {"content": " "}]}, "empty_answer"),
        ({"conversations": []}, "no_answer"),
        ({"conversations": [QUESTION, ANSWER | {"loss": False}]}, "no_answer"),
        ({"conversations": [QUESTION, ANSWER | {"loss": "no"}]}, "wrong_type"),
        ({"conversations": [QUESTION | {"loss": False}, ANSWER]}, "wrong_type"),
        ({"conversations": [QUESTION]}, "no_answer"),
        ({"conversations": [QUESTION, {"role": "assistant", "content": " \n"}]}, "empty_answer"),
        ({"conversations": [QUESTION, ANSWER, {"role": "user", "content": ""}, ANSWER]}, "empty_question"),
        ({"conversations": [QUESTION, {"role": "assistant", "content": "<image>"}]}, "mark_outside_question"),
        ({"conversations": [{"role": "system", "content": "<image>"}, QUESTION, ANSWER]}, "mark_outside_question"),
        ({"image": None}, "marks_and_pictures_disagree"),
        ({"image": ["a.jpg", "b.jpg"]}, "marks_and_pictures_disagree"),
        ({"alternatives": [[{"role": "user", "content": "No mark"}, ANSWER]]}, "marks_and_pictures_disagree"),
        (asked(IMAGE_PART, None), "wrong_type"),
        (asked(IMAGE_PART, ["What?"]), "wrong_type"),
        (asked(IMAGE_PART, {}), "wrong_type"),
        (asked(IMAGE_PART, {"type": ["text"], "text": "What?"}), "wrong_type"),
        (asked(IMAGE_PART, {"type": "video"}), "wrong_type"),
        (asked({"type": "image", "image": "b.jpg"}), "wrong_type"),
        (asked(IMAGE_PART, {"type": "text"}), "wrong_type"),
        (asked(IMAGE_PART, {"type": "text", "content": "What?"}), "wrong_type"),
        (asked(IMAGE_PART, {"type": "text", "text": None}), "wrong_type"),
        (asked(IMAGE_PART, words("half \ud83d")), "bad_unicode"),
        (asked(words("<image> What?")), "marks_and_pictures_disagree"),
        (asked(IMAGE_PART, IMAGE_PART), "marks_and_pictures_disagree"),
        (asked(IMAGE_PART) | {"image": None}, "marks_and_pictures_disagree"),
        (asked() | {"image": None}, "empty_question"),
        (asked(words(" "), words("\n")) | {"image": None}, "empty_question"),
        (answered(), "empty_answer"),
        (answered(words(""), words(" \n")), "empty_answer"),
        (answered(IMAGE_PART), "mark_outside_question"),
        (answered(words("A cat."), IMAGE_PART), "mark_outside_question"),
        ({"conversations": [{"role": "system", "content": [IMAGE_PART]}, QUESTION, ANSWER]}, "mark_outside_question"),
    ],
)
def test_an_invalid_record_is_rejected_with_its_reason(changes, reason):
    parse_record(record(), "qa.jsonl line 1")  # valid without the change
    with pytest.raises(RecordError) as parsed:
        parse_record(record(**changes), "qa.jsonl line 1")
    assert parsed.value.reason == reason
    assert str(parsed.value).startswith("qa.jsonl line 1")
    with pytest.raises(RecordError) as checked:
        check_record(record(**changes))
    assert (checked.value.reason, checked.value.detail) == (reason, parsed.value.detail)


def test_a_record_error_can_be_pickled():
    error = RecordError("no_answer", "the conversation has no turns.", "qa.jsonl line 3")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is RecordError and vars(copy) == vars(error)
    assert str(copy) == str(error) == "qa.jsonl line 3: the conversation has no turns."


def test_a_record_must_be_an_object():
    not_objects: list[object] = [None, [], "text", 3]
    for obj in not_objects:
        with pytest.raises(RecordError, match="line 4: a record must be a JSON object"):
            parse_record(obj, "line 4")


def test_the_message_gives_place_fault_and_remedy():
    two_marks = [{"role": "user", "content": "<image> or <image>?"}, ANSWER]
    with pytest.raises(InputError) as caught:
        parse_record(record(id="coco_1183", conversations=two_marks), "qa.jsonl line 812")
    expected = 'qa.jsonl line 812 ("coco_1183"): 2 "<image>" marks but 1 image path; give one path per mark.'
    assert str(caught.value) == expected


def test_a_text_turn_alone_is_a_record():
    one = parse_record({"id": "t", "conversations": [TEXT]}, "")
    assert one.conversations == (Turn("text", "Once upon a time."),) and one.images == ()
    parts = TEXT | {"content": [{"type": "text", "text": "An <image> in HTML."}]}
    assert parse_record({"id": "t", "conversations": [parts]}, "").conversations[0].content == "An <image> in HTML."
    check_record({"id": "t", "conversations": [TEXT]})


def test_records_may_have_no_image_or_several():
    text_only = parse_record({"id": "t", "conversations": [{"role": "user", "content": "Hi"}, ANSWER]}, "")
    assert text_only.images == ()
    marks = [{"role": "user", "content": "<image>"}, ANSWER, {"role": "user", "content": "and <image>?"}, ANSWER]
    assert parse_record(record(image=["a.jpg", "b.jpg"], conversations=marks), "").images == ("a.jpg", "b.jpg")


def test_a_deeply_nested_value_is_rejected_like_any_other():
    deep = json_stream.decode(b"[" * 1000 + b"]" * 1000)
    for changes in (
        {"id": deep},
        {"image": deep},
        {"conversations": deep},
        {"conversations": [QUESTION, {"role": deep, "content": "A cat."}]},
        asked(IMAGE_PART, {"type": deep}),
        answered(deep),
    ):
        for check in (check_record, lambda obj: parse_record(obj, "line 1")):
            with pytest.raises(RecordError) as caught:
                check(record(**changes))
            assert caught.value.reason in ("wrong_type", "unknown_role")
    parse_record(record(extra=deep), "")


# --- parts


def test_text_in_parts_is_literal_and_only_image_parts_count_as_images():
    literal = "<image> <|im_end|> <|extra_0|> <|endoftext|>"
    talk = [
        {"role": "system", "content": [words(literal)]},
        {
            "role": "user",
            "content": [words(literal), words(""), words("!"), IMAGE_PART, words(""), IMAGE_PART, words("a")],
        },
        {"role": "assistant", "content": [words(literal), words("?")]},
        {"role": "user", "content": "<image> and now?"},
        {"role": "assistant", "content": "A cat."},
    ]
    one = parse_record(record(image=["a.jpg", "b.jpg", "c.jpg"], conversations=talk), "")
    assert one.conversations == (
        Turn("system", literal),
        Turn("user", (literal + "!", IMAGE, IMAGE, "a")),
        Turn("assistant", literal + "?"),
        Turn("user", "<image> and now?"),
        Turn("assistant", "A cat."),
    )
    assert pickle.loads(pickle.dumps(one)) == one  # spawned workers receive it pickled


def test_the_message_names_the_invalid_part():
    for part, found in [
        ("What?", "contains text instead of a part"),
        ({"type": "video"}, 'contains a part of type "video"'),
        ({"type": "image", "image": "b.jpg"}, 'contains a part with "type", "image"'),
    ]:
        expected = f'line 1 ("r0"): turn 1 {found}; expected {{"type": "image"}} or {{"type": "text", "text": "..."}}.'
        with pytest.raises(RecordError) as caught:
            parse_record(record(**asked(IMAGE_PART, part)), "line 1")
        assert str(caught.value) == expected


# --- the check


def outcome(read, obj: object) -> object:
    """What `read` returns, or the reason and detail of its error."""
    try:
        return read(obj)
    except RecordError as error:
        return error.reason, error.detail


# Nearly valid records: each value is sometimes a wrong one.
odd = st.sampled_from(
    [None, 0, 7, True, "", " ", "\u3000", "a", "<image>", "\ud83d", "图", [], ["a"], [""], [7], {}, {"a": "b"}]
)
part = st.sampled_from(
    [IMAGE_PART, words("a"), words("<image>"), words("\ud83d"), words(""), words(None), None, {"type": 1}]
)
content = st.sampled_from(["a", "<image>", "<image>\n图", "图", "\ud83d"]) | odd | st.lists(part, max_size=3)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "gpt"]) | odd, "content": content},
    optional={"loss": st.booleans() | odd},
)
talk = st.builds(
    lambda first, contents: (
        first + [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]
    ),
    st.just([]) | st.just([{"role": "system", "content": "s"}]),
    st.lists(st.sampled_from(["a", "a", "<image>", "图"]) | content, max_size=4),
)
talks = talk | st.lists(turn | odd, max_size=3) | odd
nearly_records = st.fixed_dictionaries(
    {"id": st.just("r") | odd, "conversations": talks},
    optional={
        "image": st.sampled_from(["a.jpg", ["a.jpg"], ["a.jpg", "图.jpg"], None]) | odd,
        "source": st.just("coco") | odd,
        "type": st.just("colour") | odd,
        "alternatives": st.lists(talks, max_size=2) | odd,
    },
)


@settings(max_examples=400, deadline=None)
@given(nearly_records | odd)
def test_the_fast_ways_agree_with_the_whole_parser(obj):
    expected = outcome(dataset.record._parse, obj)
    assert outcome(lambda obj: parse_record(obj, ""), obj) == expected
    assert outcome(check_record, obj) == (None if isinstance(expected, Record) else expected)
    assert isinstance(expected, Record) or all(expected)


@given(records())
def test_the_check_accepts_every_valid_record(one):
    check_record(json_of(one))


def test_a_common_record_is_checked_and_read_without_the_whole_parser(monkeypatch):
    def parse(_):
        raise AssertionError("parsed")

    monkeypatch.setattr(dataset.record, "_parse", parse)
    for common in (
        record(source="coco", type="图", alternatives=[[QUESTION, ANSWER]]),
        record(image=["图.jpg", "b.jpg"], conversations=[QUESTION, ANSWER] * 2),
        {"id": "t", "conversations": [{"role": "user", "content": "你好"}, ANSWER]},
    ):
        check_record(common)
        assert parse_record(common, "").id == common["id"]


# --- the refused row


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        (
            3,
            "r1",
            b'{"source": "coco", "file": "a.json", "line": 3, "id": "r1", "reason": "bad", "detail": "\xe5\x9b\xbe"}',
        ),
        (
            None,
            7,
            b'{"source": "coco", "file": "a.json", "index": 2, "id": 7, "reason": "bad", "detail": "\xe5\x9b\xbe"}',
        ),
        (3, "\ud83d", b'"line": 3, "id": "\\ud83d", '),
        (3, None, b'"line": 3, "id": null, '),
    ],
)
def test_a_refused_row_is_one_line_of_json(line, name, expected):
    row = encode_refused_row(source="coco", file="a.json", line=line, index=2, id=name, reason="bad", detail="图")
    assert expected in row and b"\n" not in row
    assert json.loads(row)["id"] == name


# --- alternatives


def captioned(number: int = 0) -> Record:
    captions = [(Turn("user", "<image>"), Turn("assistant", f"caption {k}")) for k in range(5)]
    return Record(f"r{number}", ("a.jpg",), captions[0], alternatives=tuple(captions[1:]))


def test_each_cycle_of_epochs_uses_every_conversation_in_a_new_order():
    one = captioned()
    everything = {one.conversations, *one.alternatives}
    cycles = [tuple(one.at_epoch(3, epoch) for epoch in range(start, start + 5)) for start in range(0, 50, 5)]
    assert all(set(cycle) == everything for cycle in cycles)
    assert len(set(cycles)) > 5


def test_the_conversation_depends_only_on_seed_epoch_and_id():
    first = [captioned(number).at_epoch(0, 0)[1].content for number in range(12)]
    assert first == [captioned(number).at_epoch(0, 0)[1].content for number in range(12)]
    assert len(set(first)) > 2  # records do not all choose the same one
    assert first != [captioned(number).at_epoch(1, 0)[1].content for number in range(12)]
    golden = [4, 0, 1, 2, 3]  # a later version must not reorder a resumed run
    assert [captioned().at_epoch(0, epoch)[1].content for epoch in range(5)] == [f"caption {k}" for k in golden]


def test_without_alternatives_every_epoch_uses_the_same_conversation():
    one = parse_record(record(), "")
    assert {one.at_epoch(0, epoch) for epoch in range(4)} == {one.conversations}


LONG = "x" * 50_000


@pytest.mark.parametrize(
    "obj",
    [
        {"id": LONG},
        record(id=LONG, image=[LONG, LONG]),
        record(id=LONG, conversations=[QUESTION | {"role": LONG}, ANSWER]),
        record(conversations=[{"role": "user", "content": [{"type": LONG}]}, ANSWER]),
        record(conversations=[{"role": "user", "content": [{"type": "text", LONG: LONG}]}, ANSWER]),
        record(conversations={LONG: LONG}),
        LONG,
    ],
)
def test_a_message_about_a_long_record_is_short(obj):
    with pytest.raises(RecordError) as error:
        parse_record(obj, "qa.jsonl line 3")
    assert len(str(error.value)) < 1500
    detail = f"{LONG}: no such file."
    row = encode_refused_row(source="s", file="f", line=1, index=0, id=LONG, reason="missing_image", detail=detail)
    assert len(row) < 1500 and b"no such file." in row


# --- QA files


@pytest.fixture
def qa_path(tmp_path):
    path = tmp_path / "qa.jsonl"
    write_lines(path, [record(k, source="ab"[k % 2], type="图") for k in range(7)])
    return path


def expected(count: int = 7) -> list[Record]:
    return [parse_record(record(k, source="ab"[k % 2], type="图"), "") for k in range(count)]


def test_lines_and_a_list_give_the_same_records(tmp_path, qa_path):
    objects = [json.loads(line) for line in qa_path.read_text(encoding="utf-8").splitlines()]
    listed = tmp_path / "qa.json"
    listed.write_text(json.dumps(objects, indent=2, ensure_ascii=False), encoding="utf-8-sig")
    spaced = tmp_path / "spaced.jsonl"
    spaced.write_text("\ufeff\n" + "\n\n".join(f" \t{json.dumps(obj)} " for obj in objects), encoding="utf-8")
    for path in (qa_path, listed, spaced):
        for _ in range(2):  # builds the index, then reads it from disk
            qa = QAFile(path)
            assert [qa[k] for k in range(len(qa))] == expected()
            assert qa[-1] == expected()[-1] and qa[np.int64(2)] == expected()[2]
            assert [qa.sources[k] for k in qa.source_of] == list("ababab") + ["a"]
    with pytest.raises(IndexError):
        QAFile(qa_path)[7]


def test_json_that_only_the_standard_library_reads_is_accepted(tmp_path):
    """A huge integer and NaN in ignored keys, and white space around records, do not disturb the index."""
    text = json.dumps(record(1, extra=10**30, score=float("nan")), indent=1) + " \n"
    listed, lines = tmp_path / "qa.json", tmp_path / "qa.jsonl"
    listed.write_text(f"[{text} , {text.replace('r1', 'r2')}]\n\n")
    lines.write_text("\n" + "\n \n".join(json.dumps(json.loads(text) | {"id": name}) for name in ("r1", "r2")) + "\n\n")
    for path in (listed, lines):
        assert [one.id for one in read_all(QAFile(path))] == ["r1", "r2"]


def test_image_paths_are_relative_to_the_file(tmp_path, qa_path):
    qa = QAFile(qa_path)
    assert qa.image_paths(qa[3]) == [tmp_path / "3.jpg"]
    assert qa.image_paths(Record("x", ("/photos/a.jpg",), ())) == [type(tmp_path)("/photos/a.jpg")]


def refuse_to_scan(*_, **__):
    raise AssertionError("the file was scanned again")


def test_the_index_is_used_unless_it_is_stale(qa_path, monkeypatch):
    QAFile(qa_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset.qa_file, "stream_json", refuse_to_scan)
        assert len(QAFile(qa_path)) == 7
    write_lines(qa_path, [record(k + 100) for k in range(7)])
    assert QAFile(qa_path)[6].id == "r106"
    index = qa_path.with_name("qa.jsonl.index.safetensors")
    index.write_bytes(index.read_bytes()[:50])
    assert QAFile(qa_path)[6].id == "r106"
    with monkeypatch.context() as patch:
        patch.setattr(dataset.qa_file, "FORMAT_VERSION", "another")
        patch.setattr(dataset.qa_file, "stream_json", refuse_to_scan)
        with pytest.raises(AssertionError, match="scanned again"):
            QAFile(qa_path)


def right_index(path) -> tuple[list[int], list[int], list[str]]:
    """Return the offsets, positions of sources and sources of a QA file with lines."""
    ends = np.cumsum([0, *map(len, path.read_bytes().splitlines(keepends=True))])
    return ends.tolist(), [k % 2 for k in range(7)], ["a", "b"]


def write_index(path, offsets: np.ndarray, source_of: np.ndarray, sources: str) -> None:
    state = path.stat()
    stamp = {"version": dataset.qa_file.FORMAT_VERSION, "size": str(state.st_size), "mtime_ns": str(state.st_mtime_ns)}
    metadata = stamp | ({"sources": sources} if sources else {})
    save_file({"offsets": offsets, "source_of": source_of}, f"{path}.index.safetensors", metadata)


wild = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 1500)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["int64", "int64", "int64", "float64", "uint8"]))
def test_an_index_of_a_stranger_gives_the_right_records_or_one_message(tmp_path_factory, data, dtype):
    """Its stamp is that of the file, but its numbers are not."""
    path = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    write_lines(path, [record(k, source="ab"[k % 2], type="图") for k in range(7)])
    offsets, source_of, sources = right_index(path)
    for _ in range(data.draw(st.integers(0, 3))):
        offsets[data.draw(st.integers(0, 7))] = data.draw(wild)
    if data.draw(st.booleans()):
        offsets = sorted(offsets)
    if data.draw(st.booleans()):
        source_of[data.draw(st.integers(0, 6))] = data.draw(st.integers(-(2**31), 2**31 - 1) | st.just(2))
    text = data.draw(st.sampled_from([json.dumps(sources)] * 3 + ["", "[", "{}", "[[], 3]", "[" * 99_999]))
    shape = data.draw(st.sampled_from([(8,), (8,), (8,), (2, 4), (8, 1)]))
    write_index(path, np.array(offsets).astype(dtype).reshape(shape), np.array(source_of, np.int32), text)
    qa = QAFile(path)
    assert {qa.sources[k] for k in qa.source_of} <= {"a", "b"}
    for k in range(len(qa)):
        try:
            assert qa[k] in expected()
        except InputError as error:
            assert f"record {k} is not at the place" in str(error) and "index.safetensors" in str(error)


def test_the_right_index_of_a_stranger_is_used(qa_path, monkeypatch):
    offsets, source_of, sources = right_index(qa_path)
    write_index(qa_path, np.array(offsets), np.array(source_of, np.int32), json.dumps(sources))
    monkeypatch.setattr(dataset.qa_file, "stream_json", refuse_to_scan)
    assert read_all(QAFile(qa_path)) == expected()


def test_a_read_only_folder_is_no_obstacle(qa_path):
    blocked = qa_path.with_name("qa.jsonl.index.safetensors")
    blocked.mkdir()  # a folder in place of the index makes writing fail for every user, including root
    qa = QAFile(qa_path)
    assert [qa[k] for k in range(7)] == expected()
    assert sorted(os.listdir(qa_path.parent)) == ["qa.jsonl", "qa.jsonl.index.safetensors"]


def test_every_record_is_checked_at_the_first_opening(qa_path):
    with open(qa_path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record(8, image=None)) + "\n")
    with pytest.raises(RecordError, match=r'qa\.jsonl line 9 \("r8"\): 1 "<image>" mark but 0 image paths'):
        QAFile(qa_path)
    qa_path.write_text('{"id": \n')
    with pytest.raises(RecordError, match=r"qa\.jsonl line 1: not a JSON value"):
        QAFile(qa_path)
    with pytest.raises(InputError, match="Has the data been prepared"):
        QAFile(qa_path.with_name("none.jsonl"))


def test_a_duplicate_id_is_an_error_that_names_both_records(qa_path):
    with open(qa_path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record(4)) + "\n" + json.dumps(record(1)) + "\n" + json.dumps(record(4)) + "\n")
    with pytest.raises(InputError, match=r'qa\.jsonl: lines 5 and 9 have the same id "r4"; give every record its own'):
        QAFile(qa_path)
    listed = qa_path.with_name("qa.json")
    listed.write_text(json.dumps([record(2), record(3), record(2)]))
    with pytest.raises(InputError, match='items 0 and 2 have the same id "r2"'):
        QAFile(listed)
    assert not list(qa_path.parent.glob("*.safetensors"))


def test_different_ids_with_equal_hashes_are_accepted(qa_path, monkeypatch):
    monkeypatch.setattr(dataset.qa_file, "hash", len, raising=False)  # every id has the same hash
    assert len(QAFile(qa_path)) == 7


def test_a_file_that_changes_while_in_use_is_an_error(qa_path):
    qa = QAFile(qa_path)
    write_lines(qa_path, [record(k + 100) for k in range(7)])
    with pytest.raises(InputError, match="changed while it was in use"):
        qa[0]


def read_all(qa: QAFile) -> list[Record]:
    return [qa[k] for k in range(len(qa))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_records(qa_path, method):
    qa = QAFile(qa_path)
    assert qa[0] == expected()[0]  # opens the file before the workers get it
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [qa] * 4, chunksize=1) == [expected()] * 4
    assert read_all(pickle.loads(pickle.dumps(qa))) == expected()


def test_memory_is_a_few_bytes_per_record(tmp_path):
    count = 20_000
    write_lines(tmp_path / "qa.jsonl", (record(k) for k in range(count)))
    QAFile(tmp_path / "qa.jsonl")
    tracemalloc.start()
    qa = QAFile(tmp_path / "qa.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(qa) == count
    assert peak < 40 * count  # 12 bytes each for offset and source; a Python object would take hundreds
