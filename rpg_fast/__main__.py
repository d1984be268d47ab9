"""The command `rpg-fast`; `python -m rpg_fast` is `rpg-fast info`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

import rpg_fast
from rpg_fast import _info
from rpg_fast._output import with_output

TRAINING = ("train", "evaluate", "export")
TRAINING_EXTRA = ("matplotlib", "numpy", "safetensors", "sklearn", "tqdm")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rpg-fast", description="Rank-based pruning for PyTorch.")
    parser.add_argument("--version", action="version", version=f"rpg_fast {rpg_fast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    info = commands.add_parser("info", help="versions, devices, and which kernel serves which op (the default)")
    info.add_argument("--json", action="store_true", help="the same, as one JSON object")
    commands.add_parser("train", help="train a network into a sparse one; `rpg-fast train --help`", add_help=False)
    commands.add_parser("evaluate", help="what a checkpoint is worth; `rpg-fast evaluate --help`", add_help=False)
    commands.add_parser("export", help="a checkpoint in other formats; `rpg-fast export --help`", add_help=False)
    return parser


def _train(arguments: list[str]) -> int:
    try:
        cli = importlib.import_module("rpg_fast.train.cli")
        return int(cli.main(arguments) or 0)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAINING_EXTRA:
            raise
        print(f"rpg-fast {arguments[0]} needs {package}: pip install -e '.[train]'", file=sys.stderr)
        return 1


def _main(arguments: list[str]) -> int:
    if arguments and arguments[0] in TRAINING:
        return _train(arguments)
    options = _parser().parse_args(arguments)
    report = _info.collect()
    print(json.dumps(report, indent=1) if getattr(options, "json", False) else _info.render(report))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (without the program's name; default: `sys.argv[1:]`) and returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return with_output(lambda: _main(arguments))


if __name__ == "__main__":
    sys.exit(main())
