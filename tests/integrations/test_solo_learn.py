"""solo-learn's losses against their formulas; test_parity compares them with solo-learn where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from fastcl.integrations.solo_learn import (
    byol_loss_func,
    manual_simclr_loss_func,
    moco_loss_func,
    mocov2plus_loss_func,
    mocov3_loss_func,
    nnclr_loss_func,
    simclr_loss_func,
    simsiam_loss_func,
)
from tests.oracle import error

from .formula import check, loss_and_grads, rows, units

B, D = 9, 7
TWO_VIEWS = torch.arange(B).repeat(2)
THREE_VIEWS = torch.arange(B).repeat(3)
LABELS = torch.tensor([4, 4, 4, -1, -1, 7, 7, 7, 7, 0, 0])


def indexed(z: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    """As the paper's formula reads, with exponentials that overflow."""
    e = (normalize(z, dim=1) @ normalize(z, dim=1).T / temperature).exp()
    same = indexes[:, None] == indexes
    own = torch.eye(len(z), dtype=torch.bool)
    positive = (e * (same & ~own)).sum(1)
    return -(positive / (positive + (e * ~same).sum(1))).log().mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("indexes", [TWO_VIEWS, THREE_VIEWS, LABELS], ids=["two views", "three views", "labels"])
def test_simclr_sums_the_exponentials_of_positives(indexes: Tensor, temperature: float) -> None:
    check(
        lambda z: simclr_loss_func(z, indexes, temperature=temperature),
        lambda z: indexed(z, indexes, temperature),
        rows(len(indexes), D),
    )


def two_views(z1: Tensor, z2: Tensor, temperature: float, extra: Tensor | None = None) -> Tensor:
    z = normalize(torch.cat([z1, z2]), dim=1)
    n = len(z)
    own = torch.eye(n, dtype=torch.bool)
    positive = own.roll(n // 2, 0) | (torch.zeros_like(own) if extra is None else extra)
    s = z @ z.T / temperature
    lse = s.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)
    return ((lse - s) * positive).sum(1).div(positive.sum(1)).mean()


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_of_two_views(temperature: float) -> None:
    check(
        lambda z1, z2: simclr_loss_func(z1, z2, temperature),
        lambda z1, z2: two_views(z1, z2, temperature),
        rows(B, D),
        rows(B, D, seed=1),
    )


def test_extra_positives_may_be_asymmetric_and_on_the_diagonal() -> None:
    extra = torch.rand(2 * B, 2 * B, generator=torch.Generator().manual_seed(0)) < 0.3
    assert extra.diagonal().any() and not torch.equal(extra, extra.T)
    leaves = rows(B, D), rows(B, D, seed=1)
    for mask in (extra, extra.long()):
        check(
            lambda z1, z2, mask=mask: simclr_loss_func(z1, z2, 0.2, mask),
            lambda z1, z2: two_views(z1, z2, 0.2, extra),
            *leaves,
        )
    nothing = torch.zeros_like(extra)
    one, other = (simclr_loss_func(*leaves, extra_pos_mask=mask) for mask in (nothing, None))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_arguments_say_which_simclr_is_meant() -> None:
    z, z1, z2 = rows(2 * B, D), *rows(2 * B, D).split(B)
    by_images = indexed(z, TWO_VIEWS, 0.1)
    assert error(simclr_loss_func(z=z, indexes=TWO_VIEWS), by_images) < 1e-12
    assert error(simclr_loss_func(z, indexes=TWO_VIEWS.int(), temperature=0.1), by_images) < 1e-12
    assert error(simclr_loss_func(z1=z1, z2=z2), by_images) < 1e-12
    assert error(simclr_loss_func(z1, z2=z2, temperature=0.1), by_images) < 1e-12
    by_labels = simclr_loss_func(z, torch.zeros(2 * B, dtype=torch.long))
    assert error(by_labels, by_images) > 0.1


