"""Every loss once, forward and backward, on small odd sizes: what ``make gpu-test`` runs under compute-sanitizer.

python -m benchmarks.sanitized native      leaves Triton's kernels out, whose compilation is slow under it
"""

from __future__ import annotations

import argparse

import torch

from fastcl import _settings, functional, pairwise, use_backend
from fastcl.backends import triton, why_not
from fastcl.testing import HOT


def main() -> None:
    """Run them; the sanitizer judges."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitized", description=__doc__.partition("\n")[0])
    parser.add_argument("backends", nargs="*", default=["triton", "native"], help="which (default: %(default)s)")
    backends = parser.parse_args().backends
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if "triton" in backends:
            _triton(dtype)
        if "native" in backends:
            _native(dtype)
    torch.cuda.synchronize()


def _triton(dtype: torch.dtype) -> None:
    _settings.fp32 = "auto"
    for strips_from, d in ((2049, 41), (1, 300)):
        triton._STRIPS_FROM = strips_from
        _losses("triton", d, dtype)
    rows = torch.randn(37, 41, device="cuda", dtype=dtype)
    with use_backend("triton"):
        for topk in (1, 5, 300):
            pairwise.pair_topk(rows, topk=topk, drop=torch.arange(37, device="cuda"))
    _frozen("triton", rows)


def _native(dtype: torch.dtype) -> None:
    _settings.fp32 = "bf16x3"  # CUDA C++ serves fp32 rows by nothing else
    for d in (40, 128, 200, 520):
        rows = torch.randn(37, d, device="cuda", dtype=dtype)
        if reason := why_not("native", "reduce", rows):
            print(f"native, {dtype}, D = {d}: not run ({reason})")
            continue
        _losses("native", d, dtype)
        _frozen("native", rows)


def _losses(backend: str, d: int, dtype: torch.dtype) -> None:
    for case in HOT:
        args, kwargs = case.inputs(37, d, dtype=dtype, device="cuda")
        with use_backend(backend):
            loss = getattr(functional, case.name)(*args, normalize=True, **kwargs)
            torch.autograd.grad(loss, [t for t in (*args, *kwargs.values()) if t.requires_grad])


def _frozen(backend: str, rows: torch.Tensor) -> None:
    with use_backend(backend):
        pairwise.pair_logsumexp(rows.clone().requires_grad_(), rows, scale=0.1).sum().backward()


if __name__ == "__main__":
    main()
