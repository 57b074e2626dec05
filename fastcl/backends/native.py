"""C++ on the CPU (``csrc/``), reached by raw addresses: fp32, bf16, fp16 and fp64 rows. CUDA C++ is in ``_cuda``.

A logit is turned into its exponential while it is still in registers. The forward keeps its packed operands and
those exponentials, tile by tile, while they fit into a workspace (256 MiB, or ``FASTCL_WORKSPACE_MB``); a backward
over exactly the same operands reads them back and computes only the rest again. There is one workspace in a process,
it belongs to the last forward, and no bit of a result depends on it: other threads may have it at any time. fp64 rows
are served by plain loops, which keep nothing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .. import _settings
from . import Pairs, Sides, _cuda, chunked, unit_pairs

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError as _error:
    _C = None
    _why_missing = str(_error)

if _C is not None and _settings.cpu_isa not in (None, *_C.instruction_sets()):
    warnings.warn(
        f"FASTCL_CPU_ISA is {_settings.cpu_isa!r}; expected one of {', '.join(_C.instruction_sets())} on this machine. "
        "The best of them is used.",
        stacklevel=2,
    )

_LINKS = _cuda._LINKS
_DTYPES = {**_cuda._DTYPES, torch.float64: 3}  # which the CPU alone has
_WORKSPACE = 256 * 2**20
_BUILD_REPORT = Path(__file__).parent.parent / "_native_build.txt"


def status() -> str:
    """In a sentence: the instruction set in use, or why there is none."""
    if _C is not None:
        return f"{isa()} kernels, of {', '.join(_C.instruction_sets())} on this machine"
    if _BUILD_REPORT.exists():
        reason = _BUILD_REPORT.read_text(encoding="utf-8").partition("\n")[0]
        return f"the native module was not built ({reason}); the build log is {_BUILD_REPORT}"
    return (
        f"this installation has no native module ({_why_missing}); pip install fastcl from source with a C++20 compiler"
    )


def isa() -> str | None:
    """The instruction set whose kernels run: the best of this machine, or ``FASTCL_CPU_ISA``; none without module."""
    if _C is None:
        return None
    sets: list[str] = _C.instruction_sets()
    return _settings.cpu_isa if _settings.cpu_isa in sets else sets[0]


def unsupported(op: str, x: Tensor) -> str | None:
    if x.device.type not in ("cpu", "cuda"):
        return f"needs CPU or CUDA tensors, got {x.device.type}"
    if _C is None:
        return status()
    if x.is_cuda:
        return _cuda.unsupported(op, x)
    if x.dtype not in _DTYPES:
        return f"has no kernels for {x.dtype}"
    if op == "contrastive" and x.dtype == torch.float64:
        return "has no fused contrastive operation for float64 rows"
    return None


def reduce(link: str, pairs: Pairs, both: bool, keep: bool) -> tuple[Tensor, Tensor]:
    if pairs.x.is_cuda:
        return _cuda.reduce(link, pairs, both)
    if pairs.x.dtype == torch.float64:
        row = _double_reduce(link, pairs)
        return row, _double_reduce(link, pairs.swapped()) if both else row.new_empty(0)
    row, col = _new(len(pairs.x)), _new(len(pairs.y) if both else 0)
    _reduce(link, pairs, keep, row, col)
    return row, col


def _reduce(link: str, pairs: Pairs, keep: bool, row: Tensor, col: Tensor) -> None:
    """Writes the results of rows, and (unless empty) of columns."""
    call = _Call(pairs)
    with _workspace.borrowed(keep) as workspace:
        room = workspace.open(link, call) if workspace else 0
        packed = workspace.packed if workspace and room else _bytes(call.engine.packed_bytes(False))
        call.engine.pack(packed.data_ptr(), bool(room))
        kept = call.engine.reduce(
            _LINKS[link], len(col) > 0, call.work(), _workspace.address(room), room, row.data_ptr(), col.data_ptr()
        )
        if workspace:
            workspace.count = kept


def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if pairs.x.is_cuda:
        return _cuda.grad(link, pairs, sides, want_dx, want_dy, want_sums)[:4]
    if pairs.x.dtype == torch.float64:
        dx, row_sum = _double_grad(link, pairs, sides, want_dx, want_sums)
        if pairs.symmetric:
            return dx, dx.new_empty(0), row_sum, row_sum.clone()
        dy, col_sum = _double_grad(link, pairs.swapped(), sides.swapped(), want_dy, want_sums)
        return dx, dy, row_sum, col_sum
    dx, dy, row_sum, col_sum = _grad(link, pairs, sides, want_dx, want_dy, want_sums)
    d = pairs.x.shape[1]
    return _narrow(dx, d) if want_dx else dx, _narrow(dy, d) if want_dy else dy, row_sum, col_sum


def _grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for rows that are not fp64; dx and dy have features up to a whole vector."""
    call = _Call(pairs)
    m, n = len(pairs.x), len(pairs.y)
    dx, dy = (_new(rows, call.engine.wide, wanted=want) for rows, want in ((m, want_dx), (n, want_dy)))
    row_sum, col_sum = (_new(rows, wanted=want_sums) for rows in (m, n))
    side_vectors = [None if t is None else t.contiguous() for t in sides]
    with _workspace.borrowed() as workspace:
        kept = workspace.count if workspace and workspace.holds(link, call) else 0
        if not kept:
            packed = _bytes(call.engine.packed_bytes(True))
            call.engine.pack(packed.data_ptr(), True)
        call.engine.grad(
            _LINKS[link], *map(_address, side_vectors), call.work(), _workspace.address(kept), kept,
            *map(_address, (dx, dy, row_sum, col_sum)),
        )  # fmt: skip
    return dx, dy, row_sum, col_sum


