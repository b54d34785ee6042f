"""The dispatch kernels: sorting is exact, data movement bit for bit, sums within rounding; what is never read may hold anything."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_as_good, choices, every_dtype, normal, poison, twice, uncontiguous

from megascale.kernels import dispatch_triton as kernels
from megascale.kernels.dispatch import sort_copies_reference


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


# Sorting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "k", "count", "dropped"),
    [
        (0, 2, 4, False),
        (1, 1, 1, False),
        (7, 2, 3, True),
        (64, 2, 5, False),  # one whole block
        (65, 2, 5, True),  # a block and two copies
        (43, 3, 13, True),
        (700, 6, 31, True),  # blocks that the scan takes in one chunk, 33 bins
        (70, 8, 511, True),  # larger blocks
    ],
)
def test_sorting_is_the_stable_one(device: torch.device, number: int, k: int, count: int, dropped: bool) -> None:
    experts = choices(number, k, count, dropped).to(device)
    for found, expected in zip(twice(kernels.sort_copies, experts, count), sort_copies_reference(experts, count), strict=True):
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


@pytest.mark.parametrize("only", [0, 3, 4])
def test_all_copies_may_go_to_one_expert_or_none(device: torch.device, only: int) -> None:
    experts = torch.full((150, 2), only, device=device)
    for found, expected in zip(kernels.sort_copies(experts, 4), sort_copies_reference(experts, 4), strict=True):
        assert torch.equal(found, expected)


def test_the_scan_carries_over_its_chunks(device: torch.device) -> None:
    """A table of more blocks than a program reads at once."""
    table = torch.randint(0, 9, (3, 70), dtype=torch.int32, generator=torch.Generator().manual_seed(0)).to(device)
    before, totals = table.cumsum(1) - table, torch.zeros(3, dtype=torch.int32, device=device)
    kernels._scan_blocks[(3,)](table, totals, 70, CHUNK=32)
    assert torch.equal(table, before.int())
    assert torch.equal(totals.cpu(), torch.randint(0, 9, (3, 70), generator=torch.Generator().manual_seed(0)).sum(1).int())


def test_choices_need_not_be_contiguous(device: torch.device) -> None:
    experts = choices(33, 3, 5).to(device)
    strided = experts.t().contiguous().t()
    for found, expected in zip(kernels.sort_copies(strided, 5), kernels.sort_copies(experts, 5), strict=True):
        assert torch.equal(found, expected)


# Rows -----------------------------------------------------------------------------------------------------------------

SHAPES = [
    (9, 1, 4, 16),
    (5, 2, 3, 7),
    (3, 3, 4, 130),
    (2, 8, 11, 64),
    (1, 4, 5, 1),
    (0, 2, 4, 8),
    (4, 2, 3, 8200),
    (3, 5, 6, 2056),
]
every_shape = pytest.mark.parametrize(("number", "k", "count", "width"), SHAPES)


@every_dtype
@every_shape
def test_copies_are_bit_exact(device: torch.device, dtype: torch.dtype, number: int, k: int, count: int, width: int) -> None:
    order, place, counts = sort_copies_reference(choices(number, k, count), count)
    x = normal(number, width, dtype=dtype, device=device)
    live = int(counts.sum())
    for rows in (x, uncontiguous(x)):
        out = twice(kernels.write_copies, rows, place.to(device), order.numel())
        assert out.shape == (number * k, width)
        assert torch.equal(out[:live], x[(order // k).to(device)][:live])
        assert out[live:].isnan().all()  # nothing is written there


@every_dtype
@every_shape
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_copies(
    device: torch.device, dtype: torch.dtype, number: int, k: int, count: int, width: int, weighted: bool
) -> None:
    _, place, counts = sort_copies_reference(choices(number, k, count), count)
    y = normal(number * k, width, dtype=dtype, device=device)
    y[int(counts.sum()) :] = torch.nan
    gates = normal(number, k, dtype=torch.promote_types(dtype, torch.float32), device=device, seed=1) if weighted else None
    picked = torch.cat([y, y.new_zeros(1, width)])[place.to(device)]
    factor = torch.ones((), device=device) if gates is None else gates[..., None]
    true, plain = (picked.double() * factor.double()).sum(1), (picked * factor.to(dtype)).sum(1)
    for rows in (y, uncontiguous(y)):
        found = twice(kernels.sum_copies, rows, place.to(device), gates)
        assert found.dtype == dtype
        if number:
            assert_as_good(found, plain, true)


@every_dtype
def test_one_copy_is_moved_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    x = normal(6, 20, dtype=dtype, device=device)
    x[0], x[1, 3] = -0.0, torch.inf
    index = torch.tensor([5, 0, 1, 6, 3, 9], device=device)  # behind the last row: zeros
    found, expected = kernels.sum_copies(x, index[:, None]), torch.cat([x, x.new_zeros(4, 20)])[index]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@every_dtype
@every_shape
def test_gradients_of_gated_sums(device: torch.device, dtype: torch.dtype, number: int, k: int, count: int, width: int) -> None:
    order, place, counts = sort_copies_reference(choices(number, k, count), count)
    place, live = place.to(device), int(counts.sum())
    y, grad = (normal(n, width, dtype=dtype, device=device, seed=n) for n in (number * k, number))
    y[live:] = torch.nan
    gates = normal(number, k, dtype=torch.promote_types(dtype, torch.float32), device=device, seed=1)
    picked = torch.cat([y, y.new_zeros(1, width)])[place]
    of_row = (order // k).to(device)
    weight = gates.flatten()[order.to(device)][:, None]
    for rows in (lambda x: x, uncontiguous):
        grad_y, grad_gates = twice(kernels.weighted_sum_backward, rows(grad), rows(y), gates, place)
        assert (grad_y.shape, grad_y.dtype, grad_gates.dtype) == (y.shape, dtype, gates.dtype)
        assert grad_y[live:].isnan().all()
        if live:
            products = [(weight.to(t) * grad.to(t)[of_row])[:live] for t in (dtype, torch.float64)]
            assert_as_good(grad_y[:live], *products)
            plain, true = ((picked.to(t) * grad.to(t)[:, None]).sum(-1) for t in (dtype, torch.float64))
            assert_as_good(grad_gates, plain, true)
        assert not grad_gates[place == order.numel()].any()


def test_offsets_of_rows_are_64_bit(device: torch.device) -> None:
    """Rows that begin 2^31 elements away; the memory between them is never touched."""
    far = torch.zeros(0, dtype=torch.bfloat16, device=device).resize_(2**31 + 64).as_strided((3, 64), (2**30, 1))
    far[:] = near = normal(3, 64, dtype=torch.bfloat16, device=device)
    place = torch.tensor([[2], [0], [1]], device=device)
    gates = torch.ones(3, 1, device=device)
    assert torch.equal(kernels.write_copies(far, place, 3), kernels.write_copies(near, place, 3))
    assert torch.equal(kernels.sum_copies(far, place), kernels.sum_copies(near, place))
    for a, b in zip(*(kernels.weighted_sum_backward(x, x, gates, place) for x in (far, near)), strict=True):
        assert torch.equal(a, b)


# In the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_the_layer_never_waits_for_the_device(device: torch.device, capacity: float | None) -> None:
    """On a GPU only; on a CPU tests/model/test_model_routing.py has it on meta tensors."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    from megascale.model.origin import Origin
    from megascale.model.routing import Experts
    from tiny import origin, tiny_model

    layer = Experts(tiny_model(experts={"count": 4, "width": 16, "per_token": 2, "capacity_factor": capacity})).to(device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer, here = layer.bfloat16(), origin(64)
    layer.router.float()
    there = Origin(here.ids.to(device), here.counter.to(device), here.key.to(device))
    x = normal(64, 1, 32, dtype=torch.bfloat16, device=device).requires_grad_()
    for step in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            layer(x, there)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()
