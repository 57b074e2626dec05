"""Drop-ins for ``pytorch_metric_learning.losses``, as subclasses of the same name, which the wrappers ask for.

They work under ``SelfSupervisedLoss``, ``CrossBatchMemory`` and ``DistributedLossWrapper``, and with any reducer. What
is fused: cosine and dot-product similarity, for ``TripletMarginLoss`` and ``ContrastiveLoss`` also the Euclidean
distance; all pairs, or a tuple of indices whose negatives are all negatives (what ``CrossBatchMemory`` and the
efficient ``DistributedLossWrapper`` pass). Everything else is the library's own code: other distances, the tuples of a
miner, ``collect_stats``, float labels, methods that a subclass of yours replaces.

``strict=True`` keeps two faults: rows are normalised in their own dtype, where a zero row in fp16 becomes NaN, and
``NTXentLoss`` adds the smallest normal number inside the logarithm, so that no pair costs more than 87.3 (in fp16 9.7)
and a pair that costs that much receives no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import functional as F
from ..functional._arguments import operand
from ..hinges import pair_hinges
from ..pairwise import l2_normalize, listed_dot, pair_logsumexp, pair_softplus_sum, row_dot
from ..triples import batch_all, class_runs, positive_indices
from ._dropin import DropIn, as_original, upstream

UPSTREAM = "pytorch_metric_learning.losses"
ORIGIN = "pip install pytorch-metric-learning"
_losses: Any = upstream(UPSTREAM, ORIGIN)
_distances: Any = upstream("pytorch_metric_learning.distances", ORIGIN)
_reducers: Any = upstream("pytorch_metric_learning.reducers", ORIGIN)

__all__ = ["ContrastiveLoss", "MultiSimilarityLoss", "NPairsLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss"]

Indices = tuple[Tensor, ...] | None


class _Batch:
    """What a loss is about: rows, columns, their labels, and which of their pairs are positive.

    Attributes:
        q, k: rows and columns in the metric of the loss; ``k`` is ``None`` where columns are rows.
        labels, columns: ``(M,)`` and ``(N,)`` integers; negatives are the pairs whose labels differ.
        same: 1 where positives leave out row i with column i, else 0.
        listed: positives as two ``(P,)`` of indices; ``None`` for all pairs of equal labels.
    """

    def __init__(self, q: Tensor, k: Tensor | None, labels: Tensor, columns: Tensor, listed: Indices) -> None:
        self.q, self.k, self.labels, self.columns, self.listed = q, k, labels, columns, listed
        self.same = int(columns is labels)

    @property
    def keys(self) -> Any:
        return self.labels if self.columns is self.labels else (self.labels, self.columns)

    @property
    def positives(self) -> dict[str, Any]:
        """The pairs of equal labels, as the pair reductions take them."""
        at = torch.arange(len(self.labels), device=self.q.device)
        return {"only": self.keys, "drop": at if self.same else None}

    def list_positives(self) -> tuple[Tensor, Tensor]:
        """In the order of ``torch.where``."""
        if self.listed is not None:
            return self.listed[0], self.listed[1]
        return positive_indices(self.labels, None if self.same else self.columns)

    def dot(self, rows: Tensor, columns: Tensor) -> Tensor:
        return listed_dot(self.q, self.q if self.k is None else self.k, rows, columns)

    def logsumexp(self, **options: Any) -> Tensor:
        return pair_logsumexp(self.q, self.k, **options)

    def segment_logsumexp(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Of listed logits ``(P,)`` by row ``(M,)``; -inf for a row without."""
        top = logits.new_full((len(self.q),), -torch.inf)
        top = top.scatter_reduce(0, rows, logits.detach(), "amax")
        shift = torch.where(top.isfinite(), top, 0)
        return shift + logits.new_zeros(len(self.q)).index_add(0, rows, (logits - shift[rows]).exp()).log()


