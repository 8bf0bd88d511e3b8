"""The QA format and the reading of files of it. Run: python -m pytest tests/test_record.py"""

import json
import multiprocessing
import os
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset.json_stream
import dataset.record
from config import InputError
from dataset.json_stream import NotJson, stream_json
from dataset.record import IMAGE_MARK, QAFile, Record, RecordError, Turn, parse_record

QUESTION = {"role": "user", "content": "<image>\nWhat is this?"}
ANSWER = {"role": "assistant", "content": "A cat."}


def record(number: int = 0, **changes) -> dict:
    return {"id": f"r{number}", "image": f"{number}.jpg", "conversations": [QUESTION, ANSWER]} | changes


def write_lines(path, objects) -> None:
    path.write_text("".join(json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects), encoding="utf-8")


# --- one record


texts = st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: text.replace(IMAGE_MARK, ""))
words = texts.filter(str.strip)


@st.composite
def records(draw) -> Record:
    images = tuple(draw(st.lists(words, max_size=3)))

    def conversation() -> tuple[Turn, ...]:
        turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
        for number in range(draw(st.integers(1, 3))):
            marks = IMAGE_MARK * len(images) if number == 0 else ""
            turns += [Turn("user", marks + draw(words)), Turn("assistant", draw(words))]
        return tuple(turns)

    alternatives = tuple(conversation() for _ in range(draw(st.integers(0, 2))))
    return Record(draw(words), images, conversation(), draw(texts), draw(texts), alternatives)


