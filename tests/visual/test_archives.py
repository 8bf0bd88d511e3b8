"""Images inside zip and tar archives are read where they are; hostile archives get one message each.

Run: python -m pytest tests/visual/test_archives.py
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import shutil
import stat
import struct
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from config import InputError
from visual import archives, image_pack, images
from visual.archives import file_names, top_folder
from visual.feature_cache import FeatureCache
from visual.image_pack import ImagePack
from visual.images import ImageError, image_bytes, image_state, read_image

LONG = "x" * 60 + "/" + "y" * 120 + ".png"
NAMES = ["1.png", "a/2.png", "./b/3.png", "中文/图.png", LONG]


def image_of(number: int, side: int = 8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (number * 30 % 256, 7, 200)).save(data, "PNG")
    return data.getvalue()


FILES = {name: image_of(number) for number, name in enumerate(NAMES)}


def write_zip(path: Path, files: dict[str, bytes] = FILES, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes] = FILES, form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_pack(path: Path) -> Path:
    with ImagePack(path) as pack:
        for name, data in FILES.items():
            if name.isascii():
                pack.add(name.removeprefix("./"), data)
        pack.publish()
    return path


def write_streamed_zip(path: Path) -> Path:
    """A zip whose sizes come after the members, with zip64 fields, behind other bytes."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in FILES.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    path.write_bytes(stream.getvalue())
    return path


