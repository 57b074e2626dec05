"""Inner products of chosen rows, a chunk of gathered rows at a time, as torch operators.

::

    gathered_dot -> s_ij = <x_i, y_index_ij> (M, K), of x (M, D), y (T, D) and index (M, K)
    listed_dot   -> s_p = <x_rows_p, y_columns_p> (P,), of x (M, D), y (N, D) and rows, columns (P,)
    ..._grad     -> dx, dy, in the dtype of grad; what is not wanted is empty

Operators, because a loop over chunks is one over a shape: ``torch.compile`` would unroll it, and compile it again for
every number of rows. Results are fp32 (fp64 for fp64 rows).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_GATHERED = 2**21  # numbers of gathered rows that live at once

torch.library.define("fastcl::gathered_dot", "(Tensor x, Tensor y, Tensor index) -> Tensor")
torch.library.define(
    "fastcl::gathered_dot_grad",
    "(Tensor grad, Tensor x, Tensor y, Tensor index, bool want_x, bool want_y) -> (Tensor, Tensor)",
)
torch.library.define("fastcl::listed_dot", "(Tensor x, Tensor y, Tensor rows, Tensor columns) -> Tensor")
torch.library.define(
    "fastcl::listed_dot_grad",
    "(Tensor grad, Tensor x, Tensor y, Tensor rows, Tensor columns, bool want_x, bool want_y) -> (Tensor, Tensor)",
)


@torch.library.impl("fastcl::gathered_dot", "CompositeExplicitAutograd")
def _gathered_dot(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    s = _products_of(x, *index.shape)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _chunks(index, y):
            s[rows] = (y[index[rows]].to(s.dtype) @ x[rows, :, None].to(s.dtype)).squeeze(2)
    return s


@torch.library.impl("fastcl::gathered_dot_grad", "CompositeExplicitAutograd")
def _gathered_dot_grad(
    grad: Tensor, x: Tensor, y: Tensor, index: Tensor, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor]:
    dx, dy = _gradients(grad, x, y, want_x, want_y)
    with torch.autocast(x.device.type, enabled=False):
        for rows in _chunks(index, y):
            g = grad[rows]
            if want_x:
                dx[rows] = (g[:, None] @ y[index[rows]].to(g.dtype)).squeeze(1)
            if want_y:
                add_rows(dy, index[rows].flatten(), (g[:, :, None] * x[rows, None].to(g.dtype)).flatten(0, 1))
    return dx, dy


@torch.library.impl("fastcl::listed_dot", "CompositeExplicitAutograd")
def _listed_dot(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    s = _products_of(x, len(rows))
    for pairs in _chunks(rows[:, None], y):
        s[pairs] = (x[rows[pairs]].to(s.dtype) * y[columns[pairs]].to(s.dtype)).sum(1)
    return s


@torch.library.impl("fastcl::listed_dot_grad", "CompositeExplicitAutograd")
def _listed_dot_grad(
    grad: Tensor, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor]:
    dx, dy = _gradients(grad, x, y, want_x, want_y)
    for pairs in _chunks(rows[:, None], y):
        g, i, j = grad[pairs, None], rows[pairs], columns[pairs]
        if want_x:
            add_rows(dx, i, g * y[j].to(g.dtype))
        if want_y:
            add_rows(dy, j, g * x[i].to(g.dtype))
    return dx, dy


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows to those of ``total`` that ``index`` names, in a fixed order."""
    if total.device.type == "cuda":  # of the two, the one that adds in a fixed order there
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def _chunks(index: Tensor, table: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``index`` whose gathered rows fit into a chunk."""
    m, k = index.shape
    step = max(1, _GATHERED // max(k * table.shape[1], 1))
    for start in range(0, m, step):
        yield slice(start, min(start + step, m))


def _products_of(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _gradients(grad: Tensor, x: Tensor, y: Tensor, want_x: bool, want_y: bool) -> tuple[Tensor, Tensor]:
    dx, dy = (grad.new_zeros(t.shape if want else (0,)) for t, want in ((x, want_x), (y, want_y)))
    return dx, dy


@torch.library.register_fake("fastcl::gathered_dot")
def _fake_gathered_dot(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    return _products_of(x, *index.shape)


@torch.library.register_fake("fastcl::listed_dot")
def _fake_listed_dot(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _products_of(x, rows.shape[0])


@torch.library.register_fake("fastcl::gathered_dot_grad")
def _fake_gathered_dot_grad(
    grad: Tensor, x: Tensor, y: Tensor, index: Tensor, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, x, y, want_x, want_y)


@torch.library.register_fake("fastcl::listed_dot_grad")
def _fake_listed_dot_grad(
    grad: Tensor, x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor]:
    return _gradients(grad, x, y, want_x, want_y)


gathered_dot = torch.ops.fastcl.gathered_dot.default
gathered_dot_grad = torch.ops.fastcl.gathered_dot_grad.default
listed_dot = torch.ops.fastcl.listed_dot.default
listed_dot_grad = torch.ops.fastcl.listed_dot_grad.default
