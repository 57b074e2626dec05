"""Losses of several views of one image, stacked: ``[view0; view1]``, row i and row i + B show image i."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .._checks import Scalar, number, sentence
from ..pairwise import contrastive, joined, merge_logsumexp, pair_logsumexp, pair_softplus_sum, row_dot
from ._arguments import arange, inverse, log_of, reduced, unit
from .labels import positive_pairs


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
    r"""NT-Xent, SimCLR's loss (Chen et al. 2020, arXiv:2002.05709, eq. 1), for two views, more views, or labels.

    :math:`L_{ip} = -\log \frac{\exp(\langle z_i, z_p \rangle / \tau)}
    {\exp(\langle z_i, z_p \rangle / \tau) + \sum_{j \text{ negative}} \exp(\langle z_i, z_j \rangle / \tau)}`
    for every positive p of row i; the value of a row is the mean over its positives. Negatives are the views of other
    images, or the rows of other labels.

    Args:
        z: ``(V B, D)``, V views of each image, stacked.
        labels: ``(N,)`` integers; positives are then the other rows with the label of row i, whatever the views. The
            mean is over positive pairs, and a row without a positive has none.
        views: V.
        extra_negatives: ``(K, D)``, used beside the batch; a memory bank.
        ids: ``(B,)`` integers; images with equal ids are not negatives of each other.

    Returns:
        A scalar, or ``(V B,)`` for ``reduction="none"``.
    """
    if labels is None:
        _checks.stacked(z, views)
        if views == 2 and extra_negatives is None and ids is None:
            loss = contrastive(z, scale=inverse(temperature, z), normalize=normalize)
            if loss is not None:
                return reduced(loss, reduction, weights)
    else:
        _checks.labelled(z, labels)
        _checks.count("views", views)
        if ids is not None:
            raise ValueError(
                sentence("ids beside labels", "one of the two", "Omit ids: rows of one label are never negatives.")
            )
    if extra_negatives is not None:
        _checks.rows(z=z, extra_negatives=extra_negatives)
    z = unit(z, normalize)
    scale = inverse(temperature, z)
    batch = z.shape[0] // views
    if labels is not None:
        image = labels
    elif ids is not None:
        _checks.vector("ids", ids, batch, z, integer=True)
        image = ids.repeat(views)
    else:
        image = arange(z) % max(batch, 1)
    n = pair_logsumexp(z, scale=scale, drop=image)
    if extra_negatives is not None:
        n = merge_logsumexp(n, pair_logsumexp(z, unit(extra_negatives, normalize), scale=scale))
    if labels is not None:
        loss, count = positive_pairs(z, labels, n, scale)
        if weights is not None:
            _checks.vector("weights", weights, len(loss), loss)
        if reduction == "mean":  # over pairs
            weights = count.to(loss.dtype) if weights is None else weights * count
        return reduced(loss, reduction, weights)
    # a view's other views stand whole batches away, so its few positives cost no pass over all pairs
    terms = [-logsigmoid(row_dot(z, _later(z, shift * batch)) * scale - n) for shift in range(1, views)]
    return reduced(torch.stack(terms).mean(0), reduction, weights)


def dcl(
    z: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, eq. 6): NT-Xent without its positive in the sum.

    :math:`L_i = -\langle z_i, z_{i'} \rangle / \tau + \log \sum_{j \ne i, i'} \exp(\langle z_i, z_j \rangle / \tau)`.
    A row with no negatives contributes 0 and is not counted.

    Args:
        z: ``(2B, D)``, two views of each image, stacked.

    Returns:
        A scalar, or ``(2B,)`` for ``reduction="none"``.
    """
    positive, negatives, _ = _two_views(z, temperature, normalize)
    counted = negatives != -torch.inf
    return reduced(torch.where(counted, negatives - positive, 0), reduction, weights, counted=counted)


