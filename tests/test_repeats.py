"""The same input gives the same bits: 1,000 times beside busy threads, and whatever lay in memory before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl
from fastcl import functional, pairwise
from fastcl.backends import chunked
from fastcl.testing import CASES, LossCase

from .conftest import DEVICE
from .oracle import loss_and_grads

LABELS = {case.label: case for case in CASES}


# --- memory that is not initialised -----------------------------------------------------------------------------------


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills what ``torch.empty`` returns with NaN, and refuses operations whose sums have no fixed order."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def losses_and_grads(case: LossCase, **inputs: Any) -> list[Tensor]:
    args, kwargs = case.inputs(9, 12, device=DEVICE, **inputs)
    found = []
    for reduction in ("mean", "none"):
        for options in ({}, {"normalize": True}):
            loss, grads = loss_and_grads(
                getattr(functional, case.name), args, {**kwargs, **options, "reduction": reduction}
            )
            found += [loss, *grads]
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_what_lay_in_memory_before_changes_no_bit(case: LossCase, backend: str) -> None:
    """Nor are there operations whose sums have no fixed order."""
    if backend == "triton" and (case.guided or not case.hot):
        pytest.skip("has no guide, or takes long in the interpreter")
    for dtype in (torch.float32,) if backend == "triton" else (torch.float32, torch.bfloat16, torch.float64):
        want = losses_and_grads(case, dtype=dtype)
        with poisoned_memory():
            got = losses_and_grads(case, dtype=dtype)
        assert all(map(torch.equal, got, want))


def test_what_lay_in_memory_before_changes_no_bit_of_primitives(backend: str) -> None:
    """Those that no loss above reaches, and a row that keeps no pair."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 7, generator=generator).to(DEVICE).requires_grad_() for n in (9, 14))
    keys = torch.zeros(9, dtype=torch.long, device=DEVICE), torch.arange(14, device=DEVICE) % 2
    keys[0][4] = 5

    def results() -> list[Tensor]:
        row, col = pairwise.pair_logsumexp(q, k, scale=2.0, only=keys, both=True)
        total = pairwise.pair_softplus_total(q, k, scale=2.0, row_bias=0.5, drop=keys)
        grads = torch.autograd.grad(row.nan_to_num(neginf=0).sum() + col.nan_to_num(neginf=0).sum() + total, (q, k))
        return [row, col, total, *grads, *pairwise.pair_topk(q, k, topk=9, only=keys)]

    want = results()
    with poisoned_memory():
        assert all(map(torch.equal, results(), want))


def test_a_read_of_memory_that_is_not_initialised_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.grad

    def wrong(*args: Any) -> tuple[Tensor, ...]:
        dx, *rest = right(*args)
        return torch.empty_like(dx), *rest

    monkeypatch.setattr(chunked, "grad", wrong)
    with pytest.raises(AssertionError), fastcl.use_backend("chunked"):
        test_what_lay_in_memory_before_changes_no_bit(LABELS["clip"], "chunked")


# --- busy threads -----------------------------------------------------------------------------------------------------

REPEATED = [
    ("native", "nt_xent", torch.bfloat16),  # of which the C++ kernels keep rounded tiles
    ("native", "supcon", torch.float32),  # class sums
    ("chunked", "triplet_hard", torch.float32),  # mining
]


@contextmanager
def busy_threads(work: list[Any]) -> Iterator[None]:
    """Threads that do their work over and over."""
    stop = threading.Event()

    def repeat(step: Any) -> None:
        while not stop.is_set():
            step()

    threads = [threading.Thread(target=repeat, args=(step,)) for step in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif(DEVICE != "cpu", reason="tests/test_gpu.py has streams in the place of threads")
@pytest.mark.parametrize(("name", "label", "dtype"), REPEATED, ids=[label for _, label, _ in REPEATED])
def test_a_thousand_repeats_beside_busy_threads(name: str, label: str, dtype: torch.dtype) -> None:
    """Every repeat has the bits of the first, while another thread computes losses, with the same memory to keep
    things in, and another multiplies matrices."""
    if name not in fastcl.available_backends():
        pytest.skip("the native module is not built here: fastcl info says why")
    given, other = LABELS[label].inputs(4, 6, dtype=dtype), LABELS["nt_xent"].inputs(200, 32, dtype=dtype, seed=1)
    matrix = torch.randn(300, 300)

    def step(label: str, args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        loss, grads = loss_and_grads(getattr(functional, LABELS[label].name), args, kwargs)
        return [loss, *grads]

    with fastcl.use_backend(name):
        want = step(label, *given)
        with busy_threads([lambda: step("nt_xent", *other), lambda: matrix @ matrix]):
            for repeat in range(1000):
                assert all(map(torch.equal, step(label, *given), want)), f"repeat {repeat}"
