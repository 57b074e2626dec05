"""What the loop knows of a method, and what a method must find in the data."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor, nn

from .config import TrainConfig
from .data import Data
from .errors import TrainError


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

    def forward(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views ``(B, C, H, W)`` to embeddings ``(B, dim)``: two, then local crops, where the config has some."""
        raise NotImplementedError

    def objective(self, labels: Tensor, *embeddings: Tensor) -> Tensor:
        """The loss of the embeddings of images with these labels ``(B,)``."""
        loss: Tensor = self.loss(*embeddings)
        return loss

    def formula(self, functions: ModuleType, labels: Tensor, *embeddings: Tensor) -> Tensor:
        """The same by ``fastcl.functional`` or ``fastcl.reference``, without moving a queue: to compare."""
        raise NotImplementedError

    def retrieval(self, features: Tensor, texts: Sequence[str]) -> dict[str, float] | None:
        """Recall at 1 in percent among pairs of images, whose ``features`` are the encoder's, and their texts.

        None where the method knows no words.
        """
        return None

    def zero_shot(self, features: Tensor, labels: Tensor, classes: Sequence[str]) -> float | None:
        """Accuracy in percent of naming images, whose ``features`` are the encoder's, by the words for their classes.

        None where the method knows no words, or the images have no classes.
        """
        return None


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
