"""Run a script, as it is, with the losses of some libraries replaced."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from . import LIBRARIES, patch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcl.integrations", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="keep the originals' numbers also where they are wrong")
    parser.add_argument("libraries", help=f"separated by commas: {', '.join(LIBRARIES)}")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    patch(*args.libraries.split(","), strict=args.strict)
    sys.argv = [args.script, *args.arguments]
    sys.path.insert(0, str(Path(args.script).resolve().parent))  # as for a script that is run by itself
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main()
