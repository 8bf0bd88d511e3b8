"""A tokenizer learned from QA files: any text survives, the same files give the same tokenizer, transformers reads it.

Run: python -m pytest tests/dataprocess/test_train_tokenizer.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import qwen
from config import InputError
from dataprocess import train_tokenizer
from dataprocess.train_tokenizer import SPECIAL_TOKENS, is_missing
from tests.toy_language import SENTENCES
from tests.toy_project import write_staged_project

ROOT = Path(__file__).parents[2]


def write_qa(path: Path, sentences=SENTENCES) -> Path:
    """Plain texts, and a dialog with an image and an alternative; the last sentence is only in the alternative."""
    rows: list[dict] = [
        {"id": f"t{i}", "conversations": [{"role": "text", "content": text}]} for i, text in enumerate(sentences[:3])
    ]
    question = {"role": "user", "content": f"<image>\n{sentences[3]}"}
    dialog = [question, {"role": "assistant", "content": sentences[4]}]
    other = [question, {"role": "assistant", "content": sentences[5]}]
    rows += [{"id": "d", "image": "a.jpg", "conversations": dialog, "alternatives": [other]}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    size = train_tokenizer.train_tokenizer([write_qa(folder / "qa.jsonl")], 320, folder / "tokenizer")
    assert size == 320
    return folder / "tokenizer"


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_survives_and_never_becomes_a_special_token(learned, text):
    tokenizer = qwen.load_tokenizer(str(learned), any_kind=True)
    ids = qwen.encode_text(tokenizer, text)
    composed = tokenizer.backend_tokenizer.normalizer.normalize_str(text)  # NFC, as in Qwen's
    assert tokenizer.decode(ids) == composed
    assert not {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} & set(ids)


def test_the_special_tokens_come_last_and_transformers_reads_the_folder(learned):
    tokenizer = AutoTokenizer.from_pretrained(learned)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [316, 317, 318, 319]
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|endoftext|>", 320)
    assert tokenizer("<|im_start|>").input_ids == [317]


def test_texts_are_split_as_qwen_splits_them():
    assert train_tokenizer.WORDS == PRETOKENIZE_REGEX


def test_it_learns_from_every_turn_and_alternative(learned, tmp_path):
    """Each sentence has fewer tokens than bytes, also the one that is only in an alternative; no `<image>` is learned."""
    tokenizer = qwen.load_tokenizer(str(learned), any_kind=True)
    for text in SENTENCES:
        assert len(qwen.encode_text(tokenizer, text)) < 0.8 * len(text.encode())
    qa = write_qa(tmp_path / "qa.jsonl", ["a"] * 5 + ["zyx zyx zyx zyx"])
    train_tokenizer.train_tokenizer([qa], 264, tmp_path / "tokenizer")
    small = qwen.load_tokenizer(str(tmp_path / "tokenizer"), any_kind=True)
    assert "zyx" in small.get_vocab() and len(qwen.encode_text(small, "image")) == 5


def test_the_same_files_give_the_same_tokenizer_in_any_process(learned, tmp_path):
    qa = write_qa(tmp_path / "qa.jsonl")
    for i, parallel in enumerate(("true", "false")):
        command = [sys.executable, "-m", "dataprocess.train_tokenizer", "--qa", str(qa), "--vocab-size", "320"]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": str(i)}
        subprocess.run([*command, "--output", str(tmp_path / str(i))], check=True, cwd=ROOT, env=environment)
        assert (tmp_path / str(i) / "tokenizer.json").read_bytes() == (learned / "tokenizer.json").read_bytes()


def test_with_a_config_it_learns_once_from_all_stages(tmp_path, capsys):
    path = write_staged_project(tmp_path)
    assert train_tokenizer.main(["--config", str(path)]) == 0
    assert "320 tokens" in capsys.readouterr().out
    made_of = json.loads((tmp_path / "tokenizer" / "learned_from.json").read_text())
    assert made_of == {
        "vocab_size": 320,
        "qa_files": [str(tmp_path / "text.jsonl"), str(tmp_path / "qa.jsonl")],
        "sample_bytes": train_tokenizer.SAMPLE_BYTES,
    }
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab()
    assert "Ġred" in vocabulary and "Ġagain" in vocabulary  # of the texts, and of the answers about images
    with pytest.raises(InputError, match="already exists"):
        train_tokenizer.main(["--config", str(path)])
    with pytest.raises(InputError, match="learned with vocab_size 320, but .* is 330"):
        train_tokenizer.main(["--config", str(path), "model.from_scratch.vocab_size=330"])


def test_is_missing_decides_whether_to_learn(learned, tmp_path):
    assert is_missing(str(tmp_path / "new"), 300) and not is_missing(str(tmp_path / "new"), None)
    assert not is_missing(str(learned), 320)
    with pytest.raises(InputError, match="was not made by dataprocess.train_tokenizer"):
        is_missing(str(tmp_path), 300)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give either --config FILE, or all of"),
        (["--qa", "qa.jsonl", "--vocab-size", "320"], "give either"),
        (["--config", "config.yaml", "--vocab-size", "320"], "give either"),
        (["--qa", "none.jsonl", "--vocab-size", "320", "--output", "t"], "no such QA file"),
        (["--qa", "qa.jsonl", "--vocab-size", "20", "--output", "t"], "need 260"),
        (["--qa", "qa.jsonl", "--vocab-size", "320", "--output", "full"], "already exists"),
        (["--qa", "qa.jsonl", "--vocab-size", "320", "--output", "."], "already exists"),
        (["--qa", "qa.jsonl", "--vocab-size", "320", "--output", "qa.jsonl/t"], "cannot be written"),
        (["--qa", "bad.jsonl", "--vocab-size", "320", "--output", "t"], r"bad.jsonl line 2 \(\"b\"\)"),
    ],
)
def test_mistakes_give_one_message_and_leave_no_files(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_qa(tmp_path / "qa.jsonl")
    good = '{"id": "a", "conversations": [{"role": "text", "content": "x"}]}\n'
    (tmp_path / "bad.jsonl").write_text(good + '{"id": "b", "conversations": []}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        train_tokenizer.main(arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_without_a_vocabulary_size_is_refused(tmp_path):
    path = write_staged_project(tmp_path)
    with pytest.raises(InputError, match="vocab_size.* is not set"):
        train_tokenizer.main(["--config", str(path), "model.from_scratch.vocab_size=null"])


def test_two_runs_that_learn_at_once_agree(tmp_path, monkeypatch):
    """The second run finds the finished folder of the first and uses it."""
    qa = write_qa(tmp_path / "qa.jsonl")
    write = train_tokenizer._write

    def slower(*arguments):
        write(*arguments)  # the other run
        write(*arguments)

    monkeypatch.setattr(train_tokenizer, "_write", slower)
    assert train_tokenizer.train_tokenizer([qa], 300, tmp_path / "tokenizer") <= 300
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_existing_folders_are_not_overwritten(learned, tmp_path):
    qa = write_qa(tmp_path / "qa.jsonl")
    before = (learned / "tokenizer.json").read_bytes()
    for folder in (learned, tmp_path):
        with pytest.raises(InputError, match="already exists; remove it, or give another folder"):
            train_tokenizer.train_tokenizer([qa], 290, folder)
    assert (learned / "tokenizer.json").read_bytes() == before


def test_a_line_that_is_not_json_is_named(tmp_path):
    qa = write_qa(tmp_path / "qa.jsonl")
    qa.write_text(qa.read_text() + "{\n")
    with pytest.raises(InputError, match="qa.jsonl line 5: not a JSON value"):
        train_tokenizer.train_tokenizer([qa], 290, tmp_path / "tokenizer")


def test_large_files_are_sampled_with_a_seed(tmp_path, monkeypatch):
    """The sample covers all parts of the files, has about the requested size, and is the same each time."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        rows = [{"id": f"{i}", "conversations": [{"role": "text", "content": f"{path.name} {i}"}]} for i in range(1000)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    everything = list(train_tokenizer._texts(paths))
    assert len(everything) == 2000
    monkeypatch.setattr(train_tokenizer, "SAMPLE_BYTES", paths[0].stat().st_size // 2)
    chosen = list(train_tokenizer._texts(paths))
    assert 400 < len(chosen) < 600 and chosen == list(train_tokenizer._texts(paths))
    assert set(chosen) < set(everything)
    numbers = [int(text.split()[1]) for text in chosen if text.startswith("b")]
    assert 200 < len(numbers) < 300 and numbers[0] < 50 and numbers[-1] > 950
    train_tokenizer.train_tokenizer(paths, 290, tmp_path / "tokenizer")
    learned_from = json.loads((tmp_path / "tokenizer" / "learned_from.json").read_text())
    assert learned_from["sample_bytes"] == train_tokenizer.SAMPLE_BYTES


def test_a_killed_process_leaves_no_folder_for_good(tmp_path):
    (tmp_path / ".tokenizer.0123abcd.partial").mkdir()
    (tmp_path / ".tokenizer.1234").mkdir()  # not ours
    train_tokenizer.train_tokenizer([write_qa(tmp_path / "qa.jsonl")], 270, tmp_path / "tokenizer")
    assert sorted(os.listdir(tmp_path)) == [".tokenizer.1234", "qa.jsonl", "tokenizer"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="special file"):
        train_tokenizer.train_tokenizer([tmp_path / "pipe"], 270, tmp_path / "other")
