r"""Which loss became slower or hungrier: ratios to eager in one run, against the stored ratios of an earlier run.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/bench_losses.py --benchmark-timer time.process_time \
        --benchmark-json losses.json
    python -m benchmarks.regressions losses.json            compares with benchmarks/results/losses-cpu.json
    python -m benchmarks.regressions losses.json --store    makes this run the one to compare with

A ratio is the time of a contender's fastest round, or its peak memory, over that of *dense* (eager, which is
``fastcl.reference``) in the same run, so that another machine changes it little. The timer counts CPU time of one
thread, so that a busy machine changes it little too; on a GPU leave it out: it would count the host's. Where dense was
skipped there is no ratio. More than a quarter above the stored one is a regression, and the exit code is 1. Needs
nothing but Python, but for ``--store``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import write

BASELINE = Path(__file__).parent / "results" / "losses-cpu.json"
EAGER = "dense"
_NOT_OURS = (EAGER, "cross-entropy")  # whose changes are torch's
LIMIT = 1.25
_SIZES = ("rows", "dim", "device", "threads", "timer")  # of which another makes other ratios
KINDS = {"time": "SLOWER", "memory": "HUNGRIER"}


@dataclass(frozen=True)
class Change:
    """A ratio to eager, then and now; ``worse`` where it grew beyond the limit."""

    loss: str
    contender: str
    kind: str
    then: float
    now: float

    @property
    def times(self) -> float:
        return self.now / self.then

    @property
    def worse(self) -> bool:
        return self.times > LIMIT


def ratios(run: dict[str, Any]) -> dict[str, Any]:
    """What ``--benchmark-json`` wrote, as ``size`` and ``rows`` of ``loss``, ``contender``, ``time`` and ``memory``.

    Raises:
        ValueError: not such a file, or one of several sizes.
    """
    try:
        benchmarks = [
            (b["group"], b["extra_info"]["contender"], b["stats"]["min"], {**b["extra_info"], **b["options"]})
            for b in run["benchmarks"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"got a file without {error}; expected one of pytest benchmarks/bench_losses.py --benchmark-json FILE. "
            "Measure again."
        ) from None
    sizes = {tuple(extra[name] for name in _SIZES) for *_, extra in benchmarks}
    if len(sizes) != 1:
        raise ValueError(f"got {len(sizes)} sizes; expected one. Measure again, all in one run.")
    eager = {loss: (fastest, extra["peak_bytes"]) for loss, name, fastest, extra in benchmarks if name == EAGER}
    rows = [
        {
            "loss": loss,
            "contender": name,
            "time": fastest / eager[loss][0],
            "memory": extra["peak_bytes"] / eager[loss][1],
        }
        for loss, name, fastest, extra in benchmarks
        if name not in _NOT_OURS and loss in eager
    ]
    return {"size": dict(zip(_SIZES, sizes.pop(), strict=True)), "rows": rows}


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Of everything that both have.

    Raises:
        ValueError: they are of different sizes, devices or numbers of threads.
    """
    for name, stored_size in then["size"].items():
        if now["size"][name] != stored_size:
            raise ValueError(
                f"got a run with {name} = {now['size'][name]}; expected {stored_size}, as is stored. Measure again."
            )
    stored = {(row["loss"], row["contender"]): row for row in then["rows"]}
    return [
        Change(row["loss"], row["contender"], kind, stored[key][kind], row[kind])
        for row in now["rows"]
        if (key := (row["loss"], row["contender"])) in stored
        for kind in KINDS
    ]


def report(then: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines for people, the worst changes last, and whether there is no regression."""
    found = sorted(changes(then, now), key=lambda change: change.times)
    lines = [f"{'loss':<28}{'contender':<16}{'of eager':<10}{'then':>8}{'now':>8}  {'now / then':>10}"]
    lines += [
        f"{c.loss:<28}{c.contender:<16}{c.kind:<10}{c.then:>8.3f}{c.now:>8.3f}  {c.times:>9.2f} x"
        + (f"  {KINDS[c.kind]}" if c.worse else "")
        for c in found
    ]
    names = [{(row["loss"], row["contender"]) for row in run["rows"]} for run in (then, now)]
    for what, only in (("not measured now", names[0] - names[1]), ("not stored", names[1] - names[0])):
        if only:
            lines.append(f"{what}: {', '.join(sorted(f'{loss} {name}' for loss, name in only))}")
    worse = sum(change.worse for change in found)
    lines.append(f"{worse} of {len(found)} ratios grew by more than {LIMIT - 1:.0%}")
    return lines, bool(found) and not worse


def main(argv: list[str] | None = None) -> int:
    """Compare, or store; 1 where something regressed, or nothing could be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regressions", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="the stored ratios (default: %(default)s)")
    parser.add_argument("--store", action="store_true", help="write them instead of comparing")
    args = parser.parse_args(argv)
    run = json.loads(args.run.read_text(encoding="utf-8"))
    now = ratios(run)
    if args.store:
        write(args.baseline, {**_provenance(run), **now})
        print(f"{len(now['rows'])} rows stored in {args.baseline}")
        return 0
    lines, good = report(json.loads(args.baseline.read_text(encoding="utf-8")), now)
    print("\n".join(lines))
    return 0 if good else 1


def _provenance(run: dict[str, Any]) -> dict[str, Any]:
    """Of the run, whose own record also names the host."""
    from fastcl._info import cpu_model, versions

    commit = run["commit_info"]
    return {
        "command": "OMP_NUM_THREADS=1 python -m pytest benchmarks/bench_losses.py --benchmark-timer time.process_time"
        " --benchmark-json FILE",
        "date": run["datetime"][:10],
        "commit": commit["id"][:7] + ("-dirty" if commit["dirty"] else ""),
        "versions": versions(),
        "machine": {"device": cpu_model()},
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"benchmarks.regressions: {error}")  # exit code 1
