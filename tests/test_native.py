"""What is native's own: every instruction set, threads, forks, memory edges, what it keeps, and living without it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl
from fastcl import _measure, _settings, functional, pairwise, reference
from fastcl.backends import Pairs, Sides, chunked, native
from fastcl.testing import HOT, LossCase

from .oracle import assert_close, check_case, loss_and_grads

pytestmark = pytest.mark.skipif(native._C is None, reason="the native module is not built here: fastcl info says why")
SETS = native._C.instruction_sets() if native._C is not None else []


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set of this machine."""
    monkeypatch.setattr(_settings, "cpu_isa", request.param)
    with fastcl.use_backend("native"):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def doubles(pairs: Pairs) -> Pairs:
    return Pairs(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in pairs))


def pairs_of(m: int, n: int, d: int, *, masked: bool = False, symmetric: bool = False, scale: float = 9.0) -> Pairs:
    generator = torch.Generator().manual_seed(m + n + d)
    x, y = (normalize(torch.randn(r, d, generator=generator), dim=1) for r in (m, n))
    if symmetric:
        y, n = x, m
    plain = Pairs(x, y, torch.tensor(scale), symmetric=symmetric)
    if not masked:
        return plain
    keys = [torch.randint(5, (r,), generator=generator) for r in (m, n)]
    if symmetric:
        return plain._replace(drop_x=torch.arange(m), drop_y=torch.arange(m), only_x=keys[0], only_y=keys[0])
    bias = [torch.randn(r, generator=generator) for r in (m, n)]
    return plain._replace(row_bias=bias[0], col_bias=bias[1], drop_x=keys[0], drop_y=keys[1], row_ceiling=bias[0] + 3)


def run(link: str, pairs: Pairs, backend: object, keep: bool = False) -> list[Tensor]:
    """Everything a backend computes for these pairs."""
    both = not pairs.symmetric
    row, col = backend.reduce(link, pairs, both, keep)  # type: ignore[attr-defined]
    m, n = len(pairs.x), len(pairs.y)
    ups = torch.linspace(0.5, 1.5, m, dtype=row.dtype), torch.linspace(-1.0, 2.0, n, dtype=row.dtype)
    lse = [t.masked_fill(t == -torch.inf, torch.inf) for t in (row, col)]
    sides = Sides(lse[0], ups[0], lse[0], ups[0]) if pairs.symmetric else Sides(lse[0], ups[0], lse[1], ups[1])
    dx, dy, row_sum, col_sum = backend.grad(link, pairs, sides, True, both, True)  # type: ignore[attr-defined]
    return [row, col, dx, dy, row_sum, *([] if pairs.symmetric else [col_sum])]


@pytest.mark.parametrize("scale", [20.0, 77.7, -100.0])
@pytest.mark.parametrize(("m", "n"), [(199, 1), (1, 23), (70, 60)])
def test_the_unit_of_length_changes_no_bit(m: int, n: int, scale: float) -> None:
    """Found by the nightly invariants: the shift of the exponents knew the lengths of rows."""
    pairs = pairs_of(m, n, 51, scale=scale)
    want = run("exp", pairs, native)
    one_pass = native.reduce_grad("exp", pairs, True, False, True)  # None where two do it
    for a, b in ((4.0, 0.5), (32.0, 32.0), (0.25, 8.0), (1 / 32, 1 / 32)):
        other = pairs._replace(x=pairs.x * a, y=pairs.y * b, scale=pairs.scale / (a * b))
        row, col, dx, dy, row_sum, col_sum = run("exp", other, native)
        for got, exact in zip((row, col, dx / b, dy / a, row_sum, col_sum), want, strict=True):
            assert torch.equal(got, exact)
        if (found := native.reduce_grad("exp", other, True, False, True)) is None or one_pass is None:
            assert found is one_pass
            continue
        assert torch.equal(found[0], one_pass[0]) and torch.equal(found[1] / b, one_pass[1])


