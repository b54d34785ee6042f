"""A SLURM cluster on one machine: the controller and the nodes are hosts of their own (benchmarks/hosts.py). Needs root,
slurm-wlm and munge.

The daemons are the real ones. Nodes have no GPUs and more CPUs than the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks.hosts import Host, Hosts, HostsError

DAEMONS = ("munged", "slurmctld", "slurmd")
SETTINGS = """
ClusterName=tests
SlurmctldHost={controller}({address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=120
KillWait=30
MinJobAge=300
SlurmdParameters=config_overrides
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"


class Cluster:
    """A running cluster: node1 to node<n> compute, the last host controls and is where one logs in."""

    def __init__(self, nodes: int, folder: Path):
        """Starts it.

        Raises:
            HostsError: no hosts on this machine, a daemon is not installed or does not come up.
        """
        path = f"{os.environ['PATH']}:/usr/sbin"
        missing = [daemon for daemon in DAEMONS if shutil.which(daemon, path=path) is None]
        if missing:
            raise HostsError(f"not installed: {', '.join(missing)} (Debian and Ubuntu: apt install slurm-wlm munge)")
        self.folder = folder
        self.hosts = Hosts(nodes + 1, folder)
        self.nodes, self.login = self.hosts.hosts[:nodes], self.hosts.hosts[nodes]
        self._daemons: list[subprocess.Popen] = []
        try:
            self._start()
        except (OSError, subprocess.SubprocessError, HostsError) as error:
            self.close()
            raise HostsError(f"SLURM does not start: {error}") from error

    def _start(self) -> None:
        folder = self.folder
        for name in ("munge", "state", *(f"spool-{node.name}" for node in self.nodes)):
            (folder / name).mkdir()
        names = [NODE.format(name=node.name, address=node.address) for node in self.nodes]
        (folder / "slurm.conf").write_text(
            SETTINGS.format(controller=self.login.name, address=self.login.address, folder=folder, nodes="\n".join(names))
        )
        self._start_munge(folder / "munge")
        self._daemon(self.login, "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait(
            lambda: self.do("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.nodes), "nodes are not idle", 30
        )

    def _start_munge(self, folder: Path) -> None:
        """One authentication daemon for all: they share the disk, and with it the socket."""
        folder.chmod(0o755)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        command = ["/usr/sbin/munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
        quiet = subprocess.DEVNULL
        self._daemons.append(subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=quiet, stderr=quiet))
        self.wait((folder / "socket").exists, "munged does not answer", 10)

    def start_node(self, node: Host) -> None:
        """Start the node's daemon."""
        self._daemon(node, "slurmd", "-D", "-N", node.name)

    def _daemon(self, host: Host, *command: str) -> None:
        """A daemon, whose output nobody reads; it ends with its host."""
        self._daemons.append(host.start([f"/usr/sbin/{command[0]}", *command[1:]], Path("/"), self.environment(), quiet=True))

    def environment(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment for SLURM's commands."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(variables or {})}

    def do(self, *command: str, folder: Path = Path("/"), variables: Mapping[str, str] | None = None) -> str:
        """A command on the login host: sbatch, squeue, scontrol; its output.

        Raises:
            HostsError: it failed.
        """
        process = self.login.start(command, folder, self.environment(variables))
        out, errors = process.communicate(timeout=30)
        if process.returncode:
            raise HostsError(f"{' '.join(command)}: {errors.strip()}")
        return out

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job; of an array, of its last element shown."""
        words = self.do("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def lose(self, number: int) -> None:
        """A power cut on one node."""
        self.nodes[number - 1].lose()

    def restore(self, number: int) -> None:
        """A node that was lost comes back."""
        self.nodes[number - 1] = self.hosts.restart(number)
        self.start_node(self.nodes[number - 1])

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        """Polls a condition; SLURM's commands may fail meanwhile.

        Raises:
            HostsError: it was not fulfilled in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            with suppress(HostsError):
                if condition():
                    return
            if time.monotonic() > deadline:
                raise HostsError(f"{what} after {seconds} s")
            time.sleep(0.2)

    def close(self) -> None:
        """End everything."""
        self.hosts.close()
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
