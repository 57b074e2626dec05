"""Fixtures that every test of the engine shares. Where there is no GPU, Triton runs in its interpreter on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy under the interpreter: its threads cost more than they give

from collections.abc import Iterator

import pytest

import fastcl
from fastcl.backends import native

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["native", "chunked", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn, forced."""
    if request.param == "native" and (native._C is None or DEVICE != "cpu"):
        pytest.skip(native.status() if native._C is None else f"native runs on the CPU, these tests on {DEVICE}")
    with fastcl.use_backend(request.param):
        yield request.param