def views(b: int, d: int, raw: torch.dtype, stacked: bool) -> list[Tensor]:
    """Rows of any length, one of them 0, in an order of memory that is nobody's favourite."""
    generator = torch.Generator().manual_seed(b + d)
    first = torch.randn(d, b, generator=generator).mul_(torch.linspace(0.5, 2, b)).T
    second = first + torch.randn(d, b, generator=generator).T
    first[2 % b] = 0.0
    return [t.to(raw) for t in ([torch.cat([first, second])] if stacked else [first, second])]


@pytest.mark.parametrize("scale", [6.0, 700.0])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("raw", "dtype", "limit"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.bfloat16, 4e-3),
        (torch.float32, torch.float16, 2e-6),  # multiplied, and weighed, in fp32
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.float16, torch.float16, 5e-4),
    ],
)
def test_contrastive(raw: torch.dtype, dtype: torch.dtype, limit: float, stacked: bool, scale: float) -> None:
    """Losses, gradients of raw rows and of the scale, against the formulas in fp64 of the rows as they are rounded."""
    for normalized in (True, False):
        for both in {False, not stacked}:
            rows, by = views(235, 41, raw, stacked), torch.tensor(scale)
            if not normalized:
                rows = [normalize(t.float(), dim=1).to(raw) for t in rows]
            x, y = (*rows, None)[:2]
            loss, *saved = native.contrastive(x, y, by, dtype, normalized, both, True)
            limit = max(limit, 2e-8 * scale)  # what fp32 leaves of so large a logit
            up = torch.linspace(1, 2, len(loss))
            dx, dy, dots = native.contrastive_grad(x, y, by, up, tuple(saved), True, not stacked)
            assert dx.dtype == raw and saved[0].dtype == dtype

            exact = [t.double().requires_grad_() for t in rows]
            unit = [pairwise.l2_normalize(t) for t in exact] if normalized else exact
            z = saved[0].double().split(len(x))
            rounded = [u + (ours - u).detach() for u, ours in zip(unit, z, strict=True)]  # and back as if they were not
            for ours, row in zip(z, unit, strict=True):
                assert_close(ours, row.detach(), 1e-7 if dtype == torch.float32 else 4e-3)
            by = by.double().requires_grad_()
            if stacked:
                want = reference.nt_xent(rounded[0], temperature=1 / by, normalize=False, reduction="none")
            else:
                ways = [rounded, rounded[::-1]][: 1 + both]
                want = torch.cat(
                    [reference.info_nce(*way, temperature=1 / by, normalize=False, reduction="none") for way in ways]
                )
            grads = torch.autograd.grad((want * up).sum(), [*exact, by])
            assert_close(loss, want, 1e-6 + 1e-8 * scale, what="loss")
            for got, g in zip((dx, dy), grads[: len(rows)], strict=False):
                assert_close(got, g, limit, floor=1e-12)
            if normalized and raw == torch.float32:  # a tangent of the row as it came, not as it was rounded
                radial = (dx.double() * x.double()).sum(1).abs()
                assert (radial <= 1e-6 * dx.double().norm(dim=1) * x.double().norm(dim=1) + 1e-36).all()
            dscale = 0.5 * dots.sum() if stacked else dots[:235].sum()
            assert_close(dscale, grads[-1], min(4 * limit, 5e-3), what="scale")  # terms of either sign


def test_contrastive_of_a_pair_that_has_no_negatives() -> None:
    x = views(1, 8, torch.float32, True)[0]
    loss, *saved = native.contrastive(x, None, torch.tensor(3.0), torch.float32, True, False, True)
    dx, _, dots = native.contrastive_grad(x, None, torch.tensor(3.0), torch.ones(2), tuple(saved), True, False)
    assert not loss.any() and not dx.any() and not dots.any()


