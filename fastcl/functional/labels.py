"""Losses whose positives share a label, and losses against one vector per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from .. import _checks
from .._checks import Scalar, number
from ..pairwise import pair_argmax, pair_logsumexp, pair_softplus_sum, pair_topk, row_dot
from ..triples import batch_all, class_runs, class_sums, positive_indices, semi_hard
from ._arguments import arange, inverse, multiplier, operand, reduced, unit
from .pairs import hinge, row_distance

# Positives per row. By benchmarks.family, 2,048 rows of 128 features with 204 positives each took 5,055 ms by pairs,
# which grows with their number, and 778 ms the other way: even near 32.
_FEW_PAIRS = 32


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
    r"""Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362), :math:`L^{sup}_{out}` (eq. 2) or ``in`` (3).

    out: :math:`L_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} \log \frac{\exp(\langle z_i, z_p \rangle / \tau)}
    {\sum_{j \ne i} \exp(\langle z_i, z_j \rangle / \tau)}` where P(i) are the other rows with the label of row i;
    in: the mean over P(i) stands inside the logarithm. A row without a positive contributes 0 and is not counted.

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers.
        form: ``"out"``, which the paper recommends, or ``"in"``.
        anchors: only the first so many rows are anchors (``contrast_mode="one"``: the first view of each image).
        base_temperature: multiplies the loss by temperature / base_temperature, as the paper's code does.

    Returns:
        A scalar, or ``(N,)``, with ``anchors`` ``(anchors,)``, for ``reduction="none"``.
    """
    _checks.choice("form", form, _checks.FORMS)
    _checks.labelled(z, labels)
    if anchors is not None:
        _checks.count("anchors", anchors, least=0, most=len(z), mend="Omit it for all rows.")
    z = unit(z, normalize)
    scale = inverse(temperature, z)

    def of_anchors(of_rows: Tensor) -> Tensor:
        return of_rows if anchors is None else of_rows.narrow(0, 0, anchors)

    q, k = of_anchors(z), None if anchors is None else z

    def keys(of_rows: Tensor) -> Any:
        return of_rows if k is None else (of_anchors(of_rows), of_rows)

    order, start, end = class_runs(labels)
    count, first = end - start, order[start]
    positives = of_anchors(count - 1)
    counted = positives > 0
    if form == "in":
        p = pair_logsumexp(q, k, scale=scale, only=keys(labels), drop=keys(arange(z)))
        n = pair_logsumexp(q, k, scale=scale, drop=keys(labels))
        loss = positives.clamp(min=1).to(p.dtype).log() - logsigmoid(torch.where(counted, p, 0) - n)
    else:
        # The mean over positives of a linear function is a function of the class sum: no matrix is needed.
        rows = operand(z)
        p = (of_anchors(rows) * of_anchors(class_sums(rows, labels))).sum(1) * scale / positives.clamp(min=1)
        # A row with one positive takes the accurate form, whose negatives do not contain that positive.
        lone = count == 2
        n = pair_logsumexp(q, k, scale=scale, drop=keys(torch.where(lone, first, arange(z))))
        loss = torch.where(of_anchors(lone), -logsigmoid(p - n), n - p)
    if base_temperature is not None:
        _checks.scalar("base_temperature", base_temperature, positive=True)
        loss = loss / (scale * base_temperature)
    return reduced(torch.where(counted, loss, 0), reduction, weights, counted=counted)


def sincere(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""SINCERE (Feeney & Hughes 2023, arXiv:2309.14277, eq. 6): SupCon whose other positives leave the denominator.

    :math:`L_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} \log \frac{\exp(\langle z_i, z_p \rangle / \tau)}
    {\exp(\langle z_i, z_p \rangle / \tau) + \sum_{j: y_j \ne y_i} \exp(\langle z_i, z_j \rangle / \tau)}`. A row
    without a positive contributes 0 and is not counted. (The mean over all *pairs* is ``nt_xent`` with labels.)

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers.

    Returns:
        A scalar, or ``(N,)`` for ``reduction="none"``.
    """
    _checks.labelled(z, labels)
    z = unit(z, normalize)
    scale = inverse(temperature, z)
    loss, count = positive_pairs(z, labels, pair_logsumexp(z, scale=scale, drop=labels), scale)
    return reduced(loss, reduction, weights, counted=count > 0)


