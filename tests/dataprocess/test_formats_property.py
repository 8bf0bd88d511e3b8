"""In every format and container, each raw record is kept completely or refused with a reason.

Run: python -m pytest tests/dataprocess/test_formats_property.py

Rows are good (the output is known), have one known fault (the reason is known), or are damaged at random (only the rules
for all rows are checked). No error other than InputError is raised. Every case runs a second time in a process with
another PYTHONHASHSEED and must write the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from config import CAPTION_FORMATS, InputError, SourceConfig
from dataprocess.readers import FORMATS
from dataset.qa_file import QAFile
from dataset.record import IMAGE, Record, Turn, parse_record, parts_of
from tests import raw_records as raw
from tests.dataprocess.helpers import prepare_sources
from tests.raw_records import Place, Row
from visual.images import image_bytes, image_state

ROOT = Path(__file__).parents[2]
REASONS = set(
    "missing_image path_outside_folder assistant_first two_users_in_a_row two_assistants_in_a_row empty_answer "
    "empty_question no_answer wrong_type not_json bad_unicode marks_and_pictures_disagree mark_outside_question "
    "unknown_role system_not_first unreadable_image decompression_bomb extreme_shape unknown_key".split()
)
cases = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=60
)


def image_file(kind: str, size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(9)),
        b"IEND",
    )
    framed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


DATA = [
    image_file("PNG", (9, 8), (0, 20, 30)),
    image_file("JPEG", (8, 9), (90, 20, 30)),
    image_file("WEBP", (9, 9), (180, 20, 30)),
    image_file("PNG", (8, 8), (250, 20, 30)),
]
BAD = {
    "cut.jpg": (image_file("JPEG", (64, 64), (5, 20, 30))[:-200], "unreadable_image"),
    "empty.png": (b"", "unreadable_image"),
    "words.jpg": (b"<html>404</html>", "unreadable_image"),
    "bomb.png": (bomb(), "decompression_bomb"),
    "thin.png": (image_file("PNG", (2000, 1), (1, 20, 30)), "extreme_shape"),
}


def run(folder: Path, sources: list[dict], verify: bool) -> str:
    """Run the preparation; return "" or the message of its InputError."""
    qa_file = folder / "out" / "qa.jsonl"
    try:
        with mock.patch("os.fsync"):  # it takes most of the time, and the test needs no safety against a power failure
            prepare_sources([SourceConfig(**source) for source in sources], qa_file, seed=3, verify_images=verify)
    except InputError as error:
        return str(error)
    return ""


class OtherProcess:
    """Runs the preparation in a process with another PYTHONHASHSEED."""

    CODE = (
        "import sys, json; from pathlib import Path; from tests.dataprocess.test_formats_property import run\n"
        "for line in sys.stdin:\n"
        "    folder, sources, verify = json.loads(line)\n"
        "    for source in sources: source.update({k: Path(source[k]) for k in ('annotations', 'images')})\n"
        "    print(json.dumps(run(Path(folder), sources, verify)), flush=True)"
    )

    def __init__(self):
        environment = os.environ | {"PYTHONHASHSEED": "12345"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, *job) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    base = tmp_path_factory.mktemp("formats")
    images = base / "images"
    for number, name in enumerate([*raw.IMAGES, "../secret.jpg", "../elsewhere/secret.jpg"]):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(DATA[number % len(DATA)])
    for name, (data, _) in BAD.items():
        (images / name).write_bytes(data)
    (images / "escape.jpg").symlink_to("../secret.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "away").symlink_to("../elsewhere")
    work = Work(base, images, OtherProcess())
    yield work
    work.other.close()


class Work:
    def __init__(self, base: Path, images: Path, other: OtherProcess):
        self.base, self.images, self.other = base, images, other

    def check(self, draw, format: str, rows: list[Row], *, write, verify: bool = False) -> None:
        """Prepare the rows and compare the output with the expected result. Then repeat without naming the format.

        write: (folder) -> (annotations, places), writes the rows into files.
        """
        captions = "all"
        if format in CAPTION_FORMATS:
            known = all(row.dialogs or row.reasons for row in rows)
            captions = draw(st.sampled_from(["all", "one_per_epoch"])) if known else "one_per_epoch"
        each = captions == "all" and format in CAPTION_FORMATS
        with tempfile.TemporaryDirectory(dir=self.base) as temporary:
            folder = Path(temporary)
            annotations, places = write(folder)
            images = folder / "raw" if format == "folder" else self.images
            source = {"name": "s", "annotations": annotations, "images": images, "format": format, "captions": captions}
            message = run(folder, [source], verify)
            check_outputs(
                folder / "out", rows=rows, places=places, image_folder=images, message=message, one_caption_each=each
            )
            outputs = taken(folder / "out")
            assert self.other.run(folder, [source], verify) == message
            assert taken(folder / "out") == outputs
            again = run(folder, [source | {"format": "auto"}], verify)
            if all(row.dialogs for row in rows) and any(row.images for row in rows):
                assert again == message and taken(folder / "out") == outputs


def taken(out: Path) -> dict[str, object]:
    """Read the output files and remove them. The index, the cache, times and the fingerprint are left out."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out)
    report = json.loads(files.pop("qa.report.json"))
    report = {key: value for key, value in report.items() if key not in ("fingerprint", "image_folders")}
    same = {name: data for name, data in files.items() if not name.endswith((".sqlite", ".safetensors"))}
    return same | {"report": json.dumps(report)}


