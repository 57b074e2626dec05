"""What the benchmarks compare is one problem: every contender computes the same loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl._peers import problem

from .oracle import assert_close


@pytest.mark.parametrize("loss", ["nt_xent", "supcon", "clip", "siglip", "moco"])
def test_every_contender_computes_the_same(loss: str) -> None:
    task = problem(loss, 24, 16, columns=40)
    want = task.ours(*task.leaves)
    want_grads = torch.autograd.grad(want, task.leaves)
    assert "eager" in task.others
    for name, function in task.others.items():
        got = function(*task.leaves)
        assert_close(got, want, 1e-5, what=name)
        for leaf, g, w in zip(task.leaves, torch.autograd.grad(got, task.leaves), want_grads, strict=True):
            assert_close(along_the_sphere(leaf, g), along_the_sphere(leaf, w), 1e-4, what=name)


def along_the_sphere(rows: Tensor, grad: Tensor) -> Tensor:
    """Some libraries normalise rows themselves, so that their gradient has no part along a row of length 1."""
    rows = rows.detach()
    return grad - rows * (rows * grad).sum(1, keepdim=True) if rows.ndim == 2 else grad


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ValueError, match="got loss = 'clap'; expected one of 'nt_xent'"):
        problem("clap", 4, 4)
