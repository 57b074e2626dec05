"""Where tensors lie in memory changes nothing: strides, offsets, one tensor for both sides, addresses past 2^31, and
what stands beside them, which is never read and never written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl
from fastcl import _settings, functional, pairwise
from fastcl.backends import Pairs, Sides, native, triton
from fastcl.testing import CASES, LossCase

from .conftest import DEVICE
from .oracle import TOLERANCE, as_double, assert_close, leaves, loss_and_grads, or_nothing

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="of the CPU's backends; tests/test_gpu.py has guard bands on a GPU"
)
M, N, D = 21, 34, 19  # none a multiple of a vector or of a tile

# --- how a tensor may lie ---------------------------------------------------------------------------------------------


def beside(t: Tensor, shape: Iterable[int]) -> Tensor:
    """Memory full of what would show: NaN, or a number that is nobody's key."""
    return torch.full(tuple(shape), torch.nan if t.is_floating_point() else -77, dtype=t.dtype)


def offset(t: Tensor) -> Tensor:
    """Contiguous, behind and before other numbers, and aligned to one element alone."""
    return beside(t, [t.numel() + 4099])[2049 : 2049 + t.numel()].view(t.shape)


def spread(t: Tensor) -> Tensor:
    """Every third number of every second row."""
    step = [slice(1, 1 + (2 + i) * n, 2 + i) for i, n in enumerate(t.shape)]
    return beside(t, [(2 + i) * n + 2 for i, n in enumerate(t.shape)])[tuple(step)]


