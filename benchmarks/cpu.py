"""The CPU kernels against what people use, forward and backward, interleaved in one process.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python -m benchmarks.cpu --json benchmarks/results/native-cpu.json

Contenders: *eager*, the dense loss in plain torch (``fastcl.reference``); *cross-entropy*, the usual short form;
*compile*, torch.compile of eager; lightly, open_clip and pytorch-metric-learning where they are installed; *native*,
fastcl with its default workspace; *native, 0 MB* with none; *native, bf16* on bfloat16 rows.

``of_sgemm`` is the rate of the least arithmetic that the loss can do (the exponentials kept), against torch's fp32
matrix product of 1,024 rows, timed in the same rounds; bf16 counts against the fp32 rate too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastcl import _settings, use_backend
from fastcl._info import cpu_model, provenance
from fastcl._measure import interleaved_seconds, median_ratio, peak_bytes
from fastcl._peers import QUEUE, package_versions, problem
from fastcl.backends import native

from .record import write

Step = Callable[[], object]
# loss, rows, dimension, products of N x M x D that the least arithmetic takes: the symmetric matrix is formed once,
# by half, and multiplied once per side; a queue is read once; two towers take one product forward and two backward.
SHAPES = [
    ("nt_xent", 256, 64, 1.5),
    ("nt_xent", 1024, 128, 1.5),
    ("nt_xent", 4096, 128, 1.5),
    ("nt_xent", 4096, 512, 1.5),
    ("nt_xent", 16384, 128, 1.5),
    ("clip", 4096, 128, 3.0),
    ("clip", 4096, 512, 3.0),
    ("moco", 256, 128, 2.0),
    ("supcon", 4096, 128, 1.5),
]


def contenders(loss: str, n: int, d: int) -> dict[str, Step]:
    """Forward and backward of one loss by contender, all on the same rows."""
    torch.compiler.reset()
    fp32, bf16 = problem(loss, n, d), problem(loss, n, d, dtype=torch.bfloat16)

    def step(function: Callable[..., Tensor], leaves: list[Tensor], workspace: int | None = None) -> Step:
        def run() -> object:
            _settings.workspace_bytes = workspace
            with use_backend("native"):
                return torch.autograd.grad(function(*leaves), leaves)

        return run

    compiled = {"compile": torch.compile(fp32.others["eager"], dynamic=False)}
    return {
        **{name: step(f, fp32.leaves) for name, f in {**fp32.others, **compiled}.items()},
        "native, 0 MB": step(fp32.ours, fp32.leaves, 0),
        "native": step(fp32.ours, fp32.leaves),
        "native, bf16": step(bf16.ours, bf16.leaves),
    }


def measure(loss: str, n: int, d: int, products: float, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row per contender."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    steps = contenders(loss, n, d)
    a = torch.randn(1024, 1024)
    seconds = interleaved_seconds({**steps, "sgemm": lambda: torch.mm(a, a)}, rounds=rounds)
    sgemm = 2 * 1024**3 / median(seconds.pop("sgemm"))
    flop = 2 * n * (QUEUE if loss == "moco" else n) * d * products
    rows = []
    for name, step in steps.items():
        taken = seconds[name]
        native.release_workspace()  # so that taking it is counted
        rows.append(
            {
                "loss": loss,
                "rows": n,
                "dim": d,
                "threads": threads,
                "contender": name,
                "seconds": taken,
                "median_seconds": median(taken),
                "peak_bytes": peak_bytes(step),
                "times_faster": {
                    other: median_ratio(seconds[other], taken) for other in seconds if not other.startswith("native")
                },
                "of_sgemm": flop / median(taken) / sgemm,
            }
        )
    return rows


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", default="1,2", help="numbers of CPU threads, with commas (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="calls of each contender, in turns; 3 above 4,096 rows (default: %(default)s)",
    )
    parser.add_argument(
        "--losses", default="nt_xent,clip,moco,supcon", help="which, with commas (default: %(default)s)"
    )
    parser.add_argument("--json", help="write the record here")
    args = parser.parse_args()
    rows = []
    for threads in map(int, args.threads.split(",")):
        for loss, n, d, products in SHAPES:
            if loss not in args.losses.split(","):
                continue
            rounds = args.rounds if n <= 4096 else 3
            for row in measure(loss, n, d, products, threads, rounds):
                faster = "  ".join(f"{k} {v:.2f}x" for k, v in row["times_faster"].items())
                print(
                    f"{loss:>8} {n:>6} x {d:<4} {threads} thread(s) {row['contender']:<24}"
                    f"{row['median_seconds'] * 1e3:>10.2f} ms {row['peak_bytes'] / 1e6:>8.1f} MB"
                    f" {row['of_sgemm']:>5.0%} of sgemm" + (f"  {faster}" if "native" in row["contender"] else ""),
                    flush=True,
                )
                rows.append(row)
    result = {
        **provenance(
            f"python -m benchmarks.cpu --threads {args.threads} --rounds {args.rounds} --losses {args.losses}"
        ),
        "machine": {"device": cpu_model(), "instructions": native.isa(), "threads": args.threads},
        "peers": package_versions(),
        "rows": rows,
    }
    write(args.json, result)


if __name__ == "__main__":
    main()
