"""Do the ranks of a run agree? Versions, config and data are compared before any collective, and a rank that cannot start tells the others.

Ranks that differ would hang or, worse, train something that nobody asked for: one that validates at other steps waits for peers that
never come; one with another corpus spoils every gradient. The ranks talk through the store at the meeting place, not through
collectives: those need equal library versions and working networks themselves. Rank 0 publishes its claim, each other rank compares
its own and answers, rank 0 publishes the verdict: O(ranks) messages, and every rank raises the same error.
"""

from __future__ import annotations

import json
import platform
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from typing import Any

from torch.distributed import DistError, Store

import megascale
from megascale.config.errors import InputError
from megascale.config.schema import Config

REMEDIES = {
    "versions": "install the same packages on every host",
    "launch": "start every rank by the same command",
    "settings": "give every rank the same config file and overrides",
    "data": "give every host the same corpora: `megascale data verify` finds damaged ones",
}
READ_SECONDS = 20.0
"""how long rank 0, whose process may hold the store, waits for the others to read that the run does not start"""


class JoinError(InputError):
    """The ranks did not come together: a rank or the meeting place is missing. Trying again may help."""

    exit_code = 1


@dataclass(frozen=True)
class Claim:
    """What a rank is about to train.

    Attributes:
        facts: by kind (the keys of `REMEDIES`) and name; equal on all ranks, or the run does not start.
        failure: why this rank cannot start.
    """

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    failure: Exception | None = None


@dataclass(frozen=True)
class _Answer:
    """What rank 0 learns of a rank. Lists, because they travel as JSON."""

    host: str
    failure: list[str] | None = None
    """place, reason, remedy"""
    failure_code: int = 2
    differences: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)


def facts_of(config: Config, data_digest: str) -> dict[str, dict[str, str]]:
    """Everything that has to be equal on all ranks: versions, every setting, the digest of the corpora."""
    versions = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": metadata.version("torch"),
        "deepspeed": metadata.version("deepspeed"),
        "megascale": megascale.__version__,
    }
    return {
        "versions": versions,
        "settings": dict(_flat(config.model_dump(mode="json"))),
        "data": {"digest of the corpora": data_digest},
    }


def _flat(tree: Any, path: str = "") -> list[tuple[str, str]]:
    """Leaves of a tree of mappings, by dotted path, as JSON."""
    if not isinstance(tree, Mapping) or not tree:
        return [(path, json.dumps(tree, sort_keys=True))]
    return [row for key, value in tree.items() for row in _flat(value, f"{path}.{key}" if path else str(key))]


def agree(store: Store, rank: int, size: int, claim: Claim, timeout_seconds: float) -> None:
    """Return if all ranks claim the same; else every rank raises the same error, which rank 0 has printed.

    Args:
        store: of the meeting place, used by nothing else.
        timeout_seconds: how long to wait for the last rank.

    Raises:
        InputError: ranks differ, or some cannot start; exit code 2.
        JoinError: ranks are missing, or one failed by no fault of its input; exit code 1.
        Exception: this rank's own failure, if it is no InputError: its traceback is worth seeing.
    """
    try:
        error = _lead(store, size, claim, timeout_seconds) if rank == 0 else _follow(store, rank, claim, timeout_seconds)
    except DistError as broken:
        place = "rank 0" if rank else "the ranks"
        remedy = "its own output tells why; if it is only slow, raise guard.timeout_seconds"
        raise JoinError(place, f"lost, or not started within {timeout_seconds:g} s ({_first_line(broken)})", remedy) from broken
    if error is None:
        return
    if claim.failure is not None and not isinstance(claim.failure, InputError):
        raise claim.failure
    raise error from claim.failure


