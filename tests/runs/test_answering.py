"""test.py: its output, its answers compared with the trained model's, its messages about mistakes.
`sh tests/run.sh tests/runs/test_answering.py`"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

import model.answer
import model.loaded
import test
import train
from config import InputError, run_script
from tests.spy import spy
from tests.toy_project import run_training, write_project
from visual.images import read_image

QUESTIONS = [
    "What colour is it?",
    "这是什么颜色？",
    "Is there a star in the upper left corner, or a circle below it?",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has just ended: its model is in memory, its folder on disk."""
    path = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        ended = spy(patch, train, "score_held_out", lambda run: run)
        run_training(path, "train.max_steps=2", "train.eval_steps=null", "train.save_steps=null")
    return ended[0]


@pytest.fixture
def final(run):
    return run.config.output_dir / "final"


@pytest.fixture
def base_models(run, tmp_path):
    """Links to the released models, at the place where a copy of the checkpoint in `tmp_path`/x/y looks for them."""
    for path in (run.config.model.vision_tower, run.config.model.language_model):
        (tmp_path / Path(path).name).symlink_to(path)


@pytest.fixture
def images(run):
    return run.config.data.sources[0].images


def rows(output, name="answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text(encoding="utf-8").splitlines()]


def answers(output) -> dict:
    return {(row["image"], row["question"]): row["answer"] for row in rows(output)}


def ask(output, *arguments) -> list[dict]:
    assert test.main([*map(str, arguments), "--output", str(output)]) == 0
    return rows(output)


def exit_message(capsys, *arguments) -> str:
    """Run test.py, which must end with exit code 2, and return the last line of stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: test.main([*map(str, arguments)]))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_one_image(final, images, tmp_path, capsys):
    image, output = images / "3.png", tmp_path / "out"
    (row,) = ask(output, "--checkpoint", final, "--images", image, "--question", QUESTIONS[0])
    assert list(row) == ["image", "question", "answer", "seconds"]
    assert (row["image"], row["question"]) == (str(image), QUESTIONS[0])
    assert isinstance(row["answer"], str) and row["seconds"] >= 0
    assert sorted(path.name for path in output.iterdir()) == ["answers.html", "answers.jsonl"]
    page = (output / "answers.html").read_text(encoding="utf-8")
    assert QUESTIONS[0] in page and "data:image/png;base64," in page and "3.png" in page
    printed = capsys.readouterr().out
    assert str(output / "answers.jsonl") in printed and str(output / "answers.html") in printed


def test_a_folder_with_subfolders_and_a_file_that_is_not_an_image(final, images, tmp_path, capsys):
    folder, output = tmp_path / "folder", tmp_path / "out"
    (folder / "sub" / "deep").mkdir(parents=True)
    for i, place in enumerate(("b.png", "sub/a.PNG", "sub/deep/c.png")):
        shutil.copy(images / f"{i}.png", folder / place)
    (folder / "sub" / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    (folder / "notes.txt").write_text("not an image")
    arguments = ["--checkpoint", final, "--images", folder, *(f"--question={q}" for q in QUESTIONS)]
    found = ask(output, *arguments)
    paths = [folder / place for place in ("b.png", "sub/a.PNG", "sub/deep/c.png")]
    assert [(r["image"], r["question"]) for r in found] == [(str(p), q) for p in paths for q in QUESTIONS]
    (problem,) = rows(output, "unreadable.jsonl")
    assert problem["image"] == str(folder / "sub" / "broken.jpg") and "broken.jpg" in problem["problem"]
    assert problem["problem"] in capsys.readouterr().out and "Not read" in (output / "answers.html").read_text()
    (folder / "sub" / "broken.jpg").unlink()
    assert [r["answer"] for r in ask(output, *arguments)] == [r["answer"] for r in found]
    assert not (output / "unreadable.jsonl").exists()


def test_an_unreadable_image_is_listed_once_for_all_questions(final, images, tmp_path):
    folder, output = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for i, name in enumerate(("a.png", "c.png", "e.png")):
        shutil.copy(images / f"{i}.png", folder / name)
    for name in ("b.jpg", "d.jpg"):
        (folder / name).write_bytes(b"not an image")
    (folder / os.fsdecode(b"\xff.png")).write_bytes((images / "3.png").read_bytes())
    arguments = ["--checkpoint", final, "--images", folder, *(f"--question={q}" for q in QUESTIONS)]
    found = ask(output, *arguments, "test.batch_size=4")
    assert [(r["image"], r["question"]) for r in found] == [
        (str(folder / f"{n}.png"), q) for n in "ace" for q in QUESTIONS
    ]
    unreadable = rows(output, "unreadable.jsonl")
    assert sorted(Path(entry["image"]).name for entry in unreadable) == ["b.jpg", "d.jpg", "\ufffd.png"]
    assert [entry["image"] for entry in unreadable if "not UTF-8" in entry["problem"]] == [str(folder / "\ufffd.png")]


def test_answers_are_written_after_each_batch(final, images, tmp_path, monkeypatch):
    written = spy(monkeypatch, model.answer, "generate", lambda *_, **__: len(rows(tmp_path)))
    ask(tmp_path, "--checkpoint", final, "--images", images, "--question", QUESTIONS[0], "test.batch_size=4")
    assert written == [0, 4, 8]


def test_a_folder_without_readable_images_is_an_error(final, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "in" / name).write_bytes(b"nothing")
    found = exit_message(capsys, "--checkpoint", final, "--images", tmp_path / "in", "--output", tmp_path / "out")
    assert "none of the 2 images" in found and str(tmp_path / "out" / "unreadable.jsonl") in found
    assert len(rows(tmp_path / "out", "unreadable.jsonl")) == 2


def test_questions_without_an_image(final, tmp_path):
    found = ask(tmp_path, "--checkpoint", final, "--no-image", *(f"--question={q}" for q in QUESTIONS))
    assert [(row["image"], row["question"]) for row in found] == [(None, q) for q in QUESTIONS]
    assert "<img" not in (tmp_path / "answers.html").read_text()


def test_scores_on_a_qa_file(run, final, images, tmp_path):
    """All references but one are the model's own answers, so the scores are known."""
    given = ask(tmp_path / "asked", "--checkpoint", final, "--images", images, "--question", QUESTIONS[0])
    given = [row for row in given if row["answer"]]
    records = [
        {
            "id": f"r{i}",
            "image": row["image"],
            "type": "own" if i else "other",
            "conversations": [
                {"role": "user", "content": f"<image>\n{QUESTIONS[0]}"},
                {"role": "assistant", "content": row["answer"] if i else "never this"},
            ],
        }
        for i, row in enumerate(given)
    ]
    qa = tmp_path / "qa.jsonl"
    qa.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = ask(tmp_path / "out", "--checkpoint", final, "--qa", qa)
    assert [row["answer"] for row in found] == [row["answer"] for row in given]
    assert [(row["id"], row["correct"]) for row in found] == [(f"r{i}", i > 0) for i in range(len(given))]
    assert {"image", "question", "answer", "seconds"} <= set(found[0])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["n"] == len(given) and scores["accuracy"] == (len(given) - 1) / len(given) > scores["blind"]
    assert scores["by_type"]["own"]["accuracy"] == 1.0 and scores["by_type"]["other"]["accuracy"] == 0.0
    blind = [row["blind"] == row["reference"] for row in found if row["blind"] is not None]
    assert sum(blind) / len(blind) == scores["blind"] and found[0]["blind"] is None  # the only one of its type
    assert scores["checkpoint_sha256"] == hashlib.sha256((final / "manifest.json").read_bytes()).hexdigest()
    assert "never this" in (tmp_path / "out" / "answers.html").read_text()


def test_scores_after_training_equal_the_checkpoints_scores(run, final, tmp_path):
    ask(tmp_path, "--checkpoint", final, "--qa", run.config.data.validation_file)
    found, expected = (json.loads((folder / "scores.json").read_text()) for folder in (tmp_path, final))
    for name in ("loss", "perplexity"):  # summed in another order
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-5)
    del found["checkpoint_sha256"]
    assert found == expected


