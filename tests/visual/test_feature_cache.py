"""The feature cache is exact, shared between processes, and intact after kills, full disks and damage."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from config import InputError
from tests.toy_project import write_images
from tests.toy_towers import write_clip, write_dinov2, write_siglip
from visual import feature_cache
from visual.encoders import load_vision_tower
from visual.feature_cache import FeatureCache, ImageKey, cache_folder, expected_bytes
from visual.images import ImageError, read_image
from visual.processor import load_image_processor

TOKENS, WIDTH = 3, 5
ROW_BYTES = TOKENS * WIDTH * 4


def features_of(image: int, salt: int = 0) -> Tensor:
    """The features [N, Dv] that a fake encoder returns for an image, which is identified by a number."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1000 * salt + image))


def pixels_of(*images: int) -> Tensor:
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


class Encoder:
    """A fake encoder: pixel_values of `pixels_of` -> features of `features_of`.

    It records its calls. Encoders with another `salt` return other features.
    """

    def __init__(self, salt: int = 0) -> None:
        self.salt, self.calls = salt, []

    def __call__(self, pixel_values: Tensor) -> Tensor:
        self.calls.append([int(pixel[0, 0, 0]) for pixel in pixel_values])
        return torch.stack([features_of(image, self.salt) for image in self.calls[-1]])


def write_files(folder: Path, count: int) -> list[Path]:
    """Write files in place of images: the cache does not decode them."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(b"image %06d" % i)
    return paths


def key_of(path: Path) -> ImageKey:
    """Make an image's key without the cache."""
    state = os.stat(path)
    return ImageKey(
        str(path), state.st_size, state.st_mtime_ns, hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    )


def new_cache(tmp_path: Path, dtype: torch.dtype = torch.float32, say=print) -> FeatureCache:
    return FeatureCache(tmp_path / "features", TOKENS, WIDTH, dtype, say)


def add(cache: FeatureCache, paths: list[Path], images: list[int], encode=None) -> Tensor:
    return cache.features([key_of(paths[i]) for i in images], pixels_of(*images), encode or Encoder())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def paths(tmp_path):
    return write_files(tmp_path / "images", 8)


@pytest.fixture
def cache(tmp_path):
    return new_cache(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_features_equal_the_encoders_bit_for_bit(tmp_path, dtype):
    write_images(tmp_path / "images", 5)
    encoder = write_clip(tmp_path / "tower")
    tower, processor = load_vision_tower(encoder, dtype=dtype), load_image_processor(encoder)
    paths = sorted((tmp_path / "images").iterdir())
    pixel_values = processor([read_image(path) for path in paths]).to(dtype)
    plain = tower(pixel_values)

    folder = cache_folder(tmp_path / "qa.jsonl", tower, processor, dtype)
    cache = FeatureCache(folder, tower.num_image_tokens, tower.hidden_size, dtype)
    missed = [cache.find(path) for path in paths]
    assert [features for features, _ in missed] == [None] * 5
    first = cache.features([key for _, key in missed], pixel_values, tower)
    again = FeatureCache(folder, tower.num_image_tokens, tower.hidden_size, dtype)
    found = torch.stack([again.find(path)[0] for path in paths])
    assert same_bits(first, plain) and same_bits(found, plain)
    assert len(again) == 5 and again.nbytes == expected_bytes(5, tower, dtype) == found.numel() * dtype.itemsize
    assert (folder / "features.bin").stat().st_size == again.nbytes


def test_new_features_are_rounded_like_cached_ones(tmp_path, paths):
    """The encoder's output has more precision than the cache, and a graph, which the result does not have."""
    cache = new_cache(tmp_path, torch.bfloat16)
    first = add(cache, paths, [0, 1], lambda pixels: Encoder()(pixels).requires_grad_())
    assert same_bits(first, Encoder()(pixels_of(0, 1)).bfloat16()) and not first.requires_grad
    assert same_bits(cache.find(paths[1])[0], first[1])


def test_values_that_are_not_finite_keep_their_bits(cache, paths):
    strange = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1e-45]).expand(1, TOKENS, WIDTH)
    first = add(cache, paths, [0], lambda _: strange)
    assert same_bits(first, strange.contiguous()) and same_bits(cache.find(paths[0])[0], first[0])


