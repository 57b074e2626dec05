"""Runs that are killed, poisoned or out of room, and checkpoints that are damaged: what is left is whole."""

import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import TrainConfig, TrainError, loop, resume, train
from fastcl.trainer.checkpoint import FORMAT, _leaves, load_checkpoint, save_checkpoint

from ..processes import together
from .conftest import SHORT
from .test_run import same_run

SEED = random.randrange(2**31)  # another one every time; pytest shows it where a test fails


@pytest.mark.skipif(not hasattr(sys, "abiflags"), reason="there is no fork, and no such signal, on Windows")
def test_a_run_that_is_killed_four_times_ends_as_if_it_had_not_been(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    ((code, printed),) = together([["-m", "tests.trainer.killed", str(tmp_path), str(SEED)]], 100)
    assert code == 0, (SEED, printed)
    ends = [line for line in printed.splitlines() if line.startswith("ended")]
    assert ends == ["ended -9"] * 4 + ["ended 3"], (SEED, printed)
    killed, full = tmp_path / "killed", tmp_path / "full"
    assert load_checkpoint(killed / "checkpoint.pt")["step"] == 16
    for words in ("cannot be written ([Errno 27] File too large)", f"fastcl train --resume {full}"):
        assert words in printed, (SEED, printed)
    assert not list(full.glob("*.tmp"))
    assert load_checkpoint(full / "checkpoint.pt")["step"] == 8
    for folder in (killed, full):
        result = resume(folder)
        same_run(folder, short_run[0])
        assert all(result[key] == short_run[1][key] for key in ("probe", "loss", "embeddings")), SEED
        assert not list(folder.glob("*.tmp"))


def test_a_loss_that_is_no_number_leaves_the_last_checkpoint(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch is NaN in step 13; without it the run goes on from step 8 as if nothing had been."""
    batch = loop._batch

    def poisoned(config: Any, data: Any, step: int, *rest: Any) -> Any:
        views, labels = batch(config, data, step, *rest)
        if step == 13:
            views[0][3] = math.nan
        return views, labels

    folder = tmp_path / "run"
    config = TrainConfig(method="moco", queue_size=100, output=str(folder), **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_batch", poisoned)
        with pytest.raises(TrainError, match=rf"loss became nan at step 13; .* --learning-rate .* is in {folder}"):
            train(config)
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 8
    resume(folder)
    same_run(folder, short_run[0])


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of step 16 is a number, what its update leaves is not: step 17 would be the first to tell."""
    step, steps = loop._step, iter(range(1, 1000))

    def poisoned(method: Any, *args: Any) -> Any:
        result = step(method, *args)
        if next(steps) == 16:
            with torch.no_grad():
                method.encoder[0].weight[0, 0, 0, 0] = math.inf
        return result

    monkeypatch.setattr(loop, "_step", poisoned)
    folder = tmp_path / "run"
    with pytest.raises(TrainError, match=r"got state\..*encoder\.0\.weight.* not finite; .* --learning-rate"):
        train(TrainConfig(output=str(folder), **SHORT))
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 8


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    tensors = {"a": torch.randn(3, 5, generator=generator), "b": torch.tensor(step), "c": torch.ones(2).bfloat16()}
    return {"step": step, "method": tensors, "history": [{"loss": 0.1, "knn": None}], "empty": []}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    pairs = list(zip(_leaves(one), _leaves(other), strict=True))
    return all(a[0] == b[0] and same(a[1], b[1]) for a, b in pairs)


def test_every_flipped_bit_and_every_cut_is_refused_or_harmless(tmp_path: Path) -> None:
    """Some bytes of the file round the content, such as its padding, mean nothing."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state(1))
    whole, draw = path.read_bytes(), random.Random(SEED)
    assert same_state(load_checkpoint(path), {"format": FORMAT, **state(1)})
    refused = 0
    for at in [draw.randrange(8 * len(whole)) for _ in range(300)]:
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert same_state(load_checkpoint(path), {"format": FORMAT, **state(1)}), (SEED, at)
        except TrainError:
            refused += 1
    assert refused > 30, SEED
    for length in [draw.randrange(len(whole)) for _ in range(20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(TrainError, match="cannot be read"):
            load_checkpoint(path)


def test_a_flipped_bit_of_a_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, state(1))
    content = bytearray(path.read_bytes())
    at = content.index(state(1)["method"]["a"].numpy().tobytes())
    content[at + 7] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["method"]["a"], state(1)["method"]["a"])
    with pytest.raises(TrainError, match="does not match its digest"):
        load_checkpoint(path)


def test_the_checkpoint_before_is_used_where_the_last_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2, 3):
        save_checkpoint(path, state(step))
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "previous-checkpoint.pt"}
    assert load_checkpoint(path)["step"] == 3
    path.write_bytes(path.read_bytes()[:-100])
    assert load_checkpoint(path)["step"] == 2
    assert "cannot be read" in (warning := capsys.readouterr().err) and "previous-checkpoint.pt is used" in warning
    assert load_checkpoint(path)["step"] == 2  # now that the damaged one is out of the way, without a word
    assert capsys.readouterr().err == ""
    save_checkpoint(path, state(4))
    path.unlink()
    assert load_checkpoint(path)["step"] == 2  # the damaged one has not pushed it out
    save_checkpoint(path, state(5))
    for file in tmp_path.glob("*checkpoint.pt"):
        file.write_bytes(b"")
    with pytest.raises(TrainError, match=r"/checkpoint\.pt cannot be read"):
        load_checkpoint(path)


def test_a_run_goes_on_from_the_checkpoint_before(short_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(short_run[0], tmp_path / "copy"))
    (folder / "result.json").unlink()
    newest = folder / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert resume(folder)["loss"] == short_run[1]["loss"]
    same_run(folder, short_run[0])
    train(TrainConfig(output=str(folder), overwrite=True, **SHORT | {"steps": 1}))
    assert not list(folder.glob("*-checkpoint.pt"))  # nothing of the run before is left
