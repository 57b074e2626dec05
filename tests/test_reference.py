"""The oracle itself, against the papers' formulas written a second way: loops over Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastcl import functional, reference

torch.manual_seed(5)
Z = torch.nn.functional.normalize(torch.randn(8, 3, dtype=torch.float64), dim=1)
K = torch.nn.functional.normalize(torch.randn(8, 3, dtype=torch.float64), dim=1)
S = (Z @ Z.T).tolist()
C = (Z @ K.T).tolist()
TAU, N = 0.3, 8
exp, log = math.exp, math.log


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def nt_xent() -> float:
    def row(i: int) -> float:
        below = sum(exp(S[i][j] / TAU) for j in range(N) if j != i)
        return -log(exp(S[i][(i + 4) % N] / TAU) / below)

    return mean([row(i) for i in range(N)])


def dcl() -> float:
    def row(i: int) -> float:
        return -S[i][(i + 4) % N] / TAU + log(sum(exp(S[i][j] / TAU) for j in range(N) if j % 4 != i % 4))

    return mean([row(i) for i in range(N)])


def info_nce() -> float:
    return mean([-log(exp(C[i][i] / TAU) / sum(exp(C[i][j] / TAU) for j in range(N))) for i in range(N)])


def clip() -> float:
    to_text = [-log(exp(5 * C[i][i]) / sum(exp(5 * C[i][j]) for j in range(N))) for i in range(N)]
    to_image = [-log(exp(5 * C[i][i]) / sum(exp(5 * C[j][i]) for j in range(N))) for i in range(N)]
    return (mean(to_text) + mean(to_image)) / 2


def siglip() -> float:
    return -sum(log(sigma((1 if i == j else -1) * (5 * C[i][j] - 2))) for i in range(N) for j in range(N)) / N


LABELS = [0, 1, 0, 2, 1, 0, 3, 3]


def supcon() -> float:
    rows = []
    for i in range(N):
        positives = [j for j in range(N) if j != i and LABELS[j] == LABELS[i]]
        below = sum(exp(S[i][j] / TAU) for j in range(N) if j != i)
        if positives:
            rows.append(-mean([log(exp(S[i][p] / TAU) / below) for p in positives]))
    return mean(rows)


# --- the rest of the family -----------------------------------------------------------------------------------------

Q, K6 = Z[:6], K[:6]
C6 = [row[:6] for row in C[:6]]
IDS = [0, 1, 0, 2, 2, 3]
G0 = torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
G1 = torch.nn.functional.normalize(G0 + 0.8 * torch.randn(6, 4, dtype=torch.float64), dim=1)
OWN = torch.nn.functional.normalize(torch.randn(6, 2, 3, dtype=torch.float64), dim=2)
LOG_Q = [-0.5, -1.0, -1.5, -0.2, -3.0, -0.7]
PROXIES = torch.nn.functional.normalize(torch.randn(4, 3, dtype=torch.float64), dim=1)
BANK = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1)
SIMILAR = [1, 0, 0, 1, 0, 1]


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def dist(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)) ** 0.5


def others(i: int, same: bool) -> list[int]:
    return [j for j in range(N) if j != i and (LABELS[i] == LABELS[j]) == same]


def nt_xent_views() -> float:
    """Four images, here two of four views each: every positive against the views of the other image."""

    def pair(i: int, p: int) -> float:
        return -log(
            exp(S[i][p] / TAU) / (exp(S[i][p] / TAU) + sum(exp(S[i][j] / TAU) for j in range(N) if j % 2 != i % 2))
        )

    return mean([pair(i, p) for i in range(N) for p in range(N) if p != i and p % 2 == i % 2])


def _label_pair(i: int, p: int) -> float:
    return -log(exp(S[i][p] / TAU) / (exp(S[i][p] / TAU) + sum(exp(S[i][n] / TAU) for n in others(i, False))))


def nt_xent_labels() -> float:
    return mean([_label_pair(i, p) for i in range(N) for p in others(i, True)])


def sincere() -> float:
    return mean([mean([_label_pair(i, p) for p in others(i, True)]) for i in range(N) if others(i, True)])


def nt_xent_bank() -> float:
    ids = [0, 1, 1, 2]

    def row(i: int) -> float:
        negatives = [exp(S[i][j] / TAU) for j in range(N) if ids[j % 4] != ids[i % 4]]
        negatives += [exp(dot(Z[i], b) / TAU) for b in BANK]
        positive = exp(S[i][(i + 4) % N] / TAU)
        return -log(positive / (positive + sum(negatives)))

    return mean([row(i) for i in range(N)])


def dclw() -> float:
    weight = [exp(S[i][(i + 4) % N] / 0.5) for i in range(N)]

    def row(i: int) -> float:
        w = 2 - weight[i] / mean(weight)
        return -w * S[i][(i + 4) % N] / TAU + log(sum(exp(S[i][j] / TAU) for j in range(N) if j % 4 != i % 4))

    return mean([row(i) for i in range(N)])


def _hard(tau_plus: float, beta: float) -> float:
    def row(i: int) -> float:
        e = [exp(S[i][j] / TAU) for j in range(N) if j % 4 != i % 4]
        weights = [x**beta / mean([y**beta for y in e]) for x in e]
        positive = exp(S[i][(i + 4) % N] / TAU)
        total = sum(w * x for w, x in zip(weights, e, strict=True))
        total = max((total - 6 * tau_plus * positive) / (1 - tau_plus), 6 * exp(-1 / TAU))
        return -log(positive / (positive + total))

    return mean([row(i) for i in range(N)])


def debiased_nt_xent() -> float:
    return _hard(0.2, 0.0)


def hard_nt_xent() -> float:
    return _hard(0.1, 0.7)


def all_pairs_nt_xent() -> float:
    total = 0.0
    for i in range(N):
        competitors = sum(exp(S[i][k] / TAU) for k in range(N) if k != i)
        for j in range(N):
            total -= log(exp(S[i][j] / TAU) / (exp(S[i][j] / TAU) + competitors))
    return total / N**2


def info_nce_own() -> float:
    """Hardness 2 in the batch and 3 for own negatives, 10 % smoothing over all eight candidates."""

    def row(i: int) -> float:
        own = [dot(Q[i], n) for n in OWN[i]]
        e = [exp(C6[i][j] / TAU + 2 * C6[i][j]) for j in range(6) if j != i] + [exp(s / TAU + 3 * s) for s in own]
        positive = C6[i][i] / TAU
        hard = -log(exp(positive) / (exp(positive) + sum(e)))
        candidates = [C6[i][j] / TAU for j in range(6)] + [s / TAU for s in own]
        return hard + 0.1 * (positive - mean(candidates))

    return mean([row(i) for i in range(6)])


def info_nce_ids() -> float:
    def row(i: int, s: list[list[float]]) -> float:
        e = [exp(s[i][j] / TAU) for j in range(6) if IDS[j] != IDS[i]]
        return -log(exp(s[i][i] / TAU) / (exp(s[i][i] / TAU) + sum(e)))

    back = [list(column) for column in zip(*C6, strict=True)]
    return mean([(row(i, C6) + row(i, back)) / 2 for i in range(6)])


def info_nce_smoothed() -> float:
    """PyTorch's own label smoothing."""
    logits = Q @ K6.T / TAU
    return float(torch.nn.functional.cross_entropy(logits, torch.arange(6), label_smoothing=0.2))


