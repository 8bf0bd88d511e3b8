"""Write the questions of a QA file as a task for lmms-eval, so that another program measures an exported model.

    python -m evaluation.lmms_task --qa data/demo/validation.jsonl --output lmms_task

The folder then holds two tasks: `held_out`, and `held_out_blind` with swapped images, as `evaluation.score` swaps them.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from config import InputError, printable, run_script
from dataset.qa_file import QAFile
from evaluation.score import Question, questions_of, swap_images
from visual.images import read_image

FUNCTIONS = "held_out.py"
TASK = """# {count} questions of {name}. Run it with:
#   python -m lmms_eval eval --model llava_hf --model_args pretrained=EXPORTED,dtype=float32,device_map=cpu --device cpu \\
#     --tasks {task} --include_path {folder} --batch_size 1 --log_samples --output_path results
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function held_out.doc_to_visual
doc_to_text: !function held_out.doc_to_text
doc_to_messages: !function held_out.doc_to_messages
doc_to_target: answer
process_results: !function held_out.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  num_beams: 1
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.lmms_task", description="Write a task for lmms-eval.")
    parser.add_argument("--qa", required=True, help="a QA file, such as data/demo/validation.jsonl")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default: 128)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the swapped images; a run scores with its config's seed"
    )
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {arguments.max_new_tokens}: give 1 or more.")
    qa, folder = QAFile(Path(arguments.qa)), Path(arguments.output).absolute()
    every = questions_of(qa, range(len(qa)))
    kept = [question for question in every if len(question.turns) == 1]
    if not kept:
        raise InputError(f"{arguments.qa}: {len(every)} questions, none of them the first turn of a record.")
    swapped = [question for question in swap_images(kept, arguments.seed) if question is not None]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("lmms_functions.py"), folder / FUNCTIONS)
    for task, questions in (("held_out", kept), ("held_out_blind", swapped)):
        write_task(folder, task, questions, name=Path(arguments.qa).name, max_new_tokens=arguments.max_new_tokens)
    print(printable(f"{folder}: {len(kept)} questions, {len(swapped)} of them also with swapped images"))
    if len(kept) < len(every):
        print(f"left out: {len(every) - len(kept)} questions that follow another one or a system prompt")
    return 0


def write_task(folder: Path, task: str, questions: Sequence[Question], *, name: str, max_new_tokens: int) -> None:
    """Write a task's questions, images included, and its YAML file. Raises ImageError if an image cannot be read."""
    rows = {
        "id": [question.id for question in questions],
        "type": [question.type for question in questions],
        "question": [prompt_of(question) for question in questions],
        "answer": [question.reference for question in questions],
        "images": [[_png(path) for path in question.images] for question in questions],
    }
    schema = pyarrow.schema([(key, pyarrow.string()) for key in ("id", "type", "question", "answer")])
    schema = schema.append(pyarrow.field("images", pyarrow.list_(pyarrow.binary())))
    file = folder / f"{task}.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows, schema=schema), file)
    text = TASK.format(
        count=len(questions),
        name=printable(name),
        task=task,
        folder=printable(str(folder)),
        file=json.dumps(str(file), ensure_ascii=False),
        max_new_tokens=max_new_tokens,
    )
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def prompt_of(question: Question) -> str:
    """Return the text of a question, in which `<image>` marks each image."""
    return "".join(part if isinstance(part, str) else "<image>" for part in question.turns[-1][1])


def _png(path: Path) -> bytes:
    data = io.BytesIO()
    read_image(path).save(data, "PNG")
    return data.getvalue()


if __name__ == "__main__":
    run_script(main)
