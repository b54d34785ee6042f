"""Reading ahead keeps order, passes on exceptions and ends its thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from megascale.data.prefetch import prefetch


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_items_come_in_order_and_the_thread_ends():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert threads() == 0


def test_an_exception_comes_where_its_item_would_have():
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise RuntimeError("no more")

    items = prefetch(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="no more"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    assert threads() == 0


def test_it_reads_no_further_ahead_than_asked():
    taken: list[int] = []
    with prefetch((taken.append(i) or i for i in itertools.count()), depth=2) as items:
        assert next(items) == 0
        threading.Event().wait(0.1)
        assert len(taken) <= 4


def test_closing_early_ends_the_thread():
    items = prefetch(itertools.count())
    next(items)
    items.close()
    items.close()
    assert threads() == 0
    assert list(items) == []
