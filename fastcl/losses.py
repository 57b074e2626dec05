"""Losses as modules: they own hyperparameters, normalisation and state; ``fastcl.functional`` owns the formulas.

Arguments that all modules share:

* ``temperature``: a number above 0, or a 0-d tensor (an ``nn.Parameter`` is learned as it is). With
  ``learn_temperature=True`` it is the start of a learned one, kept as its negative logarithm in the parameter
  ``log_scale`` (so that it stays above 0), and the scale 1 / temperature is clamped to at most 100, as in CLIP.
* ``normalize``: make every row of the input length 1 first. Turn it off only for rows that already are.
* ``reduction``: ``"mean"``, ``"sum"`` or ``"none"``.

Inputs are ``(B, D)`` in float16, bfloat16, float32 or float64; losses are fp32 (fp64 for fp64 rows); gradients have the
dtype of their input. Wrong types raise ``TypeError``, wrong shapes, devices and numbers ``ValueError``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from . import functional as F
from ._checks import Scalar, sentence
from .pairwise import l2_normalize
from .queue import FeatureQueue

_MAX_SCALE = 100.0  # CLIP (Radford et al. 2021, section 2.5) clips its logit scale there


class _Loss(nn.Module):
    """What every loss has: ``normalize`` and ``reduction``."""

    def __init__(self, *, normalize: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        _checks.choice("reduction", reduction, ("mean", "sum", "none"))
        self.normalize = normalize
        self.reduction = reduction

    @property
    def _options(self) -> dict[str, Any]:
        """What every formula in ``functional`` takes."""
        return {"reduction": self.reduction, "normalize": self.normalize}

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}"


class _TemperatureLoss(_Loss):
    def __init__(self, temperature: Scalar = 0.1, *, learn_temperature: bool = False, **options: Any) -> None:
        super().__init__(**options)
        _checks.scalar("temperature", temperature, positive=True)
        self.log_scale: nn.Parameter | None
        if learn_temperature:
            if isinstance(temperature, Tensor):
                raise TypeError(
                    sentence(
                        "learn_temperature=True with a tensor",
                        "a number to start from",
                        "Pass a number, or pass your own nn.Parameter without learn_temperature.",
                    )
                )
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        else:
            self.log_scale = None
            self.given_temperature = temperature  # nn.Module registers it where it is a Parameter

    @property
    def temperature(self) -> Scalar:
        """The temperature in use: a number, or a 0-d tensor where it is learned."""
        if self.log_scale is None:
            return self.given_temperature
        return (-self.log_scale.float().clamp(max=math.log(_MAX_SCALE))).exp()

    def extra_repr(self) -> str:
        shown = "learned" if isinstance(self.temperature, Tensor) else self.temperature
        return f"temperature={shown}, {super().extra_repr()}"


class _TwoViewLoss(_TemperatureLoss):
    def _stack(self, view0: Tensor, view1: Tensor | None) -> Tensor:
        if view1 is None:
            _checks.stacked(view0)
            return view0
        _checks.same_rows(view0=view0, view1=view1)
        return torch.cat([view0, view1])


class NTXentLoss(_TwoViewLoss):
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, eq. 1): :func:`fastcl.functional.nt_xent`.

    Shape:
        Two views of one batch, ``(B, D)`` each, or one stacked ``(2B, D)``, ``[view0; view1]``. A scalar, or ``(2B,)``.

    Example:
        >>> loss = fastcl.NTXentLoss(temperature=0.5)
        >>> loss(model(view0), model(view1)).backward()
    """

    def __init__(self, temperature: Scalar = 0.5, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(self, view0: Tensor, view1: Tensor | None = None) -> Tensor:
        return F.nt_xent(self._stack(view0, view1), temperature=self.temperature, **self._options)


class DCLLoss(_TwoViewLoss):
    """Decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, eq. 6): :func:`fastcl.functional.dcl`.

    Shape:
        Two views ``(B, D)``, or one stacked ``(2B, D)``. A scalar, or ``(2B,)``.
    """

    def forward(self, view0: Tensor, view1: Tensor | None = None) -> Tensor:
        return F.dcl(self._stack(view0, view1), temperature=self.temperature, **self._options)


class InfoNCELoss(_TemperatureLoss):
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4): :func:`fastcl.functional.info_nce`.

    Shape:
        query and key ``(B, D)``; ``negatives (K, D)`` replace the other keys, ``extra_negatives (H, D)`` join them.
        A scalar, or ``(B,)``.
    """

    def __init__(self, temperature: Scalar = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(
        self, query: Tensor, key: Tensor, negatives: Tensor | None = None, *, extra_negatives: Tensor | None = None
    ) -> Tensor:
        return F.info_nce(
            query, key, negatives, temperature=self.temperature, extra_negatives=extra_negatives, **self._options
        )


class MoCoLoss(_TemperatureLoss):
    """MoCo's InfoNCE against a queue that it owns (He et al. 2020, arXiv:1911.05722, eq. 1).

    Args:
        dim: features per row.
        queue_size: keys kept.

    The keys receive no gradient. In training mode they join ``self.queue`` after the loss is computed.

    Shape:
        query and key ``(B, dim)``. A scalar, or ``(B,)``.
    """

    def __init__(self, dim: int, queue_size: int = 65536, temperature: Scalar = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.queue = FeatureQueue(dim, queue_size)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        _checks.same_rows(query=query, key=key)
        query, key = (l2_normalize(t) if self.normalize else t for t in (query, key.detach()))  # the queue holds such
        loss = F.info_nce(query, key, self.queue.features, temperature=self.temperature, reduction=self.reduction)
        if self.training:
            self.queue.enqueue(key)
        return loss


class CLIPLoss(_Loss):
    """CLIP's symmetric InfoNCE (Radford et al. 2021, arXiv:2103.00020, fig. 3): :func:`fastcl.functional.clip`.

    Shape:
        image and text ``(B, D)``; logit_scale a number or a 0-d tensor, already exponentiated. A scalar, or ``(B,)``.
    """

    def forward(self, image: Tensor, text: Tensor, logit_scale: Scalar) -> Tensor:
        return F.clip(image, text, scale=logit_scale, **self._options)


class SigLIPLoss(_Loss):
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, eq. 1): :func:`fastcl.functional.siglip`.

    Shape:
        image and text ``(B, D)``; logit_scale (already exponentiated) and logit_bias numbers or 0-d tensors.
        A scalar, or ``(B,)``.
    """

    def forward(self, image: Tensor, text: Tensor, logit_scale: Scalar, logit_bias: Scalar) -> Tensor:
        return F.siglip(image, text, scale=logit_scale, bias=logit_bias, **self._options)


class SupConLoss(_TemperatureLoss):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, eq. 2): :func:`fastcl.functional.supcon`.

    Shape:
        z ``(N, D)``, or ``(N, V, D)`` for V views of each image; labels ``(N,)`` integers. A scalar, or one value per
        row, ``(N,)`` or ``(N * V,)``, image by image.
    """

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if isinstance(z, Tensor) and z.ndim == 3:
            _checks.vector("labels", labels, z.shape[0], z, integer=True)
            labels = labels.repeat_interleave(z.shape[1])
            z = z.flatten(0, 1)
        return F.supcon(z, labels, temperature=self.temperature, **self._options)
