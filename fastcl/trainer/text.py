"""Text for CLIP without a download: captions, their bytes as tokens, and a transformer that reads them.

Radford et al. 2021, arXiv:2103.00020, on a smaller scale: sections 2.4 (the transformer) and 3.1.4 (prompts). Where a
data set has no captions, they are written from the names of classes: the encoder sees labels then, as that of supcon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .augment import uniform
from .data import Data

TEMPLATES = (
    "a photo of a {}",
    "a picture of the {}",
    "an image that shows a {}",
    "a small photo of a {}",
    "this is a {}",
)
HEAD_WIDTH = 32  # features of an attention head
_BEGIN, _END, _PAD = 256, 257, 258  # after the 256 bytes
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def captions(data: Data, at: Tensor, seed: int, epoch: int) -> list[str]:
    """A caption for each of the training images ``at`` ``(B,)``: its own, or of a random template and its class.

    The template is a function of the seed, the epoch and the image.
    """
    if data.train.captions is not None:
        return [data.train.captions[i] for i in at.tolist()]
    drawn = (uniform(("caption", seed, epoch), at, 1)[:, 0] * len(TEMPLATES)).long().tolist()
    labels = data.train.labels[at].tolist()
    return [TEMPLATES[i].format(_name(data.classes[label])) for i, label in zip(drawn, labels, strict=True)]


def prompts(classes: Sequence[str]) -> list[str]:
    """Every template for the first class, then for the next: ``len(classes) * len(TEMPLATES)`` captions."""
    return [template.format(_name(name)) for name in classes for template in TEMPLATES]


def tokens(texts: Sequence[str], context: int) -> Tensor:
    """UTF-8 bytes between a begin and an end token, filled up: ``(B, L)`` int64, L that of the longest.

    Args:
        context: the largest L; a longer text loses its last bytes, not the end token.
    """
    rows = [torch.tensor([_BEGIN, *text.encode(errors="replace")[: context - 2], _END]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_PAD)


class TextEncoder(nn.Module):
    """A transformer with normalisation before each layer; a token sees those before it, so none sees what fills up.

    Shape:
        tokens ``(B, L)``, at most ``context``, to the features of the end token ``(B, width)``.
    """

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(_PAD + 1, width)
        self.position = nn.Parameter(torch.empty(context, width))
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        # CLIP's deviations, in its code: the stream of a pre-norm transformer starts small, so that layers count
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        seen = self.token(tokens) + self.position[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=seen.device, dtype=seen.dtype)
        read: Tensor = self.transformer(seen, mask=mask, is_causal=True)
        return read[torch.arange(len(tokens), device=tokens.device), (tokens == _END).int().argmax(1)]


def _name(name: str) -> str:
    """A class as a caption calls it: a digit in words, and no underscores."""
    return _DIGITS[int(name)] if name in tuple("0123456789") else name.replace("_", " ")
