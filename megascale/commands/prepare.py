"""`megascale prepare`: makes a corpus folder from text, code, JSON lines, parquet or a Hugging Face data set."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.data.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the verb."""
    parser.add_argument("output", metavar="NAME_OR_FOLDER", help="corpus to make: data/NAME, or a folder if it contains a slash")
    parser.add_argument(
        "--from", dest="paths", nargs="+", action="extend", type=Path, default=[], metavar="PATH",
        help="files and folders to read; default: this Python's standard library",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("auto", "text", "code", "jsonl", "parquet"), default="auto", help="default: by file suffix"
    )
    parser.add_argument("--dataset", metavar="NAME", help="Hugging Face data set to read, instead of --from")
    parser.add_argument("--subset", help="configuration of the data set")
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    parser.add_argument("--field", default="text", help="field of a record that holds the text (default: text)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to use; default: train one on the training documents"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids of the tokenizer that is trained (default: 4096)")
    parser.add_argument(
        "--separator", metavar="TOKEN", help="with --tokenizer: token before each document; default: its end-of-text token"
    )
    parser.add_argument("--validation", type=float, default=0.05, help="share of the documents held out (default: 0.05)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; does not change the result (default: all cores)"
    )
    parser.add_argument(
        "--largest-document", type=int, default=16 << 20, metavar="BYTES", help="larger documents are left out (default: 16 MiB)"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Makes the corpus and prints what it holds."""
    from megascale.data.prepare import PrepareRequest, prepare_corpus
    from megascale.data.sources import SourceRequest

    _check(arguments)
    source = SourceRequest(
        paths=tuple(arguments.paths),
        format=arguments.format,
        dataset=arguments.dataset,
        subset=arguments.subset,
        split=arguments.split,
        field=arguments.field,
        largest_document=arguments.largest_document,
    )
    request = PrepareRequest(
        source=source,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        separator=arguments.separator,
        validation=arguments.validation,
        workers=arguments.workers,
    )
    folder = corpus_folder(arguments.output)
    manifest = prepare_corpus(folder, request)
    print(json.dumps(manifest.model_dump(), indent=1) if arguments.json else summary(folder, manifest))
    return 0


def corpus_folder(name: str) -> Path:
    """The folder of a corpus: data/NAME for a plain name, else the path itself."""
    return Path(name) if "/" in name or os.sep in name else Path("data") / name


def summary(folder: Path, manifest: Manifest) -> str:
    """What a corpus holds, in a few lines."""
    lines = [f"{folder}: {manifest.source['from']}"]
    for name, split in manifest.splits.items():
        ratio = split.bytes / max(1, split.tokens - split.documents)
        lines.append(
            f"  {name:<11}{split.documents:>12,} documents {split.tokens:>16,} tokens"
            f" {split.bytes:>16,} bytes  {ratio:.2f} bytes/token"
        )
    lines.append(
        f"  tokenizer  {manifest.vocab_size:,} ids; documents start with {manifest.separator} (id {manifest.separator_id})"
    )
    lines.append(f"  left out   {manifest.duplicates:,} duplicates; {sum(manifest.bad_documents.values()):,} bad documents")
    for kind, count in manifest.bad_documents.items():
        names = [bad.name for bad in manifest.bad_names if bad.problem == kind]
        more = ", ..." if count > len(names[:4]) else ""
        lines.append(f"    {kind}: {count:,} ({', '.join(names[:4])}{more})")
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.validation < 1:
        raise InputError("--validation", f"{arguments.validation} is not a share", "give a number from 0 to below 1")
    for name in ("workers", "largest_document"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}", f"{getattr(arguments, name)} is too small", "give at least 1")
