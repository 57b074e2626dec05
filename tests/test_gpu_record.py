"""The record of a GPU, made on a CPU as far as that goes: what is measured, checked, noted and believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastcl.backends import Pairs, _cuda, native

gpu = pytest.importorskip("benchmarks.gpu", reason="Triton is not installed")


def test_every_contender_is_measured_and_ours_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    if native._C is None:
        pytest.skip(native.status())
    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu, "_seconds", lambda step, calls: float(step() is not None))
    monkeypatch.setattr(gpu, "graphed", lambda step: step)
    monkeypatch.setattr(gpu, "peak_bytes", lambda step, device: 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rows = {row["contender"]: row for row in gpu.measure("nt_xent", 16, 16, 8, torch.float32, 3, float("inf"))}
    assert {"eager", "compile, eager", "fastcl chunked", "fastcl triton, graph", "fastcl native, graph"} <= rows.keys()
    for backend in gpu.KERNELS:
        assert rows[f"fastcl {backend}"]["gradient_error"] < 1e-5
        assert len(rows[f"fastcl {backend}"]["seconds"]) == 3
    assert "_grad_kernel" in rows["fastcl triton"]["checked_kernels"]


def test_launches_are_noted_by_the_names_of_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: int) -> None: ...

    products = SimpleNamespace(sums=launch, grad=launch, weights=launch, product=launch)
    monkeypatch.setattr(_cuda, "kernels", SimpleNamespace(ampere=products, hopper=products, finish=launch, deepest=256))

    def launches(family: str, depth: int, *launched: str) -> set[str]:
        monkeypatch.setattr(_cuda, "family", lambda device: family)
        rows = torch.ones(2, depth, dtype=torch.bfloat16)
        call = _cuda._Call("exp", Pairs(rows, rows, torch.tensor(1.0)))
        with gpu._noting_launches() as names:
            for kernel in launched:
                call.launch(kernel, 1)
            call.launch("grad", 0)
        return {name.removeprefix("csrc/cuda/") for name in names}

    assert launches("ampere", 64, "sums", "finish") == {"sums.cu", "vectors.cu"}
    assert launches("hopper", 64, "sums", "grad", "finish") == {"hopper_sums.cu", "hopper_grad.cu", "vectors.cu"}
    assert launches("hopper", 512, "sums", "weights", "product") == {"hopper_wide.cu"}


def test_a_backend_is_verified_by_its_own_rows() -> None:
    def row(backend: str, error: float) -> dict[str, Any]:
        return {"contender": f"fastcl {backend}", "dtype": "bfloat16", "gradient_error": error}

    def selftest(passed: bool) -> dict[str, Any]:
        both = [{"backend": name, "device": "cuda:0", "passed": name == "triton" or passed} for name in gpu.KERNELS]
        return {"rows": both}

    rows = [row("triton", 1e-3), row("native", 1e-3)]
    assert all(gpu._verified(rows, selftest(True), backend) for backend in gpu.KERNELS)
    assert gpu._verified(rows, selftest(False), "triton") and not gpu._verified(rows, selftest(False), "native")
    assert not gpu._verified([*rows, row("native", 1e-2)], selftest(True), "native")
    assert not gpu._verified(rows[:1], selftest(True), "native")  # nothing was compared


def test_goals_are_those_of_an_h200() -> None:
    row = {"loss": "nt_xent", "rows": 4096, "dim": 128, "dtype": "bfloat16", "median_seconds": 108e-6}
    contenders = {"fastcl triton": 2.0, "fastcl native, graph": 108 / 37, "eager": None}
    for contender, ratio in contenders.items():
        assert gpu._of_goal({**row, "contender": contender}, "NVIDIA H200") == (ratio and pytest.approx(ratio))
        assert gpu._of_goal({**row, "contender": contender}, "NVIDIA H100 80GB HBM3") is None
