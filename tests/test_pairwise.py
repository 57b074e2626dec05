"""The primitives against the matrix written out: every mask, bias, sign and combination the engine promises."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fastcl
from fastcl import _ops, backends
from fastcl.backends import Pairs, Sides
from fastcl.pairwise import (
    gathered_dot,
    l2_normalize,
    listed_dot,
    merge_logsumexp,
    pair_argmax,
    pair_logsumexp,
    pair_softplus_sum,
    pair_topk,
    row_dot,
    scale_gradient,
)
from fastcl.reference._dense import logsumexp
from fastcl.testing import CASES, LossCase

from .conftest import DEVICE
from .oracle import TOLERANCE, as_double, assert_close

REDUCTIONS = {"logsumexp": pair_logsumexp, "softplus": pair_softplus_sum}
M, N, D = 21, 34, 19


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(*s, generator=generator) / 2).to(DEVICE).requires_grad_() for s in shapes]


def integers(n: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def dense(
    name: str,
    q: Tensor,
    k: Tensor,
    scale: Any,
    row_bias: Any = None,
    col_bias: Any = None,
    drop: Any = None,
    only: Any = None,
    ceiling: Any = None,
    guide: Any = None,
) -> tuple[Tensor, Tensor]:
    """Rows and columns, from the matrix."""
    s = scale * q @ k.T
    keep = torch.ones_like(s, dtype=torch.bool)
    if row_bias is not None:
        s = s + (row_bias[:, None] if isinstance(row_bias, Tensor) and row_bias.ndim else row_bias)
    if col_bias is not None:
        s = s + col_bias
    for keys, equal in ((drop, False), (only, True)):
        if keys is not None:
            rows, cols = keys if isinstance(keys, tuple) else (keys, keys)
            keep &= (rows[:, None] == cols) == equal
    if ceiling is not None:
        keep &= s <= ceiling[:, None]
    if guide is not None:
        keep &= guide[0] @ guide[1].T <= guide[2][:, None]
    if name == "logsumexp":
        return logsumexp(s, keep), logsumexp(s.T, keep.T)
    kept = -logsigmoid(-s).masked_fill(~keep, 0)
    return kept.sum(1), kept.sum(0)


def check(name: str, q: Tensor, k: Tensor | None, both: bool = False, **options: Any) -> None:
    def upstream(results: tuple[Tensor, ...]) -> Tensor:
        """A different weight for every result, so that a misplaced one shows."""
        weighted = [
            (r.masked_fill(r == -torch.inf, 0) * torch.linspace(0.5, 1.7, len(r), dtype=r.dtype, device=r.device)).sum()
            for r in results
        ]
        return torch.stack(weighted).sum()

    doubles = {key: tuple(map(as_double, v)) if isinstance(v, tuple) else as_double(v) for key, v in options.items()}
    exact_q = as_double(q)
    exact_k = exact_q if k is None else as_double(k)
    want = dense(name, exact_q, exact_k, **doubles)[: 1 + both]
    got = REDUCTIONS[name](q, k, both=both, **options)
    got = got if both else (got,)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 2e-6, what="result")
    inputs = [q, *([] if k is None else [k]), *(v for v in options.values() if _wants_grad(v))]
    exact = [exact_q, *([] if k is None else [exact_k]), *(v for v in doubles.values() if _wants_grad(v))]
    for i, (g, w) in enumerate(
        zip(torch.autograd.grad(upstream(got), inputs), torch.autograd.grad(upstream(want), exact), strict=True)
    ):
        assert_close(g, w, 1e-5, what=f"gradient {i}")


def _wants_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def options_for(m: int, n: int, same: bool) -> dict[str, dict[str, Any]]:
    row_bias, col_bias = tensors((m,), (n,), seed=1)
    scalar = torch.tensor(-0.7, device=DEVICE, requires_grad=True)
    drop = integers(m, 9, 2) if same else (integers(m, 9, 2), integers(n, 9, 3))
    only = integers(m, 3, 4) if same else (integers(m, 3, 4), integers(n, 3, 5))
    return {
        "plain": {},
        "drop": {"drop": drop},
        "only": {"only": only},
        "drop and only": {"drop": drop, "only": only},
        "row bias": {"row_bias": row_bias},
        "column bias": {"col_bias": col_bias},
        "both biases": {"row_bias": row_bias, "col_bias": col_bias},
        "scalar bias": {"row_bias": scalar},
        "number bias": {"row_bias": -1.5},
        "ceiling": {"ceiling": torch.linspace(-1, 2, m, device=DEVICE)},
        "everything": {
            "row_bias": row_bias, "col_bias": col_bias, "drop": drop, "only": only,
            "ceiling": torch.linspace(-1, 2, m, device=DEVICE),
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("option", options_for(1, 1, True))
@pytest.mark.parametrize("scale", [3.0, -2.0])
@pytest.mark.parametrize("both", [False, True])
def test_two_sets(name: str, option: str, scale: float, both: bool, backend: str) -> None:
    q, k = tensors((M, D), (N, D))
    learned = torch.tensor(scale, device=DEVICE, requires_grad=True)
    check(name, q, k, both=both, scale=learned, **options_for(M, N, False)[option])


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("option", options_for(1, 1, True))
@pytest.mark.parametrize("both", [False, True])
def test_one_set(name: str, option: str, both: bool, backend: str) -> None:
    (q,) = tensors((M, D))
    learned = torch.tensor(2.5, device=DEVICE, requires_grad=True)
    check(name, q, None, both=both, scale=learned, **options_for(M, M, True)[option])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_one_set_with_keys_that_differ_by_side(name: str, backend: str) -> None:
    (q,) = tensors((M, D))
    check(name, q, None, scale=2.5, drop=(integers(M, 5, 1), integers(M, 5, 2)))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_one_bias_for_rows_and_columns(name: str, backend: str) -> None:
    q, bias = tensors((M, D), (M,))
    got = REDUCTIONS[name](q, scale=2.0, row_bias=bias, col_bias=bias)
    exact_q, exact_bias = as_double(q), as_double(bias)
    want, _ = dense(name, exact_q, exact_q, 2.0, exact_bias, exact_bias)
    weights = torch.linspace(0.5, 1.7, M, device=DEVICE)
    for g, w in zip(
        torch.autograd.grad((got * weights).sum(), (q, bias)),
        torch.autograd.grad((want * weights.double()).sum(), (exact_q, exact_bias)),
        strict=True,
    ):
        assert_close(g, w, 1e-5)


GUIDED_BACKENDS = pytest.mark.parametrize("backend", ["native", "chunked"], indirect=True)


def guide_for(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    of_rows, of_columns = (t.detach() for t in tensors((m, 6), (n, 6), seed=11))
    return of_rows, of_columns, torch.linspace(-1, 1, m, device=DEVICE)


@GUIDED_BACKENDS
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
def test_guide(name: str, option: str, both: bool, sets: int, backend: str) -> None:
    q, k = tensors((M, D), (N, D))
    learned, n = torch.tensor(3.0, device=DEVICE, requires_grad=True), (M, N)[sets - 1]
    options = options_for(M, n, sets == 1)[option]
    check(name, q, None if sets == 1 else k, both=both, scale=learned, guide=guide_for(M, n), **options)


@GUIDED_BACKENDS
@pytest.mark.parametrize("sizes", [(300, 500), (3, 1000), (700, 2)], ids=str)
def test_guide_over_many_tiles(sizes: tuple[int, int], backend: str) -> None:
    q, k = tensors(*((n, D) for n in sizes))
    check("logsumexp", q, k, both=True, scale=3.0, guide=guide_for(*sizes))


@GUIDED_BACKENDS
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("guides", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_guide_of_another_dtype(rows: torch.dtype, guides: torch.dtype, backend: str) -> None:
    q, k = (t.detach().to(rows) for t in tensors((M, D), (N, D)))
    a, b, limit = guide_for(M, N)
    guide = a.to(guides), b.to(guides), limit
    want, _ = dense("logsumexp", q.double(), k.double(), 2.0, guide=tuple(t.double() for t in guide))
    assert_close(pair_logsumexp(q, k, scale=2.0, guide=guide), want, 2e-6)


@GUIDED_BACKENDS
def test_another_guide_is_another_matrix(backend: str) -> None:
    """What one forward kept is not taken for another's that differs in its guide alone."""
    q, k = tensors((M, D), (N, D))
    a, b, limit = guide_for(M, N)
    first = pair_logsumexp(q, k, scale=2.0, guide=(a, b, limit))
    second = pair_logsumexp(q, k, scale=2.0, guide=(a, b, limit - 0.5))
    third = pair_logsumexp(q, k, scale=2.0)
    for row in (first, second, third, first, third):
        (dq,) = torch.autograd.grad(row.exp().sum(), q, retain_graph=True)
        i = 5
        weights = (dq[i] / row[i].exp() / 2).detach()  # sum_j w_ij k_j
        s = 2.0 * q[i].detach() @ k.detach().T
        keep = torch.ones(N, dtype=torch.bool, device=DEVICE)
        if row is not third:
            keep = a[i] @ b.T <= limit[i] - (0.5 if row is second else 0)
        assert_close(weights, s.masked_fill(~keep, -torch.inf).softmax(0) @ k.detach(), 1e-5)


