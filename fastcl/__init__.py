"""Contrastive losses that never store the similarity matrix."""

from . import functional, pairwise, reference
from ._explain import explain
from ._version import __version__
from .backends import available_backends, use_backend
from .grad_cache import cached_embeddings, cached_loss, token_chunks
from .inspection import pair_softmax_matmul, pair_statistics, similarity_tile
from .losses import (
    BatchTripletLoss,
    BYOLLoss,
    CLIPLoss,
    CosFaceLoss,
    DCLLoss,
    DCLWLoss,
    GISTLoss,
    HardNTXentLoss,
    InBatchSoftmaxLoss,
    InfoNCELoss,
    MoCoLoss,
    MoCoV3Loss,
    MultiSimilarityLoss,
    NegativeCosineLoss,
    NPairLoss,
    NTXentLoss,
    SampledInfoNCELoss,
    SiameseLoss,
    SigLIPLoss,
    SINCERELoss,
    SupConLoss,
    TripletLoss,
)
from .queue import FeatureQueue

__all__ = [
    "BYOLLoss",
    "BatchTripletLoss",
    "CLIPLoss",
    "CosFaceLoss",
    "DCLLoss",
    "DCLWLoss",
    "FeatureQueue",
    "GISTLoss",
    "HardNTXentLoss",
    "InBatchSoftmaxLoss",
    "InfoNCELoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "MultiSimilarityLoss",
    "NPairLoss",
    "NTXentLoss",
    "NegativeCosineLoss",
    "SINCERELoss",
    "SampledInfoNCELoss",
    "SiameseLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "__version__",
    "available_backends",
    "cached_embeddings",
    "cached_loss",
    "explain",
    "functional",
    "pair_softmax_matmul",
    "pair_statistics",
    "pairwise",
    "reference",
    "similarity_tile",
    "token_chunks",
    "use_backend",
]
