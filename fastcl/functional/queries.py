"""Losses of rows that look for their partner among candidates: queries and keys, images and texts, users and items."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

from .. import _checks
from .._checks import Scalar, number, sentence
from ..pairwise import (
    contrastive,
    gathered_dot,
    merge_logsumexp,
    pair_logsumexp,
    pair_softplus_sum,
    pair_softplus_total,
    row_dot,
    scale_gradient,
)
from ._arguments import arange, inverse, multiplier, operand, reduced, share, unit


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Scalar,
    extra_negatives: Tensor | None = None,
    own_negatives: Tensor | None = None,
    ids: Tensor | None = None,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    own_hardness: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4); with a queue, MoCo's (arXiv:1911.05722, eq. 1).

    :math:`L_i = -\log \frac{\exp(\langle q_i, k_i \rangle / \tau)}{\exp(\langle q_i, k_i \rangle / \tau) +
    \sum_{n \text{ negative}} \exp(\langle q_i, n \rangle / \tau)}`

    Args:
        q: ``(B, D)`` queries.
        k: ``(B, D)``; ``k[i]`` is the positive of ``q[i]``.
        negatives: ``(K, D)``, used instead of the other rows of ``k``; a queue.
        extra_negatives: ``(H, D)``, used beside them by every query; mined hard negatives.
        own_negatives: ``(B, H, D)``, used beside them by the query of the same row only.
        ids: ``(B,)`` integers; keys with the id of a query are not negatives of it.
        symmetric: average with the loss of keys looking for their queries; for in-batch negatives only.
        label_smoothing: share of the target that is spread over all candidates (Szegedy et al. 2016,
            arXiv:1512.00567, section 7); not together with ``ids``, which make the candidates differ.
        hardness: :math:`\alpha`; :math:`\alpha \cos` without gradient is added to the logit of a negative, so that hard
            ones count more (Lan et al. 2025, arXiv:2503.04812, eq. 5).
        own_hardness: the same for ``own_negatives`` (Schechter Vera et al. 2025, arXiv:2509.20354).

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(q=q, k=k)
    scale = inverse(temperature, q)
    number("label_smoothing", label_smoothing, low=0.0, high=1.0)
    number("hardness", hardness, low=0.0)
    number("own_hardness", own_hardness, low=0.0)
    _checks.flag(symmetric=symmetric)
    shared = {"negatives": negatives, "extra_negatives": extra_negatives}
    _checks.rows(q=q, **{name: block for name, block in shared.items() if block is not None})
    blocks = {**shared, "own_negatives": own_negatives}
    given = [name for name, block in blocks.items() if block is not None]
    if symmetric and given:
        raise ValueError(sentence(f"symmetric=True with {given[0]}", "in-batch negatives alone", "Omit one of them."))
    if label_smoothing and ids is not None:
        raise ValueError(
            sentence("label_smoothing with ids", "one of the two", "Omit one: smoothing spreads over all keys.")
        )
    if negatives is not None and ids is not None:
        raise ValueError(sentence("ids with negatives", "in-batch negatives, which have ids", "Omit one of them."))
    if not (given or ids is not None or label_smoothing or hardness):
        loss = contrastive(q, k, scale=scale, normalize=normalize, both=symmetric)
        if loss is not None:
            return reduced(loss.view(2, -1).mean(0) if symmetric else loss, reduction, weights)
    q, k = unit(q, normalize), unit(k, normalize)
    positive = row_dot(q, k) * scale
    keys = _ids(ids, q)
    in_batch = negatives is None
    columns = k if negatives is None else unit(negatives, normalize)
    found = harder_logsumexp(q, columns, scale, hardness, drop=keys if in_batch else None, both=symmetric)
    n = [found] if not symmetric else list(found)
    if extra_negatives is not None:
        extra_negatives = unit(extra_negatives, normalize)
        n[0] = merge_logsumexp(n[0], harder_logsumexp(q, extra_negatives, scale, hardness))
    own = None
    if own_negatives is not None:
        own = _own_dots(q, own_negatives, normalize)
        n[0] = merge_logsumexp(n[0], _logsumexp(own * scale + own.detach() * own_hardness))
    loss = torch.stack([-logsigmoid(positive - side) for side in n]).mean(0)
    if label_smoothing:
        # the mean logit of all candidates is linear in them: no matrix is needed
        total = _sum_of_dots(q, columns) + (0 if in_batch else positive / scale)
        count = len(columns) + (0 if in_batch else 1)
        if extra_negatives is not None:
            total, count = total + _sum_of_dots(q, extra_negatives), count + len(extra_negatives)
        if own is not None:
            total, count = total + own.sum(1), count + own.shape[1]
        if symmetric:
            total = (total + _sum_of_dots(k, q)) / 2
        loss = loss + label_smoothing * (positive - total * scale / count)
    return reduced(loss, reduction, weights)


def moco_v3(
    q0: Tensor,
    q1: Tensor,
    k0: Tensor,
    k1: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""MoCo v3 (Chen et al. 2021, arXiv:2104.02057, algorithm 1): both views look for the other's key in the batch.

    :math:`L_i = 2 \tau (\ell(q^0_i, k^1) + \ell(q^1_i, k^0))` with InfoNCE :math:`\ell`. Keys receive no gradient.

    Args:
        q0, q1: ``(B, D)`` predictions of the two views.
        k0, k1: ``(B, D)`` their keys by the momentum encoder.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(q0=q0, q1=q1, k0=k0, k1=k1)
    one, other = (
        info_nce(q, k.detach(), temperature=temperature, reduction="none", normalize=normalize)
        for q, k in ((q0, k1), (q1, k0))
    )
    return reduced(2 / inverse(temperature, q0) * (one + other), reduction, weights)


def in_batch_softmax(
    q: Tensor,
    k: Tensor,
    *,
    temperature: Scalar,
    log_q: Tensor,
    ids: Tensor | None = None,
    correct_positive: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""In-batch sampled softmax of two-tower recommenders, with the logQ correction (Yi et al. 2019,
    doi:10.1145/3298689.3346996, eq. 4): popular items are in a batch more often, and are discounted for it.

    InfoNCE over :math:`s_{ij} - \log Q_j`, where Q_j is the probability that item j is in a batch.

    Args:
        q: ``(B, D)`` users.
        k: ``(B, D)`` items; ``k[i]`` was chosen by ``q[i]``.
        log_q: ``(B,)``, log Q of every item; it receives a gradient if it wants one.
        ids: ``(B,)`` integers, the items: keys with the item of a query are not negatives of it.
        correct_positive: ``False`` corrects negatives only, since a positive is there for certain (Khrylchenko et al.
            2025, arXiv:2507.09331).

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(q=q, k=k)
    _checks.vector("log_q", log_q, k.shape[0], k)
    _checks.flag(correct_positive=correct_positive)
    q, k = unit(q, normalize), unit(k, normalize)
    scale = inverse(temperature, q)
    positive = row_dot(q, k) * scale - (log_q if correct_positive else 0)
    n = pair_logsumexp(q, k, scale=scale, col_bias=-log_q, drop=_ids(ids, q))
    return reduced(-logsigmoid(positive - n), reduction, weights)


def gist(
    q: Tensor,
    k: Tensor,
    guide_q: Tensor,
    guide_k: Tensor,
    *,
    temperature: Scalar,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    negatives: Tensor | None = None,
    guide_negatives: Tensor | None = None,
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""GISTEmbed's loss (Solatorio 2024, arXiv:2402.16829, eq. 2): a guide model strikes out false negatives.

    InfoNCE of a query against keys, other queries, and, in the row of its key, other keys; a pair that the guide finds
    more similar than the query and its key, :math:`g_{ij} > g_{ii} - m`, is no negative.

    Args:
        q, k: ``(B, D)``; ``k[i]`` is the positive of ``q[i]``.
        guide_q, guide_k: ``(B, G)``, unit rows of the guide for the same texts; they receive no gradient.
        margin: m, ``"absolute"``; or ``"relative"``: the limit is :math:`g_{ii} - m |g_{ii}|`.
        negatives: ``(K, D)`` hard negatives for every query, with ``guide_negatives`` ``(K, G)``.
        contrast_anchors, contrast_positives: whether queries, and keys, are compared among themselves.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(q=q, k=k)
    _checks.same_rows(guide_q=guide_q, guide_k=guide_k)
    _checks.choice("margin_strategy", margin_strategy, _checks.MARGIN_STRATEGIES)
    number("margin", margin)
    _checks.flag(contrast_anchors=contrast_anchors, contrast_positives=contrast_positives)
    if (negatives is None) != (guide_negatives is None):
        raise ValueError(sentence("negatives without their guide, or the reverse", "both or neither", "Pass both."))
    if negatives is not None and guide_negatives is not None:
        _checks.rows(q=q, negatives=negatives)
        _checks.rows(guide_q=guide_q, guide_negatives=guide_negatives)
    q, k, guide_q, guide_k = (unit(rows, normalize) for rows in (q, k, guide_q, guide_k))
    scale = inverse(temperature, q)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        agreed = row_dot(guide_q, guide_k)
        limit = agreed - margin * (agreed.abs() if margin_strategy == "relative" else 1)
    own: dict[str, Any] = {"scale": scale, "drop": arange(q)}
    n = [pair_logsumexp(q, k, guide=(guide_q, guide_k, limit), **own)]
    if contrast_anchors:
        n.append(pair_logsumexp(q, guide=(guide_q, guide_q, limit), **own))
    if contrast_positives:
        n.append(pair_logsumexp(k, guide=(guide_k, guide_k, limit), **own))
    if negatives is not None and guide_negatives is not None:
        guide = (guide_q, unit(guide_negatives, normalize), limit)
        n.append(pair_logsumexp(q, unit(negatives, normalize), scale=scale, guide=guide))
    return reduced(-logsigmoid(row_dot(q, k) * scale - merge_logsumexp(*n)), reduction, weights)


def sampled_info_nce(
    q: Tensor,
    table: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    temperature: Scalar,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""InfoNCE with negatives drawn for every row, as wav2vec 2.0 does (Baevski et al. 2020, arXiv:2006.11477, eq. 3).

    Time and memory follow the number of samples, O(M K D) and O(M K), not the size of the table.

    Args:
        q: ``(M, D)``.
        table: ``(T, D)``, what indices point into: the frames of an utterance, all items.
        positive: ``(M,)`` integers; ``table[positive[i]]`` is the positive of ``q[i]``.
        negatives: ``(M, K)`` integers; where one is the row's positive, it is forgotten.

    Returns:
        A scalar, or ``(M,)`` for ``reduction="none"``.
    """
    _checks.rows(q=q, table=table)
    _checks.vector("positive", positive, q.shape[0], q, integer=True)
    q, table = unit(q, normalize), unit(table, normalize)
    scale = inverse(temperature, q)
    s = (gathered_dot(q, table, negatives) * scale).masked_fill(negatives == positive[:, None], -torch.inf)
    p = row_dot(q, embedding(positive, table)) * scale
    return reduced(-logsigmoid(p - _logsumexp(s)), reduction, weights)