def test_simclr_does_not_overflow() -> None:
    z = rows(2 * B, D).float()
    assert not indexed(z, TWO_VIEWS, 0.01).isfinite()  # exp(100)
    want, wanted = loss_and_grads(lambda z: indexed(z, TWO_VIEWS, 0.01), [z.double()])
    loss, grads = loss_and_grads(lambda z: simclr_loss_func(z, TWO_VIEWS, 0.01), [z])
    assert error(loss, want) < 1e-5 and error(grads[0], wanted[0]) < 1e-5
    half = z.half()
    assert not indexed(half, TWO_VIEWS, 0.05).isfinite()  # exp(20)
    loss, grads = loss_and_grads(lambda z: simclr_loss_func(z, TWO_VIEWS, 0.05), [half])
    want, wanted = loss_and_grads(lambda z: indexed(z, TWO_VIEWS, 0.05), [half.double()])
    assert loss.dtype == torch.float16 and grads[0].dtype == torch.float16
    # rows are rounded once more, to half, when they are normalised: 2^-11 of a logit of up to 20, in losses above 10
    assert error(loss, want) < 1e-3 and error(grads[0], wanted[0]) < 2e-3


def test_a_row_without_a_positive_has_an_infinite_loss() -> None:
    z = rows(3, D).requires_grad_()
    assert simclr_loss_func(z, torch.tensor([0, 0, 1])) == torch.inf
    assert indexed(z, torch.tensor([0, 0, 1]), 0.1) == torch.inf
    assert simclr_loss_func(z, torch.tensor([5, 5, 5])) == 0  # and one without a negative none


