"""Inf-CL, whose kernels need a GPU, and multiply fp32 rows as TF32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Draw, Problem, original

# A rounding of both factors to 11 bits changes a logit by up to 2^-10 of its size, here at most 14.3, and a
# probability by as much; the largest of many such errors counts against the mean of all, so by far less.
_TF32 = 5e-3


def _problem(draw: Draw, name: str, labels: bool = False) -> Problem:
    from fastcl.integrations import inf_cl

    theirs = getattr(original("inf_cl"), name)
    ours = getattr(inf_cl, name)
    keys = draw.n + (draw.choice(0, 5, usual=0) if labels else 0)
    width = 16 * max(draw.d // 16, 1)
    scale = torch.tensor(draw.between(1.0, 14.3, 14.3), requires_grad=True)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in (draw.units(d=width), draw.units(keys, width), scale)]
    options: dict[str, Any] = {"head_dim": width if width & (width - 1) == 0 else 16}
    if labels:
        options["labels"] = torch.randint(keys, (draw.n,), generator=draw.generator).cuda()

    def step(function: Any) -> Any:
        def call(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
            losses = function(q, k, scale=scale, **options)
            return (losses * torch.linspace(0.5, 1.5, losses.numel()).view(losses.shape).to(losses)).sum()

        return call

    return Problem(leaves, step(ours), step(theirs))


def _flash(draw: Draw) -> Problem:
    return _problem(draw, "cal_flash_loss")


def _labelled(draw: Draw) -> Problem:
    return _problem(draw, "cal_flash_loss", labels=True)


# cal_inf_loss is this one's mean where torch.distributed is not initialised, and the original's does not
# differentiate there: its gradient of the scale is an all-reduce.
CASES = [
    Case("inf_cl", "cal_flash_loss", _flash, tolerance=_TF32),
    Case("inf_cl", "cal_flash_loss, labels", _labelled, tolerance=_TF32),
]
