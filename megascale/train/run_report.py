"""What a run reached: its training, its held-out text beside compressors, a sample, its parameters, and what to do next."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.config.errors import InputError
from megascale.data.corpus import Split
from megascale.model.accounting import parameters
from megascale.observe.sinks import read_metrics
from megascale.train.compressors import PRIMING_BYTES, bits_per_byte, text_of
from megascale.train.evaluate import evaluate
from megascale.train.load_run import LoadedRun
from megascale.train.sampling import SamplingOptions, generate

CACHE = "report-cache.json"
"""In the run folder: what takes long and does not change."""

_SAMPLE = SamplingOptions(tokens=96, temperature=0.7, top_p=0.95)
_CODE_PROMPT = "def __init__(self,"
_PROMPT_WORDS = 12
_RESUME = "train on where it ended"
_PROMPT_BYTES = 1 << 16  # of held-out text that is looked at


def collect(run: LoadedRun, sequences: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """All facts of the report, of JSON types.

    Args:
        sequences: held-out sequences scored of each source; None: all.
        say: told what is being done before anything that takes long.

    Raises:
        InputError: no metrics, or a damaged cache.
    """
    records = read_metrics(run.folder / "metrics.jsonl")
    counted = dataclasses.asdict(parameters(run.config.model))
    del counted["matmul_per_token"]
    held_out = {name: _held_out(run, name, sequences, say) for name in run.data.validation}
    return {
        "run": run.config.run.name,
        "folder": str(run.folder),
        "step": run.step,
        "ended": _read_json(run.folder / "exit.json").get("reason", "unknown"),
        "training": _training(run, records),
        "held_out": held_out,
        "parameters": {**{kind: count for kind, count in counted.items() if count}, "total": parameters(run.config.model).total},
        "sample": _sample(run, say),
        "curves": {
            name: [[record["step"], record[name]] for record in records if name in record]
            for name in ("train/lm_loss", *(f"val/{source}/loss" for source in run.data.validation))
        },
        "next": _next_commands(run),
    }


def _training(run: LoadedRun, records: list[dict[str, Any]]) -> dict[str, Any]:
    manifest = _read_json(run.folder / "manifest.json")
    last = records[-1]
    return {
        "steps": last["step"],
        "planned_steps": run.config.schedule.steps,
        "tokens": last["tokens"],
        "flops": last["flops_total"],
        "seconds": sum(record["perf/step_seconds"] for record in records),
        "first_loss": records[0]["train/lm_loss"],
        "last_loss": last["train/lm_loss"],
        # the middle value of the later half: the first steps compile
        "tokens_per_second": _middle(records, "perf/tokens_per_second"),
        "tflops_per_device": _middle(records, "perf/tflops_per_gpu"),
        "mfu": _middle(records, "perf/mfu"),
        "devices": manifest.get("world"),
        "device": manifest.get("device"),
    }


def _middle(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records[len(records) // 2 :] if name in record]
    return statistics.median(values) if values else None


def _held_out(run: LoadedRun, source: str, count: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The model's result on a source's held-out text, and the compressors' where the text can be decoded."""
    validation = run.data.validation[source]
    shown = len(validation) if count is None else min(count, len(validation))

    def score() -> dict[str, Any]:
        say(f"scoring {shown:,} of {len(validation):,} held-out sequences of {source}")
        return evaluate(run, validation, count, None)

    found = _cached(run.folder / CACHE, f"model/{run.checkpoint}/{run.data.digest}/{source}/{shown}", score)
    training, digest = next(
        (blended.sequences.split, blended.digest) for blended in run.data.train.sources if blended.sequences.name == source
    )
    compressors = None
    if run.data.token_bytes is not None:

        def compress() -> dict[str, Any]:
            return _compress(run, source, validation.split, training, say)

        compressors = _cached(run.folder / CACHE, f"compressors/{digest}/{PRIMING_BYTES}", compress)
    return {**found, "all_scored": shown == len(validation), "compressors": compressors}


def _compress(run: LoadedRun, source: str, validation: Split, training: Split, say: Callable[[str], None]) -> dict[str, Any]:
    tokenizer, separator = run.data.tokenizer, run.separator
    assert tokenizer is not None and separator is not None
    say(f"decoding the text of {source}")
    held_out, primer = text_of(validation, tokenizer, separator), text_of(training, tokenizer, separator, PRIMING_BYTES)
    say(f"compressing {len(held_out):,} held-out bytes with gzip and xz, xz also after {len(primer):,} bytes of training text")
    return {"bits_per_byte": bits_per_byte(held_out, primer), "bytes": len(held_out), "primer_bytes": len(primer)}


def _sample(run: LoadedRun, say: Callable[[str], None]) -> dict[str, str] | None:
    """A continuation of a prompt that fits the held-out text; None without a tokenizer."""
    tokenizer = run.data.tokenizer
    if tokenizer is None or run.separator is None:
        return None
    say("generating a sample")
    split = next(iter(run.data.validation.values())).split if run.data.validation else run.data.train.sources[0].sequences.split
    prompt = fitting_prompt(text_of(split, tokenizer, run.separator, _PROMPT_BYTES).decode("utf-8"))
    context = run.config.data.sequence_length
    ids = run.encode(prompt)[-context:]
    chosen = [step[0] for step in generate(run.stages, ids, 1, context, run.separator, _SAMPLE)]
    whole = [token for token in [*ids, *chosen] if token is not None and token != run.separator]
    text = tokenizer.decode(whole, skip_special_tokens=False)
    return {"prompt": prompt, "text": text, "settings": f"temperature {_SAMPLE.temperature}, top-p {_SAMPLE.top_p}"}


def fitting_prompt(held_out: str) -> str:
    """The start of a Python function for Python code, else the first words of the held-out text."""
    return _CODE_PROMPT if "\ndef " in held_out and "self" in held_out else " ".join(held_out.split()[:_PROMPT_WORDS])


def _next_commands(run: LoadedRun) -> list[dict[str, str]]:
    name, config = run.config.run.name, run.folder / "config.yaml"
    train, steps, streams = (
        f"megascale train --config {config}",
        2 * run.config.schedule.steps,
        2 * run.config.model.streams.count,
    )
    commands = {
        "continue a text": f"megascale generate {run.folder} --prompt 'import'",
        "score a file, each token with a long context": (
            f"megascale eval {run.folder} --text FILE --stride {max(run.config.data.sequence_length // 4, 1)}"
        ),
        "the curves": f"megascale dashboard show --run {run.folder}",
        "this report as a page": f"megascale report {run.folder} --html",
        _RESUME: train,
        "the same for twice as long": f"{train} run.name={name}-long schedule.steps={steps}",
        "twice the streams": f"{train} run.name={name}-p{streams} model.streams.count={streams}",
    }
    if _read_json(run.folder / "exit.json").get("reason") == "done":
        del commands[_RESUME]
    return [{"to": to, "type": command} for to, command in commands.items()]


def _cached(path: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The value of a key in a JSON file; computed and stored where it is missing."""
    if key not in _read_json(path):
        value = compute()
        content = {**_read_json(path), key: value}
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
    return _read_json(path)[key]


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing where there is no file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(str(path), f"is damaged: {error}", "delete it") from error
