"""Tiled Triton kernels for CUDA tensors (and, with TRITON_INTERPRET=1, for CPU tensors in tests).

Here stands what is launched and why; the device code is ``_triton_kernels``, the sizes of tiles ``_triton_configs``.

* ``reduce``: bounds and key ranges, sums in parts, then one launch that adds the parts and repairs what a constant
  shift lost. One set visits its upper triangle.
* ``grad``: each program owns rows of a gradient and walks the columns. Long rows of large batches go in strips: a strip
  of weights is written, and two matrix products read it.
* ``reduce_grad``: gradients in the forward, where they are known: SigLIP's, and those against frozen columns.
* ``contrastive``: raw rows to losses and back, in five launches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .. import _settings
from . import Pairs, Sides, on_device_of, tf32_is_allowed, unit_pairs
from . import _triton_kernels as kernels
from ._triton_configs import Config, config, family

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

DESCRIPTORS = TensorDescriptor is not None
INTERPRETED = not isinstance(kernels._sums_kernel, triton.runtime.JITFunction)
_PARTS = 128  # programs that look for bounds; each writes a part
_SPANS = 32  # of rows, and of columns: 528 pairs of them in a triangle, four for each processor of a Hopper GPU
_UNITS = _SPANS * (_SPANS + 1) // 2
_WIDEST = 8192  # features of a row that a program holds at once
_SLOTS = 128  # neighbours that a program keeps of each row; of 256, their ranks alone take half of the registers
_LOWEST = -(1 << 63) + _SLOTS  # of the ranks of neighbours; below it is none
_LEAST_WORKSPACE = 256 * 2**20  # bytes that a strip may take: a product of more rows is faster
_MOST_SPLITS = 4  # of gradients that have a program for every processor anyway: each is an fp32 copy of them
_STRIPS_FROM = 2049  # rows; below, one launch is worth more than fewer operations
# Left alone, the assembler aims at more blocks per processor, and pays with registers that spill.
_OPTIONS = {"maxnreg": 255, "enable_fp_fusion": True}


class Limits(NamedTuple):
    """Of a device: its name, compute capability and number of processors."""

    name: str
    capability: tuple[int, int]
    processors: int


@lru_cache(maxsize=None)
def limits(device: torch.device) -> Limits:
    if INTERPRETED:
        return Limits("", (0, 0), 3)
    found = torch.cuda.get_device_properties(device)
    return Limits(found.name, (found.major, found.minor), found.multi_processor_count)


_too_large: dict[str, set[Config]] = {}  # by the name of the device


class _TooLarge(Exception):
    """A tile does not fit into the shared memory of the device."""


def _steps_down(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls it again, with smaller tiles, where those of the table are too large for the device."""

    @wraps(function)
    def run(*args: Any) -> Any:
        while True:
            try:
                return function(*args)
            except _TooLarge:
                continue

    return run


def unsupported(op: str, x: Tensor) -> str | None:
    if not (x.is_cuda or INTERPRETED):
        return f"needs CUDA tensors or TRITON_INTERPRET=1, got {x.device}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs float32, float16 or bfloat16 rows, got {x.dtype}"
    if op == "guided":
        return "has no second similarity"
    if op in ("normalize", "contrastive") and x.shape[1] > _WIDEST:
        return f"holds a row in one program, which is possible up to {_WIDEST} features, got {x.shape[1]}"
    return None if INTERPRETED else _failed_check(x.device, x.dtype)


@_steps_down
def reduce(link: str, pairs: Pairs, both: bool, keep: bool) -> tuple[Tensor, Tensor]:
    pairs = _contiguous(pairs)
    row, col = _new(pairs.x, len(pairs.x)), _new(pairs.y, len(pairs.y) if both else 0)
    if len(pairs.x) and len(pairs.y):
        _reduce(link, pairs, (row, col), _bound(link, pairs))
        return row, col
    empty = -torch.inf if link == "exp" else 0.0
    return row.fill_(empty), col.fill_(empty)


