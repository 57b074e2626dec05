"""Device code of the ``triton`` backend: one function per thing a kernel does, one kernel per launch.

A tile of logits is formed in registers, turned into exponentials or weights, and forgotten. What every kernel shares:

* ``x`` and ``y`` are row-major ``(M, D)`` and ``(N, D)``, or tensor descriptors of them (``TMA``); ``row`` and ``col``
  are the first row and column of a tile. Whatever lies outside reads as zero and is masked.
* Exponents are in base 2 from the product on (one instruction less), results in base e.
* The drop keys of a tile are compared only where the ranges of its row keys and column keys meet; these ranges come
  from a kernel before. Everywhere else a tile pays for no mask at all.
* Nothing is atomic: a sum over several programs is written in parts, which are added in a fixed order.

The interpreter rules out inline assembly and libdevice, which is why log1p is written out below.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(2.0**-126)  # the smallest normal number: below it exp2 gives 0
_INF = tl.constexpr(float("inf"))
_SPREAD = tl.constexpr(100.0)  # of log-sum-exps in base 2 over which e^s * (u_i + v_j) stays in range
# Weights are about 1 / N^2, below what fp16 holds: for such rows the largest is made this large.
_FP16_ROOM = tl.constexpr(2.0**14)
_FIRST, _LAST = tl.constexpr(2**63 - 1), tl.constexpr(-(2**63))  # of the ranks of neighbours


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32. ``upcast``: where the hardware (or the interpreter) cannot multiply 16-bit numbers."""
    if PRECISION == "upcast":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "bf16x3":
        # fp32 as a sum of two bf16: three products, whose dropped fourth is 2^-16 of the first at most
        a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
        a_low, b_low = (a - a_high.to(tl.float32)).to(tl.bfloat16), (b - b_high.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    elif PRECISION == "bf16x3, upcast":
        a_high, b_high = a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32)
        a_low, b_low = (a - a_high).to(tl.bfloat16).to(tl.float32), (b - b_high).to(tl.bfloat16).to(tl.float32)
        acc = tl.dot(a_low, b_high, acc, input_precision="ieee")
        acc = tl.dot(a_high, b_low, acc, input_precision="ieee")
        acc = tl.dot(a_high, b_high, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _rows(
    source, first, start, COUNT, D: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Rows first .. first + ROWS and features start .. start + DEPTH, (ROWS, DEPTH); zeros outside."""
    if TMA:
        tile = source.load([first, start])
    else:
        r = first + tl.arange(0, ROWS)
        d = start + tl.arange(0, DEPTH)
        at = source + r.to(tl.int64)[:, None] * D + d[None, :]
        tile = tl.load(at, mask=(r < COUNT)[:, None] & (d < D)[None, :], other=0.0)
    return tile


@triton.jit
def _products(
    x, y, row, col, M, N, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of a tile, (BLOCK_M, BLOCK_N) in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        a = _rows(x, row, k, M, D, BLOCK_M, BLOCK_K, TMA)
        b = _rows(y, col, k, N, D, BLOCK_N, BLOCK_K, TMA)
        acc = _dot(a, tl.trans(b), acc, PRECISION)
    return acc


@triton.jit
def _logits(acc, scale, row_bias, col_bias, rows, cols, M, N, UNIT: tl.constexpr):
    """s of a tile, times UNIT."""
    s = acc * (scale * UNIT)
    if row_bias is not None:
        s += (tl.load(row_bias + rows, mask=rows < M, other=0.0) * UNIT)[:, None]
    if col_bias is not None:
        s += (tl.load(col_bias + cols, mask=cols < N, other=0.0) * UNIT)[None, :]
    return s


@triton.jit
def _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N):
    """s, with -inf where a pair is forgotten or outside. One mask after the other: none is held in registers."""
    in_m, in_n = rows < M, cols < N
    # "above" is asked, not "at most": a NaN logit is kept, so that it reaches the loss
    if row_ceiling is not None:
        s = tl.where(s > tl.load(row_ceiling + rows, mask=in_m, other=0.0)[:, None], float("-inf"), s)
    if col_ceiling is not None:
        s = tl.where(s > tl.load(col_ceiling + cols, mask=in_n, other=0.0)[None, :], float("-inf"), s)
    if drop_x is not None:
        row_key, col_key = tl.load(drop_x + rows, mask=in_m, other=0), tl.load(drop_y + cols, mask=in_n, other=0)
        s = tl.where(row_key[:, None] == col_key[None, :], float("-inf"), s)
    if only_x is not None:
        row_key, col_key = tl.load(only_x + rows, mask=in_m, other=0), tl.load(only_y + cols, mask=in_n, other=0)
        s = tl.where(row_key[:, None] != col_key[None, :], float("-inf"), s)
    s = tl.where((rows < M)[:, None], s, float("-inf"))
    return tl.where((cols < N)[None, :], s, float("-inf"))


@triton.jit
def _base2(s, UNIT: tl.constexpr):
    """s of ``_logits`` in base 2."""
    if UNIT == 1.0:
        s = s * _LOG2E
    return s


@triton.jit
def _key_range(ranges, first, COUNT, BLOCK: tl.constexpr, RANGE: tl.constexpr):
    """The least and the largest drop key of BLOCK rows."""
    at = ranges + 2 * (first // RANGE)
    low, high = tl.load(at), tl.load(at + 1)
    for i in tl.static_range(1, BLOCK // RANGE):
        inside = first + i * RANGE < COUNT
        low = tl.minimum(low, tl.load(at + 2 * i, mask=inside, other=low))
        high = tl.maximum(high, tl.load(at + 2 * i + 1, mask=inside, other=high))
    return low, high


@triton.jit
def _at_an_edge(only_x, row_ceiling, col_ceiling, row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a tile has pairs to forget, the drop keys apart."""
    near = (row + BLOCK_M > M) | (col + BLOCK_N > N)
    if (only_x is not None) or ((row_ceiling is not None) or (col_ceiling is not None)):
        near |= True
    return near


@triton.jit
def _softplus(s):
    """log(1 + e^s) to fp32 accuracy for any s; 0 for -inf.

    With e = e^-|s|, log1p(e) = 2 atanh(t), t = e / (2 + e) <= 1/3: the series below is short by less than 2e-8.
    """
    e = tl.exp2(-tl.abs(s) * _LOG2E)
    t = e / (2.0 + e)
    u = t * t
    series = 1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9 + u * (1 / 11 + u * (1 / 13))))))
    return tl.maximum(s, 0.0) + 2.0 * t * series


