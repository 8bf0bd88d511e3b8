"""Open a trained model for answering: a checkpoint (final/, best/, checkpoint-<step>) or an exported folder.

from model import load
print(load("runs/demo/final").answer("What is in the picture?", ["photo.jpg"]))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from config import Config, InputError, load_config
from dataset.conversation import question_parts
from model.answer import Answerer, Request
from model.build import PRECISIONS, Built, hub_access, resolve_precision
from model.checkpoint_folder import verify_folder
from model.export.opened import is_export, is_llava, open_llava
from training.run import open_answerer, open_model, open_processors


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers questions about images."""

    built: Built
    answerer: Answerer

    def answer(self, question: str, images: Sequence[str | Path] = ()) -> str:
        """Answer a question about image files, which may be none. Raises ImageError if an image cannot be read."""
        turns = [("user", question_parts(question, len(images)))]
        return self.answerer.answer([Request(turns, [Path(image) for image in images])])[0]


def load(folder: str | Path, device: str | None = None, allow_download: bool = False) -> LoadedModel:
    """Load a checkpoint or an exported folder, in eval mode. No code in the folder is run and nothing is unpickled.

    device: a torch device; None for a GPU if there is one. allow_download: let a checkpoint whose base models are hub names
    download them. Raises InputError.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(folder).resolve()
    config = open_config(path)
    word = config.train.precision
    precision = resolve_precision("auto" if word == "fp16" and where.type == "cpu" else word, where)
    with hub_access(config.model, set(), allow_download):
        built = open_built(config, path, precision)
    built.model.to(where).eval()
    return LoadedModel(built, open_answerer(config, built, precision, device=where))


def open_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a verified folder. Raises InputError if a folder of released weights that it names does not
    exist."""
    verify_folder(folder, hashes=not is_export(folder))  # an export holds gigabytes of released weights
    config = load_config(folder / "config.yaml", overrides)
    for key in ("vision_tower", "language_model"):
        path = getattr(config.model, key)
        if path is not None and os.path.isabs(path) and not os.path.isdir(path):
            raise InputError(
                f"{path}: the checkpoint was trained on top of this folder, which does not exist; say where it is now: "
                f"model.{key}=FOLDER."
            )
    return config


def open_built(config: Config, folder: Path, precision: str) -> Built:
    """Build the model of a folder whose config `open_config` returned."""
    if is_llava(folder):
        return open_llava(folder, PRECISIONS[precision])
    return open_model(config, precision, open_processors(config, folder), checkpoint=folder)