def _reduce(
    link: str,
    pairs: Pairs,
    out: tuple[Tensor, Tensor],
    found: tuple[Tensor | None, Tensor | None, Tensor | None],
    positive: Tensor | None = None,
    loss: Tensor | None = None,
) -> None:
    """Writes the results of rows and (unless empty) columns; from the logits of positives, the losses of both."""
    x, y, scale, optional, symmetric = *pairs[:3], pairs.vectors, pairs.symmetric
    row, col = out
    (m, d), n, both = x.shape, y.shape[0], col.shape[0] > 0
    cut = _config("sums", x, pairs)
    if symmetric:
        side = max(cut.block_m, cut.block_n)
        spans = min(_blocks(n, side), _SPANS)
        row_span = col_span = _blocks(_blocks(n, spans), side) * side
        row_spans = col_spans = _blocks(n, row_span)
        units = row_spans * (row_spans + 1) // 2
        row_parts = col_parts = _new(x, row_spans + 1, n)
    else:
        row_span = _span(m, cut.block_m, 24)
        row_spans = _blocks(m, row_span)
        col_span = _span(n, cut.block_n, _blocks(_UNITS, row_spans))
        col_spans = _blocks(n, col_span)
        units = row_spans * col_spans
        row_parts, col_parts = _new(x, col_spans, m), _new(x, row_spans, n if both else 0)
    with_cols = symmetric or both
    terms = max(m, n) - 1
    room = 126 - terms.bit_length()
    device = limits(x.device)
    _launch(
        kernels._sums_kernel, (min(units, 2 * device.processors),), cut, x,
        *_sources((x, cut.block_m, cut.block_k), (y, cut.block_n, cut.block_k)), scale, *optional,
        *found, row_parts, col_parts if with_cols else None, m, n, room, row_span, col_span, row_spans, units,
        D=d, LINK=link, SYMMETRIC=symmetric, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        PRECISION=_precision(x), TMA=_by_descriptor(x, y), PARTS=_PARTS, RANGE=_range_of(x),
    )  # fmt: skip
    cut = _config("finish", x)
    row_blocks, col_blocks = _blocks(m, cut.block_m), _blocks(n, cut.block_m) if both else 0
    _launch(
        kernels._finish_kernel, (row_blocks + col_blocks,), cut, x,
        x, y, scale, *optional, found[0], row_parts, col_parts if both else None, len(row_parts),
        row_spans, row, col if both else None, positive, loss, loss[m:] if loss is not None and both else None,
        row_blocks, m, n, room,
        D=d, LINK=link, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, PRECISION=_precision(x),
        PARTS=_PARTS,
    )  # fmt: skip


def _span(count: int, block: int, most: int) -> int:
    """Rows of one of at most ``most`` equal spans, in whole blocks."""
    blocks = _blocks(count, block)
    return _blocks(blocks, min(blocks, most)) * block


