"""Runs that are killed, poisoned or out of room, and checkpoints that are damaged: what is left is whole."""

import copy
import json
import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastcl.trainer import TrainConfig, TrainError, command, loop, resume, table, train
from fastcl.trainer.checkpoint import FORMAT, _leaves, load_checkpoint, save_checkpoint
from fastcl.trainer.data import load_data
from fastcl.trainer.guard import Guard
from fastcl.trainer.signals import requests

from ..processes import together
from .conftest import SHORT
from .runs import interrupt, metrics, need_torchvision, parse, same_run, same_state_of_runs
from .test_data import make_folder

CPU = torch.device("cpu")
SEED = random.randrange(2**31)  # another one every time; pytest shows it where a test fails


FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork, and no such signal, on Windows")
MOCO = {"method": "moco", "queue_size": 100}


def killed(folder: Path, kills: int, options: dict[str, Any]) -> list[str]:
    """What ``killed.py`` printed; all of its runs ended as they should."""
    words = [str(folder), str(SEED), str(kills), json.dumps(options)]
    ((code, printed),) = together([["-m", "tests.trainer.killed", *words]], 200)
    lines = printed.splitlines()
    assert code == 0, (SEED, printed)
    ends = [line for line in lines if line.startswith("ended")]
    assert ends == ["ended -9"] * kills + ["ended 3", "ended 0"], (SEED, printed)
    return lines


@FORKS
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    lines = killed(tmp_path, 20, MOCO | SHORT)
    full = tmp_path / "full_disk"
    (line,) = [line for line in lines if "checkpoint.pt cannot be written" in line]
    assert "[Errno 27] File too large" in line and f"fastcl train --resume {full}" in line, (SEED, lines)
    assert not list(full.glob("*.tmp"))
    assert load_checkpoint(full / "checkpoint.pt")["step"] == 8
    for folder in (tmp_path / "killed", full):
        result = resume(folder)
        same_run(folder, short_run[0])
        assert all(result[key] == short_run[1][key] for key in ("probe", "loss", "embeddings")), SEED
        assert not list(folder.glob("*.tmp"))
    # a log that had no room from step 3 on: it is said once, and made up for at the end
    for name in ("metrics.csv", "events.out"):
        (line,) = [line for line in lines if str(tmp_path / "full_log" / name) in line]
        assert "cannot be written ([Errno 27] File too large); the run goes on" in line, lines
    same_run(tmp_path / "full_log", short_run[0])
    assert json.loads((tmp_path / "full_log" / "result.json").read_text())["loss"] == short_run[1]["loss"]


@FORKS
def test_a_run_on_files_that_threads_decode_is_killed_as_well(tmp_path: Path) -> None:
    need_torchvision()
    make_folder(tmp_path / "images")
    options = {"data": "imagefolder", "data_dir": str(tmp_path / "images"), "image_size": 8, "batch_size": 8}
    options |= {"steps": 12, "probe_every": 12, "checkpoint_every": 8, "threads": 1}  # four epochs of three steps
    killed(tmp_path, 4, options)
    train(TrainConfig(output=str(tmp_path / "whole"), **options))
    for name in ("killed", "full_disk"):
        resume(tmp_path / name)
        same_run(tmp_path / name, tmp_path / "whole")


