"""What P streams cost at inference beside more parameters for the same loss: ParScale's comparison (arXiv 2505.10475, figure 4).

The paper's figures are estimates of a program (cli99/llm-analysis), not measurements: 22 times less additional memory and 6 times less
additional time for P = 8 streams of 1.6B parameters at batch 1. Here they are computed by `megascale.plan.inference`, once by the
conventions of that program and once by what a serving program must do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import megascale
from megascale.config.load import load_config
from megascale.config.resolve import resolve
from megascale.config.schema import Model
from megascale.laws.form import Array
from megascale.laws.table import read_csv
from megascale.plan.cluster import Cluster, load_cluster
from megascale.plan.inference import SERVER, Conventions, Request, memory, request_seconds

LENGTHS = (64, 128, 256, 512)
"""prompts, and as many new tokens; the mean over them is given"""
BATCHES = (1, 2, 4, 8)
PUBLISHED = Conventions(cache_passes=2, full_cache=True, all_logits=True, prefix_tokens=True, chunk=None)
"""cost_analysis.py of QwenLM/ParScale, by llm-analysis: the cache is loaded and stored at its final length for each token, and the logits
of the whole prompt are held; the 48 prefix slots are tokens of every stream"""
PUBLISHED_RATIOS = {1: (22.5, 6.42), 2: (12.8, 3.24), 4: (6.92, 1.67), 8: (3.62, 0.88)}
"""batch -> memory and time ratio that its program gives, run again"""
_ROOT = Path(megascale.__file__).resolve().parent
_MODELS, _LOSSES = _ROOT.parent / "configs" / "models", _ROOT / "laws" / "data" / "parscale_losses.csv"
_SMALL, _LARGE = "1.6b", ("2.8b", "4.4b")
_SMALL_PLACE = 3
"""of the small model among the six sizes; the larger two are the last ones"""


@dataclass(frozen=True)
class Ratio:
    """Additional cost of more parameters over that of more streams, at equal loss."""

    batch: int
    memory: float
    seconds: float
    stream_bytes: float
    """what the streams add"""
    stream_seconds: float

    @property
    def streams_lose_time(self) -> bool:
        """Whether more parameters are the faster way."""
        return self.seconds < 1


def ratios(conventions: Conventions = SERVER, streams: int = 8, batches: tuple[int, ...] = BATCHES) -> list[Ratio]:
    """The comparison by batch: 1.6B with P streams against a model between 2.8B and 4.4B of the same loss, measured on Stack-V2-Python.

    The larger model's costs lie between those two linearly in the loss, as in the paper's program. A100 80GB at 0.7 of its FLOP/s and 0.9
    of its memory bandwidth.
    """
    device = _device()
    plain, wide = _model(_SMALL, 1), _model(_SMALL, streams)
    ends = [_model(name, 1) for name in _LARGE]
    share = _share(streams)
    found = []
    for batch in batches:
        costs = [_cost(model, device, batch, conventions) for model in (plain, wide, *ends)]
        base, parallel = costs[0], costs[1]
        larger = costs[2] + share * (costs[3] - costs[2])
        more = (larger - base) / (parallel - base)
        found.append(Ratio(batch, float(more[0]), float(more[1]), *(float(x) for x in parallel - base)))
    return found


def turning_batch(found: list[Ratio]) -> int | None:
    """The smallest batch at which streams cost more time than parameters; none = not among those computed."""
    return next((ratio.batch for ratio in found if ratio.streams_lose_time), None)


def _cost(model: Model, device: Cluster, batch: int, conventions: Conventions) -> Array:
    requests = [Request(length, length, batch) for length in LENGTHS]
    bytes_held = np.mean([memory(model, request, conventions).total for request in requests])
    return np.array([bytes_held, np.mean([request_seconds(model, device, request, conventions) for request in requests])])


def _device() -> Cluster:
    cluster = load_cluster("a100")
    return cluster.model_copy(update={"efficiency": cluster.efficiency.model_copy(update={"matmul": 0.7, "memory": 0.9})})


def _model(name: str, streams: int) -> Model:
    return resolve(load_config(_MODELS / f"parscale_{name}.yaml", [f"model.streams.count={streams}"]).config).model


def _share(streams: int) -> float:
    """Where between the two larger models the loss of the one with streams lies."""
    table = read_csv(_LOSSES, where={"corpus": ("stack-v2-python",)})
    by_size = np.argsort(table.columns["N"], kind="stable")
    losses, counts = table.loss[by_size], table.columns["P"][by_size]
    below, above = losses[counts == 1][-2:]
    target = losses[counts == streams][_SMALL_PLACE]
    return float((below - target) / (below - above))
