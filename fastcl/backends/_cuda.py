"""CUDA C++ on a GPU (``csrc/cuda``), reached by raw addresses: fp16 and bf16 rows, and fp32 as sums of two of bf16.

Here stands what is launched. Results are found in the same steps as those of the ``triton`` backend: bounds and key
ranges, sums in parts, then a launch that adds the parts and repairs what the constant shift lost; gradients are owned
by blocks of rows; ``contrastive`` goes from raw rows to losses and back in five launches. More than 256 features are
for Hopper's kernels only, whose gradients then go in strips of rows. Tests run the same kernels on CPU tensors, in a
simulator (``csrc/sim``).

fp32 rows are multiplied as sums of two bf16 numbers, x = high + low, where the user allows that: by three products,
whose dropped fourth, of the lower numbers, is 2^-18 of the first at most. Weights are split alike. sm_80 does that in
registers, of tiles of both numbers; Hopper reads rows three times as long, and its gradients go in strips of both kinds
of weights. Bounds, and results that need a repair, come from the rows as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _settings
from . import Pairs, Sides, on_device_of, tf32_is_allowed, unit_pairs

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

kernels: ModuleType | None = getattr(_C, "cuda", None)
_LINKS = {"exp": 0, "softplus": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/kernels.hpp numbers them
_SPANS = 32  # of one set, and about as many of two: fp32 parts of sums for every row and column
# Estimates, in the time of a tile: of a panel of columns that comes, of a part of sums that is added in the end.
_PANEL, _PART = 2.5, 0.05
_THREADS = 128
_STRIP = 256  # rows: the height of a strip is a multiple
_SHORTEST_RANGE = 16  # of keys, of any backend: fakes do not know whose ranges they are
_NO_UPSTREAM: Any = ((0, 0, 0), 0)
_BUILD_REPORT = Path(__file__).parent.parent / "_cuda_build.txt"


def unsupported(op: str, x: Tensor) -> str | None:
    if kernels is None:
        reason = (
            _BUILD_REPORT.read_text(encoding="utf-8").partition("\n")[0] if _BUILD_REPORT.exists() else "unknown why"
        )
        return f"was built without CUDA kernels ({reason}); pip install fastcl from source where nvcc is found"
    if x.is_cuda and _capability(x.device) < (8, 0):
        return "has CUDA kernels for compute capability 8.0 and later only"
    if op == "topk":
        return "has no CUDA kernel for neighbours"
    if op == "guided":
        return "has no second similarity"
    if x.dtype not in _DTYPES:
        return f"needs float32, float16 or bfloat16 rows on a GPU, got {x.dtype}"
    is_split = x.dtype == torch.float32
    if is_split and not (_settings.fp32 == "bf16x3" or tf32_is_allowed()):
        return (
            "multiplies float32 rows on a GPU as sums of two bfloat16 numbers only: set FASTCL_FP32=bf16x3, or allow "
            "torch TF32, which is less exact"
        )
    if is_split and op == "contrastive":
        return "has no fused contrastive operation for float32 rows"
    if x.shape[1] % 8 or x.shape[1] == 0:
        return f"needs a multiple of 8 features on a GPU, got {x.shape[1]}"
    deepest = kernels.deepest // (2 if is_split else 1)
    if x.shape[1] > deepest and (op == "contrastive" or family(x.device) == "ampere"):
        return f"takes at most {deepest} features of {x.dtype} on this GPU, got {x.shape[1]}"
    return None


def reduce(link: str, pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
    call = _Call(link, pairs)
    row, col = _new(pairs.x, call.m), _new(pairs.x, call.n if both else 0)
    if call.m == 0 or call.n == 0:
        empty = -torch.inf if link == "exp" else 0.0
        return row.fill_(empty), col.fill_(empty)
    call.find_bounds(link == "exp")
    _reduce(call, row, col)
    return row, col


def _reduce(
    call: _Call, row: Tensor, col: Tensor | None, positive: Tensor | None = None, loss: Tensor | None = None
) -> None:
    """Writes the results of rows and of columns, if any; from the logits of partners, the losses of both."""
    m, n, both = call.m, call.n, col is not None and col.shape[0] > 0
    plan, blocks, (row_parts, col_parts) = _plan(call, call.tiles(), True, both)
    room = 126 - (max(m, n) - 1).bit_length()
    call.launch(
        "sums", blocks, call.pairs(), call.operands.dtype, call.link,
        _addresses(call.bounds, row_parts, col_parts), (room, *plan),
    )  # fmt: skip
    of_rows = _blocks(m, _THREADS)
    of_cols = _blocks(n, _THREADS) if both else 0
    losses = _address(loss)
    call.launch(
        "finish", of_rows + of_cols,
        (call.pairs(call.rows), _addresses(row_parts, row, positive, loss), (row_parts.shape[0], of_rows)),
        (
            call.swapped(call.rows), (*_addresses(col_parts, col, positive), losses and losses + 4 * m),
            (col_parts.shape[0], of_cols),
        ),
        call.rows.dtype, call.link, _address(call.bounds), room,
    )  # fmt: skip


def _plan(
    call: _Call, tiles: Sequence[int], of_rows: bool, of_cols: bool
) -> tuple[tuple[int, ...], int, tuple[Tensor, Tensor]]:
    """How the matrix is cut into units of spans, by how many blocks, and the parts of the sums that are wanted."""
    m, n, x = call.m, call.n, call.tensors[0]
    rows, cols, _, _, parts, at_once = tiles
    if call.symmetric:
        row_span = col_span = _span(n, max(rows, cols), _SPANS)
        row_spans = _blocks(n, row_span)
        units = row_spans * (row_spans + 1) // 2
        row_parts = col_parts = _new(x, parts * row_spans + 1, n)
    else:
        row_span, col_span = _two_spans(m, n, rows, cols, parts, at_once * processors(call.device))
        row_spans, col_spans = _blocks(m, row_span), _blocks(n, col_span)
        units = row_spans * col_spans
        row_parts = _new(x, parts * col_spans, m if of_rows else 0)
        col_parts = _new(x, row_spans, n if of_cols else 0)
    plan = (row_span, col_span, row_spans, units)
    return plan, min(units, at_once * processors(call.device)), (row_parts, col_parts)


def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool, want_total: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, row_sum, col_sum, and the results of rows; with no upstream gradients, those of the sum over all rows."""
    call = _Call(link, pairs)
    (m, d), n = pairs.x.shape, call.n
    if m == 0 or n == 0:

        def zeros(want: bool, *shape: int) -> Tensor:
            return _new(pairs.x, *(shape if want else (0,))).zero_()

        dx, dy = zeros(want_dx, m, d), zeros(want_dy, n, d)
        return dx, dy, zeros(want_sums, m), zeros(want_sums, n), zeros(want_total, m)
    if _in_strips(pairs.x):
        return *_strips(link, pairs, sides, want_dx, want_dy, want_sums), _new(pairs.x, 0)
    call.find_bounds(False)
    upstream = call.upstreams(sides)
    wanted = (want_dx, want_sums, want_total), (want_dy, want_sums and not pairs.symmetric, False)
    parts = _grad(call, upstream, *wanted)
    dx, row_sum, total, dy, col_sum, _ = (
        _new(pairs.x, 0) if t is None else t[0] if len(t) == 1 else t.sum(0) for t in parts
    )
    return dx, dy, row_sum, row_sum.clone() if pairs.symmetric else col_sum, total


