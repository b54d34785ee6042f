"""Every launcher starts, ends and restarts a run: on one host, and on several (which needs root). Each test starts real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.hosts import Host, Hosts, HostsError, allow_ssh
from corpora import build_corpus
from megascale.checkpoint.load import CheckpointReader
from megascale.observe.metrics import reproducible
from megascale.observe.sinks import read_metrics
from runs import ROOT, environment, write_config

pytestmark = pytest.mark.slow

STEPS = 150
RUN = (f"schedule.steps={STEPS}", "checkpoint.every=25", "observe.console_every=50", "guard.timeout_seconds=30")
BIN = Path(sys.executable).parent
PRETRAIN = "launch/pretrain.py"
TORCHRUN, DEEPSPEED = str(BIN / "torchrun"), str(BIN / "deepspeed")
Command = list[str]
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture
def config(tmp_path: Path, tiny_corpus: Path) -> Path:
    return write_config(tmp_path, tiny_corpus)


def training(config: Path, *overrides: str) -> Command:
    """What every launcher starts."""
    return [PRETRAIN, "--config", str(config), *RUN, *overrides]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def run_of(config: Path) -> Path:
    return config.parent / "runs" / "tiny"


def start(command: Command, variables: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup, the run would ignore it too
    process = subprocess.Popen(command, cwd=ROOT, env=environment() | (variables or {}), stdout=pipe, stderr=pipe, text=True)
    signal.signal(signal.SIGHUP, before)
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    """A test that failed leaves no processes to the next one."""
    yield
    for process in STARTED:
        end(process)
    STARTED.clear()


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all below it."""
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.kill()


def finish(process: subprocess.Popen[str], seconds: float = 100) -> str:
    """Waits until the process and all that share its output have ended; what they wrote."""
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        pytest.fail(f"still running after {seconds} s: {process.args}\n{''.join(process.communicate())}")
    return out + errors


def wait_until(condition: Callable[[], bool], what: str, *processes: subprocess.Popen[str], seconds: float = 120) -> None:
    """Polls while the processes live."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, finish(process)
        if time.monotonic() > deadline:
            for process in processes:
                end(process)
            pytest.fail(f"{what} after {seconds} s\n" + "\n".join(finish(process, 5) for process in processes))
        time.sleep(0.01)


def wait_for_step(config: Path, *processes: subprocess.Popen[str]) -> None:
    """Until some steps of the run are done, and many are not."""
    metrics = run_of(config) / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 5, "no steps", *processes)


def ended_as(config: Path) -> tuple[str, str]:
    """Reason and message of exit.json."""
    record = json.loads((run_of(config) / "exit.json").read_text())
    return record["reason"], record["message"]


def assert_saved_where_it_stopped(config: Path) -> None:
    """The last step is before the end and has a checkpoint."""
    last = max(record["step"] for record in read_metrics(run_of(config) / "metrics.jsonl"))
    assert last < STEPS
    assert (run_of(config) / "checkpoints" / f"step-{last:08d}").is_dir()


def final_state(run: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    reader = CheckpointReader(run / "checkpoints" / f"step-{STEPS:08d}")
    return {name: reader.read(name) for name in reader.names()}, [reproducible(r) for r in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """The run on two ranks that nobody disturbs."""
    config = write_config(tmp_path_factory.mktemp("whole"), tiny_corpus)
    process = start([TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", *training(config)])
    output = finish(process)
    assert process.returncode == 0, output
    return run_of(config)


def assert_equal_runs(found: Path, expected: Path) -> None:
    tensors, metrics = final_state(found)
    true_tensors, true_metrics = final_state(expected)
    assert [name for name, tensor in true_tensors.items() if not torch.equal(tensor, tensors[name])] == []
    assert metrics == true_metrics


# One host -------------------------------------------------------------------------------------------------------------


def launcher(name: str, config: Path, *overrides: str) -> Command:
    """A launcher of two ranks on this host."""
    if name == "torchrun":
        return [TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", *training(config, *overrides)]
    return [DEEPSPEED, "--num_gpus=2", f"--master_port={free_port()}", *training(config, *overrides)]


def descendants(process: subprocess.Popen[str], *words: str) -> list[psutil.Process]:
    """The processes below this one whose arguments hold all words."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if all(word in child.cmdline() for word in words)]


