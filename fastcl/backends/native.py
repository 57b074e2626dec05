"""C++ on the CPU (``csrc/``), reached by raw addresses: fp32, bf16 and fp16 rows.

A logit is turned into its exponential while it is still in registers. The forward keeps those exponentials, tile by
tile, while they fit into a workspace (256 MiB, or ``FASTCL_WORKSPACE_MB``); a backward over exactly the same operands
reads them back and computes only the rest again. There is one workspace in a process, it belongs to the last forward,
and results do not depend on it, except that bf16 rows round what is kept.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from .. import _settings
from . import Pairs, Sides

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError as _error:
    _C = None
    _why_missing = str(_error)

_LINKS = {"exp": 0, "softplus": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WORKSPACE = 256 * 2**20
_BUILD_REPORT = Path(__file__).parent.parent / "_native_build.txt"


def status() -> str:
    """In a sentence: the instruction set in use, or why there is none."""
    if _C is not None:
        return f"{isa()} kernels, of {', '.join(_C.instruction_sets())} on this machine"
    if _BUILD_REPORT.exists():
        reason = _BUILD_REPORT.read_text(encoding="utf-8").partition("\n")[0]
        return f"the native module was not built ({reason}); the build log is {_BUILD_REPORT}"
    return f"this installation has no native module ({_why_missing}); pip install fastcl from source with a C++20 compiler"


def isa() -> str:
    """The instruction set whose kernels run: the best of this machine, or ``FASTCL_CPU_ISA``."""
    sets: list[str] = _C.instruction_sets()
    return _settings.cpu_isa if _settings.cpu_isa in sets else sets[0]


def unsupported(op: str, pairs: Pairs) -> str | None:
    if pairs.x.device.type != "cpu":
        return f"needs CPU tensors, got {pairs.x.device.type}"
    if _C is None:
        return status()
    if pairs.x.dtype not in _DTYPES:
        return f"has no kernels for {pairs.x.dtype}"
    return None


def reduce(link: str, pairs: Pairs, both: bool, keep: bool) -> tuple[Tensor, Tensor]:
    row, col = _new(len(pairs.x)), _new(len(pairs.y) if both else 0)
    with _Call(pairs) as call:
        engine = call.engine
        kept = _workspace if keep and _workspace.lock.acquire(blocking=False) else None
        try:
            tiles = _workspace.open(link, call) if kept else 0
            packed = kept.packed if kept and tiles else _bytes(engine.packed_bytes(False))
            engine.pack(packed.data_ptr(), bool(tiles))
            stored = engine.reduce(
                _LINKS[link], both, call.work(), _workspace.address(tiles), tiles, row.data_ptr(), col.data_ptr()
            )
            if kept:
                kept.count = stored
        finally:
            if kept:
                kept.lock.release()
    return row, col


def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = len(pairs.x), len(pairs.y)
    with _Call(pairs) as call:
        engine = call.engine
        dx, dy = (_new(rows, engine.wide, wanted=want) for rows, want in ((m, want_dx), (n, want_dy)))
        row_sum, col_sum = (_new(rows, wanted=want_sums) for rows in (m, n))
        held = [None if t is None else t.contiguous() for t in sides]
        kept = _workspace.lock.acquire(blocking=False)
        try:
            tiles = _workspace.count if kept and _workspace.holds(link, call) else 0
            if not tiles:
                packed = _bytes(engine.packed_bytes(True))
                engine.pack(packed.data_ptr(), True)
            engine.grad(
                _LINKS[link], *map(_address, held), call.work(), _workspace.address(tiles), tiles,
                *map(_address, (dx, dy, row_sum, col_sum)),
            )  # fmt: skip
        finally:
            if kept:
                _workspace.lock.release()
    depth = pairs.x.shape[1]
    dx, dy = (d[:, :depth].contiguous() if want else d for d, want in ((dx, want_dx), (dy, want_dy)))
    return dx, dy, row_sum, col_sum


def reduce_grad(link: str, pairs: Pairs, want_dx: bool, want_sums: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Both in one pass over y; ``None`` where two passes are needed."""
    if link != "exp" or not want_dx:
        return None
    with _Call(pairs) as call:
        engine = call.engine
        row, dx = _new(len(pairs.x)), _new(len(pairs.x), engine.wide)
        packed = _bytes(engine.packed_bytes(True))
        engine.pack(packed.data_ptr(), True)
        if not engine.reduce_grad(call.work(), row.data_ptr(), dx.data_ptr()):
            return None
    row_sum = (row != -torch.inf).to(row.dtype) if want_sums else _new(0)  # softmax weights sum to 1
    return row, dx[:, : pairs.x.shape[1]].contiguous(), row_sum


