"""A run from end to end: its folder, its repeatability, and what it refuses."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl import reference
from fastcl.trainer import TrainConfig, TrainError, command, loop, resume, table, train
from fastcl.trainer.checkpoint import load_checkpoint, save_checkpoint
from fastcl.trainer.config import SECTIONS
from fastcl.trainer.data import Images, load_data
from fastcl.trainer.errors import MissingPackage
from fastcl.trainer.methods import METHODS, SimCLR
from fastcl.trainer.progress import Progress

from .conftest import SHORT
from .runs import block_torchvision, interrupt, losses, metrics, parse, same_run


def test_the_run_folder_is_complete(short_run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = short_run
    names = {path.name for path in folder.iterdir()}
    pictures = {"loss.png", "probe.png", "embedding.png"}
    assert {"config.json", "checkpoint.pt", "metrics.csv", "result.json"} | pictures <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") for name in names)
    for name in pictures:
        data = (folder / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    config = TrainConfig(**json.loads((folder / "config.json").read_text()))
    assert (config.method, config.steps, config.temperature) == ("moco", 24, 0.5)


def test_the_result_has_the_promised_keys(short_run: tuple[Path, dict[str, Any]]) -> None:
    folder, returned = short_run
    result = json.loads((folder / "result.json").read_text())
    assert result == returned
    assert [result[k] for k in ("method", "dataset", "seed", "steps")] == ["moco", "digits", 0, 24]
    assert set(result["probe"]) == {"raw", "random", "trained"}
    for probe in result["probe"].values():
        assert set(probe) == {"knn", "linear", "few10", "few1"}
        assert set(probe["few10"]) == set(probe["few1"]) == {"mean", "std"}
        accuracies = [probe["knn"], probe["linear"], probe["few10"]["mean"], probe["few1"]["mean"]]
        assert all(30 < accuracy <= 100 for accuracy in accuracies)  # chance is 10
    assert 88 < result["probe"]["raw"]["few10"]["mean"] < 92
    assert 0 < result["loss_share"] < 1 and result["seconds"] > 0
    assert result["loss_peak_bytes"]["fastcl"] > 0 and result["loss_peak_bytes"]["dense"] > 0
    assert set(result["versions"]) == {"fastcl", "torch", "python"} and result["threads"] == 1
    text = table(result)
    for words in ("raw pixels", "random init", "trained", "kNN", "share of a step", "peak memory", "±"):
        assert words in text


def test_metrics_follow_every_step(short_run: tuple[Path, dict[str, Any]]) -> None:
    folder, result = short_run
    rows = metrics(folder)
    assert [int(row["step"]) for row in rows] == list(range(1, 25))
    assert [int(row["step"]) for row in rows if row["few10"]] == [12, 24]
    assert result["loss"] == pytest.approx(sum(float(row["loss"]) for row in rows) / 24)
    assert float(rows[-1]["few10"]) == result["probe"]["trained"]["few10"]["mean"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert max(rates) == 3e-3 and rates[0] == 3e-3 and 0 < rates[-1] < 1e-4  # one step of warm-up, then a cosine


def test_events_hold_the_metrics(short_run: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(short_run[0]))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 25))
    assert [event.step for event in events.Scalars("few10")] == [12, 24]


def test_the_checkpoint_holds_tensors_and_plain_containers(short_run: tuple[Path, dict[str, Any]]) -> None:
    state = torch.load(short_run[0] / "checkpoint.pt", weights_only=True)
    assert state["step"] == 24 and state["config"]["method"] == "moco"
    assert "loss.queue.features" in state["method"] and "encoder.0.weight" in state["method"]


@pytest.mark.parametrize("stop", [3, 13, 20])
def test_a_resumed_run_ends_as_if_it_had_not_stopped(
    stop: int, short_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, result = short_run
    config = TrainConfig(method="moco", queue_size=100, output=str(tmp_path / "run"), **SHORT)
    with monkeypatch.context() as patch:
        interrupt(patch, at=stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = tmp_path / "run"
    assert not (folder / "result.json").exists()
    if stop < SHORT["checkpoint_every"]:
        with pytest.raises(TrainError, match=r"no checkpoint\.pt"):
            resume(folder)
        return
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == stop // 8 * 8
    resumed = resume(folder)
    same_run(folder, whole)
    assert (resumed["probe"], resumed["loss"]) == (result["probe"], result["loss"])
    assert resume(folder) == resumed  # a finished run is left alone


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, result = short_run
    torch.manual_seed(123)  # the global generator has no say, and is left alone
    before = torch.get_rng_state()
    config = TrainConfig(method="moco", queue_size=100, output=str(tmp_path / "again"), **SHORT)
    again = train(config)
    assert torch.equal(before, torch.get_rng_state())
    same_run(tmp_path / "again", whole)
    assert (again["probe"], again["loss"]) == (result["probe"], result["loss"])
    other = train(TrainConfig(method="moco", seed=1, output=str(tmp_path / "other"), **SHORT | {"steps": 2}))
    assert other["loss"] != again["loss"]


@pytest.mark.parametrize(
    "other",
    [
        {"optimizer": "sgd", "learning_rate": 0.3},
        {"optimizer": "lars", "learning_rate": 0.3},
        {"precision": "bf16", "accumulate": 2, "exclude_norm_bias": True},
    ],
    ids=lambda other: next(iter(other.values())),
)
def test_other_ways_to_train_resume_as_well(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SHORT | {"steps": 10, "probe_every": 10} | other
    train(TrainConfig(output=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        interrupt(patch, at=9)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(tmp_path / "cut"), **settings))
    resume(tmp_path / "cut")
    same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_scale_of_fp16_gradients_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SHORT | {"steps": 3, "precision": "fp16", "batch_size": 8, "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(tmp_path / "run"), **settings))
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    save_checkpoint(path, state | {"scaler": state["scaler"] | {"scale": 32.0}})
    resume(tmp_path / "run")
    assert load_checkpoint(path)["scaler"]["scale"] == 32


def test_a_compiled_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole of torch.compile but its last step, C++, which takes half a minute here and is torch's to test.
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))
    settings = SHORT | {"method": "moco", "steps": 2, "probe_every": 2}
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    compiled = train(TrainConfig(compile=True, output=str(tmp_path / "compiled"), **settings))
    assert counted["unique_graphs"] > before
    eager = train(TrainConfig(output=str(tmp_path / "eager"), **settings))
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    a, b = (load_checkpoint(tmp_path / run / "checkpoint.pt")["method"] for run in ("compiled", "eager"))
    assert list(a) == list(b)  # what a compiled run leaves can be read by any other


def test_the_loop_follows_the_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        method="byol", momentum=0.5, momentum_schedule="cosine", lr_scaling="linear", warmup_steps=0,
        output=str(tmp_path / "run"), **SHORT | {"steps": 4},
    )  # fmt: skip
    step, seen = loop._step, []

    def spy(method: Any, optimizer: torch.optim.Optimizer, *args: Any) -> tuple[float, float]:
        seen.append((method.momentum, optimizer.param_groups[0]["lr"]))
        return step(method, optimizer, *args)

    monkeypatch.setattr(loop, "_step", spy)
    train(config)
    assert seen == [(loop.slow_momentum(config, t), loop.learning_rate(config, t)) for t in (1, 2, 3, 4)]
    assert len({momentum for momentum, _ in seen}) == 4


def test_views_are_a_function_of_seed_and_step() -> None:
    digits = load_data(TrainConfig())
    one = Images(torch.zeros(8), lambda at: digits.train.read(torch.zeros_like(at)))  # the same image 8 times
    data = dataclasses.replace(digits, train=one)

    def view(seed: int, step: int) -> torch.Tensor:
        return loop.batch_of(TrainConfig(seed=seed, batch_size=4), data, step, torch.device("cpu"))[0][0]

    assert torch.equal(view(0, 1), view(0, 1))
    for other in (view(0, 2), view(0, 3), view(1, 1)):  # steps 1 and 2 are one epoch, 3 is the next
        assert not torch.equal(view(0, 1), other)


def test_a_step_has_as_many_views_as_asked_and_a_control_mixes_all() -> None:
    data, cpu = load_data(TrainConfig()), torch.device("cpu")
    config = TrainConfig(batch_size=6, local_crops=3, local_size=4)
    views, _ = loop.batch_of(config, data, 2, cpu)
    assert [tuple(view.shape) for view in views] == [(6, 1, 8, 8)] * 2 + [(6, 1, 4, 4)] * 3
    mixed, _ = loop.batch_of(dataclasses.replace(config, control="shuffled-pairs"), data, 2, cpu)
    for number, (view, other) in enumerate(zip(views, mixed, strict=True)):
        assert torch.equal(view.roll(number, 0), other)


def test_a_run_with_local_crops_learns(tmp_path: Path) -> None:
    crops = {"local_crops": 2, "local_size": 4}
    train(TrainConfig(output=str(tmp_path / "run"), **crops, **SHORT))
    curve = losses(tmp_path / "run")
    assert len(curve) == 24 and sum(curve[-4:]) / 4 < sum(curve[:4]) / 4 - 0.2


def test_simclr_learns_and_the_control_does_not(tmp_path: Path) -> None:
    settings = SHORT | {"steps": 30, "probe_every": 30}
    chance = math.log(2 * 64 - 1)
    real = train(TrainConfig(output=str(tmp_path / "real"), **settings))
    control = train(TrainConfig(output=str(tmp_path / "control"), control="shuffled-pairs", **settings))
    last = losses(tmp_path / "real")[-1]
    assert last < chance - 0.8 and control["loss"] > chance - 0.05
    assert control["probe"]["trained"]["few10"]["mean"] < real["probe"]["trained"]["few10"]["mean"]


def test_the_fused_loss_trains_as_the_dense_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dense(SimCLR):
        def objective(self, labels: torch.Tensor, *embeddings: torch.Tensor) -> torch.Tensor:
            return self.formula(reference, labels, *embeddings)

    curves = []
    for name, method in (("fused", SimCLR), ("dense", Dense)):
        monkeypatch.setitem(METHODS, "simclr", method)
        train(TrainConfig(output=str(tmp_path / name), temperature=0.1, **SHORT))
        curves.append(losses(tmp_path / name))
    assert curves[0] == pytest.approx(curves[1], abs=1e-3) and curves[0][-1] < curves[0][0] - 0.5


def test_a_run_without_training_keeps_its_random_weights(tmp_path: Path) -> None:
    config = TrainConfig(method="moco", control="no-training", output=str(tmp_path / "run"), **SHORT | {"steps": 3})
    result = train(config)
    trained = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["method"]
    untrained = loop.build_method(config, load_data(config))
    for name, parameter in untrained.named_parameters():
        close = (0.0, 0.0) if parameter.requires_grad else (1e-6, 1e-6)  # the key encoder: a lerp of equal numbers
        torch.testing.assert_close(trained[name], parameter, atol=close[0], rtol=close[1])
    assert not torch.equal(trained["loss.queue.features"], untrained.loss.queue.features)
    assert result["control"] == "no-training"


def test_a_frozen_queue_does_not_move_and_the_encoder_does(tmp_path: Path) -> None:
    config = TrainConfig(
        method="moco", queue_size=100, control="frozen-queue", output=str(tmp_path / "run"), **SHORT | {"steps": 3}
    )
    train(config)
    trained = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["method"]
    untrained = loop.build_method(config, load_data(config)).state_dict()
    for name in ("loss.queue.features", "loss.queue.pointer"):
        assert torch.equal(trained[name], untrained[name])
    assert not torch.equal(trained["encoder.0.weight"], untrained["encoder.0.weight"])


def test_a_folder_with_a_run_is_not_overwritten_unasked(short_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = short_run
    before = (folder / "result.json").read_bytes()
    with pytest.raises(TrainError, match=r"finished run; .* --overwrite"):
        train(TrainConfig(output=str(folder)))
    assert (folder / "result.json").read_bytes() == before
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match=r"interrupted run; .* replace the run with --overwrite$"):
        train(TrainConfig(output=str(other)))  # there is nothing to resume
    (other / "previous-checkpoint.pt").write_bytes(b"")
    with pytest.raises(TrainError, match=r"interrupted run; .* --resume"):
        train(TrainConfig(output=str(other)))
    (other / "result.json").write_text("{}")
    result = train(TrainConfig(output=str(other), overwrite=True, **SHORT | {"steps": 1}))
    assert json.loads((other / "result.json").read_text()) == result
    assert (other / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.ones(1000)})
    assert load_checkpoint(path)["step"] == 1
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TrainError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(TrainError, match="of format 99"):
        load_checkpoint(path)
    torch.save({"format": 1, "step": Path("an object of any class could run code")}, path)
    with pytest.raises(TrainError, match="cannot be read"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": 2, "bad": lambda: None})
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_a_missing_extra_is_named_before_training(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # makes `import package` raise ImportError
    with pytest.raises(MissingPackage, match=rf'{package} .* pip install "fastcl\[train\]"'):
        train(TrainConfig(output=str(tmp_path / "run"), **SHORT))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "dino"}, "one of simclr, moco"),
        ({"data": "mnist"}, "one of digits"),
        ({"encoder": "vgg"}, "got encoder 'vgg'; expected conv, .* Near it: "),
        ({"control": "none"}, "one of shuffled-pairs, no-training, frozen-queue"),
        ({"local_crops": 2, "method": "moco"}, "local_crops = 2 for moco; expected .*: simclr, supcon"),
        ({"local_crops": -1}, "local_crops = -1; expected 0 or more"),
        ({"local_crops": 1, "local_size": 0}, "local_size = 0; expected 1 or more"),
        ({"control": "frozen-queue"}, "'frozen-queue' for simclr; expected moco"),
        ({"steps": 0}, "steps = 0; expected 1 or more"),
        ({"threads": 0}, "threads = 0; expected 1 or more"),
        ({"temperature": 0.0}, "temperature = 0.0; expected a finite number above 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"optimizer": "adam"}, "one of adamw, sgd, lars"),
        ({"lr_scaling": "cubic"}, "one of none, linear, sqrt"),
        ({"lr_schedule": "flat"}, "one of cosine, steps"),
        ({"momentum_schedule": "flat"}, "one of constant, cosine"),
        ({"steps": "10"}, "steps = '10'; expected int"),
        ({"chunk": 8.0}, "chunk = 8.0; expected int or None"),
        ({"head": "cubic"}, "one of mlp, linear"),
        ({"stem": "tiny"}, "one of imagenet, cifar"),
        ({"dim": 0}, "dim = 0; expected 1 or more"),
        ({"head_layers": 1}, "head_layers = 1; expected 2 or more"),
        ({"head": "linear", "head_layers": 3}, "head_layers = 3 for a linear head; expected an mlp"),
        ({"method": "byol", "predictor_norm": True}, "predictor_norm for byol; expected moco-v3"),
        ({"freeze_patch_embedding": True}, "freeze_patch_embedding for the encoder conv; expected one that begins"),
        ({"encoder": "given"}, r"encoder = 'given' without a module; expected .* train\(config, encoder=module\)"),
        ({"stem": "cifar"}, "stem = 'cifar' for the encoder conv; expected a ResNet"),
        ({"hidden": 0}, "hidden = 0; expected 1 or more"),
        ({"margin": -1.0}, "margin = -1.0; expected a finite number, 0 or more"),
        ({"precision": "fp8"}, "one of fp32, bf16, fp16"),
        ({"accumulate": 0}, "accumulate = 0; expected 1 or more"),
        ({"accumulate": 3}, "accumulate = 3 for a batch size of 256; expected equal micro-batches"),
        ({"accumulate": 4, "batch_size": 4}, "accumulate = 4 for a batch size of 4"),
        ({"warmup_steps": -1}, "warmup_steps = -1; expected 0 or more"),
        ({"warmup_steps": 20, "steps": 10}, "warmup_steps = 20 for 10 steps"),
        ({"weight_decay": -1e-4}, "weight_decay = -0.0001; expected a finite number, 0 or more"),
        ({"momentum": 1.5}, "momentum = 1.5; expected 0 to 1"),
        ({"device": "toaster"}, "device 'toaster'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=sentence):
        train(TrainConfig(**{"output": str(tmp_path / "run"), **settings}))
    assert not (tmp_path / "run").exists()


def test_the_command_trains_without_torchvision_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block_torchvision(monkeypatch, ImportError("blocked"))
    run, file = str(tmp_path / "run"), tmp_path / "result.json"
    args = parse("--steps", "2", "--batch-size", "32", "--threads", "1", "--output", run, "--json", str(file))
    assert command.run(args) == 0
    out, err = capsys.readouterr()
    assert "raw pixels" in out and run in out
    assert "step 2/2: loss" in err
    assert json.loads(file.read_text()) == json.loads((tmp_path / "run" / "result.json").read_text())
    assert command.run(parse("--resume", run, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_resume_takes_no_other_setting(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="got --steps, --seed with --resume"):
        command.run(parse("--resume", str(tmp_path), "--seed", "1", "--steps", "5"))


def test_an_interrupted_command_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    way_on = f"Continue with: fastcl train --resume {tmp_path / 'run'}"
    words = ["--batch-size", "32", "--threads", "1", "--checkpoint-every", "1", "--output", str(tmp_path / "run")]
    for at, said in ((1, "No step was saved."), (2, way_on)):  # before and after the first checkpoint
        with monkeypatch.context() as patch:
            interrupt(patch, at=at)
            assert command.run(parse(*words, "--overwrite")) == 130
        assert f"\nInterrupted. {said}\n" in capsys.readouterr().err


def test_flags_and_fields_have_the_same_defaults_and_types() -> None:
    assert set(SECTIONS) < {f.name for f in dataclasses.fields(TrainConfig)}  # groups of --help
    assert not [name for name in vars(parse()) if name not in ("resume", "preset", "config", "set", "json")]
    args = parse("--steps", "3", "--temperature", "0.1", "--download", "--data-dir", "x", "--threads", "2")
    assert (args.steps, args.temperature, args.download, args.data_dir, args.threads) == (3, 0.1, True, "x", 2)


def test_where_nobody_watches_progress_is_a_line_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 4.9, 5.1, 6.0, 10.2])
    monkeypatch.setattr("fastcl.trainer.progress.time.monotonic", lambda: next(clock))
    with Progress(100, 0, torch.device("cpu")) as progress:
        for step in range(1, 6):
            progress.update(step, 1.5, 10.0, 0.1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3/100", "step 5/100"]
    assert re.search(r"loss 1.500, 10 images/s, loss share 10%, memory \d+\.\d\d GiB, 165 s left", lines[0])


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(10, 4, torch.device("cpu")) as progress:
        progress.update(10, 1.5, 10.0, 0.1)
    assert "10/10" in capsys.readouterr().err