def the_command(process: subprocess.Popen[str]) -> int:
    return process.pid


def launch_module(process: subprocess.Popen[str]) -> int:
    return descendants(process, "deepspeed.launcher.launch")[0].pid


def last_rank(process: subprocess.Popen[str]) -> int:
    return next(child.pid for child in reversed(descendants(process, PRETRAIN)) if child.environ().get("RANK") == "1")


ENDINGS = {
    "TERM to deepspeed": ("deepspeed", the_command, signal.SIGTERM, -15, "the launcher died"),
    "TERM to deepspeed's launch": ("deepspeed", launch_module, signal.SIGTERM, 1, "SIGTERM"),
    "TERM to torchrun": ("torchrun", the_command, signal.SIGTERM, 1, "SIGTERM"),
    "TERM to a rank of torchrun": ("torchrun", last_rank, signal.SIGTERM, 1, "another rank was asked to stop"),
    "KILL to torchrun": ("torchrun", the_command, signal.SIGKILL, -9, "the launcher died"),
}


@pytest.mark.parametrize(
    "name, target, number, code, cause",
    [
        pytest.param(*ending, id=name, marks=[pytest.mark.full] * (name == "TERM to deepspeed"))
        for name, ending in ENDINGS.items()
    ],
)
def test_a_signal_to_any_part_of_a_launcher_saves_the_run_and_leaves_nobody(
    config: Path, name: str, target: Callable[[subprocess.Popen[str]], int], number: int, code: int, cause: str
) -> None:
    process = start(launcher(name, config))
    wait_for_step(config, process)
    family = descendants(process)
    os.kill(target(process), number)
    output = finish(process)
    reason, message = ended_as(config)
    assert (process.returncode, reason) == (code, "requeue"), output
    assert message in (cause, "another rank was asked to stop")  # rank 0 may see it a step later
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert_saved_where_it_stopped(config)


@pytest.mark.full
@pytest.mark.slow
def test_a_run_under_zero_is_stopped_and_resumed_to_the_same_bits(config: Path, tmp_path: Path, tiny_corpus: Path) -> None:
    zero, others = "parallel.zero_stage=1", tmp_path / "whole"
    others.mkdir()
    whole = write_config(others, tiny_corpus)
    undisturbed = start(launcher("deepspeed", whole, zero))
    output = finish(undisturbed, 300)
    assert undisturbed.returncode == 0, output
    process = start(launcher("deepspeed", config, zero))
    wait_for_step(config, process)
    os.kill(last_rank(process), signal.SIGTERM)
    finish(process, 300)
    assert ended_as(config)[0] == "requeue"
    assert_saved_where_it_stopped(config)
    again = start(launcher("deepspeed", config, zero))
    output = finish(again, 300)
    assert again.returncode == 0, output
    assert_equal_runs(run_of(config), run_of(whole))


def test_a_run_under_nohup_outlives_its_shell(config: Path) -> None:
    shell = start(["bash", "-c", 'nohup "$0" "$@" & wait', sys.executable, *training(config)])
    wait_for_step(config, shell)
    run = descendants(shell, PRETRAIN)[0]
    shell.kill()
    run.send_signal(signal.SIGHUP)
    output = finish(shell)
    assert ended_as(config) == ("done", ""), output


def test_a_run_whose_terminal_closes_saves_its_step(config: Path) -> None:
    process = start([sys.executable, *training(config, "observe.console_every=1")])
    wait_for_step(config, process)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=30)
    assert (process.returncode, ended_as(config)) == (85, ("requeue", "SIGHUP"))
    assert_saved_where_it_stopped(config)


# Ranks that differ ----------------------------------------------------------------------------------------------------


def refused(*commands: Command) -> str:
    """Ranks started by hand, that all end with code 2; the one error that they print."""
    place = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        start([sys.executable, *command], place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, command in enumerate(commands)
    ]
    outputs = [finish(process) for process in started]
    assert [process.returncode for process in started] == [2] * len(started), outputs
    assert "".join(outputs).count("error: ") == 1 and "Traceback" not in "".join(outputs), outputs
    return outputs[0]


