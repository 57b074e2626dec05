"""What the definitions share: unit rows, sums over kept entries of a matrix, the reduction over rows."""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor


def unit(rows: Tensor, normalize: bool) -> Tensor:
    """Rows of length 1; a row of zeros stays one."""
    if not normalize:
        return rows
    length: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / length.masked_fill(length == 0, 1)


def logsumexp(s: Tensor, keep: Tensor) -> Tensor:
    """Row-wise log-sum-exp of the kept entries ``(M,)``; -inf, with no gradient, for a row that keeps none."""
    if not s.shape[1]:
        return s.sum(1) - torch.inf
    # The lowest finite number instead of -inf: an empty row would differentiate to NaN.
    lse = s.masked_fill(~keep, torch.finfo(s.dtype).min).logsumexp(1)
    return torch.where(keep.any(1), lse, -torch.inf)


def mean(values: Tensor, keep: Tensor) -> Tensor:
    """Row-wise mean of the kept entries ``(M,)``; 0 for a row that keeps none."""
    return torch.where(keep, values, 0).sum(1) / keep.sum(1).clamp(min=1)


def not_self(rows: Tensor) -> Tensor:
    return ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)


def distances(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Distance of every row of ``a`` to every row of ``b``, in the last two dimensions."""
    if distance == "cosine":
        return 1 - a @ b.mT
    squared = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
    if distance == "squared":
        return squared
    apart = squared != 0  # the root of 0 would differentiate to infinity
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def reduced(loss: Tensor, reduction: str, weights: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    weights = torch.ones_like(loss) if weights is None else weights
    loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction != "mean":
        raise ValueError(f"got reduction = {reduction!r}; expected 'mean', 'sum' or 'none'. Choose one.")
    total = (weights if counted is None else weights * counted).sum()
    return loss.sum() / torch.where(total == 0, 1, total)
