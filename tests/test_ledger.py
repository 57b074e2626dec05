"""The ledger of GPU runs: what ages a kernel, and what it says of one that never ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ledger

SOURCE = '''
import triton
_SIZE = 64
_UNUSED = 1
@triton.jit
def _helper(x):
    return x + 1
@triton.jit
def _sum_kernel(x, out):
    """Sums."""
    out = _helper(x)  # one more
class Config:
    stages: int = 2
def _launch(kernel):
    return kernel[_SIZE](Config)
def unrelated():
    return _UNUSED
'''


@pytest.mark.parametrize(
    ("old", "new", "ages"),
    [
        ("# one more", "# two more", False),
        ('"""Sums."""', '"""Adds up."""', False),
        ("out = _helper(x)", "out = (\n        _helper(x)\n    )", False),
        ("_UNUSED = 1", "_UNUSED = 2", False),
        ("return _UNUSED", "return 7", False),
        ("out = _helper(x)", "out = _helper(x) + 1", True),
        ("return x + 1", "return x + 2", True),
        ("_SIZE = 64", "_SIZE = 32", True),
        ("stages: int = 2", "stages: int = 3", True),
        ("return kernel[_SIZE]", "return kernel[_SIZE + 1]", True),
    ],
)
def test_what_ages_a_kernel(old: str, new: str, ages: bool) -> None:
    assert old in SOURCE
    before, after = ledger.kernel_hashes(SOURCE), ledger.kernel_hashes(SOURCE.replace(old, new))
    assert before.keys() == after.keys() == {"_sum_kernel"}
    assert (before != after) == ages


def test_the_three_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SOURCES", ["kernels.py"])
    (tmp_path / "kernels.py").write_text(SOURCE)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)

    def record(name: str, date: str, digest: str, verified: bool) -> None:
        kernels = {"_sum_kernel": {"hash": digest, "verified": verified}}
        head = {"machine": {"gpu": "NVIDIA H200"}, "date": date, "commit": "abc"}
        (results / name).write_text(json.dumps({**head, "kernels": kernels}))

    def said() -> str:
        (row,) = ledger.status(tmp_path)
        return ledger.sentence(row)

    (results / "other.json").write_text("{}")
    assert said() == "not yet run on a GPU"
    digest = ledger.kernel_hashes(SOURCE)["_sum_kernel"]
    record("a.json", "2026-01-01", digest, False)
    assert said() == "not yet run on a GPU"
    record("b.json", "2026-01-02", "older", True)
    assert said() == "verified on NVIDIA H200, 2026-01-02, commit abc, but its source has changed since"
    record("a.json", "2026-01-01", digest, True)
    assert said() == "verified on NVIDIA H200, 2026-01-01, commit abc"


def test_the_kernels_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["kernel"] for row in ledger.status()} >= {"_sums_kernel", "_grad_kernel"}
    unverified = any(row["state"] != "current" for row in ledger.status())
    assert ledger.main(["--check"]) == int(unverified)
    assert "_sums_kernel" in capsys.readouterr().out
