"""What is Triton's own: the check a device must pass before the kernels become its default, and its arithmetic."""

import pytest
import torch

from fastcl import pairwise
from fastcl.backends import Pairs, triton

from .conftest import DEVICE
from .oracle import assert_close


@pytest.fixture(autouse=True)
def forget_earlier_checks() -> None:
    triton._failed_check.cache_clear()


def test_the_kernels_pass_their_check() -> None:
    assert triton._failed_check(torch.device(DEVICE)) is None


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


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU multiplies bfloat16 as it should")
def test_bfloat16_is_refused_in_the_interpreter() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert "bfloat16" in str(triton.unsupported("reduce", x))


def test_guard_bands() -> None:
    """NaN before and behind every input is never read into a result."""

    def guarded(t: torch.Tensor) -> torch.Tensor:
        flat = torch.full((t.numel() + 2 * 4096,), float("nan"), device=DEVICE)
        flat[4096:-4096] = t.flatten()
        return flat[4096:-4096].view(t.shape)

    q, k, bias = (guarded(torch.randn(*s, device=DEVICE)) for s in [(19, 37), (23, 37), (19,)])
    from fastcl import use_backend

    with use_backend("triton"):
        q, k = q.requires_grad_(), k.requires_grad_()
        row, col = pairwise.pair_logsumexp(q, k, scale=0.5, row_bias=bias, both=True)
        grads = torch.autograd.grad(row.sum() + col.sum(), (q, k))
    assert all(t.isfinite().all() for t in (row, col, *grads))
