"""Whatever tiling wrote a tensor, any other tiling reads the same bits."""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megascale.checkpoint.errors import CheckpointError, SaveError
from megascale.checkpoint.index import Placement, TensorEntry, check_tiling
from megascale.checkpoint.layout import Rectangle, full, region
from megascale.checkpoint.load import CheckpointReader

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]
Tile = tuple[tuple[int, ...], tuple[int, ...]]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern, NaN payloads included; bool holds 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(one.contiguous().reshape(-1).view(torch.uint8) for one in (a, b)))


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Tile]:
    """A grid of cuts, or a tree of cuts (tiles that share no common grid)."""
    if draw(st.booleans()):
        cuts = [sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=3))}) for extent in shape]
        spans = [list(zip(one, one[1:], strict=False)) or [(0, 0)] for one in cuts]
        return [(tuple(a for a, _ in tile), tuple(b - a for a, b in tile)) for tile in product(*spans)]
    tiles: list[Tile] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        offsets, sizes = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        first = draw(st.integers(0, sizes[axis]))
        for start, length in ((0, first), (first, sizes[axis] - first)):
            tile_offsets, tile_sizes = list(offsets), list(sizes)
            tile_offsets[axis] += start
            tile_sizes[axis] = length
            tiles.append((tuple(tile_offsets), tuple(tile_sizes)))
    return tiles


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Tile], list[Tile]]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    tensor = random_bits(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 1000)))
    return tensor, draw(tilings(shape)), draw(tilings(shape))


@given(st.lists(tensors(), min_size=1, max_size=4), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tiling_reads_what_any_other_wrote(save_world, cases, world, random) -> None:
    per_rank: list[list[Rectangle]] = [[] for _ in range(world)]
    for number, (tensor, written, _) in enumerate(cases):
        for offsets, sizes in written:
            piece = tensor[region(offsets, sizes)]
            per_rank[random.randrange(world)].append(Rectangle(f"model/{number}", tuple(tensor.shape), offsets, piece))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = save_world(Path(folder), 7, per_rank)
        assert outcomes == [Path(folder) / "step-00000007"] * world
        with CheckpointReader(outcomes[0]) as reader:
            reader.verify()
            assert reader.names() == [f"model/{number}" for number in range(len(cases))]
            for number, (tensor, _, read) in enumerate(cases):
                name = f"model/{number}"
                assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
                assert same_bits(reader.read(name), tensor)
                for offsets, sizes in read:
                    assert same_bits(reader.read(name, offsets, sizes), tensor[region(offsets, sizes)])


def tiling_entry(shape: tuple[int, ...], tiles: list[Tile]) -> TensorEntry:
    return TensorEntry(shape, "float32", tuple(Placement("file", str(tile), *tile) for tile in tiles if 0 not in tile[1]))


@given(st.data(), st.lists(st.integers(1, 7), max_size=3).map(tuple))
def test_a_tiling_is_accepted_only_if_each_element_is_covered_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    tiles = [tile for tile in data.draw(tilings(shape)) if 0 not in tile[1]]
    victim = data.draw(st.integers(0, len(tiles) - 1))
    change = data.draw(st.sampled_from(["none", "drop", "repeat", "move"]))
    if change == "drop":
        tiles.pop(victim)
    elif change == "repeat":
        tiles.append(tiles[victim])
    elif change == "move":
        _, sizes = tiles[victim]
        tiles[victim] = (tuple(data.draw(st.integers(0, n - m)) for n, m in zip(shape, sizes, strict=True)), sizes)
    covered = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in tiles:
        covered[region(offsets, sizes)] += 1
    if bool((covered == 1).all()):
        check_tiling("w", tiling_entry(shape, tiles))
    else:
        with pytest.raises(CheckpointError, match="tensor w"):
            check_tiling("w", tiling_entry(shape, tiles))


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([(0, 2), (3, 4)], "3 elements were given, shape (4,) has 4"),
        ([(0, 3), (2, 4)], "hold the same elements"),
        ([(0, 4), (0, 4)], "hold the same elements"),
    ],
)
def test_every_rank_learns_which_tensor_has_a_hole_or_an_overlap(save_world, tmp_path, pieces, complaint) -> None:
    whole = torch.arange(4.0)
    outcomes = save_world(tmp_path, 5, [[Rectangle("model/w", (4,), (a,), whole[a:b])] for a, b in pieces])
    assert all(isinstance(one, SaveError) for one in outcomes)
    assert len({str(one) for one in outcomes}) == 1
    assert "tensor model/w" in str(outcomes[0]) and complaint in str(outcomes[0])
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree_about_a_tensor_are_told_so(save_world, tmp_path) -> None:
    pieces = [Rectangle("w", (4,), (0,), torch.zeros(2)), Rectangle("w", (4,), (2,), torch.zeros(2, dtype=torch.bfloat16))]
    outcomes = save_world(tmp_path, 5, [[piece] for piece in pieces])
    assert all("tensor w: one rank says float32 (4,), another bfloat16 (4,)" in str(one) for one in outcomes)


def test_shards_are_ordinary_safetensors_files(save_world, tmp_path) -> None:
    tensors = {"flags": torch.tensor([True, False, True]), "half": torch.randn(3, 5).bfloat16(), "w": torch.randn(4, 6)[:, ::2]}
    path = save_world(tmp_path, 1, [[full(name, tensor) for name, tensor in tensors.items()]])[0]
    loaded = load_file(path / "shard-00000.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_starts_at_a_multiple_of_its_element_size(save_world, tmp_path) -> None:
    tensors = [
        full("a", torch.ones(3).bool()),
        full("b", torch.ones(3).bfloat16()),
        full("c", torch.ones(3)),
        full("d", torch.ones(1).long()),
    ]
    path = save_world(tmp_path, 1, [tensors])[0]
    content = (path / "shard-00000.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    starts = {key: entry["data_offsets"][0] for key, entry in json.loads(content[8 : 8 + length]).items()}
    assert all((8 + length + starts[one.name]) % one.tensor.element_size() == 0 for one in tensors)


def test_a_read_tensor_is_independent_of_the_files(small_checkpoint, tmp_path) -> None:
    path = small_checkpoint(tmp_path, 3)
    tensor = CheckpointReader(path).read("model/weight", (0, 0), (4, 8))
    for file in path.iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(tensor, torch.full((4, 8), 3.0))


@pytest.mark.parametrize(("offsets", "sizes"), [((0, 0), (9, 8)), ((-1, 0), (2, 8)), ((0,), (4,)), ((9, 0), None)])
def test_reading_outside_a_tensor_is_refused(small_checkpoint, tmp_path, offsets, sizes) -> None:
    with pytest.raises(CheckpointError, match=r"has shape \(8, 8\)"):
        CheckpointReader(small_checkpoint(tmp_path, 3)).read("model/weight", offsets, sizes)


def test_an_unknown_name_gets_the_nearest_one(small_checkpoint, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="did you mean model/weight"):
        CheckpointReader(small_checkpoint(tmp_path, 3)).read("model/wieght")
