"""Time and peak memory of every loss in ``fastcl.testing.CASES``, dense against fastcl: a pytest-benchmark file.

OMP_NUM_THREADS=1 pytest benchmarks/bench_losses.py --benchmark-json losses.json

``benchmarks.regressions`` compares what that wrote with an earlier run.
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
DENSE_LIMIT_GB = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("contender", [*DENSE, *NAMES])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_loss(benchmark: Any, case: LossCase, contender: str) -> None:
    """Forward and backward; ``extra_info`` carries the peak memory in bytes and the sizes."""
    batch = ROWS // case.rows(1)[0]
    steps = contenders(case, batch, DIM, torch.float32, DEVICE)
    stored_gb = case.stored(ROWS, case.rows(batch)[-1], DIM) * 4e-9
    if DENSE.get(contender, 0) * stored_gb > DENSE_LIMIT_GB:
        pytest.skip(f"{contender} would store numbers of {stored_gb:.1f} GB, some of them at once")
    if contender not in steps:
        pytest.skip(f"{contender} does not run {case.name} on {DEVICE}, or only in an interpreter")

    def step() -> None:
        steps[contender]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    native.release_workspace()  # so that taking it is counted
    benchmark.group = case.label
    benchmark.extra_info.update(
        contender=contender,
        rows=ROWS,
        dim=DIM,
        device=DEVICE.type,
        threads=torch.get_num_threads(),
        peak_bytes=peak_bytes(step, DEVICE),
    )
    benchmark.pedantic(step, rounds=7, warmup_rounds=1)
