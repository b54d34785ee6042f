"""From the whole decoder on the meta device to this rank's parts with weights: cut stages, shard parameters, materialise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from megascale.config.layout import stage_count, stages_of_rank
from megascale.config.schema import Config, Model
from megascale.model.decoder import Decoder
from megascale.model.exchange import Split, unit_range
from megascale.model.initialize import fill, start_routers
from megascale.model.vocabulary import Embedding, Head
from megascale.parallel.mesh import DATA, STAGE, Mesh, Ranks
from megascale.parallel.placement import Placement
from megascale.parallel.stages import stage_layers


def whole_on_meta(model: Model) -> Decoder:
    """The whole decoder without memory."""
    with torch.device("meta"):
        return Decoder(model)


def cut(decoder: Decoder, stage: int, config: Config) -> None:
    """Leave one stage's parts, in place: its layers, the embedding on the first stage, norm, aggregator and head on the last."""
    stages = stage_count(config.parallel)
    keep = {str(layer) for layer in stage_layers(config)[stage]}
    for name in set(decoder.layers) - keep:
        del decoder.layers[name]
    if stage > 0:
        decoder.embedding = None
    if stage < stages - 1:
        decoder.norm = decoder.aggregator = decoder.head = None


def named_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """A stage's parameters by global name: a tied head is the embedding, also where the embedding itself is on another stage."""
    tied = decoder.config.tie_embeddings
    return {"embedding.weight" if tied and n == "head.weight" else n: p for n, p in decoder.named_parameters()}


def shard(decoder: Decoder, mesh: Mesh) -> dict[str, Placement]:
    """Replace each split parameter by this rank's piece, in place (on the meta device), and say what lies where, by global name."""
    splits = _splits(decoder)
    placements: dict[str, Placement] = {}
    for name, parameter in list(decoder.named_parameters(remove_duplicate=False)):
        mine, shape = splits.get(name, ()), tuple(parameter.shape)
        ranges = [range(size) for size in shape]
        for split in mine:
            if mesh.size(split.axis) > 1:
                ranges[split.dim] = _piece(split, shape, mesh)
        if any(len(here) < size for here, size in zip(ranges, shape, strict=True)):
            _replace(decoder, name, torch.empty([len(r) for r in ranges], dtype=parameter.dtype, device=parameter.device))
        tied = decoder.config.tie_embeddings and name in ("embedding.weight", "head.weight")
        placements["embedding.weight" if tied else name] = Placement(
            shape, tuple(r.start for r in ranges), *_holders(mine, tied, mesh)
        )
    if decoder.config.tie_embeddings and decoder.embedding is not None and decoder.head is not None:
        decoder.head.weight = decoder.embedding.weight
    _note_rows(decoder, placements)
    return placements


def _splits(decoder: Decoder) -> dict[str, tuple[Split, ...]]:
    """What the modules declare, by full name."""
    found: dict[str, tuple[Split, ...]] = {}
    for prefix, module in decoder.named_modules():
        declared: Mapping[str, Split | tuple[Split, ...]] = getattr(module, "splits", {})
        found |= {f"{prefix}.{name}": (some,) if isinstance(some, Split) else some for name, some in declared.items()}
    return found


def _part(axis: str, mesh: Mesh) -> int:
    peers = mesh.layout.expert_peers(mesh.world.rank) if axis == "ep" else mesh.along("tp")
    return peers.index(mesh.world.rank)


def _piece(split: Split, shape: tuple[int, ...], mesh: Mesh) -> range:
    units = unit_range(split.units, _part(split.axis, mesh), mesh.size(split.axis))
    width = shape[split.dim] // split.units
    return range(units.start * width, units.stop * width)


def _replace(decoder: Decoder, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(decoder.get_submodule(owner), attribute, nn.Parameter(tensor))


def _holders(splits: tuple[Split, ...], tied: bool, mesh: Mesh) -> tuple[Ranks, Ranks]:
    """(holders, sharded_over) of a `Placement`."""
    layout, rank = mesh.layout, mesh.world.rank
    data = mesh.along(*DATA)
    if not splits:
        return mesh.along(*STAGE), data
    if any(split.axis == "ep" for split in splits):
        experts = layout.expert_holders(rank)
        return experts, experts
    if tied:
        return layout.over_data(layout.ends(rank)), data
    shared = any(split.units < mesh.size("tp") for split in splits)
    return (layout.over_data(layout.kv_peers(rank)) if shared else data), data


def _note_rows(decoder: Decoder, placements: Mapping[str, Placement]) -> None:
    """Tell embedding and head which rows of the vocabulary they have."""
    for name, module in decoder.named_children():
        if isinstance(module, (Embedding, Head)):
            tied = decoder.config.tie_embeddings
            module.first_row = placements["embedding.weight" if tied else f"{name}.weight"].offsets[0]


def materialise(decoder: Decoder, placements: Mapping[str, Placement], seed: int, device: torch.device) -> None:
    """Give a sharded stage memory on the device and its initial weights, drawn from (seed, global name, rows), its own alone.

    On the meta device (dry runs) there is neither.
    """
    if device.type == "meta":
        return
    decoder.to_empty(device=device)
    if decoder.config.tie_embeddings and decoder.embedding is not None and decoder.head is not None:
        decoder.head.weight = decoder.embedding.weight  # to_empty has parted them
    for name, parameter in named_parameters(decoder).items():
        place = placements[name]
        fill(parameter, name, decoder.config, seed, place.global_shape, place.offsets)
    start_routers(decoder, seed)


def own_stages(config: Config, mesh: Mesh) -> list[int]:
    """The pipeline stages of this rank, first stage first."""
    return stages_of_rank(mesh.place["pp"], config.parallel)


def tie_ends(decoders: Mapping[int, Decoder]) -> None:
    """Where this rank has the first and the last stage, and they are not the same: their tied embedding and head are one parameter."""
    ends = [decoder for decoder in decoders.values() if decoder.embedding is not None or decoder.head is not None]
    if len(ends) == 2 and ends[0].config.tie_embeddings:
        assert ends[0].embedding is not None and ends[1].head is not None
        ends[1].head.weight = ends[0].embedding.weight
