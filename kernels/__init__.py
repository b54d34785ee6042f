"""Triton kernels, each beside its plain PyTorch reference. The only import name is ``megascale.kernels``.

With the repository root on ``sys.path`` this folder can also be found as a top-level ``kernels``. Under two names every
custom operator would be registered twice, so under that name nothing can be imported from it. The bare name stays
importable on purpose: transformers looks for a package called ``kernels`` whenever it is imported, and an error here
would break ``import transformers``; an empty module without a version counts as "not installed" there.
"""

from __future__ import annotations

from pathlib import Path

if __name__ != "megascale.kernels":
    __path__ = []

    def __getattr__(name: str) -> object:
        if (Path(__file__).parent / f"{name}.py").exists():
            raise ImportError(f"the kernels of megascale have one import name: use `from megascale.kernels import {name}`")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
