"""Methods: an encoder, what stands on it, and a loss. ``forward`` makes what the loss takes, which is timed by itself.

Networks that follow another slowly run in training mode: their BatchNorm normalises by the batch, as the other's does,
and keeps running statistics of its own, which nothing reads. They follow the parameters of the other, not its buffers.
Where BatchNorm sees a part of a batch only (``bn_splits``, or several ranks), MoCo's key encoder sees parts of other
images: a permutation of each step deals them out, over all ranks, and keys are brought back. The running statistics of
``bn_splits`` parts are their mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import groupby
from types import ModuleType

import torch
from torch import Tensor, nn

from ..losses import (
    BatchTripletLoss,
    BYOLLoss,
    MoCoLoss,
    MoCoV3Loss,
    NegativeCosineLoss,
    NTXentLoss,
    SiameseLoss,
    SupConLoss,
)
from ..pairwise import l2_normalize
from .batchnorm import shuffled
from .clip import CLIP
from .config import TrainConfig
from .method import Method
from .models import projection_head


class SimCLR(Method):
    """SimCLR (Chen et al. 2020, arXiv:2002.05709): views, one encoder, NT-Xent, to which all views are positives."""

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = _plain_head(features, config)
        self.loss = NTXentLoss(config.temperature)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        z: Tensor = self.head(_features(self.encoder, views))
        return z.chunk(len(views))

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        z = l2_normalize(torch.cat(embeddings))
        loss: Tensor = functions.nt_xent(z, views=len(embeddings), temperature=self.loss.temperature)
        return loss


class SupCon(SimCLR):
    """Supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362): images of a class belong together."""

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__(encoder, features, config)
        self.loss = SupConLoss(config.temperature)

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = self.loss(torch.stack(embeddings, 1), labels)
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        z = l2_normalize(torch.cat(embeddings))
        loss: Tensor = functions.supcon(z, labels.repeat(len(embeddings)), temperature=self.loss.temperature)
        return loss


class MoCo(Method):
    """MoCo (He et al. 2020, arXiv:1911.05722): a query, a key by a slowly moving copy, and a queue.

    With a linear head it is version 1, with an MLP version 2 (Chen et al. 2020, arXiv:2003.04297).
    """

    loss: MoCoLoss

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = _plain_head(features, config)
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.loss = MoCoLoss(config.dim, config.queue_size, config.temperature)
        self.momentum = config.momentum
        self.bn_splits, self.sync_batchnorm = config.bn_splits, config.sync_batchnorm

    def begin_step(self) -> None:
        """Moves the key encoder, before the keys of a step as in MoCo's code."""
        _follow(self.key_encoder, self.encoder, self.momentum)
        _follow(self.key_head, self.head, self.momentum)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Queries of the first view, and keys of the second, shuffled where BatchNorm sees a part of the batch."""
        view0, view1 = views
        in_parts = self.bn_splits > 1 or (self.loss.ranks is not None and not self.sync_batchnorm)
        with torch.no_grad():
            if self.training and in_parts:
                images, restored = shuffled(view1, self.seed, self.loss.ranks)
                key = restored(self.key_head(self.key_encoder(images)))
            else:
                key = self.key_head(self.key_encoder(view1))
        return self.head(self.encoder(view0)), key

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        query, key = map(l2_normalize, embeddings)
        loss: Tensor = functions.info_nce(query, key, self.loss.queue.features, temperature=self.loss.temperature)
        return loss


class BYOL(Method):
    """BYOL (Grill et al. 2020, arXiv:2006.07733): a predictor looks for what a slow copy makes of the other view.

    No negatives: what keeps embeddings apart are the predictor, the copy, and BatchNorm in the heads.
    """

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(features, config.dim, norm=True, hidden=config.hidden, layers=config.head_layers)
        self.predictor = projection_head(config.dim, config.dim, norm=True, hidden=config.hidden)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        self.loss = BYOLLoss()
        self.momentum = config.momentum

    def begin_step(self) -> None:
        """Moves the target."""
        _follow(self.target_encoder, self.encoder, self.momentum)
        _follow(self.target_head, self.head, self.momentum)

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Predictions of all views, then the targets of the first two."""
        with torch.no_grad():
            targets = self.target_head(self.target_encoder(torch.cat(views[:2])))
        predictions = self.predictor(self.head(_features(self.encoder, views)))
        return (*predictions.chunk(len(views)), *targets.chunk(2))

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return _both_ways(self.loss, *embeddings)

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return _both_ways(functions.byol, *map(l2_normalize, embeddings))


