"""On whose account a collective goes where its process group does not tell: gradients and the loop's sums travel over the same ranks as the
model's exchanges. Only the ledger (`megascale.parallel.ledger`) reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_account: ContextVar[tuple[str | None, bool]] = ContextVar("account", default=(None, False))


@contextmanager
def charged_to(axis: str, hidden: bool = False) -> Iterator[None]:
    """Collectives issued inside, by this thread, belong to `axis`; `hidden`: a backward pass goes on meanwhile. Not for code that is
    compiled: it would break the graph.
    """
    before = _account.set((axis, hidden))
    try:
        yield
    finally:
        _account.reset(before)


def account() -> tuple[str | None, bool]:
    """The axis that collectives belong to now (none: their process group tells), and whether something goes on that hides them."""
    return _account.get()
