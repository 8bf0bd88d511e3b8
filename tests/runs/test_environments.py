"""Every script under every environment: a full disk, a read-only folder, other locales, closed or full streams, no HOME, a
tiny terminal, missing packages, interrupts. It ends with its result, or with a message and exit code 2; never with a
traceback.

Run: sh tests/run.sh tests/runs/test_environments.py
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import io
import itertools
import json
import os
import pwd
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dataprocess.process_image
import dataprocess.train_tokenizer
import dataset.show
import model.export.__main__ as export
import test
import train
import training.log
from config import InputError, run_script
from config.errors import explain_fault
from tests.toy_project import fresh_accelerate, write_project

ROOT = Path(__file__).parent.parent.parent
ODD = "图😀é"  # no encoding but UTF-8 and GB18030 has all three


class Outcome(NamedTuple):
    code: object
    out: str
    err: str


def run(
    main: Callable[[], int | None], *arguments: object, encoding: str = "utf-8", sink: str | None = None
) -> Outcome:
    """Run a script's main in this process, with streams of an encoding. sink: "full" for a stdout that cannot be written,
    "closed" for none."""
    out = io.TextIOWrapper(open("/dev/full", "wb") if sink == "full" else io.BytesIO(), encoding)  # noqa: SIM115
    err = io.TextIOWrapper(io.BytesIO(), encoding)
    with pytest.MonkeyPatch.context() as patch, fresh_accelerate(), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["script", *map(str, arguments)])
        patch.setattr(sys, "stdout", None if sink == "closed" else out)
        patch.setattr(sys, "stderr", err)
        run_script(main)
    code = ended.value.code or 0
    err.flush()
    return Outcome(code, "" if sink else _text(out), _text(err))


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(stream.encoding)


def assert_explained(outcome: Outcome, *words: str) -> None:
    """The script failed with one line on stderr that has these words."""
    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in outcome.err, outcome.err
    assert all(word in lines[0] for word in words), lines[0]


class Project(NamedTuple):
    folder: Path
    final: Path  # of a finished run

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    def scripts(self, output: Path) -> dict[str, tuple]:
        """Return every script that makes something: name -> its main and arguments, to write into `output`."""
        config = ("--config", self.config)
        trains = (*config, f"output_dir={output}", "train.cache_features=off", "train.max_steps=1")
        image, qa = self.folder / "images" / "0.png", self.folder / "validation.jsonl"
        tokenizer = ("--qa", self.folder / "qa.jsonl", "--vocab-size", 300, "--output", output / "tokenizer")
        asks = ("--checkpoint", self.final, "--output", output / "answers")
        return {
            "prepare": (dataprocess.process_image.main, *config),
            "check": (train.main_with_messages, "--check", *trains),
            "train": (train.main_with_messages, *trains),
            "show": (dataset.show.main, *trains),
            "tokenizer": (dataprocess.train_tokenizer.main, *tokenizer),
            "ask": (test.main_with_messages, *asks, image, "--question", ODD),
            "score": (test.main_with_messages, *asks, "--qa", qa),
            "export": (export.main_with_messages, "--checkpoint", self.final, "--output", output / "export"),
        }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Project:
    """A prepared project with a finished run, whose records have characters of many scripts."""
    folder = tmp_path_factory.mktemp("environments")
    project = Project(folder / "project", folder / "run" / "final")
    write_project(project.folder)
    annotations = project.folder / "train.json"
    records = json.loads(annotations.read_text())
    records[0]["conversations"][1]["value"] = f"{ODD} \u2028 \x1b[1m"
    annotations.write_text(json.dumps(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.log, "draw_curves", lambda runs, image: None)
        main, *arguments = project.scripts(folder / "run")["train"]
        assert run(main, *arguments).code == 0
    return project


@pytest.fixture
def project(trained, tmp_path, monkeypatch) -> Project:
    """A copy that a test may break, prepared at its place."""
    monkeypatch.setattr(training.log, "draw_curves", lambda runs, image: None)
    monkeypatch.setattr(export.Export, "prove", lambda self, folder: pytest.fail("nothing may be exported here"))
    copy = Project(shutil.copytree(trained.folder, tmp_path / "project"), trained.final)
    main, *arguments = copy.scripts(tmp_path)["prepare"]
    assert run(main, *arguments).code == 0
    return copy


def forget_preparation(project: Project, index_only: bool = False) -> None:
    for path in project.folder.glob("*.index.safetensors" if index_only else "*qa.*"):
        path.unlink()
    if not index_only:
        (project.folder / "validation.jsonl").unlink()


def partials(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.partial") if path.is_file()]


# ---------------------------------------------------------------------------------------------------------------------
# Disks


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("process", ctypes.c_int)]


class _Capabilities(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Forbid writing below `folder`, also to root, whose right to ignore permissions is put away for this thread."""
    folders = [Path(root) for root, _, _ in os.walk(folder)]
    libc, header, found = ctypes.CDLL(None), _Header(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(ctypes.byref(header), found) == 0
    before = found[0].effective
    for path in folders:
        path.chmod(0o555)
    found[0].effective = before & ~0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    assert libc.capset(ctypes.byref(header), found) == 0
    try:
        with pytest.raises(PermissionError):
            (folder / "probe").touch()
        yield
    finally:
        found[0].effective = before
        assert libc.capset(ctypes.byref(header), found) == 0
        for path in folders:
            path.chmod(0o755)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, for Python and for libraries in other languages."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_prepared_data_without_an_index_on_a_read_only_disk_are_used(project, tmp_path):
    forget_preparation(project, index_only=True)
    scripts = project.scripts(tmp_path / "out")
    for name in ("prepare", "train", "show", "tokenizer"):
        main, *arguments = scripts[name]
        with read_only(project.folder):
            outcome = run(main, *arguments)
        assert outcome.code == 0, (name, outcome.err)
    assert not list(project.folder.glob("*.index.safetensors"))


def test_where_nothing_can_be_written_every_script_says_where(project, tmp_path):
    (tmp_path / "out" / "answers").mkdir(parents=True)
    for is_prepared in (True, False):
        if not is_prepared:
            forget_preparation(project)
        for name, (main, *arguments) in project.scripts(tmp_path / "out").items():
            with read_only(tmp_path):
                outcome = run(main, *arguments)
            if is_prepared and name in ("prepare", "check"):  # they have nothing to write
                assert outcome.code == 0, (name, outcome.err)
            elif is_prepared or name in ("prepare", "check", "train", "show", "ask", "export"):
                assert_explained(outcome, "Permission denied", str(tmp_path))
    assert not partials(tmp_path)


@pytest.mark.parametrize("size", [0, 1000])
def test_on_a_full_disk_every_script_says_so(project, tmp_path, size):
    scripts = project.scripts(tmp_path / "out")
    del scripts["check"]  # with prepared data it writes nothing
    tokenizer, score = scripts.pop("tokenizer"), scripts.pop("score")
    for name, (main, *arguments) in {"tokenizer": tokenizer, "score": score, **scripts}.items():
        if name == "prepare":
            forget_preparation(project)
        with file_size_limit(size):
            outcome = run(main, *arguments)
        assert_explained(outcome, str(tmp_path) if name != "tokenizer" else "a file")
        assert "would exceed" in outcome.err or "cannot be written" in outcome.err
    assert not partials(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE])
