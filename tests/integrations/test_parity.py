"""A drop-in gives the numbers of what it stands in for, on the version that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.dropins import Case, Draw, backward, cases, missing

# n, d: no multiple of anything, more features than rows and the reverse
SIZES = [(5, 3), (17, 40), (61, 16), (130, 7)]


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius distance by the size of what is wanted; of a vanishing gradient by the rounding of its terms."""
    assert got.shape == want.shape and got.dtype == want.dtype and got.isfinite().all()
    distance, size = (got - want).norm().item(), want.norm().item()
    return distance / max(size, 1e-3)


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.library}-{case.label}")
def test_value_and_gradients_are_the_originals(case: Case) -> None:
    if reason := missing(case.library):
        pytest.skip(reason)
    for seed, (n, d) in enumerate(SIZES):
        problem = case.build(Draw(n, d, seed=seed))
        loss, grads = backward(problem.ours, problem.leaves)
        want, wanted = backward(problem.theirs, problem.leaves)
        assert relative(loss, want) <= case.tolerance, (n, d, loss, want)
        for i, (grad, exact) in enumerate(zip(grads, wanted, strict=True)):
            assert relative(grad, exact) <= case.tolerance, (n, d, i, torch.linalg.norm(grad - exact))