def test_logs_and_plots_that_cannot_be_written_do_not_stop_a_run(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_off(short_run[0], tmp_path)
    (folder / "metrics.csv").unlink()
    (folder / "metrics.csv").mkdir()
    (folder / "loss.png").unlink()
    (folder / "loss.png").symlink_to("/dev/full" if Path("/dev/full").exists() else tmp_path)
    result = resume(folder)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [str(folder / name) in line for name, line in zip(("metrics.csv", "loss.png"), warnings, strict=True)]
    assert all("cannot be written ([Errno " in line for line in warnings)
    assert result["loss"] == short_run[1]["loss"]
    (folder / "metrics.csv").rmdir()
    same_state_of_runs(folder, short_run[0])
    (folder / "result.json").unlink()
    resume(folder)  # of a run that has all of its steps: what was missing is made up for
    same_run(folder, short_run[0])


def test_a_result_that_cannot_be_written_is_a_sentence(short_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = cut_off(short_run[0], tmp_path)
    (folder / "result.json.tmp").mkdir()
    with pytest.raises(TrainError, match=rf"result\.json cannot be written .* fastcl train --resume {folder}"):
        resume(folder)


def cut_off(run: Path, tmp_path: Path) -> Path:
    """A copy of a run of which the last checkpoint and the result are lost."""
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    (folder / "result.json").unlink()
    (folder / "checkpoint.pt").unlink()
    return folder


def poison(monkeypatch: pytest.MonkeyPatch, what: str, steps: Collection[int]) -> list[int]:
    """Something of these steps is not finite; with micro-batches, only of the second.

    Returns:
        The step of every loss that will be computed.
    """

    def views(batch: Any) -> Any:
        def poisoned(config: Any, data: Any, step: int, *rest: Any) -> Any:
            views, labels = batch(config, data, step, *rest)
            now[0] = step
            if what == "views" and step in steps:
                views[0][-3] = math.nan
            return views, labels

        return poisoned

    def part(add_gradients: Any) -> Any:
        """Where there is one batch it is the first, of micro-batches the second."""

        def poisoned(method: Any, network: Any, *args: Any, **options: Any) -> Any:
            calls.append(now[0])
            poisonous = now[0] in steps and calls.count(now[0]) * options["share"] == 1

            def objective(labels: Any, *embeddings: Any) -> Any:
                losses.append(now[0])
                loss = type(method).objective(method, labels, *embeddings)
                if what == "gradients" and poisonous:
                    embeddings[0].register_hook(lambda grad: grad * math.nan)
                return loss * math.inf if what == "loss" and poisonous else loss

            def broken(*views: Any) -> Any:
                first, *others = network(*views)
                return first * math.inf, *others

            method.objective = objective
            return add_gradients(method, broken if what == "embeddings" and poisonous else network, *args, **options)

        return poisoned

    now, calls, losses = [0], list[int](), list[int]()
    monkeypatch.setattr(loop, "batch_of", views(loop.batch_of))
    monkeypatch.setattr(loop, "add_gradients", part(loop.add_gradients))
    return losses


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"chunk": 32}], ids=["whole", "accumulate", "chunk"])
@pytest.mark.parametrize("what", ["views", "embeddings", "loss", "gradients"])
@pytest.mark.filterwarnings("ignore:got an encoder with BatchNorm")
def test_a_batch_that_is_not_finite_changes_nothing(
    what: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MoCo has slow networks, a queue, and BatchNorm in both encoders."""
    config = TrainConfig(**MOCO, output=str(tmp_path), **SHORT, **options).resolved()
    data = load_data(config)
    method = loop.build_method(config, data)
    optimizer = loop.build_optimizer(config, method)
    guard = Guard(method)

    def step(number: int) -> float:
        views, labels = loop.batch_of(config, data, number, CPU)
        given = config.chunk, config.accumulate, config.precision, None, None, guard
        return loop._step(method, optimizer, views, labels, CPU, *given)[0]

    losses = poison(monkeypatch, what, [2])
    assert math.isfinite(step(1))
    before, optimized = copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    assert math.isnan(step(2)) and guard.bad == what
    assert losses.count(2) == config.accumulate - (what in ("views", "embeddings"))  # no loss has seen them
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    for at, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], optimized[at][name]) for name in state)
    assert math.isfinite(step(3)) and not guard.bad
    after = method.state_dict()
    unmoved = [name for name in after if torch.equal(after[name], before[name])]
    assert not unmoved


def test_a_run_skips_what_is_not_finite_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four batches in a row are skipped, and the run is cut off among them: with the fifth, they are not five."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    bad = (6, 7, 8, 9, 11)
    settings = {**MOCO, **SHORT, "steps": 14, "probe_every": 14, "checkpoint_every": 7}
    poison(monkeypatch, "views", bad)
    result = train(TrainConfig(output=str(whole), **settings))
    assert result["skipped_batches"] == 5 and "batches skipped, because they were not finite: 5" in table(result)
    said = capsys.readouterr().err
    assert [f"warning: step {step}: the views are not finite" in said for step in range(1, 15)] == [
        step in bad for step in range(1, 15)
    ]
    rows = metrics(whole)
    assert [(int(row["step"]), row["loss"]) for row in rows if row["skipped"]] == [(step, "") for step in bad]
    losses = [float(row["loss"]) for row in rows if not row["skipped"]]
    assert len(losses) == 9 and result["loss"] == pytest.approx(sum(losses) / 9)
    listed = [json.loads(line) for line in (whole / "skipped_batches.jsonl").open()]
    assert [(row["step"], row["not_finite"]) for row in listed] == [(step, "views") for step in bad]
    config = TrainConfig(output=str(whole), **settings).resolved()
    data = load_data(config)
    for row in listed:
        _, labels = loop.batch_of(config, data, row["step"], CPU)
        assert torch.equal(labels, data.train.labels[row["images"]])
    with monkeypatch.context() as patch:
        interrupt(patch, at=9)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(cut), **settings))
    assert load_checkpoint(cut / "checkpoint.pt")["step"] == 7
    resume(cut)
    same_run(cut, whole)
    assert (cut / "skipped_batches.jsonl").read_bytes() == (whole / "skipped_batches.jsonl").read_bytes()


def test_five_batches_in_a_row_stop_a_run_wherever_it_was_cut_off(
    short_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 14 to 18 are; the checkpoint of step 16 knows of three. What mends the batches mends the run."""
    folder = tmp_path / "run"
    stopped = (
        rf"got 5 batches in a row that are not finite, the last in step 18 \(its views\).*--learning-rate.*{folder}"
    )
    with monkeypatch.context() as patch:
        poison(patch, "views", range(14, 30))
        for run in (lambda: train(TrainConfig(output=str(folder), **MOCO, **SHORT)), lambda: resume(folder)):
            with pytest.raises(TrainError, match=stopped):
                run()
            assert load_checkpoint(folder / "checkpoint.pt")["step"] == 16
            steps = [json.loads(line)["step"] for line in (folder / "skipped_batches.jsonl").open()]
            assert steps == [14, 15, 16, 17, 18]
    (folder / "checkpoint.pt").unlink()
    resume(folder)  # from step 8
    same_run(folder, short_run[0])
    assert not (folder / "skipped_batches.jsonl").exists()


def test_a_run_without_any_finite_batch_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "loss", range(9))
    with pytest.raises(TrainError, match=r"got 2 batches in a row .* step 2 \(its loss\)"):
        train(TrainConfig(output=str(tmp_path / "run"), **SHORT | {"steps": 2}))


