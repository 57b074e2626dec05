"""Losses as modules: they own hyperparameters, normalisation and state; ``fastcl.functional`` owns the formulas.

Arguments that all modules share:

* ``temperature``: a number above 0, or a 0-d tensor (an ``nn.Parameter`` is learned as it is). With
  ``learn_temperature=True`` it is the start of a learned one, kept as its negative logarithm in the parameter
  ``log_scale`` (so that it stays above 0), and the scale 1 / temperature is clamped to at most 100, as in CLIP.
* ``normalize``: make every row of the input length 1 first. Turn it off only for rows that already are.
* ``reduction``: ``"mean"``, ``"sum"`` or ``"none"``.
* ``process_group``: of torch.distributed; the loss is then over the rows of all its ranks, and equals that of one
  process with all rows: :func:`fastcl.distributed.evaluate`. ``strategy``, ``even`` and ``wire_dtype`` go with it:
  :class:`fastcl.distributed.Ranks`.

Inputs are ``(B, D)`` in float16, bfloat16, float32 or float64; losses are fp32 (fp64 for fp64 rows); gradients have the
dtype of their input. Wrong types raise ``TypeError``, wrong shapes, devices and numbers ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks
from . import functional as F
from ._checks import Scalar, sentence
from .pairwise import joined, l2_normalize
from .queue import FeatureQueue

if TYPE_CHECKING:
    from .distributed import Ranks

_MAX_SCALE = 100.0  # CLIP (Radford et al. 2021, section 2.5) clips its logit scale there


class _Loss(nn.Module):
    """What every loss has: ``normalize`` and ``reduction``, and other ranks."""

    def __init__(
        self, *, normalize: bool = True, reduction: str = "mean", process_group: Any = None, **ranks: Any
    ) -> None:
        super().__init__()
        _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        _checks.flag(normalize=normalize)
        self.normalize = normalize
        self.reduction = reduction
        self.ranks: Ranks | None = None
        if process_group is not None:
            from . import distributed  # takes longer to import than all else, and few need it

            self.ranks = distributed.Ranks(process_group, **ranks)
        elif ranks:
            mend = "Pass process_group=torch.distributed.group.WORLD, or leave them out."
            raise TypeError(sentence(f"{', '.join(ranks)} without process_group", "options of this loss", mend))

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.ranks is None:
            return super().__call__(*args, **options)
        from .distributed import together

        return together(self.ranks, super().__call__, *args, **options)

    def _evaluate(self, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        """A formula over the rows of this process, or of all ranks."""
        if self.ranks is None:
            return function(*args, **options)
        from .distributed import evaluate

        loss: Tensor = evaluate(function, self.ranks, *args, **options)
        return loss

    def _numbered(self, groups: Tensor) -> Tensor:
        """Labels that were made here, which mean something else on other ranks."""
        if self.ranks is None:
            return groups
        from .distributed import told_apart

        return told_apart(groups, self.ranks)

    @property
    def _options(self) -> dict[str, Any]:
        """What every formula in ``functional`` takes."""
        return {"reduction": self.reduction, "normalize": self.normalize}

    def extra_repr(self) -> str:
        ranks = "" if self.ranks is None else f", strategy={self.ranks.strategy!r} over ranks"
        return f"normalize={self.normalize}, reduction={self.reduction!r}{ranks}"


class _TemperatureLoss(_Loss):
    def __init__(self, temperature: Scalar = 0.1, *, learn_temperature: bool = False, **options: Any) -> None:
        super().__init__(**options)
        _checks.scalar("temperature", temperature, positive=True)
        _checks.flag(learn_temperature=learn_temperature)
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
        log_scale = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32))
        return (-log_scale.clamp(max=math.log(_MAX_SCALE))).exp()

    def extra_repr(self) -> str:
        shown = "learned" if isinstance(self.temperature, Tensor) else self.temperature
        return f"temperature={shown}, {super().extra_repr()}"


class _TwoViewLoss(_TemperatureLoss):
    def _stack(self, *views: Tensor | None) -> tuple[Tensor, int]:
        """Views one under the other, and how many. One tensor is either stacked already, or ``(B, V, D)``."""
        given = [view for view in views if view is not None]
        if len(given) > 1:
            _checks.same_rows(**{f"view{i}": view for i, view in enumerate(given)})
            return joined(*given), len(given)
        (z,) = given
        if _holds_views(z):
            return z.transpose(0, 1).flatten(0, 1), z.shape[1]
        _checks.stacked(z)
        return z, 2

    def _two(self, view0: Tensor, view1: Tensor | None) -> Tensor:
        z, views = self._stack(view0, view1)
        if views != 2:
            raise ValueError(sentence(f"{views} views", "two", "Use NTXentLoss or SupConLoss for more views."))
        return z


class NTXentLoss(_TwoViewLoss):
    """NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, eq. 1): :func:`fastcl.functional.nt_xent`.

    Shape:
        Views of one batch, ``(B, D)`` each, or all in one tensor: ``(2B, D)``, ``[view0; view1]``, or ``(B, V, D)``.
        With ``labels`` ``(B,)``, integers, all views of images of one label are positives; then one tensor ``(N, D)``
        with ``(N,)`` labels will do. ``extra_negatives`` ``(K, D)`` join the negatives; images with equal ``ids``
        ``(B,)`` are none. A scalar, or one value per row, view by view.

    Example:
        >>> loss = fastcl.NTXentLoss(temperature=0.5)
        >>> loss(model(view0), model(view1)).backward()
    """

    def __init__(self, temperature: Scalar = 0.5, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(
        self,
        view0: Tensor,
        view1: Tensor | None = None,
        *more_views: Tensor,
        labels: Tensor | None = None,
        extra_negatives: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        z, views = view0, 2
        if labels is None or view1 is not None or _holds_views(view0):
            z, views = self._stack(view0, view1, *more_views)
            if labels is not None:
                _checks.vector("labels", labels, len(view0), view0, integer=True)
                labels = labels.repeat(views)
        return self._evaluate(
            F.nt_xent, z, labels, temperature=self.temperature, views=views,
            extra_negatives=extra_negatives, ids=ids, weights=weights, **self._options,
        )  # fmt: skip


class DCLLoss(_TwoViewLoss):
    """Decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, eq. 6): :func:`fastcl.functional.dcl`.

    Shape:
        Two views ``(B, D)``, or one stacked ``(2B, D)``. A scalar, or ``(2B,)``.
    """

    def forward(self, view0: Tensor, view1: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.dcl, self._two(view0, view1), temperature=self.temperature, weights=weights, **self._options
        )


class DCLWLoss(_TwoViewLoss):
    """DCL with weighted positives (Yeh et al. 2022, arXiv:2110.06848, section 3.3): :func:`fastcl.functional.dclw`.

    Shape:
        Two views ``(B, D)``, or one stacked ``(2B, D)``. A scalar, or ``(2B,)``.
    """

    def __init__(self, temperature: Scalar = 0.1, *, sigma: float = 0.5, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.sigma = sigma

    def forward(self, view0: Tensor, view1: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
        z = self._two(view0, view1)
        return self._evaluate(
            F.dclw, z, temperature=self.temperature, sigma=self.sigma, weights=weights, **self._options
        )


class HardNTXentLoss(_TwoViewLoss):
    """Hard-negative NT-Xent (Robinson et al. 2021, arXiv:2010.04592): :func:`fastcl.functional.hard_nt_xent`.

    With ``beta=0`` it is the debiased loss (Chuang et al. 2020, arXiv:2007.00224).

    Shape:
        Two views ``(B, D)``, or one stacked ``(2B, D)``. A scalar, or ``(2B,)``.
    """

    def __init__(self, temperature: Scalar = 0.5, *, tau_plus: float = 0.1, beta: float = 1.0, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.tau_plus, self.beta = tau_plus, beta

    def forward(self, view0: Tensor, view1: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.hard_nt_xent, self._two(view0, view1), temperature=self.temperature,
            tau_plus=self.tau_plus, beta=self.beta, weights=weights, **self._options,
        )  # fmt: skip


class InfoNCELoss(_TemperatureLoss):
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748, eq. 4): :func:`fastcl.functional.info_nce`.

    Args:
        symmetric, label_smoothing, hardness, own_hardness: those of the function.

    Shape:
        query and key ``(B, D)``; ``negatives (K, D)`` replace the other keys, ``extra_negatives (H, D)`` join them, and
        ``own_negatives (B, H, D)`` join those of their query. A scalar, or ``(B,)``.
    """

    def __init__(
        self,
        temperature: Scalar = 0.07,
        *,
        symmetric: bool = False,
        label_smoothing: float = 0.0,
        hardness: float = 0.0,
        own_hardness: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        self.symmetric, self.label_smoothing = symmetric, label_smoothing
        self.hardness, self.own_hardness = hardness, own_hardness

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        extra_negatives: Tensor | None = None,
        own_negatives: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return self._evaluate(
            F.info_nce, query, key, negatives, temperature=self.temperature,
            extra_negatives=extra_negatives, own_negatives=own_negatives, ids=ids,
            symmetric=self.symmetric, label_smoothing=self.label_smoothing,
            hardness=self.hardness, own_hardness=self.own_hardness, weights=weights, **self._options,
        )  # fmt: skip


class InBatchSoftmaxLoss(_TemperatureLoss):
    """In-batch softmax with the logQ correction (Yi et al. 2019): :func:`fastcl.functional.in_batch_softmax`.

    Args:
        correct_positive: ``False`` corrects negatives only.

    Shape:
        query and key ``(B, D)``, ``log_q`` ``(B,)``, ``ids`` ``(B,)`` integers. A scalar, or ``(B,)``.
    """

    def __init__(self, temperature: Scalar = 0.05, *, correct_positive: bool = True, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.correct_positive = correct_positive

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        log_q: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return self._evaluate(
            F.in_batch_softmax, query, key, temperature=self.temperature, log_q=log_q, ids=ids,
            correct_positive=self.correct_positive, weights=weights, **self._options,
        )  # fmt: skip


class GISTLoss(_TemperatureLoss):
    """GISTEmbed's guided loss (Solatorio 2024, arXiv:2402.16829, eq. 2): :func:`fastcl.functional.gist`.

    Args:
        margin, margin_strategy, contrast_anchors, contrast_positives: those of the function.

    Shape:
        query and key ``(B, D)``, guide_query and guide_key ``(B, G)``; ``negatives (K, D)`` with
        ``guide_negatives (K, G)``. A scalar, or ``(B,)``.
    """

    def __init__(
        self,
        temperature: Scalar = 0.01,
        *,
        margin: float = 0.0,
        margin_strategy: str = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        _checks.choice("margin_strategy", margin_strategy, _checks.MARGIN_STRATEGIES)
        self.margin, self.margin_strategy = margin, margin_strategy
        self.contrast_anchors, self.contrast_positives = contrast_anchors, contrast_positives

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        guide_query: Tensor,
        guide_key: Tensor,
        *,
        negatives: Tensor | None = None,
        guide_negatives: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return self._evaluate(
            F.gist, query, key, guide_query, guide_key, temperature=self.temperature,
            margin=self.margin, margin_strategy=self.margin_strategy, negatives=negatives,
            guide_negatives=guide_negatives, contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives, weights=weights, **self._options,
        )  # fmt: skip


class SampledInfoNCELoss(_TemperatureLoss):
    """InfoNCE of sampled negatives, as in wav2vec 2.0: :func:`fastcl.functional.sampled_info_nce`.

    Shape:
        query ``(M, D)``, table ``(T, D)``; positive ``(M,)`` and negatives ``(M, K)``, integers that point into the
        table. A scalar, or ``(M,)``.
    """

    def forward(
        self, query: Tensor, table: Tensor, positive: Tensor, negatives: Tensor, *, weights: Tensor | None = None
    ) -> Tensor:
        return self._evaluate(
            F.sampled_info_nce,
            query,
            table,
            positive,
            negatives,
            temperature=self.temperature,
            weights=weights,
            **self._options,
        )


class MoCoLoss(_TemperatureLoss):
    """MoCo's InfoNCE against a queue that it owns (He et al. 2020, arXiv:1911.05722, eq. 1).

    Args:
        dim: features per row.
        queue_size: keys kept.

    The keys receive no gradient. Over ranks there is one queue: the keys of all join it, in the same order everywhere.
    In training mode they join ``self.queue`` after the loss is computed. With two queries
    and two keys the loss is symmetric, as in MoCo v2+: the mean of both views looking for the key of the other.

    Shape:
        query and key ``(B, dim)``, or ``query0, key1, query1, key0``: what belongs together follows one another.
        A scalar, or ``(B,)``.
    """

    def __init__(self, dim: int, queue_size: int = 65536, temperature: Scalar = 0.07, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.queue = FeatureQueue(dim, queue_size)
        self._same_queue = False

    def _share_queue(self) -> None:
        """Random rows of rank 0 for all: later, the same keys join it everywhere, in the same order."""
        assert self.ranks is not None
        group = self.ranks.process_group
        for buffer in self.queue.buffers():
            torch.distributed.broadcast(buffer, torch.distributed.get_global_rank(group, 0), group=group)
        self._same_queue = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        query1: Tensor | None = None,
        key1: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        if (query1 is None) != (key1 is None):
            raise ValueError(sentence("one of query1 and key1", "both or neither", "Pass both for a symmetric loss."))
        pairs = {"query": query, "key": key}
        if query1 is not None and key1 is not None:
            pairs |= {"query1": query1, "key1": key1}
        _checks.same_rows(**pairs)
        rows = list(pairs.values())
        queries, keys = rows[::2], [k.detach() for k in rows[1::2]]
        if self.normalize:  # the queue holds such
            queries, keys = [l2_normalize(q) for q in queries], [l2_normalize(k) for k in keys]
        if self.ranks is not None and not self._same_queue:
            self._share_queue()
        losses = [
            self._evaluate(
                F.info_nce, q, k, self.queue.features,
                temperature=self.temperature, weights=weights, reduction=self.reduction,
            )
            for q, k in zip(queries, keys, strict=True)
        ]  # fmt: skip
        if self.ranks is not None:
            from .distributed import all_rows

            keys = [all_rows(k, self.ranks.process_group, even=self.ranks.even) for k in keys]
        if self.training:
            self.queue.enqueue(joined(*keys))
        return torch.stack(losses).mean(0)


class MoCoV3Loss(_TemperatureLoss):
    """MoCo v3's symmetric in-batch loss (Chen et al. 2021, arXiv:2104.02057): :func:`fastcl.functional.moco_v3`.

    Shape:
        query0, query1 ``(B, D)`` predictions, key0, key1 ``(B, D)`` of the momentum encoder. A scalar, or ``(B,)``.
    """

    def __init__(self, temperature: Scalar = 0.2, **options: Any) -> None:
        super().__init__(temperature, **options)

    def forward(
        self, query0: Tensor, query1: Tensor, key0: Tensor, key1: Tensor, *, weights: Tensor | None = None
    ) -> Tensor:
        return self._evaluate(
            F.moco_v3, query0, query1, key0, key1, temperature=self.temperature, weights=weights, **self._options
        )


class CLIPLoss(_Loss):
    """CLIP's symmetric InfoNCE (Radford et al. 2021, arXiv:2103.00020, fig. 3): :func:`fastcl.functional.clip`.

    Shape:
        image and text ``(B, D)``; logit_scale a number or a 0-d tensor, already exponentiated; pairs with equal ``ids``
        ``(B,)`` are no negatives of each other. A scalar, or ``(B,)``.
    """

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Scalar,
        *,
        text_scale: Scalar | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return self._evaluate(
            F.clip, image, text, scale=logit_scale, text_scale=text_scale, ids=ids, weights=weights, **self._options
        )


class SigLIPLoss(_Loss):
    """SigLIP's pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, eq. 1): :func:`fastcl.functional.siglip`.

    Shape:
        image and text ``(B, D)``; logit_scale (already exponentiated) and logit_bias numbers or 0-d tensors; pairs with
        equal ``ids`` ``(B,)`` are no negatives of each other. A scalar, or ``(B,)``.
    """

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Scalar,
        logit_bias: Scalar,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        return self._evaluate(
            F.siglip, image, text, scale=logit_scale, bias=logit_bias, ids=ids, weights=weights, **self._options
        )


class SupConLoss(_TemperatureLoss):
    """Supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362, eq. 2, 3): :func:`fastcl.functional.supcon`.

    Args:
        form: ``"out"`` or ``"in"``.
        contrast_mode: ``"all"`` rows are anchors, or ``"one"``: the first view of each image.
        base_temperature: multiplies the loss by temperature / base_temperature.

    Shape:
        z ``(N, D)``, or ``(N, V, D)`` for V views of each image. Labels ``(N,)`` integers; or a ``mask`` ``(N, N)``
        that says which belong together, which has to be an equivalence (its values are read from the device); or
        neither: then the views of one image. A scalar, or one value per row, ``(N,)`` or ``(N * V,)``, image by image.

    Raises:
        ValueError: a mask by which a is like b and b like c, but a not like c.
    """

    def __init__(
        self,
        temperature: Scalar = 0.1,
        *,
        form: str = "out",
        contrast_mode: str = "all",
        base_temperature: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        _checks.choice("form", form, _checks.FORMS)
        _checks.choice("contrast_mode", contrast_mode, ("all", "one"))
        self.form, self.contrast_mode, self.base_temperature = form, contrast_mode, base_temperature

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        stacked = _holds_views(z)
        _checks.rows(z=z[:, :1].flatten(0, 1) if stacked else z)
        views = z.shape[1] if stacked else 1
        n = len(z)
        if labels is not None and mask is not None:
            raise ValueError(
                sentence("labels and a mask", "one of the two", "Pass one: both say which rows belong together.")
            )
        if mask is not None:
            labels = self._numbered(_classes(mask, z))
        elif labels is None:
            labels = self._numbered(torch.arange(n, device=z.device))
        else:
            _checks.vector("labels", labels, n, z, integer=True)
        options: dict[str, Any] = {
            "form": self.form,
            "base_temperature": self.base_temperature,
            "temperature": self.temperature,
        }
        if views == 1 and z.ndim == 2:
            return self._evaluate(F.supcon, z, labels, weights=weights, **options, **self._options)
        if self.contrast_mode == "one":  # first views come first
            z, labels = z.transpose(0, 1).flatten(0, 1), labels.repeat(views)
            return self._evaluate(F.supcon, z, labels, anchors=n, weights=weights, **options, **self._options)
        z, labels = z.flatten(0, 1), labels.repeat_interleave(views)
        return self._evaluate(F.supcon, z, labels, weights=weights, **options, **self._options)


class SINCERELoss(_TemperatureLoss):
    """SINCERE (Feeney & Hughes 2023, arXiv:2309.14277, eq. 6): :func:`fastcl.functional.sincere`.

    Shape:
        z ``(N, D)``, labels ``(N,)`` integers. A scalar, or ``(N,)``.
    """

    def forward(self, z: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(F.sincere, z, labels, temperature=self.temperature, weights=weights, **self._options)


class MultiSimilarityLoss(_Loss):
    """Multi-similarity loss (Wang et al. 2019, arXiv:1904.06627, eq. 15): :func:`fastcl.functional.multi_similarity`.

    Args:
        alpha, beta, base, epsilon: those of the function; ``epsilon=None`` does no mining.

    Shape:
        z ``(N, D)``, labels ``(N,)`` integers. A scalar, or ``(N,)``.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        epsilon: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    def forward(self, z: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.multi_similarity, z, labels, alpha=self.alpha, beta=self.beta, base=self.base, epsilon=self.epsilon,
            weights=weights, **self._options,
        )  # fmt: skip


class BatchTripletLoss(_Loss):
    """Triplet loss of the triplets of a batch (Hermans et al. 2017; Schroff et al. 2015).

    Args:
        margin: in the unit of the distance; ``None`` is the soft margin, not for ``"all"``.
        mining: ``"hard"`` :func:`fastcl.functional.triplet_hard`, ``"semi-hard"``
            :func:`fastcl.functional.triplet_semi_hard`, or ``"all"`` :func:`fastcl.functional.triplet_all`.
        distance: ``"euclidean"``, ``"squared"`` or ``"cosine"``.

    Shape:
        z ``(N, D)``, labels ``(N,)`` integers. A scalar, or what the function gives for ``reduction="none"``.
    """

    def __init__(
        self,
        margin: float | None = 0.2,
        *,
        mining: str = "hard",
        distance: str = "euclidean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _checks.choice("mining", mining, ("hard", "semi-hard", "all"))
        _checks.choice("distance", distance, _checks.DISTANCES)
        self.margin, self.mining, self.distance = margin, mining, distance

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        function = {"hard": F.triplet_hard, "semi-hard": F.triplet_semi_hard, "all": F.triplet_all}[self.mining]
        return self._evaluate(function, z, labels, margin=self.margin, distance=self.distance, **self._options)


class TripletLoss(_Loss):
    """Triplet loss of given triplets (Schroff et al. 2015, arXiv:1503.03832, eq. 2): :func:`fastcl.functional.triplet`.

    Args:
        margin: in the unit of the distance; ``None`` is the soft margin.
        distance: ``"euclidean"``, ``"squared"`` or ``"cosine"``.
        swap: use the distance of positive and negative where it is smaller.

    Shape:
        anchor, positive, negative ``(B, D)``. A scalar, or ``(B,)``.
    """

    def __init__(
        self,
        margin: float | None = 0.2,
        *,
        distance: str = "euclidean",
        swap: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        _checks.choice("distance", distance, _checks.DISTANCES)
        self.margin, self.distance, self.swap = margin, distance, swap

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.triplet, anchor, positive, negative, margin=self.margin, distance=self.distance, swap=self.swap,
            weights=weights, **self._options,
        )  # fmt: skip


class SiameseLoss(_Loss):
    """Contrastive loss of a siamese network (Hadsell et al. 2006, eq. 4): :func:`fastcl.functional.siamese`.

    Args:
        margin: in the unit of the distance.
        distance: ``"euclidean"``, ``"squared"`` or ``"cosine"``.

    Shape:
        a, b ``(B, D)``, similar ``(B,)`` integers, 1 for a similar pair. A scalar, or ``(B,)``.
    """

    def __init__(self, margin: float = 1.0, *, distance: str = "euclidean", **options: Any) -> None:
        super().__init__(**options)
        _checks.choice("distance", distance, _checks.DISTANCES)
        self.margin, self.distance = margin, distance

    def forward(self, a: Tensor, b: Tensor, similar: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.siamese, a, b, similar, margin=self.margin, distance=self.distance, weights=weights, **self._options
        )


class NPairLoss(_Loss):
    """Multi-class N-pair loss (Sohn 2016, eq. 7): :func:`fastcl.functional.n_pair`. It does not normalise by default.

    Shape:
        query and key ``(B, D)``, of any length. A scalar, or ``(B,)``.
    """

    def __init__(self, l2: float = 0.0, *, normalize: bool = False, **options: Any) -> None:
        super().__init__(normalize=normalize, **options)
        self.l2 = l2

    def forward(self, query: Tensor, key: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(F.n_pair, query, key, l2=self.l2, weights=weights, **self._options)


class NegativeCosineLoss(_Loss):
    """SimSiam's negative cosine (Chen & He 2021, arXiv:2011.10566): :func:`fastcl.functional.negative_cosine`.

    Shape:
        predictions p and targets z ``(B, D)``. A scalar, or ``(B,)``.
    """

    def forward(self, p: Tensor, z: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(F.negative_cosine, p, z, weights=weights, **self._options)


class BYOLLoss(_Loss):
    """BYOL's squared distance (Grill et al. 2020, arXiv:2006.07733, eq. 2): :func:`fastcl.functional.byol`.

    Shape:
        predictions p and targets z ``(B, D)``; targets receive no gradient. A scalar, or ``(B,)``.
    """

    def forward(self, p: Tensor, z: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(F.byol, p, z, weights=weights, **self._options)


class CosFaceLoss(_Loss):
    """CosFace over one learned proxy per class (Wang et al. 2018, arXiv:1801.09414): :func:`fastcl.functional.cosface`.

    Args:
        classes, dim: shape of the parameter ``proxies`` ``(classes, dim)``.
        scale: of the cosines.
        margin: taken from the cosine of the own class; 0 is the normalised softmax.

    Shape:
        z ``(N, dim)``, labels ``(N,)`` integers below ``classes``. A scalar, or ``(N,)``.
    """

    def __init__(self, classes: int, dim: int, *, scale: float = 64.0, margin: float = 0.35, **options: Any) -> None:
        super().__init__(**options)
        for name, value in (("classes", classes), ("dim", dim)):
            _checks.count(name, value)
        self.scale, self.margin = scale, margin
        self.proxies = nn.Parameter(nn.functional.normalize(torch.randn(classes, dim), dim=1))

    def forward(self, z: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
        return self._evaluate(
            F.cosface, z, self.proxies, labels, scale=self.scale, margin=self.margin, weights=weights, **self._options
        )


def _holds_views(z: Tensor) -> bool:
    """Whether one tensor holds several views of each image, ``(B, V, D)``."""
    return isinstance(z, Tensor) and z.ndim == 3


def _classes(mask: Tensor, z: Tensor) -> Tensor:
    """Labels of the classes of an equivalence, the first row of each; what is none is refused."""
    n = len(z)
    if not isinstance(mask, Tensor) or mask.shape != (n, n):
        got = f"mask of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"mask of {type(mask).__name__}"
        raise ValueError(sentence(got, f"shape ({n}, {n}): which rows belong together", "Pass that, or labels."))
    like = mask != 0
    labels = like.to(z.device, torch.uint8).argmax(1) if n else torch.zeros(0, dtype=torch.long, device=z.device)
    if not torch.equal(like.to(z.device), labels[:, None] == labels):
        mend = "Pass labels, or a class for each group: positives are classes here, so that no matrix is needed."
        expected = "an equivalence: every row like itself, and where a is like b and b like c, a like c"
        raise ValueError(sentence("a mask that is none of classes", expected, mend))
    return labels
