"""fastcl on a CUDA device against what people use, forward and backward, side by side; the record of one GPU.

    python -m benchmarks.gpu --json benchmarks/results/h200.json --minutes 8

Several processes compile first, which takes longer than measuring. Run it again to go on: rows that were measured with
the same kernels are kept. Contenders: *eager* (``fastcl.reference``) and *cross-entropy* (the usual short form), each
also under torch.compile; ``F.linear_cross_entropy`` where torch has it; lightly, open_clip, inf_cl and
pytorch-metric-learning where they are installed; *fastcl chunked*, *fastcl triton*, and *fastcl triton, graph*, a
replayed CUDA graph; *fastcl native* and its graph, the CUDA C++ kernels, for rows that they take. What does not fit
into the memory is said so.

Losses and gradients up to 4,096 rows are compared with fp64; a kernel is *verified* when those and ``fastcl selftest``
pass on its backend and one of them launched it. ``of_bound`` is the least time of ``benchmarks.roofline`` with this
GPU's own measured ceilings over the time, ``of_goal`` the time over the goal of ``benchmarks.predict``, which was set
for an H200 and bf16.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastcl import _selftest, backends, pairwise, use_backend
from fastcl._info import provenance
from fastcl._measure import graphed, peak_bytes
from fastcl._peers import QUEUE, package_versions, problem
from fastcl.backends import _cuda, triton

from . import ledger, predict, roofline
from .record import write

Step = Callable[[], object]
DEVICE = torch.device("cuda")
# loss, rows, columns, dimension: the most telling first, for a run may be cut short
SHAPES = [
    ("nt_xent", 4096, 4096, 128),
    ("nt_xent", 16384, 16384, 128),
    ("nt_xent", 16384, 16384, 512),
    ("clip", 16384, 16384, 512),
    ("moco", 1024, QUEUE, 128),
    ("siglip", 16384, 16384, 768),
    ("nt_xent", 1024, 1024, 128),
    ("nt_xent", 65536, 65536, 128),
    ("supcon", 4096, 4096, 128),
    ("clip", 65536, 65536, 512),
    ("siglip", 65536, 65536, 768),
    *(("nt_xent", n, n, d) for n in (1024, 4096, 16384, 65536) for d in (64, 256, 512, 1024)),
    ("nt_xent", 2048, 2048, 128),
    ("nt_xent", 8192, 8192, 128),
    ("nt_xent", 32768, 32768, 128),
    ("nt_xent", 1048576, 1048576, 128),
]
KERNELS = ("triton", "native")  # backends with kernels of their own
NEEDED = ("reduce", "grad")
COMPILED_ROWS = 8192  # that many meet the same kernels as more do
CHECKED_ROWS = 4096  # a dense fp64 matrix of that size and its gradient fit anywhere
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
LARGEST_DENSE = 131072  # a dense matrix of more rows fits no GPU, and trying costs minutes
ROUND_SECONDS = 0.02  # of repeated calls: launch gaps and the clock's steps average out


def measure(
    loss: str, n: int, columns: int, d: int, dtype: torch.dtype, rounds: int, deadline: float, compiled: bool = True
) -> list[dict[str, Any]]:
    """One row per contender; ``skipped`` says why one was not measured. After the deadline there is one round."""
    torch.compiler.reset()
    task = problem(loss, n, d, columns=columns, device=DEVICE, dtype=dtype)

    def step(function: Callable[..., Tensor], backend: str = "auto") -> Step:
        def run() -> object:
            with use_backend(backend):
                return torch.autograd.grad(function(*task.leaves), task.leaves)

        return run

    steps: dict[str, Callable[[], Step]] = {}
    for name, function in task.others.items():
        steps[name] = lambda f=function: step(f)  # type: ignore[misc]
        if compiled and name in ("eager", "cross-entropy"):
            steps[f"compile, {name}"] = lambda f=function: step(torch.compile(f, dynamic=False))  # type: ignore[misc]
    steps = {} if max(n, columns) > LARGEST_DENSE else steps
    steps["fastcl chunked"] = lambda: step(task.ours, "chunked")
    ours = [name for name in KERNELS if all(backends.why_not(name, op, task.leaves[0]) is None for op in NEEDED)]
    for backend in ours:
        steps[f"fastcl {backend}"] = lambda b=backend: step(task.ours, b)  # type: ignore[misc]
        steps[f"fastcl {backend}, graph"] = lambda b=backend: graphed(step(task.ours, b))  # type: ignore[misc]

    ready: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in steps.items():
        row = rows[name] = {
            "loss": loss, "rows": n, "columns": columns, "dim": d, "dtype": str(dtype).removeprefix("torch."),
            "contender": name,
        }  # fmt: skip
        try:
            ready[name] = make()
            ready[name]()
            row["peak_bytes"] = None if name.endswith("graph") else peak_bytes(ready[name], DEVICE)
            row["calls"] = max(1, int(ROUND_SECONDS / _seconds(ready[name], 1)))
        except Exception as error:  # out of memory, or a peer that cannot: the others are measured all the same
            ready.pop(name, None)
            row["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for done in range(rounds):
        if done and time.monotonic() > deadline:
            break
        for name, run in ready.items():
            seconds[name].append(_seconds(run, rows[name]["calls"]))
    for name, taken in seconds.items():
        rows[name].update(seconds=taken, median_seconds=median(taken))
    for backend in ours:
        row = rows[f"fastcl {backend}"]
        if n <= CHECKED_ROWS and "skipped" not in row:
            with _noting_launches() as names:
                row["gradient_error"] = _gradient_error(loss, n, columns, d, dtype, backend)
            row["checked_kernels"] = sorted(names)
    return list(rows.values())


def compile_first(shapes: list[tuple[str, int, int, int, str]], workers: int) -> None:
    """Everything that will be launched, once, by several processes, into Triton's cache on disk."""
    jobs: list[tuple[Any, ...]] = [("selftest", str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]
    jobs += [("mining",), *dict.fromkeys((loss, min(n, COMPILED_ROWS), c, d, t) for loss, n, c, d, t in shapes)]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_launch_once, job): job for job in jobs}
        for done in as_completed(waiting):
            if error := done.exception():  # measuring goes on, and will say the same of its own
                print(f"compiling for {waiting[done]}: {type(error).__name__}: {error}", flush=True)


