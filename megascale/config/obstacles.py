"""Why a number of ranks along one axis cannot work with the other settings, one reason a text; no reason = it works."""

from __future__ import annotations

from megascale.config.layout import V_SHAPED, stages_per_rank
from megascale.config.resolve import feed_forward_width
from megascale.config.schema import Config, Parallel
from megascale.config.size import expert_row_unit, routed_layers

LEAST = {"1f1b": 1, "dualpipev": 2}
"""Micro-batches per pipeline rank that a schedule needs."""


def tensor_obstacles(config: Config, tp: int) -> list[str]:
    """Reasons against tp tensor-parallel ranks: heads, widths and tokens must be shared evenly."""
    if tp == 1:
        return []
    model, experts = config.model, config.model.experts
    kv_heads, ffn_width = model.kv_heads or model.heads, feed_forward_width(model)
    shared = {"model.heads": model.heads, "data.sequence_length": config.data.sequence_length}
    routed = len(routed_layers(model))
    if routed < model.layers:
        shared["model.ffn_width"] = ffn_width
    if routed and experts.shared:
        shared["model.experts.shared x width"] = experts.shared * (experts.width or ffn_width)
    uneven = [f"{name} {size}" for name, size in shared.items() if size % tp]
    reasons = [f"does not divide {', '.join(uneven)}"] if uneven else []
    if kv_heads != model.heads and kv_heads % tp and tp % kv_heads:
        reasons.append(f"neither divides model.kv_heads {kv_heads} nor is a multiple of it")
    if model.altup.form == "sequence":
        reasons.append("would cut the sequence, whose kept tokens are not shared evenly (model.altup.form)")
    if config.optimizer.name == "muon":
        reasons.append("would cut the matrices, which Muon needs whole (optimizer.name)")
    return reasons


def stream_obstacles(config: Config, ranks: int) -> list[str]:
    """Reasons against so many stream-parallel ranks: streams, and behind the aggregator tokens, must be shared evenly."""
    if ranks == 1:
        return []
    parallel, counts = (
        config.parallel,
        {config.model.streams.count} | {phase.streams for phase in config.schedule.phases if phase.streams},
    )
    uneven = sorted(count for count in counts if count % ranks)
    where = "of a phase (schedule.phases.streams)" if config.schedule.phases else "(model.streams.count)"
    reasons = [f"does not divide the {uneven[0]} streams {where}"] if uneven else []
    if config.data.sequence_length % (ranks * parallel.cp * parallel.tp):
        reasons.append(f"x cp {parallel.cp} x tp {parallel.tp} does not divide {_length(config)}")
    return reasons


def context_obstacles(config: Config, ranks: int) -> list[str]:
    """Reasons against so many context-parallel ranks: tokens, and with ulysses heads, must be shared evenly."""
    if ranks == 1:
        return []
    model, parallel = config.model, config.parallel
    chunks = ranks if parallel.context == "ulysses" else 2 * ranks
    reasons = []
    if config.data.sequence_length % (chunks * parallel.tp * parallel.stream):
        times = "" if chunks == ranks else "x 2 chunks "
        reasons.append(f"{times}x tp {parallel.tp} x stream {parallel.stream} does not divide {_length(config)}")
    if model.altup.form == "sequence":
        reasons.append("would cut the sequence, whose kept tokens are not shared evenly (model.altup.form)")
    if parallel.context == "ulysses":
        heads = max((model.kv_heads or model.heads) // parallel.tp, 1)
        if heads % ranks:
            reasons.append(f"does not divide the {heads} key/value heads of a rank, which ulysses shares (parallel.context)")
        return reasons
    if model.sliding_window:
        reasons.append("gathers keys without a window (model.sliding_window), which parallel.context=ulysses has")
    if model.experts.count > 1 and model.experts.capacity_factor is not None and model.experts.scope == "global":
        reasons.append("leaves tokens out of the order by which capacity is given, which parallel.context=ulysses keeps")
    return reasons


def _length(config: Config) -> str:
    return f"data.sequence_length {config.data.sequence_length}"


def pipeline_obstacles(config: Config, pp: int) -> list[str]:
    """Reasons against pp pipeline ranks: every stage needs a layer, and the schedule enough micro-batches."""
    if pp == 1:
        return []
    parallel, micro_batches, layers = config.parallel, config.batch.micro_batches, config.model.layers
    each = stages_per_rank(parallel.model_copy(update={"pp": pp}))
    reasons = []
    if pp * each > layers:
        name = "2 stages a rank" if parallel.schedule in V_SHAPED else f"virtual_stages {each}"
        times = f"x {name} = {pp * each} stages " if each > 1 else ""
        reasons.append(f"{times}is more than the {layers} layers (model.layers)")
    if not schedule_fits(parallel, pp, micro_batches):
        reasons.append(_unfit(parallel, pp, micro_batches))
    if parallel.zero_stage == 3:
        reasons.append("is not possible with parallel.zero_stage 3")
    return reasons


def schedule_fits(parallel: Parallel, pp: int, micro_batches: int) -> bool:
    """Whether torch's pipeline schedules take this many micro-batches.

    Schedule1F1B wants one a stage at least, ScheduleDualPipeV too, which has two a rank. ScheduleInterleaved1F1B and
    ScheduleInterleavedZeroBubble cut them into max(1, micro-batches // pp) rounds of equal size. ScheduleZBVZeroBubble takes any number.
    """
    if parallel.schedule in LEAST:
        return micro_batches >= LEAST[parallel.schedule] * pp
    return parallel.schedule == "zbv" or micro_batches % max(1, micro_batches // pp) == 0


def _unfit(parallel: Parallel, pp: int, micro_batches: int) -> str:
    if parallel.schedule in LEAST:
        return f"needs batch.micro_batches of at least {LEAST[parallel.schedule] * pp}, given {micro_batches}"
    rounds = micro_batches // pp
    return f"interleaves in {rounds} rounds (micro_batches // pp), which do not divide batch.micro_batches {micro_batches}"


def width_obstacles(config: Config, tp: int) -> list[str]:
    """Reasons against an etp of as many ranks as tp: an expert's width must be shared evenly."""
    experts = config.model.experts
    if tp == 1:
        return []
    if experts.count == 1:
        return ["has no experts to split (model.experts.count is 1)"]
    width, name = (experts.width, "experts.width") if experts.width else (feed_forward_width(config.model), "ffn_width")
    unit = expert_row_unit(config)
    if width % (tp * unit) == 0:
        return []
    return [f"does not cut model.{name} {width} into multiples of {unit}, 16 bytes of {config.precision}"]


def expert_obstacles(config: Config, ep: int, ranks: int | None) -> list[str]:
    """Reasons against ep expert-parallel ranks: experts, and the ranks of a stage, must be shared evenly.

    Args:
        config: the tree.
        ep: expert-parallel ranks.
        ranks: those that ep may take (`layout.expert_ranks`); none = not known.
    """
    if ep == 1:
        return []
    reasons = []
    count = config.model.experts.count
    if count == 1:
        reasons.append("has no experts to spread (model.experts.count is 1)")
    elif count % ep:
        reasons.append(f"does not divide model.experts.count {count}")
    if ranks is not None and ranks % ep:
        which = "ranks of a pipeline stage (dp x stream x cp x tp)"
        if config.parallel.etp > 1:
            which = "ranks of a pipeline stage with the same part of an expert (dp x stream x cp)"
        reasons.append(f"does not divide the {ranks} {which}")
    if config.parallel.zero_stage == 3:
        reasons.append("is not possible with parallel.zero_stage 3")
    return reasons
