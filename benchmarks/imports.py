"""What ``import fastcl`` costs after ``import torch``; at most 50 ms are meant.

python -m benchmarks.imports

Every round is a process of its own. Bytecode is kept, whatever ``PYTHONDONTWRITEBYTECODE`` says: a first round, which
is not counted, writes it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 50.0  # milliseconds
SCRIPT = "import torch, time; start = time.perf_counter(); import fastcl; print(1e3 * (time.perf_counter() - start))"


def milliseconds(rounds: int) -> list[float]:
    """Of each round, the least first."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def one() -> float:
        command = [sys.executable, "-c", SCRIPT]
        return float(subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)

    one()
    return sorted(one() for _ in range(rounds))


def main() -> int:
    """1 if the median is above the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="processes that import it (default: %(default)s)")
    taken = milliseconds(parser.parse_args().rounds)
    found = f"{median(taken):.1f} ms ({taken[0]:.1f} to {taken[-1]:.1f})"
    print(f"import fastcl after import torch: {found}, at most {LIMIT:.0f} are meant")
    return int(median(taken) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
