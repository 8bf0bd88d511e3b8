"""Report how well a trained model names emoji in the drawing style that training did not see.

    python -m demo.emoji_report --checkpoint DIR [--emoji data/emoji] [--output DIR] [key=value ...]
    python -m demo.emoji_report --baselines-only [--config recipes/emoji.yaml] [--emoji data/emoji] [key=value ...]

The answers are those that `python test.py --checkpoint DIR --qa data/emoji/validation.jsonl` wrote; so are their marks.
Beside them: the same questions with swapped images (blind), and what nearest neighbour and a ridge classifier make of the
frozen encoder's features (demo/emoji_baselines.py), computed once for an encoder and its data: 0.2 s an image on a CPU core.
Writes into --output, by default emoji_report/ beside the checkpoint:

    report.md      the tables
    report.json    every number, the command, the checkpoint's and the data's digests
    answers.html   fifty names, chosen by --seed: image, expected, answered, answered about another image
    answers.png    the same as one image, if there is a font with Chinese characters
"""

# ruff: noqa: E402 - the arguments are checked before the libraries are imported, which takes seconds

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from config import Config, InputError, load_config, printable, run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Report how well a model names emoji in a style it has not seen.")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint's folder, which test.py has asked")
    parser.add_argument(
        "--answers", type=Path, help="folder that test.py wrote (default: answers/ beside the checkpoint)"
    )
    parser.add_argument(
        "--baselines-only", action="store_true", help="no checkpoint: nearest neighbour and ridge alone"
    )
    parser.add_argument("--config", default="recipes/emoji.yaml", help="names the encoder for --baselines-only")
    parser.add_argument(
        "--emoji", type=Path, default=Path("data/emoji"), help="folder of demo.emoji (default: data/emoji)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the report (default: emoji_report/ beside the checkpoint)"
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses the answers that are shown (default: 0)")
    parser.add_argument("--font", help="a font file with Chinese characters, for answers.png (default: look for one)")
    parser.add_argument("--allow-download", action="store_true", help="download an encoder that is named by hub name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.vision_tower=FOLDER")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.baselines_only == (arguments.checkpoint is not None):
        raise InputError("give either --checkpoint DIR, for the report, or --baselines-only.")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: give 0 or a larger number.")
    return arguments


if __name__ == "__main__":  # imports this file as a module: what is below never runs as a script
    run_script("demo.emoji_report.main", lambda: parse_arguments(None))

import numpy as np
import torch
from PIL import ImageFont
from tqdm import tqdm

from config.files import make_folder, open_regular, publish
from dataset.open import file_sha256
from demo.emoji_baselines import EmojiData, concept_of, name_by_features, read_emoji, style_of
from demo.emoji_drawings import STYLES
from demo.emoji_sheet import draw_sheet, find_font
from demo.emoji_tables import (
    FEATURES,
    KINDS,
    NOTES,
    PARTS,
    baseline_shares,
    baseline_table,
    report_table,
    share,
    wrong_names,
)
from evaluation.page import write_page
from evaluation.score import is_correct
from model.checkpoint_folder import MANIFEST, verify_folder
from model.hub import hub_access
from visual.encoders import VisionTower, load_vision_tower
from visual.feature_cache import cache_folder
from visual.images import read_image
from visual.processor import ImageProcessor, load_image_processor

SHOWN = 50
ENCODED = 16  # images at a time
BASELINES = 1  # format of the stored baselines: increase it when they are computed in another way


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    data = read_emoji(arguments.emoji)
    config, checkpoint = open_config(arguments)
    rows, digest = ([], "") if checkpoint is None else read_answers(arguments, checkpoint, data)
    font = find_font(arguments.font)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    with hub_access(config.model, set(), arguments.allow_download):
        baselines = stored_baselines(data, config)
    if checkpoint is None:
        print(baseline_table(baselines, data, set(data.held_out)))
        return 0
    output = arguments.output or checkpoint.parent / "emoji_report"
    entries = [
        entry
        for prefix in PARTS
        for kind in KINDS
        if (entry := entry_of(prefix, kind, rows, data=data, baselines=baselines))
    ]
    asked = {concept_of(row["image"]) for row in rows if row["type"] in ("name_en", "name_zh")}
    tables = "\n\n".join([report_table(entries), baseline_table(baselines, data, asked), NOTES])
    about = {
        "command": shlex.join(["python", "-m", "demo.emoji_report", *(sys.argv[1:] if argv is None else argv)]),
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": digest,
        "held_out_style": data.held_out_style,
        "known_concepts": len(data.names),
        "training_images": len(data.training),
        "seed": arguments.seed,
    }
    shown = [
        row | {"image": str(data.folder / data.held_out[concept_of(row["image"])])}  # test.py's may be a relative path
        for row in choose_rows(rows, arguments.seed)
    ]
    try:
        make_folder(output)
        publish(output / "report.md", f"{tables}\n".encode())
        values = about | {"questions": entries, "baselines": baselines}
        publish(output / "report.json", (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode())
        written = [
            "report.md",
            "report.json",
            *write_answers(output, shown, about, font=font),
        ]
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); name another folder with --output."
        ) from None
    print(printable("\n".join([tables, "", *(str(output / name) for name in written)]), lines=True))
    if font is None:
        print("answers.png: not written, because no font with Chinese characters was found; name one with --font FILE.")
    return 0


