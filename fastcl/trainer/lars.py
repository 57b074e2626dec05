"""LARS, a learning rate of its own for every layer: what lets SGD train with thousands of images per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    r"""Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888, algorithm 1 and eq. 6).

    For every parameter w with gradient g, learning rate :math:`\gamma`, weight decay :math:`\beta`, momentum m:

    .. math::

        \lambda = \eta \|w\| / (\|g\| + \beta \|w\|), \quad
        v \leftarrow m v + \gamma \lambda (g + \beta w), \quad w \leftarrow w - v.

    The trust ratio :math:`\lambda` is 1 where w or g is zero, and in groups with ``adapt=False``: SimCLR (Chen et al.
    2020, arXiv:2002.05709, section 2.2) leaves biases and normalisation alone, which such a group without weight decay
    does; its code divides by :math:`\|g + \beta w\|`, which its small :math:`\beta` makes nearly the same.

    Args:
        params: parameters, or groups with ``lr``, ``momentum``, ``weight_decay``, ``trust`` and ``adapt`` of their own.
        lr: :math:`\gamma`.
        momentum: m.
        weight_decay: :math:`\beta`.
        trust: :math:`\eta`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay. Returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                decay = group["weight_decay"]
                update = w.grad + decay * w
                if group["adapt"]:
                    length, slope = w.norm(), w.grad.norm()
                    ratio = group["trust"] * length / (slope + decay * length)
                    update *= torch.where((length > 0) & (slope > 0), ratio, 1)
                state = self.state[w]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(w)
                state["velocity"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                w -= state["velocity"]
        return loss
