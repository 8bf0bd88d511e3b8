"""Open a trained model for answering: a checkpoint (final/, best/, checkpoint-<step>) or an exported folder.

from model import load
print(load("runs/demo/final").answer("What is in the picture?", ["photo.jpg"]))
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from config import Config
from dataset.conversation import question_parts
from model.answer import Answerer, Request
from model.build import PRECISIONS, Built, resolve_precision
from model.checkpoint_folder import verify_folder
from model.export.opened import is_export, open_llava, refuse_gguf
from model.hub import hub_access
from model.start import is_llava_export
from training.provenance import find_released, saved_config
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


def load(
    folder: str | Path,
    device: str | None = None,
    allow_download: bool = False,
    *,
    vision_tower: str | Path | None = None,
    language_model: str | Path | None = None,
) -> LoadedModel:
    """Load a checkpoint or an exported folder, in eval mode. No code in the folder is run and nothing is unpickled.

    device: a torch device; None for a GPU if there is one. allow_download: let a checkpoint whose base models are hub names
    download them. vision_tower, language_model: folders of the base models, if they are not where the checkpoint's config
    says. Raises InputError.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(folder).resolve()
    named = {"vision_tower": vision_tower, "language_model": language_model}
    config = open_config(path, [f"model.{key}={json.dumps(str(place))}" for key, place in named.items() if place])
    word = config.train.precision
    precision = resolve_precision("auto" if word == "fp16" and where.type == "cpu" else word, where)
    with hub_access(config.model, set(), allow_download):
        built = open_built(config, path, precision)
    built.model.to(where).eval()
    return LoadedModel(built, open_answerer(config, built, precision, device=where))


def open_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a verified folder, with the places of its released models on this machine. Raises InputError if
    one of them is not found."""
    refuse_gguf(folder)
    verify_folder(folder, hashes=not is_export(folder))  # an export holds gigabytes of released weights
    config = saved_config(folder, overrides)
    given = {override.partition("=")[0].strip() for override in overrides}
    return dataclasses.replace(config, model=find_released(config, folder, given))


def open_built(config: Config, folder: Path, precision: str) -> Built:
    """Build the model of a folder whose config `open_config` returned."""
    if is_llava_export(folder):
        return open_llava(folder, PRECISIONS[precision])
    return open_model(config, precision, open_processors(config, folder), checkpoint=folder)
