"""The Triton kernels without a GPU: run in Triton's interpreter, and compiled for GPUs that are not here, by every supported Triton.

Each is a pytest process of its own: the interpreter is chosen when Triton is imported, and a process has one Triton. `make test` puts
the supported ones beside the environment, as .venv/triton-VERSION.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRITONS = sorted(Path(sys.prefix).glob("triton-*"))


KINDS = ("gpu", "compiled")


def run_suite(triton: Path, kind: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """The tests of one kind with one Triton, in a process of their own."""
    environment = os.environ | {"PYTHONPATH": str(triton), "TRITON_CACHE_DIR": str(cache)}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}  # as before 3.10, where the default changes
    environment.pop("TRITON_INTERPRET", None)
    if kind == "gpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", HERE / kind]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[Path, str], Future]]:
    """All of them, two at a time: each keeps one core busy."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            (triton, kind): pool.submit(run_suite, triton, kind, tmp_path_factory.mktemp("cache"))
            for triton in TRITONS
            for kind in KINDS
        }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("triton", TRITONS or [None], ids=lambda path: path.name if path else "no triton")
def test_kernels_on(triton: Path | None, kind: str, suites: dict[tuple[Path, str], Future]) -> None:
    if triton is None:
        pytest.skip(f"no triton-VERSION in {sys.prefix}: `make test` installs the supported ones")
    done = suites[triton, kind].result()
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, "see the output of the inner pytest"
