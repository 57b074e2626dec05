"""What holds between two calls, whatever the inputs: invariants of every loss and primitive, on inputs that are drawn.

No reference stands here: a call is compared with another call whose result follows from it. Hypothesis draws the loss,
the backend, the dtype, the sizes (none or an odd number of rows, to 300; an odd number of features, to 1,100), the
temperature (0.001 to 10) and the seed of the numbers; what it prints for a failure makes that very call again.

    pytest tests/test_invariants.py                                # a few examples of every invariant
    HYPOTHESIS_PROFILE=nightly pytest tests/test_invariants.py     # more than 20,000 of them

``drawn.py`` says what may be drawn, and by how much two sides of a comparison may differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from math import log, sqrt
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl
from fastcl import _gathered, _settings, functional, triples
from fastcl.backends import chunked, native
from fastcl.pairwise import (
    gathered_dot,
    listed_dot,
    merge_logsumexp,
    pair_argmax,
    pair_softplus_total,
    pair_topk,
    row_dot,
)
from fastcl.testing import CASES

from .conftest import DEVICE
from .drawn import (
    EXTRAS,
    LABELS,
    LINKS,
    Drawn,
    Loss,
    Matrix,
    Named,
    is_rows,
    losses,
    mapped,
    matrices,
    matrix_changed,
    same_bits,
)
from .oracle import assert_close

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="these backends are those of the CPU; tests/test_gpu.py is there"
)

settings.register_profile(
    "suite",
    max_examples=7,
    deadline=None,  # nothing is timed
    database=None,  # a failure prints what makes it again
    print_blob=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("nightly", settings.get_profile("suite"), max_examples=800)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

BACKENDS = ("native", "chunked", "triton") if native._C is not None else ("chunked", "triton")


# --- invariants of losses ---------------------------------------------------------------------------------------------

# Losses of rows that do not know each other, and which of their arguments is a table that all of them look at.
TABLES = {
    "info_nce-queue": "2", "sampled_info_nce": "1", "cosface": "1", "siamese": None, "triplet": None,
    "negative_cosine": None, "byol": None, "squared_cosine": None,
}  # fmt: skip
# Losses of logits scale * <q, k> alone: nothing but the product of scale, q and k enters.
OF_LOGITS = (
    "nt_xent", "dcl", "info_nce", "info_nce-queue", "info_nce-extra_negatives", "clip", "supcon", "nt_xent-views",
    "nt_xent-labels", "nt_xent-bank-ids", "all_pairs_nt_xent", "info_nce-smoothed", "info_nce-ids", "in_batch_softmax",
    "in_batch_softmax-refined", "gist", "gist-margin", "sampled_info_nce", "clip-two-scales", "siglip", "siglip-ids",
    "supcon-in", "sincere",
)  # fmt: skip
# Of these, losses of differences of the logits of a row.
OF_DIFFERENCES = tuple(
    label for label in OF_LOGITS if label not in ("siglip", "siglip-ids", "in_batch_softmax-refined")
)
SWAPPED = {  # arguments that change places
    "clip": ("1", "0"), "siglip": ("1", "0"), "siglip-ids": ("1", "0"), "info_nce-smoothed": ("1", "0"),
    "info_nce-ids": ("1", "0"), "siamese": ("1", "0"), "negative_cosine": ("1", "0"), "squared_cosine": ("1", "0"),
    "clip-two-scales": ("1", "0"), "moco_v3": ("1", "0", "3", "2"),
}  # fmt: skip
STACKED = tuple(c.label for c in CASES if c.rows(1)[0] == 2 and c.label != "supcon-one")
LABELLED = {  # arguments that say which rows belong together
    "nt_xent-labels": "1", "supcon": "1", "supcon-in": "1", "supcon-one": "1", "sincere": "1", "multi_similarity": "1",
    "multi_similarity-mined": "1", "triplet_all": "1", "triplet_all-cosine": "1", "triplet_hard": "1",
    "triplet_hard-soft": "1", "triplet_semi_hard": "1", "nt_xent-bank-ids": "ids", "info_nce-ids": "ids",
    "in_batch_softmax": "ids", "clip-two-scales": "ids", "siglip-ids": "ids",
}  # fmt: skip
GUIDES = ("2", "3", "guide_q", "guide_k", "guide_negatives")  # of gist
WEIGHTED = tuple(c.label for c in CASES if "weights" in signature(getattr(functional, c.name)).parameters)
NOT_OF_LOGITS = ("triplet_all", "triplet_all-cosine", "triplet_semi_hard")


def permuting_pairs_permutes_gradients(p: Loss) -> None:
    inputs = p.inputs()

    def places(name: str, n: int) -> Tensor:
        """The same permutation of the pairs in every view; rows that are no pairs in an order of their own."""
        if name == TABLES.get(p.label):
            return p.order(n) if p.label == "info_nce-queue" else torch.arange(n)  # others point into it
        copies, rest = divmod(n, max(p.batch, 1))
        if rest:
            return p.order(n)
        return (p.order(p.batch) + p.batch * torch.arange(copies)[:, None]).flatten()

    def moved(name: str, t: Tensor) -> Tensor:
        return t[places(name, len(t))] if t.ndim else t

    loss, grads = p(inputs)
    upstream = p.upstream(loss)
    want = moved("", loss), {n: moved(n, g) for n, g in grads.items()}
    p.same(p(mapped(inputs, moved), moved("", upstream)), want)


def turned(p: Drawn) -> Callable[[Tensor], Tensor]:
    """The features in another order and with other signs, which rounds nothing; in fp64 also a reflection."""
    order = torch.randperm(p.dim, generator=p.generator)
    sign = torch.randint(2, (p.dim,), generator=p.generator) * 2 - 1
    mirror = torch.nn.functional.normalize(torch.randn(p.dim, generator=p.generator, dtype=torch.float64), dim=0)

    def turn(x: Tensor) -> Tensor:
        x = x[..., order] * sign.to(x.dtype)
        return x - 2 * (x @ mirror)[..., None] * mirror if x.dtype == torch.float64 else x

    return turn


def rotating_features_rotates_gradients(p: Loss) -> None:
    inputs, turn = p.inputs(), turned(p)
    loss, grads = p(inputs)
    p.same(
        p(mapped(inputs, lambda _, t: turn(t) if is_rows(t) else t)),
        (loss, {n: turn(g) if is_rows(g) else g for n, g in grads.items()}),
    )


def the_length_of_a_row_divides_its_gradient(p: Loss) -> None:
    """By powers of 2, which round nothing: bit for bit, but for fp16's small range."""
    inputs = p.inputs()
    most = 4 if p.dtype == torch.float16 else 20
    least = 0 if p.dtype == torch.float16 else -most

    def drawn(rows: Tensor) -> Tensor:
        return 2.0 ** torch.randint(least, most + 1, (*rows.shape[:-1], 1), generator=p.generator)

    lengths = {name: drawn(inputs[name]) for name in p.sides()}
    longer = mapped(inputs, lambda name, t: t * lengths[name].to(t.dtype) if name in lengths else t)
    loss, grads = p(inputs, normalize=True)
    got, got_grads = p(longer, normalize=True)
    got_grads = {n: g * lengths[n].to(g.dtype) if n in lengths else g for n, g in got_grads.items()}
    assert torch.equal(got, loss), "other bits of the loss"
    if p.dtype != torch.float16:
        assert all(same_bits(g, grads[n]) for n, g in got_grads.items()), "other bits of a gradient"
        return
    # what is shorter by 2^4 has lost as many digits below 2^-24
    p.same_gradients(got_grads, grads, {n: p.unit(n) + sqrt(g.numel()) * 2.0**-20 / 1e-3 for n, g in grads.items()})