def test_questions_beyond_the_models_length_are_left_out_and_counted(tmp_path, capsys):
    """Qwen v1 fails beyond its length: a long held-out conversation must not end a run that has trained."""
    path = write_project(tmp_path, language_model="qwen1")
    for file, change in (
        (tmp_path / "lm" / "config.json", lambda values: values.update(seq_length=100)),
        (tmp_path / "train.json", lambda values: values[0]["conversations"][3].update(value="again " * 60)),
        (tmp_path / "validation.json", lambda values: values[0]["conversations"][2].update(value="Say it. " * 60)),
        (
            tmp_path / "validation.json",
            lambda values: values[1]["conversations"][2].update(value="\x1b]52;c;cm0=\x07?"),
        ),
    ):
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))
    quick = ("train.max_steps=1", "train.eval_steps=1", "train.save_steps=null")
    assert run_training(path, *quick, "--check") == 0
    note = "validation.jsonl: 1 of 6 questions do not fit into the 100 tokens"
    assert note in capsys.readouterr().out
    assert run_training(path, *quick) == 0
    printed = capsys.readouterr()
    assert "questions left out, because they do not fit" in printed.out
    assert "\x1b]" not in printed.out + printed.err and "\\x1b]52;c;cm0=\\x07?  ->" in printed.out + printed.err
    scores = json.loads((tmp_path / "run" / "final" / "scores.json").read_text())
    assert (scores["n"], scores["left_out"]) == (5, 1)
    assert run_training(path, *quick) == 0  # finished
    found = ask(tmp_path / "out", "--config", path, "--qa", tmp_path / "validation.jsonl")
    assert len(found) == 5 and json.loads((tmp_path / "out" / "scores.json").read_text())["left_out"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# A folder from somebody else


@pytest.fixture
def foreign(final, base_models, tmp_path):
    """A copy of the checkpoint in a folder that somebody else may have prepared."""
    shutil.copytree(final, tmp_path / "foreign" / "final")
    return tmp_path / "foreign" / "final"


def test_answers_are_not_written_through_links(run, foreign, images, tmp_path, capsys):
    """Symbolic links to a file outside, a hard link to one, and a pipe: each is replaced by a file of its own."""
    (tmp_path / "mine").write_text("mine")
    output = foreign.parent / "answers"
    output.mkdir()
    for name in ("answers.html", "scores.json", "unreadable.jsonl", ".answers.html.partial", ".scores.json.partial"):
        (output / name).symlink_to(tmp_path / "mine")
    answered = output / "answers.jsonl"
    for prepare, words in (
        (lambda: answered.symlink_to(tmp_path / "mine"), ["--qa", run.config.data.validation_file]),
        (lambda: answered.hardlink_to(tmp_path / "mine"), ["--images", images / "1.png"]),
        (lambda: os.mkfifo(answered), ["--images", images / "1.png"]),
    ):
        prepare()
        assert test.main(["--checkpoint", str(foreign), *map(str, words)]) == 0
        assert (tmp_path / "mine").read_text() == "mine"
        for name in ("answers.jsonl", "answers.html", *(["scores.json"] if words[0] == "--qa" else [])):
            assert (output / name).is_file() and not (output / name).is_symlink()
        answered.unlink()
    shutil.rmtree(output)
    output.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    message = exit_message(capsys, "--checkpoint", foreign, images / "1.png")
    assert f"{output}: is a symbolic link" in message and list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("word", ["--images", "--qa"])
def test_a_pipe_is_not_waited_for(final, tmp_path, capsys, word):
    os.mkfifo(tmp_path / "pipe.png")
    message = exit_message(capsys, "--checkpoint", final, word, tmp_path / "pipe.png", "--output", tmp_path / "out")
    printed = message + (tmp_path / "out" / "unreadable.jsonl").read_text() if word == "--images" else message
    assert "pipe.png: " in printed and ("plain file" in printed or "regular file" in printed)


def test_what_is_printed_cannot_control_the_terminal(final, images, tmp_path, capsys, monkeypatch):
    evil = "\x1b]52;c;cm0=\x07"
    monkeypatch.setattr(model.answer.Answerer, "_texts", lambda self, batch, pixels: [evil] * len(batch))
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images / "1.png", folder / f"{evil}a.png")
    (folder / f"{evil}b.png").write_bytes(b"nothing")
    ask(tmp_path / "out", "--checkpoint", final, "--images", folder, "--question", f"{evil}?")
    printed = "".join(capsys.readouterr())
    assert "\x1b]" not in printed and "\x07" not in printed and printed.count("\\x1b]52;c;cm0=\\x07") >= 3