def moco_v3() -> float:
    def term(q: torch.Tensor, k: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(q @ k.T / TAU, torch.arange(4)))

    return 2 * TAU * (term(Z[:4], K[4:]) + term(Z[4:], K[:4]))


def in_batch_softmax() -> float:
    def row(i: int) -> float:
        corrected = [C6[i][j] / TAU - LOG_Q[j] for j in range(6)]
        e = [exp(corrected[j]) for j in range(6) if IDS[j] != IDS[i]]
        return -log(exp(corrected[i]) / (exp(corrected[i]) + sum(e)))

    return mean([row(i) for i in range(6)])


def gist() -> float:
    def row(i: int) -> float:
        limit = dot(G0[i], G1[i]) - 0.05
        e = [exp(C6[i][j] / TAU) for j in range(6) if j != i and dot(G0[i], G1[j]) <= limit]
        e += [exp(S[i][j] / TAU) for j in range(6) if j != i and dot(G0[i], G0[j]) <= limit]
        e += [exp(dot(K[i], K[j]) / TAU) for j in range(6) if j != i and dot(G1[i], G1[j]) <= limit]
        return -log(exp(C6[i][i] / TAU) / (exp(C6[i][i] / TAU) + sum(e)))

    return mean([row(i) for i in range(6)])


