"""Every kernel compiles for every architecture, fits it, and uses its matrix instructions: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import setup
from benchmarks import aot, ledger

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton and its assembler come for Linux only"),
    pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6),
        reason="older Triton does not know sm_100 and spills: python -m benchmarks.aot lists what it makes",
    ),
]


@pytest.fixture(scope="session")
def compiled() -> list[aot.Compiled]:
    rows, failed = aot.compile_everything(few=True)
    assert not failed
    return rows


@pytest.fixture(scope="session")
def compiled_cuda() -> list[aot.Compiled]:
    try:
        setup.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    return aot.compile_cuda()


def test_no_kernel_has_a_fault(compiled: list[aot.Compiled]) -> None:
    assert aot.faults(compiled) == []


def test_no_cuda_kernel_has_a_fault(compiled_cuda: list[aot.Compiled]) -> None:
    assert aot.faults(compiled_cuda) == []


def test_every_cuda_kernel_was_compiled(compiled_cuda: list[aot.Compiled]) -> None:
    """All that stand in the headers; of those that multiply every instantiation, its loop and its shared memory."""
    multiplying = (*setup.AMPERE_SOURCES, *setup.HOPPER_SOURCES)
    for source in (*setup.CUDA_SOURCES, *multiplying):
        file = f"csrc/cuda/{source}.cu"
        defined = re.findall(r"__global__ .*?(\w+)_kernel\(", (aot.ROOT / f"{file}h").read_text(), re.DOTALL)
        for arch in setup.architectures_of(source):
            rows = [r for r in compiled_cuda if r.used_by == [file] and r.arch == int(arch.strip("a"))]
            names = {row.kernel for row in rows}
            assert {name.partition("<")[0] for name in names} == set(defined)
            if source in multiplying:
                assert names == set(instantiations(source))
                assert aot.CUDA_PRODUCTS[file] == ("wgmma" if source in setup.HOPPER_SOURCES else "mma.sync")
                two_tiles = 2 * 32 * 64 * 2
                assert all(row.loop["products"] and row.shared_bytes > two_tiles for row in rows)


def test_instructions_that_only_probes_use(tmp_path: Path) -> None:
    """The simulator knows them, and their PTX compiles to what it says."""
    try:
        nvcc = setup.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    probes, cubin = aot.ROOT / "csrc" / "sim" / "probes.cuh", str(tmp_path / "probes.cubin")
    subprocess.run([nvcc, "-std=c++20", "-arch=sm_90a", "-cubin", "-x", "cu", probes, "-o", cubin], check=True)
    code = aot._tool("nvdisasm", "-c", cubin)
    assert "HMMA.1688.F32.TF32" in code and "UTMASTG.2D" in code


def instantiations(source: str) -> Iterator[str]:
    """Names of what a source that multiplies holds."""
    for dtype in ("f32", "bf16", "f16")[source in setup.HOPPER_SOURCES :]:  # Hopper reads fp32 rows as rows of bf16
        for link in ("exp", "softplus"):
            if source != "hopper_wide":
                yield from (f"{source}<{dtype}, {depth}, {link}>" for depth in (64, 128, 256))
                continue
            for choice in ("false", "true"):
                yield f"hopper_wide<{dtype}, {link}, {choice}>"
                yield f"hopper_product<{dtype}, {choice}>"


def test_every_kernel_was_compiled_for_every_architecture(compiled: list[aot.Compiled]) -> None:
    kernels = set(ledger.triton_hashes())
    for arch in aot.SHARED_LIMIT:
        for dtype in aot.DTYPES:
            if arch < 80 and dtype == "tf32":
                continue
            rows = [row for row in compiled if (row.arch, row.dtype) == (arch, dtype)]
            users = {user for row in rows for user in row.used_by}
            assert set(aot.FEW) == users
            one_pass = {"_one_pass_kernel", "_merge_kernel"}  # for rows of 16 bits, on matrix units
            wanted = kernels - (set() if aot.matrix_family(arch, dtype) and "16" in dtype else one_pass)
            assert {row.kernel for row in rows} == wanted


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"stack_bytes": 8}, "spills 8 bytes"),
        ({"matrix": {"wgmma": 4, "mma.sync": 4}}, "multiplies with ['mma.sync', 'wgmma'], expected mma.sync"),
        ({"matrix": {}}, "multiplies with fp32 units, expected mma.sync"),
        ({"wide_loads": 0}, "no 16-byte loads"),
    ],
)
def test_a_fault_of_a_cuda_kernel_is_found(
    compiled_cuda: list[aot.Compiled], fault: dict[str, object], said: str
) -> None:
    row = next(r for r in compiled_cuda if r.kernel == "sums<bf16, 128, exp>")
    (sentence,) = aot.faults([replace(row, **fault)])  # type: ignore[arg-type]
    assert said in sentence


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"stack_bytes": 8}, "spills 8 bytes"),
        ({"matrix": {"mma.sync": 4}}, "multiplies with ['mma.sync'], expected wgmma"),
        ({"matrix": {}}, "multiplies with fp32 units, expected wgmma"),
        ({"wide_loads": 0}, "no 16-byte loads"),
    ],
)
def test_a_fault_is_found(compiled: list[aot.Compiled], fault: dict[str, object], said: str) -> None:
    row = next(r for r in compiled if (r.arch, r.dtype, r.kernel) == (90, "bfloat16", "_sums_kernel"))
    (sentence,) = aot.faults([replace(row, **fault)])  # type: ignore[arg-type]
    assert said in sentence


def test_what_does_not_compile_is_reported() -> None:
    rows, failed = aot.compile_everything([13], ["float32"], workers=1)
    assert not rows
    assert failed[0]["arch"] == 13
    assert failed[0]["reason"]
