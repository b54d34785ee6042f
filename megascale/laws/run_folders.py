"""Our own runs as a table: sizes from the config and the model accounting, tokens, FLOPs and loss from metrics.jsonl.

Columns: N parameters that one token sees, without embeddings (prefixes and aggregator included, idle experts not); N_with_embeddings;
N_total; D loss tokens; C FLOPs of training; P, E, k, K; F forward TFLOPs a token; B parameters per FLOP; U unique tokens; label `router`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megascale.laws.refusals import BadTable
from megascale.laws.table import LOSS, RunTable, read_csv
from megascale.observe.sinks import read_metrics

_TAIL = 0.05
"""share of the last records over which a training loss is averaged: one step's loss is noisy"""


def read_table(
    paths: Sequence[Path],
    mapping: Mapping[str, str] | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    run: str | None = None,
    loss: str | None = None,
) -> RunTable:
    """A csv file, or run folders (or their metrics.jsonl files).

    Args:
        mapping, where, run: of a csv file, see `read_csv`; of run folders the mapping renames columns, `N=N_with_embeddings`.
        loss: metric of run folders; none = their only `val/.../loss`.

    Raises:
        BadTable: files and folders together, a run that did not end, a metric that is missing.
    """
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in paths]
    if not any(folder.is_dir() for folder in folders):
        if len(paths) != 1:
            raise BadTable(", ".join(map(str, paths)), "several files", "give one csv file, or run folders")
        if loss is not None:
            raise BadTable(
                str(paths[0]), "--loss names a metric of run folders", "name the column of a csv file: --map loss=COLUMN"
            )
        return read_csv(paths[0], mapping, where, run)
    if where or run:
        raise BadTable(
            str(paths[0]), "is a run folder; --where and --run choose rows of a csv file", "name the folders that you mean"
        )
    rows = [_row(folder, loss) for folder in folders]
    place = ", ".join(map(str, folders))
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0] if name != "router"}
    for symbol, source in (mapping or {}).items():
        if source not in columns:
            raise BadTable(place, f"run folders have no column {source!r}", f"they have {', '.join(columns)}")
        columns[symbol] = columns[source]
    return RunTable(place, columns, {"router": tuple(row["router"] for row in rows)})


def _row(folder: Path, loss: str | None) -> dict[str, Any]:
    from megascale.config.load import load_config
    from megascale.config.phases import spans
    from megascale.config.resolve import resolve
    from megascale.model.accounting import active_parameters, parameters

    config = resolve(load_config(folder / "config.yaml").config)
    model = config.model
    if len({span.config.model.streams.count for span in spans(config)}) > 1:
        raise BadTable(str(folder), "changed its number of streams on the way, so it is no point of a law of P", "leave it out")
    _check_ended(folder)
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise BadTable(str(folder), "its metrics file holds no step", "leave it out")
    last, counts, experts = records[-1], parameters(model), model.experts
    active = active_parameters(model)
    tokens = float(last["tokens"])
    forward = float(last["flops_total"]) / tokens / 3  # a backward pass counts twice the forward pass
    return {
        "N": active - counts.embedding - counts.head,
        "N_with_embeddings": active,
        "N_total": counts.total,
        "D": tokens,
        "C": float(last["flops_total"]),
        "P": model.streams.count,
        "E": experts.count,
        "k": experts.per_token,
        "K": model.altup.blocks,
        "F": forward / 1e12,
        "B": counts.non_embedding / forward,
        "U": _unique_tokens(folder, last, tokens),
        LOSS: _loss(folder, records, loss),
        "router": experts.router if experts.count > 1 else "dense",
    }


def _check_ended(folder: Path) -> None:
    """Refuse runs that stopped half way: their learning rate had not come down, so they are no points of a law of D."""
    path = folder / "exit.json"
    try:
        reason = json.loads(path.read_text(encoding="utf-8")).get("reason")
    except FileNotFoundError:
        reason = "still running, or killed"
    except (ValueError, AttributeError) as error:
        raise BadTable(str(path), f"cannot be read: {error}", "restore it, or leave the run out") from error
    if reason != "done":
        raise BadTable(
            str(folder), f"did not reach its end ({reason}), so it is no point of a law of D", "finish it or leave it out"
        )


def _loss(folder: Path, records: list[dict[str, Any]], metric: str | None) -> float:
    """The last value of a validation loss, or the mean training loss of the last records."""
    if metric is None:
        found = sorted({name for record in records for name in record if name.startswith("val/") and name.endswith("/loss")})
        if len(found) != 1:
            known = ", ".join(found) or "none"
            raise BadTable(str(folder), f"validation losses: {known}", f"choose one: --loss {(found or ['train/lm_loss'])[0]}")
        metric = found[0]
    values = [float(record[metric]) for record in records if metric in record]
    if not values:
        raise BadTable(str(folder), f"never logged {metric}", "choose a loss that all runs have with --loss")
    if not metric.startswith("train/"):
        if metric not in records[-1]:
            raise BadTable(str(folder), f"did not log {metric} at its last step", "validate at the end, or choose another --loss")
        return values[-1]
    return float(np.mean(values[-max(1, round(_TAIL * len(values))) :]))


def _unique_tokens(folder: Path, last: Mapping[str, Any], tokens: float) -> float:
    """Tokens seen, each source's divided by its epochs above one."""
    shares = {name.removeprefix("data/share/"): float(value) for name, value in last.items() if name.startswith("data/share/")}
    if not shares:
        raise BadTable(str(folder), "logged no data/share/ metrics, so its unique tokens are not known", "leave it out")
    return sum(share * tokens / max(float(last[f"data/epoch/{source}"]), 1.0) for source, share in shares.items())
