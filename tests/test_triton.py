"""What is Triton's own: the check a device must pass before the kernels become its default, and its arithmetic."""

import pytest
import torch

from fastcl import pairwise, use_backend
from fastcl.backends import Pairs, Sides, triton

from .conftest import DEVICE
from .oracle import assert_close


@pytest.fixture(autouse=True)
def forget_earlier_checks() -> None:
    triton._failed_check.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_pass_their_check(dtype: torch.dtype) -> None:
    assert triton._failed_check(torch.device(DEVICE), dtype) is None


@pytest.mark.parametrize("fault", [0.999, float("nan")])
def test_a_wrong_kernel_fails_the_check(fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton._grad_rows
    monkeypatch.setattr(triton, "_grad_rows", lambda *args: tuple(fault * t for t in right(*args)))
    reason = triton._failed_check(torch.device(DEVICE))
    assert reason is not None
    assert "failed its numeric check" in reason


def test_a_compiler_error_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise OSError("no ptxas")

    monkeypatch.setattr(triton, "_launch", broken)
    assert triton._failed_check(torch.device(DEVICE)) == f"does not run on {DEVICE}: OSError: no ptxas"


def test_softplus_sums_keep_digits_over_the_whole_range() -> None:
    """e^-40 is below fp32's spacing at 1; a softplus through log(1 + e) would give 0."""
    logits = torch.linspace(-60, 60, 121, device=DEVICE)
    q, k = logits[:, None].contiguous(), torch.ones(1, 1, device=DEVICE)
    pairs = Pairs(q, k, torch.ones((), device=DEVICE))
    row, _ = triton.reduce("softplus", pairs, False, False)
    want = torch.logaddexp(logits.double(), torch.zeros((), dtype=torch.float64, device=DEVICE))
    for got, exact in zip(row, want, strict=True):
        assert_close(got, exact, 1e-6)


LINKS = {"exp": pairwise.pair_logsumexp, "softplus": pairwise.pair_softplus_sum}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("mask", ["nothing", "drop", "everything"])
@pytest.mark.parametrize("sides", ["one set", "rows", "both"])
def test_every_variant(dtype: torch.dtype, link: str, mask: str, sides: str) -> None:
    """Every kernel with every combination of arguments it is compiled for, ragged in rows, columns and depth."""
    generator = torch.Generator().manual_seed(0)
    m, n, d = 37, 37 if sides == "one set" else 45, 35
    x, y = (torch.nn.functional.normalize(torch.randn(r, d, generator=generator), dim=1) for r in (m, n))
    vectors = [torch.randn(r, generator=generator) for r in (m, n)]
    keys = [torch.randint(5, (r,), generator=generator) for r in (m, n)]

    def leaves(to: torch.dtype, result: torch.dtype) -> list[torch.Tensor]:
        rows = [t.to(dtype).to(DEVICE, to).requires_grad_() for t in (x, y)]
        numbers = [t.to(DEVICE, result).requires_grad_() for t in (*vectors, torch.tensor(8.0))]
        return [*rows, *numbers]

    def run(to: torch.dtype, result: torch.dtype, backend: str) -> list[torch.Tensor]:
        q, k, row_bias, col_bias, scale = given = leaves(to, result)
        drop, only = (tuple(t.to(DEVICE) for t in pair) for pair in (keys, [t % 3 for t in keys]))
        one_set = sides == "one set"
        options: dict[str, object] = {"scale": scale}
        if mask != "nothing":
            options["drop"] = drop[0] if one_set else drop
        if mask == "everything":
            col_bias = row_bias if one_set else col_bias
            options.update(row_bias=row_bias, col_bias=col_bias, only=only[0] if one_set else only)
            if not one_set:
                options["ceiling"] = row_bias.detach() + 4
        with use_backend(backend):
            out = LINKS[link](q, None if one_set else k, both=sides == "both", **options)  # type: ignore[arg-type]
            outs = out if isinstance(out, tuple) else (out,)
            # a row without a kept pair is -inf and sends no gradient
            total = sum((t.masked_fill(t == -torch.inf, 0) * torch.linspace(1, 2, len(t)).to(t)).sum() for t in outs)
            grads = torch.autograd.grad(total, given, allow_unused=True)  # type: ignore[arg-type]
        return [*outs, *(g for g in grads if g is not None)]

    exact = run(torch.float64, torch.float64, "chunked")
    got = run(dtype, torch.float32, "triton")
    assert len(got) == len(exact) >= 3
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for g, e in zip(got, exact, strict=True):
        assert_close(g, e, 2e-6 if g.dim() == 1 else tolerance)


def test_writes_nothing_beside_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries before and behind every output, which are not initialised: what is not written stays NaN."""
    guards = []

    def canaries(x: torch.Tensor, *shape: int) -> torch.Tensor:
        n = torch.Size(shape).numel()
        buffer = torch.full((n + 8192,), 77.0, device=x.device)
        guards.append((buffer, n))
        buffer[4096 : n + 4096] = torch.nan
        return buffer[4096 : n + 4096].view(shape)

    monkeypatch.setattr(triton, "_new", canaries)
    x, y = torch.randn(19, 37, device=DEVICE), torch.randn(45, 37, device=DEVICE)
    pairs = Pairs(x, y, torch.ones((), device=DEVICE))
    row, col = triton.reduce("exp", pairs, True, False)
    sides = Sides(row, torch.ones_like(row), col, torch.ones_like(col))
    assert all(t.isfinite().all() for t in (row, col, *triton.grad("exp", pairs, sides, True, True, True)))
    assert len(guards) >= 6
    for buffer, n in guards:
        assert (buffer[:4096] == 77).all() and (buffer[n + 4096 :] == 77).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_guard_bands(dtype: torch.dtype) -> None:
    """NaN before and behind every input is never read into a result."""

    def guarded(t: torch.Tensor) -> torch.Tensor:
        flat = torch.full((t.numel() + 2 * 4096,), float("nan"), device=DEVICE, dtype=t.dtype)
        flat[4096:-4096] = t.flatten()
        return flat[4096:-4096].view(t.shape)

    q, k, bias = (guarded(torch.randn(*s, device=DEVICE)) for s in [(19, 37), (23, 37), (19,)])
    q, k = (guarded(t.to(dtype)) for t in (q, k))
    with use_backend("triton"):
        q, k = q.requires_grad_(), k.requires_grad_()
        row, col = pairwise.pair_logsumexp(q, k, scale=0.5, row_bias=bias, both=True)
        grads = torch.autograd.grad(row.sum() + col.sum(), (q, k))
    assert all(t.isfinite().all() for t in (row, col, *grads))
