"""Log-sum-exps of this rank's rows over the rows of all ranks, as functions that know their own gradients.

*One set* (NT-Xent): row i of rank r is compared with every row. Since s_ij = s_ji, the gradient of a row needs the rows
of others, and two numbers of each: its log-sum-exp and upstream gradient. No gradient of a row ever travels.

*Two sets* (InfoNCE, CLIP): rows stay, columns travel. Log-sum-exps of columns are sums over ranks, and so are the
gradients of columns.

*gather* stores the columns of all ranks and visits them in one pass. The *ring* holds two blocks of columns: one is
visited while the next arrives, and what was found for a block travels behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from ..backends import Pairs
from ..pairwise import once_differentiable, operand_dtype
from ._wire import Wire, logsumexp

Found = list[Tensor]


def circulate(
    wire: Wire,
    counts: Sequence[int],
    own: Found,
    visit: Callable[[int, Found], Found],
    merge: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Found:
    """Passes every rank's block round the ring, once past every rank; the next block arrives while one is visited.

    Args:
        own: tensors ``(counts[rank], ...)``.
        visit: takes the rank that a block is of, and the block; gives what it found for the rows of the block.
        merge: puts two findings together; they travel behind their block and come home. ``None`` lets them go.

    Returns:
        What all ranks found for this rank's block.
    """
    after, before = (wire.rank + 1) % wire.size, (wire.rank - 1) % wire.size
    held, carried = own, list[Tensor]()
    for step in range(wire.size):
        owner = (wire.rank - step) % wire.size
        pending: list[Any] = []
        if step and merge:
            sending, carried = carried, [t.new_empty(counts[owner], *t.shape[1:]) for t in carried]
            pending += wire.exchange(after, sending, before, carried)
        arriving: list[Any] = []
        coming = []
        if step + 1 < wire.size:
            coming = [t.new_empty(counts[(owner - 1) % wire.size], *t.shape[1:]) for t in own]
            arriving = wire.exchange(after, held, before, coming)
        found = visit(owner, held)
        for work in pending:
            work.wait()
        if merge:
            carried = [merge(*both) for both in zip(carried, found, strict=True)] if step else found
        for work in arriving:
            work.wait()
        held = coming
    if not merge or wire.size == 1:
        return carried
    home = [t.new_empty(counts[wire.rank], *t.shape[1:]) for t in carried]
    for work in wire.exchange(after, carried, before, home):
        work.wait()
    return home


class OneSet(torch.autograd.Function):
    """Log-sum-exp of every row of this rank over the rows of all ranks whose keys differ: ``(B,)`` of ``(B, D)``."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, scale: Tensor, keys: Tensor, counts: list[int], wire: Wire, ring: bool, backend: str
    ) -> Tensor:
        x = _operand(z, wire)
        scale_dtype, scale = scale.dtype, scale.detach().to(torch.promote_types(x.dtype, torch.float32))
        ctx.known = counts, wire, ring, backend, z.dtype, scale_dtype

        def reduce(pairs: Pairs, both: bool = False) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = _ops.pair_reduce("exp", *pairs, both, True, backend)
            return found

        def own() -> Tensor:
            return reduce(Pairs(x, x, scale, drop_x=keys, drop_y=keys, symmetric=True))[0]

        if ring:
            row, all_x, all_keys = _half_ring(x, keys, scale, counts, wire, reduce), None, None
        else:
            rows = wire.begin_gather(wire.narrow(x), counts)
            all_keys = wire.gather(keys, counts)
            row = own()  # while rows are on their way
            all_x = rows().to(x.dtype)
            start = sum(counts[: wire.rank])
            for others in (slice(0, start), slice(start + len(x), None)):
                if len(all_x[others]):
                    pairs = Pairs(x, all_x[others], scale, drop_x=keys, drop_y=all_keys[others])
                    row = torch.logaddexp(row, reduce(pairs)[0])
        ctx.save_for_backward(x, scale, keys, row, all_x, all_keys)
        return row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scale, keys, row, all_x, all_keys = ctx.saved_tensors
        counts, wire, ring, backend, z_dtype, scale_dtype = ctx.known
        grad = grad.contiguous()

        def gradient(pairs: Pairs, col: Tensor, col_grad: Tensor) -> Tensor:
            dx: Tensor = _ops.pair_grad("exp", *pairs, row, grad, col, col_grad, True, False, False, backend)[0]
            return dx

        if ring:
            dx = torch.zeros_like(x, dtype=row.dtype)

            def visit(owner: int, block: Found) -> Found:
                y, y_keys, col, col_grad = block
                dx.add_(gradient(Pairs(x, y.to(x.dtype), scale, drop_x=keys, drop_y=y_keys), col, col_grad))
                return []

            circulate(wire, counts, [wire.narrow(x), keys, row, grad], visit)
        else:
            col, col_grad = (wire.gather(t, counts) for t in (row, grad))
            dx = gradient(Pairs(x, all_x, scale, drop_x=keys, drop_y=all_keys), col, col_grad)
        # every pair is seen from both of its rows
        dscale = 0.5 * (x * dx).sum()
        return dx.mul_(scale).to(z_dtype), dscale.to(scale_dtype), None, None, None, None, None