def test_a_fault_of_the_disk_is_named(number, tmp_path):
    reason = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is exceeded"}.get(
        number, os.strerror(number)
    )
    partial = str(tmp_path / ".a.b.0123abcd.partial")
    for error in (OSError(number, "?", partial), OSError(number, "?"), Exception(f"? (os error {number})")):
        message = explain_fault(error)
        assert message and reason in message
        assert str(tmp_path / "a.b") in message or "a file" in message
    assert explain_fault(ValueError("no file")) is None and explain_fault(OSError("no number")) is None


# ---------------------------------------------------------------------------------------------------------------------
# Terminals and homes


@pytest.mark.parametrize("encoding, sink", [("ascii", None), ("latin-1", None), ("utf-8", "closed"), ("utf-8", "full")])
def test_any_terminal_will_do(project, tmp_path, monkeypatch, encoding, sink):
    monkeypatch.setenv("COLUMNS", "5")
    monkeypatch.setenv("LINES", "1")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: (_ for _ in ()).throw(KeyError("uid not found")))
    scripts = project.scripts(tmp_path / "out")
    del scripts["export"]
    if encoding != "ascii":
        scripts = {name: scripts[name] for name in ("prepare", "show", "ask")}
    for name, (main, *arguments) in scripts.items():
        outcome = run(main, *arguments, encoding=encoding, sink=sink)
        if sink == "full":
            assert_explained(outcome, "standard output")
        else:
            assert outcome.code == 0, (name, outcome.err)
        if name == "ask" and encoding != "utf-8":
            assert "\\u56fe\\U0001f600" in outcome.out
    for main in (main for main, *_ in scripts.values()):
        for arguments in (["--help"], ["--no-such-option"], [f"{ODD}=1"]):
            outcome = run(main, *arguments, encoding=encoding, sink=sink)
            assert "Traceback" not in outcome.err and outcome.code == (
                2 if sink == "full" or arguments != ["--help"] else 0
            )


def test_help_fits_any_width(monkeypatch):
    mains = [main for main, *_ in Project(Path(), Path()).scripts(Path()).values()]
    for width, main in itertools.product((1, 5, 11, 20, 40, 60, 79, 100, 139), mains):
        monkeypatch.setenv("COLUMNS", str(width))
        assert run(main, "--help").out.startswith("usage:")


