"""The helper that runs functions on ranks: results by rank, failures with their cause, no hang without its stacks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ranks import RankError, RankPool, RankTimeout, run_ranks

THIS_FILE = Path(__file__).resolve()


@pytest.fixture(scope="module")
def pool() -> Any:
    with RankPool(world_size=2) as pool:
        yield pool


def report_self(rank: int, world_size: int) -> tuple[int, int, int, int]:
    from torch import distributed

    return rank, world_size, distributed.get_rank(), distributed.get_world_size()


def sum_over_ranks(rank: int, world_size: int, factor: float) -> list[float]:
    import torch
    from torch import distributed

    values = torch.full((2,), factor * (rank + 1))
    distributed.all_reduce(values)
    return values.tolist()


def draw_number(rank: int, world_size: int) -> float:
    import torch

    return torch.rand(()).item()


def launcher_variables(rank: int, world_size: int) -> dict[str, str]:
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
    os.environ["LEFT_BEHIND"] = "1"
    return found


def left_behind(rank: int, world_size: int) -> bool:
    return "LEFT_BEHIND" in os.environ


def compile_the_loss(rank: int, world_size: int) -> tuple[str, str]:
    from megascale.model.loss import LossKernels

    before = repr(LossKernels.statistics)
    LossKernels.compile()
    return before, repr(LossKernels.statistics)


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def raise_on(rank: int, world_size: int, failing: int) -> None:
    from torch import distributed

    if rank == failing:
        raise LookupError(f"nothing at {rank}")
    distributed.barrier()


def exit_on(rank: int, world_size: int, failing: int) -> None:
    from torch import distributed

    if rank == failing:
        os._exit(7)
    distributed.barrier()


def wait_in_vain(rank: int, world_size: int) -> None:
    from torch import distributed

    if rank == 1:
        time.sleep(600)
    distributed.barrier()


def sleep_long(rank: int, world_size: int) -> None:
    time.sleep(60)


def return_a_lock(rank: int, world_size: int) -> Any:
    import threading

    return threading.Lock()


def fresh_ranks_answer_in_order(rank: int, world_size: int) -> tuple[int, int]:
    return rank, os.getpid()


def test_fresh_ranks_answer_in_rank_order_and_are_gone_afterwards() -> None:
    answers = run_ranks(fresh_ranks_answer_in_order, 2)
    assert [rank for rank, _ in answers] == [0, 1]
    assert not any(Path(f"/proc/{process_id}").exists() for _, process_id in answers)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_call_has_a_process_group_of_its_size(pool: RankPool, world_size: int) -> None:
    assert pool.run(report_self, world_size=world_size) == [(rank, world_size) * 2 for rank in range(world_size)]


def test_ranks_communicate(pool: RankPool) -> None:
    assert pool.run(sum_over_ranks, 0.5) == [[1.5, 1.5]] * 2


def test_processes_live_on_and_grow_in_number(pool: RankPool) -> None:
    two = pool.run(process_id)
    three = pool.run(process_id, world_size=3)
    assert three[:2] == two
    assert pool.run(process_id) == two
    assert pool.process_ids == three


def test_every_call_starts_from_the_same_seed(pool: RankPool) -> None:
    first, second = pool.run(draw_number), pool.run(draw_number)
    assert first == second
    assert first[0] == first[1]


def test_ranks_see_a_launchers_variables_and_leave_none(pool: RankPool) -> None:
    zero, one = pool.run(launcher_variables)
    assert zero == {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    assert one["RANK"] == "1"
    assert pool.run(left_behind) == [False, False]


def test_an_exception_names_its_rank_and_shows_its_traceback_and_the_pool_starts_anew(pool: RankPool) -> None:
    before = pool.run(process_id)
    with pytest.raises(RankError, match="rank 1 of 2 in raise_on") as caught:
        pool.run(raise_on, 1)
    assert caught.value.rank == 1
    assert "LookupError: nothing at 1" in str(caught.value)
    assert THIS_FILE.name in str(caught.value)
    assert pool.process_ids == []
    assert set(before).isdisjoint(pool.run(process_id))


def test_a_rank_that_dies_is_named_with_its_exit_code(pool: RankPool) -> None:
    with pytest.raises(RankError, match="exit code 7") as caught:
        pool.run(exit_on, 0)
    assert caught.value.rank == 0


def test_a_hang_ends_at_the_deadline_with_the_stacks_of_all_ranks(pool: RankPool) -> None:
    pool.run(process_id)
    start = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] did not finish in 2 s") as caught:
        pool.run(wait_in_vain, timeout=2)
    assert time.monotonic() - start < 20
    assert str(caught.value).count("in wait_in_vain") == 2
    assert "barrier" in str(caught.value)


def test_a_result_that_cannot_travel_is_an_error(pool: RankPool) -> None:
    with pytest.raises(RankError, match="cannot pickle"):
        pool.run(return_a_lock)


def test_functions_without_a_name_are_refused(pool: RankPool) -> None:
    with pytest.raises(TypeError, match="top level"):
        pool.run(lambda rank, world_size: rank)


def test_busy_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        f"import os, signal, sys, threading; sys.path.insert(0, {str(THIS_FILE.parent)!r})\n"
        "from ranks import RankPool; import test_ranks\n"
        "if __name__ == '__main__':\n"
        "    pool = RankPool(1)\n"
        "    print(pool.run(test_ranks.process_id)[0], flush=True)\n"
        "    threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "    pool.run(test_ranks.sleep_long)\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "program.py"]
    ended = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    rank = Path(f"/proc/{int(ended.stdout)}")
    deadline = time.monotonic() + 20
    while rank.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not rank.exists()


def test_what_a_call_compiles_for_its_process_ends_with_it(pool: RankPool) -> None:
    """Compiled functions round otherwise: the next run in this process would not be the same bit for bit."""
    first, second = (pool.run(compile_the_loss) for _ in range(2))
    assert [before for before, _ in first] == [before for before, _ in second]
    assert all(before != after for before, after in first)
