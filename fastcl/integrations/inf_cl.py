"""Drop-ins for ``inf_cl`` (Inf-CLIP): change ``from inf_cl import`` to ``from fastcl.integrations.inf_cl import``.

The repository is copied, not installed, and its kernels need a GPU; these functions stand alone and run anywhere.
Losses are fp32, as there. What differs: rows may have any width, and ``head_dim``, by which the original cuts them, is
taken and not used; fp32 rows are multiplied as fastcl's settings say, not always as TF32; without a process group
``scale`` has a gradient in all functions, where the original's is an all-reduce that fails; logits may be of any size,
where ``cal_ring_loss`` overflows from 89 on.

On several ranks the keys of all are candidates, as many on each. The original sends them around in a ring, here they
are gathered, ``(W N, D)`` on every rank, and their gradient is reduce-scattered. The original sums the gradient of
``scale`` over ranks, so that after DDP's average it is world_size times too large. Here it is the gradient;
``strict=True`` keeps the original's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .._checks import Scalar, sentence
from ..functional._arguments import multiplier
from ._dropin import gathered, ranks, softmax_rows

UPSTREAM = "inf_cl"
ORIGIN = "see github.com/DAMO-NLP-SG/Inf-CLIP"

__all__ = ["cal_flash_loss", "cal_inf_loss", "cal_ring_loss"]


def cal_flash_loss(
    q: Tensor, k: Tensor, labels: Tensor | None = None, scale: Scalar | None = None, head_dim: int = 256
) -> Tensor:
    r"""Cross-entropy of every row of :math:`\text{scale} \cdot q k^T`, on this process.

    Args:
        q: ``(M, D)``.
        k: ``(N, D)``, N at least M without labels.
        labels: ``(M,)`` integers, the positive of every row among ``k``; row i itself when omitted.
        scale: inverse temperature, 1 when omitted: a number, or a tensor of one element, which receives a gradient, or
            one per row, ``(M, 1)``.
        head_dim: not used.

    Returns:
        ``(M,)`` fp32.

    Raises:
        TypeError, ValueError: rows, labels or a scale that do not fit.
    """
    q, scale = _scaled(q, scale)
    return _losses(q, k, labels, scale).float()


def cal_inf_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: Scalar | None = None,
    head_dim: int = 256,
    *,
    strict: bool = False,
) -> Tensor:
    """The mean over this rank's rows of their cross-entropy against the keys of all ranks.

    Args:
        q: ``(M, D)`` of this rank.
        k: ``(N, D)`` of this rank; N is the same on all.
        labels: ``(M,)`` integers, the positive of every row among this rank's ``k``.
        scale, head_dim: as in :func:`cal_flash_loss`.
        strict: keep the original's gradient of ``scale``, a sum over ranks.

    Returns:
        A scalar, fp32.
    """
    rank, world_size = ranks()
    _checks.flag(strict=strict)
    if strict and world_size > 1 and isinstance(scale, Tensor) and scale.requires_grad:
        scale = scale.view_as(scale)
        scale.register_hook(_summed)
    q, scale = _scaled(q, scale)
    if world_size > 1:
        _checks.rows(q=q, k=k)
        labels = _targets(q, k, labels) + rank * len(k)
        k = gathered(k)
    return _losses(q, k, labels, scale).mean().float()


cal_ring_loss = cal_inf_loss  # in the original the one with kernels, the other without


def _losses(q: Tensor, k: Tensor, labels: Tensor | None, scale: Scalar) -> Tensor:
    _checks.rows(q=q, k=k)
    if labels is not None or len(q) != len(k):
        labels = _targets(q, k, labels)
    return softmax_rows(q, k, labels, scale=scale)


def _targets(q: Tensor, k: Tensor, labels: Tensor | None) -> Tensor:
    if labels is not None:
        _checks.vector("labels", labels, len(q), q, integer=True)
        return labels
    if len(q) > len(k):
        got = f"{len(q)} rows of q and {len(k)} of k"
        raise ValueError(sentence(got, "a row of k for every row of q", "Pass labels, which say which."))
    return torch.arange(len(q), device=q.device)


def _scaled(q: Tensor, scale: Scalar | None) -> tuple[Tensor, Scalar]:
    """Rows and a scale of them all."""
    if scale is None:
        return q, 1.0
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            _checks.rows(q=q)
            _checks.tensor("scale", scale, "of one number, or one per row")
            _checks.vector("scale", scale.squeeze(1) if scale.ndim == 2 else scale, len(q), q)
            if scale.ndim != 2:
                got, mend = f"scale of shape {tuple(scale.shape)}", "Use scale.unsqueeze(1)."
                raise ValueError(sentence(got, f"one number, or shape ({len(q)}, 1)", mend))
            return scale * q, 1.0
        scale = scale.reshape(())
    return q, multiplier("scale", scale, q)


def _summed(grad: Tensor) -> Tensor:
    total = grad.clone()
    dist.all_reduce(total)
    return total
