"""The arithmetic of ranks, stages and batches: pure functions of the settings."""

from __future__ import annotations

from megascale.config.schema import Batch, Config, Parallel

WORLD_AXES = ("pp", "dp", "stream", "cp", "tp")
V_SHAPED = ("zbv", "dualpipev")
"""Schedules with two stages a rank, of which the second lie in the opposite order."""
SPLIT_BACKWARD = ("zero_bubble", *V_SHAPED)
"""Schedules that compute the gradients of the weights later than those of the inputs."""


def data_parallel_ranks(parallel: Parallel, world: int | None) -> int | None:
    """Data-parallel ranks: as set, or world / the other axes (rounded down); none where neither is known."""
    if parallel.dp is not None or world is None:
        return parallel.dp
    return world // other_ranks(parallel)


def other_ranks(parallel: Parallel) -> int:
    """The product of all axes of the world but dp."""
    return parallel.pp * parallel.stream * parallel.cp * parallel.tp


def expert_ranks(parallel: Parallel, dp: int) -> int:
    """ep x edp: the ranks of a pipeline stage over which whole experts may be spread, or, with etp = tp, the same parts of them."""
    return dp * parallel.stream * parallel.cp * (1 if parallel.etp > 1 else parallel.tp)


def zero_stage_of(config: Config, world: int) -> int:
    """The ZeRO stage of a run on `world` ranks: as set, or 1 with several data-parallel ranks, else 0 (no DeepSpeed)."""
    parallel = config.parallel
    if parallel.zero_stage is not None:
        return parallel.zero_stage
    replicas = world // (parallel.pp * parallel.tp)
    return 1 if replicas > 1 else 0


def stages_per_rank(parallel: Parallel) -> int:
    """Pipeline stages of a rank: virtual_stages where the schedule takes several, always two where it goes forth and back as a V."""
    if parallel.pp == 1 or parallel.schedule == "1f1b":
        return 1
    return 2 if parallel.schedule in V_SHAPED else parallel.virtual_stages


def stage_count(parallel: Parallel) -> int:
    """Pipeline stages over all ranks."""
    return parallel.pp * stages_per_rank(parallel)


def rank_of_stage(stage: int, parallel: Parallel) -> int:
    """The pipeline rank that holds a stage: round and round, or forth and back, so that the first and the last stage are on rank 0."""
    if parallel.schedule in V_SHAPED and stage >= parallel.pp:
        return 2 * parallel.pp - 1 - stage
    return stage % parallel.pp


def stages_of_rank(rank: int, parallel: Parallel) -> list[int]:
    """The stages that a pipeline rank holds, first stage first."""
    return [stage for stage in range(stage_count(parallel)) if rank_of_stage(stage, parallel) == rank]


def batch_fits(batch: Batch, micro_batches: int, ranks: int) -> bool:
    """Whether the full batch and those of the ramp can be shared evenly by micro-batches and data-parallel ranks."""
    sizes = (batch.sequences, *(stage.sequences for stage in batch.ramp))
    return all(size % (micro_batches * ranks) == 0 for size in sizes)


def pipeline_bubble(parallel: Parallel, micro_batches: int) -> float:
    """The share of a pipelined step in which a rank waits, where a stage's backward pass takes twice its forward pass, half of it for the
    weights. p ranks, m micro-batches, v stages a rank; in units of a stage's forward pass for one micro-batch a rank works 3 m v.

    1F1B and interleaved: 3 (p-1) (arXiv 2104.04473, section 2.2). zero_bubble: p-1 (ZB-H1 in arXiv 2401.10241, section 2.2:
    (p-1) (F + B - W), B the backward pass for the inputs). zbv: p-1, which is the wait for the first micro-batch (section 6 there counts
    none, because the next step may begin in it; here the gradient norm is waited for). dualpipev: 2 (p-1) (DeepSeek's DualPipe,
    README: (s/2 - 1) (F&B + B - 3W), s = 2p stages, F&B = 3W where nothing overlaps, and B the whole backward pass there).

    These are of schedules with work for all ranks, which fewer micro-batches than ranks are not: the first of these takes p through the v
    stages of each rank, the others follow 1/v apart, in units of a rank's work for one; of p + (m-1)/v it works m.
    """
    waits = {"1f1b": 3, "interleaved": 3, "zero_bubble": 1, "zbv": 1, "dualpipev": 2}[parallel.schedule] * (parallel.pp - 1)
    stages = stages_per_rank(parallel)
    share = waits / (3 * micro_batches * stages + waits)
    few = 1 - micro_batches / (parallel.pp + (micro_batches - 1) / stages)
    return share if micro_batches >= parallel.pp else max(share, few)
