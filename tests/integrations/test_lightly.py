"""What is particular to lightly: attributes and state, and a batch of one pair."""

from __future__ import annotations

import pytest
import torch

upstream = pytest.importorskip("lightly.loss", reason="lightly is not installed")

from fastcl.integrations import lightly as ours  # noqa: E402

from .formula import check_interface  # noqa: E402

NAMES = ["NTXentLoss", "DCLLoss", "DCLWLoss", "NegativeCosineSimilarity"]


@pytest.mark.parametrize("name", NAMES)
def test_same_arguments_attributes_and_state(name: str) -> None:
    check_interface(getattr(ours, name)(), getattr(upstream, name)())


def test_dcl_of_one_pair() -> None:
    views = torch.randn(1, 4), torch.randn(1, 4)
    assert upstream.DCLLoss()(*views) == ours.DCLLoss(strict=True)(*views) == -torch.inf
    assert ours.DCLLoss()(*views) == 0


def test_the_bank_moves_on_only_with_a_gradient() -> None:
    loss = ours.NTXentLoss(memory_bank_size=(8, 4))
    before = loss.memory_bank.bank.clone()
    loss(torch.randn(3, 4), torch.randn(3, 4))
    assert torch.equal(loss.memory_bank.bank, before)
    keys = torch.randn(3, 4)
    loss(torch.randn(3, 4, requires_grad=True), keys).backward()
    assert torch.allclose(loss.memory_bank.bank[:3], torch.nn.functional.normalize(keys, dim=1))
    assert torch.equal(loss.memory_bank.bank[3:], before[3:])


def test_temperatures_that_the_fast_path_does_not_take_are_the_originals() -> None:
    views = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(ours.NTXentLoss(-0.5)(*views), upstream.NTXentLoss(-0.5)(*views))
    with pytest.raises(ValueError, match="Illegal temperature"):
        ours.NTXentLoss(0.0)
