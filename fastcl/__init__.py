"""Contrastive losses that never store the similarity matrix."""

from . import functional, pairwise, reference
from ._explain import explain
from ._version import __version__
from .backends import available_backends, use_backend
from .losses import CLIPLoss, DCLLoss, InfoNCELoss, MoCoLoss, NTXentLoss, SigLIPLoss, SupConLoss
from .queue import FeatureQueue

__all__ = [
    "CLIPLoss",
    "DCLLoss",
    "FeatureQueue",
    "InfoNCELoss",
    "MoCoLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "__version__",
    "available_backends",
    "explain",
    "functional",
    "pairwise",
    "reference",
    "use_backend",
]
