"""Exported encoders: the same bits in other libraries' names, and what cannot be exported or read."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastcl import cli
from fastcl._version import __version__
from fastcl.trainer import TrainConfig, TrainError, export
from fastcl.trainer.checkpoint import save_checkpoint
from fastcl.trainer.errors import MissingPackage
from fastcl.trainer.export import detectron2_name, load_weights, read_weights, resnet_name, trained_encoder
from fastcl.trainer.methods import METHODS
from fastcl.trainer.models import build_encoder, run_encoder

from .runs import need_torchvision


def a_run(
    folder: Path, encoder: str | None, channels: int, size: int = 64, given: nn.Module | None = None, **settings: Any
) -> Path:
    """The checkpoint of a run, with weights and statistics that no other encoder has."""
    config = TrainConfig(**{"method": "byol", "encoder": "given" if given else encoder, "seed": 3, **settings})
    shape = [channels, size, size]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network, width = run_encoder(config, shape, given)
        method = METHODS[config.method](network, width, config).to(memory_format=torch.channels_last)
        network(torch.rand(4, *shape))  # moves the statistics of BatchNorm
    folder.mkdir(exist_ok=True)
    state = {"config": dataclasses.asdict(config), "step": 7, "images": shape, "method": method.state_dict()}
    save_checkpoint(folder / "checkpoint.pt", state)
    return folder


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_torchvision()
    return a_run(tmp_path_factory.mktemp("resnet"), "resnet18", 3)


def features(encoder: nn.Module, channels: int, size: int = 48) -> torch.Tensor:
    images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        return encoder.eval()(images)


@pytest.mark.parametrize(
    ("name", "suffix", "classifier", "size"),
    [
        ("resnet18", ".pt", "fc", 64),
        ("resnet18", ".safetensors", "fc", 64),
        ("mobilenet_v3_small", ".pt", "classifier.3", 64),
        ("torchvision:vit_b_32", ".safetensors", "heads.head", 32),  # of one patch, to be quick
    ],
)
def test_torchvision_loads_a_file_and_has_the_same_features(
    name: str, suffix: str, classifier: str, size: int, tmp_path: Path
) -> None:
    need_torchvision()
    from torchvision.models import get_model

    run, file = a_run(tmp_path / "run", name, 3, size, method="simclr"), tmp_path / f"encoder{suffix}"
    about = export(run, file)
    if suffix == ".pt":
        weights = torch.load(file, weights_only=True)
    else:
        weights = pytest.importorskip("safetensors.torch").load_file(file)
    options = {"image_size": size} if "vit" in name else {}
    model = get_model(name.removeprefix("torchvision:"), weights=None, **options)
    missed = model.load_state_dict(weights, strict=False)
    keys = [f"{classifier}.weight", f"{classifier}.bias"]
    assert (missed.missing_keys, missed.unexpected_keys) == (keys, [])
    assert (about["encoder"], about["size"]) == (name, f"{size} x {size}")
    called = name.removeprefix("torchvision:") + ("(image_size=32)" if options else "")
    assert about["torchvision"] == f"{called} without {' and '.join(keys)}"
    model.set_submodule(classifier, nn.Identity())
    assert torch.equal(features(model, 3, size), features(trained_encoder(run)[0], 3, size))


@pytest.mark.parametrize(("name", "channels"), [("vit_tiny_patch16_224", 3), ("resnet18", 1)])
def test_timm_loads_a_file_of_its_network_and_has_the_same_features(name: str, channels: int, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    run = a_run(tmp_path / "run", f"timm:{name}", channels, 32)
    about = export(run, tmp_path / "encoder.pt")
    model = eval(f"timm.{about['timm']}", {"timm": timm})  # what the metadata say to call
    model.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    assert torch.equal(features(model, channels, 32), features(trained_encoder(run)[0], channels, 32))


def test_timm_loads_a_file_and_has_the_same_features(resnet_run: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    export(resnet_run, tmp_path / "encoder.pt")
    model = timm.create_model("resnet18", num_classes=0)
    model.load_state_dict(torch.load(tmp_path / "encoder.pt", weights_only=True))
    torch.testing.assert_close(features(model, 3), features(trained_encoder(resnet_run)[0], 3))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_weights_are_those_of_the_checkpoint(suffix: str, short_run: tuple[Path, object], tmp_path: Path) -> None:
    folder, _ = short_run
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    file = tmp_path / f"encoder{suffix}"
    about = export(folder, file)
    assert (about["method"], about["encoder"], about["dim"], about["steps"]) == ("moco", "conv", "128", "24")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["method"]
    weights = read_weights(file)
    assert weights.keys() == {name[8:] for name in state if name.startswith("encoder.")}
    assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in weights.items())
    again, _ = build_encoder("conv", 1, 8)
    load_weights(again, weights, str(file))
    assert torch.equal(features(again, 1), features(trained_encoder(folder)[0], 1))


def test_safetensors_say_what_they_hold(resnet_run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    export(resnet_run, tmp_path / "encoder.safetensors")
    with safetensors.safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        about = file.metadata()
    assert [about[key] for key in ("method", "encoder", "dim", "fastcl")] == ["byol", "resnet18", "512", __version__]
    assert (about["range"], json.loads(about["mean"]), json.loads(about["std"])) == ("0 to 1", [0.0] * 3, [1.0] * 3)
    assert about["torchvision"] == "resnet18 without fc.weight and fc.bias"


def test_a_stem_that_torchvision_has_not_is_named(tmp_path: Path) -> None:
    need_torchvision()
    about = export(a_run(tmp_path / "grey", "resnet18", 1), tmp_path / "grey.pt")
    assert "conv1.weight is (64, 1, 7, 7) in place of (64, 3, 7, 7)" in about["torchvision"]
    about = export(a_run(tmp_path / "small", "resnet18", 1, stem="cifar"), tmp_path / "small.pt")
    assert "(64, 1, 3, 3) in place of (64, 3, 7, 7)" in about["torchvision"] and "maxpool by" in about["torchvision"]
    with pytest.raises(TrainError, match=r"conv1\.weight \(64, 1, 7, 7\) in place of \(64, 3, 7, 7\)\); .* channels"):
        load_weights(build_encoder("resnet18", 3, 64)[0], read_weights(tmp_path / "grey.pt"), "grey.pt")


# It writes neither BatchNorm nor max-pooling with the onnx packages of today; fastcl then says that it could not.
needs_exporter = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot write .onnx files")


# The features are sums of at most 4,608 fp32 products, layer after layer; other orders of summation changed them by
# 3e-7 of the largest.
@needs_exporter
@pytest.mark.parametrize(("encoder", "channels"), [("conv", 1), ("resnet18", 3)])
def test_onnx_has_the_same_features_for_any_batch_and_size(encoder: str, channels: int, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    if encoder != "conv":
        need_torchvision()
    run, file = a_run(tmp_path / "run", encoder, channels), tmp_path / "encoder.onnx"
    about = export(run, file)
    session = runtime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == about
    trained, _ = trained_encoder(run)
    for shape in ((1, channels, 64, 64), (5, channels, 64, 64), (2, channels, 37, 80)):
        images = torch.rand(shape)
        (found,) = session.run(["features"], {"images": images.numpy()})
        with torch.no_grad():
            expected = trained(images)
        assert (torch.from_numpy(found) - expected).abs().max() < 3e-6 * expected.abs().max()


class Growing(nn.Module):
    """Decides by the size of its images, as networks with windows do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images).mean((2, 3))
        return 2 * features if images.shape[2] > 100 else features


