"""`megascale laws`: every verb prints what it found, as text and as JSON; bad input ends with code 2."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megascale.cli import main
from megascale.laws.registry import form_named, law_named
from megascale.observe.figures import curve

LOSSES = str(Path(str(files("megascale.laws"))) / "data" / "parscale_losses.csv")
PILE = ["--runs", LOSSES, "--where", "corpus=pile", "--starts", "4"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Runs `megascale laws ...`; the printed text, or the JSON document."""

    def run(*words: str) -> Any:
        assert main(["laws", *words]) == 0
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in words else out

    return run


def routers_csv(path: Path) -> Path:
    """Losses that obey the registry's laws of two routers."""
    rows = ["N,E,router,loss"]
    for router, law in (("one", "routed-s-base"), ("two", "routed-hash")):
        for n in np.geomspace(2e7, 1.2e9, 5):
            for e in (1, 2, 8, 32, 128, 512):
                loss = law_named(law).predict("loss", {"N": np.array([n]), "E": np.array([float(e)])})[0]
                if e > 1 or router == "one":
                    rows.append(f"{n},{e},{'dense' if e == 1 else router},{loss:.6f}")
    path.write_text("\n".join(rows) + "\n")
    return path


def test_list_and_show(call) -> None:
    assert "parscale-pile" in call("list") and "routed-floor" in call("list", "--forms")
    assert {"law", "source", "evidence"} <= set(call("list", "--json")[0])
    shown = call("show", "routed-rl-r", "--json")
    assert shown["constants"]["c"]["printed"] == "0.012" and shown["printed_error"] > 0.01
    text = call("show", "routed-rl-r")
    assert "as printed the law would predict +1.20%" in text and "experts" in text
    assert "moves tokens_per_parameter by 0.68%, compute_multiplier by 0.73%" in call("show", "joint-moe")
    assert "no printed digits" in call("show", "utilisation-s-base") and "no printed digits" not in text


def test_predict_flags_what_is_out_of_range_and_says_how_far_laws_disagree(call) -> None:
    found = call("predict", "joint-moe", "ling-leverage", "--at", "C=1e20,1e22", "E=32", "A=0.03125", "G=2", "--json")
    far = [row for row in found["predictions"] if row["law"] == "joint-moe" and row["inputs"]["C"] == 1e22]
    assert far and all(set(row["out_of_range"]) == {"C", "N", "D"} for row in far)
    (near,) = [row for row in found["disagreements"] if row["inputs"]["C"] == 1e20]
    assert near["quantity"] == "compute_multiplier"
    assert near["spread"] == pytest.approx(near["values"]["ling-leverage"] / near["values"]["joint-moe"])
    assert "OUT OF RANGE: N outside" in call("predict", "joint-moe", "--at", "N=1e10", "D=1e10", "E=32")


@pytest.mark.parametrize(
    "law,at,quantity,derived",
    [
        ("chinchilla", ["C=1e22", "I=1e16"], "served_tokens", {"D": 2.51e14, "D/N": 3.158e5}),
        ("chinchilla", ["C=4e22"], "optimal_loss", {"D": 5.59e11}),
        ("sardana", ["C=4e22"], "tokens_per_parameter", {"N": 5.101e10, "D/N": 2.562}),
        ("joint-moe", ["C=1e21", "E=1"], "compute_multiplier", {"N": 5.73e9}),
        ("compute-only", ["BPC=0.45", "D=2e12"], "needed_parameters", {}),
        ("compute-only", ["BPC=0.4", "D=15e12"], "needed_parameters", {"D/N": 823.4}),
    ],
)
def test_what_a_law_derives_itself_is_held_against_its_range_too(call, law, at, quantity, derived) -> None:
    rows = call("predict", law, "--at", *at, "--json")["predictions"]
    (row,) = [row for row in rows if row["quantity"] == quantity]
    assert row["derived"] == pytest.approx(derived, rel=1e-2)
    assert set(row["out_of_range"]) == set(derived)
    text = call("predict", law, "--at", *at)
    for symbol in derived:
        assert f"derived {symbol} = {row['derived'][symbol]:.4g} outside" in text