WRITERS = {
    "stored.zip": write_zip,
    "deflated.zip": lambda path: write_zip(path, how=zipfile.ZIP_DEFLATED),
    "streamed.zip": write_streamed_zip,
    "gnu.tar": write_tar,
    "pax.tar": lambda path: write_tar(path, form=tarfile.PAX_FORMAT),
    "pack.zip": write_pack,
    "a name without a suffix": write_zip,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_member_is_read_by_its_path_below_the_archive(tmp_path, kind):
    archive = WRITERS[kind](tmp_path / kind)
    names = [name for name in NAMES if name.isascii() or kind != "pack.zip"]
    open_before = len(os.listdir("/proc/self/fd"))
    for name in names:
        assert image_bytes(archive / name) == FILES[name]
        state = image_state(os.fsencode(archive / name))
        assert (state.size, state.is_file) == (len(FILES[name]), True) and state.mtime_ns < 0
        assert state == image_state(archive / name)
    assert read_image(archive / "a" / "2.png").size == (8, 8)
    assert sorted(file_names(str(archive))) == sorted(name.removeprefix("./") for name in names)
    assert len(os.listdir("/proc/self/fd")) == open_before
    os.symlink(archive, tmp_path / "link")
    assert image_bytes(tmp_path / "link" / "1.png") == FILES["1.png"]
    for wrong in ("none.png", "a", "a/2.png/x", "../1.png", "a/../1.png"):
        with pytest.raises(ImageError, match="no such file") as error:
            image_bytes(f"{archive}/{wrong}")
        assert error.value.reason == "missing_image"
        with pytest.raises(OSError):
            image_state(f"{archive}/{wrong}")


def test_names_of_windows_in_gbk_and_with_backslashes_are_read(tmp_path):
    path = tmp_path / "old.zip"
    write_zip(path, {"train-AAAA.png": image_of(1)})
    path.write_bytes(path.read_bytes().replace(b"train-AAAA", b"train\\" + "小狗".encode("gbk")))
    assert image_bytes(path / "train" / "小狗.png") == image_of(1)


def test_the_later_of_two_members_with_one_name_counts_as_when_unpacking(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("1.png", image_of(1))
        archive.writestr("1.png", image_of(2))
    assert image_bytes(tmp_path / "a.zip" / "1.png") == image_of(2)


@pytest.mark.parametrize("name", ["b.zip", "b.tar"])
def test_a_replaced_archive_is_read_again(tmp_path, name):
    write = write_zip if name.endswith("zip") else write_tar
    path = write(tmp_path / name, {"1.png": image_of(1)})
    before = image_state(path / "1.png")
    os.utime(path, ns=(1, 1))  # a zip has checksums, so a copy with another time has the same images
    assert (image_state(path / "1.png") == before) == name.endswith("zip")
    write(path, {"0.png": image_of(3), "1.png": image_of(2)})
    assert image_bytes(path / "1.png") == image_of(2) and image_state(path / "1.png") != before
    path.unlink()
    path.mkdir()
    (path / "1.png").write_bytes(image_of(4))
    assert image_bytes(path / "1.png") == image_of(4) and image_state(path / "1.png").mtime_ns > 0


def test_the_top_folder_is_that_of_all_images(tmp_path):
    assert (
        top_folder(str(write_zip(tmp_path / "a.zip", {"t/1.png": b"1", "t/x/2.png": b"2", "__MACOSX/t/._1.png": b"3"})))
        == "t"
    )
    assert top_folder(str(write_tar(tmp_path / "b.tar", {"t/1.png": b"1", "2.png": b"2"}))) == ""


# --- processes and threads


def read_all(path: str, answers) -> None:
    answers.put([image_bytes(f"{path}/{name}") for name in FILES])


def test_forked_workers_read_without_sharing_a_position_or_a_lock(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    image_bytes(path / "1.png")
    shutil.copy(path, tmp_path / "unknown.zip")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with archives._lock:  # as if a thread of this process were reading an index while a worker starts
        names = ("a.zip", "a.zip", "unknown.zip")
        workers = [context.Process(target=read_all, args=(str(tmp_path / name), answers)) for name in names]
        for worker in workers:
            worker.start()
    for worker in workers:
        assert answers.get() == list(FILES.values())
        worker.join()


def test_threads_read_one_index(tmp_path, monkeypatch):
    path, calls = write_tar(tmp_path / "a.tar", {f"{k}.png": b"%d" % k * 99 for k in range(200)}), []
    whole = archives._read_index

    def slowly(archive: str) -> tuple:
        calls.append(archive)
        time.sleep(0.1)
        return whole(archive)

    monkeypatch.setattr(archives, "_read_index", slowly)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda k: image_bytes(path / f"{k}.png"), range(200))) == [
            b"%d" % k * 99 for k in range(200)
        ]
    assert len(calls) == 1


# --- hostile archives


def encrypted(path: Path) -> None:
    write_zip(path, {"1.png": image_of(1)})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("1.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")


def tar_link(path: Path, kind: bytes = tarfile.SYMTYPE) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)


def with_index(path: Path, change: dict[int, tuple[str, int]]) -> None:
    """A zip of two members whose index says something else about the first: place in the entry -> its form and value."""
    write_zip(path, {"1.png": image_of(1), "2.png": image_of(2)})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2")
    for place, (form, value) in change.items():
        struct.pack_into(form, data, entry + place, value)
    path.write_bytes(data)


def damaged(path: Path, place: int) -> None:
    write_zip(path, {"1.png": image_of(1)})
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


def renamed(path: Path) -> None:
    """A zip whose index gives a member another name than its header."""
    write_zip(path, {"2.png": image_of(1)})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"PK\1\2")] + data[data.index(b"PK\1\2") :].replace(b"2.png", b"1.png"))


def cut(path: Path, write, size: int) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:size])


def bomb(path: Path) -> None:
    write_zip(path, {"1.png": bytes(70_000_000)}, zipfile.ZIP_DEFLATED)


def huge_name(path: Path) -> None:
    header = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + header + bytes(10240))


