"""Registration of the operators: schemas, fakes, autograd keys, dynamic shapes."""

import pytest
import torch

from fastcl import _gathered, _ops
from fastcl.backends import Pairs, native


def pairs(masked: bool, symmetric: bool) -> Pairs:
    x = torch.randn(6, 4)
    y = x.clone() if symmetric else torch.randn(5, 4)
    plain = Pairs(x, y, torch.tensor(2.0), symmetric=symmetric)
    if not masked:
        return plain
    keys = torch.arange(len(x)), torch.arange(len(y))
    return plain._replace(
        row_bias=None if symmetric else torch.randn(6),
        drop_x=keys[0],
        drop_y=keys[1],
        only_x=keys[0] % 2,
        only_y=keys[1] % 2,
        **(
            {}
            if symmetric
            else {"guide_x": torch.randn(6, 3), "guide_y": torch.randn(5, 3), "row_limit": torch.rand(6)}
        ),
    )


@pytest.mark.parametrize("link", ["exp", "softplus"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_opcheck(link: str, masked: bool, symmetric: bool) -> None:
    p = pairs(masked, symmetric)
    m, n = len(p.x), len(p.y)
    for both in {False, not symmetric}:
        for keep in (False, True):
            torch.library.opcheck(_ops.pair_reduce, (link, *p, both, keep, "auto"))
    row, col = torch.rand(m) + 9, torch.rand(n) + 9
    sides = (row, row, row, row) if symmetric else (row, torch.rand(m), col, torch.rand(n))
    for want_dx, want_dy, want_sums in [(True, not symmetric, True), (True, False, False)]:
        torch.library.opcheck(_ops.pair_grad, (link, *p, *sides, want_dx, want_dy, want_sums, "auto"))


@pytest.mark.parametrize("link", ["exp", "softplus"])
@pytest.mark.parametrize("want", [(True, True, True), (True, False, False), (False, True, True)])
def test_opcheck_reduce_grad(link: str, want: tuple[bool, bool, bool]) -> None:
    torch.library.opcheck(_ops.pair_reduce_grad, (link, *pairs(True, False), *want, "auto"))


def test_opcheck_topk() -> None:
    torch.library.opcheck(_ops.pair_topk, (*pairs(True, False), 3, "auto"))


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", ["auto", "native", "triton"])
def test_opcheck_contrastive(backend: str, stacked: bool, normalize: bool) -> None:
    if backend != "triton" and native._C is None:
        pytest.skip("the native module is not built here: fastcl info says why")
    x, y = torch.randn(6, 4), None if stacked else torch.randn(6, 4)
    scale = torch.tensor(2.0)
    for both in {False, not stacked}:
        args = (x, y, scale, torch.float32, normalize, both, True, backend)
        torch.library.opcheck(_ops.contrastive, args)
        loss, *saved = _ops.contrastive(*args)
        for want in [(True, not stacked), (True, False)]:
            torch.library.opcheck(_ops.contrastive_grad, (x, y, scale, loss, *saved, *want, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck_of_gathered_rows(dtype: torch.dtype) -> None:
    x, y = torch.randn(6, 4).to(dtype), torch.randn(5, 4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    index, rows, columns = torch.randint(5, (6, 3)), torch.randint(6, (7,)), torch.randint(5, (7,))
    torch.library.opcheck(_gathered.gathered_dot, (x, y, index))
    torch.library.opcheck(_gathered.listed_dot, (x, y, rows, columns))
    for want in [(True, True), (True, False), (False, True)]:
        grads = torch.rand(6, 3, dtype=wide), torch.rand(7, dtype=wide)
        for op, args in (
            (_gathered.gathered_dot_grad, (grads[0], x, y, index, *want)),
            (_gathered.listed_dot_grad, (grads[1], x, y, rows, columns, *want)),
        ):
            torch.library.opcheck(op, args)
            assert tuple(t.numel() > 0 for t in op(*args)) == want
