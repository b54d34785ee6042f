"""The published runs behind the routed scaling laws (data/curves.csv.gz of google-deepmind/scaling_laws_for_routing, CC-BY 4.0).

One row a run and evaluation, the last one counts. Some rows lack a loss. N is dense_parameter_count, E num_experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megascale.laws.table import RunTable, read_csv

TOKENS_PER_STEP = 524_288
"""256 sequences of 2,048 tokens: follows from flops_per_step and the shapes of all six sizes"""
ROUTERS = ("S-Base", "RL-R", "Hash")
DENSE = "Dense"


def read_routed(path: Path, routers: Sequence[str] = ROUTERS, all_settings: bool = False) -> RunTable:
    """The last evaluation of each run.

    Args:
        all_settings: also runs with other routed blocks than every other one, several experts a token, more FLOPs, or other seeds. Left
            out are S-BASE runs of the 25M size with other routed blocks: their labels contradict each other.

    Returns:
        Columns N, E, F (forward TFLOPs a token), B (parameters per FLOP), loss, and the label `router`.
    """
    mapping = {
        "loss": "loss_validation", "N": "dense_parameter_count", "E": "num_experts", "router": "router_type",
        "step_flops": "flops_per_step", "P_all": "total_parameter_count",
    }  # fmt: skip
    where = {"router_type": (*routers, DENSE)}
    if not all_settings:
        where |= {"routing_frequency": ("0.5",), "k": ("1",), "seed": ("42",), "flop_increase": ("1.0",)}
    table = read_csv(path, mapping, where, run="hyper_id")
    doubtful = np.array([router == "S-Base" for router in table.labels["router"]])
    doubtful &= (table.columns["routing_frequency"] != 0.5) & np.array(
        [label == "25M" for label in table.labels["model_size_label"]]
    )
    table = table.rows(~doubtful)
    flops = table.columns["step_flops"] / TOKENS_PER_STEP
    columns = {symbol: table.columns[symbol] for symbol in ("N", "E", "loss")}
    columns |= {"F": flops / 1e12, "B": table.columns["P_all"] / flops}
    return RunTable(table.place, columns, {"router": table.labels["router"]}, table.notes)


def of_router(table: RunTable, router: str) -> RunTable:
    """The runs of one router, and the dense ones as E = 1."""
    return table.rows(np.array([label in (router, DENSE) for label in table.labels["router"]]))
