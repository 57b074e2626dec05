"""What the formulas share: checking of common arguments, and the reduction over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _across, _checks
from .._checks import Scalar
from ..pairwise import l2_normalize, operand_dtype


def unit(rows: Tensor, normalize: bool) -> Tensor:
    """Rows as a formula takes them: contiguous, so that sums, and those of gradients, add in one order."""
    _checks.flag(normalize=normalize)
    return l2_normalize(rows) if normalize else rows.contiguous()


def reduced(loss: Tensor, reduction: str, weights: Tensor | None = None, *, counted: Tensor | None = None) -> Tensor:
    """(Weighted) mean over the rows that are counted, sum, or the rows as they are; the mean over no rows is 0."""
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if weights is not None:
        _checks.vector("weights", weights, loss.shape[0], loss)
        weights = weights.to(loss.dtype)
        loss = loss * weights
    if reduction == "none":
        return loss
    weight = None if counted is None else counted.sum()
    if weights is not None:
        weight = (weights if counted is None else weights * counted).sum()
    return share(loss, loss.shape[0], reduction, weight)


def share(loss: Tensor, rows: int, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Sum of the losses of so many rows, ``(rows,)`` or ``()``, or their mean: over a weight, or over the rows."""
    if (across := _across.current()) is not None:
        return across.reduced(loss, rows, reduction, weight)
    if reduction == "mean" and weight is None and loss.ndim == 1 and rows > 0:
        return loss.mean()  # one operator and one node where a sum and a quotient are two
    return loss.sum() if reduction == "sum" else loss.sum() / divisor(rows if weight is None else weight)


def divisor(weight: Tensor | int) -> Tensor | int:
    """By what a sum is divided for a mean: that of no rows is 0."""
    return torch.where(weight == 0, 1, weight) if isinstance(weight, Tensor) else max(weight, 1)


def log_of(count: int, like: Tensor) -> float | Tensor:
    """Of a number of rows; while torch.compile traces, a tensor: a Python number would fix the number of rows."""
    if torch.compiler.is_compiling():
        return torch.full((), count, dtype=like.dtype, device=like.device).log()
    return math.log(count)


def inverse(temperature: Scalar, rows: Tensor) -> Scalar:
    _checks.scalar("temperature", temperature, positive=True)
    return 1 / multiplier("temperature", temperature, rows)


def multiplier(name: str, value: Scalar, rows: Tensor) -> Scalar:
    """A scalar in the precision of the logits, whatever a caller's ``model.half()`` made of it."""
    _checks.scalar(name, value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float32))


def arange(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device)


def operand(rows: Tensor) -> Tensor:
    """Rows in fp32 (fp64), rounded as the operands of the pair reductions are; the gradient does not see that."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    dtype = operand_dtype(rows, rows)
    if torch.promote_types(dtype, wide.dtype) == dtype:
        return wide
    return wide + (wide.to(dtype).to(wide.dtype) - wide).detach()
