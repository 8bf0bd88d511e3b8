"""Whole runs with the tokenizers of released models: Qwen v1's, Qwen3's, SmolLM2's; and Llama's, which has no chat tokens.
The language models are tiny and random. `sh tests/run.sh tests/runs/test_real_tokenizers.py`"""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tiktoken
import yaml
from tokenizers import Tokenizer

import test
from config import IGNORE_INDEX, InputError, load_config
from dataset import show
from dataset.loader import QADataset
from dataset.record import Image, parts_of
from qwen.tokenizer import QWEN1_SPECIAL_TOKENS
from tests import toy_language
from tests.downloads import qwen1_vocabulary
from tests.qwen.test_scratch import llama_like
from tests.qwen.test_tokenizer import PATTERN
from tests.runs.test_training import assert_equal_files, rows, without_times
from tests.starts import At, Start
from tests.toy_project import run_training, write_project, write_yaml
from training.run import open_processors, open_qa_file

Encode = Callable[[str], list[int]]
WEIGHTS = ("projector.safetensors", "adapter_model.safetensors")
# Questions and answers on which tokenizers differ. All in NFC.
HARD = [
    ("What colour is it?", "It's red, isn't it?"),
    ("这是什么颜色？", "红色的🎉，对吗？"),
    ("two  spaces\tand\n\n lines \n x", "café naïve 1234567 👩‍👩‍👧 🇩🇪 ﬁne"),
    ("def f(x):\n\treturn x**2", '</div>\n\n{"k": [1, null]}'),
    ("Is <|im_end|> or <think> a word?<|endoftext|>", "Yes: <|image_pad|><|extra_0|> <|im_start|>user\n<tool_call>"),
]


class Family(NamedTuple):
    """A tiny language model in `folder` with a released tokenizer, and what reads the tokenizer independently of us."""

    folder: Path
    image_token: str
    encode: Encode  # special tokens in a text are tokens
    encode_plain: Encode  # they are characters


