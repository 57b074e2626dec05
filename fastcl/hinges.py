"""Sums of hinge losses over all pairs of rows: a tile of distances at a time, never the matrix.

A pair is positive where its labels are equal, else negative. With d its distance, a positive pair costs
max(0, d - positive margin), a negative one max(0, negative margin - d) (Hadsell et al. 2006, doi:10.1109/CVPR.2006.100,
without the square).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._gathered import add_rows
from .pairwise import apply, once_differentiable
from .triples import class_runs, distance_grad, distance_tile

_TILE = 2**17  # numbers of a tile of distances, a handful of which live at once: they should stay in the cache


class HingeSums(NamedTuple):
    """Over the positive pairs, then the negative ones.

    Attributes:
        sums: ``(2,)`` fp64, with a gradient.
        above: ``(2,)`` int64, how many pairs cost more than 0.
        pairs: ``(2,)`` int64, how many there are.
    """

    sums: Tensor
    above: Tensor
    pairs: Tensor


def pair_hinges(
    q: Tensor,
    k: Tensor | None,
    labels: Tensor,
    column_labels: Tensor | None = None,
    *,
    positive_margin: float,
    negative_margin: float,
    distance: str = "euclidean",
    skip_diagonal: bool = True,
) -> HingeSums:
    """Hinge losses of all pairs, in O(M N D) time and O((M + N) D) memory.

    Args:
        q: ``(M, D)`` rows.
        k: ``(N, D)`` columns; ``None`` for ``q`` itself, which costs half.
        labels, column_labels: ``(M,)`` and ``(N,)`` integers; the second is omitted with ``k``.
        distance: ``"euclidean"``, ``"squared"`` or ``"cosine"``, 1 - <q, k>; in fp32, or fp64 for fp64 rows. The
            squares of near rows, whose difference would lose digits, are computed from the rows themselves.
        skip_diagonal: pair i, i does not count.

    Raises:
        TypeError, ValueError: rows or labels that do not fit, an unknown distance.
    """
    _checks.rows(q=q) if k is None else _checks.rows(q=q, k=k)
    _checks.choice("distance", distance, _checks.DISTANCES)
    _checks.number("positive_margin", positive_margin)
    _checks.number("negative_margin", negative_margin)
    _checks.flag(skip_diagonal=skip_diagonal)
    _checks.vector("labels", labels, len(q), q, integer=True)
    if k is None:
        column_labels = labels
    _checks.tensor("column_labels", column_labels, "of integers")
    assert column_labels is not None
    _checks.vector("column_labels", column_labels, len(q if k is None else k), q, integer=True)
    margins = positive_margin, negative_margin
    return HingeSums(*apply(_Hinges, q, k, labels, column_labels, margins, distance, skip_diagonal))


class _Hinges(torch.autograd.Function):
    """The gradients of both sums are found with them: a hinge's slope does not depend on other pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        labels: Tensor,
        column_labels: Tensor,
        margins: tuple[float, float],
        distance: str,
        skip_diagonal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = q.to(torch.promote_types(q.dtype, torch.float32)).contiguous()  # so that sums add in one order
        y = x if k is None else k.to(x.dtype).contiguous()
        sums = x.new_zeros(2, dtype=torch.float64)
        above = labels.new_zeros(2, dtype=torch.long)
        wanted = any(ctx.needs_input_grad[:2])
        dx = x.new_zeros(2, *(x.shape if wanted else (0,)))
        dy = dx if k is None else y.new_zeros(2, *(y.shape if wanted else (0,)))
        for tile in _tiles(x, y, k is None, labels, column_labels, distance, skip_diagonal):
            for side in range(2):
                found = tile.hinges(side, margins[side], distance, (dx[side], dy[side]) if wanted else None)
                sums[side] += found[0]
                above[side] += found[1]
        ctx.dtypes = q.dtype, None if k is None else k.dtype
        ctx.save_for_backward(dx, None if k is None else dy)
        pairs = _pairs(labels, column_labels, skip_diagonal)
        ctx.mark_non_differentiable(above, pairs)
        return sums, above, pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        dq, dk = (
            None if d is None else (grad.to(d.dtype)[:, None, None] * d).sum(0).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dq, dk, None, None, None, None, None


def _pairs(labels: Tensor, column_labels: Tensor, skip_diagonal: bool) -> Tensor:
    """How many pairs are positive, and how many negative."""
    _, start, end = class_runs(labels, column_labels)
    both = min(len(labels), len(column_labels)) if skip_diagonal else 0
    positive = (end - start).sum() - (labels[:both] == column_labels[:both]).sum()
    return torch.stack([positive, len(labels) * len(column_labels) - both - positive])


class _Tile(NamedTuple):
    """Distances ``(R, C)`` of some rows to some columns, squared where they are Euclidean, but for rounding.

    Columns from ``once`` on stand for their mirror image too.
    """

    x: Tensor
    y: Tensor
    rows: slice
    columns: slice
    once: int
    d: Tensor
    near: Tensor | None  # where rounding costs digits; None where nowhere
    slack: float  # that rounding costs at most
    kept: tuple[Tensor, Tensor]  # positive pairs, and negative ones

    def hinges(
        self, side: int, margin: float, distance: str, grads: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the costs of one side's pairs, and how many cost something; their gradients are added to ``grads``.

        Few pairs are listed, and near ones always: their distance is that of the difference of their rows.
        """
        sign = (1, -1)[side]
        bound = margin if distance != "euclidean" else margin**2 if margin > 0 else 0.0
        if distance == "euclidean" and margin < 0:  # every distance is above
            costs = self.kept[0] if side == 0 else torch.zeros_like(self.kept[1])
        else:
            costs = (self.d > bound - self.slack) if side == 0 else (self.d < bound + self.slack)
            costs &= self.kept[side]
        rows, columns = self.rows, self.columns
        few = 16 * int(costs.sum()) <= costs.numel()
        far = None
        if not few:
            far = costs if self.near is None else costs & ~self.near
            costs = torch.zeros_like(costs) if self.near is None else costs & self.near
        i, j = costs.nonzero(as_tuple=True)
        total, count = self.d.new_zeros((), dtype=torch.float64), i.new_zeros(())
        for part in _chunks(i, self.x.shape[1]):
            a, b = i[part], j[part]
            x, y = self.x[rows][a], self.y[columns][b]
            if distance == "cosine":
                d = 1 - (x * y).sum(1)
            else:
                difference = x - y
                d = difference.square().sum(1)
                d = d.sqrt() if distance == "euclidean" else d
            cost = (sign * (d - margin)).relu_()
            times = (cost > 0) * (1 + (b >= self.once).long())
            total += (cost * times).sum(dtype=torch.float64)
            count += times.sum()
            if grads is not None:
                w = sign * times.to(d.dtype)
                if distance == "cosine":
                    add_rows(grads[0][rows], a, -w[:, None] * y)
                    add_rows(grads[1][columns], b, -w[:, None] * x)
                else:
                    slope = 2 * w if distance == "squared" else w / d.clamp(min=torch.finfo(d.dtype).tiny)
                    difference *= slope[:, None]
                    add_rows(grads[0][rows], a, difference)
                    add_rows(grads[1][columns], b, difference.neg_())
        if far is None:
            return total, count
        d = self.d.clamp(min=0).sqrt_() if distance == "euclidean" else self.d
        cost = (sign * (d - margin)).relu_().masked_fill_(~far, 0)
        far = cost > 0
        for values, result in ((cost, total), (far, count)):
            result += values[:, : self.once].sum(dtype=result.dtype) + 2 * values[:, self.once :].sum(
                dtype=result.dtype
            )
        if grads is not None:
            w = far.to(d.dtype).mul_(sign)
            w[:, self.once :] *= 2
            row_grad, col_grad = distance_grad(w, d, self.x[rows], self.y[columns], distance)
            grads[0][rows] += row_grad
            grads[1][columns] += col_grad
        return total, count


def _chunks(index: Tensor, width: int) -> Iterator[slice]:
    """Parts of a list of pairs whose gathered rows are no larger than a few tiles."""
    step = max(1, 4 * _TILE // max(width, 1))
    for start in range(0, len(index), step):
        yield slice(start, start + step)


def _tiles(
    x: Tensor, y: Tensor, one_set: bool, labels: Tensor, column_labels: Tensor, distance: str, skip_diagonal: bool
) -> Iterator[_Tile]:
    x_squares, y_squares = x.square().sum(1), y.square().sum(1)
    longest = (
        float((x_squares.max() + y_squares.max()).clamp(max=torch.finfo(x.dtype).max)) if len(x) and len(y) else 0.0
    )
    slack = 0.0 if distance == "cosine" else 16 * torch.finfo(x.dtype).eps * longest
    height = max(1, _TILE // max(len(y), 1))
    for first in range(0, len(x), height):
        rows = slice(first, min(first + height, len(x)))
        columns = slice(first if one_set else 0, len(y))
        squares = "cosine" if distance == "cosine" else "squared"
        d = distance_tile(x[rows], y[columns], x_squares[rows], y_squares[columns], squares)
        positive = labels[rows, None] == column_labels[columns]
        negative = ~positive
        # pair i, i: a number of the rows is a number of the columns, too, less those left of them
        diagonal = torch.arange(rows.start, min(rows.stop, len(y)), device=x.device)
        own = diagonal - rows.start, diagonal - columns.start
        if one_set:
            d[own] = 0
        if skip_diagonal:
            positive[own] = negative[own] = False
        near = None
        if distance != "cosine" and bool(d.min() < longest / 8):
            # Rounding the squares costs a few eps of their sum: elsewhere less than 1e-5 of d.
            near = d < (x_squares[rows, None] + y_squares[columns]) / 8
        yield _Tile(
            x, y, rows, columns, rows.stop - rows.start if one_set else len(y), d, near, slack, (positive, negative)
        )
