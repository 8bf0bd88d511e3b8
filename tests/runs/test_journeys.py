"""What a new user does, from a table or LLaVA's files to a model that answers, and the mistakes on the way.

Run: sh tests/run.sh tests/runs/test_journeys.py
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

import test
import train
from config import InputError, load_config, run_script
from tests.toy_language import write_qwen2
from tests.toy_project import COLOURS, config_values, fresh_accelerate, run_training, write_project, write_yaml
from tests.toy_towers import write_clip

ROOT = Path(__file__).parents[2]


def run_test(*arguments: object) -> int:
    """Run test.py's main in this process."""
    with fresh_accelerate():
        return test.main([str(argument) for argument in arguments])


def image(path: Path, colour: str, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), tuple(max(0, value - shade) for value in COLOURS[colour])).save(path)


# ---------------------------------------------------------------------------------------------------------------------
# A table, from training to a moved clone


def write_table(folder: Path, count: int) -> None:
    """Write a table of Excel on a Chinese Windows, with `count` images."""
    with open(folder / "数据.csv", "w", encoding="gbk", newline="") as file:
        table = csv.writer(file)
        table.writerow(["图片", "问题", "答案", "标注员"])
        for i in range(count):
            colour = list(COLOURS)[i % len(COLOURS)]
            image(folder / "图片" / f"照片{i}.png", colour, shade=i)
            table.writerow([f"照片{i}.png", "What colour is it?" if i % 2 else "这是什么颜色？", colour, "甲"])


@pytest.fixture
def clone(tmp_path):
    """A user's folder with models, a table and a config of one source."""
    folder = tmp_path / "克隆 a"
    write_clip(folder / "tower")
    write_qwen2(folder / "lm")
    write_table(folder, 16)
    values = config_values()
    values["data"] |= {
        "sources": [{"name": "mine", "annotations": "数据.csv", "images": "图片"}],
        "validation_fraction": 0.01,
    }
    values["train"] |= {"max_steps": None, "num_train_epochs": 1, "eval_steps": None, "save_steps": None}
    write_yaml(folder / "mine.yaml", values)
    return folder


def test_a_chinese_table_is_trained_on_scored_extended_and_moved(clone, capsys):
    config = clone / "mine.yaml"
    with pytest.raises(InputError, match=r'"标注员" is not read, .* write columns: \{ignore: \[标注员\]\}'):
        run_training(config)
    values = yaml.safe_load(config.read_text("utf-8"))
    values["data"]["sources"][0]["columns"] = {"ignore": ["标注员"]}
    write_yaml(config, values)
    with pytest.raises(InputError, match=r"data.validation_fraction \(0.01\); raise it, for example to 0.2"):
        run_training(config, "--check", "train.num_workers=999")
    assert capsys.readouterr().out.count("note: train.num_workers is 999, but ") == 1
    values["data"]["validation_fraction"] = 0.2
    write_yaml(config, values)
    assert run_training(config) == 0

    scoring = ("--qa", clone / "数据.csv", "--images", clone / "图片", "columns.ignore=[标注员]")
    run_test("--config", config, *scoring)
    scores = json.loads((clone / "run/answers/scores.json").read_text())
    assert scores["n"] == 16

    write_table(clone, 22)
    with pytest.raises(
        InputError, match=r"(?s)data have changed since the run began:.*records: \d+ -> \d+ .*add --extend"
    ):
        run_training(config)
    assert run_training(config, "--extend") == 0
    assert "extended data: " in capsys.readouterr().out

    moved = clone.rename(clone.parent / "moved")
    config = moved / "mine.yaml"
    run_test("--config", config, moved / "图片/照片1.png", "--question", "What colour is it?")
    assert len((moved / "run/answers/answers.jsonl").read_text().splitlines()) == 1
    assert run_training(config) == 0 and "This run is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"(?s)train.num_train_epochs: 1.0 -> 2.0\n.*add --extend"):
        run_training(config, "train.num_train_epochs=2")
    assert run_training(config, "train.num_train_epochs=2", "--extend") == 0
    assert "resuming from" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA in two stages


@pytest.fixture
def llava(tmp_path):
    """A copy of the recipe without the Chinese captions, and its words for toy models."""
    text = (ROOT / "recipes/llava-two-stage.yaml").read_text("utf-8")
    path = tmp_path / "recipes/mine.yaml"
    path.parent.mkdir()
    kept = [line for line in text.splitlines() if "name: ai-challenger" not in line]
    path.write_text("\n".join(kept).replace("llava-pretrain/images}", "llava-pretrain/images.zip}"), encoding="utf-8")
    write_clip(tmp_path / "clip")
    write_qwen2(tmp_path / "qwen")
    words = [f"model.vision_tower={tmp_path}/clip", f"model.language_model={tmp_path}/qwen"]
    words += ["train.num_workers=0", "train.projector_start=calibrated", "train.precision=fp32", "train.num_threads=1"]
    words += ["data.validation_fraction=0.3", "test.max_new_tokens=4", "data.max_length=256"]
    return path, words