class _Fused(DropIn):
    """``compute_loss`` that looks for the fast path.

    Attributes:
        own_code: methods of the library that the fast path stands for; where a subclass replaces one, it is called.
        takes_indices: whether the fast path takes listed positives.
    """

    own_code: tuple[str, ...] = ("_compute_loss",)
    takes_indices = True
    distance: Any
    reducer: Any
    collect_stats: bool

    def forward(self, embeddings: Tensor, *args: Any, **options: Any) -> Any:
        """The library's arguments; a loss in the dtype of the embeddings, or what its reducer makes of it."""
        loss = super().forward(embeddings, *args, **options)  # type: ignore[misc]
        return as_original(loss, embeddings) if isinstance(loss, Tensor) else loss

    def compute_loss(self, embeddings: Tensor, labels: Any, indices: Indices, ref_emb: Tensor, ref_labels: Any) -> Any:
        if self._can(labels, ref_labels) and len(embeddings) * len(ref_emb) > 2:
            # the library's number for a list is bit for bit the same with labels and without
            listed = indices if self.takes_indices and not self.strict else None
            known = None if listed is None else self._known(listed, labels, ref_labels)
            if indices is None or known is not None:
                q = self._rows(embeddings)
                k = None if ref_emb is embeddings else self._rows(ref_emb)
                found = self._fused(_Batch(q, k, labels, ref_labels, known))
                if found is not None:
                    return {name: self._in_dtype(name, part, embeddings) for name, part in found.items()}
        return super().compute_loss(embeddings, labels, indices, ref_emb, ref_labels)  # type: ignore[misc]

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        """The library's dict of losses, or ``None`` where there is no fast path."""
        raise NotImplementedError

    def _measures(self) -> bool:
        """Whether the distance is one that the fast path knows."""
        return type(self.distance) in (_distances.CosineSimilarity, _distances.DotProductSimilarity)

    def _can(self, *labels: Any) -> bool:
        original = next(base for base in type(self).__mro__ if not issubclass(base, DropIn))
        return (
            self._measures()
            and (self.distance.p, self.distance.power) == (2, 1)
            and not any(part.collect_stats for part in (self, self.distance, self.reducer))
            and all(isinstance(t, Tensor) and not t.is_floating_point() and t.ndim == 1 for t in labels)
            and all(getattr(type(self), name) is getattr(original, name) for name in self.own_code)
        )

    def _rows(self, embeddings: Tensor) -> Tensor:
        if not self.distance.normalize_embeddings:
            return embeddings
        return self.distance.normalize(embeddings) if self.strict else l2_normalize(embeddings)

    @staticmethod
    def _known(indices: Indices, labels: Tensor, columns: Tensor) -> tuple[Tensor, Tensor] | None:
        """The listed positives, where the listed negatives are all the pairs whose labels differ, in order."""
        assert indices is not None
        if len(indices) != 4 or all(len(part) <= 1 for part in indices):
            return None
        anchor, positive, other, negative = indices
        _, start, end = class_runs(labels, columns)
        if len(other) != int((len(columns) - (end - start)).sum()):
            return None
        place = other * len(columns) + negative
        complete = (labels[other] != columns[negative]).all() & (place.diff() > 0).all()
        return (anchor, positive) if complete else None

    def _in_dtype(self, name: str, part: dict[str, Any], embeddings: Tensor) -> dict[str, Any]:
        """Losses in the dtype that other reducers than those of a mean expect; a mean is rounded once, at its end."""
        losses = part["losses"]  # the number 0 where there are none
        rounds = isinstance(losses, Tensor) and self._reduction(name) is None
        return {**part, "losses": as_original(losses, embeddings) if rounds else losses}

    def _reduction(self, name: str = "loss") -> str | None:
        """``"mean"`` or ``"mean above 0"`` where the reducer is exactly that: then no list of losses is needed."""
        reducer = self.reducer
        if type(reducer) is _reducers.MultipleReducers:
            own = reducer.reducers  # a ModuleDict, which has no get
            reducer = own[name] if name in own else reducer.default_reducer  # noqa: SIM401
        if reducer.collect_stats:
            return None
        if type(reducer) is _reducers.MeanReducer:
            return "mean"
        above_zero = type(reducer) is _reducers.AvgNonZeroReducer and (reducer.low, reducer.high) == (0, None)
        return "mean above 0" if above_zero else None


def _reduced(total: Tensor, count: Tensor) -> dict[str, Any]:
    return {"losses": total / count.clamp(min=1), "indices": None, "reduction_type": "already_reduced"}


