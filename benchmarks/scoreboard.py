"""Prove what fastcl promises: every row of benchmarks/promises.py that this machine can prove, and a figure for each.

    python -m benchmarks.scoreboard                 all rows, into benchmarks/results/scoreboard.json
    python -m benchmarks.scoreboard --only 2,11     some rows; what is known of the others stays

Tests run once, all together, under tests/planted.py, which asks every numeric assertion about wrong results as well. A
row passes where all of its tests pass, none accepts a wrong result, and one at least was not skipped. Without a CUDA
device rows that need one are "not run". The exit code is 1 where a row fails. ``python -m benchmarks.render`` writes
docs/reliability.md from the results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import record
from .aot import Compiled, faults
from .promises import PROMISES, Promise

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BOARD = RESULTS / "scoreboard.json"
OF_THE_BOARD = "tests/test_scoreboard.py::test_the_board_has_every_row_and_none_that_failed"  # which is being written
PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


def main(argv: list[str] | None = None) -> int:
    """1 if a row fails, 2 for a row that is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoreboard", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", metavar="ROWS", help="rows by number, with commas between; all without")
    parser.add_argument("--workers", default="logical", help="processes that run the tests")
    parser.add_argument("--json", type=Path, default=BOARD, metavar="FILE", help="where results are, and go")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else [promise.row for promise in PROMISES]
    unknown = set(wanted) - {promise.row for promise in PROMISES}
    if unknown:
        parser.error(f"got no row {', '.join(sorted(unknown))}; expected some of {', '.join(p.row for p in PROMISES)}")
    promises = [promise for promise in PROMISES if promise.row in wanted]
    rows = proved(promises, args.workers)
    for row in rows:
        print(f"{row['row']:>4}  {row['outcome']:8} {row['figure']}")
    known = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
    merged = {row["row"]: row for row in (*known, *rows)}
    order = [promise.row for promise in PROMISES if promise.row in merged]
    record.write(args.json, {"rows": [merged[row] for row in order]})
    return int(any(row["outcome"] == FAIL for row in rows))


def proved(promises: Iterable[Promise], workers: str) -> list[dict[str, Any]]:
    """A row of results for each promise."""
    import torch

    from fastcl import _info

    gpu = torch.cuda.is_available()
    here = [promise for promise in promises if gpu or not promise.needs_gpu]
    machine = {**_info.machine(), "gpu": torch.cuda.get_device_name() if gpu else None}
    begun = {**_info.provenance(""), "machine": machine}
    tests = tested(sorted({test for promise in here for test in promise.tests}), workers)
    rows = []
    for promise in promises:
        row = {"row": promise.row, **begun, "command": f"python -m benchmarks.scoreboard --only {promise.row}"}
        if promise not in here:
            row |= {"outcome": NOT_RUN, "figure": "needs a CUDA device"}
        elif promise.record:
            row |= of_record(promise.record)
        elif promise.command:
            row |= of_command(promise.command)
        else:
            row |= of_tests([test for node, test in tests.items() if any(belongs(node, to) for to in promise.tests)])
        rows.append(row)
    return rows


def tested(nodes: list[str], workers: str) -> dict[str, dict[str, Any]]:
    """Every test by its node, as tests/planted.py saw it."""
    if not nodes:
        return {}
    outer = [node for node in nodes if not any(node != other and belongs(node, other) for other in nodes)]
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "tests.json"
        words = ["-m", "pytest", "-q", "-n", workers, "-p", "tests.planted", "--planted-json", str(seen), *outer]
        done = subprocess.run([sys.executable, *words, "--deselect", OF_THE_BOARD], cwd=ROOT, check=False)
        if done.returncode not in (0, 1):  # not even all tests were collected: what ran proves nothing of the others
            raise SystemExit(f"benchmarks.scoreboard: pytest ended with exit code {done.returncode}")
        found: dict[str, dict[str, Any]] = json.loads(seen.read_text(encoding="utf-8"))
    return found


