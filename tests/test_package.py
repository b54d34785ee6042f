"""The package as it is installed: what a wheel holds, one import name for kernels, pinned versions, a clear build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def python(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with the repository root first on sys.path, as ``python -m`` does."""
    return run(sys.executable, "-c", program)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in ("megascale", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    built = run(sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')", cwd=tree)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tree.glob("*.whl"))) as archive:
        yield archive


def metadata(wheel: zipfile.ZipFile) -> list[str]:
    return wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode().splitlines()


def test_a_wheel_holds_every_source_file_once_and_kernels_only_inside_the_package(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = [*(ROOT / "megascale").rglob("*"), *(ROOT / "megascale" / "kernels").rglob("*")]
    files = (file for file in sources if file.is_file() and "__pycache__" not in file.parts)
    assert held == {file.relative_to(ROOT).as_posix() for file in files}
    assert "megascale/kernels/__init__.py" in held


def test_a_wheel_has_the_console_script(wheel: zipfile.ZipFile) -> None:
    scripts = next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "megascale = megascale.cli:main" in wheel.read(scripts).decode()


def test_every_dependency_is_pinned_to_a_version_that_its_range_allows(wheel: zipfile.ZipFile) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins: dict[str, list[Requirement]] = {}
    for pin in map(Requirement, lines):
        assert re.fullmatch(r"==[0-9a-z.]+", str(pin.specifier)), f"{pin} is not an exact pin"
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for line in metadata(wheel):
        if line.startswith("Requires-Dist: ") and 'extra == "gpu"' not in line:
            needed = Requirement(line.removeprefix("Requires-Dist: "))
            for pin in pins[canonicalize_name(needed.name)]:
                assert needed.specifier.contains(str(pin.specifier).removeprefix("=="), prereleases=True), (needed, pin)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_no_package_is_pinned_twice_for_one_python(version: str) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate({"python_version": version})]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) == len(set(names))


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert python("import sys, megascale; assert not {'torch', 'numpy', 'wandb'} & set(sys.modules)").returncode == 0


@pytest.mark.parametrize("statement", ["from kernels import attention", "import kernels.attention"])
def test_kernels_have_one_import_name(statement: str) -> None:
    assert (ROOT / "kernels" / "attention.py").exists()
    ended = python(statement)
    assert ended.returncode == 1
    assert ("from megascale.kernels import attention" if "from" in statement else "No module named") in ended.stderr


def test_the_folder_kernels_is_not_taken_for_the_package_that_transformers_looks_for() -> None:
    ended = python("import kernels, transformers; print(transformers.utils.is_kernels_available())")
    assert ended.stdout.strip() == "False", ended.stderr


@pytest.fixture
def make_tree(tmp_path: Path) -> Path:
    """A folder with a blank in its name that holds only what make reads, and a stand-in for Python."""
    tree = tmp_path / "a tree"
    tree.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    return tree


def stand_in(tree: Path, script: str) -> str:
    file = tree / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return "./python"


def test_make_names_a_missing_python(make_tree: Path) -> None:
    ended = run("make", "test", "PYTHON=no-such-python", cwd=make_tree)
    assert ended.returncode == 2
    assert "no-such-python: not found" in ended.stderr


def test_make_refuses_an_unsupported_python(make_tree: Path) -> None:
    python = stand_in(make_tree, 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.13.1;; esac')
    ended = run("make", "quickstart", f"PYTHON={python}", cwd=make_tree)
    assert ended.returncode == 2
    assert "Python 3.13.1" in ended.stderr
    assert "3.10, 3.11 or 3.12" in ended.stderr


def test_make_explains_a_python_without_venv(make_tree: Path) -> None:
    python = stand_in(make_tree, 'case "$*" in *ensurepip*) exit 1;; esac')
    ended = run("make", "test", f"PYTHON={python}", cwd=make_tree)
    assert ended.returncode == 2
    assert "apt install python3-venv" in ended.stderr
    assert not (make_tree / ".venv").exists()


def test_make_installs_again_only_when_the_specification_changed(make_tree: Path) -> None:
    (make_tree / ".venv" / "bin").mkdir(parents=True)
    tritons = re.search(r"^TRITONS := (.*)$", (make_tree / "Makefile").read_text(), re.MULTILINE)
    assert tritons is not None
    made = [f".venv/triton-{version}" for version in tritons[1].split()]
    for name in (".venv/bin/python", ".venv/stamp", ".venv/stamp-dev", *made):
        (make_tree / name).touch()
    assert "pip" not in run("make", "-n", "test", cwd=make_tree).stdout
    (make_tree / ".venv" / "stamp").unlink()
    assert "pip" in run("make", "-n", "test", cwd=make_tree).stdout


def test_torch_comes_from_the_named_index_and_nothing_else_does(make_tree: Path) -> None:
    planned = run("make", "-n", "test", "TORCH_INDEX=file:///an/index", cwd=make_tree).stdout
    (line,) = (line for line in planned.splitlines() if "--index-url" in line)
    assert line.endswith('--no-deps --index-url "file:///an/index" torch')
    assert "--index-url" not in run("make", "-n", "test", cwd=make_tree).stdout
