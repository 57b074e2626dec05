"""Losses over the rows of all ranks.

The loss of a rank is W times the weighted sum over its own rows, divided by the sum of the weights of all rows. Its
gradients are defined so that the mean over ranks, which DDP and FSDP compute, is the gradient of one process with all
rows: an input receives the sum of the gradients of all ranks' losses.

Two ways lead there, and both run the formulas of ``fastcl.functional`` as they are:

* *own rows*: a formula whose rows only meet others in a reduction over pairs runs on the rows of this rank, and its
  reductions over the columns of all.
* *all rows*: any other formula runs on the gathered rows of all ranks, on each; its reductions over pairs are shared
  out by rows.

Losses whose rows never meet (triplets that are given, BYOL, proxies) need no rows of others, only their number.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _across, _checks
from .._checks import sentence
from ..backends import forced
from ..functional._arguments import divisor
from ..pairwise import apply, as_tensor, l2_normalize
from ._agreement import agree
from ._pairs import OneSet, TwoSets
from ._wire import Wire, check_group, chunk, gathered, logsumexp, total

STRATEGIES = ("auto", "gather", "ring")
# Rows of these losses meet no others; of info_nce neither, if the negatives are given.
_ALONE = {"byol", "cosface", "negative_cosine", "sampled_info_nce", "siamese", "squared_cosine", "triplet"}
_OWN_ROWS = {"clip", "dcl", "gist", "in_batch_softmax", "info_nce", "moco_v3", "n_pair", "nt_xent", "siglip"}
_RINGS = {"clip", "dcl", "info_nce", "moco_v3", "n_pair", "nt_xent"}
# Views of an image that one argument holds one under the other.
_VIEWS = {"dcl": 2, "dclw": 2, "debiased_nt_xent": 2, "hard_nt_xent": 2}
# Tensors that are the same on all ranks, and those with a number of rows of their own.
_SHARED = {("info_nce", "negatives"), ("cosface", "proxies"), ("sampled_info_nce", "table")}
_APART: set[Any] = {"extra_negatives", "guide_negatives", ("gist", "negatives")}
_OF_RANKS = 1 << 40  # rows of one rank, at most: their numbers are told apart by this


@dataclass(frozen=True)
class Ranks:
    """Whose rows a loss is over, and how they come together.

    Args:
        process_group: of torch.distributed; its ranks call the loss together.
        strategy: ``"gather"`` stores the rows of all ranks on each, ``"ring"`` passes them round, two blocks at a time
            (NT-Xent, DCL, InfoNCE, N-pair, MoCo v3 and CLIP); ``"auto"`` takes the ring where gathered rows would take
            more than a quarter of the memory that is free on any rank.
        even: every rank promises the same shapes as all others, and that all call the same loss; the exchange that
            finds out otherwise is left out.
        wire_dtype: in which rows, and gradients of rows, travel: ``torch.bfloat16`` halves their bytes. In sums over
            pairs rows are then rounded on every rank alike, their own included; sums stay fp32.

    Raises:
        TypeError: not a process group, or one that this rank does not belong to.
        ValueError: an unknown strategy, or a dtype that is not of floating-point numbers.
    """

    process_group: Any
    strategy: str = "auto"
    even: bool = False
    wire_dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copy of a model, such as a momentum encoder's, talks to the same ranks

    def __post_init__(self) -> None:
        _checks.choice("strategy", self.strategy, STRATEGIES)
        _checks.flag(even=self.even)
        dtype = self.wire_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            mend = "Pass torch.bfloat16, or omit it."
            raise ValueError(sentence(f"wire_dtype = {dtype!r}", "a floating-point dtype", mend))
        check_group(self.process_group)


@dataclass
class _Batch:
    """How many images everyone has, and which of the rows of all are this rank's."""

    counts: list[int]
    wire: Wire
    start: int
    end: int

    def own(self, losses: Tensor) -> Tensor:
        """Of losses of all rows, ``(V N,)``, view by view, those of this rank."""
        n = sum(self.counts)
        return losses.view(-1, n)[:, self.start : self.end].flatten() if n else losses


