"""What invariants draw: a loss of CASES, or a reduction over pairs, at some size, of some dtype, on some backend.

Either side of a comparison is allowed the error of ``oracle.TOLERANCE``, so their difference twice that. Where a result
is a difference of large numbers the error is that of the large ones: of a logit, ``8 eps scale``; of the gradient of a
row, whose weights add up to at most 2, the tolerance times ``scale``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl import functional
from fastcl.pairwise import pair_logsumexp, pair_softplus_sum
from fastcl.testing import CASES, LossCase

from .oracle import TOLERANCE, assert_close

LABELS = {case.label: case for case in CASES}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((300, 65), (33, 1100))  # rows and features at most: many of either
Named = dict[str, Any]  # arguments by name, positional ones by their number


def odd(most: int) -> st.SearchStrategy[int]:
    """0, 1, 3, 5, ... up to ``most``; all but the first two in any order, for Hypothesis prefers what comes first."""
    others = range(3, most + 1, 2)
    return st.sampled_from([0, 1, *Random(0).sample(others, len(others))])


def temperatures(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """0.001 to 10; of fp16 rows, whose gradients are sums of 300 numbers of size 1 / temperature, from 0.05."""
    return st.floats(-1.3 if dtype == torch.float16 else -3.0, 1.0).map(lambda e: 10.0**e)


@dataclass(frozen=True)
class Drawn:
    backend: str
    dtype: torch.dtype
    dim: int
    scale: float
    seed: int

    @cached_property
    def generator(self) -> torch.Generator:
        """For what an invariant chooses at random."""
        return torch.Generator().manual_seed(self.seed + 1)

    @property
    def numbers(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def tolerance(self) -> tuple[float, float]:
        """Relative, of results and of gradients: twice the oracle's, and the rounding of the logits."""
        result, gradient = TOLERANCE[self.dtype]
        return 2 * result, 2 * (gradient + 8 * torch.finfo(self.numbers).eps * abs(self.scale))

    @property
    def logit_error(self) -> float:
        return 8 * torch.finfo(self.numbers).eps * max(abs(self.scale), 1)

    def order(self, n: int) -> Tensor:
        """A permutation; the same for the same number, so that rows that belong together stay together."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + n))

    def same_gradients(self, got: dict[str, Tensor], want: dict[str, Tensor], floors: dict[str, float]) -> None:
        assert got.keys() == want.keys()
        for name, g in got.items():
            # fp16 has nothing between multiples of 2^-24
            rounding = 2.0**-24 * sqrt(g.numel()) if g.dtype == torch.float16 else 0.0
            floor = max(self.tolerance[1] * floors[name], rounding)
            assert_close(g, want[name], self.tolerance[1], floor=floor, what=f"gradient of {name}")


@dataclass(frozen=True)
class Loss(Drawn):
    """A row of CASES at some size."""

    label: str
    batch: int
    reduction: str

    @property
    def case(self) -> LossCase:
        return LABELS[self.label]

    def inputs(self) -> Named:
        by_name = {"temperature": 1 / self.scale, "scale": self.scale, "text_scale": 0.6 * self.scale}
        numbers = {name: by_name[name] for name in self.case.numbers if name in by_name}
        args, kwargs = self.case.inputs(self.batch, self.dim, dtype=self.dtype, seed=self.seed, **numbers)
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}

    def __call__(
        self, inputs: Named, upstream: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients by name. Rows have upstream gradients from 0.5 to 1.5, so that a misplaced one shows."""
        args = [value for name, value in inputs.items() if name.isdigit()]
        kwargs = {name: value for name, value in inputs.items() if not name.isdigit()}
        leaves = {n: t for n, t in {**inputs, **options}.items() if isinstance(t, Tensor) and t.requires_grad}
        with fastcl.use_backend(self.backend):
            loss = getattr(functional, self.case.name)(*args, **{"reduction": self.reduction, **kwargs, **options})
            if upstream is None:
                upstream = self.upstream(loss)
            return loss.detach(), dict(
                zip(leaves, torch.autograd.grad(loss, list(leaves.values()), upstream), strict=True)
            )

    def upstream(self, loss: Tensor) -> Tensor:
        return torch.linspace(0.5, 1.5, len(loss), dtype=loss.dtype) if loss.ndim else torch.ones_like(loss)

    def same(
        self,
        got: tuple[Tensor, dict[str, Tensor]],
        want: tuple[Tensor, dict[str, Tensor]],
        larger: float = 1.0,
    ) -> None:
        """``larger``: how many times as large as usual the logits were on one of the sides."""
        (loss, grads), (want_loss, want_grads) = got, want
        rows = max(self.rows, 1)
        floor = larger * self.logit_error * (sqrt(rows) if loss.ndim else rows) * self.breadth
        assert_close(loss, want_loss, self.tolerance[0], floor=floor, what="loss")
        self.same_gradients(grads, want_grads, {n: larger * self.unit(n) for n in grads})

    @property
    def rows(self) -> int:
        return self.case.rows(self.batch)[0]

    @property
    def breadth(self) -> float:
        """Of how many terms a row's loss is the sum: weights of a row add up to as much."""
        return max(self.batch, 1) if self.case.name == "siglip" else 1.0

    def unit(self, name: str) -> float:
        """How large a gradient would be if nothing cancelled."""
        rows, steepness = max(self.rows, 1), max(self.scale, 1.0)
        if name == "temperature":
            return rows * max(self.scale**2, 1.0)
        if name in ("scale", "text_scale", "bias"):
            return rows * self.breadth
        return sqrt(rows) * (1.0 if name in ("log_q", "weights") else steepness) * self.breadth

    def sides(self) -> list[str]:
        """Names of the arguments that are rows."""
        return [name for name, t in self.inputs().items() if is_rows(t)]


