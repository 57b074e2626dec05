"""How a test compares: fp64 reference on the very inputs, relative Frobenius error, and a tolerance with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastcl import functional, reference
from fastcl.testing import LossCase

# Relative error of a loss and of a gradient, by dtype of the rows.
#  fp32: a rounding of a logit of size 1 / tau costs eps / tau; 1e-6 and 1e-5 are the project's promise at tau >= 0.05.
#  fp16, bf16: compared on the same rounded inputs; losses are fp32, gradients are rounded to the dtype (2^-11, 2^-8
#        relative per element) after an fp32 sum whose weights were rounded once to it.
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-6, 1e-3),
    torch.bfloat16: (1e-6, 5e-3),
}


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius distance; NaN or inf where `want` has none is infinitely far; 0 against 0 is exact."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    same = torch.equal(got.isnan(), want.isnan()) and torch.equal(
        got.masked_fill(~got.isinf(), 0), want.masked_fill(~want.isinf(), 0)
    )
    if not same:
        return float("inf")
    got, want = (t.masked_fill(~t.isfinite(), 0) for t in (got, want))
    distance, size = (got - want).norm(), want.norm()
    return 0.0 if distance == 0 else float(distance / size) if size > 0 else float("inf")


def assert_close(got: Tensor, want: Tensor, tolerance: float, *, floor: float = 0.0, what: str = "") -> None:
    """Relative error at most `tolerance`, or absolute distance at most `floor` (for a value that is 0 in theory)."""
    relative = error(got, want)
    if relative <= tolerance:
        return
    distance = float((got.detach().double().cpu() - want.detach().double().cpu()).norm())
    assert distance <= floor, (
        f"{what}: relative error {relative:.2e}, allowed {tolerance:.0e} ({distance:.2e} absolute)"
    )


def or_nothing(want: Tensor, least: float) -> tuple[Tensor, float]:
    """What is expected and how far from it a result may be: 0 where ``want`` is so small that it is 0 in theory."""
    return (torch.zeros_like(want), least) if float(want.detach().norm()) < least else (want, 0.0)


def as_double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def leaves(args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    return [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.requires_grad]


def loss_and_grads(
    function: Callable[..., Tensor], args: Iterable[Any], kwargs: dict[str, Any], upstream: float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = function(*args, **kwargs)
    grads = torch.autograd.grad(loss.sum(), leaves(args, kwargs), torch.full_like(loss.sum(), upstream))
    return loss, grads


def check_case(
    case: LossCase,
    args: list[Any],
    kwargs: dict[str, Any],
    *,
    tolerance: tuple[float, float] | None = None,
    floor: float = 0.0,
    loss_floor: float = 0.0,
    **more: Any,
) -> None:
    """Loss and every gradient of ``fastcl.functional`` against ``fastcl.reference`` in fp64 on the same inputs.

    A gradient shorter than ``floor`` is compared with the 0 that it is in theory, and may be that far from it; a longer
    one may lose half a per cent of that to cancellation. ``loss_floor`` is how far a loss may be.
    """
    loss_tolerance, grad_tolerance = tolerance or TOLERANCE[args[0].dtype]
    got, got_grads = loss_and_grads(getattr(functional, case.name), args, {**kwargs, **more})
    want, want_grads = exact(case, args, kwargs, **more)
    assert got.dtype == torch.promote_types(args[0].dtype, torch.float32)
    assert_close(got, want, loss_tolerance, floor=loss_floor, what="loss")
    for i, (g, w, leaf) in enumerate(zip(got_grads, want_grads, leaves(args, kwargs), strict=True)):
        assert g.dtype == leaf.dtype
        # fp16 has nothing between multiples of 2^-24, which a gradient of 1e-5 is not far above
        rounding = 2.0**-25 * g.numel() ** 0.5 if g.dtype == torch.float16 else 0.0
        w, least = or_nothing(w, floor)
        assert_close(g, w, grad_tolerance, floor=max(rounding, least, floor / 200), what=f"gradient {i}")


def exact(case: LossCase, args: list[Any], kwargs: dict[str, Any], **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients of the dense definition in fp64."""
    doubles = {k: as_double(v) for k, v in kwargs.items()}
    return loss_and_grads(getattr(reference, case.name), [as_double(a) for a in args], {**doubles, **more})
