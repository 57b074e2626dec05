"""Where formulas and pair reductions look whether rows of other ranks count, too; ``fastcl.distributed`` says so.

A formula sees the rows of all ranks and is written as for one process. Of what it calls, only the reductions over pairs
and the reduction over rows need to know that there are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor


class Across(Protocol):
    """What is done in the place of one process."""

    def reduce(self, link: str, reduce: Callable[..., Any], q: Tensor, k: Tensor, options: dict[str, Any]) -> Any:
        """A pair reduction over all rows: ``(M,)``, or with ``both`` also ``(N,)``."""

    def topk(self, topk: Callable[..., Any], q: Tensor, k: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The most similar columns of all rows."""

    def reduced(self, loss: Tensor, rows: int, reduction: str, weight: Tensor | None) -> Tensor:
        """This rank's share of the sum of (weighted) losses, ``(rows,)`` or ``()``, or of their mean: over the weight
        of the rows of all, or over their number."""


# A plain global, as the forced backend is: a loss reads it in forward, and its backward does not.
_current: Across | None = None


def current() -> Across | None:
    return _current


@contextmanager
def using(across: Across | None) -> Iterator[None]:
    global _current
    before, _current = _current, across
    try:
        yield
    finally:
        _current = before
