"""Drop-ins for ``grad_cache.loss``: the losses that GradCache calls on the representations of a large batch.

The repository is installed from a clone, if at all; these classes stand alone. Logits are plain inner products. A loss
has the dtype of its rows, or is fp32 under autocast. Bad input raises a ValueError where GradCache has an assertion.

On several ranks :class:`DistributedContrastiveLoss` computes the loss of all ranks' rows on every rank, and sends
gradients to this rank's rows only. GradCache leaves it at that, so that DDP's average is 1 / world_size of the
gradient. Here it is the gradient; ``strict=True`` keeps GradCache's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import _checks
from .._checks import sentence
from ..functional._arguments import reduced
from ..pairwise import scale_gradient
from ._dropin import as_original, gathered, ranks, softmax_rows

UPSTREAM = "grad_cache.loss"
ORIGIN = "see github.com/luyug/GradCache"

__all__ = ["ContrastiveLossWithQueryClosure", "DistributedContrastiveLoss", "SimpleContrastiveLoss"]

_IGNORED = -100  # cross_entropy's ignore_index, which the original has by default


class SimpleContrastiveLoss:
    """InfoNCE at temperature 1: a query's positive is followed by its hard negatives among the keys.

    Attributes:
        target_per_qry: keys per query, ``n_hard_negatives + 1``.
    """

    def __init__(self, n_hard_negatives: int = 0) -> None:
        mend = "Pass how many keys follow each positive."
        _checks.count("n_hard_negatives", n_hard_negatives, least=0, mend=mend)
        self.target_per_qry = n_hard_negatives + 1

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Loss of queries against all keys.

        Args:
            x: ``(B, D)`` queries.
            y: ``(N, D)`` keys; without a target N = B (n_hard_negatives + 1).
            target: ``(B,)`` integers, the positive of every query; rows with -100 are not counted. Or ``(B, N)``
                probabilities, which go to torch's ``cross_entropy``.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.

        Returns:
            A scalar, or ``(B,)`` for ``reduction="none"``. As in torch, the mean over no rows is NaN.

        Raises:
            ValueError: shapes that do not fit, an unknown reduction.
            TypeError: rows that are not floating-point matrices.
        """
        _checks.rows(x=x, y=y)
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        if target is None:
            if len(x) * self.target_per_qry != len(y):
                raise ValueError(
                    sentence(
                        f"{len(x)} queries and {len(y)} keys",
                        f"{self.target_per_qry} keys per query",
                        "Set n_hard_negatives to the number of keys behind each positive, or pass a target.",
                    )
                )
            if self.target_per_qry > 1:
                target = torch.arange(0, len(y), self.target_per_qry, device=x.device)
            loss = softmax_rows(x, y, target, scale=1.0)
        elif isinstance(target, Tensor) and target.is_floating_point():
            if target.shape != (len(x), len(y)):
                got, expected = f"target of shape {tuple(target.shape)}", f"shape ({len(x)}, {len(y)}) of probabilities"
                raise ValueError(sentence(got, expected, "Pass one for every query and key, or integers."))
            return cross_entropy(x @ y.T, target, reduction=reduction)
        else:
            _checks.vector("target", target, len(x), x, integer=True)
            counted = target != _IGNORED
            loss = softmax_rows(x, y, torch.where(counted, target, 0), scale=1.0)
            loss = torch.where(counted, loss, 0)
            if reduction == "mean":
                return as_original(loss.sum() / counted.sum(), x, y)
        return as_original(loss.mean() if reduction == "mean" else reduced(loss, reduction), x, y)


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The same over queries and keys of all ranks, as many on each.

    Attributes:
        word_size: ranks.
        rank: this one.
        strict: keep the original's gradient, 1 / world_size of the right one once DDP has averaged it.
    """

    def __init__(self, n_hard_negatives: int = 0, *, strict: bool = False) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                sentence(
                    "torch.distributed not initialised",
                    "a process group",
                    "Call torch.distributed.init_process_group() first, or use SimpleContrastiveLoss.",
                )
            )
        super().__init__(n_hard_negatives=n_hard_negatives)
        self.rank, self.word_size = ranks()
        self.strict = strict

    def __call__(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """As :class:`SimpleContrastiveLoss`, with rows of this rank; a target is one of all queries and keys."""
        return super().__call__(self.gather_tensor(x), self.gather_tensor(y), target, reduction)

    def gather_tensor(self, t: Tensor) -> Tensor:
        """Rows of all ranks, of which those of this one receive a gradient."""
        everyone = gathered(t.detach())
        own = t if self.strict else scale_gradient(t, self.word_size)
        first = self.rank * len(t)
        return torch.cat([everyone[:first], own, everyone[first + len(t) :]])


class ContrastiveLossWithQueryClosure(SimpleContrastiveLoss):
    """The same, for queries that are given or computed by a function when they are needed."""

    def __call__(  # type: ignore[override]
        self,
        *reps: Tensor,
        query_closure: Callable[[], Tensor] | None = None,
        target: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Loss of queries against all keys.

        Args:
            reps: queries and keys, or the keys alone beside a ``query_closure``.
            query_closure: gives the queries.
            target, reduction: as in :class:`SimpleContrastiveLoss`.

        Raises:
            ValueError: not one or two tensors; two beside a closure, or one without.
        """
        if len(reps) not in (1, 2):
            raise ValueError(sentence(f"{len(reps)} tensors", "queries and keys, or keys alone", "Pass 1 or 2."))
        if (len(reps) == 2) == (query_closure is not None):
            got = "queries and a query_closure" if query_closure is not None else "keys without queries"
            raise ValueError(sentence(got, "queries, or a query_closure", "Pass one of the two."))
        x = reps[0] if query_closure is None else query_closure()
        return super().__call__(x, reps[-1], target, reduction)
