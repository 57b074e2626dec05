"""Losses of given pairs and triplets."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dense import Scalar, distances, reduced, unit
from .labels import _hinge


def siamese(
    a: Tensor,
    b: Tensor,
    similar: Tensor,
    *,
    margin: float,
    distance: str = "euclidean",
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Similar pairs are pulled together, others pushed apart up to a margin."""
    d = _row_distance(unit(a, normalize), unit(b, normalize), distance)
    return reduced(torch.where(similar != 0, d**2, (margin - d).relu() ** 2) / 2, reduction, weights)


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float | None,
    distance: str = "euclidean",
    swap: bool = False,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """The positive is to be nearer than the negative by a margin."""
    a, p, n = (unit(rows, normalize) for rows in (anchor, positive, negative))
    to_positive, to_negative = _row_distance(a, p, distance), _row_distance(a, n, distance)
    if swap:
        to_negative = torch.minimum(to_negative, _row_distance(p, n, distance))
    return reduced(_hinge(to_positive - to_negative, margin), reduction, weights)


def negative_cosine(
    p: Tensor,
    z: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Minus the cosine of a prediction and its target."""
    return reduced(-(unit(p, normalize) * unit(z, normalize)).sum(1), reduction, weights)


def byol(
    p: Tensor,
    z: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """The squared distance of a unit prediction and its unit target, which receives no gradient."""
    p, z = unit(p, normalize), unit(z.detach(), normalize)
    return reduced(2 - 2 * (p * z).sum(1), reduction, weights)


def squared_cosine(
    a: Tensor,
    b: Tensor,
    similar: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Squared cosines, those of similar pairs over the temperature: smallest at right angles, so it trains nothing."""
    squared = (unit(a, normalize) * unit(b, normalize)).sum(1) ** 2
    return reduced((1 - similar) * squared + similar * squared / temperature, reduction, weights)


def _row_distance(a: Tensor, b: Tensor, distance: str) -> Tensor:
    return distances(a.unsqueeze(1), b.unsqueeze(1), distance).flatten()
