"""Drop-ins for the losses of sentence-transformers 6.

Change ``from sentence_transformers.sentence_transformer.losses import`` to
``from fastcl.integrations.sentence_transformers import``. Arguments, attributes, model cards and state are those of
sentence-transformers, for every class is a subclass of its class there.

Where sentence-transformers is wrong, or loses digits:

* An embedding of zeros has no direction. It receives gradient 0 here, and one of about 1e12 there; ``strict=True``
  keeps that one.
* :class:`GISTEmbedLoss` takes a row for a negative of itself where its guide finds positive and query equal, or where
  the margin is negative. Never here; ``strict=True`` leaves that, too, to the guide.
* The loss of an easy batch is there a difference of two nearly equal numbers. Here it has all its digits, in any case.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from typing_extensions import deprecated

from .. import functional as F
from .._checks import ROW_DTYPES, Scalar, sentence
from ..functional.queries import harder_logsumexp
from ..pairwise import gathered_dot, l2_normalize, merge_logsumexp, pair_logsumexp, row_dot
from ._dropin import DropIn, as_original, image_ids, upstream

UPSTREAM = "sentence_transformers.sentence_transformer.losses"
ORIGIN = "pip install sentence-transformers"
_losses: Any = upstream(UPSTREAM, ORIGIN)
_util: Any = upstream("sentence_transformers.util", ORIGIN)
_embed_columns = upstream("sentence_transformers.base.losses.merged_forward", ORIGIN).embed_columns
SiameseDistanceMetric = _losses.SiameseDistanceMetric
TripletDistanceMetric = _losses.TripletDistanceMetric

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "ContrastiveLoss",
    "GISTEmbedLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "SiameseDistanceMetric",
    "TripletDistanceMetric",
    "TripletLoss",
]


class _Ranked(DropIn):
    gather_across_devices: bool

    def _everyone(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, with gradients; the same tensor where they are not asked for or there is one rank."""
        return _util.all_gather_with_grad(rows) if self.gather_across_devices else rows


