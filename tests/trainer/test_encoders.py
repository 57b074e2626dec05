"""Encoders by name and modules of the caller: what becomes of them, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcl.trainer import TrainConfig, TrainError, export, resume, train, write_page
from fastcl.trainer.checkpoint import load_checkpoint, save_checkpoint
from fastcl.trainer.data import load_data
from fastcl.trainer.encoders import freeze_patch_embedding
from fastcl.trainer.errors import MissingPackage
from fastcl.trainer.evaluation import evaluate
from fastcl.trainer.export import start_from
from fastcl.trainer.loop import build_method
from fastcl.trainer.models import build_encoder, calibrated, encode, projection_head, run_encoder

from .conftest import SHORT
from .runs import need_torchvision, same_run


class Mine(nn.Module):
    """With dropout, whose random numbers a resumed run must draw again, and a batch that tells the mode."""

    def __init__(self, features: int = 6, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, features, 3)
        self.norm = nn.BatchNorm2d(features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.norm(self.conv(images)).relu().mean((2, 3)))


GIVEN = {"encoder": "given", "method": "simclr", **SHORT, "steps": 4, "checkpoint_every": 2, "probe_every": 4}


@pytest.mark.parametrize(
    ("name", "channels", "size", "features"),
    [
        ("resnet18", 1, 17, 512),
        ("mobilenet_v3_small", 1, 33, 1024),
        ("torchvision:squeezenet1_1", 3, 64, 512),  # its classifier is a convolution
        ("efficientnet_b0", 3, 32, 1280),
        ("convnext_tiny", 1, 32, 768),
        ("googlenet", 3, 64, 1024),  # with classifiers on the way
        ("vit_b_32", 1, 32, 768),
        ("timm:vit_tiny_patch16_224", 1, 32, 192),
        ("timm:resnet18", 1, 32, 512),
        ("timm:mobilenetv3_small_050", 3, 32, 1024),
    ],
)
def test_a_network_by_name_gives_features_and_learns(name: str, channels: int, size: int, features: int) -> None:
    pytest.importorskip("timm" if name.startswith("timm:") else "torchvision")
    encoder, width = build_encoder(name, channels, size)
    assert width == features and encoder.training
    found = encoder(torch.rand(3, channels, size, size))
    assert found.shape == (3, features)
    found.square().sum().backward()
    first = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == channels and first.weight.grad is not None
    assert first.weight.grad.abs().sum() > 0


def test_torchvision_is_meant_with_and_without_its_name() -> None:
    need_torchvision()
    encoders = []
    for name in ("resnet18", "torchvision:resnet18"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            encoders.append(build_encoder(name, 3, 32)[0].state_dict())
    assert all(torch.equal(value, encoders[1][key]) for key, value in encoders[0].items())


def test_images_may_be_of_any_shape_where_the_network_takes_it() -> None:
    need_torchvision()
    assert build_encoder("mobilenet_v3_small", 3, (32, 48))[1] == 1024
    with pytest.raises(TrainError, match=r"3 x 32 x 64 \(channels, height, width\), which the encoder vit_b_32 does"):
        build_encoder("vit_b_32", 3, (32, 64))


@pytest.mark.parametrize(
    ("name", "stem", "sentence"),
    [
        ("resnet19", "imagenet", r"got encoder 'resnet19'; expected conv.*timm:NAME.* Near it: resnet1"),
        ("zzz", "imagenet", r"There are \d+; none is near it"),
        ("timm:vit_tiny_patch16_225", "imagenet", r"Near it: timm:vit_tiny_patch16_224"),
        ("mobilenet_v3_small", "cifar", r"stem = 'cifar' for the encoder mobilenet_v3_small; expected a ResNet"),
        ("timm:resnet18", "cifar", r"stem = 'cifar' for the encoder timm:resnet18"),
        ("vit_b_16", "imagenet", r"3 x 40 x 40.* vit_b_16 does not take \(AssertionError: .*indivisible by patch"),
        ("timm:vit_tiny_patch16_224", "imagenet", r"3 x 40 x 40.* \(ValueError: patches of 16 x 16 do not divide"),
        ("timm:vit_tiny_patch16_224.nonsense", "imagenet", r"does not take \(RuntimeError: Invalid pretrained tag"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(name: str, stem: str, sentence: str) -> None:
    pytest.importorskip("timm" if name.startswith("timm:") else "torchvision")
    with pytest.raises(TrainError, match=sentence):
        build_encoder(name, 3, 40, stem)


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match=r"timm cannot be imported .*timm:resnet18 needs it.* pip install timm"):
        build_encoder("timm:resnet18", 3, 32)


def test_weights_of_timm_are_those_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    asked = {}

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.update(options, name=name, pretrained=pretrained)
        return genuine(name, **options)

    genuine = timm.create_model
    encoder, _ = build_encoder("timm:mobilenetv3_small_050", 3, 32)
    before = encoder.state_dict()["conv_stem.weight"].clone()
    monkeypatch.setattr(timm, "create_model", create)
    state = torch.get_rng_state()
    start_from(encoder, "timm:mobilenetv3_small_050")
    assert asked == {"name": "mobilenetv3_small_050", "pretrained": True, "num_classes": 0}
    assert torch.equal(torch.get_rng_state(), state)  # so the heads are those of the seed
    assert not torch.equal(encoder.state_dict()["conv_stem.weight"], before)

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(TrainError, match=r"weights of timm:resnet18 cannot be had \(OSError: no such host\)"):
        start_from(encoder, "timm:resnet18")


def test_a_file_of_torchvision_with_its_classifier_is_a_start(tmp_path: Path) -> None:
    need_torchvision()
    from torchvision.models import mobilenet_v3_small

    with torch.random.fork_rng(devices=[]):
        model = mobilenet_v3_small(weights=None)
        encoder, _ = build_encoder("mobilenet_v3_small", 3, 32)
    torch.save(model.state_dict(), tmp_path / "downloaded.pth")
    start_from(encoder, str(tmp_path / "downloaded.pth"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_the_patches_of_a_vit_stay_as_they_were(tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.BatchNorm2d(8), nn.Flatten())
    train(TrainConfig(output=str(tmp_path), freeze_patch_embedding=True, **GIVEN), encoder=encoder)
    weights = load_checkpoint(tmp_path / "checkpoint.pt")["method"]
    assert torch.equal(weights["encoder.0.weight"], encoder[0].weight)
    assert not torch.equal(weights["encoder.1.weight"], encoder[1].weight)
    for other in (Mine(), nn.Flatten(), nn.Conv2d(1, 4, 1)):
        with pytest.raises(TrainError, match="for the encoder mine; expected one that begins with patches"):
            freeze_patch_embedding(other, "mine")


def test_local_crops_must_go_through_too() -> None:
    pytest.importorskip("timm")
    config = TrainConfig(encoder="timm:vit_tiny_patch16_224", local_crops=2, local_size=16)
    with pytest.raises(TrainError, match=r"images of 1 x 16 x 16 .*which the encoder timm:vit_tiny.* does not take"):
        run_encoder(config, [1, 32, 32], None)
    assert run_encoder(dataclasses.replace(config, encoder="conv"), [1, 32, 32], None)[1] == 128


def test_heads_have_as_many_layers_as_asked_for() -> None:
    kinds = [type(layer).__name__ for layer in projection_head(5, 3, norm=True, hidden=7, layers=4)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 3 + ["Linear"]
    assert projection_head(5, 3, layers=3)(torch.rand(2, 5)).shape == (2, 3)
    config = TrainConfig(method="moco", head_layers=3, hidden=9)
    method = build_method(config, load_data(config))
    for head in (method.get_submodule("head"), method.get_submodule("key_head")):
        assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(9, 128), (9, 9), (64, 9)]


def test_the_baseline_of_a_network_with_dropout_drops_nothing() -> None:
    data = load_data(TrainConfig())
    at = torch.arange(100)
    module = nn.Sequential(nn.Dropout(0.5), Mine())
    one, other = (calibrated(module, data.train, at, torch.device("cpu")) for _ in range(2))
    found = [encode(encoder, data.test, at, torch.device("cpu")) for encoder in (one, other)]
    assert torch.equal(*found) and not torch.equal(one[1].norm.running_mean, module[1].norm.running_mean)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Mine]:
    """A run of the caller's module: the folder, the result, and the module."""
    folder, module = tmp_path_factory.mktemp("runs") / "given", Mine().eval()
    return folder, train(TrainConfig(output=str(folder), **GIVEN), encoder=module), module


