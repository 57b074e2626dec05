"""Every loss once, forward and backward, on small odd sizes: what ``make gpu-test`` runs under compute-sanitizer."""

from __future__ import annotations

import torch

from fastcl import functional, use_backend
from fastcl.testing import CASES


def main() -> None:
    """Run them; the sanitizer judges."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            args, kwargs = case.inputs(37, 41, dtype=dtype, device="cuda")
            with use_backend("triton"):
                loss = getattr(functional, case.name)(*args, **kwargs)
                torch.autograd.grad(loss, [t for t in (*args, *kwargs.values()) if t.requires_grad])
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
