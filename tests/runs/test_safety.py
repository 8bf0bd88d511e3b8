"""A run uses no network, writes only into its folders and unpickles nothing; the same command makes the same files.
`sh tests/run.sh tests/runs/test_safety.py`

The scripts run as a user starts them, in separate processes, under tests/guard/sitecustomize.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import test as script
from tests.guard import ROOT, guarded
from tests.toy_project import run_training, write_project

VARY = {"samples_per_s", "tokens_per_s", "peak_memory_mb"}  # keys of metrics.jsonl that differ between equal runs
STARTS = ["manifest.json", "run.json"]  # run.json records time and command of the start, manifest.json its hash


def python(folder: Path, environment: dict[str, str], *words: str) -> str:
    """Run Python under guard, assert that nothing was refused and the exit code is 0, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder / "elsewhere", env=environment, capture_output=True, text=True
    )
    log = folder / "refused.jsonl"
    assert not log.exists(), log.read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Everything that a user does with a config, in one process because starting Python takes longest. It writes into the
# folders of the run and the data only.
DRIVE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from dataprocess import process_image
from dataset import show
from tests.toy_project import run_training
config, images = sys.argv[1:]
sys.argv = ["process_image", "--config", config]
assert not process_image.main()
assert show.main(["--config", config, "--count", "4"]) == 0
assert run_training(config, "--check") == 0
import test
assert test.main(["--config", config, images, "--question", "What is it?"]) == 0
assert test.main(["--config", config, "--qa", config.replace("config.yaml", "data/validation.jsonl")]) == 0
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, the project's files with their times before the runs).

    `python train.py` ran twice, with different hash seeds: `folder/first` is the first run's folder and
    `folder/project/run` the second one's. DRIVE ran after that.
    """
    folder = tmp_path_factory.mktemp("guarded")
    project = folder / "project"
    config = write_project(project)
    values = yaml.safe_load(config.read_text())
    values["data"] |= {"qa_file": "data/qa.jsonl", "validation_file": "data/validation.jsonl"}
    values["train"]["num_workers"] = 2
    config.write_text(yaml.safe_dump(values))
    before = {path: path.lstat().st_mtime_ns for path in project.rglob("*")}
    writable = [project / "run", project / "data"]
    train = str(ROOT / "train.py"), "--config", str(config)
    python(folder, guarded(folder, writable, 1), *train)
    (project / "run").rename(folder / "first")
    python(folder, guarded(folder, writable, 2), *train)
    python(folder, guarded(folder, writable), "-c", DRIVE, str(config), str(project / "images"))
    return folder, before


# ---------------------------------------------------------------------------------------------------------------------
# The guard itself


@pytest.mark.parametrize(
    "what, code",
    [
        ("network", "import socket; socket.create_connection(('127.0.0.1', 9))"),
        ("network", "import socket; socket.socket().connect(('127.0.0.1', 9))"),
        ("network", "import socket; socket.socket().bind(('127.0.0.1', 0))"),
        ("network", "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'a', ('127.0.0.1', 9))"),
        ("network", "import urllib.request; urllib.request.urlopen('http://localhost')"),
        ("network", "import os, socket; os.fork() or socket.gethostbyname('localhost'); assert not os.wait()[1]"),
        ("network", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; "
                    "socket.gethostbyname(chr(97))'], check=True)"),
        ("write", "open('a', 'w')"),
        ("write", "import os; os.open('a', os.O_CREAT)"),
        ("write", "import os; os.mkdir('a')"),
        ("write", "import os; os.rename(os.environ['TMPDIR'] + '/there', 'a')"),
        ("write", "import os; os.symlink('a', 'b')"),
        ("write", "import os; os.symlink(os.getcwd(), os.environ['TMPDIR'] + '/out'); "
                  "open(os.environ['TMPDIR'] + '/out/a', 'w')"),
        ("write", "import os; os.unlink('../home')"),
        ("write", "import shutil; shutil.rmtree('../home')"),
        ("pickle", "import pickle; pickle.loads(b'cos\\nsystem\\n.')"),
    ],
)  # fmt: skip
def test_the_guard_refuses(tmp_path, what, code):
    """The process gets an error, the log a line in case the error is caught, and nothing is done."""
    environment = guarded(tmp_path, [])
    (tmp_path / "temp" / "there").touch()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "Refused" in done.stderr
    assert json.loads((tmp_path / "refused.jsonl").read_text().splitlines()[0])[0] == what
    assert list((tmp_path / "elsewhere").iterdir()) == [] and (tmp_path / "home").exists()


def test_the_guard_permits_the_allowed(tmp_path):
    code = (
        "import os, pickle, socket, tempfile; open(tempfile.mkdtemp() + '/a', 'w').close(); "
        "a, b = socket.socketpair(); a.send(b'x'); pickle.loads(pickle.dumps({'a': [1, None]})); open('/dev/null', 'w')"
    )
    python(tmp_path, guarded(tmp_path, []), "-c", code)


# ---------------------------------------------------------------------------------------------------------------------
# Under the guard


def test_nothing_is_written_outside_the_run_the_data_and_the_cache(runs):
    """The guard has refused nothing (`python` asserts that). It does not see writes of C and Rust libraries, so all
    files around are compared too."""
    folder, before = runs
    project = folder / "project"
    after = {path: path.lstat().st_mtime_ns for path in project.rglob("*")}
    made = {path.relative_to(project).parts[0] for path in after if path not in before}
    assert made == {"run", "data"}
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed == set()
    assert list((folder / "elsewhere").iterdir()) == []
    assert {path.name for path in (folder / "home").iterdir()} <= {".cache", ".config"}
    assert [path for path in (folder / "home" / ".config").rglob("*") if not path.is_dir()] == []
    # the loader's workers leave the sockets over which they sent tensors, torch's compiler an empty folder
    assert {re.sub("[-_].*", "", path.name) for path in (folder / "temp").iterdir()} <= {"pymp", "torchinductor"}
    assert [path for path in (folder / "temp").rglob("*") if path.is_file()] == []
    assert {"answers.jsonl", "answers.html"} <= set(os.listdir(project / "run" / "answers"))
    assert (project / "run" / "show.html").exists()


def test_no_file_of_a_run_is_a_pickle(runs):
    folder, _ = runs
    known = {".safetensors", ".json", ".jsonl", ".yaml", ".png", ".html", ".jinja", ".txt", ""}
    for name, content in files(folder / "project" / "run").items():
        assert Path(name).suffix in known, name
        assert not content.startswith((b"\x80", b"PK")), name


def test_torch_load_is_never_called(tmp_path, monkeypatch):
    """Not in training, resuming or answering."""
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("torch.load or torch.save"))
    config = write_project(tmp_path, images=8)
    quick = ("train.eval_steps=null", "train.save_steps=1", "train.score_samples=1")
    assert run_training(config, *quick, "train.max_steps=2") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert run_training(config, *quick, "train.max_steps=2") == 0
    assert script.main(["--config", str(config), "--question", "What is it?"]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Reproducibility


def test_the_same_command_makes_the_same_metrics(runs):
    folder, _ = runs

    def rows(run: Path) -> list[dict]:
        text = (run / "metrics.jsonl").read_text()
        return [{k: v for k, v in json.loads(line).items() if k not in VARY} for line in text.splitlines()]

    first, second = rows(folder / "first"), rows(folder / "project" / "run")
    assert first == second
    assert [row["step"] for row in first if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert sum("val_loss" in row for row in first) == 2


@pytest.mark.parametrize("name", ["samples.jsonl", "final", "best", "checkpoint-3", "checkpoint-6"])
def test_the_same_command_makes_the_same_bytes(runs, name):
    """Every file (weights, optimizer, scores, tokenizer, config, ...) except the record of the start and its hash."""
    folder, _ = runs
    paths = [folder / "first" / name, folder / "project" / "run" / name]
    if name.endswith(".jsonl"):
        assert paths[0].read_bytes() == paths[1].read_bytes() != b""
        return
    first, second = map(files, paths)
    assert first.keys() == second.keys() >= {"run.json", "config.yaml", "adapter_config.json", "projector.safetensors"}
    assert [name for name in first if first[name] != second[name]] == STARTS
    hashes = [json.loads(found["manifest.json"])["files"] for found in (first, second)]
    assert {name for name in hashes[0] if hashes[0][name] != hashes[1][name]} <= {"run.json"}


def test_the_trained_folder_records_its_start_without_secrets(runs):
    folder, _ = runs
    run = folder / "project" / "run"
    (entry,) = json.loads((run / "final" / "run.json").read_text())
    assert entry["command"][0].endswith("train.py") and "--config" in entry["command"]
    assert {"python", "torch", "transformers", "peft"} <= set(entry["versions"])
    assert "git_commit" in entry and len(entry["qa_sha256"]) == 64 and entry["step"] == 0
    assert (run / "final" / "run.json").read_bytes() == (run / "run.json").read_bytes()
    holding = [name for name, content in files(run).items() if b"do-not-write-this-down" in content]
    assert holding == []
