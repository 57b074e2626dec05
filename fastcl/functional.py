"""The losses, as formulas over embeddings of length 1 that never build the similarity matrix.

Every softmax loss here compares the positive logit p_i with n_i, the log-sum-exp of the negatives *alone*::

    L_i = -log sigmoid(p_i - n_i) = -log( e^{p_i} / (e^{p_i} + sum_{j negative} e^{s_ij}) )

That is cross-entropy, in the form that keeps its digits when a pair is easy: with the positive inside the sum,
``lse - p`` subtracts two nearly equal numbers. A row with no negatives has n_i = -inf, loss 0 and gradient 0.

Arguments that all functions share:

* ``temperature`` (or ``scale``, its inverse, and ``bias``): a number, or a 0-d tensor, which receives a gradient.
* ``reduction``: ``"mean"`` (over the rows that count; 0 where there are none), ``"sum"``, or ``"none"``: one per row.
* ``normalize``: make every row length 1 first, as :func:`fastcl.pairwise.l2_normalize` does.

All return fp32 (fp64 for fp64 rows), and raise ``TypeError`` or ``ValueError`` for tensors that do not fit. The losses
are defined for rows of length 1; the modules in ``fastcl`` normalize by default, these functions do not.
Two views are stacked as ``[view0; view1]``: row i and row i + B are two views of one image.
``fastcl.reference`` has the same functions, with the same arguments, on the full matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import _checks
from ._checks import Scalar
from .pairwise import (
    contrastive,
    l2_normalize,
    merge_logsumexp,
    pair_logsumexp,
    pair_softplus_sum,
    pair_softplus_total,
    row_dot,
)


def nt_xent(z: Tensor, *, temperature: Scalar, reduction: str = "mean", normalize: bool = False) -> Tensor:
    r"""NT-Xent, SimCLR's loss (Chen et al. 2020, arXiv:2002.05709, eq. 1).

    :math:`L_i = -\log \frac{\exp(\langle z_i, z_{i'} \rangle / \tau)}
    {\sum_{j \ne i} \exp(\langle z_i, z_j \rangle / \tau)}` where i' is the other view of image i.

    Args:
        z: ``(2B, D)``, two views of each image, stacked.

    Returns:
        A scalar, or ``(2B,)`` for ``reduction="none"``.
    """
    _checks.stacked(z)
    loss = contrastive(z, scale=_inverse(temperature, z), normalize=normalize)
    if loss is None:
        positive, negatives = _two_views(_unit(z, normalize), temperature)
        loss = -logsigmoid(positive - negatives)
    return _reduce(loss, reduction)


def dcl(z: Tensor, *, temperature: Scalar, reduction: str = "mean", normalize: bool = False) -> Tensor:
    r"""Decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, eq. 6): NT-Xent without its positive in the sum.

    :math:`L_i = -\langle z_i, z_{i'} \rangle / \tau + \log \sum_{j \ne i, i'} \exp(\langle z_i, z_j \rangle / \tau)`.
    A row with no negatives contributes 0 and is not counted.

    Args:
        z: ``(2B, D)``, two views of each image, stacked.

    Returns:
        A scalar, or ``(2B,)`` for ``reduction="none"``.
    """
    positive, negatives = _two_views(_unit(z, normalize), temperature)
    counted = negatives != -torch.inf
    return _reduce(torch.where(counted, negatives - positive, 0), reduction, counted)


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: Scalar,
    extra_negatives: Tensor | None = None,
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
        extra_negatives: ``(H, D)``, used beside them; mined hard negatives.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``.
    """
    _checks.same_rows(q=q, k=k)
    scale = _inverse(temperature, q)
    if negatives is None and extra_negatives is None:
        loss = contrastive(q, k, scale=scale, normalize=normalize)
        if loss is not None:
            return _reduce(loss, reduction)
    q, k = _unit(q, normalize), _unit(k, normalize)
    positive = row_dot(q, k) * scale
    if negatives is None:
        n = pair_logsumexp(q, k, scale=scale, drop=_arange(q))
    else:
        n = pair_logsumexp(q, _unit(negatives, normalize), scale=scale)
    if extra_negatives is not None:
        n = merge_logsumexp(n, pair_logsumexp(q, _unit(extra_negatives, normalize), scale=scale))
    return _reduce(-logsigmoid(positive - n), reduction)


def clip(image: Tensor, text: Tensor, *, scale: Scalar, reduction: str = "mean", normalize: bool = False) -> Tensor:
    r"""CLIP's loss (Radford et al. 2021, arXiv:2103.00020, fig. 3): InfoNCE from image to text and back, averaged.

    Args:
        image, text: ``(B, D)``; row i of one belongs to row i of the other.
        scale: CLIP's ``logit_scale.exp()``, the inverse temperature.

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``: the mean of the two directions per pair.
    """
    _checks.same_rows(image=image, text=text)
    scale = _multiplier("scale", scale, image)
    loss = contrastive(image, text, scale=scale, normalize=normalize, both=True)
    if loss is not None:
        return _reduce(loss.view(2, -1).mean(0), reduction)
    image, text = _unit(image, normalize), _unit(text, normalize)
    positive = row_dot(image, text) * scale
    to_text, to_image = pair_logsumexp(image, text, scale=scale, drop=_arange(image), both=True)
    return _reduce(-0.5 * (logsigmoid(positive - to_text) + logsigmoid(positive - to_image)), reduction)


