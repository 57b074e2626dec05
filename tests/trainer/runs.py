"""What tests of runs do alike: read a command and what it left, cut a run off, compare two, look for torchvision."""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import command, loop
from fastcl.trainer.checkpoint import load_checkpoint


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C in the middle of step ``at``."""
    step, steps = loop._step, iter(range(1, 1000))

    def interrupted(*args: Any) -> tuple[float, float]:
        if next(steps) == at:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "_step", interrupted)


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path) -> list[float]:
    """Of every step."""
    return [float(row["loss"]) for row in metrics(folder)]


def same_run(one: Path, other: Path) -> None:
    """Equal metrics, weights, queue and optimizer, bit for bit."""
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    same_state_of_runs(one, other)


def same_state_of_runs(one: Path, other: Path) -> None:
    """The same but for ``metrics.csv``."""
    a, b = (load_checkpoint(folder / "checkpoint.pt") for folder in (one, other))
    assert a["history"] == b["history"] and list(a["method"]) == list(b["method"])
    for name in a["method"]:
        assert torch.equal(a["method"][name], b["method"][name]), name
    for i, state in a["optimizer"]["state"].items():
        for name in state:
            assert torch.equal(state[name], b["optimizer"]["state"][i][name]), (i, name)


def need_torchvision() -> None:
    """Skip where torchvision is absent, or was built for another torch and raises RuntimeError on import."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchvision does not work here: {error}")


def block_torchvision(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make every import of torchvision raise."""

    class Block:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "torchvision":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Block(), *sys.meta_path])
