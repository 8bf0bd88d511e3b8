"""An image file is checked once, and its verdict is cached while the file stays the same.

Run: python -m pytest tests/dataprocess/test_verify_images.py
"""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataprocess import verify_images
from dataprocess.verify_images import ImageVerifier, Verdict


def jpeg(seed: int) -> bytes:
    """The bytes of a small JPEG, different for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """30 paths: every third file is truncated, every tenth does not exist."""
    (tmp_path / "images").mkdir()
    made = []
    for number in range(30):
        path = tmp_path / "images" / f"{number}.jpg"
        if number % 10:
            path.write_bytes(jpeg(number) if number % 3 else jpeg(number)[:-60])
        made.append(str(path))
    return made


@pytest.fixture
def decoded(monkeypatch) -> list[bytes]:
    """The bytes of all files that were decoded."""
    seen: list[bytes] = []
    verify_image = verify_images.verify_image

    def remember(data: bytes) -> None:
        seen.append(data)
        verify_image(data)

    monkeypatch.setattr(verify_images, "verify_image", remember)
    return seen


def run(cache: Path, paths: list[str], workers: int = 2) -> list[Verdict]:
    with ImageVerifier(cache, workers) as verifier:
        return verifier.verify(paths)


def test_verdicts_have_the_order_of_the_paths_for_any_number_of_workers(tmp_path, paths):
    expected = []
    for number, path in enumerate(paths):
        if number % 10 == 0:
            expected.append(("", "missing_image"))
        else:
            digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
            expected.append((digest, "" if number % 3 else "unreadable_image"))
    one, four = (run(tmp_path / f"{workers}.sqlite", paths, workers) for workers in (1, 4))
    assert [verdict[:2] for verdict in one] == expected and one == four
    assert all(bool(verdict.detail) == bool(verdict.reason) for verdict in one)
    assert run(tmp_path / "1.sqlite", paths[::-1]) == one[::-1]
    assert run(tmp_path / "new.sqlite", [paths[1], paths[2], paths[1]]) == [one[1], one[2], one[1]]


def test_a_second_run_decodes_nothing(tmp_path, paths, decoded):
    first = run(tmp_path / "c.sqlite", paths)
    assert len(decoded) == 27
    assert run(tmp_path / "c.sqlite", paths) == first
    assert len(decoded) == 27


def test_a_changed_file_is_verified_again(tmp_path, paths, decoded):
    before = run(tmp_path / "c.sqlite", paths)
    Path(paths[1]).write_bytes(b"no image")  # another size
    same_size = Path(paths[2]).read_bytes()[:-1] + b"\0"
    Path(paths[2]).write_bytes(same_size)
    os.utime(paths[2], ns=(1, 1))  # another time
    decoded.clear()
    after = run(tmp_path / "c.sqlite", paths)
    assert sorted(decoded) == sorted([b"no image", same_size])
    assert after[1].reason == "unreadable_image" and after[1].digest != before[1].digest
    assert after[3:] == before[3:]
    Path(paths[10]).write_bytes(jpeg(10))  # was missing, which is not cached
    assert run(tmp_path / "c.sqlite", paths)[10].reason == ""


def test_equal_bytes_have_equal_digests_under_any_name(tmp_path):
    for name in ("a.jpg", "b.png", "c"):
        (tmp_path / name).write_bytes(jpeg(0))
    with ImageVerifier(tmp_path / "c.sqlite") as verifier:
        verdicts = verifier.verify([str(tmp_path / name) for name in ("a.jpg", "b.png", "c")])
    digest = hashlib.blake2b(jpeg(0), digest_size=16).hexdigest()
    assert verdicts == [Verdict(digest, "", "")] * 3


def test_changed_detects_any_changed_or_removed_file(tmp_path, paths):
    def changed() -> bool:
        with ImageVerifier(tmp_path / "c.sqlite") as verifier:
            return verifier.changed()

    run(tmp_path / "c.sqlite", paths)
    assert not changed()
    os.utime(paths[1], ns=(1, 1))
    assert changed() and changed()
    run(tmp_path / "c.sqlite", paths)
    assert not changed()
    os.unlink(paths[2])
    assert changed()


def test_a_removed_file_is_deleted_from_the_cache_after_a_complete_run(tmp_path, paths):
    run(tmp_path / "c.sqlite", paths)
    os.unlink(paths[1])
    with pytest.raises(KeyboardInterrupt), ImageVerifier(tmp_path / "c.sqlite") as verifier:
        assert verifier.changed()
        raise KeyboardInterrupt
    with ImageVerifier(tmp_path / "c.sqlite") as verifier:
        assert verifier.changed()
        verifier.verify(paths[2:])
    with ImageVerifier(tmp_path / "c.sqlite") as verifier:
        assert not verifier.changed()


def test_verdicts_before_an_interrupt_are_kept(tmp_path, paths, monkeypatch, decoded):
    counting = verify_images.verify_image

    def interrupted(data):
        if len(decoded) == 20:
            raise KeyboardInterrupt
        counting(data)

    monkeypatch.setattr(verify_images, "verify_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c.sqlite", paths, workers=1)
    monkeypatch.setattr(verify_images, "verify_image", counting)
    run(tmp_path / "c.sqlite", paths)
    assert 27 <= len(decoded) <= 27 + verify_images.PATHS_PER_TASK


def test_a_file_that_changes_while_it_is_read_is_not_cached(tmp_path, monkeypatch, decoded):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(0))

    def read_and_change(path, real=verify_images.image_bytes):
        data = real(path)
        os.utime(path, ns=(1, 1))
        return data

    with monkeypatch.context() as context:
        context.setattr(verify_images, "image_bytes", read_and_change)
        assert run(tmp_path / "c.sqlite", [str(path)])[0].reason == ""
    run(tmp_path / "c.sqlite", [str(path)])
    assert len(decoded) == 2


def test_out_of_memory_is_not_cached(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(0))

    def no_memory(*_):
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr("PIL.ImageFile.ImageFile.load", no_memory)
        assert "memory" in run(tmp_path / "c.sqlite", [str(path)])[0].detail
    assert run(tmp_path / "c.sqlite", [str(path)])[0].reason == ""


# --- the cache file


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbled(content: bytes) -> bytes:
    return content[:4096] + bytes(len(content) - 4096)


@pytest.mark.parametrize("damage", [half, garbled, lambda _: b"shopping list " * 100, lambda _: b""])
def test_a_damaged_cache_is_replaced(tmp_path, paths, decoded, damage):
    cache = tmp_path / "c.sqlite"
    first = run(cache, paths)
    cache.write_bytes(damage(cache.read_bytes()))
    decoded.clear()
    assert run(cache, paths) == first and len(decoded) == 27
    assert run(cache, paths) == first and len(decoded) == 27


def test_damage_found_later_is_no_error(tmp_path, paths):
    cache = tmp_path / "c.sqlite"
    with ImageVerifier(cache, 2) as verifier:
        first = verifier.verify(paths)
        cache.write_bytes(b"shopping list" * 1000)
        assert verifier.verify(paths) == first
    assert run(cache, paths) == first


def test_a_cache_of_another_version_is_not_used(tmp_path, paths, monkeypatch, decoded):
    run(tmp_path / "c.sqlite", paths)
    monkeypatch.setattr(verify_images, "VERSION", verify_images.VERSION + 1)
    run(tmp_path / "c.sqlite", paths)
    assert len(decoded) == 54


def test_tables_of_another_program_stay(tmp_path, paths):
    cache = tmp_path / "c.sqlite"
    with sqlite3.connect(cache) as other:
        other.execute("CREATE TABLE recipes AS SELECT 'cake' AS name")
    first = run(cache, paths)
    assert run(cache, paths) == first
    with sqlite3.connect(cache) as other:
        assert other.execute("SELECT name FROM recipes").fetchall() == [("cake",)]


def test_without_a_writable_file_the_cache_is_in_memory(tmp_path, paths, decoded):
    (tmp_path / "file").touch()
    for impossible in (tmp_path / "file" / "c.sqlite", tmp_path / "none" / "c.sqlite", tmp_path):
        decoded.clear()
        with ImageVerifier(impossible, 2) as verifier:
            first = verifier.verify(paths)
            assert verifier.verify(paths) == first and len(decoded) == 27
            assert not verifier.changed()


def test_a_cache_locked_by_another_process_is_no_error(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(verify_images, "LOCKED_SECONDS", 0.05)
    first = run(tmp_path / "c.sqlite", paths[:15])
    with sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert run(tmp_path / "c.sqlite", paths[:15]) == first
        other.execute("COMMIT")
    with sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")  # allows reading, blocks writing
        assert run(tmp_path / "c.sqlite", paths)[:15] == first
    assert run(tmp_path / "c.sqlite", paths)[:15] == first


def test_two_processes_share_one_cache(tmp_path, paths):
    code = (
        "import sys; from pathlib import Path; from dataprocess.verify_images import ImageVerifier\n"
        "with ImageVerifier(Path(sys.argv[1]), 1) as verifier:\n"
        "    for path in sys.argv[2:]: verifier.verify([path])"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path / "c.sqlite")]
    children = [subprocess.Popen([*command, *part], cwd=root) for part in (paths, paths[::-1])]
    assert [child.wait() for child in children] == [0, 0]
    with sqlite3.connect(tmp_path / "c.sqlite") as rows:
        assert rows.execute("SELECT count(*) FROM verdicts").fetchone() == (27,)


def test_file_names_that_are_not_unicode_or_not_possible(tmp_path, decoded):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    Path(strange).write_bytes(jpeg(0))
    names = [strange, str(tmp_path / "a\0b"), str(tmp_path / "\ud800"), str(tmp_path), ""]
    reasons = ["", "missing_image", "missing_image", "unreadable_image", "missing_image"]
    for _ in range(2):
        assert [verdict.reason for verdict in run(tmp_path / "c.sqlite", names)] == reasons
    assert len(decoded) == 1
