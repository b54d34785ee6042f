"""The job script on a real SLURM of three nodes, each a host of its own (needs root, slurm-wlm and munge; skipped without)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.hosts import HostsError
from cluster import Cluster
from megascale.checkpoint.load import CheckpointReader
from megascale.cli import main
from megascale.observe.metrics import reproducible
from megascale.observe.sinks import read_metrics
from ranks import RankPool
from runs import environment, tiny_config, train_phases_on_rank, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 150
RUN = (f"schedule.steps={STEPS}", "checkpoint.every=25", "observe.console_every=50", "guard.timeout_seconds=60")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        cluster = Cluster(3, tmp_path_factory.mktemp("cluster"))
    except HostsError as error:
        pytest.skip(str(error))
    yield cluster
    cluster.close()


@dataclass(frozen=True)
class Ended:
    """What a run came to: its last checkpoint's tensors, weights and moments, the digests of its files, and its metrics."""

    tensors: dict[str, torch.Tensor]
    digests: dict[str, str]
    metrics: list[dict]


@pytest.fixture(scope="module")
def uninterrupted(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Ended:
    """The run on two ranks that nobody disturbs."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), tiny_corpus, *RUN)
    records = ranks.run(train_phases_on_rank, config.model_dump(), world_size=2, timeout=200)[0]
    return Ended(*last_checkpoint(Path(config.run.folder) / config.run.name), [reproducible(record) for record in records])


class Job:
    """A job of the script `megascale slurm` writes, for one rank on each of some nodes."""

    def __init__(self, cluster: Cluster, folder: Path, corpus: Path, *options: str, overrides: tuple[str, ...] = RUN):
        self.cluster, self.config, self.run = cluster, write_config(folder, corpus), folder / "runs" / "tiny"
        self.output, script = folder / "output.txt", folder / "job.sbatch"
        words = ["--config", str(self.config), "--output", str(script), f"--sbatch=--output={self.output}", *options, *overrides]
        assert main(["slurm", *words]) == 0
        self.number = cluster.do("sbatch", "--parsable", str(script), variables=environment()).strip()

    def said(self) -> str:
        """The job's output, both starts of a requeued one."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, text: str, seconds: float = 150) -> None:
        """Until the script has said something."""
        self._wait(lambda: text in self.said(), f"not said: {text}", seconds)

    def wait_for_steps(self) -> None:
        """Until some steps are done, and many are not."""
        metrics = self.run / "metrics.jsonl"
        self._wait(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 5, "no steps", 150)

    def wait_for_checkpoint(self) -> None:
        """Until the first one is there."""
        self._wait((self.run / "checkpoints" / "step-00000025").is_dir, "no checkpoint", 150)

    def wait_until(self, *states: str, seconds: float = 150) -> dict[str, str]:
        """Until the job is in one of these states; what SLURM says of it."""
        self._wait(lambda: self.cluster.job(self.number)["JobState"] in states, f"not {states}", seconds)
        return self.cluster.job(self.number)

    def _wait(self, condition, what: str, seconds: float) -> None:
        try:
            self.cluster.wait(condition, what, seconds)
        except HostsError as error:
            pytest.fail(f"{error}\n{self.said()}")

    def start_now(self) -> None:
        """A job that was requeued waits for two minutes, so that its nodes can settle; this one for seconds."""
        self.wait_until("PENDING")
        self.cluster.do("scontrol", "update", f"jobid={self.number}", "StartTime=now+3seconds")

    def ended_as(self) -> str:
        return json.loads((self.run / "exit.json").read_text())["reason"]


@pytest.fixture
def free_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster on which nothing runs or waits."""
    yield cluster
    cluster.do("scancel", "--user=root")
    for node in cluster.nodes:
        cluster.wait(lambda node=node: not node.processes("launch/pretrain.py"), "ranks are left", 60)


def last_checkpoint(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Its tensors, and the digests of the files that hold them."""
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    reader = CheckpointReader(folder)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
    return {name: reader.read(name) for name in reader.names()}, digests


def assert_ended_as(run: Path, expected: Ended) -> None:
    tensors, digests = last_checkpoint(run)
    assert [name for name, tensor in expected.tensors.items() if not torch.equal(tensor, tensors[name])] == []
    assert digests == expected.digests
    assert [reproducible(record) for record in read_metrics(run / "metrics.jsonl")] == expected.metrics


def test_a_job_warned_of_its_time_limit_saves_is_requeued_and_ends_with_the_same_bits(
    free_cluster: Cluster, tmp_path: Path, tiny_corpus: Path, uninterrupted: Ended
) -> None:
    job = Job(free_cluster, tmp_path, tiny_corpus, "--nodes=2")
    job.wait_for_steps()
    free_cluster.do("scancel", "--batch", "--signal=USR1", job.number)  # as SLURM does before the limit
    job.wait_for("requeued")
    assert job.ended_as() == "requeue"
    job.start_now()
    facts = job.wait_until("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["Restarts"], facts["NumNodes"]) == ("COMPLETED", "1", "2"), job.said()
    assert "resuming from step-" in job.said()
    assert_ended_as(job.run, uninterrupted)


@pytest.mark.full
def test_a_job_that_loses_a_node_goes_on_with_the_spare_one(
    free_cluster: Cluster, tmp_path: Path, tiny_corpus: Path, uninterrupted: Ended
) -> None:
    job = Job(free_cluster, tmp_path, tiny_corpus, "--nodes=2")
    job.wait_for_checkpoint()
    assert job.cluster.job(job.number)["NodeList"] == "node[1-2]"
    free_cluster.lose(2)
    try:
        job.wait_for("requeued")
        assert "ended: error" in job.said()
        # SLURM gives the lost node up only when it has been silent for `SlurmdTimeout`; then the job may start at once
        facts = job.wait_until("COMPLETED", "FAILED", seconds=330)
    finally:
        free_cluster.restore(2)
    assert (facts["JobState"], facts["NodeList"]) == ("COMPLETED", "node[1,3]"), job.said()
    assert_ended_as(job.run, uninterrupted)


@pytest.mark.full
def test_a_cancelled_job_saves_its_step_and_stays_away(free_cluster: Cluster, tmp_path: Path, tiny_corpus: Path) -> None:
    job = Job(free_cluster, tmp_path, tiny_corpus, "--nodes=1", "--ranks-per-node=2")
    job.wait_for_steps()
    free_cluster.do("scancel", job.number)
    job.wait_for("ended: ")
    assert job.ended_as() == "requeue", job.said()
    last = max(record["step"] for record in read_metrics(job.run / "metrics.jsonl"))
    assert last < STEPS
    assert (job.run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert job.wait_until("CANCELLED")["Restarts"] == "0"


@pytest.mark.full
def test_a_job_with_a_config_that_went_wrong_is_not_requeued(free_cluster: Cluster, tmp_path: Path, tiny_corpus: Path) -> None:
    job = Job(free_cluster, tmp_path, tiny_corpus, "--nodes=2", "--sbatch=--hold")
    job.config.write_text(job.config.read_text().replace("heads: 4", "heads: 5"))
    free_cluster.do("scontrol", "release", job.number)
    facts = job.wait_until("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.said()
    assert "ended: bad_input" in job.said()


@pytest.mark.full
def test_an_array_goes_on_element_by_element_and_the_rest_ends_at_once(
    free_cluster: Cluster, tmp_path: Path, tiny_corpus: Path, uninterrupted: Ended
) -> None:
    job = Job(free_cluster, tmp_path, tiny_corpus, "--nodes=2", "--array=3")
    job.wait_for_steps()
    (job.run / "REQUEUE").touch()  # scancel of SLURM 22.05 signals an element of an array, and reports a failure nevertheless
    job.wait_for("nothing to do: the run is done", 300)
    assert f"job {job.number}_1, start 1: the array's next element goes on" in job.said()
    assert f"job {job.number}_2, start 1: ended: done" in job.said()
    assert_ended_as(job.run, uninterrupted)