@given(records())
def test_a_record_survives_json(one):
    def turns(conversation):
        return [{"role": turn.role, "content": turn.content} for turn in conversation]

    obj = {"id": one.id, "image": one.images, "conversations": turns(one.conversations)}
    obj |= {"source": one.source, "type": one.type, "alternatives": [turns(other) for other in one.alternatives]}
    assert parse_record(json.loads(json.dumps(obj)), "") == one


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
        ({"conversations": [QUESTION, {"role": "assistant", "content": "half \ude00"}]}, "bad_unicode"),
        ({"conversations": [QUESTION, {"role": "gpt", "content": "A cat."}]}, "unknown_role"),
        ({"conversations": [QUESTION, {"role": ["user"], "content": "A cat."}]}, "unknown_role"),
        ({"conversations": [QUESTION, ANSWER, {"role": "system", "content": "Be kind."}]}, "system_not_first"),
        ({"conversations": [ANSWER]}, "assistant_first"),
        ({"conversations": [{"role": "system", "content": "Be kind."}, ANSWER]}, "assistant_first"),
        ({"conversations": [QUESTION, {"role": "user", "content": "And?"}, ANSWER]}, "two_users_in_a_row"),
        ({"conversations": [QUESTION, ANSWER, ANSWER]}, "two_assistants_in_a_row"),
        ({"conversations": []}, "no_answer"),
        ({"conversations": [QUESTION]}, "no_answer"),
        ({"conversations": [QUESTION, {"role": "assistant", "content": " \n"}]}, "empty_answer"),
        ({"conversations": [QUESTION, ANSWER, {"role": "user", "content": ""}, ANSWER]}, "empty_question"),
        ({"conversations": [QUESTION, {"role": "assistant", "content": "<image>"}]}, "mark_outside_question"),
        ({"conversations": [{"role": "system", "content": "<image>"}, QUESTION, ANSWER]}, "mark_outside_question"),
        ({"image": None}, "marks_and_pictures_disagree"),
        ({"image": ["a.jpg", "b.jpg"]}, "marks_and_pictures_disagree"),
        ({"alternatives": [[{"role": "user", "content": "No mark"}, ANSWER]]}, "marks_and_pictures_disagree"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(changes, reason):
    parse_record(record(), "qa.jsonl line 1")  # good without the change
    with pytest.raises(RecordError) as refusal:
        parse_record(record(**changes), "qa.jsonl line 1")
    assert refusal.value.reason == reason
    assert str(refusal.value).startswith("qa.jsonl line 1")


def test_a_refusal_survives_the_way_out_of_a_worker():
    refusal = RecordError("no_answer", "the conversation has no turns.", "qa.jsonl line 3")
    copy = pickle.loads(pickle.dumps(refusal))
    assert type(copy) is RecordError and vars(copy) == vars(refusal)
    assert str(copy) == str(refusal) == "qa.jsonl line 3: the conversation has no turns."


def test_a_record_that_is_no_object_is_refused():
    for obj in (None, [], "text", 3):
        with pytest.raises(RecordError, match="line 4: a record is a JSON object"):
            parse_record(obj, "line 4")


def test_the_message_says_what_where_and_what_to_do():
    two_marks = [{"role": "user", "content": "<image> or <image>?"}, ANSWER]
    with pytest.raises(InputError) as refusal:
        parse_record(record(id="coco_1183", conversations=two_marks), "qa.jsonl line 812")
    expected = 'qa.jsonl line 812 ("coco_1183"): 2 "<image>" marks but 1 image path; give one path per mark.'
    assert str(refusal.value) == expected


def test_records_without_an_image_and_with_two_are_fine():
    text_only = parse_record({"id": "t", "conversations": [{"role": "user", "content": "Hi"}, ANSWER]}, "")
    assert text_only.images == ()
    marks = [{"role": "user", "content": "<image>"}, ANSWER, {"role": "user", "content": "and <image>?"}, ANSWER]
    assert parse_record(record(image=["a.jpg", "b.jpg"], conversations=marks), "").images == ("a.jpg", "b.jpg")


# --- alternatives


def captioned(number: int = 0) -> Record:
    captions = [(Turn("user", "<image>"), Turn("assistant", f"caption {k}")) for k in range(5)]
    return Record(f"r{number}", ("a.jpg",), captions[0], alternatives=tuple(captions[1:]))


def test_five_epochs_see_five_captions_in_a_new_order_each_cycle():
    one = captioned()
    everything = {one.conversations, *one.alternatives}
    cycles = [tuple(one.at_epoch(3, epoch) for epoch in range(start, start + 5)) for start in range(0, 50, 5)]
    assert all(set(cycle) == everything for cycle in cycles)
    assert len(set(cycles)) > 5


def test_the_choice_depends_on_seed_epoch_and_id_alone():
    first = [captioned(number).at_epoch(0, 0)[1].content for number in range(12)]
    assert first == [captioned(number).at_epoch(0, 0)[1].content for number in range(12)]
    assert len(set(first)) > 2  # records do not move in step
    assert first != [captioned(number).at_epoch(1, 0)[1].content for number in range(12)]
    golden = [4, 0, 1, 2, 3]  # a later version may not reshuffle a run that is resumed
    assert [captioned().at_epoch(0, epoch)[1].content for epoch in range(5)] == [f"caption {k}" for k in golden]


def test_without_alternatives_every_epoch_is_the_same():
    one = parse_record(record(), "")
    assert {one.at_epoch(0, epoch) for epoch in range(4)} == {one.conversations}


# --- streams of JSON


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(json_values, max_size=6),
    chunk=st.integers(1, 40),
    pretty=st.booleans(),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_a_list_is_read_exactly_whatever_the_chunks(tmp_path_factory, values, chunk, pretty, ascii_only, bom):
    text = json.dumps(values, indent=1 if pretty else None, ensure_ascii=ascii_only) + "\n" * pretty
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "backslashreplace")
    path = tmp_path_factory.mktemp("list") / "list.json"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset.json_stream, "CHUNK_BYTES", chunk)
        items = list(stream_json(path))
    assert [item.value for item in items] == values == json.loads(data.decode("utf-8-sig"))
    for item in items:  # an offset leads to its value
        assert json.JSONDecoder().raw_decode(data[item.offset :].decode())[0] == item.value


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[1",
        "[1,",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[1]]",
        "[1]x",
        "[nul",
        '["a',
        "[{]",
        '["\\u12"]',
        "[1}",
        "[ 1 , ",
        "[1" + " " * 99,
        "[{} {}" + " " * 99,
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_malformed_list_is_an_error_never_a_shorter_list(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(dataset.json_stream, "CHUNK_BYTES", chunk)
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(InputError, match=r"list\.json: .* near byte"):
        list(stream_json(tmp_path / "list.json"))


def test_a_list_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "list.json").write_bytes('["你好"]'.encode("gbk"))
    with pytest.raises(InputError, match="not UTF-8"):
        list(stream_json(tmp_path / "list.json"))


