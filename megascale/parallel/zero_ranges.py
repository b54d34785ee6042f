"""Flat ranges of row-major tensors as rectangles: how a piece of ZeRO's flat partition is written and read without gathering."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Shape = tuple[int, ...]


def flat_rectangles(sizes: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Elements start..stop-1 of a row-major tensor of these sizes, cut into at most 2*ndim - 1 rectangles.

    The range is a tail of its first row, whole rows, and a head of its last row (a row: an index of the first dimension); the tail and the
    head are ranges of one dimension less.

    Yields: offsets, sizes and first flat index of each rectangle, in the order of the flat index; nothing for an empty range.
    """
    assert 0 <= start <= stop <= prod(sizes), f"elements {start} to {stop} of a tensor of sizes {sizes}"
    if start == stop:
        return
    if len(sizes) <= 1:
        yield (start,) * len(sizes), (stop - start,) * len(sizes), start
        return
    row = prod(sizes[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start < row:
        yield from _in_row(sizes, first, start, stop)
        return
    whole, end = -(-start // row), stop // row
    yield from _in_row(sizes, first, start, whole * row)
    if whole < end:
        yield (whole, *(0,) * (len(sizes) - 1)), (end - whole, *sizes[1:]), whole * row
    yield from _in_row(sizes, last, end * row, stop)


def _in_row(sizes: Shape, index: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape, int]]:
    before = index * prod(sizes[1:])
    if start < stop:
        for offsets, extents, first in flat_rectangles(sizes[1:], start - before, stop - before):
            yield (index, *offsets), (1, *extents), before + first