def twice_the_rows_are_twice_the_loss(p: Loss) -> None:
    """Of losses whose rows do not know each other; the rows' gradients do not change, those of a table double."""
    inputs, table = p.inputs(), TABLES[p.label]

    def doubled(name: str, t: Tensor) -> Tensor:
        return torch.cat([t, t]) if t.ndim and name != table else t

    loss, grads = p(inputs)
    upstream = p.upstream(loss)
    got, got_grads = p(mapped(inputs, doubled), doubled("", upstream))
    n = len(loss) if loss.ndim else 0
    want = doubled("", loss) if n else 2 * loss
    p.same(
        (got, got_grads), (want, {k: doubled(k, g) if g.ndim and k != table else 2 * g for k, g in grads.items()}), 2
    )


def a_queue_twice_adds_log_2(p: Loss) -> None:
    """-log sigmoid(p - n) of n + log 2 is L + log(2 - e^-L)."""
    p = replace(p, reduction="none")
    inputs = p.inputs()
    loss, _ = p(inputs)
    doubled = mapped(inputs, lambda name, t: torch.cat([t, t]) if name == "2" else t)
    got, _ = p(doubled)
    floor = 2 * p.logit_error * sqrt(max(len(loss), 1))
    assert_close(got, loss + torch.log1p(-torch.expm1(-loss)), p.tolerance[0], floor=floor, what="loss")


def rows_in_two_parts_add_up(p: Loss) -> None:
    p = replace(p, reduction="sum")
    inputs, table = p.inputs(), TABLES[p.label]
    cut = int(torch.randint(p.batch + 1, (), generator=p.generator))
    parts = [
        p(mapped(inputs, lambda name, t, part=part: t[part] if t.ndim and name != table else t))
        for part in (slice(cut), slice(cut, None))
    ]
    (one, one_grads), (other, other_grads) = parts

    def joined(name: str, g: Tensor) -> Tensor:
        return torch.cat([g, other_grads[name]]) if g.ndim and name != table else g + other_grads[name]

    p.same((one + other, {name: joined(name, g) for name, g in one_grads.items()}), p(inputs), 2)


def a_queue_in_two_parts_is_the_queue(p: Loss) -> None:
    inputs = p.inputs()
    queue = inputs["2"].detach()
    cut = int(torch.randint(len(queue) + 1, (), generator=p.generator))
    loss, grads = p(inputs)
    parts = {"2": queue[:cut].requires_grad_(), "extra_negatives": queue[cut:].requires_grad_()}
    got, got_grads = p({**inputs, **parts})
    got_grads["2"] = torch.cat([got_grads["2"], got_grads.pop("extra_negatives")])
    p.same((got, got_grads), (loss, grads), 2)