DRAWN = [[1, 1, 4], [2, 1, 0], [5, 6, 7], [0, 2, 3], [7, 7, 7], [1, 2, 3]]
RIGHT = [4, 5, 5, 6, 7, 0]


def sampled_info_nce() -> float:
    def row(i: int) -> float:
        e = [exp(C[i][j] / TAU) for j in DRAWN[i] if j != RIGHT[i]]
        return -log(exp(C[i][RIGHT[i]] / TAU) / (exp(C[i][RIGHT[i]] / TAU) + sum(e)))

    return mean([row(i) for i in range(6)])


def n_pair() -> float:
    a, b = 1.7 * Q, 0.6 * K6

    def row(i: int) -> float:
        rest = sum(exp(dot(a[i], b[j]) - dot(a[i], b[i])) for j in range(6) if j != i)
        return log(1 + rest) + 0.25 * 0.1 * (dot(a[i], a[i]) + dot(b[i], b[i]))

    return mean([row(i) for i in range(6)])


def supcon_in() -> float:
    rows = []
    for i in range(N):
        if positives := others(i, True):
            below = sum(exp(S[i][j] / TAU) for j in range(N) if j != i)
            rows.append(-log(mean([exp(S[i][p] / TAU) / below for p in positives])))
    return mean(rows)


def supcon_one() -> float:
    """Four anchors, all eight rows as columns; scaled by temperature over base temperature."""
    rows = []
    for i in range(4):
        if positives := others(i, True):
            below = sum(exp(S[i][j] / TAU) for j in range(N) if j != i)
            rows.append(-mean([log(exp(S[i][p] / TAU) / below) for p in positives]))
    return mean(rows) * TAU / 0.07


def _multi_similarity(epsilon: float | None) -> float:
    rows = []
    for i in range(N):
        p, n = [S[i][j] for j in others(i, True)], [S[i][j] for j in others(i, False)]
        if epsilon is not None:
            least, most = min(p, default=math.inf), max(n, default=-math.inf)
            p, n = [s for s in p if s - epsilon < most], [s for s in n if s + epsilon > least]
        rows.append(log(1 + sum(exp(-2 * (s - 0.5)) for s in p)) / 2 + log(1 + sum(exp(9 * (s - 0.5)) for s in n)) / 9)
    return mean(rows)


def multi_similarity() -> float:
    return _multi_similarity(None)


def multi_similarity_mined() -> float:
    return _multi_similarity(0.1)


def triplet_all() -> float:
    hinges = [
        max(0.0, dist(Z[a], Z[p]) - dist(Z[a], Z[n]) + 0.2)
        for a in range(N) for p in others(a, True) for n in others(a, False)
    ]  # fmt: skip
    return sum(hinges) / sum(h > 0 for h in hinges)


def triplet_hard() -> float:
    return mean([
        max(0.0, max(dist(Z[a], Z[p]) for p in others(a, True)) - min(dist(Z[a], Z[n]) for n in others(a, False)) + 0.2)
        for a in range(N) if others(a, True)
    ])  # fmt: skip


def triplet_semi_hard() -> float:
    def pair(a: int, p: int) -> float:
        d = dist(Z[a], Z[p])
        beyond = [dist(Z[a], Z[n]) for n in others(a, False) if dist(Z[a], Z[n]) >= d]
        return max(0.0, d - (min(beyond) if beyond else max(dist(Z[a], Z[n]) for n in others(a, False))) + 0.2)

    return mean([pair(a, p) for a in range(N) for p in others(a, True)])


def cosface() -> float:
    def row(i: int) -> float:
        cos = [dot(Z[i], c) for c in PROXIES]
        own = exp(7 * (cos[LABELS[i]] - 0.2))
        return -log(own / (own + sum(exp(7 * cos[c]) for c in range(4) if c != LABELS[i])))

    return mean([row(i) for i in range(N)])


