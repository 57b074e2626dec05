"""Losses on the full matrix as people usually write them, where ``fastcl.reference`` is written to be exact instead.

The reference is what a loss means, and often takes a pass or a matrix more than it needs: two log-sum-exps for digits
that few ask for, (N, N, D) differences, (N, N, N) triplets. To be faster than that proves nothing. Here are the short
forms, one per loss, of unit rows and for ``reduction="mean"``; ``tests/test_family.py`` holds them to the reference.
A loss without a form here is measured against the reference itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, pairwise_distance, softplus, triplet_margin_loss

from fastcl import reference


def usual(name: str, arguments: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The usual dense form of a loss for such keyword arguments, or ``None`` where the reference is one."""
    form = FORMS.get(name)
    takes_hardness = arguments.get("hardness") or arguments.get("own_hardness")
    without_form = takes_hardness or arguments.get("form") == "in" or arguments.get("correct_positive") is False
    return None if without_form else form


def nt_xent(
    z: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float,
    views: int = 2,
    extra_negatives: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    s = z @ z.T / temperature
    if labels is None and views == 2 and extra_negatives is None and ids is None:
        s.fill_diagonal_(-torch.inf)
        return cross_entropy(s, _arange(z).roll(len(z) // 2))
    image = _arange(z) % (len(z) // views) if labels is None else labels
    group = image if ids is None else ids.repeat(views)
    candidates = s.masked_fill(group[:, None] == group, -torch.inf)
    if extra_negatives is not None:
        candidates = torch.cat([candidates, z @ extra_negatives.T / temperature], 1)
    anchor, positive = _positive_pairs(image)
    return -logsigmoid(s[anchor, positive] - candidates.logsumexp(1)[anchor]).mean()


def dclw(z: Tensor, *, temperature: float, sigma: float = 0.5) -> Tensor:
    s, positive = _two_views(z, temperature)
    w = (positive.detach() * temperature / sigma).exp()
    return (s.logsumexp(1) - (2 - w / w.mean()) * positive).mean()


def dcl(z: Tensor, *, temperature: float) -> Tensor:
    s, positive = _two_views(z, temperature)
    return (s.logsumexp(1) - positive).mean()


def debiased_nt_xent(z: Tensor, *, temperature: float, tau_plus: float = 0.1) -> Tensor:
    s, positive = _two_views(z, temperature)
    positive, count = positive.exp(), len(z) - 2
    n = ((s.exp().sum(1) - count * tau_plus * positive) / (1 - tau_plus)).clamp(min=count * math.exp(-1 / temperature))
    return -(positive / (positive + n)).log().mean()


def hard_nt_xent(z: Tensor, *, temperature: float, tau_plus: float = 0.1, beta: float = 1.0) -> Tensor:
    s, positive = _two_views(z, temperature)
    e, positive, count = s.exp(), positive.exp(), len(z) - 2
    w = e if beta == 1 else (beta * s).exp()
    n = (w * e).sum(1) / (w.sum(1) / count)
    n = ((n - count * tau_plus * positive) / (1 - tau_plus)).clamp(min=count * math.exp(-1 / temperature))
    return -(positive / (positive + n)).log().mean()


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    extra_negatives: Tensor | None = None,
    ids: Tensor | None = None,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    if negatives is not None:  # as in MoCo's code
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / temperature
        return cross_entropy(logits, torch.zeros_like(_arange(q)))
    columns = k if extra_negatives is None else torch.cat([k, extra_negatives])
    s = _without_equals(q @ columns.T / temperature, ids)
    loss = cross_entropy(s, _arange(q), label_smoothing=label_smoothing)
    return (loss + cross_entropy(s.T, _arange(q), label_smoothing=label_smoothing)) / 2 if symmetric else loss


def moco_v3(q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, *, temperature: float) -> Tensor:
    one, other = (info_nce(q, k.detach(), temperature=temperature) for q, k in ((q0, k1), (q1, k0)))
    return 2 * temperature * (one + other)


def in_batch_softmax(q: Tensor, k: Tensor, *, temperature: float, log_q: Tensor, ids: Tensor | None = None) -> Tensor:
    return cross_entropy(_without_equals(q @ k.T / temperature - log_q, ids), _arange(q))


def sampled_info_nce(q: Tensor, table: Tensor, positive: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    s = torch.einsum("md,mkd->mk", q, table[negatives]) / temperature
    p = (q * table[positive]).sum(1) / temperature
    return -logsigmoid(p - s.masked_fill(negatives == positive[:, None], -torch.inf).logsumexp(1)).mean()


def n_pair(q: Tensor, k: Tensor, *, l2: float = 0.0) -> Tensor:
    return cross_entropy(q @ k.T, _arange(q)) + l2 / 4 * (q.square().sum() + k.square().sum()) / len(q)


def clip(
    image: Tensor, text: Tensor, *, scale: Tensor, text_scale: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    target = _arange(image)
    cosine = image @ text.T
    s = _without_equals(scale * cosine, ids)
    t = s.T if text_scale is None else _without_equals(text_scale * cosine.T, ids)
    return (cross_entropy(s, target) + cross_entropy(t, target)) / 2


def siglip(image: Tensor, text: Tensor, *, scale: Tensor, bias: Tensor, ids: Tensor | None = None) -> Tensor:
    sign = 2 * torch.eye(len(image)) - 1
    logits = _without_equals((scale * image @ text.T + bias) * sign, ids, torch.inf)
    return -logsigmoid(logits).sum() / len(image)


def supcon(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    anchors: int | None = None,
    base_temperature: float | None = None,
) -> Tensor:
    rows = slice(anchors)
    s = z[rows] @ z.T / temperature
    s.fill_diagonal_(-torch.inf)
    log_probability = s.log_softmax(1)
    anchor, positive = _positive_pairs(labels)
    if anchors is not None:
        first = anchor < anchors
        anchor, positive = anchor[first], positive[first]
    count = torch.bincount(anchor, minlength=len(s))
    loss = -(log_probability[anchor, positive] / count[anchor]).sum() / (count > 0).sum().clamp(min=1)
    return loss if base_temperature is None else loss * (temperature / base_temperature)


def sincere(z: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    s = z @ z.T / temperature
    n = s.masked_fill(labels[:, None] == labels, -torch.inf).logsumexp(1)
    anchor, positive = _positive_pairs(labels)
    count = torch.bincount(anchor, minlength=len(z))
    loss = -logsigmoid(s[anchor, positive] - n[anchor]) / count[anchor]
    return loss.sum() / (count > 0).sum().clamp(min=1)


def triplet_all(z: Tensor, labels: Tensor, *, margin: float, distance: str = "euclidean") -> Tensor:
    """(P, N) hinges for P positive pairs, instead of (N, N, N)."""
    d = _distances(z, distance)
    anchor, positive = _positive_pairs(labels)
    hinges = (d[anchor, positive][:, None] + margin - d[anchor]).relu()
    hinges = hinges.masked_fill(labels[anchor, None] == labels, 0)
    return hinges.sum() / (hinges > 0).sum().clamp(min=1)


def triplet_hard(z: Tensor, labels: Tensor, *, margin: float | None, distance: str = "euclidean") -> Tensor:
    d = _distances(z, distance)
    same = labels[:, None] == labels
    counted = (same.sum(1) > 1) & ~same.all(1)
    nearest = d.masked_fill(same, torch.inf).amin(1)
    furthest = d.masked_fill(~same, 0).amax(1)  # of a row without a positive its own, which is 0 and not counted
    return _hinge((furthest - nearest)[counted], margin).sum() / counted.sum().clamp(min=1)


def triplet_semi_hard(z: Tensor, labels: Tensor, *, margin: float | None, distance: str = "euclidean") -> Tensor:
    """(P, N) candidates for P positive pairs, looked at without gradient."""
    d = _distances(z, distance)
    anchor, positive = _positive_pairs(labels)
    to_positive = d[anchor, positive]
    with torch.no_grad():
        rows, same = d[anchor], labels[anchor, None] == labels
        nearest, at = rows.masked_fill(same | (rows < to_positive[:, None]), torch.inf).min(1)
        furthest = d.masked_fill(labels[:, None] == labels, -torch.inf).argmax(1)[anchor]
        negative = torch.where(nearest < torch.inf, at, furthest)
    return _hinge(to_positive - d[anchor, negative], margin).mean()


def cosface(z: Tensor, proxies: Tensor, labels: Tensor, *, scale: Tensor, margin: float = 0.35) -> Tensor:
    s = z @ proxies.T
    s[_arange(z), labels] -= margin
    return cross_entropy(scale * s, labels)


def siamese(a: Tensor, b: Tensor, similar: Tensor, *, margin: float) -> Tensor:
    d = pairwise_distance(a, b, eps=0.0)
    return torch.where(similar != 0, d**2, (margin - d).relu() ** 2).mean() / 2


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor, *, margin: float, swap: bool = False) -> Tensor:
    return triplet_margin_loss(anchor, positive, negative, margin=margin, swap=swap, eps=0.0)


FORMS: dict[str, Callable[..., Tensor]] = {
    form.__name__: form
    for form in (
        nt_xent, dcl, dclw, debiased_nt_xent, hard_nt_xent, info_nce, moco_v3, in_batch_softmax, sampled_info_nce,
        n_pair, clip, siglip, supcon, sincere, triplet_all, triplet_hard, triplet_semi_hard, cosface, siamese, triplet,
    )
}  # fmt: skip
# Those whose dense form needs no matrix either: time and memory are O(N D) on both sides.
LINEAR = ("sampled_info_nce", "siamese", "triplet", "negative_cosine", "byol", "squared_cosine")
assert all(hasattr(reference, name) for name in (*FORMS, *LINEAR))


def _arange(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def _positive_pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    same = labels[:, None] == labels
    anchor, positive = same.fill_diagonal_(False).nonzero(as_tuple=True)
    return anchor, positive


def _two_views(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits without those of the own image, and those of the other view."""
    half = len(z) // 2
    s = z @ z.T / temperature
    positive = torch.cat([s.diagonal(half), s.diagonal(-half)])
    image = _arange(z) % half
    return s.masked_fill(image[:, None] == image, -torch.inf), positive


def _without_equals(s: Tensor, ids: Tensor | None, fill: float = -torch.inf) -> Tensor:
    if ids is None:
        return s
    return s.masked_fill((ids[:, None] == ids).fill_diagonal_(False), fill)


def _distances(z: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1 - z @ z.T
    if distance == "euclidean":
        return torch.cdist(z, z)
    squares = z.square().sum(1)
    return (squares[:, None] + squares - 2 * z @ z.T).clamp(min=0)


def _hinge(difference: Tensor, margin: float | None) -> Tensor:
    return softplus(difference) if margin is None else (difference + margin).relu()
