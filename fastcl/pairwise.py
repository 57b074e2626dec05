"""Differentiable reductions over all pairs of rows, without the pair matrix.

Every function here looks at the implicit matrix of logits

    s_ij = scale * <q_i, k_j> + row_bias_i + col_bias_j

and reduces over the pairs that are *kept*. Which pairs those are is said with integers, one per row, so a mask costs
O(N): ``drop`` forgets pairs whose keys are equal ("not itself": ``drop=torch.arange(N)``), ``only`` forgets pairs whose
keys differ ("same class": ``only=labels``), ``ceiling`` forgets pairs whose logit is above the row's ("no harder than
the positive by delta": ``ceiling=positive + delta``), and ``guide`` forgets pairs that a second pair of embeddings
finds more similar than the row's limit ("what a guide model takes for a positive"), whose matrix is not stored either.

Rows may be float16, bfloat16, float32 or float64. Under ``torch.autocast`` the operands are rounded to its dtype;
logits, sums and gradients are fp32 (fp64 for fp64 rows) in any case. Gradients have the dtype of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from . import _across, _checks, _gathered, _ops
from ._checks import Scalar, sentence
from .backends import Pairs, forced

Keys = Tensor | tuple[Tensor, Tensor] | None  # one tensor for both sides, or (row keys, column keys)
Guide = tuple[Tensor, Tensor, Tensor] | None  # (features of rows, features of columns, limits of rows)


_ONE_DERIVATIVE = (
    "got a second derivative (create_graph=True) through a fused fastcl loss; expected one backward pass. "
    "Use the function of the same name in fastcl.reference, which is plain differentiable torch."
)
_NO_TRANSFORMS = (
    "got a torch.func transform (vmap, grad, jvp) around a fused fastcl loss; expected plain autograd. "
    "Use the function of the same name in fastcl.reference, which is plain torch."
)


def pair_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Scalar,
    row_bias: Scalar | None = None,
    col_bias: Scalar | None = None,
    drop: Keys = None,
    only: Keys = None,
    ceiling: Tensor | None = None,
    guide: Guide = None,
    both: bool = False,
) -> Any:
    r"""Log-sum-exp of the kept logits of every row.

    .. math:: r_i = \log \sum_{j \text{ kept}} e^{s_{ij}}

    Args:
        q: ``(M, D)`` rows.
        k: ``(N, D)`` columns; ``q`` itself when omitted, which costs less than half.
        scale: a number other than 0, or a 0-d tensor, which receives a gradient. May be negative.
        row_bias: a number, a 0-d tensor or ``(M,)``, in logits; a tensor receives a gradient.
        col_bias: the same for columns, ``(N,)``.
        drop: integer keys; pairs with equal keys are forgotten.
        only: integer keys; pairs with different keys are forgotten.
        ceiling: ``(M,)`` logits; pairs above their row's are forgotten. It receives no gradient.
        guide: ``(M, G)``, ``(N, G)`` and ``(M,)``; pairs whose inner product of such features is above their row's
            limit are forgotten. They receive no gradient.
        both: also return the log-sum-exp of every column.

    Returns:
        ``(M,)``, or the pair ``(M,), (N,)`` with ``both=True``; fp32, or fp64 for fp64 rows. ``-inf`` where a row has
        no kept pair; such a row sends no gradient.

    Raises:
        TypeError: rows that are not floating-point matrices, keys that are not integers.
        ValueError: shapes or devices that do not fit, a scale of 0.
        RuntimeError: a second derivative or a ``torch.func`` transform; a forced backend that cannot do it.

    Where ``k`` receives no gradient, that of ``q`` is computed in the forward pass: the backward then reads neither
    ``k`` nor anything of size N, and ``k`` may be overwritten before it (a queue of keys may move on).
    """
    return _reduce("exp", q, k, scale, row_bias, col_bias, drop, only, ceiling, guide, both)


def pair_softplus_sum(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Scalar,
    row_bias: Scalar | None = None,
    col_bias: Scalar | None = None,
    drop: Keys = None,
    only: Keys = None,
    ceiling: Tensor | None = None,
    guide: Guide = None,
    both: bool = False,
) -> Any:
    r"""Sum of the softplus of the kept logits of every row, :math:`\sum_{j \text{ kept}} \log(1 + e^{s_{ij}})`.

    Arguments, result and errors are those of :func:`pair_logsumexp`; a row with no kept pair gives 0.
    """
    return _reduce("softplus", q, k, scale, row_bias, col_bias, drop, only, ceiling, guide, both)


def pair_softplus_total(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Scalar,
    row_bias: Scalar | None = None,
    drop: Keys = None,
    only: Keys = None,
    ceiling: Tensor | None = None,
    guide: Guide = None,
) -> Tensor:
    r"""Sum of the softplus of all kept logits, :math:`\sum_{ij \text{ kept}} \log(1 + e^{s_{ij}})`.

    The sum of :func:`pair_softplus_sum`, for less: a weight does not depend on other pairs, so the gradients are
    computed in the forward pass, over the same tiles, and the backward multiplies them by a number.

    Arguments and errors are those of :func:`pair_softplus_sum`.

    Returns:
        A scalar; fp32, or fp64 for fp64 rows.
    """
    if (across := _across.current()) is not None:
        options = {"scale": scale, "row_bias": row_bias, "drop": drop, "only": only, "ceiling": ceiling, "guide": guide}
        return across.reduce("softplus", pair_softplus_total, q, q if k is None else k, options)
    # Of two sets, even if they are one: then autograd adds both gradients.
    pairs = pairs_of(q, q if k is None else k, scale, row_bias, None, drop, only, ceiling, guide, both=True)
    dtype = operand_dtype(pairs.x, pairs.y)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in pairs):
        return apply(_SoftplusTotal, forced(), dtype, *pairs)
    row, _ = _ops.pair_reduce("softplus", *rounded(pairs, dtype), False, False, forced())
    return row.sum()


def contrastive(
    q: Tensor, k: Tensor | None = None, *, scale: Scalar, normalize: bool = False, both: bool = False
) -> Tensor | None:
    r"""One fused operation for the losses of SimCLR, InfoNCE and CLIP, where the backend has one, else ``None``.

    :math:`-\log \sigma(p_a - n_a)` for every anchor a, with the logit p of its partner and the log-sum-exp n of its
    logits with all other rows; it equals the formulas in ``fastcl.functional``, in a few launches.

    Args:
        q: ``(B, D)`` anchors, row i the partner of row i of ``k``; without ``k`` two stacked views ``(2B, D)``, where
            rows i and i + B are partners and every row is an anchor.
        k: ``(B, D)``.
        scale: inverse temperature: a number, or a 0-d tensor, which receives a gradient.
        normalize: make rows length 1 first.
        both: rows of ``k`` are anchors, too, against those of ``q``.

    Returns:
        Losses of the rows of ``q``, then (``both``) of those of ``k``; fp32. ``None`` where the backend of such rows
        does not have the operation, and under ``torch.compile``, which fuses the formulas itself.

    Raises:
        TypeError, ValueError: rows or a scale that do not fit, as in :func:`pair_logsumexp`.
    """
    if k is None:
        _checks.stacked(q)
    else:
        _checks.same_rows(q=q, k=k)
    _check_scale(scale)
    _checks.flag(normalize=normalize, both=both)
    y = q if k is None else k
    dtype = operand_dtype(q, y)
    if torch.compiler.is_compiling() or y.dtype != q.dtype or not len(q) or dtype == torch.float64:
        return None
    if _across.current() is not None:
        return None
    if not _ops.fuses(q, dtype, forced()):
        return None
    scale = as_tensor(scale, q).to(_compute_dtype(dtype))
    keep = torch.is_grad_enabled() and (q.requires_grad or y.requires_grad or scale.requires_grad)
    k = None if k is None else _distinct(k, q)
    return apply(_Contrastive, q, k, scale, forced(), dtype, normalize, both, keep)


def merge_logsumexp(*parts: Tensor) -> Tensor:
    """Log-sum-exp of blocks of columns that were reduced one by one (batch, hard negatives, queue): each ``(M,)``.

    A row that is empty (``-inf``) in every block stays ``-inf`` and sends no gradient.
    """
    _checks.count("the number of parts", len(parts), mend="Pass the log-sum-exp of every block of columns.")
    _checks.elements("part 0", parts[0])
    for number, part in enumerate(parts):
        _checks.vector(f"part {number}", part, parts[0].numel(), parts[0])
    stack = torch.stack(parts)
    empty = (stack == -torch.inf).all(0)
    # logsumexp differentiates an all-empty row to NaN: it is given a harmless one instead
    return torch.where(empty, -torch.inf, stack.masked_fill(empty, 0).logsumexp(0))


def row_dot(q: Tensor, k: Tensor) -> Tensor:
    """Inner product of row ``i`` of ``q`` with row ``i`` of ``k``: the positive pairs.

    Args:
        q, k: ``(M, D)``.

    Returns:
        ``(M,)`` fp32 (fp64), from operands rounded exactly as those of the pair reductions are.
    """
    _checks.same_rows(q=q, k=k)
    dtype = operand_dtype(q, k)
    if q.dtype == k.dtype == dtype == _compute_dtype(dtype):  # nothing to round: autograd does the rest, for less
        return products(q, k).sum(1)
    return apply(_RowDot, q, _distinct(k, q), dtype)


def gathered_dot(q: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Inner products of every row with rows of a table that are chosen for it: negatives that were sampled.

    Args:
        q: ``(M, D)``.
        table: ``(T, D)``.
        index: ``(M, K)`` integers in [0, T).

    Returns:
        ``(M, K)`` fp32 (fp64), from operands rounded exactly as those of the pair reductions are. Beside it and the
        gradients no more than a few chunks of gathered rows are stored, forward and backward.
    """
    _checks.rows(q=q, table=table)
    _checks.matrix("index", index, q.shape[0], q)
    return apply(_GatheredDot, q, _distinct(table, q), index, operand_dtype(q, table))


