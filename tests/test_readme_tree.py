"""READMEs, docs and metadata name files, functions, rules and versions that exist."""

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.test_imports import MAY_IMPORT, packages

ROOT = Path(__file__).parents[1]
# the files that lead from a config to a training step, in reading order
ROAD = (
    "config/schema.py dataset/record.py dataset/conversation.py dataset/order.py dataset/batch.py dataset/loader.py "
    "visual/encoders.py visual/processor.py model/projector.py model/model.py model/loss.py qwen/injection.py "
    "qwen/modeling.py model/trainable.py training/step.py train.py"
).split()
READMES = {"README.md": "## The code", "README_zh.md": "## 代码"}
ARCHITECTURE = {"docs/architecture.md": "## The tree", "docs/architecture_zh.md": "## 目录"}
READING_ORDER = {"docs/architecture.md": "## Reading order", "docs/architecture_zh.md": "## 阅读顺序"}
NAMED_IN = [*ARCHITECTURE, "CONTRIBUTING.md"]

every_readme = pytest.mark.parametrize("page", READMES)
every_architecture = pytest.mark.parametrize("page", ARCHITECTURE)

A_PATH = re.compile(r"(?:[\w.-]+/)+(?:[\w.-]+\.\w+)?|[\w-]+\.(?:py|yaml|sh|md|txt|toml)")
# `file.py` `name`, or several names with commas between them
NAMES_IN_A_FILE = re.compile(r"`((?:\w+/)*\w+\.py)`((?:[,、]? `[A-Za-z_][\w.]*`)+)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """Return the text under a heading, up to the next one of its level."""
    _, found, rest = read(page).partition(f"\n{heading}\n")
    assert found, f"{page}: no heading {heading!r}"
    return rest.split("\n## ")[0]


def fenced_block(page: str, heading: str) -> str:
    """Return the first fenced block under a heading."""
    found = re.search(r"^```\w*\n(.*?)^```", section(page, heading), re.DOTALL | re.MULTILINE)
    assert found, f"{page}: no fenced block under {heading!r}"
    return found[1]


def listed_paths(block: str) -> list[str]:
    """Return the paths at the starts of a tree's lines.

    An indented path is relative to the folder above it, and a path after a folder on one line is relative to that folder.
    """
    found: list[str] = []
    above: list[tuple[int, str]] = []  # (indent, folder) of the folders that are open
    for line in block.splitlines():
        text = line.lstrip(" │├└─")
        indent = len(line) - len(text)
        above = [entry for entry in above if entry[0] < indent]
        folder = above[-1][1] if above else ""
        for word in text.split():
            if not A_PATH.fullmatch(word):
                break  # the description
            found.append(folder + word)
            if word.endswith("/"):
                folder += word
                above.append((indent, folder))
    return found


def test_trees_are_read_in_both_layouts():
    nested = """\
train.py  test.py   two scripts, see README.md
model/              the model
  loss.py           its loss
├── checks/
│   └── a.py        a check
"""
    assert listed_paths(nested) == [
        "train.py",
        "test.py",
        "model/",
        "model/loss.py",
        "model/checks/",
        "model/checks/a.py",
    ]
    assert listed_paths("qwen/  lora.py  names\nvisual/images.py   reads\n") == [
        "qwen/",
        "qwen/lora.py",
        "visual/images.py",
    ]


@every_readme
def test_every_listed_path_exists(page):
    paths = listed_paths(fenced_block(page, READMES[page]))
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []


@every_readme
def test_every_file_of_the_road_is_listed(page):
    assert set(ROAD) - set(listed_paths(fenced_block(page, READMES[page]))) == set()


def test_both_readmes_list_the_same_paths():
    english, chinese = (listed_paths(fenced_block(page, heading)) for page, heading in READMES.items())
    assert english == chinese


@every_architecture
def test_the_architecture_lists_every_module(page):
    listed = {path for path in listed_paths(fenced_block(page, ARCHITECTURE[page])) if path.endswith(".py")}
    folders = set(packages()) - {"benchmarks"}
    modules = {path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert listed == {"train.py", "test.py"} | {path for path in modules if not path.endswith("__init__.py")}


@every_architecture
def test_the_architecture_has_the_import_table(page):
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", read(page), re.MULTILINE)
    assert {package: set(re.findall(r"`([\w.]+)`", cell)) for package, cell in rows} == {
        package: set(allowed) for package, allowed in MAY_IMPORT.items()
    }


@pytest.mark.parametrize("page", READING_ORDER)
def test_the_reading_order_is_the_road(page):
    assert re.findall(r"`([\w/]+\.py)`", section(page, READING_ORDER[page])) == ROAD


@pytest.mark.parametrize("page", [*READMES, *READING_ORDER])
def test_the_stated_length_of_the_road_is_right(page):
    length = sum(len(read(path).splitlines()) for path in ROAD)
    stated = re.findall(r"(\d,?\d{3}) ?(?:lines|行)", section(page, (READMES | READING_ORDER)[page]))
    assert [int(number.replace(",", "")) for number in stated] == [pytest.approx(length, rel=0.1)]


@cache
def names_in(path: str) -> set[str]:
    """Return what a module defines: functions, classes, constants, and `Class.member`."""

    def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        return found

    top = defined(ast.parse(read(path)).body)
    members = {
        f"{name}.{m}" for name, node in top.items() if isinstance(node, ast.ClassDef) for m in defined(node.body)
    }
    return {*top, *members}


@pytest.mark.parametrize("page", NAMED_IN)
def test_every_name_in_the_docs_is_in_its_file(page):
    found = [
        (path, name)
        for path, names in NAMES_IN_A_FILE.findall(read(page))
        for name in re.findall(r"`([\w.]+)`", names)
        if not name.endswith(".py")
    ]
    assert len(found) > 5
    assert [(path, name) for path, name in found if name not in names_in(path)] == []


@pytest.mark.parametrize("page", NAMED_IN)
def test_every_file_and_test_in_the_docs_exists(page):
    text = read(page)
    paths = re.findall(r"`((?:[\w-]+/)+(?:[\w-]+\.\w+)?|[\w-]+\.py)`", text)
    paths = [path for path in paths if path not in ("final/",)]  # of a run
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    tests = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in names_in(path.relative_to(ROOT).as_posix())
    }
    assert [name for name in re.findall(r"`(test_\w+)`", text) if name not in tests] == []


def test_versions_agree():
    project = tomllib.loads(read("pyproject.toml"))
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (project["project"]["version"], project["project"]["license"])

    pins = dict(
        pin
        for page in ("requirements.txt", "tests/requirements.txt")
        for pin in re.findall(r"^(\S+)==(\S+)", read(page), re.MULTILINE)
    )
    hooks = {repo["repo"].rpartition("/")[2]: repo for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]}
    assert hooks["ruff-pre-commit"]["rev"] == f"v{pins['ruff']}"

    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert f"python={oldest}" in yaml.safe_load(read("environment.yml"))["dependencies"]
    workflow = json.dumps(yaml.safe_load(read(".github/workflows/ci.yml")))
    assert f'"python-version": "{oldest}"' in workflow and f"torch=={pins['torch']} " in workflow


def test_first_party_packages_are_known_to_ruff_and_mypy():
    tool = tomllib.loads(read("pyproject.toml"))["tool"]
    product = {*packages(), "train", "test"}
    assert set(tool["ruff"]["lint"]["isort"]["known-first-party"]) == product | {"tests"}
    assert {name.removesuffix(".py") for name in tool["mypy"]["files"]} == product - {"benchmarks"}
