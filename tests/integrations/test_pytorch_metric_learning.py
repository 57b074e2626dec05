"""What is particular to pytorch-metric-learning: no pair is listed, wrappers, faults, and what falls back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.dropins import Draw, backward

upstream = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")

from benchmarks.dropins import pytorch_metric_learning as cases  # noqa: E402
from benchmarks.dropins.pytorch_metric_learning import part  # noqa: E402
from fastcl._bench import nothing_kept  # noqa: E402
from fastcl._measure import peak_bytes  # noqa: E402
from fastcl.integrations import pytorch_metric_learning as ours  # noqa: E402
from tests.oracle import assert_close, error  # noqa: E402

from .formula import check_interface  # noqa: E402

NAMES = ours.__all__


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.fused], ids=lambda case: case.label)
def test_fused_cases_never_form_the_matrix(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case.build(Draw(37, 5, seed=1))

    def refused(*_: object) -> Tensor:
        raise AssertionError("the original's distance matrix")

    from pytorch_metric_learning.distances import BaseDistance

    monkeypatch.setattr(BaseDistance, "forward", refused)
    assert problem.ours(*problem.leaves).isfinite()
    with pytest.raises(AssertionError, match="distance matrix"):
        problem.theirs(*problem.leaves)


@pytest.mark.parametrize("name", NAMES)
def test_same_arguments_attributes_and_state(name: str) -> None:
    check_interface(getattr(ours, name)(), getattr(upstream, name)())


def test_the_cap_of_the_logarithm() -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.01], [0.9, 0.1]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    exact, grads = backward(lambda z: ours.NTXentLoss(temperature=0.01)(z, labels), [z])
    capped, no_grads = backward(lambda z: upstream.NTXentLoss(temperature=0.01)(z, labels), [z])
    strict, strict_grads = backward(lambda z: ours.NTXentLoss(temperature=0.01, strict=True)(z, labels), [z])
    assert exact > 50 > 44 > capped  # two of four pairs cost 100, and are capped at 87.3
    assert torch.isclose(strict, capped, rtol=1e-5)
    assert torch.allclose(strict_grads[0], no_grads[0], atol=1e-4 * grads[0].norm().item())
    wide, _ = backward(
        lambda z: upstream.NTXentLoss(temperature=0.01)(z, labels), [z.detach().double().requires_grad_()]
    )
    assert torch.isclose(exact.double(), wide, rtol=1e-5)


@pytest.mark.parametrize("columns", [False, True])
def test_an_easy_row_counts(columns: bool) -> None:
    """Its loss is about 1e-8, which the original rounds to 0 in fp32 and its default reducer then leaves out."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.3, 0.954], [0.6, 0.8], [0.6, -0.8]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    more = {"ref_emb": z.clone(), "ref_labels": labels} if columns else {}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in more.items()}
    mine, theirs = cases.pair("SupConLoss", temperature=0.022)
    exact = theirs(z.double(), labels, **wide)
    assert error(mine(z, labels, **more), exact) < 1e-5
    assert theirs(z, labels, **more) > 1.2 * exact


def test_a_replaced_method_is_called() -> None:
    class Mine(ours.NTXentLoss):  # type: ignore[misc, name-defined]
        def _compute_loss(self, pos_pairs: Tensor, neg_pairs: Tensor, indices_tuple: Any) -> Any:
            losses = {**super()._compute_loss(pos_pairs, neg_pairs, indices_tuple)["loss"]}
            return {"loss": {**losses, "losses": losses["losses"] * 0 + 7}}

    assert Mine()(torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])) == 7


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [[0], [0, 1], [3, 3], [5, 5, 5, 5], [0, 1, 2, 3]])
def test_batches_without_positives_or_negatives(name: str, labels: list[int]) -> None:
    z = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mine, theirs = cases.pair(name)
    loss, grads = backward(lambda z: mine(z, torch.tensor(labels)), [z])
    exact, wanted = backward(lambda z: theirs(z, torch.tensor(labels)), [z.detach().double().requires_grad_()])
    assert_close(loss, exact, 1e-5, floor=1e-15)
    assert_close(grads[0], wanted[0], 1e-5)


