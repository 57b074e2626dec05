"""What the family benchmark measures against is the same loss, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import dense, family
from fastcl import reference


@pytest.mark.parametrize("case", family.ROWS, ids=lambda c: c.label)
def test_the_dense_forms_are_the_reference(case: Any) -> None:
    args, kwargs = case.inputs(13, 5, dtype=torch.float64)
    if "temperature" in kwargs:
        kwargs["temperature"] = case.numbers["temperature"]
    form = dense.usual(case.name, kwargs)
    if form is None:
        pytest.skip("measured against the reference itself")
    wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    got, expected = form(*args, **kwargs), getattr(reference, case.name)(*args, **kwargs)
    torch.testing.assert_close(got, expected)
    # cdist multiplies instead of subtracting, so its distances have half of the digits
    tolerance = 1e-6 if "triplet" in case.name else 1e-9
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