def test_changing_found_features_does_not_change_the_cache(cache, paths):
    add(cache, paths, [0])
    cache.find(paths[0])[0].zero_()
    assert same_bits(cache.find(paths[0])[0], features_of(0))


def test_the_different_images_of_a_batch_are_encoded_once_in_one_call(cache, paths):
    encoder = Encoder()
    batch = [3, 1, 3, 3, 1, 2]
    assert same_bits(add(cache, paths, batch, encoder), torch.stack([features_of(i) for i in batch]))
    assert encoder.calls == [[3, 1, 2]] and len(cache) == 3


def test_images_added_after_find_are_read_and_not_encoded(cache, paths):
    """A resumed run finds these images stored, an uninterrupted one asked before they were. Both get the features of the
    first batch, although the encoder would now return others."""
    keys = [cache.find(path)[1] for path in paths[:3]]
    add(cache, paths, [0, 1])
    later = Encoder(salt=1)
    features = cache.features(keys, pixels_of(0, 1, 2), later)
    assert later.calls == [[2]]
    assert same_bits(features, torch.stack([features_of(0), features_of(1), features_of(2, salt=1)]))
    assert same_bits(add(cache, paths, [2, 0], later), torch.stack([features_of(2, salt=1), features_of(0)]))
    assert later.calls == [[2]]


def test_the_process_that_is_second_gets_the_features_of_the_first(tmp_path, cache, paths):
    """Neither found the image and both encoded it; the other process stored its features first."""
    other, mine = new_cache(tmp_path), Encoder(salt=1)

    def encode(pixel_values: Tensor) -> Tensor:
        add(other, paths, [1, 2])
        return mine(pixel_values)

    features = add(cache, paths, [0, 1], encode)
    assert same_bits(features, torch.stack([features_of(0, salt=1), features_of(1)]))
    for image, salt in ((0, 1), (1, 0), (2, 0)):
        assert same_bits(cache.find(paths[image])[0], features_of(image, salt))
    assert len(cache) == 3


def test_no_images_give_no_features(cache):
    assert cache.features([], torch.empty(0, 3, 2, 2), Encoder()).shape == (0, TOKENS, WIDTH) and len(cache) == 0


def test_features_of_another_shape_are_not_stored(cache, paths):
    with pytest.raises(ValueError, match=r"\(1, 4, 5\), expected \(1, 3, 5\)"):
        add(cache, paths, [0], lambda _: torch.zeros(1, TOKENS + 1, WIDTH))
    assert len(cache) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Which image


def test_the_key_is_the_files_state_and_content(cache, paths):
    assert cache.find(paths[0]) == (None, key_of(paths[0]))
    add(cache, paths, [0])
    assert cache.find(paths[0])[1] == key_of(paths[0])


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_features_of_deep_grey_images_that_earlier_rules_read_are_not_used(cache, paths, tmp_path, kind):
    """`key_of` is an earlier version's key. Ordinary images keep their features."""
    deep, grey = tmp_path / f"deep.{kind}", tmp_path / f"grey.{kind}"
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(deep)
    Image.fromarray(np.full((8, 8), 30, np.uint8)).save(grey)
    cache.features([key_of(deep), key_of(grey), key_of(paths[0])], pixels_of(0, 1, 2), Encoder())
    with sqlite3.connect(tmp_path / "features" / "index.sqlite") as index:  # an earlier version stored plain paths
        index.execute("DELETE FROM paths")
        for path in (deep, grey, paths[0]):
            index.execute("INSERT OR REPLACE INTO paths VALUES (?, ?, ?, ?)", (os.fsencode(path), *key_of(path)[1:4]))
    index.close()
    assert same_bits(cache.find(grey)[0], features_of(1)) and same_bits(cache.find(paths[0])[0], features_of(2))
    found, key = cache.find(deep)
    assert found is None
    cache.features([key], pixels_of(3), Encoder())
    assert same_bits(cache.find(deep)[0], features_of(3))


def test_a_known_file_is_not_read(cache, paths, monkeypatch):
    add(cache, paths, [0])
    monkeypatch.setattr(feature_cache, "image_bytes", None)
    assert same_bits(cache.find(paths[0])[0], features_of(0))


