"""AltUp (arXiv 2301.13310): predict and correct by definition, identity start, and the blocks' symmetries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megascale.model.altup import AltUpResidual
from megascale.model.decoder import Decoder, is_routed
from megascale.model.residual import SingleResidual, computed_block, contract, expand
from tiny import packed_batch, tiny_decoder, tiny_model

BATCH = packed_batch([[7, 5], [12]])
READS, SELECTS, COEFFICIENTS = ("old", "predicted"), ("alternating", "by_period", "same"), ("static", "token")


def residual(blocks: int, layer: int = 0, spread: float = 0.0, dtype: torch.dtype = torch.float64, **settings) -> AltUpResidual:
    model = tiny_model(width=8, altup={"blocks": blocks, **settings})
    module = AltUpResidual(model, computed_block(layer, model)).to(dtype)
    torch.manual_seed(blocks)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape))
    return module


def state_of(blocks: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 2, blocks, 8, generator=torch.Generator().manual_seed(3), dtype=dtype).requires_grad_()


def sublayer(x: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for attention and feed-forward of a block."""
    return (2 * x).tanh(), (x + 1).sin()


def step(module: AltUpResidual | SingleResidual, state: Tensor) -> Tensor:
    parts = module.split(state)
    block = module.read(parts)
    attention, feed_forward = sublayer(block)
    return module(parts, module.combine(block + attention, attention, feed_forward))


def by_definition(module: AltUpResidual, state: Tensor) -> Tensor:
    """Algorithm 1: predict with p = I + dp, compute block j, correct with g = 1 + dg; by token, dp and dg are Gemma 3n's."""
    j, blocks = module.computed, state.shape[2]

    def modalities(u: Tensor) -> Tensor:
        normed = u * (u.square().mean(-1, keepdim=True) + module.eps) ** -0.5 * module.modality_norm
        return (normed @ module.modality.T / u.shape[-1]).tanh()

    dp = (modalities(state[:, :, j]) @ module.predict.T).unflatten(-1, (blocks, blocks)) if module.by_token else module.predict
    p = (torch.eye(blocks) + dp).expand(*state.shape[:2], -1, -1)
    predicted = torch.einsum("tpik,tpkd->tpid", p, state)
    read = predicted[:, :, j] if module.predicted else state[:, :, j]
    computed = read + sum(sublayer(read))
    g = 1 + (modalities(computed) @ module.correct.T if module.by_token else module.correct)
    return predicted + g[..., None] * (computed - predicted[:, :, j])[:, :, None]


