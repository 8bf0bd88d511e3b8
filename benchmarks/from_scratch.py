"""The worth of each choice of the from-scratch recipe: `python -m benchmarks.from_scratch --output DIR [--jobs 2]`.

Trains recipes/from-scratch-demo.yaml as it is and with one choice switched off, with several seeds each, and writes means
and spreads of the held-out scores into DIR as from_scratch.md and from_scratch.json. Finished runs are kept, so the same
command resumes where it was interrupted. Some six minutes of one CPU core a run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from benchmarks.measuring import ROOT, machine, table
from config import InputError, load_config, run_script, to_yaml

RECIPE = ROOT / "recipes" / "from-scratch-demo.yaml"
DENSE = (  # as many parameters for a token as with two routed experts and the shared one
    "model.from_scratch.architecture=qwen2", "model.from_scratch.intermediate_size=192",
    "model.from_scratch.num_experts=null", "model.from_scratch.num_experts_per_tok=null",
    "model.from_scratch.moe_intermediate_size=null", "model.from_scratch.shared_expert_intermediate_size=null",
    "train.router_aux_loss_coef=null",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {  # name -> config keys; WITHOUT_TEXT also drops the first stage
    "the recipe": (),
    "MLP instead of the resampler": ("model.projector=mlp", "model.num_queries=null"),
    "causal instead of mixed attention": ("model.attention=causal",),
    "dense instead of experts, equal active parameters": DENSE,
    "without stage 0": (),
}
WITHOUT_TEXT = "without stage 0"
TYPES = ("colour", "shape", "count", "place", "yes_no", "digit", "unseen_pair")


def write_config(folder: Path, without_text: bool) -> Path:
    """Write the recipe with absolute paths into `folder`; with or without its first stage."""
    values = yaml.safe_load(to_yaml(load_config(RECIPE)))
    if without_text:
        values["train"]["stages"] = values["train"]["stages"][1:]
    path = folder / ("without_text.yaml" if without_text else "recipe.yaml")
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def train(config: Path, folder: Path, words: Sequence[str]) -> dict:
    """Run train.py, which passes over a finished run and refuses one of another config; return the scores."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), f"output_dir={folder}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=environment).returncode
    if status:
        raise InputError(f"{folder}: ended with exit code {status}; see log.txt there. The same command resumes.")
    return json.loads((folder / "final" / "scores.json").read_text(encoding="utf-8"))


def run_all(output: Path, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Return variant -> the scores of each seed."""
    output.mkdir(parents=True, exist_ok=True)
    configs = {flag: write_config(output, flag) for flag in (False, True)}

    def run(name: str, seed: int) -> dict:
        words = [*VARIANTS[name], f"seed={seed}", *arguments.override]
        return train(configs[name == WITHOUT_TEXT], output / f"{list(VARIANTS).index(name)}-{seed}", words)

    found: dict[str, list[dict]] = {name: [] for name in arguments.variants}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [(name, seed, pool.submit(run, name, seed)) for seed in arguments.seeds for name in arguments.variants]
        for name, seed, running in runs:
            found[name].append(running.result())
            print(f"{name}, seed {seed}: {100 * found[name][-1]['accuracy']:.1f} %", flush=True)
    return found


def cell(values: Sequence[float]) -> str:
    """Format mean and spread (lowest to highest), in percent."""
    low, mean, high = (100 * value for value in (min(values), statistics.mean(values), max(values)))
    return f"{mean:.1f} ({low:.0f}–{high:.0f})"


def as_markdown(found: dict[str, list[dict]], seeds: Sequence[int]) -> str:
    rows = []
    for name, scores in found.items():
        values = [[one[key] for one in scores] for key in ("accuracy", "blind")]
        values += [[one["by_type"][kind]["accuracy"] for one in scores] for kind in TYPES]
        rows.append([name, *map(cell, values)])
    about = f"{len(seeds)} seeds: mean (lowest–highest) of the held-out answers that are exactly right, in %."
    return f"{about} {machine()}.\n\n{table(['', 'all', 'blind', *TYPES], rows)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The worth of each choice of the from-scratch recipe.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a core each")
    parser.add_argument("--override", action="append", default=[], metavar="key=value", help="for every run")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    found = run_all(output, arguments)
    text = as_markdown(found, arguments.seeds)
    (output / "from_scratch.md").write_text(text, encoding="utf-8")
    values = {"date": str(datetime.date.today()), "seeds": arguments.seeds, "scores": found}
    (output / "from_scratch.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    run_script(main)
