"""Dividing a step among processes. (The order of samples itself is in test_loader.py.)

Run: python -m pytest tests/dataset/test_order.py
"""

from itertools import chain

import numpy as np
import pytest

from config import InputError
from dataset.order import SampleOrder, micro_batches, split_step

UP_TO_8 = range(1, 9)


@pytest.mark.parametrize("processes", UP_TO_8)
def test_a_step_is_divided_evenly_into_the_largest_micro_batches(processes):
    """For every batch size and accumulation up to 8: the number of samples is kept, each process has equally many
    micro-batches, and no larger micro-batch, up to the given size, would divide the step."""
    for batch_size in UP_TO_8:
        for accumulation in UP_TO_8:
            samples = batch_size * accumulation
            fitting = [size for size in range(1, batch_size + 1) if samples % (size * processes) == 0]
            if samples % processes:
                assert not fitting
                with pytest.raises(InputError, match=f"{samples} samples .* which {processes} processes .* multiple"):
                    split_step(batch_size, accumulation, processes)
                continue
            size, count = split_step(batch_size, accumulation, processes)
            assert size * count == samples and count % processes == 0 and size == max(fitting) <= batch_size


def test_sizes_that_divide_evenly_are_kept():
    assert split_step(2, 4, 1) == split_step(2, 4, 2) == split_step(2, 4, 4) == (2, 4)
    assert split_step(2, 3, 1) == (2, 3) and split_step(4, 1, 2) == (2, 2) and split_step(4, 1, 4) == (1, 4)


@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 4), (3, 4), (8, 3), (6, 2)])
def test_any_number_of_processes_takes_the_same_samples_in_each_step(shape):
    order = SampleOrder(np.arange(13), 3, np.ones(13))
    samples, steps = shape[0] * shape[1], range(2, 6)
    for processes in (n for n in UP_TO_8 if samples % n == 0):
        size, count = split_step(*shape, processes)
        ranks = [
            list(micro_batches(order, steps, batch_size=size, accumulation=count, rank=rank, world_size=processes))
            for rank in range(processes)
        ]
        each = count // processes
        assert {len(batches) for batches in ranks} == {each * len(steps)}
        for i, step in enumerate(steps):
            taken = chain(*(chain(*batches[i * each : (i + 1) * each]) for batches in ranks))
            assert sorted(taken) == sorted(order.at(step * samples + j) for j in range(samples))
