"""Drop-ins for ``lightly.loss``: change ``from lightly.loss import`` to ``from fastcl.integrations.lightly import``.

Arguments, attributes and state are lightly's, for every class is a subclass of lightly's. ``strict=True`` normalises
rows as lightly does: in their own dtype, where a zero row, or a large one, in fp16 becomes NaN.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .. import functional as F
from ..pairwise import l2_normalize, pair_logsumexp, row_dot
from ._dropin import DropIn, as_original, image_ids, upstream

if TYPE_CHECKING:
    from collections.abc import Callable

UPSTREAM = "lightly.loss"
ORIGIN = "pip install lightly"
_loss: Any = upstream(UPSTREAM, ORIGIN)
_dist: Any = upstream("lightly.utils.dist", ORIGIN)
MemoryBankModule: Any = upstream("lightly.loss.memory_bank", ORIGIN).MemoryBankModule

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "MemoryBankModule",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "negative_mises_fisher_weights",
]


class _TwoViews(DropIn):
    """Normalised views, and the log-sum-exp of their negatives: views of other images, on this rank or on all."""

    temperature: float
    gather_distributed: bool

    def _unit(self, *views: Tensor) -> list[Tensor]:
        return [nn.functional.normalize(view, dim=1) if self.strict else l2_normalize(view) for view in views]

    def _negatives(self, out0: Tensor, out1: Tensor) -> Tensor:
        """``(2B,)`` for the rows of both views, which are normalised."""
        z, scale = torch.cat([out0, out1]), 1 / self.temperature
        if not self._gathers:
            return pair_logsumexp(z, scale=scale, drop=torch.arange(len(out0), device=z.device).repeat(2))
        everyone = torch.cat([torch.cat(_dist.gather(view)) for view in (out0, out1)])
        own, ids = image_ids(len(out0), _dist.rank(), _dist.world_size(), z.device)
        return pair_logsumexp(z, everyone, scale=scale, drop=(own.repeat(2), ids.repeat(2)))

    @property
    def _gathers(self) -> bool:
        return self.gather_distributed and _dist.world_size() > 1


class NTXentLoss(_TwoViews, DropIn, _loss.NTXentLoss):
    """NT-Xent, and with a memory bank MoCo's loss: :func:`fastcl.functional.nt_xent` and ``info_nce``."""

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """``(B, D)`` rows of two views; a scalar."""
        if not self.temperature > 0:
            return super().forward(out0, out1)
        if not (self.strict or self.memory_bank.size[0] or self._gathers):
            loss = F.nt_xent(torch.cat([out0, out1]), temperature=self.temperature, normalize=True)
            return as_original(loss, out0, out1)
        unit0, unit1 = self._unit(out0, out1)
        unit1, bank = self.memory_bank(unit1, update=out0.requires_grad)
        if bank is not None:
            loss = F.info_nce(unit0, unit1, bank.T.to(out0.device), temperature=self.temperature)
        else:
            positive = (row_dot(unit0, unit1) / self.temperature).repeat(2)
            loss = -logsigmoid(positive - self._negatives(unit0, unit1)).mean()
        return as_original(loss, out0, out1)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """DCLW's weights of the positives, ``(B,)``: :func:`fastcl.functional.dclw`. Rows of length 1."""
    with torch.no_grad():
        return 2 - len(out0) * (row_dot(out0, out1) / sigma).softmax(0)


class DCLLoss(_TwoViews, DropIn, _loss.DCLLoss):
    """Decoupled contrastive loss: :func:`fastcl.functional.dcl`. A pair alone, which has no negatives, has loss 0."""

    weight_fn: Callable[[Tensor, Tensor], Tensor] | None

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """``(B, D)`` rows of two views; a scalar."""
        if self.strict and len(out0) < 2:
            return super().forward(out0, out1)
        unit0, unit1 = self._unit(out0, out1)
        positive = (row_dot(unit0, unit1) / self.temperature).repeat(2)
        if self.weight_fn:
            positive = positive * torch.cat([self.weight_fn(unit0, unit1), self.weight_fn(unit1, unit0)])
        negatives = self._negatives(unit0, unit1)
        loss = torch.where(negatives == -torch.inf, 0, negatives - positive).mean()
        return as_original(loss, out0, out1)


class DCLWLoss(DCLLoss, DropIn, _loss.DCLWLoss):
    """DCL whose easy positives weigh less: :func:`fastcl.functional.dclw`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        given: Any = self.weight_fn  # a partial of lightly's own function, which makes torch warn at every step
        self.weight_fn = partial(negative_mises_fisher_weights, **given.keywords)


class NegativeCosineSimilarity(DropIn, _loss.NegativeCosineSimilarity):
    """SimSiam's loss of one direction: :func:`fastcl.functional.negative_cosine`. No matrix is saved by it."""

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Rows ``(B, D)``, or any shape and ``dim`` that ``cosine_similarity`` takes; a scalar."""
        if self.strict or x0.ndim != 2 or x0.shape != x1.shape or self.dim not in (1, -1):
            return super().forward(x0, x1)
        return as_original(F.negative_cosine(x0, x1, normalize=True), x0, x1)