def reduce_grad(
    link: str, pairs: Pairs, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if pairs.x.is_cuda:
        return _cuda.reduce_grad(link, pairs, want_dx, want_dy, want_sums)
    if link != "exp" or not want_dx or want_dy or pairs.x.dtype == torch.float64:
        return None
    call = _Call(pairs)
    row, dx = _new(len(pairs.x)), _new(len(pairs.x), call.engine.wide)
    packed = _bytes(call.engine.packed_bytes(True))
    call.engine.pack(packed.data_ptr(), True)
    if not call.engine.reduce_grad(call.work(), row.data_ptr(), dx.data_ptr()):
        return None  # the constant shift does not serve here
    row_sum = (row != -torch.inf).to(row.dtype) if want_sums else _new(0)  # softmax weights sum to 1
    return row, _narrow(dx, pairs.x.shape[1]), _new(0), row_sum


def topk(pairs: Pairs, topk: int) -> tuple[Tensor, Tensor]:
    call = _Call(pairs)
    values = _new(len(pairs.x), topk, dtype=call.dtype)
    indices = torch.empty_like(values, dtype=torch.long)
    if call.dtype == torch.float64:
        call.engine.topk(topk, values.data_ptr(), indices.data_ptr())
        return values, indices
    packed = _bytes(call.engine.packed_bytes(False))
    call.engine.pack(packed.data_ptr(), False)
    call.engine.topk(call.work(), topk, values.data_ptr(), indices.data_ptr())
    return values, indices


def contrastive(
    x: Tensor, y: Tensor | None, scale: Tensor, dtype: torch.dtype, normalize: bool, both: bool, keep: bool
) -> tuple[Tensor, ...]:
    if x.is_cuda:
        return _cuda.contrastive(x, y, scale, dtype, normalize, both, keep)
    one_set, threads = y is None, torch.get_num_threads()
    rows = len(x) if one_set else 2 * len(x)
    half, anchors = rows // 2, rows if one_set or both else rows // 2
    z, length, positive = _new(rows, x.shape[1], dtype=dtype), _new(rows if normalize else 0), _new(rows)
    for view, first in _views(x, y):
        _C.normalize(_rows(view), threads, _DTYPES[dtype], *map(_address, (z[first:], length[first:])))
    keys = torch.arange(half).repeat(2)
    lse, loss = _new(anchors), _new(anchors)
    row, col = (lse, lse[:0]) if one_set else (lse[:half], lse[half:])
    _reduce("exp", unit_pairs(z, keys, scale, one_set), keep, row, col)
    _C.losses(_rows(z), float(scale), anchors, lse.data_ptr(), positive.data_ptr(), threads, loss.data_ptr())
    return loss, z, length, positive, lse, keys, keys.new_zeros(-(-rows // 16), 2)


def contrastive_grad(
    x: Tensor, y: Tensor | None, scale: Tensor, grad: Tensor, saved: tuple[Tensor, ...], want_x: bool, want_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda:
        return _cuda.contrastive_grad(x, y, scale, grad, saved, want_x, want_y)
    z, length, positive, lse, keys, _ = saved
    one_set, half, anchors = y is None, len(z) // 2, len(lse)
    grad = grad.detach().to(torch.float32)
    if len(grad) > 1 and grad.stride(0):
        grad = grad.contiguous()
    of_lse, finite = _new(anchors), _new(anchors)
    _C.upstreams(
        anchors, lse.data_ptr(), positive.data_ptr(), grad.data_ptr(), grad.stride(0) if anchors > 1 else 0,
        of_lse.data_ptr(), finite.data_ptr(),
    )  # fmt: skip
    if one_set:
        sides = Sides(finite, of_lse, finite, of_lse)
    else:
        sides = Sides(finite[:half], of_lse[:half], *((finite[half:], of_lse[half:]) if anchors > half else ()))
    want = (want_x, want_y and not one_set)
    negatives = _grad("exp", unit_pairs(z, keys, scale, one_set), sides, *want, False)
    outs = [_new(*x.shape, wanted=w, dtype=x.dtype) for w in want]
    dots = _new(len(z) if one_set or want[1] else half)
    for (view, first), w, dz, out in zip(_views(x, y), want, negatives, outs, strict=False):
        if w:
            _C.restore(
                _rows(z), float(scale), _rows(view), _address(length[first:]), first, anchors, of_lse.data_ptr(),
                dz.data_ptr(), dz.shape[1], torch.get_num_threads(), out.data_ptr(), dots[first:].data_ptr(),
            )  # fmt: skip
    return outs[0], outs[1], dots


def _views(x: Tensor, y: Tensor | None) -> list[tuple[Tensor, int]]:
    """Raw rows, and which of the stacked ones they are from."""
    return [(x.detach(), 0)] if y is None else [(x.detach(), 0), (y.detach(), len(x))]


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        return chunked.normalize(x)
    unit, length = _new(*x.shape, dtype=x.dtype), _new(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    _C.normalize(_rows(x.detach()), torch.get_num_threads(), _DTYPES[x.dtype], unit.data_ptr(), length.data_ptr())
    return unit, length


def normalize_grad(x: Tensor, length: Tensor, grad: Tensor) -> Tensor:
    if x.is_cuda:
        return chunked.normalize_grad(x, length, grad)
    dx = _new(*x.shape, dtype=x.dtype)
    rows = _rows(x.detach()), length.data_ptr(), _rows(grad.detach())
    _C.normalize_grad(*rows, torch.get_num_threads(), dx.data_ptr())
    return dx


def release_workspace() -> None:
    """Give back what the last forward kept; the next one takes it anew. Without the native module there is nothing."""
    if _C is None:
        return
    with _workspace.lock:
        _workspace.count = 0
        _workspace.packed = _workspace.tiles = _bytes(0)
        _workspace.vectors = []


class _Call:
    """One engine, and the tensors whose addresses it holds, which must live as long."""

    def __init__(self, pairs: Pairs) -> None:
        x, y = pairs.x.detach(), pairs.y.detach()
        engine, self.dtype = _C.Engine, torch.float32
        if x.dtype == torch.float64:
            x, y, engine, self.dtype = x.contiguous(), y.contiguous(), _C.Doubles, torch.float64
        self.operands = (x, x if pairs.symmetric else y)
        self.vectors = tuple(None if t is None else t.detach().contiguous() for t in pairs.vectors)
        self.symmetric, self.scale = pairs.symmetric, float(pairs.scale)
        here = isa(), torch.get_num_threads()
        rows = _rows(x)
        columns = rows if pairs.symmetric else _rows(y)
        self.engine = engine(rows, columns, pairs.symmetric, self.scale, *map(_address, self.vectors), *here)
        if pairs.guide_x is None or pairs.guide_y is None:
            return
        # The guide is an engine of its own, whose logits have ceilings. It computes as the rows' engine does: in fp64
        # beside fp64 rows, else in fp32, from guides of at most that.
        dtypes = (pairs.guide_x.dtype, pairs.guide_y.dtype)
        common = self.dtype if self.dtype == torch.float64 or torch.float64 in dtypes else torch.promote_types(*dtypes)
        guides = [t.to(common).contiguous() for t in (pairs.guide_x, pairs.guide_y)]
        limits = [None if t is None else t.to(self.dtype).contiguous() for t in (pairs.row_limit, pairs.col_limit)]
        self.vectors += (*guides, *limits)
        guide = engine(*map(_rows, guides), False, 1.0, *(0,) * 6, *map(_address, limits), *here)
        if self.dtype == torch.float32:
            self.packed_guide = _bytes(guide.packed_bytes(False))
            guide.pack(self.packed_guide.data_ptr(), False)
        self.engine.guided_by(guide)

    def work(self) -> int:
        """Address of the scratch of the threads."""
        self.scratch = _bytes(self.engine.work_bytes)
        return self.scratch.data_ptr()


class _Workspace:
    """What the last forward kept: its packed operands, its tiles, and what they were computed from."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.packed = self.tiles = torch.empty(0, dtype=torch.uint8)
        self.of: tuple[object, ...] = ()
        self.vectors: list[Tensor | None] = []

    @contextmanager
    def borrowed(self, wanted: bool = True) -> Iterator[_Workspace | None]:
        """The workspace for one call, or ``None`` where it is not wanted or another thread has it."""
        if not (wanted and self.lock.acquire(blocking=False)):
            yield None
            return
        try:
            yield self
        finally:
            self.lock.release()

    def open(self, link: str, call: _Call) -> int:
        """Make room for the tiles of a forward; how many there is room for."""
        budget = _WORKSPACE if _settings.workspace_bytes is None else _settings.workspace_bytes
        engine = call.engine
        packed: int = engine.packed_bytes(True)
        tiles: int = min(engine.tiles, max(0, budget - packed) // engine.tile_bytes)
        self.count = 0
        if tiles:
            self._hold("packed", packed)
            self._hold("tiles", tiles * engine.tile_bytes + 64)
            self.of = self._of(link, call)
            self.vectors = [None if t is None else t.clone() for t in call.vectors]
        return tiles

    def _hold(self, name: str, size: int) -> None:
        if len(getattr(self, name)) < size:
            setattr(self, name, _bytes(0))  # before its successor is there, not after
            setattr(self, name, _bytes(size))

    def holds(self, link: str, call: _Call) -> bool:
        """Whether the tiles are those of this gradient: everything they were computed from is compared, bit by bit."""
        return bool(
            self.count
            and self.of == self._of(link, call)
            and all(_equal(a, b) for a, b in zip(self.vectors, call.vectors, strict=True))
            and call.engine.reuse(self.packed.data_ptr())
        )

    def address(self, tiles: int) -> int:
        return self.tiles.data_ptr() if tiles else 0

    @staticmethod
    def _of(link: str, call: _Call) -> tuple[object, ...]:
        x, y = call.operands
        return link, isa(), x.dtype, x.shape, y.shape, call.symmetric, call.scale, len(call.vectors)


_workspace = _Workspace()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    (count, depth), (row_stride, col_stride) = x.shape, x.stride()
    return x.data_ptr(), _DTYPES[x.dtype], count, depth, row_stride, col_stride


def _address(t: Tensor | None) -> int:
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def _double_reduce(link: str, pairs: Pairs) -> Tensor:
    call = _Call(pairs)
    row = _new(len(pairs.x), dtype=call.dtype)
    call.engine.reduce(_LINKS[link], row.data_ptr())
    return row


def _double_grad(link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_sum: bool) -> tuple[Tensor, Tensor]:
    call = _Call(pairs)
    side_vectors = [None if t is None else t.contiguous() for t in sides]
    dx = _new(*pairs.x.shape, wanted=want_dx, dtype=call.dtype)
    row_sum = _new(len(pairs.x), wanted=want_sum, dtype=call.dtype)
    if want_dx or want_sum:
        call.engine.grad(_LINKS[link], *map(_address, (*side_vectors, dx, row_sum)))
    return dx, row_sum


def _new(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape if wanted else (0,), dtype=dtype)


def _narrow(padded: Tensor, depth: int) -> Tensor:
    return padded[:, :depth].contiguous()


def _bytes(n: int) -> Tensor:
    buffer = torch.empty(n, dtype=torch.uint8)
    _C.expect_large(buffer.data_ptr(), n)
    return buffer
