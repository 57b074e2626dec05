"""The report of regressions sees one, by ratio to eager in the same run, and only that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import regressions

FIGURES = {  # loss and contender: seconds, bytes
    ("clip", "dense"): (4.0, 1000),
    ("clip", "cross-entropy"): (3.0, 800),
    ("clip", "native"): (1.0, 100),
    ("clip", "chunked"): (2.0, 50),
    ("dcl", "dense"): (3.0, 900),
    ("dcl", "native"): (1.5, 90),
    ("byol", "native"): (1.0, 10),  # its dense form was skipped
}


def run(machine: float = 1.0, rows: int = 2048, **changed: Any) -> dict[str, Any]:
    """As pytest-benchmark writes it; a machine is so many times slower."""
    figures = FIGURES | changed.pop("figures", {})
    return {
        "benchmarks": [
            {
                "group": loss,
                "stats": {"min": machine * seconds},
                "options": {"timer": "process_time"},
                "extra_info": {
                    "contender": name, "peak_bytes": peak, "rows": rows, "dim": 128, "device": "cpu", "threads": 1,
                },
            }
            for (loss, name), (seconds, peak) in figures.items()
        ],
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789", "dirty": True},
        "machine_info": {"node": "secret-host"},
    }  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A run, and the baseline that was stored of it."""
    measured, baseline = tmp_path / "run.json", tmp_path / "baseline.json"
    measured.write_text(json.dumps(run()))
    assert regressions.main([str(measured), "--baseline", str(baseline), "--store"]) == 0
    return measured, baseline


def compared(files: tuple[Path, Path], now: dict[str, Any]) -> int:
    files[0].write_text(json.dumps(now))
    return regressions.main([str(files[0]), "--baseline", str(files[1])])


def test_what_is_stored_are_ratios_and_no_host(files: tuple[Path, Path]) -> None:
    text = files[1].read_text()
    stored = json.loads(text)
    assert "secret-host" not in text and stored["commit"] == "0123456-dirty" and stored["date"] == "2026-01-02"
    assert {(row["loss"], row["contender"]): (row["time"], row["memory"]) for row in stored["rows"]} == {
        ("clip", "native"): (0.25, 0.1),
        ("clip", "chunked"): (0.5, 0.05),
        ("dcl", "native"): (0.5, 0.1),
    }


def test_a_slower_machine_is_no_regression(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(files, run(machine=7.0)) == 0
    assert "0 of 6 ratios grew by more than 25%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "code", "word"),
    [((1.24, 100), 0, ""), ((1.26, 100), 1, "SLOWER"), ((1.0, 126), 1, "HUNGRIER"), ((0.5, 50), 0, "")],
)
def test_more_than_a_quarter_is_flagged(
    files: tuple[Path, Path], figure: tuple[float, int], code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(files, run(figures={("clip", "native"): figure})) == code
    flagged = [line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line or "HUNGRIER" in line]
    assert len(flagged) == code and all(word in line and "clip" in line and "native" in line for line in flagged)


def test_what_is_missing_is_named(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    now = run(figures={("clip", "triton"): (1.0, 1)})
    now["benchmarks"] = [b for b in now["benchmarks"] if b["group"] != "dcl"]
    assert compared(files, now) == 0
    out = capsys.readouterr().out
    assert "not measured now: dcl native\n" in out and "not stored: clip triton\n" in out


def test_nothing_to_compare_does_not_pass(files: tuple[Path, Path]) -> None:
    now = run()
    now["benchmarks"] = [b for b in now["benchmarks"] if b["extra_info"]["contender"] == "dense"]
    assert compared(files, now) == 1


def test_another_size_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="got a run with rows = 512; expected 2048"):
        compared(files, run(rows=512))
    both = run()
    both["benchmarks"] += run(rows=512)["benchmarks"]
    with pytest.raises(ValueError, match="got 2 sizes; expected one"):
        compared(files, both)
    with pytest.raises(ValueError, match="got a file without 'benchmarks'"):
        compared(files, {})


def test_the_stored_baseline_compares_with_itself() -> None:
    stored = json.loads(regressions.BASELINE.read_text())
    lines, good = regressions.report(stored, stored)
    assert good and lines[-1].startswith("0 of ")
