"""Fixtures that every test of the engine shares. Where there is no GPU, Triton runs in its interpreter on the CPU."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy under the interpreter: its threads cost more than they give

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastcl
from fastcl.backends import native

torch.set_num_threads(1)


def round_as_hardware_does() -> None:
    """Triton's interpreter cuts the low bits of fp32 off where GPUs round to the nearest bf16."""
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    cut = InterpreterBuilder.cast_impl

    def rounded(self: object, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(source.data, np.float32)).to(torch.bfloat16).view(torch.int16)
            return TensorHandle(bits.numpy().view(np.uint16), tl.bfloat16)
        return cut(self, source, target)

    InterpreterBuilder.cast_impl = rounded


def patch_the_language_once() -> None:
    """Triton's interpreter replaces the functions of its language at every launch, and at every call in a kernel, which
    takes half of its time; replaced once, they stay so."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # an older Triton
        return
    patch, patched = interpreter._patch_lang, set[str]()

    def once(kernel: Callable[..., object]) -> object:
        if kernel.__module__ not in patched:  # what a module calls by name is what is replaced
            patched.add(kernel.__module__)
            patch(kernel)
        return interpreter._LangPatchScope()  # nothing to put back

    interpreter._patch_lang = once


round_as_hardware_does()
patch_the_language_once()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """TEST_FAILURES=FILE: failures as they come, for a lent machine that may be gone before pytest's summary."""
    file = os.environ.get("TEST_FAILURES")
    if report.failed and file and "PYTEST_XDIST_WORKER" not in os.environ:  # the process that collects them has it, too
        with Path(file).open("a", encoding="utf-8") as log:
            log.write(f"{report.nodeid}\n{report.longreprtext}\n\n")


# Files whose tests share what is slow to build: one process runs all of it. (An xdist_group would say so beside the
# tests, but pytest-xdist 3.8 does not see it with pytest 9.2.)
SHARED = (
    "tests/integrations/test_two_ranks.py",
    "tests/test_aot.py",
    "tests/test_cuda.py",
    "tests/test_distributed.py",
    "tests/test_four_edits.py",
    "tests/test_grad_cache.py",
    "tests/test_mutants.py",
    "tests/test_package.py",
    "tests/test_site.py",
    "tests/trainer/test_run.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Test after test to whichever process is free, the files above as wholes and first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in SHARED else nodeid

    return Scheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(params=["native", "chunked", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced."""
    if request.param == "native" and (native._C is None or DEVICE != "cpu"):
        pytest.skip(native.status() if native._C is None else f"native runs on the CPU, these tests on {DEVICE}")
    with fastcl.use_backend(request.param):
        yield request.param
