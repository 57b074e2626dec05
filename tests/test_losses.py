"""The modules: normalisation, shapes, learned temperatures, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastcl
from fastcl import _ops, functional
from fastcl.backends import forced
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


def test_nt_xent_takes_any_number_of_views(views: tuple[Tensor, Tensor]) -> None:
    three = (*views, torch.randn(6, 5))
    want = functional.nt_xent(torch.cat(three), temperature=0.5, views=3, normalize=True)
    assert torch.equal(fastcl.NTXentLoss()(*three), want)
    assert torch.equal(fastcl.NTXentLoss()(torch.stack(three, 1)), want)
    with pytest.raises(ValueError, match="got 3 views; expected two"):
        fastcl.DCLLoss()(torch.stack(three, 1))


def test_nt_xent_takes_labels(views: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([0, 1, 0, 2, 3, 1])
    want = functional.nt_xent(torch.cat(views), labels.repeat(2), temperature=0.5, normalize=True)
    assert torch.equal(fastcl.NTXentLoss()(*views, labels=labels), want)
    assert torch.equal(fastcl.NTXentLoss()(torch.cat(views), labels=labels.repeat(2)), want)
    assert torch.equal(fastcl.NTXentLoss()(torch.stack(views, 1), labels=labels), want)
    assert torch.equal(fastcl.NTXentLoss()(view0=views[0], view1=views[1], labels=labels), want)
    odd = fastcl.NTXentLoss()(torch.cat(views)[:7], labels=torch.arange(7) % 3)
    assert odd.isfinite()


# module, arguments after the embeddings, the function's name and its keywords
PLAIN: dict[str, tuple[nn.Module, str, dict[str, object]]] = {
    "dclw": (fastcl.DCLWLoss(0.2, sigma=0.4), "dclw", {"temperature": 0.2, "sigma": 0.4}),
    "hard": (
        fastcl.HardNTXentLoss(tau_plus=0.2, beta=0.5), "hard_nt_xent",
        {"temperature": 0.5, "tau_plus": 0.2, "beta": 0.5},
    ),
    "debiased": (fastcl.HardNTXentLoss(beta=0.0), "debiased_nt_xent", {"temperature": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_two_view_modules(name: str, views: tuple[Tensor, Tensor]) -> None:
    module, function, kwargs = PLAIN[name]
    want = getattr(functional, function)(torch.cat(views), normalize=True, **kwargs)
    assert torch.equal(module(*views), want)
    assert torch.equal(module(torch.cat(views)), want)


def test_modules_of_queries(views: tuple[Tensor, Tensor]) -> None:
    q, k = views
    own, ids, weights = torch.randn(6, 2, 5), torch.arange(6) // 2, torch.rand(6)
    guides, log_q = (torch.randn(6, 4), torch.randn(6, 4)), torch.rand(6).log()
    index, drawn = torch.arange(6), torch.randint(6, (6, 3))
    made = [
        (
            fastcl.InfoNCELoss(0.2, hardness=1.0, own_hardness=2.0, label_smoothing=0.1)(q, k, own_negatives=own),
            functional.info_nce(
                q, k, own_negatives=own, hardness=1.0, own_hardness=2.0, label_smoothing=0.1,
                temperature=0.2, normalize=True,
            ),
        ),
        (
            fastcl.InfoNCELoss(0.2, symmetric=True)(q, k, ids=ids, weights=weights),
            functional.info_nce(q, k, ids=ids, weights=weights, symmetric=True, temperature=0.2, normalize=True),
        ),
        (
            fastcl.InBatchSoftmaxLoss(0.2, correct_positive=False)(q, k, log_q, ids=ids),
            functional.in_batch_softmax(
                q, k, log_q=log_q, ids=ids, correct_positive=False, temperature=0.2, normalize=True
            ),
        ),
        (
            fastcl.GISTLoss(0.2, margin=0.1, contrast_anchors=False)(q, k, *guides),
            functional.gist(q, k, *guides, temperature=0.2, margin=0.1, contrast_anchors=False, normalize=True),
        ),
        (
            fastcl.SampledInfoNCELoss(0.2)(q, k, index, drawn),
            functional.sampled_info_nce(q, k, index, drawn, temperature=0.2, normalize=True),
        ),
        (fastcl.NPairLoss(0.1)(q, k), functional.n_pair(q, k, l2=0.1)),
        (
            fastcl.MoCoV3Loss()(q, k, q + 1, k + 1),
            functional.moco_v3(q, k, q + 1, k + 1, temperature=0.2, normalize=True),
        ),
        (
            fastcl.CLIPLoss()(q, k, 5.0, text_scale=3.0, ids=ids),
            functional.clip(q, k, scale=5.0, text_scale=3.0, ids=ids, normalize=True),
        ),
        (
            fastcl.SigLIPLoss()(q, k, 5.0, -1.0, ids=ids),
            functional.siglip(q, k, scale=5.0, bias=-1.0, ids=ids, normalize=True),
        ),
        (fastcl.NegativeCosineLoss()(q, k), functional.negative_cosine(q, k, normalize=True)),
        (fastcl.BYOLLoss()(q, k), functional.byol(q, k, normalize=True)),
        (
            fastcl.TripletLoss(0.3, swap=True)(q, k, q.roll(1, 0)),
            functional.triplet(q, k, q.roll(1, 0), margin=0.3, swap=True, normalize=True),
        ),
        (
            fastcl.SiameseLoss(0.9, distance="cosine")(q, k, ids % 2),
            functional.siamese(q, k, ids % 2, margin=0.9, distance="cosine", normalize=True),
        ),
    ]  # fmt: skip
    for got, want in made:
        assert torch.equal(got, want)


def test_modules_of_labels(views: tuple[Tensor, Tensor]) -> None:
    z, labels = torch.cat(views), torch.arange(12) % 4
    cosface = fastcl.CosFaceLoss(4, 5, scale=9.0, margin=0.1)
    made = [
        (fastcl.SINCERELoss()(z, labels), functional.sincere(z, labels, temperature=0.1, normalize=True)),
        (
            fastcl.MultiSimilarityLoss(beta=9.0, epsilon=0.1)(z, labels),
            functional.multi_similarity(z, labels, beta=9.0, epsilon=0.1, normalize=True),
        ),
        (
            cosface(z, labels),
            functional.cosface(z, cosface.proxies, labels, scale=9.0, margin=0.1, normalize=True),
        ),
        (
            fastcl.SupConLoss(form="in", base_temperature=0.2)(z, labels),
            functional.supcon(z, labels, form="in", base_temperature=0.2, temperature=0.1, normalize=True),
        ),
        *(
            (fastcl.BatchTripletLoss(mining=mining)(z, labels), function(z, labels, margin=0.2, normalize=True))
            for mining, function in {
                "hard": functional.triplet_hard, "semi-hard": functional.triplet_semi_hard,
                "all": functional.triplet_all,
            }.items()
        ),
    ]  # fmt: skip
    for got, want in made:
        assert torch.equal(got, want)
    assert list(cosface.state_dict()) == ["proxies"]
    cosface(z, labels).backward()
    assert cosface.proxies.grad.isfinite().all()


def test_supcon_contrasts_one_view(views: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([0, 1, 0, 2, 3, 1])
    got = fastcl.SupConLoss(contrast_mode="one", reduction="none")(torch.stack(views, 1), labels)
    want = functional.supcon(torch.cat(views), labels.repeat(2), temperature=0.1, normalize=True, reduction="none")
    assert_close(got, want[:6], 1e-6)


def test_supcon_takes_a_mask_that_is_an_equivalence(views: tuple[Tensor, Tensor]) -> None:
    z, labels = torch.stack(views, 1), torch.tensor([4, 1, 4, 2, 3, 1])
    mask = labels[:, None] == labels
    assert torch.equal(fastcl.SupConLoss()(z, mask=mask.float()), fastcl.SupConLoss()(z, labels))
    assert torch.equal(fastcl.SupConLoss()(z), fastcl.SupConLoss()(z, torch.arange(6)))
    chain = mask.clone()
    chain[0, 1] = chain[1, 0] = True  # 0 is like 1 and like 2, but 1 is not like 2
    one_way = mask.clone()
    one_way[3, 4] = True
    for bad in (chain, one_way, torch.zeros(6, 6), mask[:5]):
        with pytest.raises(ValueError, match=r"^got (a )?mask .+; expected .+\. .+\.$"):
            fastcl.SupConLoss()(z, mask=bad)
    with pytest.raises(ValueError, match="got labels and a mask"):
        fastcl.SupConLoss()(z, labels, mask=mask)


def test_moco_of_both_views_is_the_mean_of_both_and_keeps_both_keys() -> None:
    torch.manual_seed(0)
    q0, k1, q1, k0 = torch.randn(4, 3, 5)
    loss = fastcl.MoCoLoss(5, 8, 0.2)
    one, other = copy.deepcopy(loss)(q0, k1), copy.deepcopy(loss)(q1, k0)
    assert_close(loss(q0, k1, q1, k0), (one + other) / 2, 1e-6)
    assert_close(loss.queue.features[:6], l2_normalize(torch.cat([k1, k0])), 0)
    assert loss.queue.pointer == 6
    with pytest.raises(ValueError, match="got one of query1 and key1"):
        loss(q0, k1, q1)


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


def test_repr_says_what_it_does() -> None:
    assert repr(fastcl.NTXentLoss(0.1)) == "NTXentLoss(temperature=0.1, normalize=True, reduction='mean')"
    assert "temperature=learned" in repr(fastcl.DCLLoss(learn_temperature=True))


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_views_in_one_half_under_autocast_to_the_other(
    dtypes: tuple[torch.dtype, torch.dtype], views: tuple[Tensor, Tensor]
) -> None:
    """Which torch.cat and torch.roll refuse there."""
    rows, autocast = dtypes
    given = [view.to(rows) for view in views]
    moco = fastcl.MoCoLoss(5, queue_size=12)
    with torch.autocast("cpu", dtype=autocast):
        found = fastcl.NTXentLoss()(*given), moco(given[0], given[1], given[1], given[0])
    # one operator rounds once; where normalisation is another, its rows have the dtype that they came in
    fused = _ops.fuses(given[0], autocast, forced())
    rounded = [l2_normalize(view.float() if fused else view).to(autocast).float() for view in given]
    assert_close(found[0], fastcl.NTXentLoss(normalize=False)(*rounded), 1e-6)
    assert found[1].isfinite() and moco.queue.pointer == 0