def _grad(
    call: _Call, upstream: tuple[Any, Any], of_rows: tuple[bool, bool, bool], of_cols: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients, sums of weights and results of rows, then those of columns, where they are wanted: in parts."""
    _, _, rows, cols, _, _ = call.tiles()
    row_blocks, col_blocks = (
        _blocks(count, rows) if any(want) else 0 for count, want in ((call.m, of_rows), (call.n, of_cols))
    )
    results: list[Tensor | None] = []
    sides = []
    for pairs, vectors, count, other, want, blocks in (
        (call.pairs(), upstream, call.m, call.n, of_rows, row_blocks),
        (call.swapped(), upstream[::-1], call.n, call.m, of_cols, col_blocks),
    ):
        splits = _splits(call.device, row_blocks + col_blocks, _blocks(other, cols))
        shapes = ((splits, count, call.rows.depth), (splits, count), (splits, count))
        parts = [_new(call.tensors[0], *shape) if w else None for shape, w in zip(shapes, want, strict=True)]
        results += parts
        sides.append((pairs, vectors, _addresses(*parts), (blocks, splits)))
    programs = sum(blocks * splits for *_, (blocks, splits) in sides)
    call.launch("grad", programs, *sides, call.operands.dtype, call.link)
    return results


def _strips(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A strip of weights at a time: dx of its rows, and what it gives to all of dy (one set: to the rows below)."""
    (m, d), n, x, symmetric = pairs.x.shape, len(pairs.y), pairs.x, pairs.symmetric
    budget = _settings.workspace_bytes
    budget = max(64 * 2**20, 4 * (m + n) * d) if budget is None else budget
    pitch = _blocks(n, 8) * 8
    planes, dtype = (2, torch.bfloat16) if x.dtype == torch.float32 else (1, x.dtype)  # of weights
    height = max(1, min(budget // (2 * planes * pitch * _STRIP), _blocks(m, _STRIP))) * _STRIP
    weights, gain = _new(x, planes, min(height, m), pitch, dtype=dtype), _new(x, 1)
    dx, row_sum = _new(x, *((m, d) if want_dx else (0,))), _new(x, m if want_sums else 0)
    dy, col_sum = _new(x, *((n, d) if want_dy else (0,))), _new(x, n if want_sums else 0)
    if symmetric:
        dy, col_sum = dx, row_sum
    for first in range(0, m, height):
        rows = slice(first, min(first + height, m))
        cols = slice(first if symmetric else 0, n)
        call = _Call(link, pairs.sliced(rows, cols))
        call.find_bounds(False)
        plan, blocks, parts = _plan(call, call.tiles_of_strips(), want_sums, want_sums)
        low = weights.stride(0) * (planes - 1)
        call.launch(
            "weights", blocks, call.pairs(), call.upstreams(sides.sliced(rows, cols)), call.operands.dtype, call.link,
            _addresses(*parts, weights, gain), pitch, low, plan,
        )  # fmt: skip
        strip = weights[:, : call.m, : call.n]
        below = slice(rows.stop, n) if symmetric else cols  # of dy, which this strip also gives to
        given = strip[:, :, call.m :] if symmetric else strip
        if want_dx:
            _product(call, dx[rows], strip, call.planes[1], gain, add=symmetric and first > 0)
        if want_dx if symmetric else want_dy:
            _product(call, dy[below], given.transpose(1, 2), call.planes[0], gain, add=first > 0)
        if want_sums:
            row, col = (part.sum(0) / gain for part in parts)
            row_sum[rows] = row + row_sum[rows] if symmetric and first else row
            col = col[call.m :] if symmetric else col
            col_sum[below] = col + col_sum[below] if first else col
    return dx, _new(x, 0) if symmetric else dy, row_sum, row_sum.clone() if symmetric else col_sum


def _product(call: _Call, out: Tensor, weights: Tensor, y: Sequence[int], gain: Tensor, add: bool) -> None:
    """out = or += weights y / gain, for one plane of weights and of y, or the three products of two; y: addresses."""
    if len(out) == 0:
        return
    (rows, depth), (_, _, inner), transposed = out.shape, weights.shape, weights.stride(1) == 1
    rows_of_tile, features_of_tile, *_ = call.tiles_of_strips()
    for i, j in ((0, 0), (1, 0), (0, 1))[: 2 * len(y) - 1]:
        call.launch(
            "product", _blocks(rows, rows_of_tile) * _blocks(depth, features_of_tile),
            (*_addresses(out, gain, weights[i]), y[j]), weights.stride(2) if transposed else weights.stride(1),
            (rows, depth, inner), transposed, add or i + j > 0, call.operands.dtype,
        )  # fmt: skip


def _planes(t: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 numbers as sums of two bf16 numbers."""
    high = t.detach().bfloat16()
    return high, (t.detach() - high).bfloat16()


def _in_strips(x: Tensor) -> bool:
    """Whether gradients go in strips of weights: no block of Hopper's owns such rows."""
    assert kernels is not None
    return family(x.device) == "hopper" and (x.shape[1] > kernels.deepest or x.dtype == torch.float32)


def reduce_grad(
    link: str, pairs: Pairs, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if link != "softplus" or _in_strips(pairs.x):
        return None
    dx, dy, row_sum, _, row = grad(link, pairs, Sides(), want_dx, want_dy, want_sums, want_total=True)
    return row, dx, dy, row_sum


def family(device: torch.device) -> str:
    """Which kernels multiply there: ``hopper``'s need exactly its instructions, ``ampere``'s run on all later GPUs."""
    hopper = device.type == "cuda" and _capability(device) == (9, 0)
    return "hopper" if hopper and hasattr(kernels, "hopper") else "ampere"


def contrastive(
    x: Tensor, y: Tensor | None, scale: Tensor, dtype: torch.dtype, normalize: bool, both: bool, keep: bool
) -> tuple[Tensor, ...]:
    one_set = y is None
    b, d = len(x) // 2 if one_set else len(x), x.shape[1]
    z, positive = _new(x, 2 * b, d, dtype=dtype), _new(x, 2 * b)
    length = _new(x, 2 * b if normalize else 0)
    keys, ranges = (_new(x, *shape, dtype=torch.long) for shape in ((2 * b,), (_blocks(2 * b, _SHORTEST_RANGE), 2)))
    lse = _new(x, 2 * b if one_set or both else b)
    loss = _new(x, len(lse))
    call = _Call("exp", unit_pairs(z, keys, scale, one_set))
    call.bounds, call.ranges = None if normalize else _new(x, 4, call.kernels.parts), (_address(ranges),) * 2
    call.launch(
        "prepare", _blocks(b, call.kernels.views_rows) if normalize else call.kernels.parts,
        call.views(x, y, z, length, positive), _DTYPES[x.dtype], _DTYPES[dtype],
        *_addresses(call.bounds, keys, ranges),
    )  # fmt: skip
    _reduce(call, lse, lse[b:] if both and not one_set else None, positive, loss)
    return loss, z, length, positive, lse, keys, ranges


def contrastive_grad(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    grad: Tensor,
    saved: tuple[Tensor, ...],
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z, length, positive, lse, keys, ranges = saved
    (rows, d), one_set = z.shape, y is None
    b = rows // 2
    want_y = want_y and not one_set
    call = _Call("exp", unit_pairs(z, keys, scale, one_set))
    call.ranges = (_address(ranges),) * 2
    # the anchors of the first view, which all of them begin with, and those of the second, where there are any
    first = call.upstream(lse, grad, positive)
    second = _later(first, b) if lse.shape[0] > b else _NO_UPSTREAM
    upstream = (first, first) if one_set else (first, second)
    dx_parts, _, _, dy_parts, _, _ = _grad(call, upstream, (want_x, False, False), (want_y, False, False))
    dx = _new(x, *(x.shape if want_x else (0,)), dtype=x.dtype)
    dy = _new(x, *(x.shape if want_y else (0,)), dtype=x.dtype)
    dots = _new(x, rows if one_set or want_y else b)
    pitch = rows if one_set else b

    def side(parts: Tensor | None, out: Tensor, row: int, dot: int) -> Any:  # from that row, and that of the dots, on
        if parts is None:
            return (0, 0, 0), (0, pitch)
        at = parts.data_ptr() + 4 * d * row, out.data_ptr() + out.element_size() * d * row, dots.data_ptr() + 4 * dot
        return at, (parts.shape[0], pitch)

    call.launch(
        "restore", _blocks(b, call.kernels.views_rows), call.views(x, y, z, length, positive), (first, second),
        side(dx_parts, dx, 0, 0), side(dx_parts, dx, b, b) if one_set else side(dy_parts, dy, 0, b),
        _DTYPES[x.dtype], _DTYPES[z.dtype],
    )  # fmt: skip
    return dx, dy, dots


@lru_cache(maxsize=None)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Rows(NamedTuple):
    """Addresses of x and y, their features, and their dtype as the kernels call it."""

    at: tuple[int, int]
    depth: int
    dtype: int


class _Call:
    """Addresses of one implicit matrix, and the tensors behind them, which must live as long."""

    def __init__(self, link: str, pairs: Pairs) -> None:
        assert kernels is not None
        self.kernels, self.link = kernels, _LINKS[link]
        self.products = getattr(kernels, family(pairs.x.device))
        self.tensors: list[Tensor] = []  # the rows come first
        self.device, self.symmetric = pairs.x.device, pairs.symmetric
        (self.m, depth), self.n = pairs.x.shape, len(pairs.y)
        x = self.keep(_aligned(pairs.x))
        y = x if pairs.symmetric else self.keep(_aligned(pairs.y))
        self.rows = self.operands = _Rows((_address(x), _address(y)), depth, _DTYPES[pairs.x.dtype])
        # of x and of y: what strips of weights are multiplied by
        self.planes: tuple[tuple[int, ...], ...] = tuple((at,) for at in self.rows.at)
        if pairs.x.dtype == torch.float32:
            self.split(pairs.x, pairs.y)
        reals = (pairs.scale, pairs.row_bias, pairs.col_bias, pairs.row_ceiling, pairs.col_ceiling)
        self.reals = tuple(_address(self.keep(t, torch.float32)) for t in reals)
        keys = (pairs.drop_x, pairs.drop_y, pairs.only_x, pairs.only_y)
        self.keys = tuple(_address(self.keep(t, torch.long)) for t in keys)
        self.bounds: Tensor | None = None
        self.ranges = (0, 0)

    def split(self, x: Tensor, y: Tensor) -> None:
        """fp32 rows as sums of two bf16 numbers, which are multiplied in their place."""
        (high_x, low_x), (high_y, low_y) = planes = _planes(x), _planes(y)
        if _in_strips(x):
            self.planes = tuple(_addresses(*map(self.keep, plane)) for plane in planes)
            rows = [torch.cat(parts, 1) for parts in ((high_x, high_x, low_x), (high_y, low_y, high_y))]
            dtype = torch.bfloat16
        else:  # the higher numbers of eight features, then the lower ones
            rows = [torch.stack([t.unflatten(1, (-1, 8)) for t in plane], 2).flatten(1) for plane in planes]
            dtype = x.dtype
        at_x, at_y = _addresses(*map(self.keep, rows))
        self.operands = _Rows((at_x, at_y), rows[0].shape[1], _DTYPES[dtype])

    def pairs(self, rows: _Rows | None = None) -> Any:
        """The matrix, of the rows that are multiplied, or of others."""
        at, depth, _ = rows or self.operands
        return (at, (self.m, self.n, depth), self.reals, (*self.keys, *self.ranges), self.symmetric)

    def swapped(self, rows: _Rows | None = None) -> Any:
        """The transposed matrix."""
        at, depth, _ = rows or self.operands
        scale, row_bias, col_bias, row_ceiling, col_ceiling = self.reals
        drop_x, drop_y, only_x, only_y = self.keys
        return (
            at[::-1], (self.n, self.m, depth), (scale, col_bias, row_bias, col_ceiling, row_ceiling),
            (drop_y, drop_x, only_y, only_x, *self.ranges[::-1]), self.symmetric,
        )  # fmt: skip

    def keep(self, t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        if t is None:
            return None
        t = (t if dtype is None else t.to(dtype)).contiguous()
        self.tensors.append(t)
        return t

    def upstream(self, lse: Tensor | None, grad: Tensor | None, positive: Tensor | None = None) -> Any:
        """Upstream gradients of one side, and what they belong to; one number may stand for those of all rows."""
        if grad is None or grad.shape[0] == 0:
            return _NO_UPSTREAM
        grad = grad.to(torch.float32)
        if grad.stride(0):
            grad = grad.contiguous()
        self.tensors.append(grad)
        return _addresses(self.keep(lse, torch.float32), grad, positive), grad.stride(0)

    def upstreams(self, sides: Sides) -> tuple[Any, Any]:
        return self.upstream(sides.row_lse, sides.row_grad), self.upstream(sides.col_lse, sides.col_grad)

    def views(self, x: Tensor, y: Tensor | None, z: Tensor, length: Tensor, positive: Tensor) -> Any:
        """Raw rows of both views (two tensors, or the halves of one), and what is made of them."""
        half, depth = z.shape[0] // 2, self.rows.depth
        first = _address(self.keep(_aligned(x)))
        # halves of one tensor are aligned alike: rows have a multiple of 8 features
        second = first + half * depth * x.element_size() if y is None else _address(self.keep(_aligned(y)))
        return (first, second, *_addresses(z, length, positive), self.reals[0]), (half, depth)

    def find_bounds(self, bounds: bool) -> None:
        """Bounds on what a logit is made of, where they are wanted, and the ranges of the drop keys."""
        x = self.tensors[0]
        if bounds:
            self.bounds = _new(x, 4, self.kernels.parts)
        if self.keys[0]:
            counts = (_blocks(count, self.kernels.keys_in_a_range) for count in (self.m, self.n))
            row, col = (_new(x, count, 2, dtype=torch.long) for count in counts)
            self.tensors += (row, col)
            self.ranges = (_address(row), _address(row if self.symmetric else col))
        if bounds or self.keys[0]:
            pairs, dtype = self.pairs(self.rows), self.rows.dtype
            self.launch("bounds", self.kernels.parts, pairs, dtype, _address(self.bounds), *self.ranges)

    def tiles(self) -> Sequence[int]:
        """Rows and columns of a tile of sums, and of a gradient; parts of a span of columns; blocks on a processor."""
        found: Sequence[int] = self.products.tiles(self.operands.depth)
        return found

    def tiles_of_strips(self) -> Sequence[int]:
        """The same of weights and their products, whatever the depth of the rows."""
        found: Sequence[int] = self.products.tiles(self.kernels.deepest + 1)
        return found

    def launch(self, kernel: str, blocks: int, *args: Any) -> None:
        if blocks == 0:
            return
        function = getattr(self.products, kernel, None) or getattr(self.kernels, kernel)
        if self.device.type != "cuda":  # the simulator
            function(*args, blocks, 0)
            return
        with on_device_of(self.tensors[0]):
            function(*args, blocks, torch.cuda.current_stream().cuda_stream)


def _later(upstream: Any, row: int) -> Any:
    """The same vectors from a row on."""
    (lse, grad, positive), stride = upstream
    return (lse + 4 * row, grad + 4 * row * stride, positive + 4 * row), stride


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _span(count: int, block: int, most: int) -> int:
    """Rows of one of at most ``most`` equal spans, in whole blocks."""
    blocks = _blocks(count, block)
    return _blocks(blocks, min(blocks, most)) * block


@lru_cache(maxsize=1024)
def _two_spans(m: int, n: int, rows: int, cols: int, parts: int, blocks: int) -> tuple[int, int]:
    """Rows and columns of the units that so many blocks would be done with first.

    A unit loads each of its panels of columns once, for all of its tiles of rows: few rows against a long queue are one
    span, or every tile would wait for a panel of its own. Spans of columns leave parts of the sums of every row, which
    have to stay few.
    """

    def cuts() -> Iterator[tuple[float, int, int, int]]:  # their time in tiles of rows, and numbers in parts of sums
        for row_spans in (*range(1, _SPANS + 1), *(blocks * quarters // 4 or 1 for quarters in range(1, 17))):
            row_span = _span(m, rows, row_spans)
            for rounds in range(5):
                col_span = _span(n, cols, max(1, rounds * blocks // _blocks(m, row_span)))
                spans = _blocks(m, row_span), _blocks(n, col_span)
                numbers = spans[0] * n + parts * spans[1] * m
                if numbers <= 2 * _SPANS * (m + n):
                    passes = _blocks(spans[0] * spans[1], blocks) * (col_span // cols)
                    time = passes * (row_span // rows + _PANEL) + _PART * max(spans[0], parts * spans[1])
                    yield time, numbers, row_span, col_span

    return min(cuts())[2:]


def _splits(device: torch.device, programs: int, tiles: int) -> int:
    """Into how many spans the columns are cut so that every processor has work."""
    available = processors(device)
    if programs == 0 or programs >= available:
        return 1
    each = _blocks(tiles, min(_blocks(2 * available, programs), max(1, tiles // 2)))
    return _blocks(tiles, each)


def _new(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.new_empty(shape, dtype=dtype)


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(map(_address, tensors))


def _address(t: Tensor | None) -> int:
    """0 where there is nothing, which is torch's answer for a tensor without elements, too."""
    return 0 if t is None else t.data_ptr()
