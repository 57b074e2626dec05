"""BatchNorm as several GPUs have it, on one, and the shuffling that MoCo needs then (He et al. 2020, arXiv:1911.05722).

Statistics of a few rows tell a query which keys were normalised with its positive, unless keys are normalised in other
company than queries: section 3.3, "Shuffling BN".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import Ranks, shuffle_batch


class SplitBatchNorm(_BatchNorm):
    """A BatchNorm that normalises equal parts of the batch each on its own, in training.

    The running statistics move to the mean over the parts of theirs, where GPUs that share nothing would keep those of
    the first part. The state dict is that of the layer in whose place it stands, and in evaluation so is what it does.

    Args:
        layer: in whose place it stands; parameters and buffers are those of the layer itself.
        splits: parts, each of consecutive rows.
    """

    def __init__(self, layer: _BatchNorm, splits: int) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        assert layer.affine and layer.track_running_stats and layer.momentum is not None  # as all encoders' have it
        self.splits = splits
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.num_batches_tracked = layer.num_batches_tracked
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, ...)`` to the same shape."""
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        means, variances = (b.repeat(self.splits, 1) for b in (self.running_mean, self.running_var))
        parts = zip(input.tensor_split(self.splits), means, variances, strict=True)
        normalised = [batch_norm(*part, self.weight, self.bias, True, self.momentum, self.eps) for part in parts]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        return torch.cat(normalised)

    def _check_input_dim(self, input: Tensor) -> None:
        """One class for vectors and for images."""


def split_batchnorm(network: nn.Module, splits: int) -> None:
    """Put a :class:`SplitBatchNorm` in the place of every BatchNorm inside ``network``."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, SplitBatchNorm(child, splits))


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