@triton.jit
def _log2(total):
    """log2 of a positive normal number: the exponent, which is exact, and the logarithm of what is left, near 1."""
    bits = total.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23
    return exponent.to(tl.float32) + tl.log2((bits - (exponent << 23)).to(tl.float32, bitcast=True))


@triton.jit
def _shift(bounds, scale, room, PARTS: tl.constexpr):
    """What is subtracted from every exponent: a whole number, above 0 only where sums would overflow without it.

    No logit is above |scale| max|x| max|y| + max|row bias| + max|column bias| (Cauchy-Schwarz), so no exponential is
    above 2^room and no sum above 2^126. Without bounds rows have length 1, up to the rounding of bf16.
    """
    largest = tl.abs(scale) * 1.01
    if bounds is not None:
        part = bounds + tl.arange(0, PARTS)
        lengths = tl.sqrt(tl.max(tl.load(part), 0)) * tl.sqrt(tl.max(tl.load(part + PARTS), 0))
        largest = tl.abs(scale) * lengths * 1.00001
        largest += tl.max(tl.load(part + 2 * PARTS), 0) + tl.max(tl.load(part + 3 * PARTS), 0)
    # finite, so that a kept pair is never as small as a forgotten one
    return tl.minimum(tl.maximum(tl.ceil(largest * _LOG2E) - room, 0.0), 1e30)