HOSTILE = {
    "encrypted": (encrypted, "in the archive it is encrypted"),
    "zip with a link": (link, "is a link, which is not followed"),
    "tar with a link": (tar_link, "is a link, which is not followed"),
    "tar with a hard link": (lambda path: tar_link(path, tarfile.LNKTYPE), "is a link, which is not followed"),
    "tar with a device": (lambda path: tar_link(path, tarfile.CHRTYPE), "is not a plain file"),
    "LZMA": (
        lambda path: write_zip(path, {"1.png": image_of(1)}, zipfile.ZIP_LZMA),
        "is compressed by LZMA, which is not read",
    ),
    "overlapping": (lambda path: with_index(path, {20: ("<L", 300)}), "members of the archive overlap or lie outside"),
    "outside": (lambda path: with_index(path, {42: ("<L", 1 << 30)}), "members of the archive overlap or lie outside"),
    "another member": (lambda path: with_index(path, {42: ("<L", 3), 20: ("<L", 70)}), "not where its index says"),
    "another name": (renamed, "not where its index says"),
    "a wrong size": (lambda path: with_index(path, {24: ("<L", 50)}), "not the bytes that its index says"),
    "a wrong index": (lambda path: with_index(path, {0: ("<L", 7)}), "index of the archive is damaged"),
    "a flipped bit": (lambda path: damaged(path, 60), "not the bytes that its index says"),
    "zip bomb": (bomb, "grows from .* to 70,000,000 bytes, as in a zip bomb"),
    "zip that is cut": (lambda path: cut(path, write_zip, 300), "a zip has its index at its end"),
    "tar that is cut": (
        lambda path: cut(path, write_tar, 1500),
        "cut off after 1 members|cut off or damaged after 1 members",
    ),
    "tar with a huge name": (huge_name, "cut off after 0 members"),
    "compressed as a whole": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(600)), "compressed as a whole"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_gets_one_message(tmp_path, kind):
    make, message = HOSTILE[kind]
    path = tmp_path / "bad"
    make(path)
    with pytest.raises(ImageError, match=message) as error:
        image_bytes(path / "1.png")
    assert error.value.reason == "unreadable_image" and str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_lead_outside_are_never_read(tmp_path, write):
    (tmp_path / "in").mkdir()
    (tmp_path / "evil.png").write_bytes(b"outside")
    wanted = ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "..", "good.png"]
    path = write(tmp_path / "in" / "bad", {name: b"inside" for name in wanted})
    assert list(file_names(str(path))) == ["good.png"]
    for name in wanted[:-1]:
        with pytest.raises(ImageError, match="no such file"):
            image_bytes(f"{path}/{name.lstrip('/')}")


def test_a_file_that_is_no_archive_has_no_members(tmp_path):
    (tmp_path / "1.png").write_bytes(image_of(1))
    with pytest.raises(ImageError, match="no such file") as error:
        image_bytes(tmp_path / "1.png" / "2.png")
    assert error.value.reason == "missing_image"


def test_an_image_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 50)
    with pytest.raises(ImageError, match="more than 50; shrink it") as error:
        image_bytes(write_zip(tmp_path / "a.zip") / "1.png")
    assert error.value.reason == "decompression_bomb"


WHOLE = {name: WRITERS[name] for name in ("deflated.zip", "streamed.zip", "gnu.tar", "pax.tar")}


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    st.floats(0, 1) | st.just(1.0),
)
def test_no_damage_raises_anything_else_or_gives_other_bytes(tmp_path, kind, flips, kept):
    path = tmp_path / "damaged"
    path.unlink(missing_ok=True)
    WHOLE[kind](path)
    data = bytearray(path.read_bytes())
    for place, mask in flips:
        data[min(int(place * len(data)), len(data) - 1)] ^= mask
    path.unlink()  # another inode, so that no index of before is used
    path.write_bytes(data[: int(kept * len(data))])
    for name in NAMES:
        try:
            found = image_bytes(path / name)
        except ImageError:
            continue
        assert found == FILES[name] or kind.endswith("tar")  # a tar has no checksums of its members


# --- the feature cache


