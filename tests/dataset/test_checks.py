"""`train.py --check` and the check at each start find all faults of the data before step 0, and name their rows.

Run: sh tests/run.sh tests/dataset/test_checks.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from config import InputError
from dataset.checks.findings import SHOWN, Findings, Place, Rows
from dataset.checks.records import check_file
from dataset.checks.report import histogram
from dataset.checks.sample import check_labels
from dataset.conversation import ChatFormat, TooLong
from dataset.record import IMAGE_MARK, parse_record
from tests.toy_project import config_values, run_training, write_project

ROOT = Path(__file__).parents[2]
GOOD = 10  # valid records of the training file; another 4 are held out


def record(name: str, image: str | list[str] | None, *talk: str, **more) -> dict:
    """Make a record whose turns alternate between user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
    return {"id": name, "source": "toy", "conversations": turns, **({"image": image} if image else {}), **more}


def with_roles(*roles: str) -> dict:
    return {"id": "bad", "conversations": [{"role": role, "content": "x"} for role in roles]}


def good_lines(first: int, count: int) -> list[bytes]:
    numbers = range(first, first + count)
    rows = [record(f"r{i}", f"images/{i}.png", f"<image>\nNumber {i}?", f"It is {i}.", type="number") for i in numbers]
    rows[0]["conversations"][0]["content"] = "<image>\n这是什么颜色？"
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]


def png_header(width: int, height: int) -> bytes:
    """Make a PNG that claims the given size and has almost no data."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def spoil(images: Path) -> None:
    """Write the bad images of the faults below."""
    image = (images / "0.png").read_bytes()
    (images / "truncated.png").write_bytes(image[: len(image) * 2 // 3])
    (images / "empty.png").write_bytes(b"")
    (images / "bomb.png").write_bytes(png_header(30000, 30000))
    Image.fromarray(np.zeros((2, 900, 3), np.uint8)).save(images / "strip.png")
    (images / "note.jpg").write_text("not an image")
    shutil.copy(images / f"{GOOD}.png", images / "another name.png")  # r10, the first held-out record
    os.symlink(images / f"{GOOD + 1}.png", images / "link.png")


Q, A = f"{IMAGE_MARK}\nWhat?", "This."
# fault -> (line of the QA file, expected reason, part of the expected message)
FAULTS: dict[str, tuple[bytes | dict, str, str]] = {
    "malformed JSON": (b'{"id": "bad", "conversations": [', "not_json", "not a JSON value"),
    "not UTF-8": (b'{"id": "bad", "source": "\xff\xfe"}', "not_json", "UTF-8"),
    "unpaired surrogate": (record("bad", None, "\ud83d", "A"), "bad_unicode", "surrogate"),
    "not an object": (b'["bad"]', "wrong_type", "a record must be a JSON object"),
    "wrong type": (record("bad", None, "Q", "A") | {"image": 7}, "wrong_type", '"image" must be a path'),
    "assistant first": (with_roles("assistant", "user", "assistant"), "assistant_first", "turn 1"),
    "two users in a row": (with_roles("user", "user", "assistant"), "two_users_in_a_row", "turn 2"),
    "empty answer": (record("bad", "images/0.png", Q, " \n"), "empty_answer", "turn 2 (assistant) is empty"),
    "no answer": (record("bad", "images/0.png", Q), "no_answer", "ends with a user turn"),
    "marks and images": (record("bad", "images/0.png", Q * 2, A), "marks_and_pictures_disagree", '2 "<image>" marks'),
    "missing image": (record("bad", "images/gone.png", Q, A), "missing_image", "images/gone.png"),
    "a folder as an image": (record("bad", "images", Q, A), "missing_image", "not a file"),
    "NUL in a path": (record("bad", "images/\0.png", Q, A), "missing_image", "null byte"),
    "truncated image": (record("bad", "images/truncated.png", Q, A), "unreadable_image", "images/truncated.png"),
    "zero-byte image": (record("bad", "images/empty.png", Q, A), "unreadable_image", "images/empty.png"),
    "text as an image": (record("bad", "images/note.jpg", Q, A), "unreadable_image", "images/note.jpg"),
    "decompression bomb": (record("bad", "images/bomb.png", Q, A), "decompression_bomb", "images/bomb.png"),
    "a strip": (record("bad", "images/strip.png", Q, A), "extreme_shape", "images/strip.png"),
    "duplicate id": (record("r2", "images/0.png", Q, A), "duplicate_id", "the same id as line 3"),
    "leaked image": (record("bad", "images/another name.png", Q, A), "leaked_image", f"images/{GOOD}.png"),
    "leaked through a link": (record("bad", "images/link.png", Q, A), "leaked_image", f"images/{GOOD + 1}.png"),
    "too many images": (
        record("bad", ["images/0.png"] * 40, Q * 40, A), "longer_than_max_length", "an image ends at token",
    ),
    "nothing supervised": (record("bad", "images/0.png", Q + "?" * 400, A), "nothing_supervised", "leaves no answer"),
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Write a project without faults that uses its QA files directly; return the path of its config."""
    folder = write_project(tmp_path_factory.mktemp("project"), images=GOOD + 4).parent
    spoil(folder / "images")
    values = config_values()
    values["data"]["sources"] = []
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    write_qa(folder)
    (folder / "validation.jsonl").write_bytes(b"".join(line + b"\n" for line in good_lines(GOOD, 4)))
    return folder / "config.yaml"


