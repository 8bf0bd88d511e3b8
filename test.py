"""Ask a trained model about one image or a folder of them, or score it on a QA file.

    python test.py [IMAGE_OR_FOLDER] [--checkpoint DIR] [--question TEXT]... [--output DIR] [key=value ...]
    python test.py --no-image --question TEXT
    python test.py --qa FILE [--checkpoint DIR] [--output DIR]

A checkpoint's folder is all that is needed; the default is the final/ of config.yaml's run. Writes answers.jsonl and
answers.html (with --qa also scores.json) into --output, by default <run>/answers. Models that the checkpoint names by hub
name are read from the local cache; missing ones are downloaded if config.yaml names them too, or with --allow-download.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from config import DEFAULT_CONFIG, Config, InputError, load_config, printable, run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a trained model about images, or score it on a QA file.")
    parser.add_argument(
        "--checkpoint", help="folder of a checkpoint or an export (default: final/ of config.yaml's run)"
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="used if --checkpoint is not given")
    parser.add_argument("--images", help="an image or a folder with its subfolders (default: test.images)")
    parser.add_argument("--question", action="append", help="may be given several times (default: test.questions)")
    parser.add_argument("--no-image", action="store_true", help="ask the questions without any image")
    parser.add_argument("--qa", help="a QA file: ask its questions, compare with its answers")
    parser.add_argument("--output", help="folder for answers.jsonl and answers.html (default: <run>/answers)")
    parser.add_argument(
        "--allow-download", action="store_true", help="download the hub's models that the checkpoint names"
    )
    parser.add_argument("rest", nargs="*", metavar="IMAGE_OR_FOLDER | key=value")
    arguments = parser.parse_intermixed_args(argv)
    arguments.overrides = []
    for word in arguments.rest:
        if "=" in word and not os.path.exists(word):
            arguments.overrides.append(word)
        elif arguments.images is None:
            arguments.images = word
        else:
            raise InputError(
                f'"{word}": an image or folder is given already ({arguments.images}); give one, or key=value.'
            )
    if arguments.qa and (arguments.images or arguments.question or arguments.no_image):
        raise InputError("--qa asks the file's own questions about its own images; leave out images and --question.")
    if arguments.no_image and arguments.images:
        raise InputError(f"--no-image and {arguments.images}: ask about an image or without one, not both.")
    return arguments


def check_arguments() -> None:
    """Parse the command line and the config. Raises InputError for what is wrong in them."""
    arguments = parse_arguments(None)
    if not arguments.checkpoint:
        load_config(arguments.config, arguments.overrides)


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("test.main_with_messages", check_arguments)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from accelerate import PartialState
from tqdm import tqdm

from config.files import naming, open_new, refuse_link, write_whole
from dataset.checks.records import check_file
from dataset.conversation import question_parts
from dataset.loader import make_loader
from dataset.open import file_sha256
from dataset.qa_file import QAFile
from evaluation.page import write_page
from evaluation.score import Question, is_correct, questions_of, score, score_table, swap_images
from evaluation.validation import Validation, sum_losses
from model.answer import Answer, Answerer, Request
from model.build import Built, autocast, hub_access, hub_models, resolve_precision
from model.checkpoint_folder import MANIFEST
from model.hub import check_hub
from model.loaded import open_built, open_config
from training.memory import explain_out_of_memory
from training.run import chat_format, max_length, open_answerer, open_qa_file
from training.speed import packing
from visual.images import ImageError, image_state, list_images


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config, checkpoint, own_models = open_checkpoint(arguments)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    images = None if arguments.qa or arguments.no_image else find_images(arguments.images or config.test.images)
    qa = QAFile(Path(arguments.qa)) if arguments.qa else None
    if not arguments.output:
        refuse_link(checkpoint.parent / "answers")
    output = make_folder(Path(arguments.output) if arguments.output else checkpoint.parent / "answers")
    device = PartialState().device
    word = config.train.precision
    precision = resolve_precision("auto" if word == "fp16" and device.type == "cpu" else word, device)
    if arguments.allow_download or hub_models(config.model) <= own_models:
        check_hub(config.model)
    with hub_access(config.model, own_models, arguments.allow_download):
        built = open_built(config, checkpoint, precision)
    built.model.to(device).eval()
    answerer = open_answerer(config, built, precision, device=device)
    title, table = "Answers", ""
    unreadable: list[dict] = []
    if qa is not None:
        title = f"Scores on {qa.path.name}"
        validation = validate(qa, config, built, precision=precision)
        rows, table = score_questions(qa, answerer, validation, config=config, checkpoint=checkpoint, output=output)
    else:
        questions = arguments.question or list(config.test.questions)
        rows, unreadable = answer_questions(
            answerer, images, questions, batch_size=config.test.batch_size, output=output
        )
    about = f"{len(rows)} answers by {checkpoint}"
    with writing(output / "answers.html") as page:
        write_page(page, title, about, rows=rows, unreadable=unreadable, table=table)
    if unreadable and not rows:
        raise InputError(
            f"none of the {len(unreadable)} images can be read; {output / 'unreadable.jsonl'} gives the reasons."
        )
    print(printable(f"{output / 'answers.jsonl'}\n{output / 'answers.html'}", lines=True))
    return 0


def open_checkpoint(arguments: argparse.Namespace) -> tuple[Config, Path, set[str]]:
    """Return (the config to answer with, the checkpoint, the hub's models that the user named).

    The model is the checkpoint's. The `test` section is config.yaml's if the checkpoint was found through it.
    """
    typed = {word.partition("=")[2] for word in arguments.overrides}
    if arguments.checkpoint:
        checkpoint = Path(arguments.checkpoint).resolve()
        return open_config(checkpoint, arguments.overrides), checkpoint, typed
    current = load_config(arguments.config, arguments.overrides)
    checkpoint = current.output_dir / "final"
    if not checkpoint.exists():
        raise InputError(
            f"{checkpoint}: no trained model yet; run sh train.sh first, or name one with --checkpoint DIR."
        )
    others = [word for word in arguments.overrides if not word.startswith("test.")]
    trained = open_config(checkpoint, others)
    return dataclasses.replace(trained, test=current.test), checkpoint, typed | hub_models(current.model)


def find_images(path: str | Path | None) -> list[Path]:
    """Return one image, or every image in a folder and its subfolders."""
    if path is None:
        raise InputError('no image to ask about: give an image or a folder, or set "test.images".')
    path = Path(path)
    try:
        image_state(path)
    except (OSError, ValueError):
        raise InputError(f"{path}: no such image or folder.") from None
    images = list_images(path) if path.is_dir() else [path]
    if not images:
        raise InputError(
            f"{path}: no image in this folder or below it (looked for .jpg, .png, .webp, .gif, .bmp, ...)."
        )
    return images


def make_folder(path: Path) -> Path:
    """Create the folder for the answers before the model is loaded, so that a fault shows at once."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({error.strerror}); name another folder with --output.") from None
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Name `path`, which the block writes, in an error of the disk."""
    try:
        yield path
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name another folder with --output.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Questions about images


def answer_questions(
    answerer: Answerer, images: list[Path] | None, questions: Sequence[str], batch_size: int, output: Path
) -> tuple[list[dict], list[dict]]:
    """Ask every question about every image (None: without an image). Returns (rows of answers.jsonl, unreadable images).

    Each answer is written as soon as it is known. An image that cannot be read is listed and skipped.
    """
    rows: list[dict] = []
    unreadable: list[dict] = []
    shown: list[Path | None] = [None] if images is None else list(named_in_utf8(images, unreadable))
    asked = list(itertools.product(shown, questions))
    requests = (
        Request([("user", question_parts(question, 0 if image is None else 1))], [] if image is None else [image])
        for image, question in asked
    )
    answers = tqdm(answerer.stream(requests, batch_size), total=len(asked), unit="answer")
    with writing(output / "answers.jsonl") as path:
        file = open_new(path)
    with naming(path), file:
        for (image, question), answer in zip(asked, answers, strict=True):
            if isinstance(answer, ImageError):
                if not unreadable or unreadable[-1]["image"] != str(image):  # one line an image
                    unreadable.append({"image": str(image), "problem": str(answer)})
                continue
            row = {
                "image": None if image is None else str(image),
                "question": question,
                "answer": answer.text,
                "seconds": round(answer.seconds, 4),
            }
            rows.append(row)
            with writing(path):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
            tqdm.write(printable(f"{'' if image is None else f'{image.name}: '}{question}  ->  {answer.text}"))
    for entry in unreadable:
        print(f"not read: {printable(entry['problem'])}")
    if unreadable:
        write_rows(output / "unreadable.jsonl", unreadable)
    else:
        (output / "unreadable.jsonl").unlink(missing_ok=True)
    return rows, unreadable


def named_in_utf8(images: Sequence[Path], unreadable: list[dict]) -> Iterator[Path]:
    """Yield the images whose names are UTF-8 text, and add the others to `unreadable`."""
    for image in images:
        try:
            str(image).encode()
        except UnicodeEncodeError:
            name = os.fsencode(image).decode(errors="replace")
            unreadable.append({"image": name, "problem": f"{name}: the file's name is not UTF-8 text; rename it."})
        else:
            yield image


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as JSON Lines."""
    with writing(path):
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# A QA file


