"""Laws, fits and comparisons as facts (for JSON) and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megascale.laws.form import Form
from megascale.laws.law import Law, printed_error, rounding_effects

_FACTS = Mapping[str, Any]


def law_line(law: Law) -> dict[str, Any]:
    """A law in a list."""
    predicts = [quantity.name for quantity in law.quantities]
    return {"law": law.name, "title": law.title, "source": law.source, "evidence": law.evidence, "predicts": predicts}


def laws_text(lines: Sequence[_FACTS]) -> str:
    """The list of laws."""
    cells = [
        [line["law"], line["title"], line["evidence"], line["predicts"][0], line["source"].split(",")[0].split(":")[-1].strip()]
        for line in lines
    ]
    return (
        _table(["law", "title", "evidence", "predicts", "source"], cells)
        + "\n`megascale laws show LAW` has the rest; `--forms` lists what can be fitted"
    )


def form_facts(form: Form) -> dict[str, Any]:
    """A form in a list."""
    return {
        "form": form.name,
        "formula": form.formula,
        "inputs": list(form.inputs),
        "parameters": list(form.names),
        "size": form.size,
    }


def forms_text(forms: Sequence[_FACTS]) -> str:
    """The list of forms."""
    return _table(
        ["form", "inputs", "parameters", "formula"],
        [[f["form"], ",".join(f["inputs"]), str(len(f["parameters"])), f["formula"]] for f in forms],
    )


def law_facts(law: Law) -> dict[str, Any]:
    """All of an entry."""
    rounding = rounding_effects(law)
    return {
        "law": law.name,
        "title": law.title,
        "formula": law.formula,
        "source": law.source,
        "evidence": law.evidence,
        "corpus": law.corpus,
        "log_base": law.log_base,
        "constants": {
            name: {"value": c.value, "printed": c.printed or None, "note": c.note or None, "rounding_effects": rounding.get(name)}
            for name, c in law.constants.items()
        },
        "printed_error": printed_error(law),
        "inputs": {s: {"meaning": v.meaning, "unit": v.unit, "low": v.low, "high": v.high} for s, v in law.variables.items()},
        "predicts": [
            {"quantity": q.name, "unit": q.unit, "inputs": list(q.inputs), "meaning": q.meaning, "dimensionless": q.dimensionless}
            for q in law.quantities
        ],
        "fitted_by": law.form.name if law.form else None,
        "notes": list(law.notes),
    }


def law_text(facts: _FACTS) -> str:
    """An entry."""
    lines = [f"{facts['law']}: {facts['title']}", f"  {facts['formula']}", f"  source    {facts['source']} ({facts['evidence']})"]
    lines += [f"  corpus    {facts['corpus']}", f"  logs      base {facts['log_base']}", "  constants"]
    for name, constant in facts["constants"].items():
        printed = (
            f" (printed {constant['printed']})" if constant["printed"] and float(constant["printed"]) != constant["value"] else ""
        )
        effects = ", ".join(
            f"{name} by {effect:.2%}" for name, effect in (constant["rounding_effects"] or {}).items() if effect >= 1e-3
        )
        rounding = f"  half a unit of the last digit moves {effects}" if effects else ""
        note = f"  {constant['note']}" if constant["note"] else ""
        lines.append(f"    {name:<8} {constant['value']:.6g}{printed}{rounding}{note}")
    if facts["printed_error"] is not None:
        lines.append(f"    as printed the law would predict {facts['printed_error']:+.2%} in the middle of its range")
    if not any(constant["printed"] for constant in facts["constants"].values()):
        lines.append("    these are of our fit: there are no printed digits whose rounding could matter")
    lines.append("  inputs")
    for symbol, v in facts["inputs"].items():
        span = f"{v['low']:.4g} to {v['high']:.4g}" if np.isfinite(v["high"]) else "no range stated"
        lines.append(f"    {symbol:<8} {v['meaning']} [{v['unit']}], {span}")
    lines.append("  predicts")
    for q in facts["predicts"]:
        lines.append(
            f"    {q['quantity']} ({q['unit']}) from {', '.join(q['inputs']) or 'nothing'}{': ' + q['meaning'] if q['meaning'] else ''}"
        )
    return "\n".join([*lines, "  notes", *(f"    - {note}" for note in facts["notes"])])


def predictions_text(facts: _FACTS) -> str:
    """Predictions and disagreements."""
    cells = []
    for row in facts["predictions"]:
        given = " ".join(f"{symbol}={value:.6g}" for symbol, value in row["inputs"].items())
        interval = f"[{row['low']:.5g}, {row['high']:.5g}]" if "low" in row else ""
        derived = {s: f"derived {s} = {value:.4g}" for s, value in row.get("derived", {}).items()}
        outside = "; ".join(
            f"{derived.get(s, s)} outside {low:.4g} to {high:.4g}" for s, (low, high) in row["out_of_range"].items()
        )
        cells.append(
            [
                row["law"],
                given,
                row["quantity"],
                f"{row['value']:.6g}",
                interval,
                row["unit"],
                "OUT OF RANGE: " + outside if outside else "",
            ]
        )
    lines = [_table(["law", "at", "quantity", "value", "95 %", "unit", ""], cells)]
    for found in facts["disagreements"]:
        if "not_compared" in found:
            groups = " | ".join(", ".join(laws) for laws in found["groups"])
            lines.append(f"{found['quantity']} is not compared between {groups}: {found['not_compared']}")
            continue
        values = ", ".join(f"{law} {value:.4g}" for law, value in found["values"].items())
        given = " ".join(f"{symbol}={value:.4g}" for symbol, value in found["inputs"].items())
        lines.append(f"the laws disagree by a factor of {found['spread']:.3g} on {found['quantity']} at {given}: {values}")
    return "\n".join(lines)


def study_text(facts: _FACTS) -> str:
    """A fit and its diagnosis."""
    lines = [f"{facts['form']}: {facts['formula']}", f"{facts['runs']} runs of {facts['place']}", *facts["notes"]]
    cells = [[name, f"{p['value']:.6g}", _interval(p["low"], p["high"])] for name, p in facts["parameters"].items()]
    lines += [_table(["parameter", "value", "95 % (bootstrap over runs)"], cells)]
    lines.append(_errors(facts))
    lines.append(
        f"R2 {facts['r_squared']:.4f}; Huber delta {facts['huber_delta']:.2g}; {facts['starts_at_optimum']} starts at the optimum"
    )
    lines.append(_identifiability(facts))
    if facts["at_zero"]:
        lines.append(f"driven to zero: {', '.join(facts['at_zero'])}: the runs ask for a form without it")
    if facts["bootstrap"]["failed"]:
        lines.append(f"{facts['bootstrap']['failed']} resamples gave no fit and are not in the intervals")
    return "\n".join(lines)


def comparison_text(rows: Sequence[_FACTS]) -> str:
    """Forms by held-out error."""
    cells = [
        [r["form"], str(r["parameters"]), f"{r['rmsle']:.5f}", f"{r['leave_one_out_rmsle']:.5f}", _held(r["largest_size"], short=True),
         f"{r['condition']:.0f}", "best" if i == 0 else f"{r['worse_share']:.0%}"]
        for i, r in enumerate(rows) if "refused" not in r
    ]  # fmt: skip
    table = _table(["form", "parameters", "fit", "left out", "largest size", "condition", "worse than the best in"], cells)
    refused = [f"{r['form']} refused: {r['refused']}\n  -> {r['remedy']}" for r in rows if "refused" in r]
    return "\n".join(
        [
            table,
            "errors are RMSLE, natural log; the last column counts resamples of the runs: near 50 % they cannot decide",
            *refused,
        ]
    )


def routers_text(facts: _FACTS) -> str:
    """Routers beside each other."""
    lines = []
    for name, router in facts["routers"].items():
        lines.append(f"{name}: {router['runs']} runs; {_errors(router)}")
        cells = [[p, f"{v['value']:.5g}", _interval(v["low"], v["high"])] for p, v in router["parameters"].items()]
        cutoff = router["cutoff"]
        cells.append(["N_cutoff", f"{cutoff['value']:.3g}", _interval(cutoff["low"], cutoff["high"])])
        for e in router["effective_parameters"]:
            flag = f"  OUT OF RANGE: {', '.join(e['out_of_range'])}" if e["out_of_range"] else ""
            label = f"Nbar({e['N']:.4g}, {e['E']:.4g})"
            cells.append([label, f"{e['effective_parameters']:.4g}", _interval(e["low"], e["high"]) + flag])
        lines += [_table(["", "value", "95 %"], cells), _identifiability(router), ""]
    best = ", ".join(f"{name} in {count}" for name, count in facts["best"].items())
    lines.append(f"lowest measured loss, of {len(facts['cells'])} cells: {best}")
    for cell in facts["cells"]:
        losses = " < ".join(f"{name} {cell['losses'][name]:.4f}" for name in cell["order"])
        lines.append(f"  N={cell['N']:.4g} E={cell['E']:.4g}: {losses}")
    for point in facts["predicted"]:
        losses = " < ".join(f"{name} {point['losses'][name]:.4f}" for name in point["order"])
        share = "" if point["first_is_best_share"] is None else f" (first in {point['first_is_best_share']:.0%} of resamples)"
        lines.append(f"predicted at N={point['N']:.4g} E={point['E']:.4g}: {losses}{share}")
    return "\n".join(lines)


def _errors(facts: _FACTS) -> str:
    held = _held(facts["largest_size"])
    return f"error (RMSLE): fit {facts['rmsle']:.5f}, left out one at a time {facts['leave_one_out_rmsle']:.5f}, {held}"


def _identifiability(facts: _FACTS) -> str:
    weak = "; ".join(", ".join(group) for group in facts["weak"])
    return f"condition {facts['condition']:.0f}" + (
        f"; move together: {weak} (use predictions, not single values)" if weak else ""
    )


def _held(held: Any, short: bool = False) -> str:
    if isinstance(held, str):
        return held if not short else "not possible"
    text = f"{held['rmsle']:.5f} ({held['bias']:+.2%})"
    return text if short else f"largest {held['symbol']} ({held['runs']} runs) {text}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.4g}, {high:.4g}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )
