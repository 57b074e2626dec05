"""Losses whose positives share a label, and losses against one vector per class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ._dense import Scalar, distances, logsumexp, mean, not_self, reduced, unit


def supcon(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: Scalar,
    form: str = "out",
    anchors: int | None = None,
    base_temperature: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Mean over the positives of a row of their log-softmax, or the logarithm of the mean; others are not counted."""
    z = unit(z, normalize)
    rows = slice(anchors)
    s = (z[rows] / temperature) @ z.T
    other = not_self(z)[rows]
    positive = (labels[rows, None] == labels) & other
    count = positive.sum(1)
    if form == "in":
        p = torch.where(count > 0, logsumexp(s, positive), 0)
        loss = count.clamp(min=1).to(p.dtype).log() - logsigmoid(p - logsumexp(s, other & ~positive))
    else:
        p = mean(s, positive)
        # lse - p and -log sigmoid(p - n) are the same number; with one positive the second keeps its digits
        alone = -logsigmoid(p - logsumexp(s, other & ~positive))
        loss = torch.where(count == 1, alone, logsumexp(s, other) - p)
    if base_temperature is not None:
        loss = loss * (temperature / base_temperature)
    return reduced(loss.masked_fill(count == 0, 0), reduction, weights, count > 0)


def sincere(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Mean over the positives of a row, each against the rows of other labels alone."""
    z = unit(z, normalize)
    s = (z / temperature) @ z.T
    same = labels[:, None] == labels
    positive = same & not_self(z)
    loss = mean(-logsigmoid(s - logsumexp(s, ~same)[:, None]), positive)
    return reduced(loss, reduction, weights, positive.any(1))


def multi_similarity(
    z: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """A soft maximum over the positives that are too far, and one over the negatives that are too near."""
    z = unit(z, normalize)
    s = z @ z.T
    negative = labels[:, None] != labels
    positive = ~negative & not_self(z)
    if epsilon is not None and len(z):
        least = s.detach().masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        most = s.detach().masked_fill(~negative, -torch.inf).amax(1, keepdim=True)
        positive, negative = positive & (s <= most + epsilon), negative & (s >= least - epsilon)
    p, n = logsumexp(-alpha * (s - base), positive), logsumexp(beta * (s - base), negative)
    return reduced(-logsigmoid(-p) / alpha - logsigmoid(-n) / beta, reduction, weights)


def triplet_all(
    z: Tensor,
    labels: Tensor,
    *,
    margin: float,
    distance: str = "euclidean",
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Every triplet of the batch, (N, N, N) of them."""
    z = unit(z, normalize)
    d = distances(z, z, distance)
    negative = labels[:, None] != labels
    positive = ~negative & not_self(z)
    hinges = (d[:, :, None] - d[:, None] + margin).relu() * (positive[:, :, None] & negative[:, None])
    if reduction == "none":
        return hinges.sum((1, 2))
    return hinges.sum() / ((hinges > 0).sum().clamp(min=1) if reduction == "mean" else 1)


def triplet_hard(
    z: Tensor,
    labels: Tensor,
    *,
    margin: float | None,
    distance: str = "euclidean",
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """The furthest positive and the nearest negative of every row."""
    z = unit(z, normalize)
    d = distances(z, z, distance)
    negative = labels[:, None] != labels
    positive = ~negative & not_self(z)
    counted = positive.any(1) & negative.any(1)
    if not len(z):
        return reduced(d.sum(1), reduction, weights)
    furthest = d.masked_fill(~positive, -torch.inf).amax(1)
    nearest = d.masked_fill(~negative, torch.inf).amin(1)
    loss = torch.where(counted, _hinge(torch.where(counted, furthest - nearest, 0), margin), 0)
    return reduced(loss, reduction, weights, counted)


def triplet_semi_hard(
    z: Tensor,
    labels: Tensor,
    *,
    margin: float | None,
    distance: str = "euclidean",
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Per positive pair the nearest negative that is no nearer than the positive, or the furthest negative."""
    z = unit(z, normalize)
    d = distances(z, z, distance)
    negative = labels[:, None] != labels
    anchor, positive = (~negative & not_self(z)).nonzero(as_tuple=True)
    if not len(anchor):
        return reduced(0 * d.sum(1), reduction)
    to_positive, negative = d[anchor, positive], negative[anchor]
    beyond = negative & (d[anchor] >= to_positive[:, None])
    nearest = d[anchor].masked_fill(~beyond, torch.inf).amin(1)
    furthest = d[anchor].masked_fill(~negative, -torch.inf).amax(1)
    counted = negative.any(1)
    difference = to_positive - torch.where(beyond.any(1), nearest, furthest)
    loss = torch.where(counted, _hinge(torch.where(counted, difference, 0), margin), 0)
    if reduction == "mean":
        return reduced(loss, reduction, counted=counted)
    return reduced(d.new_zeros(len(z)).index_add(0, anchor, loss), reduction)


def cosface(
    z: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    scale: Scalar = 64.0,
    margin: float = 0.35,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Cross-entropy of cosines with one proxy per class, that of the own class less a margin."""
    s = unit(z, normalize) @ unit(proxies, normalize).T
    own = labels[:, None] == torch.arange(len(proxies), device=z.device)
    positive = torch.where(own, s, 0).sum(1) - margin
    return reduced(-logsigmoid(scale * positive - logsumexp(scale * s, ~own)), reduction, weights)


def _hinge(difference: Tensor, margin: float | None) -> Tensor:
    return softplus(difference, threshold=1e9) if margin is None else (difference + margin).relu()
