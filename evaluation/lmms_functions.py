"""What lmms-eval calls for a task that `evaluation.lmms_task` wrote. Copied beside the task, so it needs nothing of this
project."""

from __future__ import annotations

import io
import unicodedata
from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the images of a question, RGB."""
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in doc["images"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """Return the prompt's text; `<image>` marks the place of an image, as in training."""
    return doc["question"]


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict]:
    """Return the question as a chat message: its images in the places that `<image>` marks."""
    images = iter(doc_to_visual(doc))
    content: list[dict[str, Any]] = []
    for i, text in enumerate(doc["question"].split("<image>")):
        content += [{"type": "image", "url": next(images)}] if i else []
        content += [{"type": "text", "text": text}] if text else []
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether the answer is exactly the record's, except for blanks at the ends and the form of composed
    characters."""
    found, expected = (unicodedata.normalize("NFC", text).strip() for text in (results[0], doc["answer"]))
    return {"exact_match": float(found == expected)}
