"""The reference trainer: from images to a probed encoder in one command, ``fastcl train``.

::

    from fastcl.trainer import TrainConfig, train

    result = train(TrainConfig(method="moco", steps=900, output="runs/first"))
    print(result["probe"]["trained"]["few10"]["mean"])
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

from .config import TrainConfig
from .errors import TrainError
from .export import export
from .loop import resume, train
from .page import write_page
from .report import table

__all__ = ["TrainConfig", "TrainError", "add_arguments", "export", "resume", "run", "table", "train", "write_page"]

_STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fastcl train``: one per field of :class:`TrainConfig`, ``--resume`` and ``--json``."""
    types = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.default is not None and f.default is not False:
            help += f" (default: {f.default})"
        # An absent flag leaves no trace: the one home of the defaults is TrainConfig.
        assert f.default is not MISSING
        if types[f.name] is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        kind = next(t for t in (int, float, str) if t in (types[f.name], *getattr(types[f.name], "__args__", ())))
        parser.add_argument(flag, type=kind, choices=f.metadata["choices"], default=argparse.SUPPRESS, help=help)
    parser.add_argument("--resume", metavar="DIR", help="continue the interrupted run in DIR; takes no other setting")
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="print JSON in place of the table, or write it to FILE beside the table",
    )


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say and print the result. Exit code 0, or 130 when interrupted.

    Raises:
        TrainError: the run cannot start or go on; see :func:`train`.
    """
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    if args.resume and given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise TrainError(
            f"got {flags} with --resume; expected --resume alone: the run keeps its settings. Leave it out."
        )
    config = TrainConfig(**given)
    folder = Path(args.resume or str(config.resolved().output))
    try:
        result = resume(folder) if args.resume else train(config)
    except KeyboardInterrupt:
        print(f"\nInterrupted. Continue with: fastcl train --resume {folder}", file=sys.stderr)
        return 130
    text = json.dumps(result, indent=2)
    if args.json == _STDOUT:
        print(text)
        return 0
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    print(f"{table(result)}\n\nrun folder: {folder}")
    return 0
