"""SupContrast."""

from __future__ import annotations

from typing import Any

import torch

from . import Case, Draw, Problem, original


def _problem(draw: Draw, views: int, *args: Any, **options: Any) -> Problem:
    """n rows in all: some views of each image, of length 1, of features in two dimensions or in one."""
    from fastcl.integrations import sup_contrast

    options = {
        "temperature": draw.between(0.05, 1.0, 0.07),
        "base_temperature": draw.between(0.05, 1.0, 0.07),
        "contrast_mode": draw.choice("all", "one", usual="all"),
        **options,
    }
    batch = _images(draw, views)
    features = draw.units(batch * views).detach().view(batch, views, *_shape(draw)).requires_grad_()

    def step(module: Any) -> Any:
        loss = module.SupConLoss(**options)
        return lambda features: loss(features, *args)

    return Problem([features], step(sup_contrast), step(original("sup_contrast")))


def _images(draw: Draw, views: int) -> int:
    return max(draw.n // views, 2)


def _shape(draw: Draw) -> tuple[int, ...]:
    return (draw.d // 2, 2) if draw.d % 2 == 0 and draw.choice(True, False, usual=False) else (draw.d,)


def _views(draw: Draw) -> Problem:
    return _problem(draw, draw.choice(2, 3, usual=2))


def _labels(draw: Draw) -> Problem:
    views = draw.choice(1, 2, 3, usual=2)
    labels = draw.labels(_images(draw, views))
    return _problem(draw, views, labels if draw.choice(True, False, usual=True) else labels / 3)


def _one(draw: Draw) -> Problem:
    labels = draw.labels(_images(draw, 2))
    return _problem(draw, 2, labels, contrast_mode="one")


def _mask(draw: Draw) -> Problem:
    """Asymmetric, with images that have no positive, even among their own views."""
    views = draw.choice(1, 2, 3, usual=2)
    batch = _images(draw, views)
    mask = (torch.rand(batch, batch, generator=draw.generator) < 0.2).float()
    mask[0] = 0
    if draw.choice(True, False, usual=False):
        mask = mask * torch.rand(batch, batch, generator=draw.generator)
    return _problem(draw, views, None, mask)


CASES = [
    Case("sup_contrast", "SupConLoss, views", _views),
    Case("sup_contrast", "SupConLoss, labels", _labels),
    Case("sup_contrast", "SupConLoss, one view as anchors", _one),
    Case("sup_contrast", "SupConLoss, mask", _mask),
]
