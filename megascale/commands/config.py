"""`megascale config show|validate|diff|model|schema`: look at configs before anything starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megascale.config.checks import check
from megascale.config.errors import InputError
from megascale.config.fields import KeyPath, dotted, leaves
from megascale.config.load import LoadedConfig, load_config
from megascale.config.origin import place_of
from megascale.config.resolve import resolve
from megascale.config.schema import Config
from megascale.config.write import difference, digest, dump, dump_section


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs and their arguments."""
    verbs = parser.add_subparsers(dest="config_verb", required=True, metavar="VERB")
    show = verbs.add_parser("show", help="print the whole tree, derived values filled in")
    _add_file(show)
    show.add_argument("--origin", action="store_true", help="mark where each value comes from")
    show.add_argument("--comments", action="store_true", help="print the meaning of each setting")
    show.add_argument("--json", action="store_true", help="print JSON")
    validate = verbs.add_parser("validate", help="check a config; exit code 2 if it is wrong")
    _add_file(validate)
    validate.add_argument("--world", type=int, help="number of ranks, to check the layout too")
    validate.add_argument("--json", action="store_true", help="print JSON")
    compare = verbs.add_parser("diff", help="print the settings in which two configs differ; exit code 1 if there are any")
    compare.add_argument("first", type=Path, metavar="A", help="YAML file")
    compare.add_argument("second", type=Path, metavar="B", help="YAML file")
    compare.add_argument("--json", action="store_true", help="print JSON")
    model = verbs.add_parser("model", help="print the model section of a trained model, for a config that starts from it")
    model.add_argument("folder", type=Path, metavar="FOLDER", help="a run folder, or a Hugging Face folder")
    verbs.add_parser("schema", help="print the JSON schema of configs, for editors")


def run(arguments: argparse.Namespace) -> int:
    """Run a verb.

    Returns:
        0, or 1 where `diff` finds differences.

    Raises:
        InputError: a config is wrong.
    """
    verbs = {"show": _show, "validate": _validate, "diff": _diff, "model": _model, "schema": _schema}
    return verbs[arguments.config_verb](arguments)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=VALUE", help="settings that replace those of the file; directly behind FILE"
    )


def _show(arguments: argparse.Namespace) -> int:
    loaded = load_config(arguments.file, arguments.overrides)
    config = resolve(loaded.config)
    origins = _origins(loaded, config) if arguments.origin else {}
    if not arguments.json:
        print(dump(config, comments=arguments.comments, notes=origins), end="")
    elif arguments.origin:
        places = {dotted(path): place for path, place in origins.items()}
        _print_json({"config": config.model_dump(mode="json"), "origin": places})
    else:
        _print_json(config.model_dump(mode="json"))
    return 0


def _origins(loaded: LoadedConfig, config: Config) -> dict[KeyPath, str]:
    """For each setting of the resolved config: its file and line, its override, ``derived`` or ``default``."""
    before = dict(leaves(loaded.config))
    places: dict[KeyPath, str] = {}
    for path, value in leaves(config):
        if value != before[path]:
            places[path] = "derived"
        else:
            places[path] = place_of(path, loaded.origin, loaded.file) if loaded.is_set(*path) else "default"
    return places


def _validate(arguments: argparse.Namespace) -> int:
    if arguments.world is not None and arguments.world < 1:
        raise InputError("--world", f"{arguments.world} is not a number of ranks", "give 1 or more")
    loaded = load_config(arguments.file, arguments.overrides)
    warnings = check(loaded, arguments.world)
    if arguments.json:
        _print_json({"file": loaded.file, "digest": digest(loaded.config), "warnings": warnings})
        return 0
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{loaded.file}: valid, digest {digest(loaded.config)[:16]}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    first, second = (resolve(load_config(path).config) for path in (arguments.first, arguments.second))
    rows = difference(first, second)
    if arguments.json:
        _print_json([{"setting": path, "first": one, "second": other} for path, one, other in rows])
    else:
        for path, one, other in rows:
            print(f"{path}: {json.dumps(one)} -> {json.dumps(other)}")
    return 1 if rows else 0


def _model(arguments: argparse.Namespace) -> int:
    from megascale.train.source import model_of

    print(dump_section(Config(model=model_of(arguments.folder)), "model"), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    schema = Config.model_json_schema()
    # Files may include others; the tree itself has no such setting.
    schema["properties"]["include"] = {
        "description": "files to read first, relative to this one",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    _print_json(schema)
    return 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