def test_losses_of_different_corpora_are_not_compared(call) -> None:
    found = call("predict", "parscale-pile", "routed-hash", "--at", "N=1e9", "P=4", "E=8", "--json")["disagreements"]
    assert found == [
        {"quantity": "loss", "groups": [["parscale-pile"], ["routed-hash"]], "not_compared": "measured on different corpora"}
    ]
    same = call("predict", "chinchilla", "besiroglu", "--at", "N=1e9", "D=2e10", "--json")["disagreements"]
    assert {row["quantity"] for row in same} == {"loss", "compute_share"}


def test_a_law_of_another_corpus_silences_no_disagreement(call) -> None:
    words = ["chinchilla", "besiroglu", "sardana", "--at", "N=1e9", "D=2e10", "C=1e21"]
    found = call("predict", *words, "--json")["disagreements"]
    compared = {row["quantity"]: set(row["values"]) for row in found if "values" in row}
    pair = {"chinchilla", "besiroglu"}
    assert compared["loss"] == compared["optimal_loss"] == pair
    # N and D of the optimum are no losses.
    assert compared["optimal_parameters"] == compared["optimal_tokens"] == compared["compute_share"] == pair | {"sardana"}
    assert {row["quantity"] for row in found if "not_compared" in row} == {"loss", "optimal_loss"}
    assert "loss is not compared between besiroglu, chinchilla | sardana: measured" in call("predict", *words)


def test_fit_saves_what_predict_reads(call, tmp_path: Path) -> None:
    saved = str(tmp_path / "fit.json")
    found = call("fit", "parscale", *PILE, "--bootstrap", "20", "--save", saved, "--json")
    k = found["parameters"]["k"]
    assert k["low"] < k["value"] < k["high"] and found["largest_size"]["runs"] == 4
    text = call("fit", "parscale", *PILE, "--bootstrap", "0", "--delta", "0.001")
    assert "R2 0.9987" in text and "left out one at a time" in text
    inside, beyond = call("predict", saved, "--at", "N=1e9", "P=4,16", "--json")["predictions"]
    assert inside["low"] < inside["value"] < inside["high"] and not inside["out_of_range"]
    assert beyond["out_of_range"] == {"P": [1.0, 8.0]}


