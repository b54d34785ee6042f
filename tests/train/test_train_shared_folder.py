"""The run folder on several ranks: opened by one, seen by all, refused alike."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from megascale.config.errors import InputError
from megascale.train import shared_folder
from megascale.train.shared_folder import open_shared_folder
from ranks import RankPool
from runs import one_process, tiny_config


def opened(rank: int, size: int, folders: list[Path], corpus: Path) -> tuple[str, bool]:
    """What came of it on a rank whose runs lie below its own folder, and whether the user has been told."""
    config = tiny_config(folders[rank], corpus)
    with mock.patch.object(shared_folder, "VISIBLE_SECONDS", 0.3):
        try:
            return str(open_shared_folder(config, one_process(rank, size))), True
        except InputError as error:
            return str(error), error.told


def test_ranks_that_share_the_folder_open_it(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    assert ranks.run(opened, [tmp_path, tmp_path], tiny_corpus) == [(str(tmp_path / "runs" / "tiny"), True)] * 2
    assert sorted(path.name for path in (tmp_path / "runs" / "tiny").iterdir()) == ["checkpoints", "config.yaml", "logs"]


def test_hosts_with_folders_of_their_own_are_refused(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    """The path is the same on both hosts in real life; here only rank 0's name of it is told."""
    folders = [tmp_path / "node1", tmp_path / "node2"]
    for folder in folders:
        folder.mkdir()
    (first, told), other = ranks.run(opened, folders, tiny_corpus)
    assert other == (first, told)
    assert told
    assert "runs/tiny: rank 1 cannot see what rank 0 writes there\n  -> choose a run.folder=PATH that all hosts share" in first


def test_a_folder_that_rank_0_cannot_open_is_refused_by_all(ranks: RankPool, tmp_path: Path, tiny_corpus: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    first, other = ranks.run(opened, [tmp_path, tmp_path], tiny_corpus)
    assert first == other
    assert "cannot be written: Not a directory" in first[0]
    assert first[1]
