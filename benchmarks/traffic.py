"""What a rank sends in a step, counted three ways: by the dry run, by the ledger of a real step, and by the network interface of a host.

`python -m benchmarks.traffic CONFIG OUTPUT STEPS` is one of two ranks, each on a host of its own, and goes through all layouts.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.hosts import Hosts
from benchmarks.layout_runs import ALL_AXES, CROSSING, PORT, Layout, LayoutRuns, overrides, start
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.parallel.agreement import Claim
from megascale.parallel.ledger import Entry, Ledger
from megascale.parallel.mesh import open_mesh
from megascale.parallel.world import World, end_world, start_world
from megascale.train.batch_stream import StepBatch, step_batches
from megascale.train.build import Parts, build, open_run_data
from megascale.train.dry_run import dry_run

INTERFACE = "eth0"
BEFORE = 2
"""Steps before the interface is read: in the first one the stages of a pipeline also get to know each other, the second is the ledger's."""


def predicted(runs: LayoutRuns, model: str, layout: Layout) -> dict[str, float]:
    """Bytes that rank 0 sends in a step, by axis, as the dry run has them."""
    found = dry_run(runs.config, overrides(model, layout), layout.ranks)
    return by_axis(found.ranks[0].sent)


def by_axis(entries: list[Entry]) -> dict[str, float]:
    """Bytes sent."""
    return {axis: float(sum(entry.sent for entry in entries if entry.axis == axis)) for axis in sorted({e.axis for e in entries})}


def counted(runs: LayoutRuns, hosts: Hosts, steps: int) -> dict[str, dict]:
    """For each layout what rank 0 sends in a step: `ledger` by axis, and `interface`, with all headers and acknowledgements."""
    output, log = runs.folder / "traffic.json", runs.folder / "traffic.log"
    program = ["-m", "benchmarks.traffic", str(runs.config), str(output), str(steps)]
    meeting = {"MASTER_ADDR": hosts.hosts[0].name, "MASTER_PORT": str(PORT), "WORLD_SIZE": str(len(hosts.hosts))}
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ranks = [start(program, log, host, RANK=str(i), **meeting, **local) for i, host in enumerate(hosts.hosts)]
    if any(rank.wait(timeout=600) for rank in ranks):
        raise RuntimeError(f"counting failed\n{log.read_text()[-5000:]}")
    return json.loads(output.read_text())


def traffic_row(layout: Layout, dry: dict[str, float], found: dict) -> dict[str, object]:
    """Megabytes that rank 0 sends in a step."""
    ledger, interface = sum(found["ledger"].values()), found["interface"]
    largest = max(found["ledger"], key=found["ledger"].__getitem__)
    return {
        "layout": layout.name,
        "axis": largest,
        "axis_mb": found["ledger"][largest] / 1e6,
        "dry_run_mb": sum(dry.values()) / 1e6,
        "ledger_mb": ledger / 1e6,
        "interface_mb": interface / 1e6,
        "ledger_over_dry_run": ledger / sum(dry.values()),
        "interface_over_ledger": interface / ledger,
    }


# One rank ---------------------------------------------------------------------------------------------------------------


def sent_so_far() -> int:
    """Bytes that this host's interface has sent."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith(f"{INTERFACE}:"))


def _step(parts: Parts, batch: StepBatch) -> None:
    count = len(batch.micro_batches)
    scale = torch.tensor(1 / sum(micro_batch.loss_tokens for micro_batch in batch.micro_batches))
    parts.stages.gradients(batch.micro_batches, [1 / count] * count, scale, parts.engine, lambda *_: None, batch.step)
    parts.engine.gradient_norm()
    parts.engine.step(1.0)


def count_layout(world: World, config_file: Path, layout: Layout, steps: int) -> dict[str, object]:
    """What this rank sends in a step of a layout."""
    loaded = load_config(config_file, overrides(ALL_AXES, layout))
    config, data = open_run_data(resolve(loaded.config))
    parts = build(config, data, open_mesh(config.parallel, config.model, world), lambda _: None)
    readers, entries, before = parts.mesh.along("dp"), [], 0
    for batch in step_batches(data.train, config.batch, 1, BEFORE + steps, readers.index(world.rank), len(readers)):
        if batch.step == BEFORE:
            with Ledger(parts.mesh) as ledger:
                _step(parts, batch)
            entries = ledger.entries()
            world.barrier()  # what was sent has arrived
            before = sent_so_far()
        else:
            _step(parts, batch)
    world.barrier()
    return {"ledger": by_axis(entries), "interface": (sent_so_far() - before) / steps}


def main(arguments: list[str]) -> None:
    """One of the ranks; rank 0 writes what it found."""
    config_file, output, steps = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    world = start_world(120, Claim())
    found = {}
    for layout in CROSSING:
        begin = time.perf_counter()
        found[layout.name] = count_layout(world, config_file, layout, steps)
        gc.collect()  # engines are cycles
        print(f"{layout.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    if world.rank == 0:
        output.write_text(json.dumps(found))
    end_world(world)


if __name__ == "__main__":
    main(sys.argv[1:])