def _half_ring(
    x: Tensor, keys: Tensor, scale: Tensor, counts: list[int], wire: Wire, reduce: Callable[..., Any]
) -> Tensor:
    """Of two ranks one computes the block of both, and sends the other its sums: half of the products."""
    row: Tensor = reduce(Pairs(x, x, scale, drop_x=keys, drop_y=keys, symmetric=True))[0]
    steps = wire.size // 2
    after, before = (wire.rank + 1) % wire.size, (wire.rank - 1) % wire.size
    held: Found = [wire.narrow(x), keys]
    for step in range(steps + 1):
        arriving: list[Any] = []
        coming: Found = []
        if step < steps:
            count = counts[(wire.rank - step - 1) % wire.size]
            coming = [t.new_empty(count, *t.shape[1:]) for t in held]
            arriving = wire.exchange(after, held, before, coming)
        if step:
            y, y_keys = held
            both = 2 * step < wire.size  # half way round, either rank meets the other
            found, for_other = reduce(Pairs(x, y.to(x.dtype), scale, drop_x=keys, drop_y=y_keys), both)
            row = torch.logaddexp(row, found)
            if both:
                mine = torch.empty_like(row)
                to, origin = (wire.rank - step) % wire.size, (wire.rank + step) % wire.size
                for work in wire.exchange(to, [for_other], origin, [mine]):
                    work.wait()
                row = torch.logaddexp(row, mine)
        for work in arriving:
            work.wait()
        held = coming
    return row


class TwoSets(torch.autograd.Function):
    """Log-sum-exps of this rank's rows over all columns, ``(B,)``, and (``both``) of its columns over all rows."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: Tensor, keys: Tensor, k_keys: Tensor, both: bool, counts: list[int],
        wire: Wire, ring: bool, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = operand_dtype(q, k)
        x, y = _operand(q, wire, dtype), _operand(k, wire, dtype)
        scale_dtype, scale = scale.dtype, scale.detach().to(torch.promote_types(dtype, torch.float32))
        ctx.known = counts, wire, ring, backend, both, q.dtype, k.dtype, scale_dtype
        row = x.new_full((len(x),), -torch.inf, dtype=scale.dtype)
        all_y = all_keys = None

        def visit(owner: int, block: Found) -> Found:
            pairs = Pairs(x, block[0].to(dtype), scale, drop_x=keys, drop_y=block[1])
            found = _ops.pair_reduce("exp", *pairs, both, True, backend)
            torch.logaddexp(row, found[0], out=row)
            return [found[1]] if both else []

        if ring:
            columns = circulate(wire, counts, [wire.narrow(y), k_keys], visit, torch.logaddexp if both else None)
        else:
            rows = wire.begin_gather(wire.narrow(y), counts)
            all_keys = wire.gather(k_keys, counts)
            own = visit(wire.rank, [y, k_keys])  # while rows are on their way
            all_y = rows().to(dtype)
            start = sum(counts[: wire.rank])
            before, after = (
                visit(-1, [all_y[others], all_keys[others]])
                for others in (slice(0, start), slice(start + len(y), None))
            )
            columns = [
                logsumexp(torch.cat(parts), wire).split(counts)[wire.rank]
                for parts in zip(before, own, after, strict=True)
            ]
        col = columns[0] if both else row.new_empty(0)
        ctx.save_for_backward(x, y, scale, keys, k_keys, row, col, all_y, all_keys)
        ctx.set_materialize_grads(False)
        if not both:
            ctx.mark_non_differentiable(col)
        return row, col

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor | None, col_grad: Tensor | None) -> tuple[Any, ...]:
        x, y, scale, keys, k_keys, row, col, all_y, all_keys = ctx.saved_tensors
        counts, wire, ring, backend, both, q_dtype, k_dtype, scale_dtype = ctx.known
        row_grad = torch.zeros_like(row) if row_grad is None else row_grad.contiguous()
        of_columns = []
        if both:
            of_columns = [col, torch.zeros_like(col) if col_grad is None else col_grad.contiguous()]
        dx = torch.zeros_like(x, dtype=row.dtype)

        def visit(owner: int, block: Found) -> Found:
            col_side = block[2:] if both else (None, None)
            pairs = Pairs(x, block[0].to(x.dtype), scale, drop_x=keys, drop_y=block[1])
            found = _ops.pair_grad("exp", *pairs, row, row_grad, *col_side, True, True, False, backend)
            dx.add_(found[0])
            return [found[1]]

        if ring:
            (dy,) = circulate(wire, counts, [wire.narrow(y), k_keys, *of_columns], visit, torch.add)
        else:
            (dy,) = visit(-1, [all_y, all_keys, *(wire.gather(t, counts) for t in of_columns)])
            dy = wire.scatter_sum(dy, counts)
        dscale = (x * dx).sum()
        return (
            dx.mul_(scale).to(q_dtype), dy.mul_(scale).to(k_dtype), dscale.to(scale_dtype), *(None,) * 7
        )  # fmt: skip


def _operand(rows: Tensor, wire: Wire, dtype: torch.dtype | None = None) -> Tensor:
    """Rows as they are multiplied, by this rank as by others: rounded to the dtype in which they travel."""
    dtype = operand_dtype(rows, rows) if dtype is None else dtype
    rows = rows.detach()
    return (rows if wire.dtype is None else rows.to(wire.dtype)).to(dtype).contiguous()
