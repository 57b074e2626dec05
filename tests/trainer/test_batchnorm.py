"""BatchNorm in parts is that of several GPUs, leaves no trace in a state dict, and MoCo's keys are shuffled then."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl.trainer import PRESETS, TrainConfig, TrainError, export, loop, methods, resume, train
from fastcl.trainer.batchnorm import SplitBatchNorm, shuffled, split_batchnorm
from fastcl.trainer.data import load_data
from fastcl.trainer.export import trained_encoder
from fastcl.trainer.loop import build_method
from fastcl.trainer.methods import MoCo
from fastcl.trainer.ranks import Ranks

from .conftest import SHORT
from .runs import interrupt, same_run


def layers(dims: int, splits: int) -> tuple[nn.Module, list[nn.Module]]:
    """A split layer, and as many plain ones, with the same parameters and statistics that are not the initial ones."""
    plain = (nn.BatchNorm1d(5) if dims == 2 else nn.BatchNorm2d(5)).double()
    with torch.no_grad():
        for values in (plain.weight, plain.bias, plain.running_mean, plain.running_var):
            values.copy_(torch.rand(5))
    copies = [copy.deepcopy(plain) for _ in range(splits)]
    network = nn.Sequential(plain)
    split_batchnorm(network, splits)
    assert isinstance(network[0], SplitBatchNorm)
    return network[0], copies


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 4)])
@pytest.mark.parametrize("splits", [2, 3])
def test_every_part_is_normalised_by_a_batchnorm_of_its_own(splits: int, shape: tuple[int, ...]) -> None:
    split, copies = layers(len(shape), splits)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, dtype=torch.float64)
    rows = [slice(i * 12 // splits, (i + 1) * 12 // splits) for i in range(splits)]
    want = torch.cat([layer(x[part]) for layer, part in zip(copies, rows, strict=True)])
    assert torch.equal(split(x), want)
    (expected,) = torch.autograd.grad((want * weights).sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad((split(x) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (want * weights).sum().backward()
    for name in ("weight", "bias"):
        (own,) = torch.autograd.grad((split(x) * weights).sum(), getattr(split, name))
        of_parts = sum(getattr(layer, name).grad for layer in copies)
        torch.testing.assert_close(own, of_parts, rtol=1e-12, atol=1e-12)


class Activated(nn.BatchNorm1d):
    """A layer with more inside, as timm has them."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    "plain",
    [
        nn.BatchNorm1d(5, affine=False),
        nn.BatchNorm1d(5, momentum=None),
        nn.BatchNorm1d(5, track_running_stats=False),
        Activated(5),
    ],
    ids=["not affine", "cumulative mean", "no statistics", "a subclass"],
)
def test_layers_of_every_kind_are_split(plain: nn.Module) -> None:
    split, *copies = (copy.deepcopy(plain).double() for _ in range(3))
    names, parameters = list(split.state_dict()), list(split.parameters())
    split_batchnorm(split, 2)
    assert list(split.state_dict()) == names
    assert all(now is then for now, then in zip(split.parameters(), parameters, strict=True))
    for _ in range(2):
        x = torch.randn(8, 5, dtype=torch.float64)
        want = torch.cat([layer(part) for layer, part in zip(copies, x.chunk(2), strict=True)])
        torch.testing.assert_close(split(x), want, rtol=1e-12, atol=1e-12)
    for name, buffer in split.named_buffers():
        of_parts = torch.stack([getattr(layer, name) for layer in copies]).double().mean(0)
        torch.testing.assert_close(buffer.double(), of_parts, rtol=1e-12, atol=1e-12)


