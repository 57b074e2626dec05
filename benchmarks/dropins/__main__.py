"""Every drop-in beside its original, on the CPU: time, peak memory, and how far their numbers are apart.

``python -m benchmarks.dropins --json benchmarks/results/dropins-cpu.json``. Both run in one process, interleaved. Peak
memory of ours is measured with nothing kept for the backward, for what native kernels keep is a bounded cache.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from typing import Any

import torch

from fastcl._bench import nothing_kept
from fastcl._info import cpu_model, provenance
from fastcl._measure import beyond, interleaved_seconds, median_ratio, peak_bytes
from fastcl.backends import native

from ..record import updated, write
from . import LIBRARIES, Case, Draw, backward, cases, missing, upstream_version

PARITY = [(5, 3), (17, 40), (61, 16), (130, 7), (33, 64)]  # n, d; each with several seeds


def apart(case: Case) -> dict[str, float]:
    """Largest relative distance of losses and of gradients over random problems, in fp32."""
    worst = {"loss": 0.0, "gradient": 0.0}
    for seed in range(4):
        for n, d in PARITY:
            problem = case.build(Draw(n, d, seed=seed))
            (loss, grads), (want, wanted) = (backward(f, problem.leaves) for f in (problem.ours, problem.theirs))
            for kind, pairs in (("loss", [(loss, want)]), ("gradient", list(zip(grads, wanted, strict=True)))):
                for got, exact in pairs:
                    distance = ((got - exact).norm() / exact.norm().clamp(min=1e-3)).item()
                    worst[kind] = max(worst[kind], distance)
    return worst


def measure(case: Case, n: int, d: int, rounds: int, theirs: bool) -> dict[str, Any]:
    problem = case.build(Draw(n, d, usual=True))
    steps = {"fastcl": partial(backward, problem.ours, problem.leaves)}
    if theirs:
        steps["original"] = partial(backward, problem.theirs, problem.leaves)
    slowest = max(taken[0] for taken in interleaved_seconds(steps, rounds=1).values())
    # short calls are noisy, and cheap: they take more rounds
    seconds = interleaved_seconds(steps, rounds=max(rounds, min(15, int(0.5 / slowest))))
    peak = {}
    for name, step in steps.items():
        with nothing_kept():
            peak[name] = peak_bytes(step)
    return {
        "size": n,
        "median_seconds": {name: median(taken) for name, taken in seconds.items()},
        "times_faster": median_ratio(seconds["original"], seconds["fastcl"]) if theirs else None,
        "peak_bytes": peak,
    }


def skipped(case: Case, n: int, before: dict[str, Any] | None, gigabytes: float, limit: float) -> str | None:
    """Why the original is not run at n rows: what it took at the size before, taken for quadratic."""
    if n > case.largest:
        return f"is not tried beyond {case.largest} rows"
    if before is None or "original" not in before["peak_bytes"]:
        return None if before is None else str(before["skipped"])
    factor = (n / before["size"]) ** 2
    memory, seconds = before["peak_bytes"]["original"] * factor, before["median_seconds"]["original"] * factor
    return beyond(memory, seconds, gigabytes, limit)


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences about every row that refutes what is asked of a fused drop-in, or of any."""
    found = []
    for row in rows:
        name = f"{row['library']} {row['label']}"
        found += [f"{name}: {kind} {far:.1e} apart" for kind, far in row["apart"].items() if far > row["tolerance"]]
        at = {size["size"]: size for size in row["sizes"]}
        for n, size in at.items():
            faster = size["times_faster"]
            if row["fused"] and n >= 2048 and faster is not None and faster < 1:
                found.append(f"{name}, N = {n:,}: {faster:.2f} x the speed of the original")
        peaks = [size["peak_bytes"]["fastcl"] for n, size in at.items() if n >= 2048]
        # O(N D) grows fourfold from 2,048 to 8,192, a matrix sixteenfold
        if row["fused"] and len(peaks) == 2 and peaks[1] > 6 * peaks[0]:
            found.append(f"{name}: peak memory grows {peaks[1] / peaks[0]:.1f}-fold from 2,048 to 8,192 rows")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropins", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="512,2048,8192", help="sizes N, with commas (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="features (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at least; small sizes take more")
    parser.add_argument(
        "--limit-gb",
        type=float,
        default=6.0,
        help="skip an original that would need more memory (default: %(default)s)",
    )
    parser.add_argument("--limit-seconds", type=float, default=12.0, help="of one call of the original")
    parser.add_argument("--cases", default="", help="only 'library label' that contain one of these, comma-separated")
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--update", help="results of a whole run, of which the cases measured now take the place")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    absent = {name: reason for name in LIBRARIES if (reason := missing(name))}
    for case in cases():
        name = f"{case.library} {case.label}"
        if case.library in absent or not any(word in name for word in args.cases.split(",")):
            continue
        sizes: list[dict[str, Any]] = []
        for n in sorted({*map(int, args.rows.split(",")), *([case.largest] if case.largest < 10**9 else [])}):
            why = skipped(case, n, sizes[-1] if sizes else None, args.limit_gb, args.limit_seconds)
            if why and not case.fused:
                continue  # ours is the original there
            sizes.append({**measure(case, n, args.dim, args.rounds, not why), "skipped": why})
            print(name, _line(sizes[-1]), flush=True)
        rows.append(
            {
                "library": case.library,
                "label": case.label,
                "fused": case.fused,
                "tolerance": case.tolerance,
                "apart": apart(case),
                "sizes": sizes,
            }
        )
    found = findings(rows)
    print("\n".join([*absent.values(), *(found or ["nothing refutes the claims"])]))
    result = {
        **provenance(
            f"python -m benchmarks.dropins --rows {args.rows} --dim {args.dim} --rounds {args.rounds}"
            f" --limit-gb {args.limit_gb:g} --limit-seconds {args.limit_seconds:g}"
            + (f" --cases '{args.cases}'" if args.cases else "")
        ),
        "originals": {name: upstream_version(name) for name in LIBRARIES if name not in absent},
        "absent": absent,
        "machine": {"device": cpu_model(), "instructions": native.isa(), "threads": torch.get_num_threads()},
        "rows": rows,
        "findings": found,
    }
    if args.update:
        result = updated(args.update, result, ("library", "label"), findings)
    write(args.json, result)


def _line(size: dict[str, Any]) -> str:
    ms = "  ".join(f"{name} {taken * 1e3:.2f} ms" for name, taken in size["median_seconds"].items())
    mb = "  ".join(f"{name} {peak / 1e6:.1f} MB" for name, peak in size["peak_bytes"].items())
    faster = "" if size["times_faster"] is None else f"{size['times_faster']:.2f} x"
    return f"{size['size']}: {faster}  {ms}  {mb}  {size['skipped'] or ''}"


if __name__ == "__main__":
    main()
