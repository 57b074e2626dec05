"""Sums over triples against loops, and the runs of classes that they stand on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcl import functional, reference, triples
from fastcl._measure import peak_bytes

from .conftest import DEVICE
from .oracle import assert_close


def labels_of(n: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows_of(n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_class_runs_and_positive_indices(classes: int) -> None:
    labels = labels_of(23, classes) * 7 - 3
    order, start, end = triples.class_runs(labels)
    for i in range(23):
        assert order[start[i] : end[i]].tolist() == (labels == labels[i]).nonzero().flatten().tolist()
    anchor, positive = triples.positive_indices(labels)
    pairs = [(i, j) for i in range(23) for j in range(23) if i != j and labels[i] == labels[j]]
    assert list(zip(anchor.tolist(), positive.tolist(), strict=True)) == pairs


@pytest.mark.parametrize("classes", [1, 4, 60])
def test_class_sums(classes: int) -> None:
    z, labels = rows_of(37, 5), labels_of(37, classes)
    got = triples.class_sums(z, labels)
    others = (labels[:, None] == labels) & ~torch.eye(37, dtype=torch.bool, device=DEVICE)
    want = others.double() @ z
    assert_close(got, want, 1e-14, floor=1e-13)
    upstream = torch.randn_like(got)
    assert_close(
        torch.autograd.grad(got, z, upstream)[0], torch.autograd.grad(want, z, upstream)[0], 1e-14, floor=1e-13
    )


@pytest.mark.parametrize("n", [0, 1, 2, 37])
def test_run_sums_as_a_gpu_adds_them(n: int) -> None:
    rows, start = torch.randn(n, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    for i in range(1, n):
        start[i] = i if i % 5 == 0 else start[i - 1]
    want = torch.stack([rows[start[i] : i + 1].sum(0) for i in range(n)]) if n else rows
    assert_close(triples.run_sums(rows, start), want, 1e-14)


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("classes", [1, 2, 5, 30])
@pytest.mark.parametrize("tile", [2**20, 100])
def test_batch_all_against_loops(distance: str, classes: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triples, "_TILE", tile)
    z, labels = rows_of(17, 4), labels_of(17, classes, seed=3)

    def d(a: int, b: int) -> Tensor:
        if distance == "cosine":
            return 1 - z[a] @ z[b]
        squared = (z[a] - z[b]).square().sum()
        return squared if distance == "squared" else squared.sqrt()

    want = [z.sum() * 0 for _ in range(17)]
    active = 0
    for a in range(17):
        for p in range(17):
            for n in range(17):
                if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
                    value = (d(a, p) - d(a, n) + 0.3).relu()
                    want[a] = want[a] + value
                    active += int(value > 0)
    sums, found = triples.batch_all(z, labels, 0.3, distance)
    assert int(found) == active
    assert_close(sums, torch.stack(want), 1e-12)
    upstream = torch.linspace(0.5, 2, 17, dtype=torch.float64, device=DEVICE)
    got_grad, want_grad = (torch.autograd.grad(s, z, upstream)[0] for s in (sums, torch.stack(want)))
    assert_close(got_grad, want_grad, 1e-11)


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
@pytest.mark.parametrize("margin", [0.3, None])
@pytest.mark.parametrize("classes", [1, 2, 5, 30])
@pytest.mark.parametrize("tile", [2**20, 100])
def test_semi_hard_against_loops(
    distance: str, margin: float | None, classes: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triples, "_TILE", tile)
    z, labels = rows_of(17, 4), labels_of(17, classes, seed=3)
    d = reference._dense.distances(z, z, distance)
    want = [z.sum() * 0 for _ in range(17)]
    pairs = 0
    for a in range(17):
        negatives = [d[a, n] for n in range(17) if labels[n] != labels[a]]
        for p in range(17):
            if p == a or labels[p] != labels[a] or not negatives:
                continue
            beyond = [n for n in negatives if n >= d[a, p]]
            difference = d[a, p] - (min(beyond) if beyond else max(negatives))
            hinge = torch.log1p(difference.exp()) if margin is None else (difference + margin).relu()
            want[a] = want[a] + hinge
            pairs += 1
    upstream = torch.linspace(0.5, 2, 17, dtype=torch.float64, device=DEVICE)
    (want_grad,) = torch.autograd.grad(torch.stack(want), z, upstream)
    for semi_hard in (triples.semi_hard, functional.labels._semi_hard_of_pairs):  # the few and the many
        sums, found = semi_hard(z, labels, margin, distance)
        assert int(found) == pairs
        assert_close(sums, torch.stack(want), 1e-12)
        assert_close(torch.autograd.grad(sums, z, upstream)[0], want_grad, 1e-11)


@pytest.mark.parametrize("few", [0, 100])
def test_semi_hard_either_way(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional.labels, "_FEW_PAIRS", few)
    z, labels = rows_of(40, 6, torch.float32), labels_of(40, 4)
    exact_z = z.detach().double().requires_grad_()
    got, want = (f.triplet_semi_hard(x, labels, margin=0.2) for f, x in ((functional, z), (reference, exact_z)))
    assert_close(got, want, 1e-6)
    assert_close(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, exact_z)[0], 1e-5)
    with torch.no_grad():
        z[3] = torch.nan
    assert functional.triplet_semi_hard(z, labels, margin=0.2).isnan()


def test_distances_of_near_rows_keep_their_digits() -> None:
    """Positives 1e-3 apart: a distance from fp32 products would be wrong in its third digit."""
    z = rows_of(24, 16, torch.float32).detach()
    z = torch.nn.functional.normalize(torch.cat([z, z + 1e-3 * z.roll(1, 1)]), dim=1).requires_grad_()
    labels = torch.arange(24, device=DEVICE).repeat(2)
    got = functional.triplet_all(z, labels, margin=1.5)
    exact_z = z.detach().double().requires_grad_()
    want = reference.triplet_all(exact_z, labels, margin=1.5)
    assert_close(got, want, 1e-6)
    assert_close(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, exact_z)[0], 1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts CPU allocations")
@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("function", [functional.triplet_all, functional.triplet_semi_hard])
def test_no_cube_no_pairs_and_no_matrix_are_allocated(classes: int, function: Callable[..., Tensor]) -> None:
    """4,096 rows, forward and backward, in less than one matrix of fp64 numbers: blocks, of which several live."""
    z = torch.randn(4096, 4, requires_grad=True)
    labels = labels_of(4096, classes)
    peak = peak_bytes(lambda: torch.autograd.grad(function(z, labels, margin=0.2), z))
    assert peak < 8 * 4096**2, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("mining", [functional.triplet_hard, functional.triplet_semi_hard, functional.triplet_all])
def test_an_unknown_distance_is_refused(mining: object) -> None:
    with pytest.raises(ValueError, match=r"^got distance = 'manhattan'; expected .+\. .+\.$"):
        mining(torch.randn(4, 3), torch.arange(4), margin=0.2, distance="manhattan")  # type: ignore[operator]
