"""What every loss means: the definitions on the full matrix, in plain torch, any dtype, twice differentiable.

Names and arguments are those of ``fastcl.functional``. These are the oracle of every test, in fp64, and the way out
where the fused functions refuse (second derivatives, ``torch.func``). They store the matrix: O(N^2) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Scalar = float | Tensor


def nt_xent(z: Tensor, *, temperature: Scalar, reduction: str = "mean", normalize: bool = False) -> Tensor:
    """SimCLR: rows i and i + B are positives, every other row but i itself is a negative."""
    z = _unit(z, normalize)
    s = (z / temperature) @ z.T
    image = torch.arange(len(z) // 2, device=z.device).repeat(2)
    n = logsumexp(s, image[:, None] != image)
    return _reduce(-logsigmoid(_other_view(s) - n), reduction)


def dcl(z: Tensor, *, temperature: Scalar, reduction: str = "mean", normalize: bool = False) -> Tensor:
    """NT-Xent whose denominator lacks the positive; a row without negatives is not counted."""
    z = _unit(z, normalize)
    s = (z / temperature) @ z.T
    image = torch.arange(len(z) // 2, device=z.device).repeat(2)
    n = logsumexp(s, image[:, None] != image)
    counted = n > -torch.inf
    return _reduce((n - _other_view(s)).masked_fill(~counted, 0), reduction, counted)


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
    """``k[i]`` is the positive of ``q[i]``; negatives are the rest of ``k`` or ``negatives``, and the extra ones."""
    q, k = _unit(q, normalize), _unit(k, normalize)
    s = q @ k.T
    positive = s.diagonal()
    keep = ~torch.eye(len(q), dtype=torch.bool, device=q.device)
    if negatives is not None:
        s = q @ _unit(negatives, normalize).T
        keep = torch.ones_like(s, dtype=torch.bool)
    if extra_negatives is not None:
        s = torch.cat([s, q @ _unit(extra_negatives, normalize).T], 1)
        keep = torch.cat([keep, keep.new_ones(len(q), len(extra_negatives))], 1)
    return _reduce(-logsigmoid(positive / temperature - logsumexp(s / temperature, keep)), reduction)


def clip(image: Tensor, text: Tensor, *, scale: Scalar, reduction: str = "mean", normalize: bool = False) -> Tensor:
    """Cross-entropy of every image against all texts and of every text against all images, averaged."""
    image, text = _unit(image, normalize), _unit(text, normalize)
    s = (scale * image) @ text.T
    keep = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    p = s.diagonal()
    return _reduce(-(logsigmoid(p - logsumexp(s, keep)) + logsigmoid(p - logsumexp(s.T, keep))) / 2, reduction)


def siglip(
    image: Tensor, text: Tensor, *, scale: Scalar, bias: Scalar, reduction: str = "mean", normalize: bool = False
) -> Tensor:
    """Binary cross-entropy of every pair: 1 on the diagonal, 0 elsewhere."""
    image, text = _unit(image, normalize), _unit(text, normalize)
    s = (scale * image) @ text.T + bias
    sign = 2 * torch.eye(len(s), dtype=s.dtype, device=s.device) - 1
    return _reduce(-logsigmoid(sign * s).sum(1), reduction)


def supcon(
    z: Tensor, labels: Tensor, *, temperature: Scalar, reduction: str = "mean", normalize: bool = False
) -> Tensor:
    """Mean over the positives of a row of their log-softmax; a row without positives is not counted."""
    z = _unit(z, normalize)
    s = (z / temperature) @ z.T
    other = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & other
    count = positive.sum(1)
    mean = s.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    # lse - p and -log sigmoid(p - n) are the same number; with one positive the second keeps its digits
    alone = -logsigmoid(mean - logsumexp(s, other & ~positive))
    loss = torch.where(count == 1, alone, logsumexp(s, other) - mean)
    return _reduce(loss.masked_fill(count == 0, 0), reduction, count > 0)


def _unit(rows: Tensor, normalize: bool) -> Tensor:
    """Rows of length 1; a row of zeros stays one."""
    if not normalize:
        return rows
    length = rows.norm(dim=1, keepdim=True)
    return rows / length.masked_fill(length == 0, 1)


def logsumexp(s: Tensor, keep: Tensor) -> Tensor:
    """Row-wise log-sum-exp of the kept entries ``(M,)``; -inf, with no gradient, for a row that keeps none."""
    if not s.shape[1]:
        return s.sum(1) - torch.inf
    # The lowest finite number instead of -inf: an empty row would differentiate to NaN.
    lse = s.masked_fill(~keep, torch.finfo(s.dtype).min).logsumexp(1)
    return torch.where(keep.any(1), lse, -torch.inf)


def _other_view(s: Tensor) -> Tensor:
    half = len(s) // 2
    return torch.cat([s.diagonal(half), s.diagonal(-half)]) if half else s.new_zeros(0)


def _reduce(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction != "mean":
        raise ValueError(f"got reduction = {reduction!r}; expected 'mean', 'sum' or 'none'. Choose one.")
    return loss.sum() / max(len(loss) if counted is None else int(counted.sum()), 1)
