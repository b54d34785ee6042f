"""Save a checkpoint: every rank writes its rectangles, all succeed or all fail alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar, cast

from megascale.checkpoint.errors import CheckpointError, SaveError
from megascale.checkpoint.files import FileRecord, encode_json, sync_folder, write_file
from megascale.checkpoint.folders import publish, start, step_folder, tidy
from megascale.checkpoint.index import INDEX, Index, merge, to_json
from megascale.checkpoint.layout import Rectangle
from megascale.checkpoint.manifest import MANIFEST, STATE, Manifest
from megascale.checkpoint.shard import Shard, shard_name

Gather = Callable[[object], list]
Result = TypeVar("Result")


def save_checkpoint(
    folder: Path,
    step: int,
    rectangles: Iterable[Rectangle],
    state: Mapping[str, object],
    *,
    rank: int,
    world: int,
    gather: Gather,
    barrier: Callable[[], object],
) -> Path:
    """Write the checkpoint of a step. Called by all ranks together.

    Args:
        folder: the run's ``checkpoints`` folder, on a file system that all ranks share; made when missing.
        step: optimizer steps done. A checkpoint of this step that exists already is replaced, and stays readable until then.
        rectangles: what this rank writes. Over all ranks they have to cover each tensor exactly once.
        state: rank 0's is stored; anything JSON can hold.
        rank, world: of this process.
        gather: collects one small Python object of each rank on all ranks, in rank order.
        barrier: waits for all ranks.

    Returns:
        The checkpoint's folder.

    Raises:
        SaveError: any rank failed (a full disk, a rectangle missing or given twice). Every rank raises the same error; the
            half-written folder is removed and older checkpoints are as they were.
    """
    save = _Save(folder, step, rank, world, gather)
    try:
        return save.run(rectangles, state)
    except SaveError:
        try:
            if rank == 0 and folder.is_dir():
                tidy(folder)
        finally:
            barrier()  # no rank may start the next save while rank 0 still clears up this one
        raise


@dataclass(frozen=True)
class _Plan:
    """What ranks tell each other before anything is written. Rank 0 alone makes the folder and measures its free bytes."""

    index: Index
    size: int
    partial: Path | None = None
    free: int | None = None


@dataclass(frozen=True)
class _Outcome:
    """How an action went on one rank: its result, or why it failed and the bytes free on the disk then."""

    result: object
    failure: str | None = None
    free: int | None = None


class _Save:
    """One save on one rank: plan, write, publish. After each the ranks exchange their outcomes."""

    def __init__(self, folder: Path, step: int, rank: int, world: int, gather: Gather):
        self.folder, self.step, self.rank, self.world, self.gather = folder, step, rank, world, gather
        self.needed = 0  # bytes of the whole checkpoint, known after planning

    def run(self, rectangles: Iterable[Rectangle], state: Mapping[str, object]) -> Path:
        shards: list[Shard] = []  # filled by the action, so that a failure to plan reaches the other ranks too
        plans = self._together(self.folder, lambda: self._plan(shards, rectangles, state))
        partial = plans[0].partial
        assert partial is not None, "rank 0 makes the partial folder"
        self._check_space(plans)
        index: Index = {}
        records = self._together(partial / shards[0].file, lambda: self._write(shards[0], partial, plans, index))
        finals = self._together(partial, lambda: self._publish(partial, records, index, state))
        return cast(Path, finals[0])

    def _plan(self, shards: list[Shard], rectangles: Iterable[Rectangle], state: Mapping[str, object]) -> _Plan:
        shard = Shard(self.rank, rectangles)
        shards.append(shard)
        index_size = len(encode_json(to_json(shard.index), indent=None))
        if self.rank > 0:
            return _Plan(shard.index, shard.size + index_size)
        state_size = len(encode_json(dict(state)))
        self.folder.mkdir(parents=True, exist_ok=True)
        tidy(self.folder)
        partial = start(self.folder, self.step)
        # All files go into one folder, thus to one file system: rank 0's free bytes are everyone's.
        return _Plan(shard.index, shard.size + index_size + state_size, partial, shutil.disk_usage(self.folder).free)

    def _check_space(self, plans: list[_Plan]) -> None:
        self.needed, free = sum(plan.size for plan in plans), plans[0].free
        assert free is not None, "rank 0 measures the free space"
        if self.needed > free:
            raise self._error(f"disk full on {self.folder}", free)

    def _write(self, shard: Shard, partial: Path, plans: list[_Plan], index: Index) -> FileRecord | None:
        if self.rank == 0:
            index.update(merge(plan.index for plan in plans))
        return shard.write(partial) if shard.size else None

    def _publish(self, partial: Path, records: list[FileRecord | None], index: Index, state: Mapping[str, object]) -> Path | None:
        if self.rank > 0:
            return None
        files = {shard_name(rank): record for rank, record in enumerate(records) if record is not None}
        for name, record in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != record.size:
                raise OSError(f"rank 0 does not see {name} as it was written: {self.folder} has to be shared by all ranks")
        files[INDEX] = _write_bytes(partial / INDEX, encode_json(to_json(index), indent=None))
        files[STATE] = _write_bytes(partial / STATE, encode_json(dict(state)))
        saved_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        _write_bytes(partial / MANIFEST, Manifest(self.step, saved_at, files).encode())
        sync_folder(partial)
        return publish(partial)

    def _together(self, path: Path, action: Callable[[], Result]) -> list[Result]:
        """Run an action, exchange outcomes, return all ranks' results; if a rank failed, raise the same error on every rank."""
        cause: Exception | None = None
        try:
            outcome = _Outcome(action())
        except Exception as error:  # noqa: BLE001 (whatever it is: the other ranks wait in the exchange and have to be told)
            cause = error
            outcome = _Outcome(None, _describe(self.rank, path, error), _free_bytes(self.folder))
        outcomes: list[_Outcome] = self.gather(outcome)
        assert len(outcomes) == self.world, "gather returns one object for each rank"
        failed = [one for one in outcomes if one.failure is not None]
        if failed:
            others = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
            raise self._error(f"{failed[0].failure}{others}", failed[0].free) from cause
        return [cast(Result, one.result) for one in outcomes]

    def _error(self, reason: str, free: int | None) -> SaveError:
        needs = f"this checkpoint needs {self.needed:,} bytes, " if self.needed else ""
        has = f"{free:,} bytes are free" if free is not None else "free space is unknown"
        remedy = "older checkpoints are intact; when the disk is full, free space or lower checkpoint.keep_last"
        return SaveError(str(step_folder(self.folder, self.step)), f"not saved: {reason}; {needs}{has}", remedy)


def _describe(rank: int, path: Path, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return f"{error.place}: {error.reason}"
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return f"rank {rank} could not write {path}: {text}"


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _write_bytes(path: Path, content: bytes) -> FileRecord:
    return write_file(path, [memoryview(content)])
