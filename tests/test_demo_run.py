"""The README's two commands, as a newcomer gives them: from another folder, in a path with blanks. Takes a few minutes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = {"colour": 0.95, "shape": 0.95, "digit": 0.95, "count": 0.90, "place": 0.90, "yes_no": 0.90}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository's own files, nothing that a run left."""
    folder = tmp_path_factory.mktemp("a newcomer's folder") / "vlm"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    return folder


def sh(clone, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(["sh", *words], cwd=clone.parent, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(clone):
    done = sh(clone, str(clone / "train.sh"))
    assert done.returncode == 0, done.stdout + done.stderr
    return clone / "runs" / "demo", done.stdout


def test_the_demo_learns_to_see(trained):
    run, printed = trained
    scores = json.loads((run / "final" / "scores.json").read_text())
    for name, least in NEEDED.items():
        entry = scores["by_type"][name]
        assert entry["n"] >= 200 and entry["accuracy"] >= least, (name, entry)
        assert entry["blind"] <= entry["accuracy"] - 0.3, (name, entry)
        for language in ("en", "zh"):
            both = scores["by_type_and_language"][f"{name}/{language}"]
            assert both["accuracy"] >= least - 0.05, (name, language, both)
    unseen = scores["by_type"]["unseen_pair"]
    assert unseen["n"] >= 200 and unseen["accuracy"] > unseen["blind"]
    assert "colour" in printed and "blind %" in printed  # the table stands at the end


def test_it_answers_about_a_folder(clone, trained, tmp_path):
    run, _ = trained
    done = sh(clone, str(clone / "test.sh"), "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and all(set(row) == {"image", "question", "answer", "seconds"} for row in rows)
    page = (tmp_path / "answers.html").read_text()
    assert page.count("<img") == 12 and all(row["answer"] for row in rows)


def test_the_second_start_says_that_the_run_is_finished(clone, trained):
    done = sh(clone, str(clone / "train.sh"))
    assert done.returncode == 0 and "This run is finished" in done.stdout
