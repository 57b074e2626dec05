"""Sums over triples of rows (anchor, positive, negative), without a list of them.

Which rows are positives is said by labels, as integers: rows sorted by label make every class a run, so a row's
positives are found without a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .pairwise import apply, once_differentiable

_TILE = 2**20  # numbers of a block of distances; a handful of such blocks live at once


def class_runs(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The order that sorts rows by label (stable), and where the run of every row's class starts and ends in it."""
    order = labels.argsort(stable=True)
    label = labels[order].contiguous()
    labels = labels.contiguous()
    return order, torch.searchsorted(label, labels), torch.searchsorted(label, labels, right=True)


def positive_indices(labels: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of an anchor and another row of its label, anchor by anchor: two ``(P,)``. Reads P from the device."""
    order, start, end = class_runs(labels)
    count = end - start - 1
    anchor = torch.repeat_interleave(torch.arange(len(labels), device=labels.device), count)
    offset = torch.arange(len(anchor), device=labels.device) - (count.cumsum(0) - count)[anchor]
    own = order.argsort()[anchor] - start[anchor]
    return anchor, order[start[anchor] + offset + (offset >= own)]


def class_sums(z: Tensor, labels: Tensor) -> Tensor:
    """For every row the sum of the *other* rows of its label, ``(N, D)`` fp32 (fp64); no host synchronisation."""
    return apply(_ClassSums, z, labels)


def batch_all(z: Tensor, labels: Tensor, margin: float, distance: str) -> tuple[Tensor, Tensor]:
    """Sums of max(0, d(a, p) - d(a, n) + margin) over the triplets of every anchor.

    Args:
        z: ``(N, D)`` fp32 or fp64.
        labels: ``(N,)`` integers.
        distance: ``"euclidean"``, ``"squared"`` or ``"cosine"``.

    Returns:
        The sums, ``(N,)``, and how many triplets of all are above 0, ``()`` int64.
    """
    _checks.choice("distance", distance, ("euclidean", "squared", "cosine"))
    return apply(_BatchAll, z, labels, margin, distance)


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


class _BatchAll(torch.autograd.Function):
    """Both directions walk over blocks of anchors and form their distances to all rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor, margin: float, distance: str) -> tuple[Tensor, Tensor]:
        ctx.margin, ctx.distance = margin, distance
        ctx.save_for_backward(z, labels)
        sums, active = [z.new_zeros(0, dtype=torch.float64)], labels.new_zeros(())
        for block in _blocks(z, labels, margin, distance):
            sums.append(block.loss())
            active = active + block.share.masked_fill(~block.negative, 0).sum()
        total = torch.cat(sums).to(z.dtype)
        ctx.mark_non_differentiable(active)
        return total, active

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
        z, labels = ctx.saved_tensors
        rows = z.double()
        dz = torch.zeros_like(rows)
        for block in _blocks(z, labels, ctx.margin, ctx.distance):
            w = block.weights() * grad[block.anchors, None]  # of every distance
            if ctx.distance == "cosine":
                dz[block.anchors] -= w @ rows
                dz -= w.T @ rows[block.anchors]
                continue
            if ctx.distance == "euclidean":
                w = torch.where(block.d > 0, w / torch.where(block.d > 0, block.d, 1), 0)
            else:
                w = 2 * w
            dz[block.anchors] += w.sum(1)[:, None] * rows[block.anchors] - w @ rows
            dz += w.sum(0)[:, None] * rows - w.T @ rows[block.anchors]
        return dz.to(z.dtype), None, None, None


class _Block:
    """Some anchors: their distances to all rows, their positives sorted, and every row's place among these.

    A triplet counts where the positive's threshold t_p = d(a, p) + margin is above d(a, n). With the thresholds of an
    anchor in ascending order, those above a negative are all from some place on.
    """

    def __init__(self, anchors: slice, d: Tensor, labels: Tensor, positives: Tensor, exists: Tensor, margin: float):
        self.anchors, self.d, self.positives = anchors, d, positives  # positives (A, P) are columns of d
        self.negative = labels[anchors, None] != labels
        thresholds = torch.where(exists, d.gather(1, positives) + margin, -torch.inf)  # what is absent comes first
        self.thresholds, self.order = thresholds.sort(1)
        self.place = torch.searchsorted(self.thresholds, d, right=True)
        self.share = positives.shape[1] - self.place  # thresholds above

    def loss(self) -> Tensor:
        kept = self.thresholds.masked_fill(self.thresholds == -torch.inf, 0)
        above = kept.flip(1).cumsum(1).flip(1)  # sum of this and all greater thresholds
        above = torch.cat([above, above.new_zeros(len(above), 1)], 1).gather(1, self.place)
        return (above - self.share * self.d).masked_fill(~self.negative, 0).sum(1)

    def weights(self) -> Tensor:
        """Derivative of the anchor's sum by each of its distances ``(A, N)``."""
        w = torch.where(self.negative, -self.share, 0).double()
        n, slots = self.place.shape[0], self.positives.shape[1] + 1
        # how many negatives a threshold is above: those whose place is not after it
        places = self.place.masked_fill(~self.negative, slots - 1)
        beaten = places.new_zeros(n, slots).scatter_add_(1, places, torch.ones_like(places)).cumsum(1)[:, :-1]
        beaten = torch.where(self.thresholds > -torch.inf, beaten, 0)
        return w.scatter_add_(1, self.positives.gather(1, self.order), beaten.double())


def _blocks(z: Tensor, labels: Tensor, margin: float, distance: str) -> Iterator[_Block]:
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
        with torch.autocast(z.device.type, enabled=False):
            d = rows[anchors] @ rows.T
        if distance == "cosine":
            d = 1 - d
        else:
            d = (squares[anchors, None] + squares - 2 * d).clamp_(min=0)
            d[at[anchors] - first, at[anchors]] = 0
            d = d if distance == "squared" else d.sqrt_()
        place = start[anchors, None] + slot
        inside = place < end[anchors, None]
        positives = order[torch.where(inside, place, start[anchors, None])]
        exists = inside & (positives != at[anchors, None])
        yield _Block(anchors, d, labels, positives, exists, margin)