@pytest.mark.parametrize("seconds", [1, -1])
def test_a_changed_image_is_encoded_again(cache, paths, seconds, monkeypatch):
    """The same path and size, with a later or an earlier time."""
    add(cache, paths, [0])
    before = os.stat(paths[0]).st_mtime_ns
    paths[0].write_bytes(b"image 999999")
    os.utime(paths[0], ns=(before + seconds * 10**9,) * 2)
    found, key = cache.find(paths[0])
    assert found is None and key == key_of(paths[0])
    encoder = Encoder(salt=1)
    cache.features([key], pixels_of(0), encoder)
    monkeypatch.setattr(feature_cache, "image_bytes", None)  # the file's new state is known
    assert encoder.calls == [[0]] and same_bits(cache.find(paths[0])[0], features_of(0, salt=1))
    assert len(cache) == 2


def test_the_same_content_with_another_path_or_time_is_the_same_image(cache, paths, tmp_path):
    add(cache, paths, [0])
    copy = tmp_path / "copy.png"
    shutil.copy(paths[0], copy)
    os.utime(paths[0], ns=(1, 1))
    assert same_bits(cache.find(copy)[0], features_of(0)) and same_bits(cache.find(paths[0])[0], features_of(0))
    assert len(cache) == 1


def test_the_same_content_under_two_paths_is_stored_once(cache, paths, tmp_path, monkeypatch):
    copy = tmp_path / "copy.png"
    shutil.copy(paths[0], copy)
    encoder = Encoder()
    features = cache.features([key_of(paths[0]), key_of(copy)], pixels_of(0, 0), encoder)
    assert encoder.calls == [[0]] and same_bits(features[0], features[1]) and len(cache) == 1
    monkeypatch.setattr(feature_cache, "image_bytes", None)  # both paths are known now
    assert same_bits(cache.find(copy)[0], cache.find(paths[0])[0])


def test_each_view_of_an_image_has_its_own_features_and_unchanged_images_keep_theirs(
    cache, paths, tmp_path, monkeypatch
):
    """`key_of` is the key of versions that knew no views."""
    add(cache, paths, [0])
    copy = tmp_path / "copy.png"
    shutil.copy(paths[0], copy)
    found, one = cache.find(paths[0], b"one")
    assert found is None
    _, two = cache.find(paths[0], b"two")
    cache.features([one, two], pixels_of(1, 2), Encoder())
    assert same_bits(cache.find(copy, b"two")[0], features_of(2)), "another path, the same content"
    monkeypatch.setattr(feature_cache, "image_bytes", None)  # the file is known
    for view, image in ((b"", 0), (b"one", 1), (b"two", 2)):
        assert same_bits(cache.find(paths[0], view)[0], features_of(image))
    assert cache.find(paths[0])[1] == key_of(paths[0]) and len(cache) == 3
    cache.repair()
    assert len(cache) == 3


def test_file_names_need_not_be_unicode(cache, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(b"strange")
    cache.features([cache.find(path)[1]], pixels_of(4), Encoder())
    assert same_bits(cache.find(path)[0], features_of(4))


def test_an_unreadable_file_gives_the_error_of_read_image(cache, tmp_path):
    for bad in (tmp_path / "none.png", tmp_path, tmp_path / "a\0b", tmp_path / "\ud800"):
        with pytest.raises(ImageError) as plain:
            read_image(bad)
        with pytest.raises(ImageError) as error:
            cache.find(bad)
        assert str(error.value) == str(plain.value) and error.value.reason == plain.value.reason
        assert str(bad) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Which folder


def folder_of(tower, processor, dtype=torch.float32) -> Path:
    return cache_folder(Path("data/qa.jsonl"), tower, processor, dtype)


def test_everything_that_changes_the_features_changes_the_folder(tmp_path):
    one, two = write_clip(tmp_path / "one"), write_clip(tmp_path / "two")
    processor, tower = load_image_processor(one), load_vision_tower(one)
    folder = folder_of(tower, processor)
    assert folder.parent == Path("data/qa.features") and len(folder.name) == 16 and int(folder.name, 16) >= 0
    assert not (tmp_path / "qa.features").exists()
    assert folder == folder_of(load_vision_tower(two), load_image_processor(two)), "the same weights in another folder"

    others = [
        folder_of(load_vision_tower(one, feature_layer=-1), processor),
        folder_of(load_vision_tower(one, feature_layer=-3), processor),
        folder_of(tower, processor, torch.bfloat16),
        folder_of(load_vision_tower(one, dtype=torch.bfloat16), processor),
        folder_of(load_vision_tower(write_siglip(tmp_path / "siglip")), processor),
    ]
    settings = two / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"resample": 2}))
    others.append(folder_of(tower, load_image_processor(two)))
    changed = load_vision_tower(one)
    changed.model.config.hidden_act = "gelu"  # not visible in the weights
    others.append(folder_of(changed, processor))
    dino = write_dinov2(tmp_path / "dino")
    others += [folder_of(load_vision_tower(dino, image_size=size), processor) for size in (28, 42)]
    assert len({folder, *others}) == len(others) + 1


