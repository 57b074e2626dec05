"""Tiled Triton kernels for CUDA tensors (and, with TRITON_INTERPRET=1, for CPU tensors in tests).

A program owns BLOCK_M rows and walks the columns, so nothing is atomic and results repeat bit for bit. Column results
are the same kernels on the transposed pairs. The maths stands in ``fastcl._ops``; the interpreter rules out inline
assembly and libdevice, which is why log1p is written out below.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Pairs, Sides, tf32_is_allowed


class Config(NamedTuple):
    """How a launch is cut: rows and columns of a tile, depth of a step of its product, features of an output slice."""

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    warps: int
    stages: int


# By how a tile is multiplied; python -m benchmarks.aot shows that each fits registers and shared memory everywhere.
_CONFIGS = {
    "fp32 units": Config(32, 64, 16, 64, 8, 1),
    "fp32 units, 16 bits": Config(32, 64, 32, 64, 8, 1),  # 16 bytes per thread and load
    "mma.sync, 16 bits": Config(64, 64, 32, 64, 8, 2),
    "mma.sync, TF32": Config(64, 32, 32, 64, 8, 2),
    "wgmma": Config(64, 32, 64, 64, 4, 2),  # of 8 warps and 64 rows the compiler of Triton 3.2 aborts
    "tcgen05": Config(64, 64, 64, 64, 8, 2),
    "interpreter": Config(16, 32, 32, 32, 1, 1),
}
# Left alone, the assembler aims at more blocks per processor, and pays with registers that spill.
_OPTIONS = {"maxnreg": 255, "enable_fp_fusion": True}


def unsupported(op: str, x: Tensor) -> str | None:
    if op == "topk":
        return "has no kernel for mining, where one matrix product and torch.topk do well"
    if not (x.is_cuda or INTERPRETED):
        return f"needs CUDA tensors or TRITON_INTERPRET=1, got {x.device}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs float32, float16 or bfloat16 rows, got {x.dtype}"
    return None if INTERPRETED else _failed_check(x.device, x.dtype)


def reduce(link: str, pairs: Pairs, both: bool, keep: bool) -> tuple[Tensor, Tensor]:
    row = _reduce_rows(link, pairs)
    return row, _reduce_rows(link, pairs.swapped()) if both else row.new_empty(0)


def grad(
    link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_dy: bool, want_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, row_sum = _grad_rows(link, pairs, sides, want_dx, want_sums)
    dy, col_sum = _grad_rows(link, pairs.swapped(), sides.swapped(), want_dy, want_sums)
    return dx, dy, row_sum, col_sum


def _reduce_rows(link: str, pairs: Pairs) -> Tensor:
    out = _new(pairs.x, len(pairs.x))
    _launch(_reduce_kernel, pairs, 1, out, LINK=link)
    return out


def _grad_rows(link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_sum: bool) -> tuple[Tensor, Tensor]:
    m, d = pairs.x.shape
    dx = _new(pairs.x, m, d) if want_dx else _new(pairs.x, 0)
    row_sum = _new(pairs.x, m if want_sum else 0)
    if want_dx or want_sum:
        _launch(
            _grad_kernel, pairs, triton.cdiv(d, _config(pairs.x).block_d) if want_dx else 1,
            *(t if t is None else t.contiguous() for t in sides),
            dx if want_dx else None, row_sum if want_sum else None, LINK=link,
        )  # fmt: skip
    return dx, row_sum


def _new(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _launch(kernel: Any, pairs: Pairs, slices: int, *tensors: Tensor | None, LINK: str) -> None:
    """One program per BLOCK_M rows (and per slice of the output's features), on row-major operands."""
    x, y, scale, *optional, _ = pairs
    m, d = x.shape
    config = _config(x)
    if m == 0 or slices == 0:
        return
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(m, config.block_m), slices)](
            x.contiguous(), y.contiguous(), scale,
            *(t if t is None else t.contiguous() for t in optional), *tensors,
            m, len(y), D=d, LINK=LINK, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            BLOCK_D=config.block_d, PRECISION=_precision(x),
            **({} if INTERPRETED else {"num_warps": config.warps, "num_stages": config.stages, **_OPTIONS}),
        )  # fmt: skip


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, such as (9, 0)."""
    return torch.cuda.get_device_capability(device)


def _precision(x: Tensor) -> str:
    """How operands are multiplied: "ieee" fp32, "tf32" (and 16-bit numbers as they are), or "upcast" to fp32 first.

    Triton has no matrix instructions for GPUs before Ampere, and its interpreter multiplies the bit patterns of bf16.
    """
    has_matrix_units = not INTERPRETED and capability(x.device) >= (8, 0)
    if x.dtype == torch.float32:
        return "tf32" if has_matrix_units and tf32_is_allowed() else "ieee"
    return "tf32" if has_matrix_units else "upcast"


def _config(x: Tensor) -> Config:
    """Static: never tuned by timing, so that every run and every rank computes the same bits."""
    if INTERPRETED:
        return _CONFIGS["interpreter"]
    if _precision(x) in ("ieee", "upcast"):
        return _CONFIGS["fp32 units" if x.dtype == torch.float32 else "fp32 units, 16 bits"]
    by_mma = "mma.sync, TF32" if x.dtype == torch.float32 else "mma.sync, 16 bits"
    return _CONFIGS[{9: "wgmma", 10: "tcgen05"}.get(capability(x.device)[0], by_mma)]


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
    z = torch.nn.functional.normalize(torch.randn(75, 40, generator=generator), dim=1).to(device, dtype)
    keys = torch.arange(75, device=device) // 2
    pairs = Pairs(z, z, torch.tensor(10.0, device=device), drop_x=keys, drop_y=keys, symmetric=True)
    tolerance = 5e-3 if dtype != torch.float32 or tf32_is_allowed() else 1e-5
    try:
        for link in ("exp", "softplus"):
            row, _ = reduce(link, pairs, False, True)
            exact, _ = chunked.reduce(link, pairs, False, True)
            ones = torch.ones_like(row)
            dx, *_ = grad(link, pairs, Sides(exact, ones, exact, ones), True, False, False)
            exact_dx, *_ = chunked.grad(link, pairs, Sides(exact, ones, exact, ones), True, False, False)
            for got, want in ((row, exact), (dx, exact_dx)):
                error = float((got - want).norm() / want.norm())
                if not error <= tolerance:  # a NaN fails too
                    return f"failed its numeric check on {device}: relative error {error:.1e}, allowed {tolerance:.0e}"
    except Exception as error:  # whatever the compiler or driver raises, another backend can still serve
        return f"does not run on {device}: {type(error).__name__}: {error}"
    return None


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _logits(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of logits (BLOCK_M, BLOCK_N) in fp32; -inf where a pair is forgotten or outside."""
    in_m, in_n = rows < M, cols < N
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        xs = tl.load(x + rows[:, None] * D + d[None, :], mask=in_m[:, None] & (d < D)[None, :], other=0.0)
        ys = tl.load(y + cols[:, None] * D + d[None, :], mask=in_n[:, None] & (d < D)[None, :], other=0.0)
        s = _dot(xs, tl.trans(ys), s, PRECISION)
    s *= tl.load(scale)
    if row_bias is not None:
        s += tl.load(row_bias + rows, mask=in_m, other=0.0)[:, None]
    if col_bias is not None:
        s += tl.load(col_bias + cols, mask=in_n, other=0.0)[None, :]
    forget = (rows >= M)[:, None] | (cols >= N)[None, :]
    # "above" is asked, not "at most": a NaN logit is kept, so that it reaches the loss
    if row_ceiling is not None:
        forget |= s > tl.load(row_ceiling + rows, mask=in_m, other=0.0)[:, None]
    if col_ceiling is not None:
        forget |= s > tl.load(col_ceiling + cols, mask=in_n, other=0.0)[None, :]
    if drop_x is not None:
        forget |= (
            tl.load(drop_x + rows, mask=in_m, other=0)[:, None] == tl.load(drop_y + cols, mask=in_n, other=0)[None, :]
        )
    if only_x is not None:
        forget |= (
            tl.load(only_x + rows, mask=in_m, other=0)[:, None] != tl.load(only_y + cols, mask=in_n, other=0)[None, :]
        )
    return tl.where(forget, float("-inf"), s)