def test_an_overflow_of_fp16_is_left_to_the_scaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, "gradients", [2])
    settings = SHORT | {"steps": 3, "precision": "fp16", "batch_size": 8, "checkpoint_every": 1}
    result = train(TrainConfig(output=str(tmp_path / "run"), **settings))
    scales = [load_checkpoint(tmp_path / "run" / f"{name}.pt") for name in ("previous-checkpoint", "checkpoint")]
    assert result["skipped_batches"] == 0 and scales[1]["scaler"]["scale"] == 2.0**15  # it begins with 2 ** 16


@pytest.fixture
def heard() -> Iterator[None]:
    """Interrupts as at a terminal: what nohup or a shell's ``&`` starts ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step(
    number: int,
    code: int,
    short_run: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(number))
        with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
            train(TrainConfig(output=str(folder), **MOCO, **SHORT))
    assert isinstance(end.value, KeyboardInterrupt) if code == 130 else end.value.code == 143
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 5
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: signal.raise_signal(number))
        assert command.run(parse("--resume", str(folder))) == code
    assert f"fastcl train --resume {folder}" in capsys.readouterr().err
    assert load_checkpoint(folder / "checkpoint.pt")["step"] == 7
    resume(folder)
    same_run(folder, short_run[0])


@pytest.mark.usefixtures("heard")
def test_a_second_interrupt_does_not_wait_for_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a launcher's: nothing more
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            ended.append("at once")

    at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(output=str(tmp_path / "run"), **SHORT))
    assert ended and not (tmp_path / "run" / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_left_alone_outside_the_main_thread_and_where_they_are_ignored() -> None:
    inside = []

    def other_thread() -> None:
        with requests(insist=True):
            inside.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)))

    before = list(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)))
    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert inside == before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with requests(insist=True) as request:
            signal.raise_signal(signal.SIGTERM)
        assert not request.received and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])


@pytest.mark.usefixtures("heard")
def test_a_signal_that_came_too_late_for_a_step_is_handed_on() -> None:
    with pytest.raises(KeyboardInterrupt), requests(insist=True) as request:
        signal.raise_signal(signal.SIGINT)
        assert request.received == signal.SIGINT


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Acts at the beginning of a step."""
    rate = loop.learning_rate

    def asked(config: TrainConfig, step: int) -> float:
        if step == number:
            act()
        return rate(config, step)

    monkeypatch.setattr(loop, "learning_rate", asked)


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