@pytest.mark.parametrize("options", [{"strict": True}, {"reducer": part("reducers", "MeanReducer")}, {}])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]])
def test_no_pair_is_no_loss_in_any_mode(options: dict[str, Any], labels: list[int]) -> None:
    z = Draw(4, 3).rows()
    (loss, (grad,)) = backward(lambda z: ours.NTXentLoss(**options)(z, torch.tensor(labels)), [z])
    assert loss == 0
    assert not grad.any()


def test_float_labels_and_statistics_are_the_originals() -> None:
    z, labels = torch.randn(6, 3), torch.tensor([0.5, 0.5, 1, 1, 2, 2])
    assert torch.equal(ours.NTXentLoss()(z, labels), upstream.NTXentLoss()(z, labels))
    loss = ours.SupConLoss(distance=cases.part("distances", "CosineSimilarity", collect_stats=True))
    loss(z * 3, labels.long())
    assert abs(loss.distance.initial_avg_query_norm - (3 * z).norm(dim=1).mean().item()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strict_caps_as_the_dtype_of_the_rows_does(dtype: torch.dtype) -> None:
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 0, 1, 1])
    capped = upstream.NTXentLoss(temperature=0.02)(z, labels)
    strict = ours.NTXentLoss(temperature=0.02, strict=True)(z, labels)
    assert strict.dtype == capped.dtype == dtype
    assert torch.isclose(strict, capped, rtol=2e-3 if dtype == torch.float16 else 1e-5)
    assert ours.NTXentLoss(temperature=0.02)(z, labels) > 1.05 * capped


def test_distributed_wrapper_takes_our_classes() -> None:
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    z, labels = torch.randn(8, 3), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    with pytest.warns(UserWarning, match="non-distributed"):
        wrapped = DistributedLossWrapper(ours.SupConLoss(), efficient=True)(z, labels)
    assert torch.isclose(wrapped, upstream.SupConLoss()(z, labels), rtol=1e-5)


def test_memory_of_a_label_per_image_grows_with_the_batch() -> None:
    def step(n: int) -> int:
        z, labels = torch.randn(n, 16, requires_grad=True), torch.arange(n // 2).repeat(2)
        return peak_bytes(lambda: ours.NTXentLoss()(z, labels).backward())

    step(64)
    with nothing_kept():
        assert step(2048) < 3 * step(1024)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "MultiSimilarityLoss"])
@pytest.mark.parametrize("change", ["none", "one missing", "one of equal labels", "one twice", "out of order"])
def test_listed_negatives_are_taken_as_listed(name: str, change: str) -> None:
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    same, at = labels[:, None] == labels, torch.arange(9)
    anchor, positive = torch.where(same & (at[:, None] != at))
    other, negative = torch.where(~same)
    if change == "one missing":  # the one that weighs most
        unit = torch.nn.functional.normalize(z.detach(), dim=1)
        kept = torch.arange(len(other)) != (unit[other] * unit[negative]).sum(1).argmax()
        other, negative = other[kept], negative[kept]
    elif change == "one of equal labels":  # the pair of rows 0 and 1 leaves the positives and takes a negative's place
        anchor, positive = anchor[1:], positive[1:]
        other, negative = torch.cat([at[:1], other[1:]]), torch.cat([at[1:2], negative[1:]])
    elif change == "one twice":
        other, negative = torch.cat([other[1:2], other[1:]]), torch.cat([negative[1:2], negative[1:]])
    elif change == "out of order":
        other, negative = other.flip(0), negative.flip(0)
    indices = anchor, positive, other, negative
    both = [backward(lambda z, loss=loss: loss(z, labels, indices), [z]) for loss in cases.pair(name)]
    (mine, grads), (theirs, exact) = both
    assert torch.isclose(mine, theirs, rtol=1e-5) and torch.allclose(grads[0], exact[0], rtol=1e-4, atol=1e-6)
