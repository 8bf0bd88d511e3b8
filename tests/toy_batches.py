"""Samples of random tokens and pixels, and a comparison of batches. For tests of batches and of what the model computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from config import IGNORE_INDEX
from dataset.batch import Batch, Sample

PAD = 0
CPU = torch.device("cpu")


def samples_of(image_token: int, images: Sequence[int] = (1, 0, 3, 0, 1), seed: int = 0) -> list[Sample]:
    """Return one sample for each number of images, each image 16 tokens, with text before, between and after.

    A few last tokens are supervised; in the second sample all of them, including the first.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i, count in enumerate(images):
        text = torch.randint(10, 200, (6 + 5 * i,), generator=generator)
        ids = torch.cat([text[:2], *[torch.cat([torch.full((16,), image_token), text[2:3]])] * count, text[2:]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-(2 + i) :] = ids[-(2 + i) :]
        samples.append(
            Sample(
                id=f"s{i}",
                input_ids=ids,
                labels=ids.clone() if i == 1 else labels,
                pixel_values=torch.randn(count, 3, 28, 28, generator=generator) if count else None,
                patch_features=None,
                image_keys=[f"{i}.{j}" for j in range(count)],
                is_cached=[False] * count,
            )
        )
    return samples


def text_sample(name: str, length: int) -> Sample:
    """Return a sample of `length` supervised tokens without images."""
    return Sample(
        id=name,
        input_ids=torch.ones(length, dtype=torch.long),
        labels=torch.ones(length, dtype=torch.long),
        pixel_values=None,
        patch_features=None,
        image_keys=[],
        is_cached=[],
    )


def is_same(one: Batch | Sample, other: Batch | Sample) -> bool:
    """Return whether two batches or samples are equal in every field; tensors also in dtype."""

    def equal(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return type(one) is type(other) and all(equal(value, vars(other)[name]) for name, value in vars(one).items())


def are_same(some: Sequence[Batch | Sample], others: Sequence[Batch | Sample]) -> bool:
    return len(some) == len(others) and all(is_same(a, b) for a, b in zip(some, others, strict=True))
