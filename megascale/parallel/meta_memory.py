"""The memory of a step that runs on meta tensors: how many bytes would be alive, and the most that ever were."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MetaMemory(TorchDispatchMode):
    """Counts the meta storages that operations make while it is entered, until they are freed: activations, their gradients, buffers.

    What a fused kernel allocates inside, and frees before it returns, is not seen.

    Args:
        state: tensors that are there anyway; they and views of them are not counted.
    """

    def __init__(self, state: Iterable[Tensor]):
        super().__init__()
        # the storages are held: a freed one's address might be given to another
        self.state = {storage._cdata: storage for storage in (x.untyped_storage() for x in state)}
        self.alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs the operation and counts what is new."""
        result = func(*args, **(kwargs or {}))
        for x in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(x, Tensor) and x.is_meta:
                self._count(x)
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in self.state:
            return
        size = storage.nbytes()
        self.alive[key] = (weakref.ref(storage, partial(self._forget, key)), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, _: object) -> None:
        self.now -= self.alive.pop(key)[1]