def test_a_rank_with_other_settings_and_data_is_refused(config: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    other = build_corpus(tmp_path / "other", seed=1)
    changed = training(config, "validation.every=7", f"data.sources.0.path={other}")
    message = refused(training(config), changed)
    assert "error: rank 1 on " in message
    for text in ("validation.every is 7 instead of 0", "digest of the corpora is"):
        assert text in message
    assert not (config.parent / "runs").exists()


def test_a_rank_without_a_config_file_tells_the_others(config: Path) -> None:
    message = refused(training(config), training(config.with_name("absent.yaml")))
    assert "error: rank 1 on " in message
    assert "absent.yaml: there is no such file" in message


# Several hosts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(three_hosts: Hosts) -> list[Host]:
    """Two hosts on which nothing runs."""
    return three_hosts.hosts[:2]


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    file = tmp_path / "hostfile"
    file.write_text("node1 slots=1\nnode2 slots=1\n")
    return file


def start_on(host: Host, command: Command) -> subprocess.Popen[str]:
    return host.start(command, ROOT, environment())


def start_torchrun(pair: list[Host], config: Path) -> list[subprocess.Popen[str]]:
    """One rank on each host, met by torch's c10d rendezvous."""
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=node1:{free_port()}"]
    return [start_on(host, [TORCHRUN, *meeting, "--rdzv-id=tiny", *training(config)]) for host in pair]


def test_two_hosts_without_ssh_are_stopped_by_one_and_resumed_by_torchrun(
    pair: list[Host], config: Path, hostfile: Path, uninterrupted: Path
) -> None:
    common = [DEEPSPEED, f"--hostfile={hostfile}", "--no_ssh", "--master_addr=node1", f"--master_port={free_port()}"]
    both = [start_on(host, [*common, f"--node_rank={i}", *training(config)]) for i, host in enumerate(pair)]
    wait_for_step(config, *both)
    os.kill(pair[1].processes("deepspeed.launcher.launch")[0], signal.SIGTERM)
    outputs = [finish(process) for process in both]
    assert [process.returncode for process in both] == [85, 1], outputs
    assert ended_as(config) == ("requeue", "another rank was asked to stop")
    assert_saved_where_it_stopped(config)
    assert [host.processes() for host in pair] == [[], []]
    again = start_torchrun(pair, config)
    outputs = [finish(process) for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert_equal_runs(run_of(config), uninterrupted)


@pytest.mark.full
def test_after_the_loss_of_a_host_the_other_ends_with_an_error_and_a_rerun_with_a_third_resumes(
    three_hosts: Hosts, config: Path, uninterrupted: Path
) -> None:
    one, two, spare = three_hosts.hosts
    first, second = start_torchrun([one, two], config)
    wait_until(lambda: (run_of(config) / "checkpoints" / "step-00000025").is_dir(), "no checkpoint", first, second)
    two.lose()
    output = finish(first)
    finish(second)
    assert first.returncode == 1, output
    reason, message = ended_as(config)
    assert (reason, message[:5]) == ("error", "rank "), output
    assert one.processes() == []
    again = start_torchrun([one, spare], config)
    outputs = [finish(process) for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert "resuming from step-" in "".join(outputs)
    assert_equal_runs(run_of(config), uninterrupted)


@pytest.mark.full
def test_two_hosts_by_ssh(pair: list[Host], config: Path, hostfile: Path, uninterrupted: Path) -> None:
    """deepspeed's usual way: pdsh over ssh. TERM to the command reaches both hosts."""
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    try:
        allow_ssh(pair, config.parent / "ssh")
    except HostsError as error:
        pytest.skip(str(error))
    common = [DEEPSPEED, f"--hostfile={hostfile}", "--master_addr=node1", f"--master_port={free_port()}"]
    process = start_on(pair[0], [*common, *training(config)])
    wait_for_step(config, process)
    os.kill(pair[0].processes(DEEPSPEED)[0], signal.SIGTERM)
    output = finish(process)
    # the command does not wait for the ranks
    wait_until(lambda: not any(host.processes(PRETRAIN) for host in pair), "ranks are left")
    assert (process.returncode, ended_as(config)[0]) == (1, "requeue"), output
    assert_saved_where_it_stopped(config)
    again = start_on(pair[0], [*common, *training(config)])
    output = finish(again)
    assert again.returncode == 0, output
    assert_equal_runs(run_of(config), uninterrupted)