@triton.jit
def _softplus(s):
    """log(1 + e^s) to fp32 accuracy for any s; 0 for -inf.

    With e = e^-|s|, log1p(e) = 2 atanh(t), t = e / (2 + e) <= 1/3: the series below is short by less than 2e-8.
    """
    e = tl.exp(-tl.abs(s))
    t = e / (2.0 + e)
    u = t * t
    series = 1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13))))))
    return tl.maximum(s, 0.0) + 2.0 * t * series


@triton.jit
def _reduce_kernel(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, out, M, N,
    D: tl.constexpr, LINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = tl.arange(0, BLOCK_N).to(tl.int64) + start
        s = _logits(
            x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N,
            D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        if LINK == "exp":  # online: the running sum is rescaled whenever the peak moves
            new = tl.maximum(peak, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # no kept pair so far
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(s - base[:, None]), 1)
            peak = new
        else:
            total += tl.sum(_softplus(s), 1)
    if LINK == "exp":
        total = peak + tl.log(tl.where(total == 0.0, 1.0, total))
    tl.store(out + rows, total, mask=rows < M)


@triton.jit
def _grad_kernel(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
    row_lse, row_grad, col_lse, col_grad, dx, row_sum, M, N,
    D: tl.constexpr, LINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = rows < M
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = tl.arange(0, BLOCK_N).to(tl.int64) + start
        in_n = cols < N
        s = _logits(
            x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N,
            D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        w = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if row_grad is not None:
            g = tl.load(row_grad + rows, mask=in_m, other=0.0)[:, None]
            if LINK == "exp":
                w += g * tl.exp(s - tl.load(row_lse + rows, mask=in_m, other=float("inf"))[:, None])
            else:
                w += g * tl.sigmoid(s)
        if col_grad is not None:
            g = tl.load(col_grad + cols, mask=in_n, other=0.0)[None, :]
            if LINK == "exp":
                w += g * tl.exp(s - tl.load(col_lse + cols, mask=in_n, other=float("inf"))[None, :])
            else:
                w += g * tl.sigmoid(s)
        if row_sum is not None:
            weights += tl.sum(w, 1)
        if dx is not None:
            ys = tl.load(y + cols[:, None] * D + d[None, :], mask=in_n[:, None] & (d < D)[None, :], other=0.0)
            # Weights are about 1 / N^2, below what fp16 holds: such rows multiply in TF32, whose mantissa is as long.
            if ys.dtype == tl.float16:
                acc = _dot(w, ys.to(tl.float32), acc, PRECISION)
            else:
                acc = _dot(w.to(ys.dtype), ys, acc, PRECISION)
    if dx is not None:
        tl.store(dx + rows[:, None] * D + d[None, :], acc, mask=in_m[:, None] & (d < D)[None, :])
    if row_sum is not None:  # noqa: SIM102  Triton cannot mix a compile-time and a run-time test
        if tl.program_id(1) == 0:  # every slice of features has computed them
            tl.store(row_sum + rows, weights, mask=in_m)


INTERPRETED = not isinstance(_reduce_kernel, triton.runtime.JITFunction)