def write_qa(folder: Path, faults: Sequence[str] = (), good: int = GOOD, name: str = "qa.jsonl") -> list[int]:
    """Write the valid records, with the faults after the fourth. Returns the line numbers of the faults."""
    lines = good_lines(0, good)
    bad = [
        line if isinstance(line, bytes) else json.dumps(line).encode() for line, *_ in map(FAULTS.__getitem__, faults)
    ]
    if len(bad) > 1:
        bad = [line.replace(b'"bad"', b'"bad%d"' % i) for i, line in enumerate(bad)]  # avoids duplicate ids
    (folder / name).write_bytes(b"".join(line + b"\n" for line in lines[:4] + bad + lines[4:]))
    return list(range(5, 5 + len(bad)))


def refused(config: Path, *arguments: str) -> str:
    """Run the training script, which must raise InputError; return the message."""
    with pytest.raises(InputError) as caught:
        run_training(config, *arguments)
    return str(caught.value)


def test_a_clean_project_has_no_findings(clean, tmp_path, capsys):
    write_qa(clean.parent)
    assert run_training(clean, "--check", f"output_dir={tmp_path / 'run'}") == 0
    output = capsys.readouterr().out
    assert "10 records" in output and "4 records" in output and "finding" not in output
    few = ("holds only 4 images", "too few to learn")  # which a toy project cannot help
    assert output.count("note:") == 2 and all(words in output for words in few)
    assert re.search(
        r"source +records +turns +images +text only +en +zh +other\n +toy +10 +20 +10 +0 +9 +1 +0\n", output
    )
    assert "types: number 10" in output and "max_length 128" in output and "█" in output
    assert "Nothing was trained" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_row_named(clean, tmp_path, fault):
    """Both --check and the quiet check at a start find it before step 0, and find nothing else."""
    (line,) = write_qa(clean.parent, [fault])
    _, reason, detail = FAULTS[fault]
    (tmp_path / "run").mkdir()
    for arguments in (["--check"], []):
        message = refused(clean, f"output_dir={tmp_path / 'run'}", *arguments)
        rows = re.findall(r"^    (line \d+)(.*)$", message, re.M)
        assert [row[0] for row in rows] == [f"line {line}"] and detail in rows[0][1]
        assert f"{clean.parent / 'qa.jsonl'}\n  {reason}: 1 record\n" in message
        assert '("bad")' in message or fault in ("malformed JSON", "not UTF-8", "not an object", "duplicate id")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "findings.jsonl"}, "nothing was trained"


def test_all_faults_are_found_at_once(clean, tmp_path):
    lines = write_qa(clean.parent, list(FAULTS))
    message = refused(clean, f"output_dir={tmp_path}", "--check")
    found = dict.fromkeys(lines)
    reason = None
    for text in message.splitlines():
        if match := re.match(r"  (\w+): \d+ records?$", text):
            reason = match[1]
        elif match := re.match(r"    line (\d+)", text):
            assert found[int(match[1])] is None
            found[int(match[1])] = reason
    assert list(found.values()) == [reason for _, reason, _ in FAULTS.values()]


