"""Ways to look at the matrix that is never stored: a tile of it, its product with vectors, figures of its rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import _checks
from ._checks import Scalar, sentence
from .backends import Pairs, chunked
from .pairwise import operand_dtype, pair_logsumexp, pair_topk, pairs_of, rounded

_BLOCK = 2**22  # logits of a block of rows that live at once


class SimilarityTile(NamedTuple):
    """Some rows against some columns."""

    logits: Tensor  # (R, C), -inf where a pair is not kept
    weights: Tensor  # (R, C), the softmax over *all* kept columns of a row


class PairStatistics(NamedTuple):
    """What a contrastive batch looks like to each of its rows."""

    probability: Tensor  # (M,) of the positive, in the softmax of it and its negatives
    hit: Tensor  # (M,) bool: no negative is above the positive
    effective_negatives: Tensor  # (M,) 1 / sum of squared softmax weights of the negatives: 1 to their number


@torch.no_grad()
def similarity_tile(
    q: Tensor, k: Tensor | None = None, rows: slice = slice(None), cols: slice = slice(None), **options: Any
) -> SimilarityTile:
    """One tile of logits and of softmax weights.

    Args:
        q: ``(M, D)``.
        k: ``(N, D)``; ``q`` itself when omitted.
        rows, cols: which ones, R and C of them.
        options: ``scale`` and the other arguments of :func:`fastcl.pairwise.pair_logsumexp`, without ``both``.

    Returns:
        ``logits`` and ``weights``, both ``(R, C)`` fp32 (fp64). A row that keeps no pair has weights 0. No gradient.
    """
    for name, part in (("rows", rows), ("cols", cols)):
        if not isinstance(part, slice):
            got = f"{name} of type {type(part).__name__}"
            raise TypeError(sentence(got, "a slice", "Pass slice(start, stop), or leave it out for all."))
    logits = chunked.logits(_two_sets(q, k, options).sliced(rows, cols))
    row_lse = pair_logsumexp(q, q if k is None else k, **options)[rows, None]
    return SimilarityTile(logits, (logits - row_lse.masked_fill(row_lse == -torch.inf, 0)).exp())


def pair_softmax_matmul(q: Tensor, k: Tensor | None, v: Tensor, **options: Any) -> Tensor:
    r"""Average of the rows of ``v`` by the softmax of every row's logits, :math:`\sum_j \mathrm{softmax}(s_i)_j v_j`.

    Args:
        q: ``(M, D)``.
        k: ``(N, D)``; ``q`` itself for ``None``.
        v: ``(N, E)``.
        options: ``scale`` and the other arguments of :func:`fastcl.pairwise.pair_logsumexp`, without ``both``.

    Returns:
        ``(M, E)`` fp32 (fp64); 0 for a row that keeps no pair. Differentiable in q, k, v, scale and biases, any number
        of times: blocks of rows are computed again in backward, so no more than a block of logits is stored.
    """
    pairs = _two_sets(q, k, options)
    _checks.rows(v=v)
    if len(v) != len(pairs.y):
        got, expected = f"v of shape {tuple(v.shape)}", f"{len(pairs.y)} rows, one per column"
        raise ValueError(sentence(got, expected, "Give every column what is to be averaged."))
    v = v.to(pairs.scale.dtype)

    def block(rows: slice, *fields: Any) -> Tensor:
        s = chunked.logits(Pairs(*fields).sliced(rows, slice(None)))
        return s.masked_fill((s == -torch.inf).all(1, keepdim=True), 0).softmax(1).masked_fill(s == -torch.inf, 0) @ v

    height = max(1, _BLOCK // max(len(v), 1))
    blocks = [slice(i, min(i + height, len(q))) for i in range(0, len(q), height)]
    done = [checkpoint(block, rows, *pairs, use_reentrant=False) for rows in blocks]
    return torch.cat(done) if done else v.new_zeros(0, v.shape[1])


@torch.no_grad()
def pair_statistics(
    positive: Tensor, q: Tensor, k: Tensor | None = None, *, scale: Scalar, **options: Any
) -> PairStatistics:
    """Figures to watch while a contrastive loss trains, of every row, without a matrix and without gradient.

    Args:
        positive: ``(M,)`` logits of the positive pairs, such as ``row_dot(q, k) * scale``.
        q, k, scale, options: the negatives, as in :func:`fastcl.pairwise.pair_logsumexp`: a scale above 0, and keys.

    Returns:
        ``probability``, ``hit`` and ``effective_negatives``; 1, true and 0 for a row without negatives.

    Example:
        >>> watch = fastcl.pair_statistics(10 * row_dot(q, k), q, k, scale=10.0, drop=torch.arange(len(q)))
        >>> print(watch.hit.float().mean())
    """
    _checks.rows(q=q)
    _checks.vector("positive", positive, q.shape[0], q)
    n = pair_logsumexp(q, k, scale=scale, **options)
    twice = pair_logsumexp(q, k, scale=2 * scale, **options)  # log of the sum of squared exponentials
    best, _ = pair_topk(q, k, topk=1, **options)
    empty = n == -torch.inf
    return PairStatistics(
        probability=(positive - n).sigmoid(),
        hit=best.squeeze(1) * scale <= positive,
        effective_negatives=torch.where(empty, 0, (2 * n.masked_fill(empty, 0) - twice).exp()),
    )


def _two_sets(q: Tensor, k: Tensor | None, options: dict[str, Any]) -> Pairs:
    pairs = pairs_of(q, k, **options)
    return rounded(pairs, operand_dtype(pairs.x, pairs.y))._replace(symmetric=False)
