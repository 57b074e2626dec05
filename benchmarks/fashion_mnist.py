"""60,000 photographs in ten minutes on a CPU: does SimCLR beat raw pixels, and is the fused loss the dense one?

python -m benchmarks.fashion_mnist      about ten minutes on two cores; writes results/fashion_mnist.json, exits with 1
                                        where a requirement fails

A ResNet of one block per stage is trained for a fixed number of steps and probed with ten labels per class. Two more
runs of 100 steps have one seed and two losses: the fused one, and ``fastcl.reference``'s, which stores the matrix.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastcl import reference
from fastcl._info import commit, cpu_model, versions
from fastcl.trainer import TrainConfig, train
from fastcl.trainer.errors import MissingData
from fastcl.trainer.methods import METHODS, SimCLR

STEPS, COMPARED = 1000, 100
SETTINGS: dict[str, Any] = {
    "data": "fashion-mnist", "encoder": "given", "batch_size": 128, "learning_rate": 1e-3, "temperature": 0.2,
    "probe_every": 250, "checkpoint_every": 250,
}  # fmt: skip
RESULT = Path(__file__).parent / "results" / "fashion_mnist.json"


class Dense(SimCLR):
    """SimCLR whose loss stores the matrix of all similarities."""

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return self.formula(reference, labels, *embeddings)


def small_resnet() -> nn.Module:
    """Of one block per stage; grey images of 28 x 28 pixels become 7 x 7 before the first: 4.9 million parameters."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.conv1 = nn.Conv2d(1, 64, kernel_size=3, stride=2, padding=1, bias=False)
    network.fc = nn.Identity()
    return network


def main() -> int:
    """Run everything, write the result, and return the exit code."""
    measured_at = commit()  # before anything is written
    with tempfile.TemporaryDirectory() as folder:
        try:
            fused = _train(Path(folder, "fused"), COMPARED)
        except MissingData as error:
            print(f"skipped: {error}")
            return 0
        with mock.patch.dict(METHODS, simclr=Dense):
            dense = _train(Path(folder, "dense"), COMPARED)
        largest = max(abs(a - b) for a, b in zip(_losses(folder, "fused"), _losses(folder, "dense"), strict=True))
        whole = _train(Path(folder, "whole"), STEPS)
    few10 = {name: probe["few10"]["mean"] for name, probe in whole["probe"].items()}
    checks = {
        "few10 above raw pixels": few10["trained"] > few10["raw"],
        "ten minutes at most": whole["seconds"] <= 600,
        f"losses of {COMPARED} steps within 1e-3 of the dense loss's": largest <= 1e-3,
        "less memory than the dense loss": whole["loss_peak_bytes"]["fastcl"] < whole["loss_peak_bytes"]["dense"],
    }
    RESULT.write_text(
        json.dumps(
            {
                "command": "python -m benchmarks.fashion_mnist",
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                "commit": measured_at,
                "versions": versions(),
                "machine": {"device": cpu_model(), "threads": whole["threads"]},
                "checks": checks,
                "run": whole,
                "compared": {"steps": COMPARED, "largest_difference": largest, "fused": fused, "dense": dense},
            },
            indent=2,
        )
        + "\n"
    )
    print(f"few10 {few10}, {whole['seconds']:.0f} s; losses differ by at most {largest:.1e}")
    for what, ok in checks.items():
        print(f"{'pass' if ok else 'FAIL'}  {what}")
    return 0 if all(checks.values()) else 1


def _train(folder: Path, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    return train(TrainConfig(output=str(folder), steps=steps, **SETTINGS), encoder=small_resnet())


def _losses(folder: str, run: str) -> list[float]:
    with Path(folder, run, "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    sys.exit(main())
