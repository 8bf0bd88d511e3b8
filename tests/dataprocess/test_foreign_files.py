"""Data preparation replaces only its own files, writes through no link, waits for no pipe, and leaves nothing after a kill.

Run: sh tests/run.sh tests/dataprocess/test_foreign_files.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from config import InputError, SourceConfig, load_config
from dataprocess import containers, folders, process_image
from dataset.json_stream import stream_json
from dataset.open import file_sha256
from dataset.qa_file import QAFile
from tests.dataprocess.helpers import prepare_sources

OUTPUTS = ["qa.jsonl", "held.jsonl", "qa.report.json", "qa.refused.jsonl"]
MINE = b"written by hand\n"


class Shop:
    """A folder with twenty images, their annotations, and the preparation run on them."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        (folder / "images").mkdir(parents=True)
        self.out.mkdir()
        for k in range(20):
            Image.new("RGB", (9, 8), (k, 9 * k, 50)).save(folder / "images" / f"{k}.png")
        self.write([f"{k}.png" for k in range(20)])

    def write(self, images: list[str], **more) -> None:
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        raw = [{"id": name, "image": name, "conversations": turns, **more} for name in images]
        (self.folder / "raw.json").write_text(json.dumps(raw))

    def prepare(self, seed=0, max_refused=0.5, verify_images=False, images: Path | None = None, **source) -> dict:
        source = {"annotations": self.folder / "raw.json", "format": "llava"} | source
        return prepare_sources(
            [SourceConfig("x", images=images or self.folder / "images", **source)],
            self.out / "qa.jsonl",
            validation_file=self.out / "held.jsonl",
            validation_fraction=0.4,
            seed=seed,
            max_refused=max_refused,
            verify_images=verify_images,
        )

    def outputs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.iterdir()}


@pytest.fixture
def shop(tmp_path) -> Shop:
    return Shop(tmp_path)


class Waiting(BaseException):
    """No Exception, which the code under test could catch."""


@contextlib.contextmanager
def at_most(seconds: int):
    """Stop a test that waits, for example for the writer of a pipe."""

    def stop(*_: object) -> None:
        raise Waiting

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- whose file it is


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("content", [MINE, b"{}", None])
def test_a_file_of_somebody_else_is_refused_before_work_begins(shop, monkeypatch, name, content):
    path = shop.out / name
    if content is None:
        path.symlink_to(shop.folder / "elsewhere")
        (shop.folder / "elsewhere").write_bytes(MINE)
    else:
        path.write_bytes(content)
    monkeypatch.setattr(process_image, "Converter", None)  # not reached
    with pytest.raises(InputError, match=rf"{name}: exists, and was not .* give another \"data\.") as error:
        shop.prepare(verify_images=True)
    assert "elsewhere" in str(error.value)  # what to do
    assert path.read_bytes() == (content or MINE) and os.listdir(shop.out) == [name]


def test_an_edited_file_is_kept(shop):
    shop.prepare()
    for name in ("qa.jsonl", "held.jsonl"):
        whole = (shop.out / name).read_bytes()
        edited = b"".join(whole.splitlines(keepends=True)[1:])
        (shop.out / name).write_bytes(edited)
        for seed in (0, 1):
            with pytest.raises(InputError, match=rf"{name}: was changed after .* To keep the changes, remove"):
                shop.prepare(seed=seed)
        assert (shop.out / name).read_bytes() == edited
        (shop.out / name).unlink()
        shop.prepare()
        assert (shop.out / name).read_bytes() == whole


@pytest.mark.parametrize("moves", [False, True])
def test_an_edit_of_equal_length_is_kept(shop, moves):
    """Also in a moved folder, and where only the images changed. A copy, which has another time, is no edit."""
    shop.prepare()
    if moves:
        shop.out = shop.out.rename(shop.folder / "moved")
    whole = (shop.out / "qa.jsonl").read_bytes()
    edited = whole.replace(b"This.", b"That.", 1)
    (shop.out / "qa.jsonl").write_bytes(edited)
    Image.new("RGB", (9, 8)).save(shop.folder / "images" / "new.png")
    for seed in (0, 1):
        with pytest.raises(InputError, match=r"qa\.jsonl: was changed after .* SHA-256 .* To keep the changes, remove"):
            shop.prepare(seed=seed)
        assert (shop.out / "qa.jsonl").read_bytes() == edited != whole
    (shop.out / "qa.jsonl").write_bytes(whole)
    assert shop.prepare(seed=1)["kept"] == 20