def name_of_the_hub(folder: Path, name: str) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["model"]["language_model"] = name
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "config.yaml").read_bytes()
    manifest["files"]["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_contacts_the_hub_only_with_consent(run, foreign, images, tmp_path, capsys, monkeypatch):
    """Its config may name any repository. What the local cache holds is used, without the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name_of_the_hub(foreign, "some/body")
    words = ["--checkpoint", foreign, images / "1.png", "--question", "Q"]
    message = exit_message(capsys, *words)
    assert message.startswith("error: some/body: ") and "--allow-download" in message

    def stop(*_):
        raise InputError(f"offline: {huggingface_hub.is_offline_mode()}.")

    config = foreign.parent / "config.yaml"
    values = yaml.safe_load((run.config.output_dir.parent / "config.yaml").read_text())
    values["output_dir"], values["model"]["language_model"] = str(foreign.parent), "some/body"
    config.write_text(yaml.safe_dump(values))
    with monkeypatch.context() as patch:
        patch.setattr(model.loaded, "open_processors", stop)
        asked: list = []
        patch.setattr("model.hub.check_hub", asked.append)  # one short try
        for more in ([*words, "--allow-download"], ["--config", config, images / "1.png"]):
            assert exit_message(capsys, *more) == "error: offline: False."
        assert [one.language_model for one in asked] == ["some/body"] * 2

    cached = tmp_path / "cache" / "models--some--body"
    shutil.copytree(run.config.model.language_model, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    with monkeypatch.context() as patch:
        patch.setattr(model.loaded, "open_processors", stop)
        assert exit_message(capsys, *words).startswith("error: offline: True. The hub was not contacted.")
    assert len(ask(tmp_path / "out", *words)) == 1 and not huggingface_hub.is_offline_mode()


# ---------------------------------------------------------------------------------------------------------------------
# The answers are the trained model's


def greedy(run, image, question: str, count: int) -> str:
    """Answer without test.py's code: the prompt is one string, and every token runs the whole sequence."""
    model, tokenizer = run.built.model.eval(), run.built.tokenizer
    pixels = run.built.image_processor([read_image(image)])
    image_tokens = "<|image_pad|>" * model.vision_tower.num_image_tokens
    prompt = f"<|im_start|>user\n{image_tokens}\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            inputs = torch.tensor([ids + answer])
            hidden = model.causal_lm.model(
                input_ids=inputs, image_features=model.encode_images(pixels), use_cache=False
            )
            answer.append(int(model.causal_lm.lm_head(hidden.last_hidden_state[0, -1]).argmax()))
            if answer[-1] in stops:
                break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_answers_equal_those_of_the_trained_model(run, final, images, tmp_path):
    ask(tmp_path, "--checkpoint", final, "--images", images, *(f"--question={q}" for q in QUESTIONS[:2]))
    found = answers(tmp_path)
    expected = {
        (str(image), question): greedy(run, image, question, run.config.test.max_new_tokens)
        for image in images.iterdir()
        for question in QUESTIONS[:2]
    }
    assert found == expected
    assert len(set(found.values())) > 3  # they depend on image and question


def test_answers_do_not_depend_on_the_batch_size(final, images, tmp_path):
    arguments = ["--checkpoint", final, "--images", images, *(f"--question={q}" for q in QUESTIONS)]
    found = [ask(tmp_path / size, *arguments, f"test.batch_size={size}") for size in ("1", "8", "100")]
    plain = [[(row["image"], row["question"], row["answer"]) for row in each] for each in found]
    assert plain[0] == plain[1] == plain[2] and len(plain[0]) == 36


def test_overrides_change_the_generation(final, images, tmp_path):
    arguments = ["--checkpoint", final, "--images", images, "--question", QUESTIONS[0]]
    one = ask(tmp_path / "one", *arguments, "test.max_new_tokens=1")
    beams = ask(tmp_path / "beams", *arguments, "test.max_new_tokens=1", "test.num_beams=3")
    longer = ask(tmp_path / "longer", *arguments, "test.max_new_tokens=8")
    # with one token, the best beam is the most likely token
    assert [row["answer"] for row in one] == [row["answer"] for row in beams]
    assert sum(len(row["answer"]) for row in longer) > sum(len(row["answer"]) for row in one)


def test_a_moved_checkpoint_gives_the_same_answers(final, base_models, images, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(final, moved)
    monkeypatch.chdir(tmp_path)
    arguments = ["--images", images, "--question", QUESTIONS[0]]
    ask(tmp_path / "a", "--checkpoint", final, *arguments)
    assert test.main(["--checkpoint", "elsewhere/model", *map(str, arguments)]) == 0
    assert answers(moved.parent / "answers") == answers(tmp_path / "a")


def test_images_and_text_are_read_as_in_training(run, final, images, tmp_path):
    """A checkpoint has its own image processor and tokenizer; those beside the base models may change or disappear."""
    tower, lm = tmp_path / "tower", tmp_path / "lm"
    shutil.copytree(run.config.model.vision_tower, tower)
    shutil.copytree(run.config.model.language_model, lm, ignore=shutil.ignore_patterns("*tokenizer*"))
    processor = json.loads((tower / "preprocessor_config.json").read_text())
    (tower / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.0, 0.9, 0.0]}))
    arguments = ["--checkpoint", final, "--images", images, "--question", QUESTIONS[0]]
    ask(tmp_path / "a", *arguments)
    ask(tmp_path / "b", *arguments, f"model.vision_tower={tower}", f"model.language_model={lm}")
    assert answers(tmp_path / "b") == answers(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_the_default_checkpoint_is_the_one_that_the_config_trained(run, final, images, tmp_path):
    """`sh test.sh [FOLDER]`: the model as it was trained, images and questions as in config.yaml now."""
    config = final.parent.parent / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["test"] = {"images": str(images / "1.png"), "questions": ["Now?"], "max_new_tokens": 2}
    values["model"]["language_model"] = "no/longer/there"
    changed = config.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(values))
    assert [(r["image"], r["question"]) for r in ask(tmp_path, "--config", changed)] == [
        (str(images / "1.png"), "Now?")
    ]
    long = '["' + "Is it so? " * 40 + '"]'  # longer than a file name may be
    found = ask(tmp_path, "--config", changed, images / "2.png", f"test.questions={long}")
    assert [(row["image"], row["question"]) for row in found] == [(str(images / "2.png"), "Is it so? " * 40)]
    assert test.main(["--config", str(changed), str(images)]) == 0
    assert len(rows(final.parent / "answers")) == 12