def test_a_copy_of_the_module_is_trained(given: tuple[Path, dict[str, Any], Mine], tmp_path: Path) -> None:
    folder, result, module = given
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    again = train(TrainConfig(output=str(tmp_path), **GIVEN), encoder=module)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone
    assert not module.training and all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    same_run(tmp_path, folder)
    assert again["probe"] == result["probe"]
    trained = load_checkpoint(folder / "checkpoint.pt")["method"]
    assert trained["encoder.norm.num_batches_tracked"] == 4  # in training mode
    assert not torch.equal(trained["encoder.conv.weight"], module.conv.weight)
    untrained = build_method(TrainConfig(**GIVEN), load_data(TrainConfig()), None, module).encoder.state_dict()
    assert all(torch.equal(untrained[key], value) for key, value in before.items())


def test_a_resumed_run_of_a_module_with_dropout_ends_in_the_same_bits(
    given: tuple[Path, dict[str, Any], Mine], tmp_path: Path
) -> None:
    folder, result, module = given
    whole, state = (load_checkpoint(folder / f"{which}checkpoint.pt") for which in ("", "previous-"))
    assert (whole["step"], state["step"]) == (4, 2)
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    torch.manual_seed(123)  # whatever the caller drew before
    resumed = resume(tmp_path, encoder=copy.deepcopy(module))
    after = load_checkpoint(tmp_path / "checkpoint.pt")["method"]
    assert all(torch.equal(value, after[key]) for key, value in whole["method"].items())
    assert resumed["probe"] == result["probe"]