def transposed(t: Tensor) -> Tensor:
    return beside(t, [n + 2 for n in reversed(t.shape)])[(slice(1, -1),) * t.ndim].permute(*reversed(range(t.ndim)))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"offset": offset, "spread": spread, "transposed": transposed}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def laid_out(value: Any, layout: str) -> Any:
    """The same numbers, lying so; numbers and scalars as they are."""
    if isinstance(value, tuple):
        return tuple(laid_out(v, layout) for v in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return LAYOUTS[layout](value).copy_(value.detach()).requires_grad_(value.requires_grad)


# --- every entry of the package ---------------------------------------------------------------------------------------


def rows(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(x, dim=-1).to(dtype).requires_grad_()


def arguments(dtype: torch.dtype, backend: str) -> dict[str, dict[str, Any]]:
    """Of every differentiable primitive, by name: all masks and biases that the backend knows."""
    generator = torch.Generator().manual_seed(5)
    numbers = torch.promote_types(dtype, torch.float32)
    q, k = rows(M, D, dtype=dtype, seed=1), rows(N, D, dtype=dtype, seed=2)
    bias = [torch.randn(n, generator=generator).to(numbers).requires_grad_() for n in (M, N)]
    keys = [tuple(torch.randint(c, (n,), generator=generator) for n in (M, N)) for c in (9, 2)]
    scale = torch.tensor(5.0, dtype=numbers).requires_grad_()
    masks = {"drop": keys[0], "only": keys[1], "ceiling": bias[0].detach() + 3}
    if backend != "triton":
        guide = [rows(n, 7, dtype=dtype, seed=n).detach() for n in (M, N)]
        masks["guide"] = (*guide, torch.linspace(-0.3, 0.9, M).to(numbers))
    two = {"q": q, "k": k, "scale": scale, "row_bias": bias[0], **masks}
    index = torch.randint(N, (M, 5), generator=generator)
    partner = rows(M, D, dtype=dtype, seed=3)
    fused = {"contrastive": {"q": q, "k": partner, "scale": scale, "both": True, "normalize": True}}
    return {
        "pair_logsumexp": {**two, "col_bias": bias[1], "both": True},
        "pair_softplus_sum": {**two, "col_bias": bias[1], "both": True},
        "pair_softplus_total": two,
        "pair_logsumexp of one set": {"q": q, "scale": scale, "drop": keys[0][0], "only": keys[1][0]},
        "pair_logsumexp, frozen columns": {**two, "k": k.detach()},
        "row_dot": {"q": q, "k": partner},
        "gathered_dot": {"q": q, "table": k, "index": index},
        "listed_dot": {"q": q, "k": k, "rows": index[:, 0] % M, "columns": index[:, 1]},
        "l2_normalize": {"x": q},
        "merge_logsumexp": {"parts": (bias[0], bias[0].detach() * 2)},
        **(fused if backend == "triton" else {}),
    }  # fmt: skip


def results(name: str, given: dict[str, Any], layout: str | None = None) -> list[Tensor]:
    """What a primitive returns and the gradients of its inputs, with upstream gradients that lie like its inputs."""
    function = getattr(pairwise, name.partition(",")[0].partition(" of ")[0])
    out = function(*given["parts"]) if "parts" in given else function(**given)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in out]
    upstream = [u if layout is None else laid_out(u, layout) for u in upstream]
    wanted = [t for value in given.values() for t in (value if isinstance(value, tuple) else (value,))]
    wanted = [t for t in wanted if isinstance(t, Tensor) and t.requires_grad]
    kept = [(t, u.masked_fill(t == -torch.inf, 0)) for t, u in zip(out, upstream, strict=True)]
    grads = torch.autograd.grad([t for t, _ in kept], wanted, [u for _, u in kept])
    return [*(t.detach() for t in out), *grads]


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_bit_depends_on_where_tensors_lie(
    layout: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every input of every primitive between NaN: biases, keys, ceilings, guides and upstream gradients, too."""
    if backend == "triton" and (dtype == torch.float64 or layout != "offset"):
        pytest.skip("Triton's kernels get contiguous rows of at most 32 bits")
    given = arguments(dtype, backend)
    for strips in (False, True) if backend == "triton" else (False,):
        monkeypatch.setattr(triton, "_STRIPS_FROM", 1 if strips else 10**9)
        monkeypatch.setattr(_settings, "workspace_bytes", 1 if strips else None)
        for name in [n for n in given if not strips or n.startswith("pair_")]:
            want = results(name, given[name])
            got = results(name, {key: laid_out(value, layout) for key, value in given[name].items()}, layout)
            assert not any(t.isnan().any() for t in want), name
            assert all(map(torch.equal, got, want)), name


@each_layout
@pytest.mark.parametrize("largest", [True, False])
def test_neighbours_do_not_depend_on_where_tensors_lie(layout: str, largest: bool, backend: str) -> None:
    given = arguments(torch.float32, backend)["pair_logsumexp"]
    options = {name: given[name] for name in ("q", "k", "col_bias", "drop", "only", "ceiling")}
    for topk in (1, 5):
        want = pairwise.pair_topk(topk=topk, largest=largest, **options)
        lying = {name: laid_out(value, layout) for name, value in options.items()}
        assert all(map(torch.equal, pairwise.pair_topk(topk=topk, largest=largest, **lying), want))


@pytest.mark.parametrize("layout", ["offset", "transposed"])  # test_functional.py spreads rows and features
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_no_bit_of_a_loss_depends_on_where_its_arguments_lie(case: LossCase, layout: str) -> None:
    args, kwargs = case.inputs(9, 20)
    function = getattr(functional, case.name)
    lying = [laid_out(a, layout) for a in args], {name: laid_out(value, layout) for name, value in kwargs.items()}
    for backend in ("native", "chunked") if native._C is not None else ("chunked",):
        with fastcl.use_backend(backend):
            (loss, grads), (got, got_grads) = loss_and_grads(function, args, kwargs), loss_and_grads(function, *lying)
        assert torch.equal(got, loss)
        assert all(map(torch.equal, got_grads, grads))


PAIRED = [case for case in CASES if case.rows(8)[:2] == (8, 8)]


@pytest.mark.parametrize("case", PAIRED, ids=lambda case: case.label)
@pytest.mark.parametrize("how", ["one tensor", "overlapping views"])
def test_one_tensor_may_stand_on_both_sides(case: LossCase, how: str, backend: str) -> None:
    """Its gradient is the sum of those of two tensors. Overlapping views are rows i and i + 1 of one tensor."""
    if backend == "triton" and (case.guided or not case.hot):
        pytest.skip("has no guide, or takes long in the interpreter")
    args, kwargs = case.inputs(8, 11)
    z = rows(9, 11, dtype=torch.float32, seed=4)
    exact = as_double(z)

    def sides(t: Tensor) -> list[Tensor]:
        return [t[:-1], t[:-1] if how == "one tensor" else t[1:]]

    def grad(module: Any, t: Tensor, others: list[Any], named: dict[str, Any]) -> tuple[Tensor, ...]:
        first, second = sides(t)
        if how == "one tensor":
            second = first
        loss = getattr(module, case.name)(first, second, *others, **named)
        return loss, *torch.autograd.grad(loss, [t, *leaves(others, named)])

    wide = [as_double(a) for a in args[2:]], {name: as_double(value) for name, value in kwargs.items()}
    got, want = grad(functional, z, args[2:], kwargs), grad(fastcl.reference, exact, *wide)
    loss_tolerance, tolerance = TOLERANCE[torch.float32]
    # equal rows are at distance 0, and all is rounding where a row's positive is the row itself
    value, floor = or_nothing(want[0], 1e-6)
    assert_close(got[0], value, loss_tolerance, floor=max(floor, 1e-9))
    for g, w in zip(got[1:], want[1:], strict=True):
        w, floor = or_nothing(w, 2e-5)
        assert_close(g, w, tolerance, floor=floor)


# --- past 2^31 --------------------------------------------------------------------------------------------------------

FAR = 2**31


@pytest.fixture(scope="module")
def vast() -> Iterator[Tensor]:
    """4 GiB of addresses, of which only the pages that a test writes to become memory."""
    try:
        yield torch.empty(FAR + 2**12, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"4 GiB of address space cannot be had: {error}")


FAR_APART = {"rows": (FAR // 4 + 7, 1), "features": (1, FAR // 4 + 7)}  # five of them end past 2^31


@pytest.mark.parametrize("apart", FAR_APART)
def test_offsets_past_two_to_the_31(apart: str, vast: Tensor, backend: str) -> None:
    """The last row, or the last feature, lies more than 2^31 numbers behind the first."""
    if backend == "triton":
        pytest.skip("gets contiguous copies; tests/test_gpu.py has more than 2^31 numbers in one tensor")
    shape = (5, 23) if apart == "rows" else (23, 5)
    x, k = rows(*shape, dtype=torch.bfloat16, seed=1).detach(), rows(31, shape[1], dtype=torch.bfloat16, seed=2)
    far = vast.as_strided(shape, FAR_APART[apart])
    assert sum((n - 1) * step for n, step in zip(shape, far.stride(), strict=True)) >= FAR
    far = far.copy_(x).detach().requires_grad_()
    exact, exact_k = as_double(far), as_double(k)
    for q, y, wide_q, wide_y in ((far, k, exact, exact_k), (k, far, exact_k, exact)):
        row, col = pairwise.pair_logsumexp(q, y, scale=3.0, both=True)
        s = 3.0 * wide_q @ wide_y.T
        want = s.logsumexp(1), s.logsumexp(0)
        upstream = [torch.linspace(0.5, 1.5, len(t)) for t in want]
        grads = torch.autograd.grad((row, col), (q, y), upstream)
        exact_grads = torch.autograd.grad(want, (wide_q, wide_y), [u.double() for u in upstream])
        for got, w in ((row, want[0]), (col, want[1])):
            assert_close(got, w, TOLERANCE[torch.bfloat16][0])
        for got, w in zip(grads, exact_grads, strict=True):
            assert_close(got, w, TOLERANCE[torch.bfloat16][1])
        assert_close(pairwise.pair_softplus_sum(q, y, scale=3.0), torch.nn.functional.softplus(s).sum(1), 1e-6)
        values, indices = pairwise.pair_topk(q.detach(), y.detach(), topk=2)
        assert torch.equal(indices, (wide_q @ wide_y.T).topk(2).indices)
        assert_close(values, (wide_q @ wide_y.T).topk(2).values, 1e-6)
    unit = pairwise.l2_normalize(far)
    (grad,) = torch.autograd.grad(unit, far, x)
    near = x.clone().requires_grad_()
    assert torch.equal(unit, pairwise.l2_normalize(near))
    assert torch.equal(grad, torch.autograd.grad(pairwise.l2_normalize(near), near, x)[0])


# --- canaries round every output --------------------------------------------------------------------------------------


class Canaries(TorchDispatchMode):
    """Numbers before and behind whatever is allocated, and NaN in what is not initialised."""

    GUARD = 4096  # bytes; a multiple of every alignment

    def __init__(self) -> None:
        super().__init__()
        self.guarded: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        name = op.name().removeprefix("aten::").partition(".")[0]
        if name.removeprefix("new_").removesuffix("_like") not in ("empty", "zeros", "full", "ones"):
            return made
        count, width = made.numel() * made.element_size(), made.element_size()
        buffer = torch.full((count + 2 * self.GUARD,), 77, dtype=torch.uint8)
        self.guarded.append((buffer, count))
        inside = buffer[self.GUARD : self.GUARD + count].view(made.dtype).view(made.shape)
        if "empty" in name:
            return inside.fill_(torch.nan if made.is_floating_point() else 1 << (8 * width - 2))
        return inside.copy_(made)

    def check(self) -> None:
        assert self.guarded
        for buffer, count in self.guarded:
            assert (buffer[: self.GUARD] == 77).all() and (buffer[self.GUARD + count :] == 77).all()


def kernel_calls(module: Any, dtype: torch.dtype) -> dict[str, Callable[[], tuple[Tensor, ...] | None]]:
    """Every kernel of a backend's contract, with every mask, bias and side."""
    numbers = torch.promote_types(dtype, torch.float32)
    g = torch.Generator().manual_seed(0)
    x, y = (rows(n, 37, dtype=dtype, seed=n).detach() for n in (M, N))
    bias = [torch.randn(n, generator=g).to(numbers) for n in (M, N)]
    keys = [torch.randint(4, (n,), generator=g) for n in (M, N)]
    scale = torch.tensor(4.0, dtype=numbers)
    plain = Pairs(x, y, scale)
    ones = Pairs(x, x, scale, drop_x=keys[0], drop_y=keys[0], symmetric=True)
    masked = plain._replace(
        row_bias=bias[0], col_bias=bias[1], drop_x=keys[0], drop_y=keys[1], only_x=keys[0] % 2, only_y=keys[1] % 2,
        row_ceiling=bias[0] + 3, col_ceiling=bias[1] + 3,
    )  # fmt: skip
    given = {"plain": plain, "one set": ones, "masked": masked}
    if module is native:
        guide = [rows(n, 5, dtype=dtype, seed=n).detach() for n in (M, N)]
        given["guided"] = masked._replace(guide_x=guide[0], guide_y=guide[1], row_limit=bias[0], col_limit=bias[1])
    side = [torch.rand(n, generator=g).to(numbers) for n in (M, N)]
    calls: dict[str, Callable[[], tuple[Tensor, ...] | None]] = {}
    for name, pairs in given.items():
        both = not pairs.symmetric
        lse = [b + 9 for b in bias]  # of 20 to 35 logits up to 4
        sides = Sides(lse[0], side[0], lse[1], side[1]) if both else Sides(lse[0], side[0], lse[0], side[0])
        for link in ("exp", "softplus"):
            calls[f"reduce, {link}, {name}"] = partial(module.reduce, link, pairs, both, True)
            calls[f"grad, {link}, {name}"] = partial(module.grad, link, pairs, sides, True, both, True)
            if both:
                calls[f"reduce_grad, {link}, {name}"] = partial(
                    module.reduce_grad, link, pairs, True, link == "softplus", True
                )
        if both:
            calls |= {f"topk {k}, {name}": partial(module.topk, pairs, k) for k in (1, 5)}
    length = module.normalize(x)[1]
    calls["normalize"] = partial(module.normalize, x)
    calls["normalize_grad"] = lambda: (module.normalize_grad(x, length, x),)
    if dtype != torch.float64:
        for first, second in ((x[:-1], None), (x, y[:M])):
            fused = partial(module.contrastive, first, second, scale, dtype, True, True, True)
            loss, *saved = fused()
            sets = 1 if second is None else 2
            calls |= {
                f"contrastive, {sets}": fused,
                f"contrastive_grad, {sets}": partial(
                    module.contrastive_grad, first, second, scale, torch.ones_like(loss), tuple(saved), True, True
                ),
            }
    return calls


@pytest.mark.parametrize(
    ("module", "dtype", "strips"),
    [(native, d, False) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    + [(triton, torch.float32, False), (triton, torch.float16, True)],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_nothing_is_written_beside_outputs(
    module: Any, dtype: torch.dtype, strips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a kernel allocates, results and scratch; and what it returns was written: the same bits as without."""
    if module is native and native._C is None:
        pytest.skip(native.status())
    monkeypatch.setattr(triton, "_STRIPS_FROM", 1 if strips else 10**9)
    for name, call in kernel_calls(module, dtype).items():
        native.release_workspace()
        want = call()
        if want is None:  # two passes do it
            continue
        native.release_workspace()
        with Canaries() as canaries:
            got = call()
        canaries.check()
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.nan_to_num(), w.nan_to_num()) and torch.equal(g.isnan(), w.isnan()), name
            assert not w.isnan().any() or name.startswith("contrastive"), name
    native.release_workspace()


def test_a_number_written_beside_an_output_is_noticed() -> None:
    with Canaries() as canaries:
        made = torch.empty(3, 4)
        canaries.check()
        torch.as_strided(made, (1,), (1,), made.storage_offset() + 12).fill_(0.0)
    with pytest.raises(AssertionError):
        canaries.check()
