"""The CUDA C++ kernels on a GPU for the first time: each in a process of its own, against fp64.

    python -m benchmarks.probe --workers 8

A kernel that faults takes the CUDA context of its process with it, and one whose barriers do not match hangs; neither
ends the others here, and every line says which it was. Two runs of each must agree in all bits. Then, for what passed,
``python -m benchmarks.launches`` says where the time of a step goes.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import time
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a process that has asked CUDA cannot be forked

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastcl import _settings, functional, reference, use_backend
from fastcl.backends import Pairs, Sides, _cuda, chunked, native, triton  # noqa: F401  loaded before the forks

SECONDS = 40.0  # for one case; they take five, most of it CUDA's
KINDS = (
    "sums, one set",
    "sums, two sets",
    "sums, softplus",
    "grad, one set",
    "grad, two sets",
    "grad, softplus",
    "contrastive",
)
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-4}
OTHERS = 222  # more columns than rows, of two sets


def cases() -> list[tuple[str, torch.dtype, int, int]]:
    """Kind, dtype, features and rows; the most telling first."""
    return [
        (kind, dtype, d, n)
        for n, dims in ((301, (64, 128, 200, 256, 520)), (2048, (128, 520)))
        for dtype in TOLERANCE
        for d in dims
        for kind in KINDS
        if not (kind == "contrastive" and (dtype == torch.float32 or d > 256))
        and not (n == 2048 and dtype != torch.bfloat16)
    ]


def errors(kind: str, dtype: torch.dtype, d: int, n: int, device: str = "cuda") -> dict[str, float]:
    """Relative Frobenius errors of every result; NaN where two runs differ in a bit."""
    if dtype == torch.float32:
        _settings.fp32 = "bf16x3"  # CUDA C++ serves fp32 rows by nothing else
    generator = torch.Generator().manual_seed(d)

    def rows(count: int) -> Tensor:
        return normalize(torch.randn(count, d, generator=generator), dim=1).to(device, dtype)

    if kind == "contrastive":
        z = (3 * rows(2 * n)).requires_grad_()
        exact = z.detach().double().requires_grad_()
        with use_backend("native"):
            loss = functional.nt_xent(z, temperature=0.1, normalize=True)
            (got,) = torch.autograd.grad(loss, z)
        want_loss = reference.nt_xent(exact, temperature=0.1, normalize=True)
        (want,) = torch.autograd.grad(want_loss, exact)
        return {"loss": _relative(loss, want_loss), "grad": _relative(got, want)}
    link, symmetric = ("softplus" if "softplus" in kind else "exp"), "one set" in kind
    x, y, scale = rows(n), rows(n + OTHERS), torch.tensor(10.0, device=device)
    keys, other_keys = (torch.arange(count, device=device) // 2 for count in (n, n + OTHERS))
    if symmetric:
        y, other_keys = x, keys
    pairs = Pairs(x, y, scale, drop_x=keys, drop_y=other_keys, symmetric=symmetric)
    exact_pairs = pairs._replace(x=x.double(), y=y.double(), scale=scale.double())
    both = not symmetric
    row, col = chunked.reduce(link, exact_pairs, both, True)
    if kind.startswith("sums"):
        return _compared(lambda: _cuda.reduce(link, pairs, both), (row, col))
    upstream = [torch.linspace(1, 2, len(t), device=device, dtype=t.dtype) for t in (row, col)]
    sides = Sides(row, upstream[0], *((col, upstream[1]) if both else (row, upstream[0])))
    narrow = Sides(*(t if t is None else t.float() for t in sides))
    wanted = 4 if both else 3  # of one set, sums of weights of columns are those of rows
    exact_grads = chunked.grad(link, exact_pairs, sides, True, both, True)[:wanted]
    return _compared(lambda: _cuda.grad(link, pairs, narrow, True, both, True)[:wanted], exact_grads)


def _compared(run: Any, want: tuple[Tensor, ...]) -> dict[str, float]:
    got, again = run(), run()
    return {
        str(i): _relative(g, w) if torch.equal(g, a) else float("nan")
        for i, (g, a, w) in enumerate(zip(got, again, want, strict=True))
        if w.numel()
    }


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def _child(pipe: Any, case: tuple[str, torch.dtype, int, int]) -> None:
    try:
        found = errors(*case)
        verdict = "right" if all(error <= TOLERANCE[case[1]] for error in found.values()) else "WRONG"
        pipe.send(f"{verdict} {' '.join(f'{error:.1e}' for error in found.values())}")
    except Exception as error:  # whatever a broken kernel raises is its line
        pipe.send(f"RAISED {type(error).__name__}: {str(error).splitlines()[0]}")


def main() -> None:
    """A line per case, as they end; how many were not right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=4, help="processes at once (default: %(default)s)")
    workers = parser.parse_args().workers
    context = mp.get_context("fork")  # importing torch takes longer than a case
    waiting, running, failed = cases(), list[Any](), 0
    while waiting or running:
        while waiting and len(running) < workers:
            receiver, sender = context.Pipe(False)
            process = context.Process(target=_child, args=(sender, waiting[0]))
            process.start()
            sender.close()
            running.append((process, receiver, waiting.pop(0), time.monotonic()))
        for one in list(running):
            process, receiver, case, began = one
            if receiver.poll(0.01):
                try:
                    text = receiver.recv()
                except EOFError:
                    text = "DIED"
            elif time.monotonic() - began > SECONDS:
                text = "HANGS"
            else:
                continue
            process.kill()
            running.remove(one)
            failed += not text.startswith("right")
            kind, dtype, d, n = case
            print(f"{kind:<16}{str(dtype).removeprefix('torch.'):<9}{n:>6} x {d:<5}{text}", flush=True)
    raise SystemExit(f"{failed} of {len(cases())} are not right" if failed else 0)


if __name__ == "__main__":
    main()
