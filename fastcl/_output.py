"""What a command found: text for a person, JSON for a program, or both, as ``--json`` says."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ._checks import sentence

_STDOUT = "-"


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add ``--json [FILE]``, which :func:`say` and :func:`show` take as ``args.json``."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="print JSON in place of the text, or write it to FILE beside the text",
    )


def check_folder(flag: str, file: str | None) -> None:
    """Refuse a file that could not be written, before minutes of work and not after.

    Raises:
        FileNotFoundError: its folder does not exist.
    """
    folder = Path(file or ".").parent
    if not folder.is_dir():
        raise FileNotFoundError(sentence(f"{flag} {file}", "a file in a folder that exists", f"Create {folder} first."))


def say(line: str, file: str | None) -> None:
    """Print a line on the way; to stderr where stdout is for JSON."""
    print(line, file=sys.stderr if file == _STDOUT else sys.stdout, flush=True)


def show(result: dict[str, Any], text: str | None, file: str | None) -> None:
    """Print ``text``, where there is one, and write ``result``; JSON for stdout takes the text's place."""
    written = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if file == _STDOUT:
        sys.stdout.write(written)
        return
    if text is not None:
        print(text)
    if file is not None:
        Path(file).write_text(written, encoding="utf-8")