def is_rows(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.ndim >= 2


def mapped(inputs: Named, change: Callable[[str, Tensor], Tensor]) -> Named:
    """Every tensor changed."""
    return {
        name: change(name, t.detach()).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in inputs.items()
    }


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Of all that is far enough from the smallest normal number for a power of 2 to round nothing."""
    return bool(((got == want) | ((got - want).abs() <= 1e-30)).all())


def steps(case: LossCase) -> bool:
    """Whether the last digit of a distance or a similarity may decide which of two formulas is used: fp64 has digits
    enough that it does not."""
    names = ("triplet", "triplet_all", "debiased_nt_xent", "hard_nt_xent")
    return case.guided or case.mined or case.name in names


def losses(*labels: str, bits: bool = False, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Callable[..., Any]:
    """Strategy of the losses of these labels, by the backends. ``bits``: nothing is rounded on the way."""

    @st.composite
    def strategy(draw: Any, backends: tuple[str, ...]) -> Loss:
        case = LABELS[draw(st.sampled_from(labels))]
        wide = steps(case) and not bits
        backend = draw(
            st.sampled_from(
                [b for b in backends if b != "triton" or not (case.guided or wide or dtypes == (torch.float64,))]
            )
        )
        allowed = (torch.float64,) if wide else dtypes
        dtype = draw(st.sampled_from([d for d in allowed if backend != "triton" or d != torch.float64]))
        scale = 1 / draw(temperatures(dtype)) if {"temperature", "scale"} & case.numbers.keys() else 1.0
        if case.name == "multi_similarity":
            scale = case.options["beta"]
        most, dim = (9, 41) if backend == "triton" else draw(st.sampled_from(SIZES))
        most = min(most, 300 // case.rows(1)[0])
        # unit rows of one feature are +1 or -1: among equal rows a mined loss may take any
        least = 2 if case.mined or case.guided else 0
        return Loss(
            backend, dtype, draw(odd(dim).map(lambda d: max(d, 1 + least))), scale, draw(st.integers(0, 2**20)),
            case.label, draw(odd(most)), draw(st.sampled_from(["sum", "none"])),
        )  # fmt: skip

    return strategy


LINKS = {"exp": pair_logsumexp, "softplus": pair_softplus_sum}


@dataclass(frozen=True)
class Matrix(Drawn):
    """A reduction over the pairs of two sets, or of one, with some biases and masks."""

    link: str
    rows: int
    columns: int
    extras: tuple[str, ...]
    one_set: bool = False

    def inputs(self) -> Named:
        g = torch.Generator().manual_seed(self.seed)

        def rows(n: int) -> Tensor:
            x = torch.randn(n, self.dim, generator=g, dtype=torch.float64)
            return torch.nn.functional.normalize(x, dim=1).to(self.dtype).requires_grad_()

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.numbers)

        def keys() -> tuple[Tensor, Tensor]:
            x, y = (torch.randint(4, (n,), generator=g) for n in (m, n))
            return (x, x) if self.one_set else (x, y)

        m, n = self.rows, self.rows if self.one_set else self.columns
        q, k = rows(m), rows(n)
        made = {
            "row_bias": numbers(m).requires_grad_(), "col_bias": numbers(n).requires_grad_(),
            "drop": keys(), "only": keys(), "ceiling": numbers(m) + abs(self.scale) / 2,
        }  # fmt: skip
        scale = torch.tensor(self.scale, dtype=self.numbers).requires_grad_()
        return {"q": q, **({} if self.one_set else {"k": k}), "scale": scale, **{e: made[e] for e in self.extras}}

    def __call__(
        self, inputs: Named, both: bool = False, upstream: tuple[Tensor, ...] | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Results of rows, and of columns where ``both``; gradients by name."""
        q, k, options = inputs["q"], inputs.get("k"), {n: v for n, v in inputs.items() if n not in ("q", "k")}
        leaves = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
        with fastcl.use_backend(self.backend):
            out = LINKS[self.link](q, k, both=both, **options)
            out = out if both else (out,)
            upstream = upstream or tuple(self.upstream(t) for t in out)
            grads = torch.autograd.grad(out, list(leaves.values()), upstream)
            return tuple(t.detach() for t in out), dict(zip(leaves, grads, strict=True))

    def upstream(self, result: Tensor) -> Tensor:
        return torch.linspace(0.5, 1.5, len(result), dtype=result.dtype)

    def same(self, got: Any, want: Any, larger: float = 1.0) -> None:
        (results, grads), (want_results, want_grads) = got, want
        for r, w in zip(results, want_results, strict=True):
            assert_close(
                r, w, self.tolerance[0], floor=larger * self.logit_error * sqrt(max(len(r), 1)) * self.breadth,
                what="result",
            )  # fmt: skip
        self.same_gradients(grads, want_grads, {n: larger * self.unit(n) for n in grads})

    @property
    def breadth(self) -> float:
        return 1.0 if self.link == "exp" else max(self.columns, self.rows, 1)

    def unit(self, name: str) -> float:
        n = max(self.rows, self.columns, 1)
        return {"scale": n, "row_bias": sqrt(n), "col_bias": sqrt(n)}.get(
            name, sqrt(n) * max(abs(self.scale), 1)
        ) * self.breadth


EXTRAS = ("row_bias", "col_bias", "drop", "only", "ceiling")


def matrices(
    *links: str,
    extras: tuple[str, ...] = EXTRAS,
    one_set: bool | None = False,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Callable[..., Any]:
    """Strategy of reductions, with some of the extras; ``one_set=None``: of one set or of two."""

    @st.composite
    def strategy(draw: Any, backends: tuple[str, ...]) -> Matrix:
        chosen = tuple(e for e in extras if draw(st.booleans()))
        # at a ceiling, the last digit of a logit decides: fp64 has digits enough that it does not
        allowed = (torch.float64,) if "ceiling" in chosen and torch.float64 in dtypes else dtypes
        if "triton" in backends and set(allowed) == {torch.float64}:
            backends = tuple(b for b in backends if b != "triton")
        backend = draw(st.sampled_from(backends))
        dtype = draw(st.sampled_from([d for d in allowed if backend != "triton" or d != torch.float64]))
        scale = draw(st.sampled_from([-1, 1])) / draw(temperatures(dtype))
        most, dim = (25, 37) if backend == "triton" else draw(st.sampled_from(SIZES))
        return Matrix(
            backend, dtype, draw(odd(dim).map(lambda d: max(d, 1))), scale, draw(st.integers(0, 2**20)),
            draw(st.sampled_from(links or tuple(LINKS))), draw(odd(most)), draw(odd(most)), chosen,
            draw(st.booleans()) if one_set is None else one_set,
        )  # fmt: skip

    return strategy


def matrix_changed(
    inputs: Named, rows: Callable[[Tensor], Tensor] | None, columns: Callable[[Tensor], Tensor] | None
) -> Named:
    """Everything that belongs to rows changed in one way, everything that belongs to columns in another."""

    def fresh(t: Tensor, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        return t if change is None else change(t.detach()).requires_grad_(t.requires_grad)

    side = {"q": rows, "row_bias": rows, "ceiling": rows, "k": columns, "col_bias": columns, "scale": None}
    return {
        name: (fresh(t[0], rows), fresh(t[1], columns)) if isinstance(t, tuple) else fresh(t, side[name])
        for name, t in inputs.items()
    }