def write_llava(folder: Path) -> None:
    """Write LLaVA's two files in their own layouts: images in a zip; several folders, texts without an image."""
    rows: list[dict] = []
    (folder / "llava-pretrain").mkdir(parents=True)
    with zipfile.ZipFile(folder / "llava-pretrain/images.zip", "w") as archive:
        for i in range(12):
            colour = list(COLOURS)[i % 4]
            image(folder / "one.png", colour, shade=i)
            name = f"{i % 3:05d}/{i:09d}.jpg"
            archive.write(folder / "one.png", name)
            turns = [
                {"from": "human", "value": "Describe it briefly.\n<image>"},
                {"from": "gpt", "value": f"a {colour} wall"},
            ]
            rows.append({"id": name[6:-4], "image": name, "conversations": turns})
    (folder / "llava-pretrain/blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    rows.clear()
    for k, part in enumerate(["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K"]):
        for i in range(3):
            image(folder / f"llava-instruct/{part}/{i}.jpg", list(COLOURS)[i], shade=5 * k + i)
            turns = [
                {"from": "human", "value": "<image>\nWhat colour is it?"},
                {"from": "gpt", "value": list(COLOURS)[i]},
            ]
            turns += [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes"}]
            rows.append({"id": f"{k}-{i}" if k else i, "image": f"{part}/{i}.jpg", "conversations": turns})
    for i in range(4):
        turns = [{"from": "human", "value": f"How much is {i} + 1?"}, {"from": "gpt", "value": str(i + 1)}]
        rows.append({"id": f"text{i}", "model": "", "conversations": turns})
    (folder / "llava-instruct/llava_v1_5_mix665k.json").write_text(json.dumps(rows))


def test_llavas_files_train_in_two_stages_after_all_missing_ones_are_named_at_once(llava, capsys):
    config, words = llava
    with pytest.raises(InputError) as missing:
        run_training(config, *words)
    data = config.parent.parent / "data"
    for stage, name, path in (
        ("align", "captions", "annotations {}/llava-pretrain/blip_laion_cc_sbu_558k.json"),
        ("align", "captions", "images {}/llava-pretrain/images.zip"),
        ("instruct", "instructions", "annotations {}/llava-instruct/llava_v1_5_mix665k.json"),
        ("instruct", "instructions", "images {}/llava-instruct"),
    ):
        assert f'stage "{stage}": source "{name}": {path.format(data)} does not exist' in str(missing.value)
    assert "relative to the config file" in str(missing.value)
    write_llava(data)
    assert run_training(config, *words) == 0
    said = capsys.readouterr().out
    for name, count in (("captions", 12), ("instructions", 19)):
        assert re.search(rf"^{name} +{count} +{count} +0$", said, re.MULTILINE)
    assert "taken: projector" in said and "the model that all stages together made" in said
    run_test("--config", config, data / "llava-instruct/gqa", "--question", "What colour is it?")
    answers = (config.parent.parent / "runs/llava-two-stage/answers/answers.jsonl").read_text().splitlines()
    assert len(answers) == 3


def test_a_missing_source_is_named_with_what_may_be_meant(tmp_path):
    path = write_project(tmp_path)
    word = 'source "held": annotations .*/validaton.json does not exist; did you mean ".*/validation.json"'
    with pytest.raises(InputError, match=word):
        run_training(path, "data.sources.held.annotations=" + str(tmp_path / "validaton.json"))


# ---------------------------------------------------------------------------------------------------------------------
# A user in a hurry


MISTAKES = {
    "--config mine.yml": 'mine.yml: no such config file; did you mean "mine.yaml"?',
    "--config .": ".: is a folder; expected a YAML file",
    "--confg mine.yaml": '"--confg": no such option; did you mean "--config"?',
    "--config mine.yaml --stages a": '"--stages": no such option; did you mean "--stage"?',
    "--config mine.yaml train.lr=1e-3": 'did you mean "train.projector_lr" or "train.lora_lr" or ',
    "--config mine.yaml epochs=4": 'did you mean "train.num_train_epochs"?',
    "--config mine.yaml seed = 3": '"seed": expected key=value without spaces',
    "--config gbk.yaml": "gbk.yaml: not UTF-8 text; save it as UTF-8",
    "--config tab.yaml": "line 2, column 1:",
    "--config colon.yaml": "a key is followed by a colon and a space",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_slip_is_named_with_what_was_meant(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "mine.yaml", config_values())
    (tmp_path / "gbk.yaml").write_text("output_dir: 结果\n", encoding="gbk")
    (tmp_path / "tab.yaml").write_text("model:\n\tprojector: mlp\n")
    (tmp_path / "colon.yaml").write_text("seed:1\noutput_dir: run\n")
    with pytest.raises(InputError) as refused:
        train.main(words.split())
    assert MISTAKES[words] in str(refused.value)
    if "tab" in words:
        assert str(refused.value).endswith("Indent with spaces; YAML allows no tabs there.")


def test_a_config_that_was_edited_on_windows_means_the_same(tmp_path):
    path = tmp_path / "config.yaml"
    values = config_values()
    values["output_dir"], values["model"]["vision_tower"] = "runs/a", "./models/tower"
    write_yaml(path, values)
    plain = load_config(path)
    text = path.read_text().replace("runs/a", "runs\\a").replace("./models/tower", ".\\models\\tower")
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    assert load_config(path) == plain
    (tmp_path / "runs\\a").mkdir()  # such a name exists
    assert load_config(path).output_dir == tmp_path / "runs\\a"


SHORT = ("train.max_steps=1", "train.eval_steps=null", "train.save_steps=null", "train.score_samples=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = write_project(tmp_path_factory.mktemp("trained"))
    run_training(path, *SHORT)
    return path


def test_new_data_of_a_finished_run_are_not_passed_over_in_silence(trained, tmp_path, capsys):
    shutil.copytree(trained.parent, tmp_path / "copy")
    rows = json.loads((tmp_path / "copy/train.json").read_text())
    run_training(tmp_path / "copy/config.yaml", *SHORT)
    assert "data have changed" not in capsys.readouterr().out
    (tmp_path / "copy/train.json").write_text(json.dumps([*rows, rows[0] | {"id": "new"}]))
    run_training(tmp_path / "copy/config.yaml", *SHORT)
    said = capsys.readouterr().out
    assert "This run is finished" in said and "changed since: 9 records -> 10;" in said and "--extend trains" in said


def test_an_archive_of_images_is_asked_about(trained, tmp_path):
    images = trained.parent / "images"
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for name in ("a/0.png", "1.PNG", "__MACOSX/._1.PNG", ".hidden.png", "read.me"):
            archive.write(images / "0.png", name)
    run_test("--config", trained, tmp_path / "p.zip", "--question", "What colour is it?", "--output", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"{tmp_path}/p.zip/{name}" for name in ("1.PNG", "a/0.png")]
    assert (tmp_path / "out/answers.html").read_text().count("<img ") == 2
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"bad.zip: .* unpack it"):
        run_test("--config", trained, tmp_path / "bad.zip")


@pytest.mark.parametrize(
    ("words", "expected"),
    {
        "images/11.pn": '11.pn: no such image or folder; did you mean "images/11.png"?',
        "images/0.png 颜色？": "given already (images/0.png); give one, or key=value. A question is given with --question.",
        "images/0.png --questions 颜色？": '"--questions": no such option; did you mean "--question"?',
        "images/0.png output_dir=other": "no trained model yet; run sh train.sh first, or name the config of its training "
        "with --config FILE",
    }.items(),
)
def test_a_slip_in_asking_is_named(trained, monkeypatch, words, expected):
    monkeypatch.chdir(trained.parent)
    with pytest.raises(InputError) as refused:
        run_test("--config", trained, *words.split())
    assert expected in str(refused.value)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C in the first second


@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_an_interrupt_of_the_first_imports_shows_no_traceback(tmp_path, script):
    shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)"
    )
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")


def test_a_script_handles_interrupts_from_its_start(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            run_script(lambda: seen.append(signal.getsignal(signal.SIGINT)), seen := [])  # type: ignore[arg-type]
        assert seen == [signal.default_int_handler]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_the_search_for_packages_shows_no_traceback(tmp_path):
    shutil.copy(ROOT / "setup.sh", tmp_path)
    os.mkfifo(tmp_path / "requirements.txt")
    command = f'ROOT="{tmp_path}" REQUIREMENTS=requirements.txt; . "$ROOT/setup.sh"'
    with subprocess.Popen(
        ["sh", "-c", command],
        env={**os.environ, "PYTHON": sys.executable},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        with open(tmp_path / "requirements.txt", "w"):  # returns once the list is being read
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=20)
    assert "Traceback" not in said and process.returncode != 0
