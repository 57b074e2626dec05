"""Every loss on every backend against its definition in fp64, and the promises that all losses share."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import fastcl
from fastcl import _settings, functional, reference
from fastcl._measure import peak_bytes
from fastcl.backends import chunked, native
from fastcl.pairwise import l2_normalize
from fastcl.testing import CASES, HOT, LossCase

from .conftest import DEVICE
from .oracle import TOLERANCE, assert_close, check_case, error, exact, leaves, loss_and_grads

# No or one negative; sizes that are no multiple of any tile; widths below, at and above a tile, and 1.
GRID = list(itertools.product((1, 2, 5, 33, 130), (1, 8, 48, 129)))
DIAGONAL = [(1, 8), (2, 1), (5, 48), (33, 129), (130, 8)]
ONE = {c.name: c for c in reversed(CASES)}
INTERPRETED = DEVICE != "cuda"
BACKENDS = ("native", "chunked", "triton")


def case_id(value: object) -> str | None:
    return value.label if isinstance(value, LossCase) else None


def shapes(case: LossCase, backend: str) -> list[tuple[int, int]]:
    """The interpreter is slow: Triton sees each size and each width there, not each pair of them, or one of either."""
    if backend == "triton" and case.guided:
        return []
    if backend == "triton" and INTERPRETED:
        return DIAGONAL if case.hot else [(17, 40)]
    # among equal rows a mined loss may differentiate by any, and unit rows of one feature are +1 or -1
    return [(b, d) for b, d in (GRID if case.hot else DIAGONAL) if not (case.mined and d == 1)]


def on_backends(*cases: LossCase) -> pytest.MarkDecorator:
    """Every case on every backend, but only the tuned ones in the interpreter."""
    pairs = [(c, b) for c in cases for b in BACKENDS if b != "triton" or c.hot or not (INTERPRETED or c.guided)]
    return pytest.mark.parametrize(("case", "backend"), pairs, indirect=["backend"], ids=case_id)


each_case = pytest.mark.parametrize("case", CASES, ids=case_id)
each_case_and_backend = on_backends(*CASES)
each_summed_case = pytest.mark.parametrize("case", [c for c in CASES if c.summed], ids=case_id)


@pytest.mark.parametrize(
    ("case", "backend", "batch", "dim"),
    [(c, b, *s) for c in CASES for b in BACKENDS for s in shapes(c, b)],
    indirect=["backend"],
    ids=case_id,
)
def test_matches_reference(case: LossCase, backend: str, batch: int, dim: int) -> None:
    args, kwargs = case.inputs(batch, dim, device=DEVICE, seed=batch + dim)
    # Unit rows of one feature are +1 or -1, and their gradients differences of equal numbers: 0 but for rounding.
    check_case(case, args, kwargs, **cancelling(case, batch, dim), loss_floor=loss_floor(case))


def loss_floor(case: LossCase) -> float:
    """DCL is a difference of logits of size 1 / tau = 10, which may come near 0; so is a hinge, or a cosine."""
    return 2e-6 if case.name in ("dcl", "dclw", "negative_cosine", "siamese") else 0.0


def cancelling(case: LossCase, batch: int, dim: int = 0) -> dict[str, Any]:
    """Bounds of gradients that are differences of equal numbers."""
    if case.name == "all_pairs_nt_xent" and batch == 1:  # each of two rows is the other's only competitor
        return {"floor": 1e-4, "tolerance": (1e-6, 2e-5)}
    return {"floor": 1e-4 if dim == 1 else 0.0}


@on_backends(*(replace(c, hot=False) for c in CASES))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_doubles(case: LossCase, reduction: str, backend: str) -> None:
    """Loss and every gradient to 1e-12 and 1e-11."""
    args, kwargs = case.inputs(19, 13, device=DEVICE, dtype=torch.float64, seed=4)
    check_case(case, args, kwargs, reduction=reduction)


@each_case_and_backend
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(case: LossCase, reduction: str, backend: str) -> None:
    args, kwargs = case.inputs(7, 12, device=DEVICE)
    check_case(case, args, kwargs, reduction=reduction)


@pytest.mark.parametrize(
    "case", [c for c in CASES if "weights" in signature(getattr(functional, c.name)).parameters], ids=case_id
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights(case: LossCase, reduction: str) -> None:
    args, kwargs = case.inputs(7, 12, device=DEVICE)
    rows = len(getattr(reference, case.name)(*args, **kwargs, reduction="none"))
    weights = torch.rand(rows, device=DEVICE, requires_grad=True)
    check_case(case, args, {**kwargs, "weights": weights}, reduction=reduction, loss_floor=loss_floor(case))
    ones = getattr(functional, case.name)(*args, **kwargs, reduction=reduction, weights=torch.ones(rows, device=DEVICE))
    assert_close(ones, getattr(functional, case.name)(*args, **kwargs, reduction=reduction), 1e-6)


@each_case_and_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(case: LossCase, dtype: torch.dtype, backend: str) -> None:
    args, kwargs = case.inputs(33, 40, dtype=dtype, device=DEVICE)
    check_case(case, args, kwargs)


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_torch(case: LossCase, dtype: torch.dtype) -> None:
    """The dense loss, computed by torch in that dtype from the same rows, is further from the truth."""
    args, kwargs = case.inputs(64, 32, dtype=dtype, device=DEVICE)
    want, want_grads = exact(case, args, kwargs)
    dense, dense_grads = loss_and_grads(getattr(reference, case.name), args, kwargs)
    fused, fused_grads = loss_and_grads(getattr(functional, case.name), args, kwargs)
    cap, grad_cap = TOLERANCE[dtype]
    assert error(fused, want) <= min(error(dense, want), cap)
    for f, d, w in zip(fused_grads, dense_grads, want_grads, strict=True):
        assert error(f, w) <= min(max(error(d, w), torch.finfo(dtype).eps / 2), grad_cap)  # one rounding to it


@pytest.mark.parametrize("case", [c for c in CASES if not c.stops_gradient], ids=case_id)
def test_gradcheck(case: LossCase) -> None:
    args, kwargs = case.inputs(4, 3, dtype=torch.float64)
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.requires_grad]

    def loss(*tensors: Tensor) -> Tensor:
        rows, others = tensors[: len(args)], tensors[len(args) :]
        return getattr(functional, case.name)(*rows, **{**kwargs, **dict(zip(names, others, strict=True))})

    assert torch.autograd.gradcheck(loss, (*args, *(kwargs[n] for n in names)))


@each_case_and_backend
def test_a_number_is_as_good_as_a_tensor(case: LossCase, backend: str) -> None:
    args, kwargs = case.inputs(6, 8, device=DEVICE)
    numbers = {k: v.item() if isinstance(v, Tensor) and v.ndim == 0 else v for k, v in kwargs.items()}
    tensor, number = (getattr(functional, case.name)(*args, **k) for k in (kwargs, numbers))
    assert_close(number, tensor, 2e-7)


@each_case_and_backend
def test_non_contiguous_rows_give_the_same_bits(case: LossCase, backend: str) -> None:
    args, kwargs = case.inputs(9, 20, device=DEVICE)

    def strided(t: Tensor) -> Tensor:
        if t.ndim == 1 or not t.is_floating_point():
            return t.detach().repeat_interleave(2, 0)[::2].requires_grad_(t.requires_grad)
        if t.ndim == 3:
            return t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad)
        wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), math.nan, device=t.device)
        wide[::2, 1::3] = t.detach()
        return wide[::2, 1::3].requires_grad_(t.requires_grad)

    loss, grads = loss_and_grads(getattr(functional, case.name), args, kwargs)
    rows = [strided(a) for a in args]
    others = {k: strided(v) if isinstance(v, Tensor) and v.ndim else v for k, v in kwargs.items()}
    assert not rows[0].is_contiguous()
    loss2, grads2 = loss_and_grads(getattr(functional, case.name), rows, others)
    assert torch.equal(loss, loss2)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))


@each_case_and_backend
def test_backward_repeats_bit_for_bit_and_scales(case: LossCase, backend: str) -> None:
    args, kwargs = case.inputs(20, 16, device=DEVICE)
    before = [t.detach().clone() for t in leaves(args, kwargs)]
    loss = getattr(functional, case.name)(*args, **kwargs)
    first, second, third = (torch.autograd.grad(loss, leaves(args, kwargs), retain_graph=True) for _ in range(3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))
    double = torch.autograd.grad(loss, leaves(args, kwargs), torch.full_like(loss, 2.0))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, double, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(args, kwargs), strict=True))


# --- temperatures and easy pairs ------------------------------------------------------------------------------------


def softmax_cases() -> list[LossCase]:
    return [c for c in HOT if c.name != "siglip"]


@pytest.mark.parametrize("case", softmax_cases(), ids=case_id)
@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("easy", [False, True])
def test_any_temperature(case: LossCase, temperature: float, easy: bool, backend: str) -> None:
    number = {"scale": 1 / temperature} if case.name == "clip" else {"temperature": temperature}
    args, kwargs = case.inputs(21, 24, device=DEVICE, easy=easy, **number)
    # A logit of size 1 / tau has a rounding error of eps / tau, and it is the logit that the loss is a function of.
    eps = torch.finfo(torch.float32).eps
    tolerance = 1e-6 + 4 * eps / temperature, 1e-5 + 8 * eps / temperature
    floor = 1e-30  # losses below e^-69 and their gradients leave fp32's normal numbers
    got, got_grads = loss_and_grads(getattr(functional, case.name), args, kwargs)
    want, want_grads = exact(case, args, kwargs)
    assert_close(got, want, tolerance[0], floor=floor, what="loss")
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_close(g, w, tolerance[1], floor=floor, what="gradient")


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_easy_pairs_keep_their_digits(name: str, seed: int, backend: str) -> None:
    """A loss of about 1e-14, which cross-entropy in fp32 rounds to 0, is right to 1e-5; so is its gradient."""
    case = ONE[name]
    number = {"scale": 50.0} if name == "clip" else {"temperature": 0.02}
    args, kwargs = case.inputs(33, 400, device=DEVICE, seed=seed, easy=True, **number)
    want, _ = exact(case, args, kwargs)
    assert 0 < want < 1e-13
    if name == "nt_xent":
        s = (args[0] @ args[0].T / 0.02).fill_diagonal_(-torch.inf)
        assert torch.nn.functional.cross_entropy(s, torch.arange(66, device=DEVICE).roll(33)) == 0
    check_case(case, args, kwargs, tolerance=(1e-5, 1e-5))


# --- degenerate batches ---------------------------------------------------------------------------------------------


@each_case_and_backend
@pytest.mark.parametrize("batch", [0, 1])
def test_tiny_batches(case: LossCase, batch: int, backend: str) -> None:
    args, kwargs = case.inputs(batch, 6, device=DEVICE)
    for reduction in ("mean", "sum"):
        check_case(case, args, kwargs, **cancelling(case, batch), reduction=reduction)


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip", "dcl"])
def test_no_negatives_is_a_loss_of_zero(name: str, backend: str) -> None:
    loss, grads = loss_and_grads(getattr(functional, name), *ONE[name].inputs(1, 6, device=DEVICE))
    assert loss == 0
    assert all((g == 0).all() for g in grads)


def test_supcon_without_positives_is_zero_and_not_counted(backend: str) -> None:
    z = ONE["supcon"].inputs(3, 5, device=DEVICE)[0][0]
    loss, (grad,) = loss_and_grads(functional.supcon, [z, torch.arange(6, device=DEVICE)], {"temperature": 0.1})
    assert loss == 0
    assert (grad == 0).all()
    labels = torch.tensor([4, 7, 4, 9, 7, 4], device=DEVICE)  # 9 is alone
    rows = functional.supcon(z, labels, temperature=0.1, reduction="none")
    assert rows[3] == 0
    assert_close(functional.supcon(z, labels, temperature=0.1), rows.sum() / 5, 1e-6)


@each_case_and_backend
def test_equal_rows_are_finite(case: LossCase, backend: str) -> None:
    args, kwargs = case.inputs(5, 7, device=DEVICE)

    def equal(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.ndim >= 2 and t.is_floating_point()):
            return t
        return t.detach()[:1].expand_as(t).contiguous().requires_grad_(t.requires_grad)

    args, kwargs = [equal(a) for a in args], {k: equal(v) for k, v in kwargs.items()}
    want, _ = exact(case, args, kwargs)
    got, grads = loss_and_grads(getattr(functional, case.name), args, kwargs)
    assert_close(got, want, 1e-6)
    assert all(g.isfinite().all() for g in grads)


@each_case_and_backend
def test_a_nan_row_gives_a_nan_loss(case: LossCase, backend: str) -> None:
    args, kwargs = case.inputs(5, 7, device=DEVICE)
    with torch.no_grad():
        args[0][2] = math.nan
    assert getattr(functional, case.name)(*args, **kwargs).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [0.0, 1e-30, 6e4])
def test_one_odd_row_does_not_poison_the_batch(dtype: torch.dtype, length: float, backend: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(12, 16, device=DEVICE)
    x[4] *= length / x[4].norm()
    x = x.to(dtype).requires_grad_()
    loss = fastcl.NTXentLoss(0.2)(x)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert grad.isfinite().all()
    if not x[4].any():
        assert (grad[4] == 0).all()
    exact_x = x.detach().double().requires_grad_()
    norm = exact_x.norm(dim=1, keepdim=True)
    unit = exact_x / norm.masked_fill(norm == 0, 1)
    want = reference.nt_xent(unit.to(dtype).double() if dtype != torch.float32 else unit, temperature=0.2)
    (want_grad,) = torch.autograd.grad(want, exact_x)
    others = [i for i in range(12) if i != 4]
    assert_close(loss, want, TOLERANCE[dtype][0])
    assert_close(grad[others], want_grad[others], TOLERANCE[dtype][1])


# --- dtypes, autocast, compile --------------------------------------------------------------------------------------


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@each_case
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_operands_and_nothing_else(case: LossCase, autocast: torch.dtype | None) -> None:
    """Rows of every dtype; fp64 ones are left alone. Temperature, scale and bias stay fp32, so do their gradients."""
    for dtype in FLOATS:
        args, kwargs = case.inputs(17, 24, device=DEVICE, dtype=dtype)
        with torch.autocast(DEVICE, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss, grads = loss_and_grads(getattr(functional, case.name), args, kwargs)
        numbers = torch.promote_types(dtype, torch.float32)
        assert loss.dtype == numbers
        assert all(g.dtype == (dtype if g.ndim > 1 else numbers) for g in grads)
        operands = dtype if autocast is None or dtype == torch.float64 else autocast

        def rounded(t: Any, operands: torch.dtype = operands) -> Any:
            if not (isinstance(t, Tensor) and t.ndim >= 2 and t.is_floating_point()):
                return t
            return t.detach().to(operands).to(t.dtype).requires_grad_(t.requires_grad)

        # a guide is multiplied as it is: its verdicts are compared with a limit
        named = {k: v if k.startswith("guide") else rounded(v) for k, v in kwargs.items()}
        want, want_grads = exact(case, [rounded(a) for a in args], named)
        tolerance = max(TOLERANCE[operands], TOLERANCE[dtype])
        assert_close(loss, want, tolerance[0])
        for g, w in zip(grads, want_grads, strict=True):
            rounding = 2.0**-25 * g.numel() ** 0.5 if g.dtype == torch.float16 else 0.0  # as in check_case
            assert_close(g, w, tolerance[1], floor=rounding)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in HOT if c.numbers], ids=case_id)
def test_a_gradient_scaler_scales_and_skips(case: LossCase, autocast: torch.dtype) -> None:
    """Gradients of a scaled loss are those of the loss; where one row is infinite, the step is skipped, and the scale
    halved."""
    args, kwargs = case.inputs(9, 16, device=DEVICE)
    wanted = leaves(args, kwargs)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    optimizer = torch.optim.SGD(wanted, lr=0.1)

    def backward() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=autocast):
            loss = getattr(functional, case.name)(*args, **kwargs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)

    with torch.autocast(DEVICE, dtype=autocast):
        _, want = loss_and_grads(getattr(functional, case.name), args, kwargs)
    backward()
    for leaf, w in zip(wanted, want, strict=True):
        assert_close(leaf.grad, w, 1e-6)  # scaled by a power of 2: bit for bit, but for fp16 weights
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    with torch.no_grad():
        args[0][2] = math.inf
    before = [t.detach().clone() for t in wanted]
    backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    assert all(map(torch.equal, before, wanted))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_mixed_dtypes_compute_in_the_wider(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    (image, text), kwargs = ONE["clip"].inputs(9, 16, device=DEVICE)
    args = [t.detach().to(d).requires_grad_() for t, d in zip((image, text), dtypes, strict=True)]
    loss, grads = loss_and_grads(functional.clip, args, kwargs)
    want, want_grads = exact(ONE["clip"], args, kwargs)
    assert_close(loss, want, 1e-6)
    for g, w, leaf in zip(grads, want_grads, leaves(args, kwargs), strict=True):
        assert g.dtype == leaf.dtype
        assert_close(g, w, 5e-3)


@pytest.mark.parametrize("case", [c for c in CASES if c.compiles], ids=case_id)
def test_compiles_as_one_graph(case: LossCase) -> None:
    args, kwargs = case.inputs(9, 8, device=DEVICE)
    eager = loss_and_grads(getattr(functional, case.name), args, kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(functional, case.name), fullgraph=True, backend="aot_eager")
    loss, grads = loss_and_grads(compiled, args, kwargs)
    assert_close(loss, eager[0], 1e-6)
    for a, b in zip(grads, eager[1], strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.compiles], ids=case_id)
def test_every_batch_size_after_the_second_is_compiled(case: LossCase) -> None:
    """The graph of the second serves them all: nothing in a formula fixes the number of rows."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = getattr(functional, case.name)
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for batch in range(3, 13):
        args, kwargs = case.inputs(batch, 8, device=DEVICE)
        (_, got), (_, want) = (loss_and_grads(f, args, kwargs) for f in (compiled, loss))
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, 1e-5)
    assert graphs.frame_count <= 2


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="counts CPU allocations")
@pytest.mark.parametrize("name", ["nt_xent", "clip", "siglip", "supcon"])
def test_no_matrix_is_allocated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of 16,384 rows stay under 1/16 of the N x N fp32 matrix (64 of 1,024 MiB)."""
    n = 16384
    batch = n if name in ("clip", "siglip") else n // 2
    args, kwargs = ONE[name].inputs(batch, 4)
    step = getattr(functional, name)
    monkeypatch.setattr(_settings, "workspace_bytes", 2**20)  # a setting bounds what may be kept beside
    peak = peak_bytes(lambda: torch.autograd.grad(step(*args, **kwargs), args[0]))
    assert peak < 4 * n * n / 16, f"{peak / 2**20:.0f} MiB"


@pytest.mark.skipif(DEVICE != "cpu", reason="counts CPU allocations")
@pytest.mark.parametrize("case", [c for c in CASES if c.name != "triplet_all"], ids=case_id)
def test_the_family_allocates_no_matrix(case: LossCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of 4,096 rows stay under a quarter of one 4,096 x 4,096 fp32 matrix (64 MiB)."""
    monkeypatch.setattr(_settings, "workspace_bytes", 2**20)
    args, kwargs = case.inputs(4096 // max(case.rows(1)[0], 1), 4)
    step = getattr(functional, case.name)
    peak = peak_bytes(lambda: torch.autograd.grad(step(*args, **kwargs), leaves(args, kwargs)))
    assert peak < 4 * 4096**2 / 4, f"{peak / 2**20:.0f} MiB"


def test_dense_memory_would_be_noticed() -> None:
    """The measurement above is not blind: it sees the dense loss's matrix."""
    args, kwargs = ONE["nt_xent"].inputs(512, 4)
    assert peak_bytes(lambda: reference.nt_xent(*args, **kwargs)) > 4 * 1024**2


@pytest.mark.skipif(DEVICE != "cpu", reason="counts CPU allocations")
def test_no_backward_buffers_without_a_gradient() -> None:
    q, k = (torch.randn(2048, 64) for _ in range(2))
    with_grad = peak_bytes(lambda: functional.info_nce(q.requires_grad_(), k, k, temperature=0.1))
    frozen = peak_bytes(lambda: functional.info_nce(q.detach(), k, k, temperature=0.1))
    assert frozen <= with_grad - q.nbytes


@pytest.mark.skipif(DEVICE != "cpu", reason="counts CPU allocations")
@pytest.mark.parametrize("case", HOT, ids=case_id)
def test_whoever_wants_no_gradient_pays_for_none(case: LossCase) -> None:
    """The same bytes for frozen rows, ``no_grad`` and ``inference_mode``, and the same bits."""
    args, kwargs = case.inputs(301, 24)
    function = getattr(functional, case.name)

    def frozen(t: Any) -> Any:
        return t.detach() if isinstance(t, Tensor) else t

    still = [frozen(a) for a in args], {name: frozen(value) for name, value in kwargs.items()}

    def within(mode: Any) -> Any:
        def step() -> Tensor:
            with mode():
                return function(*args, **kwargs)

        return step

    steps = [lambda: function(*still[0], **still[1]), within(torch.no_grad), within(torch.inference_mode)]
    assert len({peak_bytes(step) for step in steps}) == 1
    loss, *others = (step() for step in steps)
    assert all(torch.equal(loss, other) and not other.requires_grad for other in others)
    if native._C is not None:  # chunked needs no more of a forward whose gradient follows
        native.release_workspace()
        assert peak_bytes(lambda: function(*args, **kwargs)) > peak_bytes(steps[0])  # so that it can be seen


@pytest.mark.skipif(DEVICE != "cpu", reason="counts CPU allocations")
@pytest.mark.parametrize("backend", ["native", "chunked"], indirect=True)
def test_frozen_keys_cost_no_gradient(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward together; half of what the gradient of a queue takes is far more than all the rest."""
    monkeypatch.setattr(_settings, "workspace_bytes", 0)
    q, k = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)
    queue = torch.randn(4096, 64)

    def step() -> Any:
        return torch.autograd.grad(functional.info_nce(q, k, queue, temperature=0.1), q)

    frozen = peak_bytes(step)
    queue.requires_grad_()
    assert frozen <= peak_bytes(step) - queue.nbytes / 2


# --- refusals -------------------------------------------------------------------------------------------------------

Z = torch.randn(6, 4)


def test_second_derivatives_are_refused_and_reference_is_the_way_out() -> None:
    z = l2_normalize(Z.double()).requires_grad_()
    (grad,) = torch.autograd.grad(functional.nt_xent(z, temperature=0.3), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastcl\.reference"):
        grad.sum().backward()
    (plain,) = torch.autograd.grad(reference.nt_xent(z, temperature=0.3), z, create_graph=True)
    assert_close(grad, plain, 1e-12)
    plain.sum().backward()


def test_functorch_is_refused_and_reference_is_the_way_out() -> None:
    def gradient(module: object) -> Tensor:
        return torch.func.grad(lambda z: module.nt_xent(z, temperature=0.3))(Z)  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match=r"fastcl\.reference"):
        gradient(functional)
    assert gradient(reference).shape == Z.shape
    with pytest.raises(RuntimeError, match=r"fastcl\.reference"):
        torch.vmap(lambda z: functional.nt_xent(z, temperature=0.3))(Z.expand(3, 6, 4))


# --- the assertions themselves, and threads -------------------------------------------------------------------------


def test_eight_threads_agree() -> None:
    args, kwargs = ONE["clip"].inputs(40, 16)
    want = loss_and_grads(functional.clip, args, kwargs)[1]
    found: list[tuple[Tensor, ...]] = []
    workers = [
        threading.Thread(target=lambda: found.append(loss_and_grads(functional.clip, args, kwargs)[1]))
        for _ in range(8)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(found) == 8
    assert all(torch.equal(a, b) for grads in found for a, b in zip(grads, want, strict=True))


WRONG_GRADIENTS = {
    "zero": lambda dx: torch.zeros_like(dx),
    "negated": lambda dx: -dx,
    "doubled": lambda dx: 2 * dx,
    "1 % large": lambda dx: 1.01 * dx,
    "one row off": lambda dx: dx.roll(1, 0),
    "one column off": lambda dx: dx.roll(1, 1),
    "last row missing": lambda dx: torch.cat([dx[:-1], torch.zeros_like(dx[-1:])]),
    "one NaN": lambda dx: dx.index_fill(0, torch.tensor([0]), math.nan),
    "bf16": lambda dx: dx.bfloat16().float(),
}
WRONG_SUMS = {
    "1e-5 large": lambda r: r * (1 + 1e-5),
    "one term short": lambda r: r - 1e-3,
    "shuffled": lambda r: r.roll(1),
    "inf": lambda r: r + torch.inf,
}


@each_summed_case
@pytest.mark.parametrize("fault", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_noticed(case: LossCase, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.grad

    def wrong(*args: object) -> tuple[Tensor, ...]:
        dx, dy, *sums = right(*args)  # type: ignore[arg-type]
        return (*(WRONG_GRADIENTS[fault](d) if d.numel() else d for d in (dx, dy)), *sums)

    args, kwargs = case.inputs(9, 8)
    monkeypatch.setattr(chunked, "grad", wrong)
    with fastcl.use_backend("chunked"), pytest.raises(AssertionError, match="gradient"):
        check_case(case, args, kwargs)


@pytest.mark.parametrize(
    ("case", "fault"),
    # what is wrong with two sums cancels in their difference
    [
        (c, f)
        for c in CASES
        if c.summed
        for f in WRONG_SUMS
        if not (f == "one term short" and c.label in ("hard_nt_xent", "supcon-in"))
    ],
    ids=case_id,
)
def test_a_wrong_sum_is_noticed(case: LossCase, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.reduce

    def wrong(*args: object) -> tuple[Tensor, Tensor]:
        row, col = right(*args)  # type: ignore[arg-type]
        return WRONG_SUMS[fault](row), col

    args, kwargs = case.inputs(9, 8)
    monkeypatch.setattr(chunked, "reduce", wrong)
    with fastcl.use_backend("chunked"), pytest.raises(AssertionError, match="loss"):
        check_case(case, args, kwargs, reduction="none")
