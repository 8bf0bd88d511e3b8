"""Several samples in one row, one after the other, with no padding between them. Knows only lengths.

The samples of an optimizer step are put into its rows so that all rows are about equally long. The step is the whole of
the look-ahead: nothing moves from one step to another, so what is learned from, and when, is the same as without packing,
for any number of processes and wherever a run is taken up again.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Which samples stand in which row: longest first, each into the row that is shortest by then (Graham's LPT: no row is
    longer than 4/3 of the best possible). lengths: of a step's samples, in tokens. Returns `rows` lists of places in
    `lengths`, each in rising order, none empty where there are samples enough."""
    filled = [0] * rows
    members: list[list[int]] = [[] for _ in range(rows)]
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = min(range(rows), key=lambda r: (filled[r], r))
        filled[row] += lengths[place]
        members[row].append(place)
    return [sorted(row) for row in members]


def bucket(length: int) -> int:
    """`length` rounded up to one of 16 sizes an octave, at most a 16th more: few shapes come again and again, where a new
    one costs its compilation, its choice of kernels or its memory."""
    step = max(16, 1 << max(0, length.bit_length() - 5))
    return -(-length // step) * step
