"""`megascale generate`: continue a text with a trained run. Text goes to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands.trained_model import add_model_arguments, add_precision_argument, open_model
from megascale.config.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megascale.train.load_run import LoadedModel
    from megascale.train.sampling import SamplingOptions
    from megascale.train.team import Team


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read it from a file, or from stdin with -")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens generated (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = the likeliest token, always (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="N", help="only the N likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="only the likeliest tokens that reach probability X"
    )
    parser.add_argument("--samples", type=int, default=1, help="continuations; a single one is printed as it comes (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of the random choices (default: 1)")
    add_precision_argument(parser)
    parser.add_argument(
        "--parallel", metavar="LAYOUT",
        help="of the ranks that a launcher starts: axes dp, pp, tp, ep, etp, for example"
        ' "{tp: 2, pp: 2}" (default: all of them share the samples)',
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: no run, checkpoint or tokenizer; streams of another trunk; a setting out of range; an unreadable or empty prompt; a
            layout that does not fit.
    """
    from megascale.train.sampling import SamplingOptions
    from megascale.train.team import join_team, read_parallel

    options = SamplingOptions(arguments.tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)

    def check() -> None:
        options.check()
        if arguments.samples < 1:
            raise InputError("--samples", f"{arguments.samples} is out of range", "give at least 1")
        parallel = read_parallel(arguments.parallel)
        if parallel.cp > 1 or parallel.stream > 1:
            reason = "a new token is one token with all its streams: cp and stream have nothing to share"
            raise InputError("--parallel", reason, "choose among dp, pp, tp, ep, etp")

    with join_team(arguments.parallel, vars(arguments), check) as team:
        return _run(arguments, options, team)


def _run(arguments: argparse.Namespace, options: SamplingOptions, team: Team) -> int:
    prompt = team.of_leader(lambda: arguments.prompt if arguments.prompt_file is None else _read_prompt(arguments.prompt_file))
    # the ranks share whole texts, not the tokens of one, whose number the layout therefore need not divide
    loaded = open_model(arguments, team, length=team.parallel.tp)
    ids = team.together(lambda: _encode(loaded, prompt))
    context = loaded.config.data.sequence_length
    notes = []
    if len(ids) > context:
        notes.append(f"the prompt has {len(ids):,} tokens; the model sees its last {context:,}")
        ids = ids[-context:]
    if len(ids) + options.tokens - 1 > context:
        notes.append(f"past {context:,} tokens the model sees only the newer part of the text, at least {context // 2:,} tokens")
    for note in notes if team.leads else ():
        print(f"note: {note}", file=sys.stderr, flush=True)
    assert loaded.tokenizer is not None
    shown = prompt if team.leads and not arguments.json else None
    samples, timing = _generate(loaded, loaded.tokenizer, ids, arguments.samples, options, shown)
    if not team.leads:
        return 0
    if arguments.json:
        head = {"run": str(arguments.run), "step": loaded.step, "prompt": prompt, "prompt_tokens": len(ids), "notes": notes}
        print(json.dumps({**head, "samples": samples, **timing}, indent=1))
    speed = f"{timing['tokens_per_second']:,.1f} tokens/s" if timing["tokens_per_second"] else "one token"
    seconds = timing["prompt_seconds"]
    print(f"step {loaded.step}: {timing['tokens']:,} tokens, {speed}; prompt and first token {seconds:.2f} s", file=sys.stderr)
    return 0


def _encode(loaded: LoadedModel, prompt: str) -> list[int]:
    ids = loaded.encode(prompt)
    if not ids:
        raise InputError("--prompt", "is empty, and documents of this model have no start token", "give some text")
    return ids


def _read_prompt(name: str) -> str:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise InputError(f"--prompt-file {name}", f"cannot be read: {error.strerror}", "name a file, or - for stdin") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--prompt-file {name}", f"is not UTF-8 text: byte {error.start}", "convert it to UTF-8") from error


def _generate(
    loaded: LoadedModel, tokenizer: Tokenizer, ids: list[int], count: int, options: SamplingOptions, prompt: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All samples and the timing. Prints the prompt and what follows it, a single sample as it comes; nothing for prompt None."""
    from tokenizers.decoders import DecodeStream

    from megascale.train.sampling import generate

    # the prompt's ids make the first word come out as it does in the middle of a text
    streams = [DecodeStream(ids=ids, skip_special_tokens=False) for _ in range(count)]
    texts, lengths = [""] * count, [0] * count
    streaming = prompt is not None and count == 1
    if streaming:
        print(prompt, end="", flush=True)
    times = [time.perf_counter()]
    for chosen in generate(loaded.stages, ids, count, loaded.config.data.sequence_length, loaded.separator, options):
        for i, token in enumerate(chosen):
            if token is None:
                continue
            piece = streams[i].step(tokenizer, token) or ""
            texts[i], lengths[i] = texts[i] + piece, lengths[i] + 1
            if streaming:
                print(piece, end="", flush=True)
        times.append(time.perf_counter())
    if streaming:
        print(flush=True)
    elif prompt is not None:
        for i, text in enumerate(texts):
            print(f"--- sample {i + 1} of {count}\n{prompt}{text}", flush=True)
    tokens = sum(lengths)
    first = sum(length > 0 for length in lengths)
    rest = times[-1] - times[1]
    timing = {
        "tokens": tokens,
        "prompt_seconds": times[1] - times[0],
        "tokens_per_second": (tokens - first) / rest if tokens > first else None,
    }
    samples = [
        {"text": text, "tokens": length, "ended": length < options.tokens} for text, length in zip(texts, lengths, strict=True)
    ]
    return samples, timing
