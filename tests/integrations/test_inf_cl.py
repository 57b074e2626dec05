"""Inf-CL's losses against their formula; test_parity compares them with Inf-CL on a GPU, where that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastcl.integrations.inf_cl import cal_flash_loss, cal_inf_loss, cal_ring_loss
from tests.oracle import TOLERANCE, error

from .formula import check, loss_and_grads, rows, units

M, D = 9, 7
SCALE = torch.tensor(14.3, dtype=torch.float64)


def formula(q: Tensor, k: Tensor, labels: Tensor | None = None, scale: Any = 1.0, reduction: str = "none") -> Tensor:
    labels = torch.arange(len(q)) if labels is None else labels.long()
    return cross_entropy(scale * q @ k.T, labels, reduction=reduction)


def fp32_check(ours: Any, want: Any, *leaves: Tensor) -> None:
    check(ours, want, *leaves, loss_dtype=torch.float32)


@pytest.mark.parametrize("keys", [M, 20])
def test_a_row_is_its_own_label_by_default(keys: int) -> None:
    q, k = rows(M, D), rows(keys, D, seed=1)
    fp32_check(cal_flash_loss, formula, q, k)
    fp32_check(
        lambda q, k, scale: cal_flash_loss(q, k, scale=scale), lambda q, k, scale: formula(q, k, None, scale),
        units(M, D), units(keys, D, seed=1), SCALE,
    )  # fmt: skip


@pytest.mark.parametrize("keys", [4, M, 20])
def test_labels_may_repeat(keys: int) -> None:
    labels = torch.tensor([0, 3, 3, 1, 2, 1, 3, 0, 3])
    for given in (labels, labels.int(), labels.short()):
        fp32_check(
            lambda q, k, scale, given=given: cal_flash_loss(q, k, given, scale),
            lambda q, k, scale: formula(q, k, labels, scale),
            units(M, D),
            units(keys, D, seed=1),
            SCALE,
        )


def test_a_scale_is_a_number_one_element_or_one_per_row() -> None:
    q, k = units(M, D), units(M, D, seed=1)
    want = formula(q, k, None, 14.3)
    for scale in (14.3, SCALE, SCALE.view(1), SCALE.view(1, 1), SCALE.float(), SCALE.expand(M, 1)):
        assert error(cal_flash_loss(q, k, scale=scale), want) < 1e-5
    fp32_check(
        lambda q, k, scale: cal_flash_loss(q, k, scale=scale), lambda q, k, scale: formula(q, k, None, scale),
        q, k, torch.linspace(0.5, 20, M, dtype=torch.float64)[:, None],
    )  # fmt: skip
    fp32_check(
        lambda q, k, scale: cal_flash_loss(q, k, scale=scale), lambda q, k, scale: formula(q, k, None, scale),
        q, k, SCALE.view(1),
    )  # fmt: skip


@pytest.mark.parametrize("function", [cal_inf_loss, cal_ring_loss])
def test_inf_and_ring_are_the_mean(function: Any) -> None:
    labels = torch.arange(M).flip(0)
    for given in (None, labels):
        for strict in (False, True):
            fp32_check(
                lambda q, k, scale, given=given, strict=strict: function(q, k, given, scale, strict=strict),
                lambda q, k, scale, given=given: formula(q, k, given, scale, "mean"),
                units(M, D),
                units(M, D, seed=1),
                SCALE,
            )


def test_the_logits_may_be_large() -> None:
    """The original's ring loss takes exponentials as they are: CLIP's largest scale, 100, is too large for fp32."""
    q, k, scale = units(M, D).float(), units(M, D, seed=1).float(), SCALE.float().fill_(100)
    k = torch.where(torch.arange(M)[:, None] < 4, q, k)
    assert not (scale * q @ k.T).exp().sum(1).log().isfinite().all()
    want, wanted = loss_and_grads(
        lambda q, k, scale: formula(q, k, None, scale, "mean"), [q.double(), k.double(), scale.double()]
    )
    loss, grads = loss_and_grads(lambda q, k, scale: cal_ring_loss(q, k, scale=scale), [q, k, scale])
    assert error(loss, want) < 1e-5
    assert all(error(grad, exact) < 1e-5 for grad, exact in zip(grads, wanted, strict=True))


def test_head_dim_changes_nothing() -> None:
    q, k = rows(M, D), rows(M, D, seed=1)
    for head_dim in (16, 3, 0):
        assert torch.equal(cal_flash_loss(q, k, head_dim=head_dim), cal_flash_loss(q, k))
        assert torch.equal(cal_inf_loss(q, k, head_dim=head_dim), cal_inf_loss(q, k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_rows_are_fp32(dtype: torch.dtype) -> None:
    q, k = units(M, D).to(dtype), units(M, D, seed=1).to(dtype)
    want, wanted = loss_and_grads(formula, [q.double(), k.double()])
    loss, grads = loss_and_grads(cal_flash_loss, [q, k])
    assert loss.dtype == torch.float32 and error(loss, want) < 1e-6
    for grad, exact in zip(grads, wanted, strict=True):
        assert grad.dtype == dtype and error(grad, exact) < TOLERANCE[dtype][1]
    with torch.autocast("cpu", dtype):
        assert cal_inf_loss(q.float(), k.float()).dtype == torch.float32


Q = rows(M, D)


@pytest.mark.parametrize("function", [cal_flash_loss, cal_inf_loss, cal_ring_loss])
@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"q": Q, "k": Q[1:]}, ValueError),
        ({"q": Q, "k": Q[:, 1:]}, ValueError),
        ({"q": Q, "k": Q, "labels": torch.arange(M + 1)}, ValueError),
        ({"q": Q, "k": Q, "labels": torch.arange(M).float()}, TypeError),
        ({"q": Q, "k": Q, "scale": "large"}, TypeError),
        ({"q": Q, "k": Q, "scale": float("nan")}, ValueError),
        ({"q": Q.long(), "k": Q}, TypeError),
    ],
)
def test_bad_input_is_refused_in_one_sentence(function: Any, arguments: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^got .*; expected .*\. .*"):
        function(**arguments)
