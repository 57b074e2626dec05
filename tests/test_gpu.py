"""What only a CUDA device can show: `make gpu-test` runs this there; elsewhere every test is skipped and says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl
from fastcl import _settings, functional, pairwise
from fastcl.backends import _cuda, triton
from fastcl.testing import CASES, HOT, LossCase

from .oracle import TOLERANCE, assert_close, check_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
# Of the rows of a test that is about something else.
DTYPE = {"triton": torch.float32, "native": torch.bfloat16}
# Loss and gradient. fp32 numbers are sums of two of bf16, off by 2^-18, under logits of up to 10.
ON_CUDA_KERNELS = {
    torch.float32: (2e-6, 3e-5),
    torch.float16: TOLERANCE[torch.float16],
    torch.bfloat16: TOLERANCE[torch.bfloat16],
}
each_backend = pytest.mark.parametrize("backend", list(DTYPE), indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Triton, unless a test asks for another, or for each."""
    name = getattr(request, "param", "triton")
    if name == "native":
        skip_what_native_cannot(64, torch.bfloat16)
    with fastcl.use_backend(name):
        yield name


def skip_what_native_cannot(d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Given a patch, fp32 rows are allowed to be multiplied as sums of two bf16 numbers."""
    if monkeypatch:
        monkeypatch.setattr(_settings, "fp32", "bf16x3")
    if reason := _cuda.unsupported("reduce", rows(8, d, dtype)):
        pytest.skip(f"native {reason}")


def rows(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator), dim=1).to(DEVICE, dtype).requires_grad_()


def step(z: Tensor) -> tuple[Tensor, Tensor]:
    loss = functional.nt_xent(z, temperature=0.1)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("case", [c for c in CASES if not c.guided], ids=lambda c: c.label)
@pytest.mark.parametrize("dtype", [t for t in TOLERANCE if t != torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(301, 37), (512, 128), (260, 520)], ids=str)
def test_every_loss_against_fp64(case: LossCase, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    n, d = shape
    # of many candidates two are equal within the rounding of fp32, and fp64 chooses the other
    args, kwargs = case.inputs(61 if case.mined else n, d, dtype=dtype, device=DEVICE)
    check_case(case, args, kwargs)


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
@pytest.mark.parametrize("case", [c for c in CASES if c.guided], ids=lambda c: c.label)
def test_guided_losses_against_fp64(case: LossCase) -> None:
    args, kwargs = case.inputs(301, 37, device=DEVICE)
    check_case(case, args, kwargs)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("case", HOT, ids=lambda c: c.label)
@pytest.mark.parametrize("dtype", list(ON_CUDA_KERNELS), ids=str)
@pytest.mark.parametrize("d", [40, 64, 128, 200, 256, 520])
def test_every_loss_on_cuda_kernels(
    case: LossCase, dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_what_native_cannot(d, dtype, monkeypatch)
    args, kwargs = case.inputs(301, d, dtype=dtype, device=DEVICE)
    check_case(case, args, kwargs, tolerance=ON_CUDA_KERNELS[dtype])


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize("function", [pairwise.pair_logsumexp, pairwise.pair_softplus_sum])
@pytest.mark.parametrize("dtype", list(ON_CUDA_KERNELS), ids=str)
@pytest.mark.parametrize("d", [40, 64, 128, 200, 256, 520])
def test_every_mask_and_bias_on_cuda_kernels(
    function: Callable[..., Any], dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_what_native_cannot(d, dtype, monkeypatch)
    m, n = 301, 523
    x, y = rows(m, d, dtype), rows(n, d, dtype, seed=1)
    row_bias, col_bias = torch.linspace(-1, 1, m, device=DEVICE), torch.linspace(2, 0, n, device=DEVICE)
    drop = torch.arange(m, device=DEVICE) % 9, torch.arange(n, device=DEVICE) % 11
    only = torch.arange(m, device=DEVICE) % 2, torch.arange(n, device=DEVICE) % 3

    def run(wide: bool) -> list[Tensor]:
        x_, y_, a, b = (
            t.detach().to(torch.double if wide else t.dtype).requires_grad_() for t in (x, y, row_bias, col_bias)
        )
        ceiling = torch.linspace(1, 4, m, device=DEVICE, dtype=a.dtype)
        results = function(
            x_, y_, scale=5.0, row_bias=a, col_bias=b, drop=drop, only=only, ceiling=ceiling, both=True
        )  # fmt: skip
        kept = [t.masked_fill(t == -torch.inf, 0) for t in results]
        weights = [torch.linspace(1, 2, len(t), device=DEVICE, dtype=t.dtype) for t in kept]
        total = sum((t * w).sum() for t, w in zip(kept, weights, strict=True))
        return [*kept, *torch.autograd.grad(total, (x_, y_, a, b))]  # type: ignore[arg-type]

    got = run(False)
    with fastcl.use_backend("chunked"):
        want = run(True)
    result, gradient = ON_CUDA_KERNELS[dtype]
    tolerances = (
        10 * result,
        10 * result,
        gradient,
        gradient,
        1e-5,
        1e-5,
    )  # logits are rounded to fp32 in another order
    for g, w, tolerance in zip(got, want, tolerances, strict=True):
        assert_close(g, w, tolerance)


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 10.0])
def test_any_temperature(temperature: float) -> None:
    case = HOT[0]
    args, _ = case.inputs(300, 64, device=DEVICE, temperature=temperature)
    with fastcl.use_backend("chunked"):
        want = functional.nt_xent(*(t.detach().double() for t in args), temperature=temperature)
    got = functional.nt_xent(*args, temperature=temperature)
    assert_close(got, want, 1e-6 + 4 * 1.2e-7 / temperature)


def test_tf32_when_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    z = rows(512, 128)
    _, ieee = step(z)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    _, got = step(z)
    assert not torch.equal(got, ieee)
    assert_close(got, ieee, 1e-2)


@each_backend
def test_past_2_to_the_31(backend: str) -> None:
    """65,537 rows: more pairs than 32 bits count. Sampled rows of the gradient against fp64."""
    n, d, tau, dtype = 65537, 32, 0.1, DTYPE[backend]
    x, y = rows(n, d, dtype), rows(n, d, dtype, seed=1)
    lse = pairwise.pair_logsumexp(x, y, scale=1 / tau)
    (dx,) = torch.autograd.grad(lse.sum(), x)
    some = torch.tensor([0, 1, 40000, n - 2, n - 1], device=DEVICE)
    logits = x.detach()[some].double() @ y.detach().double().T / tau
    assert_close(lse.detach()[some], logits.logsumexp(1), 1e-6)
    assert_close(dx[some], logits.softmax(1) @ y.detach().double() / tau, TOLERANCE[dtype][1])


@each_backend
def test_offsets_past_2_to_the_31(backend: str) -> None:
    """A matrix of more than 2^31 elements: the last rows lie beyond what a 32-bit offset reaches."""
    d = 1024 if backend == "triton" else 256
    n = 2**31 // d + 64
    x = torch.empty(n, d, device=DEVICE, dtype=torch.bfloat16)
    x[-64:] = rows(64, d, torch.bfloat16).detach()
    x[:64] = rows(64, d, torch.bfloat16, seed=1).detach()
    y = rows(96, d, torch.bfloat16, seed=2).detach()
    for part in (x[-64:], x[:64]):
        with fastcl.use_backend("chunked"):
            want = pairwise.pair_logsumexp(part.double(), y.double(), scale=10.0)
        assert_close(pairwise.pair_logsumexp(part, y, scale=10.0), want, 1e-5)
    whole = pairwise.pair_logsumexp(y, x[64:], scale=1e-3)
    assert whole.isfinite().all()


@each_backend
def test_same_bits_beside_a_noisy_stream(backend: str) -> None:
    z = rows(1000, 96, torch.bfloat16)
    want = step(z)
    noise, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    for i in range(1000):
        if i % 50 == 0:
            with torch.cuda.stream(noise):
                for _ in range(20):
                    a = (a @ a).clamp(-1, 1)
        for got, w in zip(step(z), want, strict=True):
            assert torch.equal(got, w), f"repeat {i}"


@each_backend
@pytest.mark.parametrize("case", [c for c in CASES if c.compiles and not c.guided], ids=lambda c: c.label)
def test_no_host_synchronisation(case: LossCase, backend: str) -> None:
    args, kwargs = case.inputs(128, 64, dtype=torch.bfloat16, device=DEVICE)
    if backend == "native" and case.mined:
        pytest.skip("native has no CUDA kernel for neighbours, which this loss looks for")

    def run() -> list[Tensor]:
        loss = getattr(functional, case.name)(*args, **kwargs)
        leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    run()  # the first call on a device checks the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_a_cuda_graph_replays_on_new_data(backend: str) -> None:
    z = rows(512, 64, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(z)
    for seed in range(100):
        fresh = rows(512, 64, torch.bfloat16, seed=seed)
        with torch.no_grad():
            z.copy_(fresh)
        graph.replay()
        for got, want in zip(captured, step(fresh), strict=True):
            assert torch.equal(got, want), f"replay {seed}"


@each_backend
def test_eight_threads_on_cold_caches(backend: str) -> None:
    """Sizes that nothing else here uses: the threads themselves compile the kernels and make the numeric check."""
    sizes = (68, 104)
    triton._failed_check.cache_clear()
    results: list[tuple[int, tuple[Tensor, Tensor]]] = []

    def work(n: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            result = step(rows(n, 48, DTYPE[backend]))
        stream.synchronize()
        results.append((n, result))

    threads = [threading.Thread(target=work, args=(sizes[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8  # a thread that raised has none
    wanted = {n: step(rows(n, 48, DTYPE[backend])) for n in sizes}
    for n, result in results:
        for got, want in zip(result, wanted[n], strict=True):
            assert torch.equal(got, want)


def test_processes_on_one_cold_cache(tmp_path: object) -> None:
    code = (
        "import torch, fastcl; z = torch.randn(64, 24, device='cuda', requires_grad=True)\n"
        "with fastcl.use_backend('triton'): fastcl.NTXentLoss()(z).backward()\n"
        "assert z.grad.isfinite().all()"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) for _ in range(16)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()


@each_backend
def test_a_side_stream(backend: str) -> None:
    z = rows(700, 64, DTYPE[backend])
    want = step(z)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(z)
    stream.synchronize()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_current(backend: str) -> None:
    z = rows(200, 32, DTYPE[backend])
    want = step(z)
    for got, w in zip(step(z.detach().to("cuda:1").requires_grad_()), want, strict=True):
        assert got.device.index == 1
        assert torch.equal(got.cpu(), w.cpu())


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype: torch.dtype, autocast: torch.dtype | None, backend: str) -> None:
    if backend == "native":
        skip_what_native_cannot(64, autocast or dtype)
    z = rows(256, 64, dtype)
    rounded = z.detach().to(autocast or dtype)
    wide = rounded.double().requires_grad_()
    with fastcl.use_backend("chunked"):
        want = torch.autograd.grad(functional.nt_xent(wide, temperature=0.1), wide)[0]
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = functional.nt_xent(z, temperature=0.1)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    assert z.grad is not None
    tolerance = max(TOLERANCE[dtype][1], TOLERANCE[autocast or dtype][1])
    assert_close(z.grad.double() / scaler.get_scale(), want, tolerance)


@each_backend
def test_memory_does_not_grow_with_pairs(backend: str) -> None:
    from fastcl._measure import peak_bytes

    z = rows(16384, 64, torch.bfloat16)
    step(z)
    assert peak_bytes(lambda: step(z), torch.device(DEVICE)) < 40 * z.nbytes


@pytest.mark.parametrize("normalized", [True, False])
def test_a_small_batch_is_five_launches(normalized: bool) -> None:
    """Of our kernels: rows prepared, sums, results, gradients, gradients of raw rows."""
    z = rows(2048, 128, torch.bfloat16)

    def run() -> None:
        loss = functional.nt_xent(z, temperature=0.1, normalize=normalized)
        torch.autograd.grad(loss, z)

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    ours = [e.name for e in trace.events() if e.name.endswith("_kernel") and e.name in vars(triton.kernels)]
    assert sorted(ours) == sorted(
        ["_prepare_kernel", "_sums_kernel", "_finish_kernel", "_grad_kernel", "_restore_kernel"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nt_xent", "clip", "siglip"])
def test_strips_of_a_large_batch_against_fp64(name: str, dtype: torch.dtype) -> None:
    case = next(c for c in HOT if c.name == name)
    args, kwargs = case.inputs(4400 // case.rows(1)[0], 520, dtype=dtype, device=DEVICE)
    assert triton._in_strips(args[0], args[0], triton._Want(True, True))
    check_case(case, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_by_address_and_by_descriptor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    z = rows(700, 128, dtype)
    got = step(z)
    monkeypatch.setattr(triton, "DESCRIPTORS", False)
    for a, b in zip(got, step(z), strict=True):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("d", [1, 7, 64, 200, 256, 257, 1024, 4096])
def test_any_depth(d: int) -> None:
    z = rows(130, d, torch.bfloat16)
    _, got = step(z)
    exact = z.detach().double().requires_grad_()
    want = fastcl.reference.nt_xent(exact, temperature=0.1)
    assert_close(got, torch.autograd.grad(want, exact)[0], TOLERANCE[torch.bfloat16][1], floor=1e-4)


@each_backend
def test_compiled(backend: str) -> None:
    compiled: Callable[..., Tensor] = torch.compile(functional.nt_xent, fullgraph=True)
    z = rows(300, 64, DTYPE[backend])
    _, want = step(z)
    (got,) = torch.autograd.grad(compiled(z, temperature=0.1), z)
    assert_close(got, want, TOLERANCE[z.dtype][1])