@contextmanager
def small_tiles(workspace: int) -> Iterator[None]:
    """Scratch memory of so many bytes, and little of everything else that is done in pieces."""
    from fastcl.backends import triton

    small: list[tuple[Any, str, Any]] = [
        (_settings, "workspace_bytes", workspace), (triples, "_TILE", max(workspace, 1)),
        (_gathered, "_GATHERED", max(workspace, 1)), (triton, "_STRIPS_FROM", 1), (triton, "_SPANS", 3),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in small:
            patch.setattr(module, name, value)
        yield


def tiles_change_nothing(p: Loss) -> None:
    """Of the C++ kernels not a bit, except of bf16 rows, of which they keep rounded tiles."""
    inputs = p.inputs()
    loss, grads = p(inputs)
    with small_tiles(int(torch.randint(2**17, (), generator=p.generator))):
        got, got_grads = p(inputs)
    p.same((got, got_grads), (loss, grads))
    if p.backend == "native" and p.case.summed and p.dtype != torch.bfloat16:
        assert torch.equal(got, loss), "other bits of the loss"
        assert all(torch.equal(g, grads[n]) for n, g in got_grads.items()), "other bits of a gradient"


def swapping_the_sides_swaps_the_gradients(p: Loss) -> None:
    inputs = p.inputs()
    if p.label in STACKED:
        p = replace(p, reduction="sum" if p.case.name == "dclw" else p.reduction)

        def swap(_: str, t: Tensor) -> Tensor:
            return t.roll(p.batch, 0) if t.ndim and len(t) == p.rows else t

        loss, grads = p(inputs)
        upstream = p.upstream(loss)
        want = swap("", loss), {n: swap(n, g) for n, g in grads.items()}
        p.same(p(mapped(inputs, swap), swap("", upstream)), want)
        return
    p = replace(p, reduction="sum")
    other = dict(zip("0123", SWAPPED[p.label], strict=False))
    if p.label == "clip-two-scales":
        other |= {"scale": "text_scale", "text_scale": "scale"}
    loss, grads = p(inputs)
    swapped = {name: inputs[other.get(name, name)] for name in inputs}
    p.same(p(swapped), (loss, {n: grads[other.get(n, n)] for n in grads}))


def the_positive_is_no_negative_of_its_own(p: Loss) -> None:
    inputs = p.inputs()
    more = torch.cat([inputs["negatives"], inputs["positive"][:, None]], 1)
    p.same(p({**inputs, "negatives": more}), p(inputs))


def a_common_offset_of_the_logits_cancels(p: Loss) -> None:
    """A feature that all rows have in common, so that every logit grows by the same."""
    inputs = p.inputs()
    offset = 2.0 ** int(torch.randint(-1, 2, (), generator=p.generator))

    def widened(name: str, t: Tensor) -> Tensor:
        if not is_rows(t) or (p.case.name == "gist" and name in GUIDES):
            return t
        return torch.cat([t, t.new_full((*t.shape[:-1], 1), offset)], -1)

    loss, grads = p(inputs)
    got, got_grads = p(mapped(inputs, widened))
    got_grads = {n: g[..., : p.dim] if is_rows(g) else g for n, g in got_grads.items()}
    p.same((got, got_grads), (loss, grads), 2 + 2 * offset**2)
    if p.label == "in_batch_softmax":
        shifted = mapped(inputs, lambda name, t: t + offset if name == "log_q" else t)
        p.same(p(shifted), (loss, grads), 2)


def gradients_are_those_of_a_product(p: Loss) -> None:
    """Euler: logits scale * <q, k> are homogeneous, so <q, dq> + <k, dk> = 2 scale dscale."""
    inputs = p.inputs()
    _, grads = p(inputs)
    dots = sum((inputs[n].detach().double() * grads[n].double()).sum() for n in p.sides() if n in grads)
    of_scales = sum(inputs[n].detach().double() * grads[n].double() for n in ("scale", "text_scale") if n in grads)
    if "temperature" in grads:
        of_scales = of_scales - inputs["temperature"].detach().double() * grads["temperature"].double()
    floor = p.tolerance[1] * 2 * p.scale * max(p.rows, 1) * p.breadth
    assert_close(
        torch.as_tensor(dots), 2 * torch.as_tensor(of_scales), p.tolerance[1], floor=floor, what="2 scale dscale"
    )


def the_gradient_of_a_normalized_row_is_a_tangent(p: Loss) -> None:
    inputs = p.inputs()
    _, grads = p(inputs, normalize=True)
    for name, g in grads.items():
        if is_rows(g):
            along = (inputs[name].detach().double() * g.double()).sum(-1)
            assert float(along.norm()) <= p.tolerance[1] * p.unit(name), (
                f"{name}: {float(along.norm()):.1e} along itself"
            )


def rows_add_up_to_the_sum_and_the_mean(p: Loss) -> None:
    inputs = p.inputs()
    rows = replace(p, reduction="none")
    loss, grads = rows(inputs, torch.ones_like(rows(inputs)[0]))
    total = replace(p, reduction="sum")(inputs)
    p.same((loss.sum(), grads), total)
    mean, mean_grads = replace(p, reduction="mean")(inputs)
    # How many rows count is the ratio of sum and mean where labels decide; a sum of 0 has a mean of 0.
    count = max(len(loss), 1)
    if p.label in LABELLED or p.case.name in NOT_OF_LOGITS:
        count = float(total[0] / mean) if mean else 1.0
    p.same((mean * count, {n: g.double() * count for n, g in mean_grads.items()}), total)


def upstream_gradients_add_up(p: Loss) -> None:
    p = replace(p, reduction="none")
    inputs = p.inputs()
    loss, _ = p(inputs)
    one, other = (torch.rand(len(loss), generator=p.generator, dtype=torch.float64).to(loss.dtype) for _ in range(2))
    (_, a), (_, b), (_, both) = p(inputs, one), p(inputs, other), p(inputs, one + 2 * other)
    p.same_gradients({n: g + 2 * b[n] for n, g in a.items()}, both, {n: 3 * p.unit(n) for n in a})


def weights_are_upstream_gradients(p: Loss) -> None:
    inputs = p.inputs()
    rows = replace(p, reduction="none")
    loss, _ = rows(inputs)
    weights = torch.rand(len(loss), generator=p.generator, dtype=torch.float64).to(loss.dtype).requires_grad_()
    _, grads = rows(inputs, weights.detach())
    got, got_grads = replace(p, reduction="sum")(inputs, weights=weights)
    p.same((got, got_grads), ((loss * weights).sum().detach(), {**grads, "weights": loss}))


def names_of_labels_do_not_matter(p: Loss) -> None:
    """Not a bit of them; numbers of up to 63 bits, in another order."""
    inputs, name = p.inputs(), LABELLED[p.label]
    labels = inputs[name]
    names = torch.randint(2**62, (int(labels.max()) + 1 if len(labels) else 1,), generator=p.generator) * 2 - 2**62
    (loss, grads), (got, got_grads) = p(inputs), p({**inputs, name: names[labels]})
    assert torch.equal(got, loss), "other bits of the loss"
    assert all(torch.equal(g, grads[n]) for n, g in got_grads.items()), "other bits of a gradient"


def features_of_zero_do_not_matter(p: Loss) -> None:
    inputs = p.inputs()
    more = int(torch.randint(1, 70, (), generator=p.generator))

    def padded(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_zeros(*t.shape[:-1], more)], -1) if is_rows(t) else t

    loss, grads = p(inputs)
    got, got_grads = p(mapped(inputs, lambda _, t: padded(t)))
    p.same((got, got_grads), (loss, {n: padded(g) for n, g in grads.items()}))
    assert not any(g[..., p.dim :].any() for g in got_grads.values() if is_rows(g)), "a gradient of features of zero"