def topk(pairs: Pairs, topk: int) -> tuple[Tensor, Tensor]:
    values = _new(len(pairs.x), topk)
    indices = torch.empty_like(values, dtype=torch.long)
    with _Call(pairs) as call:
        packed = _bytes(call.engine.packed_bytes(False))
        call.engine.pack(packed.data_ptr(), False)
        call.engine.topk(call.work(), topk, values.data_ptr(), indices.data_ptr())
    return values, indices


class _Call:
    """One engine and the tensors whose addresses it holds."""

    def __init__(self, pairs: Pairs) -> None:
        x = pairs.x.detach()
        y = x if pairs.symmetric else pairs.y.detach()
        self.vectors = tuple(None if t is None else t.detach().contiguous() for t in pairs[3:-1])
        self.pairs, self.operands, self.scale = pairs, (x, y), float(pairs.scale)
        self.engine = _C.Engine(
            _rows(x), _rows(y), pairs.symmetric, self.scale, *map(_address, self.vectors), isa(),
            torch.get_num_threads(),
        )  # fmt: skip

    def work(self) -> int:
        self.scratch = _bytes(self.engine.work_bytes)
        return self.scratch.data_ptr()

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Workspace:
    """What the last forward kept: its packed operands, its tiles, and what they were computed from."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.packed = self.tiles = torch.empty(0, dtype=torch.uint8)

    def open(self, link: str, call: _Call) -> int:
        """Make room for the tiles of a forward; how many there is room for."""
        budget = _WORKSPACE if _settings.workspace_bytes is None else _settings.workspace_bytes
        engine = call.engine
        tiles: int = min(engine.tiles, budget // engine.tile_bytes)
        self.count = 0
        if tiles:
            self.packed = _at_least(self.packed, engine.packed_bytes(True))
            self.tiles = _at_least(self.tiles, tiles * engine.tile_bytes + 64)
            self.of = self._of(link, call)
            self.vectors = [None if t is None else t.clone() for t in call.vectors]
        return tiles

    def holds(self, link: str, call: _Call) -> bool:
        """Whether the tiles are those of this gradient: everything they were computed from is compared, bit by bit."""
        return bool(
            self.count
            and self.of == self._of(link, call)
            and all(a is b or torch.equal(a, b) for a, b in zip(self.vectors, call.vectors, strict=True))
            and call.engine.reuse(self.packed.data_ptr())
        )

    def address(self, tiles: int) -> int:
        return self.tiles.data_ptr() if tiles else 0

    @staticmethod
    def _of(link: str, call: _Call) -> tuple[object, ...]:
        x, y = call.operands
        present = tuple(t is None for t in call.vectors)
        return link, isa(), x.dtype, x.shape, y.shape, call.pairs.symmetric, call.scale, present


_workspace = _Workspace()


def _rows(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), _DTYPES[x.dtype], *x.shape, *x.stride()


def _address(t: Tensor | None) -> int:
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def _new(*shape: int, wanted: bool = True) -> Tensor:
    return torch.zeros(shape if wanted else (0,))


def _bytes(n: int) -> Tensor:
    buffer = torch.empty(n, dtype=torch.uint8)
    _C.expect_large(buffer.data_ptr(), n)
    return buffer


def _at_least(buffer: Tensor, n: int) -> Tensor:
    return buffer if len(buffer) >= n else _bytes(n)
