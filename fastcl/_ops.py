"""The kernels as torch operators: schemas, fakes and dispatch.

::

    s_ij = scale * <x_i, y_j> + row_bias_i + col_bias_j
    a pair (i, j) is kept where   drop_x_i != drop_y_j   and   only_x_i == only_y_j
                                  and   not s_ij > row_ceiling_i   and   not s_ij > col_ceiling_j
                                  and   not <guide_x_i, guide_y_j> > row_limit_i, nor > col_limit_j

    link        pair_reduce: row_i (M,)      weight w_ij of pair_grad
    exp         log sum_j e^s_ij             row_grad_i e^(s_ij - row_lse_i) + col_grad_j e^(s_ij - col_lse_j)
    softplus    sum_j log(1 + e^s_ij)        (row_grad_i + col_grad_j) sigmoid(s_ij)

    pair_reduce  -> row (M,), and with `both` the same over columns, col (N,); `keep`: pair_grad will follow
    pair_grad    -> dx_i = sum_j w_ij y_j (M, D)    dy_j = sum_i w_ij x_i (N, D)
                    row_sum_i = sum_j w_ij (M,)     col_sum_j = sum_i w_ij (N,)
    pair_reduce_grad -> row (M,), and dx, dy, row_sum of pair_grad for row_grad = 1. Where y is frozen, the gradient of
                    row i is row_grad_i times what the forward knows; where only the sum of all rows is wanted, so is
                    that of y. One operator, not two, because torch.compile moves an operator that only the backward
                    needs there, past the writes of a queue into its y.
    l2_normalize -> unit_i = x_i / length_i (M, D) in the dtype of x, length (M,); where a row is shorter than a normal
                    number its length is +inf
    l2_normalize_grad -> dx_i = (grad_i - unit_i <unit_i, grad_i>) / length_i (M, D) in the dtype of x
    contrastive  -> loss_a = -log sigmoid(p - n_a) of every anchor a, from rows x, y (B, D) that are made length 1 first
                    if `normalize`, and what its gradient needs. Anchors are the rows of x, and with `both` then those
                    of y; p is the logit of a row with its partner, n_a its log-sum-exp over the other rows. Without y,
                    x is stacked (2B, D): rows i and i + B are partners, and every row is an anchor against all others.
                    Only some backends have it; it equals the composition of the above. `keep`: its gradient follows.
    contrastive_grad -> gradients of x, y, and dots whose sum is the gradient of the scale (twice it without y)
    pair_topk    -> the largest s_ij of every row, descending (M, K), and their j (M, K);
                    -inf and -1 where fewer pairs are kept

Sums run over kept pairs only. Results are fp32 (fp64 for fp64 rows) whatever the dtype of the rows. ``scale`` does not
multiply dx and dy, so that ``sum <x, dx>`` is its gradient even where it is 0. An output not asked for is empty.
``symmetric`` promises that y is x and that s and its kept pairs are symmetric: then `both` and `want_dy` are not asked,
and the row and column sides of pair_grad are equal. ``backend`` is a name or "auto".
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backends import Pairs, Sides, chunked, select

_PAIRS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? drop_x, Tensor? drop_y, "
    "Tensor? only_x, Tensor? only_y, Tensor? row_ceiling, Tensor? col_ceiling, "
    "Tensor? guide_x, Tensor? guide_y, Tensor? row_limit, Tensor? col_limit, bool symmetric"
)
_SIDES = "Tensor? row_lse, Tensor? row_grad, Tensor? col_lse, Tensor? col_grad"
_WANT = "bool want_dx, bool want_dy, bool want_sums"
_N_PAIRS, _N_SIDES = len(Pairs._fields), len(Sides._fields)

torch.library.define(
    "fastcl::pair_reduce", f"(str link, {_PAIRS}, bool both, bool keep, str backend) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastcl::pair_grad", f"(str link, {_PAIRS}, {_SIDES}, {_WANT}, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "fastcl::pair_reduce_grad",
    f"(str link, {_PAIRS}, {_WANT}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("fastcl::pair_topk", f"({_PAIRS}, int topk, str backend) -> (Tensor, Tensor)")
torch.library.define(
    "fastcl::contrastive",
    "(Tensor x, Tensor? y, Tensor scale, ScalarType dtype, bool normalize, bool both, bool keep, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastcl::contrastive_grad",
    "(Tensor x, Tensor? y, Tensor scale, Tensor grad, Tensor z, Tensor length, Tensor positive, Tensor lse, "
    "Tensor keys, Tensor ranges, bool want_x, bool want_y, str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("fastcl::l2_normalize", "(Tensor x, str backend) -> (Tensor, Tensor)")
torch.library.define("fastcl::l2_normalize_grad", "(Tensor x, Tensor length, Tensor grad, str backend) -> Tensor")


@torch.library.impl("fastcl::pair_reduce", "CompositeExplicitAutograd")
def _reduce(link: str, *args: Any) -> tuple[Tensor, Tensor]:
    pairs, (both, keep, backend) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS:]
    return _kernels("reduce", pairs, backend).reduce(link, pairs, both, keep)


@torch.library.impl("fastcl::pair_grad", "CompositeExplicitAutograd")
def _grad(link: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, (row_lse, row_grad, col_lse, col_grad) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS : _N_PAIRS + _N_SIDES]
    sides = Sides(_empty_to_inf(row_lse), row_grad, _empty_to_inf(col_lse), col_grad)
    *want, backend = args[_N_PAIRS + _N_SIDES :]
    return _kernels("grad", pairs, backend).grad(link, pairs, sides, *want)


@torch.library.impl("fastcl::pair_reduce_grad", "CompositeExplicitAutograd")
def _reduce_grad(link: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, (*want, backend) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS:]
    kernels = _kernels("grad", pairs, backend)
    if hasattr(kernels, "reduce_grad") and (done := kernels.reduce_grad(link, pairs, *want)) is not None:
        return done
    row, _ = kernels.reduce(link, pairs, False, True)
    unit = Sides(_empty_to_inf(row), torch.ones_like(row))
    want_dx, want_dy, want_sums = want
    dx, dy, row_sum, _ = kernels.grad(link, pairs, unit, want_dx, want_dy, want_sums)
    return row, dx, dy, row_sum


@torch.library.impl("fastcl::pair_topk", "CompositeExplicitAutograd")
def _topk(*args: Any) -> tuple[Tensor, Tensor]:
    pairs, (topk, backend) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS:]
    return _kernels("topk", pairs, backend).topk(pairs, topk)


@torch.library.impl("fastcl::contrastive", "CompositeExplicitAutograd")
def _contrastive(x: Tensor, y: Tensor | None, scale: Tensor, dtype: torch.dtype, *args: Any) -> tuple[Tensor, ...]:
    *flags, backend = args
    return select("contrastive", _operand(x, dtype), backend).contrastive(x, y, scale, dtype, *flags)


@torch.library.impl("fastcl::contrastive_grad", "CompositeExplicitAutograd")
def _contrastive_grad(
    x: Tensor, y: Tensor | None, scale: Tensor, grad: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *saved, want_x, want_y, backend = args
    kernels = select("contrastive", _operand(x, saved[0].dtype), backend)
    return kernels.contrastive_grad(x, y, scale, grad, saved, want_x, want_y)


def fuses(x: Tensor, dtype: torch.dtype, backend: str) -> bool:
    """Whether the backend for such rows, multiplied in ``dtype``, has ``contrastive`` for them."""
    rows = _operand(x, dtype)
    kernels = select("reduce", rows, backend)
    return hasattr(kernels, "contrastive") and kernels.unsupported("contrastive", rows) is None


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows like those that will be multiplied, by which a backend is chosen."""
    return x if x.dtype == dtype else x.new_empty((2, x.shape[1]), dtype=dtype)


