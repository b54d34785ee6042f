"""What one rank of a layout has of the model and of a micro-batch: the numbers that memory and time are made of.

d width, H query heads, G key/value heads, D head width, f feed-forward width, V vocabulary, P streams, K blocks, T tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megascale.config.errors import InputError
from megascale.config.layout import expert_ranks, stage_count, zero_stage_of
from megascale.config.schema import Config, Model
from megascale.config.size import end_width
from megascale.model.accounting import active_parameters, flops_per_token, mean_visible_keys, parameters
from megascale.model.routers import baseline_width
from megascale.parallel.mesh import Layout, make_layout
from megascale.plan.cut import Cut, cut_of


@dataclass(frozen=True)
class Elements:
    """Numbers of parameters on a rank, by how they are held."""

    matrices: int = 0
    """of the layers, in the run's precision: what Muon takes where it is the optimizer"""
    others: int = 0
    """embedding, head, biases, prefixes, aggregator: in the run's precision too"""
    wide: int = 0
    """norms, routers, AltUp's coefficients: fp32 always"""
    experts: int = 0
    """in the run's precision; shared with the ranks that have the same experts"""

    def __add__(self, other: Elements) -> Elements:
        return Elements(
            self.matrices + other.matrices, self.others + other.others, self.wide + other.wide, self.experts + other.experts
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.others + self.wide + self.experts


class Plan:
    """A resolved config on a world of ranks, with what follows from both by arithmetic; all ranks of a pipeline rank are alike.

    Args:
        config: resolved and checked; knows the vocabulary's size.
        world: ranks.

    Raises:
        InputError: the vocabulary's size is not set, or a part of the model is frozen, which the planner does not know.
    """

    def __init__(self, config: Config, world: int):
        if config.model.vocab_size is None:
            raise InputError("model.vocab_size", "is not set, and the planner opens no corpus", "set it, for example to 128256")
        if config.start.freeze:
            raise InputError("start.freeze", "the planner counts runs that train everything", "leave it out for the plan")
        self.config, self.model, self.world = config, config.model, world
        self.layout: Layout = make_layout(config.parallel, config.model, world)
        sizes = self.layout.sizes
        self.pp, self.dp, self.stream, self.cp, self.tp = (sizes[axis] for axis in ("pp", "dp", "stream", "cp", "tp"))
        self.ep, self.etp = self.layout.ep, self.layout.etp
        self.zero = zero_stage_of(config, world)
        self.micro_batches = config.batch.micro_batches
        self.element_bytes = 2 if config.precision == "bf16" else 4
        sequences = config.batch.sequences // self.micro_batches // self.dp
        self.sequences = sequences
        self.tokens = sequences * config.data.sequence_length // self.cp
        """T here: of a micro-batch, shared only by cp (inside attention and feed-forward all tp ranks have them)"""
        self.streams = self.model.streams.count // self.stream
        self._elements: dict[int, Elements] = {}

    @property
    def visible_keys(self) -> float:
        """Mean number of keys that a token sees: documents are taken to fill their sequences, as in a dry run."""
        return mean_visible_keys((self.config.data.sequence_length - 1) / 2, self.model)

    @property
    def step_tokens(self) -> int:
        """Of a step, all ranks together."""
        return self.config.batch.sequences * self.config.data.sequence_length

    @cached_property
    def flops(self) -> float:
        """Model FLOPs of a step, all ranks together, as the dry run counts them."""
        length = self.config.data.sequence_length
        kept = -(-length // self.model.altup.stride) / length
        return flops_per_token(self.model, self.visible_keys, kept=kept) * self.step_tokens

    @property
    def parameters(self) -> int:
        """Of the model."""
        return parameters(self.model).total

    @property
    def active_parameters(self) -> int:
        """That one token passes."""
        return active_parameters(self.model)

    @cached_property
    def cut(self) -> Cut:
        """The layers of each pipeline stage and rank."""
        return cut_of(self.config)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a pipeline rank."""
        return self.cut.by_rank[rank]

    @property
    def stage_count(self) -> int:
        """Pipeline stages over all ranks."""
        return stage_count(self.config.parallel)

    @property
    def data_shards(self) -> int:
        """Ranks over which ZeRO shares what all data ranks hold."""
        return self.dp * self.stream * self.cp

    @property
    def expert_shards(self) -> int:
        """Ranks with the same experts, over which ZeRO shares their state."""
        return expert_ranks(self.config.parallel, self.dp) // self.ep

    @property
    def query_width(self) -> int:
        """H D of this tensor-parallel rank."""
        assert self.model.head_dim
        return self.model.heads * self.model.head_dim // self.tp

    @property
    def key_width(self) -> int:
        """G D of this tensor-parallel rank, which has one head at least."""
        assert self.model.head_dim and self.model.kv_heads
        return max(self.model.kv_heads // self.tp, 1) * self.model.head_dim

    @property
    def ffn_width(self) -> int:
        """f of this rank."""
        assert self.model.ffn_width
        return self.model.ffn_width // self.tp

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding on this rank."""
        assert self.model.vocab_size
        return -(-self.model.vocab_size // self.tp)

    @cached_property
    def kinds(self) -> dict[bool, Elements]:
        """Elements of a layer without (False) and with experts (True)."""
        return {
            routed: _layer_elements(self, routed) for routed in {routed for counts in self.cut.counts for _, routed, _ in counts}
        }

    def stage_elements(self, stage: int) -> Elements:
        """Elements of a pipeline stage."""
        total = self._ends(stage)
        for (_, routed, strided), count in self.cut.counts[stage].items():
            each = self.kinds[routed]
            wide = each.wide + 3 * strided
            total += Elements(each.matrices * count, each.others * count, wide * count, each.experts * count)
        return total

    def _ends(self, stage: int) -> Elements:
        model, ends = self.model, end_width(self.model)
        first, last = stage == 0, stage == self.stage_count - 1
        streams = model.streams.count
        aggregator = ((streams * ends + 1) * model.width + (model.width + 1) * streams) * (streams > 1)
        tables = first + (last and not (first and model.tie_embeddings))
        return Elements(others=tables * self.vocabulary * ends + last * aggregator, wide=last * ends)

    def rank_elements(self, rank: int) -> Elements:
        """Elements of a pipeline rank."""
        if rank not in self._elements:
            self._elements[rank] = self._rank_elements(rank)
        return self._elements[rank]

    def _rank_elements(self, rank: int) -> Elements:
        stages = self.stages_of(rank)
        total = sum((self.stage_elements(stage) for stage in stages), Elements())
        if self.model.tie_embeddings and len(stages) > 1 and {0, self.stage_count - 1} <= set(stages):
            total += Elements(others=-self.vocabulary * end_width(self.model))  # a V has both ends on one rank, once
        return total


def _layer_elements(plan: Plan, routed: bool) -> Elements:
    model, d = plan.model, plan.model.width
    assert model.head_dim
    matrices = d * (2 * plan.query_width + 2 * plan.key_width)
    others = (plan.query_width + 2 * plan.key_width) * model.qkv_bias
    wide = 2 * d + 2 * model.head_dim * model.qk_norm + _altup_elements(model)
    if model.streams.count > 1:
        others += _prefix_elements(plan)
    if not routed:
        return Elements(matrices + 3 * d * plan.ffn_width, others, wide, 0)
    experts = model.experts
    assert experts.width
    wide += experts.count * d * (experts.router != "hash") + baseline_width(model) * (d + 1) * (experts.router == "rl_r")
    matrices += 3 * d * experts.shared * experts.width // plan.tp
    return Elements(matrices, others, wide, experts.count // plan.ep * 3 * d * experts.width // plan.etp)


def _prefix_elements(plan: Plan) -> int:
    streams = plan.model.streams
    rows, hidden = streams.count * streams.prefix_tokens, streams.reparameterise
    if hidden is None:
        return 2 * rows * plan.key_width
    return (rows + hidden + 1) * hidden + 2 * (hidden + 1) * plan.key_width


def _altup_elements(model: Model) -> int:
    blocks, token = model.altup.blocks, model.altup.coefficients == "token"
    if model.altup.form == "sequence" or blocks == 1:
        return 0
    return (blocks**2 + blocks) * (blocks if token else 1) + (blocks + 1) * model.width * token
