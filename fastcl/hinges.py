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
from .pairwise import add_rows, apply, once_differentiable
from .triples import distance_grad, distance_tile

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
    _checks.choice("distance", distance, ("euclidean", "squared", "cosine"))
    _checks.vector("labels", labels, len(q), q, integer=True)
    if k is None:
        column_labels = labels
    assert column_labels is not None
    _checks.vector("column_labels", column_labels, len(q if k is None else k), q, integer=True)
    margins = positive_margin, negative_margin
    return HingeSums(*apply(_Hinges, q, k, labels, column_labels, margins, distance, skip_diagonal))


class _Hinges(torch.autograd.Function):
    """Both directions walk over the same tiles; the distances are computed again in the backward pass."""

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
        ctx.options = margins, distance, skip_diagonal
        ctx.save_for_backward(q, k, labels, column_labels)
        sums = q.new_zeros(2, dtype=torch.float64)
        above, pairs = labels.new_zeros(2, dtype=torch.long), labels.new_zeros(2, dtype=torch.long)
        for tile in _tiles(q, k, labels, column_labels, *ctx.options):
            for side, (cost, kept) in enumerate(zip(tile.costs(), (tile.positive, tile.negative), strict=True)):
                tile.add(sums[side], cost)
                tile.add(above[side], cost > 0)
                tile.add(pairs[side], kept)
        ctx.mark_non_differentiable(above, pairs)
        return sums, above, pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
        q, k, labels, column_labels = ctx.saved_tensors
        _, distance, _ = ctx.options
        x, y = _wide(q, k)
        dx = torch.zeros_like(x)
        dy = dx if k is None else torch.zeros_like(y)
        for tile in _tiles(q, k, labels, column_labels, *ctx.options):
            w = tile.weights(*grad.to(x.dtype))
            rows, columns = tile.rows, tile.columns
            if distance == "cosine":
                row_grad, col_grad = distance_grad(w, tile.d, x[rows], y[columns], distance)
            else:
                # Most pairs cost nothing, and near ones need the difference of their rows: both are listed.
                active = w != 0
                few = 16 * int(active.sum()) <= w.numel()
                i, j = (active if few else active & tile.near).nonzero(as_tuple=True)
                row_grad, col_grad = torch.zeros_like(x[rows]), torch.zeros_like(y[columns])
                for part in _chunks(i, x.shape[1]):
                    a, b = i[part], j[part]
                    slope = 2 * w[a, b] if distance == "squared" else w[a, b] / tile.d[a, b].clamp(min=_tiny(x))
                    difference = (x[rows][a] - y[columns][b]) * slope[:, None]
                    add_rows(row_grad, a, difference)
                    add_rows(col_grad, b, -difference)
                if not few:
                    w = w.masked_fill(tile.near, 0)
                    far = distance_grad(w, tile.d, x[rows], y[columns], distance)
                    row_grad, col_grad = row_grad + far[0], col_grad + far[1]
            dx[rows] += row_grad
            dy[columns] += col_grad
        return dx.to(q.dtype), None if k is None else dy.to(k.dtype), None, None, None, None, None


class _Tile(NamedTuple):
    """Distances ``(R, C)`` of some rows to some columns; columns from ``once`` on stand for their mirror image too."""

    rows: slice
    columns: slice
    once: int
    d: Tensor
    near: Tensor
    positive: Tensor
    negative: Tensor
    margins: tuple[float, float]

    def costs(self) -> tuple[Tensor, Tensor]:
        positive, negative = self.margins
        return (
            (self.d - positive).relu_().masked_fill_(~self.positive, 0),
            (negative - self.d).relu_().masked_fill_(~self.negative, 0),
        )

    def add(self, total: Tensor, values: Tensor) -> None:
        total += values[:, : self.once].sum(dtype=total.dtype) + 2 * values[:, self.once :].sum(dtype=total.dtype)

    def weights(self, positive_grad: Tensor, negative_grad: Tensor) -> Tensor:
        positive, negative = self.margins
        w = torch.zeros_like(self.d)
        w[self.positive & (self.d > positive)] = positive_grad
        w[self.negative & (self.d < negative)] = -negative_grad
        w[:, self.once :] *= 2
        return w


def _wide(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows and columns in fp32 (fp64)."""
    x = q.to(torch.promote_types(q.dtype, torch.float32))
    return x, x if k is None else k.to(x.dtype)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


def _chunks(index: Tensor, width: int) -> Iterator[slice]:
    """Parts of a list of pairs whose gathered rows are no larger than a few tiles."""
    step = max(1, 4 * _TILE // max(width, 1))
    for start in range(0, len(index), step):
        yield slice(start, start + step)


def _tiles(
    q: Tensor,
    k: Tensor | None,
    labels: Tensor,
    column_labels: Tensor,
    margins: tuple[float, float],
    distance: str,
    skip_diagonal: bool,
) -> Iterator[_Tile]:
    x, y = _wide(q, k)
    x_squares, y_squares = x.square().sum(1), y.square().sum(1)
    at = torch.arange(max(len(x), len(y)), device=q.device)
    height = max(1, _TILE // max(len(y), 1))
    for first in range(0, len(x), height):
        rows = slice(first, min(first + height, len(x)))
        columns = slice(first if k is None else 0, len(y))
        own = at[rows, None] == at[columns]
        near = torch.zeros_like(own)
        if distance == "cosine":
            d = distance_tile(x[rows], y[columns], x_squares[rows], y_squares[columns], distance)
        else:
            d = distance_tile(x[rows], y[columns], x_squares[rows], y_squares[columns], "squared")
            if k is None:
                d.masked_fill_(own, 0)
            # Rounding the squares costs a few eps of their sum: here less than 1e-5 of d.
            near = d < (x_squares[rows, None] + y_squares[columns]) / 8
            if k is None:
                near &= ~own
            i, j = near.nonzero(as_tuple=True)
            for part in _chunks(i, x.shape[1]):
                d[i[part], j[part]] = (x[rows][i[part]] - y[columns][j[part]]).square().sum(1)
            d = d if distance == "squared" else d.sqrt_()
        positive = labels[rows, None] == column_labels[columns]
        negative = ~positive
        if skip_diagonal:
            positive &= ~own
            negative &= ~own
        once = rows.stop - rows.start if k is None else len(y)
        yield _Tile(rows, columns, once, d, near, positive, negative, margins)
