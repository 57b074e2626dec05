"""What the benchmarks compare is one problem: every contender computes the same loss."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import problem

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
        for g, w in zip(torch.autograd.grad(got, task.leaves), want_grads, strict=True):
            assert_close(g, w, 1e-4, what=name)


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ValueError, match="got the loss 'clap'; expected nt_xent"):
        problem("clap", 4, 4)