def _bound(link: str, pairs: Pairs, ranges_only: bool = False) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bounds on what a logit is made of, and the ranges of the drop keys of rows and columns."""
    x, y, drop_x, drop_y = pairs.x, pairs.y, pairs.drop_x, pairs.drop_y
    (m, d), n, size = x.shape, len(y), _range_of(x)
    bounds = None if ranges_only or link != "exp" else _new(x, 4, _PARTS)
    row_ranges = col_ranges = None
    if drop_x is not None and drop_y is not None:
        row_ranges = drop_x.new_empty(_blocks(m, size), 2)
        col_ranges = row_ranges if pairs.symmetric else drop_y.new_empty(_blocks(n, size), 2)
    if (bounds is None and row_ranges is None) or m == 0 or n == 0:
        return bounds, row_ranges, col_ranges
    _launch(
        kernels._bound_kernel, (_PARTS,), None, x,
        x, y, pairs.row_bias, pairs.col_bias, drop_x, drop_y, bounds, row_ranges, col_ranges, m, n,
        D=d, SYMMETRIC=pairs.symmetric, ROWS=16 if INTERPRETED else 64, BLOCK_K=32, PARTS=_PARTS, RANGE=size,
    )  # fmt: skip
    return bounds, row_ranges, col_ranges


@_steps_down
def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = _contiguous(pairs)
    sides = Sides(*(t if t is None else t.contiguous() for t in sides))
    _, row_ranges, col_ranges = _bound(link, pairs, ranges_only=True)
    want = _Want(want_dx, want_dy, want_sums, want_sums and not pairs.symmetric)
    got = _grad(link, pairs, sides, want, row_ranges, col_ranges)
    col_sum = got.row_sum.clone() if pairs.symmetric and want_sums else got.col_sum
    return got.dx, got.dy, got.row_sum, col_sum


@_steps_down
def reduce_grad(
    link: str, pairs: Pairs, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    x, y = pairs.x, pairs.y
    if len(x) == 0 or len(y) == 0:
        return None
    pairs = _contiguous(pairs)
    if link == "softplus":
        _, row_ranges, col_ranges = _bound(link, pairs, ranges_only=True)
        want = _Want(want_dx, want_dy, want_sums, False, row_total=True)
        got = _grad(link, pairs, Sides(), want, row_ranges, col_ranges)
        return got.row_total, got.dx, got.dy, got.row_sum
    cut = _find("one_pass", x)
    return None if want_dy or not want_dx or cut is None else _one_pass(pairs, cut, want_sums)


def _one_pass(pairs: Pairs, cut: Config, want_sums: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, scale, optional = *pairs[:3], pairs.vectors
    (m, d), n = x.shape, len(y)
    _, row_ranges, col_ranges = _bound("exp", pairs, ranges_only=True)
    blocks = _blocks(m, cut.block_m)
    splits = _splits(x, blocks, n, cut.block_n)
    parts, peaks, totals = _new(x, splits, m, d), _new(x, splits, m), _new(x, splits, m)
    _launch(
        kernels._one_pass_kernel, (blocks * splits,), cut, x,
        *_sources((x, cut.block_m, cut.block_k), (y, cut.block_n, cut.block_k)), scale, *optional,
        row_ranges, col_ranges, parts, peaks, totals, blocks, splits, m, n,
        D=d, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k, PRECISION=_precision(x), HALF=_is_half(x),
        TMA=_by_descriptor(x, y), RANGE=_range_of(x),
    )  # fmt: skip
    row, dx = _new(x, m), _new(x, m, d)
    width, block = _row_block(d)
    _launch(
        kernels._merge_kernel, (_blocks(m, block),), None, x,
        parts, peaks, totals, dx, row, splits, m, D=d, BLOCK=block, WIDTH=width,
    )  # fmt: skip
    row_sum = (row != -torch.inf).to(row.dtype) if want_sums else _new(x, 0)  # softmax weights sum to 1
    return row, dx, _new(x, 0), row_sum


class _Want(NamedTuple):
    dx: bool
    dy: bool
    row_sum: bool = False
    col_sum: bool = False
    row_total: bool = False


class _Grads(NamedTuple):
    """What was wanted, the rest empty; ``dx`` and ``dy`` are parts ``(splits, M, D)`` where those were asked for."""

    dx: Tensor
    dy: Tensor
    row_sum: Tensor
    col_sum: Tensor
    row_total: Tensor


def _grad(
    link: str,
    pairs: Pairs,
    sides: Sides,
    want: _Want,
    row_ranges: Tensor | None,
    col_ranges: Tensor | None,
    positives: tuple[Tensor | None, Tensor | None] = (None, None),
    parts: bool = False,
) -> _Grads:
    """Gradients of rows and columns; with no upstream gradients at all, those of the sum over all rows."""
    x, y = pairs.x, pairs.y
    if x.shape[0] == 0 or y.shape[0] == 0:
        shapes = x.shape if want.dx else (0,), y.shape if want.dy else (0,)
        lengths = (len(x) * want.row_sum, len(y) * want.col_sum, len(x) * want.row_total)
        return _Grads(*(_new(x, *shape).zero_() for shape in (*shapes, *((n,) for n in lengths))))
    ranges = (row_ranges, col_ranges)
    if _in_strips(x, y, want):
        return _strips(link, pairs, sides, want, ranges, positives, parts)
    return _row_owned(link, pairs, sides, want, ranges, positives, parts)


def _row_owned(
    link: str,
    pairs: Pairs,
    sides: Sides,
    want: _Want,
    ranges: tuple[Tensor | None, Tensor | None],
    positives: tuple[Tensor | None, Tensor | None],
    parts: bool,
) -> _Grads:
    x, y, scale, optional = *pairs[:3], pairs.vectors
    (m, d), n = x.shape, y.shape[0]
    cut = _config("grad", x, pairs)
    slices = _blocks(d, cut.block_d)
    row_slices, col_slices = slices if want.dx else 1, slices if want.dy else 1
    of_rows = want.dx or want.row_sum or want.row_total
    of_cols = want.dy or want.col_sum
    row_blocks = _blocks(m, cut.block_m) if of_rows else 0
    col_blocks = _blocks(n, cut.block_m) if of_cols else 0
    programs = row_blocks * row_slices + col_blocks * col_slices
    row_splits, col_splits = _splits(x, programs, n, cut.block_n), _splits(x, programs, m, cut.block_n)
    dx = _new(x, row_splits, m, d) if want.dx else None
    dy = _new(x, col_splits, n, d) if want.dy else None
    row_sum = _new(x, row_splits, m) if want.row_sum else None
    row_total = _new(x, row_splits, m) if want.row_total else None
    col_sum = _new(x, col_splits, n) if want.col_sum else None
    row_programs = row_blocks * row_slices * row_splits
    col_programs = col_blocks * col_slices * col_splits
    # either set gives rows of a tile, columns of it, and what weights are multiplied with; as few descriptors as do
    owned, passed, outs = ((cut.block_m, cut.block_k), (cut.block_n, cut.block_k), (cut.block_n, cut.block_d))
    apart = min(cut.block_k, cut.block_d) < d  # else one tile serves both products
    sources = _sources(
        (x, *owned), (x, *passed) if of_cols else None, (x, *outs) if of_cols and apart else None,
        (y, *owned) if of_cols else None, (y, *passed), (y, *outs) if apart else None,
    )  # fmt: skip
    _launch(
        kernels._grad_kernel, (row_programs + col_programs,), cut, x,
        *sources, scale, *optional,
        sides.row_lse, sides.row_grad, positives[0], sides.col_lse, sides.col_grad, positives[1], *ranges,
        dx, row_sum, row_total, dy, col_sum, row_blocks, row_splits, row_programs, col_blocks, col_splits, m, n,
        D=d, LINK=link, STRIDE=_stride(sides), BOTH=of_cols, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k, BLOCK_D=cut.block_d, PRECISION=_precision(x), HALF=_is_half(x), TMA=_by_descriptor(x, y),
        RANGE=_range_of(x),
    )  # fmt: skip
    return _Grads(
        *(_new(x, 0) if t is None else t if parts else _sum(t) for t in (dx, dy)),
        *(_new(x, 0) if t is None else _sum(t) for t in (row_sum, col_sum, row_total)),
    )


def _sum(parts: Tensor) -> Tensor:
    """In the order of the parts."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _in_strips(x: Tensor, y: Tensor, want: _Want) -> bool:
    """Whether a program cannot own whole rows, the batch is large, and either product has work for the whole device."""
    if max(x.shape[0], y.shape[0]) < _STRIPS_FROM or x.shape[1] <= _config("grad", x).block_d:
        return False
    cut = _config("product", x)
    outputs = [len(t) for t, wanted in ((x, want.dx), (y, want.dy)) if wanted]
    programs = [_blocks(n, cut.block_m) * _blocks(x.shape[1], cut.block_d) for n in outputs]
    return min(programs, default=0) >= limits(x.device).processors // 2