def test_triton_says_that_it_has_no_guide() -> None:
    q, k = tensors((M, D), (N, D))
    with fastcl.use_backend("triton"), pytest.raises(RuntimeError, match="has no second similarity"):
        pair_logsumexp(q, k, scale=1.0, guide=guide_for(M, N))


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("frozen", ["q", "k"])
def test_frozen_side(name: str, frozen: str, backend: str) -> None:
    q, k = tensors((M, D), (N, D))
    learned, row_bias = torch.tensor(2.0, device=DEVICE, requires_grad=True), tensors((M,), seed=7)[0]
    wanted = [q if frozen == "k" else k, learned, row_bias]
    (q if frozen == "q" else k).requires_grad_(False)
    weights = torch.linspace(0.5, 1.7, M, device=DEVICE)
    got = torch.autograd.grad((REDUCTIONS[name](q, k, scale=learned, row_bias=row_bias) * weights).sum(), wanted)
    doubles = {id(t): as_double(t) for t in (q, k, learned, row_bias)}
    want, _ = dense(name, *(doubles[id(t)] for t in (q, k, learned, row_bias)))
    exact = torch.autograd.grad((want * weights.double()).sum(), [doubles[id(t)] for t in wanted])
    for g, w in zip(got, exact, strict=True):
        assert_close(g, w, 1e-5)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_row_without_a_pair_sends_no_gradient(frozen: bool, name: str, backend: str) -> None:
    q, k = tensors((M, D), (N, D))
    k.requires_grad_(not frozen)
    alone = torch.arange(M, device=DEVICE) % 3 == 0
    result = REDUCTIONS[name](q, k, scale=2.0, drop=(alone.long(), torch.ones(N, dtype=torch.long, device=DEVICE)))
    empty = -torch.inf if name == "logsumexp" else 0.0
    assert (result[alone] == empty).all() and (result[~alone] != empty).all()
    (dq,) = torch.autograd.grad(result.masked_fill(alone, 0).sum(), q)
    assert (dq[alone] == 0).all() and dq.isfinite().all() and dq[~alone].any(1).all()