def belongs(node: str, to: str) -> bool:
    """Whether a test is in a folder, in a file, or has other parameters of a test."""
    return node == to or node.startswith((f"{to}/", f"{to}::", f"{to}["))


def of_tests(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Outcome and figure of a row from its tests: how many, what they compared, and how near the bounds."""
    outcomes = Counter(test["outcome"] for test in tests)
    accepted = sorted({wrong for test in tests for wrong in test.get("accepted", ())})
    asked = sum(test.get("asked", 0) for test in tests)
    planted = sum(sum(test.get("planted", {}).values()) for test in tests)
    nearest: dict[str, float] = {}
    for bound, error in ((b, e) for test in tests for b, e in test.get("nearest", {}).items()):
        nearest[bound] = max(nearest.get(bound, 0.0), error)
    figure = f"{outcomes['passed']:,} tests"
    if asked:
        figure += f"; {asked:,} comparisons, {planted - len(accepted):,} of {planted:,} wrong results refused"
    if outcomes["failed"] or accepted:
        figure = f"{outcomes['failed']:,} of {len(tests):,} tests failed, {len(accepted):,} wrong results accepted"
    return {
        "outcome": FAIL if outcomes["failed"] or accepted else PASS if outcomes["passed"] else NOT_RUN,
        "figure": figure,
        "tests": dict(outcomes),
        "skipped": dict(Counter(test["reason"] for test in tests if test["outcome"] == "skipped")),
        "comparisons": asked,
        "planted": planted,
        "accepted": accepted,
        "largest_error_by_bound": {bound: nearest[bound] for bound in sorted(nearest, key=float)},
    }


def of_command(command: str) -> dict[str, Any]:
    """Outcome and figure of a row from a command: its exit code, and its last line."""
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else words[0]
    env = {**os.environ, "PYTHON": sys.executable}  # of a Makefile
    done = subprocess.run(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip()]
    counted = [line for line in lines if re.search(r"\d+ passed", line)]  # of pytest, which make does not end with
    figure = "; ".join(counted) or (lines[-1] if lines else "")
    failed = f"exit code {done.returncode}: {lines[-1] if lines else 'no output'}"
    return {"outcome": PASS, "figure": figure} if done.returncode == 0 else {"outcome": FAIL, "figure": failed}


def of_record(name: str) -> dict[str, Any]:
    """Outcome and figure of a row from a committed measurement, which says itself when and where it was made."""
    file = RESULTS / name
    if not file.exists():
        return {"outcome": NOT_RUN, "figure": f"no benchmarks/results/{name} yet"}
    result = json.loads(file.read_text(encoding="utf-8"))
    made = {key: result[key] for key in ("command", "date", "commit", "machine", "versions") if key in result}
    good, figure = RECORDS[name](result)
    return {**made, "outcome": PASS if good else FAIL, "figure": figure}


def _mutants(result: dict[str, Any]) -> tuple[bool, str]:
    killed = sum(row["outcome"] == "killed" for row in result["rows"])
    return killed == len(result["rows"]), f"{killed} of {len(result['rows'])} mutants killed"


def _aot(result: dict[str, Any]) -> tuple[bool, str]:
    rows, failed = [Compiled(**row) for row in result["rows"]], result["not_compiled"]
    wrong = len(faults(rows)) + len(failed)
    return not wrong, f"{len(rows):,} kernels for {len({row.arch for row in rows})} architectures, {wrong} with a fault"


def _digits(result: dict[str, Any]) -> tuple[bool, str]:
    checks = result["checks"]
    return all(checks.values()), f"{sum(checks.values())} of {len(checks)} requirements"


RECORDS: dict[str, Callable[[dict[str, Any]], tuple[bool, str]]] = {
    "mutants.json": _mutants,
    "aot.json": _aot,
    "digits.json": _digits,
}

if __name__ == "__main__":
    sys.exit(main())
