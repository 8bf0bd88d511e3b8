"""Ask a trained model about one picture or a folder of them; or score it on a QA file.

    python test.py [PICTURE_OR_FOLDER] [--checkpoint DIR] [--question TEXT]... [--output DIR] [key=value ...]
    python test.py --no-image --question TEXT
    python test.py --qa FILE [--checkpoint DIR] [--output DIR]

A checkpoint's folder is all that is needed. Without --checkpoint it is the one that config.yaml's run ended with.
Writes answers.jsonl and answers.html (and, with --qa, scores.json) into --output, by default <run>/answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from accelerate import PartialState
from tqdm import tqdm

from assemble import answerer, build, chat_format, open_processors, open_qa_file
from config import DEFAULT_CONFIG, Config, InputError, load_config, run_script
from dataset.check import check_file
from dataset.conversation import question_parts
from dataset.loader import make_loader
from dataset.qa_file import QAFile
from evaluation.page import write_page
from evaluation.score import Question, is_correct, questions_of, score, score_table
from model.answer import Answerer, Request
from model.build import Built, autocast, resolve_precision
from model.folder import verify_folder
from speed import packing
from step import full_memory_named
from validate import Validation, add_up, of_sums
from visual.images import ImageError, list_images


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config, checkpoint = open_checkpoint(arguments)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    pictures = None if arguments.qa or arguments.no_image else find_pictures(arguments.images or config.test.images)
    qa = QAFile(Path(arguments.qa)) if arguments.qa else None
    output = make_folder(Path(arguments.output) if arguments.output else checkpoint.parent / "answers")
    device = PartialState().device
    word = config.train.precision
    precision = resolve_precision("auto" if word == "fp16" and device.type == "cpu" else word, device)
    built = build(config, precision, open_processors(config, checkpoint), checkpoint)
    built.model.to(device).eval()
    ask = answerer(config, built, precision, device)
    if qa is not None:
        score_file(ask, qa, config, built, precision, checkpoint, output)
    else:
        questions = arguments.question or list(config.test.questions)
        answer_questions(ask, pictures, questions, config.test.batch_size, checkpoint, output)
    print(f"{output / 'answers.jsonl'}\n{output / 'answers.html'}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a trained model about pictures, or score it on a QA file.")
    parser.add_argument("--checkpoint", help="a checkpoint's folder (default: final/ of config.yaml's output_dir)")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="used where --checkpoint is not given")
    parser.add_argument("--images", help="a picture or a folder, with its subfolders (default: test.images)")
    parser.add_argument("--question", action="append", help="may be given several times (default: test.questions)")
    parser.add_argument("--no-image", action="store_true", help="ask the questions without any picture")
    parser.add_argument("--qa", help="a QA file: ask its questions, compare with its answers")
    parser.add_argument("--output", help="folder for answers.jsonl and answers.html (default: <run>/answers)")
    parser.add_argument("rest", nargs="*", metavar="PICTURE_OR_FOLDER | key=value")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = []
    for word in arguments.rest:
        if "=" in word and not os.path.exists(word):
            arguments.overrides.append(word)
        elif arguments.images is None:
            arguments.images = word
        else:
            raise InputError(
                f'"{word}": there is a picture or folder already ({arguments.images}); give one, or key=value.'
            )
    if arguments.qa and (arguments.images or arguments.question or arguments.no_image):
        raise InputError(
            "--qa asks the file's own questions about its own pictures; leave out pictures and --question."
        )
    if arguments.no_image and arguments.images:
        raise InputError(f"--no-image and {arguments.images}: ask about a picture or without one, not both.")
    return arguments


def open_checkpoint(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """(the config to answer with, the checkpoint): the model as the checkpoint has it; the `test` section from config.yaml
    where the checkpoint was found through it."""
    if arguments.checkpoint:
        checkpoint = Path(arguments.checkpoint).resolve()
        verify_folder(checkpoint)
        return with_models(load_config(checkpoint / "config.yaml", arguments.overrides)), checkpoint
    current = load_config(arguments.config, arguments.overrides)
    checkpoint = current.output_dir / "final"
    if not checkpoint.exists():
        raise InputError(
            f"{checkpoint}: no trained model yet; run sh train.sh first, or name one with --checkpoint DIR."
        )
    verify_folder(checkpoint)
    others = [word for word in arguments.overrides if not word.startswith("test.")]
    trained = with_models(load_config(checkpoint / "config.yaml", others))
    return dataclasses.replace(trained, test=current.test), checkpoint


def with_models(config: Config) -> Config:
    """The config, if the released weights that it names are still where they were; else InputError says how to name them."""
    for key in ("vision_tower", "language_model"):
        path = getattr(config.model, key)
        if path is not None and os.path.isabs(path) and not os.path.isdir(path):
            raise InputError(
                f"{path}: the checkpoint was trained on top of this folder, which is not there any more; say where it is "
                f"now: model.{key}=FOLDER."
            )
    return config


def find_pictures(path: str | Path | None) -> list[Path]:
    """One picture, or every picture below a folder."""
    if path is None:
        raise InputError('no picture to ask about: give a picture or a folder, or set "test.images".')
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such picture or folder.")
    pictures = list_images(path) if path.is_dir() else [path]
    if not pictures:
        raise InputError(
            f"{path}: no picture in this folder or below it (looked for .jpg, .png, .webp, .gif, .bmp, ...)."
        )
    return pictures


def make_folder(path: Path) -> Path:
    """The folder for the answers, made before the model is loaded: what is wrong with it shows at once."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); name another folder with --output.") from None
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Questions about pictures