class MoCoV3(BYOL):
    """MoCo v3 (Chen et al. 2021, arXiv:2104.02057): BYOL's networks, InfoNCE over the batch both ways, and no queue.

    The projection ends with BatchNorm that learns nothing, as in the paper's code; for ViTs the prediction does too.
    """

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__(encoder, features, config)
        for head in (self.head, self.target_head, *([self.predictor] if config.predictor_norm else [])):
            head.append(nn.BatchNorm1d(config.dim, affine=False))
        self.loss = MoCoV3Loss(config.temperature)

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = self.loss(*embeddings)
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = functions.moco_v3(*map(l2_normalize, embeddings), temperature=self.loss.temperature)
        return loss


class SimSiam(Method):
    """SimSiam (Chen & He 2021, arXiv:2011.10566): BYOL whose target is the network itself, without gradient."""

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(features, config.dim, norm=True, hidden=config.hidden, layers=config.head_layers)
        self.predictor = projection_head(config.dim, config.dim, norm=True, hidden=config.hidden)
        self.loss = NegativeCosineLoss()

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Predictions of all views, then the targets of the first two."""
        z = self.head(_features(self.encoder, views))
        return (*self.predictor(z).chunk(len(views)), *z.detach().chunk(len(views))[:2])

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return _both_ways(self.loss, *embeddings) / 2

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        return _both_ways(functions.negative_cosine, *map(l2_normalize, embeddings)) / 2


class Siamese(SimCLR):
    """A siamese network (Hadsell et al. 2006, doi:10.1109/CVPR.2006.100) that needs no labels.

    Two views of an image are a similar pair; a view and the other view of the batch's neighbour, whose order is random,
    a dissimilar one, which a margin pushes apart.
    """

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__(encoder, features, config)
        self.loss = SiameseLoss(1.0 if config.margin is None else config.margin)

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = self.loss(*self._pairs(*embeddings))
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        pairs = self._pairs(*map(l2_normalize, embeddings))
        loss: Tensor = functions.siamese(*pairs, margin=self.loss.margin)
        return loss

    @staticmethod
    def _pairs(z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        similar = torch.ones(len(z0), dtype=torch.long, device=z0.device)
        return torch.cat([z0, z0]), torch.cat([z1, z1.roll(1, 0)]), torch.cat([similar, 1 - similar])


class Triplet(SimCLR):
    """FaceNet's loss (Schroff et al. 2015, arXiv:1503.03832, section 3.2) of views: an image is a class of its own.

    The positives of a view are the others; a negative is semi-hard among all views of the batch: the nearest that is
    no nearer than the positive, or else the furthest.
    """

    loss: BatchTripletLoss

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__(encoder, features, config)
        margin = 0.2 if config.margin is None else config.margin
        self.loss = BatchTripletLoss(margin, mining="semi-hard", distance="squared")

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = self.loss(torch.cat(embeddings), self.loss._numbered(self._images(labels, embeddings)))
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        z = l2_normalize(torch.cat(embeddings))
        loss: Tensor = functions.triplet_semi_hard(
            z, self._images(labels, embeddings), margin=self.loss.margin, distance=self.loss.distance
        )
        return loss

    @staticmethod
    def _images(labels: Tensor, views: Sequence[Tensor]) -> Tensor:
        return torch.arange(len(labels), device=labels.device).repeat(len(views))


def _features(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Of all views, one under the other. One pass over those of one size, so BatchNorm sees them together."""
    return torch.cat([encoder(torch.cat(list(same))) for _, same in groupby(views, lambda view: view.shape)])


def _both_ways(loss: Callable[[Tensor, Tensor], Tensor], *embeddings: Tensor) -> Tensor:
    """The targets of the first two views, which come last, each against the predictions of all other views.

    A sum over the two targets of the mean over predictions. Local crops are no targets (SwAV, arXiv:2006.09882, 3.3).
    """
    *predictions, z0, z1 = embeddings
    at_z0, at_z1 = predictions[1:], [predictions[0], *predictions[2:]]
    total = sum(loss(p, z1) for p in at_z1) + sum(loss(p, z0) for p in at_z0)
    assert isinstance(total, Tensor)
    return total / len(at_z0)


def _plain_head(features: int, config: TrainConfig) -> nn.Module:
    """A projection without BatchNorm: linear (MoCo v1), or with a hidden layer."""
    if config.head == "linear":
        return nn.Linear(features, config.dim)
    return projection_head(features, config.dim, hidden=config.hidden, layers=config.head_layers)


@torch.no_grad()
def _follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    for of_slow, of_fast in zip(slow.parameters(), fast.parameters(), strict=True):
        of_slow.lerp_(of_fast, 1 - momentum)


METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR, "moco": MoCo, "moco-v3": MoCoV3, "byol": BYOL, "simsiam": SimSiam, "supcon": SupCon,
    "siamese": Siamese, "triplet": Triplet, "clip": CLIP,
}  # fmt: skip
