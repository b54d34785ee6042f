"""What a run leaves in its process, taken back: for tests, and for ranks that serve many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock


@contextmanager
def compiled_here_only() -> Iterator[None]:
    """What a run compiles for its whole process ends with this block: compiled functions round otherwise, so that the next run would not be
    the same bit for bit.
    """
    from megascale.kernels.attention import PrefixMaths
    from megascale.model.loss import LossKernels

    with ExitStack() as patches:
        for place, names in ((LossKernels, ("statistics", "gradient")), (PrefixMaths, ("merge", "gradients"))):
            patches.enter_context(mock.patch.multiple(place, **{name: place.__dict__[name] for name in names}))
        yield