def test_a_file_written_after_a_refused_preparation_is_kept(shop):
    shop.write(["0.png", "gone.png"])
    with pytest.raises(InputError, match="1 of 2 raw records were refused"):
        shop.prepare(max_refused=0.0)
    (shop.out / "qa.jsonl").write_bytes(MINE)
    with pytest.raises(InputError, match=r"qa\.jsonl: exists, and was not made"):
        shop.prepare()
    assert (shop.out / "qa.jsonl").read_bytes() == MINE


def as_written_before(report: dict, was_refused: bool) -> dict:
    """Return the report in the form that had no "outputs" and no hashes."""
    report = {key: value for key, value in report.items() if key != "outputs"}
    for side in ("train", "validation"):
        report[side] = {key: value for key, value in report[side].items() if key != "sha256"}
    return report | {"fingerprint": None} if was_refused else report


@pytest.mark.parametrize("was_refused", [False, True])
def test_files_of_an_earlier_version_and_in_a_moved_folder_are_ours(shop, was_refused):
    report = as_written_before(shop.prepare(), was_refused)
    (shop.out / "qa.report.json").write_text(json.dumps(report))
    shop.out = shop.out.rename(shop.folder / "moved")
    assert shop.prepare(seed=1)["kept"] == 20


def test_a_report_of_any_form_is_no_traceback(shop):
    shop.prepare()
    report = json.loads((shop.out / "qa.report.json").read_text())
    for change in ({"train": 7}, {"train": {"file": 7}}, {"outputs": 3}, {"outputs": [[]]}, {"validation": {}}):
        (shop.out / "qa.report.json").write_text(json.dumps(report | change | {"fingerprint": "x"}))
        with pytest.raises(InputError, match="exists, and was not"):
            shop.prepare()


# --- kills


class Killed(BaseException):
    """Like SIGKILL: nothing is cleaned up after it."""


def test_a_kill_at_any_rename_leaves_files_that_the_next_run_knows(shop, tmp_path, monkeypatch):
    for seed in (0, 1):  # from nothing, and over the files of an earlier run
        for nth in range(1, 9):
            one = Shop(tmp_path / f"{seed}-{nth}")
            if seed:
                one.prepare()
            done, replace = 0, os.replace

            def rename(old, new, nth=nth, replace=replace):
                nonlocal done
                done += 1
                if done == nth:
                    raise Killed
                replace(old, new)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", rename)
                patch.setattr(Path, "unlink", lambda self, **_: None)  # the clean-up of an exception
                try:
                    one.prepare(seed=seed)
                except Killed:
                    pass
            report = one.prepare(seed=seed)
            assert one.outputs().keys() == set(OUTPUTS)
            assert json.loads(one.outputs()["qa.report.json"]) == report and report["kept"] == 20
            if done < nth:
                break
        assert done == 5  # the report, two files and the refused records, and the report again


def test_only_abandoned_partial_files_are_removed(shop):
    kept = [".qa.jsonl.1234", ".qa.jsonl.partial", ".other.jsonl.0123abcd.partial", "qa.jsonl.0123abcd.partial"]
    for name in kept:
        (shop.out / name).write_bytes(MINE)
    (shop.out / ".qa.jsonl.0000abcd.partial").symlink_to(shop.folder / "raw.json")
    (shop.out / ".qa.jsonl.0123abcd.partial").write_bytes(b"half")
    with process_image.AsideFile(shop.out / "qa.jsonl") as file:  # of a process that still works
        (held,) = set(os.listdir(shop.out)) - {*kept, ".qa.jsonl.0000abcd.partial", ".qa.jsonl.0123abcd.partial"}
        shop.prepare()
        assert set(os.listdir(shop.out)) == {*kept, held, ".qa.jsonl.0000abcd.partial", *OUTPUTS}
        assert file.path.read_bytes()