@triton.jit
def _largest(vector, COUNT, BLOCK: tl.constexpr):
    """The largest absolute value among this program's share of a vector; +inf where one is NaN."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(vector + at, mask=at < COUNT, other=0.0))
        largest = tl.maximum(largest, tl.where(value == value, value, _INF))
    return tl.max(largest, 0)


@triton.jit
def _longest(x, COUNT, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest squared length among this program's share of rows; +inf where one is NaN."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, D, BLOCK_K):
            tile = _rows(x, first, k, COUNT, D, BLOCK, BLOCK_K, False).to(tl.float32)
            total += tl.sum(tile * tile, 1)
        largest = tl.maximum(largest, tl.where(total == total, total, _INF))
    return tl.max(largest, 0)


@triton.jit
def _key_ranges(keys, ranges, COUNT, RANGE: tl.constexpr):
    """The least and the largest key of every RANGE rows, (ranges, 2)."""
    for block in range(tl.program_id(0), tl.cdiv(COUNT, RANGE), tl.num_programs(0)):
        at = block * RANGE + tl.arange(0, RANGE)
        # outside, the last key: the last block holds it
        key = tl.load(keys + tl.minimum(at, COUNT - 1))
        tl.store(ranges + 2 * block, tl.min(key, 0))
        tl.store(ranges + 2 * block + 1, tl.max(key, 0))


@triton.jit(do_not_specialize=["M", "N"])
def _bound_kernel(
    x, y, row_bias, col_bias, drop_x, drop_y, bounds, row_ranges, col_ranges, M, N,
    D: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    RANGE: tl.constexpr,
):  # fmt: skip
    """Bounds (4, PARTS) on squared lengths and biases, one part per program, and the ranges of the drop keys."""
    if bounds is not None:
        part = bounds + tl.program_id(0)
        length = _longest(x, M, D, ROWS, BLOCK_K)
        tl.store(part, length)
        if not SYMMETRIC:
            length = _longest(y, N, D, ROWS, BLOCK_K)
        tl.store(part + PARTS, length)
        row = tl.program_id(0) * 0.0
        if row_bias is not None:
            row = _largest(row_bias, M, 1024)
        tl.store(part + 2 * PARTS, row)
        col = tl.program_id(0) * 0.0
        if col_bias is not None:
            col = _largest(col_bias, N, 1024)
        tl.store(part + 3 * PARTS, col)
    if drop_x is not None:
        _key_ranges(drop_x, row_ranges, M, RANGE)
        if not SYMMETRIC:
            _key_ranges(drop_y, col_ranges, N, RANGE)


@triton.jit(do_not_specialize=["M", "N", "room", "row_span", "col_span", "row_spans", "units"])
def _sums_kernel(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
    bounds, row_ranges, col_ranges, row_parts, col_parts, M, N, room, row_span, col_span, row_spans, units,
    D: tl.constexpr, LINK: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, PARTS: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Sums over rows, and in the same pass over columns, in parts: one per span of columns (of rows).

    A unit is a span of rows times a span of columns. A panel of BLOCK_N columns stays, tiles of BLOCK_M rows pass by:
    the sums of its columns stay in registers, those of rows are added to this unit's part in memory. One set visits
    the units and tiles of its upper triangle; off the diagonal the sums over columns are those of the mirrored rows.
    The diagonal units leave them in a part of their own, the last.
    """
    RESIDENT: tl.constexpr = BLOCK_K >= D
    SQUARE: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    # one multiplication less, where natural logits are not compared with a ceiling
    UNIT: tl.constexpr = _LOG2E if LINK == "exp" and ((row_ceiling is None) and (col_ceiling is None)) else 1.0
    by = tl.load(scale)
    shift = 0.0
    if LINK == "exp":
        shift = _shift(bounds, by, room, PARTS)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        if SYMMETRIC:  # unit = j (j + 1) / 2 + i with i <= j
            j = ((tl.sqrt(8.0 * unit + 1.0) - 0.99) * 0.5).to(tl.int32)
            i = unit - j * (j + 1) // 2
        else:
            j = unit // row_spans
            i = unit % row_spans
        first, last = i * row_span, tl.minimum((i + 1) * row_span, M)
        row_part = row_parts + j * M
        visited = first  # rows of the span before this one have sums of earlier panels
        for col in range(j * col_span, tl.minimum((j + 1) * col_span, N), BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            if drop_x is not None:
                col_low, col_high = _key_range(col_ranges, col, N, BLOCK_N, RANGE)
            stop = last
            if SYMMETRIC:
                stop = tl.minimum(last, (col // SQUARE + 1) * SQUARE)
            if RESIDENT:
                panel = tl.trans(_rows(y, col, 0, N, D, BLOCK_N, BLOCK_K, TMA))
            if col_parts is not None:
                # A sum over rows crosses threads, so tiles are added up as they are; beside a long product such a sum
                # is little, and the registers are worth more.
                col_total = tl.zeros((BLOCK_M, BLOCK_N) if RESIDENT else (BLOCK_N,), tl.float32)
                col_least = 0.0
            for row in range(first, stop, BLOCK_M):
                rows = row + tl.arange(0, BLOCK_M)
                before = tl.load(row_part + rows, mask=rows < tl.where(row < visited, M, 0), other=0.0)
                if RESIDENT:
                    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    acc = _dot(_rows(x, row, 0, M, D, BLOCK_M, BLOCK_K, TMA), panel, acc, PRECISION)
                else:
                    acc = _products(x, y, row, col, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA)
                s = _logits(acc, by, row_bias, col_bias, rows, cols, M, N, UNIT)
                near = _at_an_edge(only_x, row_ceiling, col_ceiling, row, col, M, N, BLOCK_M, BLOCK_N)
                if drop_x is not None:
                    row_low, row_high = _key_range(row_ranges, row, M, BLOCK_M, RANGE)
                    near |= (row_low <= col_high) & (col_low <= row_high)
                if near:
                    s = _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N)
                least = 0.0
                if LINK == "exp":
                    s = _base2(s, UNIT) - shift
                    # A sum of 0 says that no pair was kept: a kept pair gives at least the smallest number.
                    if near:
                        s = tl.where(s == float("-inf"), s, tl.maximum(s, -126.0))
                    e = tl.exp2(s)
                    least = tl.where(near, 0.0, _TINY)
                else:
                    e = _softplus(s)
                total = before + tl.maximum(tl.sum(e, 1), least)
                tl.store(row_part + rows, total, mask=rows < M)
                if col_parts is not None:
                    off = 1.0
                    if SYMMETRIC:  # pairs of a square on the diagonal are seen from both of their sides already
                        off = tl.where(row // SQUARE != col // SQUARE, 1.0, 0.0)
                    if RESIDENT:
                        col_total += e * off
                    else:
                        col_total += tl.sum(e, 0) * off
                    col_least = tl.maximum(col_least, least * off)
            if col_parts is not None:
                part = i
                if SYMMETRIC:
                    part = tl.where(i == j, row_spans, i)
                if RESIDENT:
                    col_total = tl.sum(col_total, 0)
                tl.store(col_parts + part * N + cols, tl.maximum(col_total, col_least), mask=cols < N)
            visited = stop
            tl.debug_barrier()  # what these threads added to a part, others read in the next panel


@triton.jit
def _online(
    x, y, by, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, row, M, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of BLOCK_M rows with a running maximum: right for any logits, and slower."""
    rows = row + tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(0, N, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        acc = _products(x, y, row, col, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False)
        s = _logits(acc, by, row_bias, col_bias, rows, cols, M, N, 1.0)
        s = _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N)
        new = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no kept pair so far
        total = total * tl.exp2((peak - base) * _LOG2E) + tl.sum(tl.exp2((s - base[:, None]) * _LOG2E), 1)
        peak = new
    return peak + tl.log(tl.where(total == 0.0, 1.0, total))


@triton.jit
def _finish(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
    bounds, parts, count, out, positive, loss, block, M, N, room,
    D: tl.constexpr, LINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The results of one block of rows, from their parts."""
    row = block * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(0, count):
        total += tl.load(parts + part * M + rows, mask=rows < M, other=0.0)
    if LINK == "exp":
        by = tl.load(scale)
        shift = _shift(bounds, by, room, PARTS)
        # Terms below the smallest number were lost: together up to 2^-126 * N, to be below 2^-24 of the sum.
        suspect = (total > 0.0) & (total < tl.exp2(24.0 - room))
        suspect |= (total != total) | (total == _INF)
        kept = (total > 0.0) & (total < _INF)
        result = (shift + _log2(tl.where(kept, total, 1.0))) * _LN2
        result = tl.where(total == 0.0, float("-inf"), result)
        if tl.max(suspect.to(tl.int32), 0) > 0:
            exact = _online(
                x, y, by, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, row, M, N, D,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            result = tl.where(suspect, exact, result)
        total = result
    tl.store(out + rows, total, mask=rows < M)
    if loss is not None:  # -log sigmoid(p - n), and n = -inf where there are no negatives
        positives = tl.load(positive + rows, mask=rows < M, other=0.0)
        tl.store(loss + rows, _softplus(total - positives), mask=rows < M)


@triton.jit(do_not_specialize=["M", "N", "room", "row_count", "col_count", "row_blocks"])
def _finish_kernel(
    x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
    bounds, row_parts, col_parts, row_count, col_count, row_out, col_out, positive, row_loss, col_loss, row_blocks,
    M, N, room,
    D: tl.constexpr, LINK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds the parts; blocks where the constant shift lost digits are computed again, with a running maximum.

    Programs take the blocks of rows and then those of columns. No block is computed twice where nothing was lost, and
    nothing outside this launch needs to know.
    """
    block = tl.program_id(0)
    if block < row_blocks:
        _finish(
            x, y, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, bounds,
            row_parts, row_count, row_out, positive, row_loss, block, M, N, room, D, LINK, BLOCK_M, BLOCK_N, BLOCK_K,
            PRECISION, PARTS,
        )  # fmt: skip
    else:
        if col_parts is not None:  # Triton cannot mix a compile-time and a run-time test
            _finish(
                y, x, scale, col_bias, row_bias, drop_y, drop_x, only_y, only_x, col_ceiling, row_ceiling, bounds,
                col_parts, col_count, col_out, positive, col_loss, block - row_blocks, N, M, room, D, LINK, BLOCK_M,
                BLOCK_N, BLOCK_K, PRECISION, PARTS,
            )  # fmt: skip


@triton.jit
def _upstream(grad, lse, positive, rows, M, STRIDE: tl.constexpr):
    """Gradient of the results of rows. Of a loss -log sigmoid(p - n), that of n."""
    g = tl.load(grad + rows * STRIDE, mask=rows < M, other=0.0)
    if positive is not None:
        n = tl.load(lse + rows, mask=rows < M, other=0.0)
        g *= tl.sigmoid(n - tl.load(positive + rows, mask=rows < M, other=0.0))
    return g


@triton.jit
def _lse2(lse, rows, M):
    """In base 2; +inf where no pair was kept, so that weights are 0 there."""
    value = tl.load(lse + rows, mask=rows < M, other=_INF) * _LOG2E
    return tl.where(value == float("-inf"), _INF, value)


@triton.jit
def _span(lse, COUNT, low, high, BLOCK: tl.constexpr):
    """low and high, widened to the finite values of a vector, in base 2."""
    least, most = tl.full((BLOCK,), float("inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, COUNT, BLOCK):
        value = _lse2(lse, start + tl.arange(0, BLOCK), COUNT)
        least = tl.minimum(least, value)
        most = tl.maximum(most, tl.where(value == _INF, float("-inf"), value))
    return tl.minimum(low, tl.min(least, 0)), tl.maximum(high, tl.max(most, 0))


@triton.jit
def _peak(grad, COUNT, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The largest absolute value of upstream gradients."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COUNT * STRIDE + 1 - STRIDE, BLOCK):  # of a repeated number, one
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(grad + at * STRIDE, mask=at < COUNT, other=0.0)))
    return tl.max(largest, 0)


@triton.jit
def _balance(
    row_lse, row_grad, col_lse, col_grad, M, N, LINK: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Middle of all log-sum-exps (base 2), whether they lie too far apart for it, and the gain of fp16 weights.

    Where a pair counts for its row and for its column, one exponential serves both: with E = 2^(s - middle),
    w = E (g_i 2^(middle - lse_i) + h_j 2^(middle - lse_j)). No kept logit is above its log-sum-exp.
    """
    middle, wide, gain = 0.0, 0.0, 1.0
    if LINK == "exp" and ((row_grad is not None) and (col_grad is not None)):
        low, high = _span(row_lse, M, float("inf"), float("-inf"), 1024)
        low, high = _span(col_lse, N, low, high, 1024)
        middle = tl.where(low <= high, 0.5 * (low + high), 0.0)
        wide = tl.where(high - low > _SPREAD, 1.0, 0.0)
    if HALF:
        largest = 0.0
        if row_grad is not None:
            largest = _peak(row_grad, M, STRIDE, 1024)
        if col_grad is not None:
            largest = tl.maximum(largest, _peak(col_grad, N, STRIDE, 1024))
        if (row_grad is None) and (col_grad is None):
            largest = 1.0
        gain = tl.where((largest > 0.0) & (largest < _INF), _FP16_ROOM / largest, 1.0)
    return middle, wide, gain


@triton.jit
def _side(
    lse, grad, positive, rows, M, middle, gain, LINK: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of some rows: upstream gradient times gain, that times 2^(middle - lse), and lse in base 2."""
    a = tl.zeros((BLOCK,), tl.float32)
    u, lse2 = a, a
    if grad is not None:
        a = _upstream(grad, lse, positive, rows, M, STRIDE) * gain
        if LINK == "exp":
            lse2 = _lse2(lse, rows, M)
            u = a * tl.exp2(middle - lse2)
    return a, u, lse2


@triton.jit
def _weights(
    s, a, u, row_lse2, col_lse, col_grad, col_positive, cols, N, middle, wide, gain,
    LINK: tl.constexpr, ROWS: tl.constexpr, STRIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """w of a tile, times gain. ``a``, ``u`` and ``row_lse2`` are what ``_side`` says of its rows."""
    COLS: tl.constexpr = col_grad is not None
    if LINK == "softplus":
        w = tl.sigmoid(s)
        if COLS:
            b, _, _ = _side(col_lse, col_grad, col_positive, cols, N, middle, gain, LINK, STRIDE, BLOCK_N)
            if ROWS:
                w *= a[:, None] + b[None, :]
            else:
                w *= b[None, :]
        elif ROWS:
            w *= a[:, None]
        else:  # the sum of all rows
            w *= gain
    else:
        s = _base2(s, UNIT)
        if ROWS and COLS:
            if wide > 0.0:
                b, _, col_lse2 = _side(col_lse, col_grad, col_positive, cols, N, middle, gain, LINK, STRIDE, BLOCK_N)
                w = a[:, None] * tl.exp2(s - row_lse2[:, None]) + b[None, :] * tl.exp2(s - col_lse2[None, :])
            else:
                _, v, _ = _side(col_lse, col_grad, col_positive, cols, N, middle, gain, LINK, STRIDE, BLOCK_N)
                w = tl.exp2(s - middle) * (u[:, None] + v[None, :])
        elif ROWS:
            w = a[:, None] * tl.exp2(s - row_lse2[:, None])
        else:
            b, _, col_lse2 = _side(col_lse, col_grad, col_positive, cols, N, middle, gain, LINK, STRIDE, BLOCK_N)
            w = b[None, :] * tl.exp2(s - col_lse2[None, :])
    return w


@triton.jit
def _grad_rows(
    xs, ys, outs, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
    row_lse, row_grad, row_positive, col_lse, col_grad, col_positive, row_ranges, col_ranges,
    dx, row_sum, row_total, program, blocks, splits, M, N,
    D: tl.constexpr, LINK: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr, TMA: tl.constexpr,
    RANGE: tl.constexpr,
):  # fmt: skip
    """One block of rows of dx = w y, from one span of columns, for one slice of features: fp32, in registers."""
    RESIDENT: tl.constexpr = BLOCK_K >= D
    SHARED: tl.constexpr = RESIDENT and (BLOCK_D >= D)  # one tile of y serves both products
    UNIT: tl.constexpr = _LOG2E if LINK == "exp" and ((row_ceiling is None) and (col_ceiling is None)) else 1.0
    block, rest = program % blocks, program // blocks
    split, part = rest % splits, rest // splits
    row = block * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    by = tl.load(scale)
    middle, wide, gain = _balance(row_lse, row_grad, col_lse, col_grad, M, N, LINK, HALF, STRIDE)
    a, u, row_lse2 = _side(row_lse, row_grad, row_positive, rows, M, middle, gain, LINK, STRIDE, BLOCK_M)
    if dx is not None:
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if row_sum is not None:
        weight_total = tl.zeros((BLOCK_M,), tl.float32)
    if row_total is not None:
        total = tl.zeros((BLOCK_M,), tl.float32)
    if RESIDENT:
        q = _rows(xs, row, 0, M, D, BLOCK_M, BLOCK_K, TMA)
    if drop_x is not None:
        row_low, row_high = _key_range(row_ranges, row, M, BLOCK_M, RANGE)
    span = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    for col in range(split * span, tl.minimum((split + 1) * span, N), BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        if RESIDENT:
            k = _rows(ys, col, 0, N, D, BLOCK_N, BLOCK_K, TMA)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc = _dot(q, tl.trans(k), acc, PRECISION)
        else:
            acc = _products(xs, ys, row, col, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA)
        s = _logits(acc, by, row_bias, col_bias, rows, cols, M, N, UNIT)
        near = _at_an_edge(only_x, row_ceiling, col_ceiling, row, col, M, N, BLOCK_M, BLOCK_N)
        if drop_x is not None:
            col_low, col_high = _key_range(col_ranges, col, N, BLOCK_N, RANGE)
            near |= (row_low <= col_high) & (col_low <= row_high)
        if near:
            s = _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N)
        if row_total is not None:
            total += tl.sum(_softplus(s), 1)
        w = _weights(
            s, a, u, row_lse2, col_lse, col_grad, col_positive, cols, N, middle, wide, gain, LINK, row_grad is not None,
            STRIDE, UNIT, BLOCK_N,
        )  # fmt: skip
        if row_sum is not None:
            weight_total += tl.sum(w, 1)
        if dx is not None:
            if not SHARED:
                k = _rows(outs, col, part * BLOCK_D, N, D, BLOCK_N, BLOCK_D, TMA)
            out = _dot(w.to(k.dtype), k, out, PRECISION)
    at = (split * M + rows).to(tl.int64)
    if dx is not None:
        d = part * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(dx + at[:, None] * D + d[None, :], out / gain, mask=(rows < M)[:, None] & (d < D)[None, :])
    if part == 0:  # every slice of features has computed them
        if row_sum is not None:
            tl.store(row_sum + at, weight_total / gain, mask=rows < M)
        if row_total is not None:
            tl.store(row_total + at, total, mask=rows < M)


@triton.jit(do_not_specialize=["M", "N", "row_blocks", "row_splits", "row_programs", "col_blocks", "col_splits"])
def _grad_kernel(
    x_rows, x_cols, x_outs, y_rows, y_cols, y_outs, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y,
    row_ceiling, col_ceiling, row_lse, row_grad, row_positive, col_lse, col_grad, col_positive, row_ranges, col_ranges,
    dx, row_sum, row_total, dy, col_sum, row_blocks, row_splits, row_programs, col_blocks, col_splits, M, N,
    D: tl.constexpr, LINK: tl.constexpr, STRIDE: tl.constexpr, BOTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr,
    TMA: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Gradients of rows, and in the same launch those of columns: programs own what they write.

    It is attention's forward with one matrix for keys and values. Too few blocks to fill the device: columns are split,
    and the splits are added afterwards, in order.
    """
    program = tl.program_id(0)
    if program < row_programs:
        _grad_rows(
            x_rows, y_cols, y_outs, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
            row_lse, row_grad, row_positive, col_lse, col_grad, col_positive, row_ranges, col_ranges,
            dx, row_sum, row_total, program, row_blocks, row_splits, M, N,
            D, LINK, STRIDE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION, HALF, TMA, RANGE,
        )  # fmt: skip
    else:
        if BOTH:  # Triton cannot mix a compile-time and a run-time test
            _grad_rows(
                y_rows, x_cols, x_outs, scale, col_bias, row_bias, drop_y, drop_x, only_y, only_x, col_ceiling,
                row_ceiling, col_lse, col_grad, col_positive, row_lse, row_grad, row_positive, col_ranges, row_ranges,
                dy, col_sum, None, program - row_programs, col_blocks, col_splits, N, M,
                D, LINK, STRIDE, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION, HALF, TMA, RANGE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N"])
def _balance_kernel(
    row_lse, row_grad, col_lse, col_grad, balance, M, N, LINK: tl.constexpr, HALF: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """What ``_balance`` says, once, for the strips: (middle, wide, gain)."""
    middle, wide, gain = _balance(row_lse, row_grad, col_lse, col_grad, M, N, LINK, HALF, STRIDE)
    tl.store(balance, middle)
    tl.store(balance + 1, wide)
    tl.store(balance + 2, gain)


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def _weights_kernel(
    xs, ys, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling,
    row_lse, row_grad, row_positive, col_lse, col_grad, col_positive, row_ranges, col_ranges, balance,
    weights, pitch, row_sum, row_total, tiles, M, N,
    D: tl.constexpr, LINK: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, HALF: tl.constexpr, TMA: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """w of a strip of rows, times gain, in the dtype of the operands; each program takes some tiles of a row."""
    UNIT: tl.constexpr = _LOG2E if LINK == "exp" and ((row_ceiling is None) and (col_ceiling is None)) else 1.0
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    by, middle, wide, gain = tl.load(scale), tl.load(balance), tl.load(balance + 1), tl.load(balance + 2)
    a, u, row_lse2 = _side(row_lse, row_grad, row_positive, rows, M, middle, gain, LINK, STRIDE, BLOCK_M)
    if drop_x is not None:
        row_low, row_high = _key_range(row_ranges, row, M, BLOCK_M, RANGE)
    if row_sum is not None:
        weight_total = tl.zeros((BLOCK_M,), tl.float32)
    if row_total is not None:
        total = tl.zeros((BLOCK_M,), tl.float32)
    first = tl.program_id(1) * tiles * BLOCK_N
    for col in range(first, tl.minimum(first + tiles * BLOCK_N, N), BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        acc = _products(xs, ys, row, col, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA)
        s = _logits(acc, by, row_bias, col_bias, rows, cols, M, N, UNIT)
        near = _at_an_edge(only_x, row_ceiling, col_ceiling, row, col, M, N, BLOCK_M, BLOCK_N)
        if drop_x is not None:
            col_low, col_high = _key_range(col_ranges, col, N, BLOCK_N, RANGE)
            near |= (row_low <= col_high) & (col_low <= row_high)
        if near:
            s = _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N)
        if row_total is not None:
            total += tl.sum(_softplus(s), 1)
        w = _weights(
            s, a, u, row_lse2, col_lse, col_grad, col_positive, cols, N, middle, wide, gain, LINK, row_grad is not None,
            STRIDE, UNIT, BLOCK_N,
        )  # fmt: skip
        if row_sum is not None:
            weight_total += tl.sum(w, 1)
        at = weights + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
        tl.store(at, w.to(weights.dtype.element_ty), mask=(rows < M)[:, None] & (cols < pitch)[None, :])
    at = tl.program_id(1) * M + rows
    if row_sum is not None:
        tl.store(row_sum + at, weight_total / gain, mask=rows < M)
    if row_total is not None:
        tl.store(row_total + at, total, mask=rows < M)


@triton.jit(do_not_specialize=["M", "N", "blocks"])
def _product_kernel(
    weights, pitch, y, out, blocks, M, N,
    D: tl.constexpr, TRANSPOSED: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out (M, D), or out plus: w y for a strip w (M, N), or its transpose where w is (N, M)."""
    row = tl.program_id(0) % blocks * BLOCK_M
    part = tl.program_id(0) // blocks
    rows, d = row + tl.arange(0, BLOCK_M), part * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for col in range(0, N, BLOCK_K):
        cols = col + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            at = weights + cols.to(tl.int64)[:, None] * pitch + rows[None, :]
            w = tl.trans(tl.load(at, mask=(cols < N)[:, None] & (rows < M)[None, :], other=0.0))
        else:
            at = weights + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
            w = tl.load(at, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)
        acc = _dot(w, _rows(y, col, part * BLOCK_D, N, D, BLOCK_K, BLOCK_D, TMA), acc, PRECISION)
    at = out + rows.to(tl.int64)[:, None] * D + d[None, :]
    inside = (rows < M)[:, None] & (d < D)[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc, mask=inside)


@triton.jit(do_not_specialize=["M", "N", "blocks", "splits"])
def _one_pass_kernel(
    xs, ys, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, row_ranges, col_ranges,
    out, peaks, totals, blocks, splits, M, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, TMA: tl.constexpr, RANGE: tl.constexpr,
):  # fmt: skip
    """Sums of exponentials and of exponentials times y in one pass, under a running maximum, in parts per split.

    For a frozen y: the softmax is known up to a factor per row when the forward ends, and with it the gradient.
    """
    UNIT: tl.constexpr = _LOG2E if row_ceiling is None and col_ceiling is None else 1.0
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row = block * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    by = tl.load(scale)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if drop_x is not None:
        row_low, row_high = _key_range(row_ranges, row, M, BLOCK_M, RANGE)
    q = _rows(xs, row, 0, M, D, BLOCK_M, BLOCK_K, TMA)
    span = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    for col in range(split * span, tl.minimum((split + 1) * span, N), BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        k = _rows(ys, col, 0, N, D, BLOCK_N, BLOCK_K, TMA)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = _dot(q, tl.trans(k), s, PRECISION)
        s = _logits(s, by, row_bias, col_bias, rows, cols, M, N, UNIT)
        near = _at_an_edge(only_x, row_ceiling, col_ceiling, row, col, M, N, BLOCK_M, BLOCK_N)
        if drop_x is not None:
            col_low, col_high = _key_range(col_ranges, col, N, BLOCK_N, RANGE)
            near |= (row_low <= col_high) & (col_low <= row_high)
        if near:
            s = _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N)
        s = _base2(s, UNIT)
        new = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # no kept pair so far
        keep = tl.exp2(peak - base)
        if HALF:
            base -= 14.0  # as _FP16_ROOM; it cancels in the quotient
        e = tl.exp2(s - base[:, None])
        total = total * keep + tl.sum(e, 1)
        acc = _dot(e.to(k.dtype), k, acc * keep[:, None], PRECISION)
        peak = new
    if HALF:
        total *= 2.0**-14
        acc *= 2.0**-14
    at = (split * M + rows).to(tl.int64)
    d = tl.arange(0, BLOCK_K)
    tl.store(out + at[:, None] * D + d[None, :], acc, mask=(rows < M)[:, None] & (d < D)[None, :])
    tl.store(peaks + at, peak, mask=rows < M)
    tl.store(totals + at, total, mask=rows < M)


@triton.jit(do_not_specialize=["M", "splits"])
def _merge_kernel(
    parts, peaks, totals, out, row_out, splits, M, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The splits of ``_one_pass_kernel``, joined in order: log-sum-exp and softmax-weighted mean of y of every row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    inside = (rows < M)[:, None] & (d < D)[None, :]
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(0, splits):
        value = tl.load(peaks + split * M + rows, mask=rows < M, other=0.0)
        peak = tl.where(value != value, value, tl.maximum(peak, value))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for split in range(0, splits):
        at = (split * M + rows).to(tl.int64)
        factor = tl.exp2(tl.load(peaks + at, mask=rows < M, other=0.0) - base)
        total += factor * tl.load(totals + at, mask=rows < M, other=0.0)
        acc += factor[:, None] * tl.load(parts + at[:, None] * D + d[None, :], mask=inside, other=0.0)
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(row_out + rows, (peak + tl.log2(some)) * _LN2, mask=rows < M)
    tl.store(out + rows.to(tl.int64)[:, None] * D + d[None, :], acc / some[:, None], mask=inside)


@triton.jit
def _ranked(s, cols):
    """64-bit numbers that order logits as topk does, all different: the larger first, NaN before all, and of equals the
    first column. What is forgotten comes last."""
    s = tl.where(s == 0.0, 0.0, s)  # 0 and -0 are equal
    bits = tl.where(s == s, s.to(tl.int32, bitcast=True), 0x7FC00000)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative numbers in reverse
    rank = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - cols).to(tl.int64)[None, :]
    return tl.where(s == float("-inf"), _LAST, rank)


@triton.jit(do_not_specialize=["M", "N", "count", "blocks", "splits"])
def _topk_kernel(
    xs, ys, scale, row_bias, col_bias, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, below, out,
    count, blocks, splits, M, N,
    D: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Ranks of the best ``count`` <= SLOTS kept logits of every row, in no order, in parts (splits, M, count).

    A tile is asked for its best again and again, for all of its rows at once, until no row has one that belongs among
    its best so far: after the first tiles that is rare. ``below``: only ranks below that of the row.
    """
    row = tl.program_id(0) % blocks * BLOCK_M
    split = tl.program_id(0) // blocks
    rows = row + tl.arange(0, BLOCK_M)
    slot = tl.arange(0, SLOTS)
    by = tl.load(scale)
    # Empty slots differ, so that one at a time is the least; those not asked for are never the least.
    empty = tl.where(slot < count, slot.to(tl.int64) + _LAST, _FIRST)
    best = tl.zeros((BLOCK_M, SLOTS), tl.int64) + empty[None, :]
    least = tl.min(best, 1)
    span = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    for col in range(split * span, tl.minimum((split + 1) * span, N), BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        acc = _products(xs, ys, row, col, M, N, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, TMA)
        s = _logits(acc, by, row_bias, col_bias, rows, cols, M, N, 1.0)
        s = _masked(s, drop_x, drop_y, only_x, only_y, row_ceiling, col_ceiling, rows, cols, M, N)
        rank = _ranked(s, cols)
        if below is not None:
            rank = tl.where(rank < tl.load(below + rows, mask=rows < M, other=0)[:, None], rank, _LAST)
        top = tl.max(rank, 1)
        if SLOTS == 1:
            least = tl.maximum(least, top)
        else:
            while tl.max((top > least).to(tl.int32), 0) > 0:
                best = tl.where((best == least[:, None]) & (top > least)[:, None], top[:, None], best)
                least = tl.min(best, 1)
                rank = tl.where(rank == top[:, None], _LAST, rank)
                top = tl.max(rank, 1)
    if SLOTS == 1:
        best = least[:, None]
    at = (split * M + rows).to(tl.int64)[:, None] * count + slot[None, :]
    tl.store(out + at, best, mask=(rows < M)[:, None] & (slot < count)[None, :])


@triton.jit
def _unit_rows(x, rows, COUNT, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows divided by their lengths, in fp32, and the lengths: +inf, and a row of zeros, below the smallest number."""
    d = tl.arange(0, WIDTH)
    inside = (rows < COUNT)[:, None] & (d < D)[None, :]
    wide = tl.load(x + rows.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    # Divided by the largest entry first, squares stay in range.
    largest = tl.max(tl.abs(wide), 1)
    short = largest < _TINY
    near_one = wide / tl.where(short, 1.0, largest)[:, None]
    norm = tl.where(short, _INF, tl.sqrt(tl.sum(near_one * near_one, 1)))
    return near_one / norm[:, None], tl.where(short, _INF, norm * largest)


@triton.jit(do_not_specialize=["M"])
def _normalize_kernel(x, unit, length, M, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Unit rows in the dtype of x, and lengths."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    z, norm = _unit_rows(x, rows, M, D, WIDTH)
    inside = (rows < M)[:, None] & (d < D)[None, :]
    tl.store(unit + rows.to(tl.int64)[:, None] * D + d[None, :], z.to(unit.dtype.element_ty), mask=inside)
    tl.store(length + rows, norm, mask=rows < M)


@triton.jit
def _through_length(x, length, rows, dz, COUNT, D: tl.constexpr, WIDTH: tl.constexpr):
    """The gradient of x from that of x / |x|: (dz - z <z, dz>) / |x|."""
    d = tl.arange(0, WIDTH)
    inside = (rows < COUNT)[:, None] & (d < D)[None, :]
    norm = tl.load(length + rows, mask=rows < COUNT, other=1.0)[:, None]
    z = tl.load(x + rows.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32) / norm
    return (dz - z * tl.sum(z * dz, 1)[:, None]) / norm


@triton.jit
def _store_raw_gradient(
    x, length, rows, offset, dz, out, COUNT, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, WIDTH)
    inside = (rows < COUNT)[:, None] & (d < D)[None, :]
    if length is not None:
        dz = _through_length(x, length + offset, rows, dz, COUNT, D, WIDTH)
    tl.store(out + rows.to(tl.int64)[:, None] * D + d[None, :], dz.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _normalize_grad_kernel(x, length, grad, dx, M, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient of raw rows from that of unit rows."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    inside = (rows < M)[:, None] & (d < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + d[None, :]
    dz = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    _store_raw_gradient(x, length, rows, 0, dz, dx, M, D, WIDTH)


@triton.jit
def _view(
    x, z, length, keys, rows, offset, B, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of one view as the kernels will multiply them; their numbers in the batch become their drop keys."""
    d = tl.arange(0, WIDTH)
    inside = (rows < B)[:, None] & (d < D)[None, :]
    if length is not None:
        unit, norm = _unit_rows(x, rows, B, D, WIDTH)
        tl.store(length + offset + rows, norm, mask=rows < B)
    else:
        unit = tl.load(x + rows.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded = unit.to(z.dtype.element_ty)
    tl.store(z + (offset + rows).to(tl.int64)[:, None] * D + d[None, :], rounded, mask=inside)
    tl.store(keys + offset + rows, rows, mask=rows < B)
    return rounded.to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def _prepare_kernel(
    x, y, z, length, bounds, positive, keys, ranges, scale, B,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, RANGE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rows of both views (B, D) -> z (2B, D), divided by their lengths if those are asked for, else with bounds on
    them; logits of the positives, drop keys and their ranges."""
    longest = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(B, BLOCK), tl.num_programs(0)):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        first = _view(x, z, length, keys, rows, 0, B, D, BLOCK, WIDTH)
        second = _view(y, z, length, keys, rows, B, B, D, BLOCK, WIDTH)
        p = tl.sum(first * second, 1) * tl.load(scale)
        tl.store(positive + rows, p, mask=rows < B)
        tl.store(positive + B + rows, p, mask=rows < B)
        if bounds is not None:
            squared = tl.maximum(tl.sum(first * first, 1), tl.sum(second * second, 1))
            # a NaN in either must not hide behind the other
            whole = tl.sum(first + second, 1) == tl.sum(first + second, 1)
            longest = tl.maximum(longest, tl.where(whole & (squared == squared), squared, _INF))
    if bounds is not None:
        part = bounds + tl.program_id(0)
        tl.store(part, tl.max(longest, 0))
        tl.store(part + PARTS, tl.max(longest, 0))
        tl.store(part + 2 * PARTS, 0.0)
        tl.store(part + 3 * PARTS, 0.0)
    for block in range(tl.program_id(0), tl.cdiv(2 * B, RANGE), tl.num_programs(0)):
        begin, end = block * RANGE, tl.minimum(block * RANGE + RANGE, 2 * B) - 1
        astride = (begin < B) & (end >= B)
        tl.store(ranges + 2 * block, tl.where(astride, 0, begin % B))
        tl.store(ranges + 2 * block + 1, tl.where(astride, B - 1, end % B))


@triton.jit
def _sum_parts(parts, count, pitch, rows, COUNT, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a gradient, added over the splits in order."""
    d = tl.arange(0, WIDTH)
    inside = (rows < COUNT)[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for part in range(0, count):
        at = (part * pitch + rows).to(tl.int64)
        acc += tl.load(parts + at[:, None] * D + d[None, :], mask=inside, other=0.0)
    return acc


@triton.jit(do_not_specialize=["B", "x_count", "y_count", "x_pitch", "y_pitch"])
def _restore_kernel(
    x, y, z, length, positive, lse, grad, scale, x_parts, x_count, x_pitch, y_parts, y_count, y_pitch, dx, dy, dots, B,
    D: tl.constexpr, BOTH: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of raw rows from the parts of the negatives' gradients: adds the positives', scales, and goes through
    the lengths. ``dots`` are <z_i, dz_i>, whose sum is the gradient of the scale."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDTH)
    inside = (rows < B)[:, None] & (d < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + d[None, :]
    by = tl.load(scale)
    # the loss is -log sigmoid(p - n): what n receives, p receives with the other sign
    c = -_upstream(grad, lse, positive, rows, B, STRIDE)
    if BOTH:
        c -= _upstream(grad + B * STRIDE, lse + B, positive + B, rows, B, STRIDE)
    second = tl.load(z + B.to(tl.int64) * D + at, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    if x_parts is not None:
        dz = _sum_parts(x_parts, x_count, x_pitch, rows, B, D, BLOCK, WIDTH) + c[:, None] * second
        tl.store(dots + rows, tl.sum(dz * first, 1), mask=rows < B)
        _store_raw_gradient(x, length, rows, 0, dz * by, dx, B, D, WIDTH)
    if y_parts is not None:
        dz = _sum_parts(y_parts, y_count, y_pitch, rows, B, D, BLOCK, WIDTH) + c[:, None] * first
        tl.store(dots + B + rows, tl.sum(dz * second, 1), mask=rows < B)
        _store_raw_gradient(y, length, rows, B, dz * by, dy, B, D, WIDTH)
