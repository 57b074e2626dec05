"""Losses of rows that look for their partner among candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._dense import Scalar, logsumexp, not_self, reduced, unit


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
    """``k[i]`` is the positive of ``q[i]``; negatives: the rest of ``k`` or ``negatives``, and extra and own ones."""
    q, k = unit(q, normalize), unit(k, normalize)
    s = q @ k.T
    positive = s.diagonal() / temperature
    keep = not_self(q) if ids is None else ids[:, None] != ids
    if negatives is not None:
        s = q @ unit(negatives, normalize).T
        keep = torch.ones_like(s, dtype=torch.bool)
    if extra_negatives is not None:
        s = torch.cat([s, q @ unit(extra_negatives, normalize).T], 1)
        keep = torch.cat([keep, keep.new_ones(len(q), len(extra_negatives))], 1)
    logits = s / temperature + hardness * s.detach()
    if own_negatives is not None:
        own = torch.einsum("bd,bhd->bh", q, unit(own_negatives, normalize))
        s = torch.cat([s, own], 1)
        logits = torch.cat([logits, own / temperature + own_hardness * own.detach()], 1)
        keep = torch.cat([keep, torch.ones_like(own, dtype=torch.bool)], 1)
    loss = -logsigmoid(positive - logsumexp(logits, keep))
    if symmetric:
        loss = (loss - logsigmoid(positive - logsumexp(logits.T, keep.T))) / 2
    if label_smoothing:
        candidates = s if negatives is None else torch.cat([positive[:, None] * temperature, s], 1)
        average = candidates.mean(1)
        if symmetric:
            average = (average + s.mean(0)) / 2
        loss = loss + label_smoothing * (positive - average / temperature)
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
    """InfoNCE of both views against the keys of the other, times 2 tau; keys are constants."""
    one = info_nce(q0, k1.detach(), temperature=temperature, reduction="none", normalize=normalize)
    other = info_nce(q1, k0.detach(), temperature=temperature, reduction="none", normalize=normalize)
    return reduced(2 * temperature * (one + other), reduction, weights)


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
    """Cross-entropy over the batch's items, each discounted by how often it is in a batch."""
    s = (unit(q, normalize) / temperature) @ unit(k, normalize).T
    keep = not_self(q) if ids is None else ids[:, None] != ids
    positive = s.diagonal() - (log_q if correct_positive else 0)
    return reduced(-logsigmoid(positive - logsumexp(s - log_q, keep)), reduction, weights)


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
    """Cross-entropy over keys, queries and keys of the own key that the guide does not take for positives."""
    q, k, guide_q, guide_k = (unit(rows, normalize) for rows in (q, k, guide_q, guide_k))
    agreed = (guide_q * guide_k).sum(1).detach()
    limit = agreed - margin * (agreed.abs() if margin_strategy == "relative" else 1)

    def block(of_rows: Tensor, columns: Tensor, guide_rows: Tensor, guide_columns: Tensor) -> tuple[Tensor, Tensor]:
        return of_rows @ columns.T / temperature, (guide_rows @ guide_columns.T).detach() <= limit[:, None]

    blocks = [block(q, k, guide_q, guide_k)]
    blocks += [block(q, q, guide_q, guide_q)] if contrast_anchors else []
    blocks += [block(k, k, guide_k, guide_k)] if contrast_positives else []
    blocks = [(s, keep & not_self(q)) for s, keep in blocks]
    positive = blocks[0][0].diagonal()
    if negatives is not None and guide_negatives is not None:
        blocks.append(block(q, unit(negatives, normalize), guide_q, unit(guide_negatives, normalize)))
    s, keep = (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
    return reduced(-logsigmoid(positive - logsumexp(s, keep)), reduction, weights)


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
    """Every row against its positive and the rows of a table that were drawn for it."""
    s = unit(q, normalize) @ unit(table, normalize).T / temperature
    p = s.gather(1, positive[:, None]).squeeze(1)
    return reduced(
        -logsigmoid(p - logsumexp(s.gather(1, negatives), negatives != positive[:, None])), reduction, weights
    )


def n_pair(
    q: Tensor,
    k: Tensor,
    *,
    l2: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """InfoNCE at temperature 1, of rows kept short by a penalty."""
    q, k = unit(q, normalize), unit(k, normalize)
    loss = info_nce(q, k, temperature=1.0, reduction="none")
    return reduced(loss + l2 / 4 * (q.square().sum(1) + k.square().sum(1)), reduction, weights)


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
    """Cross-entropy of every image against all texts and of every text against all images, averaged."""
    image, text = unit(image, normalize), unit(text, normalize)
    keep = not_self(image) if ids is None else ids[:, None] != ids
    s = (scale * image) @ text.T
    t = s.T if text_scale is None else (text_scale * text) @ image.T
    from_image = logsigmoid(s.diagonal() - logsumexp(s, keep))
    from_text = logsigmoid(t.diagonal() - logsumexp(t, keep))
    return reduced(-(from_image + from_text) / 2, reduction, weights)


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
    """Binary cross-entropy of every pair: 1 on the diagonal, 0 elsewhere."""
    image, text = unit(image, normalize), unit(text, normalize)
    s = (scale * image) @ text.T + bias
    diagonal = ~not_self(image)
    counted = diagonal | (True if ids is None else ids[:, None] != ids)
    return reduced(-torch.where(counted, logsigmoid(torch.where(diagonal, s, -s)), 0).sum(1), reduction, weights)
