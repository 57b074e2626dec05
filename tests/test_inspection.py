"""Tiles, averages and statistics of the matrix that is not stored, against the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import inspection
from fastcl.pairwise import pair_logsumexp, row_dot

from .conftest import DEVICE
from .oracle import assert_close

M, N, D = 13, 17, 5


def given(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((M, D), (N, D), (N, 3)))
    return q.to(DEVICE).requires_grad_(), k.to(DEVICE).requires_grad_(), v.to(DEVICE).requires_grad_()


def masked(q: Tensor, k: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Options of a call, and the logits they mean."""
    rows, cols = torch.arange(M, device=DEVICE) % 4, torch.arange(N, device=DEVICE) % 5
    bias = torch.linspace(-1, 1, N, dtype=torch.float64, device=DEVICE)
    options = {"scale": 1.5, "col_bias": bias, "drop": (rows, cols)}
    return options, (1.5 * q @ k.T + bias).masked_fill(rows[:, None] == cols, -torch.inf)


def test_a_tile_is_a_part_of_the_matrix() -> None:
    q, k, _ = given()
    options, s = masked(q, k)
    tile = fastcl.similarity_tile(q, k, slice(2, 9), slice(5, 11), **options)
    assert_close(tile.logits, s[2:9, 5:11], 1e-13)
    assert_close(tile.weights, s.softmax(1)[2:9, 5:11], 1e-12)
    whole = fastcl.similarity_tile(q, scale=2.0)
    assert_close(whole.weights.sum(1), torch.ones(M), 1e-12)


def test_a_row_that_keeps_nothing_has_no_weights() -> None:
    q, _, _ = given()
    tile = fastcl.similarity_tile(q, scale=1.0, drop=torch.zeros(M, dtype=torch.long, device=DEVICE))
    assert (tile.logits == -torch.inf).all()
    assert not tile.weights.any()


@pytest.mark.parametrize("block", [2**22, 40])
def test_softmax_matmul(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    q, k, v = given()
    options, s = masked(q, k)
    got, want = fastcl.pair_softmax_matmul(q, k, v, **options), s.softmax(1) @ v
    assert_close(got, want, 1e-13)
    upstream = torch.randn_like(want)
    for g, w in zip(
        torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream), strict=True
    ):
        assert_close(g, w, 1e-12)


def test_softmax_matmul_twice_differentiable() -> None:
    q, k, v = (t[:4].detach().requires_grad_() for t in given())
    scale = torch.tensor(1.5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    keys = torch.arange(4, device=DEVICE)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, scale: fastcl.pair_softmax_matmul(q, k, v, scale=scale, drop=keys), (q, k, v, scale)
    )


def test_softmax_matmul_of_a_row_that_keeps_nothing() -> None:
    q, _, _ = given()
    keys = torch.zeros(M, dtype=torch.long, device=DEVICE)
    got = fastcl.pair_softmax_matmul(q, None, q, scale=1.0, drop=keys)
    assert not got.any()
    assert not torch.autograd.grad(got.sum(), q)[0].any()
    assert fastcl.pair_softmax_matmul(q[:0], None, q[:0], scale=1.0).shape == (0, D)
    with pytest.raises(ValueError, match=r"^got v of shape .+; expected .+\. .+\.$"):
        fastcl.pair_softmax_matmul(q, None, q[:3], scale=1.0)


def test_statistics(backend: str) -> None:
    q, k = (t.detach()[:M].float() for t in given()[:2])
    k = k + 0.5 * q  # so that some find their partner
    keys = torch.arange(M, device=DEVICE)
    positive = 2.0 * row_dot(q, k)
    got = fastcl.pair_statistics(positive, q, k, scale=2.0, drop=keys)
    s = 2.0 * q.double() @ k.double().T
    n = s.masked_fill(torch.eye(M, dtype=torch.bool, device=DEVICE), -torch.inf)
    assert_close(got.probability, s.softmax(1).diagonal(), 1e-5)
    assert torch.equal(got.hit, s.argmax(1) == keys)
    assert 0 < got.hit.sum() < M
    assert_close(got.effective_negatives, 1 / n.softmax(1).square().sum(1), 1e-5)
    assert (got.effective_negatives <= M - 1).all()


def test_statistics_without_negatives() -> None:
    q, _, _ = given()
    alone = fastcl.pair_statistics(row_dot(q, q), q, scale=1.0, drop=torch.zeros(M, dtype=torch.long, device=DEVICE))
    assert (alone.probability == 1).all()
    assert alone.hit.all()
    assert not alone.effective_negatives.any()
    uniform = fastcl.pair_statistics(torch.zeros(M), torch.zeros(M, D), scale=1.0, drop=torch.arange(M))
    assert_close(uniform.effective_negatives, torch.full((M,), M - 1.0), 1e-6)
    assert pair_logsumexp(torch.zeros(M, D), scale=1.0).shape == (M,)
