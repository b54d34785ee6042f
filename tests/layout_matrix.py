"""The layout matrix: on up to 8 gloo ranks, layouts that together contain every allowed pair of axes, schedules, ZeRO stages and routers.

`python tests/layout_matrix.py` trains each against one process by the rule of `layouts.problems` and writes docs/layout_matrix.md; about
20 minutes on two quiet cores. `--only N` trains the first N. P=2, E=4, K=2 in all of them.

`python tests/layout_matrix.py --pairs 20` instead draws pairs of these layouts, saves in one and resumes in the other: the state must keep
every bit, and the training must go on as if it had never changed. It writes docs/layout_changes.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from corpora import build_corpus  # noqa: E402
from layouts import ADAMW, CUT_ALL, References, Result, change, problems, train  # noqa: E402
from megascale.config.checks import check  # noqa: E402
from megascale.config.errors import InputError  # noqa: E402
from megascale.config.load import load_config  # noqa: E402
from ranks import RankError, RankPool  # noqa: E402
from runs import write_config  # noqa: E402

PAGE, PAGE_OF_CHANGES = ROOT / "docs/layout_matrix.md", ROOT / "docs/layout_changes.md"
MOST_RANKS, LEAST_LAYOUTS = 8, 64
MODEL = "model={width: 32, layers: 4, heads: 4, kv_heads: 4, ffn_width: 64}"
COMMON = (MODEL, *ADAMW, "batch={sequences: 8, micro_batches: 4}")
SEVERAL_STAGES = ("interleaved", "zero_bubble")
Choice = Mapping[str, str]

CHOICES: dict[str, tuple[str, ...]] = {
    "pipeline": ("-", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"),
    "dp": ("1", "2"),
    "stream": ("1", "2"),
    "context": ("-", "all_gather", "ulysses"),
    "tp": ("1", "2"),
    "ep": ("1", "2", "4"),
    "etp": ("1", "2"),
    "zero": ("0", "1", "2", "3"),
    "recompute": ("none", "layer"),
    "router": ("softmax", "sigmoid", "s_base", "rl_r", "hash"),
}


def ranks_of(choice: Choice) -> int:
    """The world of a layout."""
    pipeline, context = 1 + (choice["pipeline"] != "-"), 1 + (choice["context"] != "-")
    return pipeline * context * prod(int(choice[axis]) for axis in ("dp", "stream", "tp"))


def settings_of(choice: Choice) -> tuple[str, ...]:
    """Overrides of a run in this layout."""
    values = {axis: choice[axis] for axis in ("dp", "stream", "tp", "ep", "etp", "recompute")} | {"zero_stage": choice["zero"]}
    if choice["pipeline"] != "-":
        values |= {"pp": "2", "schedule": choice["pipeline"]}
    if choice["pipeline"] in SEVERAL_STAGES:
        values |= {"virtual_stages": "2"}
    if choice["context"] != "-":
        values |= {"cp": "2", "context": choice["context"]}
    parallel = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"parallel={{{parallel}}}", *([CUT_ALL] if choice["zero"] == "3" else [])


def router_of(choice: Choice) -> str:
    """The override of the router."""
    return f"model.experts.router={choice['router']}"


class Matrix:
    """The layouts that the checks of the config allow."""

    def __init__(self, folder: Path, corpus: Path):
        self.base = write_config(folder, corpus)
        self.known: dict[tuple[str, ...], bool] = {}

    def allows(self, choice: Choice) -> bool:
        """Whether this is a layout of at most 8 ranks that is not refused."""
        key = tuple(choice[name] for name in CHOICES)
        if key not in self.known:
            self.known[key] = ranks_of(choice) <= MOST_RANKS and not self._refused(choice)
        return self.known[key]

    def _refused(self, choice: Choice) -> bool:
        sizes = (MODEL, "model.streams={count: 2, prefix_tokens: 4}", "model.experts={count: 4}", "model.altup={blocks: 2}")
        batch = "batch={sequences: 8, micro_batches: 4}"
        try:
            check(load_config(self.base, (*sizes, batch, router_of(choice), *settings_of(choice))), ranks_of(choice))
        except InputError:
            return True
        return False

    def layouts(self) -> list[dict[str, str]]:
        """Greedily, so that every pair of choices that some layout has is in one of these; then others at random, the same every time."""
        generator = random.Random(1)
        every = [dict(zip(CHOICES, values, strict=True)) for values in _random_choices(generator, 6000)]
        allowed = [choice for choice in every if ranks_of(choice) > 1 and self.allows(choice)]
        missing = set().union(*(_pairs(choice) for choice in allowed))
        found: list[dict[str, str]] = []
        while missing:
            best = max(allowed, key=lambda choice: len(missing & _pairs(choice)))
            found.append(best)
            missing -= _pairs(best)
        others = [choice for choice in allowed if choice not in found]
        return found + generator.sample(others, max(LEAST_LAYOUTS - len(found), 0))


def _random_choices(generator: random.Random, count: int) -> list[tuple[str, ...]]:
    found = {tuple(generator.choice(values) for values in CHOICES.values()) for _ in range(count)}
    return sorted(found)


def _pairs(choice: Choice) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(combinations(choice.items(), 2))


def distance(found: Result, reference: Result) -> tuple[float, float]:
    """The largest relative difference in loss and norm, and the largest distance of a weight over the way it went."""
    curve = max(abs(a - b) / abs(b) for x, y in zip(found.curve, reference.curve, strict=True) for a, b in zip(x, y, strict=True))
    ways = ((found.end[name] - w).norm() / (w - reference.start[name]).norm() for name, w in reference.end.items())
    return curve, max(float(way) for way in ways)


def page(rows: list[str], right: int, count: int) -> str:
    """docs/layout_matrix.md."""
    return "\n".join(
        [
            "# The layout matrix",
            "",
            f"Written by `python tests/layout_matrix.py`: {count} layouts on 2 to {MOST_RANKS} gloo ranks that together contain",
            "every allowed pair of choices, each trained for three steps with P=2, E=4, K=2 in fp32 and compared with one process.",
            f"The rule: loss and norm within 1e-5, every weight within a thousandth of the way it went. {right} of {count} keep it.",
            "",
            "| ranks | " + " | ".join(CHOICES) + " | loss and norm | weights | |",
            "| --- |" + " --- |" * (len(CHOICES) + 3),
            *rows,
            "",
        ]
    )  # fmt: skip


def page_of_changes(rows: list[str], right: int, count: int) -> str:
    """docs/layout_changes.md."""
    return "\n".join(
        [
            "# Saved in one layout, resumed in another",
            "",
            f"Written by `python tests/layout_matrix.py --pairs {count}`: pairs of layouts drawn from those of",
            "[the layout matrix](layout_matrix.md). Two steps in the first, then three in the second, with P=2, E=4, K=2 in fp32.",
            "What the second loads and saves again must be what the first has saved, to the bit: weights, moments, step counts, buffers;",
            f"and the curve and the last weights those of one process that never stopped, by the rule there. {right} of {count} keep it.",
            "",
            "| saved in | resumed in | router | tensors with other bits | loss and norm | weights | |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )  # fmt: skip


class Bench:
    """Where layouts are trained, and one process's run for each router to compare with."""

    def __init__(self, folder: Path):
        self.folder, self.corpus, self.pool = folder, build_corpus(folder / "words"), RankPool()
        self.one = References(self.pool, folder, self.corpus, *COMMON)

    def layout(self, choice: Choice, number: int) -> tuple[str, bool]:
        """A row of the page, and whether the layout keeps the rule."""
        world, settings = way_of(choice)
        found = train(self.pool, self.folder, self.corpus, world, f"layout-{number}", *settings)
        reference = self.one(router_of(choice))
        wrong, (curve, way) = problems(found, reference), distance(found, reference)
        return f"| {world} | " + " | ".join(choice.values()) + f" | {curve:.0e} | {way:.0e} | {'; '.join(wrong)} |", not wrong

    def change(self, first: Choice, second: Choice, number: int) -> tuple[str, bool]:
        """A row of the page of changes, and whether the pair keeps the rule."""
        found, other = change(self.pool, self.folder, self.corpus, way_of(first), way_of(second), f"change-{number}")
        reference = self.one(router_of(first), steps=5)
        wrong, (curve, way) = problems(found, reference), distance(found, reference)
        cells = (short(first), short(second), first["router"], str(len(other)), f"{curve:.0e}", f"{way:.0e}", "; ".join(wrong))
        return f"| {' | '.join(cells)} |", not wrong and not other