def test_a_locale_without_utf8_opens_files_of_any_name(tmp_path):
    """In a process of its own: Python chooses the encoding of file names when it starts."""
    write_project(tmp_path)
    config = (tmp_path / "config.yaml").rename(tmp_path / f"{ODD}.yaml")
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / f"{ODD}.png")
    annotations = tmp_path / "train.json"
    annotations.write_text(annotations.read_text().replace('"0.png"', json.dumps(f"{ODD}.png")))
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "dataprocess.process_image", "--config", str(config), "data.max_refused=0"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, **locale}, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.isascii() and ODD in (tmp_path / "qa.jsonl").read_text(encoding="utf-8")


def start(script: str, *arguments: str) -> None:
    """Start a script as `python SCRIPT ...` or `python -m MODULE ...` does, in this process, until its own imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        if script.endswith(".py"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)


SCRIPTS = [
    "train.py", "test.py", "dataset.show", "model.export", "dataprocess.process_image", "dataprocess.train_tokenizer",
    "demo.draw", "demo.emoji", "demo.emoji_report", "demo.pretrain_backbones", "demo.real_parts",
    "model.import_checkpoint",
]  # fmt: skip
QUICK = [
    "train.py",
    "test.py",
    "dataset.show",
    "model.export",
    "demo.emoji_report",
    "demo.pretrain_backbones",
    "demo.real_parts",
    "model.import_checkpoint",
]  # these check their arguments first


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_argument_that_is_not_utf8_is_named(script, capsys):
    with pytest.raises(SystemExit) as ended:
        start(script, "--question", "caf\udce9")
    assert ended.value.code == 2
    assert 'error: the argument "caf\\udce9" is not UTF-8 text' in capsys.readouterr().err


def test_a_question_that_is_not_text_is_refused_without_the_command_line_too(project, tmp_path):
    main, *arguments = project.scripts(tmp_path)["ask"]
    assert_explained(run(main, *arguments, "--question", "\ud800"), "\\ud800", "is not UTF-8")


# ---------------------------------------------------------------------------------------------------------------------
# The first seconds


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", QUICK)
def test_help_and_mistakes_come_before_the_libraries_are_imported(script, capsys, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    for arguments, code in ((["--help"], 0), (["--no-such-option"], 2), (["--samples=0", "train.lora_rl=1"], 2)):
        with pytest.raises(SystemExit) as ended:
            start(script, *arguments)
        assert ended.value.code == code
        printed = capsys.readouterr()
        assert "usage:" in printed.out + printed.err or "error:" in printed.err


@pytest.mark.parametrize("script", ["train.py", "dataset.show"])
def test_a_mistake_in_the_config_comes_before_the_libraries_are_imported(script, capsys, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imports {name}"))
    with pytest.raises(SystemExit) as ended:
        start(script, "train.lora_rl=1")
    assert ended.value.code == 2 and 'did you mean "train.lora_lr"?' in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "error, code, words",
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 2, "the package torch is not installed in"),
        (ImportError("cannot import name 'New' from 'peft'", name="peft"), 2, "the package peft in"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_missing_package_and_an_interrupt_in_the_first_seconds_are_one_line(
    script, error, code, words, capsys, monkeypatch
):
    needed = {"model.import_checkpoint": "--from"} | dict.fromkeys(
        ("model.export", "demo.emoji_report"), "--checkpoint"
    )
    arguments = [needed[script], "x", "--output", "y"] if script in needed else []
    given = iter([error])
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(next(given)))
    with pytest.raises(SystemExit) as ended:
        start(script, *arguments)
    printed = capsys.readouterr()
    assert ended.value.code == code and printed.err.count("\n") == 1 and words in printed.err
    if code == 2:
        assert sys.executable in printed.err and "sh train.sh" in printed.err and ". .venv/bin/activate" in printed.err


def test_a_missing_module_of_ours_is_no_missing_package(monkeypatch):
    error = ModuleNotFoundError("No module named 'training.gone'", name="training.gone")
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(error))
    with pytest.raises(ModuleNotFoundError):
        start("train.py")


def test_without_any_package_a_script_is_one_line():
    """In a process of its own, without site-packages: config itself needs a package."""
    for command in (["train.py"], ["-m", "dataset.show"]):
        ran = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 2 and ran.stderr.count("\n") == 1
        assert f"the package yaml is not installed in {sys.executable}. Run sh train.sh" in ran.stderr


def test_an_interrupt_while_data_are_prepared_is_one_line(project, monkeypatch, tmp_path):
    def interrupt(*positional: object, **named: object) -> None:
        raise KeyboardInterrupt

    forget_preparation(project)
    monkeypatch.setattr(dataprocess.process_image, "Converter", interrupt)
    for name in ("prepare", "train", "show"):
        main, *arguments = project.scripts(tmp_path / "out")[name]
        outcome = run(main, *arguments)
        assert outcome.code == 130 and outcome.err.splitlines()[-1:] == ["interrupted"]
    assert not partials(tmp_path)


def test_run_script_does_not_hide_a_bug():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        run_script(lambda: (_ for _ in ()).throw(InputError("no.")))
    assert ended.value.code == 2