def positive_pairs(z: Tensor, labels: Tensor, negatives: Tensor, scale: Scalar) -> tuple[Tensor, Tensor]:
    """Mean of -log sigmoid(p - n) over the positives of a row, and their number, both ``(N,)``: no pair is listed."""
    total = pair_softplus_sum(z, scale=-scale, row_bias=negatives, drop=arange(z), only=labels)
    _, start, end = class_runs(labels)
    count = end - start - 1
    return total / count.clamp(min=1), count


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
    r"""Multi-similarity loss (Wang et al. 2019, arXiv:1904.06627, eq. 15), with or without its mining (eq. 12, 13).

    :math:`L_i = \frac{1}{\alpha} \log\left(1 + \sum_{p \in P(i)} e^{-\alpha (\langle z_i, z_p \rangle - \lambda)}
    \right) + \frac{1}{\beta} \log\left(1 + \sum_{n \in N(i)} e^{\beta (\langle z_i, z_n \rangle - \lambda)}\right)`

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers; P(i) are the other rows of the label of row i, N(i) the rows of other labels.
        alpha, beta: above 0.
        base: :math:`\lambda`.
        epsilon: mining: negatives count that are more similar than the least similar positive less epsilon, positives
            that are less similar than the most similar negative plus epsilon; ``None`` counts all.

    Returns:
        A scalar, or ``(N,)`` for ``reduction="none"``.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        _checks.scalar(name, value, positive=True)
    _checks.scalar("base", base)
    _checks.labelled(z, labels)
    z = unit(z, normalize)
    others = arange(z)
    near_enough = far_enough = None
    if epsilon is not None:
        _checks.scalar("epsilon", epsilon)
        least_similar, _ = pair_topk(z, topk=1, only=labels, drop=others, largest=False)
        most_similar, _ = pair_topk(z, topk=1, drop=labels)
        far_enough = (z, z, most_similar.squeeze(1) + epsilon)
        near_enough = (-z, z, epsilon - least_similar.squeeze(1))  # -s > -floor: a floor is a ceiling of the opposite
    p = pair_logsumexp(z, scale=-alpha, row_bias=alpha * base, only=labels, drop=others, guide=far_enough)
    n = pair_logsumexp(z, scale=beta, row_bias=-beta * base, drop=labels, guide=near_enough)
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
    r"""Batch-all triplet loss (Hermans et al. 2017, arXiv:1703.07737, eq. 6): every triplet of the batch.

    :math:`\max(0, d(a, p) - d(a, n) + m)` for every anchor a, positive p (same label) and negative n (another label);
    ``"mean"`` is over the triplets above 0. There are O(N^3) triplets: a row's positives are sorted once, and every
    negative then finds its share by bisection, so time is O(N^2 (D + log N)) and memory O(N D). Distances are in fp64.

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers.
        margin: m, in the unit of the distance.
        distance: ``"euclidean"``, ``"squared"`` (Euclidean) or ``"cosine"`` (1 - cosine, of rows of length 1).

    Returns:
        A scalar, or for ``reduction="none"`` the sums over the triplets of each anchor, ``(N,)``.
    """
    _checks.labelled(z, labels)
    _checks.scalar("margin", margin)
    return _of_sums(batch_all(operand(unit(z, normalize)), labels, margin, distance), reduction)


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
    r"""Batch-hard triplet loss (Hermans et al. 2017, arXiv:1703.07737, eq. 5): per anchor the furthest positive and the
    nearest negative.

    A row without a positive or without a negative contributes 0 and is not counted.

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers.
        margin: in the unit of the distance; ``None`` is the soft margin, :math:`\log(1 + e^{d(a, p) - d(a, n)})`.
        distance: as in :func:`triplet_all`.

    Returns:
        A scalar, or ``(N,)`` for ``reduction="none"``.
    """
    _checks.labelled(z, labels)
    z = operand(unit(z, normalize))
    nearness = _nearness(z, distance)
    positive = pair_argmax(z, **nearness, only=labels, drop=arange(z), largest=False)
    negative = pair_argmax(z, **nearness, drop=labels)
    counted = (positive >= 0) & (negative >= 0)
    to_positive, to_negative = (row_distance(z, _rows(z, i), distance) for i in (positive, negative))
    loss = torch.where(counted, hinge(to_positive - to_negative, margin), 0)
    return reduced(loss, reduction, weights, counted=counted)


def triplet_semi_hard(
    z: Tensor,
    labels: Tensor,
    *,
    margin: float | None,
    distance: str = "euclidean",
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Semi-hard triplet loss (Schroff et al. 2015, FaceNet, arXiv:1503.03832, section 3.2).

    For every pair of an anchor and a positive, the nearest negative that is no nearer than the positive; where there is
    none, the furthest negative. The mean is over the pairs whose anchor has a negative.

    With few positive pairs, P, each looks for its negative among all rows, in O(P N D) time and O(P D) memory. With
    many a row's positives are sorted and its negatives placed among them, in fp64: O(N^2 (D + log N)) time and O(N D)
    memory. P is read from the device.

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers.
        margin: in the unit of the distance; ``None`` is the soft margin.
        distance: as in :func:`triplet_all`.

    Returns:
        A scalar, or for ``reduction="none"`` the sums over the positives of each anchor, ``(N,)``.
    """
    _checks.labelled(z, labels)
    z = operand(unit(z, normalize))
    _, start, end = class_runs(labels)
    few = 0 < int((end - start - 1).sum()) <= _FEW_PAIRS * len(z)
    return _of_sums((_semi_hard_of_pairs if few else semi_hard)(z, labels, margin, distance), reduction)


