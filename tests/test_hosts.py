"""The hosts of benchmarks/hosts.py: names, addresses, processes of their own, and what a loss does. Needs root; skipped without."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.hosts import Host, Hosts

SERVE = (
    "import socket; s = socket.create_server(('', 9000)); c, _ = s.accept(); c.sendall(socket.gethostname().encode()); c.recv(1)"
)
CALL = "import socket, sys; s = socket.create_connection((sys.argv[1], 9000), 5); print(s.recv(99).decode())"


def start(host: Host, program: str, *arguments: str) -> subprocess.Popen[str]:
    return host.start([sys.executable, "-c", program, *arguments], Path("/"), os.environ)


def test_each_host_has_a_name_and_an_address_and_reaches_every_other_one(three_hosts: Hosts) -> None:
    hosts = three_hosts.hosts
    assert [host.do("hostname").strip() for host in hosts] == ["node1", "node2", "node3"]
    assert len({host.address for host in hosts}) == 3
    for host in hosts:
        for other in hosts:
            server = start(other, SERVE)
            assert (
                host.do("bash", "-c", f"until '{sys.executable}' -c \"$0\" {other.name} 2>/dev/null; do :; done", CALL)
                == f"{other.name}\n"
            )
            server.communicate(timeout=20)


def test_a_lost_host_takes_its_processes_along_and_comes_back_empty(three_hosts: Hosts) -> None:
    one, two, three = three_hosts.hosts
    sleepers = [start(host, "import time; time.sleep(100)") for host in (one, two)]
    while not (one.processes(sys.executable) and two.processes(sys.executable)):
        time.sleep(0.01)
    two.lose()
    sleepers[1].wait(timeout=10)
    assert (one.up, two.up, three.up) == (True, False, True)
    assert sleepers[0].poll() is None, "other hosts do not notice"
    again = three_hosts.restart(2)
    assert (again.do("hostname").strip(), again.processes(), again.up) == ("node2", [], True)
    one.clear()
    assert sleepers[0].wait(timeout=10) != 0


SINK = "import socket; s = socket.create_server(('', 9000)); c, _ = s.accept(); print('up')\nwhile c.recv(2**20): pass"
POUR = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 9000), 5)
begin = time.perf_counter()
link.sendall(bytes(1_256_000))
link.shutdown(socket.SHUT_WR)
link.recv(1)
print(time.perf_counter() - begin)
"""


def test_a_limited_host_sends_no_faster_than_it_may(three_hosts: Hosts) -> None:
    one, two, _ = three_hosts.hosts
    three_hosts.limit("8mbit")
    try:
        start(two, SINK)
        time.sleep(0.5)
        seconds = float(one.do(sys.executable, "-c", POUR, two.name))
    finally:
        three_hosts.limit(None)
    assert seconds > 0.99, "of 1.256 MB a quarter may leave at once, the rest at 1 MB/s"
    assert "tbf" not in one.do("tc", "qdisc", "show", "dev", "eth0")
