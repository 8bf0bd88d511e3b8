"""The QA file -> batches. Opens records, reads their images, encodes their turns, pads. Knows no model and no encoder:
it is handed a function that turns an image file into pixel_values.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import IGNORE_INDEX, InputError
from dataset.conversation import ChatFormat
from dataset.qa_file import QAFile
from visual.images import ImageError

REPLACEMENTS = 10  # records tried in one place before pictures are taken to be gone altogether


class BadImage(InputError):
    """A record whose pictures cannot be read."""


class QADataset(Dataset):
    """Samples by (epoch, record): {"id": str, "input_ids": [L], "labels": [L], "pixel_values": [m, 3, H, W], m >= 0,
    "replaced": None}.

    read_pixels: image file -> [3, H, W] float32. kept: the records that may be used, None for all. A record that cannot
    be used raises InputError with its id. skip_bad_images: where its pictures cannot be read, another one of `kept` takes
    its place, which one being a function of (seed, epoch, record), and "replaced" says whose place and why.
    """

    def __init__(
        self,
        qa: QAFile,
        chat: ChatFormat,
        read_pixels: Callable[[Path], Tensor],
        max_length: int | None,
        seed: int,
        kept: np.ndarray | None = None,
        skip_bad_images: bool = False,
    ):
        self.qa, self.chat, self.read_pixels, self.max_length, self.seed = qa, chat, read_pixels, max_length, seed
        self.kept = np.arange(len(qa)) if kept is None else kept
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return len(self.qa)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        if not self.skip_bad_images:
            return self._read(epoch, index)
        places = np.random.default_rng((self.seed, epoch, index))
        replaced = None
        for _ in range(REPLACEMENTS):
            try:
                return self._read(epoch, index) | {"replaced": replaced}
            except BadImage as error:
                replaced = replaced or str(error)
                index = int(self.kept[places.integers(len(self.kept))])
        raise InputError(
            f"{replaced} {REPLACEMENTS - 1} others in its place cannot be read either; are the pictures there?"
        )

    def _read(self, epoch: int, index: int) -> dict:
        record = self.qa[index]
        try:
            encoded = self.chat.encode(record.at_epoch(self.seed, epoch), self.max_length)
            pixels = [self.read_pixels(path) for path in self.qa.image_paths(record)]
        except ImageError as error:
            advice = "" if self.skip_bad_images else " With data.on_bad_image=skip another record takes its place."
            raise BadImage(f'{self.qa.path} ("{record.id}"): {error}{advice}') from error
        except InputError as error:
            raise InputError(f'{self.qa.path} ("{record.id}"): {error}') from error
        return {
            "id": record.id,
            "replaced": None,
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "pixel_values": torch.stack(pixels) if pixels else None,
        }


def collate(samples: Sequence[dict], pad_token_id: int) -> dict:
    """Pad on the right: input_ids, labels, attention_mask [B, L]; pixel_values [M, 3, H, W] of all images in reading order,
    or None where the batch has no image; images_in_row [B]: how many of them each row has; ids: the records' names;
    replaced: what was said of records whose place they took."""
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
        "images_in_row": [0 if s["pixel_values"] is None else len(s["pixel_values"]) for s in samples],
        "ids": [sample["id"] for sample in samples],
        "replaced": [sample["replaced"] for sample in samples if sample["replaced"]],
    }


def split_batch(batch: dict, pieces: int) -> Iterator[dict]:
    """A batch as `pieces` smaller ones (fewer where it has fewer rows) of consecutive rows, padded to their own length."""
    rows = len(batch["ids"])
    if pieces == 1:
        yield batch
        return
    size = -(-rows // pieces)
    images_before = [0, *itertools.accumulate(batch["images_in_row"])]
    for first in range(0, rows, size):
        last = min(first + size, rows)
        length = int(batch["attention_mask"][first:last].sum(dim=1).max())
        pixels = None
        if images_before[first] < images_before[last]:
            pixels = batch["pixel_values"][images_before[first] : images_before[last]]
        yield {
            **{key: batch[key][first:last, :length] for key in ("input_ids", "labels", "attention_mask")},
            "pixel_values": pixels,
            "images_in_row": batch["images_in_row"][first:last],
            "ids": batch["ids"][first:last],
            "replaced": [],
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
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


@contextlib.contextmanager
def dead_workers_named() -> Iterator[None]:
    """Inside, a loader's process that was killed is an InputError. torch notices it in a signal handler, so the error comes
    wherever this process happens to be, not only where it asks for a batch."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that reads pictures was killed ({str(error).strip()}). Mostly the machine's memory was full: lower "
            "train.num_workers, or look for huge pictures; the same command goes on from the last checkpoint."
        ) from None


def _leave_signals_to_the_parent(worker: int) -> None:
    """A Ctrl-C reaches every process of a terminal, and a SIGTERM every process of a job (torchrun, timeout, Slurm and
    systemd send it so); while the parent finishes its step, it needs its workers. It ends them by a SIGTERM of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_the_parents_sigterm, daemon=True).start()


def _await_the_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


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
