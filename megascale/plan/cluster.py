"""A cluster: what one device, one node and the network between nodes can do, read from a YAML file.

Bandwidths are those of one device and one direction: what a device sends while it receives as much. NVIDIA's NVLink figures count both.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field, ValidationError

import megascale
from megascale.config.errors import InputError
from megascale.config.fields import dotted
from megascale.config.read_yaml import Document, parse_yaml
from megascale.config.schema import Node, field

CLUSTERS = Path(megascale.__file__).resolve().parent.parent / "configs" / "clusters"


class Efficiency(Node):
    """How much of the nominal figures programs reach: few constants, each with a physical meaning (docs/planner.md says where from)."""

    matmul: float = field(0.8, "share of the peak that a very large matrix product reaches", gt=0, le=1)
    matmul_half: float = field(140.0, "smallest dimension of a matrix product that reaches half of that", ge=0)
    attention: float = field(0.6, "share of the peak that fused attention reaches", gt=0, le=1)
    grouped: float = field(0.75, "speed of experts' grouped products over that of one product of the same rows", gt=0, le=1)
    memory: float = field(0.85, "share of the memory bandwidth that passes over tensors reach", gt=0, le=1)
    intra_node: float = field(0.77, "share of the bandwidth in a node that collectives reach", gt=0, le=1)
    inter_node: float = field(0.74, "share of the bandwidth between nodes that collectives reach", gt=0, le=1)
    overlap: float = field(0.62, "share of what may travel beside computation that does", ge=0, le=1)
    straggle: float = field(0.05, "share of a step that data-parallel replicas on several nodes wait for the slowest", ge=0, lt=1)
    fragmentation: float = field(
        0.05, "memory that the allocator cannot use, as a share of what is held for activations", ge=0, lt=1
    )


class Cluster(Node):
    """Nodes of equal devices and the network between them."""

    name: str = Field(description="name of the device, for people")
    peak_flops: float = Field(description="dense bf16 tensor-core peak of a device, FLOP/s", gt=1e9, lt=1e18)
    memory_bytes: float = Field(description="memory of a device, bytes", gt=1e8, lt=1e14)
    memory_bandwidth: float = Field(description="of a device's memory, bytes/s", gt=1e9, lt=1e15)
    processors: int = field(108, "streaming multiprocessors of a device: tiles of a matrix product computed at a time", gt=0)
    devices_per_node: int = field(8, "devices that the fast links join", gt=0)
    intra_node_bandwidth: float = Field(description="NVLink, of a device and one direction, bytes/s", gt=1e6, lt=1e14)
    inter_node_bandwidth: float = Field(
        description="network between nodes, of a device and one direction, bytes/s", gt=1e6, lt=1e14
    )
    intra_node_latency: float = field(5e-6, "of one message in a node, seconds", ge=0, lt=1)
    inter_node_latency: float = field(15e-6, "of one message between nodes, seconds", ge=0, lt=1)
    kernel_seconds: float = field(3e-6, "what a kernel costs beside its work, seconds", ge=0, lt=1)
    reserved_bytes: float = field(2.5e9, "held by the driver, the communication library and the framework, bytes", ge=0)
    price_per_hour: float | None = field(None, "of one device, dollars; none = prices are not given", gt=0)
    hours_between_failures: float = field(40000.0, "mean time between failures of one node, hours", gt=0)
    checkpoint_bandwidth: float = field(1e9, "at which a node writes a checkpoint, bytes/s", gt=0)
    checkpoint_seconds: float = field(
        2.0, "that a checkpoint holds training up beside its bytes: ranks wait for each other", ge=0
    )
    host_bandwidth: float = field(2e10, "from a device's memory to its host's, of one device, bytes/s", gt=0)
    restart_seconds: float = field(600.0, "from a failure until training goes on, seconds", ge=0)
    efficiency: Efficiency = Efficiency()

    @property
    def usable_bytes(self) -> float:
        """Memory of a device that tensors may take."""
        return self.memory_bytes - self.reserved_bytes


def load_cluster(name: str) -> Cluster:
    """A cluster by its name in configs/clusters, or by the path of a YAML file.

    Raises:
        InputError: no such cluster; a file that is no YAML, or has unknown, missing or impossible values.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CLUSTERS / f"{name.lower()}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(file.stem for file in CLUSTERS.glob("*.yaml"))) or "none: the repository's configs/ is not there"
        raise InputError(
            f"cluster {name}", "is neither a known cluster nor a readable YAML file", f"known: {known}; or name a file.yaml"
        ) from error
    document = parse_yaml(text, str(path))
    if not isinstance(document.value, dict):
        raise InputError(str(path), "holds no settings of a cluster", f"start from a copy of {CLUSTERS / 'h100.yaml'}")
    try:
        cluster = Cluster.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        raise _wrong(error, document, str(path)) from error
    if cluster.usable_bytes <= 0:
        reason = f"reserved_bytes {cluster.reserved_bytes:g} leave nothing of memory_bytes {cluster.memory_bytes:g}"
        raise InputError(str(path), reason, "both are bytes of one device")
    return cluster


def _wrong(error: ValidationError, document: Document, place: str) -> InputError:
    """Every wrong value with its line."""
    details = error.errors(include_url=False, include_context=False)
    reasons = []
    for detail in details:
        line = document.lines.get(detail["loc"])
        where = f" (line {line})" if line else ""
        given = "" if detail["type"] in ("missing", "extra_forbidden") else f", given {detail['input']!r}"
        said = {"missing": "is missing", "extra_forbidden": "is unknown"}.get(detail["type"], detail["msg"].lower())
        reasons.append(f"{dotted(detail['loc'])}{where} {said}{given}")
    return InputError(place, "; ".join(reasons), "units are FLOP/s, bytes, bytes/s and seconds, all of one device or node")
