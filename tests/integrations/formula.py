"""How drop-ins are compared: with a formula in plain torch, in fp64 on the very numbers; with the original."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.oracle import error

# relative; fp32 by what drop-ins promise, fp64 by rounding
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 1e-5)}


def rows(n: int, d: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def units(n: int, d: int, *, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(rows(n, d, seed=seed), dim=1)


def loss_and_grads(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Of a scalar, or of a weighted sum of all losses; a leaf without a gradient has zeros."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    total = (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def check(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], *leaves: Tensor, loss_dtype: torch.dtype | None = None
) -> None:
    """Loss and every gradient in fp64 and in fp32.

    Args:
        loss_dtype: where it is not that of the leaves.
    """
    for dtype, (of_loss, of_grad) in TOLERANCE.items():
        own = [leaf.to(dtype) for leaf in leaves]
        loss, grads = loss_and_grads(ours, own)
        want, wanted = loss_and_grads(formula, [leaf.double() for leaf in own])
        assert loss.dtype == (loss_dtype or dtype)
        assert want.isfinite().all()
        if loss_dtype == torch.float32:
            of_loss = TOLERANCE[torch.float32][0]
        assert error(loss, want) <= of_loss, (dtype, loss, want)
        for i, (grad, exact) in enumerate(zip(grads, wanted, strict=True)):
            assert error(grad, exact) <= of_grad, (dtype, i, error(grad, exact))


def check_interface(loss: nn.Module, original: nn.Module) -> None:
    """A drop-in is a subclass with the arguments, attributes and state of the original, and ``strict``."""
    mine, theirs = type(loss), type(original)
    parameters = dict(inspect.signature(mine).parameters)
    assert parameters.pop("strict").default is None
    assert parameters == dict(inspect.signature(theirs).parameters)
    assert mine.__name__ == theirs.__name__ and issubclass(mine, theirs)
    assert set(vars(loss)) - {"strict"} == set(vars(original))
    assert loss.state_dict().keys() == original.state_dict().keys()