def answer_questions(
    ask: Answerer,
    pictures: list[Path] | None,
    questions: Sequence[str],
    batch_size: int,
    checkpoint: Path,
    output: Path,
) -> None:
    """Ask every question about every picture (None: without one). Each answer is written as soon as it is there; a picture
    that cannot be read is listed and passed over."""
    rows: list[dict] = []
    unreadable: list[dict] = []
    shown = [None] if pictures is None else list(named_in_utf8(pictures, unreadable))
    count = len(shown) * len(questions)
    requests = (
        Request([("user", question_parts(question, 0 if image is None else 1))], [] if image is None else [image])
        for image, question in itertools.product(shown, questions)
    )
    given = tqdm(ask.stream(requests, batch_size), total=count, unit="answer")
    with open(output / "answers.jsonl", "w", encoding="utf-8") as file:
        for (image, question), answer in zip(itertools.product(shown, questions), given, strict=True):
            if isinstance(answer, ImageError):
                if not unreadable or unreadable[-1]["image"] != str(image):  # one line a picture
                    unreadable.append({"image": str(image), "problem": str(answer)})
                continue
            row = {
                "image": None if image is None else str(image),
                "question": question,
                "answer": answer.text,
                "seconds": round(answer.seconds, 4),
            }
            rows.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            tqdm.write(f"{'' if image is None else f'{image.name}: '}{question}  ->  {answer.text}")
    for entry in unreadable:
        print(f"not read: {entry['problem']}")
    if unreadable:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in unreadable)
        (output / "unreadable.jsonl").write_text(lines, encoding="utf-8")
    else:
        (output / "unreadable.jsonl").unlink(missing_ok=True)
    write_page(output / "answers.html", "Answers", f"{len(rows)} answers by {checkpoint}", rows, unreadable)
    if not rows:
        raise InputError(f"none of the {len(unreadable)} pictures can be read; {output / 'unreadable.jsonl'} says why.")


def named_in_utf8(pictures: Sequence[Path], unreadable: list[dict]) -> Iterator[Path]:
    """The pictures whose names can be written down; the others are added to `unreadable`."""
    for picture in pictures:
        try:
            str(picture).encode()
        except UnicodeEncodeError:
            name = os.fsencode(picture).decode(errors="replace")
            unreadable.append({"image": name, "problem": f"{name}: the file's name is not UTF-8 text; rename it."})
        else:
            yield picture


# ---------------------------------------------------------------------------------------------------------------------
# A QA file


def score_file(
    ask: Answerer, qa: QAFile, config: Config, built: Built, precision: str, checkpoint: Path, output: Path
) -> None:
    """Ask the questions of a QA file, with their pictures and with swapped ones; measure the loss of its answers; write and
    print the scores."""
    if not len(qa):
        raise InputError(f"{qa.path}: holds no records; expected one QA record a line.")
    questions = questions_of(qa, range(len(qa)))  # none where it holds texts alone, which have a loss all the same
    seconds: list[list[float]] = []  # of the questions with their own pictures, then of those with swapped ones

    def answers(asked: Sequence[Question]) -> list[str]:
        requests = [Request(question.turns, question.images) for question in asked]
        given = ask.answer_all(requests, config.test.batch_size, functools.partial(tqdm, unit="answer"))
        seconds.append([answer.seconds for answer in given])
        return [answer.text for answer in given]

    found = validate(qa, config, built, precision)
    scores, given = score(questions, answers, config.seed)
    scores |= found.values
    rows = [
        {
            "id": question.id,
            "image": str(question.images[-1]) if question.images else None,
            "question": question.text,
            "answer": answer,
            "reference": question.reference,
            "correct": is_correct(answer, question.reference),
            "type": question.type,
            "seconds": round(taken, 4),
        }
        for question, answer, taken in zip(questions, given, seconds[0], strict=True)
    ]
    (output / "answers.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    (output / "scores.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table = "\n".join([score_table(scores), *(f"{name} {value:.4f}" for name, value in found.values.items())])
    print(table)
    write_page(
        output / "answers.html", f"Scores on {qa.path.name}", f"{len(rows)} answers by {checkpoint}", rows, (), table
    )


def validate(qa: QAFile, config: Config, built: Built, precision: str) -> Validation:
    """How well the answers of a QA file are told, by all of its records that data.max_length leaves a use for."""
    limit, size, device = config.data.max_length, config.test.batch_size, built.model.causal_lm.device
    chat = chat_format(config, built)
    checked = check_file(qa.path, chat=chat, max_length=limit, sample_size=0, seed=config.seed)
    if checked.unfit_records:
        count = len(checked.unfit_records)
        print(f"note: {count} records are longer than data.max_length ({limit}) allows; the loss leaves them out")
    dataset = open_qa_file(config, built, qa.path, checked.unfit_records)
    if not len(dataset.kept):
        raise InputError(f'{qa.path}: no record fits into "data.max_length" ({limit}); allow more.')
    packed = packing(config).is_on
    starts = range(0, len(dataset.kept), size)
    batches = ([(0, int(index)) for index in dataset.kept[start : start + size]] for start in starts)
    loader = make_loader(dataset, batches, built.tokenizer.pad_token_id, 0, False, packed)
    sums = add_up(built.model, tqdm(loader, total=len(starts), unit="batch"), device, autocast(precision, device))
    return of_sums(sums, built.model.has_experts)


def main_within_memory() -> int:
    """`main`, with a full memory as a message instead of a traceback."""
    with full_memory_named("Make test.batch_size or test.max_new_tokens smaller."):
        return main()


if __name__ == "__main__":
    run_script(main_within_memory)
