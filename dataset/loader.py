"""The QA file -> batches: open records, read their images, encode their turns, collate.

Knows no model and no encoder: a function that turns an image file into pixel values is passed in.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import InputError
from dataset.augment import Augmenter
from dataset.batch import Batch, Sample, collate
from dataset.conversation import ChatFormat, Encoded
from dataset.order import PackedRow, pack
from dataset.qa_file import QAFile
from dataset.record import Record
from dataset.workers import obey_parent_only
from visual.images import ImageError

# training/prepare.py has a note of its own, once
warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
MAX_REPLACEMENTS = 10  # records tried for one sample before all images are taken to be missing

Key = tuple[int, int]  # (epoch, record)


class Prepared(NamedTuple):
    """A sample whose text is encoded and whose images are not read yet."""

    key: Key
    encoded: Encoded


class BadImage(InputError):
    """A record whose images cannot be read."""


class QADataset(Dataset):
    """Samples by (epoch, record).

    read_pixels: image file -> [3, H, W] float32; with an augmenter, (image file, view) -> the same of that view.
    max_length: tokens; longer answers are cut at the end. kept: the records that may be used, None for all.
    skip_bad_images: a record whose images cannot be read is replaced by another one of `kept`, chosen as a function of
    (seed, epoch, record); `Sample.replaced` reports it.

    find_features: (image file, key of its view, empty without an augmenter) -> (the patch features [N, Dv] or None, the
    cache key). None, the default: nothing is cached.
    augmenter: chooses the view of each image. None, the default: images are not changed.

    A record that cannot be used raises InputError with its id.
    """

    find_features: Callable[[Path, bytes], tuple[Tensor | None, object]] | None = None
    augmenter: Augmenter | None = None

    def __init__(
        self,
        qa: QAFile,
        chat: ChatFormat,
        read_pixels: Callable[..., Tensor],
        *,
        max_length: int | None,
        seed: int,
        kept: np.ndarray | None = None,
        skip_bad_images: bool = False,
    ):
        self.qa, self.chat, self.read_pixels = qa, chat, read_pixels
        self.max_length, self.seed, self.skip_bad_images = max_length, seed, skip_bad_images
        self.kept = np.arange(len(qa)) if kept is None else kept

    def __len__(self) -> int:
        return len(self.qa)

    def without_augmentation(self) -> QADataset:
        """Return the same samples with unchanged images."""
        plain = copy.copy(self)
        plain.augmenter = None
        return plain

    def __getitem__(self, key: Key) -> Sample:
        return self.read(key, *self.encode(key))

    def encode(self, key: Key) -> tuple[Record, Encoded]:
        """Return the record of `key` with its ids and labels. Opens no image."""
        epoch, index = key
        record = self.qa[index]
        try:
            return record, self.chat.encode(record.at_epoch(self.seed, epoch), self.max_length)
        except InputError as error:
            raise InputError(f'{self.qa.path} ("{record.id}"): {error}') from error

    def read(self, key: Key, record: Record, encoded: Encoded) -> Sample:
        """Return the sample of `key`, given what `encode` returned for it."""
        if not self.skip_bad_images:
            return self._sample(key, record, encoded)
        epoch, index = key
        generator = np.random.default_rng((self.seed, epoch, index))
        replaced = None
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self._sample(key, record, encoded, replaced=replaced)
            except BadImage as error:
                replaced = replaced or str(error)
                key = epoch, int(self.kept[generator.integers(len(self.kept))])
                record, encoded = self.encode(key)
        raise InputError(
            f"{replaced} {MAX_REPLACEMENTS - 1} records that could replace it cannot be read either; do the images exist?"
        )

    def _sample(self, key: Key, record: Record, encoded: Encoded, replaced: str | None = None) -> Sample:
        cached: list[Tensor] = []
        pixels: list[Tensor] = []
        keys: list[object] = []
        is_cached: list[bool] = []
        try:
            for place, path in enumerate(self.qa.image_paths(record)):
                view = None if self.augmenter is None else self.augmenter.view(key, place)
                features, image_key = None, None
                if self.find_features is not None:
                    features, image_key = self.find_features(path, b"" if view is None else view.key)
                is_cached.append(features is not None)
                if features is not None:
                    cached.append(features)
                else:
                    keys.append(image_key)
                    pixels.append(self.read_pixels(path) if view is None else self.read_pixels(path, view))
        except ImageError as error:
            advice = "" if self.skip_bad_images else " data.on_bad_image=skip would replace this record by another one."
            raise BadImage(f'{self.qa.path} ("{record.id}"): {error}{advice}') from error
        return Sample(
            id=record.id,
            input_ids=torch.tensor(encoded.input_ids),
            labels=torch.tensor(encoded.labels),
            pixel_values=torch.stack(pixels) if pixels else None,
            patch_features=torch.stack(cached) if cached else None,
            image_keys=keys,
            is_cached=is_cached,
            replaced=replaced,
        )


def make_loader(
    dataset: QADataset,
    batches: Iterable[list[Key] | PackedRow],
    pad_token_id: int,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    packed: bool = False,
) -> Iterator[Batch]:
    """Yield one batch for each item of `batches`, in that order, for any number of workers.

    An item is a list of (epoch, record) pairs, or the PackedRow of a step: all items are of one kind. The rows of a step
    depend on the lengths of all its samples, so one worker more encodes the texts, each once, and the others read images.
    Raises InputError at a batch with a record that cannot be used.
    """
    items: Iterator = iter(batches)
    first = next(items, None)
    if first is None:
        return
    items = itertools.chain([first], items)
    if isinstance(first, PackedRow):
        steps = (list(rows) for _, rows in itertools.groupby(items, key=lambda row: row.keys))
        items = itertools.chain.from_iterable(_load(_Rows(dataset), steps, num_workers=min(num_workers, 1)))
    for batch in _load(_Batches(dataset, pad_token_id, packed), items, num_workers=num_workers, pin_memory=pin_memory):
        if isinstance(batch, InputError):
            raise batch
        yield batch


def _load(dataset: Dataset, items: Iterable, *, num_workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """Yield `dataset[item]` for each item, in that order, from worker processes."""
    loader = DataLoader(
        dataset,
        sampler=items,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without its own generator, each new iterator would draw a seed from torch's global one, and whatever uses that
        # would depend on how often a loader was opened.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=obey_parent_only,
    )
    try:
        yield from loader
    except (ConnectionError, EOFError):
        # The worker that made this item was killed before the item was fetched from its memory. torch's signal handler
        # raises its own, clearer error during this wait, once the process is gone.
        time.sleep(5)
        raise


def _unchanged(item: Any) -> Any:
    """Return the item. DataLoader's own conversion would visit every token."""
    return item


