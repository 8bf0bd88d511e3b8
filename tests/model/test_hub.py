"""The hub is asked once, shortly and before any work. Run: sh tests/run.sh tests/model/test_hub.py"""

from __future__ import annotations

import http.server
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

import dataset.show
import train
from config import InputError, load_config
from model import hub
from tests.toy_language import write_qwen2
from tests.toy_project import fresh_accelerate, run_training, write_project

ANSWERS = {  # name -> what the hub answers about it: status, error code
    "some/model": (200, ""),
    "some/gated": (403, "GatedRepo"),
    "some/unknown": (401, "RepoNotFound"),
    "some/parts": (404, "EntryNotFound"),
    "some/broken": (503, ""),
    "some/busy": (429, ""),
    "some/portal": (302, ""),
}


def set_endpoint(monkeypatch, address: str) -> None:
    """Set what huggingface_hub reads from HF_ENDPOINT when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_PRINTED", set())


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[str]]:
    """A hub on this machine. Yields the names that it was asked for."""
    names: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            names.append("/".join(self.path.split("/")[1:3]))
            status, code = ANSWERS[names[-1]]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/login")
            elif code:
                self.send_header("X-Error-Code", code)
            elif status == 200:
                self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield names
    server.shutdown()


@pytest.fixture
def unreachable(monkeypatch) -> None:
    set_endpoint(monkeypatch, "http://127.0.0.1:9")  # where nothing listens


def model_config(tmp_path, *overrides: str):
    path = write_project(tmp_path)
    return load_config(path, overrides).model


def fill_cache(tmp_path, monkeypatch, name: str) -> None:
    """Put a toy model into the cache of the hub, as a download would."""
    repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    write_qwen2(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)


def test_folders_need_no_hub(tmp_path, asked):
    hub.check_hub(model_config(tmp_path))
    assert asked == []


@pytest.mark.parametrize("name", ["some/model", "some/parts"])
def test_a_hub_that_answers_is_asked_once_for_each_name(tmp_path, asked, name):
    models = [model_config(tmp_path, f"model.vision_tower={name}", "model.language_model=some/model")] * 2
    hub.check_hub(*models)
    assert asked == sorted({name, "some/model"}) and not constants.HF_HUB_OFFLINE
    hub.check_hub(*models)
    assert asked.count("some/model") == 1


@pytest.mark.parametrize(
    "name, words",
    [
        ("some/gated", "some/gated: its owner gives it out after a request.*hf auth login"),
        ("some/unknown", "some/unknown: not a folder, and the hub .* has no such model.*relative to the config"),
        (
            "some/broken",
            "some/broken: neither a folder nor on this machine.*503.*HF_ENDPOINT=.*modelscope download --model",
        ),
        ("some/busy", "does not answer .*429"),
        ("some/portal", "does not answer .something else answers"),
    ],
)
def test_every_other_answer_is_explained(tmp_path, asked, name, words):
    with pytest.raises(InputError, match=words):
        hub.check_hub(model_config(tmp_path, f"model.language_model={name}"))
    assert len(asked) == 1


def test_without_the_hub_what_is_cached_is_read_and_nothing_else_is_tried(tmp_path, monkeypatch, unreachable, capsys):
    model = model_config(tmp_path, "model.language_model=some/model")
    fill_cache(tmp_path, monkeypatch, "some/model")
    hub.check_hub(model)
    assert constants.HF_HUB_OFFLINE and "some/model: read from the local cache" in capsys.readouterr().out
    hub.check_hub(model)  # HF_HUB_OFFLINE=1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().out
    hub.check_hub(model)
    assert capsys.readouterr().out == ""  # once


def test_without_the_hub_training_stops_before_data_are_prepared_and_says_what_to_do(tmp_path, unreachable):
    path, start = write_project(tmp_path), time.monotonic()
    for arguments in ([], ["--check"]):
        with pytest.raises(InputError) as refused:
            run_training(path, "model.language_model=some/model", *arguments)
        message = str(refused.value)
        assert "some/model: neither a folder nor on this machine" in message and "http://127.0.0.1:9" in message
        for way in (
            "Give a folder",
            "HF_ENDPOINT=https://hf-mirror.com",
            f"{sys.executable} -m pip install modelscope",
        ):
            assert way in message
        program = os.path.join(os.path.dirname(sys.executable), "modelscope")
        assert f"{program} download --model some/model --local_dir model" in message
    with pytest.raises(InputError, match="neither a folder"):
        dataset.show.main(["--config", str(path), "model.vision_tower=some/model"])
    assert not (tmp_path / "qa.jsonl").exists() and not (tmp_path / "run").exists()
    assert time.monotonic() - start < 60  # retries take minutes


def test_every_stage_is_checked_before_the_first_one_trains(tmp_path, unreachable):
    path = write_project(tmp_path)
    values = {"name": "last", "train": {}}
    stages = json.dumps([{"name": "first"}, values])
    with fresh_accelerate(), pytest.raises(InputError, match="some/model: neither a folder"):
        train.main(["--config", str(path), f"train.stages={stages}", "model.vision_tower=some/model"])


def test_an_encoder_that_the_hub_does_not_have_is_named_before_data_are_prepared(tmp_path, asked):
    path = write_project(tmp_path)
    with pytest.raises(InputError, match="some/unknown: not a folder, and the hub .* has no such model"):
        run_training(path, "model.vision_tower=some/unknown")
    assert asked == ["some/unknown"] and not (tmp_path / "qa.jsonl").exists() and not (tmp_path / "run").exists()


def test_whatever_may_download_asks_the_hub_first(tmp_path, asked):
    """hub_access: test.py, model.load, model.export and the others that open a checkpoint."""
    model = model_config(tmp_path, "model.language_model=some/unknown")
    for own, allowed in (({"some/unknown"}, False), (set(), True)):
        with pytest.raises(InputError, match="has no such model"), hub.hub_access(model, own, allowed):
            pytest.fail("went on")
    assert asked == ["some/unknown"] * 2
    with pytest.raises(InputError, match="--allow-download"), hub.hub_access(model, set(), False):
        pytest.fail("went on")
    assert asked == ["some/unknown"] * 2