def test_the_feature_cache_knows_images_in_archives(tmp_path):
    path, cache = write_tar(tmp_path / "a.tar"), FeatureCache(tmp_path / "cache", 3, 5, torch.float32)
    (tmp_path / "file.png").write_bytes(FILES["1.png"])
    features, key = cache.find(path / "1.png")
    assert features is None and key.size == len(FILES["1.png"])
    made = cache.features([key], torch.zeros(1, 3, 2, 2), lambda _: torch.ones(1, 3, 5))
    shutil.copy(path, tmp_path / "b.zip")
    for same in (path / "1.png", tmp_path / "b.zip" / "1.png", tmp_path / "file.png"):
        found, other = cache.find(same)
        assert found is not None and found.equal(made[0]) and other.digest == key.digest
    assert cache.find(path / "a" / "2.png")[0] is None
    with pytest.raises(ImageError, match="no such file"):
        cache.find(path / "none.png")


# --- packs


def test_a_pack_has_the_same_bytes_each_time_and_any_program_opens_it(tmp_path):
    first, second = write_pack(tmp_path / "1.zip"), write_pack(tmp_path / "2.zip")
    assert first.read_bytes() == second.read_bytes()
    with ImagePack(tmp_path / "3.zip") as pack:
        pack.add("a.png", b"abc")
        pack.publish()
    digest = hashlib.sha256((tmp_path / "3.zip").read_bytes()).hexdigest()
    assert digest == "58c85b2b612f230adb99eb86db30ea2f0bff94d0b5546f8264285077da8e9d69"  # on any day
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None and archive.comment == image_pack.MARK
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert [archive.read(name) for name in archive.namelist()] == [FILES[name] for name in NAMES if name.isascii()]


def test_a_pack_beyond_the_limits_of_a_zip_uses_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr(image_pack, "_FULL", 150)  # offsets from 4 GiB on
    monkeypatch.setattr(image_pack, "_MANY", 2)
    data = {f"{k}.png": image_of(k) for k in range(4)}
    with ImagePack(tmp_path / "a.zip") as pack:
        for name, content in data.items():
            pack.add(name, content)
        pack.publish()
    raw = (tmp_path / "a.zip").read_bytes()
    assert b"PK\6\6" in raw and b"PK\6\7" in raw
    for short, full in ((b"\x96\0\0\0", b"\xff\xff\xff\xff"), (b"\2\0\2\0", b"\xff\xff\xff\xff")):
        raw = raw[: raw.index(b"PK\1\2")] + raw[raw.index(b"PK\1\2") :].replace(
            short, full
        )  # what the limits really are
    (tmp_path / "b.zip").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == data
    assert {name: image_bytes(tmp_path / "b.zip" / name) for name in file_names(str(tmp_path / "b.zip"))} == data


def test_an_unfinished_pack_is_read_by_the_process_that_writes_it(tmp_path):
    path = tmp_path / "a.zip"
    write_pack(path)
    old = path.read_bytes()
    with ImagePack(path) as pack:
        pack.add("new.png", image_of(9))
        pack.add("new.png", image_of(9))
        assert image_bytes(path / "new.png") == image_of(9)
        state = image_state(path / "new.png")
        with pytest.raises(ImageError, match="no such file"):
            image_bytes(path / "1.png")
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.zip"]  # it was not published
    with ImagePack(path) as pack:
        pack.add("new.png", image_of(9))
        pack.publish()
    assert image_state(path / "new.png") == state and list(file_names(str(path))) == ["new.png"]


def test_a_file_that_is_no_pack_is_never_replaced(tmp_path):
    mine = write_zip(tmp_path / "mine.zip")
    os.symlink(write_pack(tmp_path / "pack.zip"), tmp_path / "link.zip")
    os.mkfifo(tmp_path / "pipe.zip")
    for path in (mine, tmp_path / "link.zip", tmp_path / "pipe.zip", tmp_path):
        with pytest.raises(InputError, match="exists, and was not written by data preparation"):
            ImagePack(path)