def test_the_exit_code_is_2_without_a_traceback(clean, tmp_path):
    write_qa(clean.parent, ["missing image", "empty answer"])
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(clean),
        "--check",
        f"output_dir={tmp_path / 'run'}",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert "missing_image: 1 record" in ran.stderr and "empty_answer: 1 record" in ran.stderr
    assert "tokens per conversation" in ran.stdout, "the report must be printed too"


def test_faults_of_the_model_and_of_the_data_are_reported_together(clean, tmp_path):
    write_qa(clean.parent, ["empty answer"])
    message = refused(clean, f"output_dir={tmp_path}", "--check", "model.vision_feature_layer=-9")
    assert "model.vision_feature_layer: -9" in message and "empty_answer" in message
    (tmp_path / "nothing").mkdir()
    message = refused(
        clean, f"output_dir={tmp_path / 'run'}", "--check", f"model.language_model={tmp_path / 'nothing'}"
    )
    assert str(tmp_path / "nothing") in message and "empty_answer" in message


def test_the_held_out_file_is_checked_like_the_training_file(clean, tmp_path):
    write_qa(clean.parent)
    (line,) = write_qa(clean.parent, ["truncated image"], name="other.jsonl")
    message = refused(
        clean, f"output_dir={tmp_path}", f"data.validation_file={clean.parent / 'other.jsonl'}", "--check"
    )
    assert f"{clean.parent / 'other.jsonl'}\n  unreadable_image: 1 record\n    line {line} " in message
    assert f"leaked_image: {GOOD} records" in message, "the other records are also in the training file"


def test_a_long_list_is_shortened_and_a_file_has_all_of_it(clean, tmp_path):
    lines = [json.dumps(record(f"x{i}", f"images/gone{i}.png", Q, A)).encode() for i in range(SHOWN + 5)]
    (clean.parent / "qa.jsonl").write_bytes(b"\n".join(good_lines(0, 2) + lines))
    message = refused(clean, f"output_dir={tmp_path}", "--check")
    assert f"missing_image: {SHOWN + 5} records" in message and "... and 5 more" in message
    assert len(re.findall(r"^    line ", message, re.M)) == SHOWN and str(tmp_path / "findings.jsonl") in message
    rows = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(3, SHOWN + 8))
    assert set(rows[0]) == {"source", "file", "line", "id", "reason", "detail"} and rows[4]["id"] == "x4"
    write_qa(clean.parent)
    run_training(clean, f"output_dir={tmp_path}", "--check")
    assert not (tmp_path / "findings.jsonl").exists(), "an outdated list must be deleted"


def test_records_of_a_list_are_named_by_their_index(clean, tmp_path):
    values = [json.loads(line) for line in good_lines(0, 3)] + [FAULTS["empty answer"][0]]
    (clean.parent / "list.json").write_text(json.dumps(values))
    message = refused(clean, f"output_dir={tmp_path}", "--check", f"data.qa_file={clean.parent / 'list.json'}")
    assert 'item 3 ("bad"): turn 2 (assistant) is empty.' in message
    (clean.parent / "list.json").write_text(json.dumps(values)[:-3])
    message = refused(clean, f"output_dir={tmp_path}", "--check", f"data.qa_file={clean.parent / 'list.json'}")
    assert "expected a JSON list of objects" in message


def test_a_few_records_that_are_too_long_are_left_out_and_listed(clean, tmp_path, capsys):
    lines = write_qa(clean.parent, ["nothing supervised", "too many images"])
    assert run_training(clean, f"output_dir={tmp_path}", "--check", "data.max_refused=0.17") == 0
    output = capsys.readouterr().out
    assert "note: qa.jsonl: 2 records" in output and str(tmp_path / "qa.refused.jsonl") in output
    rows = [json.loads(line) for line in (tmp_path / "qa.refused.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"], row["id"], row["source"]) for row in rows] == [
        (lines[0], "nothing_supervised", "bad0", "toy"), (lines[1], "longer_than_max_length", "bad1", "toy"),
    ]  # fmt: skip
    assert "data.max_refused" in refused(clean, f"output_dir={tmp_path}", "data.max_refused=0.16")


