"""Losses of several views of one image, stacked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._dense import Scalar, logsumexp, mean, not_self, reduced, unit


def nt_xent(
    z: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: Scalar,
    views: int = 2,
    extra_negatives: Tensor | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Every positive against all negatives: the other views of an image, or the other rows of a label."""
    z = unit(z, normalize)
    batch = len(z) // views
    image = torch.arange(batch, device=z.device).repeat(views) if labels is None else labels
    group = image if ids is None else ids.repeat(views)
    s = (z / temperature) @ z.T
    negative = group[:, None] != group
    n = logsumexp(s, negative)
    if extra_negatives is not None:
        s_extra = (z / temperature) @ unit(extra_negatives, normalize).T
        s_all = torch.cat([s, s_extra], 1)
        n = logsumexp(s_all, torch.cat([negative, torch.ones_like(s_extra, dtype=torch.bool)], 1))
    positive = (image[:, None] == image) & not_self(z)
    loss = mean(-logsigmoid(s - n[:, None]), positive)
    if labels is None:
        return reduced(loss, reduction, weights)
    if reduction == "mean":  # over pairs
        weights = positive.sum(1) * (1 if weights is None else weights)
    return reduced(loss, reduction, weights)


def dcl(
    z: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """NT-Xent whose denominator lacks the positive; a row without negatives is not counted."""
    _, positive, n = _two_views(z, temperature, normalize)
    counted = n > -torch.inf
    return reduced((n - positive).masked_fill(~counted, 0), reduction, weights, counted)


def dclw(
    z: Tensor,
    *,
    temperature: Scalar,
    sigma: float = 0.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """DCL whose positives are weighted by 2 - e^(cos / sigma) over its mean, a constant."""
    z, positive, n = _two_views(z, temperature, normalize)
    weight = (_other_view(z @ z.T).detach() / sigma).exp()
    weight = 2 - weight / weight.mean()
    counted = n > -torch.inf
    return reduced((n - weight * positive).masked_fill(~counted, 0), reduction, weights, counted)


def debiased_nt_xent(
    z: Tensor,
    *,
    temperature: Scalar,
    tau_plus: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """NT-Xent from whose sum over negatives the share of false ones is subtracted."""
    return hard_nt_xent(
        z, temperature=temperature, tau_plus=tau_plus, beta=0.0,
        weights=weights, reduction=reduction, normalize=normalize,
    )  # fmt: skip


def hard_nt_xent(
    z: Tensor,
    *,
    temperature: Scalar,
    tau_plus: float = 0.1,
    beta: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """The debiased loss whose negatives are weighted by e^(beta s) over its mean. Sums of exponentials, as printed."""
    z = unit(z, normalize)
    s = (z / temperature) @ z.T
    image = torch.arange(len(z) // 2, device=z.device).repeat(2)
    negative = image[:, None] != image
    count = len(z) - 2
    positive = _other_view(s)
    if count <= 0:
        return reduced(0 * positive, reduction, weights)
    # all of a row's exponentials are divided by e^top, which changes no quotient
    top = torch.maximum(s.masked_fill(~negative, -torch.inf).amax(1), positive).detach()
    e = torch.where(negative, (s - top[:, None]).exp(), 0)
    w = torch.where(negative, (beta * (s - top[:, None])).exp(), 0)
    total = (w * e).sum(1) / (w.sum(1) / count)
    unbiased = (total - count * tau_plus * (positive - top).exp()) / (1 - tau_plus)
    inverse = torch.as_tensor(1 / temperature, dtype=s.dtype, device=s.device)
    total = torch.maximum(unbiased, count * (-inverse - top).exp())
    return reduced(-logsigmoid(positive - top - total.log()), reduction, weights)


def all_pairs_nt_xent(
    z: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Every row as a positive of every row, itself too. It does not know the pairs: it trains nothing."""
    z = unit(z, normalize)
    s = (z / temperature) @ z.T
    n = logsumexp(s, not_self(z))
    return reduced(-logsigmoid(s - n[:, None]).sum(1) / max(len(z), 1), reduction, weights)


def _two_views(z: Tensor, temperature: Scalar, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    z = unit(z, normalize)
    s = (z / temperature) @ z.T
    image = torch.arange(len(z) // 2, device=z.device).repeat(2)
    return z, _other_view(s), logsumexp(s, image[:, None] != image)


def _other_view(s: Tensor) -> Tensor:
    half = len(s) // 2
    return torch.cat([s.diagonal(half), s.diagonal(-half)]) if half else s.diagonal()
