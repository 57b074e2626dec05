"""Whether the embeddings fall together: alignment, uniformity and effective rank of a fixed sample of images.

What is looked at is what the loss sees, projections of length 1, not the features that are probed: a collapse shows
there first. Both views of an image are the same at every step, by the encoder and the head in evaluation mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..pairwise import l2_normalize, pair_logsumexp, row_dot
from .data import Data

MONITORS = ("alignment", "uniformity", "effective_rank")
COLLAPSED = 2.0  # an effective rank below it: all embeddings on one line
_SAMPLE = 1024  # images
_AT_ONCE = 256  # images whose views live at once


def monitors(encoder: nn.Module, head: nn.Module, data: Data, at: Tensor, device: torch.device) -> dict[str, float]:
    """The three figures of at most 1,024 of the training images ``at`` ``(N,)``, evenly spaced over them.

    Args:
        encoder, head: ``(B, C, H, W)`` to embeddings ``(B, D)``; they are left in the mode they are in.

    Returns:
        By the names of :data:`MONITORS`; NaN where an embedding is not finite.
    """
    at = at[torch.arange(min(len(at), _SAMPLE)) * len(at) // min(len(at), _SAMPLE)]
    one, other = map(l2_normalize, _embeddings(encoder, head, data, at, device))
    if not bool((one.isfinite() & other.isfinite()).all()):
        return dict.fromkeys(MONITORS, math.nan)
    return {"alignment": alignment(one, other), "uniformity": uniformity(one), "effective_rank": effective_rank(one)}


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean squared distance of two views, 0 (the best) to 4: Wang & Isola 2020, arXiv:2005.10242, section 4.1, alpha 2.

    Args:
        one, other: ``(N, D)`` of length 1, row by row of the same image.
    """
    return (2 - 2 * row_dot(one, other).double()).mean().item()


def uniformity(embeddings: Tensor) -> float:
    """Log of the mean of exp(-2 * squared distance) over all pairs of different rows; 0 where all are equal.

    Wang & Isola 2020, section 4.1, with t = 2. The lower, the more evenly they are spread over the sphere; no matrix of
    pairs is stored.

    Args:
        embeddings: ``(N, D)`` of length 1, at least two.
    """
    count = len(embeddings)
    # |x - y|^2 = 2 - 2 <x, y>, so exp(-2 |x - y|^2) = exp(4 <x, y> - 4)
    rows = pair_logsumexp(embeddings, scale=4.0, drop=torch.arange(count, device=embeddings.device))
    return float(rows.double().logsumexp(0)) - math.log(count * (count - 1)) - 4


def effective_rank(embeddings: Tensor) -> float:
    """Exponential of the entropy of the singular values over their sum, 1 to D: RankMe.

    Garrido et al. 2023, arXiv:2210.02885, section 3, here of rows of length 1, and without their epsilon of 1e-7.

    Args:
        embeddings: ``(N, D)``, finite; not centred, so rows that are all equal have rank 1.
    """
    singular = torch.linalg.svdvals(embeddings.double())
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.double).tiny)
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def _embeddings(
    encoder: nn.Module, head: nn.Module, data: Data, at: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Embeddings ``(N, D)`` of two views of the images, fp32 on the CPU."""
    was_training = [(module, module.training) for module in (encoder, head)]
    for module, _ in was_training:
        module.eval()
    parts = []
    for part in at.split(_AT_ONCE):
        images = data.train.read(part).to(device)
        views = torch.cat(data.augmentation.views(images, part, ("monitors",)))
        parts.append(head(encoder(views)).float().cpu().chunk(2))
    for module, training in was_training:
        module.train(training)
    one, other = zip(*parts, strict=True)
    return torch.cat(one), torch.cat(other)