def listed_dot(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products of listed pairs of rows: pairs that a miner chose.

    Args:
        q: ``(M, D)``.
        k: ``(N, D)``.
        rows, columns: ``(P,)`` integers in [0, M) and [0, N); pair p is ``q[rows[p]]`` and ``k[columns[p]]``.

    Returns:
        ``(P,)`` fp32 (fp64), from operands rounded exactly as those of the pair reductions are. Beside it and the
        gradients no more than a few chunks of gathered rows are stored, forward and backward.
    """
    _checks.rows(q=q, k=k)
    _checks.elements("rows", rows, integer=True)
    _checks.vector("rows", rows, rows.numel(), q, integer=True)
    _checks.vector("columns", columns, len(rows), q, integer=True)
    return apply(_ListedDot, q, _distinct(k, q), rows, _distinct(columns, rows), operand_dtype(q, k))


def scale_gradient(x: Tensor, factor: Scalar) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor``."""
    _checks.elements("x", x)
    _checks.scalar("factor", factor)
    still = x.detach()
    if isinstance(factor, Tensor):
        factor = factor.detach()
    # x - still is 0, and carries the gradient; where x is NaN or infinite the result is NaN
    return still + ((x - still) * factor).to(x.dtype)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows of Euclidean length 1.

    Args:
        x: ``(M, D)``.

    Returns:
        ``(M, D)`` in the dtype of ``x``, computed in fp32 (fp64). Rows from the smallest normal number to the largest
        finite one are right in every dtype (the squares of neither over- nor underflow); a shorter row, such as a zero
        row, gives a zero row and a zero gradient.
    """
    _checks.rows(x=x)
    return apply(_Normalize, x, forced())


@torch.no_grad()
def pair_argmax(q: Tensor, k: Tensor | None = None, **options: Any) -> Tensor:
    """Index of the most similar (or with ``largest=False`` the least similar) kept column of every row.

    Args:
        q, k, options: those of :func:`pair_topk`, without ``topk``.

    Returns:
        ``(M,)`` int64; the first index among equals, -1 where no pair is kept.
    """
    return pair_topk(q, k, topk=1, **options)[1].squeeze(1)


@torch.no_grad()
def pair_topk(
    q: Tensor,
    k: Tensor | None = None,
    *,
    topk: int,
    col_bias: Tensor | None = None,
    drop: Keys = None,
    only: Keys = None,
    ceiling: Tensor | None = None,
    largest: bool = True,
) -> tuple[Tensor, Tensor]:
    """The ``topk`` most similar (or least similar) kept columns of every row, best first.

    Args:
        q: ``(M, D)``.
        k: ``(N, D)``; ``q`` itself when omitted.
        topk: how many, at least 1.
        col_bias: ``(N,)``, added to the similarities; with -|k_j|^2 / 2 the most similar is the nearest.
        drop, only: keys, as in :func:`pair_logsumexp`.
        ceiling: ``(M,)``; pairs more similar than their row's (with ``largest=False`` less similar) are forgotten.

    Returns:
        Similarities ``<q_i, k_j> + col_bias_j``, ``(M, topk)`` fp32 (fp64), and indices, ``(M, topk)`` int64. Where
        fewer pairs are kept the index is -1 and the similarity -inf (+inf with ``largest=False``). No gradient.
    """
    _checks.count("topk", topk)
    _checks.flag(largest=largest)
    if (across := _across.current()) is not None:
        options = {"topk": topk, "col_bias": col_bias, "drop": drop, "only": only, "ceiling": ceiling}
        return across.topk(pair_topk, q, q if k is None else k, {**options, "largest": largest})
    sign = 1.0 if largest else -1.0
    _refuse_transforms()
    col_bias, ceiling = (t if t is None or largest else -t for t in (col_bias, ceiling))
    pairs = pairs_of(q, k, sign, col_bias=col_bias, drop=drop, only=only, ceiling=ceiling)
    values, indices = _ops.pair_topk(*rounded(pairs, operand_dtype(pairs.x, pairs.y)), topk, forced())
    return values * sign, indices


def _reduce(
    link: str,
    q: Tensor,
    k: Tensor | None,
    scale: Scalar,
    row_bias: Scalar | None,
    col_bias: Scalar | None,
    drop: Keys,
    only: Keys,
    ceiling: Tensor | None,
    guide: Guide,
    both: bool,
) -> Any:
    _checks.flag(both=both)
    if (across := _across.current()) is not None:
        masks = {"drop": drop, "only": only, "ceiling": ceiling, "guide": guide}
        options = {"scale": scale, "row_bias": row_bias, "col_bias": col_bias, **masks, "both": both}
        return across.reduce(link, partial(_reduce, link), q, q if k is None else k, options)
    pairs = pairs_of(q, k, scale, row_bias, col_bias, drop, only, ceiling, guide, both)
    dtype = operand_dtype(pairs.x, pairs.y)
    needs_grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in pairs)
    frozen_k = not (pairs.symmetric or both or pairs.y.requires_grad)
    frozen_k = frozen_k and (pairs.col_bias is None or not pairs.col_bias.requires_grad)
    if needs_grad and frozen_k:
        return apply(_ReduceFrozen, link, forced(), dtype, *pairs)
    row, col = apply(_Reduce, link, forced(), dtype, both, needs_grad, *pairs)
    return (row, col) if both else row


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """torch's decorator of that name, in our words, and also where the upstream gradient is a constant."""

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            result = backward(ctx, *grads)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _SecondDerivative.apply(torch.empty(0, requires_grad=True), *result)
        return result

    return once


class _SecondDerivative(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated; the first argument only makes autograd record it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Any, ...]:
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(_ONE_DERIVATIVE)


class _Reduce(torch.autograd.Function):
    """A pair reduction whose backward computes the tiles again."""

    @staticmethod
    def forward(
        ctx: Any, link: str, backend: str, dtype: torch.dtype, both: bool, keep: bool, *args: Any
    ) -> tuple[Tensor, Tensor]:
        pairs = Pairs(*args)
        ctx.dtypes = [None if t is None else t.dtype for t in args[:5]]
        pairs = rounded(pairs, dtype)
        row, col = _ops.pair_reduce(link, *pairs, both, keep, backend)
        ctx.link, ctx.backend, ctx.symmetric, ctx.both = link, backend, pairs.symmetric, both
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(row, col, *tuple(pairs)[:-1])
        if not both:
            ctx.mark_non_differentiable(col)
        return row, col

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor | None, col_grad: Tensor | None) -> tuple[Any, ...]:
        row, col, *saved = ctx.saved_tensors
        pairs = Pairs(*(*saved, ctx.symmetric))
        want_q, want_k, want_scale, want_row_bias, want_col_bias = ctx.needs_input_grad[5:10]
        if not ctx.both:  # torch.compile sends zeros where eager sends None
            col_grad = None
        if row_grad is None and col_grad is None:
            return (None,) * (5 + len(pairs))
        row_side = (None, None) if row_grad is None else (row, row_grad)
        col_side = (None, None) if col_grad is None else (col, col_grad)
        if pairs.symmetric:
            col_side = row_side
        dq, dk, row_sum, col_sum = _ops.pair_grad(
            ctx.link, *pairs, *row_side, *col_side,
            want_q or want_scale, want_k and not pairs.symmetric, want_row_bias or want_col_bias, ctx.backend,
        )  # fmt: skip
        # A symmetric pass sees every pair from both of its sides, so it counts scale and biases twice.
        half = 0.5 if pairs.symmetric else 1.0
        if pairs.symmetric:
            col_sum = row_sum
        dscale = products(pairs.x, dq).sum() * half if want_scale else None
        grads = (
            dq.mul_(pairs.scale) if want_q else None,
            dk.mul_(pairs.scale) if want_k and not pairs.symmetric else None,
            dscale,
            row_sum * half if want_row_bias else None,
            col_sum * half if want_col_bias else None,
        )
        cast = (None if g is None else g.to(t) for g, t in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, None, None, *cast, *(None,) * (len(pairs) - 5)


class _ReduceFrozen(torch.autograd.Function):
    """A pair reduction over columns that receive no gradient.

    The gradient of row i is then its upstream gradient times a vector that the forward can compute, so the backward is
    elementwise and does not read k.
    """

    @staticmethod
    def forward(ctx: Any, link: str, backend: str, dtype: torch.dtype, *args: Any) -> Tensor:
        pairs = Pairs(*args)
        ctx.dtypes = [None if t is None else t.dtype for t in args[:4]]
        pairs = rounded(pairs, dtype)
        want_q, _, want_scale, want_row_bias = ctx.needs_input_grad[3:7]
        row, dq, _, row_sum = _ops.pair_reduce_grad(link, *pairs, want_q or want_scale, False, want_row_bias, backend)
        dscale = products(pairs.x, dq).sum(1) if want_scale else None
        ctx.save_for_backward(dq.mul_(pairs.scale) if want_q else None, dscale, row_sum if want_row_bias else None)
        return row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dq, dscale, row_sum = ctx.saved_tensors
        q_dtype, _, scale_dtype, bias_dtype = ctx.dtypes
        return (
            None, None, None,
            None if dq is None else (grad[:, None] * dq).to(q_dtype),
            None,
            None if dscale is None else (grad * dscale).sum().to(scale_dtype),
            None if row_sum is None else (grad * row_sum).to(bias_dtype),
            *(None,) * (len(Pairs._fields) - 4),
        )  # fmt: skip


class _SoftplusTotal(torch.autograd.Function):
    """A sum over all pairs, whose gradients are known when it is: the backward multiplies them by a number."""

    @staticmethod
    def forward(ctx: Any, backend: str, dtype: torch.dtype, *args: Any) -> Tensor:
        pairs = Pairs(*args)
        ctx.dtypes = [None if t is None else t.dtype for t in args[:4]]
        pairs = rounded(pairs, dtype)
        want_q, want_k, want_scale, want_row_bias = ctx.needs_input_grad[2:6]
        row, dq, dk, row_sum = _ops.pair_reduce_grad(
            "softplus", *pairs, want_q or want_scale, want_k, want_row_bias, backend
        )
        ctx.save_for_backward(
            dq.mul(pairs.scale) if want_q else None,
            dk.mul_(pairs.scale) if want_k else None,
            products(pairs.x, dq).sum() if want_scale else None,
            row_sum if want_row_bias else None,
        )
        return row.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = (None if t is None else (grad * t).to(d) for t, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, *grads, *(None,) * (len(Pairs._fields) - 4)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        scale: Tensor,
        backend: str,
        dtype: torch.dtype,
        *flags: bool,
    ) -> Tensor:
        loss, *saved = _ops.contrastive(q, k, scale, dtype, *flags, backend)
        ctx.backend = backend
        ctx.save_for_backward(q, k, scale, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, scale, *saved = ctx.saved_tensors
        want_q, want_k, want_scale, *_ = ctx.needs_input_grad
        dq, dk, dots = _ops.contrastive_grad(q, k, scale, grad, *saved, want_q or want_scale, want_k, ctx.backend)
        dscale = None
        if want_scale:  # in one set a pair counts for both of its rows; in two, dots of the second follow the first's
            dscale = 0.5 * dots.sum() if k is None else dots[: len(q)].sum()
        return dq if want_q else None, dk if want_k else None, dscale, *(None,) * 5


class _RowDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = q.dtype, k.dtype
        x, y = q.to(dtype), k.to(dtype)
        ctx.save_for_backward(x, y)
        compute = _compute_dtype(dtype)
        return products(x.to(compute), y.to(compute)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y = ctx.saved_tensors
        want_q, want_k, _ = ctx.needs_input_grad
        q_dtype, k_dtype = ctx.dtypes
        g = grad[:, None]
        return (g * y).to(q_dtype) if want_q else None, (g * x).to(k_dtype) if want_k else None, None


class _GatheredDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = q.dtype, table.dtype
        x, y = q.to(dtype).contiguous(), table.to(dtype).contiguous()
        ctx.save_for_backward(x, y, index)
        return _gathered.gathered_dot(x, y, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        want = ctx.needs_input_grad[:2]
        grads = _gathered.gathered_dot_grad(grad.contiguous(), *ctx.saved_tensors, *want)
        return *_wanted(grads, want, ctx.dtypes), None, None


class _ListedDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = q.dtype, k.dtype
        x, y = q.to(dtype).contiguous(), k.to(dtype).contiguous()
        ctx.save_for_backward(x, y, rows, columns)
        return _gathered.listed_dot(x, y, rows, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        want = ctx.needs_input_grad[:2]
        grads = _gathered.listed_dot_grad(grad, *ctx.saved_tensors, *want)
        return *_wanted(grads, want, ctx.dtypes), None, None, None


def _wanted(grads: Sequence[Tensor], want: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    return [g.to(dtype) if w else None for g, w, dtype in zip(grads, want, dtypes, strict=True)]


def products(a: Tensor, b: Tensor) -> Tensor:
    """Of their numbers, contiguous: torch adds in the order of memory, and sums must not depend on strides."""
    return a.contiguous() * b.contiguous()


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        unit, length = _ops.l2_normalize(x, backend)
        ctx.backend = backend
        ctx.save_for_backward(x, length)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, length = ctx.saved_tensors
        return _ops.l2_normalize_grad(x, length, grad, ctx.backend), None


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, with torch.func's transforms refused in our words."""
    _refuse_transforms()
    return function.apply(*args)


def _refuse_transforms() -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(_NO_TRANSFORMS)


def pairs_of(
    q: Tensor,
    k: Tensor | None,
    scale: Scalar,
    row_bias: Scalar | None = None,
    col_bias: Scalar | None = None,
    drop: Keys = None,
    only: Keys = None,
    ceiling: Tensor | None = None,
    guide: Guide = None,
    both: bool = False,
) -> Pairs:
    """Everything checked, scalars as tensors on the device of the rows."""
    one_set = k is None or k is q
    y = q if k is None else k
    _checks.rows(q=q, k=y)
    y = _distinct(y, q)
    _check_scale(scale)
    if ceiling is not None:
        _checks.vector("ceiling", ceiling, q.shape[0], q)
    guide_x, guide_y, limit = (None, None, None) if guide is None else _guide(guide, q, y)
    drop_x, drop_y = _keys("drop", drop, q, y)
    only_x, only_y = _keys("only", only, q, y)
    equal_biases = row_bias is col_bias or (_is_uniform(row_bias) and _is_uniform(col_bias))
    return Pairs(
        x=q,
        y=y,
        scale=as_tensor(scale, q),
        row_bias=_bias("row_bias", row_bias, q),
        col_bias=_bias("col_bias", col_bias, y, row_bias),
        drop_x=drop_x,
        drop_y=drop_y,
        only_x=only_x,
        only_y=only_y,
        row_ceiling=None if ceiling is None else ceiling.detach(),
        guide_x=guide_x,
        guide_y=guide_y,
        row_limit=limit,
        symmetric=(
            one_set
            and _is_shared(drop)
            and _is_shared(only)
            and ceiling is None
            and guide is None
            and equal_biases
            and not both
        ),
    )


def _guide(guide: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not (isinstance(guide, tuple) and len(guide) == 3):
        got = f"guide of {len(guide)} parts" if isinstance(guide, tuple) else f"guide of type {type(guide).__name__}"
        mend = "Pass guide=(features of rows, features of columns, limit of every row)."
        raise TypeError(sentence(got, "a tuple of three tensors", mend))
    of_rows, of_columns, limit = guide
    named = {"guide (of the rows)": of_rows, "guide (of the columns)": of_columns}
    _checks.rows(**named)
    for (name, features), rows in zip(named.items(), (q, k), strict=True):
        if len(features) != len(rows):
            got = f"{name} of shape {tuple(features.shape)} for {len(rows)} rows"
            raise ValueError(sentence(got, "one row of guide features per row", "Guide the same batch."))
    _checks.vector("guide (limits)", limit, len(q), q)
    dtype = _compute_dtype(torch.promote_types(of_rows.dtype, of_columns.dtype))
    of_rows, of_columns = of_rows.detach(), of_columns.detach()
    return of_rows, _distinct(of_columns, of_rows), limit.detach().to(dtype)


def _check_scale(scale: Scalar) -> None:
    _checks.scalar("scale", scale)
    if not isinstance(scale, Tensor) and scale == 0:
        raise ValueError(sentence("scale = 0", "any other number", "Choose one: with 0 all logits are equal."))


def _keys(name: str, keys: Keys, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if keys is None:
        return None, None
    if isinstance(keys, tuple) and len(keys) != 2:
        mend = f"Pass {name}=(keys of rows, keys of columns)."
        raise TypeError(sentence(f"{name} of {len(keys)} parts", "one tensor of keys, or a tuple of two", mend))
    row_keys, col_keys = keys if isinstance(keys, tuple) else (keys, keys)
    _checks.vector(f"{name} (of the rows)", row_keys, q.shape[0], q, integer=True)
    _checks.vector(f"{name} (of the columns)", col_keys, k.shape[0], k, integer=True)
    return row_keys.long(), _distinct(col_keys, row_keys).long()


def _is_shared(keys: Keys) -> bool:
    return not isinstance(keys, tuple) or keys[0] is keys[1]


def _distinct(t: Tensor, other: Tensor) -> Tensor:
    """``t`` under another name, for torch.compile refuses one tensor in two arguments of an autograd.Function."""
    return t.view_as(t) if t is other else t


def _bias(name: str, bias: Scalar | None, rows: Tensor, other: Scalar | None = None) -> Tensor | None:
    if bias is None:
        return None
    if _is_uniform(bias):
        _checks.scalar(name, bias)
        return as_tensor(bias, rows).expand(rows.shape[0])
    assert isinstance(bias, Tensor)
    _checks.vector(name, bias, rows.shape[0], rows)
    return bias.view_as(bias) if bias is other else bias


def _is_uniform(bias: Scalar | None) -> bool:
    return not isinstance(bias, Tensor) or bias.ndim == 0


def as_tensor(value: Scalar, rows: Tensor) -> Tensor:
    """A scalar on the device of rows; a number gets the dtype of their logits."""
    if isinstance(value, Tensor):
        return value.to(rows.device)
    return torch.full((), value, dtype=_compute_dtype(rows.dtype), device=rows.device)


def rounded(pairs: Pairs, dtype: torch.dtype) -> Pairs:
    """Operands in the dtype of the kernels, the numbers beside them in the dtype of the results."""
    compute = _compute_dtype(dtype)
    x = pairs.x.to(dtype)

    def number(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(compute)

    return Pairs(  # torch 2.6 cannot compile _replace()
        x,
        x if pairs.symmetric else pairs.y.to(dtype),
        pairs.scale.to(compute),
        number(pairs.row_bias),
        number(pairs.col_bias),
        pairs.drop_x,
        pairs.drop_y,
        pairs.only_x,
        pairs.only_y,
        number(pairs.row_ceiling),
        number(pairs.col_ceiling),
        pairs.guide_x,
        pairs.guide_y,
        pairs.row_limit,
        pairs.col_limit,
        pairs.symmetric,
    )


def joined(*parts: Tensor) -> Tensor:
    """Rows one under the other. Autocast, whose ``torch.cat`` refuses fp16 rows beside bf16, is off here."""
    device = parts[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return torch.cat(parts)
    with torch.autocast(device, enabled=False):
        return torch.cat(parts)


def operand_dtype(q: Tensor, k: Tensor) -> torch.dtype:
    """In which dtype rows are multiplied: the wider of theirs, or autocast's."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    device = q.device.type
    if dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
