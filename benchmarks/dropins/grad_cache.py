"""GradCache. Logits are plain inner products, so rows are as long as a model with a temperature makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Draw, Problem, original


def _problem(draw: Draw, name: str, keys: int, options: dict[str, Any], call: Any) -> Problem:
    """n queries and some keys, of length 1 to 5."""
    from fastcl.integrations import grad_cache

    length = draw.between(1.0, 5.0, 4.5)
    leaves = [(length * rows.detach()).requires_grad_() for rows in (draw.units(), draw.units(keys))]
    ours, original_ = (getattr(module, name)(**options) for module in (grad_cache, original("grad_cache")))
    return Problem(leaves, call(ours), call(original_))


def _summed(losses: Tensor) -> Tensor:
    """A scalar of as many different weights as there are losses."""
    return (losses * torch.linspace(0.5, 1.5, losses.numel()).view(losses.shape)).sum()


def _call(**options: Any) -> Any:
    return lambda loss: lambda x, y: _summed(loss(x, y, **options))


def _reduction(draw: Draw) -> str:
    return draw.choice("mean", "sum", "none", usual="mean")


def _simple(draw: Draw) -> Problem:
    return _problem(draw, "SimpleContrastiveLoss", draw.n, {}, _call(reduction=_reduction(draw)))


def _hard(draw: Draw) -> Problem:
    hard = draw.choice(1, 2, 5, usual=1)
    return _problem(
        draw,
        "SimpleContrastiveLoss",
        draw.n * (hard + 1),
        {"n_hard_negatives": hard},
        _call(reduction=_reduction(draw)),
    )


def _target(draw: Draw) -> Problem:
    """Any key is the positive; some queries share one, and some are ignored."""
    keys = draw.n + draw.choice(0, 3, 40, usual=0)
    target = torch.randint(keys, (draw.n,), generator=draw.generator)
    target[::4] = -100
    return _problem(draw, "SimpleContrastiveLoss", keys, {}, _call(target=target, reduction=_reduction(draw)))


def _closure(draw: Draw) -> Problem:
    return _problem(
        draw,
        "ContrastiveLossWithQueryClosure",
        draw.n,
        {},
        lambda loss: lambda x, y: loss(y, query_closure=lambda: x),
    )


CASES = [
    Case("grad_cache", "SimpleContrastiveLoss", _simple),
    Case("grad_cache", "SimpleContrastiveLoss, hard negatives", _hard),
    Case("grad_cache", "SimpleContrastiveLoss, target", _target),
    Case("grad_cache", "ContrastiveLossWithQueryClosure", _closure),
]
