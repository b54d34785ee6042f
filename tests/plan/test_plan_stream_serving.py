"""ParScale's inference costs: what its program prints, from our own analysis; and what a server would see."""

import pytest

from megascale.model import accounting
from megascale.plan.inference import SERVER, Request, cache_bytes, memory, weights_read
from megascale.plan.shapes import shape
from megascale.plan.stream_serving import PUBLISHED, PUBLISHED_RATIOS, ratios, turning_batch


def test_published_ratios_are_reproduced_by_the_published_conventions():
    for ratio in ratios(PUBLISHED):
        published_memory, published_time = PUBLISHED_RATIOS[ratio.batch]
        assert ratio.memory == pytest.approx(published_memory, rel=0.10)
        assert ratio.seconds == pytest.approx(published_time, rel=0.05)


def test_streams_lose_their_advantage_in_time_by_batch_8_as_published():
    assert turning_batch(ratios(PUBLISHED)) == 8


def test_a_server_that_passes_over_the_cache_once_sees_less_time_and_more_memory_for_streams():
    for published, served in zip(ratios(PUBLISHED), ratios(SERVER), strict=True):
        assert served.seconds > 1.5 * published.seconds
        assert served.memory < 0.85 * published.memory
    assert turning_batch(ratios(SERVER)) is None
    assert turning_batch(ratios(SERVER, batches=(8, 16, 32))) == 16


def test_memory_of_a_plain_model_is_two_bytes_a_weight_and_its_cache():
    model = shape(8)  # Llama 3.1 8B
    held = memory(model, Request(1000, 24))
    assert held.weights == 2 * 8_030_261_248
    assert held.cache == 2 * 2 * 32 * 8 * 128 * 1024


def test_streams_multiply_the_cache_and_nothing_else_of_size():
    plain, wide = shape(8), shape(8, streams=4)
    assert cache_bytes(wide, 100) == 4 * cache_bytes(plain, 100)
    assert memory(wide, Request(100, 1)).weights < 1.02 * memory(plain, Request(100, 1)).weights


def test_one_row_reads_k_experts_and_many_rows_read_all():
    model = shape(4, experts=64, per_token=2)
    all_weights = memory(model, Request(1, 1)).weights
    assert weights_read(model, 1) < 0.2 * all_weights
    assert weights_read(model, 4096) == pytest.approx(all_weights, rel=0.06)  # the embedding's rows stay


def test_every_stream_picks_its_own_experts():
    one, eight = shape(4, experts=64), shape(4, experts=64, streams=8)
    expert = 2 * 3 * one.width * one.ffn_width * one.layers // 2
    more = weights_read(eight) - weights_read(one) - 2 * (accounting.parameters(eight).total - accounting.parameters(one).total)
    assert more == pytest.approx(expert * (64 * (1 - (63 / 64) ** 8) - 1))
