"""sentence-transformers, from embeddings on: what a model makes of the texts is the same on both sides."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import Case, Draw, Problem, original

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
WORDS = ("the", "a", "cat", "dog", "bird", "sun", "sits", "runs", "sings", "here", "there", "slowly", "red", "old")


@lru_cache(maxsize=None)
def tiny_model(words: tuple[str, ...] = WORDS, width: int = 16, seed: int = 0) -> Any:
    """A SentenceTransformer of one small random BERT layer, whose tokenizer knows these words; made offline."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        Path(folder, "vocab.txt").write_text("\n".join(vocabulary))
        BertTokenizer(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        BertModel(config).save_pretrained(folder)
        layers = Transformer(folder, max_seq_length=16)
    return SentenceTransformer(modules=[layers, Pooling(width)], device="cpu").eval()


def pair(name: str, *models: Any, **options: Any) -> tuple[Any, Any]:
    """The drop-in and the original."""
    from fastcl.integrations import sentence_transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        ours, theirs = (
            getattr(module, name)(*models, **options)
            for module in (sentence_transformers, original("sentence_transformers"))
        )
    return ours, theirs


def _step(loss: Any) -> Callable[..., Tensor]:
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def _chunked(columns: tuple[Tensor, ...]) -> list[list[Tensor]]:
    return [list(column.split(max(len(column) // 3, 1))) for column in columns]


def _cached_step(loss: Any) -> Callable[..., Tensor]:
    return lambda *columns: loss.calculate_loss(_chunked(columns))


def _ranking(hard: int = 0, *, name: str = "MultipleNegativesRankingLoss", dot: bool = False, **fixed: Any) -> Any:
    """Queries, positives and ``hard`` columns of negatives, n rows each."""

    def build(draw: Draw) -> Problem:
        options = {"scale": draw.between(1.0, 30.0, 20.0), **fixed}
        if "hardness_mode" in fixed:
            options["hardness_strength"] = draw.between(0.5, 9.0, 5.0)
        leaves = [draw.rows() for _ in range(2 + hard)]
        if dot:
            from sentence_transformers.util import dot_score

            options |= {"scale": draw.between(0.5, 5.0, 1.0), "similarity_fct": dot_score}
            leaves = [draw.units() for _ in range(2 + hard)]
        cached = name.startswith("Cached")
        if cached:
            options["mini_batch_size"] = 32 if draw.usual else max(draw.n // 3, 1)
        # a model that is not called here; the cached losses look at its first part
        ours, theirs = pair(name, nn.Sequential(nn.Identity()), **options)
        step = _cached_step if cached else _step
        return Problem(leaves, step(ours), step(theirs))

    return build


def _guided(hard: int = 0, *, name: str = "GISTEmbedLoss", **fixed: Any) -> Any:
    """Queries, positives and ``hard`` columns of negatives, and the same texts as a guide sees them."""

    def build(draw: Draw) -> Problem:
        logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
        margin = draw.between(0.0, 0.2, 0.0)
        options = {"temperature": draw.between(0.05, 0.5, 0.01), "margin": margin, **fixed}
        columns = 2 + hard
        topics = draw.rows(d=8).detach()  # without them a guide finds no negative more similar than the positive
        guides = [topics + 0.7 * draw.rows(d=8).detach() for _ in range(columns)]
        leaves = [draw.rows() for _ in range(columns)]
        cached = name.startswith("Cached")
        if cached:
            options["mini_batch_size"] = 32 if draw.usual else max(draw.n // 3, 1)
        ours, theirs = pair(name, tiny_model(), tiny_model(), **options)
        if cached:
            of_guide = _chunked(tuple(guides))
            return Problem(
                leaves,
                lambda *columns: ours.calculate_loss(_chunked(columns), of_guide),
                lambda *columns: theirs.calculate_loss(_chunked(columns), of_guide),
            )
        return Problem(
            leaves,
            lambda *columns: ours.compute_loss_from_embeddings(list(columns), guides),
            lambda *columns: _forward_of(theirs, list(columns), guides),
        )

    return build


def _forward_of(loss: Any, columns: list[Tensor], guides: list[Tensor]) -> Tensor:
    """The original has no function of embeddings: its forward is given models that look them up."""
    loss.model, loss.guide = _Lookup(columns), _Lookup(guides)
    return loss([{"column": torch.tensor(i)} for i in range(len(columns))], None)


class _Lookup(nn.Module):
    """A model whose text is the number of a column."""

    def __init__(self, columns: list[Tensor]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.columns[int(features["column"])]}


def _triplet(metric: str) -> Any:
    def build(draw: Draw) -> Problem:
        distances = original("sentence_transformers").TripletDistanceMetric
        options = {"distance_metric": getattr(distances, metric), "triplet_margin": draw.between(0.5, 5.0, 5.0)}
        ours, theirs = pair("TripletLoss", nn.Identity(), **options)
        return Problem([draw.rows(), draw.rows(), draw.rows()], _step(ours), _step(theirs))

    return build


def _contrastive(metric: str) -> Any:
    def build(draw: Draw) -> Problem:
        distances = original("sentence_transformers").SiameseDistanceMetric
        options = {
            "distance_metric": getattr(distances, metric),
            "margin": draw.between(0.3, 1.5, 0.5),
            "size_average": draw.choice(True, False, usual=True),
        }
        ours, theirs = pair("ContrastiveLoss", nn.Identity(), **options)
        similar = draw.labels() % 2
        steps = (lambda a, b, loss=loss: loss.compute_loss_from_embeddings([a, b], similar) for loss in (ours, theirs))
        return Problem([draw.rows(), draw.rows()], *steps)

    return build


SYMMETRIC: dict[str, Any] = {"directions": BOTH, "partition_mode": "per_direction"}
# of the original every product of rows is a tensor of its own: N x N x D numbers, several times
LARGEST_GUIDED = 2048

CASES = [
    Case("sentence_transformers", label, build, largest=largest)
    for label, build, largest in [
        ("MultipleNegativesRankingLoss", _ranking(), 10**9),
        ("MultipleNegativesRankingLoss, a hard negative", _ranking(1), 10**9),
        ("MultipleNegativesRankingLoss, three hard negatives", _ranking(3), 10**9),
        ("MultipleNegativesRankingLoss, both directions", _ranking(**SYMMETRIC), 10**9),
        ("MultipleNegativesRankingLoss, both directions, two hard negatives", _ranking(2, **SYMMETRIC), 10**9),
        ("MultipleNegativesRankingLoss, both directions, joint", _ranking(directions=BOTH), 10**9),
        ("MultipleNegativesRankingLoss, all directions", _ranking(directions=ALL), 10**9),
        ("MultipleNegativesRankingLoss, all directions, two hard negatives", _ranking(2, directions=ALL), 10**9),
        *(
            (f"MultipleNegativesRankingLoss, hardness of {mode}", _ranking(2, hardness_mode=mode), 10**9)
            for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
        ),
        (
            "MultipleNegativesRankingLoss, hardness of in_batch_negatives, pairs",
            _ranking(hardness_mode="in_batch_negatives"),
            10**9,
        ),
        (
            "MultipleNegativesRankingLoss, hardness of in_batch_negatives, all directions",
            _ranking(1, hardness_mode="in_batch_negatives", directions=ALL),
            10**9,
        ),
        ("MultipleNegativesRankingLoss, dot_score", _ranking(1, dot=True), 10**9),
        ("MultipleNegativesSymmetricRankingLoss", _ranking(name="MultipleNegativesSymmetricRankingLoss"), 10**9),
        ("CachedMultipleNegativesRankingLoss", _ranking(1, name="CachedMultipleNegativesRankingLoss"), 10**9),
        (
            "CachedMultipleNegativesSymmetricRankingLoss",
            _ranking(name="CachedMultipleNegativesSymmetricRankingLoss"),
            10**9,
        ),
        ("GISTEmbedLoss", _guided(), LARGEST_GUIDED),
        ("GISTEmbedLoss, negatives", _guided(1), LARGEST_GUIDED),
        ("GISTEmbedLoss, relative margin", _guided(1, margin_strategy="relative"), LARGEST_GUIDED),
        (
            "GISTEmbedLoss, queries and positives alone",
            _guided(contrast_anchors=False, contrast_positives=False),
            LARGEST_GUIDED,
        ),
        ("CachedGISTEmbedLoss, two negatives", _guided(2, name="CachedGISTEmbedLoss"), LARGEST_GUIDED),
    ]
] + [
    Case("sentence_transformers", label, build, fused=False)
    for label, build in [
        ("TripletLoss", _triplet("EUCLIDEAN")),
        ("TripletLoss, cosine", _triplet("COSINE")),
        ("ContrastiveLoss", _contrastive("COSINE_DISTANCE")),
        ("ContrastiveLoss, euclidean", _contrastive("EUCLIDEAN")),
    ]
]
