"""The kernels as torch operators: schemas, fakes and dispatch.

::

    s_ij = scale * <x_i, y_j> + row_bias_i + col_bias_j
    a pair (i, j) is kept where   drop_x_i != drop_y_j   and   only_x_i == only_y_j
                                  and   not s_ij > row_ceiling_i   and   not s_ij > col_ceiling_j

    link        pair_reduce: row_i (M,)      weight w_ij of pair_grad
    exp         log sum_j e^s_ij             row_grad_i e^(s_ij - row_lse_i) + col_grad_j e^(s_ij - col_lse_j)
    softplus    sum_j log(1 + e^s_ij)        (row_grad_i + col_grad_j) sigmoid(s_ij)

    pair_reduce  -> row (M,), and with `both` the same over columns, col (N,); `keep`: pair_grad will follow
    pair_grad    -> dx_i = sum_j w_ij y_j (M, D)    dy_j = sum_i w_ij x_i (N, D)
                    row_sum_i = sum_j w_ij (M,)     col_sum_j = sum_i w_ij (N,)
    pair_reduce_grad -> row (M,), and dx, row_sum of pair_grad for row_grad = 1: where y is frozen, the gradient of
                    row i is row_grad_i times what the forward knows. One operator, not two, because torch.compile
                    moves an operator that only the backward needs there, past the writes of a queue into its y.
    l2_normalize -> unit_i = x_i / length_i (M, D) in the dtype of x, length (M,); where a row is shorter than a normal
                    number its length is +inf
    l2_normalize_grad -> dx_i = (grad_i - unit_i <unit_i, grad_i>) / length_i (M, D) in the dtype of x
    pair_topk    -> the largest s_ij of every row, descending (M, K), and their j (M, K);
                    -inf and -1 where fewer pairs are kept

Sums run over kept pairs only. Results are fp32 (fp64 for fp64 rows) whatever the dtype of the rows. ``scale`` does not
multiply dx and dy, so that ``sum <x, dx>`` is its gradient even where it is 0. An output not asked for is empty.
``symmetric`` promises that y is x and that s and its kept pairs are symmetric: then `both` and `want_dy` are not asked,
and the row and column sides of pair_grad are equal. ``backend`` is a name or "auto".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import Pairs, Sides, chunked, select

_PAIRS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor? drop_x, Tensor? drop_y, "
    "Tensor? only_x, Tensor? only_y, Tensor? row_ceiling, Tensor? col_ceiling, bool symmetric"
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
    f"(str link, {_PAIRS}, bool want_dx, bool want_sums, str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("fastcl::pair_topk", f"({_PAIRS}, int topk, str backend) -> (Tensor, Tensor)")
torch.library.define("fastcl::l2_normalize", "(Tensor x, str backend) -> (Tensor, Tensor)")
torch.library.define("fastcl::l2_normalize_grad", "(Tensor x, Tensor length, Tensor grad, str backend) -> Tensor")


@torch.library.impl("fastcl::pair_reduce", "CompositeExplicitAutograd")
def _reduce(link: str, *args: Any) -> tuple[Tensor, Tensor]:
    pairs, (both, keep, backend) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS:]
    return select("reduce", pairs.x, backend).reduce(link, pairs, both, keep)


@torch.library.impl("fastcl::pair_grad", "CompositeExplicitAutograd")
def _grad(link: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, (row_lse, row_grad, col_lse, col_grad) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS : _N_PAIRS + _N_SIDES]
    sides = Sides(_empty_to_inf(row_lse), row_grad, _empty_to_inf(col_lse), col_grad)
    *want, backend = args[_N_PAIRS + _N_SIDES :]
    return select("grad", pairs.x, backend).grad(link, pairs, sides, *want)


@torch.library.impl("fastcl::pair_reduce_grad", "CompositeExplicitAutograd")
def _reduce_grad(link: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    pairs, (want_dx, want_sums, backend) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS:]
    kernels = select("grad", pairs.x, backend)
    if hasattr(kernels, "reduce_grad") and (done := kernels.reduce_grad(link, pairs, want_dx, want_sums)) is not None:
        return done
    row, _ = kernels.reduce(link, pairs, False, True)
    unit = Sides(_empty_to_inf(row), torch.ones_like(row))
    dx, _, row_sum, _ = kernels.grad(link, pairs, unit, want_dx, False, want_sums)
    return row, dx, row_sum


@torch.library.impl("fastcl::pair_topk", "CompositeExplicitAutograd")
def _topk(*args: Any) -> tuple[Tensor, Tensor]:
    pairs, (topk, backend) = Pairs(*args[:_N_PAIRS]), args[_N_PAIRS:]
    return select("topk", pairs.x, backend).topk(pairs, topk)


@torch.library.impl("fastcl::l2_normalize", "CompositeExplicitAutograd")
def _l2_normalize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return getattr(select("reduce", x, backend), "normalize", chunked.normalize)(x)


@torch.library.impl("fastcl::l2_normalize_grad", "CompositeExplicitAutograd")
def _l2_normalize_grad(x: Tensor, length: Tensor, grad: Tensor, backend: str) -> Tensor:
    return getattr(select("grad", x, backend), "normalize_grad", chunked.normalize_grad)(x, length, grad)


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
def _fake_reduce_grad(link: str, x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    want_dx, want_sums, _ = args[-3:]
    m = x.shape[0]
    return _new(x, m), _new(x, *x.shape) if want_dx else _new(x, 0), _new(x, m if want_sums else 0)


@torch.library.register_fake("fastcl::pair_topk")
def _fake_topk(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    topk = args[-2]
    return _new(x, x.shape[0], topk), x.new_empty((x.shape[0], topk), dtype=torch.long)


@torch.library.register_fake("fastcl::l2_normalize")
def _fake_l2_normalize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _new(x, x.shape[0])


@torch.library.register_fake("fastcl::l2_normalize_grad")
def _fake_l2_normalize_grad(x: Tensor, length: Tensor, grad: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def l2_normalize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """One operator on a CPU, where launching a dozen takes longer than they do; elsewhere torch.compile fuses them."""
    if x.device.type == "cpu":
        return torch.ops.fastcl.l2_normalize(x, backend)
    return chunked.normalize(x)


def l2_normalize_grad(x: Tensor, length: Tensor, grad: Tensor, backend: str) -> Tensor:
    if x.device.type == "cpu":
        return torch.ops.fastcl.l2_normalize_grad(x, length, grad, backend)
    return chunked.normalize_grad(x, length, grad)


pair_reduce = torch.ops.fastcl.pair_reduce.default
pair_grad = torch.ops.fastcl.pair_grad.default
pair_reduce_grad = torch.ops.fastcl.pair_reduce_grad.default
pair_topk = torch.ops.fastcl.pair_topk.default