def test_a_killed_process_leaves_partial_files_that_the_next_removes(shop, monkeypatch):
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(process_image.Converter, "convert", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            shop.prepare()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(os.listdir(shop.out)) == 3  # of two QA files and the refused records
    shop.prepare()
    assert set(os.listdir(shop.out)) == set(OUTPUTS)


# --- links


def test_nothing_is_written_through_a_link(shop):
    victim, database = shop.folder / "victim", shop.folder / "victim.sqlite"
    victim.write_bytes(MINE)
    with contextlib.closing(sqlite3.connect(database)) as rows:
        rows.execute("CREATE TABLE verdicts (precious TEXT)")
    before = database.read_bytes()
    for name in (*OUTPUTS, "qa.jsonl.index.safetensors"):
        (shop.out / f".{name}.{os.getpid()}").symlink_to(victim)
    (shop.out / "qa.images.sqlite").symlink_to(database)
    (shop.out / "qa.jsonl.index.safetensors").symlink_to(victim)
    assert shop.prepare(verify_images=True)["kept"] == 20
    assert len(QAFile(shop.out / "qa.jsonl")) > 5
    assert victim.read_bytes() == MINE and database.read_bytes() == before


def test_images_in_the_records_are_not_written_through_a_link(shop):
    victim = shop.folder / "victim"
    victim.write_bytes(MINE)
    data = (shop.folder / "images" / "3.png").read_bytes()
    (shop.out / "qa.images").mkdir()  # as earlier versions made it
    store = process_image.ImageStore(shop.out / "qa.images")
    name = store.place(data)
    (shop.out / "qa.images" / f".{name}.{os.getpid()}").symlink_to(victim)
    (shop.out / "qa.images" / name).symlink_to(victim)
    (shop.out / "qa.images" / f".{name}.0123abcd.partial").write_bytes(data[:9])  # left by a kill
    store.write_placed()
    assert victim.read_bytes() == MINE and (shop.out / "qa.images" / name).read_bytes() == data
    assert len(os.listdir(shop.out / "qa.images")) == 2


# --- pipes and devices

READ: dict[str, Callable[[Path], object]] = {
    "qa.jsonl": QAFile,
    "values.jsonl": lambda path: list(stream_json(path)),
    "bytes": file_sha256,
    "config.yaml": load_config,
    "raw.json": lambda path: list(containers.stream_records(path, None, limit=None, first_size=1, size=1)),
    "raw.csv": lambda path: list(containers.stream_records(path, None, limit=None, first_size=1, size=1)),
    "raw.parquet": lambda path: list(containers.stream_records(path, None, limit=None, first_size=1, size=1)),
}


@pytest.mark.parametrize("name", READ)
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with at_most(3), pytest.raises(InputError, match=r"special file .* expected a regular file"):
        READ[name](path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with at_most(3), pytest.raises(InputError, match=r"special file .* expected a regular file"):
        READ[name](path)


@pytest.mark.parametrize("name", ["qa.report.json", "qa.images.sqlite", "qa.jsonl.index.safetensors", "qa.jsonl"])
def test_a_pipe_beside_the_qa_file_does_not_stop_preparation(shop, name):
    os.mkfifo(shop.out / name)
    with at_most(5):
        if name.startswith("qa.images") or "index" in name:
            assert shop.prepare(verify_images=True)["kept"] == 20 and len(QAFile(shop.out / "qa.jsonl"))
        else:
            with pytest.raises(InputError, match=f"{name}: exists"):
                shop.prepare()


def test_a_caption_that_cannot_be_read_refuses_its_image(shop, monkeypatch):
    album = shop.folder / "album"
    shutil.copytree(shop.folder / "images", album)
    (shop.folder / "secret.txt").write_text("the password")
    (album / "0.txt").write_text("A cat.")
    (album / "1.txt").symlink_to("0.txt")
    (album / "2.txt").symlink_to(shop.folder / "secret.txt")
    os.mkfifo(album / "3.txt")
    (album / "4.txt").write_bytes(b"\xff\xfe\x00")
    (album / "5.txt").write_text("private")
    (album / "6.txt").write_text("word " * 20)
    opening = folders.open_regular

    def open_public(path: Path):
        if path.name == "5.txt":
            raise PermissionError(13, "Permission denied", str(path))  # root, who may run this test, can read anything
        return opening(path)

    monkeypatch.setattr(folders, "open_regular", open_public)
    monkeypatch.setattr(folders, "LONGEST_CELL", 50)
    with at_most(5):
        report = shop.prepare(annotations=album, images=album, format="auto", max_refused=1.0)
    assert report["kept"] == 2 and report["by_reason"] == {
        "no_answer": 13, "unreadable_text": 3, "bad_unicode": 1, "path_outside_folder": 1,
    }  # fmt: skip
    refused = [json.loads(line) for line in (shop.out / "qa.refused.jsonl").read_text().splitlines()]
    details = {row["detail"].split("/")[-1].split(":")[0].split(" ")[0]: row["detail"] for row in refused}
    assert "special file" in details["3.txt"] and "Permission denied" in details["5.txt"]
    assert "password" not in str(shop.outputs())


# --- messages


def test_a_long_or_hostile_id_or_path_gives_a_short_plain_message(shop, capsys, monkeypatch):
    clipboard = "\x1b]52;c;cm0gLXJm\x07\u202egnp.\x9b31m"
    for name in (clipboard, "x" * 100_000, clipboard * 20_000):
        shop.write([name, f"{name[:200_000]}/a.png"], type=name)
        with pytest.raises(InputError, match="2 of 2 raw records") as error:
            shop.prepare(images=shop.folder / "images")
        assert len(str(error.value)) < 6000 and not set(str(error.value)) & set("\x1b\x07\x9b\u202e")
        lines = (shop.out / "qa.refused.jsonl").read_text().splitlines()
        assert len(lines) == 2 and max(map(len, lines)) < 10_000


def test_the_summary_is_printed_without_control_characters(shop, capsys, monkeypatch):
    report = {"by_source": {"\x1b]0;x\x07": {"read": 1, "kept": 1, "refused": 0}}, "by_reason": {}, "repairs": {}}
    monkeypatch.setattr(process_image, "prepare_from_config", lambda _: report)
    (shop.folder / "config.yaml").write_text(
        "output_dir: run\nmodel: {vision_tower: ./tower, language_model: ./lm}\n"
        "train: {projector_lr: 1e-3, lora_lr: 1e-4}\ndata: {qa_file: qa.jsonl}\n"
    )
    monkeypatch.setattr("sys.argv", ["process_image", "--config", str(shop.folder / "config.yaml")])
    process_image.main()
    printed = capsys.readouterr().out
    assert "\\x1b]0;x\\x07" in printed and "\x1b" not in printed


# --- another data set


def test_a_file_of_another_data_set_is_not_replaced(shop, monkeypatch):
    shop.prepare()
    first = shop.outputs()
    other = shop.folder / "other.json"
    other.write_text((shop.folder / "raw.json").read_text())
    with pytest.raises(InputError, match=r"qa\.jsonl: was made from another data set \(x: .*raw\.json\)") as error:
        shop.prepare(annotations=other)
    assert 'another "data.qa_file"' in str(error.value) and "delete the file" in str(error.value)
    assert shop.outputs() == first
    (shop.out / "qa.jsonl").unlink()  # as the message says
    assert shop.prepare(annotations=other)["annotations"] == {"x": str(other)}


def test_sources_of_the_same_data_set_are_added_removed_edited_and_moved(shop, tmp_path):
    def prepare(home: Path, *names: str) -> dict:
        sources = [SourceConfig(f"s-{name}", home / f"{name}.json", "llava", images=home / "images") for name in names]
        return prepare_sources(sources, home / "out" / "qa.jsonl")

    for name in "abc":
        shutil.copy(shop.folder / "raw.json", shop.folder / f"{name}.json")
    prepare(shop.folder, "a")
    assert prepare(shop.folder, "a", "b")["kept"] == 40
    assert prepare(shop.folder, "b", "c")["kept"] == 40
    shop.write(["1.png"])
    shutil.copy(shop.folder / "raw.json", shop.folder / "b.json")
    assert prepare(shop.folder, "b")["kept"] == 1
    moved = tmp_path / "moved"
    shop.folder.joinpath("images").rename(moved_images := tmp_path / "kept-images")
    moved.mkdir()
    for path in [shop.out, *shop.folder.glob("*.json")]:
        path.rename(moved / path.name)
    moved_images.rename(moved / "images")
    assert prepare(moved, "b", "c")["kept"] == 21
    with pytest.raises(InputError, match="another data set"):
        prepare(moved, "a")
    report = json.loads((moved / "out" / "qa.report.json").read_text())
    del report["annotations"]  # as earlier versions wrote it
    (moved / "out" / "qa.report.json").write_text(json.dumps(report))
    assert prepare(moved, "a")["kept"] == 20