def open_config(arguments: argparse.Namespace) -> tuple[Config, Path | None]:
    """Return the config that names the encoder, and the verified checkpoint, if one is given."""
    if arguments.checkpoint is None:
        return load_config(arguments.config, arguments.overrides), None
    checkpoint = arguments.checkpoint.resolve()
    verify_folder(checkpoint)
    if (checkpoint / "vision_tower.safetensors").exists():
        print("note: this run trained its encoder; the baselines use the encoder's released weights")
    return load_config(checkpoint / "config.yaml", arguments.overrides), checkpoint


def read_answers(arguments: argparse.Namespace, checkpoint: Path, data: EmojiData) -> tuple[list[dict], str]:
    """Return the rows of answers.jsonl, and the SHA-256 of the checkpoint's manifest.

    Raises InputError if test.py has not asked this checkpoint, or about other data.
    """
    folder = arguments.answers or checkpoint.parent / "answers"
    command = f"python test.py --checkpoint {arguments.checkpoint} --qa {data.folder / 'validation.jsonl'}"
    advice = f"run {command}{f' --output {folder}' if arguments.answers else ''}"
    try:
        with open_regular(folder / "answers.jsonl") as file:
            rows = [json.loads(line) for line in file]
        with open_regular(folder / "scores.json") as file:
            digest = json.load(file).get("checkpoint_sha256")
        known = {prefix + kind for prefix in PARTS for kind in KINDS}
        rows = [row for row in rows if row.get("type") in known]
        names = [row for row in rows if row["type"].endswith(("name_en", "name_zh"))]
        strangers = [row for row in names if not is_asked_of(data, row)]
        correct = all(row["correct"] == is_correct(row["answer"], row["reference"]) and "blind" in row for row in rows)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); first {advice}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: not answers of test.py --qa ({error!r}); {advice}") from None
    if not names:
        raise InputError(f"{folder / 'answers.jsonl'}: no answer to a question for the name of an emoji; {advice}")
    expected = file_sha256(checkpoint / MANIFEST)
    if digest != expected or not correct:
        raise InputError(f"{folder}: the answers are not this checkpoint's, or of an earlier version; {advice}")
    if strangers:
        raise InputError(
            f"{folder / 'answers.jsonl'}: {strangers[0].get('id')} asks about {strangers[0]['image']}, which is not in the "
            f"held-out style {data.held_out_style} of {data.folder} under this name; give the data that was asked about "
            "with --emoji DIR."
        )
    return rows, expected


def is_asked_of(data: EmojiData, row: dict) -> bool:
    """Return whether a name's row is about an image that `data` holds out, with the name that it has there."""
    concept, language = concept_of(row["image"]), row["type"][-2:]
    is_known = style_of(row["image"]) == data.held_out_style and concept in data.held_out
    return is_known and is_correct(row["reference"], data.names[concept].get(language, ""))


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


