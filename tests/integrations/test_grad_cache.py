"""GradCache's losses against their formula; test_parity compares them with GradCache where that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastcl.integrations.grad_cache import (
    ContrastiveLossWithQueryClosure,
    DistributedContrastiveLoss,
    SimpleContrastiveLoss,
)
from tests.oracle import error

from .formula import check, loss_and_grads, rows, units

B, D = 9, 7
REDUCTIONS = ("mean", "sum", "none")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("hard", [0, 1, 4])
def test_a_positive_is_followed_by_its_hard_negatives(hard: int, reduction: str) -> None:
    loss = SimpleContrastiveLoss(n_hard_negatives=hard)
    assert loss.target_per_qry == hard + 1
    check(
        lambda x, y: loss(x, y, reduction=reduction),
        lambda x, y: cross_entropy(x @ y.T, torch.arange(B) * (hard + 1), reduction=reduction),
        rows(B, D),
        rows(B * (hard + 1), D, seed=1),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keys", [4, B, 20])
def test_a_target_may_repeat_and_be_ignored(keys: int, reduction: str) -> None:
    target = torch.tensor([0, 3, 3, -100, 2, 1, -100, 0, 3])
    leaves = rows(B, D), rows(keys, D, seed=1)

    def formula(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(x @ y.T, target, reduction=reduction)

    check(lambda x, y: SimpleContrastiveLoss()(x, y, target, reduction), formula, *leaves)
    check(lambda x, y: SimpleContrastiveLoss(3)(x, y, target.int(), reduction=reduction), formula, *leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_probabilities_as_a_target(reduction: str) -> None:
    target = rows(B, 20, seed=2).softmax(1)
    check(
        lambda x, y: SimpleContrastiveLoss()(x, y, target.to(x.dtype), reduction),
        lambda x, y: -(target * (x @ y.T).log_softmax(1)).sum(1) if reduction == "none"
        else -(target * (x @ y.T).log_softmax(1)).sum() / (B if reduction == "mean" else 1),
        rows(B, D),
        rows(20, D, seed=1),
    )  # fmt: skip


def test_the_mean_over_no_rows_is_nan_as_in_torch() -> None:
    loss, grads = loss_and_grads(
        lambda x, y: SimpleContrastiveLoss()(x, y, torch.full((B,), -100), "sum"), [rows(B, D), rows(B, D)]
    )
    assert loss == 0 and not any(grad.any() for grad in grads)
    assert SimpleContrastiveLoss()(rows(B, D), rows(B, D), torch.full((B,), -100)).isnan()
    assert SimpleContrastiveLoss()(rows(0, D), rows(0, D)).isnan()
    assert cross_entropy(rows(0, 0), torch.arange(0)).isnan()


def test_easy_pairs_keep_their_digits() -> None:
    """Where the positive is far above all others, a loss that is a difference of two large numbers is 0."""
    x = torch.eye(B).double() * 5
    want = cross_entropy(x @ x.T, torch.arange(B))
    plain = x.float()
    assert cross_entropy(plain @ plain.T, torch.arange(B)) == 0 < want < 1e-9
    assert error(SimpleContrastiveLoss()(plain, plain), want) < 1e-5


def test_a_closure_gives_the_queries() -> None:
    x, y, target = rows(B, D), rows(2 * B, D, seed=1), torch.arange(B).flip(0)
    loss = ContrastiveLossWithQueryClosure(n_hard_negatives=1)
    check(
        lambda x, y: loss(y, query_closure=lambda: 2 * x),
        lambda x, y: cross_entropy(2 * x @ y.T, torch.arange(B) * 2),
        x,
        y,
    )
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"target": target, "reduction": reduction}
        want = cross_entropy(x @ y.T, **options)
        assert error(loss(x, y, **options), want) < 1e-12
        assert error(loss(y, query_closure=lambda: x, **options), want) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_has_the_dtype_of_its_rows_and_fp32_under_autocast(reduction: str) -> None:
    x, y = units(B, D), units(2 * B, D, seed=1)

    def rounded(dtype: torch.dtype) -> Tensor:
        """The loss in fp64 of rows of a dtype."""
        return SimpleContrastiveLoss(1)(x.to(dtype).double(), y.to(dtype).double(), reduction=reduction)

    targets = (None, torch.arange(B) * 2, torch.eye(2 * B)[::2].double())
    for target in targets:
        soft = target is not None and target.is_floating_point()
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            given = target.to(dtype) if soft else target
            loss = SimpleContrastiveLoss(1)(x.to(dtype), y.to(dtype), given, reduction)
            assert loss.dtype == dtype
            assert error(loss, rounded(dtype)) < torch.finfo(dtype).eps / 2 + 1e-6  # the rounding of the loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = SimpleContrastiveLoss(1)(x.float(), y.float(), target.float() if soft else target, reduction)
        assert loss.dtype == torch.float32
        # soft targets are left to torch, which rounds logits of at most 1 to bf16
        assert error(loss, rounded(torch.bfloat16)) < (2.0**-9 if soft else 1e-6)


X, Y = rows(B, D), rows(2 * B, D, seed=1)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: SimpleContrastiveLoss()(X, Y), ValueError),
        (lambda: SimpleContrastiveLoss(2)(X, Y), ValueError),
        (lambda: SimpleContrastiveLoss(1)(X, Y, reduction="average"), ValueError),
        (lambda: SimpleContrastiveLoss(1)(X, Y[:, 1:]), ValueError),
        (lambda: SimpleContrastiveLoss()(X, Y, torch.arange(B + 1)), ValueError),
        (lambda: SimpleContrastiveLoss(1)(X.long(), Y), TypeError),
        (lambda: ContrastiveLossWithQueryClosure()(X, X, query_closure=lambda: X), ValueError),
        (lambda: ContrastiveLossWithQueryClosure()(X), ValueError),
        (lambda: ContrastiveLossWithQueryClosure()(), ValueError),
        (lambda: ContrastiveLossWithQueryClosure()(X, X, X), ValueError),
        (lambda: DistributedContrastiveLoss(), RuntimeError),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^got .*; expected .*\. .*"):
        call()
