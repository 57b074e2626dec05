"""``--init``: every network of a run starts from the weights that were asked for, or the run does not start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from fastcl.trainer import TrainConfig, TrainError, export, resume, train
from fastcl.trainer.checkpoint import load_checkpoint, save_checkpoint
from fastcl.trainer.data import load_data
from fastcl.trainer.export import start_from
from fastcl.trainer.loop import build_method
from fastcl.trainer.models import build_encoder

from .conftest import SHORT
from .runs import need_torchvision


@pytest.fixture(scope="module")
def exported(short_run: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "encoder.pt"
    export(short_run[0], file)
    return file


def test_every_network_of_a_method_starts_from_the_file(exported: Path) -> None:
    config = TrainConfig(method="moco").resolved()
    method, weights = build_method(config, load_data(config), str(exported)), torch.load(exported, weights_only=True)
    random = build_method(config, load_data(config))
    for name in ("encoder", "key_encoder"):
        found = method.get_submodule(name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert not torch.equal(random.encoder[0].weight, method.encoder[0].weight)
    assert torch.equal(random.head[0].weight, method.head[0].weight)  # the heads are those of the seed


def test_a_run_goes_on_from_the_file_and_its_baseline_is_random(
    exported: Path, short_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    few = SHORT | {"steps": 1, "learning_rate": 1e-6}
    started = train(TrainConfig(init=str(exported), output=str(tmp_path / "started"), **few))
    first = load_checkpoint(tmp_path / "started" / "checkpoint.pt")["method"]["encoder.0.weight"]
    moved = (first - torch.load(exported, weights_only=True)["0.weight"]).abs().max()
    assert 0 < moved < 2e-6  # a step of AdamW is at most its learning rate, and the decay
    assert started["probe"]["random"] == short_run[1]["probe"]["random"]


def test_a_resumed_run_does_not_start_again(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = SHORT | {"steps": 2, "checkpoint_every": 1}
    train(TrainConfig(init=str(exported), output=str(folder), **settings))
    state = load_checkpoint(folder / "checkpoint.pt")
    gone = dataclasses.replace(TrainConfig(**state["config"]), init=str(tmp_path / "gone.pt"), steps=3)
    save_checkpoint(folder / "checkpoint.pt", state | {"config": dataclasses.asdict(gone)})
    (folder / "result.json").unlink()
    assert resume(folder)["steps"] == 3


def test_weights_that_do_not_fit_stop_the_run_before_its_folder_is_made(exported: Path, tmp_path: Path) -> None:
    need_torchvision()
    with pytest.raises(
        TrainError, match=r"--init .*encoder\.pt do not fit .*missing: conv1\.weight.*unknown: 0\.weight"
    ):
        train(TrainConfig(init=str(exported), encoder="resnet18", output=str(tmp_path / "run"), **SHORT))
    with pytest.raises(TrainError, match=r"none\.pt cannot be read"):
        train(TrainConfig(init=str(tmp_path / "none.pt"), output=str(tmp_path / "run"), **SHORT))
    assert not (tmp_path / "run").exists()


def test_torchvision_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_torchvision()
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.random.fork_rng(devices=[]):
        # as torchvision's older files: with the classifier, without the step counters of BatchNorm
        weights = {k: v for k, v in resnet18(weights=None).state_dict().items() if "num_batches" not in k}
        encoder, _ = build_encoder("resnet18", 3, 64)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name)
    assert not torch.equal(encoder.get_parameter("conv1.weight"), weights["conv1.weight"])
    start_from(encoder, "torchvision:resnet18")
    found = encoder.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items() if not name.startswith("fc."))
    with pytest.raises(TrainError, match=r"conv1\.weight \(64, 3, 7, 7\) in place of \(64, 1, 7, 7\)"):
        start_from(build_encoder("resnet18", 1, 64)[0], "torchvision:resnet18")


def test_without_a_network_the_way_round_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_torchvision()

    def unreachable(*args: object, **options: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(
        TrainError, match=r"resnet18-.*\.pth cannot be had .*not known.*hub/checkpoints, .* --init FILE"
    ):
        start_from(build_encoder("resnet18", 3, 64)[0], "torchvision:resnet18")


@pytest.mark.parametrize(
    ("init", "sentence"),
    [
        ("torchvision:resnet19", "torchvision.* Near it: resnet1"),
        ("timm:resnet19", r"network of timm\. Near it: timm:"),
    ],
)
def test_a_name_that_a_library_has_not_is_refused(init: str, sentence: str) -> None:
    pytest.importorskip(init.partition(":")[0])
    with pytest.raises(TrainError, match=f"got encoder '{init}'; expected .*{sentence}"):
        start_from(torch.nn.Identity(), init)
