"""Ask a trained model about one image or a folder of them, or score it on a QA file.

    python test.py [IMAGE_OR_FOLDER] [--checkpoint DIR] [--question TEXT]... [--output DIR] [key=value ...]
    python test.py --no-image --question TEXT
    python test.py --qa FILE [--images DIR] [--blind all] [--checkpoint DIR] [--output DIR] [key=value ...]

--qa takes a QA file, a raw source as in data.sources (CSV, JSON, Parquet, a folder), or the file of a benchmark (VQAv2, GQA,
TextVQA, POPE, MME, MMBench, MMStar, ScienceQA, SEED-Bench, COCO captions), whose results are also written for its
leaderboard; docs/scores.md has the metrics.

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
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C before run_script, which handles it

from config import (
    DEFAULT_CONFIG,
    Config,
    InputError,
    choose,
    load_config,
    nearest_path,
    printable,
    refuse_options,
    run_script,
)

BLIND = ("swapped", "blank", "absent")
METRIC_NAMES = ("exact", "vqa", "yes_no", "choice", "anls", "caption")
# keys of a raw source in data.sources, and of data, that may be given beside --qa
SOURCE_KEYS = ("format", "limit", "captions", "columns", "prompts")
DATA_KEYS = ("data.max_refused", "data.verify_images")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a trained model about images, or score it on a QA file.")
    parser.add_argument(
        "--checkpoint", help="folder of a checkpoint or an export (default: final/ of config.yaml's run)"
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="used if --checkpoint is not given")
    parser.add_argument(
        "--images",
        help="an image or a folder with its subfolders (default: test.images); with --qa: the folder of a raw source's "
        "images",
    )
    parser.add_argument("--question", action="append", help="may be given several times (default: test.questions)")
    parser.add_argument("--no-image", action="store_true", help="ask the questions without any image")
    parser.add_argument(
        "--qa", help="a QA file, a raw source or a benchmark: ask its questions, compare with its answers"
    )
    parser.add_argument(
        "--blind",
        metavar="KIND[,KIND]",
        help=f"with --qa, what to ask about instead of the images: {', '.join(BLIND)} or all (default: swapped); each takes "
        "as long as the questions themselves",
    )
    parser.add_argument(
        "--metric", choices=METRIC_NAMES, help="with --qa: score every answer so (default: chosen by the record's type)"
    )
    parser.add_argument("--suffix", help='with --qa: a line to add to each question, such as "Answer with one word."')
    parser.add_argument("--output", help="folder for answers.jsonl and answers.html (default: <run>/answers)")
    parser.add_argument(
        "--allow-download", action="store_true", help="download the hub's models that the checkpoint names"
    )
    parser.add_argument("rest", nargs="*", metavar="IMAGE_OR_FOLDER | key=value")
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    refuse_options(unknown, known=vars(arguments).keys() - {"rest"})
    arguments.overrides = []
    for word in arguments.rest:
        if "=" in word and not os.path.exists(word):
            arguments.overrides.append(word)
        elif arguments.qa:
            raise InputError(f"--qa asks the file's own questions about its own images; leave out {word}.")
        elif arguments.images is None:
            arguments.images = word
        else:
            raise InputError(
                f'"{word}": an image or folder is given already ({arguments.images}); give one, or key=value. A question '
                "is given with --question."
            )
    if arguments.qa and (arguments.question or arguments.no_image):
        raise InputError(
            "--qa asks the file's own questions about its own images; leave out --question and --no-image."
        )
    for name in ("blind", "metric", "suffix"):
        if getattr(arguments, name) is not None and not arguments.qa:
            raise InputError(f"--{name} is for scoring; give the questions with --qa FILE.")
    arguments.settings = []
    if arguments.qa:  # of a raw source; no section of a config has one of these names
        arguments.settings = [word for word in arguments.overrides if is_of_source(word)]
        arguments.overrides = [word for word in arguments.overrides if not is_of_source(word)]
    arguments.blind = blind_kinds(arguments.blind or "swapped")
    if arguments.no_image and arguments.images:
        raise InputError(f"--no-image and {arguments.images}: ask about an image or without one, not both.")
    return arguments


def is_of_source(word: str) -> bool:
    """Return whether `key=value` is about the source that --qa names, not about the config."""
    key = word.partition("=")[0].strip()
    return key.split(".")[0] in SOURCE_KEYS or key in DATA_KEYS


def blind_kinds(words: str) -> tuple[str, ...]:
    """Return the kinds of --blind; swapped images are always among them."""
    named = [word.strip() for word in words.split(",")]
    for word in named:
        choose(dict.fromkeys((*BLIND, "all")), word, "--blind")
    return tuple(kind for kind in BLIND if kind in named or kind == "swapped" or "all" in named)


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
from dataprocess.benchmark_files import MME_TASKS
from dataprocess.questions import Questions, open_questions
from dataset.checks.records import check_file
from dataset.conversation import question_parts
from dataset.loader import make_loader
from dataset.open import file_sha256
from dataset.qa_file import QAFile
from evaluation.leaderboard import Result, mme_scores, write_results
from evaluation.page import write_page
from evaluation.rows import ask_and_score, trained_on_text, with_suffix
from evaluation.score import questions_of, score_table
from evaluation.tables import metric_table, metrics_line
from evaluation.trained import trained_questions
from evaluation.validation import Validation, sum_losses
from model.answer import Answer, Answerer, Request
from model.build import Built, autocast, resolve_precision
from model.checkpoint_folder import MANIFEST
from model.hub import hub_access, hub_models
from model.loaded import open_built, open_config
from training.memory import explain_out_of_memory
from training.run import chat_format, max_length, open_answerer, open_qa_file
from training.speed import packing
from visual.images import ImageError, image_state, list_archived_images, list_images


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    config, checkpoint, own_models = open_checkpoint(arguments)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    images = None if arguments.qa or arguments.no_image else find_images(arguments.images or config.test.images)
    if not arguments.output:
        refuse_link(checkpoint.parent / "answers")
    output = Path(arguments.output) if arguments.output else checkpoint.parent / "answers"
    source = qa = None
    if arguments.qa:
        folder = Path(arguments.images) if arguments.images else None
        source = open_questions(Path(arguments.qa), output, images=folder, settings=arguments.settings)
        qa = QAFile(source.qa_file)  # its faults show before the model is loaded
    make_folder(output)
    device = PartialState().device
    word = config.train.precision
    precision = resolve_precision("auto" if word == "fp16" and device.type == "cpu" else word, device)
    with hub_access(config.model, own_models, arguments.allow_download):
        built = open_built(config, checkpoint, precision)
    built.model.to(device).eval()
    answerer = open_answerer(config, built, precision, device=device)
    title, table = "Answers", ""
    unreadable: list[dict] = []
    if source is not None and qa is not None:
        title = f"Scores on {qa.path.name}"
        values = {} if is_unanswered(source) else validate(qa, config, built, precision=precision).values
        rows, scores, table = score_questions(
            source, answerer, arguments, config=config, checkpoint=checkpoint, output=output
        )
        scores |= values | {"checkpoint_sha256": file_sha256(checkpoint / MANIFEST)}
        with writing(output / "scores.json") as path:
            write_whole(path, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
        table = "\n".join([table, *(f"{name} {value:.4f}" for name, value in values.items())])
        print(table)
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
            f"{checkpoint}: no trained model yet; run sh train.sh first, or name the config of its training with --config "
            "FILE, or the model with --checkpoint DIR."
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
        advice = "Give an image or a folder: sh test.sh IMAGE_OR_FOLDER, or set test.images in the config."
        raise InputError(f"{path}: no such image or folder{nearest_path(path)} {advice}") from None
    if path.suffix.lower() in (".zip", ".tar") and path.is_file():
        images = list_archived_images(path)
    else:
        images = list_images(path) if path.is_dir() else [path]
    if not images:
        raise InputError(f"{path}: no image in it or below it (looked for .jpg, .png, .webp, .gif, .bmp, ...).")
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
    source: Questions, answerer: Answerer, arguments: argparse.Namespace, config: Config, checkpoint: Path, output: Path
) -> tuple[list[dict], dict, str]:
    """Ask the questions of a QA file, with their images and without them; write answers.jsonl and, for a benchmark, the file
    of its leaderboard.

    Questions that do not fit into the language model are left out and counted. Returns (rows of answers.jsonl, scores, the
    table to print).
    """
    qa = QAFile(source.qa_file)
    found = questions_of(qa, range(len(qa)))  # empty if the file holds texts alone, which still have a loss
    if arguments.suffix:
        found = [with_suffix(question, arguments.suffix) for question in found]
    fits = [answerer.fits(question.turns) for question in found]
    questions = [
        dataclasses.replace(question, metric=arguments.metric or "")
        for question, fit in zip(found, fits, strict=True)
        if fit
    ]

    def answer_all(requests: Sequence[Request]) -> list[Answer]:
        return answerer.answer_all(requests, config.test.batch_size, functools.partial(tqdm, unit="answer"))

    trained = trained_questions(questions, training_files(config))
    if trained:
        print(trained_on_text(questions, trained))
    print(f"asking {len(questions):,} questions, and again with other images: {', '.join(arguments.blind)}")
    scores, rows = ask_and_score(
        questions, answer_all, config.seed, left_out=len(found) - len(questions), kinds=arguments.blind
    )
    write_rows(output / "answers.jsonl", rows)
    if trained:
        scores["trained_on"] = sorted({questions[i].id for i in trained})
    if source.benchmark == "mme":
        scores["mme"] = mme_scores(scores["metrics"], MME_TASKS)
    if source.benchmark:
        texts = iter(rows)
        results = [
            Result(next(texts)["answer"] if fit else "", asked.native, asked.options)
            for asked, fit in zip(source.asked, fits, strict=True)
        ]
        with writing(output / "results"):
            paths = write_results(source.benchmark, results, output)
        print(printable(f"for the leaderboard: {', '.join(map(str, paths))}"))
    parts = [score_table(scores), metrics_line(questions), metric_table(scores)]
    parts += [f"MME {part} {value:.1f}" for part, value in scores.get("mme", {}).items()]
    return rows, scores, "\n".join(part for part in parts if part)


def is_unanswered(source: Questions) -> bool:
    """Return whether no answer of a benchmark is known, so that there is nothing to measure a loss on."""
    return bool(source.benchmark) and not any(question.answers for question in source.asked)


def training_files(config: Config) -> list[Path]:
    """Return the QA files that a checkpoint was trained on: its own, and those of the checkpoints that it started from."""
    files = [config.data.qa_file]
    start, seen = config.model.start_from, set[Path]()
    while start is not None and start not in seen and (start / "config.yaml").is_file():
        seen.add(start)
        try:
            earlier = open_config(start, [])
        except InputError:  # no checkpoint any more
            break
        files.append(earlier.data.qa_file)
        start = earlier.model.start_from
    return files


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