@settings(max_examples=40)
@given(
    blocks=st.integers(2, 5),
    layer=st.integers(0, 9),
    read=st.sampled_from(READS),
    select=st.sampled_from(SELECTS),
    coefficients=st.sampled_from(COEFFICIENTS),
    spread=st.floats(0, 2),
)
def test_a_layer_is_algorithm_1_with_its_gradients(
    blocks: int, layer: int, read: str, select: str, coefficients: str, spread: float
) -> None:
    module = residual(blocks, layer, spread, read=read, select=select, coefficients=coefficients)
    state = state_of(blocks)
    found, expected = step(module, state), by_definition(module, state)
    torch.testing.assert_close(found, expected)
    inputs, factors = (state, *module.parameters()), torch.linspace(-1, 1, found.numel()).view(found.shape)
    for got, true in zip(
        torch.autograd.grad((found * factors).sum(), inputs), torch.autograd.grad((expected * factors).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_with_kernels_a_layer_has_the_same_bits(read: str, coefficients: str) -> None:
    module, state = residual(3, 1, 0.5, read=read, coefficients=coefficients), state_of(3)
    found = []
    for module.fused in (False, True):
        out = step(module, state)
        found.append([out, *torch.autograd.grad(out.sin().sum(), (state, *module.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@settings(max_examples=40)
@given(blocks=st.integers(2, 5), layer=st.integers(0, 9), read=st.sampled_from(READS), spread=st.floats(0, 2))
def test_a_layer_is_a_static_hyper_connection(blocks: int, layer: int, read: str, spread: float) -> None:
    """R' = A_r^T R + B^T F(A_m^T R) of arXiv 2409.19606 with B = g; and A_m = e_j, A_r^T = (I - g e_j^T) P + g e_j^T where the old block
    is read, A_m = P^T e_j, A_r^T = P where the predicted one is.
    """
    module, state = residual(blocks, layer, spread, read=read), state_of(blocks)
    one = torch.eye(blocks, dtype=torch.float64)
    g, p, e = (1 + module.correct)[:, None], one + module.predict, one[module.computed][:, None]
    width, depth = (e, (one - g @ e.T) @ p + g @ e.T) if read == "old" else (p.T @ e, p)
    update = sum(sublayer(torch.einsum("km,tpkd->tpd", width, state)))
    expected = torch.einsum("ik,tpkd->tpid", depth, state) + g[None, None] * update[:, :, None]
    torch.testing.assert_close(step(module, state), expected)


def test_the_gradient_is_the_derived_one() -> None:
    """dxh_i = dx'_i - [i = j] S and dg_i = <dx'_i, y - xh_j> with S = sum_k g_k dx'_k; the block that is read gets S from outside."""
    module, state = residual(3, 1, 0.5, read="old"), state_of(3)
    parts = module.split(state)
    block = module.read(parts)
    attention, feed_forward = (y.detach() for y in sublayer(block))
    out = module(parts, module.combine(block + attention, attention, feed_forward))
    grad = torch.randn(out.shape, dtype=out.dtype)
    grad_state, grad_p, grad_g = torch.autograd.grad(out, (state, module.predict, module.correct), grad)
    p, g, j, x = torch.eye(3) + module.predict.detach(), 1 + module.correct.detach(), 1, state.detach()
    predicted = torch.einsum("ik,tpkd->tpid", p.to(x), x)
    total = (g[:, None] * grad).sum(2)
    grad_predicted = grad.clone()
    grad_predicted[:, :, j] -= total
    y = x[:, :, j] + attention + feed_forward
    torch.testing.assert_close(grad_g, torch.einsum("tpid,tpd->i", grad, y - predicted[:, :, j]))
    torch.testing.assert_close(grad_p, torch.einsum("tpid,tpjd->ij", grad_predicted, x))
    expected = torch.einsum("ij,tpid->tpjd", p.to(x), grad_predicted)
    expected[:, :, j] += total  # y = x_j + F
    torch.testing.assert_close(grad_state, expected)


@pytest.mark.parametrize("blocks", [2, 3, 4])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("select", SELECTS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_the_identity_start_is_the_plain_model(blocks: int, read: str, select: str, coefficients: str) -> None:
    # The last norm sees K times the plain state: its epsilon alone would tell them apart.
    plain = tiny_decoder(tiny_model(layers=4, norm_eps=1e-12))
    altup = {"blocks": blocks, "read": read, "select": select, "coefficients": coefficients}
    decoder = tiny_decoder(tiny_model(layers=4, norm_eps=1e-12, altup=altup))
    states: list[Tensor] = []
    decoder.hidden(*BATCH.inputs, watch=lambda _, state: states.append(state.detach()))
    assert all(torch.equal(state[:, :, :1].expand_as(state), state) for state in states)
    found, expected = BATCH.losses(decoder).lm, BATCH.losses(plain).lm
    assert abs((found - expected).item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_the_identity_start_adds_the_layers_output_bit_for_bit(dtype: torch.dtype, read: str, coefficients: str) -> None:
    """The update, which has the state's precision, is added as it is, though y = x + F would round a small one away."""
    module = residual(3, dtype=torch.float32, read=read, coefficients=coefficients)
    x, update = (torch.randn(5, 2, 8) * 100).to(dtype), torch.randn(5, 2, 8).to(dtype)
    found = module(module.split(x[:, :, None].expand(-1, -1, 3, -1)), update)
    assert all(torch.equal(found[:, :, i], x + update) for i in range(3))


@torch.no_grad()
def set_gains(decoder: Decoder, gains) -> None:
    """g of every layer; `gains` gives one row of K numbers for the computed block."""
    for layer in decoder.layers.values():
        layer.residual.correct.copy_(gains(layer.residual.computed) - 1)


def one_hot(blocks: int):
    return lambda computed: torch.eye(blocks)[computed]


def last_state(decoder: Decoder) -> Tensor:
    states: list[Tensor] = []
    with torch.no_grad():
        decoder.hidden(*BATCH.inputs, watch=lambda _, state: states.append(state))
    return states[-1]


@pytest.mark.parametrize("read", READS)
def test_correcting_the_computed_block_alone_leaves_the_others_unchanged(read: str) -> None:
    plain = tiny_decoder(tiny_model(layers=4))
    decoder = tiny_decoder(tiny_model(layers=4, altup={"blocks": 3, "read": read, "select": "same"}))
    set_gains(decoder, one_hot(3))
    state = last_state(decoder)
    torch.testing.assert_close(state[:, :, 0], last_state(plain)[:, :, 0], rtol=1e-5, atol=1e-6)
    embedded = decoder.embedding(BATCH.tokens.flatten())
    for other in (1, 2):
        assert torch.equal(state[:, 0, other], embedded)


@pytest.mark.parametrize("read", READS)
def test_correcting_the_computed_block_alone_in_turns_is_k_separate_networks(read: str) -> None:
    decoder = tiny_decoder(tiny_model(layers=4, altup={"blocks": 2, "read": read}), spread=0.1)
    with torch.no_grad():
        for layer in decoder.layers.values():
            layer.residual.predict.zero_()
    set_gains(decoder, one_hot(2))
    state = last_state(decoder)
    for block in range(2):
        separate = tiny_decoder(tiny_model(layers=2))
        with torch.no_grad():
            separate.embedding.weight.copy_(decoder.embedding.weight)
            for i in range(2):
                for name, parameter in separate.layers[str(i)].named_parameters():
                    parameter.copy_(decoder.layers[str(2 * i + block)].get_parameter(name))
        torch.testing.assert_close(state[:, :, block], last_state(separate)[:, :, 0], rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(order=st.permutations(range(4)), read=st.sampled_from(READS), coefficients=st.sampled_from(COEFFICIENTS))
def test_permuting_blocks_permutes_the_next_state(order: list[int], read: str, coefficients: str) -> None:
    module, state = residual(4, 1, 0.5, read=read, coefficients=coefficients), state_of(4).detach()
    expected = step(module, state)[:, :, order]
    with torch.no_grad():
        module.predict.copy_(module.predict.view(4, 4, -1)[order][:, order].view_as(module.predict))
        module.correct.copy_(module.correct[order])
    module.computed = order.index(module.computed)
    torch.testing.assert_close(step(module, state[:, :, order]), expected)


@pytest.mark.parametrize("layer", range(4))
def test_a_layer_reads_its_block_only(layer: int) -> None:
    module, state = residual(3, layer, 0.5), state_of(3).detach()
    changed = state + 1
    changed[:, :, layer % 3] = state[:, :, layer % 3]
    assert torch.equal(module.read(module.split(changed)), module.read(module.split(state)))
    assert torch.equal(module.read(module.split(state)), state[:, :, layer % 3])


@pytest.mark.parametrize(
    ("altup", "every", "expected"),
    [
        ({"blocks": 3}, 1, [0, 1, 2, 0, 1, 2]),
        ({"blocks": 3, "select": "same"}, 1, [0] * 6),
        ({"blocks": 2}, 2, [0, 1, 0, 1, 0, 1]),
        ({"blocks": 2, "select": "by_period"}, 2, [0, 0, 1, 1, 0, 0]),
    ],
)
def test_the_computed_block_alternates_by_layer_or_by_period_or_stays(altup: dict, every: int, expected: list[int]) -> None:
    model = tiny_model(layers=6, altup=altup, experts={"count": 4, "every": every, "offset": every - 1})
    assert [computed_block(layer, model) for layer in range(6)] == expected
    if altup.get("select") == "by_period":
        assert {computed_block(layer, model) for layer in range(6) if is_routed(layer, model)} == {0, 1}


def test_one_block_costs_no_copy() -> None:
    embedding, model = torch.randn(5, 32), tiny_model()
    state = expand(embedding, 1, model)
    assert state.shape == (5, 1, 1, 32)
    residual = SingleResidual()
    read = residual.read(residual.split(state))
    assert contract(state, model).data_ptr() == read.data_ptr() == embedding.data_ptr()


def test_blocks_and_streams_start_equal_and_contract_by_their_sum() -> None:
    embedding, model = torch.randn(5, 32), tiny_model(altup={"blocks": 3})
    state = expand(embedding, 2, model)
    assert torch.equal(state, embedding[:, None, None].expand(5, 2, 3, 32))
    torch.testing.assert_close(contract(state, model), 3 * embedding[:, None].expand(5, 2, 32))


def test_wide_blocks_are_parts_of_the_embedding_and_of_what_the_head_reads() -> None:
    embedding, model = torch.randn(5, 96), tiny_model(altup={"blocks": 3, "form": "wide"})
    state = expand(embedding, 2, model)
    assert torch.equal(state[:, 1, 2], embedding[:, 64:])
    assert torch.equal(contract(state, model), embedding[:, None].expand(5, 2, 96))


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_streams_that_still_agree_may_come_as_one(coefficients: str) -> None:
    """The blocks have one stream, the update two: as if the blocks were given twice, gradients included."""
    for read in READS:
        module = residual(3, 1, 0.5, read=read, coefficients=coefficients)
        shared, update = state_of(3)[:, :1].detach().requires_grad_(), torch.randn(5, 2, 8, dtype=torch.float64)
        outs = [module(module.split(state), update) for state in (shared, shared.expand(-1, 2, -1, -1))]
        assert outs[0].shape == (5, 2, 3, 8)
        torch.testing.assert_close(*outs)
        factors = torch.linspace(-1, 1, outs[0].numel()).view(outs[0].shape)
        pair = [torch.autograd.grad((out * factors).sum(), (shared, *module.parameters())) for out in outs]
        for one, two in zip(*pair, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("select", SELECTS)
def test_training_tells_the_blocks_apart(coefficients: str, select: str) -> None:
    """All blocks start equal; the coefficients' gradients differ between blocks, so that they do not stay so."""
    decoder = tiny_decoder(tiny_model(layers=4, altup={"blocks": 2, "coefficients": coefficients, "select": select}))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = BATCH.losses(decoder).lm
        assert loss is not None
        loss.backward()
        optimizer.step()
    state = last_state(decoder)
    assert (state[:, :, 0] - state[:, :, 1]).norm() > 0.01 * state[:, :, 0].norm()


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_a_wide_model_of_equal_blocks_is_the_plain_model(read: str, coefficients: str) -> None:
    """With the plain embedding in every block, and each block's part of the head 1/K of the plain one."""
    plain = tiny_decoder(tiny_model(layers=4))
    altup = {"blocks": 3, "form": "wide", "read": read, "coefficients": coefficients}
    decoder = tiny_decoder(tiny_model(layers=4, altup=altup))
    assert decoder.embedding is not None
    assert decoder.head is not None
    with torch.no_grad():
        decoder.embedding.weight.copy_(plain.embedding.weight.repeat(1, 3))
        decoder.head.weight.copy_(plain.head.weight.repeat(1, 3) / 3)
    found, expected = BATCH.losses(decoder).lm, BATCH.losses(plain).lm
    assert abs((found - expected).item()) < 1e-6