class _OwnRows:
    """Formulas run on the rows of this rank; columns are those of all."""

    def __init__(self, batch: _Batch, views: int, numbered: bool, ring: bool, whole: list[Tensor]) -> None:
        self.batch, self.wire, self.numbered, self.ring = batch, batch.wire, numbered, ring
        self.counts = [views * count for count in batch.counts]
        self.whole = whole  # columns that are complete already

    def reduce(self, link: str, reduce: Callable[..., Any], q: Tensor, k: Tensor, options: dict[str, Any]) -> Any:
        with _across.using(None):
            if any(k is t for t in self.whole):
                return reduce(q, k, **options)
            drop, guide = options["drop"], options["guide"]
            keys, k_keys = (self._told_apart(t) for t in (drop if isinstance(drop, tuple) else (drop, drop)))
            both = options.get("both", False)
            scale = as_tensor(options["scale"], q)
            if k is q and not both and link == "exp" and guide is None:
                return apply(OneSet, q, scale, keys, self.counts, self.wire, self.ring, forced())
            # columns that want no gradient are cheaper in one pass, of which the pair reductions know
            frozen = not (k.requires_grad or both or self.ring)
            if link == "exp" and guide is None and options.get("col_bias") is None and not frozen:
                spread = (both, self.counts, self.wire, self.ring, forced())
                row, col = apply(TwoSets, q, k, scale, keys, k_keys, *spread)
                return (row, col) if both else row
            options = {**options, "drop": (keys, self.wire.gather(k_keys, self.counts))}
            if isinstance(options.get("col_bias"), Tensor):
                options["col_bias"] = gathered(options["col_bias"], self.counts, self.wire)
            if guide is not None:
                options["guide"] = (guide[0], self.wire.gather(guide[1].detach(), self.counts), guide[2])
            found = reduce(q, gathered(k, self.counts, self.wire), **options)
            if not both:
                return found
            row, col = found
            col = _columns(link, col, self.wire)
            start = sum(self.counts[: self.wire.rank])
            return row, col[start : start + len(k)]

    def topk(self, topk: Callable[..., Any], q: Tensor, k: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a formula on this rank's rows has no neighbours among all")

    def reduced(self, loss: Tensor, rows: int, reduction: str, weight: Tensor | None) -> Tensor:
        loss = loss.sum() * self.wire.size
        if reduction == "sum":
            return loss
        if weight is not None:
            return loss / divisor(total(weight, self.wire))
        own = self.batch.end - self.batch.start
        return loss / divisor(rows // own * sum(self.batch.counts) if own else 1)

    def _told_apart(self, keys: Tensor) -> Tensor:
        """Numbers of rows of this rank, as numbers of rows of all."""
        return keys + self.wire.rank * _OF_RANKS if self.numbered else keys


class _AllRows:
    """Formulas run on the rows of all ranks; reductions over pairs are shared out by rows."""

    def __init__(self, batch: _Batch) -> None:
        self.batch, self.wire = batch, batch.wire

    def reduce(self, link: str, reduce: Callable[..., Any], q: Tensor, k: Tensor, options: dict[str, Any]) -> Any:
        rows, counts = chunk(len(q), self.wire)
        with _across.using(None):
            found = reduce(q[rows], k, **_sliced(options, rows))
        if not options["both"]:
            return gathered(found, counts, self.wire)
        row, col = found
        return gathered(row, counts, self.wire), _columns(link, col, self.wire)

    def topk(self, topk: Callable[..., Any], q: Tensor, k: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        rows, counts = chunk(len(q), self.wire)
        with _across.using(None):
            values, indices = topk(q[rows], k, **_sliced(options, rows))
        return self.wire.gather(values, counts), self.wire.gather(indices, counts)

    def reduced(self, loss: Tensor, rows: int, reduction: str, weight: Tensor | None) -> Tensor:
        loss = self.batch.own(loss).sum() * self.wire.size
        return loss if reduction == "sum" else loss / divisor(rows if weight is None else weight)


@torch.compiler.disable
def evaluate(function: Callable[..., Tensor], ranks: Ranks, *args: Any, **options: Any) -> Tensor:
    """A loss of ``fastcl.functional`` over the rows of all ranks; every rank calls it together with the others.

    Args:
        function: one of ``fastcl.functional``.
        ranks: whose rows.
        args, options: the function's own. Tensors with one number or row per row of the batch, and extra negatives, are
            this rank's, and may be of different length on every rank, or empty; InfoNCE's ``negatives`` and CosFace's
            ``proxies`` are the same on all. Labels and ids mean the same on all ranks.

    Returns:
        For ``reduction="mean"`` W times the weighted sum of this rank's rows, divided by the sum of the weights of all
        rows, so that the mean over ranks is the loss of one process with all rows, and so are its gradients; ``"sum"``:
        W times the sum of its rows; ``"none"``: its rows.

    Raises:
        TypeError: a function or ranks that are none.
        ValueError: on all ranks alike, and before anything is sent: a rank whose arguments do not fit, or differ from
            those of others beyond the number of rows.
        RuntimeError: a rank is gone: torch.distributed's own, at the latest after the timeout of the group.
    """
    _checks.function("function", function)
    if not isinstance(ranks, Ranks):
        got, mend = f"ranks of type {type(ranks).__name__}", "Pass Ranks(process_group)."
        raise TypeError(sentence(got, "fastcl.distributed.Ranks", mend))
    wire = Wire(ranks.process_group, ranks.wire_dtype)
    if wire.size == 1:
        return function(*args, **options)
    given = dict(inspect.signature(function).bind(*args, **options).arguments)
    name = function.__name__
    tensors = {key: t for key, t in given.items() if isinstance(t, Tensor) and t.ndim}
    everyone = _agreed(name, ranks, given, tensors)
    normalize, reduction = given.pop("normalize", False), given.get("reduction", "mean")
    views = max(said["views"] for said in everyone)
    counts = [said["rows"] // views for said in everyone]
    start = sum(counts[: wire.rank])
    batch = _Batch(counts, wire, start, start + counts[wire.rank])
    alone = name in _ALONE or (name == "info_nce" and "negatives" in tensors and "extra_negatives" not in tensors)
    own = alone or _runs_on_own_rows(name, given)
    ring = _takes_ring(name, ranks, own and not alone, everyone)
    whole = []  # columns that are complete already
    for key, t in tensors.items():
        lengths = [said["tensors"][key][0][0] for said in everyone]
        if normalize and t.ndim > 1 and t.is_floating_point():
            t = l2_normalize(t.flatten(0, -2)).view_as(t)
        if any(said["tensors"][key][2] for said in everyone) and not t.requires_grad:
            t = t.detach().requires_grad_()  # others want theirs, which takes the backward pass of all
        if alone or (name, key) in _SHARED:
            whole.append(t)
        elif key in _APART or (name, key) in _APART:
            t = gathered(t, lengths, wire)
            whole.append(t)
        elif not own:
            each = max((n // count for n, count in zip(lengths, counts, strict=True) if count), default=1)
            t = _view_by_view(t, each, batch)
        given[key] = t
    if given.get("anchors") is not None:
        given["anchors"] = sum(counts)
    across: Any = _OwnRows(batch, views, given.get("ids") is None, ring, whole) if own else _AllRows(batch)
    with _across.using(across):
        loss = function(**given)
    return loss if own or reduction != "none" else batch.own(loss)


def _agreed(name: str, ranks: Ranks, given: dict[str, Any], tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What every rank is about to do, if they can go on together."""
    mine: dict[str, Any] = {"error": None}
    try:
        first, *_ = given.values()
        if not isinstance(first, Tensor) or not first.ndim:
            raise ValueError(sentence(f"rows of type {type(first).__name__}", "a matrix", "Pass (B, D) embeddings."))
        views = _views(name, given)
        _checks.flag(normalize=given.get("normalize", False))
        _check_lengths(name, tensors, len(first), views)
        options = {key: _shown(value) for key, value in given.items() if key not in tensors and key != "anchors"}
        grad = torch.is_grad_enabled()
        mine |= {
            "call": name,
            "options": {**options, "strategy": ranks.strategy, "wire_dtype": str(ranks.wire_dtype)},
            "tensors": {
                key: (list(t.shape), f"{t.dtype} on {t.device.type}", grad and t.requires_grad)
                for key, t in tensors.items()
            },
            "rows": len(first),
            "views": views,
            "memory": _memory(first.device, ranks.even),
        }
    except (TypeError, ValueError) as error:
        if ranks.even:
            raise
        mine["error"] = str(error)
    return [mine] * dist.get_world_size(ranks.process_group) if ranks.even else agree(mine, ranks.process_group)


def told_apart(groups: Tensor, ranks: Ranks) -> Tensor:
    """Numbers that this rank made for itself, as numbers that no other rank has."""
    return groups + dist.get_rank(ranks.process_group) * _OF_RANKS


def _views(name: str, given: dict[str, Any]) -> int:
    """How many rows of an image the first argument has, one under the other, view by view."""
    rows, anchors = len(next(iter(given.values()))), given.get("anchors")
    if name == "nt_xent" and given.get("labels") is None:
        views: int = given.get("views", 2)
        _checks.count("views", views)
        return views
    if anchors is not None:  # the first view of every image
        mend = "Make them the first view of each image, as they are over ranks."
        _checks.count("anchors", anchors, least=0, most=rows, mend=mend)
        if rows % max(anchors, 1):
            raise ValueError(sentence(f"{anchors} anchors of {rows} rows", "a divisor of the rows", mend))
        return rows // anchors if anchors else 1
    return _VIEWS.get(name, 1)


def _check_lengths(name: str, tensors: dict[str, Tensor], rows: int, views: int) -> None:
    if rows % views:
        raise ValueError(sentence(f"{rows} rows of {views} views", "whole images", "Pass all views of each."))
    for key, t in tensors.items():
        if (name, key) in _SHARED or (name, key) in _APART or key in _APART:
            continue
        if len(t) not in (rows, rows // views):
            got = f"{key} of shape {tuple(t.shape)} for {rows} rows"
            raise ValueError(sentence(got, "one per row or per image", "Pass those of this rank's batch."))


def _runs_on_own_rows(name: str, given: dict[str, Any]) -> bool:
    """Whether a row of the formula meets others in reductions over pairs alone."""
    mixes = name == "nt_xent" and given.get("labels") is not None
    return name in _OWN_ROWS and not (mixes or given.get("label_smoothing") or given.get("hardness"))


def _takes_ring(name: str, ranks: Ranks, possible: bool, everyone: list[dict[str, Any]]) -> bool:
    possible = possible and name in _RINGS
    if ranks.strategy == "ring" and not possible:
        expected = f"one of {', '.join(sorted(_RINGS))}, in its plain form"
        raise ValueError(sentence(f"strategy='ring' for {name}", expected, "Use strategy='gather'."))
    if ranks.strategy != "auto":
        return ranks.strategy == "ring"
    # of every matrix the rows of all ranks, and in backward their gradients in fp32
    size = sum(math.prod(shape) * 8 for said in everyone for shape, *_ in said["tensors"].values() if len(shape) == 2)
    return possible and size > min(said["memory"] for said in everyone) // 4


def _memory(device: torch.device, even: bool) -> int:
    """Bytes that are free on this rank; without an exchange, which would tell the others, all that it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[int(even)]
    return os.sysconf("SC_PHYS_PAGES" if even else "SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _shown(value: Any) -> str:
    """An option, so that ranks can compare; numbers on a device are not read."""
    if isinstance(value, Tensor):
        return "a tensor that wants a gradient" if value.requires_grad else "a tensor"
    return repr(value)


def _view_by_view(t: Tensor, views: int, batch: _Batch) -> Tensor:
    """Rows of all ranks: the first view of the images of all, then the next."""
    own = batch.counts[batch.wire.rank]
    images = t.view(views, own, *t.shape[1:]).transpose(0, 1)
    return gathered(images, batch.counts, batch.wire).transpose(0, 1).flatten(0, 1)


def _sliced(options: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The options of some rows of a reduction."""
    sliced = dict(options)
    for name in ("drop", "only"):
        keys = options.get(name)
        if keys is not None:
            of_rows, of_columns = keys if isinstance(keys, tuple) else (keys, keys)
            sliced[name] = (of_rows[rows], of_columns)
    for name in ("row_bias", "ceiling"):
        vector = options.get(name)
        sliced[name] = vector[rows] if isinstance(vector, Tensor) and vector.ndim else vector
    if options.get("guide") is not None:
        of_rows, of_columns, limit = options["guide"]
        sliced["guide"] = (of_rows[rows], of_columns, limit[rows])
    return {name: value for name, value in sliced.items() if name in options}


def _columns(link: str, col: Tensor, wire: Wire) -> Tensor:
    """Results of columns over the rows of all ranks, of those over the rows of each: replicated."""
    return total(col, wire) if link == "softplus" else logsumexp(col, wire)
