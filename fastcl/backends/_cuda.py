"""CUDA C++ on a GPU (``csrc/cuda``), reached by raw addresses: fp16 and bf16 rows of at most 256 features.

Here stands what is launched. Results are found in the same steps as those of the ``triton`` backend: bounds and key
ranges, sums in parts, then a launch that adds the parts and repairs what the constant shift lost; gradients are owned
by blocks of rows. Tests run the same kernels on CPU tensors, in a simulator (``csrc/sim``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import Pairs, Sides

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

kernels: ModuleType | None = getattr(_C, "cuda", None)
_LINKS = {"exp": 0, "softplus": 1}
_DTYPES = {torch.bfloat16: 1, torch.float16: 2}  # as csrc/kernels.hpp numbers them
_SPANS = 32  # of rows, and of columns
_UNITS = _SPANS * (_SPANS + 1) // 2
_THREADS = 128
_BUILD_REPORT = Path(__file__).parent.parent / "_cuda_build.txt"


def unsupported(op: str, x: Tensor) -> str | None:
    if kernels is None:
        reason = (
            _BUILD_REPORT.read_text(encoding="utf-8").partition("\n")[0] if _BUILD_REPORT.exists() else "unknown why"
        )
        return f"was built without CUDA kernels ({reason}); pip install fastcl from source where nvcc is found"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "has CUDA kernels for compute capability 8.0 and later only"
    if op == "topk":
        return "has no CUDA kernel for neighbours"
    if x.dtype not in _DTYPES:
        return f"needs float16 or bfloat16 rows on a GPU, got {x.dtype}"
    if x.shape[1] % 8 or not 0 < x.shape[1] <= kernels.deepest:
        return f"needs a multiple of 8 features, at most {kernels.deepest}, on a GPU; got {x.shape[1]}"
    return None


def reduce(link: str, pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
    call = _Call(link, pairs)
    m, n = call.m, call.n
    row, col = _new(pairs.x, m), _new(pairs.x, n if both else 0)
    if m == 0 or n == 0:
        empty = -torch.inf if link == "exp" else 0.0
        return row.fill_(empty), col.fill_(empty)
    call.find_bounds(link == "exp")
    rows, cols, _, _, parts = call.products.tiles(call.depth)
    if pairs.symmetric:
        side = max(rows, cols)
        row_span = col_span = _span(n, side, _SPANS)
        row_spans = _blocks(n, row_span)
        units = row_spans * (row_spans + 1) // 2
        row_parts = col_parts = _new(pairs.x, parts * row_spans + 1, n)
    else:
        row_span = _span(m, rows, 24)
        row_spans = _blocks(m, row_span)
        col_span = _span(n, cols, _blocks(_UNITS, row_spans))
        col_spans = _blocks(n, col_span)
        units = row_spans * col_spans
        row_parts, col_parts = _new(pairs.x, parts * col_spans, m), _new(pairs.x, row_spans, n if both else 0)
    room = 126 - (max(m, n) - 1).bit_length()
    call.launch(
        call.products.sums, min(units, call.blocks_at_once()), call.pairs, call.dtype, call.link,
        tuple(map(_address, (call.bounds, row_parts, col_parts))), (room, row_span, col_span, row_spans, units),
    )  # fmt: skip
    sides = []
    for side_pairs, parts, out in ((call.pairs, row_parts, row), (call.swapped(), col_parts, col)):
        sides.append((side_pairs, (_address(parts), _address(out)), (len(parts), _blocks(len(out), _THREADS))))
    blocks = sum(side[2][1] for side in sides)
    call.launch(call.kernels.finish, blocks, *sides, call.dtype, call.link, _address(call.bounds), room)
    return row, col


def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool, want_total: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, row_sum, col_sum, and the results of rows; with no upstream gradients, those of the sum over all rows."""
    call = _Call(link, pairs)
    (m, d), n = pairs.x.shape, call.n
    sides = Sides(*(call.keep(t, torch.float32) for t in sides))
    wanted = ((want_dx, want_sums, want_total), (want_dy, want_sums and not pairs.symmetric, False))
    if m == 0 or n == 0:

        def zeros(want: bool, *shape: int) -> Tensor:
            return _new(pairs.x, *(shape if want else (0,))).zero_()

        dx, dy = zeros(want_dx, m, d), zeros(want_dy, n, d)
        return dx, dy, zeros(want_sums, m), zeros(want_sums, n), zeros(want_total, m)
    call.find_bounds(False)
    balance = _new(pairs.x, 3)
    side_addresses = tuple(map(_address, sides))
    call.launch(call.kernels.balance, 1, call.pairs, call.dtype, call.link, side_addresses, _address(balance))
    _, _, rows, cols, _ = call.products.tiles(d)
    blocks = [_blocks(count, rows) if any(want) else 0 for count, want in zip((m, n), wanted, strict=True)]
    results: list[Tensor] = []
    tuples = []
    for side, (count, other, want) in enumerate(((m, n, wanted[0]), (n, m, wanted[1]))):
        splits = _splits(pairs.x, sum(blocks), _blocks(other, cols))
        shapes = ((splits, count, d), (splits, count), (splits, count))
        parts = [_new(pairs.x, *(shape if w else (0,))) for shape, w in zip(shapes, want, strict=True)]
        results += parts
        tuples.append((
            call.swapped() if side else call.pairs,
            (*side_addresses[2:], *side_addresses[:2]) if side else side_addresses,
            tuple(map(_address, parts)), (blocks[side], splits),
        ))  # fmt: skip
    programs = sum(t[3][0] * t[3][1] for t in tuples)
    if programs:
        call.launch(call.products.grad, programs, *tuples, call.dtype, call.link, _address(balance))
    dx, row_sum, total, dy, col_sum, _ = (t if len(t) == 0 else t[0] if len(t) == 1 else t.sum(0) for t in results)
    return dx, dy, row_sum, row_sum.clone() if pairs.symmetric else col_sum, total


