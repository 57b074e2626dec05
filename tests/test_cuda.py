"""The CUDA C++ kernels, from their own source, on the simulator: ordinary memory, hostile timing, no GPU."""

import itertools
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

import setup
from benchmarks import probe
from fastcl import _ops, _settings, explain, functional, pairwise, reference, use_backend
from fastcl.backends import Pairs, Sides, _cuda, chunked, native
from fastcl.testing import HOT, LossCase

from .oracle import assert_close, check_case

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = ("sums", "grad", "hopper_sums", "hopper_grad", "hopper_wide", "vectors", "contrastive")
EXTRA_FLAGS = os.environ.get("FASTCL_CXXFLAGS", "").split()  # `make sanitize`
LINKS = ("exp", "softplus")
# Of a gradient, whose weights are rounded to the dtype of the rows before they are multiplied. fp32: sums of two bf16
# numbers differ from rows and weights by 2^-18 at most, as do products without that of the lower numbers.
GRADIENT = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 3e-5}
HALF = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", list(GRADIENT))
each_half = pytest.mark.parametrize("dtype", HALF)
SEEDS = (0, 7, 8, 21)  # both kinds of asynchronous work late, early, late, and copies early, products late


def build(folder: Path) -> ModuleType:
    """Compile the kernels for the simulator, of an earlier build only what changed, and load them."""
    pybind11 = pytest.importorskip("pybind11", reason="the simulator's Python module is made with pybind11")
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DFASTCL_SIMULATE", "-DFASTCL_HOPPER", *EXTRA_FLAGS]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-x", "c++"]
    sources = [*(f"csrc/cuda/{name}.cu" for name in SOURCES), "csrc/sim/module.cpp"]
    with patch.dict(os.environ):
        os.environ.pop("LD_PRELOAD", None)  # of `make sanitize`
        objects = setup.compiled({Path(source).stem: (source, ["g++", *flags]) for source in sources}, folder)
    library = folder / f"_simulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    gxx("-shared", *EXTRA_FLAGS, *objects, "-o", str(library))
    loader = ExtensionFileLoader("_simulated", str(library))
    module = module_from_spec(spec_from_loader("_simulated", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def gxx(*args: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of `make sanitize`
    done = subprocess.run(["g++", *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if sys.platform != "linux":
        pytest.skip("the simulator is built with g++ on Linux")
    kept = os.environ.get("TEST_SIMULATOR")  # a folder of the checkout, whose objects serve the next run
    return build(Path(kept) if kept else tmp_path_factory.mktemp("simulator"))


class Guards:
    """Tensors between guards. Those are NaN, as what a kernel writes is at first: all of it must be written."""

    WIDTH = 1 << 16  # numbers; a tile of rows has fewer

    def __init__(self, forbid: Callable[[int, int], None]) -> None:
        self.forbid = forbid
        self.all: dict[int, torch.Tensor] = {}

    def new(self, x: torch.Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        inside = math.prod(shape)
        whole = torch.full((inside + 2 * self.WIDTH,), self.value(dtype), dtype=dtype)
        guard, end = self.WIDTH * whole.itemsize, (self.WIDTH + inside) * whole.itemsize
        self.forbid(whole.data_ptr(), guard)
        self.forbid(whole.data_ptr() + end, guard)
        self.all[whole.untyped_storage().data_ptr()] = whole
        return whole[self.WIDTH : -self.WIDTH].view(shape)

    def around(self, t: torch.Tensor) -> torch.Tensor:
        return t if t.untyped_storage().data_ptr() in self.all else self.new(t, *t.shape, dtype=t.dtype).copy_(t)

    def check(self) -> None:
        for whole in self.all.values():
            for guard in (whole[: self.WIDTH], whole[-self.WIDTH :]):
                untouched = guard.isnan() if guard.is_floating_point() else guard == self.value(guard.dtype)
                assert untouched.all(), "memory around a tensor was written"
        self.all.clear()

    @staticmethod
    def value(dtype: torch.dtype) -> float | int:
        return torch.nan if dtype.is_floating_point else 1 << 60


@pytest.fixture
def guards(simulator: ModuleType, family: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    """Whatever kernels read or write lies between guards."""
    guards, keep = Guards(simulator.forbid), _cuda._Call.keep

    def guarded(call: Any, t: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        kept = keep(call, t, dtype)
        if kept is not None:
            kept = call.tensors[-1] = guards.around(kept)
        return kept

    monkeypatch.setattr(_settings, "fp32", "bf16x3")
    monkeypatch.setattr(_cuda, "kernels", simulator)
    monkeypatch.setattr(_cuda, "_new", guards.new)
    monkeypatch.setattr(_cuda._Call, "keep", guarded)
    yield guards
    guards.check()


@pytest.fixture(params=["ampere", "hopper"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels multiply."""
    monkeypatch.setattr(_cuda, "family", lambda device: request.param)
    return str(request.param)


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, simulator: ModuleType, guards: Guards) -> int:
    simulator.seed(request.param)
    return int(request.param)


@pytest.fixture
def kernels(simulator: ModuleType, guards: Guards) -> ModuleType:
    simulator.seed(0)
    return simulator


def unit(n: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=1).to(dtype)


def integers(n: int, below: int, seed: int) -> torch.Tensor:
    return torch.randint(below, (n,), generator=torch.Generator().manual_seed(seed))


def one_set(n: int, d: int, dtype: torch.dtype, scale: float = 10.0) -> Pairs:
    z = unit(n, d, dtype)
    keys = torch.arange(n) // 2
    return Pairs(z, z, torch.tensor(scale), drop_x=keys, drop_y=keys, symmetric=True)


def two_sets(m: int, n: int, d: int, dtype: torch.dtype, masked: bool) -> Pairs:
    pairs = Pairs(unit(m, d, dtype), unit(n, d, dtype, 1), torch.tensor(5.0))
    if not masked:
        return pairs
    return pairs._replace(
        row_bias=torch.linspace(-1, 1, m), col_bias=torch.linspace(2, 0, n), drop_x=integers(m, 9, 0),
        drop_y=integers(n, 9, 1), only_x=integers(m, 2, 2), only_y=integers(n, 2, 3),
        row_ceiling=torch.linspace(1, 4, m), col_ceiling=torch.linspace(4, 1.5, n),
    )  # fmt: skip


def skip_what_is_too_long(d: int, dtype: torch.dtype) -> None:
    if reason := _cuda.unsupported("reduce", unit(2, d, dtype)):
        most = 128 if dtype == torch.float32 else 256
        assert d > most and reason.startswith(f"takes at most {most} features"), reason
        pytest.skip(reason)


def in_fp64(pairs: Pairs) -> Pairs:
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in pairs]
    return Pairs._make(wide)


def check(link: str, pairs: Pairs, tolerance: float = 1e-5) -> None:
    """Results and gradients of both sides against fp64."""
    exact, both = in_fp64(pairs), not pairs.symmetric
    row, col = chunked.reduce(link, exact, both, True)
    for got, want in zip(_cuda.reduce(link, pairs, both), (row, col), strict=True):
        assert_close(got, want, tolerance)
    rows = (row.masked_fill(row == -torch.inf, torch.inf), torch.linspace(0.5, 1.5, len(row)).double())
    cols = (col.masked_fill(col == -torch.inf, torch.inf), torch.linspace(2, 1, len(col)).double()) if both else rows
    choices = (
        [Sides(*rows, *cols)] if pairs.symmetric else [Sides(*rows, *cols), Sides(*rows), Sides(None, None, *cols)]
    )
    for sides in choices:
        narrow = Sides(*(t if t is None else t.float() for t in sides))
        got = _cuda.grad(link, pairs, narrow, True, both, True)[:4]
        want = chunked.grad(link, exact, sides, True, both, True)
        limits = (GRADIENT[pairs.x.dtype], GRADIENT[pairs.x.dtype], 10 * tolerance, 10 * tolerance)
        for g, w, limit in list(zip(got, want, limits, strict=True))[: 4 if both else 3]:  # one set has no second side
            assert_close(g, w, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("n", "d"), [(150, 64), (150, 40), (70, 128), (40, 200)])
def test_one_set(n: int, d: int, link: str, dtype: torch.dtype, seed: int) -> None:
    skip_what_is_too_long(d, dtype)
    check(link, one_set(n, d, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("masked", [False, True])
def test_two_sets(masked: bool, link: str, dtype: torch.dtype, seed: int) -> None:
    check(link, two_sets(70, 150, 64, dtype, masked))


@each_dtype
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 8), (64, 128, 128), (33, 65, 256), (130, 3, 136)])
def test_shapes(m: int, n: int, d: int, link: str, dtype: torch.dtype, kernels: ModuleType) -> None:
    skip_what_is_too_long(d, dtype)
    check(link, two_sets(m, n, d, dtype, False))
    check(link, two_sets(m, n, d, dtype, True))


@each_dtype
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("m", "n", "d"), [(40, 70, 264), (300, 330, 328)])
def test_strips_of_long_rows(
    m: int, n: int, d: int, link: str, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_what_is_too_long(d, dtype)
    monkeypatch.setattr(_settings, "workspace_bytes", 1)  # the shortest strips
    check(link, one_set(m, d, dtype))
    for masked in (False, True):
        check(link, two_sets(m, n, d, dtype, masked))


@pytest.mark.parametrize("symmetric", [True, False])
def test_several_panels_and_splits(symmetric: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of several panels of columns and tiles of rows, whose sums are added to what earlier panels left."""
    monkeypatch.setattr(_cuda, "_SPANS", 2)
    monkeypatch.setattr(_cuda, "_two_spans", lambda m, n, rows, cols, *_: (3 * rows, 2 * cols))
    check("exp", one_set(300, 40, torch.bfloat16) if symmetric else two_sets(270, 600, 40, torch.bfloat16, False))


@pytest.mark.parametrize("blocks", [3, 132, 264])
@pytest.mark.parametrize("tiles", [(64, 256, 2), (64, 128, 1), (128, 256, 2)])
def test_units_keep_every_block_busy_and_parts_few(tiles: tuple[int, int, int], blocks: int) -> None:
    rows, cols, parts = tiles
    for m, n in itertools.product((1, 64, 1000, 4096, 100_000), repeat=2):
        row_span, col_span = _cuda._two_spans(m, n, *tiles, blocks)
        assert row_span % rows == 0 and col_span % cols == 0
        row_spans, col_spans = -(-m // row_span), -(-n // col_span)
        assert parts * col_spans * m + row_spans * n <= 64 * (m + n)
        rounds = -(-row_spans * col_spans // blocks)
        least = -(-m // rows) * -(-n // cols) / blocks  # tiles of a block, were they shared out evenly
        assert rounds * row_span // rows * col_span // cols <= max(8, 1.5 * least), (m, n)
    # a panel of a queue meets most of the rows at once
    assert _cuda._two_spans(1024, 65_536, *tiles, 132)[0] >= 512


def test_gradients_of_few_rows_split_the_columns(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every processor has work: the last split has fewer tiles than the others."""
    found: list[int] = []
    splits = _cuda._splits
    monkeypatch.setattr(_cuda, "_splits", lambda *args: (found.append(splits(*args)), found[-1])[1])
    pairs = two_sets(40, 650, 40, torch.bfloat16, False)
    exact = in_fp64(pairs)
    row, _ = chunked.reduce("exp", exact, False, True)
    sides = Sides(row, torch.linspace(0.5, 1.5, 40).double())
    dx = _cuda.grad("exp", pairs, Sides(*(t if t is None else t.float() for t in sides)), True, False, False)[0]
    assert max(found) > 2
    assert_close(dx, chunked.grad("exp", exact, sides, True, False, False)[0], GRADIENT[torch.bfloat16])


def test_bits_do_not_depend_on_the_order_of_warps(kernels: ModuleType) -> None:
    (x, y), scale = raw_rows(75, 72, torch.float32, False), torch.tensor(9.0)
    results: list[tuple[torch.Tensor, ...]] = []
    for seed in (*SEEDS, 33):
        kernels.seed(seed)
        results.append(())
        for dtype in (torch.float16, torch.float32):
            pairs = one_set(150, 72, dtype)
            row, _ = _cuda.reduce("exp", pairs, False)
            side = (row, torch.ones_like(row))
            results[-1] += (row, *_cuda.grad("exp", pairs, Sides(*side, *side), True, False, True))
        loss, *saved = _cuda.contrastive(x, y, scale, torch.float16, True, True, True)
        results[-1] += (loss, *_cuda.contrastive_grad(x, y, scale, torch.ones_like(loss), tuple(saved), True, True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [200.0, 1500.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_a_constant_shift_cannot_serve_are_repaired(
    scale: float, symmetric: bool, kernels: ModuleType
) -> None:
    """Logits far below the largest possible one: their exponentials are all 0 under the shift."""
    x, y = unit(40, 16, torch.bfloat16), unit(40, 16, torch.bfloat16, 1)
    x[7] = -y.float().mean(0) * 3  # far from everything
    keys = torch.arange(40)
    y = x if symmetric else y
    check("exp", Pairs(x, y, torch.tensor(scale), drop_x=keys, drop_y=keys, symmetric=symmetric), 2e-5)


def test_rows_without_pairs_and_nan(kernels: ModuleType) -> None:
    pairs = two_sets(70, 130, 64, torch.bfloat16, False)
    none = pairs._replace(drop_x=torch.zeros(70, dtype=torch.long), drop_y=torch.zeros(130, dtype=torch.long))
    row, col = _cuda.reduce("exp", none, True)
    assert (row == -torch.inf).all() and (col == -torch.inf).all()
    x = pairs.x.clone()
    x[3, 5] = torch.nan
    row, col = _cuda.reduce("exp", pairs._replace(x=x), True)
    assert row[3].isnan() and row.isnan().sum() == 1 and col.isnan().all()
    for empty in (pairs._replace(x=x[:0]), pairs._replace(y=pairs.y[:0])):
        row, col = _cuda.reduce("exp", empty, True)
        assert (row == -torch.inf).all() and (col == -torch.inf).all() and len(row) == len(empty.x)
        sides = Sides(row, torch.ones_like(row), col, torch.ones_like(col))
        dx, dy, row_sum, col_sum, _ = _cuda.grad("exp", empty, sides, True, True, True)
        assert dx.shape == empty.x.shape and dy.shape == empty.y.shape and not (dx.any() or dy.any() or row_sum.any())
        assert not col_sum.any()


def test_key_ranges_that_touch_in_one_key(kernels: ModuleType) -> None:
    """Whole tiles, so that only the ranges of keys can ask for a mask."""
    keys = torch.cat([torch.full((64,), 5), torch.full((64,), 9)])
    pairs = Pairs(unit(128, 64, torch.bfloat16), unit(128, 64, torch.bfloat16, 1), torch.tensor(3.0),
                  drop_x=keys, drop_y=keys.roll(17))  # fmt: skip
    check("exp", pairs)


def test_log_sum_exps_far_apart_keep_their_weights(kernels: ModuleType) -> None:
    """One exponential cannot serve rows and columns whose results differ by more than fp32 spans."""
    pairs = Pairs(unit(40, 16, torch.bfloat16), unit(33, 16, torch.bfloat16, 1), torch.tensor(5.0))
    check("exp", pairs._replace(row_bias=torch.linspace(-150, 150, 40)), 2e-5)


def test_softplus_keeps_its_digits_over_the_whole_range(kernels: ModuleType) -> None:
    """Each alone: in a sum over many, a series that is wrong near 0 would hide."""
    logits = torch.linspace(-60, 60, 121)
    x = torch.zeros(121, 8, dtype=torch.bfloat16)
    row, _ = _cuda.reduce("softplus", Pairs(x, x[:1], torch.tensor(1.0), row_bias=logits), False)
    for got, want in zip(row, torch.logaddexp(logits.double(), torch.zeros(()).double()), strict=True):
        assert_close(got, want, 1e-6 + 6e-8 * float(want.log().abs()))  # a rounded exponent is off by as much


@pytest.mark.parametrize("upstream", [1e-9, -1e-9, 1e9])
def test_fp16_weights_neither_vanish_nor_overflow(upstream: float, kernels: ModuleType) -> None:
    pairs = Pairs(unit(40, 40, torch.float16), unit(50, 40, torch.float16, 1), torch.tensor(5.0))
    exact = in_fp64(pairs)
    for link in LINKS:
        row, col = chunked.reduce(link, exact, True, True)
        sides = Sides(row, torch.full_like(row, upstream), col, torch.full_like(col, upstream))
        got = _cuda.grad(link, pairs, Sides(*(t.float() for t in sides)), True, True, True)
        for g, w in zip(got, chunked.grad(link, exact, sides, True, True, True), strict=False):
            assert_close(g, w, 1e-3)


def test_the_sum_of_all_rows_in_one_pass(kernels: ModuleType) -> None:
    pairs = two_sets(70, 90, 48, torch.bfloat16, True)
    row = chunked.reduce("softplus", in_fp64(pairs), False, True)[0]
    want = chunked.grad("softplus", in_fp64(pairs), Sides(None, torch.ones_like(row)), True, True, True)
    dx, dy, row_sum, col_sum, total = _cuda.grad("softplus", pairs, Sides(), True, True, True, want_total=True)
    for g, w, limit in zip((dx, dy, row_sum, col_sum, total), (*want, row), (4e-3, 4e-3, *[1e-5] * 3), strict=True):
        assert_close(g, w, limit)


def raw_rows(b: int, d: int, dtype: torch.dtype, stacked: bool) -> tuple[torch.Tensor, ...]:
    """Views, alike as partners are, of any length, one of them 0."""
    generator = torch.Generator().manual_seed(b + d)
    first = torch.randn(b, d, generator=generator) * torch.linspace(0.5, 2, b)[:, None] / d**0.5
    second = first + torch.randn(b, d, generator=generator) / d**0.5
    if b > 2:
        first[2] = 0.0
    return (torch.cat([first, second]).to(dtype),) if stacked else (first.to(dtype), second.to(dtype))


def check_contrastive(
    raw: torch.dtype,
    dtype: torch.dtype,
    b: int,
    d: int,
    stacked: bool,
    normalize: bool = True,
    both: bool = True,
    scale: float = 8.0,
    grad: torch.Tensor | None = None,
) -> None:
    """Losses, gradients of raw rows and of the scale against the formulas in fp64."""
    rows, by = raw_rows(b, d, raw, stacked), torch.tensor(scale)
    x, y = (*rows, None)[:2]
    both = both and not stacked
    loss, *saved = _cuda.contrastive(x, y, by, dtype, normalize, both, True)
    upstream = torch.linspace(1, 2, len(loss)) if grad is None else grad.expand(len(loss))
    dx, dy, dots = _cuda.contrastive_grad(x, y, by, upstream, tuple(saved), True, not stacked)
    assert dx.dtype == raw and saved[0].dtype == dtype

    wide = [t.double().requires_grad_() for t in rows]
    unit = [pairwise.l2_normalize(t) if normalize else t for t in wide]
    z = saved[0].double().split(len(x))
    for ours, exact in zip(z, unit, strict=True):
        assert_close(ours, exact, GRADIENT[dtype])
    rounded = [u + (ours - u).detach() for u, ours in zip(unit, z, strict=True)]  # there, and back as if they were not
    by = by.double().requires_grad_()
    if stacked:
        want = reference.nt_xent(rounded[0], temperature=1 / by, normalize=False, reduction="none")
    else:
        ways = [rounded, rounded[::-1]][: 1 + both]
        want = torch.cat([reference.info_nce(*w, temperature=1 / by, normalize=False, reduction="none") for w in ways])
    wanted = torch.autograd.grad((want * upstream).sum(), [*wide, by])
    dscale = 0.5 * dots.sum() if stacked else dots[:b].sum()
    limit = max(GRADIENT[dtype], GRADIENT[raw])
    assert_close(loss, want, 1e-6 + 1e-6 * scale, what="loss")
    for got, exact in zip((dx, dy), wanted[: len(rows)], strict=False):
        assert_close(got, exact, limit, floor=1e-12)
    assert_close(dscale, wanted[-1], min(4 * limit, 5e-3), floor=1e-12, what="scale")  # terms of either sign


@each_half
@pytest.mark.parametrize("raw", list(_cuda._DTYPES))
@pytest.mark.parametrize("stacked", [True, False])
def test_contrastive(stacked: bool, raw: torch.dtype, dtype: torch.dtype, kernels: ModuleType) -> None:
    for normalize in (True, False):
        for both in {False, not stacked}:
            check_contrastive(raw, dtype, 37, 40, stacked, normalize, both)


@pytest.mark.parametrize(("b", "d"), [(1, 8), (2, 256), (16, 64), (70, 136)])
@pytest.mark.parametrize("stacked", [True, False])
def test_contrastive_of_any_shape(stacked: bool, b: int, d: int, seed: int) -> None:
    check_contrastive(torch.float32, torch.bfloat16, b, d, stacked)


def test_contrastive_where_a_range_of_keys_is_of_both_views(kernels: ModuleType) -> None:
    """Rows 64 to 95 are the last of one view and the first of the other; their partners fill narrow tiles, wholly."""
    check_contrastive(torch.float32, torch.bfloat16, 80, 136, True)


@pytest.mark.parametrize("normalize", [True, False])
def test_contrastive_of_logits_that_a_constant_shift_cannot_serve(normalize: bool, kernels: ModuleType) -> None:
    check_contrastive(torch.float32, torch.float16, 33, 16, True, normalize, scale=300.0)


@pytest.mark.parametrize("grad", [1.0, 1e-9])
def test_one_gradient_for_all_losses(grad: float, kernels: ModuleType) -> None:
    for stacked in (True, False):
        check_contrastive(torch.float32, torch.float16, 20, 24, stacked, grad=torch.tensor(grad))


def test_contrastive_of_zeros_and_nan(kernels: ModuleType) -> None:
    x, y = raw_rows(20, 24, torch.float32, False)
    by = torch.tensor(5.0)
    for bad in (
        y.index_fill(0, torch.tensor([4]), torch.nan),
        y.index_put((torch.tensor(4), torch.tensor(3)), torch.tensor(torch.nan)),
    ):
        for normalize in (True, False):
            loss, *saved = _cuda.contrastive(x, bad, by, torch.bfloat16, normalize, True, True)
            assert loss.isnan().sum() == 21 and loss[24].isnan()  # every anchor of x, and the row itself
    loss, *saved = _cuda.contrastive(x, y, by, torch.bfloat16, True, True, True)
    dx, dy, _ = _cuda.contrastive_grad(x, y, by, torch.ones_like(loss), tuple(saved), True, True)
    assert loss.isfinite().all() and dx[2].eq(0).all() and dx.any(1).sum() == 19 and dy.isfinite().all()


def test_contrastive_in_five_launches(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = _cuda._Call.launch
    monkeypatch.setattr(
        _cuda._Call, "launch", lambda call, kernel, *args: (launched.append(kernel), launch(call, kernel, *args))[1]
    )
    check_contrastive(torch.float32, torch.bfloat16, 12, 16, True)
    assert launched == ["prepare", "sums", "finish", "grad", "restore"]


def test_losses_reach_the_fused_operator(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rows of fp32 under autocast, by the public functions."""
    monkeypatch.setattr(native, "unsupported", _cuda.unsupported)
    x, y = (t.add_(0.01).requires_grad_() for t in raw_rows(30, 32, torch.float32, False))  # no row of zeros
    scale = torch.tensor(6.0, requires_grad=True)

    def losses(module: ModuleType) -> list[torch.Tensor]:
        return [
            module.nt_xent(torch.cat([x, y]), temperature=0.2, normalize=True),
            module.info_nce(x, y, temperature=0.2, normalize=True),
            module.clip(x, y, scale=scale, normalize=True),
        ]

    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        ours = losses(functional)
        only_y = torch.autograd.grad(functional.clip(x.detach(), y, scale=6.0, normalize=True), y)[0]
        report = explain(functional.clip, x, y, scale=6.0, normalize=True)
    assert report.startswith("contrastive (30 x 30 x 32, bfloat16") and "contrastive_grad" in report, report
    for loss, want in zip(ours, losses(reference), strict=True):
        assert_close(loss, want, 1e-3)
        leaves = [x, y, *([scale] if loss is ours[2] else [])]
        for g, w in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
            assert_close(g, w, 2e-2)
    assert_close(only_y, torch.autograd.grad(reference.clip(x, y, scale=6.0, normalize=True), y)[0], 2e-2)


@pytest.mark.parametrize("case", HOT, ids=lambda c: c.label)
def test_losses_of_fp32_rows(case: LossCase, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by the public functions; at temperature 0.1 a logit is off by some 2^-18 of 10."""
    monkeypatch.setattr(native, "unsupported", _cuda.unsupported)
    monkeypatch.setattr(native, "reduce", lambda link, pairs, both, keep: _cuda.reduce(link, pairs, both))
    monkeypatch.setattr(native, "grad", lambda *args: _cuda.grad(*args)[:4])
    monkeypatch.setattr(native, "reduce_grad", _cuda.reduce_grad)
    args, kwargs = case.inputs(37, 48)
    with use_backend("native"):
        check_case(case, args, kwargs, tolerance=(2e-6, 3e-5))


def test_fp32_rows_that_a_constant_shift_cannot_serve_are_repaired(kernels: ModuleType) -> None:
    """From the rows as they are, in fp32, while other logits, of up to 1500, are off by some 2^-18 of that."""
    x, y = unit(40, 16, torch.float32), unit(70, 16, torch.float32, 1)
    x[7] = -y.mean(0) * 3  # far from everything
    pairs = Pairs(x, y, torch.tensor(1500.0))
    row, col = chunked.reduce("exp", in_fp64(pairs), True, True)
    got_row, got_col = _cuda.reduce("exp", pairs, True)
    assert_close(got_row, row, 1e-5)
    assert_close(got_col, col, 1e-5)
    assert_close(got_row[7], row[7], 1e-6)


def test_fp32_rows_are_split_only_where_that_is_allowed(
    simulator: ModuleType, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "kernels", simulator)
    rows = unit(2, 128, torch.float32)
    for bf16x3, tf32 in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(_settings, "fp32", "bf16x3" if bf16x3 else "auto")
        monkeypatch.setattr(_cuda, "tf32_is_allowed", lambda tf32=tf32: tf32)
        reason = _cuda.unsupported("reduce", rows)
        assert reason is None if bf16x3 or tf32 else "set FASTCL_FP32=bf16x3" in str(reason)
    assert "no fused contrastive" in str(_cuda.unsupported("contrastive", rows))
    assert "needs float32, float16 or bfloat16" in str(_cuda.unsupported("reduce", rows.double()))


def test_opcheck_contrastive(simulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "kernels", simulator)
    monkeypatch.setattr(native, "unsupported", _cuda.unsupported)
    simulator.seed(0)
    scale = torch.tensor(2.0)
    for x, y in (torch.randn(6, 8), None), (torch.randn(6, 8), torch.randn(6, 8)):
        args = (x, y, scale, torch.bfloat16, True, y is not None, True, "native")
        torch.library.opcheck(_ops.contrastive, args)
        loss, *saved = _ops.contrastive(*args)
        for want_y in {False, y is not None}:
            torch.library.opcheck(_ops.contrastive_grad, (x, y, scale, loss, *saved, True, want_y, "native"))


def exercise(simulator: ModuleType, guards: Guards) -> None:
    """Enough of all kernels that nothing can be left out unseen: masks, and what threads do together."""
    for seed, rule in enumerate(one_rule_each(), 7):
        simulator.seed(seed)
        check("exp", rule)
        guards.check()
    check_contrastive(torch.float32, torch.float16, 37, 40, True)
    check_contrastive(torch.float16, torch.bfloat16, 37, 40, False, normalize=False)
    guards.check()
    for seed in (8, 7, 21):
        simulator.seed(seed)
        check("exp", one_set(150, 40, torch.bfloat16))
        check("softplus", one_set(150, 40, torch.bfloat16))  # sums that nothing repairs
        check("softplus", two_sets(150, 260, 64, torch.float16, False))
        check("softplus", two_sets(600, 530, 40, torch.bfloat16, False))  # more tiles than places for them
        if _cuda.unsupported("reduce", unit(2, 328, torch.bfloat16)) is None:
            check("softplus", one_set(270, 328, torch.bfloat16))
            check("exp", one_set(70, 264, torch.bfloat16))
            check("exp", two_sets(270, 530, 328, torch.float16, False))
        # What one warp knows alone: the longest row, the least log-sum-exps, the largest gradient.
        z = unit(140, 40, torch.bfloat16)
        z[50] *= 2
        pairs = Pairs(z, z[:90], torch.tensor(1500.0), row_bias=torch.where(torch.arange(140) // 32 == 3, -150.0, 0.0))
        call = _cuda._Call("exp", pairs)
        call.find_bounds(True)
        assert call.bounds is not None
        longest = z.float().square().sum(1).max()
        assert_close(call.bounds.amax(1), torch.stack([longest, longest, torch.tensor(150.0), torch.tensor(0.0)]), 1e-5)
        check("exp", pairs._replace(scale=torch.tensor(2.0)), 2e-5)
        check("exp", pairs, 2e-5)
        half = Pairs(z.half(), z[:90].half(), torch.tensor(2.0))
        upstream = torch.where(torch.arange(140) == 100, 1.0, 1e-6)
        dx = _cuda.grad("softplus", half, Sides(None, upstream), True, False, False)[0]
        want = chunked.grad("softplus", in_fp64(half), Sides(None, upstream.double()), True, False, False)[0]
        assert_close(dx, want, GRADIENT[torch.float16])
        guards.check()
    # Narrow tiles, one of which is exactly the range of keys that both views have a share in.
    check_contrastive(torch.bfloat16, torch.bfloat16, 48, 136, True)


def one_rule_each() -> Iterator[Pairs]:
    """Matrices in which one thing alone asks for masks: an edge of rows, or of columns, or one of the rules."""
    whole = two_sets(128, 128, 64, torch.bfloat16, False)
    rules = two_sets(128, 128, 64, torch.bfloat16, True)
    yield two_sets(130, 128, 64, torch.bfloat16, False)
    yield two_sets(128, 70, 40, torch.bfloat16, False)
    yield whole._replace(drop_x=rules.drop_x, drop_y=rules.drop_y)
    yield whole._replace(only_x=rules.only_x, only_y=rules.only_y)
    yield whole._replace(row_ceiling=rules.row_ceiling)
    yield whole._replace(col_ceiling=rules.col_ceiling)
    yield two_sets(70, 90, 40, torch.bfloat16, False)._replace(row_bias=torch.ones(70), col_bias=torch.ones(90))


_left_out: set[str] = set()  # places that the families share are left out once


def test_no_barrier_wait_shuffle_or_mask_can_be_left_out(
    kernels: ModuleType, guards: Guards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "_SPANS", 1)  # so that more tiles pass by than there is room for
    monkeypatch.setattr(_settings, "workspace_bytes", 1)  # and there are several strips
    kernels.forget_places()
    exercise(kernels, guards)
    unseen = []
    places = kernels.places()
    try:
        for number, place in enumerate(places):
            if place.startswith("bound") and not kernels.sanitized:
                continue  # what is read there changes no result
            if place in _left_out:
                continue  # by the other family
            _left_out.add(place)
            kernels.leave_out(number)
            try:
                exercise(kernels, guards)
                unseen.append(place)
            except (AssertionError, RuntimeError):
                pass
            guards.all.clear()
    finally:
        kernels.leave_out(-1)
    assert len(places) > 40
    assert not unseen, "\n".join(unseen)


def test_the_polynomial_is_as_exact_as_its_comment_says(simulator: ModuleType) -> None:
    def worst(low: float, high: float) -> float:
        v = torch.linspace(low, high, 50_001)
        got = torch.tensor([simulator.exp2_by_polynomial(float(x)) for x in v], dtype=torch.double)
        return float((got / v.double().exp2() - 1).abs().max())

    assert 2.6e-6 < worst(-0.5, 0.5) < 2.7e-6  # where it is fitted
    assert worst(-126, 127) < 2.7e-6
    assert simulator.exp2_by_polynomial(-1e30) == simulator.exp2_by_polynomial(-126.0) > 0
    assert math.isnan(simulator.exp2_by_polynomial(math.nan))


def test_tf32_products_in_the_simulator(simulator: ModuleType) -> None:
    a, b = (torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (16, 8))
    out = torch.empty(16, 8)
    simulator.tf32(a.data_ptr(), b.data_ptr(), out.data_ptr(), 24)

    def rounded(t: torch.Tensor) -> torch.Tensor:  # to 11 bits
        mantissa, exponent = torch.frexp(t.double())
        return torch.ldexp((mantissa * 2**11).round(), exponent - 11)

    assert_close(out, rounded(a) @ rounded(b).T, 1e-6)  # sums in fp32
    assert not torch.allclose(out, a @ b.T, rtol=1e-5)


def test_stores_of_the_copy_engine_in_the_simulator(simulator: ModuleType) -> None:
    """Boxes by way of one place in shared memory: each fence, wait and barrier is left out, and must be missed."""
    rows, depth, pitch = 150, 72, 80
    x = torch.randn(rows, pitch, generator=torch.Generator().manual_seed(0)).bfloat16()

    def fault(seed: int) -> str:
        out = torch.full((rows + 1, pitch), torch.nan, dtype=torch.bfloat16)
        simulator.seed(seed)
        try:
            simulator.negate(x.data_ptr(), out.data_ptr(), rows, depth, pitch)
        except RuntimeError as error:
            return str(error)
        inside, right, below = out[:rows, :depth], out[:rows, depth:], out[rows:]
        is_right = torch.equal(inside, -x[:, :depth]) and right.isnan().all() and below.isnan().all()
        return "" if is_right else "wrong results"

    simulator.forget_places()
    assert not any(map(fault, SEEDS))
    found: dict[str, str] = {}
    for number, place in enumerate(simulator.places()):
        simulator.leave_out(number)
        found[place] = "; ".join(filter(None, map(fault, SEEDS)))
    simulator.leave_out(-1)
    assert all(found.values()), found
    for instruction, said in {
        "fence.proxy.async": "a box is stored that was written after the last fence",
        "cp.async.bulk.commit_group": "a thread ended with stores that nothing waited for",
        "cp.async.bulk.wait_group.read": "a box was overwritten before its store had read it",
        "cp.async.bulk.wait_group": "a thread ended with stores that nothing waited for",
    }.items():
        assert any(place.partition(" ")[0] == instruction and said in found[place] for place in found), found


TOO_MANY_ROWS = """
#include <cstdlib>
#include <vector>
#include "cuda/launch.hpp"

int main(int, char** arguments) {
  using namespace fastcl;
  std::vector<uint16_t> rows(33 * 40);
  std::vector<float> bounds(4 * cuda::kParts);
  cuda::Pairs pairs{};
  pairs.x = pairs.y = rows.data();
  pairs.m = pairs.n = std::atoi(arguments[1]);
  pairs.depth = 40;
  cuda::bounds(pairs, Dtype::bf16, bounds.data(), nullptr, nullptr, {3, nullptr});
}
"""


def test_a_sanitizer_sees_through_the_simulator(tmp_path: Path) -> None:
    """33 rows are there: one more, and AddressSanitizer names the kernel. `make sanitize` runs this file so."""
    where = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(where).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime (libasan) here")
    (tmp_path / "main.cpp").write_text(TOO_MANY_ROWS)
    sources = str(CSRC / "cuda" / "vectors.cu"), str(tmp_path / "main.cpp")
    flags = ("-std=c++20", "-g1", "-fsanitize=address,undefined", "-DFASTCL_SIMULATE", f"-I{CSRC}", "-x", "c++")
    gxx(*flags, *sources, "-o", str(tmp_path / "program"))
    for rows in (33, 34):
        environment = {"ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([tmp_path / "program", str(rows)], capture_output=True, text=True, env=environment)
        found = "heap-buffer-overflow" in done.stderr and "bounds_kernel" in done.stderr
        assert found == (rows == 34), done.stderr
        assert (done.returncode == 0) == (rows == 33), done.stderr


@pytest.mark.parametrize(
    "kind", [kind for kind in probe.KINDS if kind != "contrastive"]
)  # which is asked for by its device
def test_the_probe_of_a_first_run_knows_right_from_wrong(
    kind: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "OTHERS", 8)
    found = probe.errors(kind, torch.bfloat16, 64, 24, "cpu")
    assert found
    assert max(found.values()) <= probe.TOLERANCE[torch.bfloat16]
    calls = iter((1.0, 1.5) if kind.startswith("sums") else (1.1, 1.1))  # other bits, or other numbers
    original = _cuda.reduce if kind.startswith("sums") else _cuda.grad

    def broken(*args: Any) -> tuple[torch.Tensor, ...]:
        factor = next(calls)
        return tuple(factor * t for t in original(*args))

    monkeypatch.setattr(_cuda, original.__name__, broken)
    found = probe.errors(kind, torch.bfloat16, 64, 24, "cpu")
    assert not all(error <= probe.TOLERANCE[torch.bfloat16] for error in found.values())
