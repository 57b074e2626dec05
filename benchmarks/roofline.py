"""How fast a loss could be: its arithmetic, exponentials and bytes, and the least time they take on a GPU.

    python -m benchmarks.roofline --gpu H200
    python -m benchmarks.roofline --results benchmarks/results/h200.json

The second shows, for what ``benchmarks.gpu`` measured, which fraction of that bound was reached, with the ceilings that
were measured on that GPU. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Peak rates: products of matrices in FLOP/s by dtype, dense; exponentials and bytes per second."""

    name: str
    matrix: Mapping[str, float]
    exps: float
    bytes: float


def _gpu(name: str, half: float, tf32: float, fp32: float, terabytes: float, processors: int, gigahertz: float) -> Gpu:
    matrix = {"bfloat16": half, "float16": half, "tf32": tf32, "float32": fp32}
    # 16 results of the special function unit per processor and clock: CUDA C++ Programming Guide, throughput of native
    # arithmetic instructions
    return Gpu(name, {k: v * 1e12 for k, v in matrix.items()}, processors * 16 * gigahertz * 1e9, terabytes * 1e12)


# From NVIDIA's data sheets and architecture white papers (dense rates, boost clock): leads, not measurements. A T4 has
# fp16 matrix instructions, but Triton does not use them: its products run in fp32.
GPUS = {
    "T4": _gpu("T4", 8.1, 8.1, 8.1, 0.32, 40, 1.59),
    "A100": _gpu("A100 SXM 80 GB", 312, 156, 19.5, 2.039, 108, 1.41),
    "H100": _gpu("H100 SXM", 989, 494.7, 67, 3.35, 132, 1.83),
    "H200": _gpu("H200 SXM", 989, 494.7, 67, 4.8, 132, 1.83),
    "4090": _gpu("GeForce RTX 4090", 165.2, 82.6, 82.6, 1.008, 128, 2.52),
}
ELEMENT_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Phase:
    """What one pass over the pairs must do at least."""

    name: str
    flop: float
    exps: float
    bytes: float


def phases(loss: str, n: int, k: int, d: int, element_bytes: int) -> list[Phase]:
    """The least work of a loss of n rows against k columns of d features, forward and backward.

    ``nt_xent``, ``dcl``, ``supcon``: one set, whose symmetric matrix is formed by half in either pass and multiplied
    once in the backward. ``clip``, ``info_nce``: two sets; one exponential serves both directions. ``siglip`` and
    ``moco``: one pass, for a weight does not depend on other pairs, or one side is frozen.

    Raises:
        ValueError: an unknown loss.
    """
    product, pairs = 2.0 * n * k * d, float(n * k)  # FLOP of one product of all pairs
    x, y = n * d * element_bytes, k * d * element_bytes
    if loss in ("nt_xent", "dcl", "supcon"):
        return [
            Phase("forward", product / 2, pairs / 2, x + 4 * n),
            Phase("backward", product * 1.5, pairs / 2, 2 * x + 4 * n),
        ]
    if loss in ("clip", "info_nce"):
        vectors = 4 * (n + k)
        return [
            Phase("forward", product, pairs, x + y + vectors),
            Phase("backward", 3 * product, pairs, 2 * (x + y) + vectors),
        ]
    if loss == "siglip":
        return [Phase("one pass", 3 * product, pairs, 2 * (x + y))]
    if loss == "moco":
        return [Phase("one pass", 2 * product, pairs, 2 * x + y)]
    raise ValueError(
        f"got the loss {loss!r}; expected nt_xent, dcl, supcon, clip, info_nce, siglip or moco. Check the spelling."
    )


def limits(phase: Phase, gpu: Gpu, dtype: str) -> dict[str, float]:
    """Seconds that each resource alone would take."""
    return {
        "arithmetic": phase.flop / gpu.matrix[dtype],
        "exponentials": phase.exps / gpu.exps,
        "bytes": phase.bytes / gpu.bytes,
    }


def bound_seconds(work: list[Phase], gpu: Gpu, dtype: str) -> float:
    """The least time: in every phase the slowest resource, the others hidden behind it."""
    return sum(max(limits(phase, gpu, dtype).values()) for phase in work)


def with_ceilings(gpu: Gpu, ceilings: Mapping[str, float]) -> Gpu:
    """The GPU with the rates that were measured on it: ``matmul_<dtype>`` in FLOP/s, ``copy`` in bytes/s."""
    measured = {dtype: ceilings.get(f"matmul_{dtype}", rate) for dtype, rate in gpu.matrix.items()}
    measured["float16"] = ceilings.get("matmul_float16", measured["bfloat16"])
    return replace(gpu, matrix=measured, bytes=ceilings.get("copy", gpu.bytes))


def named(name: str) -> Gpu | None:
    """The GPU of the table that a device's name contains, such as H200 of "NVIDIA H200"."""
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def fraction(row: Mapping[str, Any], device: str, ceilings: Mapping[str, float]) -> float | None:
    """Bound over measured time of a row of ``benchmarks.gpu``; ``None`` for an unknown GPU or nothing measured."""
    gpu = named(device)
    if gpu is None or row.get("median_seconds") is None:
        return None
    work = phases(row["loss"], row["rows"], row["columns"], row["dim"], ELEMENT_BYTES[row["dtype"]])
    return bound_seconds(work, with_ceilings(gpu, ceilings), row["dtype"]) / float(row["median_seconds"])


def main() -> None:
    """Print the table of bounds, or of the fractions reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", default="H200", choices=GPUS, help="whose data sheet counts (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=ELEMENT_BYTES, help="of the rows (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="a record of benchmarks.gpu: the fractions that were reached")
    args = parser.parse_args()
    if args.results:
        result = json.loads(args.results.read_text(encoding="utf-8"))
        machine = result["machine"]
        for row in result["rows"]:
            reached = fraction(row, machine["gpu"], machine["ceilings"])
            if row["contender"].startswith("fastcl") and reached is not None:
                head = f"{row['loss']:>8} {row['rows']:>9,} x {row['dim']:<5} {row['dtype']:<9} {row['contender']:<22}"
                print(f"{head}{row['median_seconds'] * 1e6:>12,.1f} us {reached:>5.0%} of the bound")
        return
    gpu = GPUS[args.gpu]
    print(f"{gpu.name}, {args.dtype}, peak rates of the data sheet")
    shapes = [("nt_xent", n, n, d) for n in (1024, 4096, 16384, 65536) for d in (64, 128, 256, 512, 1024)]
    shapes += [("clip", 16384, 16384, 512), ("siglip", 65536, 65536, 768), ("moco", 1024, 65536, 128)]
    for loss, n, k, d in shapes:
        work = phases(loss, n, k, d, ELEMENT_BYTES[args.dtype])
        by = [max(seconds, key=seconds.__getitem__) for seconds in (limits(p, gpu, args.dtype) for p in work)]
        print(
            f"{loss:>8} {n:>7,} x {k:>6,} x {d:<5}{sum(p.flop for p in work) / 1e9:>10,.1f} GFLOP"
            f"{sum(p.exps for p in work) / 1e9:>8.3f} Gexp{sum(p.bytes for p in work) / 1e6:>9.1f} MB"
            f"{bound_seconds(work, gpu, args.dtype) * 1e6:>11,.1f} us  {', '.join(dict.fromkeys(by))}"
        )


if __name__ == "__main__":
    main()