@pytest.mark.parametrize("write", [write_clip, write_siglip, write_dinov2])
def test_the_folder_depends_on_every_weight_that_is_run_and_no_other(tmp_path, write):
    """One bit of a weight changes the folder, if and only if `unfreeze` makes the weight trainable."""
    source = write(tmp_path / "tower")
    tower, processor = load_vision_tower(source), load_image_processor(source)
    folder = folder_of(tower, processor)
    tower.unfreeze()
    for name, parameter in tower.named_parameters():
        bits = parameter.data.view(-1)[-1:].view(torch.int32)
        bits ^= 1
        assert (folder_of(tower, processor) != folder) == parameter.requires_grad, name
        bits ^= 1
    assert folder_of(tower, processor) == folder


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def child(work) -> int:
    """Fork a process that calls `work` and exits with 0 unless it raises; return its id."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return process


def ended_well(process: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_a_cache_in_use_may_be_forked_and_pickled(cache, paths):
    add(cache, paths, [0])
    opened = dict(cache._opened)

    def work() -> None:
        assert same_bits(cache.find(paths[0])[0], features_of(0))
        add(cache, paths, [1])
        assert list(cache._opened) == [os.getppid(), os.getpid()]
        assert cache._opened[os.getpid()].database is not opened[os.getppid()].database

    assert ended_well(child(work))
    assert same_bits(cache.find(paths[1])[0], features_of(1))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy._opened == {} and same_bits(copy.find(paths[1])[0], features_of(1))


def test_processes_write_and_read_at_the_same_time(tmp_path):
    """Two writers with mostly the same images and different features, and two readers. Afterwards all find the features that
    the first writer of an image got, and every image has one row."""
    paths = write_files(tmp_path / "images", 60)

    def write(salt: int) -> None:
        cache, order = new_cache(tmp_path), random.Random(salt)
        for _ in range(60):
            images = order.sample(range(60), 4)
            features = add(cache, paths, images, Encoder(salt))
            assert all(same_bits(cache.find(paths[i])[0], f) for i, f in zip(images, features, strict=True))

    def read() -> None:
        cache, seen, deadline = new_cache(tmp_path), {}, time.monotonic() + 60
        for i in itertools.cycle(range(60)):
            found = cache.find(paths[i])[0]
            assert found is None or any(same_bits(found, features_of(i, salt)) for salt in (1, 2))
            assert found is None or same_bits(seen.setdefault(i, found), found)
            if len(seen) == 60:
                return
            assert time.monotonic() < deadline

    processes = [child(work) for work in (read, lambda: write(1), lambda: write(2), read)]
    add_all = child(
        lambda: add(new_cache(tmp_path), paths, list(range(60)), Encoder(1))
    )  # images that no sample contained
    assert all([ended_well(process) for process in (*processes, add_all)])
    assert len(new_cache(tmp_path)) == 60
    assert (tmp_path / "features" / "features.bin").stat().st_size == 60 * ROW_BYTES


def check_and_complete(tmp_path: Path, paths: list[Path]) -> int:
    """After a kill: check that stored images are correct, the others can be added and no row is lost.

    Returns the number of images stored before.
    """
    cache = new_cache(tmp_path)
    found = [cache.find(path)[0] for path in paths]
    assert all(features is None or same_bits(features, features_of(i)) for i, features in enumerate(found))
    count = sum(features is not None for features in found)
    assert len(cache) == count
    add(cache, paths, list(range(len(paths))))
    assert all(same_bits(cache.find(path)[0], features_of(i)) for i, path in enumerate(paths))
    assert (tmp_path / "features" / "features.bin").stat().st_size == len(paths) * ROW_BYTES
    return count


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_kill_while_writing_a_row_keeps_the_earlier_batches(tmp_path, paths, share, call):
    """At a row of the second batch, number `call` of four, with none, half or all of the row written."""
    add(new_cache(tmp_path), paths, [0, 1])

    def work() -> None:
        pwrite, calls = os.pwrite, itertools.count()

        def killing(handle: int, data, offset: int) -> int:
            if next(calls) < call:
                return pwrite(handle, data, offset)
            pwrite(handle, data[: int(len(data) * share)], offset)
            os.kill(os.getpid(), signal.SIGKILL)

        os.pwrite = killing
        add(new_cache(tmp_path), paths, [2, 3, 4, 5])

    assert not ended_well(child(work))
    assert check_and_complete(tmp_path, paths) == 2


def test_a_kill_at_any_moment_leaves_a_correct_cache(tmp_path):
    """At random moments, also during SQLite's commits. Batches of three are stored completely or not at all."""
    paths, chance, counts = write_files(tmp_path / "images", 300), random.Random(0), []
    for _ in range(12):
        shutil.rmtree(tmp_path / "features", ignore_errors=True)
        reading, writing = os.pipe()

        def work(writing=writing) -> None:
            cache = new_cache(tmp_path)
            len(cache)
            os.write(writing, b"!")
            for first in range(0, 300, 3):
                add(cache, paths, [first, first + 1, first + 2])

        process = child(work)
        os.read(reading, 1)
        time.sleep(chance.uniform(0.0, 0.06))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading), os.close(writing)
        counts.append(check_and_complete(tmp_path, paths))
    assert all(count % 3 == 0 for count in counts) and len(set(counts)) > 3, counts


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_truncated_row_is_damaged_even_if_reused_memory_completes_it(tmp_path, cache, paths, monkeypatch):
    (features,) = add(cache, paths, [0])
    file = tmp_path / "features" / "features.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *_, **__: features.clone())
        assert new_cache(tmp_path).find(paths[0])[0] is None