def test_lists_of_somebody_else_are_kept(clean, tmp_path):
    """A list is removed and replaced only if a check or data preparation wrote it."""
    write_qa(clean.parent)
    mine = b'{"id": "1", "text": "the \\"reason\\": mine"}\n'
    for name in ("qa.refused.jsonl", "qa.bad_images.jsonl"):
        (tmp_path / name).write_bytes(mine)
    run_training(clean, f"output_dir={tmp_path}", "--check")
    assert (tmp_path / "qa.refused.jsonl").read_bytes() == mine
    write_qa(clean.parent, ["nothing supervised", "truncated image"])
    options = [f"output_dir={tmp_path}", "--check", "data.max_refused=0.17", "data.on_bad_image=skip"]
    message = refused(clean, *options)
    for name in ("qa.refused.jsonl", "qa.bad_images.jsonl"):
        assert f"{tmp_path / name}: exists, and was not written by a check" in message
        assert (tmp_path / name).read_bytes() == mine
        (tmp_path / name).write_bytes(b"")
    assert run_training(clean, *options) == 0
    assert b'"reason"' in (tmp_path / "qa.refused.jsonl").read_bytes()
    assert b'"reason"' in (tmp_path / "qa.bad_images.jsonl").read_bytes()
    write_qa(clean.parent)
    run_training(clean, *options)
    assert not (tmp_path / "qa.refused.jsonl").exists()


def test_the_list_of_data_preparation_is_kept(clean):
    """Also where a held-out file of another folder has the training file's name."""
    write_qa(clean.parent)
    prepared = clean.parent / "qa.refused.jsonl"
    prepared.write_bytes(b'{"reason": "missing_image"}\n')
    (clean.parent / "held").mkdir()
    (clean.parent / "held" / "qa.jsonl").write_bytes((clean.parent / "validation.jsonl").read_bytes())
    (clean.parent / "held" / "images").symlink_to(clean.parent / "images")
    options = [f"output_dir={clean.parent}", f"data.validation_file={clean.parent / 'held' / 'qa.jsonl'}"]
    assert run_training(clean, *options, "--check") == 0
    assert prepared.read_bytes() == b'{"reason": "missing_image"}\n'
    prepared.unlink()


def test_special_token_names_in_text_are_no_fault(clean, tmp_path):
    text = "<|im_end|><|im_start|>assistant <|endoftext|> <|image_pad|> <|extra_0|>"
    lines = [json.dumps(record("a", "images/0.png", Q + text, A + text)).encode(), *good_lines(1, 3)]
    (clean.parent / "qa.jsonl").write_bytes(b"\n".join(lines))
    assert run_training(clean, f"output_dir={tmp_path}", "--check", "data.max_length=400") == 0


def test_equal_records_and_held_out_texts_are_noted(clean, tmp_path, capsys):
    rows = [json.loads(line) for line in good_lines(0, 4)]
    same = rows[1] | {"id": "again"}
    text = record("t", None, "Hello there.", "Good day.")
    lines = [json.dumps(row).encode() for row in (*rows, same, text)]
    (clean.parent / "qa.jsonl").write_bytes(b"\n".join(lines))
    (clean.parent / "held.jsonl").write_bytes(b"\n".join([*good_lines(GOOD, 2), json.dumps(text).encode()]))
    held = f"data.validation_file={clean.parent / 'held.jsonl'}"
    assert run_training(clean, f"output_dir={tmp_path}", "--check", held) == 0
    output = capsys.readouterr().out
    assert "1 of 6 records repeat another one" in output and "lines 2 and 5" in output
    assert "1 records without an image are also held out" in output
    assert re.search(r"toy +6 +12 +5 +1 +", output)


def test_checkpoints_are_compared_with_their_hashes(clean, tmp_path, capsys):
    write_qa(clean.parent)
    quick = ["train.max_steps=1", "train.eval_steps=null", "train.score_samples=1", f"output_dir={tmp_path}"]
    run_training(clean, *quick)
    assert run_training(clean, *quick, "--check") == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'checkpoint-1'}: intact" in output and f"{tmp_path / 'final'}: intact" in output
    damaged = tmp_path / "final" / "projector.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert f"{damaged}: not the file that was saved" in refused(clean, *quick, "--check")
    start = [f"output_dir={tmp_path / 'new'}", f"model.start_from={tmp_path / 'final'}"]
    assert f"{damaged}: not the file that was saved" in refused(clean, *start, "--check")


