"""Pretrain the demo's two backbones. They are shipped in this folder, so using the demo does not require this script.

    python -m demo.pretrain_backbones [--only vision|language] [--out demo]

Seeded, one thread. The tokenizer's trainer numbers tokens of equal frequency in no fixed order, so the language model's
weights still differ from run to run. The printed scores are on held-out images and scenes.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import time
from pathlib import Path

from config import run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain the demo's tiny image encoder and language model.")
    parser.add_argument("--only", choices=("vision", "language"))
    parser.add_argument("--out", type=Path, default=Path("demo"))
    return parser.parse_args(argv)


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("demo.pretrain_backbones.main", lambda: parse_arguments(None))

import torch

from demo import language, vision

VISION_STEPS, LANGUAGE_STEPS = 500, 1600
SEED = 0


def _table(title: str, scores: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()), flush=True)


def main() -> int:
    arguments = parse_arguments(None)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.process_time()

    def log(line: str) -> None:
        print(f"[{time.process_time() - start:5.0f} CPU s] {line}", flush=True)

    if arguments.only != "language":
        _table("probes of a random encoder", vision.probe(vision.new_encoder(SEED).eval()))
        encoder = vision.pretrain(steps=VISION_STEPS, seed=SEED, log=log)
        vision.save(encoder, arguments.out / "vision_tower")
        _table("probes of the encoder", vision.probe(encoder.float()))
    if arguments.only != "vision":
        tokenizer = language.new_tokenizer()
        model = language.pretrain(tokenizer, steps=LANGUAGE_STEPS, seed=SEED, log=log)
        language.save(model, tokenizer, arguments.out / "language_model")
        _table("correct answers of the language model", language.probe(model.float(), tokenizer, batches=20))
    return 0