@pytest.mark.parametrize("name", REDUCTIONS)
def test_frozen_columns_may_change_before_backward(name: str, backend: str) -> None:
    q, k = tensors((M, D), (N, D))
    k = k.detach()
    (want,) = torch.autograd.grad(REDUCTIONS[name](q, k, scale=2.0).sum(), q)
    result = REDUCTIONS[name](q, k, scale=2.0)
    k.fill_(math.nan)
    (got,) = torch.autograd.grad(result.sum(), q)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradcheck(name: str) -> None:
    q, k, row_bias, col_bias = (t.detach().double().requires_grad_() for t in tensors((4, 3), (5, 3), (4,), (5,)))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    keys = torch.arange(4), torch.arange(5)

    def function(q: Tensor, k: Tensor, scale: Tensor, row_bias: Tensor, col_bias: Tensor) -> Any:
        return REDUCTIONS[name](q, k, scale=scale, row_bias=row_bias, col_bias=col_bias, drop=keys, both=True)

    assert torch.autograd.gradcheck(function, (q, k, scale, row_bias, col_bias))


def test_a_learned_scale_of_zero_has_a_gradient(backend: str) -> None:
    q, k = tensors((M, D), (N, D))
    check("logsumexp", q, k, scale=torch.tensor(0.0, device=DEVICE, requires_grad=True))


