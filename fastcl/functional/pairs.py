"""Losses of given pairs and triplets: O(N D) in any case, here in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .._checks import Scalar
from ..pairwise import row_dot
from ._arguments import inverse, operand, reduced, unit


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
    r"""Contrastive loss of a siamese network (Hadsell et al. 2006, doi:10.1109/CVPR.2006.100, eq. 4).

    :math:`L_i = \frac12 d_i^2` where the pair is similar, else :math:`\frac12 \max(0, m - d_i)^2`.

    Args:
        a, b: ``(B, D)``.
        similar: ``(B,)`` integers, 1 (or any but 0) for a similar pair.
        margin: m, in the unit of the distance.
        distance: ``"euclidean"``, ``"squared"`` (Euclidean) or ``"cosine"`` (1 - cosine, of rows of length 1).

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(a=a, b=b)
    _checks.vector("similar", similar, a.shape[0], a, integer=True)
    _checks.scalar("margin", margin)
    d = row_distance(operand(unit(a, normalize)), operand(unit(b, normalize)), distance)
    return reduced(0.5 * torch.where(similar != 0, d, (margin - d).relu()).square(), reduction, weights)


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
    r"""Triplet loss of given triplets (Schroff et al. 2015, arXiv:1503.03832, eq. 2).

    :math:`L_i = \max(0, d(a_i, p_i) - d(a_i, n_i) + m)`.

    Args:
        anchor, positive, negative: ``(B, D)``.
        margin: in the unit of the distance; ``None`` is the soft margin (Hermans et al. 2017, arXiv:1703.07737),
            :math:`\log(1 + e^{d(a, p) - d(a, n)})`.
        distance: as in :func:`siamese`; FaceNet's is ``"squared"``.
        swap: use the distance of positive and negative where it is smaller than that of anchor and negative
            (Balntas et al. 2016, section 3.2).

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(anchor=anchor, positive=positive, negative=negative)
    _checks.flag(swap=swap)
    a, p, n = (operand(unit(rows, normalize)) for rows in (anchor, positive, negative))
    to_negative = row_distance(a, n, distance)
    if swap:
        to_negative = torch.minimum(to_negative, row_distance(p, n, distance))
    return reduced(hinge(row_distance(a, p, distance) - to_negative, margin), reduction, weights)


def negative_cosine(
    p: Tensor,
    z: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Negative cosine similarity, SimSiam's loss of one direction (Chen & He 2021, arXiv:2011.10566, eq. 1).

    :math:`L_i = -\langle p_i, z_i \rangle`. Both receive a gradient: detach the target, as SimSiam does.

    Args:
        p: ``(B, D)`` predictions.
        z: ``(B, D)`` targets.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(p=p, z=z)
    return reduced(-row_dot(unit(p, normalize), unit(z, normalize)), reduction, weights)


def byol(
    p: Tensor,
    z: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""BYOL's loss of one direction (Grill et al. 2020, arXiv:2006.07733, eq. 2).

    :math:`L_i = 2 - 2 \langle p_i, z_i \rangle`, the squared distance of rows of length 1. The targets receive no
    gradient.

    Args:
        p: ``(B, D)`` predictions of the online network.
        z: ``(B, D)`` projections of the target network.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(p=p, z=z)
    return reduced(2 - 2 * row_dot(unit(p, normalize), unit(z.detach(), normalize)), reduction, weights)


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
    r"""A squared-cosine pair loss that some introductions print. **It trains no encoder.**

    :math:`L_i = (1 - y_i) \cos_i^2 + y_i \cos_i^2 / \tau` pushes similar pairs (y = 1) towards a right angle as well,
    only harder. It is here to be compared with; the loss to train with is :func:`siamese`.

    Args:
        a, b: ``(B, D)``.
        similar: y, ``(B,)`` integers 0 or 1.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(a=a, b=b)
    _checks.vector("similar", similar, a.shape[0], a, integer=True)
    scale = inverse(temperature, a)
    squared = row_dot(unit(a, normalize), unit(b, normalize)).square()
    return reduced(torch.where(similar != 0, squared * scale, squared), reduction, weights)


def row_distance(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Distance of row i of ``a`` and row i of ``b``, ``(B,)``; that of equal rows has gradient 0."""
    _checks.choice("distance", distance, _checks.DISTANCES)
    if distance == "cosine":
        return 1 - (a * b).sum(1)
    squared = (a - b).square().sum(1)
    if distance == "squared":
        return squared
    apart = squared != 0  # a NaN is
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def hinge(difference: Tensor, margin: float | None) -> Tensor:
    """max(0, difference + margin), or the soft margin."""
    if margin is None:
        return -logsigmoid(-difference)
    _checks.scalar("margin", margin)
    return (difference + margin).relu()
