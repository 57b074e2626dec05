"""Probes: perfect on what is separable, chance on noise, and kNN equal to a brute-force one."""

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


def test_knn_equals_a_brute_force_vote() -> None:
    f = mixed()
    right = 0
    for x, label in zip(f.test.double(), f.test_labels.tolist(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(f.train.double(), x[None])
        votes = [0.0] * 5
        for i in cosine.argsort(descending=True)[:20].tolist():
            votes[f.train_labels[i]] += (cosine[i] / 0.07).exp().item()
        right += votes.index(max(votes)) == label
    assert knn(f) == pytest.approx(100 * right / 300)
    assert 40 < knn(f) < 95  # neither trivial


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
