"""The modules: normalisation, shapes, learned temperatures, state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import functional
from fastcl.pairwise import l2_normalize

from .oracle import assert_close

MODULES = {
    "nt_xent": (fastcl.NTXentLoss, 0.5),
    "dcl": (fastcl.DCLLoss, 0.1),
    "info_nce": (fastcl.InfoNCELoss, 0.07),
    "supcon": (fastcl.SupConLoss, 0.1),
}


@pytest.fixture
def views() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 5), 3 * torch.randn(6, 5)


@pytest.mark.parametrize("name", ["nt_xent", "dcl"])
def test_two_views_are_one_stack(name: str, views: tuple[Tensor, Tensor]) -> None:
    kind, temperature = MODULES[name]
    stack = torch.cat(views)
    want = getattr(functional, name)(l2_normalize(stack), temperature=temperature)
    assert torch.equal(kind()(*views), want)
    assert torch.equal(kind()(stack), want)
    assert_close(kind(normalize=False)(l2_normalize(stack)), want, 0)


def test_info_nce_with_other_negatives(views: tuple[Tensor, Tensor]) -> None:
    q, k = views
    others, more = torch.randn(9, 5), torch.randn(4, 5)
    got = fastcl.InfoNCELoss(0.3)(q, k, others, extra_negatives=more)
    all_of_them = fastcl.InfoNCELoss(0.3)(q, k, torch.cat([others, more]))
    assert_close(got, all_of_them, 1e-6)


def test_clip_and_siglip(views: tuple[Tensor, Tensor]) -> None:
    a, b = map(l2_normalize, views)
    scale, bias = torch.tensor(7.0), torch.tensor(-2.0)
    assert torch.equal(fastcl.CLIPLoss()(*views, scale), functional.clip(a, b, scale=scale))
    assert torch.equal(fastcl.SigLIPLoss()(*views, scale, bias), functional.siglip(a, b, scale=scale, bias=bias))


def test_supcon_takes_views_in_the_middle(views: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([0, 1, 0, 2, 3, 1])
    z = torch.stack(views, 1)  # (B, V, D)
    got = fastcl.SupConLoss()(z, labels)
    want = fastcl.SupConLoss()(torch.cat(views), labels.repeat(2))
    assert_close(got, want, 1e-6)


def test_supcon_of_singletons_is_nt_xent(views: tuple[Tensor, Tensor]) -> None:
    got = fastcl.SupConLoss(0.2)(torch.cat(views), torch.arange(6).repeat(2))
    assert_close(got, fastcl.NTXentLoss(0.2)(*views), 1e-6)


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "supcon"])
def test_a_learned_temperature_moves_stays_positive_and_survives_a_checkpoint(
    name: str, views: tuple[Tensor, Tensor]
) -> None:
    kind, _ = MODULES[name]
    arguments = (torch.cat(views), torch.arange(12) % 3) if name == "supcon" else views
    loss = kind(0.2, learn_temperature=True)
    assert_close(loss(*arguments), kind(0.2)(*arguments), 1e-6)
    assert list(loss.state_dict()) == ["log_scale"]
    torch.optim.SGD(loss.parameters(), lr=0.1).zero_grad()
    loss(*arguments).backward()
    assert loss.log_scale.grad.isfinite()
    assert loss.log_scale.grad != 0
    with torch.no_grad():
        loss.log_scale.fill_(50.0)
    assert loss.temperature.item() == pytest.approx(0.01)
    other = kind(0.5, learn_temperature=True)
    other.load_state_dict(loss.state_dict())
    assert other.log_scale == 50


def test_a_parameter_as_temperature_is_learned_as_it_is(views: tuple[Tensor, Tensor]) -> None:
    temperature = nn.Parameter(torch.tensor(0.3))
    loss = fastcl.NTXentLoss(temperature)
    assert [*loss.parameters()] == [temperature]
    loss(*views).backward()
    shifted = [fastcl.NTXentLoss(0.3 + d)(*(v.double() for v in views)) for d in (1e-4, -1e-4)]
    assert_close(temperature.grad, (shifted[0] - shifted[1]) / 2e-4, 1e-4)


def test_half_modules_keep_the_loss_in_fp32(views: tuple[Tensor, Tensor]) -> None:
    loss = fastcl.NTXentLoss(0.2, learn_temperature=True).half()
    value = loss(*(v.half() for v in views))
    assert value.dtype == torch.float32
    assert_close(value, fastcl.NTXentLoss(0.2)(*views), 5e-3)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: fastcl.NTXentLoss(0), ValueError),
        (lambda: fastcl.NTXentLoss(math.nan), ValueError),
        (lambda: fastcl.NTXentLoss(reduction="avg"), ValueError),
        (lambda: fastcl.NTXentLoss(torch.tensor(0.1), learn_temperature=True), TypeError),
        (lambda: fastcl.MoCoLoss(0), ValueError),
    ],
)
def test_bad_hyperparameters_are_refused(make: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^got .+; expected .+\. .+\.$"):
        make()  # type: ignore[operator]


def test_repr_says_what_it_does() -> None:
    assert repr(fastcl.NTXentLoss(0.1)) == "NTXentLoss(temperature=0.1, normalize=True, reduction='mean')"
    assert "temperature=learned" in repr(fastcl.DCLLoss(learn_temperature=True))
