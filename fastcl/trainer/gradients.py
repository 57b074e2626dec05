"""From a batch to gradients: in what precision, and how much of it at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..grad_cache import cached_embeddings
from .method import Method

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def add_gradients(
    method: Method,
    network: nn.Module,
    views: tuple[Tensor, ...],
    labels: Tensor,
    *,
    chunk: int | None,
    precision: str,
    scaler: torch.amp.GradScaler,
    share: float,
    admits: Callable[[Sequence[Tensor], Sequence[Tensor]], bool],
) -> tuple[Tensor | None, float]:
    """Add the gradients of one batch to those of the parameters.

    The backward pass is cut at the embeddings: first from the loss to them, timed, then from them to the weights, of
    which a chunk of images at a time has activations. The encoder and the heads run under autocast; the loss takes
    embeddings in whatever dtype they hand it.

    Args:
        method: whose loss it is.
        network: what makes the embeddings: the method, or what averages its gradients over ranks.
        views: ``(B, C, H, W)`` each.
        labels: ``(B,)``.
        chunk: images whose activations are held at once; None for all.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        scaler: multiplies what is differentiated; it does nothing unless the precision is fp16.
        share: what the gradients are multiplied with: the batch's part of the step.
        admits: is given the views and the embeddings; where it says no, there are no gradients.

    Returns:
        The loss ``()``, None where the batch is not admitted; the seconds that the loss itself took, forward and
        backward.
    """
    device = labels.device
    with torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES):
        embeddings = cached_embeddings(network, [views], chunk_size=chunk)[0] if chunk else network(*views)
    if not admits(views, embeddings):
        return None, 0.0
    leaves = [e.detach().requires_grad_(e.requires_grad) for e in embeddings]
    began = now(device)
    loss = method.objective(labels, *leaves)
    scaler.scale(loss * share).backward()
    spent = now(device) - began
    cut = [(e, leaf.grad) for e, leaf in zip(embeddings, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([e for e, _ in cut], [grad for _, grad in cut])
    return loss.detach(), spent


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
