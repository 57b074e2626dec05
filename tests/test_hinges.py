"""Hinge losses of all pairs against their formula, the matrix and all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl import hinges
from fastcl._measure import peak_bytes

from .conftest import DEVICE
from .oracle import assert_close


def problem(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 5, generator=generator).to(DEVICE, dtype).requires_grad_()
    return z, torch.randint(4, (n,), generator=generator).to(DEVICE)


def dense(
    q: Tensor, k: Tensor, labels: Tensor, columns: Tensor, margins: tuple[float, float], distance: str, skip: bool
) -> list[Tensor]:
    if distance == "cosine":
        d = 1 - q @ k.T
    else:
        d = (q[:, None] - k).square().sum(2)
        if distance == "euclidean":
            d = torch.where(d > 0, torch.where(d > 0, d, 1).sqrt(), 0)
    counts = ~torch.eye(*d.shape, dtype=torch.bool, device=d.device) if skip else torch.ones_like(d, dtype=torch.bool)
    same = labels[:, None] == columns
    costs = [(d - margins[0]).relu()[same & counts], (margins[1] - d).relu()[~same & counts]]
    return [
        torch.stack([c.sum() for c in costs]),
        torch.stack([(c > 0).sum() for c in costs]),
        torch.tensor([c.numel() for c in costs], device=d.device),
    ]


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("tile", [2**20, 60])
@pytest.mark.parametrize("kind", ["rows", "columns", "columns without the diagonal"])
def test_against_the_matrix(distance: str, tile: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hinges, "_TILE", tile)
    (q, labels), (k, columns) = problem(23), problem(29, seed=1)
    own, skip = kind == "rows", kind != "columns"
    margins = (1.5, 2.5) if distance != "cosine" else (0.4, 1.7)
    leaves = [q] if own else [q, k]
    got = hinges.pair_hinges(
        q, None if own else k, labels, None if own else columns, positive_margin=margins[0],
        negative_margin=margins[1], distance=distance, skip_diagonal=skip,
    )  # fmt: skip
    want = dense(q, q if own else k, labels, labels if own else columns, margins, distance, skip)
    assert_close(got.sums, want[0], 1e-13)
    assert got.above.tolist() == want[1].tolist() and got.pairs.tolist() == want[2].tolist()
    upstream = torch.tensor([0.3, -1.7], dtype=torch.float64, device=DEVICE)
    for mine, exact in zip(
        torch.autograd.grad(got.sums, leaves, upstream), torch.autograd.grad(want[0], leaves, upstream), strict=True
    ):
        assert_close(mine, exact, 1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("margin", [0.05, 3.0])
def test_near_rows_keep_their_digits_in_fp32(spread: float, margin: float) -> None:
    """Rows around a few points, whose distances are differences of nearly equal squares; few and many pairs cost."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(40, device=DEVICE) % 5
    centres = torch.randn(5, 8, generator=generator).to(DEVICE)
    z = (centres[labels] + spread * 1e-2 * torch.randn(40, 8, generator=generator).to(DEVICE)).requires_grad_()
    exact = z.detach().double().requires_grad_()
    margins = {"positive_margin": spread * 1e-2, "negative_margin": margin}
    got = hinges.pair_hinges(z, None, labels, **margins)
    want = dense(exact, exact, labels, labels, (spread * 1e-2, margin), "euclidean", True)
    assert got.above.tolist() == want[1].tolist() and got.above[0] > 0
    assert_close(got.sums, want[0], 1e-5)
    (mine,), (true,) = torch.autograd.grad(got.sums.sum(), z), torch.autograd.grad(want[0].sum(), exact)
    assert_close(mine, true, 1e-5)


def test_equal_rows_have_gradient_zero() -> None:
    z = torch.ones(4, 3, device=DEVICE, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1], device=DEVICE)
    found = hinges.pair_hinges(z, None, labels, positive_margin=0.0, negative_margin=1.0)
    found.sums.sum().backward()
    assert found.sums.tolist() == [0, 8] and z.grad is not None and not z.grad.any()


def test_nothing_of_the_size_of_the_matrix_is_stored() -> None:
    def step(n: int) -> int:
        z, labels = problem(n, torch.float32)
        return peak_bytes(
            lambda: hinges.pair_hinges(z, None, labels, positive_margin=0.1, negative_margin=2.0).sums.sum().backward(),
            DEVICE,
        )

    tiles = 12 * hinges._TILE * 8  # a handful, in fp64
    assert step(2048) < tiles and step(4096) < tiles < 4096 * 4096 * 8


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_bits_do_not_depend_on_strides(distance: str) -> None:
    (q, labels), (k, columns) = problem(23, torch.float32), problem(29, torch.float32, seed=1)
    found = []
    for by_columns in (False, True):
        rows = [(t.detach().T.contiguous().T if by_columns else t.detach()).requires_grad_() for t in (q, k)]
        sums = hinges.pair_hinges(
            *rows, labels, columns, positive_margin=0.4, negative_margin=1.7, distance=distance
        ).sums
        found.append([sums.detach(), *torch.autograd.grad(sums.sum(), rows)])
    assert all(map(torch.equal, *found))
