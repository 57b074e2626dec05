"""A ring buffer of past embeddings: MoCo's dictionary of negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks


class FeatureQueue(nn.Module):
    """The last ``size`` embeddings, oldest overwritten first (He et al. 2020, arXiv:1911.05722, section 3.1).

    Args:
        dim: features per row.
        size: rows kept.

    Attributes:
        features: buffer ``(size, dim)`` fp32, random unit rows at first, as in MoCo's code.
        pointer: buffer ``()`` int64, the row that is overwritten next.

    ``load_state_dict`` also takes MoCo's own checkpoints: ``queue`` of shape ``(dim, size)`` and ``queue_ptr``.

    Raises:
        ValueError: a dim or size below 1.

    A loss of ``fastcl`` does not read its negatives again in backward, so a queue may move on between the two.
    """

    features: Tensor
    pointer: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("size", size)):
            _checks.count(name, value)
        self.register_buffer("features", nn.functional.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write a batch over the oldest rows, in place.

        Args:
            keys: ``(B, dim)``, any B: it wraps round the end, and of more than ``size`` rows the last ``size`` stay.

        Raises:
            TypeError, ValueError: keys that are not rows of this width on this device; nothing is written then.
        """
        _checks.rows(keys=keys, queue=self.features)
        size, batch = self.features.shape[0], keys.shape[0]
        skipped = max(batch - size, 0)
        at = torch.arange(skipped, batch, device=keys.device) + self.pointer
        self.features.index_copy_(0, at % size, keys[skipped:].to(self.features.dtype))
        self.pointer.add_(batch).remainder_(size)

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"dim={dim}, size={size}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "queue" in state_dict and prefix + "features" not in state_dict:
            state_dict = dict(state_dict)
            state_dict[prefix + "features"] = state_dict.pop(prefix + "queue").T
            state_dict[prefix + "pointer"] = state_dict.pop(prefix + "queue_ptr").reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
