"""Several hosts on one machine: each has a network, address, hostname and process space of its own; the files are shared.

Needs root on Linux. A host is a process (its init) in new namespaces; killing it kills everything that runs there, as a power cut
would, only that the kernel still closes the connections. A switch, one more network namespace with a bridge, joins the hosts; the
machine's own network is not touched, and everything ends with this process. The hosts' clock and disk are the machine's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

TOOLS = ("ip", "nsenter", "setpriv", "unshare")
ADDRESS = "10.77.0.{}"
# As process 1 it has to reap orphans, which a plain sleep would leave as zombies.
INIT = "import signal, time; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); time.sleep(1e6)"


class HostsError(RuntimeError):
    """This machine cannot make hosts; the message says why."""


class Host:
    """One host, running."""

    def __init__(self, number: int, count: int, folder: Path):
        names = [f"{'127.0.1.1' if i == number else ADDRESS.format(i)} node{i}" for i in range(1, count + 1)]
        hosts_file = folder / f"hosts-{number}"
        hosts_file.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))  # as Debian's installer writes it
        self.name, self.address = f"node{number}", ADDRESS.format(number)
        setup = f'mount --bind "{hosts_file}" /etc/hosts && hostname {self.name} && exec "$0" -c "$1"'
        isolate = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._unshare, self.init = _start([*isolate, "bash", "-c", setup, sys.executable, INIT], forks=True)

    def start(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], quiet: bool = False
    ) -> subprocess.Popen[str]:
        """A command on this host, running; its output is piped, or dropped."""
        enter = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--net", "--pid", f"--wd={folder}", "--"]
        pipe = subprocess.DEVNULL if quiet else subprocess.PIPE
        return subprocess.Popen(
            [*enter, *command], env=dict(environment), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def do(self, *command: str) -> str:
        """A short command on this host; its output."""
        process = self.start(command, Path("/"), os.environ)
        out, errors = process.communicate(timeout=20)
        if process.returncode:
            raise HostsError(f"{self.name}: {' '.join(command)}: {errors.strip()}")
        return out

    def processes(self, *words: str) -> list[int]:
        """Process ids, as the machine counts them, of what runs here with all words among its arguments; init and zombies left out."""
        space, found = os.readlink(f"/proc/{self.init}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if not entry.name.isdigit() or int(entry.name) == self.init or os.readlink(entry / "ns" / "pid") != space:
                    continue
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and all(word in arguments for word in words):
                    found.append(int(entry.name))
        return found

    @property
    def up(self) -> bool:
        """Whether it was not lost."""
        return self._unshare.poll() is None

    def clear(self) -> None:
        """Kill all that runs here; the host stays."""
        while found := self.processes():
            for process in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)

    def lose(self) -> None:
        """Kill init, and with it everything that runs here."""
        with suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)
        self._unshare.wait()


class Hosts:
    """Some hosts, joined by a switch. Host i is called node<i>, from 1 on; to itself this name is a loopback address."""

    def __init__(self, count: int, folder: Path):
        """Starts them.

        Raises:
            HostsError: not root, a tool is missing, or the kernel refuses.
        """
        if os.geteuid() != 0:
            raise HostsError("hosts need root")
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise HostsError(f"not installed: {', '.join(missing)}")
        self.hosts: list[Host] = []
        self._count, self._folder = count, folder
        try:
            self._switch_process, self._switch = _start(["unshare", "--net", sys.executable, "-c", INIT], forks=False)
            self._in_switch("link", "add", "bridge", "type", "bridge")
            self._in_switch("link", "set", "bridge", "up")
            for number in range(1, count + 1):
                self.hosts.append(Host(number, self._count, self._folder))
                self._plug(number, self.hosts[-1])
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise HostsError(f"this machine makes no namespaces: {error}") from error

    def restart(self, number: int) -> Host:
        """A host that was lost, up again, with nothing running."""
        self.hosts[number - 1].lose()
        host = self.hosts[number - 1] = Host(number, self._count, self._folder)
        self._plug(number, host)
        for other in self.hosts:
            if other.up and other is not host:
                other.do("ip", "neigh", "flush", "dev", "eth0")  # the network card of this address is another one now
        return host

    def close(self) -> None:
        """End all hosts."""
        for host in self.hosts:
            host.lose()
        self._switch_process.kill()
        self._switch_process.wait()

    def limit(self, rate: str | None) -> None:
        """Let every host send no faster than `rate` (as tc writes it: 200mbit), through a token bucket; none: as fast as it can.

        Raises:
            HostsError: tc is missing or the kernel has no such queue.
        """
        if shutil.which("tc") is None:
            raise HostsError("not installed: tc")
        for host in self.hosts:
            if rate is not None:
                # the bucket holds some of the 64 KiB pieces in which the kernel hands packets down; nothing is dropped from the queue
                host.do("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "256kb", "limit", "10mb")
            elif "tbf" in host.do("tc", "qdisc", "show", "dev", "eth0"):
                host.do("tc", "qdisc", "del", "dev", "eth0", "root")

    def _plug(self, number: int, host: Host) -> None:
        """Give the host its cable."""
        self._in_switch("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", str(host.init))
        self._in_switch("link", "set", f"port{number}", "master", "bridge", "up")
        for words in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            host.do("ip", *words.split())

    def _in_switch(self, *words: str) -> None:
        command = ["nsenter", f"--target={self._switch}", "--net", "--", "ip", *words]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)


def _start(command: list[str], forks: bool) -> tuple[subprocess.Popen[str], int]:
    """A command that ends with this process, and the process id of its init, which is up."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if process.stdout.readline() != "up\n":
        _, errors = process.communicate(timeout=20)
        raise OSError(errors.strip() or f"{command[0]} failed")
    if not forks:
        return process, process.pid
    deadline = time.monotonic() + 10
    while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        assert time.monotonic() < deadline
    return process, int(children[0])


# Remote shells --------------------------------------------------------------------------------------------------------


def allow_ssh(hosts: Sequence[Host], folder: Path) -> None:
    """Let every host reach every other one by ssh without a password, with a key of its own for this purpose.

    Raises:
        HostsError: no ssh server is installed.
    """
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or shutil.which("ssh-keygen") is None:
        raise HostsError("no ssh server is installed")
    folder.mkdir()
    for name in ("server", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True, timeout=20)
    settings = folder / "sshd_config"
    rules = ["StrictModes no", "UsePAM no", "PidFile none", "PermitRootLogin yes"]
    rules.append("SetEnv OMP_NUM_THREADS=1")  # hosts share the cores
    keys = [f"HostKey {folder}/server", f"AuthorizedKeysFile {folder}/client.pub"]
    settings.write_text("\n".join([*keys, *rules, ""]))
    client = folder / "client.d"
    client.mkdir()
    (client / "hosts.conf").write_text(
        f"Host node*\n  IdentityFile {folder}/client\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which the package's start script makes
    for host in hosts:
        host.do("mount", "--bind", str(client), "/etc/ssh/ssh_config.d")
        host.do(server, "-f", str(settings))
