"""Safe opening of files: no write follows a link, and no read waits for a pipe or a device."""

from __future__ import annotations

import importlib
import os

import pytest

from config import InputError
from config.files import make_folder, open_append, open_new, open_regular, refuse_pointers, write_whole
from visual.encoders import load_vision_tower


@pytest.fixture
def link(tmp_path):
    """A link to a file elsewhere, which must keep its content."""
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "file"
    path.symlink_to("../elsewhere")
    yield path
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_new_file_replaces_a_link(link):
    with open_new(link) as file:
        file.write(b"new")
    assert not link.is_symlink() and link.read_text() == "new"


@pytest.mark.parametrize("name", ["file", "other"])
def test_a_whole_write_replaces_links(link, name):
    """The file's name, or the name under which the content is first written, is a link."""
    link.with_name(".other.partial").symlink_to("../elsewhere")
    path = link.with_name(name)
    write_whole(path, "neu ü")
    assert not path.is_symlink() and path.read_text(encoding="utf-8") == "neu ü"
    assert not link.with_name(f".{name}.partial").exists()


def test_appending_and_making_a_folder_refuse_a_link(link):
    with pytest.raises(InputError, match="is a symbolic link"):
        open_append(link)
    with pytest.raises(InputError, match="is a symbolic link"):
        make_folder(link)


def test_appending_adds_to_a_file(tmp_path):
    for _ in range(2):
        with open_append(tmp_path / "rows") as file:
            file.write(b"row\n")
    assert (tmp_path / "rows").read_text() == "row\nrow\n"


@pytest.mark.parametrize("opening", [open_regular, open_append])
def test_pipes_and_devices_are_refused(tmp_path, opening):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero" if opening is open_regular else tmp_path / "pipe"):
        with pytest.raises(InputError, match="special file"):
            opening(path)
    with pytest.raises(IsADirectoryError):
        opening(tmp_path)


def test_reading_follows_a_link(link):
    with open_regular(link) as file:
        assert file.read() == b"mine"


@pytest.mark.parametrize("load", ["qwen.tokenizer.load_tokenizer", "qwen.modeling.load_language_model"])
@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_in_a_models_folder_is_named(tmp_path, load, file):
    refuse_pointers(tmp_path)
    (tmp_path / file).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    (tmp_path / "vocab.json").write_text("{}")
    module, name = load.rsplit(".", 1)
    for function in (refuse_pointers, getattr(importlib.import_module(module), name), load_vision_tower):
        with pytest.raises(InputError, match=f"{file}: is a git-lfs pointer, .* git lfs pull"):
            function(tmp_path)
