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
        if not len(classes) or bool((labels < 0).any()):
            return None
        names = l2_normalize(self._read(prompts(classes)).unflatten(0, (-1, len(TEMPLATES))).mean(1))
        return 100 * (pair_argmax(self._seen(features), names).cpu() == labels).double().mean().item()

    @torch.no_grad()
    def retrieval(self, features: Tensor, texts: Sequence[str]) -> dict[str, float]:
        """By the nearest text of an image, and the nearest image of a text; equal texts count alike."""
        images, words = self._seen(features), self._read(texts)
        recall = {}
        for way, queries, keys in (("image_to_text", images, words), ("text_to_image", words, images)):
            found = pair_argmax(queries, keys).tolist()
            recall[way] = 100 * sum(texts[i] == texts[j] for i, j in enumerate(found)) / len(texts)
        return recall

    def _seen(self, features: Tensor) -> Tensor:
        return l2_normalize(self.head(features.to(self.log_scale)))

    def _read(self, texts: Sequence[str]) -> Tensor:
        rows = tokens(texts, self.context).to(self.log_scale.device)
        return l2_normalize(torch.cat([self.text_head(self.text_encoder(part)) for part in rows.split(256)]))