def qwen1(folder: Path) -> Family:
    toy_language.write_qwen1(folder)
    shutil.copy(qwen1_vocabulary(), folder)
    lines = (folder / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    special = {token: len(ranks) + i for i, token in enumerate(QWEN1_SPECIAL_TOKENS)}
    reference = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return Family(
        folder,
        "<|extra_0|>",
        encode=lambda text: reference.encode(text, allowed_special="all"),
        encode_plain=lambda text: reference.encode(text, disallowed_special=()),
    )


def with_tokenizer_json(folder: Path, released: Path) -> Family:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(released / name, folder)
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    reference = Tokenizer.from_str(json.dumps(values))
    reference.add_special_tokens(["<|image_pad|>"])  # SmolLM2 has none
    plain = Tokenizer.from_str(json.dumps(values | {"added_tokens": []}))
    return Family(
        folder,
        "<|image_pad|>",
        encode=lambda text: reference.encode(text, add_special_tokens=False).ids,
        encode_plain=lambda text: plain.encode(text, add_special_tokens=False).ids,
    )


FAMILIES = {"qwen1": 151_936, "qwen3": 151_936, "smollm2": 49_152}  # -> rows of embeddings, as released


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_language, "ROWS", FAMILIES[request.param])
        patch.setattr(toy_language, "HIDDEN", 16)
        if request.param == "qwen1":
            return qwen1(folder)
        write = {"qwen3": toy_language.write_qwen3, "smollm2": toy_language.write_llama}[request.param]
        return with_tokenizer_json(write(folder), request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def project(family, tmp_path_factory) -> Path:
    """The config of a run of six steps on HARD."""
    path = write_project(tmp_path_factory.mktemp("project"), images=16)  # the last four are held out
    records = [
        {
            "id": f"r{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        }
        for i, (question, answer) in enumerate(2 * HARD)
    ]
    (path.parent / "train.json").write_text(json.dumps(records))
    values = yaml.safe_load(path.read_text())
    values["model"]["language_model"] = str(family.folder)
    values["data"]["max_length"] = 512
    values["train"] |= {"gradient_accumulation_steps": 1, "score_samples": 2}
    write_yaml(path, values)
    return path


@pytest.fixture(scope="module")
def whole(project) -> Path:
    """The folder of an uninterrupted run."""
    assert run_training(project, f"output_dir={project.parent / 'whole'}") == 0
    return project.parent / "whole"


def open_samples(project: Path) -> tuple[QADataset, int]:
    """Return (the samples of the prepared QA file, the number of tokens of an image)."""
    config = load_config(project)
    processors = open_processors(config)
    return open_qa_file(config, processors, config.data.qa_file), processors.num_image_tokens


def test_check_prepares_and_trains_nothing(project, capsys):
    assert run_training(project, "--check") == 0
    assert "Checked: config, data and model fit together" in capsys.readouterr().out
    assert not (project.parent / "run" / "metrics.jsonl").exists()


def test_a_samples_ids_are_the_released_tokenizers(family, project, whole):
    """Of the whole prompt at once if no special token is typed in it, else of its pieces."""
    dataset, num_image_tokens = open_samples(project)
    images, start, end = (family.image_token * num_image_tokens, "<|im_start|>", "<|im_end|>")
    typed = 0
    for i in range(len(dataset)):
        by_piece: list[int] = []
        prompt = ""
        for turn in dataset.qa[i].conversations:
            parts = [images if isinstance(part, Image) else part for part in parts_of(turn)]
            head, tail = f"{start}{turn.role}\n", f"{end}\n"
            pieces = [family.encode(part) if part is images else family.encode_plain(part) for part in parts]
            by_piece += [*family.encode(head), *itertools.chain(*pieces), *family.encode(tail)]
            prompt += head + "".join(parts) + tail
        ids = dataset[0, i].input_ids.tolist()
        assert ids == by_piece, prompt
        if prompt.count("<|") == 8 + num_image_tokens:
            assert ids == family.encode(prompt), prompt
        else:
            typed += 1
    assert typed == 2


def test_typed_special_tokens_are_characters_and_labels_are_the_answers(family, project, whole):
    dataset, num_image_tokens = open_samples(project)
    processors = open_processors(load_config(project))
    (end,), (start,), (image,) = (family.encode(token) for token in ("<|im_end|>", "<|im_start|>", family.image_token))
    for i, (_, answer) in enumerate(2 * HARD):
        sample = dataset[0, i]
        ids = sample.input_ids.tolist()
        assert (ids.count(start), ids.count(end), ids.count(image)) == (4, 4, num_image_tokens)
        labels = [label for label in sample.labels.tolist() if label != IGNORE_INDEX]
        assert processors.decode(labels) == f"{answer}<|im_end|>" * 2


def test_the_page_shows_the_texts(project, tmp_path):
    page = tmp_path / "show.html"
    assert show.main(["--config", str(project), "--output", str(page), "--count", "10"]) == 0
    shown = html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))
    for words in ("isn't it?", "这是什么颜色？", "红色的", "👩", "<tool_call>"):
        assert words in shown, words


def test_a_killed_run_ends_like_an_uninterrupted_one(project, whole):
    killed = Start(project, at=[At("train.sum_gradients", 5)])
    assert killed.end() == -9, killed.output()
    run = project.parent / "run"
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]
    assert run_training(project) == 0
    assert without_times(rows(run)) == without_times(rows(whole))
    assert_equal_files(run / "final", whole / "final", WEIGHTS)


def test_a_checkpoint_answers_hard_questions_about_two_images(project, whole, tmp_path):
    shutil.copytree(project.parent / "images", tmp_path / "images", ignore=lambda _, names: sorted(names)[2:])
    asked = [word for question, _ in HARD for word in ("--question", question)]
    words = ["--checkpoint", str(whole / "final"), "--images", str(tmp_path / "images"), "--output", str(tmp_path)]
    assert test.main([*words, *asked]) == 0
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["question"] for row in found] == [question for question, _ in HARD] * 2
    assert all("<|im_" not in row["answer"] for row in found)


def test_llamas_tokenizer_without_chat_tokens_is_refused(tmp_path):
    """TinyLlama's layout: LlamaTokenizer, a sentencepiece BPE with <s> and </s>."""
    path = write_project(tmp_path)
    toy_language.write_llama(tmp_path / "lm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "lm" / name).unlink()
    llama_like(tmp_path / "llama")
    settings = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    (tmp_path / "lm" / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer"}))
    shutil.copy(tmp_path / "llama" / "tokenizer.json", tmp_path / "lm")
    missing = r"tokenizer .*lm: <\|im_start\|>, <\|im_end\|>, <\|endoftext\|> not in the vocabulary"
    with pytest.raises(InputError, match=rf"{missing}.*ChatML.*Qwen.*SmolLM2"):
        run_training(path, "--check")
