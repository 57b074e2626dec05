"""Every loss once, forward and backward, on small odd sizes: what ``make gpu-test`` runs under compute-sanitizer."""

from __future__ import annotations

import torch

from fastcl import functional, pairwise, use_backend
from fastcl.backends import triton
from fastcl.testing import CASES


def main() -> None:
    """Run them; the sanitizer judges."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for strips_from, d in ((2049, 41), (1, 300)):
            triton._STRIPS_FROM = strips_from
            for case in CASES:
                args, kwargs = case.inputs(37, d, dtype=dtype, device="cuda")
                with use_backend("triton"):
                    loss = getattr(functional, case.name)(*args, normalize=True, **kwargs)
                    torch.autograd.grad(loss, [t for t in (*args, *kwargs.values()) if t.requires_grad])
        rows = torch.randn(37, 41, device="cuda", dtype=dtype)
        with use_backend("triton"):
            for topk in (1, 5, 300):
                pairwise.pair_topk(rows, topk=topk, drop=torch.arange(37, device="cuda"))
            frozen = pairwise.pair_logsumexp(rows.clone().requires_grad_(), rows, scale=0.1)
            frozen.sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
