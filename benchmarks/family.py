"""Every loss of the family against its dense form: time and peak memory, forward and backward, over the batch size.

    OMP_NUM_THREADS=1 python -m benchmarks.family --json benchmarks/results/family-cpu.json

Two claims are to be shown, or refuted, for every row of ``fastcl.testing.CASES``: fastcl's memory grows as N D, so
fourfold from 2,048 to 8,192 rows where a matrix grows sixteenfold; from 2,048 rows on it is not slower than dense.

Contenders: *dense*, the usual form in ``benchmarks.dense`` or else ``fastcl.reference``; *fastcl*, with the backend
that it chooses itself. Peak memory is measured twice: as it is, and with nothing kept for the backward. What native
kernels keep is a cache of at most 256 MiB: it grows with N² up to that bound, not beyond, and would hide the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastcl import functional, reference
from fastcl._info import commit, cpu_model, versions
from fastcl._measure import interleaved_seconds, median_ratio, peak_bytes
from fastcl.backends import native
from fastcl.testing import CASES, LossCase

from . import dense

Step = Callable[[], object]
_BY_LABEL = {case.label: case for case in CASES}
# Tests have one anchor, or seven proxies: no matrix to speak of. These are what such losses are used with.
HALF = replace(_BY_LABEL["supcon-one"], variant="one-view")
ROWS = (
    *CASES,
    HALF,
    replace(_BY_LABEL["cosface"], rows=lambda b: (b, b), classes=lambda n: n, variant="N-classes"),
)
NOISE = 0.95  # a contender this little slower is not called slower
FROM, TO = 2048, 8192  # where memory growth is taken


def contenders(case: LossCase, n: int, dim: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """Forward and backward of both, on the same N rows, and what the row of the table says about them."""
    batch = max(1, n // case.rows(1)[0])
    args, kwargs = case.inputs(batch, dim)
    if "temperature" in kwargs:
        kwargs["temperature"] = case.numbers["temperature"]
    if case is HALF:
        kwargs["anchors"] = len(args[0]) // 2
    wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    usual = dense.usual(case.name, kwargs)

    def step(function: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(*args, **kwargs), wanted)

    steps = {"dense": step(usual or getattr(reference, case.name)), "fastcl": step(getattr(functional, case.name))}
    shape = {
        "loss": case.label,
        "rows": case.rows(batch)[0],
        "dense_form": "usual" if usual else "reference",
        "linear": case.name in dense.LINEAR,
    }
    return steps, shape


def measure(case: LossCase, n: int, dim: int, rounds: int, skipped: str | None) -> dict[str, Any]:
    """One row: seconds per round and peak bytes of both contenders."""
    steps, row = contenders(case, n, dim)
    if skipped:
        del steps["dense"]
    # Short calls are noisy, and cheap: they take more rounds.
    seconds = interleaved_seconds(steps, rounds=31 if row["linear"] else max(rounds, min(15, 15_000 // n)))
    peak: dict[str, int] = {}
    for name, step in steps.items():
        native.release_workspace()  # so that taking it is counted
        peak[name] = peak_bytes(step)
    with nothing_kept():
        peak["fastcl, nothing kept"] = peak_bytes(steps["fastcl"])
    faster = None if skipped else median_ratio(seconds["dense"], seconds["fastcl"])
    return {
        **row,
        "size": n,
        "dim": dim,
        "seconds": seconds,
        "median_seconds": {name: median(taken) for name, taken in seconds.items()},
        "peak_bytes": peak,
        "times_faster": faster,
        "skipped": skipped,
    }


@contextmanager
def nothing_kept() -> Iterator[None]:
    """The native kernels without their cache. FASTCL_WORKSPACE_MB=0 would also shrink the tiles of ``chunked``."""
    native.release_workspace()
    budget, native._WORKSPACE = native._WORKSPACE, 0
    try:
        yield
    finally:
        native._WORKSPACE = budget


def too_large(before: dict[str, Any] | None, n: int, gigabytes: float, call_seconds: float) -> str | None:
    """Why dense is not run at n rows, by what it took at the size before: both grow with the square, or less."""
    if before is None:
        return None
    if before["skipped"]:
        return str(before["skipped"])
    factor = (n / before["size"]) ** (1 if before["linear"] else 2)
    memory = before["peak_bytes"]["dense"] * factor / 1e9
    seconds = before["median_seconds"]["dense"] * factor
    if memory > gigabytes:
        return f"would need about {memory:.2g} GB, the limit is {gigabytes:g}"
    if seconds > call_seconds:
        return f"would take about {seconds:.2g} s a call, the limit is {call_seconds:g}"
    return None


def growth(rows: list[dict[str, Any]], loss: str, contender: str) -> float | None:
    """How many times the peak memory grows from FROM to TO rows, where both were measured."""
    peaks = {
        row["size"]: row["peak_bytes"][contender]
        for row in rows
        if row["loss"] == loss and contender in row["peak_bytes"]
    }
    return peaks[TO] / peaks[FROM] if FROM in peaks and TO in peaks else None


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences about every row that refutes a claim."""
    found = [
        f"{row['loss']}, N = {row['size']:,}: {row['times_faster']:.2f} x the speed of dense "
        f"({row['median_seconds']['fastcl'] * 1e3:.1f} against {row['median_seconds']['dense'] * 1e3:.1f} ms)"
        for row in rows
        if row["size"] >= FROM and row["times_faster"] is not None and row["times_faster"] < NOISE
    ]
    for loss in dict.fromkeys(row["loss"] for row in rows):
        times = growth(rows, loss, "fastcl, nothing kept")
        if times is not None and times > 5:
            found.append(f"{loss}: memory grows {times:.1f}-fold from {FROM:,} to {TO:,} rows")
    return found


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="512,2048,8192")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="at least; small sizes take more")
    parser.add_argument("--dense-limit-gb", type=float, default=6.0)
    parser.add_argument("--dense-limit-seconds", type=float, default=20.0)
    parser.add_argument("--losses", default="", help="only labels that contain one of these, separated by commas")
    parser.add_argument("--json")
    args = parser.parse_args()
    sizes = sorted(map(int, args.rows.split(",")))
    chosen = [c for c in ROWS if any(word in c.label for word in args.losses.split(","))]
    rows = []
    for case in chosen:
        before = None
        for n in sizes:
            skipped = too_large(before, n, args.dense_limit_gb, args.dense_limit_seconds)
            before = measure(case, n, args.dim, args.rounds, skipped)
            rows.append(before)
            print(_line(before), flush=True)
    found = findings(rows)
    print("\n".join(found or ["nothing refutes the claims"]))
    result = {
        "command": f"python -m benchmarks.family --rows {args.rows} --dim {args.dim} --rounds {args.rounds}"
        f" --dense-limit-gb {args.dense_limit_gb:g} --dense-limit-seconds {args.dense_limit_seconds:g}"
        + (f" --losses {args.losses}" if args.losses else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions(),
        "machine": {"device": cpu_model(), "instructions": native.isa(), "threads": torch.get_num_threads()},
        "rows": rows,
        "findings": found,
    }
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def _line(row: dict[str, Any]) -> str:
    ms = "  ".join(f"{name} {taken * 1e3:.2f} ms" for name, taken in row["median_seconds"].items())
    mb = "  ".join(f"{name} {peak / 1e6:.2f}" for name, peak in row["peak_bytes"].items())
    faster = "" if row["times_faster"] is None else f"{row['times_faster']:.2f} x"
    skipped = f"  dense skipped: {row['skipped']}" if row["skipped"] else ""
    return f"{row['loss']:<28}{row['rows']:>6}  {faster:>8}  {ms}  MB: {mb}{skipped}"


if __name__ == "__main__":
    main()
