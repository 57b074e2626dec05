"""Published settings, and the ways to start from them or from another run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import PRESETS, TrainConfig, TrainError, command, load_config, preset
from fastcl.trainer.methods import MoCoV3
from fastcl.trainer.models import run_encoder
from fastcl.trainer.optimization import learning_rate

from .conftest import SHORT
from .runs import parse, same_run


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_config_that_can_start_and_names_its_source(name: str) -> None:
    found = PRESETS[name]
    config = found.config.resolved()
    assert len(found.source) > 20 and found.measure
    assert found.accuracy is None or 50 < found.accuracy < 100
    assert config.warmup_steps is None or config.warmup_steps < config.steps


def test_every_preset_that_was_promised_is_there() -> None:
    assert list(PRESETS) == [
        "digits", "fashion-mnist", "simclr-cifar10", "moco-cifar10", "byol-cifar10",
        "simclr-r50", "moco-v1-r50", "moco-v2-r50", "moco-v3-r50", "moco-v3-vit-s", "moco-v3-vit-b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "peak"),
    [
        ("simclr-cifar10", 97_000, 970, 2.0),
        ("moco-cifar10", 77_600, 0, 0.06),
        ("byol-cifar10", 77_600, 0, 0.06),
        ("simclr-r50", 31_200, 3_120, 4.8),
        ("moco-v1-r50", 1_000_800, 0, 0.03),
        ("moco-v2-r50", 1_000_800, 0, 0.03),
        ("moco-v3-r50", 93_600, 3_120, 4.8),
        ("moco-v3-vit-s", 93_600, 12_480, 2.4e-3),
        ("moco-v3-vit-b", 93_600, 12_480, 2.4e-3),
    ],
)
def test_epochs_and_rates_are_those_of_the_sources(name: str, steps: int, warmup: int, peak: float) -> None:
    config = preset(name)
    assert (config.steps, config.warmup_steps) == (steps, warmup)
    assert max(learning_rate(config, step) for step in (1, max(warmup, 1), steps)) == pytest.approx(peak, rel=1e-6)


@pytest.mark.parametrize(("name", "library"), [("moco-v3-vit-s", "timm"), ("moco-v3-vit-b", "torchvision")])
def test_a_vit_of_moco_v3_freezes_its_patches_and_has_the_heads_of_the_code(name: str, library: str) -> None:
    pytest.importorskip(library)
    config = preset(name, hidden=32, dim=8)
    encoder, features = run_encoder(config, (3, 32, 32), None)  # 16 times fewer patches than ImageNet's, to be quick
    assert features == {"moco-v3-vit-s": 384, "moco-v3-vit-b": 768}[name]
    still = [key for key, value in encoder.named_parameters() if not value.requires_grad]
    patches = {"timm": "patch_embed.proj", "torchvision": "conv_proj"}[library]
    assert still == [f"{patches}.weight", f"{patches}.bias"]
    method = MoCoV3(torch.nn.Identity(), features, config)
    for head, layers in ((method.head, 3), (method.target_head, 3), (method.predictor, 2)):
        kinds = [type(layer).__name__ for layer in head]
        assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * (layers - 1) + ["Linear", "BatchNorm1d"]
        assert [layer.out_features for layer in head if isinstance(layer, torch.nn.Linear)] == [32] * (layers - 1) + [8]
        assert not head[-1].affine


def test_moco_v1_drops_its_rate_after_120_and_160_epochs() -> None:
    config = preset("moco-v1-r50")
    epoch = config.steps // 200
    rates = [learning_rate(config, epoch * n + 1) for n in (119, 120, 159, 160)]
    assert rates == pytest.approx([0.03, 0.003, 0.003, 0.0003])


def test_a_preset_gives_way_to_settings() -> None:
    base = preset("simclr-r50")
    changed = preset("simclr-r50", steps=10, warmup_steps=1, data_dir="x")
    assert changed == dataclasses.replace(base, steps=10, warmup_steps=1, data_dir="x") != base
    with pytest.raises(TrainError, match=r"preset 'simclr-r51'; expected one of digits, "):
        preset("simclr-r51")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Configs that the command would have trained."""
    configs: list[TrainConfig] = []

    def stop(config: TrainConfig) -> None:
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", stop)
    return configs


def test_flags_win_over_set_and_both_over_a_preset(started: list[TrainConfig]) -> None:
    words = ["--preset", "moco-v2-r50", "--set", "temperature=0.1", "--set", "queue_size=128", "--temperature", "0.3"]
    words += ["--set", "exclude-norm-bias=true", "--set", "warmup_steps=null", "--set", "control=shuffled-pairs"]
    assert command.run(parse(*words)) == 130
    expected = preset(
        "moco-v2-r50", temperature=0.3, queue_size=128, exclude_norm_bias=True, warmup_steps=None,
        control="shuffled-pairs",
    )  # fmt: skip
    assert started == [expected]


def test_set_alone_changes_the_defaults(started: list[TrainConfig]) -> None:
    assert command.run(parse("--set", "steps=3", "--set", "compile=false")) == 130
    assert started == [TrainConfig(steps=3)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--set", "steps"], "got --set steps; expected KEY=VALUE"),
        (["--set", "pace=3"], "got --set pace=3; expected KEY=VALUE with a key of config.json"),
        (["--set", "steps=many"], "got --set steps=many; expected int"),
        (["--set", "compile=1"], "got --set compile=1; expected true or false"),
        (["--set", "steps=null"], "got steps = None; expected int"),
        (["--set", "method=null"], "got method = None; expected str"),
        (["--preset", "resnet"], "got preset 'resnet'"),
        (["--config", "no-such-file.json"], "no-such-file.json cannot be read"),
        (["--resume", "runs/x", "--set", "steps=3"], "got --set with --resume"),
    ],
)
def test_a_setting_that_cannot_be_is_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(TrainError) as error:
        command.run(parse(*words))
    assert sentence in str(error.value)


@pytest.mark.parametrize("both", [("preset", "config"), ("preset", "resume"), ("config", "resume")])
def test_a_run_starts_from_one_thing(both: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--{both[0]}", "x", f"--{both[1]}", "y")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "cannot be read"), ("[1]", "got no settings in"), ('{"pace": 1}', "got the settings pace in")],
)
def test_a_file_that_is_no_config_is_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TrainError, match=sentence):
        load_config(tmp_path / "config.json")


def test_the_config_of_a_run_replays_it(short_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = short_run
    config = load_config(folder / "config.json")
    assert config.output == f"{folder}-replay" and not config.overwrite
    replay = tmp_path / "replay"
    file = str(folder / "config.json")
    assert command.run(parse("--config", file, "--output", str(replay), "--json", str(tmp_path / "r.json"))) == 0
    same_run(replay, folder)
    assert json.loads((tmp_path / "r.json").read_text())["probe"] == result["probe"]


def test_a_config_that_overwrote_does_not_overwrite_again(tmp_path: Path) -> None:
    written = dataclasses.asdict(TrainConfig(overwrite=True, output="runs/elsewhere", **SHORT))
    (tmp_path / "mine.json").write_text(json.dumps(written))
    assert load_config(tmp_path / "mine.json") == TrainConfig(output="runs/elsewhere", **SHORT)
    assert load_config(tmp_path / "mine.json", overwrite=True).overwrite


def test_the_accuracy_of_digits_is_that_of_the_record() -> None:
    record = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "digits.json").read_text())
    few10 = [row["probe"]["trained"]["few10"]["mean"] for row in record["rows"] if row["method"] == "simclr"]
    assert PRESETS["digits"].accuracy == round(math.fsum(few10) / len(few10), 1)