def test_an_image_whose_name_looks_like_an_override_is_an_image(final, images, tmp_path, monkeypatch):
    shutil.copy(images / "0.png", tmp_path / "a=b.png")
    monkeypatch.chdir(tmp_path)
    (row,) = ask(tmp_path, "--checkpoint", final, "a=b.png", "--question", "Q")
    assert row["image"] == "a=b.png"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--qa", "qa.jsonl", "a.png"], ["--qa", "leave out"]),
        (["--qa", "qa.jsonl", "--question", "Q"], ["--qa", "leave out"]),
        (["--no-image", "a.png"], ["--no-image", "a.png"]),
        (["a.png", "b.png"], ["b.png", "a.png"]),
        (["--images", "none.png"], ["none.png", "no such image"]),
        (["--images", "empty"], ["empty", "no image in it or below it"]),
        (["--qa", "none.jsonl"], ["none.jsonl"]),
        (["--qa", "empty/qa.jsonl"], ["qa.jsonl", "no records"]),
        (["test.batchsize=1"], ['did you mean "test.batch_size"?']),
        (["--output", "a.png"], ["a.png", "--output"]),
        (["--output", "a.png/x"], ["a.png/x", "--output"]),
    ],
)
def test_mistakes_end_with_code_2_and_advice(final, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "qa.jsonl").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = exit_message(capsys, "--checkpoint", final, *arguments)
    assert found.startswith("error: ") and [word for word in words if word not in found] == [], found


def test_a_damaged_checkpoint_is_refused_by_file_name(run, final, images, tmp_path, capsys):
    for name in ("projector.safetensors", "adapter_model.safetensors", "config.yaml", "tokenizer/tokenizer.json"):
        damaged = tmp_path / name.replace("/", "-")
        shutil.copytree(final, damaged)
        data = bytearray((damaged / name).read_bytes())
        data[len(data) // 2] ^= 1
        (damaged / name).write_bytes(data)
        assert str(damaged / name) in exit_message(capsys, "--checkpoint", damaged, "--images", images)
        (damaged / name).unlink()
        missing = exit_message(capsys, "--checkpoint", damaged, "--images", images)
        assert f"{damaged}/manifest.json: lists '{name}'" in missing
    assert "checkpoint folder does not exist" in exit_message(
        capsys, "--checkpoint", tmp_path / "none", "--images", images
    )
    assert "not a checkpoint" in exit_message(capsys, "--checkpoint", images, "--images", images)
    config = final.parent.parent / "config.yaml"
    assert "train.sh first" in exit_message(capsys, "--config", config, "output_dir=nowhere", images)