def _launch_once(job: tuple[Any, ...]) -> None:
    if job[0] == "selftest":
        _selftest.run([getattr(torch, job[1])])
    elif job[0] == "mining":
        _mining_passes()
    else:
        loss, n, columns, d, dtype = job
        task = problem(loss, n, d, columns=columns if loss == "moco" else n, device=DEVICE, dtype=getattr(torch, dtype))
        with use_backend("triton"):
            torch.autograd.grad(task.ours(*task.leaves), task.leaves)


def ceilings() -> dict[str, float]:
    """What this GPU reaches: FLOP/s of torch's matrix product on random data by dtype, bytes/s of a large copy."""
    found = {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32), ("float32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in range(2))
        found[f"matmul_{name}"] = 2 * 8192**3 / median(_seconds(lambda a=a, b=b: a @ b, 3) for _ in range(5))  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.randn(2**29, device=DEVICE)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / median(_seconds(lambda: target.copy_(source), 3) for _ in range(5))
    return found


def _seconds(step: Step, calls: int) -> float:
    """Per call, between two events on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _gradient_error(loss: str, n: int, columns: int, d: int, dtype: torch.dtype, backend: str) -> float:
    """Largest relative Frobenius error of a gradient against the dense loss in fp64, on the same rounded rows."""
    task = problem(loss, n, d, columns=columns, device=DEVICE, dtype=dtype)
    with use_backend(backend):
        got = torch.autograd.grad(task.ours(*task.leaves), task.leaves)
    exact = [t.detach().double().requires_grad_() for t in task.leaves]
    value = task.exact(*exact)
    want = torch.autograd.grad(value, exact)
    return max(float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))


def _mining_passes() -> bool:
    """What no loss launches: nearest neighbours, and rows of length 1 by themselves."""
    x = torch.randn(1000, 72, device=DEVICE).requires_grad_()
    with use_backend("triton"):
        unit = pairwise.l2_normalize(x)
        (dx,) = torch.autograd.grad((unit * unit.detach().roll(1, 0)).sum(), x)
        best, at = pairwise.pair_topk(unit, topk=1, drop=torch.arange(1000, device=DEVICE))
        nearest, places = pairwise.pair_topk(unit, topk=300, drop=torch.arange(1000, device=DEVICE))
    exact = x.detach().double().requires_grad_()
    want = torch.nn.functional.normalize(exact, dim=1)
    (want_dx,) = torch.autograd.grad((want * want.detach().roll(1, 0)).sum(), exact)
    similar = (want @ want.T).detach().fill_diagonal_(-2)
    in_order = similar.sort(1, descending=True)[0]
    errors = [(unit, want), (dx, want_dx), (best, in_order[:, :1]), (similar.gather(1, at), best)]
    errors += [(nearest, in_order[:, :300]), (similar.gather(1, places), nearest)]
    return all(float((g.double() - w).norm() / w.norm()) <= 1e-5 for g, w in errors)


@contextmanager
def _noting_launches() -> Iterator[set[str]]:
    """Kernels that are launched, as the ledger names them."""
    names: set[str] = set()
    launch, cuda_launch, sources = triton._launch, _cuda._Call.launch, ledger.cuda_sources()

    def noting(kernel: Any, *args: Any, **constants: Any) -> None:
        launch(kernel, *args, **constants)
        names.add(kernel.__name__)

    def noting_cuda(call: _cuda._Call, kernel: str, blocks: int, *args: Any) -> None:
        cuda_launch(call, kernel, blocks, *args)
        wide = "wide_" if kernel == "sums" and call.operands.depth > call.kernels.deepest else ""
        own = f"hopper_{wide}{kernel}"
        if blocks:
            names.add(sources[own if _cuda.family(call.device) == "hopper" and own in sources else kernel])

    triton._launch, _cuda._Call.launch = noting, noting_cuda  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        triton._launch, _cuda._Call.launch = launch, cuda_launch  # type: ignore[method-assign]


def _verified(rows: list[dict[str, Any]], selftest: dict[str, Any], backend: str) -> bool:
    errors = [
        (row["gradient_error"], TOLERANCE[getattr(torch, row["dtype"])])
        for row in rows
        if row["contender"] == f"fastcl {backend}" and "gradient_error" in row
    ]
    own = [row for row in selftest["rows"] if row["backend"] == backend and row["device"].startswith("cuda")]
    return bool(errors and own) and all(e <= t for e, t in errors) and all(row["passed"] for row in own)


def _of_goal(row: dict[str, Any], gpu: str) -> float | None:
    """Time over the goal that was set for it; of an H200 and bf16 only."""
    goals = predict.GOALS.get((row["loss"], row["rows"], row["dim"]))
    backend = next((i for i, name in enumerate(KERNELS) if row["contender"].startswith(f"fastcl {name}")), None)
    if goals is None or backend is None or "H200" not in gpu or row["dtype"] != "bfloat16" or "skipped" in row:
        return None
    return float(row["median_seconds"] / goals[backend])


def main() -> None:
    """Measure shape after shape until the time is over, and write after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, required=True, help="the record; rows of the same kernels that it has are kept"
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="after which no other shape is begun (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each contender, in turns (default: %(default)s)"
    )
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the rows, with commas (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile kernels first")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: got a machine without a CUDA device; expected one. Run it where one is.")
    deadline = time.monotonic() + 60 * args.minutes
    hashes = ledger.hashes()
    result = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    kept = result.get("rows", []) if {n: k["hash"] for n, k in result.get("kernels", {}).items()} == hashes else []
    gpu = torch.cuda.get_device_name()
    done = {_key(r) for r in kept}
    shapes = [(*shape, dtype) for shape in SHAPES for dtype in args.dtypes.split(",") if (*shape, dtype) not in done]
    compile_first(shapes, args.workers)
    machine: dict[str, Any] = {"gpu": gpu, "capability": torch.cuda.get_device_capability(), "ceilings": ceilings()}
    with _noting_launches() as launched:
        selftest = _selftest.run()
        mining = _mining_passes()
    print(_selftest.text(selftest), flush=True)  # also says why a backend is not among the contenders
    launched.update(name for name, k in result.get("kernels", {}).items() if kept and k["verified"])
    rows = list(kept)
    for loss, n, columns, d, dtype in shapes:
        if time.monotonic() > deadline:
            break
        new = measure(loss, n, columns, d, getattr(torch, dtype), args.rounds, deadline, not args.no_compile)
        rows += new
        for row in new:
            row["of_bound"] = roofline.fraction(row, gpu, machine["ceilings"])
            row["of_goal"] = _of_goal(row, gpu)
            print(_line(row), flush=True)
        for row in new:
            launched.update(row.get("checked_kernels", ()))
        right = {backend: _verified(rows, selftest, backend) for backend in KERNELS}
        right["triton"] &= mining
        kernels = {
            name: {
                "hash": digest,
                "verified": name in launched and right["native" if name.endswith(".cu") else "triton"],
            }
            for name, digest in hashes.items()
        }
        result = {
            **provenance(
                f"python -m benchmarks.gpu --dtypes {args.dtypes} --rounds {args.rounds}"
                + " --no-compile" * args.no_compile
            ),
            "machine": machine,
            "peers": package_versions(),
            "kernels": kernels,
            "selftest_passed": selftest["passed"],
            "rows": rows,
        }
        write(args.json, result)
    left = len(SHAPES) * len(args.dtypes.split(",")) - len({_key(r) for r in rows})
    print(f"{left} shapes left: run it again" if left > 0 else "complete")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["loss"], row["rows"], row["columns"], row["dim"], row["dtype"]


def _line(row: dict[str, Any]) -> str:
    head = f"{row['loss']:>8} {row['rows']:>8} x {row['dim']:<5} {row['dtype']:<9} {row['contender']:<24}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped'][:60]}"
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:>9.1f} MB"
    share = "" if row["of_bound"] is None else f"  {row['of_bound']:.0%} of the bound"
    goal = "" if row["of_goal"] is None else f"  {row['of_goal']:.2f} of the goal"
    error = f"  error {row['gradient_error']:.1e}" if "gradient_error" in row else ""
    return f"{head}{row['median_seconds'] * 1e3:>10.3f} ms {peak}{share}{goal}{error}"


if __name__ == "__main__":
    main()