def stored_baselines(data: EmojiData, config: Config) -> dict:
    """Return {kind of features: what `name_by_features` returns}, stored in the data's folder under a digest of the
    encoder, its layer and image size, and the images."""
    model = config.model
    tower = load_vision_tower(
        model.vision_tower, model.vision_feature_layer, image_size=model.image_size, dtype=torch.float32
    )
    processor = load_image_processor(model.vision_tower, image_size=model.image_size)
    encoder = cache_folder(data.folder / "encoder", tower, image_processor=processor, dtype=torch.float32).name
    path = data.folder / "baselines" / f"{encoder}-{data.digest()[:16]}-{BASELINES}.json"
    if path.exists():
        try:
            with open_regular(path) as file:
                return json.load(file)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); delete it, and it is computed again.") from None
    features = encode(data, tower, processor)
    found = {kind: name_by_features(data, features[kind]) for kind in FEATURES if kind in features}
    try:
        make_folder(path.parent)
        publish(path, (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())
    except OSError as error:
        print(f"note: {path}: cannot be written ({error.strerror}); the baselines are computed again next time")
    return found


@torch.inference_mode()
def encode(data: EmojiData, tower: VisionTower, processor: ImageProcessor) -> dict[str, np.ndarray]:
    """Encode the training images, then the held-out ones. Returns kind of features -> [M, D]; an encoder without a class
    token has the mean of the patches alone."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower.to(device)
    hidden: list[torch.Tensor] = []
    hook = tower.model.register_forward_hook(lambda model, inputs, output: hidden.append(output.last_hidden_state))
    means, classes = [], []
    images = [*data.training, *data.held_out.values()]
    for start in tqdm(range(0, len(images), ENCODED), desc="images for the baselines", unit="batch"):
        pixels = processor([read_image(data.folder / image) for image in images[start : start + ENCODED]])
        patches = tower(pixels.to(device))
        means.append(patches.mean(1).cpu())
        tokens = hidden.pop() if hidden else patches  # a convolutional network runs without its model's forward
        if tokens.shape[1] > patches.shape[1]:  # the class token is the first
            classes.append(tokens[:, 0].cpu())
    hook.remove()
    found = {"patches": torch.cat(means).numpy()}
    if classes:
        found["class_and_patches"] = torch.cat([torch.cat(classes), torch.cat(means)], dim=1).numpy()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def entry_of(prefix: str, kind: str, rows: Sequence[dict], data: EmojiData, baselines: dict) -> dict | None:
    """Return the numbers of one type of question; None if it was not asked."""
    rows = [row for row in rows if row["type"] == prefix + kind]
    if not rows:
        return None
    blind = [is_correct(row["blind"], row["reference"]) for row in rows if row["blind"] is not None]
    entry = {
        "type": prefix + kind,
        "correct": share(sum(row["correct"] for row in rows), len(rows)),
        "blind": share(sum(blind), len(blind)),
    }
    if kind.startswith("name_"):
        language = kind[-2:]
        entry |= baseline_shares(next(iter(baselines.values())), [concept_of(row["image"]) for row in rows])
        concept_named = {names[language].strip(): concept for concept, names in data.names.items() if language in names}
        wrong = [(concept_of(row["image"]), row["answer"].strip()) for row in rows if not row["correct"]]
        entry |= wrong_names(data, [(shown, concept_named.get(answer)) for shown, answer in wrong])
    return entry


# ---------------------------------------------------------------------------------------------------------------------
# Text and images


def choose_rows(rows: Sequence[dict], seed: int) -> list[dict]:
    """Return SHOWN random names of known concepts that are no symbols, half of them Chinese, in random order."""
    rng = np.random.default_rng(seed)
    of = {kind: [row for row in rows if row["type"] == kind] for kind in ("name_en", "name_zh")}
    chinese = min(len(of["name_zh"]), max(SHOWN // 2, SHOWN - len(of["name_en"])))
    counts = {"name_en": min(len(of["name_en"]), SHOWN - chinese), "name_zh": chinese}
    chosen = [of[kind][i] for kind in of for i in rng.choice(len(of[kind]), counts[kind], replace=False)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def write_answers(output: Path, rows: Sequence[dict], about: dict, font: ImageFont.FreeTypeFont | None) -> list[str]:
    """Write answers.html and, with a font, answers.png. Returns the names of the files."""
    right, style = sum(row["correct"] for row in rows), about["held_out_style"]
    drawn = STYLES[style]
    title = f"{len(rows)} names in the style {style}, which training did not see: {right} right"
    text = f"Chosen by seed {about['seed']}. Drawings: {style} {drawn.version}, {drawn.author}, {drawn.licence}."
    write_page(output / "answers.html", title, text, rows=rows)
    if font is None:
        (output / "answers.png").unlink(missing_ok=True)  # of an earlier report
        return ["answers.html"]
    images = [read_image(row["image"]) for row in rows]
    publish(output / "answers.png", draw_sheet(rows, images, title=title, font=font))
    return ["answers.html", "answers.png"]
