"""One table of losses and inputs, shared by tests and benchmarks.

A row names a loss that ``fastcl.functional`` and ``fastcl.reference`` both have, and says how to make its inputs. Of a
new loss one row here is all that tests, benchmarks and ``fastcl selftest`` need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Draw:
    """Random inputs of a case, in fp64, from one generator."""

    def __init__(self, batch: int, dim: int, seed: int) -> None:
        self.batch, self.dim = batch, dim
        self.generator = torch.Generator().manual_seed(seed)

    def unit(self, *shape: int) -> Tensor:
        """Rows of length 1; the last dimension is ``dim`` unless three are given."""
        shape = shape if len(shape) == 3 else (*shape, self.dim)
        return normalize(torch.randn(*shape, generator=self.generator, dtype=torch.float64), dim=-1)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(max(high, 1), shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class LossCase:
    """A loss by its name, the shapes of its embeddings, and its other arguments.

    Attributes:
        name: in ``fastcl.functional`` and ``fastcl.reference``.
        rows: batch -> rows of each embedding argument.
        numbers: scalar arguments by name, such as ``{"temperature": 0.1}``; made 0-d tensors that want a gradient.
        classes: rows of the first embeddings -> number of labels; a tensor of labels then follows the embeddings.
        row_arguments: keywords of the last embeddings, where those are not positional.
        options: other arguments, as they are, or as a function of the batch.
        drawn: makes further tensors by name; floating-point ones want a gradient, unless ``constant`` names them.
        variant: tells rows with one name apart.
        hot: one of the losses whose kernels are tuned, and which every kernel test runs.
        guided: needs a second similarity, which some backends do not have.
        mined: takes the best of several rows, so that among equals the gradient is anybody's.
        summed: its sums over pairs are those of the backends' kernels.
        stops_gradient: part of it is a constant to autograd, but not to finite differences.
        compiles: no size is read from the device, which would break torch.compile's graph.
        stored: numbers that the definition stores at once, of (rows, columns, dim), where that is not one matrix.
        detached: embeddings that receive no gradient, by position.
    """

    name: str
    rows: Callable[[int], tuple[int, ...]]
    numbers: Mapping[str, float] = field(default_factory=dict)
    classes: Callable[[int], int] | None = None
    row_arguments: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    drawn: Callable[[Draw], dict[str, Tensor]] | None = None
    constant: tuple[str, ...] = ()
    variant: str = ""
    hot: bool = False
    guided: bool = False
    mined: bool = False
    summed: bool = True
    stops_gradient: bool = False
    compiles: bool = True
    stored: Callable[[int, int, int], int] = lambda m, n, d: m * n
    detached: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return "-".join([self.name, *([self.variant] if self.variant else self.row_arguments)])

    def inputs(
        self,
        batch: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        easy: bool = False,
        **numbers: float,
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Positional and keyword arguments; every floating-point tensor that can wants a gradient.

        Args:
            easy: positives that nearly coincide, for the digits of tiny losses.
            numbers: replace values of ``self.numbers``.
        """
        draw = Draw(batch, dim, seed)
        embeddings = [draw.unit(n) for n in self.rows(batch)]
        if easy and len(embeddings) == 1:  # stacked views
            half = len(embeddings[0]) // 2
            embeddings = [torch.cat([embeddings[0][:half], embeddings[0][:half] + 0.01 * embeddings[0][half:]])]
        elif easy:
            embeddings[1] = embeddings[0] + 0.01 * embeddings[1]
        rows = [normalize(e, dim=-1).to(device, dtype) for e in embeddings]
        rows = [e.requires_grad_(i not in self.detached) for i, e in enumerate(rows)]
        number_dtype = torch.promote_types(dtype, torch.float32)
        kwargs: dict[str, Any] = {
            name: torch.tensor(value, dtype=number_dtype, device=device).requires_grad_()
            for name, value in {**self.numbers, **numbers}.items()
        }
        split = len(rows) - len(self.row_arguments)
        kwargs.update(zip(self.row_arguments, rows[split:], strict=True))
        args = rows[:split]
        if self.classes is not None:
            n = rows[0].shape[0]
            args.append(draw.integers(self.classes(n), n).to(device))
        for name, t in (self.drawn(draw) if self.drawn else {}).items():
            if t.is_floating_point():
                t = t.to(dtype if t.ndim > 1 else number_dtype)
                t = t.to(device).requires_grad_(name not in self.constant)
            kwargs[name] = t.to(device)
        return args, {**kwargs, **{n: v(batch) if callable(v) else v for n, v in self.options.items()}}


