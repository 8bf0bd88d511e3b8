"""What an answer costs, asked in batches and one at a time: `python -m benchmarks.answering`.

Two tasks: one question about every picture of a folder, and eight questions about every picture. Each is done by the plain
way, which is what one writes first and has a KV cache too: for each question read the picture, encode it, generate. And by
ours: batches, pictures read by threads meanwhile, a picture's part of the prompt read once for all questions about it.
Every measure runs in a process of its own, by turns. All answers have the same length, and in float32 the same tokens
whichever way they are asked, or this stops. Prints Markdown. Needs Linux (/proc tells what memory is in use).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
SEED = 1
QUESTIONS = 8  # about a picture, in the second task
QUESTION_WORDS = (5, 15)
BATCH = 8

NAMES = {
    "folder_plain": "a folder, one at a time",
    "folder_batched": f"a folder, batches of {BATCH}",
    "questions_plain": f"{QUESTIONS} questions a picture, one at a time",
    "questions_shared": f"{QUESTIONS} questions a picture, the picture shared",
}


class TokenIds:
    """In the tokenizer's place: the text of an answer is its token ids."""

    @staticmethod
    def batch_decode(rows, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in rows]


def requests_about(pictures: list[Path], questions: int) -> list:
    """`questions` about each of the pictures, no two alike."""
    from benchmarks.workload import WORDS
    from dataset.conversation import question_parts
    from model.answer import Request

    chance = random.Random(SEED)
    words = [word for word in WORDS if word.isascii() and word.isalpha()]
    return [
        Request(
            [("user", question_parts(" ".join(chance.choices(words, k=chance.randint(*QUESTION_WORDS))), 1))], [path]
        )
        for path in pictures
        for _ in range(questions)
    ]


def answer_plainly(ask, requests: list) -> list[str]:
    """One after the other, each from its file on."""
    import torch

    model, texts = ask.model, []
    with torch.inference_mode(), ask.autocast():
        for request in requests:
            ids = torch.tensor([ask.chat.encode_prompt(request.turns)])
            features = model.encode_images(torch.stack([ask.read_pixels(path) for path in request.images]))
            out = model.causal_lm.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), image_features=features, **ask.options
            )
            texts += TokenIds.batch_decode(out[:, ids.shape[1] :], True)
    return texts


def measure(name: str, folder: Path, precision: str, pictures: int, new_tokens: int, threads: int) -> dict:
    """Seconds, memory above that of the loaded model at the highest (MiB), and the answers, of one way of asking."""
    import torch

    from benchmarks.data import Clock
    from config import load_config
    from training.run import answerer, build, open_processors

    torch.set_num_threads(threads)
    config = load_config(folder / "config.yaml", [f"test.max_new_tokens={new_tokens}"])
    built = build(config, precision, open_processors(config))
    built.model.eval()
    ask = answerer(config, built, precision, torch.device("cpu"))
    ask.tokenizer = TokenIds()
    ask.options["min_new_tokens"] = new_tokens  # random weights: where they stop says nothing
    task, way = name.split("_")
    count = pictures // QUESTIONS if task == "questions" else pictures
    files = [folder / "images" / f"{i}.jpg" for i in range(count)]
    requests = requests_about(files, QUESTIONS if task == "questions" else 1)

    def answers(asked: list) -> list[str]:
        if way == "plain":
            return answer_plainly(ask, asked)
        return [answer.text for answer in ask.answer_all(asked, BATCH)]

    answers(requests[:BATCH])  # what is set up once
    clock = Clock()
    texts = answers(requests)
    return clock.read() | {"answers": texts}


def run(folder: Path, rounds: int, *sizes: str) -> dict[str, dict]:
    """Every measure in every round, by turns: name -> medians, and the answers of the first round."""
    results: dict[str, list[dict]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            options = ["--measure", name, "--workdir", str(folder), *sizes]
            command = [sys.executable, "-m", "benchmarks.answering", *options]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    keys = ("cpu", "wall", "peak")
    medians = {name: {key: median(one[key] for one in found) for key in keys} for name, found in results.items()}
    return {name: medians[name] | {"answers": results[name][0]["answers"]} for name in NAMES}


def check_agreement(results: dict[str, dict], precision: str) -> None:
    """Raises ValueError where answers in float32 are not those of the plain way."""
    wrong = {name: share for name, share in shares_equal(results).items() if share < 1}
    if precision == "fp32" and wrong:
        raise ValueError(f"of these answers only a share has the tokens of those asked one at a time: {wrong}")


def shares_equal(results: dict[str, dict]) -> dict[str, float]:
    """Task -> the share of the answers whose tokens are all those of the plain way."""
    shares = {}
    for plain, ours in (("folder_plain", "folder_batched"), ("questions_plain", "questions_shared")):
        pairs = list(zip(results[plain]["answers"], results[ours]["answers"], strict=True))
        shares[ours] = sum(one == other for one, other in pairs) / len(pairs)
    return shares


def markdown(results: dict[str, dict], about: str) -> str:
    shares = shares_equal(results)
    head = ["", "answers a second", "times", "answers a CPU second", "times", "MiB above the model", "tokens alike"]
    rows = [head, ["---"] * len(head)]
    for name, title in NAMES.items():
        found, plain = results[name], results[f"{name.split('_')[0]}_plain"]
        count = len(found["answers"])
        equal = f"{100 * shares[name]:.0f} %" if name in shares else ""
        cells = [f"{count / found['wall']:.2f}", f"{plain['wall'] / found['wall']:.2f}"]
        cells += [f"{count / found['cpu']:.2f}", f"{plain['cpu'] / found['cpu']:.2f}"]
        rows.append([title, *cells, f"{found['peak']:,.0f}", equal])
    return "\n".join([about, "", *("| " + " | ".join(row) + " |" for row in rows)])


def machine() -> str:
    import torch
    import transformers

    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {versions}, {date.today()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What an answer costs, in batches and one at a time. Prints Markdown.")
    parser.add_argument("--rounds", type=int, default=3, help="each measure so many times (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=64, help="in the folder (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of every answer (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that torch computes with (default: %(default)s)")
    parser.add_argument(
        "--workdir", type=Path, help="keep the workload here for the next run (default: a temporary folder)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one round: shows that it works, not how fast"
    )
    parser.add_argument("--measure", choices=NAMES, help="this one alone, in --workdir as it is; prints JSON")
    arguments = parser.parse_args()
    sizes = (arguments.precision, arguments.pictures, arguments.new_tokens, arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.workdir, *sizes)))
        return
    from benchmarks.vlm_workload import make_workload

    if arguments.quick:
        arguments.rounds, arguments.pictures, arguments.new_tokens = 1, 16, 4
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)).resolve()
        make_workload(folder, "tiny" if arguments.quick else "W2", arguments.pictures)
        words = (arguments.pictures, arguments.new_tokens, arguments.threads)
        flags = [f"--{key}={value}" for key, value in zip(("pictures", "new-tokens", "threads"), words, strict=True)]
        results = run(folder, arguments.rounds, f"--precision={arguments.precision}", *flags)
    check_agreement(results, arguments.precision)
    about = f"{arguments.precision}, threads: {arguments.threads}, {arguments.new_tokens} new tokens an answer"
    rounds = f"{arguments.rounds} round{'s' if arguments.rounds > 1 else ''}"
    print(markdown(results, f"{machine()}; {about}; median of {rounds}."))


if __name__ == "__main__":
    main()
