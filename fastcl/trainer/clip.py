"""CLIP: images and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from ..losses import CLIPLoss
from ..pairwise import l2_normalize, pair_argmax
from .config import TrainConfig
from .method import Method
from .text import TEMPLATES, TextEncoder, prompts, tokens


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

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """One view and tokens ``(B, L)`` to embeddings ``(B, dim)`` each, and the scale ``(B,)``, a copy for each row.

        What the loss learns goes through here, since gradients are averaged over ranks and chunks of what goes out.
        """
        view, tokens = views
        image, text = self.head(self.encoder(view)), self.text_head(self.text_encoder(tokens))
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
