"""The arithmetic of ranks, stages and batches: pure functions of the settings."""

from __future__ import annotations

from megascale.config.schema import Batch, Config, Parallel

WORLD_AXES = ("pp", "dp", "stream", "cp", "tp")


def data_parallel_ranks(parallel: Parallel, world: int | None) -> int | None:
    """Data-parallel ranks: as set, or world / the other axes (rounded down); none where neither is known."""
    if parallel.dp is not None or world is None:
        return parallel.dp
    return world // other_ranks(parallel)


def other_ranks(parallel: Parallel) -> int:
    """The product of all axes of the world but dp."""
    return parallel.pp * parallel.stream * parallel.cp * parallel.tp


def zero_stage_of(config: Config, world: int) -> int:
    """The ZeRO stage of a run on `world` ranks: as set, or 1 with several data-parallel ranks, else 0 (no DeepSpeed)."""
    parallel = config.parallel
    if parallel.zero_stage is not None:
        return parallel.zero_stage
    replicas = world // (parallel.pp * parallel.tp)
    return 1 if replicas > 1 else 0


def stage_count(parallel: Parallel) -> int:
    """Pipeline stages over all ranks: pp, times virtual_stages where the schedule interleaves them."""
    interleaved = parallel.pp > 1 and parallel.schedule == "interleaved"
    return parallel.pp * (parallel.virtual_stages if interleaved else 1)


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage: contiguous, in order, at most one layer more on some stages than on others.

    The remainder goes to the stages just before the last: the last has the head, and under 1F1B the first ones keep the
    activations of the most micro-batches.
    """
    assert 1 <= stages <= layers, f"{layers} layers cannot fill {stages} stages"
    least, more = divmod(layers, stages)
    sizes = [least + (stages - 1 - more <= stage < stages - 1) for stage in range(stages)]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def batch_fits(batch: Batch, micro_batches: int, ranks: int) -> bool:
    """Whether the full batch and those of the ramp can be shared evenly by micro-batches and data-parallel ranks."""
    sizes = (batch.sequences, *(stage.sequences for stage in batch.ramp))
    return all(size % (micro_batches * ranks) == 0 for size in sizes)


def pipeline_bubble(pp: int, micro_batches: int, virtual_stages: int) -> float:
    """The share of a pipelined step in which a rank waits (arXiv 2104.04473, section 2.2): (p-1) / (m v + p-1)."""
    return (pp - 1) / (micro_batches * virtual_stages + pp - 1)