def the_unit_of_length_does_not_matter(p: Loss) -> None:
    """Rows 2^e times as long at a temperature 4^e times as high: not a bit, for a power of 2 rounds nothing."""
    inputs = p.inputs()
    by = 2.0 ** int(torch.randint(-5, 6, (), generator=p.generator))
    powers = {"temperature": by**2, "scale": by**-2, "text_scale": by**-2, **dict.fromkeys(p.sides(), by)}
    if p.case.guided:
        powers |= dict.fromkeys(GUIDES, 1.0)
    loss, grads = p(inputs)
    got, got_grads = p(mapped(inputs, lambda name, t: t * powers.get(name, 1) if t.is_floating_point() else t))
    assert same_bits(got, loss), "other bits of the loss"
    wrong = [n for n, g in got_grads.items() if not same_bits(g * powers.get(n, 1), grads[n])]
    assert not wrong, f"other bits of the gradients of {wrong}"


# --- invariants of primitives -----------------------------------------------------------------------------------------


def permuting_rows_and_columns(p: Matrix) -> None:
    inputs = p.inputs()
    i, j = p.order(p.rows), torch.randperm(p.columns, generator=p.generator)
    (row, col), grads = p(inputs, both=True)
    moved = matrix_changed(inputs, lambda t: t[i], lambda t: t[j])
    upstream = p.upstream(row)[i], p.upstream(col)[j]
    of_rows = ("q", "row_bias")
    want = {n: g[i] if n in of_rows else g[j] if g.ndim else g for n, g in grads.items()}
    p.same(p(moved, both=True, upstream=upstream), ((row[i], col[j]), want), 2)


def rotating_features(p: Matrix) -> None:
    inputs, turn = p.inputs(), turned(p)
    results, grads = p(inputs)
    got = p({n: turn(t.detach()).requires_grad_() if n in ("q", "k") else t for n, t in inputs.items()})
    p.same(got, (results, {n: turn(g) if n in ("q", "k") else g for n, g in grads.items()}))


def columns_twice(p: Matrix) -> None:
    """A sum of exponentials doubles: its logarithm grows by log 2, and every copy has half of the weight."""
    inputs = p.inputs()
    (row,), grads = p(inputs)
    (got,), got_grads = p(matrix_changed(inputs, None, lambda t: torch.cat([t, t])))
    of_columns = {n: torch.cat([g, g]) for n, g in grads.items() if n in ("k", "col_bias")}
    if p.link == "exp":
        want = row + log(2), grads | {n: g / 2 for n, g in of_columns.items()}
    else:
        want = 2 * row, {n: 2 * g for n, g in grads.items()} | of_columns
    p.same(((got,), got_grads), ((want[0],), want[1]), 2)


def columns_in_two_parts(p: Matrix) -> None:
    inputs = p.inputs()
    (whole,), grads = p(inputs)
    cut = int(torch.randint(p.columns + 1, (), generator=p.generator))
    with fastcl.use_backend(p.backend):
        parts = [
            LINKS[p.link](s["q"], s["k"], **{n: v for n, v in s.items() if n not in ("q", "k")})
            for s in (part_of_columns(inputs, slice(cut)), part_of_columns(inputs, slice(cut, None)))
        ]
        merged = merge_logsumexp(*parts) if p.link == "exp" else parts[0] + parts[1]
        leaves = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
        got = torch.autograd.grad(merged, list(leaves.values()), p.upstream(merged))
    p.same(((merged,), dict(zip(leaves, got, strict=True))), ((whole,), grads), 2)


def part_of_columns(inputs: Named, part: slice) -> Named:
    """Views, through which gradients reach the whole."""
    named = {n: t[part] for n, t in inputs.items() if n in ("k", "col_bias")}
    return inputs | named | {n: (t[0], t[1][part]) for n, t in inputs.items() if isinstance(t, tuple)}


def tiles_of_a_matrix(p: Matrix) -> None:
    inputs = p.inputs()
    both = not p.one_set
    results, grads = p(inputs, both)
    with small_tiles(int(torch.randint(2**17, (), generator=p.generator))):
        got, got_grads = p(inputs, both)
    p.same((got, got_grads), (results, grads), 2)
    if p.backend == "native" and p.dtype != torch.bfloat16:
        assert all(map(torch.equal, got, results)), "other bits of a result"
        assert all(torch.equal(g, grads[n]) for n, g in got_grads.items()), "other bits of a gradient"