def test_contrastive_keeps_the_digits_of_easy_pairs() -> None:
    """Losses of 1e-9, with gradients of that size."""
    x = torch.eye(6, dtype=torch.float32).repeat(2, 1)
    by = torch.tensor(22.0)
    loss, *saved = native.contrastive(x, None, by, torch.float32, False, False, True)
    dx, _, _ = native.contrastive_grad(x, None, by, torch.ones(12), tuple(saved), True, False)
    exact = x.double().requires_grad_()
    want = reference.nt_xent(exact, temperature=1 / by.double(), normalize=False, reduction="none")
    assert 1e-9 < want.max() < 3e-9
    assert_close(loss, want, 1e-6)
    assert_close(dx, torch.autograd.grad(want.sum(), exact)[0], 1e-5)


def test_contrastive_of_nan() -> None:
    x, y = views(20, 24, torch.float32, False)
    y[4, 3] = torch.nan
    for normalized in (True, False):
        loss, *_ = native.contrastive(x, y, torch.tensor(3.0), torch.float32, normalized, True, False)
        assert loss.isnan().sum() == 21 and loss[24].isnan()  # every anchor of x, and the row itself


def test_contrastive_pays_for_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are kept only where a gradient follows, one gradient is computed alone, and is the same then."""
    kept: list[bool] = []
    real = native._reduce
    monkeypatch.setattr(native, "_reduce", lambda *args: (kept.append(args[2]), real(*args))[1])
    q, k = (t.requires_grad_() for t in views(20, 24, torch.float32, False))
    with fastcl.use_backend("native"):
        both = torch.autograd.grad(functional.clip(q, k, scale=6.0, normalize=True), [q, k])
        alone = [
            torch.autograd.grad(functional.clip(q, k.detach(), scale=6.0, normalize=True), q)[0],
            torch.autograd.grad(functional.clip(q.detach(), k, scale=6.0, normalize=True), k)[0],
        ]
        with torch.no_grad():
            functional.clip(q, k, scale=6.0, normalize=True)
        functional.clip(q.detach(), k.detach(), scale=6.0, normalize=True)
    assert kept == [True, True, True, False, False]
    for got, want in zip(alone, both, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("link", ["exp", "softplus"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [9.0, -4.0, 700.0])
def test_every_instruction_set(isa: str, link: str, masked: bool, symmetric: bool, scale: float) -> None:
    """Several blocks with a ragged last one; a scale of 700 takes the safe path."""
    p = pairs_of(461, 530, 37, masked=masked, symmetric=symmetric, scale=scale)
    exact = doubles(p)
    # fp32's rounding of a logit is 6e-8 of it, and the exponential makes it a relative error
    tolerance = 2e-6 if abs(scale) < 100 else 2e-4
    for got, want in zip(run(link, p, native), run(link, exact, chunked), strict=True):
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("link", ["exp", "softplus"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [9.0, -700.0])
def test_doubles_on_every_instruction_set(isa: str, link: str, masked: bool, symmetric: bool, scale: float) -> None:
    """Ragged in rows, columns and depth; 2e-16 of a logit of 700 is an error of 2e-13 of its exponential."""
    p = doubles(pairs_of(61, 261, 37, masked=masked, symmetric=symmetric, scale=scale))
    for got, want in zip(run(link, p, native), run(link, p, chunked), strict=True):
        assert got.dtype == torch.float64
        assert_close(got, want, 1e-14 if abs(scale) < 100 else 1e-12)


def test_softplus_keeps_its_digits_over_the_whole_range(isa: str) -> None:
    """Each alone: in a sum over many, a series that is wrong near 0 would hide."""
    logits = torch.linspace(-60, 60, 121)
    row, _ = native.reduce("softplus", Pairs(logits[:, None], torch.ones(1, 1), torch.tensor(1.0)), False, False)
    for got, want in zip(row, torch.logaddexp(logits.double(), torch.zeros(()).double()), strict=True):
        assert_close(got, want, 1e-6 + 6e-8 * float(want.log().abs()))  # a rounded exponent is off by as much


@pytest.mark.parametrize("case", HOT, ids=lambda c: c.label)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_loss_on_every_instruction_set(isa: str, case: LossCase, dtype: torch.dtype) -> None:
    args, kwargs = case.inputs(19, 45, dtype=dtype)
    check_case(case, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_same_bits_for_any_number_of_threads(symmetric: bool, keep: bool, dtype: torch.dtype, threads: None) -> None:
    p = pairs_of(1201, 999, 24, masked=True, symmetric=symmetric)
    if dtype == torch.float64:
        p = doubles(p)
    torch.set_num_threads(1)
    want = run("exp", p, native)
    for n in (2, 5):
        torch.set_num_threads(n)
        for _ in range(3):
            for got, w in zip(run("exp", p, native, keep), want, strict=True):
                assert torch.equal(got, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits_kept_or_computed_again(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiles kept, some of them, none."""
    p = pairs_of(700, 700, 24, symmetric=True)
    p = p._replace(x=p.x.to(dtype), y=p.y.to(dtype))
    want = run("exp", p, native)
    for budget in (0, 2**19, 2**21):
        monkeypatch.setattr(_settings, "workspace_bytes", budget)
        for link in ("exp", "softplus"):
            kept = run(link, p, native, keep=True)
            assert bool(native._workspace.count) == (budget > 0)
            for got, w in zip(kept, want if link == "exp" else run(link, p, native), strict=True):
                assert torch.equal(got, w)