def tell(error: InputError) -> None:
    """Print an error that all ranks are about to raise, on one of them."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    error.told = True


# Rank 0 ---------------------------------------------------------------------------------------------------------------


def _lead(store: Store, size: int, claim: Claim, timeout_seconds: float) -> InputError | None:
    # Without facts (a failure here) there is nothing to compare with: the others only tell whether they fail too.
    store.set("reference", json.dumps(claim.facts))
    answers, missing = _collect(store, size, timeout_seconds)
    answers = {0: _answer(claim, {})} | answers
    error = _missing(missing, timeout_seconds) if missing else _verdict(answers, size)
    if error is not None:
        tell(error)  # before the others learn of it: they end at once, and a launcher then ends this process too
    store.set("verdict", json.dumps(None if error is None else [error.exit_code, error.place, error.reason, error.remedy]))
    if error is not None:
        with suppress(DistError):  # a rank that died since its answer reads no verdict
            store.wait([f"read/{rank}" for rank in answers if rank], timedelta(seconds=READ_SECONDS))
    return error


def _collect(store: Store, size: int, timeout_seconds: float) -> tuple[dict[int, _Answer], list[int]]:
    """The answers of the other ranks, and who gave none in time."""
    deadline = time.monotonic() + timeout_seconds
    answers: dict[int, _Answer] = {}
    missing = []
    for rank in range(1, size):
        key, left = f"answer/{rank}", deadline - time.monotonic()
        with suppress(DistError):  # too late
            if left > 0:
                store.wait([key], timedelta(seconds=left))
        if store.check([key]):
            answers[rank] = _Answer(**json.loads(store.get(key)))
        else:
            missing.append(rank)
    return answers, missing


def _missing(missing: list[int], timeout_seconds: float) -> JoinError:
    reason = f"did not start within {timeout_seconds:g} s of rank 0"
    remedy = "their own output, on their host, tells why; if they are only slow, raise guard.timeout_seconds"
    return JoinError(name_ranks(missing), reason, remedy)


def _verdict(answers: dict[int, _Answer], size: int) -> InputError | None:
    failures: dict[tuple[str, ...], list[int]] = {}
    differences: dict[tuple[str, ...], list[int]] = {}
    for rank, answer in answers.items():
        if answer.failure is not None:
            failures.setdefault(tuple(answer.failure), []).append(rank)
        elif answer.differences:
            differences.setdefault(tuple(answer.differences), []).append(rank)
    if failures:
        return _failed(failures, answers, size)
    if not differences:
        return None
    (texts, ranks), *others = differences.items()
    reason = f"{'differs' if len(ranks) == 1 else 'differ'} from rank 0 on {answers[0].host}: {'; '.join(texts)}"
    reason += "".join(f"\n  {_who(ranks, answers)}: {'; '.join(texts)}" for texts, ranks in others)
    remedies = dict.fromkeys(text for answer in answers.values() for text in answer.remedies)
    return InputError(_who(ranks, answers), reason, "; ".join(remedies))


def _failed(failures: dict[tuple[str, ...], list[int]], answers: dict[int, _Answer], size: int) -> InputError:
    ((place, reason, remedy), ranks), *others = failures.items()
    kind = InputError if all(answers[rank].failure_code == 2 for some in failures.values() for rank in some) else JoinError
    if len(ranks) < size:
        place = f"{_who(ranks, answers)}: {place}"
    reason += "".join(f"\n  {_who(ranks, answers)}: {place}: {reason}" for (place, reason, _), ranks in others)
    return kind(place, reason, remedy)


def _who(ranks: list[int], answers: dict[int, _Answer]) -> str:
    """`ranks 8-15 on node2`."""
    hosts = list(dict.fromkeys(answers[rank].host for rank in ranks))
    return f"{name_ranks(ranks)} on {', '.join(hosts[:3])}{', ...' if len(hosts) > 3 else ''}"


def name_ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


# The other ranks ------------------------------------------------------------------------------------------------------


def _follow(store: Store, rank: int, claim: Claim, timeout_seconds: float) -> InputError | None:
    patience = timedelta(seconds=timeout_seconds)
    store.wait(["reference"], patience)
    reference: dict[str, dict[str, str]] = json.loads(store.get("reference"))
    answer = _answer(claim, reference)
    store.set(f"answer/{rank}", json.dumps(asdict(answer)))
    store.wait(["verdict"], patience + timedelta(seconds=READ_SECONDS))
    verdict = json.loads(store.get("verdict"))
    store.set(f"read/{rank}", "")
    if verdict is None:
        if answer.differences:  # rank 0 did not look at this rank: it counts fewer ranks
            return InputError(f"rank {rank}", f"differs from rank 0: {'; '.join(answer.differences)}", "; ".join(answer.remedies))
        return None
    code, *texts = verdict
    error = InputError(*texts) if code == 2 else JoinError(*texts)
    error.told = True
    return error


def _answer(claim: Claim, reference: dict[str, dict[str, str]]) -> _Answer:
    host, failure = socket.gethostname(), claim.failure
    if isinstance(failure, InputError):
        return _Answer(host, [failure.place, failure.reason, failure.remedy], failure.exit_code)
    if failure is not None:
        remedy = "its traceback is in its own output"
        return _Answer(host, [type(failure).__name__, _first_line(failure), remedy], failure_code=1)
    differences, remedies = [], []
    for kind, expected in reference.items():
        found = claim.facts.get(kind, {})
        rows = [
            f"{name} is {found.get(name, 'missing')} instead of {expected.get(name, 'missing')}"
            for name in dict.fromkeys((*expected, *found))
            if found.get(name) != expected.get(name)
        ]
        differences += rows
        remedies += [REMEDIES[kind]] * bool(rows)
    return _Answer(host, differences=differences, remedies=remedies)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
