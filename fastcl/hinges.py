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
from .pairwise import apply, once_differentiable
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
        distance: ``"euclidean"`` or ``"squared"``, in fp64, or ``"cosine"``, 1 - <q, k>, in the dtype of the rows.
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
        exact = _exact(q, distance)
        x = q.to(exact)
        y = x if k is None else k.to(exact)
        dx = torch.zeros_like(x)
        dy = dx if k is None else torch.zeros_like(y)
        for tile in _tiles(q, k, labels, column_labels, *ctx.options):
            rows, columns = tile.rows, tile.columns
            row_grad, col_grad = distance_grad(tile.weights(*grad.to(exact)), tile.d, x[rows], y[columns], distance)
            dx[rows] += row_grad
            dy[columns] += col_grad
        return dx.to(q.dtype), None if k is None else dy.to(k.dtype), None, None, None, None, None


class _Tile(NamedTuple):
    """Distances ``(R, C)`` of some rows to some columns; columns from ``once`` on stand for their mirror image too."""

    rows: slice
    columns: slice
    once: int
    d: Tensor
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


def _exact(rows: Tensor, distance: str) -> torch.dtype:
    """Differences of squares need the digits."""
    return torch.promote_types(rows.dtype, torch.float32 if distance == "cosine" else torch.float64)


def _tiles(
    q: Tensor,
    k: Tensor | None,
    labels: Tensor,
    column_labels: Tensor,
    margins: tuple[float, float],
    distance: str,
    skip_diagonal: bool,
) -> Iterator[_Tile]:
    exact = _exact(q, distance)
    x = q.to(exact)
    y = x if k is None else k.to(exact)
    x_squares, y_squares = x.square().sum(1), y.square().sum(1)
    at = torch.arange(max(len(x), len(y)), device=q.device)
    height = max(1, _TILE // max(len(y), 1))
    for first in range(0, len(x), height):
        rows = slice(first, min(first + height, len(x)))
        columns = slice(first if k is None else 0, len(y))
        d = distance_tile(x[rows], y[columns], x_squares[rows], y_squares[columns], distance)
        own = at[rows, None] == at[columns]
        if k is None and distance != "cosine":
            d.masked_fill_(own, 0)
        positive = labels[rows, None] == column_labels[columns]
        negative = ~positive
        if skip_diagonal:
            positive &= ~own
            negative &= ~own
        once = rows.stop - rows.start if k is None else len(y)
        yield _Tile(rows, columns, once, d, positive, negative, margins)
