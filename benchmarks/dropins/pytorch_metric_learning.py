"""pytorch-metric-learning."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from . import Case, Draw, Problem, original

DISTANCES: dict[str, dict[str, Any]] = {
    "cosine": {},
    "dot": {"class": "DotProductSimilarity", "normalize_embeddings": False},
    "euclidean": {"class": "LpDistance"},
    "similarity": {"class": "CosineSimilarity"},
}


def part(module: str, name: str, **options: Any) -> Any:
    """An object of the library: a distance, a reducer, a wrapper."""
    return getattr(import_module(f"pytorch_metric_learning.{module}"), name)(**options)


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    from fastcl.integrations import pytorch_metric_learning

    modules = (pytorch_metric_learning, original("pytorch_metric_learning"))
    ours, theirs = (getattr(module, name)(**options) for module in modules)
    return ours, theirs


def _options(draw: Draw, name: str) -> dict[str, Any]:
    if name in ("NTXentLoss", "SupConLoss"):
        return {"temperature": draw.between(0.05, 1.0, 0.1)}
    if name == "MultiSimilarityLoss":
        alpha, beta = draw.between(1.0, 5.0, 2.0), draw.between(5.0, 50.0, 50.0)
        return {"alpha": alpha, "beta": beta, "base": draw.between(0.0, 1.0, 0.5)}
    if name == "TripletMarginLoss":
        return {"margin": draw.between(0.0, 0.5, 0.05)}
    if name == "ContrastiveLoss":
        return {"pos_margin": draw.between(0.0, 1.2, 0.0), "neg_margin": draw.between(0.5, 1.6, 1.0)}
    return {}


def _of_labels(draw: Draw, name: str, reducer: str = "", distance: str = "") -> Problem:
    options = _options(draw, name)
    if reducer:
        options["reducer"] = part("reducers", reducer)
    if distance == "similarity" and name == "ContrastiveLoss":
        options.update(pos_margin=draw.between(0.0, 1.0, 1.0), neg_margin=draw.between(-0.5, 0.5, 0.0))
    if distance == "dot":  # long rows: losses below the original's cap at 87.3
        options["temperature"] = draw.between(5.0, 10.0, 10.0)
    if distance:
        kind = dict(DISTANCES[distance])
        options["distance"] = part("distances", kind.pop("class"), **kind)
    ours, theirs = pair(name, **options)
    labels = draw.labels()
    return Problem([draw.rows()], lambda z: ours(z, labels), lambda z: theirs(z, labels))


def _two_views(draw: Draw, name: str, symmetric: bool = True) -> Problem:
    """Under SelfSupervisedLoss: n rows in all, a label per image."""
    ours, theirs = (
        part("losses", "SelfSupervisedLoss", loss=loss, symmetric=symmetric)
        for loss in pair(name, **_options(draw, name))
    )
    half = max(draw.n // 2, 3)
    return Problem([draw.rows(half), draw.rows(half)], ours, theirs)


def _memory(draw: Draw, name: str) -> Problem:
    """Under CrossBatchMemory, which lists all pairs itself: the third batch of a memory that overflows with it."""
    size = max(draw.n // 2, 2)
    memory = {"embedding_size": draw.d, "memory_size": 2 * size + 1}
    ours, theirs = (
        part("losses", "CrossBatchMemory", loss=loss, **memory) for loss in pair(name, **_options(draw, name))
    )
    batches = [(draw.rows(size).detach(), draw.labels(size, each=3)) for _ in range(2)]
    labels = draw.labels(size, each=3)

    def third(loss: Any, z: Tensor) -> Tensor:
        loss.reset_queue()
        for batch in batches:
            loss(*batch)
        return loss(z, labels)

    return Problem([draw.rows(size)], partial(third, ours), partial(third, theirs))


def _columns(draw: Draw, name: str, same_labels: bool = False) -> Problem:
    """Rows against other columns, ``ref_emb``."""
    ours, theirs = pair(name, **_options(draw, name))
    labels, columns = draw.labels(), draw.labels(draw.n + 3)
    if same_labels:  # one tensor for both: pair i, i does not count
        columns = labels
    leaves = [draw.rows(), draw.rows(len(columns))]
    return Problem(
        leaves, *(lambda q, k, loss=loss: loss(q, labels, ref_emb=k, ref_labels=columns) for loss in (ours, theirs))
    )


def _mined(draw: Draw, name: str, miner: str, **options: Any) -> Problem:
    ours, theirs = pair(name, **_options(draw, name))
    z, labels = draw.rows(), draw.labels()
    indices = part("miners", miner, **options)(z.detach(), labels)
    return Problem([z], lambda z: ours(z, labels, indices), lambda z: theirs(z, labels, indices))


def _case(label: str, build: Any, *args: Any, fused: bool = True, largest: int = 10**9, **options: Any) -> Case:
    def of(draw: Draw) -> Problem:
        return build(draw, *args, **options)

    return Case("pytorch_metric_learning", label, of, fused, largest)


# What the originals survive in 24 GB: NTXentLoss makes a float per positive and negative pair, TripletMarginLoss three
# indices per triplet.
CASES = [
    _case("NTXentLoss", _of_labels, "NTXentLoss", largest=256),
    _case("NTXentLoss, two views", _two_views, "NTXentLoss", largest=512),
    _case("NTXentLoss, AvgNonZeroReducer", _of_labels, "NTXentLoss", "AvgNonZeroReducer", largest=128),
    _case("NTXentLoss, dot product", _of_labels, "NTXentLoss", "", "dot", largest=128),
    _case("NTXentLoss, ref_emb", _columns, "NTXentLoss", largest=128),
    _case("NTXentLoss, ref_emb of the same labels", _columns, "NTXentLoss", same_labels=True, largest=128),
    _case("NTXentLoss, two views, not symmetric", _two_views, "NTXentLoss", symmetric=False, largest=128),
    _case("NTXentLoss, memory", _memory, "NTXentLoss", fused=False, largest=128),
    _case("NTXentLoss, miner", _mined, "NTXentLoss", "MultiSimilarityMiner", fused=False, largest=128),
    _case("SupConLoss", _of_labels, "SupConLoss"),
    _case("SupConLoss, two views", _two_views, "SupConLoss"),
    _case("SupConLoss, MeanReducer", _of_labels, "SupConLoss", "MeanReducer"),
    _case("SupConLoss, ref_emb", _columns, "SupConLoss"),
    _case("SupConLoss, ref_emb of the same labels", _columns, "SupConLoss", same_labels=True),
    _case("SupConLoss, memory", _memory, "SupConLoss", fused=False),
    _case("SupConLoss, Euclidean", _of_labels, "SupConLoss", "", "euclidean", fused=False),
    _case("MultiSimilarityLoss", _of_labels, "MultiSimilarityLoss"),
    _case("MultiSimilarityLoss, ref_emb", _columns, "MultiSimilarityLoss"),
    _case("MultiSimilarityLoss, memory", _memory, "MultiSimilarityLoss", fused=False),
    _case("MultiSimilarityLoss, miner", _mined, "MultiSimilarityLoss", "MultiSimilarityMiner", fused=False),
    _case("NPairsLoss", _of_labels, "NPairsLoss"),
    _case("NPairsLoss, MeanReducer", _of_labels, "NPairsLoss", "MeanReducer"),
    _case("TripletMarginLoss", _of_labels, "TripletMarginLoss", largest=2048),
    _case("TripletMarginLoss, MeanReducer", _of_labels, "TripletMarginLoss", "MeanReducer", largest=2048),
    _case("TripletMarginLoss, cosine", _of_labels, "TripletMarginLoss", "", "similarity", largest=2048),
    _case("TripletMarginLoss, two views", _two_views, "TripletMarginLoss", largest=2048),
    _case("TripletMarginLoss, ref_emb", _columns, "TripletMarginLoss", fused=False, largest=1024),
    _case("TripletMarginLoss, miner", _mined, "TripletMarginLoss", "TripletMarginMiner", fused=False, largest=1024),
    _case("ContrastiveLoss", _of_labels, "ContrastiveLoss"),
    _case("ContrastiveLoss, MeanReducer", _of_labels, "ContrastiveLoss", "MeanReducer"),
    _case("ContrastiveLoss, cosine", _of_labels, "ContrastiveLoss", "", "similarity"),
    _case("ContrastiveLoss, ref_emb", _columns, "ContrastiveLoss"),
    _case("ContrastiveLoss, ref_emb of the same labels", _columns, "ContrastiveLoss", same_labels=True),
    _case("ContrastiveLoss, memory", _memory, "ContrastiveLoss", fused=False),
]
