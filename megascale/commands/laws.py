"""`megascale laws`: published scaling laws, predictions, fits of runs, comparisons, plots."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands.written import check_writable, save
from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.laws.fit import FitOptions
    from megascale.laws.table import RunTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="laws_verb", required=True, metavar="VERB")
    listed = _verb(verbs, "list", "the published laws, or what can be fitted")
    listed.add_argument("--forms", action="store_true", help="list the forms that can be fitted instead")
    show = _verb(verbs, "show", "formula, source, constants, range and known problems of a law")
    show.add_argument("law", metavar="LAW")
    predict = _verb(verbs, "predict", "what laws say at some inputs, what is out of range, where they disagree")
    predict.add_argument("law", nargs="+", metavar="LAW|FIT.json", help="names of laws, or one file saved by fit --save")
    _add_at(predict, "inputs: N=1e9 D=2e10,2e11; every combination is predicted")
    fit = _verb(verbs, "fit", "fit a form to runs, with intervals, held-out errors and what the runs cannot separate")
    fit.add_argument("form", metavar="FORM", help="a name of `megascale laws list --forms`")
    _add_runs(fit, required=True)
    _add_fit_options(fit)
    fit.add_argument("--save", type=Path, metavar="FILE.json", help="keep the fit, for predict")
    compare = _verb(verbs, "compare", "competing forms on held-out error, or routers beside each other")
    compare.add_argument("form", nargs="*", metavar="FORM", help="two or more forms")
    compare.add_argument("--routers", action="store_true", help="fit the routed law to each router instead; --at N=... E=...")
    _add_runs(compare, required=True)
    _add_fit_options(compare)
    _add_at(compare, "with --routers: sizes and experts at which routers are compared")
    plot = _verb(verbs, "plot", "a law, or a fit with its runs and intervals, as a picture", with_json=False)
    plot.add_argument("law", metavar="LAW|FORM", help="a law; with --runs a form")
    plot.add_argument("--x", required=True, metavar="SYMBOL", help="input on the axis")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")
    _add_at(plot, "the other inputs of a law, a line for each combination")
    _add_runs(plot, required=False)
    _add_fit_options(plot)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: an unknown law or form, inputs that determine nothing, runs that cannot carry a fit.
    """
    {"list": _list, "show": _show, "predict": _predict, "fit": _fit, "compare": _compare, "plot": _plot}[arguments.laws_verb](
        arguments
    )
    return 0


def _verb(verbs: Any, name: str, meaning: str, with_json: bool = True) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=meaning, description=meaning)
    if with_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_at(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--at", action="extend", nargs="+", default=[], metavar="SYMBOL=VALUE[,VALUE]", help=meaning)


def _add_runs(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        required=required,
        metavar="PATH",
        help="a csv file (.gz too), or run folders or metrics.jsonl files",
    )
    parser.add_argument(
        "--format",
        choices=("table", "routed-lm"),
        default="table",
        help="routed-lm: the published curves.csv.gz of routed models",
    )
    parser.add_argument(
        "--map",
        action="extend",
        nargs="+",
        default=[],
        metavar="SYMBOL=COLUMN",
        help="columns of the file, or a number for all rows: D=130e9",
    )
    parser.add_argument("--where", action="extend", nargs="+", default=[], metavar="COLUMN=VALUE[,VALUE]", help="rows to keep")
    parser.add_argument("--run", metavar="COLUMN", help="names the run in files with a row an evaluation: the last one counts")
    parser.add_argument("--loss", metavar="METRIC", help="of run folders (default: their only val/.../loss)")


def _add_fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--delta", type=float, help="of the Huber loss, in log loss (default: from the residuals; papers use 0.001)"
    )
    parser.add_argument(
        "--bootstrap", type=int, default=200, metavar="COUNT", help="resamples of the runs for intervals (default: 200)"
    )
    parser.add_argument("--starts", type=int, default=32, help="of the search (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and resamples (default: 0)")


def _list(arguments: argparse.Namespace) -> None:
    from megascale.laws import report
    from megascale.laws.registry import FORMS, LAWS

    facts = (
        [report.form_facts(form) for form in FORMS.values()]
        if arguments.forms
        else [report.law_line(law) for law in LAWS.values()]
    )
    _print(arguments, facts, report.forms_text if arguments.forms else report.laws_text)


def _show(arguments: argparse.Namespace) -> None:
    from megascale.laws import report
    from megascale.laws.registry import law_named

    _print(arguments, report.law_facts(law_named(arguments.law)), report.law_text)


def _predict(arguments: argparse.Namespace) -> None:
    from megascale.laws import report
    from megascale.laws.predict import disagreements, predict, predict_saved
    from megascale.laws.registry import law_named
    from megascale.laws.study import load

    at = _numbers(arguments.at)
    saved = [name for name in arguments.law if name.endswith(".json")]
    if saved and len(arguments.law) > 1:
        raise InputError(
            "predict", "a saved fit beside other laws", "predict with it alone: losses of different corpora are not compared"
        )
    if saved:
        facts: dict[str, Any] = {"predictions": predict_saved(load(Path(saved[0])), at), "disagreements": []}
    else:
        rows = predict([law_named(name) for name in dict.fromkeys(arguments.law)], at)
        facts = {"predictions": rows, "disagreements": disagreements(rows)}
    _print(arguments, facts, report.predictions_text)


