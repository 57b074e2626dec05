"""Drop-in for ``losses.py`` of SupContrast: ``from fastcl.integrations.sup_contrast import SupConLoss``.

The repository is copied, not installed, so the class stands alone. What differs: no matrix of similarities is stored
(a ``mask`` is one of images, not of views); labels may be integers or floats, and are compared on the device of the
features; a batch of a single row has loss 0 where the original's is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from .. import functional as F
from .._checks import Scalar, sentence
from ..functional._arguments import inverse, operand
from ..pairwise import pair_logsumexp, row_dot

UPSTREAM = "losses"
ORIGIN = "put losses.py of github.com/HobbitLong/SupContrast on the path"

__all__ = ["SupConLoss"]


class SupConLoss(nn.Module):
    """Supervised contrastive loss of several views: :func:`fastcl.functional.supcon`.

    Attributes:
        temperature: a number, or a 0-d tensor.
        contrast_mode: ``"all"`` views are anchors, or ``"one"``: the first of each image.
        base_temperature: the loss is multiplied by temperature / base_temperature.
    """

    def __init__(self, temperature: Scalar = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The mean over all anchors, of which those without a positive have loss 0, as in the original.

        Args:
            features: ``(B, V, ...)``, V views of B images, of length 1 once flattened to ``(B, V, D)``.
            labels: ``(B,)``; images with equal labels are positives of each other. Without labels and mask the
                positives of a view are the other views of its image.
            mask: ``(B, B)``; how much image j is a positive of image i: 0 and 1, or weights. Need not be symmetric.

        Returns:
            A scalar, fp32 (fp64 for fp64 features).

        Raises:
            TypeError: features, labels or a mask that are no tensors.
            ValueError: shapes that do not fit, labels and mask together, an unknown ``contrast_mode``.
        """
        _checks.tensor("features", features, "(images, views, ...)")
        _checks.scalar("base_temperature", self.base_temperature, positive=True)
        if features.ndim < 3:
            got = f"features of shape {tuple(features.shape)}"
            raise ValueError(sentence(got, "(images, views, ...)", "Use features.unsqueeze(1) for a single view."))
        if labels is not None and mask is not None:
            raise ValueError(
                sentence("labels and mask", "one of the two", "Omit labels: a mask says all that they say.")
            )
        if self.contrast_mode not in ("all", "one"):
            got = f"contrast_mode = {self.contrast_mode!r}"
            raise ValueError(sentence(got, "'all' or 'one'", "Say which views are anchors."))
        features = features.flatten(2)
        batch, views, width = features.shape
        z = features.transpose(0, 1).reshape(views * batch, width)  # view by view
        anchors = batch if self.contrast_mode == "one" else views * batch
        if mask is not None:
            return self._of_mask(z, mask, batch, views, anchors)
        if labels is None:
            if views == 2 and anchors == len(z):
                return F.nt_xent(z, temperature=self.temperature) * (self.temperature / self.base_temperature)
            image = torch.arange(batch, device=z.device)
        else:
            image = _integers(labels, batch).to(z.device)
        total = F.supcon(
            z, image.repeat(views), temperature=self.temperature, base_temperature=self.base_temperature,
            anchors=None if anchors == len(z) else anchors, reduction="sum",
        )  # fmt: skip
        return total / max(anchors, 1)

    def _of_mask(self, z: Tensor, mask: Tensor, batch: int, views: int, anchors: int) -> Tensor:
        """The sum of a row's positive logits is linear in their rows, so it needs sums over views and no logits."""
        _checks.tensor("mask", mask, "(images, images)")
        if mask.shape != (batch, batch):
            got = f"mask of shape {tuple(mask.shape)}"
            raise ValueError(sentence(got, f"({batch}, {batch})", "Pass a row per image, not per view."))
        scale, rows = inverse(self.temperature, z), operand(z)
        mask = mask.to(rows.device, rows.dtype)
        itself = mask.diagonal()[:, None]  # a row is no positive of its own: it was summed with the views of its image
        with torch.autocast(z.device.type, enabled=False):
            sums = mask @ rows.view(views, batch, -1).sum(0)
            positives = sums.repeat(anchors // max(batch, 1), 1)
            itself = itself.repeat(anchors // max(batch, 1), 1)
            p = row_dot(rows[:anchors], positives - itself * rows[:anchors]) * scale
        count = views * mask.sum(1).repeat(anchors // max(batch, 1)) - itself.squeeze(1)
        own = torch.arange(len(z), device=z.device)
        if anchors == len(z):
            n = pair_logsumexp(z, scale=scale, drop=own)
        else:
            n = pair_logsumexp(z[:anchors], z, scale=scale, drop=(own[:anchors], own))
        n = torch.where(n == -torch.inf, 0, n)  # of a row alone
        loss = (count * n - p) / torch.where(count < 1e-6, 1, count)
        return loss.sum() / max(anchors, 1) / (scale * self.base_temperature)


def _integers(labels: Tensor, batch: int) -> Tensor:
    """Labels of any shape that holds one per image, and of any dtype, as ``(B,)`` integers."""
    _checks.tensor("labels", labels, "of one label per image")
    labels = labels.reshape(-1)
    if len(labels) != batch:
        got = f"{len(labels)} labels for {batch} images"
        raise ValueError(sentence(got, "one label per image", "Pass each once, not once per view."))
    if labels.is_floating_point():
        return labels.unique(return_inverse=True)[1]
    return labels.long() if labels.dtype == torch.bool else labels
