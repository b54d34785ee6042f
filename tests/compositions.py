"""What composes with what: features of a run, the checks' verdict on every pair, and few runs that train every pair that is allowed.

`python tests/compositions.py` writes the table into docs/composition.md; the tests fail when it is not up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from megascale.config.checks import check  # noqa: E402
from megascale.config.errors import InputError  # noqa: E402
from megascale.config.load import validate  # noqa: E402
from megascale.config.overrides import apply_override  # noqa: E402
from megascale.config.tree import Tree  # noqa: E402

PAGE = ROOT / "docs/composition.md"
MOST_RANKS = 4
BASE = """
model: {width: 32, layers: 4, heads: 4, kv_heads: 2, ffn_width: 64, vocab_size: 256}
data: {sequence_length: 32}
batch: {sequences: 8, micro_batches: 2}
optimizer: {lr: 0.003, eps: 1.0e-5}
schedule: {steps: 3, warmup_steps: 0}
compile: "off"
parallel: {zero_stage: 0}
validation: {every: 0}
checkpoint: {every: 0}
observe: {wandb: {mode: "off"}}
"""


@dataclass(frozen=True)
class Feature:
    """Something that a run can have."""

    settings: tuple[str, ...]
    choice: str = ""
    """features of one choice exclude each other by their meaning"""
    needs: str = ""
    """a feature without which this one means nothing"""
    ranks: int = 1
    """multiplies the ranks of the run"""
    layout: bool = False
    """changes how the run is computed, not what: the run must be that of one process without it"""
    rounds: bool = False
    """computes in bf16: the run is that of one process only as far as rounding allows"""


BY_WIDTH = "tensor parallel, width of experts too"
FEATURES: dict[str, Feature] = {
    "P streams": Feature(("model.streams.count=2", "model.streams.prefix_tokens=4")),
    "two phases, P = 1 first": Feature(
        ("schedule={phases: [{steps: 1, streams: 1, shape: constant}, {steps: 2, shape: constant}]}",), needs="P streams"
    ),
    "P: quiet start": Feature(("model.streams.prefix_start=quiet",), needs="P streams"),
    "P: prefix network": Feature(("model.streams.reparameterise=8",), needs="P streams"),
    **{
        f"experts: {router}": Feature(
            ("model.experts.count=4", "model.experts.width=16", f"model.experts.router={router}"), choice="router"
        )
        for router in ("softmax", "sigmoid", "s_base", "rl_r", "hash")
    },
    "k = 2": Feature(("model.experts.per_token=2",), needs="experts: softmax"),
    "capacity": Feature(("model.experts.capacity_factor=1.25",), needs="experts: softmax"),
    "shared expert": Feature(("model.experts.shared=1",), needs="experts: softmax"),
    "every second layer routed": Feature(("model.experts.every=2", "model.experts.offset=1"), needs="experts: softmax"),
    "K blocks": Feature(("model.altup.blocks=2",)),
    "K: read predicted": Feature(("model.altup.read=predicted",), needs="K blocks"),
    "K: same block": Feature(("model.altup.select=same",), choice="block", needs="K blocks"),
    "K: blocks by period": Feature(("model.altup.select=by_period",), choice="block", needs="K blocks"),
    "K: wide": Feature(("model.altup.form=wide",), needs="K blocks"),
    "K: coefficients by token": Feature(("model.altup.coefficients=token",), needs="K blocks"),
    "every second token (Sequence-AltUp)": Feature(("model.altup.form=sequence", "model.altup.stride=2")),
    "tied embeddings": Feature(("model.tie_embeddings=true",)),
    "q/k norm, biases": Feature(("model.qk_norm=true", "model.qkv_bias=true")),
    "sliding window": Feature(("model.sliding_window=8",)),
    "whole-sequence attention": Feature(("data.attention=causal",)),
    "bf16": Feature(("precision=bf16",), rounds=True),
    "Muon": Feature(("optimizer.name=muon",), rounds=True),
    "batch ramp": Feature(("batch.ramp=[{steps: 1, sequences: 4}]",)),
    "recompute: layer": Feature(("parallel.recompute=layer",), choice="recompute", layout=True),
    "recompute: stream": Feature(("parallel.recompute=stream",), choice="recompute", needs="P streams", layout=True),
    "data parallel": Feature((), ranks=2, layout=True),
    "tensor + sequence parallel": Feature(("parallel.tp=2",), choice="tensor", ranks=2, layout=True),
    BY_WIDTH: Feature(("parallel.tp=2", "parallel.etp=2"), choice="tensor", needs="experts: softmax", ranks=2, layout=True),
    "pipeline, 1F1B": Feature(("parallel.pp=2",), choice="pipeline", ranks=2, layout=True),
    "pipeline, interleaved": Feature(
        ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"), choice="pipeline", ranks=2, layout=True
    ),
    # dualpipev has the stages and the split of zbv, and needs more micro-batches than the other features of these runs
    **{
        f"pipeline, {schedule}": Feature(
            ("parallel.pp=2", f"parallel.schedule={schedule}"), choice="pipeline", ranks=2, layout=True
        )
        for schedule in ("zero_bubble", "zbv")
    },
    "context parallel, all-gather": Feature(("parallel.cp=2",), choice="context", ranks=2, layout=True),
    "context parallel, Ulysses": Feature(("parallel.cp=2", "parallel.context=ulysses"), choice="context", ranks=2, layout=True),
    "stream parallel": Feature(("parallel.stream=2",), needs="P streams", ranks=2, layout=True),
    "expert parallel": Feature(("parallel.ep=2",), needs="experts: softmax", layout=True),
    "ZeRO 1": Feature(("parallel.zero_stage=1",), choice="engine", layout=True),
    "ZeRO 2": Feature(("parallel.zero_stage=2",), choice="engine", layout=True),
    "ZeRO 3": Feature(("parallel.zero_stage=3",), choice="engine", layout=True),
}


def completed(names: Collection[str]) -> tuple[str, ...]:
    """The features with what they need, in the table's order."""
    found = set(names)
    for name in names:
        needed = FEATURES[name].needs
        if needed and not any(other == needed or _alternatives(other, needed) for other in found):
            found.add(needed)
    if "expert parallel" in found:  # experts are spread over ranks that are there already
        spread = [name for name in found if FEATURES[name].ranks > 1 and FEATURES[name].choice != "pipeline" and name != BY_WIDTH]
        found.update([] if spread else ["data parallel"])
    return tuple(name for name in FEATURES if name in found)