def _semi_hard_of_pairs(z: Tensor, labels: Tensor, margin: float | None, distance: str) -> tuple[Tensor, Tensor]:
    """What :func:`fastcl.triples.semi_hard` gives, from a list of all positive pairs."""
    nearness = _nearness(z, distance)
    anchor, positive = positive_indices(labels)
    a, p = _rows(z, anchor), _rows(z, positive)
    bias = nearness.get("col_bias")
    ceiling = row_dot(a.detach(), p.detach()) + (0 if bias is None else bias[positive])
    beyond = pair_argmax(a.detach(), z, **nearness, drop=(labels[anchor], labels), ceiling=ceiling)
    furthest = pair_argmax(z, **nearness, drop=labels, largest=False)[anchor]
    negative = torch.where(beyond >= 0, beyond, furthest)
    counted = negative >= 0
    difference = row_distance(a, p, distance) - row_distance(a, _rows(z, negative), distance)
    loss = torch.where(counted, hinge(difference, margin), 0)
    per_anchor = torch.bincount(anchor, minlength=len(z))
    return torch.segment_reduce(loss, "sum", lengths=per_anchor, initial=0), counted.sum()


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
    r"""CosFace (Wang et al. 2018, arXiv:1801.09414, eq. 4): a softmax over one proxy per class, with a margin.

    :math:`L_i = -\log \frac{e^{s (\cos_{i y_i} - m)}}{e^{s (\cos_{i y_i} - m)} + \sum_{c \ne y_i} e^{s \cos_{i c}}}`;
    with ``margin=0`` the normalised softmax (Wang et al. 2017, arXiv:1704.06369).

    Args:
        z: ``(N, D)``.
        proxies: ``(C, D)``, one row per class.
        labels: ``(N,)`` integers in [0, C), which is not checked on the device.
        scale: s, a number or a 0-d tensor, which receives a gradient.
        margin: m, taken from the cosine of the own class.

    Returns:
        A scalar, or ``(N,)`` for ``reduction="none"``.
    """
    _checks.rows(z=z, proxies=proxies)
    _checks.vector("labels", labels, z.shape[0], z, integer=True)
    number("margin", margin)
    z, proxies = unit(z, normalize), unit(proxies, normalize)
    scale = multiplier("scale", scale, z)
    positive = (row_dot(z, _rows(proxies, labels)) - margin) * scale
    n = pair_logsumexp(z, proxies, scale=scale, drop=(labels, arange(proxies)))
    return reduced(-logsigmoid(positive - n), reduction, weights)


def _of_sums(sums_and_count: tuple[Tensor, Tensor], reduction: str) -> Tensor:
    """Reduction of the sums of every anchor, whose mean is over as many triplets as are counted."""
    sums, count = sums_and_count
    total = reduced(sums, "sum" if reduction == "mean" else reduction)
    return total / count.clamp(min=1) if reduction == "mean" else total


def _nearness(z: Tensor, distance: str) -> dict[str, Tensor]:
    """What makes the most similar row the nearest: |a - b|^2 = |a|^2 - 2 (<a, b> - |b|^2 / 2)."""
    _checks.choice("distance", distance, _checks.DISTANCES)
    return {} if distance == "cosine" else {"col_bias": -0.5 * z.detach().square().sum(1)}


def _rows(z: Tensor, index: Tensor) -> Tensor:
    """Rows by index, of which -1 means any; their gradient is summed in one order, unlike that of ``z[index]``."""
    return embedding(index.clamp(min=0), z)
