"""open_clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Draw, Problem, original


def _problem(draw: Draw, name: str, leaves: list[Tensor], **options: Any) -> Problem:
    from fastcl.integrations import open_clip

    ours, theirs = (getattr(module, name)(**options) for module in (open_clip, original("open_clip")))
    return Problem([draw.units(), draw.units(), *leaves], ours, theirs)


def _scale(draw: Draw, usual: float) -> Tensor:
    return torch.tensor(draw.between(1.0, 50.0, usual), requires_grad=True)


def _clip(draw: Draw) -> Problem:
    return _problem(draw, "ClipLoss", [_scale(draw, 14.3)])


def _siglip(draw: Draw) -> Problem:
    bias = torch.tensor(draw.between(-20.0, 0.0, -10.0), requires_grad=True)
    return _problem(draw, "SigLipLoss", [_scale(draw, 10.0), bias])


def _coca(draw: Draw) -> Problem:
    words, length = 11, 3
    labels = torch.randint(words, (draw.n, length), generator=draw.generator)
    logits = torch.randn(draw.n, length, words, generator=draw.generator).requires_grad_()
    problem = _problem(
        draw, "CoCaLoss", [_scale(draw, 14.3), logits], caption_loss_weight=2.0, clip_loss_weight=0.7, pad_id=3
    )

    def total(loss: Any) -> Any:
        return lambda image, text, scale, logits: sum(loss(image, text, logits, labels, scale))

    return Problem(problem.leaves, total(problem.ours), total(problem.theirs))


CASES = [
    Case("open_clip", "ClipLoss", _clip),
    Case("open_clip", "SigLipLoss", _siglip),
    Case("open_clip", "CoCaLoss", _coca),
]