def check_outputs(
    out: Path, *, rows: list[Row], places: list[Place], image_folder: Path, message: str, one_caption_each: bool
) -> None:
    """Compare all output files and the message of the error with the expected result."""
    report = json.loads((out / "qa.report.json").read_text(encoding="utf-8"))
    refusals = [json.loads(line) for line in (out / "qa.refused.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert report["read"] == len(places) == report["kept"] + report["refused"] and report["refused"] == len(refusals)
    row_at = {place: number for number, place in enumerate(places)}
    refused = {}
    for refusal in refusals:
        (word,) = {"line", "index"} & refusal.keys()
        number = row_at[refusal["file"], word, refusal[word]]
        assert number not in refused and refusal["source"] == "s" and refusal["reason"] in REASONS and refusal["detail"]
        refused[number] = refusal
    for number, row in enumerate(rows):
        if number not in refused:
            assert not row.reasons, f"kept, though {row.reasons}: {row.value!r}"
            continue
        assert row.dialogs is None, f"{refused[number]}: {row.value!r}"
        assert not row.reasons or refused[number]["reason"] in row.reasons, (refused[number], row)
        if isinstance(row.value, dict) and isinstance(row.value.get("id"), str):
            assert refused[number]["id"] == row.value["id"]
    kept = [row for number, row in enumerate(rows) if number not in refused]
    if not kept:
        assert "none of" in message and not (out / "qa.jsonl").exists()
        return
    assert message == ""
    check_kept(QAFile(out / "qa.jsonl"), kept, image_folder.resolve(), one_caption_each=one_caption_each)


def check_kept(qa: QAFile, rows: list[Row], image_folder: Path, *, one_caption_each: bool) -> None:
    records = iter(qa[i] for i in range(len(qa)))
    lines = iter(qa.path.read_bytes().split(b"\n")[:-1])
    seen = set()
    for row in rows:
        for dialogs in (
            ([[dialog] for dialog in row.dialogs] if one_caption_each else [row.dialogs]) if row.dialogs else [None]
        ):
            record, line = next(records), next(lines)
            assert parse_record(json.loads(line), "") == parse_record(as_json(record), "") == record
            assert record.id.startswith("s:") and record.source == "s" and record.id not in seen
            seen.add(record.id)
            for path in qa.image_paths(record):
                inside = {image_folder, qa.folder.resolve() / "qa.images.zip"}
                assert image_state(path).is_file and inside & set(path.resolve().parents)
            if dialogs is not None:
                said = [
                    [(turn.role, parts_of(turn)) for turn in dialog]
                    for dialog in (record.conversations, *record.alternatives)
                ]
                assert len(said) == len(dialogs)
                for ours, theirs in zip(said, dialogs, strict=True):
                    assert len(ours) == len(theirs)
                    for (role, parts), (wanted, pieces) in zip(ours, theirs, strict=True):
                        if pieces is raw.PROMPT:
                            assert role == "user" and parts[0] is IMAGE and len(parts) == 2
                        else:
                            expected = [IMAGE if piece is raw.IMAGE else piece for piece in raw.joined(pieces)]
                            assert (role, parts) == (wanted, expected)
                check_images(qa.image_paths(record), row.images, image_folder)
            else:
                check_words(record, row.value)
    assert next(records, None) is None


def check_images(paths: list[Path], images: Sequence[str | bytes], image_folder: Path) -> None:
    for path, wanted in zip(paths, images, strict=True):
        if isinstance(wanted, bytes):
            assert image_bytes(path) == wanted
        else:
            assert path.resolve() == image_folder / wanted


def check_words(record: Record, value: dict) -> None:
    """Check that a damaged row that was kept has no new text, except for the questions about captions."""
    source = squeezed("".join(strings(value)))
    for turn in [turn for dialog in (record.conversations, *record.alternatives) for turn in dialog]:
        if "caption" not in value or turn.role == "assistant":
            assert all(squeezed(part) in source for part in parts_of(turn) if isinstance(part, str))


def strings(value: object) -> list[str]:
    """Return the texts in a raw row. The type and image of a content's part are not text: two text parts are joined."""
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key not in ("type", "image")]
    parts = value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for part in parts for text in strings(part)]