@pytest.mark.parametrize(
    "name,reason",
    [
        ("no/dir/fit.json", "cannot be written: there is no folder"),
        ("folder.json", "cannot be written: it is a folder"),
        ("fit", "does not end in .json"),
    ],
)
def test_where_a_fit_cannot_be_saved_is_said_before_it_starts(name, reason, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr("megascale.laws.study.study", lambda *_: pytest.fail("the fit was started"))
    assert main(["laws", "fit", "parscale", *PILE, "--save", str(tmp_path / name)]) == 2
    assert f"--save: {tmp_path / name} {reason}" in capsys.readouterr().err


def test_a_folder_is_no_saved_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fit.json").mkdir()
    assert main(["laws", "predict", str(tmp_path / "fit.json"), "--at", "N=1e9", "P=4"]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err


def test_an_option_may_be_repeated(call) -> None:
    """With different symbols: none of them is dropped."""
    (row, _) = call("predict", "parscale-pile", "--at", "N=1e9", "--at", "P=4", "--json")["predictions"]
    assert row["inputs"] == {"N": 1e9, "P": 4}


def test_a_fit_without_resamples_predicts_without_an_interval(call, tmp_path: Path) -> None:
    saved = str(tmp_path / "fit.json")
    call("fit", "parscale", *PILE, "--bootstrap", "0", "--save", saved)
    (row,) = call("predict", saved, "--at", "N=1e9", "P=4", "--json")["predictions"]
    assert row["value"] > 1 and "low" not in row and "high" not in row
    assert "nan" not in call("predict", saved, "--at", "N=1e9", "P=4")


def test_compare_ranks_forms_and_reports_refusals(call) -> None:
    rows = call("compare", "parscale", "parscale-correlation", "chinchilla", *PILE, "--json")
    assert [row["form"] for row in rows] == ["parscale", "parscale-correlation", "chinchilla"]
    assert "no column D" in rows[2]["refused"]
    assert "chinchilla refused" in call("compare", "parscale", "parscale-correlation", "chinchilla", *PILE)


def test_compare_routers(call, tmp_path: Path) -> None:
    options = ["--runs", str(routers_csv(tmp_path / "routers.csv")), "--starts", "4", "--bootstrap", "10"]
    found = call("compare", "--routers", *options, "--at", "N=1e9", "E=64", "--json")
    assert {name: router["runs"] for name, router in found["routers"].items()} == {"one": 30, "two": 30}  # 5 of them dense
    (count,) = found["routers"]["one"]["effective_parameters"]
    # The dense losses are those of one law, so the other's constants bend a little.
    expected = law_named("routed-s-base").predict("effective_parameters", {"N": np.array([1e9]), "E": np.array([64.0])})[0]
    assert count["effective_parameters"] == pytest.approx(expected, rel=1e-3)
    assert found["routers"]["one"]["cutoff"]["value"] == pytest.approx(937e9, rel=0.05)
    assert len(found["cells"]) == 25 and found["best"] == {"one": 25}
    assert found["predicted"][0]["order"] == ["one", "two"]
    text = call("compare", "--routers", *options, "--at", "N=1e9", "E=64")
    assert "N_cutoff" in text and "lowest measured loss, of 25 cells: one in 25" in text


def test_plots(call, tmp_path: Path) -> None:
    call("plot", "parscale-pile", "--x", "N", "--at", "P=1,2,4,8", "--out", str(tmp_path / "law.png"))
    call("plot", "parscale", "--x", "N", *PILE, "--bootstrap", "5", "--out", str(tmp_path / "fit.svg"))
    assert (tmp_path / "law.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "fit.svg").read_text().count("<path") > 20


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The panels that are plotted from here on."""
    kept: list[Axes] = []
    monkeypatch.setattr("megascale.laws.plots.save", lambda axes, _: kept.append(axes))
    return kept


def test_a_plot_draws_what_needs_all_inputs_given(call, drawn: list[Axes]) -> None:
    call("plot", "chinchilla", "--x", "C", "--at", "I=1e12,1e13", "--out", "x.png")
    call("plot", "chinchilla", "--x", "C", "--out", "x.png")
    assert [axes.get_ylabel() for axes in drawn] == ["served_parameters (parameters)", "optimal_parameters (parameters)"]
    # No legend where nothing tells lines apart.
    assert [axes.get_legend() is None for axes in drawn] == [False, True]


def test_a_plot_has_no_values_that_no_model_can_have(call, drawn: list[Axes]) -> None:
    call("plot", "parscale-pile", "--x", "P", "--at", "N=1e9", "--out", "x.png")
    call("plot", "parscale", "--x", "P", *PILE, "--bootstrap", "0", "--out", "x.png")
    call("plot", "ling-leverage", "--x", "A", "--at", "G=2", "C=1e20", "--out", "x.png")
    assert [float(np.min(axes.lines[0].get_xdata())) for axes in drawn[:2]] == pytest.approx([1, 1])
    assert float(np.max(drawn[2].lines[0].get_xdata())) == pytest.approx(1)


def test_a_curve_is_solid_only_inside_its_range() -> None:
    axes = Figure().subplots()
    x, outside = np.array([1.0, 2.0, 3.0]), np.array([True, False, True])
    curve(axes, x, x, outside, "")
    solid, dashed = (np.isfinite(line.get_ydata()) for line in axes.lines)
    assert solid.tolist() == [False, True, False] and dashed.tolist() == [True, False, True]
    assert axes.lines[1].get_linestyle() == "--"


@pytest.mark.parametrize(
    "words,message",
    [
        (["show", "chinchila"], "did you mean chinchilla"),
        (["predict", "chinchilla", "--at", "N=1e9"], "loss needs N, D"),
        (["predict", "chinchilla", "--at", "N=1e9", "E=2"], "is no input of the law"),
        (["predict", "chinchilla", "--at", "N=x"], "is no number"),
        (["predict", "chinchilla", "--at", "N=-1", "D=1e9"], "not a positive number"),
        (["predict", "chinchilla", "--at", "C=1e22", "I=1e60"], "1e+60 is above 1e+30: nobody serves so many tokens"),
        (["predict", "parscale-pile", "--at", "P=0.01"], "0.01 is below 1: one stream is a plain model"),
        (["predict", "routed-hash", "--at", "N=1e9", "E=0.3"], "0.3 is below 1: one expert is a dense model"),
        (["predict", "ling-leverage", "--at", "A=2", "G=2", "C=1e20"], "2 is above 1: it is a share"),
        (["compare", "--routers", *PILE, "--at", "N=-370e6", "E=64"], "not a positive number"),
        (["predict", "none.json", "--at", "N=1"], "there is no such file"),
        (["predict", "none.json", "chinchilla", "--at", "N=1"], "predict with it alone"),
        (["fit", "parscal", "--runs", LOSSES], "did you mean parscale"),
        (["fit", "parscale", "--runs", "no.csv"], "there is no such file"),
        (["fit", "parscale", "--runs", LOSSES, "--delta", "-1"], "is not positive"),
        (["fit", "parscale", *PILE, "--seed", "-1"], "--seed: -1 is negative"),
        (["fit", "parscale", *PILE, "--map", "P=P", "--map", "P=2"], "--map P: is given more than once"),
        (["fit", "parscale", *PILE, "--where", "corpus=stack"], "--where corpus: is given more than once"),
        (["predict", "parscale-pile", "--at", "N=1e9", "P=2", "P=4"], "--at P: is given more than once"),
        (["fit", "chinchilla", *PILE, "--map", "D=42e9"], "cannot learn what D does"),
        (["compare", "parscale", *PILE], "two forms or more"),
        (["compare", "--routers", "parscale", *PILE], "takes no forms"),
        (["compare", "--routers", *PILE, "--map", "E=P"], "no column of routers"),
        (["plot", "parscale-pile", "--x", "N", "--out", "x.png"], "needs more than N"),
        (["plot", "parscale-pile", "--x", "N", "--at", "N=1e9", "P=2", "--out", "x.png"], "N: is the axis of the plot"),
        (["plot", "parscale-pile", "--x", "N", "--at", "P=2", "Q=2", "--out", "x.png"], "Q: is no input of parscale-pile"),
        (["plot", "parscale-pile", "--x", "Q", "--out", "x.png"], "choose among N, P"),
        (["plot", "chinchilla", "--x", "N", "--at", "D=1e10", "C=1e20", "--out", "x.png"], "C: has no effect on loss"),
        (["plot", "parscale-pile", "--x", "N", "--at", "P=-1", "--out", "x.png"], "not a positive number"),
        (["plot", "parscale-pile", "--x", "N", "--at", "P=2", "--out", "x"], "x has no ending"),
        (["plot", "parscale-pile", "--x", "N", "--at", "P=2", "--out", "no/dir/x.png"], "there is no folder no/dir"),
        (["plot", "kaplan-compute", "--x", "C", "--out", "x.png"], "states no range of C"),
        (["plot", "parscale", "--x", "D", *PILE, "--bootstrap", "0", "--out", "x.png"], "is no input of parscale"),
    ],
)
def test_bad_input_is_one_message_and_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_infinite_cutoff_is_text_in_json(call, tmp_path: Path) -> None:
    """JSON has no infinity: where routing helps at every size the cut-off is the text inf."""
    path = routers_csv(tmp_path / "routers.csv")
    lines = path.read_text().splitlines()
    form, values = form_named("routed"), {**law_named("routed-hash").values, "c": -0.002, "b": -0.03}
    rows = [line.split(",") for line in lines[1:]]
    losses = [float(form.evaluate(values, {"N": np.array([float(r[0])]), "E": np.array([float(r[1])])})[0]) for r in rows]
    path.write_text("\n".join([lines[0], *(f"{','.join(r[:3])},{loss:.8f}" for r, loss in zip(rows, losses, strict=True))]))
    found = call("compare", "--routers", "--runs", str(path), "--starts", "4", "--bootstrap", "0", "--json")
    assert found["routers"]["one"]["cutoff"]["value"] == "inf"