@pytest.mark.parametrize("damage", ["flipped", "zeros", "short", "gone"])
def test_a_damaged_row_is_encoded_again_and_overwritten(tmp_path, cache, paths, damage):
    add(cache, paths, [0, 1, 2])
    file = tmp_path / "features" / "features.bin"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[2 * ROW_BYTES + 7] ^= 1
    elif damage == "zeros":
        content[2 * ROW_BYTES :] = bytes(ROW_BYTES)
    elif damage == "short":
        del content[-1:]
    file.unlink() if damage == "gone" else file.write_bytes(content)
    cache = new_cache(tmp_path)
    found, key = cache.find(paths[2])
    assert found is None and key == key_of(paths[2])
    encoder = Encoder(salt=1)
    features = add(cache, paths, [0, 2, 1], encoder)
    salts = {0: 1, 2: 1, 1: 1} if damage == "gone" else {0: 0, 2: 1, 1: 0}
    assert encoder.calls == [[image for image, salt in salts.items() if salt]]
    assert same_bits(features, torch.stack([features_of(image, salt) for image, salt in salts.items()]))
    assert all(same_bits(cache.find(paths[image])[0], features_of(image, salt)) for image, salt in salts.items())
    assert file.stat().st_size == 3 * ROW_BYTES and len(cache) == 3


@pytest.mark.parametrize("damage", [lambda _: b"shopping list " * 1000, lambda c: c[:4096] + b"\7" * (len(c) - 4096)])
def test_a_damaged_index_is_an_error_with_advice(tmp_path, cache, paths, damage):
    add(cache, paths, list(range(8)))
    index = tmp_path / "features" / "index.sqlite"
    index.write_bytes(damage(index.read_bytes()))
    attempts = [
        lambda: new_cache(tmp_path).find(paths[0]),
        lambda: add(new_cache(tmp_path), paths, [0]),
        lambda: len(new_cache(tmp_path)),
    ]
    for attempt in attempts:
        with pytest.raises(InputError, match="is damaged.*start again to rebuild it") as error:
            attempt()
        assert str(tmp_path / "features") in str(error.value)
    shutil.rmtree(tmp_path / "features")
    add(new_cache(tmp_path), paths, [0])