def squeezed(text: str) -> str:
    """The text without marks and white space, which a repair may add or remove."""
    return "".join(text.replace(raw.MARK, "").split())


def as_json(record: Record) -> dict:
    """The record in the QA format."""

    def content(turn: Turn) -> str | list[dict]:
        if isinstance(turn.content, str) and (turn.role == "user" or raw.MARK not in turn.content):
            return turn.content
        parts = (turn.content,) if isinstance(turn.content, str) else turn.content
        return [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in parts]

    def turns(dialog) -> list[dict]:
        return [{"role": turn.role, "content": content(turn)} for turn in dialog]

    return {
        **{"id": record.id, "image": list(record.images), "source": record.source, "type": record.type},
        **{
            "conversations": turns(record.conversations),
            "alternatives": [turns(dialog) for dialog in record.alternatives],
        },
    }


# --- the cases

JSON_ROWS = {"llava": raw.llava, "chat": raw.chat, "messages": raw.messages(), "ai_challenger": raw.ai_challenger()}
JSON_ROWS["text"] = raw.text()
FAULTS = {"ai_challenger": [raw.wrong_image], "text": []}
NOT_JSON = st.sampled_from(
    [b'{"id": "x"', b"\xff\xfe", b'{"id": "\xe9"}', b"nul", b"{'id': 1}", b"{}{}", b'{"id": "\x01"}']
    + [b'{"a": ' + b"9" * 5000 + b"}", b'{"a": ' + b"[" * 100_000 + b"1"]
).map(lambda line: raw.damaged(line, "not_json"))


def some(*strategies) -> st.SearchStrategy[list[Row]]:
    return st.lists(st.one_of(*strategies), min_size=1, max_size=6)


@pytest.mark.parametrize("format", JSON_ROWS)
@cases
@given(data=st.data())
def test_json(work, format, data):
    good = JSON_ROWS[format]
    faulty = [raw.faulty(good, fault) for fault in FAULTS.get(format, [raw.wrong_image, raw.wrong_turns])]
    rows = data.draw(some(good, *faulty) | some(good) | some(good, *faulty, raw.damage(good), raw.junk_row(), NOT_JSON))
    work.check(
        data.draw, format, rows, write=lambda folder: (folder / "raw", raw.write_json(data.draw, folder / "raw", rows))
    )


@cases
@given(data=st.data())
def test_coco(work, data):
    rows, orphans = data.draw(some(raw.coco_image())), data.draw(st.integers(0, 2))
    orphan = raw.damaged(None, "missing_image")

    def write(folder):
        return folder / "raw", raw.write_coco(data.draw, folder / "raw", rows=rows, orphans=orphans)

    work.check(data.draw, "coco_captions", rows + [orphan] * orphans, write=write)


TABLES = {
    "chat, lists": raw.chat_table(DATA, None),
    "chat, one": raw.chat_table(DATA, image_file("PNG", (8, 8), (0, 0, 0))),
    "cauldron": raw.cauldron(DATA),
    "ai_challenger": raw.ai_challenger(),
}


