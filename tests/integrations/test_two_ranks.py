"""Two processes under DDP have the loss and the gradient of one process with all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import error
from tests.processes import together

from .two_ranks import LOSSES, RANKS, Model, inputs, run

LIMIT = 120  # seconds for both processes; they take about 6
Found = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every rank found; the processes are ended by their handles in any case."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = [["-m", "tests.integrations.two_ranks", str(rank), str(folder)] for rank in range(RANKS)]
    for code, text in together(arguments, LIMIT):
        assert code == 0, text
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def one_process(name: str) -> dict[str, Tensor]:
    x, y = inputs()
    module, loss_of = LOSSES[name]
    return run(Model(), module, loss_of, x.flatten(0, 1), y.flatten(0, 1), None)


# open_clip's losses of the global batch, which every rank computes
GLOBAL = ["open_clip", "open_clip, strict", "open_clip, gradients gathered"]


def over_ranks(ranks: Found, name: str) -> dict[str, Tensor]:
    """Losses of ranks that have their own rows are averaged; DDP has averaged gradients, and all ranks have them."""
    first, *others = (found[name] for found in ranks)
    for other in others:
        for key in ("weight", "scale"):
            assert torch.equal(first[key], other[key])
        if "grad_cache" in name or name in GLOBAL:
            assert error(first["loss"], other["loss"]) < 1e-14
    return {**first, "loss": torch.stack([found[name]["loss"] for found in ranks]).mean()}


# how many times too large or small the original's gradient is, which strict=True keeps
STRICT: dict[str, dict[str, float]] = {
    "open_clip, strict": {"weight": 1 / RANKS},
    "grad_cache, strict": {"weight": 1 / RANKS, "scale": 1 / RANKS},
    "inf, strict": {"scale": RANKS},
    "ring, strict": {"scale": RANKS},
}


# what its options say: a rank's keys get no gradient from the rows of others. Compared with the original below.
PARTIAL = "open_clip, local without gradients"


@pytest.mark.parametrize("name", [name for name in LOSSES if name != PARTIAL])
def test_two_ranks_are_one_process(ranks: Found, name: str) -> None:
    if name not in ranks[0]:
        pytest.skip("the library is not installed")
    got, want = over_ranks(ranks, name), one_process(name)
    for key, exact in want.items():
        exact = exact * STRICT.get(name, {}).get(key, 1)
        # Inf-CL's loss is fp32, its gradient fp64 but for that loss's
        tolerance = 1e-6 if key == "loss" and got[key].dtype == torch.float32 else 1e-10
        assert error(got[key], exact) < tolerance, (key, got[key], exact)


# names whose gradient is the original's: where it is right, and where strict=True keeps it
SAME = ["simclr, images", "simclr, labels", "nnclr", "mocov3", "grad_cache, strict", "ring, strict"]
SAME += [name for name in LOSSES if name.startswith(("lightly", "open_clip")) and name != "open_clip"]


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_are_two_ranks_of_the_original(ranks: Found, name: str) -> None:
    if f"original {name}" not in ranks[0]:
        pytest.skip("neither installed nor in $FASTCL_UPSTREAM")
    got: Any = over_ranks(ranks, name)
    want: Any = over_ranks(ranks, f"original {name}")
    for key, exact in want.items():
        tolerance = 1e-5 if exact.dtype == torch.float32 else 1e-10
        assert error(got[key], exact) < tolerance, (key, got[key], exact)