def test_lines_are_numbered_and_bad_ones_keep_their_place(tmp_path):
    data = '\ufeff{"a": 1}\r\n\n{"a": \n'.encode() + b"\xff\n" + '{"a": "图"}'.encode()
    (tmp_path / "lines.jsonl").write_bytes(data)
    items = list(stream_json(tmp_path / "lines.jsonl"))
    assert [item.line for item in items] == [1, 3, 4, 5]
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert [type(item.value) for item in items] == [dict, NotJson, NotJson, dict]
    assert json.loads(data[items[3].offset :]) == items[3].value == {"a": "图"}
    assert "UTF-8" in items[2].value


def test_one_object_over_several_lines_is_one_error(tmp_path):
    path = tmp_path / "coco.json"
    for text in (
        json.dumps({"images": [{"id": 1}]}, indent=1),
        '\ufeff\n {"images": [\n{"id": 1}]}',
        '{"a": 1,\n"b": 2}',
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(
            InputError, match=r"coco\.json: a JSON object over several lines; expected a list of objects"
        ):
            list(stream_json(path))
    path.write_text('{"a": \n{"a": 2}\n')  # a broken line is no such thing
    assert [type(item.value) for item in stream_json(path)] == [NotJson, dict]


def test_an_empty_file_holds_nothing_and_a_missing_one_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    assert list(stream_json(tmp_path / "empty.jsonl")) == []
    with pytest.raises(InputError, match="No such file"):
        list(stream_json(tmp_path / "none.jsonl"))


# --- QA files


@pytest.fixture
def qa_path(tmp_path):
    path = tmp_path / "qa.jsonl"
    write_lines(path, [record(k, source="ab"[k % 2], type="图") for k in range(7)])
    return path


def expected(count: int = 7) -> list[Record]:
    return [parse_record(record(k, source="ab"[k % 2], type="图"), "") for k in range(count)]


def test_lines_and_a_list_hold_the_same_records(tmp_path, qa_path):
    objects = [json.loads(line) for line in qa_path.read_text(encoding="utf-8").splitlines()]
    listed = tmp_path / "qa.json"
    listed.write_text(json.dumps(objects, indent=2, ensure_ascii=False), encoding="utf-8-sig")
    spaced = tmp_path / "spaced.jsonl"
    spaced.write_text("\ufeff\n" + "\n\n".join(f" \t{json.dumps(obj)} " for obj in objects), encoding="utf-8")
    for path in (qa_path, listed, spaced):
        for _ in range(2):  # with a new index, then with the one on disk
            qa = QAFile(path)
            assert [qa[k] for k in range(len(qa))] == expected()
            assert qa[-1] == expected()[-1] and qa[np.int64(2)] == expected()[2]
            assert [qa.sources[k] for k in qa.source_of] == list("ababab") + ["a"]
    with pytest.raises(IndexError):
        QAFile(qa_path)[7]


def test_image_paths_are_relative_to_the_file(tmp_path, qa_path):
    qa = QAFile(qa_path)
    assert qa.image_paths(qa[3]) == [tmp_path / "3.jpg"]
    assert qa.image_paths(Record("x", ("/photos/a.jpg",), ())) == [type(tmp_path)("/photos/a.jpg")]


def refuse_to_scan(*_):
    raise AssertionError("the file was scanned again")


def test_the_index_is_used_and_a_stale_one_is_not(qa_path, monkeypatch):
    QAFile(qa_path)
    with monkeypatch.context() as patch:
        patch.setattr(dataset.record, "stream_json", refuse_to_scan)
        assert len(QAFile(qa_path)) == 7
    write_lines(qa_path, [record(k + 100) for k in range(7)])
    assert QAFile(qa_path)[6].id == "r106"
    index = qa_path.with_name("qa.jsonl.index.safetensors")
    index.write_bytes(index.read_bytes()[:50])
    assert QAFile(qa_path)[6].id == "r106"
    with monkeypatch.context() as patch:
        patch.setattr(dataset.record, "INDEX_VERSION", "another")
        patch.setattr(dataset.record, "stream_json", refuse_to_scan)
        with pytest.raises(AssertionError, match="scanned again"):
            QAFile(qa_path)


def test_a_folder_that_cannot_be_written_is_no_obstacle(qa_path):
    blocked = qa_path.with_name("qa.jsonl.index.safetensors")
    blocked.mkdir()  # stands where the index would go, so that writing fails for every user, root too
    qa = QAFile(qa_path)
    assert [qa[k] for k in range(7)] == expected()
    assert sorted(os.listdir(qa_path.parent)) == ["qa.jsonl", "qa.jsonl.index.safetensors"]


def test_every_record_is_checked_when_the_file_is_first_opened(qa_path):
    with open(qa_path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record(8, image=None)) + "\n")
    with pytest.raises(RecordError, match=r'qa\.jsonl line 9 \("r8"\): 1 "<image>" mark but 0 image paths'):
        QAFile(qa_path)
    qa_path.write_text('{"id": \n')
    with pytest.raises(RecordError, match=r"qa\.jsonl line 1: not a JSON value"):
        QAFile(qa_path)
    with pytest.raises(InputError, match="Has the data been prepared"):
        QAFile(qa_path.with_name("none.jsonl"))