def _fit(arguments: argparse.Namespace) -> None:
    from megascale.laws import report
    from megascale.laws.registry import form_named
    from megascale.laws.study import document, study

    form_named(arguments.form)
    if arguments.save is not None:
        if arguments.save.suffix != ".json":
            raise InputError(
                "--save", f"{arguments.save} does not end in .json", "name it so: other commands tell fits from laws by it"
            )
        check_writable(arguments.save, "--save")
    found = study(arguments.form, _table(arguments), _options(arguments), arguments.bootstrap)
    _print(arguments, found.facts(), report.study_text)
    if arguments.save is not None:
        save(arguments.save, document(found), "--save")


def _compare(arguments: argparse.Namespace) -> None:
    from megascale.laws import report
    from megascale.laws.compare import compare_forms
    from megascale.laws.predict import grid
    from megascale.laws.registry import form_named
    from megascale.laws.routers import compare_routers

    if arguments.routers:
        at = _numbers(arguments.at)
        if arguments.form or set(at) - {"N", "E"} or len(at) == 1:
            raise InputError(
                "compare --routers", "takes no forms, and --at with N and E only", "for example: --at N=370e6,1.3e9 E=64,128"
            )
        points = [(point["N"], point["E"]) for point in grid(at)] if at else []
        _print(
            arguments, compare_routers(_table(arguments), points, _options(arguments), arguments.bootstrap), report.routers_text
        )
        return
    if len(set(arguments.form)) < 2 or arguments.at:
        raise InputError("compare", "needs two forms or more, and no --at", "name them, or compare routers: --routers")
    for name in arguments.form:
        form_named(name)
    _print(
        arguments,
        compare_forms(list(dict.fromkeys(arguments.form)), _table(arguments), _options(arguments)),
        report.comparison_text,
    )


def _plot(arguments: argparse.Namespace) -> None:
    from megascale.laws.plots import plot_law, plot_study
    from megascale.laws.registry import form_named, law_named
    from megascale.laws.study import study

    if not arguments.out.suffix:
        raise InputError("--out", f"{arguments.out} has no ending", "give a path that ends in .png, .pdf or .svg")
    check_writable(arguments.out, "--out")
    if arguments.runs is not None:
        form_named(arguments.law)
    if arguments.runs is None:
        plot_law(law_named(arguments.law), arguments.x, _numbers(arguments.at), arguments.out)
    elif arguments.at:
        raise InputError("--at", "has no effect with --runs: the runs say which lines are drawn", "leave one of them out")
    else:
        plot_study(study(arguments.law, _table(arguments), _options(arguments), arguments.bootstrap), arguments.x, arguments.out)
    print(f"wrote {arguments.out}")


def _table(arguments: argparse.Namespace) -> RunTable:
    from megascale.laws.routed_data import read_routed
    from megascale.laws.run_folders import read_table

    where = {column: tuple(values.split(",")) for column, values in _pairs(arguments.where, "--where").items()}
    mapping = _pairs(arguments.map, "--map")
    if arguments.format == "table":
        return read_table(arguments.runs, mapping, where, arguments.run, arguments.loss)
    if mapping or where or arguments.run or arguments.loss or len(arguments.runs) != 1:
        raise InputError(
            "--format routed-lm", "knows its columns and rows", "give one file and no --map, --where, --run or --loss"
        )
    return read_routed(arguments.runs[0])


def _options(arguments: argparse.Namespace) -> FitOptions:
    from megascale.laws.fit import FitOptions

    if arguments.delta is not None and not arguments.delta > 0:
        raise InputError("--delta", f"{arguments.delta} is not positive", "give for example 0.001")
    if arguments.bootstrap < 0 or arguments.starts < 1:
        raise InputError("--bootstrap, --starts", "counts are too small", "give a bootstrap of 0 or more and at least one start")
    if arguments.seed < 0:
        raise InputError("--seed", f"{arguments.seed} is negative", "give 0 or more")
    return FitOptions(arguments.delta, arguments.starts, arguments.seed)


def _pairs(words: list[str], option: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in words]
    for (left, equals, right), word in zip(pairs, words, strict=True):
        if not (left and equals and right):
            raise InputError(f"{option} {word}", "is no NAME=VALUE", f"write {option} NAME=VALUE")
    names = [left for left, _, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{option} {name}", "is given more than once", f"give it once; several values as {name}=VALUE,VALUE")
    return {left: right for left, _, right in pairs}


def _numbers(words: list[str]) -> dict[str, list[float]]:
    found = {}
    for symbol, text in _pairs(words, "--at").items():
        try:
            found[symbol] = [float(value) for value in text.split(",")]
        except ValueError as error:
            raise InputError(
                f"--at {symbol}", f"{text!r} is no number", "write numbers with commas between: N=1e9,2e9"
            ) from error
    return found


def _print(arguments: argparse.Namespace, facts: Any, text: Any) -> None:
    print(json.dumps(_plain(facts), indent=1, allow_nan=False) if arguments.json else text(facts))


def _plain(value: Any) -> Any:
    """JSON has no infinity and no nan: they become text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if not isinstance(value, float) or value - value == 0 else str(value)
