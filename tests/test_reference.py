"""The oracle itself, against the papers' formulas written a second way: loops over Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fastcl import reference

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


@pytest.mark.parametrize(
    ("formula", "args", "kwargs"),
    [
        (nt_xent, (Z,), {"temperature": TAU}),
        (dcl, (Z,), {"temperature": TAU}),
        (info_nce, (Z, K), {"temperature": TAU}),
        (clip, (Z, K), {"scale": 5.0}),
        (siglip, (Z, K), {"scale": 5.0, "bias": -2.0}),
        (supcon, (Z, torch.tensor(LABELS)), {"temperature": TAU}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_papers_formula(formula: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, float]) -> None:
    name = formula.__name__  # type: ignore[attr-defined]
    assert float(getattr(reference, name)(*args, **kwargs)) == pytest.approx(formula(), rel=1e-12)  # type: ignore[operator]


def test_a_queue_is_cross_entropy_with_the_positive_in_column_zero() -> None:
    logits = torch.cat([(Z[:4] * K[:4]).sum(1, keepdim=True), Z[:4] @ K[4:].T], 1) / TAU
    want = torch.nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    assert torch.allclose(reference.info_nce(Z[:4], K[:4], K[4:], temperature=TAU), want, rtol=1e-12)


def test_second_derivatives() -> None:
    z = Z.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: reference.nt_xent(z, temperature=TAU), z)