def transposing(p: Matrix) -> None:
    inputs = p.inputs()
    other = {"q": "k", "k": "q", "row_bias": "col_bias", "col_bias": "row_bias"}
    swapped = {other.get(n, n): t[::-1] if isinstance(t, tuple) else t for n, t in inputs.items()}
    (row, col), grads = p(inputs, both=True)
    (got_col, got_row), got = p(swapped, both=True)
    p.same(((got_row, got_col), {other.get(n, n): g for n, g in got.items()}), ((row, col), grads), 2)


def columns_that_keys_forget(p: Matrix) -> None:
    """Long ones, of large logits, of a class that no row is of, or of the class that all rows are of."""
    inputs = p.inputs()
    more = int(torch.randint(1, 40, (), generator=p.generator))
    strangers = torch.randn(more, p.dim, generator=p.generator).to(p.dtype) * 8

    def added(t: Tensor) -> Tensor:
        return torch.cat([t, strangers]) if t.ndim == 2 else torch.cat([t, t.new_full((more,), 3)])

    results, grads = p(inputs)
    longer = matrix_changed(inputs, None, lambda t: torch.cat([t, t.new_zeros(more, *t.shape[1:])]))
    longer["k"] = added(inputs["k"].detach()).requires_grad_()
    rows, columns = torch.zeros(p.rows, dtype=torch.long), torch.ones(p.columns + more, dtype=torch.long)
    if "only" in p.extras:  # beside other classes, one more
        longer["only"] = inputs["only"][0], torch.cat([inputs["only"][1], torch.full((more,), 9)])
    elif "drop" in p.extras:
        columns[: p.columns] = 0
        longer["only"] = rows, columns
    else:
        columns[p.columns :] = 0
        longer["drop"] = rows, columns
    got, got_grads = p(longer)
    for n in ("k", "col_bias"):
        if n in got_grads:
            assert not got_grads[n][p.columns :].any(), f"a gradient of {n} of forgotten columns"
            got_grads[n] = got_grads[n][: p.columns]
    p.same((got, got_grads), (results, grads), 2)


def biases_are_offsets(p: Matrix) -> None:
    """A row's bias is added to its log-sum-exp. It may stand as one more feature beside a 1 in every column, too."""
    inputs = p.inputs()
    bias = torch.randn(p.rows, generator=p.generator, dtype=torch.float64).to(p.numbers)
    results, grads = p(inputs)
    larger = 2 + float(bias.abs().max()) if len(bias) else 1.0
    got, got_grads = p({**inputs, "row_bias": bias.clone().requires_grad_()})
    if p.link == "exp":
        of_bias = torch.where(results[0] == -torch.inf, 0, p.upstream(results[0]))  # softmax weights add up to 1
        p.same((got, got_grads), ((results[0] + bias,), {**grads, "row_bias": of_bias}), larger)
    feature = (bias / p.scale).to(p.dtype)
    q, k = (inputs[n].detach() for n in ("q", "k"))
    wide = {
        **inputs, "q": torch.cat([q, feature[:, None]], 1).requires_grad_(),
        "k": torch.cat([k, torch.ones_like(k[:, :1])], 1).requires_grad_(),
    }  # fmt: skip
    rounded = (feature.to(p.numbers) * p.scale).requires_grad_()
    (row,), d = p(wide)
    (want,), e = p({**inputs, "row_bias": rounded})
    got_grads = {"q": d["q"][:, : p.dim], "k": d["k"][:, : p.dim], "row_bias": d["q"][:, p.dim].to(p.numbers) / p.scale}
    rest = {n: d[n] for n in e if n not in (*got_grads, "scale")}  # the scale multiplies the feature as well
    e.pop("scale")
    p.same(((row,), got_grads | rest), ((want,), e), 2 * larger)


def gradients_of_a_product(p: Matrix) -> None:
    inputs = p.inputs()
    _, grads = p(inputs)
    of_q, of_k = ((inputs[n].detach().double() * grads[n].double()).sum() for n in ("q", "k"))
    of_scale = p.scale * grads["scale"].double()
    floor = p.tolerance[1] * max(abs(p.scale), 1) * max(p.rows, p.columns, 1) * p.breadth
    assert_close(of_q, of_scale, p.tolerance[1], floor=floor, what="<q, dq>")
    assert_close(of_k, of_scale, p.tolerance[1], floor=floor, what="<k, dk>")


def one_set_is_two_equal_sets(p: Matrix) -> None:
    inputs = p.inputs()
    results, grads = p(inputs)
    twin = inputs["q"].detach().clone().requires_grad_()
    got, got_grads = p({**inputs, "k": twin})
    got_grads["q"] = got_grads["q"].to(p.numbers) + got_grads.pop("k").to(p.numbers)
    p.same((got, got_grads), (results, grads), 2)


def upstream_gradients_of_a_matrix(p: Matrix) -> None:
    inputs = p.inputs()
    results, _ = p(inputs, both=True)
    (a, b), (c, d) = (
        tuple(torch.rand(len(r), generator=p.generator, dtype=torch.float64).to(r.dtype) for r in results)
        for _ in range(2)
    )
    (_, one), (_, other) = p(inputs, True, (a, b)), p(inputs, True, (c, d))
    _, both = p(inputs, True, (a - 2 * c, b - 2 * d))
    p.same_gradients({n: g - 2 * other[n] for n, g in one.items()}, both, {n: 6 * p.unit(n) for n in one})


