"""The newest few and every so many steps are kept, and always the newest good one."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megascale.checkpoint import folders, retention
from megascale.checkpoint.folders import list_checkpoints, step_of
from megascale.checkpoint.load import newest_good
from megascale.checkpoint.retention import prune


def steps(folder) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


def test_the_newest_and_the_multiples_are_kept(small_checkpoint, tmp_path) -> None:
    for step in (100, 150, 200, 250, 300, 350):
        small_checkpoint(tmp_path, step)
    assert prune(tmp_path, keep_last=2, keep_every=200) == [250, 150, 100]
    assert steps(tmp_path) == [350, 300, 200]
    assert len(list(tmp_path.iterdir())) == 3
    assert prune(tmp_path, keep_last=2, keep_every=200) == []


def test_the_newest_good_one_outlives_damaged_newer_ones(small_checkpoint, tmp_path) -> None:
    for step in (100, 200, 300, 400):
        path = small_checkpoint(tmp_path, step)
        if step >= 300:
            content = bytearray((path / "shard-00001.safetensors").read_bytes())
            content[-1] ^= 1
            (path / "shard-00001.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="shard-00001"):
        assert prune(tmp_path, keep_last=2, keep_every=0) == [100]
    reader = newest_good(tmp_path, lambda line: None)
    assert reader is not None and reader.step == 200


def test_nothing_is_deleted_when_nothing_is_good(small_checkpoint, tmp_path) -> None:
    for step in (100, 200):
        (small_checkpoint(tmp_path, step) / "index.json").unlink()
    lines: list[str] = []
    assert prune(tmp_path, 1, 0, lines.append) == []
    assert steps(tmp_path) == [200, 100] and "nothing is deleted" in lines[-1]


def test_a_folder_without_checkpoints_is_fine(tmp_path) -> None:
    assert prune(tmp_path / "nowhere", 1, 0) == []


@given(st.sets(st.integers(1, 60), max_size=12), st.integers(1, 4), st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_kept_is_exactly_the_rule(tmp_path_factory, monkeypatch, found, keep_last, keep_every) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in found:
        folders.step_folder(folder, step).mkdir()

    class Newest:
        path = folders.step_folder(folder, max(found, default=0))

    monkeypatch.setattr(retention, "newest_good", lambda *_: Newest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(folder, keep_last, keep_every)
    newest = sorted(found)[-keep_last:]
    assert set(steps(folder)) == {step for step in found if step in newest or (keep_every and step % keep_every == 0)}
