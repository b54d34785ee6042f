"""`megascale convert`: a Hugging Face folder to a run folder, or a run's checkpoint to a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.config.schema import Config

DTYPES = ("fp32", "bf16", "fp16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="--to run: a Hugging Face folder; --to hf: a run folder")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a new folder")
    parser.add_argument("--to", choices=("run", "hf"), required=True, help="run: import; hf: export")
    parser.add_argument("--step", type=int, help="--to hf: of the checkpoint; default: the newest good one")
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="--to hf: of the weights; default: as they were imported, fp32 for weights trained here",
    )  # fmt: skip
    parser.add_argument("--shard-gb", type=float, metavar="X", help="--to hf: gigabytes of a weights file (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; returns the exit code.

    Raises:
        InputError: a source that is not what `--to` says, a target that exists, a model that the other side cannot express.
    """
    facts = _import(arguments) if arguments.to == "run" else _export(arguments)
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{facts['folder']}: {facts['tensors']:,} tensors, {facts['parameters']:,} parameters, {facts['family']} format")
    for name, reason in facts.get("left_out", {}).items():
        print(f"left out: {name} ({reason})")
    for warning in facts.get("warnings", ()):
        print(f"warning: {warning}")
    print("\n".join(_next(arguments, facts)))
    return 0


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    from megascale.checkpoint.hugging_face.folder import is_hugging_face
    from megascale.checkpoint.hugging_face.import_folder import import_folder

    for option in ("step", "dtype", "shard_gb"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option.replace('_', '-')}", "has no effect with --to run", "leave it out")
    if not is_hugging_face(arguments.source):
        raise InputError(str(arguments.source), "is not a Hugging Face folder: it has no config.json", "to export a run: --to hf")
    return import_folder(arguments.source, arguments.target)


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from megascale.checkpoint.fold import folded
    from megascale.checkpoint.hugging_face.export_folder import Export, export_checkpoint
    from megascale.checkpoint.weights import WEIGHTS
    from megascale.config.phases import span_at
    from megascale.train.load_run import open_checkpoint, read_run_config
    from megascale.train.source import run_tokenizer

    gigabytes = 5.0 if arguments.shard_gb is None else arguments.shard_gb
    if not gigabytes > 0:
        raise InputError("--shard-gb", f"{gigabytes} is out of range", "give more than 0")
    config = read_run_config(arguments.source)
    dtypes = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
    with open_checkpoint(arguments.source, arguments.step) as reader:
        # an early phase has fewer streams
        whole, model = folded(reader, span_at(config, reader.step).config.model)
        vocabulary = reader.shape(f"{WEIGHTS}embedding.weight")[0]
        export = Export(
            run_folder=arguments.source,
            model=model.model_copy(update={"vocab_size": vocabulary}),
            tokenizer=run_tokenizer(config),
            neutral=_neutral(config),
            dtype=dtypes.get(arguments.dtype),
            largest=int(gigabytes * 1e9),
        )
        return export_checkpoint(whole, export, arguments.target)


def _neutral(config: Config) -> dict[str, Any]:
    """What config.json says beside the model: the context, and the token that ends a document."""
    from megascale.data.tokenizer import load_tokenizer, separator_id
    from megascale.train.source import run_tokenizer

    values: dict[str, Any] = {"max_position_embeddings": config.data.sequence_length, "use_cache": True}
    path = run_tokenizer(config)
    if path is not None:
        values["bos_token_id"] = values["eos_token_id"] = separator_id(load_tokenizer(path))
    return values


def _next(arguments: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    """What can be done with the result."""
    folder = facts["folder"]
    if arguments.to == "run":
        return [
            f"continue a text: megascale generate {folder} --prompt 'Once'",
            f"train on: megascale train --config {folder}/config.yaml data.sources.0.path=CORPUS",
        ]
    code = ", trust_remote_code=True" if any(name.endswith(".py") for name in facts["files"]) else ""
    lines = [
        f"step {facts['step']}, {' and '.join(facts['dtypes'])}; in Python: AutoModelForCausalLM.from_pretrained({folder!r}{code})"
    ]
    if not facts["tokenizer"]:
        lines.append("no tokenizer.json: the run has none, or its corpora are not here")
    return lines