def names_of_keys(p: Matrix) -> None:
    inputs = p.inputs()
    names = torch.randperm(4, generator=p.generator) * 2**33 - 2**34  # equal in their low 32 bits
    renamed = {n: (names[t[0]], names[t[1]]) if isinstance(t, tuple) else t for n, t in inputs.items()}
    (results, grads), (got, got_grads) = p(inputs, both=True), p(renamed, both=True)
    assert all(map(torch.equal, got, results)), "other bits of a result"
    assert all(torch.equal(g, grads[n]) for n, g in got_grads.items()), "other bits of a gradient"


def units_of_length(p: Matrix) -> None:
    inputs = p.inputs()
    a, b = (2.0 ** int(torch.randint(-5, 6, (), generator=p.generator)) for _ in range(2))
    powers = {"q": a, "k": b, "scale": 1 / (a * b)}
    (results, grads), (got, got_grads) = (
        p(inputs, both=True),
        p({n: (t.detach() * powers[n]).requires_grad_() if n in powers else t for n, t in inputs.items()}, both=True),
    )
    assert all(map(same_bits, got, results)), "other bits of a result"
    wrong = [n for n, g in got_grads.items() if not same_bits(g * powers.get(n, 1), grads[n])]
    assert not wrong, f"other bits of the gradients of {wrong}"


def the_total_is_the_sum(p: Matrix) -> None:
    """``pair_softplus_total``, whose gradients come from the forward pass."""
    inputs = p.inputs()
    (row,), grads = p(inputs, upstream=(torch.ones(p.rows, dtype=p.numbers),))
    options = {n: v for n, v in inputs.items() if n not in ("q", "k")}
    leaves = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    with fastcl.use_backend(p.backend):
        total = pair_softplus_total(inputs["q"], inputs["k"], **options)
        got = torch.autograd.grad(total, list(leaves.values()))
    p.same(
        ((total[None].detach(),), dict(zip(leaves, got, strict=True))),
        ((row.sum()[None],), grads),
        sqrt(max(p.rows, 1)),
    )


def neighbours(p: Matrix) -> None:
    """The best of more are the best of fewer, of the least similar the opposite's, of columns in any order the same."""
    inputs = p.inputs()
    q, k = (inputs[n].detach() for n in ("q", "k"))
    # whole numbers, so that nothing is rounded, and many are equal
    q, k = ((4 * t * sqrt(p.dim)).round().clamp(-8, 8) for t in (q, k))
    options: Named = {n: inputs[n] for n in p.extras}
    order = torch.randperm(p.columns, generator=p.generator)
    topk = int(torch.randint(1, 12, (), generator=p.generator))
    with fastcl.use_backend(p.backend):
        values, indices = pair_topk(q, k, topk=topk, **options)
        more, more_indices = pair_topk(q, k, topk=topk + 5, **options)
        least, least_indices = pair_topk(q, -k, topk=topk, largest=False, **options)
        moved, _ = pair_topk(q, k[order], topk=topk, **{n: (t[0], t[1][order]) for n, t in options.items()})
        best = pair_argmax(q, k, **options)
        with small_tiles(int(torch.randint(2**17, (), generator=p.generator))):
            tiled, tiled_indices = pair_topk(q, k, topk=topk, **options)
    first = indices[:, 0]
    s = q.double() @ k.double().T
    found = s.gather(1, indices.clamp(min=0)) if p.columns else s.new_zeros(indices.shape)
    assert torch.equal(values.double(), found.masked_fill(indices < 0, -torch.inf)), (
        "a similarity that is not its pair's"
    )
    assert torch.equal(more[:, :topk], values) and torch.equal(-least, values), "more, or the least of the opposite"
    assert torch.equal(moved, values) and torch.equal(tiled, values), "another order, or other tiles"
    if p.backend == "chunked":  # which promises the first of equals for one neighbour alone
        if topk > 1:
            return
    else:
        assert torch.equal(more_indices[:, :topk], indices), "others of equal neighbours"
    assert torch.equal(best, first), "others of equal neighbours"
    assert torch.equal(least_indices, indices) and torch.equal(tiled_indices, indices), "others of equal neighbours"


def dots_of_rows_are_those_of_lists(p: Matrix) -> None:
    """``row_dot``, ``gathered_dot`` and ``listed_dot`` of the same pairs."""
    inputs = p.inputs()
    q, k = inputs["q"], inputs["k"]
    some = torch.randint(max(p.columns, 1), (p.rows if p.columns else 0,), generator=p.generator)
    q = q[: len(some)]
    upstream = torch.linspace(0.5, 1.5, len(some), dtype=p.numbers)
    calls: list[Callable[[], Tensor]] = [
        lambda: row_dot(q, k[some]), lambda: gathered_dot(q, k, some[:, None]).squeeze(1),
        lambda: listed_dot(q, k, torch.arange(len(some)), some),
    ]  # fmt: skip
    with small_tiles(1 + int(torch.randint(2**12, (), generator=p.generator))):
        found = [(s.detach(), torch.autograd.grad(s, (inputs["q"], k), upstream)) for s in (call() for call in calls)]
    (want, want_grads), *others = found
    for got, grads in others:
        assert_close(got, want, p.tolerance[0], floor=p.logit_error * sqrt(max(len(some), 1)), what="dots")
        p.same_gradients(
            dict(zip("qk", grads, strict=True)),
            dict(zip("qk", want_grads, strict=True)),
            {"q": p.unit("q"), "k": p.unit("k")},
        )


