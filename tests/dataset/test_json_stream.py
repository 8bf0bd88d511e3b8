"""JSON files as streams of values. Run: python -m pytest tests/dataset/test_json_stream.py"""

import io
import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset.json_stream
from config import InputError
from dataset.json_stream import Item, NotJson, stream_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def read(path, chunk: int, offsets: bool = False) -> tuple[list[Item], str]:
    """Return (items, message of the error that ended them, or "")."""
    items = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset.json_stream, "CHUNK_BYTES", chunk)
        try:
            for item in stream_json(path, offsets):
                items.append(item)
        except InputError as error:
            return items, str(error)
    return items, ""


# --- lists


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(json_values, max_size=6),
    chunk=st.integers(1, 40),
    pretty=st.booleans(),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_a_list_is_read_exactly_with_any_chunk_size(tmp_path_factory, values, chunk, pretty, ascii_only, bom):
    text = json.dumps(values, indent=1 if pretty else None, ensure_ascii=ascii_only) + "\n" * pretty
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "backslashreplace")
    path = tmp_path_factory.mktemp("list") / "list.json"
    path.write_bytes(data)
    items, error = read(path, chunk, offsets=True)
    assert [item.value for item in items] == values == json.loads(data.decode("utf-8-sig")) and not error
    for item in items:  # an offset leads to its value
        assert json.JSONDecoder().raw_decode(data[item.offset :].decode())[0] == item.value
    assert [item.value for item in read(path, chunk)[0]] == values


# Typical and awkward lists of objects: blanks anywhere, text that looks like the end of a record, keys in any order and
# repeated, numbers and escapes that the two decoders read differently.
blanks = st.sampled_from(["", "", "", " ", "\n  ", "\t", "\r\n"])
texts = st.lists(
    st.sampled_from(['"', "\\", "}", "]", "{", "[", ",", ":", " ", "\n", "a", "图", "😀", '"}, {"id": "', '"}]},{"id'])
).map(lambda pieces: json.dumps("".join(pieces), ensure_ascii=len(pieces) % 2 == 0))
scalars = texts | st.sampled_from(
    ["1", "-0", "0.5", "1e2", "1E400", "-1e400", "NaN", "Infinity", str(2**63), str(-(2**63)), str(2**64), "1" * 40]
    + ['"\\ud83d"', '"\\ud83d\\ude00"', "true", "null", "[]", "{}", "1" * 19, "0.1234567890123456789012", '"\\u007d"']
)


@st.composite
def objects(draw, depth: int = 2) -> str:
    """Draw the text of a JSON object."""
    space = draw(blanks)
    members = []
    for key in draw(st.lists(st.sampled_from(["id", "image", "id", "conversations"]), max_size=4)):
        if key == "conversations" and depth:
            value = f"[{(space + ',' + space).join(draw(st.lists(objects(depth - 1), max_size=3)))}]"
        else:
            value = draw(scalars)
        members.append(f'{space}"{key}"{draw(blanks)}:{space}{value}{space}')
    return "{" + ",".join(members) + "}"


@st.composite
def lists_of_objects(draw) -> str:
    space = draw(blanks)
    pool = draw(st.lists(objects(), min_size=1, max_size=4)) + draw(st.lists(scalars, max_size=1))
    members = draw(st.lists(st.sampled_from(pool), max_size=25))
    return f"{draw(blanks)}[{space}{(',' + space).join(members)}{draw(blanks)}]{draw(blanks)}"


