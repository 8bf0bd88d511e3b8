"""Export a trained model.

    python -m model.export --checkpoint DIR --output DIR [--dtype bf16|fp16|fp32] [--format llava|native|gguf]
        [--push USER/NAME]

The folder gets its name only after the proof that it holds the same model.
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config, InputError, load_config, printable, run_script


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.export",
        description="Write a trained model in a form that other tools open, and prove it.",
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint's folder, such as runs/demo/final")
    parser.add_argument("--output", required=True, help="the folder to write; an earlier export there is replaced")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights (default: that of the released ones)"
    )
    parser.add_argument("--format", choices=("llava", "native", "gguf"), default="llava", help="default: llava")
    parser.add_argument("--quantize", choices=("q8_0", "f16"), help="type of the matrices in a GGUF file")
    parser.add_argument(
        "--allow-class-token", action="store_true", help="write GGUF files of a CLIP encoder, for a corrected llama.cpp"
    )
    parser.add_argument("--samples", type=int, default=24, help="held-out questions of the proof (default: 24)")
    parser.add_argument(
        "--allow-download", action="store_true", help="download the hub's models that the checkpoint names"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub after the proof")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.language_model=FOLDER")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.samples < 1:
        raise InputError(f"--samples {arguments.samples}: give 1 or more; nothing is exported without a proof.")
    for flag, value in (("--quantize", arguments.quantize), ("--allow-class-token", arguments.allow_class_token)):
        if value and arguments.format != "gguf":
            raise InputError(f"{flag} is for --format gguf; leave it out, or add --format gguf.")
    if arguments.push is not None:
        check_push(arguments.push)
    if arguments.quantize and arguments.dtype:
        raise InputError("--quantize and --dtype both name the type of the weights; leave one of them out.")
    return arguments


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("model.export.__main__.main_with_messages", lambda: parse_arguments(None))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from model.checkpoint_folder import weights_digest, write_folder
from model.export.card import Story, export_json, gguf_proof_lines, model_card, portable_config, refuse_foreign
from model.export.gguf_files import KINDS, QUANTIZED, need_gguf, refuse_encoder, write_gguf
from model.export.gguf_keys import text_config_of
from model.export.gguf_proof import prove_gguf
from model.export.llava import DTYPES, Prompts, refuse_inexpressible, write_json, write_llava
from model.export.native import PARTS, prove_native, write_native
from model.export.opened import is_export
from model.export.proof import NEW_TOKENS, Reference, judge, run_stock, write_job
from model.export.push import check_push, push
from model.export.samples import collect_samples
from model.export.weights import MergedLanguageModel, Trained
from model.hub import hub_access
from model.loaded import open_built, open_config
from model.start import EXPORT
from training.memory import explain_out_of_memory
from training.run import open_answerer, open_model, open_processors

CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    checkpoint, output = Path(arguments.checkpoint).resolve(), Path(os.path.abspath(arguments.output))
    if is_export(checkpoint):
        raise InputError(f"{checkpoint}: is an export already; name the checkpoint that it was made from.")
    transformers.utils.logging.disable_progress_bar()
    config = open_config(checkpoint, arguments.overrides)
    refuse_foreign(output, is_export(output))
    export = Export(config, checkpoint, arguments)
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        output.rmdir()  # an empty folder
    write_folder(output, export.write)
    print(printable(f"{output}: exported and proven the same model"))
    if arguments.push is not None:
        print(
            printable(f"uploaded to {push(output, arguments.push)} (a new repository is private until you change that)")
        )
    return 0


class Export:
    """One export: refuses what cannot be exported, then writes and proves a folder."""

    def __init__(self, config: Config, checkpoint: Path, arguments: argparse.Namespace) -> None:
        self.config, self.checkpoint = config, checkpoint
        self.format: str = arguments.format
        self.samples: int = arguments.samples
        if self.format == "gguf":
            need_gguf()
        typed = {word.partition("=")[2] for word in arguments.overrides}
        self.access = functools.partial(hub_access, config.model, typed, arguments.allow_download)
        with self.access():
            if self.format != "native":
                refuse_inexpressible(config.model)
            if self.format == "gguf":
                refuse_encoder(config.model, arguments.allow_class_token)
            processors = open_processors(config, checkpoint)
            language_model = MergedLanguageModel(config.model, config.lora, processors, checkpoint=checkpoint)
            self.trained = Trained(config.model, language_model, processors, checkpoint=checkpoint)
        names = {kind: name for name, kind in DTYPES.items()}
        self.dtype: str = arguments.dtype or names[language_model.stored_dtype]
        self.gguf_kind = QUANTIZED.get(arguments.quantize, KINDS[self.dtype])
        self.stored: str = arguments.quantize or self.dtype  # for the card and export.json

    def write(self, folder: Path) -> None:
        """Write a whole folder. Raises InputError if the proof fails."""
        with self.access():
            self.write_model(folder)
        proof = self.prove(folder)
        print_proof(proof)
        if proof["faults"]:
            raise InputError(
                f"not exported: the folder is not the model that was trained. {'; '.join(proof['faults'])}."
            )
        config = self.config
        write_json(folder / "proof.json", proof)
        story = Story(config.model, config.data, config.train, lora=config.lora, checkpoint=self.checkpoint)
        card = model_card(story, format_name=self.format, dtype=self.stored, proof=proof)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def write_model(self, folder: Path) -> None:
        """Write everything but the proof and the card."""
        config, test = self.config, self.config.test
        prompts = Prompts(config.data.system_prompt, test.max_new_tokens)
        if self.format == "llava":
            write_llava(folder, self.trained, prompts, dtype=self.dtype)
        elif self.format == "native":
            write_native(folder, self.trained, self.dtype)
        else:
            write_gguf(folder, self.trained, prompts, kind=self.gguf_kind)
        answering = {name: getattr(test, name) for name in ("max_new_tokens", "batch_size", "num_beams")}
        portable = portable_config(
            config.model,
            config.data,
            answering | {"questions": list(test.questions)},
            parts=PARTS if self.format == "native" else (".", "."),
            precision=config.train.precision,
            seed=config.seed,
        )
        if self.format != "gguf":  # nothing here opens GGUF files
            (folder / "config.yaml").write_text(portable, encoding="utf-8")
        digest = weights_digest(self.checkpoint)
        (folder / EXPORT).write_text(
            export_json(self.format, self.stored, self.trained.processors.max_tokens, digest=digest)
        )

    def prove(self, folder: Path) -> dict[str, Any]:
        """Compare the folder with the model as it was trained, and return the figures."""
        with tempfile.TemporaryDirectory() as job:
            reference = self.reference(Path(job))
            if self.format == "gguf":
                text = text_config_of(self.trained)
                answerer = open_answerer(self._short(self.config), reference.built, "fp32", device=CPU)
                layer = self.config.model.vision_feature_layer
                return prove_gguf(reference, answerer, folder, text=text, feature_layer=layer, kind=self.gguf_kind)
            if self.format == "llava":
                merged_apart = write_job(folder, reference, self.dtype, max_new_tokens=self.config.test.max_new_tokens)
                reference.release()
                run_stock([reference.job])
                return judge(reference, merged_apart, self.dtype)
            config = self._short(load_config(folder / "config.yaml"))
            opened = open_built(config, folder, "fp32")
            return prove_native(reference, opened, open_answerer(config, opened, "fp32", device=CPU), dtype=self.dtype)

    def reference(self, job: Path) -> Reference:
        """Build the model as it was trained and ask it the questions of the proof, whose images are written to `job`."""
        config = self._short(self.config)
        with self.access():
            built = open_model(config, "fp32", self.trained.processors, checkpoint=self.checkpoint)
        answerer = open_answerer(config, built, "fp32", device=CPU)
        samples = collect_samples(config, self.trained.processors, answerer, job=job, count=self.samples)
        return Reference(built, answerer, samples, job=job)

    @staticmethod
    def _short(config: Config) -> Config:
        """Return the config with the answers of a proof: greedy and short."""
        short = min(NEW_TOKENS, config.test.max_new_tokens)
        return dataclasses.replace(config, test=dataclasses.replace(config.test, max_new_tokens=short, num_beams=1))


def print_proof(proof: dict[str, Any]) -> None:
    count = proof["samples"]
    if "tensors" in proof:
        print(f"proof on {count} samples: {json.dumps(proof['kinds'])}", *gguf_proof_lines(proof), sep="\n")
        return
    equal = ", ".join(f"{way} {number} of {count}" for way, number in proof["answers_equal"].items())
    print(f"proof on {count} samples: {json.dumps(proof['kinds'])}")
    print(f"1. logits identical to the merged model's: {proof['logits_identical']} of {count}", end="")
    print(f" (at most {proof['logits_apart']:.3g} apart)")
    print(f"2. as trained against merged: at most {proof['merged_apart']:.3g} apart at the answers")
    print(f"3. greedy answers equal: {equal}")


def main_with_messages() -> int:
    """Run `main`, with a message instead of a traceback when memory is full."""
    with explain_out_of_memory("The proof holds the model in float32; export on a machine with more memory."):
        return main()
