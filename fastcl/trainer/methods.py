"""Methods: an encoder, what stands on it, and a loss. ``forward`` makes what the loss takes, which is timed by itself.

Networks that follow another slowly run in training mode: their BatchNorm normalises by the batch, as the other's does,
and keeps running statistics of its own, which nothing reads. They follow the parameters of the other, not its buffers.
Where BatchNorm sees a part of a batch only (``bn_splits``, or several ranks), MoCo's key encoder sees parts of other
images: a permutation of each step deals them out, over all ranks, and keys are brought back. The running statistics of
``bn_splits`` parts are their mean.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from ..losses import (
    BatchTripletLoss,
    BYOLLoss,
    CLIPLoss,
    MoCoLoss,
    MoCoV3Loss,
    NegativeCosineLoss,
    NTXentLoss,
    SiameseLoss,
    SupConLoss,
)
from ..pairwise import l2_normalize, pair_argmax
from .batchnorm import shuffled
from .config import TrainConfig
from .data import Data
from .errors import TrainError
from .models import projection_head
from .text import TEMPLATES, TextEncoder, prompts, tokens


class Method(nn.Module):
    """What the loop knows of a method: ``encoder``, whose features are probed, ``loss``, and the following.

    Attributes:
        momentum: how much of its slow networks, where it has any, the next step keeps; the loop sets it.
        seed: of what is random in the next step; the loop sets it.
    """

    encoder: nn.Module
    loss: nn.Module
    momentum: float
    seed: int = 0

    def begin_step(self) -> None:
        """Before the embeddings of every step."""

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, ...]:
        """Two views ``(B, C, H, W)`` to embeddings ``(B, dim)``; one pass over both, so BatchNorm sees both."""
        raise NotImplementedError

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        """The loss of the embeddings of images with these labels ``(B,)``."""
        loss: Tensor = self.loss(*embeddings)
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        """The same by ``fastcl.functional`` or ``fastcl.reference``, without moving a queue: to compare."""
        raise NotImplementedError

    def zero_shot(self, features: Tensor, labels: Tensor, classes: Sequence[str]) -> float | None:
        """Accuracy in percent of naming images, whose ``features`` are the encoder's, by the words for their classes.

        None where the method knows no words, or the data set no classes.
        """
        return None


class SimCLR(Method):
    """SimCLR (Chen et al. 2020, arXiv:2002.05709): two views, one encoder, NT-Xent."""

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = _plain_head(features, config)
        self.loss = NTXentLoss(config.temperature)

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.encoder(torch.cat([view0, view1]))).chunk(2)

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = functions.nt_xent(l2_normalize(torch.cat(embeddings)), temperature=self.loss.temperature)
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
        loss: Tensor = functions.supcon(z, labels.repeat(2), temperature=self.loss.temperature)
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

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, ...]:
        """Queries of the first view, and keys of the second, shuffled where BatchNorm sees a part of the batch."""
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
        self.head = projection_head(features, config.dim, norm=True, hidden=config.hidden)
        self.predictor = projection_head(config.dim, config.dim, norm=True, hidden=config.hidden)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_head = copy.deepcopy(self.head).requires_grad_(False)
        self.loss = BYOLLoss()
        self.momentum = config.momentum

    def begin_step(self) -> None:
        """Moves the target."""
        _follow(self.target_encoder, self.encoder, self.momentum)
        _follow(self.target_head, self.head, self.momentum)

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, ...]:
        """Predictions of both views, then their targets."""
        views = torch.cat([view0, view1])
        with torch.no_grad():
            targets = self.target_head(self.target_encoder(views))
        return (*self.predictor(self.head(self.encoder(views))).chunk(2), *targets.chunk(2))

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        p0, p1, z0, z1 = embeddings
        loss: Tensor = self.loss(p0, z1) + self.loss(p1, z0)
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        p0, p1, z0, z1 = map(l2_normalize, embeddings)
        loss: Tensor = functions.byol(p0, z1) + functions.byol(p1, z0)
        return loss


class MoCoV3(BYOL):
    """MoCo v3 (Chen et al. 2021, arXiv:2104.02057): BYOL's networks, InfoNCE over the batch both ways, and no queue.

    The projection ends with BatchNorm that learns nothing, as in the paper's code for ResNets.
    """

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__(encoder, features, config)
        for head in (self.head, self.target_head):
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
        self.head = projection_head(features, config.dim, norm=True, hidden=config.hidden)
        self.predictor = projection_head(config.dim, config.dim, norm=True, hidden=config.hidden)
        self.loss = NegativeCosineLoss()

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, ...]:
        """Predictions of both views, then their targets."""
        z = self.head(self.encoder(torch.cat([view0, view1])))
        return (*self.predictor(z).chunk(2), *z.detach().chunk(2))

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        p0, p1, z0, z1 = embeddings
        loss: Tensor = (self.loss(p0, z1) + self.loss(p1, z0)) / 2
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        p0, p1, z0, z1 = map(l2_normalize, embeddings)
        loss: Tensor = (functions.negative_cosine(p0, z1) + functions.negative_cosine(p1, z0)) / 2
        return loss


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

    The positive of a view is the other one; its negative is semi-hard among all views of the batch: the nearest that is
    no nearer than the positive, or else the furthest.
    """

    loss: BatchTripletLoss

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__(encoder, features, config)
        margin = 0.2 if config.margin is None else config.margin
        self.loss = BatchTripletLoss(margin, mining="semi-hard", distance="squared")

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        loss: Tensor = self.loss(torch.cat(embeddings), self.loss._numbered(self._images(labels)))
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        z = l2_normalize(torch.cat(embeddings))
        loss: Tensor = functions.triplet_semi_hard(
            z, self._images(labels), margin=self.loss.margin, distance=self.loss.distance
        )
        return loss

    @staticmethod
    def _images(labels: Tensor) -> Tensor:
        return torch.arange(len(labels), device=labels.device).repeat(2)