@settings(max_examples=120, deadline=None)
@given(lists_of_objects(), st.sampled_from([20, 60, 200, 1000]))
def test_fast_reading_gives_the_same_values_as_exact_reading(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp("list") / "list.json"
    path.write_text(text, encoding="utf-8")
    items, error = read(path, chunk)
    assert repr([item.value for item in items]) == repr(json.loads(text))  # repr: NaN is not equal to itself
    assert [item.index for item in items] == list(range(len(items))) and not error


@settings(max_examples=120, deadline=None)
@given(lists_of_objects(), st.sampled_from([20, 60, 200, 1000]), st.data())
def test_fast_and_exact_reading_agree_on_a_damaged_file(tmp_path_factory, text, chunk, data):
    path = tmp_path_factory.mktemp("list") / "list.json"
    whole = text.encode()
    begin = data.draw(st.integers(0, len(whole)))
    end = min(len(whole), begin + data.draw(st.sampled_from([0, 1, 1, 5, 99999])))
    new = data.draw(st.sampled_from([b"", b"", b"]", b"}", b",", b'"', b"{", b"\\", b"\xff", b"\x00", b"7"]))
    path.write_bytes(b"[" + whole[:begin].lstrip(b" \t\r\n[") + new + whole[end:])
    exact, exact_error = read(path, 1 << 20, offsets=True)
    fast, error = read(path, chunk)
    assert repr([(item.index, item.value) for item in fast]) == repr([(item.index, item.value) for item in exact])
    assert error == exact_error


def llava(count: int) -> list[dict]:
    """Chats of several turns as LLaVA publishes them; every tenth record has its keys in another order."""
    records = []
    for i in range(count):
        turns = [{"from": "human", "value": "Is it }, { or ]?"}, {"from": "gpt", "value": 'It is "}]}, {"id".'}]
        one = {"id": f"{i:012d}", "image": f"{i}.jpg", "conversations": turns * (1 + i % 4)}
        records.append(dict(reversed(one.items())) if i % 10 == 3 else one)
    return records


@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 2}])
def test_a_list_of_records_is_read_in_pieces(tmp_path, layout):
    records = llava(3000)
    records[1500] |= {"id": 2**64, "bits": 10**30}  # orjson would round these
    records[2000] |= {"score": 1e999, "half": "\ud83d"}  # and reject these
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(records, **layout), encoding="utf-8")
    items = list(stream_json(path))
    assert [item.value for item in items] == records
    big = items[1500].value
    assert isinstance(big, dict) and type(big["id"]) is int
    assert [item.index for item in items] == list(range(3000))
    assert sum(item.offset is None for item in items) > 0.8 * len(items)  # exact reading gives offsets


def test_memory_does_not_grow_with_the_file(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(llava(6000)))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, llava(6000))))
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 1_800_000
        tracemalloc.start()
        assert sum(1 for _ in stream_json(path)) == 6000
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_200_000


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
@pytest.mark.parametrize("offsets", [False, True])
def test_a_malformed_list_is_always_an_error(tmp_path, text, chunk, offsets):
    (tmp_path / "list.json").write_text(text)
    assert re.search(r"list\.json: .* near byte", read(tmp_path / "list.json", chunk, offsets)[1])


@pytest.mark.parametrize(
    ("data", "good"),
    [
        ('["你好"]'.encode("gbk"), 0),
        (b'[{"a": 1}, {"a": "\xff"}]', 1),
        (b"[1, 2]\xe4", 2),
        (b"[1]\xff ", 1),
        (b"[\xff]", 0),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
def test_the_values_before_invalid_utf8_are_read(tmp_path, data, good, chunk):
    (tmp_path / "list.json").write_bytes(data)
    items, error = read(tmp_path / "list.json", chunk)
    assert len(items) == good and "not UTF-8" in error and f"after {good} values" in error


def test_too_deep_nesting_is_an_error_not_a_crash(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "list.json").write_text(f'[{{"a": {deep}}}]')
    with pytest.raises(InputError, match="malformed JSON"):
        list(stream_json(tmp_path / "list.json"))
    (tmp_path / "lines.jsonl").write_text(f'{{"a": {deep}}}\n{{"a": 1}}\n')
    assert [type(item.value) for item in stream_json(tmp_path / "lines.jsonl")] == [NotJson, dict]


# --- lines


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["", " ", "{", "\ud83d", "[1", "'a'", "\x0b"]) | scalars | objects(0), max_size=12),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 80),
)
def test_lines_give_the_values_of_the_standard_library(tmp_path_factory, lines, end, chunk):
    lines = ["null", *(line.replace("\n", "").replace("\r", "") for line in lines)]
    encoded = [line.encode("utf-8", "surrogatepass") for line in lines]  # an unpaired surrogate is not valid UTF-8
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_bytes(end.encode().join(encoded))
    expected: list[tuple[int, object]] = []
    for number, data in enumerate(encoded, start=1):
        if data.strip():
            try:
                expected.append((number, repr(json.loads(data.decode()))))
            except ValueError:
                expected.append((number, NotJson))
    items, error = read(path, chunk)
    assert [(i.line, NotJson if isinstance(i.value, NotJson) else repr(i.value)) for i in items] == expected
    assert [item.index for item in items] == list(range(len(items))) and not error
    whole = path.read_bytes()
    for item in items:
        assert item.line is not None and whole[item.offset :].startswith(encoded[item.line - 1])


