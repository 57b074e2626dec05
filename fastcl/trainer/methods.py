"""Methods: an encoder, a head and a loss. ``forward`` makes what the loss takes, so the loss can be timed by itself."""

from __future__ import annotations

import copy
from types import ModuleType

import torch
from torch import Tensor, nn

from ..losses import MoCoLoss, NTXentLoss
from ..pairwise import l2_normalize
from .config import TrainConfig
from .models import projection_head

DIM = 64  # features that the loss sees


class SimCLR(nn.Module):
    """SimCLR (Chen et al. 2020, arXiv:2002.05709): two views, one encoder, NT-Xent."""

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(features, DIM)
        self.loss = NTXentLoss(config.temperature)

    def begin_step(self) -> None:
        """Nothing but the weights moves from step to step."""

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, Tensor]:
        """Two views ``(B, C, H, W)`` to two embeddings ``(B, DIM)``; one pass, so BatchNorm sees both views."""
        z0, z1 = self.head(self.encoder(torch.cat([view0, view1]))).chunk(2)
        return z0, z1

    def formula(self, functions: ModuleType, z0: Tensor, z1: Tensor) -> Tensor:
        """The loss by ``fastcl.functional`` or ``fastcl.reference``: what there is to compare."""
        loss: Tensor = functions.nt_xent(l2_normalize(torch.cat([z0, z1])), temperature=self.loss.temperature)
        return loss


class MoCo(nn.Module):
    """MoCo (He et al. 2020, arXiv:1911.05722) with v2's head: a query, a key by a slowly moving copy, and a queue.

    The key encoder runs in training mode: its BatchNorm normalises by the batch, as the query's does.
    """

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(features, DIM)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.loss = MoCoLoss(DIM, config.queue_size, config.temperature)
        self.momentum = config.momentum

    @torch.no_grad()
    def begin_step(self) -> None:
        """Moves the key encoder, before the keys of a step as in MoCo's code."""
        for slow, fast in ((self.key_encoder, self.encoder), (self.key_head, self.head)):
            for key, query in zip(slow.parameters(), fast.parameters(), strict=True):
                key.lerp_(query, 1 - self.momentum)

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, Tensor]:
        """Two views ``(B, C, H, W)`` to queries and keys ``(B, DIM)``."""
        with torch.no_grad():
            key = self.key_head(self.key_encoder(view1))
        return self.head(self.encoder(view0)), key

    def formula(self, functions: ModuleType, query: Tensor, key: Tensor) -> Tensor:
        """The loss by ``fastcl.functional`` or ``fastcl.reference``, without moving the queue."""
        loss: Tensor = functions.info_nce(
            l2_normalize(query), l2_normalize(key), self.loss.queue.features, temperature=self.loss.temperature
        )
        return loss


METHODS: dict[str, type[SimCLR] | type[MoCo]] = {"simclr": SimCLR, "moco": MoCo}
