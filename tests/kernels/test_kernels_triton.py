"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for GPUs that are not here, by every supported Triton.

Each is a pytest process of its own: the interpreter is chosen when Triton is imported, and a process has one Triton. `make test` puts
the supported ones beside the environment, as .venv/triton-VERSION.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRITONS = sorted(Path(sys.prefix).glob("triton-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["gpu", "compiled"])
@pytest.mark.parametrize("triton", TRITONS or [None], ids=lambda path: path.name if path else "no triton")
def test_kernels_on(triton: Path | None, kind: str, tmp_path: Path) -> None:
    if triton is None:
        pytest.skip(f"no triton-VERSION in {sys.prefix}: `make test` installs the supported ones")
    environment = os.environ | {"PYTHONPATH": str(triton), "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}  # as before 3.10, where the default changes
    environment.pop("TRITON_INTERPRET", None)
    if kind == "gpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", HERE / kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output of the inner pytest"