class _Rows(Dataset):
    """The samples of each of a process's rows of one step, by these rows. An InputError takes the place of the rows, as in
    `_Batches`."""

    def __init__(self, dataset: QADataset):
        self.dataset = dataset

    def __getitem__(self, rows: list[PackedRow]) -> list[list[Prepared] | InputError]:
        keys, count = rows[0].keys, rows[0].rows
        try:
            prepared = [Prepared(key, self.dataset.encode(key)[1]) for key in keys]
        except InputError as error:
            return [error]
        members = pack([len(sample.encoded.input_ids) for sample in prepared], count)
        return [[prepared[i] for i in members[row.row]] for row in rows]


class _Batches(Dataset):
    """Batches by their samples. An InputError is returned, not raised: DataLoader would pass on a worker's exception as a
    new one whose message is a traceback."""

    def __init__(self, dataset: QADataset, pad_token_id: int, packed: bool):
        self.dataset, self.pad_token_id, self.packed = dataset, pad_token_id, packed

    def __getitem__(self, item: list[Key] | list[Prepared] | InputError) -> Batch | InputError:
        if isinstance(item, InputError):
            return item
        try:
            return collate([self._sample(entry) for entry in item], self.pad_token_id, self.packed)
        except InputError as error:
            return error

    def _sample(self, entry: Key | Prepared) -> Sample:
        if isinstance(entry, Prepared):
            return self.dataset.read(entry.key, self.dataset.qa[entry.key[1]], entry.encoded)
        return self.dataset[entry]