def rewritten(*statements: str):
    """Return damage by SQL statements: an index that SQLite reads without complaint."""

    def damage(folder: Path) -> None:
        with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return damage


def overwrite(name: str, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


DAMAGES = {
    "not a database": overwrite("index.sqlite", lambda content: b"shopping list " * 1000),
    "pages": overwrite("index.sqlite", lambda content: content[:4096] + b"\7" * (len(content) - 4096)),
    "newer format": overwrite("index.sqlite", lambda content: content[:18] + b"\x09\x09" + content[20:]),
    "negative place": rewritten("UPDATE pictures SET place = -1 WHERE place = 1"),
    "place beyond every file": rewritten("UPDATE pictures SET place = 4611686018427387904 WHERE place = 1"),
    "gap": rewritten("UPDATE pictures SET place = 3 WHERE place = 1"),
    "text": rewritten("UPDATE pictures SET place = 'x' WHERE place = 1"),
    "checksum": rewritten("UPDATE pictures SET checksum = x'00' WHERE place = 1"),
    "overlap": rewritten(
        "ALTER TABLE pictures RENAME TO old", "CREATE TABLE pictures (digest BLOB, place INTEGER, checksum INTEGER)",
        "INSERT INTO pictures SELECT digest, 0, checksum FROM old", "DROP TABLE old",
    ),
    "trigger": rewritten("CREATE TRIGGER t AFTER INSERT ON paths BEGIN DELETE FROM pictures; END"),
    "view": rewritten("DROP TABLE paths", "CREATE VIEW paths AS SELECT 1 AS path"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index_is_rebuilt_at_the_start(tmp_path, paths, name):
    """And before that it is never a traceback, nor are wrong features found."""
    said: list[str] = []
    folder = tmp_path / "features"
    add(new_cache(tmp_path), paths, [0, 1, 2])
    DAMAGES[name](folder)
    with contextlib.suppress(InputError):
        assert new_cache(tmp_path).find(paths[1])[0] is None
    with contextlib.suppress(InputError):
        assert same_bits(add(new_cache(tmp_path), paths, [1])[0], features_of(1))
    shutil.rmtree(folder)
    add(new_cache(tmp_path), paths, [0, 1, 2])
    DAMAGES[name](folder)
    cache = new_cache(tmp_path, say=said.append)
    cache.repair()
    assert len(said) == 1 and str(folder) in said[0] and "is damaged" in said[0] and "\n" not in said[0]
    assert len(cache) == 0 and same_bits(add(cache, paths, [2, 4])[1], features_of(4))
    new_cache(tmp_path, say=said.append).repair()
    assert len(said) == 1 and len(cache) == 2, "a sound cache stays"


def test_random_damage_of_the_index_is_never_a_traceback(tmp_path, paths):
    chance, folder, kinds = random.Random(0), tmp_path / "features", set()
    add(new_cache(tmp_path), paths, [0, 1, 2, 3])
    sound = (folder / "index.sqlite").read_bytes()
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(chance.choice((1, 3, 30))):
            content[chance.randrange(len(content)) if chance.random() < 0.5 else chance.randrange(120)] = (
                chance.randrange(256)
            )
        (folder / "index.sqlite").write_bytes(content)
        for image in range(6):
            try:
                found = new_cache(tmp_path).find(paths[image])[0]
                assert found is None or same_bits(found, features_of(image))
            except InputError as error:
                kinds.add(str(error))
        cache = new_cache(tmp_path, say=lambda _: None)
        cache.repair()
        assert same_bits(add(cache, paths, [0, 5])[1], features_of(5))
    assert kinds and all("start again to rebuild it" in kind for kind in kinds)


@pytest.mark.parametrize("name", ["features.bin", "index.sqlite", "index.sqlite-journal"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_links_and_special_files_in_the_folder_are_replaced_and_never_followed(tmp_path, paths, name, kind):
    add(new_cache(tmp_path), paths, [0])
    file, precious, said = tmp_path / "features" / name, tmp_path / "precious", []
    file.unlink(missing_ok=True)
    if kind == "link":
        precious.write_bytes(b"my work")
    file.symlink_to(precious) if kind != "fifo" else os.mkfifo(file)
    with pytest.raises(InputError, match=f"{name} is a (symbolic link|special file)"):
        add(new_cache(tmp_path), paths, [1])
    cache = new_cache(tmp_path, say=said.append)
    cache.repair()
    assert same_bits(add(cache, paths, [1])[0], features_of(1)) and len(said) == 1
    assert not file.is_symlink() and (precious.read_bytes() == b"my work" if kind == "link" else not precious.exists())


def test_a_folder_that_is_a_link_is_refused(tmp_path, paths):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "features").symlink_to(tmp_path / "elsewhere")
    for attempt in (FeatureCache.repair, lambda cache: add(cache, paths, [0])):
        with pytest.raises(InputError, match="features: is a symbolic link"):
            attempt(new_cache(tmp_path))
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path, paths):
    (tmp_path / "features").write_text("in the way")
    with pytest.raises(InputError, match="features: the feature cache cannot be used .*train.cache_features=off"):
        new_cache(tmp_path).find(paths[0])


def test_a_cache_locked_by_another_process_is_an_error(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(feature_cache, "LOCKED_SECONDS", 0.05)
    cache = new_cache(tmp_path)
    add(cache, paths, [0])
    with sqlite3.connect(tmp_path / "features" / "index.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert same_bits(cache.find(paths[0])[0], features_of(0)), "a writer does not block readers"
        with pytest.raises(InputError, match="another process has locked the feature cache"):
            add(cache, paths, [1])
        other.execute("ROLLBACK")
        other.execute("BEGIN EXCLUSIVE")
        for attempt in (cache.find, new_cache(tmp_path).find):
            with pytest.raises(InputError, match="another process has locked the feature cache"):
                attempt(paths[0])
        other.execute("ROLLBACK")
    assert same_bits(add(cache, paths, [1])[0], features_of(1))


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def disk_of(room: int):
    """Make an os.pwrite for a disk with `room` bytes left: it writes as many bytes as fit."""
    pwrite = os.pwrite

    def write(handle: int, data, offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = pwrite(handle, data[:room], offset)
        room -= count
        return count

    return write


def fill_rows(cache: FeatureCache, monkeypatch) -> None:
    monkeypatch.setattr(os, "pwrite", disk_of(ROW_BYTES + ROW_BYTES // 2))


def fill_index(cache: FeatureCache, monkeypatch) -> None:
    database = cache._opened[os.getpid()].database
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")


@pytest.mark.parametrize("fill", [fill_rows, fill_index])
def test_a_full_disk_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, fill):
    said, paths = [], write_files(tmp_path / "images", 200)
    cache = new_cache(tmp_path, torch.bfloat16, said.append)
    add(cache, paths, [0, 1])
    fill(cache, monkeypatch)
    everything = list(range(200))
    for salt in (0, 1):
        encoder = Encoder(salt)
        features = add(cache, paths, everything, encoder)
        assert encoder.calls == [everything[2:]]
        expected = [features_of(i, salt if i > 1 else 0).bfloat16() for i in everything]
        assert same_bits(features, torch.stack(expected)), "correct, and rounded like cached features"
    assert len(said) == 1 and str(tmp_path / "features") in said[0]
    assert "No space left" in said[0] or "disk is full" in said[0]
    assert len(cache) == 2 and cache.find(paths[2])[0] is None
    assert same_bits(cache.find(paths[1])[0], features_of(1).bfloat16())

    monkeypatch.undo()  # disk space was freed and the program restarted
    cache = new_cache(tmp_path, torch.bfloat16, said.append)
    add(cache, paths, everything)
    assert len(cache) == 200 and len(said) == 1
    assert all(same_bits(cache.find(paths[i])[0], features_of(i).bfloat16()) for i in everything)
    assert (tmp_path / "features" / "features.bin").stat().st_size == 200 * ROW_BYTES // 2


def test_partial_writes_are_completed(cache, paths, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:7], offset))
    add(cache, paths, [0, 1])
    assert all(same_bits(cache.find(paths[i])[0], features_of(i)) for i in (0, 1))
