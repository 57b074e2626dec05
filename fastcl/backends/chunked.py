"""Square tiles in plain torch: every device, every dtype, no compiler.

Logits live one tile at a time, so memory is O((M + N) D) plus a few tiles. A symmetric matrix visits its upper triangle
only: each tile serves its rows and, transposed, its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _settings
from . import Pairs, Sides

_TILE_SIDE = {"cpu": 256}  # a tile and its temporaries stay in a core's L2 cache
_OTHER_TILE_SIDE = 4096  # where a launch costs more than a cache miss
_TILES_ALIVE = 4  # logits, weights, a temporary, a mask

# oneMKL looks for the code of a function when it is first called. Where several of torch's threads do that at once, one
# may run code of half of the digits (pytorch/pytorch issue 188792). So each is called here first, of one number: those
# of losses, and the root that optimizers take.
for _function in (torch.exp, torch.log, torch.sqrt):
    for _dtype in (torch.float32, torch.float64):
        _function(torch.ones(1, dtype=_dtype, device="cpu"))


def unsupported(op: str, x: Tensor) -> str | None:
    return None


def reduce(link: str, pairs: Pairs, both: bool, keep: bool) -> tuple[Tensor, Tensor]:
    x, y = pairs.x, pairs.y
    empty = -torch.inf if link == "exp" else 0.0
    row = x.new_full((len(x),), empty, dtype=_sum_dtype(x))
    col = row if pairs.symmetric else x.new_full((len(y) if both else 0,), empty, dtype=row.dtype)

    for rows, cols, s in _tiles(pairs):
        row[rows] = _merge(link, row[rows], s, 1)
        if both or (pairs.symmetric and cols != rows):
            col[cols] = _merge(link, col[cols], s, 0)
    out = _compute_dtype(x)
    return row.to(out), (col.to(out) if both else x.new_empty(0, dtype=out))


def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(pairs.x)
    x, y = _operands(pairs, dtype)
    dx = torch.zeros_like(x) if want_dx else x.new_empty(0)
    dy = torch.zeros_like(y) if want_dy else y.new_empty(0)
    row_sum, col_sum = (x.new_zeros(len(t) if want_sums else 0, dtype=_sum_dtype(x)) for t in (x, y))
    mirror = (dx, row_sum) if pairs.symmetric else (dy, col_sum)  # where a tile's columns are accumulated

    for rows, cols, s in _tiles(pairs):
        w = _weights(link, s, sides, rows, cols)
        if want_dx:
            dx[rows].addmm_(w, y[cols])
        if want_sums:
            row_sum[rows] += w.sum(1)
        if pairs.symmetric and cols == rows:
            continue
        if want_dy or (pairs.symmetric and want_dx):
            mirror[0][cols].addmm_(w.T, x[rows])
        if want_sums:
            mirror[1][cols] += w.sum(0)
    return dx, dy, row_sum.to(dtype), col_sum.to(dtype)


def topk(pairs: Pairs, topk: int) -> tuple[Tensor, Tensor]:
    x = pairs.x
    values = x.new_full((len(x), topk), -torch.inf, dtype=_compute_dtype(x))
    indices = torch.full_like(values, -1, dtype=torch.long)
    for rows, cols, s in _tiles(pairs._replace(symmetric=False)):
        # max() promises the first of equal values, topk() does not
        best, at = s.max(1, keepdim=True) if topk == 1 else s.topk(min(topk, s.shape[1]), 1)
        best = torch.cat([values[rows], best], 1)
        at = torch.cat([indices[rows], at + cols.start], 1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = best[:, :topk], at.gather(1, order[:, :topk])
    return values, indices.masked_fill_(values == -torch.inf, -1)


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(x)
    wide = x.to(dtype).contiguous()  # as in _operands
    # Dividing by the largest entry first keeps squares in range: fp32 squares of 1e-30 would all be 0.
    largest = wide.abs().amax(1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
    short = largest < torch.finfo(dtype).tiny
    near_one = wide / largest.masked_fill(short, 1)
    length = near_one.norm(dim=1, keepdim=True).masked_fill(short, torch.inf)
    return (near_one / length).to(x.dtype), (length * largest).masked_fill(short, torch.inf).squeeze(1)


def normalize_grad(x: Tensor, length: Tensor, grad: Tensor) -> Tensor:
    length = length[:, None]
    unit, grad = x.to(length.dtype).contiguous() / length, grad.to(length.dtype).contiguous()
    return ((grad - unit * (unit * grad).sum(1, keepdim=True)) / length).to(x.dtype)


def logits(pairs: Pairs) -> Tensor:
    """All logits, as one matrix, -inf where a pair is forgotten: for those who want to look. Differentiable."""
    x, y = _operands(pairs, _compute_dtype(pairs.x))
    return _logits(x, y, pairs)


def _tiles(pairs: Pairs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ``(rows, cols, s)``: a tile of logits, which the caller may overwrite."""
    x, y = _operands(pairs, _compute_dtype(pairs.x))
    side = _tile_side(x)
    for i in range(0, len(x), side):
        rows = slice(i, min(i + side, len(x)))
        for j in range(i if pairs.symmetric else 0, len(y), side):
            cols = slice(j, min(j + side, len(y)))
            yield rows, cols, _logits(x[rows], y[cols], pairs.sliced(rows, cols))


