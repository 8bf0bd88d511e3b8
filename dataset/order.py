"""The order of samples, and how a step's samples are divided among micro-batches, rows and processes.

The order is a pure function of (seed, epoch, position). It does not depend on workers, processes or batches, nor on where a
run was interrupted: all of these may change without changing the samples of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from config import InputError


class SampleOrder:
    """An endless stream of samples: one pass over the data after another, each a seeded permutation of `kept`.

    An epoch is one pass, or `limit` samples if that is fewer. The next epoch continues where the last one ended, so every
    record is used once before any is used again.

    kept [n]: the records that may be used. weights [n]: how often each record is used in a pass. Its whole part is used in
    every pass; for its fraction, a seeded choice among the records of the same weight is made for each pass, of at
    least one record. Raises InputError if every weight is 0.
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
        """Return (pass over the data, record) of the sample at `position` of the stream."""
        epoch, offset = divmod(position, self.pass_length)
        if epoch != self._epoch:  # keep one pass in memory: 8 bytes a record
            self._epoch, self._permutation = epoch, self._permute(epoch)
        return epoch, int(self._permutation[offset])

    def _groups(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield for each weight (its positions in `kept`, copies of each, how many of them are used once more)."""
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


def split_step(batch_size: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Divide a step of batch_size x accumulation samples evenly among `processes`.

    Returns (samples a micro-batch, micro-batches a step): the given ones if they divide evenly, else the largest smaller
    micro-batches that do. Raises InputError if the step's samples cannot be divided evenly.
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
    order: SampleOrder, steps: range, *, batch_size: int, accumulation: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Yield the (epoch, record) pairs of each micro-batch of process `rank` in `steps`.

    A step takes the next batch_size x accumulation samples of the stream, whichever process computes them: process `rank`
    takes micro-batches rank, rank + world_size, ... Every step is full: the last step of a run takes its missing samples
    from the next epoch.
    """
    for step in steps:
        for micro in range(rank, accumulation, world_size):
            first = (step * accumulation + micro) * batch_size
            yield [order.at(position) for position in range(first, first + batch_size)]


# ---------------------------------------------------------------------------------------------------------------------
# Packing: several samples in one row without padding between them
#
# The samples of one optimizer step are distributed over its rows so that all rows are about equally long. No sample moves
# to another step, so each step learns from the same samples as without packing, for any number of processes.


class PackedRow(NamedTuple):
    """One of the `rows` rows into which the samples of a step are packed."""

    keys: list[tuple[int, int]]  # the (epoch, record) pairs of the whole step
    rows: int
    row: int


def packed_rows(
    order: SampleOrder, steps: range, *, samples_per_step: int, rows: int, rank: int = 0, world_size: int = 1
) -> Iterator[PackedRow]:
    """Yield process `rank`'s rows of each step: rank, rank + world_size, ... of `rows`.

    A step takes the next `samples_per_step` samples of the stream, as in `micro_batches`. Their lengths decide which row
    each goes into.
    """
    for step in steps:
        keys = [order.at(position) for position in range(step * samples_per_step, (step + 1) * samples_per_step)]
        for row in range(rank, rows, world_size):
            yield PackedRow(keys, rows, row)


def pack(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Distribute samples over rows: longest first, each into the row that is shortest so far.

    This is Graham's LPT rule: no row is longer than 4/3 of the best possible. lengths: tokens of each sample of a step.
    Returns `rows` lists of positions in `lengths`, each ascending; none is empty if there are at least `rows` samples.
    """
    row_lengths = [0] * rows
    members: list[list[int]] = [[] for _ in range(rows)]
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = min(range(rows), key=lambda r: (row_lengths[r], r))
        row_lengths[row] += lengths[position]
        members[row].append(position)
    return [sorted(row) for row in members]


def bucket(length: int) -> int:
    """Round `length` up to one of 16 sizes an octave, by at most 1/16. Few shapes recur, and each new shape would cost a
    compilation, a choice of kernels or memory."""
    step = max(16, 1 << max(0, length.bit_length() - 5))
    return -(-length // step) * step