def _some(n: int) -> int:
    return n // 2 + 1  # classes of 0 to about 6 rows


def _few(n: int) -> int:
    return n // 8 + 2


def _cube(m: int, n: int, d: int) -> int:
    return m * n * n


def _differences(m: int, n: int, d: int) -> int:
    return m * n * d


_TAU = {"temperature": 0.1}
_PAIR: Callable[[int], tuple[int, ...]] = lambda b: (b, b)  # noqa: E731
_STACKED: Callable[[int], tuple[int, ...]] = lambda b: (2 * b,)  # noqa: E731


def _ids(draw: Draw) -> dict[str, Tensor]:
    return {"ids": draw.integers(draw.batch // 2 + 1, draw.batch)}


def _guides(draw: Draw) -> dict[str, Tensor]:
    # a guide that mostly agrees which rows belong together, as one does
    q = draw.unit(draw.batch)
    return {"guide_q": q, "guide_k": normalize(q + 0.7 * draw.unit(draw.batch), dim=-1)}


def _hard_guides(draw: Draw) -> dict[str, Tensor]:
    count = draw.batch // 2 + 1
    return {**_guides(draw), "negatives": draw.unit(count), "guide_negatives": draw.unit(count)}


CASES = (
    LossCase("nt_xent", _STACKED, _TAU, hot=True),
    LossCase("dcl", _STACKED, _TAU, hot=True),
    LossCase("info_nce", _PAIR, {"temperature": 0.07}, hot=True),
    LossCase("info_nce", lambda b: (b, b, 3 * b + 1), {"temperature": 0.07}, variant="queue", hot=True),
    LossCase("info_nce", lambda b: (b, b, b // 2 + 1), {"temperature": 0.07}, None, ("extra_negatives",), hot=True),
    LossCase("clip", _PAIR, {"scale": 14.0}, hot=True),
    LossCase("siglip", _PAIR, {"scale": 10.0, "bias": -3.0}, hot=True),
    LossCase("supcon", _STACKED, _TAU, _some, hot=True),
    LossCase("nt_xent", lambda b: (3 * b,), _TAU, options={"views": 3}, variant="views"),
    LossCase("nt_xent", _STACKED, _TAU, _some, variant="labels"),
    LossCase("nt_xent", lambda b: (2 * b, b + 3), _TAU, None, ("extra_negatives",), drawn=_ids, variant="bank-ids"),
    LossCase("dclw", _STACKED, _TAU, stops_gradient=True),
    LossCase("debiased_nt_xent", _STACKED, {"temperature": 0.5}),
    LossCase("hard_nt_xent", _STACKED, {"temperature": 0.5}),
    LossCase("all_pairs_nt_xent", _STACKED, _TAU),
    LossCase("info_nce", _PAIR, _TAU, options={"symmetric": True, "label_smoothing": 0.1}, variant="smoothed"),
    LossCase("info_nce", _PAIR, _TAU, options={"symmetric": True}, drawn=_ids, variant="ids"),
    LossCase(
        "info_nce",
        _PAIR,
        _TAU,
        variant="own",
        stops_gradient=True,
        options={"hardness": 2.0, "own_hardness": 3.0, "label_smoothing": 0.2},
        drawn=lambda draw: {"own_negatives": draw.unit(draw.batch, 3, draw.dim)},
    ),
    LossCase("moco_v3", lambda b: (b, b, b, b), {"temperature": 0.2}, detached=(2, 3)),
    LossCase("in_batch_softmax", _PAIR, _TAU, drawn=lambda d: {"log_q": d.uniform(d.batch).log(), **_ids(d)}),
    LossCase(
        "in_batch_softmax",
        _PAIR,
        _TAU,
        variant="refined",
        options={"correct_positive": False},
        drawn=lambda draw: {"log_q": draw.uniform(draw.batch).log()},
    ),
    LossCase("gist", _PAIR, _TAU, drawn=_guides, constant=("guide_q", "guide_k"), guided=True),
    LossCase(
        "gist",
        _PAIR,
        _TAU,
        variant="margin",
        options={"margin": 0.1, "margin_strategy": "relative"},
        drawn=_hard_guides,
        constant=("guide_q", "guide_k", "guide_negatives"),
        guided=True,
    ),
    LossCase(
        "sampled_info_nce",
        lambda b: (b, 2 * b + 3),
        _TAU,
        summed=False,
        drawn=lambda d: {
            "positive": d.integers(2 * d.batch, d.batch),
            "negatives": d.integers(d.batch, d.batch, 5),
        },
    ),
    LossCase("n_pair", _PAIR, options={"l2": 0.02}),
    LossCase("clip", _PAIR, {"scale": 14.0, "text_scale": 9.0}, drawn=_ids, variant="two-scales"),
    LossCase("siglip", _PAIR, {"scale": 10.0, "bias": -3.0}, drawn=_ids, variant="ids"),
    LossCase("supcon", _STACKED, _TAU, _some, options={"form": "in"}, variant="in"),
    LossCase(
        "supcon",
        _STACKED,
        _TAU,
        _some,
        variant="one",
        options={"anchors": lambda b: b, "base_temperature": 0.07},
    ),
    LossCase("sincere", _STACKED, _TAU, _some),
    LossCase("multi_similarity", _STACKED, classes=_some, options={"beta": 20.0}),
    LossCase(
        "multi_similarity", _STACKED, classes=_few, options={"beta": 20.0, "epsilon": 0.1}, variant="mined", guided=True
    ),
    LossCase(
        "triplet_all", _STACKED, classes=_few, options={"margin": 0.2}, summed=False, compiles=False, stored=_cube
    ),
    LossCase(
        "triplet_all",
        _STACKED,
        classes=_few,
        variant="cosine",
        options={"margin": 0.2, "distance": "cosine"},
        summed=False,
        compiles=False,
        stored=_cube,
    ),
    LossCase(
        "triplet_hard",
        _STACKED,
        classes=_few,
        options={"margin": 0.2},
        mined=True,
        summed=False,
        stored=_differences,
    ),
    LossCase(
        "triplet_hard",
        _STACKED,
        classes=_few,
        variant="soft",
        options={"margin": None, "distance": "squared"},
        mined=True,
        summed=False,
        stored=_differences,
    ),
    LossCase(
        "triplet_semi_hard",
        _STACKED,
        classes=_few,
        options={"margin": 0.2},
        mined=True,
        summed=False,
        compiles=False,
        stored=_differences,
    ),
    LossCase("cosface", lambda b: (b, 7), {"scale": 16.0}, lambda n: 7, options={"margin": 0.2}),
    LossCase("siamese", _PAIR, classes=lambda n: 2, options={"margin": 1.3}, summed=False),
    LossCase("triplet", lambda b: (b, b, b), options={"margin": 0.3, "swap": True}, summed=False),
    LossCase("negative_cosine", _PAIR, summed=False),
    LossCase("byol", _PAIR, detached=(1,), summed=False),
    LossCase("squared_cosine", _PAIR, {"temperature": 0.5}, lambda n: 2, summed=False),
)

HOT = tuple(case for case in CASES if case.hot)