def test_two_records_of_one_id_are_an_error_that_names_both(qa_path):
    with open(qa_path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record(4)) + "\n" + json.dumps(record(1)) + "\n" + json.dumps(record(4)) + "\n")
    with pytest.raises(InputError, match=r'qa\.jsonl: lines 5 and 9 have the same id "r4"; give every record its own'):
        QAFile(qa_path)
    listed = qa_path.with_name("qa.json")
    listed.write_text(json.dumps([record(2), record(3), record(2)]))
    with pytest.raises(InputError, match='items 0 and 2 have the same id "r2"'):
        QAFile(listed)
    assert not list(qa_path.parent.glob("*.safetensors"))


def test_ids_that_only_look_equal_to_the_hash_are_fine(qa_path, monkeypatch):
    monkeypatch.setattr(dataset.record, "hash", len, raising=False)  # every id has the same
    assert len(QAFile(qa_path)) == 7


def test_a_file_that_changes_in_use_is_an_error_not_other_records(qa_path):
    qa = QAFile(qa_path)
    write_lines(qa_path, [record(k + 100) for k in range(7)])
    with pytest.raises(InputError, match="changed while it was in use"):
        qa[0]


def read_all(qa: QAFile) -> list[Record]:
    return [qa[k] for k in range(len(qa))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_records(qa_path, method):
    qa = QAFile(qa_path)
    assert qa[0] == expected()[0]  # open before it is handed on
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_all, [qa] * 4, chunksize=1) == [expected()] * 4
    assert read_all(pickle.loads(pickle.dumps(qa))) == expected()


def test_memory_is_bytes_a_record(tmp_path):
    count = 20_000
    write_lines(tmp_path / "qa.jsonl", (record(k) for k in range(count)))
    QAFile(tmp_path / "qa.jsonl")
    tracemalloc.start()
    qa = QAFile(tmp_path / "qa.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(qa) == count
    assert peak < 40 * count  # 12 are kept: an offset and a source; a Python object each would be hundreds
