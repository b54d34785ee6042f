"""`megascale data`: prepare, inspect and verify corpora."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands import prepare
from megascale.config.errors import InputError

if TYPE_CHECKING:
    from megascale.data.corpus import Corpus

_SHOWN_CHARACTERS = 200
_SHOWN_LENGTH = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="data_verb", required=True)
    prepare.add_arguments(verbs.add_parser("prepare", help="make a corpus folder", description=prepare.__doc__))
    inspect = verbs.add_parser("inspect", help="show what a corpus holds")
    inspect.add_argument("folder", help="a prepared corpus")
    inspect.add_argument("--documents", type=int, default=3, help="documents shown (default: 3)")
    inspect.add_argument(
        "--sequence-length", type=int, default=_SHOWN_LENGTH, help=f"of the packed sequence (default: {_SHOWN_LENGTH})"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    verify = verbs.add_parser("verify", help="read a corpus whole and check every digest and id")
    verify.add_argument("folder", help="a prepared corpus")
    verify.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen verb."""
    return {"prepare": prepare.run, "inspect": _inspect, "verify": _verify}[arguments.data_verb](arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from megascale.data.corpus import open_corpus
    from megascale.data.manifest import read_manifest

    folder = _folder(arguments.folder)
    corpus, manifest = open_corpus(str(folder)), read_manifest(folder)
    documents = _first_documents(corpus, arguments.documents)
    packed = _packed_sequence(corpus, arguments.sequence_length)
    if arguments.json:
        print(json.dumps({"manifest": manifest.model_dump(), "documents": documents, "packed": packed}, indent=1))
        return 0
    print(prepare.summary(folder, manifest))
    for number, document in enumerate(documents):
        print(f"\ndocument {number}, {document['tokens']} tokens:\n{document['text']}")
    print(f"\npacked sequence {packed['sequence']} of {packed['length']} tokens:")
    for piece in packed["documents"]:
        print(f"  tokens {piece['first']:>5} to {piece['last']:>5}  {piece['start']!r} ... {piece['end']!r}")
    return 0


def _first_documents(corpus: Corpus, count: int) -> list[dict[str, Any]]:
    from megascale.data.tokenizer import load_tokenizer

    assert corpus.tokenizer is not None
    tokenizer = load_tokenizer(corpus.tokenizer)
    documents = []
    for index in range(min(count, len(corpus.train.starts))):
        ids = corpus.train.document(index)
        text = tokenizer.decode(ids[1 : 1 + _SHOWN_CHARACTERS].tolist(), skip_special_tokens=False)
        documents.append({"tokens": len(ids), "text": text[:_SHOWN_CHARACTERS]})
    return documents


def _packed_sequence(corpus: Corpus, length: int) -> dict[str, Any]:
    """The sequence that holds the end of the first document, cut where documents meet."""
    import numpy as np

    from megascale.data.batches import SequenceSet
    from megascale.data.tokenizer import load_tokenizer

    assert corpus.tokenizer is not None
    tokenizer = load_tokenizer(corpus.tokenizer)
    if length < 1:
        raise InputError("--sequence-length", f"{length} is too small", "give at least 1")
    if corpus.train.length < 2:
        raise InputError(corpus.path, "too few tokens for a sequence", "give more documents")
    sequences = SequenceSet(corpus.name, corpus.train, length, "document", corpus.largest_id + 1, last_padded=True)
    border = int(corpus.train.starts[1]) if len(corpus.train.starts) > 1 else 0
    number = min(border // length, len(sequences) - 1)
    rows = sequences.rows(np.array([number]))
    pieces = []
    for document in range(int(rows.documents[0, -1]) + 1):
        where = np.flatnonzero(rows.documents[0] == document)
        ids = rows.tokens[0, where].tolist()
        start, end = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:8], ids[-8:]))
        pieces.append({"first": int(where[0]), "last": int(where[-1]), "start": start, "end": end})
    return {"sequence": number, "length": length, "documents": pieces}


def _verify(arguments: argparse.Namespace) -> int:
    from megascale.data.corpus import open_corpus
    from megascale.data.manifest import PREPARE_AGAIN, damaged_files, prepare_command, read_manifest

    folder = _folder(arguments.folder)
    manifest = read_manifest(folder)
    damaged = damaged_files(folder, manifest)
    if arguments.json:
        print(json.dumps({"folder": str(folder), "files": len(manifest.files), "damaged": damaged}))
    if damaged:
        remedy = PREPARE_AGAIN.format(command=prepare_command(folder))
        raise InputError(
            ", ".join(str(folder / name) for name in damaged), "differs from its digest in the manifest, or is missing", remedy
        )
    open_corpus(str(folder))
    if not arguments.json:
        total = sum(record.bytes for record in manifest.files.values())
        print(f"{folder}: {len(manifest.files)} files, {total:,} bytes, all as written")
    return 0


def _folder(name: str) -> Path:
    """The corpus of this name or path."""
    return Path(name) if Path(name).is_dir() else prepare.corpus_folder(name)