def test_running_statistics_are_the_mean_over_the_parts() -> None:
    split, copies = layers(4, 3)
    for _ in range(2):
        x = torch.randn(12, 5, 3, 4, dtype=torch.float64)
        split(x)
        for layer, part in zip(copies, x.chunk(3), strict=True):
            layer(part)
    for name in ("running_mean", "running_var"):
        want = torch.stack([getattr(layer, name) for layer in copies]).mean(0)
        torch.testing.assert_close(getattr(split, name), want, rtol=1e-12, atol=1e-12)
    assert split.num_batches_tracked == 2


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3, 4)])
def test_in_evaluation_it_is_the_plain_layer(shape: tuple[int, ...]) -> None:
    split, copies = layers(len(shape), 3)
    before = copy.deepcopy(split.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(split.eval()(x), copies[0].eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())


def test_shuffled_images_come_back_in_order_by_a_permutation_of_the_seed() -> None:
    images = torch.arange(12.0).view(12, 1)
    dealt, restored = shuffled(images, 3, None)
    assert not torch.equal(dealt, images) and torch.equal(dealt.sort(0).values, images)
    assert torch.equal(restored(dealt), images)
    assert torch.equal(shuffled(images, 3, None)[0], dealt) and not torch.equal(shuffled(images, 4, None)[0], dealt)


def moco(**settings: object) -> MoCo:
    config = TrainConfig(method="moco", batch_size=16, queue_size=50, **settings).resolved()  # type: ignore[arg-type]
    method = build_method(config, load_data(config))
    Ranks().parallel(method, config)
    assert isinstance(method, MoCo)
    return method


def pixels(split: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.rand(split, 16, 1, 8, 8, generator=generator)
    return one, other


def test_keys_are_normalised_in_other_company_and_queries_as_they_stand() -> None:
    method, plain = moco(bn_splits=2), moco()
    method.seed = 7
    query, key = method(*pixels())
    order = torch.randperm(16, generator=torch.Generator().manual_seed(7))
    images = pixels()[1][order]
    parts = [plain.key_head(plain.key_encoder(part)) for part in images.chunk(2)]
    torch.testing.assert_close(key[order], torch.cat(parts))
    parts = [plain.head(plain.encoder(part)) for part in pixels()[0].chunk(2)]
    torch.testing.assert_close(query, torch.cat(parts))
    method.seed = 8
    assert not torch.allclose(method(*pixels())[1], key)


def test_nothing_is_shuffled_where_batchnorm_sees_the_whole_batch_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "shuffled", None)  # whose call would raise
    method = moco()
    _, key = method(*pixels())
    method.seed = 5
    assert torch.equal(method(*pixels())[1], key)
    split = moco(bn_splits=4).eval()
    torch.testing.assert_close(split(*pixels())[1], moco().eval()(*pixels())[1], rtol=0, atol=0)


def test_every_step_has_a_seed_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = loop._step, list[int]()

    def spy(method: Any, *args: Any) -> tuple[float, float]:
        seen.append(method.seed)
        return step(method, *args)

    monkeypatch.setattr(loop, "_step", spy)
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(TrainConfig(output=str(tmp_path / folder), seed=seed, **SHORT | {"steps": 3, "batch_size": 8}))
    assert seen[:3] == seen[3:6] and len(set(seen)) == 6


@pytest.mark.filterwarnings("ignore:got an encoder with ")  # BatchNorm sees chunks
def test_a_run_in_parts_resumes_and_its_encoder_is_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SHORT | {"method": "moco", "bn_splits": 4, "steps": 10, "probe_every": 10, "chunk": 24}
    whole = train(TrainConfig(output=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        interrupt(patch, at=9)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(tmp_path / "cut"), **settings))
    resume(tmp_path / "cut")
    same_run(tmp_path / "cut", tmp_path / "whole")
    other = train(TrainConfig(output=str(tmp_path / "other"), **settings | {"bn_splits": 1}))
    assert other["loss"] != whole["loss"]
    export(tmp_path / "whole", tmp_path / "encoder.pt")
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    encoder, _ = trained_encoder(tmp_path / "other")
    assert list(weights) == list(encoder.state_dict())
    assert not any(isinstance(layer, SplitBatchNorm) for layer in encoder.modules())
    assert weights["1.num_batches_tracked"] == 10 * 3  # chunks of a step


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bn_splits": 0}, "bn_splits = 0; expected 1 or more"),
        ({"bn_splits": 2, "method": "byol"}, "bn_splits = 2 for byol; expected moco"),
        ({"bn_splits": 2, "sync_batchnorm": True, "device": "cuda"}, "bn_splits = 2 for sync_batchnorm"),
        ({"bn_splits": 3}, "bn_splits = 3 for 64 images of a rank's micro-batch in chunks of 64"),
        ({"bn_splits": 4, "accumulate": 16}, "bn_splits = 4 for 4 images"),
        ({"bn_splits": 4, "chunk": 30}, "bn_splits = 4 for 64 images of a rank's micro-batch in chunks of 30"),
        ({"bn_splits": 4, "chunk": 20}, "in chunks of 20"),  # the last one has 4 images
        ({"bn_splits": 64}, "equal parts of at least 2 images"),
    ],
)
def test_parts_that_cannot_be_are_a_sentence(settings: dict[str, object], sentence: str, tmp_path: Path) -> None:
    given = {"method": "moco", "output": str(tmp_path / "run"), **SHORT} | settings
    with pytest.raises(TrainError, match=sentence):
        train(TrainConfig(**given))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_ranks_share_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainError, match="bn_splits = 5 for 24 images of a rank's"):
        train(TrainConfig(method="moco", batch_size=48, bn_splits=5))


def test_presets_of_moco_have_the_gpus_of_their_sources() -> None:
    parts = {name: preset.config.bn_splits for name, preset in PRESETS.items()}
    assert {name for name, splits in parts.items() if splits > 1} == {"moco-cifar10", "moco-v1-r50", "moco-v2-r50"}
    assert {parts[name] for name in ("moco-cifar10", "moco-v1-r50", "moco-v2-r50")} == {8}