def _elements(losses: Tensor) -> dict[str, Any]:
    at = torch.arange(len(losses), device=losses.device)
    return {"loss": {"losses": losses, "indices": at, "reduction_type": "element"}}


class NTXentLoss(_Fused, DropIn, _losses.NTXentLoss):
    """NT-Xent over positive pairs of labels: :func:`fastcl.functional.nt_xent` with labels.

    The original compares every positive with every negative pair of the batch, O(N^3) for a label per image. With the
    default reducer and without indices nothing is listed; otherwise one loss per positive pair is, as the original's.
    """

    own_code = ("_compute_loss", "pair_based_loss")

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        if not self.temperature > 0:
            return None
        scale = 1 / self.temperature
        negatives = batch.logsumexp(scale=scale, drop=batch.keys)
        if batch.listed is None and self._reduction() == "mean" and not self.strict:
            total = pair_softplus_sum(batch.q, batch.k, scale=-scale, row_bias=negatives, **batch.positives)
            _, start, end = class_runs(batch.labels, batch.columns)
            return {"loss": _reduced(total.sum(), (end - start - batch.same).sum())}
        rows, columns = batch.list_positives()
        if not len(rows):  # a mean of nothing would be NaN; the library has a 0 for it
            return None
        losses = -logsigmoid(batch.dot(rows, columns) * scale - negatives[rows])
        if self.strict:
            losses = -(torch.exp(-losses) + torch.finfo(batch.q.dtype).tiny).log()
        return {"loss": {"losses": losses, "indices": (rows, columns), "reduction_type": "pos_pair"}}


class SupConLoss(_Fused, DropIn, _losses.SupConLoss):
    """Supervised contrastive loss: :func:`fastcl.functional.supcon`. A batch of one label has loss 0."""

    own_code = ("_compute_loss", "mat_based_loss")

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        if not self.temperature > 0:
            return None
        scale = 1 / self.temperature
        several = (batch.labels != batch.columns[:1]).any() | (batch.columns != batch.columns[:1]).any()
        if batch.listed is None and batch.same and batch.k is None:
            losses = F.supcon(batch.q, batch.labels, temperature=self.temperature, reduction="none")
            return _elements(torch.where(several, losses, 0))
        negatives = batch.logsumexp(scale=scale, drop=batch.keys)
        if batch.listed is None:
            _, start, end = class_runs(batch.labels, batch.columns)
            count = end - start - batch.same
            total = row_dot(batch.q, _label_sums(batch)) * scale
            positives = batch.logsumexp(scale=scale, **batch.positives)
        else:
            rows, columns = batch.list_positives()
            logits = batch.dot(rows, columns) * scale
            count = torch.bincount(rows, minlength=len(batch.q))
            total = logits.new_zeros(len(batch.q)).index_add(0, rows, logits)
            positives = batch.segment_logsumexp(logits, rows)
        has = (count > 0) & several
        # A lone positive is its own log-sum-exp, bit for bit, and the mean is taken off first: where that positive is
        # far above its negatives, no digits are lost.
        mean = torch.where(count == 1, positives, total / count.clamp(min=1))
        losses = torch.logaddexp(negatives - mean, torch.where(has, positives, 0) - mean)
        return _elements(torch.where(has, losses, 0))


class MultiSimilarityLoss(_Fused, DropIn, _losses.MultiSimilarityLoss):
    """Multi-similarity loss without its miner: :func:`fastcl.functional.multi_similarity`."""

    own_code = ("_compute_loss", "mat_based_loss")

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        if not (self.alpha > 0 and self.beta > 0):
            return None
        near, far = self.alpha * self.base, self.beta * self.base
        negatives = batch.logsumexp(scale=self.beta, row_bias=-far, drop=batch.keys)
        if batch.listed is None:
            positives = batch.logsumexp(scale=-self.alpha, row_bias=near, **batch.positives)
        else:
            rows, columns = batch.list_positives()
            positives = batch.segment_logsumexp(near - batch.dot(rows, columns) * self.alpha, rows)
        return _elements(-logsigmoid(-positives) / self.alpha - logsigmoid(-negatives) / self.beta)


