"""The cost of an answer, asked in batches and one at a time: `python -m benchmarks.answering`.

Two tasks: one question about every image of a folder, and eight questions about every image. The plain way, which is what
one writes first, also has a KV cache: for each question it reads the image, encodes it and generates. Ours asks in batches,
reads the next images in threads meanwhile, and reads an image's part of the prompt once for all questions about it. Every
measure runs in a process of its own, by turns. All answers have the same length, and in float32 the same tokens in both
ways, or this stops.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.annotations import PLAIN_WORDS, SEED
from benchmarks.measuring import Clock, machine, make_parser, measure_by_turns, median_of, open_workdir, table
from benchmarks.workload import write_workload
from config import load_config
from dataset.conversation import question_parts
from model.answer import Answerer, Request
from training.run import open_answerer, open_model, open_processors

QUESTIONS = 8  # about an image, in the second task
QUESTION_WORDS = (5, 15)
BATCH = 8

NAMES = {
    "folder_plain": "a folder, one at a time",
    "folder_batched": f"a folder, batches of {BATCH}",
    "questions_plain": f"{QUESTIONS} questions an image, one at a time",
    "questions_shared": f"{QUESTIONS} questions an image, the image shared",
}


class TokenIds:
    """Replaces the tokenizer: the text of an answer is its token ids."""

    @staticmethod
    def batch_decode(rows: Any, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in rows]


def requests_about(images: Sequence[Path], questions: int) -> list[Request]:
    """Make `questions` different questions about each image."""
    chance = random.Random(SEED)
    lengths = (chance.randint(*QUESTION_WORDS) for _ in range(len(images) * questions))
    texts = (" ".join(chance.choices(PLAIN_WORDS, k=length)) for length in lengths)
    return [Request([("user", question_parts(next(texts), 1))], [path]) for path in images for _ in range(questions)]


def answer_plainly(answerer: Answerer, requests: Sequence[Request]) -> list[str]:
    """Answer one request after the other, each from its image file on."""
    model: Any = answerer.model
    texts = []
    with torch.inference_mode(), answerer.autocast():
        for request in requests:
            ids = torch.tensor([answerer.chat.encode_prompt(request.turns)])
            features = model.encode_images(torch.stack([answerer.read_pixels(path) for path in request.images]))
            out = model.causal_lm.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), image_features=features, **answerer.options
            )
            texts += TokenIds.batch_decode(out[:, ids.shape[1] :], True)
    return texts


def measure(name: str, arguments: argparse.Namespace) -> dict:
    """Return time, memory above that of the loaded model, and the answers, of one way of asking."""
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.workdir / "config.yaml", [f"test.max_new_tokens={arguments.new_tokens}"])
    built = open_model(config, arguments.precision, open_processors(config))
    built.model.eval()
    answerer: Any = open_answerer(config, built, arguments.precision, torch.device("cpu"))
    answerer.tokenizer = TokenIds()
    answerer.options["min_new_tokens"] = arguments.new_tokens  # where random weights stop has no meaning
    task, way = name.split("_")
    questions = QUESTIONS if task == "questions" else 1
    images = [arguments.workdir / "images" / f"{i}.jpg" for i in range(arguments.images // questions)]
    requests = requests_about(images, questions)

    def answers(asked: list[Request]) -> list[str]:
        if way == "plain":
            return answer_plainly(answerer, asked)
        return [answer.text for answer in answerer.answer_all(asked, BATCH)]

    answers(requests[:BATCH])  # what is set up once
    clock = Clock()
    texts = answers(requests)
    return clock.read() | {"answers": texts}


def check_agreement(answers: dict[str, list[dict]], precision: str) -> None:
    """Raise ValueError if answers in float32 are not those of the plain way."""
    wrong = {name: share for name, share in shares_equal(answers).items() if share < 1}
    if precision == "fp32" and wrong:
        raise ValueError(f"only a share of these answers has the tokens of those asked one at a time: {wrong}")


def shares_equal(answers: dict[str, list[dict]]) -> dict[str, float]:
    """Return way -> the share of its answers whose tokens are all those of the plain way, in the first round."""
    shares = {}
    for plain, ours in (("folder_plain", "folder_batched"), ("questions_plain", "questions_shared")):
        pairs = list(zip(*(answers[name][0]["answers"] for name in (plain, ours)), strict=True))
        shares[ours] = sum(one == other for one, other in pairs) / len(pairs)
    return shares


def markdown(answers: dict[str, list[dict]], about: str) -> str:
    shares = shares_equal(answers)

    def cost(name: str, key: str) -> float:
        return median(one[key] for one in answers[name])

    head = ["", "answers a second", "times", "answers a CPU second", "times", "MiB above the model", "tokens alike"]
    rows = []
    for name, title in NAMES.items():
        plain, count, cells = f"{name.split('_')[0]}_plain", len(answers[name][0]["answers"]), [title]
        for clock in ("wall", "cpu"):
            seconds = cost(name, clock)
            cells += [f"{count / seconds:.2f}", f"{cost(plain, clock) / seconds:.2f}"]
        equal = f"{100 * shares[name]:.0f} %" if name in shares else ""
        rows.append([*cells, f"{cost(name, 'peak'):,.0f}", equal])
    return f"{about}\n\n{table(head, rows)}"


def main() -> None:
    parser = make_parser("The cost of an answer, in batches and one at a time.", NAMES)
    parser.add_argument("--images", type=int, default=64, help="in the folder (default: %(default)s)")
    parser.add_argument("--pictures", dest="images", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=int, default=32, help="of every answer (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that torch computes with (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments)))
        return
    if arguments.quick:
        arguments.rounds, arguments.images, arguments.new_tokens = 1, 16, 4
    with open_workdir(arguments.workdir) as folder:
        write_workload(folder, "tiny" if arguments.quick else "W2", arguments.images)
        options = {key: getattr(arguments, key) for key in ("precision", "threads", "images", "new_tokens")}
        answers = measure_by_turns("answering", NAMES, arguments.rounds, workdir=folder, **options)
    check_agreement(answers, arguments.precision)
    about = f"{arguments.precision}, threads: {arguments.threads}, {arguments.new_tokens} new tokens an answer"
    print(markdown(answers, f"{machine(('torch', 'transformers'))}; {about}; {median_of(arguments.rounds)}."))


if __name__ == "__main__":
    main()
