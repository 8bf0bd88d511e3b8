"""Samples and batches: what the loader makes and the model takes. Padding or packing is decided here, in `collate`.

Shapes: L tokens, m images of one sample, B rows, M images of the whole batch, N patches an image, Dv the encoder's width,
H and W the image's sides in pixels. m' and M' count the images whose features are not cached.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import IGNORE_INDEX
from dataset.order import bucket


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One encoded record with its images."""

    id: str
    input_ids: Tensor  # int64 [L]
    labels: Tensor  # int64 [L], unshifted; IGNORE_INDEX where nothing is supervised
    pixel_values: Tensor | None  # float32 [m', 3, H, W] of the m' images whose features are not cached
    patch_features: Tensor | None  # [m - m', N, Dv] of the others
    image_keys: list  # the feature-cache key of each image in pixel_values
    is_cached: list[bool]  # for each image in reading order, whether its features are used instead of its pixels
    replaced: str | None = None  # which record this one replaces, and why


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Samples of one micro-batch, padded or packed.

    Padded: one row a sample, padding on the right. Packed: all samples in one row without padding between them, followed by
    filler documents that bring L to one of a few sizes.
    """

    input_ids: Tensor  # int64 [B, L]; packed: [1, L]
    labels: Tensor  # int64 [B, L]
    attention_mask: Tensor | None  # int64 [B, L], 1 where a token is read; None if packed
    lengths: list[int] | None  # packed: tokens of each sample, then of each filler document; None if padded
    pixel_values: Tensor | None  # float32 [M', 3, H, W] of images that are not cached, in reading order
    patch_features: Tensor | None  # [M - M', N, Dv] of cached images, in reading order
    image_keys: list  # the feature-cache key of each image in pixel_values
    is_cached: list[bool]  # [M]
    images_in_sample: list[int]  # how many images each sample has
    ids: list[str]  # the records' names
    replaced: list[str]  # messages about records that were replaced
    pad_token_id: int

    @property
    def is_packed(self) -> bool:
        return self.lengths is not None

    @property
    def num_samples(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, without padding."""
        if self.lengths is not None:
            return sum(self.lengths[: self.num_samples])
        assert self.attention_mask is not None
        return int(self.attention_mask.sum())

    @property
    def num_targets(self) -> int:
        """Supervised tokens. A label at position 0 does not count: no logits precede it."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def max_sample_length(self) -> int:
        """Tokens of the longest sample."""
        return max(self.lengths) if self.lengths is not None else self.input_ids.shape[1]

    def split(self, pieces: int) -> Iterator[Batch]:
        """Yield at most `pieces` smaller batches of consecutive samples, as `collate` would make
        them. Messages about replaced records are dropped: the whole batch has reported them."""
        if pieces == 1:
            yield self
            return
        samples = list(self.samples())
        size = -(-len(samples) // pieces)
        for first in range(0, len(samples), size):
            yield collate(samples[first : first + size], self.pad_token_id, packed=self.is_packed)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of which the batch was made, without padding."""
        if self.lengths is None:
            assert self.attention_mask is not None
            lengths = self.attention_mask.sum(dim=1).tolist()
            ids, labels = (
                [row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (self.input_ids, self.labels)
            )
        else:
            ids, labels = (row[0].split(self.lengths) for row in (self.input_ids, self.labels))
        flags = iter(self.is_cached)
        is_cached = [list(itertools.islice(flags, count)) for count in self.images_in_sample]
        num_cached = [sum(sample) for sample in is_cached]
        num_fresh = [len(sample) - sum(sample) for sample in is_cached]
        keys = iter(self.image_keys)
        pixels, features = _split(self.pixel_values, num_fresh), _split(self.patch_features, num_cached)
        for i, name in enumerate(self.ids):
            yield Sample(
                id=name,
                input_ids=ids[i],
                labels=labels[i],
                pixel_values=pixels[i] if num_fresh[i] else None,
                patch_features=features[i] if num_cached[i] else None,
                image_keys=list(itertools.islice(keys, num_fresh[i])),
                is_cached=is_cached[i],
            )

    def with_images(self) -> Batch:
        """Return the batch of the samples that have images."""
        samples = [s for s, count in zip(self.samples(), self.images_in_sample, strict=True) if count]
        return collate(samples, self.pad_token_id, packed=self.is_packed)

    def model_inputs(self, device: torch.device, encoder: Callable[[Batch], Tensor | None] | None = None) -> dict:
        """The arguments of `VisionLanguageModel.forward`, on `device`; ids and labels stay on the CPU, where the model reads
        them without waiting for a GPU.

        encoder: returns the images' patch features [M, N, Dv]; None: the model encodes pixel_values itself.
        """

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        images = {"pixel_values": move(self.pixel_values)} if encoder is None else {"patch_features": encoder(self)}
        return {
            "input_ids": self.input_ids,
            "attention_mask": move(self.attention_mask),
            **images,
            "labels": self.labels,
            "lengths": self.lengths,
            "num_tokens": self.num_tokens if self.is_packed else None,
        }

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in pinned memory. DataLoader calls this method when pin_memory is set."""
        pinned: dict[str, Any] = {n: v.pin_memory() for n, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **pinned)


def collate(samples: Sequence[Sample], pad_token_id: int, packed: bool = False) -> Batch:
    """Make a batch of samples, padded or packed."""
    rows = _packed_row(samples, pad_token_id) if packed else _padded_rows(samples, pad_token_id)
    return Batch(
        **rows,
        pixel_values=_concatenate(sample.pixel_values for sample in samples),
        patch_features=_concatenate(sample.patch_features for sample in samples),
        image_keys=[key for sample in samples for key in sample.image_keys],
        is_cached=[is_cached for sample in samples for is_cached in sample.is_cached],
        images_in_sample=[len(sample.is_cached) for sample in samples],
        ids=[sample.id for sample in samples],
        replaced=[sample.replaced for sample in samples if sample.replaced],
        pad_token_id=pad_token_id,
    )


def _padded_rows(samples: Sequence[Sample], pad_token_id: int) -> dict:
    shape = (len(samples), max(len(sample.input_ids) for sample in samples))
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORE_INDEX)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        labels[row, :length] = sample.labels
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask, "lengths": None}


def _packed_row(samples: Sequence[Sample], pad_token_id: int) -> dict:
    lengths = [len(sample.input_ids) for sample in samples]
    input_ids = torch.cat([sample.input_ids for sample in samples])
    labels = torch.cat([sample.labels for sample in samples])
    starts = [0, *itertools.accumulate(lengths[:-1])]
    labels[starts] = IGNORE_INDEX  # the token before a sample's first one belongs to another sample
    padding, longest = bucket(len(input_ids)) - len(input_ids), max(lengths)
    # Fillers are no longer than a sample: no model refuses their length, and their attention costs little.
    fillers = [min(longest, padding - first) for first in range(0, padding, longest)]
    return {
        "input_ids": F.pad(input_ids, (0, padding), value=pad_token_id)[None],
        "labels": F.pad(labels, (0, padding), value=IGNORE_INDEX)[None],
        "attention_mask": None,
        "lengths": lengths + fillers,
    }


def _concatenate(tensors: Iterable[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found) if found else None


def _split(tensor: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if tensor is None else tensor.split(counts)
