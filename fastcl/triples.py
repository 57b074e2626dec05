"""Sums over triples of rows (anchor, positive, negative), without a list of them.

Which rows are positives is said by labels, as integers: rows sorted by label make every class a run, so a row's
positives are found without a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _checks
from .pairwise import apply, once_differentiable

_TILE = 2**20  # numbers of a block of distances; a handful of such blocks live at once


def class_runs(labels: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts rows by label (stable), and where the run of every row's class starts and ends in it.

    With the labels of ``columns`` it is these that are sorted.
    """
    columns = labels if columns is None else columns
    order = columns.argsort(stable=True)
    label = columns[order].contiguous()
    labels = labels.contiguous()
    return order, torch.searchsorted(label, labels), torch.searchsorted(label, labels, right=True)


def positive_indices(labels: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All pairs of an anchor and another row of its label, anchor by anchor: two ``(P,)``. Reads P from the device.

    With the labels of ``columns`` the pairs are those of a row and a column of its label.
    """
    order, start, end = class_runs(labels, columns)
    count = end - start - int(columns is None)
    anchor = torch.repeat_interleave(torch.arange(len(labels), device=labels.device), count)
    offset = torch.arange(len(anchor), device=labels.device) - (count.cumsum(0) - count)[anchor]
    if columns is None:  # its own place in its run is left out
        offset = offset + (offset >= order.argsort()[anchor] - start[anchor])
    return anchor, order[start[anchor] + offset]


def class_sums(z: Tensor, labels: Tensor) -> Tensor:
    """For every row the sum of the *other* rows of its label, ``(N, D)`` fp32 (fp64); no host synchronisation."""
    sums: Tensor = apply(_ClassSums, z, labels)
    return sums


def batch_all(z: Tensor, labels: Tensor, margin: float, distance: str) -> tuple[Tensor, Tensor]:
    """Sums of max(0, d(a, p) - d(a, n) + margin) over the triplets of every anchor.

    Args:
        z: ``(N, D)`` fp32 or fp64.
        labels: ``(N,)`` integers.
        distance: ``"euclidean"``, ``"squared"`` or ``"cosine"``.

    Returns:
        The sums, ``(N,)``, and how many triplets of all are above 0, ``()`` int64.
    """
    return _triplets(_All, z, labels, margin, distance)


def semi_hard(z: Tensor, labels: Tensor, margin: float | None, distance: str) -> tuple[Tensor, Tensor]:
    """The same over the positives p of every anchor, with the nearest negative no nearer than p, or else the furthest.

    Args:
        margin: ``None`` is the soft margin, log(1 + e^(d(a, p) - d(a, n))).

    Returns:
        The sums, ``(N,)``, and how many pairs of all have a negative, ``()`` int64.
    """
    return _triplets(_SemiHard, z, labels, margin, distance)


def _triplets(
    rule: type[_Block], z: Tensor, labels: Tensor, margin: float | None, distance: str
) -> tuple[Tensor, Tensor]:
    _checks.choice("distance", distance, _checks.DISTANCES)
    if margin is not None:
        _checks.scalar("margin", margin)
    sums, above = apply(_Triplets, rule, z, labels, margin, distance)
    return sums, above


def distance_tile(x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor, distance: str) -> Tensor:
    """Distances of rows ``(A, D)`` and columns ``(N, D)`` with their squared lengths, ``(A, N)``.

    Euclidean ones, squared or not, lose half the digits of rows that are near each other: pass fp64.
    """
    with torch.autocast(x.device.type, enabled=False):
        d = x @ y.T
    if distance == "cosine":
        return 1 - d
    d = (x_squares[:, None] + y_squares - 2 * d).clamp_(min=0)
    return d if distance == "squared" else d.sqrt_()


def distance_grad(w: Tensor, d: Tensor, x: Tensor, y: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """Gradients of rows and columns from those of a tile of distances, ``w``; that of equal rows is 0."""
    if distance == "cosine":
        return -(w @ y), -(w.T @ x)
    apart = d > 0
    w = 2 * w if distance == "squared" else torch.where(apart, w / torch.where(apart, d, 1), 0)
    return w.sum(1)[:, None] * x - w @ y, w.sum(0)[:, None] * y - w.T @ x


class _ClassSums(torch.autograd.Function):
    """The gradient of a row is the sum of the gradients of the other rows of its class: the same operation."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor) -> Tensor:
        ctx.dtype = z.dtype
        ctx.save_for_backward(labels)
        return _sums_of_others(z.to(torch.promote_types(z.dtype, torch.float32)), labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (labels,) = ctx.saved_tensors
        return _sums_of_others(grad, labels).to(ctx.dtype), None


def _sums_of_others(rows: Tensor, labels: Tensor) -> Tensor:
    order, start, end = class_runs(labels)
    if rows.device.type != "cuda":
        first = order[start]
        return torch.zeros_like(rows).index_add_(0, first, rows)[first] - rows
    return run_sums(rows[order], start[order])[end - 1] - rows  # there index_add_ adds in any order


def run_sums(rows: Tensor, start: Tensor) -> Tensor:
    """Sums from the start of every row's run up to that row: by doubling steps that stop there, in a fixed order."""
    at = torch.arange(len(rows), device=rows.device)
    step = 1
    while step < len(rows):  # after this step row i holds those from i - 2 * step + 1 on
        inside = (at[step:] - step >= start[step:])[:, None]
        rows = torch.cat([rows[:step], rows[step:] + torch.where(inside, rows[:-step], 0)])
        step *= 2
    return rows


class _Triplets(torch.autograd.Function):
    """Both directions walk over blocks of anchors and form their distances to all rows."""

    @staticmethod
    def forward(
        ctx: Any, rule: type[_Block], z: Tensor, labels: Tensor, margin: float | None, distance: str
    ) -> tuple[Tensor, Tensor]:
        ctx.rule, ctx.margin, ctx.distance = rule, margin, distance
        ctx.save_for_backward(z, labels)
        sums, count = [z.new_zeros(0, dtype=torch.float64)], labels.new_zeros(())
        for block in _blocks(rule, z, labels, margin, distance):
            sums.append(block.loss())
            count = count + block.count()
        ctx.mark_non_differentiable(count)
        return torch.cat(sums).to(z.dtype), count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        z, labels = ctx.saved_tensors
        rows = z.double()
        dz = torch.zeros_like(rows)
        for block in _blocks(ctx.rule, z, labels, ctx.margin, ctx.distance):
            dx, dy = distance_grad(
                block.weights() * grad[block.anchors, None], block.d, rows[block.anchors], rows, ctx.distance
            )
            dz[block.anchors] += dx
            dz += dy
        return None, dz.to(z.dtype), None, None, None


class _Block:
    """Some anchors, their distances to all rows, and which of these are positives and negatives.

    Attributes:
        anchors: A of N rows.
        d: ``(A, N)`` fp64.
        positives, exists: ``(A, P)`` columns of d, of which those that exist are positives of the anchor.
        negative: ``(A, N)``.
        margin: of the hinge, ``None`` for the soft margin.
    """

    def __init__(
        self, anchors: slice, d: Tensor, positives: Tensor, exists: Tensor, negative: Tensor, margin: float | None
    ) -> None:
        self.anchors, self.d, self.positives, self.exists = anchors, d, positives, exists
        self.negative, self.margin = negative, margin
        self.prepare()

    def prepare(self) -> None:
        """What loss, count and weights share."""
        raise NotImplementedError

    def loss(self) -> Tensor:
        """Sum of every anchor ``(A,)``."""
        raise NotImplementedError

    def count(self) -> Tensor:
        """Of what the mean is over, ``()``."""
        raise NotImplementedError

    def weights(self) -> Tensor:
        """Derivative of an anchor's sum by each of its distances ``(A, N)``."""
        raise NotImplementedError


class _All(_Block):
    """A triplet counts where the positive's threshold t_p = d(a, p) + margin is above d(a, n).

    With the thresholds of an anchor in ascending order, those above a negative are all from some place on.
    """

    def prepare(self) -> None:
        assert self.margin is not None
        thresholds = self.d.gather(1, self.positives) + self.margin
        thresholds = torch.where(self.exists, thresholds, -torch.inf)  # what is absent comes first
        self.thresholds, self.order = thresholds.sort(1)
        self.place = torch.searchsorted(self.thresholds, self.d, right=True)
        self.share = self.positives.shape[1] - self.place  # thresholds above

    def loss(self) -> Tensor:
        kept = self.thresholds.masked_fill(self.thresholds == -torch.inf, 0)
        above = kept.flip(1).cumsum(1).flip(1)  # sum of this and all greater thresholds
        above = torch.cat([above, above.new_zeros(len(above), 1)], 1).gather(1, self.place)
        return (above - self.share * self.d).masked_fill(~self.negative, 0).sum(1)

    def count(self) -> Tensor:
        return self.share.masked_fill(~self.negative, 0).sum()

    def weights(self) -> Tensor:
        w = torch.where(self.negative, -self.share, 0).double()
        n, slots = self.place.shape[0], self.positives.shape[1] + 1
        # how many negatives a threshold is above: those whose place is not after it; none has a place among the absent
        places = self.place.masked_fill(~self.negative, slots - 1)
        beaten = places.new_zeros(n, slots).scatter_add_(1, places, torch.ones_like(places)).cumsum(1)[:, :-1]
        return w.scatter_add_(1, self.positives.gather(1, self.order), beaten.double())


class _SemiHard(_Block):
    """With the positives of an anchor in ascending order, a negative is no nearer than all up to some place.

    So the nearest negative of a positive is the least of all places after its own: the least of every place is found
    first, then the least from every place on.
    """

    def prepare(self) -> None:
        to_positive = torch.where(self.exists, self.d.gather(1, self.positives), torch.inf)  # what is absent comes last
        to_positive, order = to_positive.sort(1)
        self.positives = self.positives.gather(1, order)
        d = torch.where(self.negative, self.d, torch.inf)
        place = torch.searchsorted(to_positive, self.d, right=True)
        a, n = d.shape
        least = d.new_full((a, to_positive.shape[1] + 1), torch.inf).scatter_reduce_(1, place, d, "amin")
        is_least = self.negative & (d == least.gather(1, place))
        column = torch.where(is_least, torch.arange(n, device=d.device), n - 1)
        columns = place.new_full(least.shape, n - 1).scatter_reduce_(1, place, column, "amin")
        nearest, at = least.flip(1).cummin(1)
        nearest, at = nearest.flip(1)[:, 1:], (least.shape[1] - 1 - at).flip(1)[:, 1:]
        chosen = columns.gather(1, at)
        furthest, last = torch.where(self.negative, self.d, -torch.inf).max(1, keepdim=True)
        none = nearest == torch.inf
        self.chosen = torch.where(none, last, chosen)
        self.counted = (to_positive != torch.inf) & self.negative.any(1, keepdim=True)
        self.difference = torch.where(self.counted, to_positive - torch.where(none, furthest, nearest), 0)

    def loss(self) -> Tensor:
        d, margin = self.difference, self.margin
        return torch.where(self.counted, -logsigmoid(-d) if margin is None else (d + margin).relu(), 0).sum(1)

    def count(self) -> Tensor:
        return self.counted.sum()

    def weights(self) -> Tensor:
        slope = self.difference.sigmoid() if self.margin is None else (self.difference + self.margin > 0).double()
        slope = torch.where(self.counted, slope, 0)
        w = torch.zeros_like(self.d).scatter_add_(1, self.positives, slope)
        return w.scatter_add_(1, self.chosen, -slope)


def _blocks(rule: type[_Block], z: Tensor, labels: Tensor, margin: float | None, distance: str) -> Iterator[_Block]:
    n = len(z)
    rows = z.double()
    squares = rows.square().sum(1)
    order, start, end = class_runs(labels)
    most = int((end - start).max()) if n else 0  # read from the device: it is a shape
    height = max(1, _TILE // max(n, 1))
    at = torch.arange(n, device=z.device)
    slot = torch.arange(most, device=z.device)
    for first in range(0, n, height):
        anchors = slice(first, min(first + height, n))
        d = distance_tile(rows[anchors], rows, squares[anchors], squares, distance)
        if distance != "cosine":
            d[at[anchors] - first, at[anchors]] = 0
        place = start[anchors, None] + slot
        inside = place < end[anchors, None]
        positives = order[torch.where(inside, place, start[anchors, None])]
        exists = inside & (positives != at[anchors, None])
        yield rule(anchors, d, positives, exists, labels[anchors, None] != labels, margin)