def _logits(x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
    """A forgotten pair's logit is -inf.

    -inf is what makes one rule serve everything: e^-inf = softplus(-inf) = sigmoid(-inf) = 0.
    """
    with torch.autocast(x.device.type, enabled=False):
        s = (x @ y.T) * pairs.scale  # one rounding, where scaled rows would have one for each feature
        if pairs.row_bias is not None:
            s += pairs.row_bias[:, None]
        if pairs.col_bias is not None:
            s += pairs.col_bias
        # "above" is asked, not "at most": a NaN logit is kept, so that it reaches the loss
        if pairs.row_ceiling is not None:
            s.masked_fill_(s > pairs.row_ceiling[:, None], -torch.inf)
        if pairs.col_ceiling is not None:
            s.masked_fill_(s > pairs.col_ceiling, -torch.inf)
        if pairs.guide_x is not None and pairs.guide_y is not None:
            guide = pairs.guide_x.to(_compute_dtype(pairs.guide_x)) @ pairs.guide_y.to(_compute_dtype(pairs.guide_y)).T
            if pairs.row_limit is not None:
                s.masked_fill_(guide > pairs.row_limit[:, None], -torch.inf)
            if pairs.col_limit is not None:
                s.masked_fill_(guide > pairs.col_limit, -torch.inf)
        if pairs.drop_x is not None and pairs.drop_y is not None:
            s.masked_fill_(pairs.drop_x[:, None] == pairs.drop_y, -torch.inf)
        if pairs.only_x is not None and pairs.only_y is not None:
            s.masked_fill_(pairs.only_x[:, None] != pairs.only_y, -torch.inf)
    return s


def _merge(link: str, total: Tensor, s: Tensor, dim: int) -> Tensor:
    if link == "exp":
        return torch.logaddexp(total, s.logsumexp(dim).to(total.dtype))
    return total - logsigmoid(-s).sum(dim)  # softplus() rounds to the identity above 20


def _weights(link: str, s: Tensor, sides: Sides, rows: slice, cols: slice) -> Tensor:
    row_lse, row_grad, col_lse, col_grad = sides
    if link == "softplus":
        w = s.sigmoid_()
        if row_grad is not None and col_grad is not None:
            return w.mul_(row_grad[rows, None] + col_grad[cols])
        return w.mul_(row_grad[rows, None]) if row_grad is not None else w.mul_(col_grad[cols])  # type: ignore[index]
    if row_lse is None or row_grad is None:
        return s.sub_(col_lse[cols]).exp_().mul_(col_grad[cols])  # type: ignore[index]
    if col_lse is None or col_grad is None:
        return s.sub_(row_lse[rows, None]).exp_().mul_(row_grad[rows, None])
    w = (s - row_lse[rows, None]).exp_().mul_(row_grad[rows, None])
    return w.add_(s.sub_(col_lse[cols]).exp_().mul_(col_grad[cols]))


def _operands(pairs: Pairs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Contiguous, so that the matrix product adds in one order, and gives the same bits, whatever the strides were."""
    x = pairs.x.to(dtype).contiguous()
    return x, x if pairs.symmetric else pairs.y.to(dtype).contiguous()


def _tile_side(x: Tensor) -> int:
    if _settings.workspace_bytes is None:
        return _TILE_SIDE.get(x.device.type, _OTHER_TILE_SIDE)
    return max(16, isqrt(_settings.workspace_bytes // (_TILES_ALIVE * x.element_size())))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Partial sums over tiles are one number per row: fp64 costs nothing there, and keeps the digits of many tiles."""
    return torch.float32 if x.device.type == "mps" else torch.float64