def test_what_a_module_must_be(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path / "run"), **GIVEN)
    by_name = dataclasses.replace(config, encoder="conv")
    for settings, module, sentence in (
        (config, None, r"encoder = 'given' without a module; expected .* resume, evaluate, export and write_page"),
        (by_name, Mine(), r"a module and encoder = 'conv'; expected 'given'"),
        (config, lambda images: images, r"got a function for encoder; expected an nn\.Module"),
        (
            config,
            nn.Conv2d(1, 4, 3),
            r"features \(2, 4, 6, 6\) of two images from the encoder given; expected \(2, F\)",
        ),
        (config, nn.Flatten(0), r"features \(128,\) of two images"),
        (config, nn.LSTM(8, 4), r"given does not take \(\w+"),
        (config, Mine(channels=3), r"images of 1 x 8 x 8 .* the encoder given does not take \(RuntimeError: "),
        (dataclasses.replace(config, stem="cifar"), Mine(), "stem = 'cifar' for the encoder given"),
    ):
        with pytest.raises(TrainError, match=sentence):
            train(settings, encoder=module)
    assert not (tmp_path / "run").exists()


def test_what_a_run_of_a_module_needs_afterwards(
    given: tuple[Path, dict[str, Any], Mine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, module = given
    uses = {
        "resume": lambda **given: resume(folder, **given),
        "evaluate": lambda **given: evaluate(folder, "knn", **given),
        "export": lambda **given: export(folder, tmp_path / "encoder.pt", **given),
        "page": lambda **given: write_page(folder, **given),
    }
    finished = (folder / "result.json").read_bytes()
    for name, use in uses.items():
        if name == "resume":  # a finished run needs nothing
            assert use() == json.loads(finished)
            (folder / "result.json").unlink()
        try:
            with pytest.raises(TrainError, match="encoder = 'given' without a module"):
                use()
            for wrong in (Mine(features=7), nn.Sequential(Mine())):
                with pytest.raises(
                    TrainError, match=r"the weights of .*checkpoint.* do not fit the network \(.*conv\."
                ):
                    use(encoder=wrong)
        finally:
            (folder / "result.json").write_bytes(finished)
    found = evaluate(folder, "fine-tune", epochs=1, encoder=module)
    assert found == evaluate(folder, "fine-tune", epochs=1, encoder=module)
    assert write_page(folder, encoder=module).exists()
    about = export(folder, tmp_path / "encoder.pt", encoder=Mine())
    assert (about["encoder"], about["dim"], about["torchvision"]) == ("given", "6", "no such model")
    mine = Mine().eval()
    mine.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    trained = load_checkpoint(folder / "checkpoint.pt")["method"]
    assert torch.equal(mine.conv.weight, trained["encoder.conv.weight"])