def siamese() -> float:
    def row(i: int) -> float:
        d = dist(Q[i], K6[i])
        return d**2 / 2 if SIMILAR[i] else max(0.0, 1.2 - d) ** 2 / 2

    return mean([row(i) for i in range(6)])


def triplet() -> float:
    def row(i: int) -> float:
        to_negative = min(dist(Q[i], Z[i + 2]), dist(K6[i], Z[i + 2]))
        return log(1 + exp(dist(Q[i], K6[i]) - to_negative))

    return mean([row(i) for i in range(6)])


def negative_cosine() -> float:
    return -mean([C6[i][i] for i in range(6)])


def byol() -> float:
    return mean([dist(Q[i], K6[i]) ** 2 for i in range(6)])


def squared_cosine() -> float:
    return mean([(1 - y) * C6[i][i] ** 2 + y * C6[i][i] ** 2 / TAU for i, y in enumerate(SIMILAR)])


LABEL = torch.tensor(LABELS)


def clip_two_scales() -> float:
    def row(i: int, s: list[list[float]], scale: float) -> float:
        return -log(exp(scale * s[i][i]) / sum(exp(scale * s[i][j]) for j in range(6)))

    back = [list(column) for column in zip(*C6, strict=True)]
    return mean([(row(i, C6, 5.0) + row(i, back, 3.0)) / 2 for i in range(6)])


def siglip_ids() -> float:
    def term(i: int, j: int) -> float:
        if i != j and IDS[i] == IDS[j]:
            return 0.0
        return log(sigma((1 if i == j else -1) * (5 * C6[i][j] - 2)))

    return -sum(term(i, j) for i in range(6) for j in range(6)) / 6