@pytest.mark.parametrize("what", ["rows", "keys", "scale", "another forward"])
def test_kept_tiles_serve_only_the_operands_they_were_made_of(what: str) -> None:
    p = pairs_of(40, 50, 8, masked=True)
    p = p._replace(x=p.x.clone())
    row, _ = native.reduce("exp", p, False, True)
    sides = Sides(row.masked_fill(row == -torch.inf, torch.inf), torch.ones_like(row))
    if what == "rows":
        p.x[17, 3] += 0.5
    elif what == "keys":
        p.drop_x[5] += 1  # type: ignore[index]
    elif what == "scale":
        p = p._replace(scale=p.scale * 1.01)
    else:
        native.reduce("exp", p._replace(x=-p.x), False, True)
    fresh = run_grad(p, sides)
    native._workspace.count = 0
    for got, want in zip(fresh, run_grad(p, sides), strict=True):
        assert torch.equal(got, want)


def run_grad(p: Pairs, sides: Sides) -> tuple[Tensor, ...]:
    return native.grad("exp", p, sides, True, True, True)


def test_nothing_is_kept_without_a_gradient() -> None:
    z = normalize(torch.randn(900, 16), dim=1)
    native.release_workspace()
    with fastcl.use_backend("native"):
        fastcl.functional.nt_xent(z, temperature=0.1)
    assert not native._workspace.tiles.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_reads_nothing_beside_its_inputs(isa: str, dtype: torch.dtype) -> None:
    """NaN before, behind and between the rows: one read of them and the result is NaN."""
    p = pairs_of(33, 70, 21, masked=True)
    if dtype == torch.float64:
        p = doubles(p)

    def guarded(t: Tensor) -> Tensor:
        big = torch.full((t.shape[0] + 4, *(2 * s + 3 for s in t.shape[1:])), torch.nan).to(t.dtype)
        inner = big[(slice(2, -2), *(slice(1, 2 * s, 2) for s in t.shape[1:]))]
        return inner.copy_(t)

    rows = [t.to(dtype) for t in (p.x, p.y)]
    plain = p._replace(x=rows[0], y=rows[1])
    strided = p._replace(
        x=guarded(rows[0]),
        y=guarded(rows[1]),
        row_bias=guarded(p.row_bias),  # type: ignore[arg-type]
        col_bias=guarded(p.col_bias),  # type: ignore[arg-type]
    )
    for got, want in zip(run("exp", strided, native), run("exp", plain, native), strict=True):
        assert torch.equal(got, want)
    unit, length = native.normalize(strided.x)
    assert torch.equal(unit, native.normalize(plain.x)[0])
    got, want = (native.normalize_grad(t.x, length, t.y[:33]) for t in (strided, plain))
    assert torch.equal(got, want)