def _strips(
    link: str,
    pairs: Pairs,
    sides: Sides,
    want: _Want,
    ranges: tuple[Tensor | None, Tensor | None],
    positives: tuple[Tensor | None, Tensor | None],
    parts: bool,
) -> _Grads:
    """A strip of weights at a time: dx of its rows, and what it gives to all of dy (one set: to the rows below)."""
    (m, d), n = pairs.x.shape, len(pairs.y)
    mirrored = pairs.symmetric and not (want.row_sum or want.row_total)
    cut = _config("weights", pairs.x, pairs)
    side = max(cut.block_m, cut.block_n)
    pitch = _blocks(n, side) * side
    budget = _settings.workspace_bytes
    if budget is None:
        budget = max(_LEAST_WORKSPACE, 4 * (m + n) * d)
    # at least four strips: of the lower triangle of one set, a strip computes what lies in its own square
    height = max(1, min(budget // (pitch * pairs.x.element_size() * side), _blocks(m, 4 * side))) * side
    weights = pairs.x.new_empty(min(height, _blocks(m, side) * side), pitch)
    balance = _new(pairs.x, 3)
    _launch(
        kernels._balance_kernel, (1,), None, pairs.x, *sides, balance, m, n,
        LINK=link, HALF=_is_half(pairs.x), STRIDE=_stride(sides),
    )  # fmt: skip
    dx = _new(pairs.x, m, d) if want.dx else None
    dy = dx if mirrored else _new(pairs.x, n, d) if want.dy else None
    row_sum, row_total = (_new(pairs.x, m if wanted else 0) for wanted in (want.row_sum, want.row_total))
    for first in range(0, m, height):
        rows = slice(first, min(first + height, m))
        cols = slice(first if mirrored else 0, n)
        strip = pairs.sliced(rows, cols)
        sums = _strip_weights(
            link, strip, sides.sliced(rows, cols), want, (_of(positives[0], rows), _of(positives[1], cols)),
            (_of(ranges[0], rows, _range_of(strip.x)), _of(ranges[1], cols, _range_of(strip.x))), weights, balance,
        )  # fmt: skip
        for total, part in zip((row_sum, row_total), sums, strict=True):
            if part is not None:
                total[rows] = _sum(part)
        written = weights[: len(strip.x), : len(strip.y)]
        if dx is not None:
            _product(written, strip.y, dx[rows], mirrored and first > 0)
        if dy is not None:
            after = slice(height, None) if mirrored else slice(None)
            _product(written[:, after].T, strip.x, dy[cols][after], first > 0)
    if _is_half(pairs.x):
        for gradient in (dx, None if mirrored else dy):
            if gradient is not None:
                gradient /= balance[2]  # the gain of fp16 weights
    col_sum = _new(pairs.x, 0)
    if want.col_sum:  # a strip has sums of rows only
        col_sum = _row_owned(link, pairs, sides, _Want(False, False, col_sum=True), ranges, positives, False).col_sum
    dx, dy = (_new(pairs.x, 0) if t is None else t[None] if parts else t for t in (dx, None if mirrored else dy))
    return _Grads(dx, dy, row_sum, col_sum, row_total)


def _strip_weights(
    link: str,
    strip: Pairs,
    sides: Sides,
    want: _Want,
    positives: tuple[Tensor | None, Tensor | None],
    ranges: tuple[Tensor | None, Tensor | None],
    weights: Tensor,
    balance: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the weights of a strip; parts of the sums of its rows."""
    x, y, scale, optional = *strip[:3], strip.vectors
    (m, d), n = x.shape, len(y)
    cut = _config("weights", x, strip)
    blocks, tiles = _blocks(m, cut.block_m), _blocks(n, cut.block_n)
    tiles_each = _blocks(tiles, max(1, _UNITS // blocks))
    chunks = _blocks(tiles, tiles_each)
    row_sum = _new(x, chunks, m) if want.row_sum else None
    row_total = _new(x, chunks, m) if want.row_total else None
    _launch(
        kernels._weights_kernel, (blocks, chunks), cut, x,
        *_sources((x, cut.block_m, cut.block_k), (y, cut.block_n, cut.block_k)), scale, *optional,
        sides.row_lse, sides.row_grad, positives[0], sides.col_lse, sides.col_grad, positives[1], *ranges, balance,
        weights, weights.stride(0), row_sum, row_total, tiles_each, m, n,
        D=d, LINK=link, STRIDE=_stride(sides), BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        PRECISION=_precision(x), HALF=_is_half(x), TMA=_by_descriptor(x, y), RANGE=_range_of(x),
    )  # fmt: skip
    return row_sum, row_total


def _product(weights: Tensor, y: Tensor, out: Tensor, add: bool) -> None:
    """out = w y, or what that adds to it; weights may be a transposed strip."""
    (m, d), n = out.shape, len(y)
    if m == 0:
        return
    if _by_library(y):
        with torch.autocast(y.device.type, enabled=False):
            if y.dtype == torch.float32:
                torch.addmm(out, weights, y, beta=float(add), out=out)
            else:
                torch.addmm(out, weights, y, beta=float(add), out_dtype=torch.float32, out=out)
        return
    transposed = weights.stride(1) != 1
    cut = _config("product", y)
    blocks = _blocks(m, cut.block_m)
    _launch(
        kernels._product_kernel, (blocks * _blocks(d, cut.block_d),), cut, y,
        weights, max(weights.stride()), *_sources((y, cut.block_k, cut.block_d)), out, blocks, m, n,
        D=d, TRANSPOSED=transposed, ADD=add, BLOCK_M=cut.block_m, BLOCK_K=cut.block_k, BLOCK_D=cut.block_d,
        PRECISION=_precision(y), TMA=_by_descriptor(y),
    )  # fmt: skip


def _by_library(y: Tensor) -> bool:
    """Whether torch multiplies a strip of weights: with fp32 results of 16-bit numbers since torch 2.8.

    Not where a user insists on deterministic algorithms, which torch refuses to promise of cuBLAS without a setting.
    """
    if INTERPRETED or _precision(y) not in ("tf32", "ieee") or torch.are_deterministic_algorithms_enabled():
        return False
    return y.dtype == torch.float32 or "dtype_out" in torch.ops.aten.addmm.overloads()


def topk(pairs: Pairs, topk: int) -> tuple[Tensor, Tensor]:
    pairs = _contiguous(pairs)
    parts: list[Tensor] = []
    for first in range(0, topk, _SLOTS):  # each time, what comes after the last of those before
        parts.append(_topk(pairs, min(topk - first, _SLOTS), parts[-1][:, -1].contiguous() if parts else None))
    rank = torch.cat(parts, 1)
    bits = rank >> 32
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
    none = rank < _LOWEST
    return values.masked_fill(none, -torch.inf), (0x7FFFFFFF - (rank & 0xFFFFFFFF)).masked_fill(none, -1)


@_steps_down
def _topk(pairs: Pairs, count: int, below: Tensor | None) -> Tensor:
    """Ranks of the best ``count`` <= _SLOTS, in order, (M, count)."""
    x, y, scale, optional = *pairs[:3], pairs.vectors
    (m, d), n = x.shape, len(y)
    if n == 0:
        return torch.full((m, count), _LOWEST - 1, device=x.device)
    cut = _config("argmax" if count == 1 else "topk", x)
    blocks = _blocks(m, cut.block_m)
    splits = _splits(x, blocks, n, cut.block_n)
    parts = torch.empty(splits, m, count, dtype=torch.long, device=x.device)
    _launch(
        kernels._topk_kernel, (blocks * splits,), cut, x,
        x, y, scale, *optional, below, parts, count, blocks, splits, m, n,
        D=d, SLOTS=triton.next_power_of_2(count), BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
        PRECISION=_precision(x), TMA=False,
    )  # fmt: skip
    return parts.transpose(0, 1).reshape(m, splits * count).topk(count).values


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    (m, d), (width, block) = x.shape, _row_block(x.shape[1])
    unit, length = torch.empty_like(x, memory_format=torch.contiguous_format), _new(x, m)
    _launch(
        kernels._normalize_kernel, (_blocks(m, block),), None, x,
        x.contiguous(), unit, length, m, D=d, BLOCK=block, WIDTH=width,
    )  # fmt: skip
    return unit, length


def normalize_grad(x: Tensor, length: Tensor, grad: Tensor) -> Tensor:
    (m, d), (width, block) = x.shape, _row_block(x.shape[1])
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(
        kernels._normalize_grad_kernel, (_blocks(m, block),), None, x,
        x.contiguous(), length, grad.contiguous(), dx, m, D=d, BLOCK=block, WIDTH=width,
    )  # fmt: skip
    return dx


@_steps_down
def contrastive(
    x: Tensor, y: Tensor | None, scale: Tensor, dtype: torch.dtype, normalize: bool, both: bool, keep: bool
) -> tuple[Tensor, ...]:
    first, second = _views(x, y)
    b, d = first.shape
    width, block = _row_block(d)
    z, positive = x.new_empty(2 * b, d, dtype=dtype), _new(x, 2 * b)
    length = _new(x, 2 * b if normalize else 0)
    bounds = None if normalize else _new(x, 4, _PARTS)
    keys = torch.empty(2 * b, dtype=torch.int32, device=x.device)
    size = _range_of(z)
    ranges = keys.new_empty(_blocks(2 * b, 16), 2)  # room for the shortest
    _launch(
        kernels._prepare_kernel, (_blocks(b, block) if normalize else _PARTS,), None, x,
        first, second, z, length if normalize else None, bounds, positive, keys, ranges, scale, b,
        D=d, BLOCK=block, WIDTH=width, RANGE=size, PARTS=_PARTS,
    )  # fmt: skip
    lse = _new(x, 2 * b if y is None or both else b)
    loss = torch.empty_like(lse)
    pairs = unit_pairs(z, keys, scale, y is None)
    out = (lse, lse[:0]) if y is None else (lse[:b], lse[b:])
    _reduce("exp", pairs, out, (bounds, ranges, ranges), positive, loss)
    return loss, z, length, positive, lse, keys, ranges


@_steps_down
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
    first, second = _views(x, y)
    (b, d), one_set = first.shape, y is None
    both = lse.shape[0] > b
    if grad.stride() not in ((0,), (1,)):
        grad = grad.contiguous()
    if one_set:
        sides, positives = Sides(lse, grad, lse, grad), (positive, positive)
    else:
        sides = Sides(lse[:b], grad[:b], *((lse[b:], grad[b:]) if both else (None, None)))
        positives = (positive[:b], positive[b:])
    pairs = unit_pairs(z, keys, scale, one_set)
    got = _grad("exp", pairs, sides, _Want(want_x, want_y and not one_set), ranges, ranges, positives, parts=True)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else x.new_empty(0)
    if one_set:
        parts, pitches, outs = (got.dx, got.dx[:, b:]), (2 * b, 2 * b), (dx[:b], dx[b:])
        dy = x.new_empty(0)
    else:
        dy = torch.empty_like(second) if want_y else x.new_empty(0)
        parts, pitches, outs = (got.dx, got.dy), (b, b), (dx, dy)
    wanted = (want_x, want_x if one_set else want_y)
    dots = _new(x, 2 * b if wanted[1] else b)
    width, block = _row_block(d)
    _launch(
        kernels._restore_kernel, (_blocks(b, block),), None, x,
        first, second, z, length if len(length) else None, positive, lse, grad, scale,
        parts[0] if wanted[0] else None, len(parts[0]), pitches[0],
        parts[1] if wanted[1] else None, len(parts[1]), pitches[1],
        outs[0] if wanted[0] else None, outs[1] if wanted[1] else None, dots, b,
        D=d, BOTH=both, STRIDE=grad.stride(0), BLOCK=block, WIDTH=width,
    )  # fmt: skip
    return dx, dy, dots


def _views(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Raw rows of both views, contiguous: two tensors, or the halves of one."""
    x = x.contiguous()
    half = x.shape[0] // 2
    return (x[:half], x[half:]) if y is None else (x, y.contiguous())


def _contiguous(pairs: Pairs) -> Pairs:
    x = pairs.x.contiguous()
    y = x if pairs.symmetric else pairs.y.contiguous()
    vectors = [t if t is None else t.contiguous() for t in pairs.vectors]
    return Pairs._make([x, y, pairs.scale, *vectors, *pairs[11:]])


def _blocks(count: int, size: int) -> int:
    """``triton.cdiv`` takes 25 times as long to find out that it is not in a kernel."""
    return -(-count // size)


def _of(t: Tensor | None, part: slice, size: int = 1) -> Tensor | None:
    return None if t is None else t[part.start // size :]


def _splits(x: Tensor, programs: int, count: int, block: int) -> int:
    """Into how many spans the columns are cut so that every processor has work, and the last wave of programs, too."""
    if programs == 0:
        return 1
    slots = 2 * limits(x.device).processors  # most tiles leave room for a second
    blocks = _blocks(count, block)
    most = max(1, min(blocks // 2, _MOST_SPLITS if programs >= slots // 2 else blocks))
    best, least = 1, float(_blocks(programs, slots))
    for waves in range(1, 5):
        splits = min(max(1, waves * slots // programs), most)
        cost = _blocks(programs * splits, slots) / splits
        if cost < 0.9 * least:  # more parts are more to add
            best, least = splits, cost
    return _blocks(blocks, _blocks(blocks, best))


def _stride(sides: Sides) -> int:
    """Of the upstream gradients: 0 where one number stands for all rows."""
    return next((t.stride(0) for t in (sides.row_grad, sides.col_grad) if t is not None), 1)


def _row_block(d: int) -> tuple[int, int]:
    """Features and rows that a program of a kernel over whole rows holds."""
    width = triton.next_power_of_2(max(d, 16))
    return width, max(1, (512 if INTERPRETED else 4096) // width)


def _new(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _launch(kernel: Any, grid: tuple[int, ...], cut: Config | None, x: Tensor, *args: Any, **constants: Any) -> None:
    if 0 in grid:
        return
    if not INTERPRETED:
        constants.update(_OPTIONS)
        if cut is not None:
            constants.update(num_warps=cut.warps, num_stages=cut.stages)
    try:
        with on_device_of(x):
            kernel[grid](*args, **constants)
    except OutOfResources:
        if cut is None:
            raise
        _too_large.setdefault(limits(x.device).name, set()).add(cut)
        raise _TooLarge from None


def _config(kind: str, x: Tensor, pairs: Pairs | None = None) -> Config:
    """What the table says for rows like these."""
    crowded = pairs is not None and any(
        t is not None for t in (pairs.col_bias, pairs.only_x, pairs.row_ceiling, pairs.col_ceiling)
    )
    found = _find(kind, x, crowded)
    if found is None:
        raise RuntimeError(
            f"got a device whose shared memory is too small for every tile of {kind!r}; expected 48 KiB at least. "
            "Use fastcl.use_backend('chunked')."
        )
    return found


def _find(kind: str, x: Tensor, crowded: bool = False) -> Config | None:
    gpu = limits(x.device).name
    return config(_family(x), kind, x.shape[1], crowded, gpu, _too_large.get(gpu, ()))


def _family(x: Tensor) -> str:
    """How a tile is multiplied."""
    if INTERPRETED:
        return "interpreter"
    return family(limits(x.device).capability, x.element_size(), _precision(x))


def _range_of(x: Tensor) -> int:
    """How many rows share a range of drop keys: a divisor of every block."""
    return {"interpreter": 16, "wgmma": 64, "tcgen05": 64}.get(_family(x).partition(",")[0], 32)


def _is_half(x: Tensor) -> bool:
    return x.dtype == torch.float16


def _precision(x: Tensor) -> str:
    """How operands are multiplied: "ieee" fp32, "tf32" (and 16-bit numbers as they are), "bf16x3", or "upcast" to fp32.

    Triton has no matrix instructions for GPUs before Ampere, and its interpreter multiplies the bit patterns of bf16.
    """
    has_matrix_units = not INTERPRETED and limits(x.device).capability >= (8, 0)
    if x.dtype != torch.float32:
        return "tf32" if has_matrix_units else "upcast"
    if _settings.fp32 == "bf16x3":
        return "bf16x3" if has_matrix_units else "bf16x3, upcast" if INTERPRETED else "ieee"
    return "tf32" if has_matrix_units and tf32_is_allowed() else "ieee"


def _by_descriptor(*tensors: Tensor) -> bool:
    """Whether tiles are fetched by the copy engine of Hopper and later: it wants rows that start at 16 bytes."""
    x = tensors[0]
    if not DESCRIPTORS or (not INTERPRETED and limits(x.device).capability < (9, 0)):
        return False
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[0] > 0 for t in tensors)
    return aligned and x.shape[1] * x.element_size() % 16 == 0


def _sources(*tiles: tuple[Tensor, int, int] | None) -> list[Any]:
    """What ``_rows`` reads of a tensor in tiles of (rows, features): descriptors of them, or the tensors themselves."""
    if _by_descriptor(*(tile[0] for tile in tiles if tile)):
        return [tile and TensorDescriptor.from_tensor(tile[0], [*tile[1:]]) for tile in tiles]
    return [tile and tile[0] for tile in tiles]


@lru_cache(maxsize=None)
def _failed_check(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """A small numeric check of the kernels, once per device, dtype and process, before they become its default."""
    from . import chunked

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "got a CUDA graph capture before fastcl's kernels were used on this device; expected one ordinary step "
            "first, in which they are checked. Run the loss once before capturing."
        )
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(150, 40, generator=generator), dim=1).to(device, dtype)
    keys = torch.arange(150, device=device) // 2
    scale = torch.tensor(10.0, device=device)
    one_set = Pairs(z, z, scale, drop_x=keys, drop_y=keys, symmetric=True)
    two_sets = Pairs(z[:75], z[75:], scale, drop_x=keys[:75], drop_y=keys[75:])
    tolerance = 5e-3 if dtype != torch.float32 or tf32_is_allowed() else 1e-5
    try:
        for link, pairs in (("exp", one_set), ("exp", two_sets), ("softplus", two_sets)):
            both = not pairs.symmetric
            exact_row, exact_col = chunked.reduce(link, pairs, both, True)
            row_side = (exact_row, torch.ones_like(exact_row))
            col_side = (exact_col, torch.ones_like(exact_col)) if both else row_side
            want = (link, pairs, Sides(*row_side, *col_side), True, both, False)
            got = (*reduce(link, pairs, both, True), *grad(*want))
            for ours, exact in zip(got, (exact_row, exact_col, *chunked.grad(*want)), strict=True):
                error = float((ours - exact).norm() / exact.norm()) if exact.numel() else 0.0
                if not error <= tolerance:  # a NaN fails too
                    return f"failed its numeric check on {device}: relative error {error:.1e}, allowed {tolerance:.0e}"
    except Exception as error:  # whatever the compiler or driver raises, another backend can still serve
        return f"does not run on {device}: {type(error).__name__}: {error}"
    return None