@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_empty_sides(m: int, n: int, backend: str) -> None:
    q, k = tensors((m, 5), (n, 5))
    row, col = pair_logsumexp(q, k, scale=2.0, both=True)
    assert row.shape == (m,)
    assert col.shape == (n,)
    if m * n == 0:
        assert (row == -torch.inf).all()
        assert (col == -torch.inf).all()
        assert (pair_softplus_sum(q, k, scale=2.0) == 0).all()
        dq, dk = torch.autograd.grad(row.nan_to_num(neginf=0).sum() + col.nan_to_num(neginf=0).sum(), (q, k))
        assert not dq.any()
        assert not dk.any()


@pytest.mark.parametrize("link", ["exp", "softplus"])
def test_backends_transpose_everything(link: str, backend: str) -> None:
    """The transposed matrix has the transposed results: every field of the contract exists for rows and for columns."""
    q, k, row_bias, col_bias, row_ceiling, col_ceiling = (
        t.detach() for t in tensors((M, D), (N, D), (M,), (N,), (M,), (N,))
    )
    drop, only = (integers(M, 9, 1), integers(N, 9, 2)), (integers(M, 3, 3), integers(N, 3, 4))
    scale = torch.tensor(2.0, device=DEVICE)
    pairs = Pairs(q, k, scale, row_bias, col_bias, *drop, *only, 2 + row_ceiling, 2 + col_ceiling)
    row, col = _ops.pair_reduce(link, *pairs, True, False, backend)
    s = 2.0 * q @ k.T + row_bias[:, None] + col_bias
    keep = (drop[0][:, None] != drop[1]) & (only[0][:, None] == only[1])
    below = keep & (s <= 2 + row_ceiling[:, None]) & (s <= 2 + col_ceiling)
    assert 0 < below.sum() < keep.sum()
    s = s.masked_fill(~below, -torch.inf)
    assert_close(row, s.logsumexp(1) if link == "exp" else torch.nn.functional.softplus(s, threshold=50).sum(1), 2e-6)
    sides = Sides(row, row_bias, col, col_bias)
    dx, dy, row_sum, col_sum = _ops.pair_grad(link, *pairs, *sides, True, True, True, backend)
    col2, row2 = _ops.pair_reduce(link, *pairs.swapped(), True, False, backend)
    dy2, dx2, col_sum2, row_sum2 = _ops.pair_grad(link, *pairs.swapped(), *sides.swapped(), True, True, True, backend)
    for a, b in ((row, row2), (col, col2), (dx, dx2), (dy, dy2), (row_sum, row_sum2), (col_sum, col_sum2)):
        assert_close(a, b, 3e-6)