@torch.library.impl("fastcl::l2_normalize", "CompositeExplicitAutograd")
def _l2_normalize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return getattr(select("normalize", x, backend), "normalize", chunked.normalize)(x)


@torch.library.impl("fastcl::l2_normalize_grad", "CompositeExplicitAutograd")
def _l2_normalize_grad(x: Tensor, length: Tensor, grad: Tensor, backend: str) -> Tensor:
    return getattr(select("normalize", x, backend), "normalize_grad", chunked.normalize_grad)(x, length, grad)


def _kernels(op: str, pairs: Pairs, backend: str) -> ModuleType:
    return select(op if pairs.guide_x is None else "guided", pairs.x, backend)


def _empty_to_inf(lse: Tensor | None) -> Tensor | None:
    """A row without kept pairs has lse -inf; its weights are e^(s - inf) = 0."""
    return None if lse is None else lse.masked_fill(lse == -torch.inf, torch.inf)


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.promote_types(like.dtype, torch.float32))


@torch.library.register_fake("fastcl::pair_reduce")
def _fake_reduce(link: str, x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    both = args[-3]
    return _new(x, x.shape[0]), _new(x, y.shape[0] if both else 0)


@torch.library.register_fake("fastcl::pair_grad")
def _fake_grad(link: str, x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_dx, want_dy, want_sums, _ = args[-4:]
    return (
        _new(x, *x.shape) if want_dx else _new(x, 0),
        _new(y, *y.shape) if want_dy else _new(y, 0),
        _new(x, x.shape[0] if want_sums else 0),
        _new(x, y.shape[0] if want_sums else 0),
    )


@torch.library.register_fake("fastcl::pair_reduce_grad")
def _fake_reduce_grad(link: str, x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want_dx, want_dy, want_sums, _ = args[-4:]
    m = x.shape[0]
    return (
        _new(x, m),
        _new(x, *x.shape) if want_dx else _new(x, 0),
        _new(y, *y.shape) if want_dy else _new(y, 0),
        _new(x, m if want_sums else 0),
    )


@torch.library.register_fake("fastcl::pair_topk")
def _fake_topk(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    topk = args[-2]
    return _new(x, x.shape[0], topk), x.new_empty((x.shape[0], topk), dtype=torch.long)


@torch.library.register_fake("fastcl::contrastive")
def _fake_contrastive(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    dtype: torch.dtype,
    normalize: bool,
    both: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    rows, d = x.shape[0] * (1 if y is None else 2), x.shape[1]
    anchors = rows if y is None or both else x.shape[0]
    # ranges of keys are those of _cuda._SHORTEST_RANGE rows, of every backend
    is_native = backend == "native" or (backend == "auto" and x.device.type == "cpu")
    keys = x.new_empty(rows, dtype=torch.int64 if is_native else torch.int32)
    return (
        _new(x, anchors), x.new_empty((rows, d), dtype=dtype), _new(x, rows if normalize else 0), _new(x, rows),
        _new(x, anchors), keys, keys.new_empty(-(-rows // 16), 2),
    )  # fmt: skip


@torch.library.register_fake("fastcl::contrastive_grad")
def _fake_contrastive_grad(
    x: Tensor, y: Tensor | None, scale: Tensor, grad: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    want_x, want_y, _ = args[-3:]
    dx = x.new_empty(x.shape if want_x else (0,))
    dy = x.new_empty(0) if y is None or not want_y else y.new_empty(y.shape)
    return dx, dy, _new(x, x.shape[0] * (1 if y is None or not want_y else 2))


@torch.library.register_fake("fastcl::l2_normalize")
def _fake_l2_normalize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _new(x, x.shape[0])


@torch.library.register_fake("fastcl::l2_normalize_grad")
def _fake_l2_normalize_grad(x: Tensor, length: Tensor, grad: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def l2_normalize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """One operator where launching a dozen takes longer than they do; torch.compile fuses them on a GPU."""
    if torch.compiler.is_compiling() and x.device.type != "cpu":
        return chunked.normalize(x)
    return torch.ops.fastcl.l2_normalize(x, backend)


def l2_normalize_grad(x: Tensor, length: Tensor, grad: Tensor, backend: str) -> Tensor:
    if torch.compiler.is_compiling() and x.device.type != "cpu":
        return chunked.normalize_grad(x, length, grad)
    return torch.ops.fastcl.l2_normalize_grad(x, length, grad, backend)


pair_reduce = torch.ops.fastcl.pair_reduce.default
pair_grad = torch.ops.fastcl.pair_grad.default
pair_reduce_grad = torch.ops.fastcl.pair_reduce_grad.default
pair_topk = torch.ops.fastcl.pair_topk.default
contrastive = torch.ops.fastcl.contrastive.default
contrastive_grad = torch.ops.fastcl.contrastive_grad.default
