"""SupContrast's loss against its formula; test_parity compares it with SupContrast where that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcl.integrations.sup_contrast import SupConLoss
from tests.oracle import error

from .formula import check, loss_and_grads, units

B, D = 9, 8
LABELS = torch.tensor([3, 3, 3, -1, -1, 8, 8, 0, 5])
MODES = ("all", "one")


def features(views: int) -> Tensor:
    return units(B * views, D).view(B, views, D)


def formula(
    features: Tensor, together: Tensor, temperature: float = 0.07, mode: str = "all", base: float = 0.07
) -> Tensor:
    """Anchor by anchor, from which images go together, ``(B, B)``."""
    features = features.flatten(2)
    batch, views, _ = features.shape
    losses = []
    for view in range(views if mode == "all" else 1):
        for image in range(batch):
            s = features @ features[image, view] / temperature  # (B, V)
            others = torch.ones(batch, views, dtype=torch.bool)
            others[image, view] = False
            weight = together[image][:, None] * others
            log_p = s - s[others].logsumexp(0)
            losses.append(-(weight * log_p).sum() / weight.sum().clamp(min=1e-9) * temperature / base)
    return torch.stack(losses).mean()


def by_labels(labels: Tensor) -> Tensor:
    return (labels[:, None] == labels).double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_labels(views: int, mode: str) -> None:
    """With one view the images 0 and 5, alone in their classes, have no positive, and count nevertheless."""
    loss = SupConLoss(0.2, mode, 0.1)
    check(
        lambda x: loss(x, LABELS),
        lambda x: formula(x, by_labels(LABELS), 0.2, mode, 0.1),
        features(views),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [2, 3])
def test_views(views: int, mode: str) -> None:
    loss = SupConLoss(0.2, mode, 0.1)
    check(loss, lambda x: formula(x, torch.eye(B), 0.2, mode, 0.1), features(views))


def _mask() -> Tensor:
    chance = torch.rand(B, B, generator=torch.Generator().manual_seed(0))
    mask = (chance < 0.4).double()
    mask[0] = 0  # no positive at all
    mask[1, 1], mask[2, 2] = 0, 1  # own views are positives only where it says so
    return mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_mask_may_be_asymmetric_and_have_weights(views: int, mode: str) -> None:
    loss = SupConLoss(0.2, mode, 0.1)
    weights = _mask() * torch.linspace(0.1, 2, B * B, dtype=torch.float64).view(B, B)
    for mask in (_mask(), weights):
        check(
            lambda x, mask=mask: loss(x, mask=mask),
            lambda x, mask=mask: formula(x, mask, 0.2, mode, 0.1),
            features(views),
        )
    # as precise as the mask, whose dtype may be any
    want = loss(features(views), mask=_mask())
    for mask in (_mask().bool(), _mask().long(), _mask().half()):
        assert error(loss(features(views), mask=mask), want) < 1e-12


def test_defaults_are_the_originals() -> None:
    want = formula(features(2), by_labels(LABELS))
    assert error(SupConLoss()(features(2), LABELS), want) < 1e-12
    assert error(SupConLoss(temperature=0.3)(features(2)), formula(features(2), torch.eye(B), 0.3)) < 1e-12
    with pytest.raises(TypeError):
        SupConLoss(normalize=True)


def test_a_mask_of_labels_is_labels() -> None:
    x = features(2)
    for labels in (LABELS, LABELS[:, None], LABELS / 3, LABELS.int()):
        assert error(SupConLoss()(x, labels), SupConLoss()(x, mask=by_labels(LABELS))) < 1e-12
    assert error(SupConLoss()(x, LABELS > 0), SupConLoss()(x, mask=by_labels(LABELS > 0))) < 1e-12


def test_more_than_one_dimension_of_features() -> None:
    x = features(2)
    want = SupConLoss()(x, LABELS)
    for shape in ((B, 2, 2, D // 2), (B, 2, D, 1, 1)):
        assert error(SupConLoss()(x.view(shape), LABELS), want) < 1e-15
    turned = x.view(B, 2, 2, D // 2).transpose(2, 3)  # its dimensions cannot be joined in place
    assert error(SupConLoss()(turned, LABELS), want) < 1e-12


def test_the_temperature_may_be_learnt() -> None:
    x, temperature = features(2), torch.tensor(0.2, dtype=torch.float64)
    for kind in ({"labels": LABELS}, {}, {"mask": _mask()}):
        together = kind.get("mask", torch.eye(B) if not kind else by_labels(LABELS))

        def ours(x: Tensor, temperature: Tensor, kind: Any = kind) -> Tensor:
            return SupConLoss(temperature, "all", 0.1)(x, **kind)

        def want(x: Tensor, temperature: Tensor, together: Tensor = together) -> Tensor:
            return formula(x, together, temperature, "all", 0.1)

        check(ours, want, x, temperature)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["views", "labels", "mask"])
def test_a_single_row_has_loss_0(kind: str, mode: str) -> None:
    """Its original has 0 times the logarithm of 0."""
    options = {"views": {}, "labels": {"labels": torch.tensor([1])}, "mask": {"mask": torch.ones(1, 1)}}[kind]
    loss, grads = loss_and_grads(lambda x: SupConLoss(contrast_mode=mode)(x, **options), [units(1, D).view(1, 1, D)])
    assert loss == 0 and not grads[0].any()


def test_one_image_of_two_views_has_loss_0() -> None:
    for options in ({}, {"labels": torch.tensor([1])}, {"mask": torch.ones(1, 1)}):
        loss, grads = loss_and_grads(lambda x, o=options: SupConLoss()(x, **o), [units(2, D).view(1, 2, D)])
        assert abs(loss) < 1e-12 and grads[0].norm() < 1e-12


@pytest.mark.parametrize("options", [{}, {"labels": LABELS}, {"mask": _mask()}], ids=["views", "labels", "mask"])
def test_losses_are_fp32_or_fp64(options: dict[str, Tensor]) -> None:
    want = SupConLoss()(features(2), **options)
    assert want.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loss = SupConLoss()(features(2).to(dtype), **options)
        assert loss.dtype == torch.float32
        assert abs(loss.double() - want) < 20 * torch.finfo(dtype).eps * want
    with torch.autocast("cpu", torch.bfloat16):
        loss = SupConLoss()(features(2).float(), **options)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - want) < 20 * torch.finfo(torch.bfloat16).eps * want


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, lambda loss: loss(features(2)[:, 0])),
        ({}, lambda loss: loss(features(2), LABELS, torch.eye(B))),
        ({}, lambda loss: loss(features(2), LABELS[1:])),
        ({}, lambda loss: loss(features(2), LABELS.repeat(2))),
        ({}, lambda loss: loss(features(2), mask=torch.eye(2 * B))),
        ({"contrast_mode": "both"}, lambda loss: loss(features(2), LABELS)),
        ({"temperature": 0.0}, lambda loss: loss(features(2), LABELS)),
        ({"temperature": 0.0}, lambda loss: loss(features(2), mask=_mask())),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options: dict[str, Any], call: Any) -> None:
    with pytest.raises(ValueError, match=r"^got .*; expected .*\. .*"):
        call(SupConLoss(**options))