def n_pair(
    q: Tensor,
    k: Tensor,
    *,
    l2: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""Multi-class N-pair loss (Sohn 2016, eq. 7): one pair of every class; every other pair's key is a negative.

    :math:`L_i = \log(1 + \sum_{j \ne i} \exp(\langle q_i, k_j \rangle - \langle q_i, k_i \rangle)) + \frac{\lambda}{4}
    (|q_i|^2 + |k_i|^2)`: InfoNCE of rows of any length at temperature 1, which are kept short by a penalty.

    Args:
        q, k: ``(B, D)``, of any length; ``k[i]`` is the positive of ``q[i]``, and no two rows of ``q`` share a class.
        l2: :math:`\lambda`.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    number("l2", l2, low=0.0)
    _checks.same_rows(q=q, k=k)
    q, k = unit(q, normalize), unit(k, normalize)
    loss = info_nce(q, k, temperature=1.0, reduction="none")
    if l2:
        loss = loss + l2 / 4 * (row_dot(q, q) + row_dot(k, k))
    return reduced(loss, reduction, weights)


def clip(
    image: Tensor,
    text: Tensor,
    *,
    scale: Scalar,
    text_scale: Scalar | None = None,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""CLIP's loss (Radford et al. 2021, arXiv:2103.00020, fig. 3): InfoNCE from image to text and back, averaged.

    It is also the contrastive part of CoCa's (Yu et al. 2022, arXiv:2205.01917, eq. 5).

    Args:
        image, text: ``(B, D)``; row i of one belongs to row i of the other.
        scale: CLIP's ``logit_scale.exp()``, the inverse temperature.
        text_scale: another scale for the direction from text to image.
        ids: ``(B,)`` integers; pairs with equal ids are not negatives of each other.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``: the mean of the two directions per pair.
    """
    _checks.same_rows(image=image, text=text)
    scale = multiplier("scale", scale, image)
    if text_scale is None and ids is None:
        loss = contrastive(image, text, scale=scale, normalize=normalize, both=True)
        if loss is not None:
            return reduced(loss.view(2, -1).mean(0), reduction, weights)
    image, text = unit(image, normalize), unit(text, normalize)
    cosine, drop = row_dot(image, text), _ids(ids, image)
    if text_scale is None:
        text_scale = scale
        to_text, to_image = pair_logsumexp(image, text, scale=scale, drop=drop, both=True)
    else:
        text_scale = multiplier("text_scale", text_scale, text)
        to_text = pair_logsumexp(image, text, scale=scale, drop=drop)
        to_image = pair_logsumexp(text, image, scale=text_scale, drop=drop)
    from_image, from_text = logsigmoid(cosine * scale - to_text), logsigmoid(cosine * text_scale - to_image)
    return reduced(-0.5 * (from_image + from_text), reduction, weights)


def siglip(
    image: Tensor,
    text: Tensor,
    *,
    scale: Scalar,
    bias: Scalar,
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    r"""SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343, eq. 1): every pair is a binary problem of its own.

    :math:`L_i = -\log \sigma(s_{ii}) - \sum_{j \ne i} \log \sigma(-s_{ij})` with
    :math:`s_{ij} = \text{scale} \langle x_i, y_j \rangle + \text{bias}`.

    Args:
        image, text: ``(B, D)``; row i of one belongs to row i of the other.
        scale: inverse temperature (the paper starts at 10).
        bias: added to every logit (the paper starts at -10).
        ids: ``(B,)`` integers; pairs with equal ids are not negatives of each other.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``: the sum over the texts of each image.
    """
    _checks.same_rows(image=image, text=text)
    scale, bias = multiplier("scale", scale, image), multiplier("bias", bias, image)
    image, text = unit(image, normalize), unit(text, normalize)
    positive = logsigmoid(row_dot(image, text) * scale + bias)
    negatives: dict[str, Any] = {"scale": scale, "row_bias": bias, "drop": _ids(ids, image)}
    if reduction not in ("mean", "sum") or weights is not None:
        return reduced(pair_softplus_sum(image, text, **negatives) - positive, reduction, weights)
    return share(pair_softplus_total(image, text, **negatives) - positive.sum(), len(image), reduction)


def _ids(ids: Tensor | None, rows: Tensor) -> Tensor:
    """Keys by which pairs are dropped: the row's number, or what the user knows better."""
    if ids is None:
        return arange(rows)
    _checks.vector("ids", ids, rows.shape[0], rows, integer=True)
    return ids


def harder_logsumexp(q: Tensor, k: Tensor, scale: Scalar, hardness: float, **options: Any) -> Any:
    """Log-sum-exp of scale * cos + hardness * cos, the second part without gradient."""
    if hardness:
        # With a scale of scale + hardness every gradient of q and k is too large by a factor that is known.
        share = scale / (scale + hardness)
        q, k = scale_gradient(q, share), scale_gradient(k, share)
    return pair_logsumexp(q, k, scale=scale + hardness, **options)


def _own_dots(q: Tensor, own: Tensor, normalize: bool) -> Tensor:
    """Inner products of every query with its own negatives, ``(B, H)``."""
    if not isinstance(own, Tensor) or own.ndim != 3 or own.shape[0] != q.shape[0]:
        got = f"of shape {tuple(own.shape)}" if isinstance(own, Tensor) else f"of type {type(own).__name__}"
        expected = f"shape ({q.shape[0]}, H, {q.shape[1]})"
        raise ValueError(sentence(f"own_negatives {got}", expected, "Give every query a group of its own."))
    table = unit(own.flatten(0, 1), normalize)
    return gathered_dot(q, table, torch.arange(table.shape[0], device=q.device).view(own.shape[:2]))


def _sum_of_dots(q: Tensor, k: Tensor) -> Tensor:
    """Sum of the inner products of every row with all rows of ``k``, ``(M,)``."""
    return (operand(q) * operand(k).sum(0)).sum(1)


def _logsumexp(s: Tensor) -> Tensor:
    """Of given logits ``(M, K)``; a row of -inf alone, or of nothing, stays -inf and sends no gradient."""
    if not s.shape[1]:
        return s.sum(1) - torch.inf
    empty = (s == -torch.inf).all(1)
    return torch.where(empty, -torch.inf, s.masked_fill(empty[:, None], 0).logsumexp(1))