# --- planted bugs, one at least for every invariant -------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def wrong_gradients(change: Callable[..., tuple[Tensor, ...]]) -> Callable[[Patch], None]:
    """``change(pairs, dx, dy, row_sum, col_sum)``."""

    def plant(patch: Patch, right: Any = chunked.grad) -> None:
        patch.setattr(chunked, "grad", lambda link, pairs, *args: change(pairs, *right(link, pairs, *args)))

    return plant


def wrong_sums(change: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Patch], None]:
    """``change(pairs, row, col)``."""

    def plant(patch: Patch, right: Any = chunked.reduce) -> None:
        patch.setattr(chunked, "reduce", lambda link, pairs, *args: change(pairs, *right(link, pairs, *args)))

    return plant


def wrong_pairs(change: Callable[[Any], Any], *kernels: str) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        for name in kernels or ("reduce", "grad"):
            patch.setattr(chunked, name, partial(wrong, getattr(chunked, name)))

    def wrong(right: Any, link: str, pairs: Any, *args: Any) -> Any:
        return right(link, change(pairs), *args)

    return plant


def wrong_reductions(change: Callable[..., Named]) -> Callable[[Patch], None]:
    """``change(weights)`` gives other arguments to what reduces the losses of rows."""
    modules = [functional.views, functional.queries, functional.labels, functional.pairs]

    def plant(patch: Patch) -> None:
        for module in modules:
            right = module.reduced
            patch.setattr(
                module, "reduced",
                lambda loss, how, weights=None, right=right, **kw: right(loss, how, **{**kw, **change(weights)}),
            )  # fmt: skip

    return plant


def upstream_ignored(patch: Patch, right: Any = chunked.grad) -> None:
    def wrong(link: str, pairs: Any, sides: Any, *want: bool) -> Any:
        ones = {n: None if (t := getattr(sides, n)) is None else torch.ones_like(t) for n in ("row_grad", "col_grad")}
        return right(link, pairs, sides._replace(**ones), *want)

    patch.setattr(chunked, "grad", wrong)


def last_tile_alone(patch: Patch, right: Any = chunked._merge) -> None:
    def wrong(link: str, total: Tensor, s: Tensor, dim: int) -> Tensor:
        return right(link, torch.full_like(total, -torch.inf if link == "exp" else 0), s, dim)

    patch.setattr(chunked, "_merge", wrong)


def logits_cut(patch: Patch, right: Any = chunked._logits) -> None:
    """As if rows were no longer than 1, and had no bias."""
    patch.setattr(chunked, "_logits", lambda x, y, pairs: right(x, y, pairs).clamp(max=float(pairs.scale.abs())))


def logits_of_wide_rows(patch: Patch, right: Any = chunked._logits) -> None:
    patch.setattr(chunked, "_logits", lambda x, y, pairs: right(x, y, pairs) * (1 + x.shape[1] / 100))


def length_with_an_epsilon(patch: Patch) -> None:
    def wrong(x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1) + 1e-2
        return (x / length[:, None]).to(x.dtype), length

    patch.setattr(chunked, "normalize", wrong)


def gradient_without_its_projection(patch: Patch) -> None:
    patch.setattr(chunked, "normalize_grad", lambda x, length, grad: (grad / length[:, None]).to(x.dtype))


def a_mean_in_place_of_a_sum(patch: Patch, right: Any = functional.queries._logsumexp) -> None:
    patch.setattr(functional.queries, "_logsumexp", lambda s: right(s) - log(max(s.shape[1], 1)))


def one_place_for_equal_rows(patch: Patch) -> None:
    def wrong(total: Tensor, index: Tensor, rows: Tensor) -> None:
        total[index] = rows

    patch.setattr(_gathered, "add_rows", wrong)


def a_total_with_gradients_of_its_own(patch: Patch) -> None:
    def wrong(link: str, pairs: Any, *want: bool) -> Any:
        row, _ = chunked.reduce(link, pairs, False, True)
        dx, dy, row_sum, _ = chunked.grad(link, pairs, fastcl.backends.Sides(row, torch.ones_like(row)), *want)
        return row, 1.01 * dx, dy, row_sum

    patch.setattr(chunked, "reduce_grad", wrong, raising=False)


def indices_of_other_rows(patch: Patch, right: Any = chunked.topk) -> None:
    def wrong(*args: Any) -> tuple[Tensor, Tensor]:
        values, indices = right(*args)
        return values, indices.roll(1, 0)

    patch.setattr(chunked, "topk", wrong)


def without_last(t: Any) -> Any:
    return t.sliced(slice(None), slice(0, max(len(t.y) - 1, 0)))


row_off = wrong_gradients(lambda pairs, dx, *rest: (dx.roll(1, 0), *rest))
feature_off = wrong_gradients(lambda pairs, dx, *rest: (dx.roll(1, -1), *rest))
columns_large = wrong_gradients(lambda pairs, dx, dy, *rest: (dx, 1.01 * dy, *rest))
one_set_large = wrong_gradients(lambda pairs, dx, *rest: (1.01 * dx if pairs.symmetric else dx, *rest))
logarithm_of_a_mean = wrong_sums(lambda pairs, row, col: (row - log(max(len(pairs.y), 1)), col))
rows_that_know_others = wrong_sums(lambda pairs, row, col: (row + 0.01 * len(row), col))
column_results_off = wrong_sums(lambda pairs, row, col: (row, col.roll(1)))
row_results_off = wrong_sums(lambda pairs, row, col: (row.roll(1), col))
last_column_left_out = wrong_pairs(without_last, "reduce")
classes_ignored = wrong_pairs(lambda pairs: pairs._replace(only_x=None, only_y=None, drop_x=None, drop_y=None))
short_keys = wrong_pairs(
    lambda pairs: pairs._replace(
        **{n: t if (t := getattr(pairs, n)) is None else t.char() for n in ("drop_x", "drop_y", "only_x", "only_y")}
    )
)
scale_with_an_end = wrong_pairs(lambda pairs: pairs._replace(scale=pairs.scale.clamp(-5, 5)))
weights_squared = wrong_reductions(lambda weights: {"weights": None if weights is None else weights.square()})


