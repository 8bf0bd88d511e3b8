"""The task for lmms-eval: the questions of a QA file, as that program's models ask them.

Run: python -m pytest tests/evaluation/test_lmms_task.py
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from config import InputError
from dataset.qa_file import QAFile
from evaluation import lmms_task
from evaluation.score import questions_of, swap_images
from model.export.llava import chat_template
from tests.toy_checkpoints import write_records
from visual.images import read_image


class Loader(yaml.SafeLoader):
    """Reads `!function name` as the text after it."""


Loader.add_constructor("!function", lambda loader, node: f"function {node.value}")


@pytest.fixture
def written(tmp_path) -> Path:
    qa = write_records(tmp_path, count=4)  # every other record has a second turn
    assert lmms_task.main(["--qa", str(qa), "--output", str(tmp_path / "task"), "--max-new-tokens", "9"]) == 0
    return tmp_path / "task"


def functions(folder: Path):
    spec = importlib.util.spec_from_file_location("held_out", folder / "held_out.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_task_asks_what_test_py_asks(written):
    module, qa = functions(written), QAFile(written.parent / "validation.jsonl")
    first = [question for question in questions_of(qa, range(4)) if len(question.turns) == 1]
    expected = {"held_out": first, "held_out_blind": swap_images(first, 0)}
    for task, questions in expected.items():
        values = yaml.load((written / f"{task}.yaml").read_text(), Loader)
        assert values["task"] == task and values["dataset_path"] == "parquet" and values["test_split"] == "test"
        assert values["generation_kwargs"] == {
            "max_new_tokens": 9, "temperature": 0, "num_beams": 1, "do_sample": False,
        }  # fmt: skip
        assert values["process_results"] == "function held_out.process_results"
        rows = pyarrow.parquet.read_table(values["dataset_kwargs"]["data_files"]["test"]).to_pylist()
        assert len(rows) == len(questions) == 4
        for row, question in zip(rows, questions, strict=True):
            assert module.doc_to_text(row) == "<image>\n" + question.text and row["answer"] == question.reference
            (image,) = module.doc_to_visual(row)
            assert np.array_equal(np.asarray(image), np.asarray(read_image(question.images[0])))


def test_the_prompt_is_that_of_an_exported_folder(written):
    """lmms-eval's llava_hf gives the folder's template the text as a string, or (as a chat model) messages."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string(chat_template("<|image_pad|>", None))
    row, module = pyarrow.parquet.read_table(written / "held_out.parquet").to_pylist()[0], functions(written)
    for messages in ([{"role": "user", "content": module.doc_to_text(row)}], module.doc_to_messages(row)):
        text = template.render(messages=messages, add_generation_prompt=True)
        assert text == "<|im_start|>user\n<|image_pad|>\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\n"
    (image,) = module.doc_to_visual(row)
    assert module.doc_to_messages(row)[0]["content"][0]["url"].tobytes() == image.tobytes()
    between = module.doc_to_messages({"question": "A<image>B<image>", "images": row["images"] * 2})[0]["content"]
    assert [part["type"] for part in between] == ["text", "image", "text", "image"]


@pytest.mark.parametrize(
    "answer, value", [("red", 1.0), (" red\n", 1.0), ("Red", 0.0), ("red.", 0.0), ("re\u0301d", 0.0)]
)
def test_an_answer_counts_as_in_scores_json(written, answer, value):
    assert functions(written).process_results({"answer": "red"}, [answer]) == {"exact_match": value}
    assert functions(written).process_results({"answer": "re\u0301d"}, ["r\u00e9d"]) == {"exact_match": 1.0}


def test_questions_of_later_turns_are_counted_and_left_out(tmp_path, capsys):
    """A harness asks one turn; a system prompt of the record would be another model's."""
    qa = write_records(tmp_path, count=2)
    lines = [json.loads(line) for line in qa.read_text().splitlines()]
    lines[0]["conversations"].insert(0, {"role": "system", "content": "Be brief."})
    qa.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lmms_task.main(["--qa", str(qa), "--output", str(tmp_path / "task")]) == 0
    said = capsys.readouterr().out
    assert (
        "1 questions, 0 of them also with swapped images" in said
        and "left out: 2 questions that follow another one or a system prompt" in said
    )
    row = pyarrow.parquet.read_table(tmp_path / "task" / "held_out.parquet").to_pylist()[0]
    assert Image.open(io.BytesIO(row["images"][0])).size == (50, 40)
    qa.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(InputError, match="1 questions, none of them the first turn"):
        lmms_task.main(["--qa", str(qa), "--output", str(tmp_path / "none")])
    with pytest.raises(InputError, match="--max-new-tokens 0: give 1 or more"):
        lmms_task.main(["--qa", str(qa), "--output", str(tmp_path / "none"), "--max-new-tokens", "0"])
