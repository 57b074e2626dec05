"""BatchNorm as several GPUs have it, on one, and the shuffling that MoCo needs then (He et al. 2020, arXiv:1911.05722).

Statistics of a few rows tell a query which keys were normalised with its positive, unless keys are normalised in other
company than queries: section 3.3, "Shuffling BN".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import Ranks, shuffle_batch


class SplitBatchNorm(_BatchNorm):
    """What :func:`split_batchnorm` makes of a layer: in training, equal parts of the batch are normalised each alone.

    The running statistics move to the mean over the parts of theirs, where GPUs that share nothing would keep those of
    the first part. In evaluation it is the layer that it was.

    Attributes:
        splits: parts, each of consecutive rows.
    """

    splits: int

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, ...)`` to the same shape, where the layer keeps it."""
        if not self.training:
            return super().forward(input)
        own = dict(self.named_buffers(recurse=False))  # none in a layer without running statistics
        normalised, after = [], []
        for part in input.tensor_split(self.splits):
            # Copies, not the buffers in place: the backward of a part looks at those that it was given.
            for name, buffer in own.items():
                setattr(self, name, buffer.clone())
            normalised.append(super().forward(part))
            after.append([getattr(self, name) for name in own])
        for (name, buffer), of_parts in zip(own.items(), zip(*after, strict=True), strict=True):
            # The one that is not floating point counts batches, and every part has counted this one.
            buffer.copy_(torch.stack(of_parts).mean(0) if buffer.is_floating_point() else of_parts[0])
            setattr(self, name, buffer)
        return torch.cat(normalised)


def split_batchnorm(network: nn.Module, splits: int) -> None:
    """Every BatchNorm in ``network`` becomes a :class:`SplitBatchNorm` of its own kind, with what it holds.

    The layer itself changes its class, so that parameters, buffers, hooks and what a subclass adds (timm's have an
    activation inside) stay where they are, and the state dict is that of the plain network.
    """
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            kind = type(layer)
            layer.__class__ = type(f"Split{kind.__name__}", (SplitBatchNorm, kind), {"splits": splits})


@torch.compiler.disable
def shuffled(images: Tensor, seed: int, ranks: Ranks | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The images of all ranks dealt out anew, by a permutation that the seed decides.

    Args:
        images: ``(B, ...)`` of this rank, B the same on all.
        ranks: which other ranks there are; None: none.

    Returns:
        As many images, and the function that brings what was made of them, ``(B, ...)``, back to where they came from.
        Neither has a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    if ranks is not None:
        return shuffle_batch(images, ranks.process_group, even=True, generator=generator)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return images[order], lambda rows: rows[order.argsort()]
