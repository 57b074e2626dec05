"""Drop-ins for ``open_clip.loss``: change ``from open_clip import`` to ``from fastcl.integrations.open_clip import``.

On many ranks with open_clip's defaults (``local_loss=False, gather_with_grad=False``) every rank computes the loss of
the global batch but sends gradients to its own features only, so that DDP's average is 1 / world_size of the
gradient. Here it is the gradient; ``strict=True`` keeps open_clip's. With ``local_loss=True, gather_with_grad=False``
features of other ranks receive no gradient from this one, which is what these options say: that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import functional as F
from ..pairwise import pair_logsumexp, pair_softplus_total, row_dot, scale_gradient
from ._dropin import DropIn, as_original, image_ids, upstream

UPSTREAM = "open_clip.loss"
ORIGIN = "pip install open_clip_torch"
_loss: Any = upstream(UPSTREAM, ORIGIN)

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss"]


class ClipLoss(DropIn, _loss.ClipLoss):
    """CLIP's loss: :func:`fastcl.functional.clip`. A ``logit_bias`` changes nothing, and receives gradient 0."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """``(B, D)`` features as open_clip's models give them, of length 1; a scalar, or a dict of it."""
        if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        scale = _number(logit_scale)
        if self.world_size == 1:
            loss = F.clip(image_features, text_features, scale=scale)
        elif self.local_loss:
            loss = self._of_this_rank(image_features, text_features, scale)
        else:
            if not (self.gather_with_grad or self.strict):
                image_features, text_features = (
                    scale_gradient(features, self.world_size) for features in (image_features, text_features)
                )
            loss = F.clip(*self._everyone(image_features, text_features), scale=scale)
        loss = as_original(loss, image_features, text_features)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum()  # DDP waits for a gradient of every parameter
        return {"contrastive_loss": loss} if output_dict else loss

    def _everyone(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        gathered: tuple[Tensor, Tensor] = _loss.gather_features(
            image, text, local_loss=self.local_loss, gather_with_grad=self.gather_with_grad,
            rank=self.rank, world_size=self.world_size, use_horovod=self.use_horovod,
        )  # fmt: skip
        return gathered

    def _of_this_rank(self, image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
        """Images of this rank look for their texts among those of all, and the reverse."""
        images, texts = self._everyone(image, text)
        ids = image_ids(len(image), self.rank, self.world_size, image.device)
        loss = image.new_zeros((), dtype=torch.float32)
        for own, others in ((image, texts), (text, images)):
            # through the gathered rows, which alone decide whether keys receive a gradient
            partner = others[ids[0]]
            negatives = pair_logsumexp(own, others, scale=scale, drop=ids)
            loss = loss - logsigmoid(row_dot(own, partner) * scale - negatives).mean() / 2
        return loss


class CoCaLoss(ClipLoss, DropIn, _loss.CoCaLoss):
    """CoCa's: CLIP's loss and that of the captions, which is a cross-entropy over words."""

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """As :class:`ClipLoss`, with ``(B, length, words)`` logits and ``(B, length)`` words; a pair, or a dict."""
        contrastive = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        caption = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


class SigLipLoss(DropIn, _loss.SigLipLoss):
    """SigLIP's loss: :func:`fastcl.functional.siglip`. Texts travel between ranks as open_clip sends them."""

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        scale, bias = _number(logit_scale), _number(0.0 if logit_bias is None else logit_bias)
        if negative_only:
            total = pair_softplus_total(image_features, text_features, scale=scale, row_bias=bias)
            loss = total / len(image_features)
        else:
            loss = F.siglip(image_features, text_features, scale=scale, bias=bias)
        return as_original(loss, image_features, text_features)


def _number(value: Tensor | float) -> Tensor | float:
    """A parameter of one element as a 0-d tensor."""
    return value.reshape(()) if isinstance(value, Tensor) else value