def reduce_grad(
    link: str, pairs: Pairs, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if link != "softplus":
        return None
    dx, dy, row_sum, _, row = grad(link, pairs, Sides(), want_dx, want_dy, want_sums, want_total=True)
    return row, dx, dy, row_sum


def family(device: torch.device) -> str:
    """Which kernels multiply there: ``hopper``'s need exactly its instructions, ``ampere``'s run on all later GPUs."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "hopper" if hopper and hasattr(kernels, "hopper") else "ampere"


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Call:
    """Addresses of one implicit matrix, and the tensors behind them, which must live as long."""

    def __init__(self, link: str, pairs: Pairs) -> None:
        assert kernels is not None
        self.kernels, self.link, self.dtype = kernels, _LINKS[link], _DTYPES[pairs.x.dtype]
        self.products = getattr(kernels, family(pairs.x.device))
        self.tensors: list[Tensor] = []
        self.device, self.symmetric = pairs.x.device, pairs.symmetric
        (self.m, self.depth), self.n = pairs.x.shape, len(pairs.y)
        x = self.keep(_aligned(pairs.x))
        y = x if pairs.symmetric else self.keep(_aligned(pairs.y))
        self.rows = (_address(x), _address(y))
        scale = self.keep(pairs.scale.reshape(1), torch.float32)
        self.reals = (_address(scale), *(_address(self.keep(t, torch.float32)) for t in (
            pairs.row_bias, pairs.col_bias, pairs.row_ceiling, pairs.col_ceiling)))  # fmt: skip
        keys = (pairs.drop_x, pairs.drop_y, pairs.only_x, pairs.only_y)
        self.keys = tuple(_address(self.keep(t, torch.long)) for t in keys)
        self.bounds: Tensor | None = None
        self.ranges = (0, 0)

    @property
    def pairs(self) -> Any:
        return (self.rows, (self.m, self.n, self.depth), self.reals, (*self.keys, *self.ranges), self.symmetric)

    def swapped(self) -> Any:
        """The transposed matrix."""
        scale, row_bias, col_bias, row_ceiling, col_ceiling = self.reals
        drop_x, drop_y, only_x, only_y = self.keys
        return (
            self.rows[::-1], (self.n, self.m, self.depth), (scale, col_bias, row_bias, col_ceiling, row_ceiling),
            (drop_y, drop_x, only_y, only_x, *self.ranges[::-1]), self.symmetric,
        )  # fmt: skip

    def keep(self, t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        if t is None:
            return None
        t = t.detach().to(dtype or t.dtype).contiguous()
        self.tensors.append(t)
        return t

    def find_bounds(self, bounds: bool) -> None:
        """Bounds on what a logit is made of, where they are wanted, and the ranges of the drop keys."""
        x = self.tensors[0]
        if bounds:
            self.bounds = _new(x, 4, self.kernels.parts)
        if self.keys[0]:
            counts = (_blocks(count, self.kernels.keys_in_a_range) for count in (self.m, self.n))
            row, col = (torch.empty(count, 2, dtype=torch.long, device=x.device) for count in counts)
            self.tensors += (row, col)
            self.ranges = (_address(row), _address(row if self.symmetric else col))
        if bounds or self.keys[0]:
            self.launch(self.kernels.bounds, self.kernels.parts, self.pairs, self.dtype, _address(self.bounds), *self.ranges)

    def launch(self, kernel: Callable[..., None], blocks: int, *args: Any) -> None:
        if self.device.type != "cuda":  # the simulator
            return kernel(*args, blocks, 0)
        with torch.cuda.device(self.device):
            kernel(*args, blocks, torch.cuda.current_stream().cuda_stream)

    def blocks_at_once(self) -> int:
        """Of sums, on the whole device."""
        return processors(self.device) * (1 if self.products is getattr(self.kernels, "hopper", None) else 2)


def _aligned(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _span(count: int, block: int, most: int) -> int:
    """Rows of one of at most ``most`` equal spans, in whole blocks."""
    blocks = _blocks(count, block)
    return _blocks(blocks, min(blocks, most)) * block


def _splits(x: Tensor, programs: int, tiles: int) -> int:
    """Into how many spans the columns are cut so that every processor has work."""
    available = processors(x.device)
    if programs == 0 or programs >= available:
        return 1
    each = _blocks(tiles, min(_blocks(2 * available, programs), max(1, tiles // 2)))
    return _blocks(tiles, each)


def _new(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _address(t: Tensor | None) -> int:
    return 0 if t is None or t.numel() == 0 else t.data_ptr()