@pytest.mark.parametrize("table", TABLES)
@cases
@given(data=st.data())
def test_parquet(work, table, data):
    rows, format = data.draw(some(TABLES[table])), table.split(",")[0]
    if format == "cauldron":
        broken = {"images": [{"bytes": b"GIF89a, nearly", "path": None}], "texts": [{"user": "?", "assistant": "!"}]}
        silent = {"images": [], "texts": [{"user": "?", "assistant": data.draw(raw.blank)}]}
        rows += [raw.damaged(broken, "unreadable_image"), raw.damaged(silent, "empty_answer")]
    work.check(
        data.draw,
        format,
        rows,
        write=lambda folder: (folder / "raw", raw.write_parquet(data.draw, folder / "raw", rows)),
    )


@cases
@given(data=st.data())
def test_csv(work, data):
    columns = data.draw(
        st.permutations(["id", "image", "question", "answer"]) | st.permutations(["image", "caption", "source"])
    )
    good = raw.table_row(columns)
    bad = st.sampled_from([(raw.OUTSIDE, "path_outside_folder"), (raw.ABSENT[:-1], "missing_image")])
    rows = data.draw(some(good, good, raw.faulty(good, wrong_cell(columns.index("image"), bad))))
    if data.draw(st.booleans()):
        rows.insert(1, raw.damaged(b"one cell", "not_json"))
        rows.append(raw.damaged("\N{NO-BREAK SPACE}".encode("latin-1"), "not_json", "bad_unicode"))
    work.check(
        data.draw,
        "csv",
        rows,
        write=lambda folder: (folder / "t.csv", raw.write_csv(data.draw, folder / "t.csv", columns=columns, rows=rows)),
    )


def wrong_cell(column: int, bad: st.SearchStrategy):
    def fault(row: Row, draw) -> Row:
        paths, reason = draw(bad)
        return raw.damaged([*row.value[:column], draw(st.sampled_from(paths)), *row.value[column + 1 :]], reason)

    return fault


@cases
@given(data=st.data())
def test_folder(work, data):
    stems = data.draw(
        st.lists(st.sampled_from(["a", "b c", "图", "sub/d", "e.f"]), min_size=1, max_size=5, unique=True)
    )
    rows, texts = [], {}
    for stem in sorted(stems):
        name = stem + data.draw(st.sampled_from([".jpg", ".PNG", ".webp"]))
        what = data.draw(st.sampled_from(["good", "good", "no text", "no image", "blank"]))
        texts[stem] = data.draw(
            raw.blank
            if what == "blank"
            else raw.literal.map(lambda text: text.strip().lstrip("\ufeff").strip()).filter(bool)
        )
        row = Row(name, raw.captioned([texts[stem]]), [name])
        wrong = {"no text": "no_answer", "no image": "missing_image", "blank": "empty_answer"}
        rows.append(row if what == "good" else raw.damaged(name, wrong[what]))

    def write(folder: Path):
        for row, stem in zip(rows, sorted(stems), strict=True):
            path = folder / "raw" / row.value
            path.parent.mkdir(parents=True, exist_ok=True)
            if "missing_image" not in row.reasons:
                path.write_bytes(DATA[0])
            if "no_answer" not in row.reasons:
                (folder / "raw" / f"{stem}.txt").write_bytes(texts[stem].encode())
        return folder / "raw", [(str(folder / "raw"), "index", number) for number in range(len(rows))]

    work.check(data.draw, "folder", rows, write=write)


@settings(cases, max_examples=12)
@given(data=st.data())
def test_verified_images(work, data):
    def fault(row: Row, draw) -> Row | None:
        name = draw(st.sampled_from(sorted(BAD)))
        if not row.images:
            return None
        return raw.damaged({**row.value, "image": [*row.images[1:], name]}, BAD[name][1])

    rows = data.draw(some(raw.llava, raw.faulty(raw.llava, fault)))
    work.check(
        data.draw,
        "llava",
        rows,
        write=lambda folder: (folder / "r", raw.write_json(data.draw, folder / "r", rows)),
        verify=True,
    )


def test_every_format_is_drawn():
    assert {*JSON_ROWS, *(table.split(",")[0] for table in TABLES), "coco_captions", "csv", "folder"} == set(FORMATS)
