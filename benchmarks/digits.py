"""Does the trainer learn? Three seeds of every method on digits, controls that must fail, and one run repeated.

python -m benchmarks.digits      about half an hour; writes results/digits.json, exits with 1 where a requirement fails
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastcl._info import cpu_model, provenance
from fastcl.trainer import TrainConfig, train

from .record import write

SEEDS = (0, 1, 2)
LEAST = {"simclr": 96.0, "moco": 95.5, "byol": 95.0, "simsiam": 95.0, "supcon": 98.0}  # few10, percent
CHANCE = math.log(2 * TrainConfig.batch_size - 1)  # NT-Xent of embeddings that tell nothing, ln(2N - 1)
RESULT = Path(__file__).parent / "results" / "digits.json"


def main() -> int:
    """Run everything, write the result, and return the exit code."""
    argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__.partition("\n")[0]).parse_args()
    head = provenance("python -m benchmarks.digits")  # before anything is written
    with tempfile.TemporaryDirectory() as folder:
        rows = [_train(folder, method=method, seed=seed) for method in LEAST for seed in SEEDS]
        control = _train(folder, method="simclr", seed=0, control="shuffled-pairs")
        # Nothing learned: no better than random weights. No negatives but the first ones: away from them all together.
        untrained = _train(folder, method="simclr", seed=0, control="no-training")
        frozen = _train(folder, method="moco", seed=0, control="frozen-queue")
        # All negatives weigh the same, so the loss has little to gain; a probe need not see that.
        hot = _train(folder, method="simclr", seed=0, temperature=100.0, output=f"{folder}/hot")
        again = _train(folder, method="simclr", seed=0, output=f"{folder}/again")
        curves = [Path(folder, name, "metrics.csv").read_bytes() for name in ("simclr-0-None", "again")]
    checks = {
        **{f"{row['method']} seed {row['seed']}: {what}": ok for row in rows for what, ok in _checks(row).items()},
        "control: loss within 0.05 of ln(2N-1)": abs(control["loss"] - CHANCE) <= 0.05,
        "control: few10 at most raw + 2": _few10(control, "trained") <= _few10(control, "raw") + 2,
        "no training: few10 at most random + 2": _few10(untrained, "trained") <= _few10(untrained, "random") + 2,
        "frozen queue: effective rank at most 5": frozen["embeddings"]["effective_rank"] <= 5,
        "frozen queue: few10 below raw + 5": _few10(frozen, "trained") < _few10(frozen, "raw") + 5,
        "temperature 100: loss above ln(2N-1) - 0.05": hot["loss"] > CHANCE - 0.05,
        "same seed twice: identical metrics": curves[0] == curves[1]
        and all(rows[0][key] == again[key] for key in ("loss", "probe")),
    }
    result = {
        **head,
        "machine": {"device": cpu_model(), "threads": rows[0]["threads"]},
        "checks": checks,
        "rows": rows,
        "control": control,
        "more_controls": [untrained, frozen, hot | {"control": "temperature 100"}],
        "repeat": again,
    }
    write(RESULT, result)
    for what, ok in checks.items():
        print(f"{'pass' if ok else 'FAIL'}  {what}")
    return 0 if all(checks.values()) else 1


def _train(folder: str, **settings: Any) -> dict[str, Any]:
    output = f"{folder}/{settings['method']}-{settings['seed']}-{settings.get('control')}"
    result = train(TrainConfig(**{"output": output, **settings}))
    scores = {name: round(probe["few10"]["mean"], 1) for name, probe in result["probe"].items()}
    print(f"{settings}: loss {result['loss']:.3f}, few10 {scores}, {result['seconds']:.0f} s", flush=True)
    return result


def _checks(row: dict[str, Any]) -> dict[str, bool]:
    method, trained = row["method"], _few10(row, "trained")
    checks = {
        f"few10 at least {LEAST[method]}": trained >= LEAST[method],
        "few10 at least raw + 5": trained >= _few10(row, "raw") + 5,
        "few10 at least random + 8": trained >= _few10(row, "random") + 8,
    }
    if method in ("simclr", "moco"):
        checks["two minutes at most"] = row["seconds"] <= 120
    if method == "moco":
        checks["effective rank at least 10"] = row["embeddings"]["effective_rank"] >= 10
    if method == "simclr":
        checks["loss at most ln(2N-1) - 1.5"] = row["loss"] <= CHANCE - 1.5
    return checks


def _few10(row: dict[str, Any], features: str) -> float:
    return float(row["probe"][features]["few10"]["mean"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
