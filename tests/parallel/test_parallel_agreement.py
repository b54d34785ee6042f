"""Ranks that differ, cannot start or are missing: what each rank is told. The ranks are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, Store, TCPStore

from megascale.config.errors import InputError
from megascale.parallel.agreement import Claim, JoinError, agree, facts_of
from runs import tiny_config

FACTS = {
    "versions": {"torch": "2.13.0"},
    "settings": {"model.width": "64", "run.seed": "0"},
    "data": {"digest of the corpora": "ab"},
}


def claim(**changes: Mapping[str, str]) -> Claim:
    """The common claim with changed facts, by kind."""
    return Claim({kind: {**facts, **changes.get(kind, {})} for kind, facts in FACTS.items()})


class Meeting:
    """Connections of some ranks to one store, kept between tests: making one takes torch five seconds now and then."""

    def __init__(self, ranks: int):
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.clients = [TCPStore("127.0.0.1", self.server.port, wait_for_workers=False) for _ in range(ranks)]
        self.calls = 0

    def outcomes(self, claims: list[Claim | None], timeout_seconds: float = 20.0) -> list[Exception | None]:
        """What `agree` raises on each rank; a claim of none is a rank that never comes."""
        found: list[Exception | None] = [None] * len(claims)
        self.calls += 1

        def rank_of(rank: int, own: Claim, store: Store) -> None:
            try:
                agree(store, rank, len(claims), own, timeout_seconds)
            except Exception as error:  # noqa: BLE001 - it is the result
                found[rank] = error

        threads = [
            threading.Thread(target=rank_of, args=(rank, own, PrefixStore(f"call {self.calls}", client)))
            for rank, (own, client) in enumerate(zip(claims, self.clients, strict=False))
            if own is not None
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        return found

    def refusal(
        self, claims: list[Claim | None], capsys: pytest.CaptureFixture[str], timeout_seconds: float = 20.0
    ) -> InputError:
        """The error that all ranks raise, which was printed once."""
        found = self.outcomes(claims, timeout_seconds)
        errors = [error for error, own in zip(found, claims, strict=True) if own is not None]
        first = errors[0]
        assert isinstance(first, InputError)
        assert all(isinstance(error, InputError) and error.told and error.exit_code == first.exit_code for error in errors)
        assert {str(error) for error in errors} == {str(first)}
        assert capsys.readouterr().err == f"error: {first}\n"
        return first


@pytest.fixture(scope="module")
def meeting() -> Meeting:
    return Meeting(5)


def test_equal_claims_agree(meeting: Meeting, capsys: pytest.CaptureFixture[str]) -> None:
    assert meeting.outcomes([claim(), claim(), claim()]) == [None, None, None]
    assert capsys.readouterr().err == ""


def test_the_error_names_the_rank_that_differs_and_how(meeting: Meeting, capsys: pytest.CaptureFixture[str]) -> None:
    error = meeting.refusal([claim(), claim(), claim(versions={"torch": "2.12.1"}, settings={"model.width": "96"})], capsys)
    assert error.place.startswith("rank 2 on ")
    assert "differs from rank 0" in error.reason
    assert "torch is 2.12.1 instead of 2.13.0; model.width is 96 instead of 64" in error.reason
    assert error.remedy == "install the same packages on every host; give every rank the same config file and overrides"
    assert error.exit_code == 2


def test_ranks_that_differ_alike_are_one_line(meeting: Meeting, capsys: pytest.CaptureFixture[str]) -> None:
    other, third = claim(data={"digest of the corpora": "cd"}), claim(settings={"run.seed": "7"})
    error = meeting.refusal([claim(), other, other, third, other], capsys)
    assert error.place.startswith("ranks 1-2, 4 on ")
    assert error.reason.count("digest of the corpora is cd instead of ab") == 1
    assert "\n  rank 3 on " in error.reason and "run.seed is 7 instead of 0" in error.reason


def test_a_setting_that_only_one_side_has_is_a_difference(meeting: Meeting, capsys: pytest.CaptureFixture[str]) -> None:
    error = meeting.refusal([claim(), claim(settings={"model.depth": "3"})], capsys)
    assert "model.depth is 3 instead of missing" in error.reason


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_rank_that_cannot_start_tells_the_others(meeting: Meeting, failing: int, capsys: pytest.CaptureFixture[str]) -> None:
    claims = [claim(), claim(), claim()]
    claims[failing] = Claim(failure=InputError("a.yaml", "there is no such file", "make it"))
    error = meeting.refusal(claims, capsys)
    assert error.place.startswith(f"rank {failing} on ") and error.place.endswith(": a.yaml")
    assert (error.reason, error.remedy, error.exit_code) == ("there is no such file", "make it", 2)


def test_a_failure_of_all_ranks_is_told_as_if_there_were_one(meeting: Meeting, capsys: pytest.CaptureFixture[str]) -> None:
    error = meeting.refusal([Claim(failure=InputError("a.yaml", "no such file"))] * 3, capsys)
    assert (error.place, error.reason) == ("a.yaml", "no such file")


def test_a_rank_that_fails_by_no_fault_of_its_input_raises_its_own_error(meeting: Meeting) -> None:
    crash = OSError("disk fell off")
    first, second = meeting.outcomes([claim(), Claim(failure=crash)])
    assert isinstance(first, JoinError) and first.exit_code == 1
    assert first.place.endswith(": OSError") and first.reason == "disk fell off"
    assert second is crash


def test_missing_ranks_are_named(meeting: Meeting, capsys: pytest.CaptureFixture[str]) -> None:
    error = meeting.refusal([claim(), None, claim(), None, None], capsys, timeout_seconds=0.5)
    assert isinstance(error, JoinError)
    assert (error.place, error.exit_code) == ("ranks 1, 3-4", 1)
    assert "did not start within 0.5 s" in error.reason


def test_a_missing_rank_0_is_named(meeting: Meeting) -> None:
    _, error = meeting.outcomes([None, claim()], timeout_seconds=0.5)
    assert isinstance(error, JoinError) and error.place == "rank 0"


def test_every_setting_and_version_is_compared(tmp_path: Path, tiny_corpus: Path) -> None:
    one = facts_of(tiny_config(tmp_path, tiny_corpus), "ab")
    other = facts_of(tiny_config(tmp_path, tiny_corpus, "checkpoint.every=3", "data.sources.0.weight=2"), "ab")
    assert one["versions"].keys() == {"python", "torch", "deepspeed", "megascale"}
    changed = {name for name in one["settings"] if one["settings"][name] != other["settings"][name]}
    assert changed == {"checkpoint.every", "data.sources"}