def test_writes_nothing_beside_its_outputs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guards = []

    def canaries(shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> Tensor:
        n = torch.Size(shape).numel()
        buffer = torch.full((n + 64,), 77, dtype=dtype)
        guards.append((buffer, n))
        return buffer[32 : n + 32].fill_(fill).view(shape)

    def new(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return canaries(shape if wanted else (0,), 0, dtype)

    monkeypatch.setattr(native, "_new", new)
    monkeypatch.setattr(native, "_bytes", lambda n: canaries((n,), 0, torch.uint8))
    native.release_workspace()
    run("exp", pairs_of(33, 70, 21, masked=True), native, keep=True)
    run("exp", pairs_of(235, 235, 16, symmetric=True), native)
    native.topk(pairs_of(33, 70, 21), 3)
    run("exp", doubles(pairs_of(33, 70, 21, masked=True)), native)
    native.topk(doubles(pairs_of(33, 70, 21)), 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(33, 21).to(dtype)
        native.normalize_grad(x, native.normalize(x)[1], x)
    native.release_workspace()
    assert guards
    for buffer, n in guards:
        assert (buffer[:32] == 77).all() and (buffer[n + 32 :] == 77).all()


def test_safe_from_several_python_threads() -> None:
    p = [pairs_of(300 + i, 280, 16, masked=True) for i in range(4)]
    want = [run("exp", q, native) for q in p]
    wrong = []

    def work(i: int) -> None:
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(run("exp", p[i], native, True), want[i], strict=True)):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_computes() -> None:
    """In a process of its own: the parent has used its worker threads, the child needs new ones."""
    code = """
import os, torch
from fastcl.backends import native, Pairs
torch.set_num_threads(3)
x = torch.ones(900, 8); p = Pairs(x, x, torch.tensor(1.0), symmetric=True)
want = native.reduce("exp", p, False, False)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(native.reduce("exp", p, False, False)[0], want) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_thread_at_import() -> None:
    code = "import torch; a = len(__import__('os').listdir('/proc/self/task')); import fastcl; from fastcl.backends "
    code += "import native; assert len(__import__('os').listdir('/proc/self/task')) == a"
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads in /proc")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_lower_instruction_set_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_settings, "cpu_isa", "baseline")
    assert native.isa() == "baseline"
    assert native.status().startswith("baseline kernels, of ")
    monkeypatch.setattr(_settings, "cpu_isa", None)
    assert native.isa() == SETS[0]


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    code = "from fastcl.backends import native; print(native.isa())"
    environment = {**os.environ, "FASTCL_CPU_ISA": "avx9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == SETS[0]
    assert "FASTCL_CPU_ISA is 'avx9'; expected one of" in done.stderr


def test_tiny_upstream_gradients_keep_their_digits() -> None:
    """One row's gradient is 1e-30 of another's: below what a common factor can hold, the safe path takes over."""
    p = pairs_of(50, 60, 8)
    row, _ = native.reduce("exp", p, False, False)
    g = torch.ones(50)
    g[7] = 1e-37
    got, *_ = native.grad("exp", p, Sides(row, g), True, False, False)
    want, *_ = native.grad("exp", p, Sides(row, torch.ones(50)), True, False, False)
    assert_close(got[7] * 1e37, want[7], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_reaches_its_results_and_no_others(bad: float, dtype: torch.dtype) -> None:
    p = pairs_of(50, 60, 8)
    p.x[11, 3] = bad
    if dtype == torch.float64:
        p = doubles(p)
    row, _ = native.reduce("exp", p, False, False)
    assert not row[11].isfinite()
    others = torch.arange(50) != 11
    want, _ = chunked.reduce("exp", p, False, False)
    assert_close(row[others], want[others], 1e-6)


def test_keys_beyond_32_bits() -> None:
    p = pairs_of(40, 50, 8, masked=True)
    far = p._replace(drop_x=p.drop_x * 2**40 - 3, drop_y=p.drop_y * 2**40 - 3)  # type: ignore[operator]
    for got, want in zip(run("exp", far, native), run("exp", p, native), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_of_ties_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0], [float("nan")]], dtype=dtype)
    y = torch.tensor([[2.0], [3.0], [3.0], [1.0]], dtype=dtype)
    values, indices = native.topk(Pairs(x, y, torch.tensor(1.0, dtype=dtype)), 3)
    assert indices[0].tolist() == [1, 2, 0] and values[0].tolist() == [3, 3, 2]
    assert values[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_over_several_tiles(dtype: torch.dtype) -> None:
    p = pairs_of(230, 530, 8, masked=True)
    if dtype == torch.float64:
        p = doubles(p)
    (values, indices), (want, at) = native.topk(p, 7), chunked.topk(p, 7)
    assert_close(values, want, 2e-6 if dtype == torch.float32 else 1e-14)
    assert torch.equal(indices, at) and (indices > 400).any()


def test_what_is_kept_is_measured_and_given_back() -> None:
    z = normalize(torch.randn(1024, 16), dim=1).requires_grad_()

    def step() -> object:
        with fastcl.use_backend("native"):
            return torch.autograd.grad(functional.nt_xent(z, temperature=0.1), z)

    native.release_workspace()
    first, again = _measure.peak_bytes(step), _measure.peak_bytes(step)
    assert first > again + 1024 * 1024 * 4 / 2
    native.release_workspace()
    assert _measure.peak_bytes(step) > again + 1024 * 1024 * 4 / 2


def test_without_the_module_there_is_nothing_to_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    native.release_workspace()
    assert native.isa() is None  # as `fastcl bench --peers` notes


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_settings, "workspace_bytes", 0)
    z = normalize(torch.randn(8192, 16), dim=1).requires_grad_()
    with fastcl.use_backend("native"):
        peak = _measure.peak_bytes(
            lambda: torch.autograd.grad(functional.nt_xent(z, temperature=0.1), z), torch.device("cpu")
        )
    assert peak < 16 * z.nbytes


def test_without_the_module_torch_runs_and_a_sentence_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = tmp_path / "_native_build.txt"
    report.write_text("c++ failed on csrc/kernels.cpp\n\nc++ -O3 ...\n", encoding="utf-8")
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_why_missing", "No module named fastcl._C", raising=False)
    monkeypatch.setattr(native, "_BUILD_REPORT", report)
    z = torch.randn(6, 4)
    said = fastcl.explain("nt_xent", z)
    assert ": chunked" in said
    assert (
        f"not native: the native module was not built (c++ failed on csrc/kernels.cpp); the build log is {report}"
        in said
    )
    report.unlink()
    assert "this installation has no native module" in fastcl.explain("nt_xent", z)
    with fastcl.use_backend("native"), pytest.raises(RuntimeError, match="no native module"):
        functional.nt_xent(z, temperature=0.1)


def test_halves_are_rounded_as_torch_rounds_them() -> None:
    """To the nearest, also among subnormal numbers and beyond the largest: gradients of short rows overflow."""
    x = torch.randn(400, 24) * torch.logspace(0, -7, 24)
    for dtype in (torch.float16, torch.bfloat16):
        rows = x.to(dtype)
        wide = rows.double()
        want = (wide / wide.norm(dim=1, keepdim=True)).float().to(dtype)
        got, length = native.normalize(rows)
        assert torch.equal(got, want)
        short = rows * 2.0**-16
        length = length * 2.0**-16
        grads = [b.normalize_grad(short, length, rows.flip(0)) for b in (native, chunked)]
        assert grads[0].isinf().any() == (dtype == torch.float16)
        assert_close(*grads, 1e-3)


def test_compiled_losses_use_what_was_kept() -> None:
    case = HOT[0]
    args, kwargs = case.inputs(150, 16)
    with fastcl.use_backend("native"):
        want = loss_and_grads(functional.nt_xent, args, kwargs)[1]
        native._workspace.count = 0
        got = loss_and_grads(torch.compile(functional.nt_xent, fullgraph=True, backend="aot_eager"), args, kwargs)[1]
    assert native._workspace.count
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 1e-6)