def dclw(
    z: Tensor,
    *,
    temperature: Scalar,
    sigma: float = 0.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Weighted decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, section 3.3): easy positives weigh less.

    :math:`L_i = -w_i \langle z_i, z_{i'} \rangle / \tau + \log \sum_{j \ne i, i'} \exp(\langle z_i, z_j \rangle /
    \tau)` with :math:`w_i = 2 - \exp(\langle z_i, z_{i'} \rangle / \sigma) / \mathrm{mean}_b
    \exp(\langle z_b, z_{b'} \rangle / \sigma)`, whose mean is 1. The weights receive no gradient. A row with no
    negatives is not counted.

    Args:
        z: ``(2B, D)``, two views of each image, stacked.
        sigma: above 0.

    Returns:
        A scalar, or ``(2B,)`` for ``reduction="none"``.
    """
    number("sigma", sigma, low=math.ulp(0.0))
    positive, negatives, cosine = _two_views(z, temperature, normalize)
    half = cosine.detach()[: cosine.shape[0] // 2] / sigma
    w = (2 - half.shape[0] * half.softmax(0)).repeat(2)
    counted = negatives != -torch.inf
    return reduced(torch.where(counted, negatives - w * positive, 0), reduction, weights, counted=counted)


def debiased_nt_xent(
    z: Tensor,
    *,
    temperature: Scalar,
    tau_plus: float = 0.1,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Debiased contrastive loss (Chuang et al. 2020, arXiv:2007.00224, eq. 8): false negatives are subtracted.

    NT-Xent whose sum over the N negatives becomes :math:`\max\left( \frac{\sum_j e^{s_{ij}} - N \tau^+ e^{s_{ii'}}}
    {1 - \tau^+},\; N e^{-1/\tau} \right)`. A row with no negatives has loss 0.

    Args:
        z: ``(2B, D)``, two views of each image, stacked.
        tau_plus: probability that a negative is a positive, in [0, 1).

    Returns:
        A scalar, or ``(2B,)`` for ``reduction="none"``.
    """
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
    r"""Contrastive loss with hard negatives (Robinson et al. 2021, arXiv:2010.04592, eq. 4): near ones count more.

    The debiased loss, whose sum over negatives is weighted: :math:`N \sum_j e^{(1 + \beta) s_{ij}} / \sum_j e^{\beta
    s_{ij}}` stands for :math:`\sum_j e^{s_{ij}}`: two log-sum-exps, at two temperatures. ``beta = 0`` is the debiased
    loss.

    Args:
        z: ``(2B, D)``, two views of each image, stacked.
        tau_plus: probability that a negative is a positive, in [0, 1).
        beta: concentration on hard negatives, at least 0.

    Returns:
        A scalar, or ``(2B,)`` for ``reduction="none"``.
    """
    number("tau_plus", tau_plus, low=0.0, high=1.0 - 2**-24)
    number("beta", beta, low=0.0)
    _checks.stacked(z)
    z = unit(z, normalize)
    batch = z.shape[0] // 2
    scale = inverse(temperature, z)
    positive = row_dot(z, _later(z, batch)) * scale
    image, log_count = arange(z) % max(batch, 1), log_of(max(2 * batch - 2, 1), positive)
    n = pair_logsumexp(z, scale=(1 + beta) * scale, drop=image)
    if beta:
        n = n - pair_logsumexp(z, scale=beta * scale, drop=image) + log_count
    if batch < 2:  # no negatives
        return reduced(0 * positive, reduction, weights)
    if tau_plus:
        # log( (e^n - N tau+ e^p) / (1 - tau+) ), where that is positive; the clamp only keeps the rest finite
        false_share = positive - n + math.log(tau_plus) + log_count
        kept = torch.log(-torch.expm1(false_share.clamp(max=-torch.finfo(n.dtype).eps)))
        n = torch.where(false_share < 0, n + kept - math.log1p(-tau_plus), -torch.inf)
    n = torch.maximum(n, torch.as_tensor(log_count - scale, dtype=n.dtype, device=n.device))
    return reduced(-logsigmoid(positive - n), reduction, weights)


def all_pairs_nt_xent(
    z: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""The average of NT-Xent over *all* pairs, as some introductions print SimCLR's loss. **It trains no encoder.**

    :math:`L = -\frac{1}{N^2} \sum_i \sum_j \log \frac{e^{s_{ij}}}{e^{s_{ij}} + \sum_{k \ne i} e^{s_{ik}}}` treats every
    row as a positive of every other, so it does not know which belong together: any order of the rows gives the same
    value. Where rows outnumber dimensions it is smallest, by a fraction of a percent, where all embeddings are nearly
    equal. It is here to be compared with; the loss to train with is :func:`nt_xent`.

    Args:
        z: ``(N, D)``.

    Returns:
        A scalar, or ``(N,)`` for ``reduction="none"``: the mean over j of each row.
    """
    _checks.rows(z=z)
    z = unit(z, normalize)
    scale = inverse(temperature, z)
    n = pair_logsumexp(z, scale=scale, drop=arange(z))
    loss = pair_softplus_sum(z, scale=-scale, row_bias=n) / max(z.shape[0], 1)
    return reduced(loss, reduction, weights)


def _two_views(z: Tensor, temperature: Scalar, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Positive logit, log-sum-exp of the negatives (views of other images), and cosine of the positive: ``(2B,)``."""
    _checks.stacked(z)
    z = unit(z, normalize)
    batch = z.shape[0] // 2
    scale = inverse(temperature, z)
    cosine = row_dot(z, _later(z, batch))
    return cosine * scale, pair_logsumexp(z, scale=scale, drop=arange(z) % max(batch, 1)), cosine


def _later(z: Tensor, rows: int) -> Tensor:
    """The row that stands so many rows after each, as if the last were followed by the first."""
    return joined(z[rows:], z[:rows])
