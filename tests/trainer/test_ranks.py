"""Two ranks train what one process trains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shutil import rmtree

import pytest
import torch

from fastcl.trainer import TrainConfig, TrainError, train

from ..processes import together
from .runs import losses, metrics, need_torchvision, same_run
from .test_decoding import BROKEN, make_folder

SCRIPT = str(Path(__file__).parent / "run_of_ranks.py")
RUN = {"steps": 20, "batch_size": 48, "queue_size": 96, "probe_every": 20, "checkpoint_every": 20, "threads": 1}
# Some gradients are zero but for rounding: of biases of keys, and before BatchNorm. AdamW would make steps of them.
SGD = {"optimizer": "sgd", "learning_rate": 0.05}
CASES = {  # further options, dtype, largest relative distance of the weights
    "simclr": ({}, "float64", 1e-12),
    "moco": ({"chunk": 10}, "float64", 1e-12),
    "supcon": ({"accumulate": 2}, "float64", 1e-12),
    "triplet": ({}, "float64", 1e-12),
    "clip": (SGD | {"accumulate": 2, "chunk": 5, "text_width": 32}, "float64", 1e-12),
    "simclr, fp32, chunks": (SGD | {"chunk": 8}, "float32", 1e-6),
}
# Said by a rank of which the interpreter ends, seen once in some two hundred runs: of a thread of torch's, for those of
# fastcl are detached, and its group was destroyed before. The launcher then ends the other rank, too; it is run again.
ABORTED = "terminate called without an active exception"


@pytest.mark.parametrize("method", list(CASES))
def test_two_ranks_reach_the_weights_of_one_process(method: str, tmp_path: Path) -> None:
    options, dtype, tolerance = CASES[method]
    settings = RUN | options | {"method": method.partition(",")[0]}
    assert_two_are_one(tmp_path, [dtype, json.dumps(settings)], [dtype, json.dumps(settings)], tolerance)


def test_shuffled_keys_and_the_batchnorm_of_two_ranks_are_those_of_two_splits(tmp_path: Path) -> None:
    one, two = (["float64", json.dumps(RUN | SGD | {"method": "moco", "bn_splits": n}), "batchnorm"] for n in (2, 1))
    assert_two_are_one(tmp_path, one, two, 1e-12)


def torchrun(folder: Path) -> list[str]:
    """Arguments of Python before a script of two ranks, whose launcher writes into this folder alone."""
    logs = ["--log-dir", str(folder / "logs")]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *logs]


def assert_two_are_one(folder: Path, of_one: list[str], of_two: list[str], tolerance: float) -> None:
    """The run of one process ends with the weights and losses of that of two ranks."""
    one, two = folder / "one", folder / "two"
    commands = [[SCRIPT, str(one), *of_one], [*torchrun(folder), SCRIPT, str(two), *of_two]]
    done = together(commands, 120)
    if ABORTED in done[1][1]:
        rmtree(two)
        done[1] = together(commands[1:], 120)[0]
    for code, text in done:
        assert code == 0, text[-3000:]
    weights = [torch.load(run / "checkpoint.pt", weights_only=True)["method"] for run in (one, two)]
    for name, want in weights[0].items():
        if "running" not in name:  # statistics of the first rank, and the mean of two splits
            distance = (weights[1][name].double() - want.double()).norm()
            assert distance <= tolerance * max(float(want.double().norm()), 1.0), name
    curves = [losses(run) for run in (one, two)]
    assert curves[1] == pytest.approx(curves[0], rel=max(tolerance, 1e-7))


def test_what_one_rank_finds_broken_all_know(tmp_path: Path) -> None:
    """Probes, which the first rank makes alone, see 20 images of each half here, so it has to be told of others."""
    need_torchvision()
    make_folder(tmp_path / "data", 200, BROKEN)
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from fastcl.trainer import TrainConfig, probe, train\n"
        "probe._LIMIT = 20\n"
        "train(TrainConfig(output=sys.argv[1], **json.loads(sys.argv[2])))\n"
    )
    options = RUN | {"steps": 2, "probe_every": 2, "checkpoint_every": 2, "image_size": 8}
    given = json.dumps(options | {"data": "imagefolder", "data_dir": str(tmp_path / "data")})
    runs = [tmp_path / "one", tmp_path / "two"]
    two_ranks = [*torchrun(tmp_path), str(script), str(runs[1]), given]
    for code, text in together([[str(script), str(runs[0]), given], two_ranks], 120):
        assert code == 0, text[-3000:]
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True)["data"]["decoded"] for run in runs)
    assert torch.equal(one, two) and set(one.tolist()) == {0, 1, 2}
    listed = [json.loads((run / "skipped_images.json").read_text()) for run in runs]
    counted = [json.loads((run / "result.json").read_text())["skipped_images"] for run in runs]
    assert listed[0] == listed[1] and counted == [len(listed[0])] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_four_ranks_leave_together_resume_to_the_bit_and_skip_together(tmp_path: Path) -> None:
    """SIGTERM to one of them; a newest checkpoint that is damaged, or that one of them cannot read; NaN on one."""
    options = {"method": "moco", "queue_size": 96, "steps": 8, "batch_size": 48, "checkpoint_every": 3, "threads": 1}
    words = ["-W", "ignore", "-m", "tests.trainer.preempted", str(tmp_path), json.dumps(options | {"probe_every": 8})]
    ((code, printed),) = together([words], 200)
    assert code == 0, printed
    codes = {"whole": 0, "preempted": 143, "resumed": 0, "repaired": 0, "poisoned": 0}
    for name, expected in codes.items():
        assert f"{name} {[expected] * 4}" in printed, printed
    assert printed.count(f"Continue with: fastcl train --resume {tmp_path / 'cut'}") == 1, printed
    assert printed.count("It is now damaged-checkpoint.pt; previous-checkpoint.pt is used") == 1, printed
    assert (tmp_path / "damaged" / "damaged-checkpoint.pt").exists()
    assert not (tmp_path / "cut" / "damaged-checkpoint.pt").exists()
    for name in ("cut", "damaged"):
        same_run(tmp_path / name, tmp_path / "whole")
    rows = metrics(tmp_path / "poisoned")
    assert [row["skipped"] for row in rows] == ["", "views", "", "views", "", "", "", ""]
    assert [bool(row["loss"]) for row in rows] == [not row["skipped"] for row in rows]


def test_a_batch_that_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(TrainError, match="48 for 5 ranks; expected a multiple"):
        train(TrainConfig(batch_size=48))


def test_batchnorm_across_ranks_wants_gpus() -> None:
    with pytest.raises(TrainError, match="sync_batchnorm on the CPU"):
        train(TrainConfig(sync_batchnorm=True))
