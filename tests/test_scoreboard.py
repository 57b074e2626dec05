"""The scoreboard: every promise has a proof that is there, and a failure cannot pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scoreboard
from benchmarks.promises import PROMISES, Promise

ROOT = Path(__file__).parents[1]
VACUOUS = """
import pytest, torch
from tests.oracle import assert_close, error

RIGHT = torch.tensor([[1.0, 2.0], [3.0, -5.0], [0.5, 0.25]])

def test_close():
    assert_close(RIGHT * 1.000001, RIGHT, 1e-5)

def test_far():
    assert_close(RIGHT, RIGHT, 0.5)

def test_nothing():
    assert_close(1e-7 * RIGHT, 1e-7 * RIGHT, 1e-5, floor=1e-3)

def test_error():
    assert error(RIGHT, RIGHT) < 2.0 and error(RIGHT, RIGHT) <= 1e-5

def test_torch():
    torch.testing.assert_close(RIGHT, RIGHT)
    assert torch.allclose(RIGHT, RIGHT, atol=1.0) and torch.isclose(RIGHT, RIGHT).all()

def test_approx():
    assert 3.0 == pytest.approx(3.0) and 3.0 == pytest.approx(3.01, rel=0.02)

def test_of_wrong_results_is_left_alone():
    with pytest.raises(AssertionError):
        assert_close(2 * RIGHT, RIGHT, 1e-5)
    assert not error(2 * RIGHT, RIGHT) < 0.5 and not torch.allclose(2 * RIGHT, RIGHT)

@pytest.mark.skip(reason="no GPU")
def test_skipped(): ...
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the plugin saw of good and of vacuous assertions."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "test_some.py").write_text(VACUOUS, encoding="utf-8")
    words = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "tests.planted", "--planted-json", "seen.json"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "test_some.py"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "7 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    found = json.loads((folder / "seen.json").read_text())
    return {node.partition("::test_")[2]: test for node, test in found.items()}


def accepted(test: dict[str, Any]) -> set[str]:
    return {wrong.rpartition(": ")[2] for wrong in test["accepted"]}


def test_an_assertion_that_a_wrong_result_would_pass_is_found(seen: dict[str, dict[str, Any]]) -> None:
    assert accepted(seen["close"]) == set() and seen["close"]["asked"] == 1 and seen["close"]["planted"]["zero"] == 1
    assert accepted(seen["far"]) >= {"1 % large", "halved"} and "negated" not in accepted(seen["far"])
    assert accepted(seen["nothing"]) >= {"zero", "negated", "doubled", "one row off"}
    assert not accepted(seen["nothing"]) & {"one NaN", "one inf"}
    assert seen["error"]["asked"] == 2 and "zero" in accepted(seen["error"])
    assert all("error" in wrong for wrong in seen["error"]["accepted"])
    assert seen["torch"]["asked"] == 3 and accepted(seen["torch"]) >= {"1 % large"}
    assert all("allclose" in wrong for wrong in seen["torch"]["accepted"])
    assert seen["approx"]["asked"] == 2 and accepted(seen["approx"]) == {"1 % large"}
    assert seen["of_wrong_results_is_left_alone"]["asked"] == 0


def test_a_row_fails_where_a_test_fails_or_accepts_a_wrong_result(seen: dict[str, dict[str, Any]]) -> None:
    good = scoreboard.of_tests([seen["close"], seen["skipped"]])
    assert good["outcome"] == "pass" and good["skipped"] == {"Skipped: no GPU": 1}
    assert good["figure"].startswith("1 tests; 1 comparisons, ") and good["figure"].endswith("refused")
    assert 5e-7 < good["largest_error_by_bound"]["1e-05"] < 2e-6
    assert scoreboard.of_tests([seen["close"], seen["far"]])["outcome"] == "fail"
    assert scoreboard.of_tests([{**seen["close"], "outcome": "failed"}])["outcome"] == "fail"
    assert scoreboard.of_tests([seen["skipped"]])["outcome"] == "not run"


@pytest.mark.parametrize(
    ("code", "outcome", "figure"),
    [(0, "pass", "3.5 ms"), (3, "fail", "exit code 3: 3.5 ms")],
)
def test_a_command_passes_with_exit_code_0(code: int, outcome: str, figure: str) -> None:
    found = scoreboard.of_command(f"python -c \"print('first'); print('3.5 ms'); raise SystemExit({code})\"")
    assert found == {"outcome": outcome, "figure": figure}


def test_what_needs_a_gpu_is_not_run_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    board = tmp_path / "board.json"
    assert scoreboard.main(["--only", "18g,9g", "--json", str(board)]) == 0
    rows = json.loads(board.read_text())["rows"]
    assert [(row["row"], row["outcome"]) for row in rows] == [("18g", "not run"), ("9g", "not run")]
    assert all(row["date"] and row["machine"]["cpu"] and row["command"] for row in rows)


def test_rows_that_are_not_asked_for_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoreboard, "proved", lambda promises, workers: [
        {"row": p.row, "outcome": "fail" if p.row == "2" else "pass", "figure": "new"} for p in promises
    ])  # fmt: skip
    board = tmp_path / "board.json"
    board.write_text(json.dumps({"rows": [{"row": "11", "figure": "old"}, {"row": "1", "figure": "old"}]}))
    assert scoreboard.main(["--only", "1", "--json", str(board)]) == 0
    assert [(row["row"], row["figure"]) for row in json.loads(board.read_text())["rows"]] == [
        ("1", "new"),
        ("11", "old"),
    ]
    assert scoreboard.main(["--only", "2", "--json", str(board)]) == 1


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.row)
def test_every_promise_has_a_proof_that_is_there(promise: Promise) -> None:
    assert sum(map(bool, (promise.tests, promise.command, promise.record))) == 1
    assert promise.needs_gpu == promise.row.endswith("g")
    for node in promise.tests:
        file, _, test = node.partition("::")
        assert (ROOT / file).exists(), node
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), node
    assert not promise.record or promise.record in scoreboard.RECORDS


def test_the_board_in_the_making_is_not_judged() -> None:
    assert scoreboard.OF_THE_BOARD.endswith(f"::{test_the_board_has_every_row_and_none_that_failed.__name__}")


def test_the_board_has_every_row_and_none_that_failed() -> None:
    assert len({promise.row for promise in PROMISES}) == len(PROMISES)
    rows = {row["row"]: row for row in json.loads(scoreboard.BOARD.read_text(encoding="utf-8"))["rows"]}
    assert rows.keys() == {promise.row for promise in PROMISES}
    wrong = {row["row"]: row["figure"] for row in rows.values() if row["outcome"] == "fail"}
    assert not wrong
    idle = {row["row"] for row in rows.values() if row["outcome"] == "not run"}
    assert idle <= {promise.row for promise in PROMISES if promise.needs_gpu}


def test_belonging() -> None:
    assert scoreboard.belongs("tests/a.py::test_b[1-2]", "tests/a.py::test_b")
    assert scoreboard.belongs("tests/a.py::test_b", "tests/a.py") and scoreboard.belongs("tests/x/a.py::t", "tests/x")
    assert not scoreboard.belongs("tests/a.py::test_bc", "tests/a.py::test_b")
