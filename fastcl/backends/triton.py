"""Tiled Triton kernels for CUDA tensors (and, with TRITON_INTERPRET=1, for CPU tensors in tests).

A program owns BLOCK_M rows and walks the columns, so nothing is atomic and results repeat bit for bit. Column results
are the same kernels on the transposed pairs. The maths stands in ``fastcl._ops``; the interpreter rules out inline
assembly and libdevice, which is why log1p is written out below.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import Pairs, Sides, tf32_is_allowed

# (BLOCK_M, BLOCK_N, BLOCK_D) and launch options. One static choice that fits the shared memory of every architecture
# from sm_75 on; never tuned by timing, so that every run and every rank computes the same bits.
_GPU_BLOCKS = (64, 64, 64)
_GPU_OPTIONS = {"num_stages": 2, "enable_fp_fusion": True}
_GPU_WARPS = {torch.float32: 8, torch.float16: 4, torch.bfloat16: 4}  # products in plain fp32 need more registers
_INTERPRETER_BLOCKS = (16, 32, 32)


def unsupported(op: str, x: Tensor) -> str | None:
    if op == "topk":
        return "has no kernel for mining, where one matrix product and torch.topk do well"
    if not (x.is_cuda or INTERPRETED):
        return f"needs CUDA tensors or TRITON_INTERPRET=1, got {x.device}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"needs float32, float16 or bfloat16 rows, got {x.dtype}"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bit patterns of bfloat16"
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs compute capability 8.0 for bfloat16"
    return None if INTERPRETED else _failed_check(x.device)


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
    out = pairs.x.new_empty(len(pairs.x), dtype=torch.float32)
    _launch(_reduce_kernel, pairs, 1, out, LINK=link)
    return out


def _grad_rows(link: str, pairs: Pairs, sides: Sides, want_dx: bool, want_sum: bool) -> tuple[Tensor, Tensor]:
    (m, d), new = pairs.x.shape, pairs.x.new_empty
    dx = new((m, d) if want_dx else 0, dtype=torch.float32)
    row_sum = new(m if want_sum else 0, dtype=torch.float32)
    if want_dx or want_sum:
        _launch(
            _grad_kernel, pairs, triton.cdiv(d, _blocks()[2]) if want_dx else 1,
            *(t if t is None else t.contiguous() for t in sides),
            dx if want_dx else None, row_sum if want_sum else None, LINK=link,
        )  # fmt: skip
    return dx, row_sum


def _launch(kernel: Any, pairs: Pairs, slices: int, *tensors: Tensor | None, LINK: str) -> None:
    """One program per BLOCK_M rows (and per slice of the output's features), on row-major operands."""
    x, y, scale, *optional, _ = pairs
    m, d = x.shape
    block_m, block_n, block_d = _blocks()
    if m == 0 or slices == 0:
        return
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(m, block_m), slices)](
            x.contiguous(), y.contiguous(), scale,
            *(t if t is None else t.contiguous() for t in optional), *tensors,
            m, len(y), D=d, LINK=LINK, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
            PRECISION="ieee" if x.dtype == torch.float32 and not tf32_is_allowed() else "tf32",
            **({} if INTERPRETED else {"num_warps": _GPU_WARPS[x.dtype], **_GPU_OPTIONS}),
        )  # fmt: skip


def _blocks() -> tuple[int, int, int]:
    return _INTERPRETER_BLOCKS if INTERPRETED else _GPU_BLOCKS


@lru_cache(maxsize=None)
def _failed_check(device: torch.device) -> str | None:
    """A small numeric check of the kernels, once per device and process, before they become its default."""
    from . import chunked

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "got a CUDA graph capture before fastcl's kernels were used on this device; expected one ordinary step "
            "first, in which they are checked. Run the loss once before capturing."
        )
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(75, 40, generator=generator), dim=1).to(device)
    keys = torch.arange(75, device=device) // 2
    pairs = Pairs(z, z, torch.tensor(10.0, device=device), drop_x=keys, drop_y=keys, symmetric=True)
    tolerance = 5e-3 if tf32_is_allowed() else 1e-5
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
def _logits(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of logits (BLOCK_M, BLOCK_N) in fp32; -inf where a pair is forgotten or outside."""
    in_m, in_n = rows < M, cols < N
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        xs = tl.load(x + rows[:, None] * D + d[None, :], mask=in_m[:, None] & (d < D)[None, :], other=0.0)
        ys = tl.load(y + cols[:, None] * D + d[None, :], mask=in_n[:, None] & (d < D)[None, :], other=0.0)
        s = tl.dot(xs, tl.trans(ys), s, input_precision=PRECISION)
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
    D: tl.constexpr, LINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = tl.arange(0, BLOCK_N).to(tl.int64) + start
        s = _logits(
            x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N,
            D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
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
    D: tl.constexpr, LINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
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
            D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
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
                acc = tl.dot(w, ys.to(tl.float32), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(w.to(ys.dtype), ys, acc, input_precision=PRECISION)
    if dx is not None:
        tl.store(dx + rows[:, None] * D + d[None, :], acc, mask=in_m[:, None] & (d < D)[None, :])
    if row_sum is not None:  # noqa: SIM102  Triton cannot mix a compile-time and a run-time test
        if tl.program_id(1) == 0:  # every slice of features has computed them
            tl.store(row_sum + rows, weights, mask=in_m)


INTERPRETED = not isinstance(_reduce_kernel, triton.runtime.JITFunction)
