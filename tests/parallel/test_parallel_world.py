"""Who a process is, as each launcher tells it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from torch.distributed import HashStore

from megascale.config.errors import InputError
from megascale.parallel.agreement import Claim
from megascale.parallel.world import choose_interface, rank_variables, start_world
from runs import ROOT

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
DEEPSPEED = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}
SLURM = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, SLURM], ids=["torchrun", "deepspeed", "srun"])
def test_every_launcher_tells_rank_world_and_the_place_on_the_node(variables: dict[str, str]) -> None:
    assert rank_variables(variables) == (9, 16, 1, 8)


def test_slurms_uneven_nodes() -> None:
    variables = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8,4(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    assert rank_variables(variables) == (3, 16, 3, 8)


@pytest.mark.parametrize(
    "variables",
    [{}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_PROCID": "0"}, {"LOCAL_RANK": "0"}],
    ids=["nothing", "one task", "a job without steps", "half a launcher"],
)
def test_without_a_launcher_there_is_one_process(variables: dict[str, str]) -> None:
    assert rank_variables(variables) == (0, 1, 0, 1)


def test_torchrun_inside_a_slurm_job_wins() -> None:
    assert rank_variables(SLURM | {**TORCHRUN, "RANK": "2"})[0] == 2


def test_a_mere_rank_is_taken_for_one_node() -> None:
    assert rank_variables({"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4, 1, 4)


def test_ranks_without_a_meeting_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="environment variable MASTER_ADDR: is not set, but there are 2 ranks\n  -> export it"):
        start_world(1.0, Claim())


def test_the_meeting_place_of_another_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="(?s)MASTER_PORT.*address already in use.*choose another: `--master_port N`"):
            start_world(1.0, Claim())


def test_a_process_alone_raises_its_own_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    failure = InputError("a.yaml", "there is no such file")
    with pytest.raises(InputError) as caught:
        start_world(1.0, Claim(failure=failure))
    assert caught.value is failure


def test_ranks_that_meet_on_their_own_host_stay_on_loopback() -> None:
    store = HashStore()
    store.set("address/1", "127.0.0.1")
    environment = {"MASTER_ADDR": "127.0.0.1"}
    choose_interface(store, 0, 2, environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_interface_chosen_by_the_user_stays() -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}
    choose_interface(HashStore(), 0, 1, environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


LEAVING = """
import atexit, sys, torch.distributed
from megascale.cli import leave
class Torn:
    def __del__(self): print("torn down")
kept = Torn()
atexit.register(lambda: print("handled"))
sys.stdout.write("written, ")
leave(85)
"""


@pytest.mark.parametrize(("launched", "torn"), [({"RANK": "0"}, ""), ({}, "torn down\n")], ids=["a rank", "alone"])
def test_a_rank_leaves_behind_its_exit_handlers_with_its_code_and_is_not_torn_down(launched: dict[str, str], torn: str) -> None:
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING], env=outer | launched, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (85, f"written, handled\n{torn}"), done.stderr
