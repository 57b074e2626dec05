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


CUDA_FILES = {
    "csrc/cuda/sums.cu": '#include "sums.cuh"\nvoid sums(int n) {}\n',
    "csrc/cuda/sums.cuh": '#include <math.h>\n#include "pairs.cuh"\nint rows = 64;  // a tile\n',
    "csrc/cuda/pairs.cuh": '#include "../sim/ptx.hpp"\n/* what\n * all know */\nint threads = 128;\n',
    "csrc/cuda/other.cu": "void other() {}\n",
    "csrc/cuda/other.cuh": "int n;\n",
    "csrc/sim/ptx.hpp": "int seed = 1;\n",
    "fastcl/backends/_cuda.py": "SPANS = 2\ndef unsupported(): return None\ndef reduce(): return SPANS  # all\n",
}


@pytest.mark.parametrize(
    ("file", "old", "new", "ages"),
    [
        ("csrc/cuda/sums.cuh", "// a tile", "// two tiles", False),
        ("csrc/cuda/sums.cuh", "rows = 64", "rows\n    = 64", False),
        ("csrc/cuda/pairs.cuh", "* all know", "* everybody knows", False),
        ("csrc/cuda/other.cuh", "int n", "int m", False),
        ("csrc/sim/ptx.hpp", "seed = 1", "seed = 2", False),
        ("fastcl/backends/_cuda.py", "# all", "# of them", False),
        ("fastcl/backends/_cuda.py", "return None", "return 'no'", False),
        ("csrc/cuda/sums.cu", "{}", "{ n++; }", True),
        ("csrc/cuda/sums.cuh", "rows = 64", "rows = 32", True),
        ("csrc/cuda/pairs.cuh", "threads = 128", "threads = 64", True),
        ("fastcl/backends/_cuda.py", "SPANS = 2", "SPANS = 3", True),
    ],
)
def test_what_ages_a_cuda_source(tmp_path: Path, file: str, old: str, new: str, ages: bool) -> None:
    for name, text in CUDA_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = ledger.cuda_hashes(tmp_path)
    assert before.keys() == {"csrc/cuda/other.cu", "csrc/cuda/sums.cu"}
    assert ledger.cuda_sources(tmp_path) == {"sums": "csrc/cuda/sums.cu", "other": "csrc/cuda/other.cu"}
    assert old in CUDA_FILES[file]
    (tmp_path / file).write_text(CUDA_FILES[file].replace(old, new))
    source = "csrc/cuda/sums.cu"
    assert (before[source] != ledger.cuda_hashes(tmp_path)[source]) == ages


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
    wanted = {"_sums_kernel", "_grad_kernel", "csrc/cuda/sums.cu", "csrc/cuda/grad.cu"}
    assert {row["kernel"] for row in ledger.status()} >= wanted
    assert {"bounds", "sums", "finish", "grad"} <= ledger.cuda_sources().keys()
    unverified = any(row["state"] != "current" for row in ledger.status())
    assert ledger.main(["--check"]) == int(unverified)
    assert "_sums_kernel" in capsys.readouterr().out
