"""Collectives over rows that are spread unevenly over ranks, plain and differentiable, and the bytes that they send.

A differentiable collective has a *replicated* result: every rank has the same, computes with it what it likes, and the
gradient of the result is the sum of what all ranks send back. So the sum of the gradients of all ranks' losses reaches
every input, and every rank has to run its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import sentence
from ..pairwise import apply, once_differentiable

# torch 2.14 renamed them
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_sent = 0


def check_group(group: Any) -> None:
    """A process group that this rank belongs to. (``None`` is the default group to torch, but not everywhere.)"""
    if not isinstance(group, dist.ProcessGroup):
        got = f"process_group of type {type(group).__name__}"
        mend = "Pass torch.distributed.group.WORLD, once it is there."
        raise TypeError(sentence(got, "a process group of this rank", mend))


def bytes_sent() -> int:
    """What the losses of this process have sent to other ranks so far, forward and backward.

    Of an all-gather, an all-to-all or a reduce-scatter (W - 1) blocks, of an all-reduce 2 (W - 1) / W of it, which is
    what the ring algorithms of NCCL send.
    """
    return _sent


def _count(count: int) -> None:
    global _sent
    _sent += count


class Wire:
    """A process group, and what this rank has sent over it.

    Args:
        group: a process group that this rank belongs to.
        dtype: in which rows travel, and the gradients of rows; ``None`` for their own.

    Attributes:
        rank, size: of this rank, of all.
    """

    def __init__(self, group: Any, dtype: torch.dtype | None = None) -> None:
        check_group(group)
        self.group, self.dtype = group, dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def narrow(self, rows: Tensor) -> Tensor:
        """Rows in the dtype in which they travel; vectors and integers as they are."""
        if (
            self.dtype is None
            or rows.ndim < 2
            or self.dtype.itemsize >= rows.element_size()
            or not rows.is_floating_point()
        ):
            return rows
        return rows.to(self.dtype)

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows of all ranks, one rank's after another's: ``(sum(counts), ...)`` of ``(counts[rank], ...)``."""
        return self.begin_gather(x, counts)()

    def begin_gather(self, x: Tensor, counts: Sequence[int]) -> Callable[[], Tensor]:
        """The same, while something else is computed: what is returned waits for them."""
        most = max(counts)
        everyone = x.new_empty(self.size * most, *x.shape[1:])
        _count((self.size - 1) * everyone.nbytes // self.size)
        work = None
        if everyone.numel():
            work = all_gather(everyone, _padded(x, most), group=self.group, async_op=True)

        def wait() -> Tensor:
            if work is not None:
                work.wait()
            return _unpadded(everyone, counts)

        return wait

    def scatter_sum(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of the sum over all ranks: ``(counts[rank], ...)`` of ``(sum(counts), ...)``.

        Summed in the dtype of ``x`` in any case, though it may travel in another.
        """
        most, own = max(counts), counts[self.rank]
        blocks = torch.stack([_padded(block, most) for block in x.split(list(counts))])
        if not blocks.numel():
            return x.new_empty(own, *x.shape[1:])
        if (sending := self.narrow(blocks) if x.ndim > 1 else blocks) is not blocks:
            received = torch.empty_like(sending)
            dist.all_to_all_single(received, sending, group=self.group)
            received[self.rank] = 0  # what does not travel is not rounded
            total = received.to(x.dtype).sum(0) + blocks[self.rank]
        elif "nccl" in dist.get_backend(self.group):
            sending = blocks
            total = torch.empty_like(blocks[0])
            _reduce_scatter(total, blocks, group=self.group)
        else:  # gloo has no reduce-scatter in every version of torch that is served
            sending = blocks
            received = torch.empty_like(blocks)
            dist.all_to_all_single(received, blocks, group=self.group)
            total = received.sum(0)
        _count((self.size - 1) * sending.nbytes // self.size)
        return total[:own]

    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def _reduced(self, x: Tensor, operation: Any) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, operation, group=self.group)
        _count(2 * (self.size - 1) * total.nbytes // self.size)
        return total

    def exchange(self, to: int, sending: Sequence[Tensor], origin: int, receiving: Sequence[Tensor]) -> list[Any]:
        """Begins to send tensors to one rank and to receive others from another; what to wait for."""
        to, origin = (dist.get_global_rank(self.group, rank) for rank in (to, origin))
        operations = [dist.P2POp(dist.isend, t, to, self.group) for t in sending if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, origin, self.group) for t in receiving if t.numel()]
        _count(sum(t.nbytes for t in sending))
        return dist.batch_isend_irecv(operations) if operations else []


def gathered(x: Tensor, counts: Sequence[int], wire: Wire) -> Tensor:
    """Rows of all ranks, replicated; those of a wire with a dtype are rounded to it, this rank's own too."""
    rows: Tensor = apply(_Gathered, x, tuple(counts), wire)
    return rows


def total(x: Tensor, wire: Wire) -> Tensor:
    """Sum over ranks, replicated."""
    summed: Tensor = apply(_Total, x, wire)
    return summed


def logsumexp(x: Tensor, wire: Wire) -> Tensor:
    """Log-sum-exp over ranks, replicated; -inf, which sends no gradient, where it is that on all."""
    largest = wire.max(x)
    shift = largest.masked_fill(largest == -torch.inf, 0)
    sums = total((x - shift).exp(), wire)
    empty = sums == 0
    return torch.where(empty, -torch.inf, torch.where(empty, 1, sums).log() + shift)


def chunk(count: int, wire: Wire) -> tuple[slice, list[int]]:
    """This rank's share of so many replicated rows, and how many everyone has."""
    bounds = [count * rank // wire.size for rank in range(wire.size + 1)]
    counts = [end - start for start, end in pairwise(bounds)]
    return slice(bounds[wire.rank], bounds[wire.rank + 1]), counts


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...], wire: Wire) -> Tensor:
        ctx.counts, ctx.wire = counts, wire
        return wire.gather(wire.narrow(x), counts).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.wire.scatter_sum(grad, ctx.counts), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return wire.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.wire.sum(grad), None


def _padded(x: Tensor, rows: int) -> Tensor:
    x = x.detach()
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _unpadded(everyone: Tensor, counts: Sequence[int]) -> Tensor:
    most = max(counts)
    if min(counts) == most:
        return everyone
    return torch.cat([everyone[rank * most :][:count] for rank, count in enumerate(counts)])
