"""Processes that fork, load data or start together compute what one process computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

import fastcl
from benchmarks import cold_cache
from fastcl import functional

from .processes import together

BACKENDS = [name for name in ("native", "chunked") if name in fastcl.available_backends()]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def loss_and_grad(backend: str) -> Tensor:
    z = normalize(torch.randn(300, 24, generator=torch.Generator().manual_seed(0)), dim=1).requires_grad_()
    with fastcl.use_backend(backend):
        loss = functional.nt_xent(z, temperature=0.1)
        (grad,) = torch.autograd.grad(loss, z)
    return torch.cat([loss.detach()[None], grad.flatten()])


@needs_fork
def test_a_fork_computes_before_and_after_the_first_call() -> None:
    """In a process of its own, with three threads; a child has one of torch's, as a DataLoader's worker has: those of
    OpenMP do not survive a fork, with or without fastcl."""
    code = """
import os, torch
from tests.test_processes import BACKENDS, loss_and_grad
torch.set_num_threads(3)

def in_a_child(want=None):
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    torch.set_num_threads(1)
    found = [loss_and_grad(backend) for backend in BACKENDS]
    os._exit(any(f.isnan().any() for f in found) if want is None else not all(map(torch.equal, found, want)))

in_a_child()
want = [loss_and_grad(backend) for backend in BACKENDS]
in_a_child(want)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


class Losses(Dataset[Tensor]):
    """What a worker computes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.stack([loss_and_grad(backend) for backend in BACKENDS])


@needs_fork
def test_workers_that_load_data_compute_losses() -> None:
    """Forked after this process has computed one."""
    want = Losses()[0]
    found = list(DataLoader(Losses(), batch_size=None, num_workers=2, timeout=100, multiprocessing_context="fork"))
    assert len(found) == 4
    assert all(torch.equal(f, want) for f in found)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton comes for Linux only")
def test_processes_on_cold_caches_compile_and_keep_the_same() -> None:
    """Four here; sixteen by ``python -m benchmarks.cold_cache``."""
    pytest.importorskip("triton", reason="Triton is not installed")
    assert cold_cache.run(4) == []


def test_two_ranks_take_the_same_tiles() -> None:
    """The tables hold what every process finds, whatever its rank, its hashes and its threads."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from fastcl import _tune
from fastcl.backends import chunked, _triton_configs as configs
print([configs.config(family, kind, d, crowded) for family in configs._TABLE for kind in _tune.KINDS
       for d in (1, 33, 64, 128, 200, 256, 512, 1100) for crowded in (False, True)], chunked._tile_side(torch.ones(1)))
from tests.test_processes import BACKENDS, loss_and_grad
print([loss_and_grad(backend).double().sum().item().hex() for backend in BACKENDS])
"""
    (code_0, one), (code_1, other) = together([["-c", code, "1"], ["-c", code, "2"]], 100)
    assert code_0 == code_1 == 0, one + other
    assert one == other and len(one) > 1000