# The same faults in raw annotations, if data preparation gives another reason; None: it repairs or accepts the record.
RAW: dict[str, str | None] = {
    "not an object": "wrong_type", "a folder as an image": "missing_image", "NUL in a path": "missing_image",
    "duplicate id": None, "leaked image": "image_held_out", "leaked through a link": "image_held_out",
    "marks and images": None, "too many images": None, "nothing supervised": None,
}  # fmt: skip


def test_check_shows_the_raw_records_that_preparation_refused(clean, tmp_path, capsys):
    """--check shows their rows, whether or not they exceed data.max_refused."""
    lines = write_qa(tmp_path, list(FAULTS), name="raw.jsonl")
    values = yaml.safe_load(clean.read_text())
    source = {"format": "llava", "images": str(clean.parent)}
    values["data"]["sources"] = [
        {"name": "raw", "annotations": "raw.jsonl", "split": "train", **source},
        {"name": "held", "annotations": str(clean.parent / "validation.jsonl"), "split": "validation", **source},
    ]
    for key in values["model"]:
        values["model"][key] = str(clean.parent / values["model"][key])
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    assert "max_refused" in refused(config, "--check")
    output = [capsys.readouterr().out]
    assert run_training(config, "--check", "data.max_refused=0.9") == 0
    output.append(capsys.readouterr().out)
    for text in output:
        found, reason = {}, None
        for line in text.splitlines():
            if match := re.match(r"refused when the data were prepared: (\w+), \d+ record", line):
                reason = match[1]
            elif match := re.match(r"    .*raw\.jsonl line (\d+) ", line):
                found[int(match[1])] = reason
        expected = {n: RAW.get(fault, FAULTS[fault][1]) for n, fault in zip(lines, FAULTS, strict=True)}
        assert found == {n: reason for n, reason in expected.items() if reason}


# --- the parts


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def chat_of(system: str | None = None, encode=encode_bytes, chat_class: type[ChatFormat] = ChatFormat) -> ChatFormat:
    """ChatML with one id per byte and three tokens per image."""
    return chat_class(
        encode,
        im_start_id=256,
        im_end_id=257,
        end_of_text_id=259,
        image_token_id=258,
        num_image_tokens=3,
        system_prompt=system,
    )


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 2), st.sampled_from(["a", "Who?", "谁", "x" * 30]), st.sampled_from(["b", "b" * 25])),
            min_size=1, max_size=3,
        ),
        min_size=1, max_size=5,
    ),
    st.integers(8, 90), st.sampled_from([None, "Help."]),
)  # fmt: skip
def test_exactly_the_records_that_cannot_be_encoded_are_unfit(tmp_path_factory, talks, max_length, system):
    folder = tmp_path_factory.mktemp("qa")
    (folder / "p").write_bytes(b"x")
    rows, expected = [], []
    for number, talk in enumerate(talks):
        turns = []
        for images, question, answer in talk:
            turns += [IMAGE_MARK * images + question, answer]
        rows.append(record(f"r{number}", ["p"] * sum(images for images, *_ in talk), *turns))
        try:
            chat_of(system=system).encode(parse_record(rows[-1], "").conversations, max_length)
        except TooLong as error:
            expected.append((number, error.reason))
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_file(folder / "qa.jsonl", chat=chat_of(system=system), max_length=max_length, sample_size=9, seed=0)
    assert list(found.unfit_records) == [number for number, _ in expected]
    assert {reason: count for (_, reason), count in found.unfit.counts.items()} == {
        reason: sum(other == reason for _, other in expected) for _, reason in expected
    }
    assert len(found.sample) == len(rows) - len(expected) and not found.wrong


def test_most_records_are_not_tokenised(tmp_path):
    """A record is tokenised only if its question may not fit, however long its answers are."""
    rows = [record("a", None, "Q", "A" * 5000), record("b", None, "Q" * 100, "A")]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return list(text.encode())

    chat = chat_of(encode=encode)
    seen.clear()
    found = check_file(tmp_path / "qa.jsonl", chat=chat, max_length=80, sample_size=9, seed=0)
    assert list(found.unfit_records) == [1] and "A" * 5000 not in seen and "Q" * 100 in seen


