"""Tests of the Triton kernels themselves: on a GPU, or without one in Triton's interpreter, which needs a process of its own.

    TRITON_INTERPRET=1 PYTHONPATH=.venv/triton-3.9.0 python -m pytest tests/kernels/gpu

`tests/kernels/test_kernels_triton.py` does that for every supported Triton. The interpreter runs each program of a grid in Python, about a
millisecond each: keep launches below 200 programs.

What the interpreter gets wrong is mended here. bf16 arithmetic works on the bits as if they were integers (triton-lang/triton#11584):
here it raises, since a kernel should compute in fp32 or wider; `dot` widens, conversions to bf16 round to nearest even as a GPU does.
Numpy from 2.4 on refuses arrays of one element as loop bounds (triton-lang/triton#9171).
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


def _mend_interpreter() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_cast, plain_dot, plain_binary, plain_patch = (
        builder.cast_impl,
        builder.create_dot,
        builder.binary_op,
        interpreter._patch_lang_tensor,
    )

    def is_bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def widen(x):
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x) else x

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return handle(rounded.view(torch.uint16).numpy().reshape(source.data.shape), tl.bfloat16)
        return plain_cast(self, source, target)

    def binary(self, left, right, operator):
        if is_bf16(left) or is_bf16(right):
            raise TypeError("bf16 arithmetic in a kernel: cast to the compute type right behind the load")
        return plain_binary(self, left, right, operator)

    def patch(tensor, *arguments):
        result = plain_patch(tensor, *arguments)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    def splat(self, block, x):  # a scalar condition has the label of what it compared, and 3.9 refuses such masks
        return handle(np.full(block.shape, x.data), tl.int1) if x.data.dtype == np.bool_ else plain_splat(self, block, x)

    builder.cast_impl, builder.binary_op, interpreter._patch_lang_tensor = cast, binary, patch
    plain_splat, builder.create_splat = builder.create_splat, splat
    builder.create_dot = lambda self, a, b, *rest: plain_dot(self, widen(a), widen(b), *rest)


if INTERPRETED:
    _mend_interpreter()