class CLIP(Method):
    """CLIP (Radford et al. 2021, arXiv:2103.00020): an image and its caption, each by an encoder and a linear layer.

    The temperature is learned: its inverse starts at 1 / 0.07 and is clipped at 100 (section 2.5).
    """

    loss: CLIPLoss

    def __init__(self, encoder: nn.Module, features: int, config: TrainConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, config.dim, bias=False)
        self.text_encoder = TextEncoder(config.text_width, config.text_layers, config.text_context)
        self.text_head = nn.Linear(config.text_width, config.dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.loss = CLIPLoss()
        self.context = config.text_context

    @torch.no_grad()
    def begin_step(self) -> None:
        """Clips the scale: the parameter, so that it can come back."""
        self.log_scale.clamp_(max=math.log(100))

    def forward(self, view0: Tensor, view1: Tensor) -> tuple[Tensor, ...]:
        """One view and tokens ``(B, L)`` to embeddings ``(B, dim)`` each, and the scale ``(B,)``, a copy for each row.

        What the loss learns goes through here, since gradients are averaged over ranks and chunks of what goes out.
        """
        image, text = self.head(self.encoder(view0)), self.text_head(self.text_encoder(view1))
        return image, text, self.log_scale.exp().expand(len(image))

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        image, text, scale = embeddings
        loss: Tensor = self.loss(image, text, scale.mean())
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        image, text, scale = embeddings
        loss: Tensor = functions.clip(l2_normalize(image), l2_normalize(text), scale=scale.mean())
        return loss

    @torch.no_grad()
    def zero_shot(self, features: Tensor, labels: Tensor, classes: Sequence[str]) -> float | None:
        """By the nearest of classes, each the mean of its prompts' embeddings (section 3.1.4)."""
        if not len(classes):
            return None
        texts = tokens(prompts(classes), self.context).to(self.log_scale.device)
        read = torch.cat([self.text_head(self.text_encoder(part)) for part in texts.split(256)])
        names = l2_normalize(l2_normalize(read).unflatten(0, (-1, len(TEMPLATES))).mean(1))
        nearest = pair_argmax(l2_normalize(self.head(features.to(self.log_scale))), names)
        return 100 * (nearest.cpu() == labels).double().mean().item()


def _plain_head(features: int, config: TrainConfig) -> nn.Module:
    """A projection without BatchNorm: linear (MoCo v1), or with a hidden layer."""
    if config.head == "linear":
        return nn.Linear(features, config.dim)
    return projection_head(features, config.dim, hidden=config.hidden)


@torch.no_grad()
def _follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    for of_slow, of_fast in zip(slow.parameters(), fast.parameters(), strict=True):
        of_slow.lerp_(of_fast, 1 - momentum)


METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR, "moco": MoCo, "moco-v3": MoCoV3, "byol": BYOL, "simsiam": SimSiam, "supcon": SupCon,
    "siamese": Siamese, "triplet": Triplet, "clip": CLIP,
}  # fmt: skip


def check_labels(config: TrainConfig, data: Data) -> None:
    """Whether the images have what the method learns from.

    Raises:
        TrainError: images without labels for supcon, or without labels and captions for clip.
    """
    needed = config.method == "supcon" or (config.method == "clip" and data.train.captions is None)
    if needed and bool((data.train.labels < 0).any()):
        expected = "labels for all" if config.method == "supcon" else "captions, or labels for all"
        raise TrainError(
            f"got images without labels in {config.data} for {config.method}; expected {expected}. "
            "Choose another method."
        )
