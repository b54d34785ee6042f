"""What all tests share: no network, no deadline for slow machines, and the pool of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from benchmarks.hosts import Hosts, HostsError
from corpora import build_corpus
from isolation import compiled_here_only
from ranks import RankPool

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}

# Examples are the same in every run and take as long as a loaded machine needs.
settings.register_profile("megascale", deadline=None, derandomize=True)
settings.load_profile("megascale")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also the cases of the matrices that are left out for time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if not item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def _compiled_for_one_test() -> Iterator[None]:
    """What a run compiles for its whole process ends with the test."""
    with compiled_here_only():
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Rank processes for the whole session: ``ranks.run(function, *args, world_size=4)``; starts when first used."""
    with RankPool(world_size=2) as pool:
        yield pool


@pytest.fixture(scope="session")
def _hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    try:
        hosts = Hosts(3, tmp_path_factory.mktemp("hosts"))
    except HostsError as error:
        pytest.skip(str(error))
    yield hosts
    hosts.close()


@pytest.fixture
def three_hosts(_hosts: Hosts) -> Iterator[Hosts]:
    """Three hosts, up, on which nothing runs; skipped where this machine makes none."""
    yield _hosts
    for number, host in enumerate(list(_hosts.hosts), 1):
        if host.up:
            host.clear()
        else:
            _hosts.restart(number)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 300 ids, for training runs; read-only, tests that damage it copy it."""
    return build_corpus(tmp_path_factory.mktemp("corpus") / "words")
