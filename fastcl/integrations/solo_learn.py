"""Drop-ins for ``solo.losses``: ``from fastcl.integrations.solo_learn import simclr_loss_func``, and so on.

Names and signatures are those of solo-learn's repository and of its release 1.0.2, which differ; solo-learn need not be
installed. What differs from both: no function stores a matrix of similarities, unless it is given one as a mask; rows
are normalised in fp32 (fp64); exponentials neither over- nor underflow, whatever the temperature and the dtype. A loss
has the dtype of its rows, or is fp32 under autocast.

On several ranks the functions that gather rows in the repository do so here: rows of all ranks, as many on each, are
candidates, and their gradients are summed over ranks, so that DDP's average is the gradient of the mean over all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .. import functional as F
from .._checks import Scalar, sentence
from ..functional._arguments import inverse, operand
from ..pairwise import l2_normalize, pair_logsumexp, row_dot
from ._dropin import as_original, gathered, image_ids, ranks, softmax_rows

UPSTREAM = "solo.losses"
ORIGIN = "see github.com/vturrisi/solo-learn"

__all__ = [
    "byol_loss_func",
    "manual_simclr_loss_func",
    "moco_loss_func",
    "mocov2plus_loss_func",
    "mocov3_loss_func",
    "nnclr_loss_func",
    "simclr_loss_func",
    "simsiam_loss_func",
]


def simclr_loss_func(
    z: Tensor | None = None,
    indexes: Tensor | None = None,
    temperature: Scalar = 0.1,
    extra_pos_mask: Tensor | None = None,
    *,
    z1: Tensor | None = None,
    z2: Tensor | None = None,
) -> Tensor:
    r"""SimCLR's loss, in the repository's form or in that of release 1.0.2; the second argument says in which.

    ``simclr_loss_func(z, indexes, temperature)`` with integer indexes is the repository's:
    :math:`L_i = -\log \frac{\sum_{p \in P(i)} e^{s_{ip}}}{\sum_{j \ne i} e^{s_{ij}}}`, where P(i) are the other rows
    with the index of row i, on all ranks. A row without a positive has an infinite loss, as there.

    ``simclr_loss_func(z1, z2, temperature, extra_pos_mask)`` with two views is the release's: NT-Xent. With a mask the
    value of a row is the mean over its partner and the positives of the mask, and the denominator is over all rows but
    itself. It gathers nothing.

    Args:
        z: ``(N, D)`` rows of all views.
        indexes: ``(N,)`` integers: the number of the image, or its label.
        temperature: a number or a 0-d tensor.
        z1, z2: ``(B, D)``.
        extra_pos_mask: ``(2B, 2B)`` booleans, for the second form.

    Returns:
        A scalar: the mean over rows.

    Raises:
        TypeError, ValueError: rows, indexes or a mask that do not fit, or not one of the two forms.
    """
    first, second = (z, indexes) if z1 is None and z2 is None else (z1 if z is None else z, z2)
    if first is None or second is None or (z2 is not None and indexes is not None):
        given = {"z": z, "indexes": indexes, "z1": z1, "z2": z2}
        got = " and ".join(name for name, value in given.items() if value is not None) or "no rows"
        raise TypeError(sentence(got, "z and indexes, or z1 and z2", "Pass both arguments of one form."))
    if isinstance(second, Tensor) and second.is_floating_point() and second.ndim != 1:
        return _two_views(first, second, temperature, extra_pos_mask)
    if extra_pos_mask is not None:
        got = "extra_pos_mask beside indexes"
        raise TypeError(sentence(got, "indexes alone", "Give rows that are positives of each other one index."))
    return _indexed(first, second, temperature)


def _two_views(z1: Tensor, z2: Tensor, temperature: Scalar, mask: Tensor | None) -> Tensor:
    _checks.same_rows(z1=z1, z2=z2)
    z = torch.cat([z1, z2])
    if mask is None:
        return as_original(F.nt_xent(z, temperature=temperature, normalize=True), z)
    positives = _pair_mask("extra_pos_mask", mask, z)
    own = torch.arange(len(z), device=z.device)
    positives = positives | (own == own.roll(len(z1))[:, None])
    z, scale = l2_normalize(z), inverse(temperature, z)
    # the mean logit of a row's positives is linear in them, so the mask is the only matrix
    rows = operand(z)
    with torch.autocast(z.device.type, enabled=False):
        mean = (positives.to(rows.dtype) @ rows) / positives.sum(1, keepdim=True)
        positive = row_dot(rows, mean) * scale
    return as_original((pair_logsumexp(z, scale=scale, drop=own) - positive).mean(), z1, z2)


def _indexed(z: Tensor, indexes: Tensor, temperature: Scalar) -> Tensor:
    _checks.rows(z=z)
    _checks.vector("indexes", indexes, len(z), z, integer=True)
    unit, scale = l2_normalize(z), inverse(temperature, z)
    rank, world_size = ranks()
    own, ids = image_ids(len(z), rank, world_size, z.device)
    if world_size == 1:
        negatives = pair_logsumexp(unit, scale=scale, drop=indexes)
        positives = pair_logsumexp(unit, scale=scale, only=indexes, drop=own)
    else:
        everyone, keys = gathered(unit), (indexes, gathered(indexes))
        negatives = pair_logsumexp(unit, everyone, scale=scale, drop=keys)
        positives = pair_logsumexp(unit, everyone, scale=scale, only=keys, drop=(own, ids))
    return as_original(-logsigmoid(positives - negatives).mean(), z)


def manual_simclr_loss_func(z: Tensor, pos_mask: Tensor, neg_mask: Tensor, temperature: Scalar = 0.1) -> Tensor:
    r"""NT-Xent whose positives and negatives are said by two matrices (release 1.0.2).

    The value of a row is the mean over its positives p of
    :math:`-\log \frac{e^{s_{ip}}}{e^{s_{ip}} + \sum_{j \text{ negative}} e^{s_{ij}}}`; the mean is over the rows that
    have a positive, and 0 where none has. Its masks are matrices already, so this is plain torch, of O(N^2) memory.

    Args:
        z: ``(N, D)``.
        pos_mask, neg_mask: ``(N, N)`` booleans.
        temperature: a number or a 0-d tensor.

    Returns:
        A scalar.
    """
    _checks.rows(z=z)
    positive, negative = _pair_mask("pos_mask", pos_mask, z), _pair_mask("neg_mask", neg_mask, z)
    rows = operand(l2_normalize(z))
    with torch.autocast(z.device.type, enabled=False):
        s = rows @ rows.T * inverse(temperature, z)
    n = s.masked_fill(~negative, -torch.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    loss = -logsigmoid(s - n).masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    return as_original(loss.sum() / (count > 0).sum().clamp(min=1), z)


def moco_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: Scalar = 0.1) -> Tensor:
    """MoCo's loss: :func:`fastcl.functional.info_nce` with a queue.

    Args:
        query, key: ``(B, D)``, of length 1 as solo-learn's methods give them.
        queue: ``(D, K)``. It may be overwritten before the backward pass.
        temperature: a number or a 0-d tensor.

    Returns:
        A scalar.
    """
    if not isinstance(queue, Tensor) or queue.ndim != 2:
        got = f"queue of shape {tuple(queue.shape)}" if isinstance(queue, Tensor) else f"queue of {type(queue)}"
        raise ValueError(sentence(got, "a matrix (features, keys)", "Transpose it: keys are its columns."))
    loss = F.info_nce(query, key, queue.T, temperature=temperature)
    return as_original(loss, query, key, queue)


mocov2plus_loss_func = moco_loss_func  # as the repository calls it


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: Scalar = 0.2) -> Tensor:
    """MoCo v3's loss of one direction: InfoNCE, times twice the temperature.

    Args:
        query: ``(B, D)``.
        key: ``(B, D)``; on several ranks those of all are candidates, and receive no gradient.
        temperature: a number or a 0-d tensor.

    Returns:
        A scalar.
    """
    return as_original(_info_nce(query, key, temperature, frozen=True) * (2 * temperature), query, key)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: Scalar = 0.1) -> Tensor:
    """NNCLR's loss of one direction: neighbours look for the predictions of their images.

    Args:
        nn: ``(B, D)`` neighbours, from the queue.
        p: ``(B, D)`` predictions; on several ranks those of all are candidates.
        temperature: a number or a 0-d tensor.

    Returns:
        A scalar.
    """
    return as_original(_info_nce(nn, p, temperature), nn, p)


def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """BYOL's loss of one direction: :func:`fastcl.functional.byol`.

    Args:
        p: ``(..., D)`` predictions.
        z: ``(..., D)`` targets, which receive no gradient.
        simplified: two ways to the same number in solo-learn; here there is one.

    Returns:
        A scalar: 2 - 2 cos, the mean over rows.
    """
    return as_original(F.byol(*_matrices(p, z), normalize=True), p, z)


def simsiam_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """SimSiam's loss of one direction: :func:`fastcl.functional.negative_cosine`.

    Args:
        p: ``(..., D)`` predictions.
        z: ``(..., D)`` targets, which receive no gradient.
        simplified: two ways to the same number in solo-learn; here there is one.

    Returns:
        A scalar: -cos, the mean over rows.
    """
    predictions, targets = _matrices(p, z)
    return as_original(F.negative_cosine(predictions, targets.detach(), normalize=True), p, z)


def _info_nce(q: Tensor, k: Tensor, temperature: Scalar, *, frozen: bool = False) -> Tensor:
    """Queries of this rank against keys of all."""
    _checks.same_rows(q=q, k=k)
    rank, world_size = ranks()
    if world_size == 1:
        return F.info_nce(q, k, temperature=temperature, normalize=True)
    everyone = gathered(l2_normalize(k.detach() if frozen else k))
    own, _ = image_ids(len(q), rank, world_size, q.device)
    return softmax_rows(l2_normalize(q), everyone, own, scale=inverse(temperature, q)).mean()


def _matrices(p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Every leading index as a row, as ``cosine_similarity`` broadcasts them."""
    for name, t in (("p", p), ("z", z)):
        _checks.elements(name, t)
    try:
        p, z = torch.broadcast_tensors(p, z)
    except RuntimeError as error:
        got = f"p of shape {tuple(p.shape)} and z of shape {tuple(z.shape)}"
        mend = "Check that both come from the same batch."
        raise ValueError(sentence(got, "shapes of which one extends the other", mend)) from error
    return p.reshape(-1, p.shape[-1]), z.reshape(-1, z.shape[-1])


def _pair_mask(name: str, mask: Tensor, rows: Tensor) -> Tensor:
    """A Boolean matrix over pairs of rows."""
    n = len(rows)
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = f"{name} of dtype {mask.dtype}" if isinstance(mask, Tensor) else f"{name} of type {type(mask).__name__}"
        raise TypeError(sentence(got, "booleans, or integers 0 and 1", "Convert it: positives have no weights here."))
    if mask.shape != (n, n):
        got = f"{name} of shape {tuple(mask.shape)}"
        raise ValueError(sentence(got, f"({n}, {n}): a row and a column per row of z", "Cover all views."))
    return mask.to(rows.device) != 0
