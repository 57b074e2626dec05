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
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastcl import functional, reference
from fastcl._bench import nothing_kept
from fastcl._info import cpu_model, provenance
from fastcl._measure import beyond, interleaved_seconds, median_ratio, peak_bytes
from fastcl.backends import native
from fastcl.testing import CASES, LossCase

from . import dense
from .record import updated, write

Step = Callable[[], object]
_BY_LABEL = {case.label: case for case in CASES}
# Beside the inputs of tests, such as these losses are used with. Tests have seven proxies, which is no matrix to speak
# of, and classes of a few rows: a few positive pairs per row, where ten classes make N / 10 of each.
_OF_ALL_POSITIVES = ("triplet_all", "triplet_semi_hard")
ROWS = (
    *CASES,
    replace(_BY_LABEL["cosface"], rows=lambda b: (b, b), classes=lambda n: n, variant="N-classes"),
    *(replace(_BY_LABEL[name], classes=lambda n: 10, variant="ten-classes") for name in _OF_ALL_POSITIVES),
)
CONTENDERS = ("dense", "fastcl")
NOISE = 0.95  # a contender this little slower is not called slower
FROM, TO = 2048, 8192  # where memory growth is taken


def contenders(case: LossCase, n: int, dim: int) -> tuple[dict[str, Step], dict[str, Any]]:
    """Forward and backward of both, on the same N rows, and what the row of the table says about them."""
    batch = max(1, n // case.rows(1)[0])
    args, kwargs = case.inputs(batch, dim)
    if "temperature" in kwargs:
        kwargs["temperature"] = case.numbers["temperature"]
    wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    usual = dense.usual(case.name, kwargs)

    def step(function: Callable[..., Tensor]) -> Step:
        return lambda: torch.autograd.grad(function(*args, **kwargs), wanted)

    steps = {"dense": step(usual or getattr(reference, case.name)), "fastcl": step(getattr(functional, case.name))}
    shape = {
        "loss": case.label,
        "rows": case.rows(batch)[0],
        "dense_form": "usual" if usual else "reference",
        # as which power of N the dense form grows; it forms candidates for every positive pair of the triplets
        "order": 1 if case.name in dense.LINEAR else 3 if case.variant == "ten-classes" else 2,
    }
    return steps, shape


def measure(case: LossCase, n: int, dim: int, rounds: int, skipped: dict[str, str]) -> dict[str, Any]:
    """One row: seconds per round and peak bytes of the contenders that are not skipped."""
    steps, row = contenders(case, n, dim)
    steps = {name: step for name, step in steps.items() if name not in skipped}
    # Short calls are noisy, and cheap: they take more rounds.
    seconds = interleaved_seconds(steps, rounds=31 if row["order"] == 1 else max(rounds, min(15, 15_000 // n)))
    peak: dict[str, int] = {}
    for name, step in steps.items():
        native.release_workspace()  # so that taking it is counted
        peak[name] = peak_bytes(step)
    if "fastcl" in steps:
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


def too_large(
    before: dict[str, Any] | None, n: int, contender: str, gigabytes: float, call_seconds: float
) -> str | None:
    """Why a contender is not run at n rows, by what it took at the size before; fastcl's claim is not trusted here."""
    if before is None:
        return None
    if reason := before["skipped"].get(contender):
        return str(reason)
    factor = (n / before["size"]) ** (before["order"] if contender == "dense" else 2)
    memory, seconds = before["peak_bytes"][contender] * factor, before["median_seconds"][contender] * factor
    return beyond(memory, seconds, gigabytes, call_seconds)


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
    found += [
        f"{r['loss']}, N = {r['size']:,}: fastcl {r['skipped']['fastcl']}" for r in rows if "fastcl" in r["skipped"]
    ]
    for loss in dict.fromkeys(row["loss"] for row in rows):
        times = growth(rows, loss, "fastcl, nothing kept")
        if times is not None and times > 5:
            found.append(f"{loss}: memory grows {times:.1f}-fold from {FROM:,} to {TO:,} rows")
    return found


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.family", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="512,2048,8192", help="sizes N, with commas (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="features (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at least; small sizes take more")
    parser.add_argument(
        "--limit-gb", type=float, default=6.0, help="skip what would need more memory (default: %(default)s)"
    )
    parser.add_argument("--limit-seconds", type=float, default=20.0, help="of one call")
    parser.add_argument("--losses", default="", help="only labels that contain one of these, separated by commas")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--update", help="results of a whole run, of which the rows measured now take the place")
    args = parser.parse_args()
    sizes = sorted(map(int, args.rows.split(",")))
    chosen = [c for c in ROWS if any(word in c.label for word in args.losses.split(","))]
    rows = []
    for case in chosen:
        before = None
        for n in sizes:
            reasons = {name: too_large(before, n, name, args.limit_gb, args.limit_seconds) for name in CONTENDERS}
            skipped = {name: reason for name, reason in reasons.items() if reason}
            before = measure(case, n, args.dim, args.rounds, skipped)
            rows.append(before)
            print(_line(before), flush=True)
    found = findings(rows)
    print("\n".join(found or ["nothing refutes the claims"]))
    result = {
        **provenance(
            f"python -m benchmarks.family --rows {args.rows} --dim {args.dim} --rounds {args.rounds}"
            f" --limit-gb {args.limit_gb:g} --limit-seconds {args.limit_seconds:g}"
            + (f" --losses {args.losses}" if args.losses else "")
        ),
        "machine": {"device": cpu_model(), "instructions": native.isa(), "threads": torch.get_num_threads()},
        "rows": rows,
        "findings": found,
    }
    if args.update:
        result = updated(args.update, result, ("loss", "size"), findings)
    write(args.json, result)


def _line(row: dict[str, Any]) -> str:
    ms = "  ".join(f"{name} {taken * 1e3:.2f} ms" for name, taken in row["median_seconds"].items())
    mb = "  ".join(f"{name} {peak / 1e6:.2f}" for name, peak in row["peak_bytes"].items())
    faster = "" if row["times_faster"] is None else f"{row['times_faster']:.2f} x"
    skipped = "".join(f"  {name} skipped: {reason}" for name, reason in row["skipped"].items())
    return f"{row['loss']:<28}{row['rows']:>6}  {faster:>8}  {ms}  MB: {mb}{skipped}"


if __name__ == "__main__":
    main()