class NPairsLoss(_Fused, DropIn, _losses.NPairsLoss):
    """N-pair loss of the first pair of every label: :func:`fastcl.functional.info_nce` at temperature 1."""

    own_code = ()
    takes_indices = False

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        if batch.k is not None or not batch.same:
            return None
        order, start, end = class_runs(batch.labels)
        first = start[order].unique()  # of every class of two rows or more, by label
        first = first[end[order[first]] - first > 1]
        self.num_pairs = len(first)
        if not len(first):
            return self.zero_losses()
        anchors, positives = order[first], order[first + 1]
        losses = F.info_nce(batch.q[anchors], batch.q[positives], temperature=1.0, reduction="none")
        return {"loss": {"losses": losses, "indices": anchors, "reduction_type": "element"}}


class _Margins(_Fused):
    """Losses of distances: Euclidean ones too."""

    takes_indices = False

    def _measures(self) -> bool:
        return type(self.distance) is _distances.LpDistance or super()._measures()

    @property
    def _distance(self) -> str:
        return "cosine" if self.distance.is_inverted else "euclidean"


class TripletMarginLoss(_Margins, DropIn, _losses.TripletMarginLoss):
    """Triplet loss of all triplets of a batch: :func:`fastcl.functional.triplet_all`, without a list of them.

    Fused without ``swap``, ``smooth_loss``, ``ref_emb`` and ``triplets_per_anchor``, and with the reducers
    ``AvgNonZeroReducer`` (the default) and ``MeanReducer``. Distances are computed in fp64.
    """

    own_code = ()

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        reduction = self._reduction()
        plain = not (self.swap or self.smooth_loss) and self.triplets_per_anchor == "all"
        if not plain or batch.k is not None or not batch.same or reduction is None:
            return None
        sums, above = batch_all(operand(batch.q), batch.labels, float(self.margin), self._distance)
        _, start, end = class_runs(batch.labels)
        triplets = ((end - start - 1) * (len(batch.labels) - (end - start))).sum()
        return {"loss": _reduced(sums.sum(), above if reduction == "mean above 0" else triplets)}


class ContrastiveLoss(_Margins, DropIn, _losses.ContrastiveLoss):
    """Contrastive loss of all pairs: :func:`fastcl.hinges.pair_hinges`, a tile of distances at a time.

    Fused with the reducers ``AvgNonZeroReducer`` (the default) and ``MeanReducer`` and without indices.
    """

    own_code = ("_compute_loss", "pair_based_loss", "get_per_pair_loss", "pos_calc", "neg_calc")

    def _fused(self, batch: _Batch) -> dict[str, Any] | None:
        names = ("pos_loss", "neg_loss")
        reductions = [self._reduction(name) for name in names]
        if None in reductions:
            return None
        # of a similarity s the margins are on s, and its distance is 1 - s
        margins = (1 - self.pos_margin, 1 - self.neg_margin) if self.distance.is_inverted else None
        positive, negative = margins or (self.pos_margin, self.neg_margin)
        columns = None if batch.k is None else batch.columns
        found = pair_hinges(
            batch.q, batch.k, batch.labels, columns, positive_margin=float(positive), negative_margin=float(negative),
            distance=self._distance, skip_diagonal=bool(batch.same),
        )  # fmt: skip
        return {
            name: _reduced(total, pairs if reduction == "mean" else above)
            for name, reduction, total, above, pairs in zip(names, reductions, *found, strict=True)
        }


def _label_sums(batch: _Batch) -> Tensor:
    """For every row the sum of the columns of its label, ``(M, D)`` fp32 (fp64)."""
    k = batch.q if batch.k is None else batch.k
    wide = k.to(torch.promote_types(k.dtype, torch.float32))
    classes, place = batch.columns.unique(return_inverse=True)
    sums = wide.new_zeros(len(classes), k.shape[1]).index_add(0, place, wide)
    of_row = torch.searchsorted(classes, batch.labels).clamp(max=len(classes) - 1)
    sums = torch.where((classes[of_row] == batch.labels)[:, None], sums[of_row], 0)
    return sums - wide if batch.same else sums
