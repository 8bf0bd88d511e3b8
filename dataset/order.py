"""Which sample comes when. The order is a pure function of (seed, epoch, position): it does not know workers, processes,
batches or where a run was interrupted, so all of those can change without changing what is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from config import InputError


class SampleOrder:
    """An endless stream of samples: pass after pass over the data, each a seeded permutation of `kept` by weight. An epoch
    is a pass, or `limit` samples where that is fewer: the next epoch goes on where it ended, so every record is taken once
    before any is taken again.

    kept [n]: the records that may be used. weights [n]: how often a record is taken in an epoch; the whole part every
    epoch, and for the rest a seeded choice among the records of the same weight that changes from epoch to epoch, of at
    least one record. Raises InputError where nothing is left to take.
    """

    def __init__(self, kept: np.ndarray, seed: int, weights: np.ndarray, limit: int | None = None):
        self.kept = np.asarray(kept, dtype=np.int64)
        self.seed = seed
        self.weights = np.asarray(weights, dtype=np.float64)
        self.epoch_length = sum(copies * len(members) + more for members, copies, more in self._groups())
        if self.epoch_length == 0:
            raise InputError('no sample to train on: every record has weight 0; raise the "weight" of a source.')
        self.pass_length = self.epoch_length
        if limit is not None:
            self.epoch_length = min(limit, self.pass_length)
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def at(self, position: int) -> tuple[int, int]:
        """(pass over the data, record) of the sample at `position` of the stream."""
        epoch, offset = divmod(position, self.pass_length)
        if epoch != self._epoch:  # one epoch is kept: 8 bytes a record
            self._epoch, self._permutation = epoch, self._permute(epoch)
        return epoch, int(self._permutation[offset])

    def _groups(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """For each weight: (its places in `kept`, whole copies of each, how many of them come once more)."""
        for weight in np.unique(self.weights):
            members = np.flatnonzero(self.weights == weight)
            copies = math.floor(weight)
            rest = float(weight) - copies
            yield members, copies, max(1, round(rest * len(members))) if rest else 0

    def _permute(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, epoch))
        taken = []
        for members, copies, more in self._groups():
            taken += [np.repeat(members, copies), generator.permutation(members)[:more]]
        return self.kept[generator.permutation(np.concatenate(taken))]


def share_out(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """(samples a micro-batch, micro-batches a step), for `processes` that share a step of batch_size x accumulation samples
    evenly: as they are where that is possible, else the largest smaller micro-batches with which it is.

    Raises InputError where the step's samples cannot be shared evenly.
    """
    samples = batch_size * accumulation
    for size in range(batch_size, 0, -1):
        if samples % (size * processes) == 0:
            return size, samples // size
    raise InputError(
        f"a step has {samples} samples (train.per_device_train_batch_size {batch_size} x "
        f"train.gradient_accumulation_steps {accumulation}), which {processes} processes cannot share evenly; make their "
        f"product a multiple of {processes}."
    )


def micro_batches(
    order: SampleOrder, steps: range, batch_size: int, accumulation: int, rank: int, world_size: int
) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, record) pairs of each micro-batch of this process in `steps`.

    A step takes the next batch_size x accumulation samples of the stream, whoever computes them: process `rank` takes its
    micro-batches rank, rank + world_size, ... Every step is full: the last one of a run borrows what it lacks from the
    next epoch.
    """
    for step in steps:
        for micro in range(rank, accumulation, world_size):
            first = (step * accumulation + micro) * batch_size
            yield [order.at(position) for position in range(first, first + batch_size)]


class Share(NamedTuple):
    """One of the `rows` rows into which the samples of a step are packed."""

    keys: list[tuple[int, int]]  # the (epoch, record) pairs of the whole step
    rows: int
    row: int


def shares(order: SampleOrder, steps: range, samples: int, rows: int, rank: int, world_size: int) -> Iterator[Share]:
    """This process's rows of each step, for packed rows: `rank`, rank + world_size, ... of `rows`. A step takes the next
    `samples` samples of the stream, as in `micro_batches`; which of them stand in which row goes by their lengths."""
    for step in steps:
        keys = [order.at(position) for position in range(step * samples, (step + 1) * samples)]
        for row in range(rank, rows, world_size):
            yield Share(keys, rows, row)