def manual(z: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    z = normalize(z, dim=1)
    e = (z @ z.T / temperature).exp()
    terms = -(e / (e + (e * negative).sum(1, keepdim=True))).log()
    values = [terms[i][positive[i]].mean() for i in range(len(z)) if positive[i].any()]
    return torch.stack(values).mean()


def _masks() -> tuple[Tensor, Tensor]:
    chance = torch.rand(B, B, generator=torch.Generator().manual_seed(0))
    positive, negative = chance < 0.3, chance > 0.5
    positive[0] = False  # no positive
    negative[1] = False  # no negative
    positive[2, 3] = negative[2, 3] = True  # both
    return positive, negative


def test_manual_simclr() -> None:
    positive, negative = _masks()
    for masks in ((positive, negative), (positive.int(), negative.int())):
        check(
            lambda z, masks=masks: manual_simclr_loss_func(z, *masks, temperature=0.2),
            lambda z: manual(z, positive, negative, 0.2),
            rows(B, D),
        )


def test_manual_simclr_neither_over_nor_underflows() -> None:
    """The original shifts by the largest logit of a row, and far positives then are the logarithm of 0."""
    positive, negative = _masks()
    z = rows(B, D).float()
    want, wanted = loss_and_grads(lambda z: manual(z, positive, negative, 0.005), [z.double()])
    loss, grads = loss_and_grads(lambda z: manual_simclr_loss_func(z, positive, negative, 0.005), [z])
    assert error(loss, want) < 1e-5 and error(grads[0], wanted[0]) < 1e-5
    nothing = torch.zeros_like(positive)
    loss, grads = loss_and_grads(lambda z: manual_simclr_loss_func(z, nothing, negative), [z])
    assert loss == 0 and not grads[0].any()


def moco(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


@pytest.mark.parametrize("function", [moco_loss_func, mocov2plus_loss_func])
def test_moco_has_its_keys_in_columns(function: Any) -> None:
    check(
        lambda q, k, queue: function(q, k, queue, 0.2),
        lambda q, k, queue: moco(q, k, queue, 0.2),
        units(B, D),
        units(B, D, seed=1),
        units(23, D, seed=2).T.contiguous(),
    )


def test_the_queue_may_move_on_before_the_backward_pass() -> None:
    q, k, queue = units(B, D).requires_grad_(), units(B, D, seed=1), units(23, D, seed=2).T.contiguous()
    want = torch.autograd.grad(moco(q, k, queue.clone(), 0.1), q)[0]
    loss = moco_loss_func(q, k, queue)
    queue[:, :B] = k.T
    assert error(torch.autograd.grad(loss, q)[0], want) < 1e-11


def info_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    return cross_entropy(normalize(q, dim=1) @ normalize(k, dim=1).T / temperature, torch.arange(len(q)))


def test_nnclr_and_moco_v3() -> None:
    leaves = rows(B, D), rows(B, D, seed=1)
    check(lambda nn, p: nnclr_loss_func(nn, p, 0.3), lambda nn, p: info_nce(nn, p, 0.3), *leaves)
    check(nnclr_loss_func, lambda nn, p: info_nce(nn, p, 0.1), *leaves)
    check(lambda q, k: mocov3_loss_func(q, k, 0.3), lambda q, k: 0.6 * info_nce(q, k, 0.3), *leaves)
    check(mocov3_loss_func, lambda q, k: 0.4 * info_nce(q, k, 0.2), *leaves)


@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("shape", [(B, D), (3, 4, D), (D,)], ids=str)
def test_byol_and_simsiam(shape: tuple[int, ...], simplified: bool) -> None:
    n = torch.Size(shape).numel() // D
    p, z = rows(n, D).view(shape), rows(n, D, seed=1).view(shape)

    def cosine(p: Tensor, z: Tensor) -> Tensor:
        return cosine_similarity(p, z.detach(), dim=-1).mean()

    check(lambda p, z: byol_loss_func(p, z, simplified), lambda p, z: 2 - 2 * cosine(p, z), p, z)
    check(lambda p, z: simsiam_loss_func(p, z, simplified=simplified), lambda p, z: -cosine(p, z), p, z)


CALLS = {
    "simclr": lambda q, k: simclr_loss_func(torch.cat([q, k]), TWO_VIEWS),
    "two views": simclr_loss_func,
    "extra": lambda q, k: simclr_loss_func(q, k, extra_pos_mask=torch.eye(2 * B, dtype=torch.bool)),
    "manual": lambda q, k: manual_simclr_loss_func(q, *_masks()),
    "moco": lambda q, k: moco_loss_func(q, k, k.T),
    "mocov3": mocov3_loss_func,
    "nnclr": nnclr_loss_func,
    "byol": byol_loss_func,
    "simsiam": simsiam_loss_func,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_loss_has_the_dtype_of_its_rows_and_fp32_under_autocast(name: str) -> None:
    leaves = units(B, D), units(B, D, seed=1)
    want = CALLS[name](*leaves)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loss = CALLS[name](*(leaf.to(dtype) for leaf in leaves))
        assert loss.dtype == dtype
        assert abs(loss.double() - want) < 20 * torch.finfo(dtype).eps * max(1, want)
    with torch.autocast("cpu", torch.bfloat16):
        loss = CALLS[name](*(leaf.float() for leaf in leaves))
    assert loss.dtype == torch.float32
    assert abs(loss.double() - want) < 20 * torch.finfo(torch.bfloat16).eps * max(1, want)


SENTENCE = r"^got .*; expected .*\. .*"
MASK = torch.zeros(2 * B, 2 * B, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda z: simclr_loss_func(z), TypeError),
        (lambda z: simclr_loss_func(z1=z), TypeError),
        (lambda z: simclr_loss_func(indexes=TWO_VIEWS), TypeError),
        (lambda z: simclr_loss_func(z, TWO_VIEWS, z2=z), TypeError),
        (lambda z: simclr_loss_func(z, TWO_VIEWS, extra_pos_mask=MASK), TypeError),
        (lambda z: simclr_loss_func(z, TWO_VIEWS.float()), TypeError),
        (lambda z: simclr_loss_func(z, TWO_VIEWS[:-1]), ValueError),
        (lambda z: simclr_loss_func(z, TWO_VIEWS, 0.0), ValueError),
        (lambda z: simclr_loss_func(z[:B], z[: B - 1]), ValueError),
        (lambda z: simclr_loss_func(z[:B], z[B:], 0.1, MASK[1:]), ValueError),
        (lambda z: simclr_loss_func(z[:B], z[B:], 0.1, MASK.double()), TypeError),
        (lambda z: manual_simclr_loss_func(z, MASK, [[True]]), TypeError),
        (lambda z: manual_simclr_loss_func(z, MASK, MASK[:, 1:]), ValueError),
        (lambda z: moco_loss_func(z, z, z[0]), ValueError),
        (lambda z: moco_loss_func(z, z, z[:3]), ValueError),  # rows, not columns
        (lambda z: nnclr_loss_func(z, z[1:]), ValueError),
        (lambda z: mocov3_loss_func(z, z, -1.0), ValueError),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=SENTENCE):
        call(rows(2 * B, D))
