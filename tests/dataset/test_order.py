"""How a step is shared out among processes. (The order of samples itself: tests/test_loader.py.)
Run: python -m pytest tests/test_order.py"""

from itertools import chain

import numpy as np
import pytest

from config import InputError
from dataset.order import SampleOrder, micro_batches, split_step

UP_TO_8 = range(1, 9)


@pytest.mark.parametrize("processes", UP_TO_8)
def test_a_step_is_shared_out_evenly_in_the_largest_micro_batches(processes):
    """For every batch and accumulation up to 8: the product stays, each process has as many micro-batches, no larger
    micro-batch (up to the one that memory was said to hold) would do."""
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


def test_what_fits_as_it_is_is_left_as_it_is():
    assert split_step(2, 4, 1) == split_step(2, 4, 2) == split_step(2, 4, 4) == (2, 4)
    assert split_step(2, 3, 1) == (2, 3) and split_step(4, 1, 2) == (2, 2) and split_step(4, 1, 4) == (1, 4)


@pytest.mark.parametrize("shape", [(4, 1), (2, 2), (1, 4), (3, 4), (8, 3), (6, 2)])
def test_every_number_of_processes_takes_the_same_samples_of_each_step(shape):
    order = SampleOrder(np.arange(13), 3, np.ones(13))
    samples, steps = shape[0] * shape[1], range(2, 6)
    for processes in (n for n in UP_TO_8 if samples % n == 0):
        size, count = split_step(*shape, processes)
        ranks = [list(micro_batches(order, steps, size, count, rank, processes)) for rank in range(processes)]
        each = count // processes
        assert {len(batches) for batches in ranks} == {each * len(steps)}
        for i, step in enumerate(steps):
            taken = chain(*(chain(*batches[i * each : (i + 1) * each]) for batches in ranks))
            assert sorted(taken) == sorted(order.at(step * samples + j) for j in range(samples))
