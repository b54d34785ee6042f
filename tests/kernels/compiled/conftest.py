"""Tests that compile the Triton kernels for GPUs this machine does not have; they need a Triton that does not interpret.

    PYTHONPATH=.venv/triton-3.9.0 python -m pytest tests/kernels/compiled

`tests/kernels/test_kernels_triton.py` does that for every supported Triton.
"""

from __future__ import annotations

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