def a_mean_of_one_more(patch: Patch, right: Any = functional._arguments.divisor) -> None:
    patch.setattr(functional._arguments, "divisor", lambda weight: right(weight) + 1)


@dataclass(frozen=True)
class Invariant:
    check: Callable[[Any], None]
    drawn: Callable[[tuple[str, ...]], st.SearchStrategy[Any]]
    bug: Callable[[Patch], None]


EVERY = tuple(LABELS)
WIDE_RANGE = (torch.float32, torch.bfloat16, torch.float64)  # as many exponents as fp32
INVARIANTS = [
    Invariant(permuting_pairs_permutes_gradients, losses(*EVERY), row_off),
    Invariant(rotating_features_rotates_gradients, losses(*EVERY), feature_off),
    Invariant(the_length_of_a_row_divides_its_gradient, losses(*EVERY, bits=True), length_with_an_epsilon),
    Invariant(the_gradient_of_a_normalized_row_is_a_tangent, losses(*EVERY), gradient_without_its_projection),
    Invariant(twice_the_rows_are_twice_the_loss, losses(*TABLES), rows_that_know_others),
    Invariant(rows_in_two_parts_add_up, losses(*TABLES), rows_that_know_others),
    Invariant(a_queue_twice_adds_log_2, losses("info_nce-queue"), logarithm_of_a_mean),
    Invariant(a_queue_in_two_parts_is_the_queue, losses("info_nce-queue"), last_column_left_out),
    Invariant(tiles_change_nothing, losses(*EVERY), last_tile_alone),
    Invariant(swapping_the_sides_swaps_the_gradients, losses(*STACKED, *SWAPPED), row_results_off),
    Invariant(the_positive_is_no_negative_of_its_own, losses("sampled_info_nce"), a_mean_in_place_of_a_sum),
    Invariant(a_common_offset_of_the_logits_cancels, losses(*OF_DIFFERENCES), logits_cut),
    Invariant(gradients_are_those_of_a_product, losses(*OF_LOGITS), columns_large),
    Invariant(
        rows_add_up_to_the_sum_and_the_mean, losses(*(n for n in EVERY if n != "nt_xent-labels")), a_mean_of_one_more
    ),
    Invariant(upstream_gradients_add_up, losses(*EVERY), upstream_ignored),
    Invariant(weights_are_upstream_gradients, losses(*WEIGHTED), weights_squared),
    Invariant(names_of_labels_do_not_matter, losses(*LABELLED, bits=True), short_keys),
    Invariant(features_of_zero_do_not_matter, losses(*EVERY), logits_of_wide_rows),
    Invariant(the_unit_of_length_does_not_matter, losses(*OF_LOGITS, bits=True, dtypes=WIDE_RANGE), scale_with_an_end),
    Invariant(permuting_rows_and_columns, matrices(), column_results_off),
    Invariant(rotating_features, matrices(), feature_off),
    Invariant(columns_twice, matrices(), logarithm_of_a_mean),
    Invariant(columns_in_two_parts, matrices(), last_column_left_out),
    Invariant(tiles_of_a_matrix, matrices(one_set=None), last_tile_alone),
    Invariant(transposing, matrices(extras=EXTRAS[:4]), column_results_off),
    Invariant(columns_that_keys_forget, matrices(), classes_ignored),
    Invariant(biases_are_offsets, matrices(extras=("drop", "only", "col_bias")), logits_cut),
    Invariant(gradients_of_a_product, matrices(), columns_large),
    Invariant(one_set_is_two_equal_sets, matrices(extras=("drop", "only"), one_set=True), one_set_large),
    Invariant(upstream_gradients_of_a_matrix, matrices(), upstream_ignored),
    Invariant(names_of_keys, matrices(), short_keys),
    Invariant(units_of_length, matrices(dtypes=WIDE_RANGE), scale_with_an_end),
    Invariant(
        the_total_is_the_sum,
        matrices("softplus", extras=("row_bias", "drop", "only")),
        a_total_with_gradients_of_its_own,
    ),
    Invariant(neighbours, matrices("exp", extras=("drop", "only")), indices_of_other_rows),
    Invariant(dots_of_rows_are_those_of_lists, matrices("exp", extras=()), one_place_for_equal_rows),
]
each_invariant = pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda i: i.check.__name__)


def search(invariant: Invariant, backends: tuple[str, ...], how: settings) -> None:
    """Looks for an example that fails, and raises what it fails with."""

    @how
    @given(invariant.drawn(backends))
    def check(drawn: Drawn) -> None:
        invariant.check(drawn)

    check()


@each_invariant
def test_holds(invariant: Invariant) -> None:
    search(invariant, BACKENDS, PROFILE)


@each_invariant
def test_notices_a_bug(invariant: Invariant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of 60 examples that shows it will do: shrinking it would only take time."""
    invariant.bug(monkeypatch)
    how = settings(PROFILE, max_examples=60, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        search(invariant, ("chunked",), how)


def test_every_loss_and_every_primitive_is_drawn() -> None:
    drawn = {*EVERY}
    assert drawn == {case.label for case in CASES} and len(drawn) == len(CASES)
    assert len(INVARIANTS) * settings.get_profile("suite").max_examples >= 200
    assert len(INVARIANTS) * settings.get_profile("nightly").max_examples >= 20_000
