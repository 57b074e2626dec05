"""Where the time of a step goes on a CUDA device: every kernel that it launches, by backend.

python -m benchmarks.launches --rounds 20 --dtypes bfloat16
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial
from statistics import median

import torch

from fastcl import use_backend
from fastcl._peers import Problem, problem

from .gpu import DEVICE, KERNELS, SHAPES, _seconds

SHOWN = 7


def _step(task: Problem, backend: str) -> object:
    with use_backend(backend):
        return torch.autograd.grad(task.ours(*task.leaves), task.leaves)


def main() -> None:
    """A block per shape and backend; the longest kernels first."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="steps that are averaged (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16", help="of the rows, with commas (default: %(default)s)")
    parser.add_argument("--shapes", type=int, default=9, help="how many of those of benchmarks.gpu")
    parser.add_argument("--backends", default=",".join(KERNELS), help="with commas (default: %(default)s)")
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        for loss, n, columns, d in SHAPES[: args.shapes]:
            task = problem(loss, n, d, columns=columns, device=DEVICE, dtype=getattr(torch, dtype))
            for backend in args.backends.split(","):
                step = partial(_step, task, backend)
                head = f"{loss} {n:,} x {d} {dtype} {backend}"
                try:
                    step()
                    seconds = median(_seconds(step, args.rounds) for _ in range(5))
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                        for _ in range(args.rounds):
                            step()
                        torch.cuda.synchronize()
                except Exception as error:  # one that cannot run says so, and the next goes on
                    print(f"{head}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                    continue
                taken: dict[str, float] = defaultdict(float)
                for event in trace.events():
                    taken[event.name] += event.device_time / args.rounds
                print(f"{head}: {seconds * 1e6:,.1f} us, {sum(taken.values()):,.1f} us in kernels", flush=True)
                for name in sorted(taken, key=taken.__getitem__, reverse=True)[:SHOWN]:
                    print(f"    {taken[name]:>10,.1f} us  {name[:100]}", flush=True)


if __name__ == "__main__":
    main()
