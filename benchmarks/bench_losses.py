"""Time and peak memory of every loss in ``fastcl.testing.CASES``, dense against fastcl: a pytest-benchmark file.

OMP_NUM_THREADS=1 pytest benchmarks/bench_losses.py --benchmark-json losses.json
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastcl._bench import DENSE, contenders
from fastcl._measure import peak_bytes
from fastcl.backends import NAMES, native
from fastcl.testing import CASES, LossCase

ROWS, DIM = 2048, 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _id(case: LossCase) -> str:
    shape = "x".join(map(str, case.rows(ROWS // case.rows(1)[0])))
    return "-".join([case.name, shape, *case.row_arguments])


@pytest.mark.parametrize("contender", [*DENSE, *NAMES])
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_loss(benchmark: Any, case: LossCase, contender: str) -> None:
    """Forward and backward; ``extra_info`` carries the peak memory in bytes and the sizes."""
    steps = contenders(case, ROWS // case.rows(1)[0], DIM, torch.float32, DEVICE)
    if contender not in steps:
        pytest.skip(f"{contender} does not run {case.name} on {DEVICE}, or only in an interpreter")

    def step() -> None:
        steps[contender]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    native.release_workspace()  # so that taking it is counted
    benchmark.group = _id(case)
    benchmark.extra_info.update(
        contender=contender,
        rows=ROWS,
        dim=DIM,
        device=DEVICE.type,
        threads=torch.get_num_threads(),
        peak_bytes=peak_bytes(step, DEVICE),
    )
    benchmark.pedantic(step, rounds=7, warmup_rounds=1)
