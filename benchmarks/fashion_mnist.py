"""60,000 photographs in ten minutes on a CPU: does SimCLR beat raw pixels, and is the fused loss the dense one?

python -m benchmarks.fashion_mnist      about a quarter of an hour on one core; writes results/fashion_mnist.json, exits
                                        with 1 where a requirement fails

A ResNet of one block per stage is trained for a fixed number of steps and probed with ten labels per class.

Then come 100 steps from one seed with the fused loss, with ``fastcl.reference``'s, which stores the matrix, and with
that of the views the other way round: the same number, rounded elsewhere. BatchNorm and AdamW at the learning rate of
the run make a few last bits into a few hundredths within some steps, whatever computes the loss. So curves are compared
twice: at a learning rate where they tell something about the loss, and at the run's, where two dense losses differ too.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastcl import reference
from fastcl._info import cpu_model, provenance
from fastcl.trainer import TrainConfig, probe, train
from fastcl.trainer.errors import MissingData
from fastcl.trainer.methods import METHODS, SimCLR

from .record import write

STEPS, COMPARED = 1000, 100
SETTINGS: dict[str, Any] = {
    "data": "fashion-mnist", "encoder": "given", "batch_size": 128, "learning_rate": 1e-3, "temperature": 0.2,
    "probe_every": 250, "checkpoint_every": 250,
}  # fmt: skip
GENTLE = {"learning_rate": 3e-5, "temperature": 0.5}
RESULT = Path(__file__).parent / "results" / "fashion_mnist.json"


class Dense(SimCLR):
    """SimCLR whose loss stores the matrix of all similarities."""

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return self.formula(reference, labels, *embeddings)


class Swapped(Dense):
    """The same with the second view before the first."""

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return super().objective(labels, *reversed(embeddings))


def small_resnet() -> nn.Module:
    """Of one block per stage; grey images of 28 x 28 pixels become 7 x 7 before the first: 4.9 million parameters."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.conv1 = nn.Conv2d(1, 64, kernel_size=3, stride=2, padding=1, bias=False)
    network.fc = nn.Identity()
    return network


def main() -> int:
    """Run everything, write the result, and return the exit code."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.fashion_mnist", description=__doc__.partition("\n")[0]
    ).parse_args()
    head = provenance("python -m benchmarks.fashion_mnist")  # before anything is written
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole, _ = _train(Path(folder, "whole"), SimCLR, STEPS)
        except MissingData as error:
            print(f"skipped: {error}")
            return 0
        gentle, own = _compared(Path(folder, "gentle"), GENTLE), _compared(Path(folder, "own"), {})
    few10 = {name: found["few10"]["mean"] for name, found in whole["probe"].items()}
    checks = {
        "few10 above raw pixels": few10["trained"] > few10["raw"],
        "ten minutes at most": whole["seconds"] <= 600,
        f"losses of {COMPARED} gentle steps within 1e-3 of the dense loss's": gentle["fused, dense"] <= 1e-3,
        "gentle steps train: the loss falls by 0.1": gentle["first"] - gentle["last"] >= 0.1,
        "at the run's settings as near to the dense loss as three times itself": (
            own["fused, dense"] <= 3 * own["dense, swapped"]
        ),
        "less memory than the dense loss": whole["loss_peak_bytes"]["fastcl"] < whole["loss_peak_bytes"]["dense"],
    }
    result = {
        **head,
        "machine": {"device": cpu_model(), "threads": whole["threads"]},
        "checks": checks,
        "run": whole,
        "gentle": gentle,
        "own": own,
    }
    write(RESULT, result)
    print(f"few10 {few10}, {whole['seconds']:.0f} s; gentle {gentle}; own {own}")
    for what, ok in checks.items():
        print(f"{'pass' if ok else 'FAIL'}  {what}")
    return 0 if all(checks.values()) else 1


def _compared(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Largest differences of the losses of 100 steps, the first and the last loss, and what was changed for it."""
    kinds: dict[str, type[SimCLR]] = {"fused": SimCLR, "dense": Dense, "swapped": Swapped}
    with mock.patch.object(probe, "_LIMIT", 400):  # nobody looks at what these runs have learned
        curves = {name: _train(folder / name, method, COMPARED, **settings)[1] for name, method in kinds.items()}

    def largest(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(curves[one], curves[other], strict=True))

    differences = {f"{one}, {other}": largest(one, other) for one, other in (("fused", "dense"), ("dense", "swapped"))}
    return {
        "settings": settings, "steps": COMPARED, **differences,
        "first": curves["fused"][0], "last": curves["fused"][-1],
    }  # fmt: skip


def _train(folder: Path, method: type[SimCLR], steps: int, **settings: Any) -> tuple[dict[str, Any], list[float]]:
    """The result, and the loss of every step."""
    torch.manual_seed(0)
    config = TrainConfig(output=str(folder), steps=steps, **SETTINGS | settings)
    with mock.patch.dict(METHODS, simclr=method):
        result = train(config, encoder=small_resnet())
    with (folder / "metrics.csv").open(newline="") as file:
        return result, [float(row["loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    sys.exit(main())