def test_tiles_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles give what one tile gives, symmetric or not, and the same bits on every run."""
    from fastcl.backends import chunked

    z, k = tensors((145, D), (81, D))  # the last tile has one row, and one column

    def results() -> list[Tensor]:
        out, itself = [], torch.arange(145, device=DEVICE)
        with fastcl.use_backend("chunked"):
            for name, other in itertools.product(REDUCTIONS, (None, k)):
                row = REDUCTIONS[name](z, other, scale=3.0, drop=itself if other is None else None)
                out += [row, *torch.autograd.grad(row.square().sum(), z)]
            return [*out, *pair_topk(z, k, topk=7)]

    whole = results()
    monkeypatch.setattr(chunked, "_tile_side", lambda x: 16)
    small, again = results(), results()
    for a, b, c in zip(whole, small, again, strict=True):
        assert torch.equal(b, c)
        assert_close(b, a, 3e-6)


def test_workspace_setting_bounds_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcl import _settings
    from fastcl._measure import peak_bytes

    def step() -> None:
        with fastcl.use_backend("chunked"):
            pair_logsumexp(q, scale=2.0)

    q = torch.randn(1024, 4)
    default = peak_bytes(step)
    monkeypatch.setattr(_settings, "workspace_bytes", 2**17)
    assert peak_bytes(step) < min(2**18, default / 4)


def test_blocks_of_columns_merge() -> None:
    q, k = tensors((M, D), (N, D))
    parts = [pair_logsumexp(q, block, scale=2.0) for block in k.split([5, 0, 29])]
    merged = merge_logsumexp(*parts)
    want, _ = dense("logsumexp", as_double(q), as_double(k), 2.0)
    assert_close(merged, want, 1e-6)
    (got,) = torch.autograd.grad(merged.square().sum(), q)
    (whole,) = torch.autograd.grad(pair_logsumexp(q, k, scale=2.0).square().sum(), q)
    assert_close(got, whole, 1e-5)
    forget_all = torch.zeros(M, dtype=torch.long, device=DEVICE), torch.zeros(N, dtype=torch.long, device=DEVICE)
    empty = pair_logsumexp(q, k, scale=2.0, drop=forget_all)
    nothing = merge_logsumexp(empty, empty)
    assert (nothing == -torch.inf).all()
    (grad,) = torch.autograd.grad(torch.sigmoid(nothing).sum(), q)
    assert not grad.any()
    blocks = torch.full((2, M), -torch.inf, device=DEVICE, requires_grad=True)  # of any origin
    (grad,) = torch.autograd.grad(torch.sigmoid(merge_logsumexp(*blocks)).sum(), blocks)
    assert not grad.any()


def test_only_what_is_harder_than_the_positive_is_forgotten() -> None:
    """The rule that GISTEmbed-like losses need: negatives above positive + delta are probably positives."""
    q, k = tensors((M, D), (M, D))
    positive = row_dot(q, k) * 2.0
    kept = pair_logsumexp(q, k, scale=2.0, drop=torch.arange(M, device=DEVICE), ceiling=positive + 0.1)
    s = 2.0 * q @ k.T
    for i in range(M):
        row = [s[i, j] for j in range(M) if j != i and s[i, j] <= positive[i] + 0.1]
        want = torch.stack(row).logsumexp(0) if row else torch.tensor(-torch.inf)
        assert_close(kept[i], want, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("topk", [1, 3, 40])
def test_topk(dtype: torch.dtype, largest: bool, topk: int) -> None:
    q, k = (t.detach().to(dtype) for t in tensors((M, D), (N, D)))
    drop = integers(M, 9, 2), integers(N, 9, 3)
    values, indices = pair_topk(q, k, topk=topk, drop=drop, largest=largest)
    s = (q.double() @ k.double().T).masked_fill(drop[0][:, None] == drop[1], -torch.inf if largest else torch.inf)
    want = s.sort(1, descending=largest).values[:, :topk]
    assert values.shape == indices.shape == (M, topk)
    found = indices >= 0
    assert torch.equal(found.sum(1), s.isfinite().sum(1).clamp(max=topk))
    assert_close(values[:, : want.shape[1]], want, 1e-6)
    assert_close(values[found], s.gather(1, indices.clamp(min=0))[found], 1e-6)
    assert (values[~found] == (-torch.inf if largest else torch.inf)).all()


@pytest.mark.parametrize("largest", [True, False])
def test_topk_with_a_bias_and_a_ceiling(largest: bool, backend: str) -> None:
    q, k, bias = (t.detach() for t in tensors((M, D), (N, D), (N,)))
    ceiling = torch.linspace(-1, 1, M, device=DEVICE)
    values, indices = pair_topk(q, k, topk=3, col_bias=bias, ceiling=ceiling, largest=largest)
    s = q.double() @ k.double().T + bias
    beyond = s > ceiling[:, None] if largest else s < ceiling[:, None]
    want = s.masked_fill(beyond, -torch.inf if largest else torch.inf).sort(1, descending=largest).values[:, :3]
    assert_close(values, want, 2e-6)
    assert_close(values[indices >= 0], s.gather(1, indices.clamp(min=0))[indices >= 0], 2e-6)


def test_the_nearest_by_a_bias() -> None:
    q, k = (t.detach() for t in tensors((M, D), (N, D)))
    assert torch.equal(pair_argmax(q, k, col_bias=-k.square().sum(1) / 2), torch.cdist(q, k).argmin(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gathered_dot(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, table = (t.detach().to(dtype).requires_grad_() for t in tensors((M, D), (N, D)))
    index = torch.randint(N, (M, 5), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    index[:, 1] = index[:, 0]  # one row twice
    exact_q, exact_table = as_double(q), as_double(table)
    want = (exact_q[:, None] * exact_table[index]).sum(2)
    upstream = torch.randn(M, 5, device=DEVICE)
    exact = torch.autograd.grad(want, (exact_q, exact_table), upstream.double())
    for chunk in (2**21, 200):
        monkeypatch.setattr(fastcl._gathered, "_GATHERED", chunk)
        got = gathered_dot(q, table, index)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(got, want, 1e-6)
        for g, w in zip(torch.autograd.grad(got, (q, table), upstream.to(got.dtype)), exact, strict=True):
            assert g.dtype == dtype
            assert_close(g, w, 1e-3 if dtype == torch.float16 else 1e-6)
    with pytest.raises(RuntimeError, match=r"fastcl\.reference"):
        (dq,) = torch.autograd.grad(gathered_dot(q, table, index).sum(), q, create_graph=True)
        dq.sum().backward()


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        ([[0]], TypeError), (torch.zeros(M, 2), TypeError), (torch.zeros(M, dtype=torch.long), ValueError),
        (torch.zeros(3, 2, dtype=torch.long), ValueError),
        (torch.zeros(M, 2, dtype=torch.long, device="meta"), ValueError),
    ],
)  # fmt: skip
def test_gathered_dot_refuses_a_bad_index(index: Any, kind: type[Exception]) -> None:
    q, table = tensors((M, D), (N, D))
    with pytest.raises(kind, match=r"^got .+; expected .+\. .+\.$"):
        gathered_dot(q, table, index)


def test_gathered_dot_of_nothing() -> None:
    q, table = tensors((M, D), (N, D))
    assert gathered_dot(q, table, torch.zeros(M, 0, dtype=torch.long, device=DEVICE)).shape == (M, 0)
    assert gathered_dot(q[:0], table, torch.zeros(0, 4, dtype=torch.long, device=DEVICE)).shape == (0, 4)


def test_scale_gradient() -> None:
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((2,), 0.25))


def test_argmax_takes_the_first_of_equals_and_minus_one_of_none() -> None:
    q = torch.eye(3)
    k = torch.cat([torch.eye(3), torch.eye(3)])
    assert pair_argmax(q, k).tolist() == [0, 1, 2]
    assert pair_argmax(q, k, only=(torch.tensor([0, 1, 5]), torch.tensor([0, 1, 1, 0, 1, 1]))).tolist() == [0, 1, -1]
    assert pair_argmax(q, drop=torch.arange(3), largest=False).tolist() == [1, 0, 0]


def test_topk_rejects_a_count_below_one() -> None:
    with pytest.raises(ValueError, match="topk = 0"):
        pair_topk(torch.eye(3), topk=0)


# triton has no kernel of its own for rows
NORMALIZERS = pytest.mark.parametrize("backend", ["native", "chunked"], indirect=True)


@NORMALIZERS
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_l2_normalize(backend: str, dtype: torch.dtype, strided: bool) -> None:
    (x,) = tensors((9, 33))
    x = x.detach().to(dtype)
    x = (x.T.contiguous().T if strided else x).requires_grad_()
    unit = l2_normalize(x)
    assert unit.dtype == dtype
    exact_x = as_double(x)
    want = exact_x / exact_x.norm(dim=1, keepdim=True)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert_close(unit, want, tolerance)
    weights = torch.linspace(-1, 1, 33, dtype=torch.float64, device=DEVICE)
    (got,) = torch.autograd.grad((unit.double() * weights).sum(), x)
    (exact,) = torch.autograd.grad((want * weights).sum(), exact_x)
    assert_close(got, exact, 2 * tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(l2_normalize, x)


@NORMALIZERS
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, s) for s in (1e-37, 1e-30, 1e-20, 1e18, 3e38)]
    + [(torch.float64, s) for s in (1e-307, 1e-200, 1e200, 1.5e308)]
    + [(torch.float16, s) for s in (2.0**-20, 60000.0)]
    + [(torch.bfloat16, s) for s in (1e-37, 3e38)],
)
def test_l2_normalize_neither_over_nor_underflows(backend: str, dtype: torch.dtype, size: float) -> None:
    x = (torch.tensor([[0.6, -0.8], [0, 1]], dtype=torch.float64) * size).to(dtype).requires_grad_()
    # scaling by a power of two is exact, and keeps fp64's own squares in range
    small = x.detach().double() * 2.0 ** -round(math.log2(size))
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    unit = l2_normalize(x)
    assert_close(unit, small / small.norm(dim=1, keepdim=True), tolerance)
    (grad,) = torch.autograd.grad(unit, x, unit.detach())
    assert grad.isfinite().all()


@NORMALIZERS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_l2_normalize_of_a_bad_row_is_nan(backend: str, bad: float) -> None:
    x = torch.ones(3, 20)
    x[1, 4] = bad
    x[2, 4:] = 0
    unit = l2_normalize(x)
    assert unit[1].isnan().all()
    assert_close(unit[[0, 2]].norm(dim=1), torch.ones(2), 1e-6)


@NORMALIZERS
def test_l2_normalize_of_zero_is_zero_without_a_gradient(backend: str) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    unit = l2_normalize(x)
    (grad,) = torch.autograd.grad(unit.sum(), x)
    assert not unit.any()
    assert not grad.any()
    assert l2_normalize(torch.zeros(2, 0)).shape == (2, 0)


# --- which backend runs -----------------------------------------------------------------------------------------------


def test_a_forced_backend_runs_the_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcl.backends import chunked, triton

    ran = []
    for module in (chunked, triton):
        for op in ("reduce", "grad"):
            right = getattr(module, op)
            monkeypatch.setattr(
                module, op, lambda *a, _right=right, _at=(module.__name__[16:], op): (ran.append(_at), _right(*a))[1]
            )
    (q,) = tensors((4, 3))
    with fastcl.use_backend("triton"):
        result = pair_logsumexp(q, scale=1.0)
    result.sum().backward()
    assert ran == [("triton", "reduce"), ("triton", "grad")]


def test_a_backend_that_cannot_says_why() -> None:
    q = torch.randn(4, 3, dtype=torch.float64, device=DEVICE)
    with fastcl.use_backend("triton"), pytest.raises(RuntimeError, match=r"needs float32.*got torch.float64"):
        pair_logsumexp(q, scale=1.0)
    with pytest.raises(ValueError, match="got backend 'numpy'"), fastcl.use_backend("numpy"):
        pass
    assert "triton" not in fastcl.available_backends(q)
    assert "chunked" in fastcl.available_backends(q)


def test_explain_changes_nothing() -> None:
    loss = fastcl.MoCoLoss(3, queue_size=16, learn_temperature=True)
    before = {name: t.clone() for name, t in loss.state_dict().items()}
    q = torch.randn(4, 3, requires_grad=True)
    assert "pair_reduce_grad (4 x 16 x 3, float32 on cpu): " in fastcl.explain(loss, q, torch.randn(4, 3))
    assert all(torch.equal(t, before[name]) for name, t in loss.state_dict().items())
    assert q.grad is None
    assert loss.log_scale.grad is None
    assert "pair_grad" in fastcl.explain(fastcl.DCLLoss(learn_temperature=True), torch.randn(4, 3))


def test_explain_says_what_is_there_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA C++ is on a GPU, until a record shows it right and faster."""
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("triton",))
    text = fastcl.explain("nt_xent", torch.randn(8, 4))
    assert "not chunked: no GPU has run its kernels yet: fastcl.use_backend('chunked') asks for them" in text


