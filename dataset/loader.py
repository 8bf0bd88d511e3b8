"""The QA file -> batches. Opens records, reads their images, encodes their turns, pads. Knows no model and no encoder:
it is handed a function that turns an image file into pixel_values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import IGNORE_INDEX, InputError
from dataset.conversation import ChatFormat
from dataset.qa_file import QAFile


class QADataset(Dataset):
    """Samples by (epoch, record): {"id": str, "input_ids": [L], "labels": [L], "pixel_values": [m, 3, H, W], m >= 0}.

    read_pixels: image file -> [3, H, W] float32. A record that cannot be used raises InputError with its id.
    """

    def __init__(
        self,
        qa: QAFile,
        chat: ChatFormat,
        read_pixels: Callable[[Path], Tensor],
        max_length: int | None,
        seed: int,
    ):
        self.qa, self.chat, self.read_pixels, self.max_length, self.seed = qa, chat, read_pixels, max_length, seed

    def __len__(self) -> int:
        return len(self.qa)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        record = self.qa[index]
        try:
            encoded = self.chat.encode(record.at_epoch(self.seed, epoch), self.max_length)
            pixels = [self.read_pixels(path) for path in self.qa.image_paths(record)]
        except InputError as error:
            raise InputError(f'{self.qa.path} ("{record.id}"): {error}') from error
        return {
            "id": record.id,
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "pixel_values": torch.stack(pixels) if pixels else None,
        }


def collate(samples: Sequence[dict], pad_token_id: int) -> dict:
    """Pad on the right: input_ids, labels, attention_mask [B, L]; pixel_values [M, 3, H, W] of all images in reading order,
    or None where the batch has no image; ids: the records' names."""
    length = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        batch["input_ids"][row, :size] = sample["input_ids"]
        batch["labels"][row, :size] = sample["labels"]
        batch["attention_mask"][row, :size] = 1
    pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    return {
        **batch,
        "pixel_values": torch.cat(pixels) if pixels else None,
        "ids": [sample["id"] for sample in samples],
    }


def make_loader(
    dataset: QADataset, batches: Iterable[list[tuple[int, int]]], pad_token_id: int, num_workers: int, pin_memory: bool
) -> Iterator[dict]:
    """One batch for each list of (epoch, record) pairs, in that order, whatever the number of workers. Raises InputError
    in the place of a batch with a record that cannot be used.

    It has a generator of its own: without one, every new iterator would take its seed from the global generator, and the
    position of dropout's random numbers would depend on how often a loader was opened.
    """
    loader = DataLoader(
        _Batches(dataset, pad_token_id),
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _Batches(Dataset):
    """Batches by their lists of (epoch, record). An InputError is returned, not raised: DataLoader would pass on what a
    worker raises as a new error with a traceback for its message."""

    def __init__(self, dataset: QADataset, pad_token_id: int):
        self.dataset, self.pad_token_id = dataset, pad_token_id

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict | InputError:
        try:
            return collate([self.dataset[key] for key in keys], self.pad_token_id)
        except InputError as error:
            return error
