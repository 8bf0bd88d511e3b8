"""setup.sh installs the packages, and deletes nothing. Run: sh tests/run.sh tests/runs/test_setup.py"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# a Python without pip and ensurepip, as `uv venv` makes it
WITHOUT_PIP = f"""#!/bin/sh
case "$*" in "-m pip"* | "-m ensurepip"*) exit 1 ;; esac
exec {sys.executable} "$@"
"""
WITH_PIP = f"""#!/bin/sh
case "$*" in "-m pip"*) echo "pip $*" >>"$0.log"; exit 0 ;; esac
exec {sys.executable} "$@"
"""
UV = """#!/bin/sh
echo "uv $*" >>"$0.log"
"""


def write_command(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def set_up(folder: Path) -> subprocess.CompletedProcess:
    """Source setup.sh in a clone that needs a package which no Python has."""
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "requirements.txt").write_text("no-such-package-anywhere==1.0\n")
    script = f'set -eu; ROOT="{folder}"; REQUIREMENTS=requirements.txt; . "$ROOT/setup.sh"; echo "PYTHON=$PYTHON"'
    path = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    return subprocess.run(["sh", "-c", script], env=path, capture_output=True, text=True)


@pytest.fixture
def own(tmp_path) -> Path:
    """A file of the user's in .venv."""
    file = tmp_path / ".venv" / "mine.txt"
    file.parent.mkdir()
    file.write_text("mine")
    return file


@pytest.mark.parametrize("python, has_uv", [(WITHOUT_PIP, True), (WITH_PIP, False), (WITH_PIP, True)])
def test_packages_are_installed_into_an_environment_that_exists(tmp_path, own, python, has_uv):
    made = write_command(tmp_path / ".venv" / "bin" / "python", python)
    if has_uv:
        write_command(tmp_path / "bin" / "uv", UV)
    ran = set_up(tmp_path)
    assert ran.returncode == 0 and ran.stdout.endswith(f"PYTHON={made}\n"), ran.stderr
    if python is WITH_PIP:
        assert (
            f"install --quiet --disable-pip-version-check -r {tmp_path}/requirements.txt"
            in Path(f"{made}.log").read_text()
        )
    else:
        wanted = f"uv pip install --quiet --python {made} -r {tmp_path}/requirements.txt\n"
        assert (tmp_path / "bin" / "uv.log").read_text() == wanted
    assert own.read_text() == "mine"


@pytest.mark.skipif(shutil.which("uv", path="/usr/bin:/bin") is not None, reason="uv is installed for the system")
def test_an_environment_without_pip_and_uv_is_kept_and_named(tmp_path, own):
    write_command(tmp_path / ".venv" / "bin" / "python", WITHOUT_PIP)
    ran = set_up(tmp_path)
    assert ran.returncode == 2 and f"{tmp_path}/.venv has no pip" in ran.stderr and "uv is not installed" in ran.stderr
    assert own.read_text() == "mine"


@pytest.mark.parametrize("python", [None, "#!/bin/sh\nexit 1\n"])
def test_a_folder_without_a_usable_python_is_kept_and_named(tmp_path, own, python):
    if python:
        write_command(tmp_path / ".venv" / "bin" / "python", python)
    ran = set_up(tmp_path)
    assert ran.returncode == 2 and f"{tmp_path}/.venv exists, but has no Python 3.11" in ran.stderr
    assert own.read_text() == "mine"
