"""How long the Triton kernels should take on a Hopper GPU: predictions, for the first run on one to confirm or refute.

    python -m benchmarks.predict --json benchmarks/results/predicted-h200.json

Nothing here was measured on a GPU. A kernel is a number of tiles; a tile costs what the slowest unit needs for it, by
the data sheet's rates: matrix units (FLOP), special function units (exponentials), and the issue of instructions. Two
bounds are given:

* *low*: with two or more blocks on a processor those units overlap fully, with one block products and the rest take
  turns; instructions are those that the arithmetic of a tile needs.
* *high*: nothing overlaps, and every instruction that the compiler left in the loop is issued for every tile, those of
  masks included (``loop`` of ``benchmarks/results/aot.json``; registers and shared memory, from the same file, say how
  many blocks fit on a processor).

What a launch moves through memory costs bytes over bandwidth, beside the rest (low) or after it (high); every launch
costs LAUNCH. The L2 cache is not modelled: where both operands of a product stream (D above 256) it may limit first.
Clocks below the data sheet's make all of it slower alike.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from . import roofline
from .record import write
from .roofline import bound_seconds, phases

AOT = Path(__file__).parent / "results" / "aot.json"
FAMILY = "wgmma, 16 bits"
ARCH, DTYPE, GPU = 90, "bfloat16", roofline.GPUS["H200"]
PROCESSORS, HERTZ = 132, 1.83e9
# Of a processor: CUDA C++ Programming Guide, technical specifications of compute capability 9.0.
REGISTERS, SHARED, RESERVED = 65536, 233472, 1024
LAUNCH = 2e-6  # seconds from the end of a kernel to the start of the next, in a stream that is never empty
# Instructions per pair, by hand: exp2, a multiply-add into its argument, and the sums over rows and columns; or exp2, a
# subtraction, u + v, the product, and half a conversion to bf16.
NEEDED = {"sums": 4.0, "grad": 4.5, "weights": 4.5, "product": 0.0}
# Loss, rows, features: seconds to reach, by Triton and by CUDA C++. Set before anything was measured.
GOALS = {
    ("nt_xent", 4096, 128): (54e-6, 37e-6),
    ("nt_xent", 4096, 512): (122e-6, 89e-6),
    ("nt_xent", 16384, 128): (421e-6, 317e-6),
    ("nt_xent", 16384, 512): (1.21e-3, 1.04e-3),
    ("nt_xent", 16384, 1024): (2.21e-3, 1.96e-3),
    ("nt_xent", 65536, 128): (6.3e-3, 4.8e-3),
    ("nt_xent", 65536, 512): (17.9e-3, 15.7e-3),
    ("nt_xent", 65536, 1024): (33.2e-3, 29.8e-3),
    ("clip", 16384, 512): (2.26e-3, 1.95e-3),
    ("clip", 65536, 512): (35e-3, 31e-3),
    ("siglip", 65536, 768): (39e-3, 33e-3),
    ("moco", 1024, 128): (75e-6, 75e-6),
}


@dataclass(frozen=True)
class Kernel:
    """One launch, or several of one kind: low and high seconds, and what limits the low one."""

    name: str
    low: float
    high: float
    limit: str
    blocks_per_processor: int = 0


def blocks_per_processor(row: dict[str, Any]) -> int:
    """How many blocks of a compiled kernel fit on one processor."""
    threads = 32 * row["warps"]
    by_registers = REGISTERS // (threads * 8 * ceil(row["registers"] / 8))
    return int(min(by_registers, SHARED // (row["shared_bytes"] + RESERVED), 2048 // threads))


def tiles(
    name: str, kind: str, row: dict[str, Any], tile: tuple[int, int, int], count: float, moved: float = 0.0
) -> Kernel:
    """A launch that computes ``count`` tiles of (rows, columns) with products of depth K, and moves some bytes."""
    m, n, depth = tile
    product = 2.0 * m * n * depth / (GPU.matrix[DTYPE] / PROCESSORS / HERTZ)
    exps = 0.0 if kind == "product" else m * n / 16
    needed, issued = NEEDED[kind] * m * n / 128, row["loop"].get("all", 0) * row["warps"] / 4
    if kind == "product":  # its loop walks the depth
        issued *= depth / 64
    blocks = blocks_per_processor(row)
    costs = {"products": product, "exponentials": exps, "instructions": needed}
    limit = max(costs, key=costs.__getitem__)
    low = costs[limit] if blocks > 1 else product + max(exps, needed)
    high = product + max(exps, needed, issued)
    per_clock, memory = count / PROCESSORS / HERTZ, moved / GPU.bytes
    limit = "bytes" if memory > low * per_clock else limit
    return Kernel(
        name, max(low * per_clock, memory) + LAUNCH, max(low, high) * per_clock + memory + LAUNCH, limit, blocks
    )


def moves(name: str, count: float) -> Kernel:
    """A launch that reads and writes ``count`` bytes."""
    seconds = count / GPU.bytes + LAUNCH
    return Kernel(name, seconds, seconds, "bytes")


def nt_xent(n: int, d: int, compiled: dict[tuple[str, str], dict[str, Any]]) -> list[Kernel]:
    """The launches of forward and backward: raw rows to losses and back."""
    from fastcl.backends._triton_configs import ANY, config

    def cut(kind: str) -> Any:
        found = config(FAMILY, kind, d)
        assert found is not None
        return found

    use = {64: "nt_xent, D = 64", 128: "nt_xent", 256: "nt_xent, D = 256"}.get(d, "nt_xent, strips")
    sums, grad = cut("sums"), cut("grad")
    found = compiled.get(("_sums_kernel", use)) or compiled["_sums_kernel", "nt_xent, D = 512"]
    half = n * n / 2 / (sums.block_m * sums.block_n)
    kernels = [
        moves("prepare", 4.0 * n * d),
        tiles("sums", "sums", found, (sums.block_m, sums.block_n, d), half),
        moves("finish", 33 * 4.0 * n),
    ]
    if grad.depth != ANY or n <= 2048:
        blocks = ceil(n / grad.block_m)
        row = compiled["_grad_kernel", use if d <= 256 else "nt_xent, D = 512"]
        slots = PROCESSORS * blocks_per_processor(row)
        splits = 1 if blocks >= PROCESSORS else ceil(2 * PROCESSORS / blocks)
        busy = blocks * splits / slots
        count = n * n / (grad.block_m * grad.block_n) * ceil(busy) / busy  # the last wave is not full
        slices = ceil(d / grad.block_d)
        depth = slices * d + d  # logits once per slice of features, and what weights are multiplied with
        kernels.append(tiles("grad", "grad", row, (grad.block_m, grad.block_n, depth), count))
        parts = splits
    else:
        weights, product = cut("weights"), cut("product")
        row = compiled["_weights_kernel", "nt_xent, strips"]
        size = (weights.block_m, weights.block_n, d)
        written = 2.0 * n * n / 2  # half a matrix of bf16, strip by strip; either product reads it again
        kernels.append(tiles("weights", "weights", row, size, n * n / 2 / (size[0] * size[1]), written))
        row = next(r for (kernel, _), r in compiled.items() if kernel == "_product_kernel")
        size = (product.block_m, product.block_d, n)
        kernels.append(tiles("products", "product", row, size, n * d / (size[0] * size[1]), 2 * written))
        parts = 1
    return [*kernels, moves("restore", (4.0 * parts + 3 * 2) * n * d)]


def predictions() -> list[dict[str, Any]]:
    """A row per shape: low and high seconds, the bound of ``benchmarks.roofline``, the goal, and the kernels."""
    rows = json.loads(AOT.read_text(encoding="utf-8"))["rows"]
    compiled = {}
    for row in rows:
        if (row["arch"], row["dtype"]) == (ARCH, DTYPE):
            compiled.update({(row["kernel"], use): row for use in row["used_by"]})
    return [
        {
            "loss": loss,
            "rows": n,
            "dim": d,
            "low_seconds": sum(k.low for k in kernels),
            "high_seconds": sum(k.high for k in kernels),
            "bound_seconds": bound_seconds(phases(loss, n, n, d, 2), GPU, DTYPE),
            "goal_seconds": goal,
            "kernels": [asdict(k) for k in kernels],
        }
        for (loss, n, d), (goal, _) in GOALS.items()
        if loss == "nt_xent"
        for kernels in [nt_xent(n, d, compiled)]
    ]


def main() -> None:
    """Print a line per shape and kernel, and write them."""
    from fastcl._info import provenance

    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the predictions here")
    args = parser.parse_args()
    rows = predictions()
    for row in rows:
        low, high, goal = (row[f"{k}_seconds"] * 1e6 for k in ("low", "high", "goal"))
        head = f"{row['loss']} {row['rows']:>6} x {row['dim']:<5}"
        print(f"{head} predicted {low:,.0f} to {high:,.0f} us, goal {goal:,.0f} us")
        for k in row["kernels"]:
            print(f"    {k['name']:<9}{k['low'] * 1e6:>9,.1f} to {k['high'] * 1e6:>9,.1f} us  {k['limit']}")
    if args.json:
        result = {
            **provenance("python -m benchmarks.predict --json benchmarks/results/predicted-h200.json"),
            "measured": False,
            "gpu": GPU.name,
            "rows": rows,
        }
        write(args.json, result)


if __name__ == "__main__":
    main()