def test_lines_are_numbered_including_invalid_ones(tmp_path):
    data = '\ufeff{"a": 1}\r\n\n{"a": \n'.encode() + b"\xff\n" + '{"a": "图"}'.encode()
    (tmp_path / "lines.jsonl").write_bytes(data)
    items = list(stream_json(tmp_path / "lines.jsonl"))
    assert [item.line for item in items] == [1, 3, 4, 5]
    assert [item.index for item in items] == [0, 1, 2, 3]
    assert [type(item.value) for item in items] == [dict, NotJson, NotJson, dict]
    assert json.loads(data[items[3].offset :]) == items[3].value == {"a": "图"}
    assert "UTF-8" in str(items[2].value)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 90), max_size=8),
    chunk=st.sampled_from([1, 7, 40]),
    end=st.sampled_from(["\n", ""]),
)
def test_a_line_that_is_too_long_is_left_out_and_the_others_are_read(tmp_path_factory, sizes, chunk, end):
    lines = [json.dumps("a" * size) for size in sizes]
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_text("\n".join(lines) + end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset.json_stream, "LONGEST_VALUE", 50)
        items, error = read(path, chunk)
    assert not error and [item.line for item in items] == list(range(1, len(lines) + 1))
    for item, line in zip(items, lines, strict=True):
        assert item.offset == path.read_text().index(line, item.offset)
        if len(line) < 50:
            assert item.value == json.loads(line)
        elif len(line) > 50:
            assert isinstance(item.value, NotJson) and "at most 50 are read" in item.value


@pytest.mark.parametrize("text", ['[1, "{}"]', '[1, "{}', "[1, {} 2]"])
def test_a_list_with_a_value_that_is_too_long_ends_there(tmp_path, monkeypatch, text):
    monkeypatch.setattr(dataset.json_stream, "LONGEST_VALUE", 4000)
    path = tmp_path / "list.json"
    path.write_text(text.replace("{}", (" " if "{} " in text else "a") * 9000))
    items, error = read(path, 500)
    assert [item.value for item in items] == [1] and "a value of more than 4,000 characters" in error


def test_blanks_before_the_first_value_take_linear_time(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(" " * 3_000_000 + "[1]")
    reads = 0

    class Counted(io.BufferedReader):
        def read(self, *size: int) -> bytes:
            nonlocal reads
            reads += 1
            return super().read(*size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset.json_stream, "open_regular", lambda path: Counted(io.FileIO(path)))
        assert [item.value for item in stream_json(path)] == [1]
    assert reads < 200


def test_one_object_over_several_lines_is_a_single_error(tmp_path):
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
    path.write_text('{"a": \n{"a": 2}\n')  # a malformed first line alone is not this error
    assert [type(item.value) for item in stream_json(path)] == [NotJson, dict]


def test_an_empty_file_has_no_values_and_a_missing_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    assert list(stream_json(tmp_path / "empty.jsonl")) == []
    with pytest.raises(InputError, match="No such file"):
        list(stream_json(tmp_path / "none.jsonl"))
