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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import IGNORE_INDEX, InputError
from dataset.conversation import ChatFormat, Encoded
from dataset.order import Share
from dataset.packing import bucket, pack
from dataset.qa_file import QAFile
from dataset.record import Record
from visual.images import ImageError

REPLACEMENTS = 10  # records tried in one place before pictures are taken to be gone altogether


class BadImage(InputError):
    """A record whose pictures cannot be read."""


class QADataset(Dataset):
    """Samples by (epoch, record): {"id": str, "input_ids": [L], "labels": [L], "pixel_values": [m, 3, H, W] or None,
    "patch_features": [m, N, Dv] or None, "image_keys": a key for each of the pixels, "is_cached": for each picture in
    order, whether its features are there instead of its pixels, "replaced": None}.

    read_pixels: image file -> [3, H, W] float32. kept: the records that may be used, None for all. A record that cannot
    be used raises InputError with its id. skip_bad_images: where its pictures cannot be read, another one of `kept` takes
    its place, which one being a function of (seed, epoch, record), and "replaced" says whose place and why.
    find_features: image file -> (its patch features [N, Dv] or None, its key), None for no cache.
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
        find_features: Callable[[Path], tuple[Tensor | None, object]] | None = None,
    ):
        self.qa, self.chat, self.read_pixels, self.max_length, self.seed = qa, chat, read_pixels, max_length, seed
        self.kept = np.arange(len(qa)) if kept is None else kept
        self.skip_bad_images = skip_bad_images
        self.find_features = find_features

    def __len__(self) -> int:
        return len(self.qa)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return self.read(key, *self.encode(key))

    def encode(self, key: tuple[int, int]) -> tuple[Record, Encoded]:
        """The record of (epoch, index), and its ids and labels: all but its pictures."""
        epoch, index = key
        record = self.qa[index]
        try:
            return record, self.chat.encode(record.at_epoch(self.seed, epoch), self.max_length)
        except InputError as error:
            raise InputError(f'{self.qa.path} ("{record.id}"): {error}') from error

    def read(self, key: tuple[int, int], record: Record, encoded: Encoded) -> dict:
        """The sample of what `encode` returned for `key`."""
        if not self.skip_bad_images:
            return self._sample(record, encoded)
        epoch, index = key
        places = np.random.default_rng((self.seed, epoch, index))
        replaced = None
        for _ in range(REPLACEMENTS):
            try:
                return self._sample(record, encoded) | {"replaced": replaced}
            except BadImage as error:
                replaced = replaced or str(error)
                record, encoded = self.encode((epoch, int(self.kept[places.integers(len(self.kept))])))
        raise InputError(
            f"{replaced} {REPLACEMENTS - 1} others in its place cannot be read either; are the pictures there?"
        )

    def _sample(self, record: Record, encoded: Encoded) -> dict:
        features, keys, pixels = [], [], []
        try:
            for path in self.qa.image_paths(record):
                found, key = self.find_features(path) if self.find_features else (None, None)
                features.append(found)
                if found is None:
                    keys.append(key)
                    pixels.append(self.read_pixels(path))
        except ImageError as error:
            advice = "" if self.skip_bad_images else " With data.on_bad_image=skip another record takes its place."
            raise BadImage(f'{self.qa.path} ("{record.id}"): {error}{advice}') from error
        cached = [found for found in features if found is not None]
        return {
            "id": record.id,
            "replaced": None,
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "pixel_values": torch.stack(pixels) if pixels else None,
            "patch_features": torch.stack(cached) if cached else None,
            "image_keys": keys,
            "is_cached": [found is not None for found in features],
        }


def collate(samples: Sequence[dict], pad_token_id: int, packed: bool = False) -> dict:
    """A batch of samples. Its pictures, of all samples in reading order: pixel_values [M, 3, H, W] of those that are not
    cached and image_keys, patch_features [M, N, Dv] of those that are (None where there are none), is_cached [M];
    images_in_sample: how many each has. ids: the records' names; replaced: what was said of records whose place they took.

    Padded on the right: input_ids, labels, attention_mask [B, L], lengths None. Packed: input_ids, labels [1, L], lengths
    of the samples in the row and, after them, of the pieces of padding that make L one of few sizes; attention_mask None.
    """
    if packed:
        rows = _one_row(samples, pad_token_id)
    else:
        rows = _padded_rows(samples, pad_token_id)
    return {
        **rows,
        "pixel_values": _joined(sample["pixel_values"] for sample in samples),
        "patch_features": _joined(sample["patch_features"] for sample in samples),
        "image_keys": [key for sample in samples for key in sample["image_keys"]],
        "is_cached": [is_cached for sample in samples for is_cached in sample["is_cached"]],
        "images_in_sample": [len(sample["is_cached"]) for sample in samples],
        "ids": [sample["id"] for sample in samples],
        "replaced": [sample["replaced"] for sample in samples if sample["replaced"]],
    }


def _padded_rows(samples: Sequence[dict], pad_token_id: int) -> dict:
    length = max(len(sample["input_ids"]) for sample in samples)
    shape = (len(samples), length)
    rows = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        rows["input_ids"][row, :size] = sample["input_ids"]
        rows["labels"][row, :size] = sample["labels"]
        rows["attention_mask"][row, :size] = 1
    return rows | {"lengths": None}


def _one_row(samples: Sequence[dict], pad_token_id: int) -> dict:
    lengths = [len(sample["input_ids"]) for sample in samples]
    ids = torch.cat([sample["input_ids"] for sample in samples])
    labels = torch.cat([sample["labels"] for sample in samples])
    starts = [0, *itertools.accumulate(lengths[:-1])]
    labels[starts] = IGNORE_INDEX  # what stands before a first token is another sample's
    padding, longest = bucket(len(ids)) - len(ids), max(lengths)
    # documents no longer than a sample, so that no model finds them too long and their attention costs next to nothing
    fillers = [min(longest, padding - first) for first in range(0, padding, longest)]
    return {
        "input_ids": F.pad(ids, (0, padding), value=pad_token_id)[None],
        "labels": F.pad(labels, (0, padding), value=IGNORE_INDEX)[None],
        "attention_mask": None,
        "lengths": lengths + fillers,
    }


def _joined(tensors: Iterable[Tensor | None]) -> Tensor | None:
    tensors = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(tensors) if tensors else None


def count_tokens(batch: dict) -> int:
    """The tokens of a batch's samples, padding aside."""
    if batch["lengths"] is None:
        return int(batch["attention_mask"].sum())
    return sum(batch["lengths"][: len(batch["ids"])])


