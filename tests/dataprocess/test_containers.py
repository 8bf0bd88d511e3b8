"""Files are recognised by their content: read, or named for what they are. Shards and splits are complete or named.

Run: python -m pytest tests/dataprocess/test_containers.py
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable

import pyarrow
import pyarrow.ipc
import pytest
from PIL import Image

from config import InputError, SourceConfig
from dataprocess.report import summary
from dataset.record import parse_record
from tests.dataprocess.helpers import prepare_sources
from tests.dataprocess.test_readers import Desk, desk, image_file, texts
from visual.images import ImageError, list_images, read_image

__all__ = ["desk"]  # a fixture

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"
ROWS = [{"image": "a.jpg", "question": f"What is {k}?", "answer": "一只猫。"} for k in range(3)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TABLE = "image,question,answer\n" + "".join(f"{row['image']},{row['question']},{row['answer']}\n" for row in ROWS)
CHINESE = "图片,问题,答案\n" + "".join(f"{row['image']},图里有什么？,{row['answer']}\n" for row in ROWS)


def arrow(rows: list[dict], *, is_stream: bool) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def questions(desk: Desk) -> list[str]:
    return [texts(one)[0].removeprefix("<image>\n") for one in desk.kept()]


READ: dict[str, tuple[str, bytes]] = {
    "utf-16": ("raw.csv", TABLE.encode("utf-16")),
    "utf-16 without a mark": ("raw.tsv", TABLE.replace(",", "\t").encode("utf-16-le")),
    "utf-16 JSON": ("raw.json", json.dumps(ROWS).encode("utf-16")),
    "GBK": ("raw.csv", TABLE.encode("gbk")),
    "GBK, Chinese headers": ("raw.csv", CHINESE.encode("gbk")),
    "GBK JSON Lines": ("raw.jsonl", LINES.encode("gbk")),
    "UTF-8, Chinese headers": ("raw.csv", CHINESE.encode()),
    "gzip": ("raw.jsonl.gz", gzip.compress(LINES.encode())),
    "gzip, a list": ("raw.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "gzip, a table": ("raw.csv.gz", gzip.compress(TABLE.encode())),
    "gzip, GBK": ("raw.csv.gz", gzip.compress(TABLE.encode("gbk"))),
    "gzip without its name": ("raw.jsonl", gzip.compress(LINES.encode())),
    "bzip2": ("raw.jsonl.bz2", bz2.compress(LINES.encode())),
    "xz": ("raw.jsonl.xz", lzma.compress(LINES.encode())),
    "arrow file": ("raw.arrow", arrow(ROWS, is_stream=False)),
    "arrow stream": ("data.arrow", arrow(ROWS, is_stream=True)),
}


@pytest.mark.parametrize("case", READ)
def test_every_container_gives_the_same_records(desk, case):
    name, data = READ[case]
    report = desk.prepare(desk.write(name, data), desk.images("a.jpg"))
    assert report["kept"] == 3 and [texts(one)[1] for one in desk.kept()] == ["一只猫。"] * 3
    is_foreign = any(word in case for word in ("utf-16", "GBK"))
    assert ("read as" in summary(report)) == is_foreign


def archive(make: Callable[[io.BytesIO], None]) -> bytes:
    made = io.BytesIO()
    make(made)
    return made.getvalue()


def as_tar(made: io.BytesIO) -> None:
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))


def as_xlsx(made: io.BytesIO) -> None:
    with zipfile.ZipFile(made, "w") as workbook:
        workbook.writestr("xl/workbook.xml", "<workbook/>")


NAMED = {
    "raw.parquet": (POINTER, "git-lfs pointer.* git lfs pull"),
    "raw.jsonl": (POINTER, "git-lfs pointer.* git lfs pull"),
    "page.json": (b"\n<!DOCTYPE html><html>401</html>", "web page.* download it again"),
    "page.csv": (b"<html><body>404</body></html>", "web page.* download it again"),
    "half.parquet": (LINES.encode(), "content is text, not parquet as its name says"),
    "plain.json.gz": (LINES.encode(), "content is text, not gzip"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "gzip data that is cut"),
    "table.xlsx": (archive(as_xlsx), "Excel workbook .*save the sheet as CSV UTF-8"),
    "shard.tar": (archive(as_tar), "tar archive"),
    "shard.tar.gz": (gzip.compress(archive(as_tar)), "tar archive"),
    "photo.json": (image_file(), "is an image.* give the folder"),
    "weights.json": (b"\x80\x04\x95", "pickle"),
    "rows.json.zst": (b"\x28\xb5\x2f\xfd9", "zstd"),
    "list.csv": (json.dumps(ROWS).encode(), "is JSON, though its name says a table"),
    "twice.csv": (b"image,answer,answer,question\n", 'two columns have the name "answer"'),
    "western.csv": (
        TABLE.replace("一只猫。", "el niño está aquí").encode("latin-1"),
        "raw records were refused|left to train",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_is_not_read_is_named_for_what_it_is(desk, name):
    data, message = NAMED[name]
    with pytest.raises(InputError, match=message) as error:
        desk.prepare(desk.write(name, data), desk.images("a.jpg"))
    assert len(str(error.value)) < 2000


def test_a_pointer_among_shards_is_named(desk):
    desk.parquet("shards/train-00000-of-00002.parquet", ROWS)
    desk.write("shards/train-00001-of-00002.parquet", POINTER)
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet: is a git-lfs pointer"):
        desk.prepare(desk.folder / "shards", desk.images("a.jpg"))


def test_an_image_that_is_a_pointer_says_so(tmp_path):
    (tmp_path / "a.jpg").write_bytes(POINTER)
    with pytest.raises(ImageError, match="git-lfs pointer.* git lfs pull"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("present", "missing"), [((0, 2), "00001"), ((1, 2), "00000"), ((0, 1), "00002"), ((1, 3), "00002")]
)
def test_a_missing_shard_is_named(desk, present, missing):
    for number in present:
        desk.parquet(f"shards/train-{number:05d}-of-00003.parquet", ROWS)
    with pytest.raises(InputError, match=rf"1 are missing \({missing}\); download"):
        desk.prepare(desk.folder / "shards", desk.images("a.jpg"))
    one = desk.folder / "shards" / f"train-{present[0]:05d}-of-00003.parquet"
    assert desk.prepare(one, desk.images("a.jpg"))["kept"] == 3  # given by name, one shard is meant


def split_rows(desk: Desk, names: list[str]) -> None:
    for number, name in enumerate(names):
        desk.parquet(
            name, [{"image": f"{number}.jpg", "question": name.split("/")[-1].split("-")[0], "answer": "Yes."}]
        )
    desk.images(*(f"{k}.jpg" for k in range(len(names))))


def prepare_sides(desk: Desk, folder: str, validation: bool = True, **settings) -> tuple[dict, list[str], list[str]]:
    held = desk.folder / "out" / "held.jsonl" if validation else None
    source = SourceConfig("x", desk.folder / folder, images=desk.folder / "images", **settings)
    report = prepare_sources([source], desk.qa, validation_file=held, validation_fraction=0.0)
    sides = [held.read_text().splitlines()] if held else [[]]
    said = [
        [texts(json.loads(line))[0].split("\n")[1] for line in lines]
        for lines in [desk.qa.read_text().splitlines(), *sides]
    ]
    return report, said[0], said[1]


SHARDS = ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"]


@pytest.mark.parametrize("layout", ["{}", "data/{}"])
def test_splits_in_the_names_of_shards_are_respected(desk, layout):
    split_rows(desk, ["hub/" + layout.format(name) for name in SHARDS])
    desk.write("hub/README.md", "A data set.")
    report, train, held = prepare_sides(desk, "hub")
    assert (train, held) == (["train"], ["validation"])
    assert "test (1 file), train (1 file), validation (1 file); each is used as that; test left out" in summary(report)
    (desk.folder / "out" / "held.jsonl").unlink()
    report, train, _ = prepare_sides(desk, "hub", validation=False)
    assert train == ["train"] and "validation and test left out" in summary(report)
    report, train, _ = prepare_sides(desk, "hub", split="train")
    assert train == ["train"]


def test_a_folder_of_one_split_is_divided_as_the_source_says(desk):
    split_rows(desk, ["hub/train-00000-of-00002.parquet", "hub/train-00001-of-00002.parquet"])
    report, train, held = prepare_sides(desk, "hub")
    assert (train, held) == (["train", "train"], []) and "notes" not in report


def test_folders_of_json_lines_and_of_arrow_are_read(desk):
    folder = desk.images("a.jpg")
    for number in range(2):
        desk.write(f"lines/part{number}.jsonl", LINES)
        desk.write(f"saved/data-{number:05d}-of-00002.arrow", arrow(ROWS, is_stream=True))
    desk.write("saved/state.json", "{}")
    desk.write("saved/dataset_info.json", "{}")
    for name in ("lines", "saved"):
        assert desk.prepare(desk.folder / name, folder)["kept"] == 6


def test_an_imagefolder_with_metadata_is_read(desk):
    folder = desk.images("train/a.jpg", "train/deep/b.jpg", folder="set")
    rows = [{"file_name": name, "text": "A cat."} for name in ("a.jpg", "deep/b.jpg")]
    desk.write("set/train/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    assert desk.prepare(folder)["kept"] == 2
    assert [one["image"] for one in desk.kept()] == ["../set/train/a.jpg", "../set/train/deep/b.jpg"]
    (folder / "train" / "metadata.jsonl").rename(folder / "metadata.csv")
    (folder / "metadata.csv").write_text("file_name,caption\ntrain/a.jpg,A cat.\n")
    assert desk.prepare(folder)["kept"] == 1


def test_a_folder_with_files_of_several_kinds_is_refused_by_name(desk):
    desk.parquet("mixed/a.parquet", ROWS)
    desk.write("mixed/b.csv", TABLE)
    with pytest.raises(InputError, match=r"several kinds .*a\.parquet.*b\.csv"):
        desk.prepare(desk.folder / "mixed", desk.images("a.jpg"))


def test_a_linked_folder_of_images_is_entered_once(desk):
    folder = desk.images("deep/a.jpg", folder="album")
    desk.write("album/deep/a.txt", "A cat.")
    (folder / "loop").symlink_to(folder)
    (folder / "deep" / "again").symlink_to(folder / "deep")
    assert desk.prepare(folder)["kept"] == 1


# --- images of other formats


def test_images_of_other_formats_in_a_folder_are_read_or_named(desk, monkeypatch):
    folder = desk.images("a.jpg", folder="album")
    Image.new("RGB", (9, 8), "red").save(folder / "b.avif")
    Image.new("RGB", (9, 8), "red").save(folder / "c.tiff")
    (folder / "d.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "e.jxl").write_bytes(b"\xff\x0a" + bytes(30))
    for name in "abcde":
        (folder / f"{name}.txt").write_text("A cat.")
    for name in ("notes.docx", "clip.mp4", "readme.md"):
        (folder / name).write_bytes(b"x")
    report = desk.prepare(folder)
    assert [os.path.splitext(one["image"])[1] for one in desk.kept()] == [".jpg", ".avif", ".tiff"]
    assert report["by_reason"] == {"unreadable_image": 2}
    named = {one["id"]: one["detail"] for one in desk.refused()}
    assert 'pip install "pillow-heif"' in named["d.HEIC"] and "pillow-jxl-plugin" in named["e.jxl"]
    assert (
        "2 files are not read" in summary(report) and ".docx (1)" in summary(report) and "readme" not in summary(report)
    )
    assert [path.name for path in list_images(folder)] == ["a.jpg", "b.avif", "c.tiff", "d.HEIC", "e.jxl"]


def test_a_text_beside_an_image_may_be_gbk(desk):
    folder = desk.images("a.jpg", folder="album")
    (folder / "a.txt").write_bytes("一只白色的猫在沙发上。".encode("gbk"))
    desk.prepare(folder)
    assert parse_record(desk.kept()[0], "").conversations[1].content == "一只白色的猫在沙发上。"