@needs_exporter
@pytest.mark.parametrize("encoder", ["vit", "given", "conv"])
def test_onnx_has_the_size_free_only_where_the_network_is_the_same_for_another(encoder: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    if encoder == "vit":
        pytest.importorskip("timm")
        export(a_run(tmp_path / "run", "timm:vit_tiny_patch16_224", 1, 32), tmp_path / "encoder.onnx")
    elif encoder == "conv":
        export(a_run(tmp_path / "run", "conv", 1, 32), tmp_path / "encoder.onnx")
    else:
        export(a_run(tmp_path / "run", None, 1, 32, Growing()), tmp_path / "encoder.onnx", encoder=Growing())
    (images,) = onnx.load(tmp_path / "encoder.onnx").graph.input
    sides = [side.dim_param or side.dim_value for side in images.type.tensor_type.shape.dim]
    assert sides == (["batch", 1, "height", "width"] if encoder == "conv" else ["batch", 1, 32, 32])


@needs_exporter
def test_what_onnx_cannot_express_is_a_sentence(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)

    class Listing(Growing):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([image.sum().item() for image in images])[:, None]

    run = a_run(tmp_path / "run", None, 1, 8, Listing())
    with pytest.raises(TrainError, match=r"encoder given cannot be written as \.onnx .* Choose \.pt"):
        export(run, tmp_path / "encoder.onnx", encoder=Listing())


@pytest.mark.parametrize(
    ("torchvision", "detectron2"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer3.0.downsample.1.running_var", "res4.0.shortcut.norm.running_var"),
    ],
)
def test_names_of_detectron2(torchvision: str, detectron2: str) -> None:
    assert detectron2_name(torchvision) == detectron2


def test_a_file_for_detectron2_holds_every_weight(resnet_run: Path, tmp_path: Path) -> None:
    export(resnet_run, tmp_path / "encoder.pkl")
    content = pickle.loads((tmp_path / "encoder.pkl").read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"].startswith("fastcl")
    weights = {k: v for k, v in trained_encoder(resnet_run)[0].state_dict().items() if "num_batches" not in k}
    assert len(content["model"]) == len(weights) == 100
    for name, value in weights.items():
        assert torch.equal(torch.from_numpy(content["model"][detectron2_name(name)]), value), name


@pytest.mark.parametrize("name", ["resnet34", "resnext50_32x4d", "wide_resnet50_2", "mobilenet_v3_small"])
def test_which_networks_are_resnets(name: str) -> None:
    need_torchvision()
    weights = build_encoder(name, 3, 32)[0].state_dict()
    if name == "resnet34":
        assert resnet_name(weights, name) == name
    else:
        with pytest.raises(TrainError, match=rf"got {name}, whose tensors are no ResNet's"):
            resnet_name(weights, name)


def test_detectron2_takes_only_a_resnet(short_run: tuple[Path, object], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"encoder conv, whose tensors are no ResNet's .* --encoder resnet18"):
        export(short_run[0], tmp_path / "encoder.pkl")
    assert not list(tmp_path.iterdir())


def test_an_unknown_suffix_and_a_folder_without_a_run_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"got encoder\.tar; expected .* \.pt, \.safetensors, \.onnx, \.pkl"):
        export(tmp_path, tmp_path / "encoder.tar")
    with pytest.raises(TrainError, match=r"got no checkpoint\.pt"):
        export(tmp_path, tmp_path / "encoder.pt")


def test_files_that_hold_no_weights_are_sentences(tmp_path: Path, short_run: tuple[Path, object]) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    for file, sentence in (
        (tmp_path / "absent.pt", "cannot be read"),
        (tmp_path / "damaged.pt", "cannot be read"),
        (short_run[0] / "checkpoint.pt", "no state dict"),
        (tmp_path / "encoder.onnx", r"expected a \.pt or \.safetensors file"),
    ):
        with pytest.raises(TrainError, match=sentence):
            read_weights(file)


def test_weights_that_do_not_fit_are_listed() -> None:
    encoder, _ = build_encoder("conv", 1, 8)
    weights = {**encoder.state_dict(), "0.weight": torch.zeros(32, 3, 3, 3), "extra": torch.zeros(1)}
    del weights["5.bias"], weights["5.num_batches_tracked"]
    with pytest.raises(
        TrainError, match=r"missing: 5\.bias; unknown: extra; of another shape: 0\.weight \(32, 3, 3, 3\)"
    ):
        load_weights(encoder, weights, "FILE")


@pytest.mark.parametrize(("suffix", "package"), [(".safetensors", "safetensors"), (".onnx", "onnx")])
def test_a_missing_package_is_named(
    suffix: str, package: str, short_run: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf'{package} .* pip install "fastcl\[train\]"'):
        export(short_run[0], tmp_path / f"encoder{suffix}")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_file_and_says_what_it_is(
    short_run: tuple[Path, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "encoder.pt"
    assert cli.main(["export", str(short_run[0]), "--to", str(file)]) == 0
    out = capsys.readouterr().out
    assert str(file) in out and "moco" in out and "0 to 1" in out
    assert torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
    assert cli.main(["export", str(short_run[0]), "--to", str(tmp_path / "none" / "encoder.pt")]) == 2
    assert "Create" in capsys.readouterr().err
