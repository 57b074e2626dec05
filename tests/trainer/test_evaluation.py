"""``fastcl evaluate``: the figures of a checkpoint, of a run that has ended and of one that has not."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl import cli
from fastcl.trainer import TrainConfig, TrainError, loop, train
from fastcl.trainer.checkpoint import load_checkpoint
from fastcl.trainer.data import Images, load_data
from fastcl.trainer.evaluation import evaluate, fine_tune
from fastcl.trainer.probe import Prober, knn

from .conftest import SHORT
from .runs import interrupt

CPU = torch.device("cpu")


@pytest.fixture
def run(short_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the short run's folder."""
    return Path(shutil.copytree(short_run[0], tmp_path / "copy"))


def test_the_probes_of_a_finished_run_are_those_of_its_result(
    run: Path, short_run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert cli.main(["evaluate", str(run), "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("moco on digits, seed 0: step 24 of 24", "raw pixels", "random init", "trained", "fine-tuned", "kNN"):
        assert words in out
    written = (run / "evaluation.json").read_bytes()
    result = json.loads(written)
    for name, probe in short_run[1]["probe"].items():
        found = result["accuracy"][name]
        assert all(found[key] == probe[key] for key in ("linear", "few10", "few1")), name
        assert ("fine_tune" in found) == (name != "raw")
    config = TrainConfig(**json.loads((run / "config.json").read_text()))
    raw = Prober(load_data(config), loop.generator("probe")).features(None, CPU)
    assert result["accuracy"]["raw"]["knn"] == knn(raw) != short_run[1]["probe"]["raw"]["knn"]  # of 200, not 20
    assert cli.main(["evaluate", str(run), "--epochs", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert (run / "evaluation.json").read_bytes() == written
    assert all(path.read_bytes() == content for path, content in before.items())


def test_one_probe_leaves_the_others(run: Path) -> None:
    assert list(evaluate(run, "linear")["accuracy"]["trained"]) == ["linear"]
    second = evaluate(run, "few-label")
    assert set(second["accuracy"]["raw"]) == {"linear", "few10", "few1"}
    assert json.loads((run / "evaluation.json").read_text()) == second
    other = json.loads((run / "evaluation.json").read_text()) | {"step": 8}
    (run / "evaluation.json").write_text(json.dumps(other))
    assert set(evaluate(run, "knn")["accuracy"]["raw"]) == {"knn"}  # another step's figures are another encoder's


def test_an_interrupted_run_is_evaluated_at_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(output=str(tmp_path / "run"), **SHORT)
    with monkeypatch.context() as patch:
        interrupt(patch, at=13)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    result = evaluate(tmp_path / "run", "linear")
    assert (result["step"], result["steps"]) == (8, 24)
    state, data = load_checkpoint(tmp_path / "run" / "checkpoint.pt"), load_data(config)
    method = loop.build_method(config, data)
    method.load_state_dict(state["method"])
    prober = Prober(data, loop.generator("probe"))
    assert result["accuracy"]["trained"]["linear"] == prober.all(prober.features(method.encoder, CPU))["linear"]


def test_fine_tuning_learns_the_labels_it_sees_and_leaves_the_encoder_alone() -> None:
    config = TrainConfig(batch_size=128)
    data = load_data(config)
    encoder = loop.build_method(config, data).encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    right = fine_tune(encoder, data, config, 8, CPU)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert right > 85 and right == fine_tune(encoder, data, config, 8, CPU)
    shuffled = data.train.labels[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))]
    wrong = dataclasses.replace(data, train=Images(shuffled, data.train.read))
    assert fine_tune(encoder, wrong, config, 8, CPU) < 30
    hidden = data.train.labels.clone()
    hidden[hidden >= 2] = -1  # images without a label are not looked at
    of_two = fine_tune(encoder, dataclasses.replace(data, train=Images(hidden, data.train.read)), config, 20, CPU)
    assert 17 < of_two < 21  # two classes of ten


def test_what_cannot_be_evaluated_is_a_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(tmp_path / "none")]) == 2
    assert "got no checkpoint.pt" in capsys.readouterr().err
    for options, sentence in (
        ({"probe": "dense"}, "got probe 'dense'; expected one of knn, linear"),
        ({"epochs": 0}, "got epochs = 0; expected 1 or more"),
        ({"device": "toaster"}, "device 'toaster'"),
    ):
        with pytest.raises(TrainError, match=sentence):
            evaluate(run, **options)
    assert not (run / "evaluation.json").exists()
