"""lightly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import Case, Draw, Problem, original


def _pair(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from fastcl.integrations import lightly

    return getattr(lightly, name)(**options), getattr(original("lightly"), name)(**options)


def _views(draw: Draw, name: str, options: dict[str, Any]) -> Problem:
    """n rows in all: two views of n / 2 images."""
    ours, theirs = _pair(name, options)
    half = max(draw.n // 2, 2)
    return Problem([draw.rows(half), draw.rows(half)], ours, theirs)


def _nt_xent(draw: Draw) -> Problem:
    return _views(draw, "NTXentLoss", {"temperature": draw.between(0.05, 1.0, 0.5)})


def _memory_bank(draw: Draw) -> Problem:
    """n keys in the bank, 256 queries."""
    options = {"temperature": draw.between(0.05, 1.0, 0.1), "memory_bank_size": (draw.n, draw.d)}
    ours, theirs = _pair("NTXentLoss", options)
    theirs.memory_bank.load_state_dict(ours.memory_bank.state_dict())
    theirs.memory_bank.bank.copy_(ours.memory_bank.bank)
    queries = 256 if draw.usual else max(draw.n // 3, 1)
    return Problem([draw.rows(queries), draw.rows(queries)], ours, theirs)


def _dcl(draw: Draw) -> Problem:
    return _views(draw, "DCLLoss", {"temperature": draw.between(0.05, 1.0, 0.1)})


def _weighted(out0: Tensor, out1: Tensor) -> Tensor:
    return torch.sum((out0 - out1) ** 2, dim=1)


def _dcl_weighted(draw: Draw) -> Problem:
    return _views(draw, "DCLLoss", {"temperature": draw.between(0.05, 1.0, 0.1), "weight_fn": _weighted})


def _dclw(draw: Draw) -> Problem:
    return _views(draw, "DCLWLoss", {"temperature": draw.between(0.05, 1.0, 0.1), "sigma": draw.between(0.2, 1.0, 0.5)})


def _negative_cosine(draw: Draw) -> Problem:
    return _views(draw, "NegativeCosineSimilarity", {})


CASES = [
    Case("lightly", "NTXentLoss", _nt_xent),
    Case("lightly", "NTXentLoss, memory bank", _memory_bank),
    Case("lightly", "DCLLoss", _dcl),
    Case("lightly", "DCLLoss, weight_fn", _dcl_weighted),
    Case("lightly", "DCLWLoss", _dclw),
    Case("lightly", "NegativeCosineSimilarity", _negative_cosine, fused=False),
]