def split_batch(batch: dict, pieces: int, pad_token_id: int) -> Iterator[dict]:
    """A batch as `pieces` smaller ones (fewer where it has fewer samples) of consecutive samples, as `collate` would have
    made them, but that whose place others took is told by none."""
    if pieces == 1:
        yield batch
        return
    samples = list(_samples(batch))
    size = -(-len(samples) // pieces)
    for first in range(0, len(samples), size):
        yield collate(samples[first : first + size], pad_token_id, packed=batch["lengths"] is not None)


def _samples(batch: dict) -> Iterator[dict]:
    """The samples of which a batch was made."""
    if batch["lengths"] is None:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        rows = [[row[:n] for row, n in zip(batch[key], lengths, strict=True)] for key in ("input_ids", "labels")]
    else:
        rows = [batch[key][0].split(batch["lengths"]) for key in ("input_ids", "labels")]
    cached, images = iter(batch["is_cached"]), batch["images_in_sample"]
    kinds = [list(itertools.islice(cached, count)) for count in images]
    stored = [sum(kind) for kind in kinds]
    fresh = [len(kind) - sum(kind) for kind in kinds]
    keys = iter(batch["image_keys"])
    pixels, features = _shared_out(batch["pixel_values"], fresh), _shared_out(batch["patch_features"], stored)
    for i, name in enumerate(batch["ids"]):
        yield {
            "id": name,
            "replaced": None,
            "input_ids": rows[0][i],
            "labels": rows[1][i],
            "pixel_values": pixels[i] if fresh[i] else None,
            "patch_features": features[i] if stored[i] else None,
            "image_keys": list(itertools.islice(keys, fresh[i])),
            "is_cached": kinds[i],
        }


def _shared_out(tensor: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if tensor is None else tensor.split(counts)


def make_loader(
    dataset: QADataset,
    batches: Iterable[list[tuple[int, int]] | Share],
    pad_token_id: int,
    num_workers: int,
    pin_memory: bool,
    packed: bool = False,
) -> Iterator[dict]:
    """One batch for each list of (epoch, record) pairs, in that order, whatever the number of workers; for a Share, of its
    row of the step. Raises InputError in the place of a batch with a record that cannot be used.

    It has a generator of its own: without one, every new iterator would take its seed from the global generator, and the
    position of dropout's random numbers would depend on how often a loader was opened.
    """
    loader = DataLoader(
        _Batches(dataset, pad_token_id, packed),
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_signals_to_the_parent,
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError):
            # A batch is fetched from the memory of the process that made it; that process has just been killed, and
            # torch's signal handler says so as soon as the process is wholly gone: during this wait.
            time.sleep(5)
            raise
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
    """Batches by their lists of (epoch, record), or by a Share of a step's. An InputError is returned, not raised:
    DataLoader would pass on what a worker raises as a new error with a traceback for its message."""

    def __init__(self, dataset: QADataset, pad_token_id: int, packed: bool):
        self.dataset, self.pad_token_id, self.packed = dataset, pad_token_id, packed
        self._step: tuple[list, list] = ([], [])  # the keys of the last Share, and their texts

    def __getitem__(self, item: list[tuple[int, int]] | Share) -> dict | InputError:
        try:
            if isinstance(item, Share):
                samples = self._packed_row(item)
            else:
                samples = [self.dataset[key] for key in item]
            return collate(samples, self.pad_token_id, self.packed)
        except InputError as error:
            return error

    def _packed_row(self, share: Share) -> list[dict]:
        if self._step[0] != share.keys:  # the other rows of the step need the same lengths
            self._step = share.keys, [self.dataset.encode(key) for key in share.keys]
        texts = self._step[1]
        row = pack([len(encoded.input_ids) for _, encoded in texts], share.rows)[share.row]
        return [self.dataset.read(share.keys[place], *texts[place]) for place in row]