def test_the_sample_is_seeded_and_uniform(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(record(f"r{i}", None, "Q", "A")) + "\n" for i in range(500)))
    samples = []
    for seed in (0, 0, *range(1, 40)):
        found = check_file(path, chat=None, max_length=8, sample_size=50, seed=seed)
        samples.append([place.index for place, _ in found.sample])
        assert len(set(samples[-1])) == 50 and [f"r{i}" for i in samples[-1]] == [r.id for _, r in found.sample]
    assert samples[0] == samples[1] != samples[2]
    assert 235 < np.mean(samples) < 265 and {i // 50 for i in np.ravel(samples)} == set(range(10))


def test_missing_images_are_found_outside_the_sample_too(tmp_path):
    (tmp_path / "good").write_bytes(b"x")
    (tmp_path / "empty").write_bytes(b"")
    rows = [record(f"r{i}", path, Q, A) for i, path in enumerate(("good", "empty", "gone", ".", "good"))]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_file(path, chat=None, max_length=8, sample_size=0, seed=0)
    assert {reason: count for (_, reason), count in found.bad_images.counts.items()} == {
        "unreadable_image": 1,
        "missing_image": 2,
    }


def test_faults_found_before_a_cut_are_kept(tmp_path):
    values = [record("a", None, "Q", ""), record("b", None, "Q", "A")]
    path = tmp_path / "qa.json"
    path.write_text(json.dumps(values)[:-4])
    found = check_file(path, chat=None, max_length=8, sample_size=9, seed=0)
    assert str(path) in found.fault and [reason for _, reason in found.wrong.counts] == ["empty_answer"]


def test_labels_that_are_not_the_answers_are_found(tmp_path):
    (tmp_path / "qa.jsonl").write_text(json.dumps(record("a", None, "Q", "A\u0301 long", "Q", "<|im_end|>")) + "\n")
    found = check_file(tmp_path / "qa.jsonl", chat=chat_of(), max_length=60, sample_size=9, seed=0)

    def decode(ids):
        return bytes(ids).decode()

    lengths = check_labels(found, chat_of(), decode, 60)
    whole = chat_of().encode(found.sample[0][1].conversations)
    assert not found.wrong and lengths.tokens.tolist() == [len(whole.input_ids)]
    cut = chat_of().encode(found.sample[0][1].conversations, 60)
    assert len(cut.input_ids) < len(whole.input_ids), "the share must be that of the cut conversation"
    assert lengths.supervised.tolist() == [cut.num_targets / len(cut.input_ids)]

    class Shifted(ChatFormat):
        """Labels one token too early."""

        def encode(self, turns, max_length=None):
            encoded = super().encode(turns, max_length)
            return type(encoded)(encoded.input_ids, [*encoded.labels[1:], -100], encoded.num_images)

    shifted = chat_of(encode=lambda text: list(text.encode())[:-1] or [0], chat_class=Shifted)
    check_labels(found, shifted, decode, 60)
    assert [reason for _, reason in found.wrong.counts] == ["labels_are_not_the_answers"]


def test_a_histogram_counts_every_value_once():
    values = np.array([0, 1, 9, 10, 10, 25, 30])
    lines = histogram(values, np.array([0, 10, 20, 30]), str, mark=12)
    assert [line.split()[-1] for line in lines] == ["3", "2", "12", "2"] and "max_length" in lines[2]
    assert lines[0].split()[:3] == ["0", "-", "10"] and lines[0].count("█") == 36


def test_control_characters_in_a_row_are_escaped(tmp_path):
    rows = Rows()
    place = Place(file=tmp_path / "qa.jsonl", line=3, index=2, id="a\x1b[31m\n\ud83d", source="")
    rows.add(place, "wrong_type", "is \u202eback\x07.")
    text = rows.text(tmp_path / "all")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800-\udfff]", text) and text.count("\n") == 2
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "rows.jsonl").symlink_to("mine")  # in a run's folder from a stranger
    rows.write(tmp_path / "rows.jsonl")
    assert (tmp_path / "mine").read_text() == "precious"
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))["detail"] == "is \u202eback\x07."


def test_a_single_fault_is_reported_unchanged():
    findings = Findings(Path("nowhere"))
    findings.stop()
    with findings.collect():
        raise InputError("only this")
    with pytest.raises(InputError, match="^only this$"):
        findings.stop()
    with findings.collect():
        raise InputError("and that")
    with pytest.raises(InputError, match="2 findings.*\n- only this\n- and that$"):
        findings.stop()