def score_questions(
    qa: QAFile, answerer: Answerer, validation: Validation, config: Config, checkpoint: Path, output: Path
) -> tuple[list[dict], str]:
    """Ask the questions of a QA file, with their images and with swapped ones; write answers.jsonl and scores.json, which
    names the checkpoint by the SHA-256 of its manifest.

    Questions that do not fit into the language model are left out and counted. Returns (rows of answers.jsonl, the printed
    table).
    """
    found = questions_of(qa, range(len(qa)))  # empty if the file holds texts alone, which still have a loss
    questions = [question for question in found if answerer.fits(question.turns)]
    answered: list[list[Answer]] = []  # the questions with their own images, then those with swapped ones

    def ask(asked: Sequence[Question]) -> list[str]:
        requests = [Request(question.turns, question.images) for question in asked]
        answers = answerer.answer_all(requests, config.test.batch_size, functools.partial(tqdm, unit="answer"))
        answered.append(answers)
        return [answer.text for answer in answers]

    scores, _ = score(questions, ask, seed=config.seed, left_out=len(found) - len(questions))
    scores |= validation.values | {"checkpoint_sha256": file_sha256(checkpoint / MANIFEST)}
    given, others = answered[0], iter(answered[1])
    is_swapped = [question is not None for question in swap_images(questions, config.seed)]
    rows = [
        {
            "id": question.id,
            "image": str(question.images[-1]) if question.images else None,
            "question": question.text,
            "answer": answer.text,
            "blind": next(others).text if swapped else None,
            "reference": question.reference,
            "correct": is_correct(answer.text, question.reference),
            "type": question.type,
            "seconds": round(answer.seconds, 4),
        }
        for question, answer, swapped in zip(questions, given, is_swapped, strict=True)
    ]
    write_rows(output / "answers.jsonl", rows)
    with writing(output / "scores.json") as path:
        write_whole(path, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    table = "\n".join([score_table(scores), *(f"{name} {value:.4f}" for name, value in validation.values.items())])
    print(table)
    return rows, table


def validate(qa: QAFile, config: Config, built: Built, precision: str) -> Validation:
    """Measure loss and accuracy on the answers of all records of a QA file that data.max_length leaves a use for."""
    if not len(qa):
        raise InputError(f"{qa.path}: holds no records; expected one QA record a line.")
    limit, size, device = max_length(config, built), config.test.batch_size, built.model.causal_lm.device
    chat = chat_format(config, built)
    checked = check_file(qa.path, chat=chat, max_length=limit, sample_size=0, seed=config.seed)
    if checked.unfit_records:
        count = len(checked.unfit_records)
        print(f"note: {count} records are longer than {limit} tokens allow; the loss leaves them out")
    dataset = open_qa_file(config, built, qa.path, left_out=checked.unfit_records)
    if not len(dataset.kept):
        raise InputError(f"{qa.path}: no record fits into {limit} tokens; allow more (data.max_length).")
    starts = range(0, len(dataset.kept), size)
    keys = ([(0, int(index)) for index in dataset.kept[start : start + size]] for start in starts)
    loader = make_loader(dataset, keys, built.tokenizer.pad_token_id, packed=packing(config).is_on)
    batches = tqdm(loader, total=len(starts), unit="batch")
    sums = sum_losses(built.model, batches, device=device, autocast=autocast(precision, device))
    return Validation.of_sums(sums, built.model.has_experts)


def main_with_messages() -> int:
    """Run `main`, with a message instead of a traceback when memory is full."""
    with explain_out_of_memory("Make test.batch_size or test.max_new_tokens smaller."):
        return main()
