"""Probes: perfect on what is separable, chance on noise, and kNN equal to a brute-force one."""

import dataclasses

import pytest
import torch

from fastcl.trainer import TrainConfig
from fastcl.trainer.augment import DIGITS
from fastcl.trainer.data import Data, Images, load_data
from fastcl.trainer.errors import MissingData
from fastcl.trainer.models import build_encoder, calibrated, encode
from fastcl.trainer.probe import (
    DRAWS,
    Features,
    Prober,
    _spread,
    few_label_draws,
    few_label_probe,
    knn,
    linear_probe,
)

CPU = torch.device("cpu")


def features(*, separable: bool, per_class: int = 60, classes: int = 5, width: int = 16) -> Features:
    generator = torch.Generator().manual_seed(0)

    def part() -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(classes).repeat(per_class)
        x = torch.randn(len(labels), width, generator=generator)
        if separable:
            x = x * 0.1 + 3 * torch.eye(width)[labels]
        return x, labels

    return Features(*part(), *part())


def mixed() -> Features:
    """Neither separable nor noise."""
    f, classes = features(separable=False), torch.eye(16)
    return Features(
        f.train + 2 * classes[f.train_labels], f.train_labels, f.test + 2 * classes[f.test_labels], f.test_labels
    )


def draws(f: Features, per_class: int) -> torch.Tensor:
    return few_label_draws(f.train_labels, per_class, torch.Generator().manual_seed(1))


def test_separable_features_reach_100() -> None:
    f = features(separable=True)
    assert knn(f) == linear_probe(f) == 100
    for per_class in (1, 10):
        assert few_label_probe(f, draws(f, per_class)) == {"mean": 100, "std": 0}


def test_noise_stays_at_chance() -> None:
    f = features(separable=False)
    for accuracy in (knn(f), linear_probe(f), *(few_label_probe(f, draws(f, k))["mean"] for k in (1, 10))):
        assert abs(accuracy - 20) < 7  # 300 test rows: one standard deviation is 2.3


@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.07), (200, 0.005), (500, 1.0)])
def test_knn_equals_a_brute_force_vote(neighbours: int, temperature: float) -> None:
    f = mixed()
    right = 0
    for x, label in zip(f.test.double(), f.test_labels.tolist(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(f.train.double(), x[None])
        votes = [0.0] * 5
        for i in cosine.argsort(descending=True)[:neighbours].tolist():
            votes[f.train_labels[i]] += (cosine[i] / temperature).exp().item()
        right += votes.index(max(votes)) == label
    assert knn(f, neighbours=neighbours, temperature=temperature) == pytest.approx(100 * right / 300)
    assert 40 < 100 * right / 300 < 95  # neither trivial


def test_knn_takes_200_neighbours_and_weighs_them() -> None:
    f = Features(  # 150 neighbours on one side, 51 nearer ones on the other
        torch.tensor([[1.0, 0.1]] * 51 + [[1.0, 1.0]] * 150), torch.tensor([1] * 51 + [0] * 150),
        torch.tensor([[1.0, 0.0]]), torch.tensor([1]),
    )  # fmt: skip
    assert knn(f) == 100  # 51 exp(0.995 / 0.07) > 149 exp(0.707 / 0.07)
    assert knn(f, temperature=10.0) == 0  # nearly a count of heads
    flipped = dataclasses.replace(f, test_labels=torch.tensor([0]))
    assert knn(flipped, temperature=10.0) == 100
    even = Features(  # 100 votes each, of nearly equal weight, until the 201st votes
        torch.tensor([[1.0, 0.0]] * 101 + [[1.0, 1e-4]] * 100), torch.tensor([0] * 101 + [1] * 100),
        torch.tensor([[0.0, 1.0]]), torch.tensor([1]),
    )  # fmt: skip
    assert knn(even) == 100 and knn(even, neighbours=201) == 0


def test_few_label_probe_is_each_draw_by_itself() -> None:
    f = mixed()
    d = draws(f, 10)
    alone = torch.tensor([few_label_probe(f, torch.stack([row, row]))["mean"] for row in d], dtype=torch.double)
    together = few_label_probe(f, d)
    assert together["mean"] == pytest.approx(alone.mean().item(), abs=0.2)
    assert together["std"] == pytest.approx(alone.std().item(), abs=0.2) and together["std"] > 0.5


def test_few_label_draws_are_balanced_distinct_and_follow_the_generator() -> None:
    labels = torch.tensor([2, 0, 1] * 12)
    chosen = few_label_draws(labels, 10, torch.Generator().manual_seed(0))
    assert chosen.shape == (DRAWS, 30)
    for row in chosen:
        assert labels[row].bincount().tolist() == [10, 10, 10] and len(set(row.tolist())) == 30
    assert len({tuple(sorted(row.tolist())) for row in chosen}) > 1
    assert torch.equal(chosen, few_label_draws(labels, 10, torch.Generator().manual_seed(0)))
    with pytest.raises(MissingData, match=r"got a class with 12 .* at least 13"):
        few_label_draws(labels, 13, torch.Generator())


def test_probes_never_look_at_unlabelled_images() -> None:
    labels = torch.tensor([-1] * 50 + [0, 1] * 20)
    images = Images(labels, lambda at: torch.rand(len(at), 1, 8, 8))
    prober = Prober(Data(images, images, ["a", "b"], DIGITS), torch.Generator())
    assert (prober.train_at >= 50).all() and len(prober.train_at) == 40


def test_a_large_half_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcl.trainer.probe._LIMIT", 30)
    labels = torch.arange(3).repeat(100)
    assert labels[_spread(labels)].bincount().tolist() == [10, 10, 10]


def test_calibration_gives_batchnorm_the_statistics_of_the_images_and_leaves_the_encoder_alone() -> None:
    data = load_data(TrainConfig())
    torch.manual_seed(0)
    encoder, width = build_encoder("conv", 1, 8)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    at = torch.arange(256)
    ready = calibrated(encoder, data.train, at, CPU)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    first = encoder[0](data.train.read(at))
    torch.testing.assert_close(ready[1].running_mean, first.mean((0, 2, 3)))
    out = encode(ready, data.train, at, CPU)
    assert out.shape == (256, width) and not out.requires_grad
    torch.testing.assert_close(out[:10], encode(ready, data.train, at[:10], CPU), atol=1e-5, rtol=1e-5)


def test_the_conv_encoder_has_93_thousand_parameters() -> None:
    encoder, _ = build_encoder("conv", 1, 8)
    assert sum(p.numel() for p in encoder.parameters()) == 92_896