@pytest.mark.parametrize(
    ("formula", "args", "kwargs"),
    [
        (nt_xent, (Z,), {"temperature": TAU}),
        (dcl, (Z,), {"temperature": TAU}),
        (info_nce, (Z, K), {"temperature": TAU}),
        (clip, (Z, K), {"scale": 5.0}),
        (siglip, (Z, K), {"scale": 5.0, "bias": -2.0}),
        (supcon, (Z, LABEL), {"temperature": TAU}),
        (nt_xent_views, (Z,), {"temperature": TAU, "views": 4}),
        (nt_xent_labels, (Z, LABEL), {"temperature": TAU}),
        (nt_xent_bank, (Z,), {"temperature": TAU, "extra_negatives": BANK, "ids": torch.tensor([0, 1, 1, 2])}),
        (dclw, (Z,), {"temperature": TAU}),
        (debiased_nt_xent, (Z,), {"temperature": TAU, "tau_plus": 0.2}),
        (hard_nt_xent, (Z,), {"temperature": TAU, "beta": 0.7}),
        (all_pairs_nt_xent, (Z,), {"temperature": TAU}),
        (info_nce_own, (Q, K6), {
            "temperature": TAU, "own_negatives": OWN, "hardness": 2.0, "own_hardness": 3.0, "label_smoothing": 0.1,
        }),
        (info_nce_ids, (Q, K6), {"temperature": TAU, "symmetric": True, "ids": torch.tensor(IDS)}),
        (info_nce_smoothed, (Q, K6), {"temperature": TAU, "label_smoothing": 0.2}),
        (moco_v3, (Z[:4], Z[4:], K[:4], K[4:]), {"temperature": TAU}),
        (in_batch_softmax, (Q, K6), {"temperature": TAU, "log_q": Z.new_tensor(LOG_Q), "ids": torch.tensor(IDS)}),
        (gist, (Q, K6, G0, G1), {"temperature": TAU, "margin": 0.05}),
        (sampled_info_nce, (Q, K, torch.tensor(RIGHT), torch.tensor(DRAWN)), {"temperature": TAU}),
        (n_pair, (1.7 * Q, 0.6 * K6), {"l2": 0.1}),
        (clip_two_scales, (Q, K6), {"scale": 5.0, "text_scale": 3.0}),
        (siglip_ids, (Q, K6), {"scale": 5.0, "bias": -2.0, "ids": torch.tensor(IDS)}),
        (supcon_in, (Z, LABEL), {"temperature": TAU, "form": "in"}),
        (supcon_one, (Z, LABEL), {"temperature": TAU, "anchors": 4, "base_temperature": 0.07}),
        (sincere, (Z, LABEL), {"temperature": TAU}),
        (multi_similarity, (Z, LABEL), {"beta": 9.0}),
        (multi_similarity_mined, (Z, LABEL), {"beta": 9.0, "epsilon": 0.1}),
        (triplet_all, (Z, LABEL), {"margin": 0.2}),
        (triplet_hard, (Z, LABEL), {"margin": 0.2}),
        (triplet_semi_hard, (Z, LABEL), {"margin": 0.2}),
        (cosface, (Z, PROXIES, LABEL), {"scale": 7.0, "margin": 0.2}),
        (siamese, (Q, K6, torch.tensor(SIMILAR)), {"margin": 1.2}),
        (triplet, (Q, K6, Z[2:]), {"margin": None, "swap": True}),
        (negative_cosine, (Q, K6), {}),
        (byol, (Q, K6), {}),
        (squared_cosine, (Q, K6, torch.tensor(SIMILAR)), {"temperature": TAU}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_the_papers_formula(
    formula: Callable[[], float], args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]
) -> None:
    name = max((n for n in reference.__all__ if formula.__name__.startswith(n)), key=len)
    got = getattr(reference, name)(*args, **kwargs)
    assert float(got) == pytest.approx(formula(), rel=1e-12)
    fused = getattr(functional, name)(*args, **kwargs)
    assert float(fused) == pytest.approx(formula(), rel=1e-10)


def test_every_loss_has_a_formula_here() -> None:
    tested = {n for n in reference.__all__ for f in globals() if f.startswith(n)}
    assert tested == set(reference.__all__) == set(functional.__all__)


# --- what trains nothing --------------------------------------------------------------------------------------------


def descended(loss: Callable[[torch.Tensor], torch.Tensor], steps: int = 400) -> torch.Tensor:
    """Free unit rows after gradient descent on a loss."""
    x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.nn.functional.normalize(x, dim=1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.nn.functional.normalize(x, dim=1).detach()


def test_all_pairs_nt_xent_does_not_know_the_pairs_and_all_but_collapses() -> None:
    in_order, shuffled = (functional.all_pairs_nt_xent(z, temperature=TAU) for z in (Z, Z[torch.randperm(N)]))
    assert float(in_order) == pytest.approx(float(shuffled), rel=1e-12)
    near = descended(lambda z: functional.all_pairs_nt_xent(z, temperature=0.1))
    assert (near @ near.T).min() > 0.9
    of_equal_rows = functional.all_pairs_nt_xent(torch.ones_like(near) / 2, temperature=0.1)
    assert functional.all_pairs_nt_xent(near, temperature=0.1) > 0.997 * of_equal_rows
    spread = descended(lambda z: functional.nt_xent(z, temperature=0.5))
    assert (spread @ spread.T).min() < 0
    assert (spread[:8] * spread[8:]).sum(1).min() > 0.9


def test_squared_cosine_pushes_similar_pairs_apart() -> None:
    similar = torch.tensor([1] * 4 + [0] * 4)

    def pairs(loss: Callable[..., torch.Tensor], **kwargs: Any) -> torch.Tensor:
        z = descended(lambda z: loss(z[:8], z[8:], similar, **kwargs))
        return (z[:8] * z[8:]).sum(1)

    cosines = pairs(functional.squared_cosine, temperature=0.5)
    assert cosines.abs().max() < 0.01, "similar or not, all end at a right angle"
    cosines = pairs(functional.siamese, margin=1.0)
    assert cosines[:4].min() > 0.99
    assert cosines[4:].max() < 0.6


def test_a_queue_is_cross_entropy_with_the_positive_in_column_zero() -> None:
    logits = torch.cat([(Z[:4] * K[:4]).sum(1, keepdim=True), Z[:4] @ K[4:].T], 1) / TAU
    want = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(reference.info_nce(Z[:4], K[:4], K[4:], temperature=TAU), want, rtol=1e-12)


def test_second_derivatives() -> None:
    z = Z.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: reference.nt_xent(z, temperature=TAU), z)