def test_explain_knows_a_guide() -> None:
    q, k = tensors((M, D), (N, D))
    words = fastcl.explain("pair_logsumexp", q, k, guide=guide_for(M, N))
    assert "not triton: has no second similarity" in words
    words = fastcl.explain("gist", q, q, *guide_for(M, M)[:2])
    assert words.count("not triton: has no second similarity") >= 2


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_explain_explains_every_loss(case: LossCase) -> None:
    args, kwargs = case.inputs(6, 8, device=DEVICE)
    words = fastcl.explain(case.name, *args, **kwargs)
    assert ("pair_" in words or "contrastive" in words) == (case.summed or case.name == "triplet_hard")
    assert ("reads a size from the device" in words) == (not case.compiles)


def test_explain_names_the_choice_and_the_reasons() -> None:
    z = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    text = fastcl.explain("nt_xent", z)
    first, *_ = fastcl.available_backends(z)
    assert f"pair_reduce (8 x 8 x 4, float64 on cpu): {first}" in text
    assert "pair_grad" in text
    assert "not triton: needs float32, float16 or bfloat16 rows, got torch.float64" in text
    with fastcl.use_backend("triton"):
        assert "none (fastcl backend 'triton' cannot" in fastcl.explain(fastcl.NTXentLoss(), z)
    assert "pair_topk" in fastcl.explain("pair_topk", z)
    with pytest.raises(ValueError, match="got the name 'nt_xnet'"):
        fastcl.explain("nt_xnet", z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_listed_dot(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastcl._gathered, "_GATHERED", 40)  # a few pairs at a time
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(M, 5, generator=generator).to(DEVICE, dtype).requires_grad_()
    k = torch.randn(N, 5, generator=generator).to(DEVICE, dtype).requires_grad_()
    rows, columns = (torch.randint(high, (57,), generator=generator).to(DEVICE) for high in (M, N))
    upstream = torch.randn(57, generator=generator).to(DEVICE, torch.promote_types(dtype, torch.float32))
    got = listed_dot(q, k, rows, columns)
    want = (q.double()[rows] * k.double()[columns]).sum(1)
    assert got.dtype == upstream.dtype
    assert_close(got, want, 1e-14 if dtype == torch.float64 else 1e-6)
    for mine, exact in zip(
        torch.autograd.grad(got, (q, k), upstream), torch.autograd.grad(want, (q, k), upstream.double()), strict=True
    ):
        assert mine.dtype == dtype
        assert_close(mine, exact, TOLERANCE[dtype][1])


def test_listed_dot_refuses_indices_that_do_not_fit() -> None:
    q, index = torch.zeros(3, 2, device=DEVICE), torch.zeros(5, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="columns of shape"):
        listed_dot(q, q, index[:4], index)
