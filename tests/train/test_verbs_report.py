"""megascale report: the run beside compressors on the same text, in text, JSON and HTML."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import pytest

from megascale.cli import main
from megascale.train import run_report
from megascale.train.compressors import bits_per_byte, text_of
from megascale.train.load_run import load_run
from megascale.train.report_html import report_html


def report(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    assert main(["report", str(run), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_held_out_text_is_the_documents_as_they_were(tiny_run: Path) -> None:
    run = load_run(tiny_run)
    assert run.data.tokenizer is not None and run.separator is not None
    texts = [path.read_text(encoding="utf-8") for path in (tiny_run.parent / "texts").iterdir()]
    sizes = json.loads((tiny_run.parent / "words" / "manifest.json").read_text())["splits"]
    splits = {"validation": run.data.validation["words"].split, "train": run.data.train.sources[0].sequences.split}
    for name, split in splits.items():
        whole = text_of(split, run.data.tokenizer, run.separator)
        assert len(whole) == sizes[name]["bytes"]
        assert any(whole.decode().startswith(text) for text in texts)
        assert whole.startswith(text_of(split, run.data.tokenizer, run.separator, limit=1))


def test_compressors_are_the_standard_ones_and_priming_helps() -> None:
    generator = random.Random(0)
    training = " ".join(generator.choices([f"word{i}" for i in range(500)], k=4000)).encode()
    held_out = training[5000:9000] + b"and something new"
    found = bits_per_byte(held_out, training)
    assert found["gzip -9"] == 8 * len(gzip.compress(held_out, 9)) / len(held_out)
    assert found["xz -9"] == 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    assert found["xz -9, primed"] < 0.1 * found["xz -9"], "the held-out text is a copy of training text"


def test_the_facts_agree_with_the_run(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(tiny_run, capsys)
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert facts["training"]["first_loss"] == records[0]["train/lm_loss"]
    assert facts["training"]["last_loss"] == records[-1]["train/lm_loss"]
    assert facts["training"]["tokens"] == records[-1]["tokens"]
    assert facts["ended"] == "done"
    assert facts["parameters"]["total"] == json.loads((tiny_run / "manifest.json").read_text())["parameters"]
    assert sum(count for kind, count in facts["parameters"].items() if kind != "total") == facts["parameters"]["total"]
    assert set(facts["held_out"]["words"]["compressors"]["bits_per_byte"]) == {"gzip -9", "xz -9", "xz -9, primed"}
    assert facts["held_out"]["words"]["compressors"]["bytes"] == facts["held_out"]["words"]["bytes"]
    assert facts["sample"]["text"].startswith("def __init__(self,")
    main(["eval", str(tiny_run), "--json"])
    evaluated = json.loads(capsys.readouterr().out)["results"]["words"]
    assert facts["held_out"]["words"].items() >= evaluated.items()


def test_what_takes_long_is_done_once(
    tiny_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(tiny_run, capsys)

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(run_report, "bits_per_byte", refuse)
    monkeypatch.setattr(run_report, "evaluate", refuse)
    assert report(tiny_run, capsys) == first
    with pytest.raises(AssertionError, match="computed again"):  # another checkpoint is another result
        main(["report", str(tiny_run), "--step", "2"])


def test_text_and_page_hold_the_figures(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(tiny_run, capsys)
    assert main(["report", str(tiny_run), "--html"]) == 0
    printed, page = capsys.readouterr().out, (tiny_run / "report.html").read_text()
    bits = f"{facts['held_out']['words']['bits_per_byte']:.3f} bits per byte"
    for text in (printed, page):
        assert bits in text
        assert f"{facts['parameters']['total']:,}" in text
        assert "gzip -9" in text and "xz -9, primed" in text
        assert f"megascale train --config {tiny_run}/config.yaml run.name=tiny-long schedule.steps=8" in text
    assert "\x1b" not in printed
    assert "data:image/png;base64,iVBOR" in page
    assert "http" not in page


def test_text_of_a_model_is_no_markup(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(tiny_run, capsys)
    facts["sample"]["text"] = "<script>[bold]"
    assert "&lt;script&gt;[bold]" in report_html(facts)


def test_a_fitting_prompt() -> None:
    assert run_report.fitting_prompt("import os\n\ndef main(self):\n").startswith("def ")
    assert run_report.fitting_prompt("Once upon a time " * 10).split()[:4] == ["Once", "upon", "a", "time"]


def test_part_of_the_text_is_called_so(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tiny_run), "--sequences", "2"]) == 0
    assert "the first 64 tokens" in capsys.readouterr().out
