"""``fastcl train`` as the command line has it: flags of the settings, and a run that prints what it found."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from .._output import add_json, show
from .checkpoint import has_checkpoint
from .config import SECTIONS, TrainConfig, load_config
from .errors import TrainError
from .loop import resume, train
from .outcome import table
from .presets import PRESETS, preset
from .ranks import launched

_METAVAR: dict[type, str] = {int: "N", float: "X"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``fastcl train``: one per field of :class:`TrainConfig`, what to start from, ``--json``."""
    group: argparse._ActionsContainer = parser
    for f in fields(TrainConfig):
        if f.name in SECTIONS:
            group = parser.add_argument_group(SECTIONS[f.name])
        flag, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.default is not None and f.default is not False:
            help += f" (default: {f.default})"
        # An absent flag leaves no trace: the one home of the defaults is TrainConfig.
        assert f.default is not MISSING
        kind = _kind(f.name)
        if kind is bool:
            group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        options = {"type": kind, "choices": f.metadata["choices"], "metavar": _METAVAR.get(kind)}
        group.add_argument(flag, default=argparse.SUPPRESS, help=help, **options)
    start = group.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="DIR", help="continue the interrupted run in DIR; takes no other setting")
    start.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from published settings, which flags change: {', '.join(PRESETS)}",
    )
    start.add_argument("--config", metavar="FILE", help="start from the config.json of a run, which flags change")
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting by its name in config.json, null or false included; a flag wins",
    )
    add_json(group)


def run(args: argparse.Namespace) -> int:
    """Train as the parsed arguments say and print the result. Exit code 0; 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        TrainError: the run cannot start or go on; see :func:`train`.
    """
    flags = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    if args.resume and (flags or args.set):
        names = ", ".join(["--" + name.replace("_", "-") for name in flags] + ["--set"] * bool(args.set))
        raise TrainError(
            f"got {names} with --resume; expected --resume alone: the run keeps its settings. Leave it out."
        )
    settings = dict(map(_setting, args.set)) | flags
    if args.preset:
        config = preset(args.preset, **settings)
    elif args.config:
        config = load_config(args.config, **settings)
    else:
        config = TrainConfig(**settings)
    folder = Path(args.resume or str(config.resolved().output))
    try:
        result = resume(folder) if args.resume else train(config)
    except (KeyboardInterrupt, SystemExit) as end:
        if launched().first:
            way_on = f"Continue with: fastcl train --resume {folder}"
            print("\nInterrupted.", way_on if has_checkpoint(folder) else "No step was saved.", file=sys.stderr)
        return 128 + (signal.SIGINT if isinstance(end, KeyboardInterrupt) else signal.SIGTERM)
    if not launched().first:
        return 0
    show(result, f"{table(result)}\n\nrun folder: {folder}", args.json)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """``key=value`` as the name of a field and what it holds."""
    name, equals, value = text.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in {f.name for f in fields(TrainConfig)}:
        raise TrainError(f"got --set {text}; expected KEY=VALUE with a key of config.json. See fastcl train --help.")
    kind = _kind(name)
    if value.lower() in ("null", "none"):
        return name, None
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise TrainError(f"got --set {text}; expected true or false. Choose one.")
        return name, value.lower() == "true"
    try:
        return name, kind(value)
    except ValueError as error:
        raise TrainError(f"got --set {text}; expected {kind.__name__} ({error}). Give a number.") from error


def _kind(name: str) -> type:
    """The type of a field, without its None."""
    hint = get_type_hints(TrainConfig)[name]
    return next(t for t in (bool, int, float, str) if t in (hint, *getattr(hint, "__args__", ())))