def siglip(
    image: Tensor, text: Tensor, *, scale: Scalar, bias: Scalar, reduction: str = "mean", normalize: bool = False
) -> Tensor:
    r"""SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343, eq. 1): every pair is a binary problem of its own.

    :math:`L_i = -\log \sigma(s_{ii}) - \sum_{j \ne i} \log \sigma(-s_{ij})` with
    :math:`s_{ij} = \text{scale} \langle x_i, y_j \rangle + \text{bias}`.

    Args:
        image, text: ``(B, D)``; row i of one belongs to row i of the other.
        scale: inverse temperature (the paper starts at 10).
        bias: added to every logit (the paper starts at -10).

    Returns:
        A scalar, or ``(B,)`` for ``reduction="none"``: the sum over the texts of each image.
    """
    _checks.same_rows(image=image, text=text)
    scale, bias = _multiplier("scale", scale, image), _multiplier("bias", bias, image)
    image, text = _unit(image, normalize), _unit(text, normalize)
    positive = logsigmoid(row_dot(image, text) * scale + bias)
    negatives: dict[str, Any] = {"scale": scale, "row_bias": bias, "drop": _arange(image)}
    if reduction not in ("mean", "sum"):
        return _reduce(pair_softplus_sum(image, text, **negatives) - positive, reduction)
    loss = pair_softplus_total(image, text, **negatives) - positive.sum()
    return loss / max(image.shape[0], 1) if reduction == "mean" else loss


def supcon(
    z: Tensor, labels: Tensor, *, temperature: Scalar, reduction: str = "mean", normalize: bool = False
) -> Tensor:
    r"""Supervised contrastive loss, :math:`L^{sup}_{out}` (Khosla et al. 2020, arXiv:2004.11362, eq. 2).

    :math:`L_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)} \log \frac{\exp(\langle z_i, z_p \rangle / \tau)}
    {\sum_{j \ne i} \exp(\langle z_i, z_j \rangle / \tau)}` where P(i) are the other rows with the label of row i.
    A row without a positive contributes 0 and is not counted.

    Args:
        z: ``(N, D)``.
        labels: ``(N,)`` integers.

    Returns:
        A scalar, or ``(N,)`` for ``reduction="none"``.
    """
    _checks.rows(z=z)
    _checks.vector("labels", labels, z.shape[0], z, integer=True)
    z = _unit(z, normalize)
    scale = _inverse(temperature, z)
    others, count, first = _class_sums(z, labels)
    # The mean over positives of a linear function is a function of the class sum: no matrix is needed.
    positive = row_dot(z, others) * scale / (count - 1).clamp(min=1)
    # A row with one positive takes the accurate form, whose negatives do not contain that positive.
    lone = count == 2
    n = pair_logsumexp(z, scale=scale, drop=torch.where(lone, first, _arange(z)))
    loss = torch.where(lone, -logsigmoid(positive - n), n - positive)
    counted = count > 1
    return _reduce(torch.where(counted, loss, 0), reduction, counted)


def _unit(rows: Tensor, normalize: bool) -> Tensor:
    return l2_normalize(rows) if normalize else rows


def _two_views(z: Tensor, temperature: Scalar) -> tuple[Tensor, Tensor]:
    """Positive logit and log-sum-exp of the negatives, both ``(2B,)``; negatives are the views of other images."""
    _checks.stacked(z)
    batch = z.shape[0] // 2
    scale = _inverse(temperature, z)
    positive = row_dot(z, z.roll(batch, 0)) * scale
    return positive, pair_logsumexp(z, scale=scale, drop=_arange(z) % max(batch, 1))


def _class_sums(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every row: the sum of the *other* rows of its class (N, D) fp32, the size of the class, its first row (N,).

    Without a host synchronisation and in a fixed order: after a stable sort a class is a run of rows, and each run is
    summed by doubling steps that stop at its ends.
    """
    n = z.shape[0]
    order = labels.argsort(stable=True)
    label, at = labels[order], _arange(z)
    start = torch.searchsorted(label, label)  # of the run that a sorted row belongs to
    end = torch.searchsorted(label, label, right=True)
    sums = z[order].to(torch.promote_types(z.dtype, torch.float32))
    step = 1
    while step < n:  # after this step sums[i] holds rows i - 2 * step + 1 .. i of its run
        inside = (at[step:] - step >= start[step:])[:, None]
        sums = torch.cat([sums[:step], sums[step:] + torch.where(inside, sums[:-step], 0)])
        step *= 2
    back = order.argsort()
    return sums[end - 1][back] - z, (end - start)[back], order[start][back]


def _reduce(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """Mean over the rows that are counted, sum, or the rows as they are. The mean over no rows is 0, with a graph."""
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(loss.shape[0], 1) if counted is None else counted.sum().clamp(min=1))


def _inverse(temperature: Scalar, rows: Tensor) -> Scalar:
    _checks.scalar("temperature", temperature, positive=True)
    return 1 / _multiplier("temperature", temperature, rows)


def _multiplier(name: str, value: Scalar, rows: Tensor) -> Scalar:
    """A scalar in the precision of the logits, whatever a caller's ``model.half()`` made of it."""
    _checks.scalar(name, value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device=rows.device, dtype=torch.promote_types(rows.dtype, torch.float32))


def _arange(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], device=rows.device)
