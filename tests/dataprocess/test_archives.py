"""Sources whose images are in a zip or tar, and the archive that takes the images of records.

Run: python -m pytest tests/dataprocess/test_archives.py
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from config import InputError, SourceConfig
from dataprocess import image_paths, image_store
from dataset.checks.records import check_file, check_leakage
from dataset.qa_file import QAFile
from evaluation.score import _contents
from tests.dataprocess.helpers import prepare_sources
from tests.dataprocess.test_readers import Desk, desk, image_file
from tests.visual.test_archives import write_tar, write_zip
from visual.images import image_bytes

__all__ = ["desk"]  # a fixture

NAMES = ["train2017/000000000001.jpg", "train2017/000000000002.jpg", "train2017/sub/c d.png"]
FILES = {name: image_file((number * 30, 9, 9)) for number, name in enumerate(NAMES)}
ASKED = {"question": "What?", "answer": "This."}
MISSING = "000000000009.jpg"
WANTED = ["000000000001.jpg", "COCO_train2014_000000000002.jpg", "sub/c d.png", MISSING, "train2017/000000000001.jpg"]


def ask(desk: Desk, images: Path, names=WANTED, **settings) -> dict:
    rows = [{"id": name, "image": name, **ASKED} for name in names]
    return desk.prepare(desk.write("raw.json", rows), images, **settings)


def unpacked(desk: Desk) -> Path:
    for name, data in FILES.items():
        desk.write(name, data)
    return desk.folder / "train2017"


@pytest.mark.parametrize("kind", ["zip", "tar", "flat.zip", "symlink"])
@pytest.mark.parametrize("verify_images", [True, False])
def test_an_archive_of_images_works_like_the_unpacked_folder(desk, kind, verify_images):
    ask(desk, unpacked(desk), verify_images=verify_images)
    wanted = [one | {"image": image_bytes(desk.qa.parent / one["image"])} for one in desk.kept()]
    reasons = [(one["reason"], one["id"]) for one in desk.refused()]
    assert reasons == [("missing_image", MISSING)] and len(wanted) == 4
    shutil.rmtree(desk.qa.parent)
    files = {name.removeprefix("train2017/") if kind.startswith("flat") else name: data for name, data in FILES.items()}
    path = (write_tar if kind == "tar" else write_zip)(desk.folder / f"train2017.{kind.removeprefix('flat.')}", files)
    if kind == "symlink":
        path = path.rename(desk.folder / "elsewhere")
        (desk.folder / "train2017.zip").symlink_to(path)
        path = desk.folder / "train2017.zip"
    shutil.rmtree(desk.folder / "train2017")
    report = ask(desk, path, verify_images=verify_images)
    assert [one | {"image": image_bytes(desk.qa.parent / one["image"])} for one in desk.kept()] == wanted
    assert [(one["reason"], one["id"]) for one in desk.refused()] == reasons
    qa = QAFile(desk.qa)
    assert [image_bytes(path) for i in range(4) for path in qa.image_paths(qa[i])] == [one["image"] for one in wanted]
    assert report["image_folders"] == {os.path.realpath(path): os.stat(path).st_mtime_ns}


def test_an_archive_inside_a_folder_is_a_folder_of_it(desk):
    for name in ("a", "b"):
        (desk.folder / "images" / name).mkdir(parents=True)
        write_zip(desk.folder / "images" / name / "part.zip", {f"{name}.png": FILES[NAMES[0]]})
    report = ask(
        desk, desk.folder / "images", ["a/part.zip/a.png", "b/part.zip/b.png", "b/part.zip/none.png", "a/part.zip"]
    )
    assert [one["image"] for one in desk.kept()] == ["../images/a/part.zip/a.png", "../images/b/part.zip/b.png"]
    assert report["refused"] == 2 and set(report["by_reason"]) <= {"missing_image", "unreadable_image"}


def test_a_folder_of_texts_finds_its_images_in_an_archive(desk):
    desk.write("texts/1.txt", "A wall.")
    desk.write("texts/sub/2.txt", "A door.")
    archive = write_zip(
        desk.folder / "i.zip", {"t/1.png": FILES[NAMES[0]], "t/sub/2.png": FILES[NAMES[1]], "__MACOSX/._1.png": b""}
    )
    assert desk.prepare(desk.folder / "texts", archive)["kept"] == 2
    assert [one["image"] for one in desk.kept()] == ["../i.zip/t/1.png", "../i.zip/t/sub/2.png"]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_a_second_run_does_nothing_until_the_archive_changes(desk, write):
    path = write(desk.folder / "train2017.x", FILES)
    assert ask(desk, path)["refused"] == 1
    source = SourceConfig("x", desk.folder / "raw.json", images=path)
    before = os.stat(desk.qa).st_mtime_ns
    assert prepare_sources([source], desk.qa, verify_images=True)["refused"] == 1
    assert os.stat(desk.qa).st_mtime_ns == before
    write(path, FILES | {f"train2017/{MISSING}": image_file("red")})
    assert prepare_sources([source], desk.qa, verify_images=True)["refused"] == 0


def test_paths_never_leave_the_archive_or_the_folder(desk):
    desk.write("secret.jpg", FILES[NAMES[0]])
    (desk.folder / "images").mkdir()
    inside = write_zip(desk.folder / "images" / "a.zip", FILES)
    link = desk.folder / "images" / "link.zip"
    link.symlink_to(write_zip(desk.folder / "outside.zip", FILES))
    wrong = ["../secret.jpg", f"{inside}/../../secret.jpg", "a.zip/../../secret.jpg", "link.zip/train2017/sub/c d.png"]
    for root, names in ((desk.folder / "images", wrong), (inside, wrong[:3])):
        with pytest.raises(InputError, match="is left to train on"):
            ask(desk, root, names)
        assert [one["reason"] for one in desk.refused()] == ["path_outside_folder"] * len(names)


def test_an_archive_that_cannot_be_read_is_named_before_any_record(desk):
    bad = write_zip(desk.folder / "bad.zip", FILES)
    bad.write_bytes(bad.read_bytes()[:-30])
    with pytest.raises(
        InputError, match=r'source "x": images: .*bad\.zip: the archive is cut off: .* download it again'
    ):
        ask(desk, bad)
    with pytest.raises(InputError, match="is neither a folder nor a zip or tar archive; give the one that contains"):
        ask(desk, desk.write("photo.jpg", image_file()))
    desk.write("images/bad.zip", bad.read_bytes())
    with pytest.raises(InputError, match=r"unreadable_image: .*images/bad\.zip.*: the archive is cut off"):
        ask(desk, desk.folder / "images", ["bad.zip/1.png"])


def test_names_that_are_not_kept_are_looked_up_one_by_one(desk, monkeypatch):
    monkeypatch.setattr(image_paths, "NAMES_KEPT", 2)
    assert ask(desk, write_zip(desk.folder / "train2017.zip", FILES))["kept"] == 4


# --- leaks and contents


def test_an_image_in_an_archive_is_compared_by_content(desk):
    archive = write_zip(desk.folder / "i.zip", {"1.png": FILES[NAMES[0]], "2.png": FILES[NAMES[1]]})
    folder = desk.write("images/copy.png", FILES[NAMES[0]]).parent
    turn = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}]
    sides = {"train": ["i.zip/1.png", "i.zip/2.png"], "held": ["images/copy.png"]}
    checked = {}
    for side, names in reversed(sides.items()):
        lines = [json.dumps({"id": name, "image": name, "conversations": turn}) for name in names]
        path = desk.write(f"{side}.jsonl", "\n".join(lines) + "\n")
        checked[side] = check_file(
            path,
            chat=None,
            max_length=99,
            sample_size=9,
            seed=0,
            is_held_out=side == "held",
            held_out=checked.get("held"),
        )
        assert len(checked[side].bad_images) == 0
    check_leakage(checked["train"], checked["held"])
    assert [path for path in checked["train"].leaks] == [f"{desk.folder}/i.zip/1.png"]
    same = _contents([archive / "1.png", archive / "2.png", folder / "copy.png"])
    assert same[archive / "1.png"] == same[folder / "copy.png"] != same[archive / "2.png"]


# --- images inside records

ROWS = [{"image": base64.b64encode(image_file((number, 0, 0))).decode(), **ASKED} for number in (1, 2, 3, 1)]


def pack_of(desk: Desk) -> Path:
    return desk.qa.with_suffix(".images.zip")


@pytest.mark.parametrize("verify_images", [True, False])
def test_images_of_records_go_into_one_archive_with_the_same_bytes_each_time(desk, verify_images):
    rows = ROWS + [{"image": base64.b64encode(image_file()[:50]).decode(), **ASKED}] * verify_images
    raw = desk.write("raw.json", rows)
    report = desk.prepare(raw, verify_images=verify_images)
    assert report["kept"] == 4 and report["image_folders"] == {str(pack_of(desk)): os.stat(pack_of(desk)).st_mtime_ns}
    images = [image_bytes(desk.qa.parent / one["image"]) for one in desk.kept()]
    assert images == [image_file((number, 0, 0)) for number in (1, 2, 3, 1)]
    first, qa = pack_of(desk).read_bytes(), desk.qa.read_bytes()
    assert not (desk.qa.parent / "qa.images").exists()
    assert desk.prepare(raw, verify_images=verify_images) == report  # nothing is done, and no image is checked again
    os.utime(pack_of(desk), ns=(1, 1))
    assert desk.prepare(raw, verify_images=verify_images) != report
    assert (pack_of(desk).read_bytes(), desk.qa.read_bytes()) == (first, qa)
    pack_of(desk).unlink()
    desk.prepare(raw, verify_images=verify_images)
    assert (pack_of(desk).read_bytes(), desk.qa.read_bytes()) == (first, qa)
    with zipfile.ZipFile(pack_of(desk)) as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 3 + verify_images


def test_the_folder_of_an_earlier_version_is_still_used(desk):
    raw = desk.write("raw.json", ROWS)
    (desk.qa.parent / "qa.images").mkdir(parents=True)
    report = desk.prepare(raw)
    assert not pack_of(desk).exists() and len(os.listdir(desk.qa.parent / "qa.images")) == 3
    assert {os.path.dirname(one["image"]) for one in desk.kept()} == {"qa.images"}
    assert desk.prepare(raw) == report


def test_a_refused_preparation_keeps_the_images_of_the_last_one(desk):
    desk.prepare(desk.write("raw.json", ROWS[:2]))
    before = pack_of(desk).read_bytes()
    with pytest.raises(InputError, match="were refused"):
        sources = [SourceConfig("x", desk.write("raw.json", [*ROWS[2:], {"image": "none", **ASKED}]))]
        prepare_sources(sources, desk.qa, verify_images=True, max_refused=0.0)
    assert pack_of(desk).read_bytes() == before
    assert not [name for name in os.listdir(desk.qa.parent) if name.endswith(".partial")]


def test_a_file_of_the_users_in_the_way_is_not_replaced(desk):
    desk.qa.parent.mkdir()
    mine = write_zip(pack_of(desk), FILES).read_bytes()
    with pytest.raises(InputError, match=r"qa\.images\.zip: exists, and was not written by data preparation"):
        desk.prepare(desk.write("raw.json", ROWS))
    assert pack_of(desk).read_bytes() == mine


def test_a_full_disk_is_named(desk, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_store.ImagePack, "add", fail)
    with pytest.raises(InputError, match=r"qa\.images\.zip: cannot be written \(No space left on device\); free space"):
        desk.prepare(desk.write("raw.json", ROWS))
