"""Side by side: every contender computes one loss, and who is wrong, slow, hungry or missing is recorded as that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import render
from fastcl import _compare, _peers, cli, reference
from fastcl._compare import Settings, largest_batch
from fastcl._measure import peak_bytes
from fastcl._peers import LOSSES, PEERS, Inputs, Peer, problem

from .oracle import assert_close

TINY = Settings(
    peers=("nt_xent",), rows=(16, 34), dim=9, device="cpu", rounds=2, queue=40, backends=("chunked",), compile=False
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare, "_ERROR_ROWS", 16)


def quiet(line: str) -> None:
    pass


def plant(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], **about: Any) -> None:
    """One peer, which computes NT-Xent like this, in place of those that are installed."""

    def losses(module: Any, of: Inputs) -> Callable[..., Tensor]:
        return lambda z: function(z, temperature=of.temperature)

    peer = Peer("planted", object, {"nt_xent": losses}, **about)
    monkeypatch.setattr(_peers, "PEERS", planted := {"planted": peer})
    monkeypatch.setattr(_compare, "PEERS", planted)


# --- who is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_every_contender_computes_the_same(loss: str) -> None:
    task = problem(loss, 24, 16, columns=40)
    want = task.ours(*task.leaves)
    want_grads = torch.autograd.grad(want, task.leaves)
    assert "eager" in task.others
    for name, function in task.others.items():
        got = function(*task.leaves)
        assert_close(got, want, 1e-5, what=name)
        for leaf, g, w in zip(task.leaves, torch.autograd.grad(got, task.leaves), want_grads, strict=True):
            assert_close(along_the_sphere(leaf, g), along_the_sphere(leaf, w), 1e-4, what=name)


def along_the_sphere(rows: Tensor, grad: Tensor) -> Tensor:
    """Some libraries normalise rows themselves, so that their gradient has no part along a row of length 1."""
    rows = rows.detach()
    return grad - rows * (rows * grad).sum(1, keepdim=True) if rows.ndim == 2 else grad


def test_who_is_said_to_normalise_does() -> None:
    """Twice as long rows: the loss of a contender that normalises them does not change."""
    for loss in LOSSES:
        task = problem(loss, 24, 16, columns=40)
        longer = [2 * t if t.ndim else t for t in task.leaves]
        for name in task.others.keys() & PEERS.keys():
            same = torch.allclose(task.others[name](*longer), task.others[name](*task.leaves), rtol=1e-4)
            assert same == (loss in PEERS[name].normalizes), (loss, name)


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ValueError, match="got loss = 'clap'; expected one of 'nt_xent'"):
        problem("clap", 4, 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_easy_positives_have_a_cosine_of_99_hundredths(loss: str) -> None:
    task = problem(loss, 40, 64, columns=10, temperature=1.0, easy=True)
    inputs: Inputs = task.exact.args[2]
    first = task.leaves[0]
    if loss == "supcon":
        same = (inputs.labels[:, None] == inputs.labels).fill_diagonal_(False)
        cosines, others = (first @ first.T)[same], (first @ first.T)[~same.fill_diagonal_(True)]
    else:
        one, other = first.chunk(2) if loss == "nt_xent" else (first, inputs.keys if loss == "moco" else task.leaves[1])
        cosines, others = (one * other).sum(1), (one @ other.T)[~torch.eye(len(one), dtype=torch.bool)]
    assert len(cosines) > 3 and abs(cosines.mean() - 0.99) < 0.005 and abs(others.mean()) < 0.05


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_a_wrong_and_slow_contender_is_recorded_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda z, temperature: 1.01 * reference.nt_xent(z, temperature=temperature))

    def seconds(steps: dict[str, Any], rounds: int, device: object) -> dict[str, list[float]]:
        return {name: [3.0 if name == "planted" else 1.5] * rounds for name in steps}

    monkeypatch.setattr(_compare, "interleaved_seconds", seconds)
    result = _compare.run(replace(TINY, call_seconds=1000), quiet)
    for row in result["rows"]:
        planted = row["contender"] == "planted"
        assert row["of_eager"] == (2 if planted else 1)
        for error in (row["loss_error"], row["gradient_error"]):
            assert error == pytest.approx(0.01, rel=1e-3) if planted else error < 1e-5
    wrong = [row for row in result["errors"] if row["contender"] == "planted" and row["dtype"] == "float32"]
    assert len(wrong) == 6 and all(row["gradient_error"] == pytest.approx(0.01, rel=1e-3) for row in wrong)


def test_a_contender_that_normalises_is_held_to_the_loss_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def normalising(z: Tensor, temperature: float) -> Tensor:
        return reference.nt_xent(z.double(), temperature=temperature, normalize=True).float()

    worst = {}
    for said in ((), ("nt_xent",)):
        plant(monkeypatch, normalising, normalizes=said)
        rows = next(g for g in _compare.accuracy("nt_xent", TINY, torch.device("cpu")) if g[0]["contender"] == "planted"
                    and g[0]["dtype"] == "float32")  # fmt: skip
        worst[said] = max(row["gradient_error"] for row in rows)
    assert worst["nt_xent",] < 1e-6 < worst[()]


def test_what_raises_or_is_not_finite_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def choosy(z: Tensor, temperature: float) -> Tensor:
        if len(z) == 34 or z.dtype == torch.float16:
            raise RuntimeError("these rows\nare too many")
        return reference.nt_xent(z, temperature=temperature) / (z.dtype != torch.bfloat16)

    plant(monkeypatch, choosy)
    result = _compare.run(TINY, quiet)
    json.dumps(result, allow_nan=False)
    skipped = {row["rows"]: row["skipped"] for row in result["rows"] if row["contender"] == "planted"}
    assert skipped == {16: None, 34: "RuntimeError: these rows"}
    assert all(row["median_seconds"] > 0 for row in result["rows"] if row["contender"] != "planted")
    failed = {row["dtype"]: row["failed"] for row in result["errors"] if row["contender"] == "planted"}
    assert failed["float16"] == "RuntimeError: these rows" and failed["float32"] is None
    assert failed["bfloat16"] == "not finite: loss_error, gradient_error"


def test_who_is_missing_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> None:
        raise ModuleNotFoundError("No module named 'nowhere'")

    monkeypatch.setattr(_peers, "PEERS", {"nowhere": Peer("no-where", nowhere, {"nt_xent": lambda m, of: m})})
    lines: list[str] = []
    result = _compare.run(TINY, lines.append)
    assert result["missing"] == {"nowhere": "ModuleNotFoundError: No module named 'nowhere'"}
    assert result["peers"] == {"no-where": None}
    assert "not here: nowhere (ModuleNotFoundError: No module named 'nowhere')" in lines
    assert "nowhere" not in {row["contender"] for row in result["rows"]}


def test_a_contender_that_would_need_too_much_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noting(z: Tensor, temperature: float) -> Tensor:
        sizes.append(len(z))
        return reference.nt_xent(z, temperature=temperature)

    plant(monkeypatch, noting, cubic=("nt_xent",))
    limit = 12 * 16**3 * 4 / 1e9  # what a contender of 16 rows, seen nowhere before, may need
    rows = _compare.times("nt_xent", replace(TINY, dense_limit_gb=limit), torch.device("cpu"))
    assert next(row for row in rows if row["contender"] == "planted")["skipped"] is None
    sizes.clear()
    rows = _compare.times("nt_xent", replace(TINY, dense_limit_gb=limit / 2), torch.device("cpu"))
    found = {(row["rows"], row["contender"]): row["skipped"] for row in rows}
    assert "the limit is" in found[16, "planted"] and "the limit is" in found[34, "planted"] and not sizes
    assert found[16, "eager"] is None and found[34, "fastcl chunked"] is None


# --- the largest batch ----------------------------------------------------------------------------------------------


def test_the_largest_batch_of_a_known_memory_is_found() -> None:
    def probe(n: int) -> tuple[int, float]:
        return peak_bytes(lambda: torch.empty(n, n, dtype=torch.uint8)), 0.0

    found = largest_batch(probe, 1000**2, call_seconds=1)
    assert found["limited_by"] == "memory" and 1000 - 1000 // 32 <= found["rows"] <= 1000
    assert found["peak_bytes"] == found["rows"] ** 2
    assert largest_batch(probe, 64**2 - 1, 1) == {"rows": None, "peak_bytes": None, "limited_by": "memory"}


def test_the_search_ends_early_and_says_why() -> None:
    assert largest_batch(lambda n: (n, n / 256), 10**9, call_seconds=4) == {
        "rows": 512, "peak_bytes": 512, "limited_by": "time",
    }  # fmt: skip
    assert largest_batch(lambda n: (n, 0.0), 10**12, call_seconds=4)["limited_by"] == "size"

    def fragile(n: int) -> tuple[int, float]:
        if n > 100:
            raise RuntimeError("at most 100 rows")
        return n, 0.0

    assert largest_batch(fragile, 10**9, 1) == {
        "rows": 64, "peak_bytes": 64, "limited_by": "RuntimeError: at most 100 rows",
    }  # fmt: skip


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_measures_every_loss_and_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    words = "--rows 16 --dim 9 --rounds 2 --device cpu --queue 40 --no-compile --memory-mb 0.1 --call-seconds 0.05"
    file, folder = tmp_path / "peers.json", tmp_path / "plots"
    assert cli.main(["bench", "--peers", *words.split(), "--json", str(file), "--plots", str(folder)]) == 0
    result = json.loads(file.read_text())
    assert result["command"].startswith(f"fastcl bench --peers {','.join(LOSSES)} --rows 16 --dim 9 ")
    assert "--no-compile" in result["command"]
    assert {"date", "commit", "versions", "peers", "missing", "machine", "settings"} <= set(result)
    keys = {
        "rows": "loss rows columns contender seconds median_seconds of_eager peak_bytes loss_error gradient_error"
        " skipped",
        "errors": "loss dtype temperature batch contender loss_error gradient_error number_error failed",
        "largest": "loss contender rows peak_bytes limited_by",
    }
    for part, names in keys.items():
        assert {row["loss"] for row in result[part]} == set(LOSSES)
        assert all(set(row) == set(names.split()) for row in result[part]), part
        for loss in LOSSES:
            here = {row["contender"] for row in result[part] if row["loss"] == loss}
            theirs = {name for name in PEERS if loss in PEERS[name].losses and name not in result["missing"]}
            assert here >= {"eager", "fastcl chunked"} | theirs
    drawn = {path.name for path in folder.iterdir()}
    dtypes = ("float32", "bfloat16", "float16")
    assert drawn == {f"{loss}{what}.png" for loss in LOSSES for what in ("", *(f"-errors-{t}" for t in dtypes))}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_contenders_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, peers=("moco",), rows=(16,), compile=True)
    rows = {row["contender"]: row for row in _compare.times("moco", settings, torch.device("cpu"))}
    assert rows["torch.compile, eager"]["skipped"] is None
    assert rows["torch.compile, eager"]["gradient_error"] < 1e-5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--peers", "nt"], "got loss after --peers = 'nt'; expected one of 'nt_xent'"),
        (["--peers", "--backends", "fast"], "got backend = 'fast'; expected one of"),
        (["--peers", "--rows", "5"], "got rows = 5; expected an even number"),
        (["--peers", "--memory-mb", "0"], "got memory_mb = 0; expected more than 0"),
        (["--peers", "--call-seconds", "nan"], "got call_seconds = nan; expected more than 0"),
        (["--peers", "--queue", "0"], "got queue = 0; expected 1 or more"),
        (["--peers", "--loss", "clip"], "got --loss with --peers; expected"),
        (["--peers", "--plot", "x.png"], "got --plot with --peers; expected"),
        (["--memory-mb", "9"], "got --memory-mb; expected --peers beside it"),
        (["--no-compile"], "got --no-compile; expected --peers beside it"),
        (["--plots", "x"], "got --plots; expected --peers beside it"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"fastcl bench: {expected}") and captured.err.count("\n") == 1


def test_the_table_has_a_line_for_every_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda z, temperature: reference.nt_xent(z, temperature=temperature) / (temperature != 0.01))
    for budget in (None, 0.1):
        result = _compare.run(replace(TINY, memory_mb=budget, call_seconds=1000), quiet)
        table = render.peers(json.loads(json.dumps(result)))
        lines = [line for line in table.splitlines() if line.startswith("| nt_xent")]
        assert [line.split("|")[3].strip() for line in lines] == ["eager", "cross-entropy", "planted", "fastcl chunked"]
        assert lines[2].count("not finite") == 2 and ("largest batch in 0.1 MB" in table) == (budget is not None)
