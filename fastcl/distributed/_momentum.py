"""What MoCo does across ranks beside its loss: shuffled batches for batch normalisation, and one queue for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .._checks import sentence
from ._agreement import over_cpu
from ._wire import Wire, all_gather


@torch.no_grad()
def all_rows(x: Tensor, process_group: Any, *, even: bool = False) -> Tensor:
    """Rows of all ranks in the order of ranks, the same on each, without gradient.

    Args:
        x: ``(B, ...)``, whatever B a rank has.
        process_group: of torch.distributed; all its ranks call this together.
        even: every rank promises the same B; otherwise they tell each other first.

    Returns:
        ``(sum of B, ...)``.

    Raises:
        TypeError, ValueError: not a tensor with rows, or not a process group of this rank.
    """
    wire = Wire(process_group)
    return wire.gather(x, _counts(x, wire, even))


@torch.no_grad()
def shuffle_batch(
    x: Tensor, process_group: Any, *, even: bool = False, generator: torch.Generator | None = None
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Deals the images of all ranks out anew, as MoCo does for its key encoder (He et al. 2020, section 3.3).

    Batch normalisation otherwise tells a query which keys were normalised with it, and so which is its own.

    Args:
        x: ``(B, ...)`` images of this rank; as many come back.
        process_group, even: those of :func:`all_rows`.
        generator: of the permutation, on the CPU; torch's global one of the device of ``x`` where it is omitted.

    Returns:
        As many images ``(B, ...)``, by a permutation of rank 0, and the function that brings what the encoder made of
        them, ``(B, D)``, back to the ranks and rows that the images came from. Neither has a gradient.
    """
    wire = Wire(process_group)
    counts = _counts(x, wire, even)
    if not isinstance(generator, torch.Generator | None):
        got = f"generator of type {type(generator).__name__}"
        raise TypeError(sentence(got, "a torch.Generator", "Pass one, or leave it out for torch's own."))
    start = sum(counts[: wire.rank])
    own = slice(start, start + counts[wire.rank])
    drawn_on = x.device if generator is None else generator.device
    order = torch.randperm(sum(counts), generator=generator, device=drawn_on).to(x.device)
    dist.broadcast(order, dist.get_global_rank(process_group, 0), group=process_group)

    @torch.no_grad()
    def restore(rows: Tensor) -> Tensor:
        return wire.gather(rows, counts)[order.argsort()[own]]

    return wire.gather(x, counts)[order[own]], restore


def _counts(x: Tensor, wire: Wire, even: bool) -> list[int]:
    _checks.tensor("x", x, "(rows, ...)")
    _checks.flag(even=even)
    if x.ndim == 0:
        raise ValueError(sentence("x of shape ()", "shape (rows, ...)", "Pass what this rank has, a row per image."))
    if even:
        return [len(x)] * wire.size
    counts = torch.empty(wire.size, dtype=torch.long)
    all_gather(counts, torch.tensor([len(x)]), group=over_cpu(wire.group))
    return [int(count) for count in counts]