class MultipleNegativesRankingLoss(_Ranked, DropIn, _losses.MultipleNegativesRankingLoss):
    """InfoNCE of queries and documents, with everything that the original adds to it; no scores are stored.

    Plain pairs are :func:`fastcl.functional.info_nce`. A similarity other than ``cos_sim`` and ``dot_score`` is
    computed by the original.
    """

    scale: Any
    similarity_fct: Any
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of embedded columns.

        Args:
            embeddings: ``(B, D)`` queries, ``(B, D)`` positives, and any number of ``(B, D)`` hard negatives.
            labels: not read.

        Returns:
            A scalar; fp64 for fp64 embeddings, else fp32 (on the CPU under autocast, too, where the original's has
            autocast's dtype).

        Raises:
            ValueError: fewer than two columns.
        """
        if not self.is_fused(embeddings):
            return super().compute_loss_from_embeddings(embeddings, labels)
        cosine = self.similarity_fct is _util.cos_sim
        # as the original: similarities of half-precision embeddings are those of their fp32 values
        rows = [column.to(torch.promote_types(column.dtype, torch.float32)) for column in embeddings]
        if cosine and self.strict:
            rows, cosine = [nn.functional.normalize(column, dim=1) for column in rows], False
        if self._is_info_nce(len(rows) - 2):
            both = len(self.directions) == 2
            return F.info_nce(*rows, temperature=1 / self._scale, symmetric=both, normalize=cosine)
        if cosine:
            rows = [l2_normalize(column) for column in rows]
        negatives = self._negatives(*rows)
        positive = row_dot(rows[0], rows[1]) * self._scale
        if self.partition_mode == "per_direction":
            return torch.stack([-logsigmoid(positive - side) for side in negatives.values()]).mean()
        # The scores of queries for documents and those of documents for queries both have the positive: the
        # denominator has it twice.
        twice = math.log(2) if "doc_to_query" in negatives else 0.0
        return twice - logsigmoid(positive + twice - merge_logsumexp(*negatives.values())).mean()

    def is_fused(self, embeddings: list[Tensor]) -> bool:
        """Whether the loss of such embeddings is computed here, and not by the original."""
        return (
            len(embeddings) > 1
            and self.similarity_fct in (_util.cos_sim, _util.dot_score)
            and isinstance(self.scale, (int, float, Tensor))
            and (not isinstance(self.scale, Tensor) or self.scale.numel() == 1)
            and embeddings[0].ndim == 2
            and len(embeddings[0]) > 0
            and embeddings[0].dtype in ROW_DTYPES
            and len({(t.shape, t.dtype) for t in embeddings}) == 1
            and all(t.layout == torch.strided for t in embeddings)
        )

    @property
    def _scale(self) -> Scalar:
        return self.scale.reshape(()) if isinstance(self.scale, Tensor) else float(self.scale)

    @property
    def _hardness(self) -> tuple[float, float]:
        """What is added for in-batch negatives, and for the hard negatives of a query itself."""
        in_batch = self.hardness_mode in ("in_batch_negatives", "all_negatives")
        of_own = self.hardness_mode in ("hard_negatives", "all_negatives")
        return self.hardness_strength * in_batch, self.hardness_strength * of_own

    def _is_info_nce(self, hard: int) -> bool:
        both_ways = self.partition_mode == "per_direction" and set(self.directions) == {"query_to_doc", "doc_to_query"}
        return (
            (set(self.directions) == {"query_to_doc"} or both_ways)
            and not hard
            and not self._hardness[0]
            and not self.gather_across_devices
        )

    def _negatives(self, queries: Tensor, positives: Tensor, *hard: Tensor) -> dict[str, Tensor]:
        """Log-sum-exp of the negatives of every row of this rank, ``(B,)``, by direction."""
        scale, (in_batch, of_own), within = self._scale, self._hardness, set(self.directions)
        among_queries = bool(within & {"query_to_query", "doc_to_query"})
        all_queries = self._everyone(queries) if among_queries else queries
        all_positives = self._everyone(positives)
        all_hard = [self._everyone(column) for column in hard]
        own, ids, keys = _numbers(positives, all_positives)
        found: dict[str, Tensor] = {}
        if "doc_to_query" in within and all_queries is queries and not in_batch:  # one matrix, read both ways
            found["query_to_doc"], found["doc_to_query"] = pair_logsumexp(
                queries, positives, scale=scale, drop=keys, both=True
            )
        else:
            found["query_to_doc"] = harder_logsumexp(queries, all_positives, scale, in_batch, drop=keys)
            if "doc_to_query" in within:
                found["doc_to_query"] = pair_logsumexp(positives, all_queries, scale=scale, drop=keys)
        if "query_to_query" in within:
            found["query_to_query"] = pair_logsumexp(queries, all_queries, scale=scale, drop=keys)
        if "doc_to_doc" in within:
            found["doc_to_doc"] = pair_logsumexp(positives, all_positives, scale=scale, drop=keys)
        if not hard:
            return found
        columns = torch.cat(all_hard)
        of_others = (own, ids.repeat(len(hard)))
        if in_batch == of_own:
            parts = [harder_logsumexp(queries, columns, scale, in_batch)]
        else:
            parts = [harder_logsumexp(queries, columns, scale, in_batch, drop=of_others)]
            index = own[:, None] + len(ids) * torch.arange(len(hard), device=own.device)
            dots = gathered_dot(queries, columns, index)
            parts.append((dots * scale + dots.detach() * of_own).logsumexp(1))
        found["query_to_doc"] = merge_logsumexp(found["query_to_doc"], *parts)
        if "doc_to_doc" in within:
            among = pair_logsumexp(positives, columns, scale=scale, drop=of_others)
            found["doc_to_doc"] = merge_logsumexp(found["doc_to_doc"], among)
        return found


def _numbers(rows: Tensor, everyone: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Numbers of the rows of this rank, those of all, and both as the keys of a reduction (of one set: the same)."""
    if everyone is rows:
        ids = torch.arange(len(rows), device=rows.device)
        return ids, ids, ids
    own, ids = image_ids(len(rows), _util.get_rank(), len(everyone) // len(rows), rows.device)
    return own, ids, (own, ids)


class _Cached(DropIn):
    """GradCache's loss stage in one go: the original cuts it into chunks of the matrix, which does not exist here."""

    loss: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        hyperparameters = {name: getattr(self.loss, name) for name in self.loss.get_config_dict()}
        self.loss = MultipleNegativesRankingLoss(self.loss.model, **hyperparameters, strict=self.strict)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the whole batch.

        Args:
            reps: of every column the ``(b, D)`` embeddings of its mini-batches.
            labels: not read.
            with_backward: also send gradients to ``reps``; the loss is then detached.

        Returns:
            A scalar, as that of :class:`MultipleNegativesRankingLoss`.
        """
        embeddings = [torch.cat(column) for column in reps]
        if not self.loss.is_fused(embeddings):
            original: Tensor = super().calculate_loss(reps, labels, with_backward=with_backward)  # type: ignore[misc]
            return original
        return _ended(self.loss.compute_loss_from_embeddings(embeddings, labels), with_backward)


def _ended(loss: Tensor, with_backward: bool) -> Tensor:
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()


class CachedMultipleNegativesRankingLoss(_Cached, DropIn, _losses.CachedMultipleNegativesRankingLoss):
    """:class:`MultipleNegativesRankingLoss` whose columns are embedded in mini-batches.

    ``mini_batch_size`` bounds the memory of the model, as there. The loss takes the embeddings all at once.
    """


with warnings.catch_warnings():
    # both classes warn whoever derives from them; whoever makes an instance is warned below
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(_losses.MultipleNegativesSymmetricRankingLoss.__deprecated__)
    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss, DropIn, _losses.MultipleNegativesSymmetricRankingLoss
    ):
        """Mean of the losses of queries that look for documents and the reverse. Deprecated there, so here."""

    @deprecated(_losses.CachedMultipleNegativesSymmetricRankingLoss.__deprecated__)
    class CachedMultipleNegativesSymmetricRankingLoss(
        CachedMultipleNegativesRankingLoss, DropIn, _losses.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """The cached loss of both directions. Deprecated there, so here."""


class _Guided(_Ranked):
    """What both losses with a guide do with embeddings."""

    similarity_fct: nn.Module
    temperature: float
    margin: float
    margin_strategy: str
    contrast_anchors: bool
    contrast_positives: bool

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], guide_embeddings: list[Tensor]) -> Tensor:
        """The loss of embedded columns: :func:`fastcl.functional.gist`, on one rank or on many.

        Args:
            embeddings: ``(B, D)`` queries, ``(B, D)`` positives, and any number of ``(B, D)`` negatives.
            guide_embeddings: of the same texts, ``(B, G)`` each; they receive no gradient.

        Returns:
            A scalar in the dtype of the embeddings, fp32 under autocast.

        Raises:
            ValueError: fewer than two columns, or not one of the guide for every column; shapes that do not fit.

        A pair that the guide finds more similar than query and positive less the margin is no negative. Where it
        finds it exactly as similar, rounding decides, as in the original. The positive stays in any case.
        """
        if not 2 <= len(embeddings) == len(guide_embeddings):
            got = f"{len(embeddings)} columns and {len(guide_embeddings)} of the guide"
            raise ValueError(sentence(got, "two or more, and as many", "Embed every column with both models."))
        anchor, positive, *negatives = (self._unit(rows) for rows in embeddings)
        with torch.no_grad(), torch.autocast(anchor.device.type, enabled=False):
            guide_anchor, guide_positive, *guide_negatives = (
                self._unit(rows.to(torch.promote_types(rows.dtype, torch.float32))) for rows in guide_embeddings
            )
            agreed = row_dot(guide_anchor, guide_positive)
            limit = agreed - self.margin * (agreed.abs() if self.margin_strategy == "relative" else 1)
        positives, guide_positives = self._everyone(positive), self._everyone(guide_positive)
        own, _, keys = _numbers(positive, positives)
        # rows, columns, the same of the guide, keys of pairs that are no negatives whatever the guide says
        blocks: list[tuple[Tensor, Tensor, Tensor, Tensor, Any]] = [
            (anchor, positives, guide_anchor, guide_positives, keys)
        ]
        if self.contrast_anchors:
            blocks.append((anchor, anchor, guide_anchor, guide_anchor, None if self.strict else own))
        if self.contrast_positives:
            blocks.append((positive, positives, guide_positive, guide_positives, None if self.strict else keys))
        if negatives:
            columns, guides = (
                torch.cat([self._everyone(rows) for rows in blocks_of]) for blocks_of in (negatives, guide_negatives)
            )
            blocks.append((anchor, columns, guide_anchor, guides, None))
        scale = 1 / self.temperature
        n = [
            pair_logsumexp(rows, columns, scale=scale, drop=drop, guide=(of_rows, of_columns, limit))
            for rows, columns, of_rows, of_columns, drop in blocks
        ]
        loss = -logsigmoid(row_dot(anchor, positive) * scale - merge_logsumexp(*n)).mean()
        return as_original(loss, *embeddings)

    @property
    def _compares_by_cosine(self) -> bool:
        return isinstance(self.similarity_fct, nn.CosineSimilarity)

    def _unit(self, rows: Tensor) -> Tensor:
        if not self.strict:
            return l2_normalize(rows)
        return nn.functional.normalize(rows, dim=1, eps=self.similarity_fct.eps)  # type: ignore[arg-type]


class GISTEmbedLoss(_Guided, DropIn, _losses.GISTEmbedLoss):
    """GISTEmbed: a guide model strikes out false negatives. Neither model's scores are stored.

    A ``similarity_fct`` that was exchanged for one other than ``nn.CosineSimilarity`` is computed by the original.
    """

    model: nn.Module
    guide: Any
    must_retokenize: bool

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """Tokenised columns (queries, positives, and perhaps negatives), and labels that are not read; a scalar.

        Raises:
            ValueError: neither two nor three columns.
        """
        columns = list(sentence_features)
        if not self._compares_by_cosine:
            original: Tensor = super().forward(columns, labels)
            return original
        if len(columns) not in (2, 3):
            mend = "Use CachedGISTEmbedLoss for more."
            raise ValueError(sentence(f"{len(columns)} columns", "two, or three with negatives", mend))
        # models write their results into the features, and those of the guide must not land in the model's
        for_guide = [dict(column) for column in columns]
        embeddings = _embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                for_guide = [self._retokenized(column) for column in columns]
            guide_embeddings = _embed_columns(self.guide, for_guide)
        return self.compute_loss_from_embeddings(embeddings, guide_embeddings)

    def _retokenized(self, column: dict[str, Tensor]) -> Any:
        """The texts of a column, read back from its tokens, as the guide's tokenizer writes them."""
        tokens: Any = column["input_ids"]
        if "cu_seq_lens_q" in column:  # all texts are one row, cut at these places
            ends = column["cu_seq_lens_q"][1:-1].tolist()
            tokens = [text.tolist() for text in tokens[0].tensor_split(ends)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return _util.batch_to_device(self.guide.preprocess(texts), self.guide.device)


class CachedGISTEmbedLoss(_Guided, DropIn, _losses.CachedGISTEmbedLoss):
    """:class:`GISTEmbedLoss` whose columns are embedded in mini-batches, with any number of negatives."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the whole batch.

        Args:
            reps: of every column the ``(b, D)`` embeddings of its mini-batches.
            reps_guided: those of the guide, ``(b, G)``.
            with_backward: also send gradients to ``reps``; the loss is then detached.

        Returns:
            A scalar, as that of :meth:`compute_loss_from_embeddings`, whose errors these are, too.
        """
        if not self._compares_by_cosine:
            original: Tensor = super().calculate_loss(reps, reps_guided, with_backward=with_backward)
            return original
        embeddings, guide_embeddings = ([torch.cat(column) for column in models] for models in (reps, reps_guided))
        return _ended(self.compute_loss_from_embeddings(embeddings, guide_embeddings), with_backward)


class TripletLoss(DropIn, _losses.TripletLoss):
    """The original, under this name: its triplets are given, it stores no matrix, and its numbers are right."""


class ContrastiveLoss(DropIn, _losses.ContrastiveLoss):
    """The original, under this name: its pairs are given, it stores no matrix, and its numbers are right."""