def _alternatives(one: str, other: str) -> bool:
    return bool(FEATURES[one].choice) and FEATURES[one].choice == FEATURES[other].choice


def ranks_of(names: Collection[str]) -> int:
    """How many ranks a run with these features takes."""
    ranks = 1
    for name in names:
        ranks *= FEATURES[name].ranks
    return ranks


def settings_of(names: Collection[str]) -> list[str]:
    """Overrides of a run with these features."""
    return [setting for name in FEATURES if name in names for setting in FEATURES[name].settings]


@cache
def refusal(names: tuple[str, ...]) -> str | None:
    """Why the config of a run with these features (`completed`) is refused; none if it is not."""
    tree = Tree(yaml.safe_load(BASE), {})
    for number, setting in enumerate(settings_of(names), 1):
        apply_override(tree, setting, number)
    try:
        check(validate(tree, "base.yaml"), ranks_of(names))
    except InputError as error:
        return _first_reason(error.reason)
    return None


def _first_reason(text: str) -> str:
    """The first problem of a list, without its place."""
    line = text.splitlines()[1].strip() if "\n" in text else text
    return line.split(": ", 2)[2] if line.count(": ") >= 2 else line


def verdict(one: str, other: str) -> str | None:
    """Of a pair: "" if it composes, a reason if it is refused, none if the two exclude each other by their meaning."""
    if _alternatives(one, other):
        return None
    return refusal(completed((one, other))) or ""


def allowed_pairs() -> list[tuple[str, str]]:
    """Every pair that composes."""
    return [pair for pair in combinations(FEATURES, 2) if verdict(*pair) == ""]


def covering_runs() -> list[tuple[str, ...]]:
    """Few runs in which every allowed pair occurs. What rounds joins only runs that are there for its own pairs."""
    exact = [pair for pair in allowed_pairs() if not any(FEATURES[name].rounds for name in pair)]
    precise = [name for name in FEATURES if not FEATURES[name].rounds]
    runs = list(_cover(exact, precise))
    return runs + list(_cover([pair for pair in allowed_pairs() if pair not in exact], list(FEATURES)))


def _cover(pairs: list[tuple[str, str]], names: list[str]) -> Iterator[tuple[str, ...]]:
    """Each run starts with a pair that no run has yet and takes in every feature that fits and brings such a pair."""
    missing = set(pairs)
    for pair in pairs:
        if pair not in missing:
            continue
        run = completed(pair)
        for name in sorted(names, key=lambda name: -sum(name in other for other in missing)):
            wider = completed((*run, name))
            fits = ranks_of(wider) <= MOST_RANKS and not any(_alternatives(*two) for two in combinations(wider, 2))
            gains = any(two in missing for two in combinations(wider, 2) if not set(two) <= set(run))
            if fits and gains and refusal(wider) is None:
                run = wider
        yield run
        missing -= set(combinations(run, 2))
    assert not missing


# The page ---------------------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/composition.md."""
    names = list(FEATURES)
    reasons: dict[str, int] = {}
    rows = list(_rows(names, reasons))
    head = "| | " + " | ".join(str(i) for i in range(1, len(names) + 1)) + " |"
    counts = f"{len(covering_runs())} runs for {len(allowed_pairs())} pairs, on up to {MOST_RANKS} ranks"
    return "\n".join(
        [
            "# What composes with what",
            "",
            "Written by `python tests/compositions.py` from the checks of the config, and kept true by `tests/test_compositions.py`:",
            f"runs that together contain every allowed pair ({counts}) are trained (CI: each 4th). Every parameter must move, and a run",
            "with a layout, an engine or recomputation must be the run of one process without them: loss and gradient norm within 1e-5,",
            "each weight within a thousandth of the way it went (fp32).",
            "",
            "`x` composes, a number is refused for the reason below, `-` are alternatives of one choice.",
            "",
            head,
            "| --- |" + " --- |" * len(names),
            *rows,
            "",
            *(f"{number}. {reason}" for reason, number in reasons.items()),
            "",
        ]
    )


def _rows(names: list[str], reasons: dict[str, int]) -> Iterator[str]:
    for i, one in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            found = verdict(*((one, other) if i < j else (other, one))) if i != j else None
            if j <= i:
                cells.append(" ")
            elif found is None:
                cells.append("-")
            else:
                cells.append(str(reasons.setdefault(found, len(reasons) + 1)) if found else "x")
        yield f"| {i + 1} {one} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
