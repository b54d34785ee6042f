"""Context and stream parallelism: shares of tokens and streams, and the run of one process in every combination with the other axes."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layouts import ADAMW, CUT_ALL, SGD_LIKE, SPOILED, full_unless, problems, train
from megascale.parallel.context import ZigZag, _Peers
from ranks import RankPool

MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64}"
STREAMS4 = "model.streams={count: 4, prefix_tokens: 4}"
ULYSSES = "parallel.context=ulysses"
COMPILED = "compile=on"
VALIDATION = "validation={every: 2, sequences: 3}"


def zigzag(rank: int, ranks: int) -> ZigZag:
    return ZigZag(_Peers(rank, ranks, ""))


@given(ranks=st.integers(1, 4), width=st.integers(1, 3))
def test_each_token_is_on_one_rank_and_the_ranks_do_the_same_work(ranks: int, width: int) -> None:
    tokens = torch.arange(2 * ranks * width)
    shares = [zigzag(rank, ranks).share(tokens) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares).sort().values, tokens)
    # a token of one long document sees itself and all before it
    assert len({int((share + 1).sum()) for share in shares}) == 1


@given(st.data())
def test_a_token_sees_its_own_chunk_and_the_span_before_it(data: st.DataObject) -> None:
    ranks, width, sequences = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    length = 2 * ranks * width
    starts = [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(sequences)]
    documents = torch.tensor([list(accumulate(map(int, row))) for row in starts])
    everywhere = torch.arange(documents.numel())
    unique = (documents + torch.arange(sequences)[:, None] * 1000).flatten()
    for rank in range(ranks):
        share = zigzag(rank, ranks)
        here, (borders, spans) = share.share(everywhere), share.borders(documents)
        part = torch.bucketize(torch.arange(len(here)), borders[1:-1].long(), right=True)
        for i, token in enumerate(here.tolist()):
            seen = {int(here[j]) for j in range(i + 1) if part[j] == part[i]}
            seen |= {key for a, b, c, d in spans.tolist() if a <= i < b for key in range(c, d)}
            assert seen == {key for key in range(token + 1) if unique[key] == unique[token]}


CASES = {
    # context parallelism
    "cp2": (2, "{cp: 2}", ()),
    "cp2, validation, biases": (2, "{cp: 2}", (VALIDATION, "model.qk_norm=true", "model.qkv_bias=true")),
    "cp2-ulysses": (2, "{cp: 2}", (ULYSSES, VALIDATION)),
    "cp2-ulysses, window, capacity": (2, "{cp: 2}", (ULYSSES, "model.sliding_window=8", "model.experts.capacity_factor=1.0")),
    "cp4": (4, "{cp: 4}", ()),
    "cp2-tp2": (4, "{cp: 2, tp: 2}", (VALIDATION,)),
    "cp2-ulysses-dp2-ep4": (4, "{cp: 2, ep: 4}", (ULYSSES,)),
    "cp2-tp2-pp2": (8, "{cp: 2, tp: 2, pp: 2}", (VALIDATION,)),
    "cp2, recomputed streams": (2, "{cp: 2, recompute: stream}", ()),
    "cp2-dp2, causal": (4, "{cp: 2}", ("data.attention=causal",)),
    # stream parallelism
    "stream2": (2, "{stream: 2}", (VALIDATION,)),
    "stream4": (4, "{stream: 4}", (STREAMS4,)),
    "stream2 of 4, recomputed streams": (2, "{stream: 2, recompute: stream}", (STREAMS4,)),
    "stream2-tp2": (4, "{stream: 2, tp: 2}", (VALIDATION,)),
    "stream2-pp2-dp2": (8, "{stream: 2, pp: 2}", ()),
    "stream2-dp2-ep4": (4, "{stream: 2, ep: 4}", ("model.experts.per_token=2",)),
    "stream2, capacity, wide": (2, "{stream: 2}", ("model.experts.capacity_factor=1.0", "model.altup={blocks: 2, form: wide}")),
    "stream2, prefix network, tied": (2, "{stream: 2}", ("model.streams.reparameterise=8", "model.tie_embeddings=true")),
    # both
    "stream2-cp2-tp2": (8, "{stream: 2, cp: 2, tp: 2}", (VALIDATION,)),
    "stream2-cp2-ulysses-tp2, one head a rank": (8, "{stream: 2, cp: 2, tp: 2}", (ULYSSES, "model.kv_heads=4")),
    "stream2-cp2-ulysses-pp2": (8, "{stream: 2, cp: 2, pp: 2}", (ULYSSES,)),
    **{f"stream2-cp2, {router}": (4, "{stream: 2, cp: 2}", (f"model.experts.router={router}",)) for router in ("s_base", "rl_r")},
    "stream2-cp2, compiled": (4, "{stream: 2, cp: 2}", (COMPILED,)),
    "stream2-cp2-ulysses, compiled": (4, "{stream: 2, cp: 2}", (ULYSSES, COMPILED)),
    "stream2-cp2-pp2, rl_r": (8, "{stream: 2, cp: 2, pp: 2}", ("model.experts.router=rl_r",)),
}
QUICK = (
    "cp2, validation, biases",
    "cp2-ulysses, window, capacity",
    "stream2-cp2-ulysses-tp2, one head a rank",
    "cp4",
    "stream4",
    "stream2 of 4, recomputed streams",
    "stream2-cp2-tp2",
    "stream2-cp2-pp2, rl_r",
)
ZERO = {
    "cp2, ZeRO 1": (4, "{cp: 2, zero_stage: 1}", ()),
    "stream2, ZeRO 2": (2, "{stream: 2, zero_stage: 2}", ()),
    "stream2-cp2-ep2, ZeRO 1": (4, "{stream: 2, cp: 2, ep: 2, zero_stage: 1}", ()),
    "stream2-cp2, ZeRO 3": (4, "{stream: 2, cp: 2, zero_stage: 3}", (CUT_ALL,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", full_unless([*QUICK, "stream2-cp2, ZeRO 3"], [*CASES, *ZERO]))
def test_a_layout_trains_the_run_of_one_process(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, name: str) -> None:
    world, parallel, settings = {**CASES, **ZERO}[name]
    parallel = parallel if "zero_stage" in parallel else parallel[:-1] + ", zero_stage: 0}"
    found = train(ranks, tmp_path, tiny_corpus, world, "run", MODEL, *ADAMW, f"parallel={parallel}", *settings)
    alone = [setting for setting in settings if setting not in (ULYSSES, CUT_ALL, COMPILED)]
    one = train(ranks, tmp_path, tiny_corpus, 1, "one", MODEL, *ADAMW, *alone)
    assert problems(found, one) == []


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["{cp: 2, zero_stage: 0}", "{stream: 2, zero_stage: 0}"])
def test_the_rule_has_teeth(ranks: RankPool, tmp_path: Path, tiny_corpus: Path, parallel: str) -> None:
    found = train(ranks, tmp_path, tiny_corpus, 2, "run", MODEL, *SGD_LIKE, f"parallel={parallel}", spoiled=True, steps=1)
    one = train(ranks, tmp_path, tiny_corpus, 1, "one", MODEL, *SGD_LIKE, steps=1)
    assert f"model/{SPOILED}" in problems(found, one)