def way_of(choice: Choice) -> tuple[int, tuple[str, ...]]:
    """Ranks and overrides of a layout."""
    return ranks_of(choice), (*COMMON, router_of(choice), *settings_of(choice))


def short(choice: Choice) -> str:
    """A layout in few words."""
    plain = {"-", "none"}
    words = [f"{axis}{choice[axis]}" for axis in ("dp", "stream", "tp", "ep", "etp") if choice[axis] != "1"]
    words += [choice[name] for name in ("pipeline", "context") if choice[name] not in plain]
    words += [f"ZeRO {choice['zero']}"] + ["recompute"] * (choice["recompute"] != "none")
    return ", ".join(words)


def pairs(layouts: list[dict[str, str]], count: int) -> list[tuple[dict[str, str], dict[str, str]]]:
    """Random pairs of layouts with the same router, the same every time."""
    generator, found = random.Random(2), []
    while len(found) < count:
        first = generator.choice(layouts)
        others = [choice for choice in layouts if choice["router"] == first["router"] and choice != first]
        found.append((first, generator.choice(others)))
    return found


def main() -> None:
    """Train the matrix, or the pairs, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="train the first so many and write nothing")
    parser.add_argument("--pairs", type=int, help="so many changes from one layout to another instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench, rows, right = Bench(Path(name)), [], 0
        layouts = Matrix(bench.folder, bench.corpus).layouts()
        jobs: list[Callable[[int], tuple[str, bool]]] = [partial(bench.layout, choice) for choice in layouts]
        if given.pairs is not None:
            jobs = [partial(bench.change, first, second) for first, second in pairs(layouts, given.pairs)]
        for number, job in enumerate(jobs[: given.only], 1):
            try:
                row, kept = job(number)
            except RankError as error:  # the others are worth knowing
                row, kept = f"| {number}: {str(error).splitlines()[-1]} |", False
            rows.append(row)
            right += kept
            print(f"{number} of {len(jobs)}: {row}", flush=True)
        bench.pool.close()
        if given.only is None and given.pairs is None:
            PAGE.write_text(page(rows, right, len(rows)))
        elif given.only is None:
            PAGE_OF_CHANGES.write_text(page_of_changes(rows, right, len(rows)))
        print(f"{right} of {len(rows)} keep the rule")
    sys.exit(right < len(rows))


if __name__ == "__main__":
    main()
